//! Tests of the SQLite registry, by what they try to break.

mod behaviour;
mod concurrency;
mod crash;
mod damage;
mod faults;
mod model;
mod property;
mod scrubbing;
mod speed;

use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::*;
use crate::model::{Hand, RequestId};
use crate::registry::{Action, Outcome, SealedTemplate, Source};
use crate::vault::{MasterKey, Vault};

#[expect(unsafe_code, reason = "SQLite's own files are made to fail")]
impl SqliteRegistry {
    /// From now on every sync of the write-ahead log fails.
    pub(crate) fn fail_syncs(&self) {
        unsafe extern "C" fn fails(_: *mut ffi::sqlite3_file, _: std::ffi::c_int) -> std::ffi::c_int {
            ffi::SQLITE_IOERR_FSYNC
        }
        let writer = self.writer.lock();
        let mut log: *mut ffi::sqlite3_file = std::ptr::null_mut();
        // SAFETY: the connection is open and its log in use, so that SQLite sets `log` to a file that
        // lives as long as it; the new methods are its own except for one of the same signature, and are
        // never freed. Nobody else uses the writing connection meanwhile.
        unsafe {
            let code = ffi::SQLITE_FCNTL_JOURNAL_POINTER;
            let found =
                ffi::sqlite3_file_control(writer.connection().handle(), std::ptr::null(), code, (&raw mut log).cast());
            assert_eq!(found, ffi::SQLITE_OK);
            let methods = ffi::sqlite3_io_methods { xSync: Some(fails), ..*(*log).pMethods };
            (*log).pMethods = Box::leak(Box::new(methods));
        }
    }
}

/// A registry in its own temporary folder.
struct Home {
    registry: Option<SqliteRegistry>,
    folder: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let mut home = Self { registry: None, folder: tempfile::tempdir().unwrap() };
        home.reopen();
        home
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("registry.db")
    }

    fn reopen(&mut self) {
        self.registry = None;
        self.registry = Some(open(&self.path()).unwrap());
    }

    /// Closes the registry and gives its database to `work`.
    fn meddle(&mut self, work: impl FnOnce(&Connection)) {
        self.registry = None;
        work(&Connection::open(self.path()).unwrap());
    }
}

impl std::ops::Deref for Home {
    type Target = SqliteRegistry;

    fn deref(&self) -> &SqliteRegistry {
        self.registry.as_ref().expect("the registry is open")
    }
}

/// The keys of every registry here.
fn keys() -> RegistryKeys {
    Vault::new(MasterKey::from_bytes([7; 32])).registry_keys()
}

fn open(path: &Path) -> Result<SqliteRegistry, RegistryError> {
    SqliteRegistry::open(path, keys())
}

fn name(id: &str) -> SubjectId {
    SubjectId::new(id).unwrap()
}

/// A template of `bytes` bytes that all depend on `seed`.
fn sealed(seed: u64, bytes: usize) -> SealedTemplate {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def0;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let hand = [Hand::Unspecified, Hand::Left, Hand::Right][usize::try_from(seed % 3).unwrap()];
    let sealed = std::iter::repeat_with(|| next().wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes())
        .flatten()
        .take(bytes)
        .collect();
    SealedTemplate { hand, sealed }
}

/// A change under request id `request`, its digest made from `digest`.
fn change(request: &str, digest: u8, action: Action) -> Change {
    Change { request_id: RequestId::new(request).unwrap(), digest: [digest; 16], action }
}

/// Of a person who is present.
fn enrolment(id: &str, templates: Vec<SealedTemplate>) -> Action {
    Action::Enrol { subject: name(id), source: Source::Person, templates }
}

fn enrol(request: &str, id: &str, seeds: &[u64]) -> Change {
    change(request, 0, enrolment(id, seeds.iter().map(|seed| sealed(*seed, 100)).collect()))
}

/// A line of a list.
fn listed(request: &str, id: &str, seed: u64, after_forget: Option<SystemTime>) -> Change {
    let source = Source::List { after_forget };
    change(request, 0, Action::Enrol { subject: name(id), source, templates: vec![sealed(seed, 100)] })
}

fn update(request: &str, id: &str, seeds: &[u64], remove: &[u64]) -> Change {
    let add = seeds.iter().map(|seed| sealed(*seed, 100)).collect();
    let remove = remove.iter().map(|id| TemplateId(*id)).collect();
    change(request, 0, Action::Update { subject: name(id), add, remove })
}

fn forget(request: &str, id: &str) -> Change {
    change(request, 0, Action::Forget { subject: name(id) })
}

/// The outcome of a single change.
fn commit_one(registry: &SqliteRegistry, change: Change) -> Outcome {
    let mut committed = registry.commit(&[change]).unwrap();
    assert_eq!(committed.outcomes.len(), 1);
    committed.outcomes.remove(0)
}

/// Nothing is wrong with the registry at `path`.
fn check_tables(path: &Path) {
    let registry = open(path).unwrap();
    assert_eq!(registry.verify(&|_| Ok(()), &|_, _| {}).problems, [""; 0]);
    let conn = Connection::open(path).unwrap();
    let number = |sql: &str| conn.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(number("SELECT count(*) FROM pragma_foreign_key_check"), 0);
    assert_eq!(number("SELECT count(*) FROM forgotten JOIN subjects USING (key)"), 0);
}
