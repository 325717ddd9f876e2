//! What the gallery promises the engine, checked by hooks of an engine.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{OnceLock, Weak};

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use thenar_index::storage::Files;
use thenar_index::{Row, SubjectNumber};

use super::*;
use crate::engine::certificate::Certificate;
use crate::engine::testing::{Hooked, Hooks};
use crate::engine::{EngineError, GalleryView};
use crate::model::{Hand, TemplateRow};
use crate::registry::sqlite::SqliteRegistry;
use crate::registry::{Action, Change, SealedTemplate, Source};
use crate::search::{NO_FLOOR, Probe, score};

mod beside;
mod damaged;
mod reopening;

const DIM: usize = 32;

/// What an engine followed, and complaints if the gallery shows more.
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
        for block in &view.segments {
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
            // While an index is being reopened, nobody sees anything.
            let Some(reader) = gallery.reader.try_read() else { return };
            let shown = reader.as_ref().expect("the index is not lost").snapshot();
            self.check(when, &GalleryView::of(&shown));
        }
    }
}

impl Hooks for Watching {
    fn before_follow(&self, view: &GalleryView<'_>) -> Result<(), EngineError> {
        self.check_shown("before it follows");
        let mut held = std::mem::take(&mut *self.followed.lock());
        for block in &view.segments {
            // As engines do: under one identity rows are only appended.
            let (_, mut copy) = held.remove(&block.identity).unwrap_or_default();
            copy.truncate(block.rows.len());
            copy.extend_from_slice(&block.rows[copy.len()..]);
            self.followed.lock().insert(block.identity, (block.first_row, copy));
        }
        self.check_shown("after it followed");
        Ok(())
    }

    fn before_erase(&self, rows: &[u32]) {
        self.check_shown("before it erases");
        // A search that could still see the rows would read their bytes, which are zeroed when no search is
        // left.
        if let Some(gallery) = self.gallery.get().and_then(Weak::upgrade)
            && let Some(reader) = gallery.reader.try_read()
        {
            let shown = reader.as_ref().expect("the index is not lost").snapshot();
            let has = |row: u32| {
                shown.segments().any(|block| (block.first_row..).zip(block.rows.chunks(DIM)).any(|(n, _)| n == row))
            };
            // A row that is being compacted has two numbers; searches see one.
            let seen = |row: &&u32| has(**row) && shown.row(Row(**row)).iter().any(|x| *x != f16::ZERO);
            if let Some(row) = rows.iter().find(seen) {
                self.complaints.lock().push(format!("row {row} may still be searched"));
            }
        }
        self.erased.lock().extend(rows);
    }

    fn before_find(&self, view: &GalleryView<'_>) -> Result<(), EngineError> {
        self.check("in a search", view);
        Ok(())
    }
}

fn watching() -> Arc<Hooked<Watching>> {
    Arc::new(Hooked::new(1, Watching::default()))
}

/// The template of a person: of unit length, and like nobody else's.
fn values(person: u32) -> Vec<f16> {
    let mut rng = ChaCha8Rng::seed_from_u64(u64::from(person));
    let values: Vec<f32> = (0..DIM).map(|_| rng.random_range(-1.0..1.0)).collect();
    let length = values.iter().map(|x| x * x).sum::<f32>().sqrt();
    values.iter().map(|x| f16::from_f32(x / length)).collect()
}

