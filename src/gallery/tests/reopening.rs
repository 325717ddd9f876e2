//! An index that failed, or could not get what it needed, while searches go on.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use thenar_index::Map;
use thenar_index::storage::{Files, StoredFile};

use super::*;

/// The operating system's error if the process may open no more files.
const EMFILE: i32 = 24;

/// The real files, with faults.
#[derive(Debug, Default, Clone)]
struct Faulty(Arc<Faults>);

#[derive(Default)]
struct Faults {
    /// How many more writes fail.
    writes: AtomicUsize,
    /// Whether nothing can be opened, created or listed.
    no_descriptors: AtomicBool,
    /// How often the folder was listed. Every opening begins with that.
    listed: AtomicUsize,
    /// Called the next time it is listed.
    on_list: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faults")
    }
}

impl Faults {
    fn descriptor(&self) -> io::Result<()> {
        let none = self.no_descriptors.load(Ordering::SeqCst);
        if none { Err(io::Error::from_raw_os_error(EMFILE)) } else { Ok(()) }
    }

    fn listed(&self) -> usize {
        self.listed.load(Ordering::SeqCst)
    }
}

impl Faulty {
    fn file(&self, real: Box<dyn StoredFile>) -> Box<dyn StoredFile> {
        Box::new(FaultyFile { real, faults: Arc::clone(&self.0) })
    }
}

impl Storage for Faulty {
    fn create(&self, path: &Path) -> io::Result<Box<dyn StoredFile>> {
        self.0.descriptor()?;
        Ok(self.file(Files.create(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn StoredFile>> {
        self.0.descriptor()?;
        Ok(self.file(Files.open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Files.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        Files.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.descriptor()?;
        Files.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.0.listed.fetch_add(1, Ordering::SeqCst);
        if let Some(call) = self.0.on_list.lock().take() {
            call();
        }
        self.0.descriptor()?;
        Files.list(dir)
    }

    fn fresh_identity(&self) -> u64 {
        Files.fresh_identity()
    }
}

#[derive(Debug)]
struct FaultyFile {
    real: Box<dyn StoredFile>,
    faults: Arc<Faults>,
}

impl StoredFile for FaultyFile {
    fn size(&self) -> io::Result<u64> {
        self.real.size()
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.real.read_at(bytes, at)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let failing = self.faults.writes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if failing.is_ok() { Err(io::Error::other("a bad disk")) } else { self.real.write_at(bytes, at) }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.real.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.real.sync()
    }

    fn map(&self, len: usize) -> io::Result<Map> {
        self.real.map(len)
    }
}

fn home() -> (Home, Arc<Faults>) {
    let disk = Faulty::default();
    (Home::on(Arc::new(disk.clone())), disk.0)
}

impl Home {
    /// Enrols people in the registry whom the gallery cannot take.
    fn fails_to_enrol(&mut self, people: std::ops::Range<u32>) -> GalleryError {
        self.try_enrol(people).expect_err("the disk is bad")
    }

    fn live(&self) -> u64 {
        self.gallery.snapshot().expect("the index is not lost").live()
    }
}

#[test]
fn an_index_that_failed_is_opened_again_under_searches_that_run() {
    let (mut home, faults) = home();
    home.enrol(0..50);
    faults.writes.store(1, Ordering::SeqCst);
    home.fails_to_enrol(50..60);
    assert_eq!(home.live(), 50);
    let (held, gallery) = (home.gallery.snapshot(), Arc::clone(&home.gallery));
    *faults.on_list.lock() = Some(Box::new(move || {
        let reader = gallery.reader.try_read().expect("searches go on while the files are checked");
        assert_eq!(reader.as_ref().map(|reader| reader.snapshot().live()), Some(50));
        drop(held);
    }));
    home.enrol(60..70);
    assert!(faults.on_list.lock().is_none(), "it was opened again");
    assert_eq!(home.live(), 70);
    home.assert_content();
}

#[test]
fn searches_go_on_over_the_old_index_if_it_cannot_be_checked() {
    let (mut home, faults) = home();
    home.enrol(0..50);
    faults.writes.store(1, Ordering::SeqCst);
    home.fails_to_enrol(50..60);
    faults.no_descriptors.store(true, Ordering::SeqCst);
    for round in 6..9 {
        let error = home.fails_to_enrol(round * 10..round * 10 + 10).to_string();
        assert!(error.contains("could not list"), "{error}");
        assert_eq!(home.live(), 50);
    }
    faults.no_descriptors.store(false, Ordering::SeqCst);
    home.enrol(90..91);
    assert_eq!(home.live(), 91);
    home.assert_content();
}

#[test]
fn what_could_not_be_begun_is_tried_again_without_opening_the_index_again() {
    let (mut home, faults) = home();
    let opened = faults.listed();
    // The first enrolment needs a file.
    faults.no_descriptors.store(true, Ordering::SeqCst);
    home.fails_to_enrol(0..10);
    assert_eq!(home.live(), 0);
    faults.no_descriptors.store(false, Ordering::SeqCst);
    home.enrol(10..20);
    assert_eq!(home.live(), 20);
    // Others do not, and neither do deletions; a checkpoint does.
    faults.no_descriptors.store(true, Ordering::SeqCst);
    home.enrol(20..30);
    home.forget(0..5);
    home.gallery.checkpoint().unwrap_err();
    home.enrol(30..40);
    assert_eq!(home.live(), 35);
    faults.no_descriptors.store(false, Ordering::SeqCst);
    home.gallery.checkpoint().unwrap();
    assert_eq!((home.live(), faults.listed()), (35, opened));
    home.assert_content();
}

#[test]
fn a_checkpoint_that_failed_is_made_up_for_without_a_write_to_wait_for() {
    let (mut home, faults) = home();
    home.enrol(0..10);
    let opened = faults.listed();
    faults.writes.store(1, Ordering::SeqCst);
    home.gallery.checkpoint().unwrap_err();
    assert_eq!(home.live(), 10);
    home.gallery.checkpoint().unwrap();
    assert!(faults.listed() > opened);
    assert_eq!(home.live(), 10);
}

#[test]
fn an_index_that_fails_again_while_it_is_repaired_is_lost_until_it_is_whole() {
    let (mut home, faults) = home();
    home.enrol(0..50);
    faults.writes.store(usize::MAX, Ordering::SeqCst);
    home.fails_to_enrol(50..60);
    assert_eq!(home.live(), 50);
    home.fails_to_enrol(60..70);
    assert!(home.gallery.snapshot().is_none(), "its files were changed");
    faults.writes.store(0, Ordering::SeqCst);
    home.enrol(70..80);
    assert_eq!(home.live(), 80);
    home.assert_content();
}

#[test]
fn the_engine_gives_its_copies_up_when_rows_get_other_numbers() {
    let (mut home, faults) = home();
    home.enrol(0..50);
    home.gallery.checkpoint().unwrap();
    // Beyond the manifest: replayed, without those who are forgotten by then.
    home.enrol(50..100);
    home.forget(60..70);
    let before = home.rows_of(90..91);
    faults.writes.store(1, Ordering::SeqCst);
    home.fails_to_enrol(100..110);
    home.enrol(110..120);
    assert_eq!(home.live(), 110);
    assert_ne!(home.rows_of(90..91), before, "or this test proves nothing");
    home.assert_content();
}
