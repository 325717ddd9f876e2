//! What the gallery promises the engine, watched by an engine.

use std::collections::BTreeMap;
use std::sync::{OnceLock, Weak};

use half::f16;
use thenar_index::{GalleryId, KeyId, SubjectNumber};

use super::*;
use crate::engine::{EngineError, GalleryView, SiftRequest};
use crate::palm::{Hand, RequestId, SubjectId};
use crate::registry::sqlite::SqliteRegistry;
use crate::registry::{Action, Change, SealedTemplate, Source};
use crate::vault::{MasterKey, Vault};

mod damaged;
mod reopening;

const DIM: usize = 32;

/// An engine that has nothing but what it followed, and complains about a gallery that shows more.
#[derive(Default)]
struct Watching {
    gallery: OnceLock<Weak<Gallery>>,
    /// First row and a copy of the rows of each block it followed, by identity.
    followed: Mutex<BTreeMap<u64, (u32, Vec<f16>)>>,
    erased: Mutex<Vec<u32>>,
    complaints: Mutex<Vec<String>>,
}

impl Watching {
    /// Compares what searches see with what was followed.
    fn check(&self, when: &str, view: &GalleryView<'_>) {
        let followed = self.followed.lock();
        for block in &view.blocks {
            let (first_row, rows) = (block.first_row, block.count(DIM));
            let held = followed.get(&block.identity).filter(|held| held.0 == first_row);
            let copy = held.map_or(&[][..], |held| &held.1);
            let is_held = |row: &usize| copy.get(row * DIM..(row + 1) * DIM) == Some(&block.rows[row * DIM..][..DIM]);
            if let Some(row) = (0..rows).filter(|&row| block.is_live(row)).find(|row| !is_held(row)) {
                let held = copy.len() / DIM;
                let first = first_row as usize;
                self.complaints.lock().push(format!("{when}: row {row} of {rows} from {first} on, {held} are held"));
            }
        }
    }

    fn check_shown(&self, when: &str) {
        if let Some(gallery) = self.gallery.get().and_then(Weak::upgrade) {
            // While an index is opened again, nobody sees anything.
            let Some(reader) = gallery.reader.try_read() else { return };
            let shown = reader.as_ref().expect("the index is not lost").snapshot();
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
        let mut held = std::mem::take(&mut *self.followed.lock());
        for block in &view.blocks {
            // As engines do: under one identity rows are only appended.
            let (_, mut copy) = held.remove(&block.identity).unwrap_or_default();
            copy.truncate(block.rows.len());
            copy.extend_from_slice(&block.rows[copy.len()..]);
            self.followed.lock().insert(block.identity, (block.first_row, copy));
        }
        self.check_shown("after it followed");
        Ok(())
    }

    fn erase(&self, rows: &[u32]) -> Result<(), EngineError> {
        self.check_shown("before it erases");
        // Searches that could see the rows would read their bytes: those go when no search is left.
        if let Some(gallery) = self.gallery.get().and_then(Weak::upgrade)
            && let Some(reader) = gallery.reader.try_read()
        {
            let shown = reader.as_ref().expect("the index is not lost").snapshot();
            let seen = |row: &&u32| shown.row(Row(**row)).iter().any(|x| *x != f16::ZERO);
            if let Some(row) = rows.iter().find(seen) {
                self.complaints.lock().push(format!("row {row} may still be searched"));
            }
        }
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
        Self::on(Arc::new(thenar_index::storage::Files))
    }

    fn on(storage: Arc<dyn Storage>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let vault = Vault::new(MasterKey::from_bytes([5; 32]));
        let registry = SqliteRegistry::open(&folder.path().join("registry.sqlite"), vault.registry_keys());
        let registry = Arc::new(registry.unwrap());
        let sealer = Arc::new(vault.sealer(DIM));
        let engine = Arc::new(Watching::default());
        let setup = Setup {
            dir: folder.path().join("index"),
            storage,
            dim: DIM,
            origin: Origin { gallery: GalleryId([9; 16]), key: KeyId(vault.key_id()) },
            registry: Arc::clone(&registry) as _,
            sealer: Arc::clone(&sealer),
        };
        let gallery = Arc::new(Gallery::open(setup, Arc::clone(&engine) as _, None).unwrap());
        engine.gallery.set(Arc::downgrade(&gallery)).unwrap();
        Self { registry, sealer, engine, gallery, changes: 0, _folder: folder }
    }

    /// What the gallery was opened with, but for the storage.
    fn setup(&self, storage: Arc<dyn Storage>) -> Setup {
        let setup = &self.gallery.setup;
        Setup {
            dir: setup.dir.clone(),
            storage,
            dim: DIM,
            origin: setup.origin,
            registry: Arc::clone(&setup.registry),
            sealer: Arc::clone(&setup.sealer),
        }
    }

    fn change(&mut self, action: Action) -> Change {
        self.changes += 1;
        Change { request_id: RequestId::new(&format!("r{}", self.changes)).unwrap(), digest: [0; 16], action }
    }

    fn commit(&self, changes: &[Change]) -> Result<(), GalleryError> {
        let committed = self.registry.commit(changes).unwrap();
        self.gallery.apply(&committed.records)
    }

    fn enrol(&mut self, people: std::ops::Range<u32>) {
        self.try_enrol(people).unwrap();
    }

    fn try_enrol(&mut self, people: std::ops::Range<u32>) -> Result<(), GalleryError> {
        let enrol = |person: u32| {
            let values = (0..DIM).map(|i| f16::from_f32(((person as usize * 31 + i * 7) % 97) as f32 / 97.0 - 0.5));
            let row = TemplateRow(values.collect());
            let id = format!("p{person}");
            let sealed = self.sealer.seal(&id, Hand::Left, &row);
            let templates = vec![SealedTemplate { hand: Hand::Left, sealed }];
            Action::Enrol { subject: SubjectId::new(&id).unwrap(), source: Source::Person, templates }
        };
        let actions: Vec<Action> = people.map(enrol).collect();
        let changes: Vec<Change> = actions.into_iter().map(|action| self.change(action)).collect();
        self.commit(&changes)
    }

    fn forget(&mut self, people: std::ops::Range<u32>) {
        let forget = |person: u32| Action::Forget { subject: SubjectId::new(&format!("p{person}")).unwrap() };
        let changes: Vec<Change> = people.map(|person| self.change(forget(person))).collect();
        self.commit(&changes).unwrap();
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
        let complaints = self.engine.complaints.lock();
        assert!(complaints.is_empty(), "{complaints:?}");
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
