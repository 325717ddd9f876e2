//! Builds the server from its configuration, runs it, and drains it.
//!
//! [`open()`] makes the use cases over a data folder, without a socket: the local import uses them as
//! they are. [`run()`] adds the sockets.

pub mod config;
pub mod data_folder;
mod engines;
mod open;
#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use self::open::{Opened, key_source, open, open_existing};
use crate::api;
use crate::engine::EngineError;
use crate::engine::cpu::CpuEngineError;
use crate::gallery::GalleryError;
use crate::model::Invalid;
use crate::net::descriptors::{self, TooFewDescriptors};
use crate::net::tls::{self, TlsError};
use crate::process::supervisor::{Died, Supervisor};
use crate::registry::RegistryError;
use crate::server::config::Config;
use crate::server::data_folder::FolderError;
use crate::vault::KeyError;
use crate::web;

/// Why the server did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The data folder cannot be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The master key cannot be loaded.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The gallery cannot be opened.
    #[error(transparent)]
    Gallery(#[from] GalleryError),
    /// The configured engine is not available.
    #[error("engine: {0}")]
    Engine(#[from] EngineError),
    /// The CPU engine is not available.
    #[error("engine: {0}")]
    CpuEngine(#[from] CpuEngineError),
    /// A gallery cannot have this dimension.
    #[error(transparent)]
    Dim(#[from] Invalid),
    /// A socket cannot be opened.
    #[error("{key}: cannot listen on {address}: {source}")]
    Listen {
        /// Key of the configuration.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The process may not open enough files for the configured connections.
    #[error(transparent)]
    Descriptors(#[from] TooFewDescriptors),
    /// TLS is misconfigured.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// gRPC failed.
    #[error(transparent)]
    Serve(#[from] api::ServeError),
    /// Metrics cannot be recorded.
    #[error("metrics: {0}")]
    Metrics(#[from] metrics_exporter_prometheus::BuildError),
    /// The operating system refused to create a thread.
    #[error("could not start a thread: {0}")]
    Thread(io::Error),
    /// A thread panicked.
    #[error(transparent)]
    Died(#[from] Died),
}

async fn listen(key: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), ServerError> {
    let error = |source| ServerError::Listen { key, address, source };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let bound = listener.local_addr().map_err(error)?;
    Ok((listener, bound))
}

/// Where a running server listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listening {
    /// gRPC.
    pub grpc: SocketAddr,
    /// Metrics, if they are served.
    pub metrics: Option<SocketAddr>,
}

/// Tells a running server to end.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Drain, then end.
    pub drain: CancellationToken,
    /// Do not wait for open calls any longer, once draining.
    pub hurry: CancellationToken,
}

/// Runs a server until `stop`, then drains it. `ready` is called once, as soon as it takes calls.
///
/// # Errors
/// [`ServerError`] if it cannot start, a socket fails, or one of its threads died.
pub async fn run(config: Config, stop: Stop, ready: impl FnOnce(Listening) + Send) -> Result<(), ServerError> {
    run_over(config, stop, ready, open).await
}

/// As [`run()`], with another way to open the data folder.
async fn run_over(
    config: Config,
    stop: Stop,
    ready: impl FnOnce(Listening) + Send,
    open: impl FnOnce(&Config, &Supervisor) -> Result<Opened, ServerError> + Send + 'static,
) -> Result<(), ServerError> {
    let handle = web::recorder()?;
    // TLS and sockets first, so that their errors appear before a gallery is opened.
    let tls = config.server.tls.as_ref().map(tls::acceptor).transpose()?;
    descriptors::raise(config.server.connections.connections_max, web::CONNECTIONS_MAX)?;
    let (grpc, grpc_address) = listen("server.listen", config.server.listen).await?;
    let metrics = match config.metrics {
        Some(address) => Some(listen("metrics.listen", address).await?),
        None => None,
    };
    let draining = stop.drain.child_token();
    let supervisor = Supervisor::new(draining.clone());
    // Liveness and readiness are answered while the gallery is being opened.
    let (started, metrics_stop) = (CancellationToken::new(), CancellationToken::new());
    let metrics_address = metrics.as_ref().map(|(_, address)| *address);
    let metrics_task = metrics.map(|(listener, _)| {
        let (started, draining, read_only) = (started.clone(), draining.clone(), supervisor.read_only().clone());
        tokio::spawn(web::serve(listener, handle, started, draining, read_only, metrics_stop.clone()))
    });
    let opened = {
        let (config, supervisor) = (config.clone(), supervisor.clone());
        tokio::task::spawn_blocking(move || open(&config, &supervisor))
            .await
            .map_err(|e| ServerError::Thread(io::Error::other(e)))??
    };
    started.cancel();
    ready(Listening { grpc: grpc_address, metrics: metrics_address });

    let socket =
        api::GrpcSocket { listener: grpc, tls, connections: config.server.connections, calls: config.server.calls };
    let serving = api::serve(Arc::clone(&opened.service), socket);
    let patience = async {
        draining.cancelled().await;
        tracing::info!(seconds = config.server.drain_seconds, "draining");
        let wait = Duration::from_secs(config.server.drain_seconds);
        if tokio::time::timeout(wait, stop.hurry.cancelled()).await.is_ok() {
            tracing::warn!("told to stop once more");
        }
    };
    let served = tokio::select! {
        served = serving => served,
        () = patience => {
            tracing::warn!("calls were still open at the end of the drain; they are cut off");
            Ok(())
        }
    };
    metrics_stop.cancel();
    if let Some(task) = metrics_task
        && task.await.is_err()
    {
        tracing::warn!("metrics were not served to the end");
    }
    let closing = supervisor.clone();
    let closed = tokio::task::spawn_blocking(move || closing.watch("closing", || opened.close())).await;
    closed.map_err(|e| ServerError::Thread(io::Error::other(e)))??;
    if let Some(died) = supervisor.died() {
        return Err(died.into());
    }
    tracing::info!("stopped");
    Ok(served?)
}
