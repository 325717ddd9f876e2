//! The system of record: who is enrolled, with which templates, and the ordered log of changes.
//!
//! Every change is one transaction that also appends to the log (an [`Lsn`] a row); the index
//! follows the log and can be rebuilt from here at any time. Templates are opaque sealed bytes to
//! this room: it does not know how they open, nor vectors, engines or transports.
//!
//! Invariants: LSNs, subject numbers and template ids are given out in ascending order and never
//! twice; what `commit` returned `Ok` for survives kill -9 and power loss; a request id names one
//! request for as long as it is kept, and the same request again changes nothing; who was forgotten comes
//! back by an enrolment that means it, and by no list that is merely older.

pub mod sqlite;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use thenar_index::{Contents, GalleryId, Lsn, RowMeta, SubjectNumber, TemplateId, source_of};

use crate::model::{Hand, RequestId, SubjectId};

/// How long a registry must remember requests, so that a client may repeat one and have it happen
/// once. [`Registry::prune_requests`] may forget older ones. Counted in time that servers have it
/// open, and not by the clock on the wall, which may leap.
pub const REQUESTS_KEPT: Duration = Duration::from_hours(30 * 24);

/// A template on its way into the registry, sealed under its subject's key.
#[derive(Clone)]
pub struct SealedTemplate {
    /// The palm it was made from.
    pub hand: Hand,
    /// Opaque to the registry: what `vault` sealed.
    pub sealed: Box<[u8]>,
}

/// A change somebody asked for.
pub struct Change {
    /// The client's name for the request.
    pub request_id: RequestId,
    /// A digest of what was asked, keyed by the vault so that it says nothing about the
    /// embedding. The same request id with another digest is [`Outcome::RequestIdReused`].
    pub digest: [u8; 16],
    /// What to do.
    pub action: Action,
}

/// Where an enrolment comes from. A person who stands before a terminal decides anew; a list may be
/// older than a deletion, so it must say that it means those who were forgotten too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The person is there.
    Person,
    /// A line of a list. The request is not answered as done if its subject was forgotten since.
    List {
        /// Those may come back who were forgotten at this time or before.
        after_forget: Option<SystemTime>,
    },
}

/// What a change does.
pub enum Action {
    /// Enrols a new subject.
    Enrol {
        /// Must be free.
        subject: SubjectId,
        /// Decides whether somebody who was forgotten may come back.
        source: Source,
        /// 1 to `TEMPLATES_PER_SUBJECT_MAX`.
        templates: Vec<SealedTemplate>,
    },
    /// Changes the templates of a subject; at least one and at most `TEMPLATES_PER_SUBJECT_MAX`
    /// remain. The log gets the additions first, then the removals, so that no reader of the log
    /// ever sees the subject without a template.
    Update {
        /// Must exist.
        subject: SubjectId,
        /// Templates to add.
        add: Vec<SealedTemplate>,
        /// Templates to delete; each must be the subject's, and be named once.
        remove: Vec<TemplateId>,
    },
    /// Deletes a subject and all templates. The deletion is remembered for ever, as the time and a keyed
    /// hash of the name, until the subject is enrolled again; [`Source`] says by whom.
    Forget {
        /// Must exist.
        subject: SubjectId,
    },
}

/// How one change of a commit ended. A change that was refused left no trace; the others of the
/// same commit stand. Its request id stays free, so the request may be tried again.
///
/// Checks are made in this order: the request id, the subject, whether it was forgotten, each template
/// to remove, the count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Done now, or done before under the same request id (`replayed`).
    Done {
        /// The last log record the change made; the last one before it where it made none (an
        /// update that adds and removes nothing).
        lsn: Lsn,
        /// The subject as this change left it; for a deletion, as it was before.
        subject: SubjectRecord,
        /// True where the request had been done before and nothing was changed now. `subject`
        /// then is as it was answered the first time, as far as it still exists: templates
        /// deleted since are missing from it, all of them where the subject is gone.
        replayed: bool,
    },
    /// The subject id is taken.
    SubjectExists,
    /// The subject was forgotten, and the enrolment is of a list that does not bring it back.
    Forgotten {
        /// When, to the millisecond.
        at: SystemTime,
    },
    /// There is no such subject.
    NoSuchSubject,
    /// This template is not the subject's.
    NoSuchTemplate(TemplateId),
    /// The subject would have this many templates, which is none or too many.
    TemplateCount(usize),
    /// The request id was used for another request.
    RequestIdReused,
}

/// A subject as the registry knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubjectRecord {
    /// The registry's number, never used twice.
    pub number: SubjectNumber,
    /// The client's name.
    pub id: SubjectId,
    /// To the millisecond.
    pub enrolled_at: SystemTime,
    /// By ascending id. Without the sealed bytes.
    pub templates: Vec<TemplateRecord>,
}

