//! Connections: who may have one, for how long, and how they end.
//!
//! One accept loop serves gRPC and metrics alike. It holds limits in total and per address, gives a
//! client a bounded time for its handshake, its first request and a life without requests, and ends
//! connections that are old. A loop that cannot accept waits before it tries again.
//! Knows bytes, HTTP and clocks. Does not know what a request is about.

pub(crate) mod descriptors;
mod graceful_close;
mod life;
mod overwrite;
mod slots;
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

use graceful_close::Lingering;
pub(crate) use life::{Guarded, Life};
use overwrite::Overwriting;
use slots::Slots;

use crate::telemetry;

/// How long a client may take to end a connection that the server has ended for being idle.
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
    /// Without a request under way.
    pub idle: Duration,
    /// Of a connection in all; it is ended a little earlier or later, so that clients that came
    /// together do not come back together.
    pub age: Duration,
}

/// A socket with what is needed to let clients in.
pub(crate) struct Door {
    pub(crate) listener: TcpListener,
    pub(crate) tls: Option<TlsAcceptor>,
    pub(crate) limits: Limits,
    pub(crate) http: Http,
}

/// Takes connections until `draining`, then waits until every connection has ended. `handler` makes
/// the handler of one connection's requests. Connections are cut off when this future is dropped.
pub(crate) async fn serve<M, H, F, B>(door: Door, draining: CancellationToken, handler: M)
where
    M: Fn(Life) -> H,
    H: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Door { listener, tls, limits, http } = door;
    let slots = Slots::new(limits.connections_max, limits.connections_per_address_max);
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
            Err(error) if is_of_one_connection(&error) => continue,
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
        let slot = match slots.take(address.ip()) {
            Ok(slot) => slot,
            Err(full) => {
                telemetry::connection_refused(full);
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let life = Life::new();
        let handler = handler(life.clone());
        let (tls, http, draining) = (tls.clone(), http.clone(), draining.clone());
        connections.spawn(async move {
            let stream = Lingering::new(stream);
            match tls {
                None => drive(stream, &http, limits, life, draining, handler).await,
                Some(tls) => {
                    // A client that is refused by its certificate learns it from the handshake.
                    if let Ok(Ok(stream)) = timeout(limits.handshake, tls.accept(stream)).await {
                        drive(stream, &http, limits, life, draining, handler).await;
                    }
                }
            }
            drop(slot);
        });
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Whether an accept failed because of the connection that was to be accepted.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

/// Serves one connection to its end.
async fn drive<I, H, F, B>(io: I, http: &Http, limits: Limits, life: Life, draining: CancellationToken, handler: H)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    H: Fn(Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let service = service_fn(|request| {
        let (under_way, answer) = (life.begin(), handler(request));
        async move { Ok::<_, Infallible>(answer.await.map(|body| Guarded::new(body, under_way))) }
    });
    let mut connection = pin!(http.serve_connection(TokioIo::new(Overwriting::new(io)), service));
    let grace = tokio::select! {
        _ = connection.as_mut() => return,
        () = draining.cancelled() => None,
        () = life.quiet(limits.first_request, limits.idle) => Some(CLOSE_GRACE),
        () = sleep(scattered(limits.age)) => Some(AGE_GRACE),
    };
    if grace.is_some() {
        life.retire();
    }
    connection.as_mut().graceful_shutdown();
    match grace {
        // Whoever drains decides how long that may take.
        None => _ = connection.await,
        Some(grace) => _ = timeout(grace, connection).await,
    }
}

/// `age`, give or take a tenth.
fn scattered(age: Duration) -> Duration {
    age.mul_f64(0.9 + 0.2 * rand::random::<f64>())
}
