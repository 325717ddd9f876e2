//! What the gallery promises the engine, watched by an engine.

use std::collections::BTreeMap;
use std::sync::{OnceLock, Weak};

use half::f16;
use thenar_index::{GalleryId, KeyId, SubjectNumber};

use super::*;
use crate::engine::{EngineError, GalleryView, SiftRequest};
use crate::palm::{Hand, RequestId, SubjectId};
use crate::registry::sqlite::SqliteRegistry;
use crate::registry::{Action, Change, SealedTemplate};
use crate::vault::{MasterKey, Vault};

const DIM: usize = 32;

/// An engine that has nothing but what it followed, and complains about a gallery that shows more.
#[derive(Default)]
struct Watching {
    gallery: OnceLock<Weak<Gallery>>,
    /// First row and rows of each block it followed, by identity.
    followed: Mutex<BTreeMap<u64, (u32, usize)>>,
    erased: Mutex<Vec<u32>>,
    complaints: Mutex<Vec<String>>,
}

impl Watching {
    /// Compares what searches see with what was followed.
    fn check(&self, when: &str, view: &GalleryView<'_>) {
        let followed = self.followed.lock();
        for block in &view.blocks {
            let (first_row, rows) = (block.first_row, block.count(DIM));
            if !followed.get(&block.identity).is_some_and(|held| held.0 == first_row && held.1 >= rows) {
                self.complaints.lock().push(format!("{when}: {rows} rows from {first_row} on, followed: {followed:?}"));
            }
        }
    }

    fn check_shown(&self, when: &str) {
        if let Some(gallery) = self.gallery.get().and_then(Weak::upgrade) {
            let shown = gallery.snapshot().expect("the index is not lost");
            self.check(when, &plan::view(&shown));
        }
    }
}

impl Engine for Watching {
    fn describe(&self) -> EngineDescription {
        EngineDescription { kind: "cpu", adapter: "watching".into(), threads: 1, host_bytes: 0, device_bytes: 0 }
    }

    fn follow(&self, view: &GalleryView<'_>) -> Result<(), EngineError> {
        self.check_shown("before it follows");
        let blocks = view.blocks.iter().map(|block| (block.identity, (block.first_row, block.count(DIM))));
        *self.followed.lock() = blocks.collect();
        self.check_shown("after it followed");
        Ok(())
    }

    fn erase(&self, rows: &[u32]) -> Result<(), EngineError> {
        self.check_shown("before it erases");
        self.erased.lock().extend(rows);
        Ok(())
    }

    fn sift(&self, view: &GalleryView<'_>, _: &SiftRequest<'_>, _: &mut Survivors) -> Result<(), EngineError> {
        self.check("in a search", view);
        Ok(())
    }
}

/// A gallery over a registry, with an engine that watches.
struct Home {
    registry: Arc<SqliteRegistry>,
    sealer: Arc<Sealer>,
    engine: Arc<Watching>,
    gallery: Arc<Gallery>,
    changes: u64,
    _folder: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let vault = Vault::new(MasterKey::from_bytes([5; 32]));
        let registry = SqliteRegistry::open(&folder.path().join("registry.sqlite"), vault.registry_keys());
        let registry = Arc::new(registry.unwrap());
        let sealer = Arc::new(vault.sealer(DIM));
        let engine = Arc::new(Watching::default());
        let setup = Setup {
            dir: folder.path().join("index"),
            dim: DIM,
            origin: Origin { gallery: GalleryId([9; 16]), key: KeyId(vault.key_id()) },
            registry: Arc::clone(&registry) as _,
            sealer: Arc::clone(&sealer),
        };
        let gallery = Arc::new(Gallery::open(setup, Arc::clone(&engine) as _, None).unwrap());
        engine.gallery.set(Arc::downgrade(&gallery)).unwrap();
        Self { registry, sealer, engine, gallery, changes: 0, _folder: folder }
    }

    fn change(&mut self, action: Action) -> Change {
        self.changes += 1;
        Change { request_id: RequestId::new(&format!("r{}", self.changes)).unwrap(), digest: [0; 16], action }
    }

    fn commit(&self, changes: &[Change]) {
        let committed = self.registry.commit(changes).unwrap();
        self.gallery.apply(&committed.records).unwrap();
    }

    fn enrol(&mut self, people: std::ops::Range<u32>) {
        let enrol = |person: u32| {
            let values = (0..DIM).map(|i| f16::from_f32(((person as usize * 31 + i * 7) % 97) as f32 / 97.0 - 0.5));
            let row = TemplateRow(values.collect());
            let id = format!("p{person}");
            let sealed = self.sealer.seal(&id, Hand::Left, &row);
            let templates = vec![SealedTemplate { hand: Hand::Left, sealed }];
            Action::Enrol { subject: SubjectId::new(&id).unwrap(), templates }
        };
        let actions: Vec<Action> = people.map(enrol).collect();
        let changes: Vec<Change> = actions.into_iter().map(|action| self.change(action)).collect();
        self.commit(&changes);
    }

    fn forget(&mut self, people: std::ops::Range<u32>) {
        let forget = |person: u32| Action::Forget { subject: SubjectId::new(&format!("p{person}")).unwrap() };
        let changes: Vec<Change> = people.map(|person| self.change(forget(person))).collect();
        self.commit(&changes);
    }

    /// The rows searches see of these people, ascending.
    fn rows_of(&self, people: std::ops::Range<u32>) -> Vec<u32> {
        let snapshot = self.gallery.snapshot().unwrap();
        let number = |person: u32| {
            let subject = self.registry.subject(&SubjectId::new(&format!("p{person}")).unwrap()).unwrap();
            SubjectNumber(subject.expect("the person is enrolled").number.0)
        };
        let mut rows: Vec<u32> = people.flat_map(|person| snapshot.rows_of(number(person))).map(|row| row.0).collect();
        rows.sort_unstable();
        rows
    }

    fn assert_content(&self) {
        assert_eq!(*self.engine.complaints.lock(), [String::new(); 0]);
    }
}

#[test]
fn no_search_sees_rows_before_the_engine_has_them() {
    let mut home = Home::new();
    for round in 0..4 {
        home.enrol(round * 50..round * 50 + 50);
        home.assert_content();
    }
    // And it is told to erase the rows that searches saw, when they see them no more.
    let gone = home.rows_of(20..90);
    home.forget(20..90);
    assert_eq!(*home.engine.erased.lock(), gone);
    home.assert_content();
}