/// A gallery over a registry, with an engine that is watched.
struct Home {
    registry: Arc<SqliteRegistry>,
    sealer: Arc<Sealer>,
    engine: Arc<Hooked<Watching>>,
    gallery: Arc<Gallery>,
    changes: u64,
    folder: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        Self::on(Arc::new(Files))
    }

    fn on(storage: Arc<dyn Storage>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let registry = Arc::new(testing::registry(folder.path()));
        let setup = testing::setup(folder.path(), DIM, storage, Arc::clone(&registry) as _).unwrap();
        let (sealer, engine) = (Arc::clone(&setup.sealer), watching());
        let gallery = Arc::new(Gallery::open(setup, Arc::clone(&engine) as _, None).unwrap());
        engine.gallery.set(Arc::downgrade(&gallery)).unwrap();
        Self { registry, sealer, engine, gallery, changes: 0, folder }
    }

    /// What the gallery is opened with again.
    fn setup(&self) -> Setup {
        testing::setup(self.folder.path(), DIM, Arc::new(Files), Arc::clone(&self.registry) as _).unwrap()
    }

    fn change(&mut self, action: Action) -> Change {
        self.changes += 1;
        testing::change(&format!("r{}", self.changes), action)
    }

    fn commit(&self, changes: &[Change]) -> Result<(), GalleryError> {
        let committed = self.registry.commit(changes).unwrap();
        self.gallery.apply(&committed.records)
    }

    fn enrol(&mut self, people: std::ops::Range<u32>) {
        self.try_enrol(people).unwrap();
    }

    fn try_enrol(&mut self, people: std::ops::Range<u32>) -> Result<(), GalleryError> {
        let row = |person| TemplateRow(values(person).into());
        let enrol = |person: u32| testing::enrol(&self.sealer, &format!("p{person}"), &row(person));
        let actions: Vec<Action> = people.map(enrol).collect();
        let changes: Vec<Change> = actions.into_iter().map(|action| self.change(action)).collect();
        self.commit(&changes)
    }

    fn forget(&mut self, people: std::ops::Range<u32>) {
        let changes: Vec<Change> = people.map(|person| self.change(testing::forget(&format!("p{person}")))).collect();
        self.commit(&changes).unwrap();
    }

    /// The rows searches see of these people, ascending.
    fn rows_of(&self, people: std::ops::Range<u32>) -> Vec<u32> {
        let snapshot = self.gallery.snapshot().unwrap();
        let number = |person: u32| {
            let subject = self.registry.subject(&testing::subject(&format!("p{person}"))).unwrap();
            SubjectNumber(subject.expect("the person is enrolled").number.0)
        };
        let mut rows: Vec<u32> = people.flat_map(|person| snapshot.rows_of(number(person))).map(|row| row.0).collect();
        rows.sort_unstable();
        rows
    }

    /// Compares a search of each kind with brute force over the people there are.
    fn assert_exact(&self, people: &BTreeSet<u32>, context: &str) {
        for (number, floor) in [(5, NO_FLOOR), (17, 0.2), (2400, 0.3), (3999, 0.99)] {
            let vector: Box<[f32]> = values(number).iter().map(|x| x.to_f32()).collect();
            let mut expected: Vec<(f64, String)> = people
                .iter()
                .map(|person| (score::exact(&values(*person), &vector), format!("p{person}")))
                .filter(|(score, _)| *score >= floor)
                .collect();
            expected.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            expected.truncate(7);
            let probes = vec![Probe { hand: Hand::Left, vector }];
            let search = Search { probes, floor, k: 7, certificate: Certificate::default(), allowed: None };
            let (answers, _) = self.gallery.search(&[&search], Priority::High, &mut CandidateRows::default()).unwrap();
            let found: Vec<(f64, String)> =
                answers[0].found.iter().map(|found| (found.score, found.subject_id.to_string())).collect();
            assert_eq!(found, expected, "{context}, person {number}");
        }
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
    // And it is told to erase the rows that searches saw, once they no longer see them.
    let gone = home.rows_of(20..90);
    home.forget(20..90);
    assert_eq!(*home.engine.erased.lock(), gone);
    home.assert_content();
}

#[test]
fn a_gallery_that_is_compacted_answers_as_before_and_the_engine_is_never_behind() {
    let mut home = Home::new();
    home.enrol(0..4000);
    let mut people: BTreeSet<u32> = (0..4000).collect();
    home.forget(600..3700);
    people.retain(|person| !(600..3700).contains(person));
    let bytes = |home: &Home| home.gallery.status().index_bytes;
    let (before, rows) = (home.gallery.status(), home.rows_of(0..600));
    assert_eq!((before.templates, before.tombstones), (900, 3100));
    assert!(!home.gallery.compact_some(u64::MAX).unwrap(), "the disk has no such room");

    // Nine hundred rows are copied in some fifteen pieces. Between them people come and go.
    let mut erased_twice = 0;
    for piece in 0_u32.. {
        let more = home.gallery.compact_some(0).unwrap();
        home.engine.check_shown("after a piece");
        home.assert_content();
        if piece % 5 == 3 {
            home.assert_exact(&people, &format!("after piece {piece}"));
        }
        if !more {
            assert!(piece > 20, "{piece} pieces prove little");
            break;
        }
        let (gone, comes) = (piece * 9 % 600, 4000 + piece);
        if piece < 40 && people.remove(&gone) {
            home.engine.erased.lock().clear();
            home.forget(gone..gone + 1);
            erased_twice += usize::from(home.engine.erased.lock().len() == 2);
            home.enrol(comes..comes + 1);
            people.insert(comes);
        }
    }
    assert!(erased_twice > 0, "nobody was forgotten whose row was copied");
    home.assert_exact(&people, "at the end");
    let after = home.gallery.status();
    assert_eq!(after.templates, people.len() as u64);
    assert!(after.tombstones < 100, "{} rows of the old segment are left", after.tombstones);
    assert!(bytes(&home) <= 2 * before.index_bytes);
    // The engine has what searches see and nothing else, under other numbers.
    let shown = home.gallery.snapshot().unwrap();
    let identities: Vec<u64> = shown.segments().map(|block| block.identity).collect();
    assert!(home.engine.followed.lock().keys().copied().eq(identities.into_iter().collect::<BTreeSet<_>>()));
    drop(shown);
    assert_ne!(home.rows_of(599..600), rows[599..]);

    // Opened again it is the same.
    let gallery = &home.gallery;
    gallery.checkpoint().unwrap();
    let setup = home.setup();
    let writer = gallery.writer.lock().index.take();
    *gallery.reader.write() = None;
    drop(writer);
    let again = Gallery::open(setup, watching(), None);
    assert_eq!(again.unwrap().status().templates, people.len() as u64);
}
