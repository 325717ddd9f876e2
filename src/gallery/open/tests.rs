//! Indexes whose registry was rolled back, replaced or changed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use half::f16;
use rusqlite::Connection;
use thenar_index::storage::Files;

use super::*;
use crate::gallery::testing;
use crate::model::TemplateRow;
use crate::registry::Change;
use crate::registry::sqlite::SqliteRegistry;

const DIM: usize = 32;

/// A data folder, without a server.
struct Folder {
    dir: tempfile::TempDir,
    dim: usize,
}

/// A server at work in a folder, as far as registry and index go.
struct Running {
    registry: Arc<SqliteRegistry>,
    setup: Setup,
    index: Index,
    report: OpenReport,
}

impl Folder {
    fn new() -> Self {
        Self::of(DIM)
    }

    fn of(dim: usize) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), dim }
    }

    fn registry(&self) -> PathBuf {
        self.dir.path().join("registry.sqlite")
    }

    fn index(&self) -> PathBuf {
        self.dir.path().join("index")
    }

    /// The files of the index with what is in them.
    fn index_files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let files = std::fs::read_dir(self.index()).unwrap().map(|entry| entry.unwrap().path());
        files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
    }

    fn open(&self) -> Result<Running, GalleryError> {
        let registry = Arc::new(testing::registry(self.dir.path()));
        let setup = testing::setup(self.dir.path(), self.dim, Arc::new(Files), Arc::clone(&registry) as _)?;
        let (index, _, report) = check(&setup, None)?.finish(&setup, None)?;
        Ok(Running { registry, setup, index, report })
    }

    /// With these people, and without a server.
    fn with(people: std::ops::Range<u32>) -> Self {
        let folder = Self::new();
        folder.work(|running| running.enrol(people, 0));
        folder
    }

    /// Lets a server do `work` here and stop.
    fn work(&self, work: impl FnOnce(&mut Running)) {
        let mut running = self.run();
        work(&mut running);
        running.stop();
    }

    fn run(&self) -> Running {
        self.open().unwrap_or_else(|e| panic!("{e}"))
    }

    /// A copy of the registry of a stopped server, in a folder of its own.
    fn copy_of_registry(&self) -> Self {
        let copy = Self::new();
        std::fs::copy(self.registry(), copy.registry()).unwrap();
        copy
    }

    /// Puts another folder's registry in the place of this one's.
    fn take_registry_of(&self, other: &Self) {
        for beside in ["-wal", "-shm"] {
            let _ = std::fs::remove_file(format!("{}{beside}", self.registry().display()));
        }
        std::fs::copy(other.registry(), self.registry()).unwrap();
    }
}

impl Running {
    fn commit(&mut self, changes: &[Change]) {
        let committed = self.registry.commit(changes).unwrap();
        let mut progress = Progress::new(self.index.snapshot().lsn());
        progress.give(&mut self.index, &self.setup.sealer, &committed.records).unwrap();
        drop(self.index.publish(progress.given));
        self.index.erase(&self.index.forgotten()).unwrap();
    }

    /// Enrols these people; `draw` says which palms they have.
    fn enrol(&mut self, people: std::ops::Range<u32>, draw: u32) {
        let enrol = |person: u32| {
            let value = |i: u32| f16::from_f32(((person * 31 + i * 7 + draw * 13) % 97) as f32 / 97.0 - 0.5);
            let row = TemplateRow((0..DIM as u32).map(value).collect());
            let enrol = testing::enrol(&self.setup.sealer, &format!("p{person}"), &row);
            testing::change(&format!("e{person}-{draw}"), enrol)
        };
        let changes: Vec<Change> = people.map(enrol).collect();
        self.commit(&changes);
    }

    fn forget(&mut self, people: std::ops::Range<u32>) {
        let forget = |person: u32| testing::change(&format!("f{person}"), testing::forget(&format!("p{person}")));
        let changes: Vec<Change> = people.map(forget).collect();
        self.commit(&changes);
    }

    /// Checks that the index has, of every template on record, the row that is sealed there, and
    /// no other row.
    fn assert_whole(&self) {
        let templates = self.registry.templates_between(TemplateId(0), TemplateId(u64::MAX), 10_000).unwrap();
        let snapshot = self.index.snapshot();
        assert_eq!(snapshot.live(), templates.len() as u64);
        for template in templates {
            let rows = snapshot.rows_of(template.subject);
            let row = rows.iter().find(|row| snapshot.meta(**row).unwrap().template == template.id).unwrap();
            assert_eq!(snapshot.meta(*row), Some(template.meta()));
            assert_eq!(snapshot.row(*row), &*open_template(&self.setup.sealer, &template).unwrap().0);
        }
    }

    fn stop(mut self) {
        self.index.checkpoint().unwrap();
    }

    /// Ends it like kill -9: no checkpoint.
    fn kill(self) {}
}