/// A template as the registry knows it, without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateRecord {
    /// The registry's number, never used twice.
    pub id: TemplateId,
    /// The palm it was made from.
    pub hand: Hand,
    /// To the millisecond.
    pub enrolled_at: SystemTime,
}

/// One record of the change log, with what the index needs to follow it.
#[derive(Clone)]
pub struct LogRecord {
    /// The record's place. Consecutive records have consecutive numbers.
    pub lsn: Lsn,
    /// What changed.
    pub event: Event,
}

/// What a log record says.
#[derive(Clone)]
pub enum Event {
    /// A template came. `template` is `None` where it has been deleted since: a later record says so.
    Added {
        /// Its id.
        id: TemplateId,
        /// The template, while it exists.
        template: Option<StoredTemplate>,
    },
    /// One template of a subject went.
    Removed {
        /// Whose it was.
        subject: SubjectNumber,
        /// Its id.
        id: TemplateId,
    },
    /// A subject went, with all templates.
    Forgotten {
        /// Who.
        subject: SubjectNumber,
    },
}

/// A template with its sealed bytes. If it is damaged, so that its hand or its subject's name cannot be
/// read, or its bytes are missing, then `sealed` is empty, and `hand` and `subject_id` say nothing.
#[derive(Clone)]
pub struct StoredTemplate {
    /// Its id.
    pub id: TemplateId,
    /// Whose it is.
    pub subject: SubjectNumber,
    /// The client's name of that subject.
    pub subject_id: SubjectId,
    /// The palm it was made from.
    pub hand: Hand,
    /// What `vault` sealed.
    pub sealed: Box<[u8]>,
}

impl StoredTemplate {
    /// What the index's row of this template says of itself.
    #[must_use]
    pub fn meta(&self) -> RowMeta<'_> {
        RowMeta {
            template: self.id,
            subject: self.subject,
            hand: self.hand as u8,
            label: self.subject_id.as_str(),
            source: source_of(&self.sealed),
        }
    }
}

/// What is in the registry, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RegistryCounts {
    /// Subjects enrolled now.
    pub subjects: u64,
    /// Templates enrolled now.
    pub templates: u64,
}

/// Facts fixed when a gallery is made. Every server that opens it must agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GalleryIdentity {
    /// Components of an embedding.
    pub dim: usize,
    /// Fingerprint of the key that sealed and rotated the templates.
    pub key_id: [u8; 16],
}

/// Why the registry could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The database failed. Nothing of the commit is there.
    #[error("the registry at {} failed while {doing}: {source}", path.display())]
    Database {
        /// The database's place.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The database's own error.
        source: rusqlite::Error,
    },
    /// The disk is full. Nothing of the commit is there, and what was acknowledged still is.
    #[error("the disk of the registry at {} is full", path.display())]
    DiskFull {
        /// The database's place.
        path: PathBuf,
    },
    /// A stored value is not one this program writes.
    #[error("the registry at {} holds a damaged {what} at {key}", path.display())]
    Damaged {
        /// The database's place.
        path: PathBuf,
        /// Which kind of value.
        what: &'static str,
        /// The row it is in.
        key: i64,
    },
    /// The file is there but is not a registry, or not in a place where one can live.
    #[error("the registry at {} cannot be used: {why}", path.display())]
    Unusable {
        /// The database's place.
        path: PathBuf,
        /// What is in the way.
        why: &'static str,
    },
    /// The operating system refused an operation on one of the registry's files.
    #[error("the registry at {} failed while {doing}: {source}", path.display())]
    File {
        /// The file's place.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The system's own error.
        source: std::io::Error,
    },
    /// The system gives no random numbers.
    #[error("the system gives no random numbers: {0}")]
    NoRandomness(getrandom::Error),
    /// A commit could not be forced to the disk. It may be there when the registry is opened anew,
    /// or not: only that tells, and nothing is written before it. The same request repeated then is
    /// done once.
    #[error(
        "the registry at {} failed while {doing}, and whether that is stored will be known after a restart: {source}",
        path.display()
    )]
    InDoubt {
        /// The database's place.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The database's own error.
        source: rusqlite::Error,
    },
    /// An earlier change is in doubt ([`RegistryError::InDoubt`]). What the disk holds is not certain
    /// until the registry is opened anew, so nothing is written before that.
    #[error(
        "the registry at {} takes no changes since the disk failed to store one: check the disk and restart",
        path.display()
    )]
    WriterStopped {
        /// The database's place.
        path: PathBuf,
    },
    /// Another program reads the registry and keeps deleted bytes alive. Scrub again later.
    #[error(
        "the registry at {} could not be scrubbed: another program is reading it; deleted templates stay in its write-ahead log until it stops",
        path.display()
    )]
    ScrubBlocked {
        /// The database's place.
        path: PathBuf,
    },
    /// A newer program wrote this registry.
    #[error("the registry at {} has schema {found}, this program knows up to {known}", path.display())]
    SchemaTooNew {
        /// The database's place.
        path: PathBuf,
        /// Its schema version.
        found: i64,
        /// The newest known here.
        known: i64,
    },
    /// The gallery was made with another dimension or another key.
    #[error("the gallery was made with {expected}, but this server has {found}: {advice}")]
    WrongIdentity {
        /// What the registry says.
        expected: String,
        /// What the server has.
        found: String,
        /// What to do about it.
        advice: &'static str,
    },
}

