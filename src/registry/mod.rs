//! The system of record: who is enrolled, with which templates, and the ordered log of changes.
//!
//! Every change is one transaction that also appends to the log (one [`Lsn`] per row); the index
//! follows the log and can be rebuilt from here at any time. Templates are opaque sealed bytes to
//! this module: it does not know how they are opened, nor vectors, engines or transports.
//!
//! Invariants: LSNs, subject numbers and template ids are assigned in ascending order and never
//! twice; a commit that returned `Ok` survives kill -9 and power loss; a request id names one
//! request as long as it is kept, and the same request again changes nothing; a subject that was forgotten
//! comes back by an enrolment in person or by a list that names a later time, never by a list that is
//! merely older.

mod change;
mod error;
mod records;
pub mod sqlite;

use std::time::Duration;

use thenar_index::{Contents, GalleryId, Lsn, SubjectNumber, TemplateId};

use crate::model::SubjectId;

pub use change::{Action, Change, Committed, Outcome, SealedTemplate, Source};
pub use error::RegistryError;
pub use records::{Event, GalleryIdentity, LogRecord, RegistryCounts, StoredTemplate, SubjectRecord, TemplateRecord};

/// How long a registry must remember requests, so that a client may repeat one and have it happen
/// once. [`Registry::prune_requests`] may forget older ones. Counted in time that servers have it
/// open, not by the wall clock, which may be set.
pub const REQUESTS_KEPT: Duration = Duration::from_hours(30 * 24);

/// The system of record. Implementations: [`sqlite::SqliteRegistry`]; a PostgreSQL one follows
/// the same contract. Calls block; make them on threads that may block.
pub trait Registry: Send + Sync {
    /// Fixes the identity of a new gallery and draws a random id for it, or checks that the
    /// gallery has this identity. Returns its id. As long as the log is empty, the dimension may change,
    /// which makes it another gallery, with another id.
    ///
    /// # Errors
    /// [`RegistryError::WrongIdentity`] if it has another.
    fn claim_identity(&self, identity: &GalleryIdentity) -> Result<GalleryId, RegistryError>;

    /// The identity and the gallery's id, if they have been claimed.
    ///
    /// # Errors
    /// [`RegistryError`] if the database fails.
    fn identity(&self) -> Result<Option<(GalleryIdentity, GalleryId)>, RegistryError>;

    /// Makes all changes in one transaction, in order, and returns an outcome for each, with the
    /// log records they made, ascending. When this returns `Ok`, they are durable.
    ///
    /// # Errors
    /// [`RegistryError`] if the database fails; then nothing of the commit is stored, unless it is
    /// [`RegistryError::InDoubt`].
    fn commit(&self, changes: &[Change]) -> Result<Committed, RegistryError>;

    /// Up to `limit` log records after `after`, ascending.
    ///
    /// # Errors
    /// [`RegistryError`] if the database fails.
    fn log_after(&self, after: Lsn, limit: usize) -> Result<Vec<LogRecord>, RegistryError>;

    /// The last log record; `Lsn(0)` if there is none.
    ///
    /// # Errors
    /// [`RegistryError`] if the database fails.
    fn last_lsn(&self) -> Result<Lsn, RegistryError>;

    /// The last log record, and a summary of all templates as of that record, for an index that
    /// followed the log up to there to compare itself with.
    ///
    /// # Errors
    /// [`RegistryError`] if the database fails.
    fn contents(&self) -> Result<(Lsn, Contents), RegistryError>;

    /// Up to `limit` templates that exist now, by ascending id, from `first` to `last` inclusive.
    ///
    /// # Errors
    /// [`RegistryError`] if the database fails.
    fn templates_between(
        &self,
        first: TemplateId,
        last: TemplateId,
        limit: usize,
    ) -> Result<Vec<StoredTemplate>, RegistryError>;

    /// The subject of that name.
    ///
    /// # Errors
    /// [`RegistryError`] if the database fails.
    fn subject(&self, id: &SubjectId) -> Result<Option<SubjectRecord>, RegistryError>;

    /// The numbers of those of these subjects that are enrolled, in no particular order, all from one
    /// snapshot.
    ///
    /// # Errors
    /// [`RegistryError`] if the database fails.
    fn subject_numbers(&self, ids: &[SubjectId]) -> Result<Vec<SubjectNumber>, RegistryError>;

    /// How many subjects and templates there are.
    ///
    /// # Errors
    /// [`RegistryError`] if the database fails.
    fn counts(&self) -> Result<RegistryCounts, RegistryError>;

    /// Makes the bytes of every deleted template unrecoverable from the files of this registry.
    /// Until this returns `Ok`, a deletion is durable but its bytes may still be in a file.
    ///
    /// # Errors
    /// [`RegistryError::ScrubBlocked`] if another program is reading the registry, and others if
    /// the database fails. Nothing is lost then; call it again.
    fn scrub(&self) -> Result<(), RegistryError>;

    /// Forgets up to `limit` of the oldest requests that were done longer ago than `kept`, and
    /// returns how many. A request repeated after that counts as a new one; callers keep at
    /// least [`REQUESTS_KEPT`].
    ///
    /// # Errors
    /// [`RegistryError`] if the database fails.
    fn prune_requests(&self, kept: Duration, limit: usize) -> Result<u64, RegistryError>;
}
