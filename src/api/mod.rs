//! gRPC: turns messages into commands to the service, and its answers into messages.
//!
//! The only server-side module that knows tonic. Checks what only a message can get wrong
//! (missing parts, enum numbers, sizes) and leaves every other check to the service.
//! `bulk_enroll` also takes the messages of a bulk enrolment without a socket, for the local import.

mod administration;
mod budget;
mod calls;
mod convert;
mod enrollment;
mod identification;
mod messages;
pub mod proto;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::ServingStatus;

use crate::api::proto::administration_server::AdministrationServer;
use crate::api::proto::enrollment_server::EnrollmentServer;
use crate::api::proto::identification_server::IdentificationServer;
use crate::net;
use crate::service::Service;

pub use calls::{CallLimits, SEARCH_MESSAGE_BYTES_MAX};
pub(crate) use enrollment::bulk_enroll;

/// Open calls on one connection.
const CALLS_PER_CONNECTION_MAX: u32 = 256;
/// Bytes that a client may send on one call before the server has read any.
const CALL_WINDOW_BYTES: u32 = 128 << 10;
/// Bytes that a client may send on all calls of one connection before the server has read any.
const CONNECTION_WINDOW_BYTES: u32 = 256 << 10;
/// How often a silent connection is pinged, and how long it may take to answer.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Why gRPC could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The descriptors for reflection are invalid.
    #[error("reflection could not be served: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A socket for gRPC, with the limits of its clients.
pub(crate) struct GrpcSocket {
    pub(crate) listener: TcpListener,
    pub(crate) tls: Option<TlsAcceptor>,
    pub(crate) connections: net::Limits,
    pub(crate) calls: CallLimits,
}

/// HTTP/2 with limits.
fn http() -> net::Http {
    let mut http = net::Http::new(TokioExecutor::new()).http2_only();
    http.http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .max_concurrent_streams(CALLS_PER_CONNECTION_MAX)
        .initial_stream_window_size(CALL_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    http
}

/// Serves until the service drains: then no new call is accepted, those in flight are answered, and
/// this returns.
///
/// # Errors
/// [`ServeError`] if the services cannot be set up.
pub(crate) async fn serve(service: Arc<Service>, socket: GrpcSocket) -> Result<(), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<IdentificationServer<identification::Api>>().await;
    health.set_serving::<EnrollmentServer<enrollment::Api>>().await;
    health.set_serving::<AdministrationServer<administration::Api>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // The limits of messages are checked as they arrive, see `calls`; tonic's own limit is never lower.
    let any = calls::BULK_MESSAGE_BYTES_MAX;
    let identification = identification::Api(Arc::clone(&service));
    let enrollment = enrollment::Api(Arc::clone(&service));
    let administration = administration::Api(Arc::clone(&service));
    let routes = Routes::new(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(IdentificationServer::new(identification).max_decoding_message_size(any))
        .add_service(EnrollmentServer::new(enrollment).max_decoding_message_size(any))
        .add_service(AdministrationServer::new(administration).max_decoding_message_size(any))
        .prepare();

    let GrpcSocket { listener, tls, connections: limits, calls } = socket;
    let budget = budget::Budget::new(calls.message_bytes_max);
    let listener = net::Listener { listener, tls, limits, http: http() };
    let goodbye = CancellationToken::new();
    let handler = move |connection: net::Connection| {
        let (routes, share) = (routes.clone(), budget.share());
        move |request| calls::answer(request, routes.clone(), calls, Arc::clone(&share), connection.clone())
    };
    let serving = net::serve(listener, goodbye.clone(), handler);
    let draining = async {
        service.draining().cancelled().await;
        health.set_not_serving::<IdentificationServer<identification::Api>>().await;
        health.set_not_serving::<EnrollmentServer<enrollment::Api>>().await;
        health.set_not_serving::<AdministrationServer<administration::Api>>().await;
        // The empty name stands for the server as a whole.
        health.set_service_status("", ServingStatus::NotServing).await;
        goodbye.cancel();
    };
    let read_only = async {
        tokio::select! {
            () = service.read_only().cancelled() => {
                health.set_not_serving::<EnrollmentServer<enrollment::Api>>().await;
                health.set_service_status("", ServingStatus::NotServing).await;
            }
            () = service.draining().cancelled() => {}
        }
    };
    tokio::join!(serving, draining, read_only);
    Ok(())
}