/// Opens a folder whose index must be rebuilt, for that reason, and is right afterwards.
fn is_rebuilt(folder: &Folder, words: &str) {
    let running = folder.run();
    let why = running.report.rebuilt_because.clone().expect("the index is rebuilt");
    assert!(why.contains(words), "{why}");
    running.assert_whole();
    running.stop();
    let again = folder.run();
    assert_eq!(again.report.rebuilt_because, None, "once and for all");
    again.assert_whole();
}

#[test]
fn deletions_that_a_copy_of_the_registry_does_not_know_are_noticed() {
    let folder = Folder::with(0..100);
    let copy = folder.copy_of_registry();
    let mut running = folder.run();
    assert_eq!(running.report.rebuilt_because, None);
    running.forget(25..75);
    running.kill();
    folder.take_registry_of(&copy);
    is_rebuilt(&folder, "50 templates on record are not in the index, 0 rows of it are not on record, and 0 are");
}

#[test]
fn a_copy_of_the_registry_that_went_its_own_way_is_noticed() {
    let folder = Folder::with(0..20);
    let copy = folder.copy_of_registry();
    // Here some go and others come; there others come, until the log is as long.
    folder.work(|running| {
        running.forget(0..5);
        running.enrol(100..110, 0);
    });
    copy.work(|running| running.enrol(200..220, 0));
    folder.take_registry_of(&copy);
    is_rebuilt(&folder, "10 templates on record are not in the index, 0 rows of it are not on record, and 10 are");
}

#[test]
fn the_same_people_with_other_palms_are_noticed() {
    let folder = Folder::with(0..20);
    let copy = folder.copy_of_registry();
    folder.work(|running| running.enrol(20..30, 0));
    // After a restore everybody since the copy is enrolled again, and one more.
    copy.work(|running| {
        running.enrol(20..30, 1);
        running.enrol(30..31, 1);
    });
    folder.take_registry_of(&copy);
    is_rebuilt(&folder, "0 templates on record are not in the index, 0 rows of it are not on record, and 10 are");
}

#[test]
fn an_index_with_rows_of_nobody_is_noticed() {
    let folder = Folder::with(0..20);
    let copy = folder.copy_of_registry();
    folder.work(|running| running.enrol(20..30, 0));
    copy.work(|running| running.forget(0..10));
    folder.take_registry_of(&copy);
    is_rebuilt(&folder, "0 templates on record are not in the index, 20 rows of it are not on record, and 0 are");
}

#[test]
fn a_log_that_does_not_go_on_from_the_index_is_noticed() {
    let folder = Folder::with(0..20);
    let copy = folder.copy_of_registry();
    folder.work(|running| running.enrol(20..40, 0));
    // The longer log, but fewer templates: the next one's number is taken in the index.
    copy.work(|running| {
        running.forget(0..20);
        running.enrol(20..25, 0);
    });
    folder.take_registry_of(&copy);
    is_rebuilt(&folder, "template 21 does not come after template 40");
}

#[test]
fn the_index_of_another_gallery_is_refused_and_left_alone() {
    let (folder, other) = (Folder::with(0..20), Folder::with(0..20));
    folder.take_registry_of(&other);
    let before = folder.index_files();
    let Err(error) = folder.open() else { panic!("it opened") };
    assert!(matches!(error, GalleryError::Swapped { .. }), "{error}");
    let said = error.to_string();
    assert!(said.contains("another data folder") && said.contains("remove the index folder"), "{said}");
    assert!(folder.index_files() == before);
    // Following the advice gives a working server again.
    std::fs::remove_dir_all(folder.index()).unwrap();
    folder.run().assert_whole();
}

#[test]
fn an_empty_gallery_may_become_one_of_another_dimension_but_its_registry_wipes_no_index_of_another() {
    let mut empty = Folder::of(2 * DIM);
    empty.run().stop();
    empty.dim = DIM;
    empty.work(|running| {
        running.enrol(0..20, 0);
        running.assert_whole();
    });

    // A registry in which nobody was enrolled, under an index that is not its own.
    let other = Folder::of(2 * DIM);
    other.run().stop();
    let before = empty.index_files();
    empty.take_registry_of(&other);
    for dim in [DIM, 2 * DIM] {
        empty.dim = dim;
        let Err(error) = empty.open() else { panic!("it opened") };
        assert!(matches!(error, GalleryError::Swapped { .. }), "{error}");
        assert!(empty.index_files() == before, "the index was changed");
    }
}

#[test]
fn a_registry_that_contradicts_itself_is_refused() {
    let folder = Folder::with(0..5);
    let conn = Connection::open(folder.registry()).unwrap();
    conn.execute_batch("DELETE FROM templates WHERE id = 3").unwrap();
    drop(conn);
    std::fs::remove_dir_all(folder.index()).unwrap();
    let Err(error) = folder.open() else { panic!("it opened") };
    assert!(matches!(error, GalleryError::Contradiction), "{error}");
}

#[test]
fn every_gallery_has_an_id_of_its_own() {
    let ids: Vec<GalleryId> = (0..8).map(|_| Folder::new().run().setup.origin.gallery).collect();
    assert!(ids.iter().enumerate().all(|(at, id)| id.0 != [0; 16] && !ids[..at].contains(id)));
}
