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
/// open, and not by the clock on the wall, which may leap.
pub const REQUESTS_KEPT: Duration = Duration::from_hours(30 * 24);

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
