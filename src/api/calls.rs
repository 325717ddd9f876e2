//! One call, between the connection and tonic: its message limit, its time limits, its bytes.

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
use super::messages::{Arriving, AtAge, Handover, Pace, exhausted};
use crate::net::{Connection, GuardedBody};

/// Bytes of one message, where nothing else is said.
pub const SEARCH_MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Bytes of one message to `Enroll` and `UpdateSubject`.
pub(super) const ENROLL_MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Bytes of one message to `BulkEnroll`.
pub(super) const BULK_MESSAGE_BYTES_MAX: usize = 8 << 20;

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

/// What is known of a method before its call is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Method {
    bytes_max: usize,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// One message, one answer; whether it changes anything.
    Unary { writes: bool },
    /// Many messages, taken by the handler itself; whether they must keep coming.
    Stream { paced: bool, at_age: AtAge },
    /// Somebody else's: health checks and reflection.
    Other,
}

fn method(path: &str) -> Method {
    let (bytes_max, kind) = match path {
        "/thenar.v1.Enrollment/BulkEnroll" => {
            (BULK_MESSAGE_BYTES_MAX, Kind::Stream { paced: true, at_age: AtAge::Refuse })
        }
        // A gate's stream is silent for as long as nobody comes.
        "/thenar.v1.Identification/IdentifyStream" => {
            (SEARCH_MESSAGE_BYTES_MAX, Kind::Stream { paced: false, at_age: AtAge::End })
        }
        "/thenar.v1.Enrollment/Enroll" | "/thenar.v1.Enrollment/UpdateSubject" => {
            (ENROLL_MESSAGE_BYTES_MAX, Kind::Unary { writes: true })
        }
        "/thenar.v1.Enrollment/Forget" => (SEARCH_MESSAGE_BYTES_MAX, Kind::Unary { writes: true }),
        path if path.starts_with("/thenar.v1.") => (SEARCH_MESSAGE_BYTES_MAX, Kind::Unary { writes: false }),
        _ => (SEARCH_MESSAGE_BYTES_MAX, Kind::Other),
    };
    Method { bytes_max, kind }
}

/// Answers one call, which is charged to the budget until its answer has been sent. A call counts as
/// large: streams that are open go on where no further one is taken.
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
    let Method { bytes_max, kind } = method(request.uri().path());
    let (mut head, body) = request.into_parts();
    let arrived = Instant::now();
    let asked = convert::deadline(&MetadataMap::from_headers(head.headers.clone()), arrived)
        .map(|deadline| deadline.saturating_duration_since(arrived));
    let silence = match kind {
        Kind::Stream { paced: false, .. } => None,
        _ => Some(limits.message),
    };
    let arriving = Arriving::new(body, bytes_max, share, Pace { whole: limits.message, silence });
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
                    seen += 1;
                }
            }
        }
        assert!(seen >= 9, "{seen} methods");
        assert_eq!(method("/grpc.health.v1.Health/Watch").kind, Kind::Other);
    }
}
