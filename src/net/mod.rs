//! Connections: limits, timeouts, TLS and graceful close.
//!
//! One accept loop serves gRPC and metrics alike. It holds limits in total and per address, gives a
//! client a bounded time for its handshake, its first request and for being idle, and ends connections that
//! have reached their age. If accepting fails, the loop waits before it tries again.
//! Knows bytes, HTTP and clocks. Does not know what a request is about.

mod connection;
mod connection_limits;
pub(crate) mod descriptors;
mod graceful_close;
mod read_buffer;
pub(crate) mod tls;

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::time::Duration;

use axum::http::{Request, Response};
use bytes::Bytes;
use http_body::Body;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub(crate) use connection::{Connection, GuardedBody};
use connection_limits::ConnectionLimiter;
use graceful_close::GracefulClose;
use read_buffer::ClearedReads;
pub use tls::TlsConfig;

use crate::telemetry;

/// How long a client may take to close a connection that the server ends because it is idle.
const CLOSE_GRACE: Duration = Duration::from_secs(2);
/// How long the calls of a connection that has reached its age may take to end.
const AGE_GRACE: Duration = Duration::from_secs(30);
/// The wait after a first failed accept; it doubles with each further failure.
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// The longest wait between two attempts to accept.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How HTTP is spoken on a connection.
pub(crate) type Http = auto::Builder<TokioExecutor>;

/// Limits of the connections to one listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once.
    pub connections_max: usize,
    /// Connections at once from one address (IPv6: from one /64 network).
    pub connections_per_address_max: usize,
    /// For the TLS handshake.
    pub handshake: Duration,
    /// From the handshake to the first request.
    pub first_request: Duration,
    /// Without a request in flight.
    pub idle: Duration,
    /// From accepting a connection to ending it; a tenth more or less, so that clients that connected
    /// together do not reconnect together.
    pub age: Duration,
}

/// A listening socket, and how its connections are served.
pub(crate) struct Listener {
    pub(crate) listener: TcpListener,
    pub(crate) tls: Option<TlsAcceptor>,
    pub(crate) limits: Limits,
    pub(crate) http: Http,
}

/// Accepts connections until `draining`, then waits until every connection has ended. `handler` makes
/// the request handler of one connection. Dropping this future cuts the connections off.
pub(crate) async fn serve<M, H, F, B>(door: Listener, draining: CancellationToken, handler: M)
where
    M: Fn(Connection) -> H,
    H: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Listener { listener, tls, limits, http } = door;
    let limiter = ConnectionLimiter::new(limits.connections_max, limits.connections_per_address_max);
    let mut connections = JoinSet::new();
    let mut pause = Duration::ZERO;
    loop {
        let accepted = tokio::select! {
            biased;
            () = draining.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if concerns_one_connection(&error) => continue,
            Err(error) => {
                if pause.is_zero() {
                    tracing::warn!(%error, "connections cannot be accepted; trying again");
                }
                pause = (pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
                let _ = timeout(pause, draining.cancelled()).await;
                continue;
            }
        };
        pause = Duration::ZERO;
        let permit = match limiter.acquire(address.ip()) {
            Ok(permit) => permit,
            Err(limit) => {
                telemetry::connection_refused(limit);
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let state = Connection::new();
        let handler = handler(state.clone());
        let (tls, http, draining) = (tls.clone(), http.clone(), draining.clone());
        connections.spawn(async move {
            let stream = GracefulClose::new(stream);
            match tls {
                None => serve_connection(stream, &http, limits, state, draining, handler).await,
                Some(tls) => {
                    // A client whose certificate is refused learns it from the handshake.
                    if let Ok(Ok(stream)) = timeout(limits.handshake, tls.accept(stream)).await {
                        serve_connection(stream, &http, limits, state, draining, handler).await;
                    }
                }
            }
            drop(permit);
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Whether accepting failed because of one connection, and not because of the listener.
fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

/// Serves one connection to its end.
async fn serve_connection<I, H, F, B>(
    io: I,
    http: &Http,
    limits: Limits,
    state: Connection,
    draining: CancellationToken,
    handler: H,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let service = service_fn(|request| {
        let (in_flight, answer) = (state.begin_request(), handler(request));
        async move { Ok::<_, Infallible>(answer.await.map(|body| GuardedBody::new(body, in_flight))) }
    });
    let mut connection = pin!(http.serve_connection(TokioIo::new(ClearedReads::new(io)), service));
    let grace = tokio::select! {
        _ = connection.as_mut() => return,
        () = draining.cancelled() => None,
        () = state.idle_timeout(limits.first_request, limits.idle) => Some(CLOSE_GRACE),
        () = sleep(jittered(limits.age)) => Some(AGE_GRACE),
    };
    if grace.is_some() {
        state.retire();
    }
    connection.as_mut().graceful_shutdown();
    match grace {
        // The server, which drains, decides how long that may take.
        None => _ = connection.await,
        Some(grace) => _ = timeout(grace, connection).await,
    }
}

/// `age`, up to a tenth more or less.
fn jittered(age: Duration) -> Duration {
    age.mul_f64(0.9 + 0.2 * rand::random::<f64>())
}
