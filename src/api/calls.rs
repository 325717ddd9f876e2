//! One call, between the connection and tonic: its limits of bytes and of time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{Request, Response};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::time::timeout;
use tonic::Status;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::service::Routes;
use tower_service::Service as _;

use super::budget::{Charge, Share};
use super::convert;
use super::messages::elements::{self, Field};
use super::messages::{Arriving, AtAge, Handover, MessageLimits, Pace, exhausted};
use crate::net::{Connection, GuardedBody};

/// Bytes of one message, of any method but these:
pub const SEARCH_MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Bytes of one message to `Enroll` and `UpdateSubject`.
pub(super) const ENROLL_MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Bytes of one message to `BulkEnroll`.
pub(super) const BULK_MESSAGE_BYTES_MAX: usize = 8 << 20;

/// Of a message without lists.
const NO_LISTS: &[Field] = &[];
/// Memory of a call besides its messages.
const CALL_BYTES: usize = 16 << 10;

/// Limits of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallLimits {
    /// From a call's first byte to its answer, for calls with one message.
    pub call: Duration,
    /// For one message to arrive, and between the messages of a bulk enrolment.
    pub message: Duration,
    /// Bytes of messages in memory, over all connections.
    pub message_bytes_max: usize,
}

/// What is known of a method from its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Method {
    limits: MessageLimits,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// One message, one answer; whether it changes anything.
    Unary { writes: bool },
    /// Many messages, read by the handler itself; whether they must keep coming.
    Stream { paced: bool, at_age: AtAge },
    /// Of other protocols: health checks and reflection.
    Other,
}

fn method(path: &str) -> Method {
    let (bytes_max, fields, kind) = match path {
        "/thenar.v1.Enrollment/BulkEnroll" => {
            (BULK_MESSAGE_BYTES_MAX, elements::BULK, Kind::Stream { paced: true, at_age: AtAge::Refuse })
        }
        // A turnstile's stream is silent as long as nobody comes.
        "/thenar.v1.Identification/IdentifyStream" => {
            (SEARCH_MESSAGE_BYTES_MAX, elements::IDENTIFY, Kind::Stream { paced: false, at_age: AtAge::End })
        }
        "/thenar.v1.Identification/Identify" => {
            (SEARCH_MESSAGE_BYTES_MAX, elements::IDENTIFY, Kind::Unary { writes: false })
        }
        "/thenar.v1.Identification/Verify" => {
            (SEARCH_MESSAGE_BYTES_MAX, elements::VERIFY, Kind::Unary { writes: false })
        }
        "/thenar.v1.Enrollment/Enroll" => (ENROLL_MESSAGE_BYTES_MAX, elements::ENROLL, Kind::Unary { writes: true }),
        "/thenar.v1.Enrollment/UpdateSubject" => {
            (ENROLL_MESSAGE_BYTES_MAX, elements::UPDATE, Kind::Unary { writes: true })
        }
        "/thenar.v1.Enrollment/Forget" => (SEARCH_MESSAGE_BYTES_MAX, NO_LISTS, Kind::Unary { writes: true }),
        path if path.starts_with("/thenar.v1.") => (SEARCH_MESSAGE_BYTES_MAX, NO_LISTS, Kind::Unary { writes: false }),
        _ => (SEARCH_MESSAGE_BYTES_MAX, NO_LISTS, Kind::Other),
    };
    Method { limits: MessageLimits { bytes_max, fields }, kind }
}

/// Answers one call, which is charged to the budget until its answer has been sent. A call counts as
/// large, so that open streams go on when no new one is taken.
pub(super) async fn answer(
    request: Request<Incoming>,
    routes: Routes,
    limits: CallLimits,
    share: Arc<Share>,
    connection: Connection,
) -> Response<GuardedBody<Body, Charge>> {
    let mut call = Charge::new(&share, limits.message_bytes_max);
    let response = match call.add(CALL_BYTES) {
        Ok(()) => admitted(request, routes, limits, share, connection).await,
        Err(_) => exhausted().into_http(),
    };
    response.map(|body| GuardedBody::new(body, call))
}

