//! Damage of the disk and of the registry: reported, left out, and the rest is served.

use std::os::unix::fs::FileExt as _;

use super::*;
use crate::registry::SubjectRecord;

impl Home {
    /// Enrols somebody whose template cannot be opened, as if a bit had flipped in the registry.
    fn enrol_damaged(&mut self, name: &str) {
        let subject = testing::subject(name);
        let mut sealed = self.sealer.seal(name, Hand::Right, &TemplateRow([f16::ONE; DIM].into()));
        sealed[DIM] ^= 4;
        let templates = vec![SealedTemplate { hand: Hand::Right, sealed }];
        let change = self.change(Action::Enrol { subject, source: Source::Person, templates });
        self.commit(&[change]).unwrap();
    }

    fn subject(&self, name: &str) -> SubjectRecord {
        self.registry.subject(&testing::subject(name)).unwrap().expect("the subject is on record")
    }

    /// Stops the gallery, lets `damage` happen to its files, and opens it again.
    fn reopened(mut self, damage: impl FnOnce(&std::path::Path)) -> Self {
        self.gallery.checkpoint().unwrap();
        self.engine = watching();
        let (setup, engine) = (self.setup(), Arc::clone(&self.engine));
        let old = Arc::into_inner(self.gallery).expect("nobody else has it");
        drop(old);
        damage(&setup.dir);
        self.gallery = Arc::new(Gallery::open(setup, engine as _, None).unwrap());
        self.engine.gallery.set(Arc::downgrade(&self.gallery)).unwrap();
        self
    }

    fn assert_all_but(&self, left_out: u64, live: u64) {
        let status = self.gallery.status();
        assert_eq!((status.left_out, status.templates), (left_out, live));
        assert_eq!(self.registry.counts().unwrap().templates, live + left_out);
        self.assert_content();
    }
}

fn segment(dir: &std::path::Path) -> std::fs::File {
    std::fs::File::options().read(true).write(true).open(dir.join("seg-00000000.idx")).unwrap()
}

#[test]
fn a_template_that_does_not_open_is_left_out_and_everybody_else_is_served() {
    let mut home = Home::new();
    home.enrol(0..20);
    home.enrol_damaged("torn");
    home.enrol(20..40);
    home.assert_all_but(1, 40);
    let number = SubjectNumber(home.subject("torn").number.0);
    assert!(home.gallery.snapshot().unwrap().rows_of(number).is_empty());

    // It is known after a restart over a sound index, too.
    let home = home.reopened(|_| {});
    assert_eq!((home.gallery.opened.replayed, home.gallery.opened.segments_rebuilt), (0, 0));
    home.assert_all_but(1, 40);
    // When a segment is rewritten, and when the index is rebuilt.
    let home = home.reopened(|dir| {
        let (file, mut byte) = (segment(dir), [0]);
        file.read_exact_at(&mut byte, 4096 + 5 * 128).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 4096 + 5 * 128).unwrap();
    });
    assert_eq!(home.gallery.opened.segments_rebuilt, 1);
    home.assert_all_but(1, 40);
    let mut home = home.reopened(|dir| std::fs::remove_file(dir.join("MANIFEST")).unwrap());
    assert!(home.gallery.opened.rebuilt_because.is_some());
    home.assert_all_but(1, 40);

    // And it can be forgotten.
    let change = home.change(testing::forget("torn"));
    home.commit(&[change]).unwrap();
    home.assert_all_but(0, 40);
    home.reopened(|_| {}).assert_all_but(0, 40);
}

#[test]
fn a_template_that_cannot_even_be_read_is_left_out_as_well() {
    let mut home = Home::new();
    home.enrol(0..20);
    let registry = home.folder.path().join("registry.sqlite");
    let home = home.reopened(|dir| {
        // The name of one is no longer text, and the bytes of another are missing.
        let database = rusqlite::Connection::open(&registry).unwrap();
        let flipped = "UPDATE slots SET content = x'ff' WHERE slot = (SELECT slot FROM subjects WHERE number = 3)";
        let lost = "UPDATE templates SET slot = 1000000 WHERE subject = 5";
        assert_eq!([flipped, lost].map(|sql| database.execute(sql, []).unwrap()), [1, 1]);
        std::fs::remove_file(dir.join("MANIFEST")).unwrap();
    });
    home.assert_all_but(2, 18);
    home.reopened(|_| {}).assert_all_but(2, 18);
}
