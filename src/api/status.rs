//! The one place where an error becomes a gRPC status.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::palm::Invalid;
use crate::service::ServiceError;

/// The status of `error`, with the field that broke a limit or the time to come back in its details.
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
        ServiceError::NotYetInForce(_) => Status::unavailable(message),
        ServiceError::Registry(source) => {
            tracing::error!(error = %source, "the registry failed");
            match &**source {
                crate::registry::RegistryError::DiskFull { .. } => Status::resource_exhausted(message),
                _ => Status::internal("the registry failed; nothing was changed"),
            }
        }
        ServiceError::SearchFailed(_) => {
            tracing::error!(error = %message, "a search failed");
            Status::unavailable(message)
        }
    }
}

/// The status of a field that is not as it must be.
pub(super) fn invalid(invalid: Invalid) -> Status {
    status(&ServiceError::Invalid(invalid))
}

/// When to try again, where `error` says so.
pub(super) fn retry_after(error: &ServiceError) -> Option<Duration> {
    match error {
        ServiceError::Busy { retry_after, .. } => Some(*retry_after),
        _ => None,
    }
}
