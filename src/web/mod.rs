//! HTTP: metrics and health for operators' tools.
//!
//! The only module that knows axum's routes. Serves numbers, never a subject or a template.

use std::sync::OnceLock;
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower_service::Service as _;

use crate::net;
use crate::telemetry;

/// Connections of operators' tools at once.
pub(crate) const CONNECTIONS_MAX: usize = 64;
/// Their limits: a scraper keeps its connection from one scrape to the next.
const LIMITS: net::Limits = net::Limits {
    connections_max: CONNECTIONS_MAX,
    connections_per_address_max: CONNECTIONS_MAX / 2,
    handshake: Duration::from_secs(10),
    first_request: Duration::from_secs(10),
    idle: Duration::from_secs(150),
    age: Duration::from_secs(3600),
};

/// How often histograms are aggregated, so that memory stays bounded if nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// The recorder of this process. The first call installs it.
///
/// # Errors
/// If another recorder is installed, or the buckets are invalid.
pub fn recorder() -> Result<PrometheusHandle, BuildError> {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    if let Some(handle) = HANDLE.get() {
        return Ok(handle.clone());
    }
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), telemetry::LATENCY_BUCKETS_S)?
        .set_buckets_for_metric(Matcher::Full("thenar_batch_probes".into()), telemetry::BATCH_BUCKETS)?
        .install_recorder()?;
    telemetry::describe();
    Ok(HANDLE.get_or_init(|| handle).clone())
}

/// Serves `/metrics`, `/livez` and `/readyz` until `stop`. The server is ready once `started`, and no
/// longer when `draining` or `read_only`.
pub async fn serve(
    listener: TcpListener,
    handle: PrometheusHandle,
    started: CancellationToken,
    draining: CancellationToken,
    read_only: CancellationToken,
    stop: CancellationToken,
) {
    let upkeep = handle.clone();
    let ended = stop.clone();
    tokio::spawn(async move {
        while tokio::time::timeout(UPKEEP, ended.cancelled()).await.is_err() {
            upkeep.run_upkeep();
        }
    });
    let metrics = move || {
        let text = handle.render();
        async move { ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response() }
    };
    let ready = move || {
        let (started, draining) = (started.is_cancelled(), draining.is_cancelled());
        let read_only = read_only.is_cancelled();
        async move {
            match (started, draining) {
                (_, true) => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
                (false, false) => (StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
                (true, false) if read_only => (StatusCode::SERVICE_UNAVAILABLE, "read-only until restarted\n"),
                (true, false) => (StatusCode::OK, "ready\n"),
            }
        }
    };
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready));
    let mut http = net::Http::new(TokioExecutor::new()).http1_only();
    http.http1().timer(TokioTimer::new()).header_read_timeout(LIMITS.first_request);
    let listener = net::Listener { listener, tls: None, limits: LIMITS, http };
    let handler = move |_| {
        let router = router.clone();
        move |request| {
            let answer = router.clone().call(request);
            async move {
                match answer.await {
                    Ok(response) => response,
                    Err(never) => match never {},
                }
            }
        }
    };
    net::serve(listener, stop, handler).await;
}