/// The system of record. Implementations: [`sqlite::SqliteRegistry`]; a PostgreSQL one follows
/// the same contract. Calls block; call them from threads that may.
pub trait Registry: Send + Sync {
    /// Fixes the identity of a new gallery and draws a random id for it, or checks that the
    /// gallery has this identity. Returns its id. As long as the log is empty, the dimension may change,
    /// which makes it another gallery, with another id.
    ///
    /// # Errors
    /// [`RegistryError::WrongIdentity`] where it is another.
    fn claim_identity(&self, identity: &GalleryIdentity) -> Result<GalleryId, RegistryError>;

    /// The identity and the gallery's id, where they have been claimed.
    ///
    /// # Errors
    /// [`RegistryError`] where the database fails.
    fn identity(&self) -> Result<Option<(GalleryIdentity, GalleryId)>, RegistryError>;

    /// Does all changes in one transaction, in order, and returns an outcome for each, with the
    /// log records they made, ascending. When this returns `Ok`, it is durable.
    ///
    /// # Errors
    /// [`RegistryError`] where the database fails; then nothing of the commit is there, unless it is
    /// [`RegistryError::InDoubt`].
    fn commit(&self, changes: &[Change]) -> Result<Committed, RegistryError>;

    /// Up to `limit` log records after `after`, ascending.
    ///
    /// # Errors
    /// [`RegistryError`] where the database fails.
    fn log_after(&self, after: Lsn, limit: usize) -> Result<Vec<LogRecord>, RegistryError>;

    /// The last log record, `Lsn(0)` where there is none.
    ///
    /// # Errors
    /// [`RegistryError`] where the database fails.
    fn last_lsn(&self) -> Result<Lsn, RegistryError>;

    /// The last log record, and what all templates are as of that record: for an index that
    /// followed the log up to there to compare itself with.
    ///
    /// # Errors
    /// [`RegistryError`] where the database fails.
    fn contents(&self) -> Result<(Lsn, Contents), RegistryError>;

    /// Up to `limit` templates that exist now, by ascending id, from `first` to `last` inclusive.
    ///
    /// # Errors
    /// [`RegistryError`] where the database fails.
    fn templates_between(
        &self,
        first: TemplateId,
        last: TemplateId,
        limit: usize,
    ) -> Result<Vec<StoredTemplate>, RegistryError>;

    /// The subject of that name.
    ///
    /// # Errors
    /// [`RegistryError`] where the database fails.
    fn subject(&self, id: &SubjectId) -> Result<Option<SubjectRecord>, RegistryError>;

    /// The numbers of those of these subjects that are enrolled, in no order: all as they are at
    /// one moment.
    ///
    /// # Errors
    /// [`RegistryError`] where the database fails.
    fn subject_numbers(&self, ids: &[SubjectId]) -> Result<Vec<SubjectNumber>, RegistryError>;

    /// How much there is.
    ///
    /// # Errors
    /// [`RegistryError`] where the database fails.
    fn counts(&self) -> Result<RegistryCounts, RegistryError>;

    /// Makes the bytes of every deleted template unrecoverable from the files of this registry.
    /// Until this returns `Ok`, a deletion is durable but its bytes may still be in a file.
    ///
    /// # Errors
    /// [`RegistryError::ScrubBlocked`] where another program stands in the way, and others where
    /// the database fails. Nothing is lost then; call it again.
    fn scrub(&self) -> Result<(), RegistryError>;

    /// Forgets up to `limit` requests, the oldest ones, that were done longer ago than `kept`, and
    /// returns how many. A request repeated after that is taken for a new one; callers leave at
    /// least [`REQUESTS_KEPT`].
    ///
    /// # Errors
    /// [`RegistryError`] where the database fails.
    fn prune_requests(&self, kept: Duration, limit: usize) -> Result<u64, RegistryError>;
}

/// What a commit did.
pub struct Committed {
    /// One a change, in order.
    pub outcomes: Vec<Outcome>,
    /// The records this commit appended to the log, ascending; `Added` ones carry their template.
    pub records: Vec<LogRecord>,
}
