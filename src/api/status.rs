//! Turns errors into gRPC statuses; nothing else does.
//!
//! What failed inside the server is logged here in full; clients learn what it means for them, and
//! nothing about the server's folders, databases or devices.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::model::Invalid;
use crate::registry::RegistryError;
use crate::service::ServiceError;

/// The status of `error`, with the invalid field or the time after which to try again in its details.
pub(super) fn status(error: &ServiceError) -> Status {
    let message = error.to_string();
    match error {
        ServiceError::Invalid(invalid) => {
            let details = ErrorDetails::with_bad_request_violation(invalid.field.clone(), invalid.problem.clone());
            Status::with_error_details(Code::InvalidArgument, message, details)
        }
        ServiceError::UnknownVenue(_) | ServiceError::NoSuchSubject(_) | ServiceError::NoSuchTemplate(_) => {
            Status::not_found(message)
        }
        ServiceError::SubjectExists(_) => Status::already_exists(message),
        ServiceError::Forgotten { .. } | ServiceError::TemplateCount { .. } | ServiceError::RequestIdReused(_) => {
            Status::failed_precondition(message)
        }
        ServiceError::Busy { retry_after, .. } => Status::with_error_details(
            Code::ResourceExhausted,
            message,
            ErrorDetails::with_retry_info(Some(*retry_after)),
        ),
        ServiceError::DiskFull { .. } => Status::resource_exhausted(message),
        ServiceError::DeadlineExceeded { .. } => Status::deadline_exceeded(message),
        ServiceError::Draining => Status::unavailable(message),
        ServiceError::NotYetInForce(source) => {
            tracing::error!(error = %source, "a change is not yet in force");
            Status::unavailable("the change is kept but not yet in force; send the same request again")
        }
        // With these codes clients repeat the request with the same request_id, so it is done once,
        // whether or not it was stored.
        ServiceError::InDoubt(source) => {
            tracing::error!(error = %source, "a change is in doubt");
            Status::unavailable(
                "in doubt: the server's disk failed to store the change, which is kept or not. No more are taken before \
                 the server is restarted; then repeat it with the same request_id, and it is done once",
            )
        }
        ServiceError::ReadOnly(source) => {
            tracing::error!(error = %source, "a change was refused");
            Status::unavailable(
                "the server takes no changes before it is restarted, since its disk failed to store one; repeat the \
                 request with the same request_id then",
            )
        }
        ServiceError::Registry(source) => {
            tracing::error!(error = %source, "the registry failed");
            match &**source {
                RegistryError::DiskFull { .. } => {
                    Status::resource_exhausted("nothing was changed: the disk of the registry is full")
                }
                _ => Status::internal("the registry failed; nothing was changed"),
            }
        }
        ServiceError::NoGallery(source) => {
            tracing::error!(error = %source, "the gallery could not be made");
            Status::unavailable("nothing was changed: the gallery could not be made; try again")
        }
        ServiceError::SearchFailed(source) => {
            tracing::error!(error = %source, "a search failed");
            Status::unavailable("the search failed in the server; try again")
        }
    }
}

/// The status of an invalid field.
pub(super) fn invalid(invalid: Invalid) -> Status {
    status(&ServiceError::Invalid(invalid))
}

/// When to try again, if `error` says so.
pub(super) fn retry_after(error: &ServiceError) -> Option<Duration> {
    match error {
        ServiceError::Busy { retry_after, .. } => Some(*retry_after),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use super::*;
    use crate::engine::EngineError;
    use crate::gallery::GalleryError;
    use crate::search::SearchError;

    #[test]
    fn what_failed_inside_the_server_is_told_without_its_paths() {
        let path = || PathBuf::from("/srv/secret/registry.sqlite");
        let gone = || std::io::Error::other("/srv/secret/index: gone");
        let registry = |error| ServiceError::Registry(Arc::new(error));
        let not_yet = |error| ServiceError::NotYetInForce(Arc::new(error));
        for (error, code) in [
            (registry(RegistryError::DiskFull { path: path() }), Code::ResourceExhausted),
            (
                ServiceError::InDoubt(Arc::new(RegistryError::InDoubt {
                    path: path(),
                    doing: "committing",
                    source: rusqlite::Error::InvalidQuery,
                })),
                Code::Unavailable,
            ),
            (ServiceError::ReadOnly(Arc::new(RegistryError::WriterStopped { path: path() })), Code::Unavailable),
            (registry(RegistryError::File { path: path(), doing: "reading it", source: gone() }), Code::Internal),
            (not_yet(GalleryError::DiskFull { path: path(), free_bytes: 7 }), Code::Unavailable),
            (not_yet(GalleryError::Folder { path: path(), source: gone() }), Code::Unavailable),
            (not_yet(GalleryError::Registry(RegistryError::ScrubBlocked { path: path() })), Code::Unavailable),
            (
                ServiceError::NoGallery(Arc::new(GalleryError::Folder { path: path(), source: gone() })),
                Code::Unavailable,
            ),
            (
                ServiceError::SearchFailed(Arc::new(SearchError::Engine(EngineError::DeviceLost {
                    reason: "/srv/secret/index/00.seg".into(),
                }))),
                Code::Unavailable,
            ),
        ] {
            assert!(error.to_string().contains("/srv/secret"), "the log has it: {error}");
            let status = status(&error);
            assert_eq!(status.code(), code, "{status:?}");
            assert!(!status.message().contains('/') && !status.message().is_empty(), "{status:?}");
            assert!(status.details().is_empty(), "{status:?}");
        }
    }
}
