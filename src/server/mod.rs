//! Builds the server from its configuration, runs it, and drains it.
//!
//! [`open`] makes the use cases over a data folder, without a socket: the local import uses them as
//! they are. [`run`] puts the sockets before them.

pub mod config;
pub mod data_folder;
#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use thenar_index::storage::{Files, Storage};
use thenar_index::{KeyId, Lsn, Origin};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::api;
use crate::engine::cpu::{CpuEngine, CpuEngineError};
use crate::engine::failover::Failover;
use crate::engine::gpu::{AdapterChoice, GpuEngine, GpuOptions};
use crate::engine::{Engine, EngineError};
use crate::gallery::{self, Gallery, GalleryError, Setup};
use crate::model::Invalid;
use crate::net::descriptors::{self, TooFewDescriptors};
use crate::net::tls::{self, TlsError};
use crate::process::supervisor::{Died, Supervisor};
use crate::registry::sqlite::SqliteRegistry;
use crate::registry::{GalleryIdentity, Registry, RegistryError};
use crate::search::batch::{BatchConfig, Batcher, SearchThreads};
use crate::server::config::{Config, EngineConfig, EngineKind};
use crate::server::data_folder::{DataFolder, FolderError};
use crate::service::writer::{Writer, WriterConfig, WriterThread};
use crate::service::{Core, Parts, Service, ServiceError};
use crate::vault::{CREDENTIAL, KeyError, KeySource, MasterKey, Rotation, Vault};
use crate::web;

