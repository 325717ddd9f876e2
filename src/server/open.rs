//! Opens a data folder: key, registry, rotation, index, engine, and the threads over them.
//!
//! If no dimension is configured and nobody is enrolled, the gallery is opened by the first enrolment.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use thenar_index::storage::{Files, Storage};
use thenar_index::{KeyId, Lsn, Origin};

use super::ServerError;
use super::config::{Config, EngineConfig};
use super::data_folder::{DataFolder, FolderError};
use super::engines::{self, Engines};
use crate::gallery::{self, Gallery, Setup};
use crate::process::supervisor::Supervisor;
use crate::registry::sqlite::SqliteRegistry;
use crate::registry::{GalleryIdentity, Registry};
use crate::search::batch::{BatchConfig, Batcher, SearchThreads};
use crate::service::writer::{Writer, WriterConfig, WriterThread};
use crate::service::{Core, Parts, Service, ServiceError};
use crate::vault::{CREDENTIAL, KeySource, MasterKey, Rotation, Vault};

/// The use cases over a data folder, with the threads behind them.
pub struct Opened {
    /// The use cases.
    pub service: Arc<Service>,
    stage: Arc<Mutex<Stage>>,
    _folder: DataFolder,
}

/// How far opening has come.
enum Stage {
    /// No gallery yet.
    Unopened(Box<Opening>),
    /// The gallery is open.
    Open(Threads),
    /// Closed for good.
    Closed,
}

/// The threads of an open gallery.
struct Threads {
    core: Core,
    search: SearchThreads,
    writer: WriterThread,
    /// Bring a lost engine back, and compact the index.
    keepers: [JoinHandle<()>; 2],
}

impl Opened {
    /// The open gallery.
    ///
    /// # Panics
    /// Before the first enrolment, if that decides on the dimension, as `rotation` does.
    /// Never after [`open_existing`].
    #[must_use]
    pub fn gallery(&self) -> &Arc<Gallery> {
        &self.service.core().expect("the gallery is open").gallery
    }

    /// Rotates embeddings before they are searched for.
    #[must_use]
    pub fn rotation(&self) -> &Arc<Rotation> {
        &self.service.core().expect("the gallery is open").rotation
    }

    /// Answers what was admitted, checkpoints, and releases the folder.
    pub fn close(self) {
        let Self { service, stage, _folder } = self;
        // Waits if the gallery is being opened. A connection that was cut off may hold the
        // service for as long as its client likes.
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
            // The supervisor reports panics.
            let _ = keeper.join();
        }
    }
}

/// What is needed to open the gallery.
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
        let (engine, failover) = self.engines.clone();
        // Making the rotation takes a moment, and so does opening an index: do both at once.
        let (rotation, gallery) = std::thread::scope(|scope| {
            let rotation = scope.spawn(|| Rotation::new(vault, dim));
            let gallery = Gallery::open(setup, engine, failover);
            (rotation.join(), gallery)
        });
        let gallery = Arc::new(gallery?);
        let rotation = rotation.map_err(|_| ServerError::Thread(io::Error::other("the rotation panicked")))??;

        let (batcher, search) = Batcher::start(self.batch, &gallery, supervisor).map_err(ServerError::Thread)?;
        let writer_config = WriterConfig { data: self.data.clone(), reserve_bytes: self.reserve_bytes };
        let (writer, writer_thread) =
            Writer::start(writer_config, Arc::clone(registry), Arc::clone(&gallery), supervisor)
                .map_err(ServerError::Thread)?;
        let recovery = supervisor
            .spawn("engine-recovery", {
                let gallery = Arc::clone(&gallery);
                move || gallery::recover_engine_forever(&gallery)
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
        Ok(Threads { core, search, writer: writer_thread, keepers: [recovery, compactor] })
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
        // It was opened for a caller that has gone since.
        Stage::Open(threads) => Ok(threads.core.clone()),
        Stage::Closed => Err(ServiceError::Draining),
    }
}

/// Opens a data folder: key, registry, rotation, index, engine, and the threads over them.
///
/// # Errors
/// [`ServerError`] that says what is missing or wrong.
pub fn open(config: &Config, supervisor: &Supervisor) -> Result<Opened, ServerError> {
    open_taken(config, supervisor, DataFolder::take, engines::build, |_| ())
}

/// As [`open`], but refuses a folder without a gallery instead of creating one. The gallery is then open.
///
/// # Errors
/// As [`open`], and [`FolderError::Empty`].
pub fn open_existing(config: &Config, supervisor: &Supervisor) -> Result<Opened, ServerError> {
    let opened = open_taken(config, supervisor, DataFolder::take_existing, engines::build, |_| ())?;
    match opened.service.core() {
        Some(_) => Ok(opened),
        None => Err(FolderError::Empty { path: config.data.clone() }.into()),
    }
}

pub(super) fn open_taken(
    config: &Config,
    supervisor: &Supervisor,
    take: fn(&Path) -> Result<DataFolder, FolderError>,
    engine: impl FnOnce(&EngineConfig, &Path) -> Result<Engines, ServerError>,
    meddle: impl FnOnce(&Arc<SqliteRegistry>),
) -> Result<Opened, ServerError> {
    let vault = Vault::new(MasterKey::load(&key_source(config.key_file.as_deref()))?);
    let folder = take(&config.data)?;
    let registry = SqliteRegistry::open(&folder.registry(), vault.registry_keys())?;
    let claimed = registry.identity()?.map(|(identity, _)| identity.dim);
    // An empty gallery gets the configured dimension, or that of the first enrolment.
    let used = registry.last_lsn()? > Lsn(0);
    let dim = config.dim.or(claimed.filter(|_| used));
    if let Some(dim) = dim.or(claimed) {
        // A wrong key, dimension or index is noticed before anything is opened.
        let storage: Arc<dyn Storage> = Arc::new(Files);
        gallery::claim(&registry, &storage, &folder.index(), &GalleryIdentity { dim, key_id: vault.key_id() })?;
    }
    let engines = engine(&config.engine, folder.path())?;
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

/// Where the master key is: the given file, or systemd's credential if systemd started
/// this process, or else the environment.
#[must_use]
pub fn key_source(file: Option<&Path>) -> KeySource {
    match file {
        Some(path) => KeySource::File(path.to_owned()),
        None if std::env::var_os("CREDENTIALS_DIRECTORY").is_some() => KeySource::Credential(CREDENTIAL.into()),
        None => KeySource::Environment,
    }
}