async fn admitted(
    request: Request<Incoming>,
    mut routes: Routes,
    limits: CallLimits,
    share: Arc<Share>,
    connection: Connection,
) -> Response<Body> {
    let Method { limits: message_limits, kind } = method(request.uri().path());
    let (mut head, body) = request.into_parts();
    let arrived = Instant::now();
    let asked = convert::deadline(&MetadataMap::from_headers(head.headers.clone()), arrived)
        .map(|deadline| deadline.saturating_duration_since(arrived));
    let silence = match kind {
        Kind::Stream { paced: false, .. } => None,
        _ => Some(limits.message),
    };
    let arriving = Arriving::new(body, message_limits, share, Pace { whole: limits.message, silence });
    // The message of a call with one is charged until it is answered.
    let held = Arc::new(Mutex::new(None));
    let (body, within) = match kind {
        Kind::Unary { .. } => {
            (arriving.into_body(Arc::clone(&held)), Some(asked.map_or(limits.call, |a| a.min(limits.call))))
        }
        Kind::Other => (arriving.into_body(Arc::clone(&held)), asked),
        Kind::Stream { at_age, .. } => {
            head.extensions.insert(Handover::new(arriving.until(at_age, connection.retiring().clone())));
            (Body::empty(), asked)
        }
    };
    let answer = routes.call(Request::from_parts(head, body));
    let answered = match within {
        Some(within) => timeout(within, answer).await,
        None => Ok(answer.await),
    };
    match answered {
        Ok(Ok(response)) => response,
        Ok(Err(never)) => match never {},
        Err(_) => late(kind).into_http(),
    }
}

fn late(kind: Kind) -> Status {
    Status::deadline_exceeded(match kind {
        Kind::Unary { writes: true } => {
            "the call's time is over; it is not known whether anything was changed: send the same request again"
        }
        _ => "the call's time is over",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::proto;
    use prost::Message as _;
    use prost_types::field_descriptor_proto::{Label, Type};

    /// The fields of a message that have elements, as the descriptors say, with those that lead to them.
    /// Floating-point numbers take no more memory than bytes.
    fn lists(files: &prost_types::FileDescriptorSet, message: &str) -> Vec<(i32, String, Vec<String>)> {
        let wanted = message.trim_start_matches(".thenar.v1.");
        let all = files.file.iter().filter(|file| file.package() == "thenar.v1").flat_map(|file| &file.message_type);
        let Some(message) = all.into_iter().find(|message| message.name() == wanted) else { return Vec::new() };
        let mut found = Vec::new();
        for field in &message.field {
            let inner = match field.r#type() {
                Type::Message => lists(files, field.type_name()),
                _ => Vec::new(),
            };
            let counts = field.label() == Label::Repeated && !matches!(field.r#type(), Type::Float | Type::Double);
            if counts || !inner.is_empty() {
                let inner = inner.into_iter().map(|(_, name, _)| name).collect();
                found.push((field.number(), field.name().to_owned(), inner));
            }
        }
        found
    }

    fn named(fields: &[Field]) -> Vec<(i32, String, Vec<String>)> {
        let inner = |field: &Field| field.fields.iter().map(|inner| inner.name.to_owned()).collect();
        fields.iter().map(|field| (field.number as i32, field.name.to_owned(), inner(field))).collect()
    }

    #[test]
    fn every_method_of_the_protocol_is_known_for_what_it_is() {
        let files = prost_types::FileDescriptorSet::decode(proto::DESCRIPTORS).unwrap();
        let mut seen = 0;
        for file in files.file.iter().filter(|file| file.package() == "thenar.v1") {
            for service in &file.service {
                for described in &service.method {
                    let path = format!("/thenar.v1.{}/{}", service.name(), described.name());
                    let streams = matches!(method(&path).kind, Kind::Stream { .. });
                    assert_eq!(streams, described.client_streaming(), "{path}");
                    assert!(streams || matches!(method(&path).kind, Kind::Unary { .. }), "{path}");
                    let declared = lists(&files, described.input_type());
                    assert_eq!(named(method(&path).limits.fields), declared, "{path}");
                    seen += 1;
                }
            }
        }
        assert!(seen >= 9, "{seen} methods");
        assert_eq!(method("/grpc.health.v1.Health/Watch").kind, Kind::Other);
    }
}
