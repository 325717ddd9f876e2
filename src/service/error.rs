//! Why a use case failed.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use thenar_index::TemplateId;

use crate::gallery::GalleryError;
use crate::model::{Invalid, RequestId, SubjectId, VenueId};
use crate::registry::RegistryError;
use crate::search::SearchError;

/// What is overloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Busy {
    /// Searches waiting for a batch.
    Searches,
    /// Changes waiting for a commit.
    Writes,
    /// Reads of the registry.
    Reads,
}

/// The errors of the use cases. Cheap to clone: every change of a failed group gets the same error.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ServiceError {
    /// A field is invalid.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The server does not know the venue.
    #[error("venue_id: {0} is not a venue of this server")]
    UnknownVenue(VenueId),
    /// There is no such subject.
    #[error("subject_id: there is no subject {0}")]
    NoSuchSubject(SubjectId),
    /// The subject id is taken.
    #[error("subject_id: {0} is enrolled already")]
    SubjectExists(SubjectId),
    /// The subject was forgotten, and the list it is on does not bring it back.
    #[error(
        "subject_id: {subject} was forgotten at {}; a list enrols them again only with after_forget \
         (thenar import --after-forget), and Enroll does for a person who is there",
        prost_types::Timestamp::from(*at)
    )]
    Forgotten {
        /// Who.
        subject: SubjectId,
        /// When.
        at: SystemTime,
    },
    /// The template is not the subject's.
    #[error("remove_template_ids: the subject has no template {}", .0.0)]
    NoSuchTemplate(TemplateId),
    /// No templates or too many would be left.
    #[error("the subject would have {count} templates; 1 to {max} are taken")]
    TemplateCount {
        /// What would be left.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// Another request had this id.
    #[error("request_id: {0} was used for another request")]
    RequestIdReused(RequestId),
    /// Too much at once.
    #[error("too many {} at once; try again in {} ms", match what {
        Busy::Searches => "searches",
        Busy::Writes => "writes",
        Busy::Reads => "reads",
    }, retry_after.as_millis())]
    Busy {
        /// Of what.
        what: Busy,
        /// When to try again.
        retry_after: Duration,
    },
    /// The caller's deadline passed before the work began.
    #[error("the deadline passed after {} ms in the queue", waited.as_millis())]
    DeadlineExceeded {
        /// Time in the queue.
        waited: Duration,
    },
    /// The server is stopping.
    #[error("the server is stopping; another or this one, restarted, will take the request")]
    Draining,
    /// Enrolments are refused before the disk is full, so that deletions still work.
    #[error(
        "the disk has {free_bytes} bytes left and {reserve_bytes} are kept free for deletions; nothing was changed"
    )]
    DiskFull {
        /// Room that is left.
        free_bytes: u64,
        /// Room that is kept.
        reserve_bytes: u64,
    },
    /// The disk failed to store the change: after a restart it may be there or not.
    #[error("in doubt: the disk failed to store the change; repeat it with the same request_id: {0}")]
    InDoubt(#[source] Arc<RegistryError>),
    /// The registry takes no change before a restart: an earlier one is in doubt.
    #[error("no changes are taken before a restart: {0}")]
    ReadOnly(#[source] Arc<RegistryError>),
    /// The registry failed; nothing was changed.
    #[error("nothing was changed: {0}")]
    Registry(#[source] Arc<RegistryError>),
    /// The change is durable, but searches do not see it yet (or bytes are not yet erased).
    #[error("the change is kept but not yet in force; send the same request again: {0}")]
    NotYetInForce(#[source] Arc<GalleryError>),
    /// There is no gallery yet, and it could not be created for the first enrolment.
    #[error("nothing was changed: the gallery could not be created: {0}")]
    NoGallery(#[source] Arc<dyn std::error::Error + Send + Sync>),
    /// There was no index or no engine to search with.
    #[error("the search failed: {0}")]
    SearchFailed(#[source] Arc<SearchError>),
}