/// Why the server did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The data folder cannot be had.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The master key cannot be had.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The gallery cannot be opened.
    #[error(transparent)]
    Gallery(#[from] GalleryError),
    /// The engine that was asked for cannot be had.
    #[error("engine: {0}")]
    Engine(#[from] EngineError),
    /// The CPU engine cannot be had.
    #[error("engine: {0}")]
    CpuEngine(#[from] CpuEngineError),
    /// The dimension is not one a gallery can have.
    #[error(transparent)]
    Dim(#[from] Invalid),
    /// A socket cannot be had.
    #[error("{key}: cannot listen on {address}: {source}")]
    Listen {
        /// Key of the configuration.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The configured connections do not fit in.
    #[error(transparent)]
    Descriptors(#[from] TooFewDescriptors),
    /// TLS cannot be spoken.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// gRPC failed.
    #[error(transparent)]
    Serve(#[from] api::ServeError),
    /// Metrics cannot be recorded.
    #[error("metrics: {0}")]
    Metrics(#[from] metrics_exporter_prometheus::BuildError),
    /// The system gave no thread.
    #[error("could not start a thread: {0}")]
    Thread(io::Error),
    /// A thread panicked.
    #[error(transparent)]
    Died(#[from] Died),
}

/// The use cases over a data folder, with the threads behind them.
pub struct Opened {
    /// The use cases.
    pub service: Arc<Service>,
    stage: Arc<Mutex<Stage>>,
    _folder: DataFolder,
}

/// How far a folder is opened.
enum Stage {
    /// There is no gallery yet.
    Unopened(Box<Opening>),
    /// There is one.
    Open(Threads),
    /// None will be opened any more.
    Closed,
}

/// What is behind an open gallery.
struct Threads {
    core: Core,
    search: SearchThreads,
    writer: WriterThread,
    /// Mends the engine, compacts the index.
    keepers: [std::thread::JoinHandle<()>; 2],
}

impl Opened {
    /// What is searched.
    ///
    /// # Panics
    /// Before the first enrolment, if that is to decide on the dimension; so does `rotation`.
    /// Never for what [`open_existing`] opened.
    #[must_use]
    pub fn gallery(&self) -> &Arc<Gallery> {
        &self.service.core().expect("the gallery is open").gallery
    }

    /// How embeddings are rotated before they are searched for.
    #[must_use]
    pub fn rotation(&self) -> &Arc<Rotation> {
        &self.service.core().expect("the gallery is open").rotation
    }

    /// Answers what was admitted, checkpoints, and lets go of the folder.
    pub fn close(self) {
        let Self { service, stage, _folder } = self;
        // Waits for an opening that is under way. A connection that was cut off may still hold the
        // service, for as long as its client likes.
        let stage = std::mem::replace(&mut *stage.lock(), Stage::Closed);
        drop(service);
        let Stage::Open(Threads { core, search, writer, keepers }) = stage else { return };
        core.batcher.close();
        core.writer.close();
        search.join();
        writer.join();
        core.gallery.close();
        for keeper in keepers {
            keeper.thread().unpark();
            // A panic is the supervisor's to report.
            let _ = keeper.join();
        }
    }
}

/// What a gallery is opened with.
struct Opening {
    vault: Vault,
    registry: Arc<dyn Registry>,
    index: PathBuf,
    data: PathBuf,
    reserve_bytes: u64,
    batch: BatchConfig,
    engines: Engines,
    supervisor: Supervisor,
}

impl Opening {
    /// Rotation, index, engine, and the threads over them.
    fn open(&self, dim: usize) -> Result<Threads, ServerError> {
        let Self { vault, registry, supervisor, .. } = self;
        let storage: Arc<dyn Storage> = Arc::new(Files);
        let identity = GalleryIdentity { dim, key_id: vault.key_id() };
        let gallery_id = gallery::claim(&**registry, &storage, &self.index, &identity)?;
        let sealer = Arc::new(vault.sealer(dim));
        let setup = Setup {
            dir: self.index.clone(),
            storage,
            dim,
            origin: Origin { gallery: gallery_id, key: KeyId(vault.key_id()) },
            registry: Arc::clone(registry),
            sealer: Arc::clone(&sealer),
        };
        let (engine, standby) = self.engines.clone();
        // The rotation takes a moment to make, and so does opening an index: both at once.
        let (rotation, gallery) = std::thread::scope(|scope| {
            let rotation = scope.spawn(|| Rotation::new(vault, dim));
            let gallery = Gallery::open(setup, engine, standby);
            (rotation.join(), gallery)
        });
        let gallery = Arc::new(gallery?);
        let rotation = rotation.map_err(|_| ServerError::Thread(io::Error::other("the rotation panicked")))??;

        let (batcher, search) = Batcher::start(self.batch, &gallery, supervisor).map_err(ServerError::Thread)?;
        let writer_config = WriterConfig { data: self.data.clone(), reserve_bytes: self.reserve_bytes };
        let (writer, writer_thread) =
            Writer::start(writer_config, Arc::clone(registry), Arc::clone(&gallery), supervisor)
                .map_err(ServerError::Thread)?;
        let mender = supervisor
            .spawn("mender", {
                let gallery = Arc::clone(&gallery);
                move || gallery::mend_forever(&gallery)
            })
            .map_err(ServerError::Thread)?;
        let compactor = supervisor
            .spawn("compactor", {
                let (gallery, reserve_bytes) = (Arc::clone(&gallery), self.reserve_bytes);
                move || gallery::compact_forever(&gallery, reserve_bytes)
            })
            .map_err(ServerError::Thread)?;
        let status = gallery.status();
        tracing::info!(
            templates = status.templates,
            dim,
            engine = status.engine.kind,
            adapter = %status.engine.adapter,
            opened_ms = status.opened.took.as_millis(),
            replayed = status.opened.replayed,
            "the gallery is open"
        );
        let (batcher, writer) = (Arc::new(batcher), Arc::new(writer));
        let core = Core { gallery, batcher, writer, rotation: Arc::new(rotation), sealer };
        Ok(Threads { core, search, writer: writer_thread, keepers: [mender, compactor] })
    }
}

/// Opens the gallery of `stage` with `dim` dimensions.
fn open_stage(stage: &Mutex<Stage>, dim: usize) -> Result<Core, ServiceError> {
    let mut stage = stage.lock();
    match &*stage {
        Stage::Unopened(opening) => {
            let threads = opening.open(dim).map_err(|e| ServiceError::NoGallery(Arc::new(e)))?;
            let core = threads.core.clone();
            *stage = Stage::Open(threads);
            Ok(core)
        }
        // Opened for a caller that went away before it learnt of it.
        Stage::Open(threads) => Ok(threads.core.clone()),
        Stage::Closed => Err(ServiceError::Draining),
    }
}

/// Opens a data folder: key, registry, rotation, index, engine, and the threads over them.
///
/// # Errors
/// [`ServerError`] with what is missing or wrong.
pub fn open(config: &Config, supervisor: &Supervisor) -> Result<Opened, ServerError> {
    open_taken(config, supervisor, DataFolder::take, engine, |_| ())
}

/// As [`open`], but refuses a folder that holds no gallery instead of making one. The gallery is open.
///
/// # Errors
/// As [`open`], and [`FolderError::Empty`].
pub fn open_existing(config: &Config, supervisor: &Supervisor) -> Result<Opened, ServerError> {
    let opened = open_taken(config, supervisor, DataFolder::take_existing, engine, |_| ())?;
    match opened.service.core() {
        Some(_) => Ok(opened),
        None => Err(FolderError::Empty { path: config.data.clone() }.into()),
    }
}

fn open_taken(
    config: &Config,
    supervisor: &Supervisor,
    take: fn(&Path) -> Result<DataFolder, FolderError>,
    engine: impl FnOnce(&EngineConfig, &Path, &Supervisor) -> Result<Engines, ServerError>,
    meddle: impl FnOnce(&Arc<SqliteRegistry>),
) -> Result<Opened, ServerError> {
    let vault = Vault::new(MasterKey::load(&key_source(config.key_file.as_deref()))?);
    let folder = take(&config.data)?;
    let registry = SqliteRegistry::open(&folder.registry(), vault.registry_keys())?;
    let claimed = registry.identity()?.map(|(identity, _)| identity.dim);
    // An empty gallery has the dimension that is configured, or that of whoever comes first.
    let used = registry.last_lsn()? > Lsn(0);
    let dim = config.dim.or(claimed.filter(|_| used));
    if let Some(dim) = dim.or(claimed) {
        // Another key, dimension or index is noticed before anything is opened.
        let storage: Arc<dyn Storage> = Arc::new(Files);
        gallery::claim(&registry, &storage, &folder.index(), &GalleryIdentity { dim, key_id: vault.key_id() })?;
    }
    let engines = engine(&config.engine, folder.path(), supervisor)?;
    let (engine, digester) = (engines.0.describe(), vault.request_digester());
    let registry = Arc::new(registry);
    meddle(&registry);
    let registry: Arc<dyn Registry> = registry;
    let opening = Opening {
        vault,
        registry: Arc::clone(&registry),
        index: folder.index(),
        data: folder.path().to_owned(),
        reserve_bytes: config.reserve_bytes,
        batch: config.batch,
        engines,
        supervisor: supervisor.clone(),
    };
    let (stage, core) = match dim {
        Some(dim) => {
            let threads = opening.open(dim)?;
            let core = threads.core.clone();
            (Stage::Open(threads), Some(core))
        }
        None => {
            tracing::info!("nobody is enrolled: the first enrolment decides on the number of dimensions");
            (Stage::Unopened(Box::new(opening)), None)
        }
    };
    let stage = Arc::new(Mutex::new(stage));
    let service = Arc::new(Service::new(Parts {
        registry,
        core,
        open: Box::new({
            let stage = Arc::clone(&stage);
            move |dim| open_stage(&stage, dim)
        }),
        engine,
        digester,
        policies: config.policies.clone(),
        certificate: config.certificate,
        venues: config.venues.clone(),
        supervisor: supervisor.clone(),
    }));
    Ok(Opened { service, stage, _folder: folder })
}

/// Where the master key is: the file that is named, else systemd's credential where systemd started
/// this process, else the environment.
#[must_use]
pub fn key_source(file: Option<&Path>) -> KeySource {
    match file {
        Some(path) => KeySource::File(path.to_owned()),
        None if std::env::var_os("CREDENTIALS_DIRECTORY").is_some() => KeySource::Credential(CREDENTIAL.into()),
        None => KeySource::Environment,
    }
}

type Engines = (Arc<dyn Engine>, Option<Arc<Failover>>);

/// The engine that is configured; a GPU's compiled kernels are kept in `folder`.
fn engine(config: &EngineConfig, folder: &Path, supervisor: &Supervisor) -> Result<Engines, ServerError> {
    let cpu: Arc<dyn Engine> = Arc::new(CpuEngine::new(config.threads)?);
    let options =
        GpuOptions { matrices: config.matrices, kernels_in: Some(folder.to_owned()), supervisor: supervisor.clone() };
    let gpu = match &config.kind {
        EngineKind::Cpu => None,
        EngineKind::Auto => match GpuEngine::with_options(AdapterChoice::RealGpu, options) {
            Ok(gpu) => Some(gpu),
            Err(error) => {
                tracing::info!(%error, "the CPU engine is used");
                None
            }
        },
        EngineKind::Gpu { adapter } => {
            let choice = adapter.clone().map_or(AdapterChoice::RealGpu, AdapterChoice::Named);
            Some(GpuEngine::with_options(choice, options)?)
        }
    };
    Ok(match gpu {
        None => (cpu, None),
        Some(gpu) => {
            let both = Arc::new(Failover::new(Arc::new(gpu), cpu));
            (Arc::clone(&both) as Arc<dyn Engine>, Some(both))
        }
    })
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
    /// Metrics, where they are served.
    pub metrics: Option<SocketAddr>,
}

/// When a running server is to end.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    /// Drain, then end.
    pub drain: CancellationToken,
    /// Wait no longer for open calls; has a meaning during a drain.
    pub hurry: CancellationToken,
}

/// Runs a server until `stop`, then drains it. `ready` is called once, when it takes calls.
///
/// # Errors
/// [`ServerError`] where it cannot start, a socket fails, or one of its threads died.
pub async fn run(config: Config, stop: Stop, ready: impl FnOnce(Listening) + Send) -> Result<(), ServerError> {
    run_over(config, stop, ready, open).await
}

/// As [`run`], over what `open` opens.
async fn run_over(
    config: Config,
    stop: Stop,
    ready: impl FnOnce(Listening) + Send,
    open: impl FnOnce(&Config, &Supervisor) -> Result<Opened, ServerError> + Send + 'static,
) -> Result<(), ServerError> {
    let handle = web::recorder()?;
    // TLS and sockets first: what is wrong with them is found out before a gallery is opened.
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
