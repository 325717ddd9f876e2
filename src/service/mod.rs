//! The use cases: identify, verify, enrol, update, forget, and the server's status.
//!
//! Everything a transport needs, in the domain's own types: a transport only turns its messages into these
//! commands and these errors into its statuses. Knows no transport and no GPU. No error carries biometric
//! data.

mod compute;
mod enrol;
mod error;
mod filters;
mod identify;
pub mod writer;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{OnceCell, Semaphore};
use tokio_util::sync::CancellationToken;

pub(crate) use compute::Driven;
pub use enrol::{BulkItem, BulkOutcome, Enrol, Enrolled, Forget, Forgotten, Prepared, Update};
pub use error::{Busy, ServiceError};
pub use identify::{Candidate, Identification, Identify, Sample, Verification, Verify};

use crate::engine::EngineDescription;
use crate::engine::certificate::Certificate;
use crate::gallery::{Gallery, GalleryStatus};
use crate::model::{Purpose, SubjectId, VenueId};
use crate::policy::{Policies, Policy};
use crate::process::supervisor::Supervisor;
use crate::process::zeroing_alloc;
use crate::registry::{Registry, RegistryCounts, SubjectRecord};
use crate::search::batch::Batcher;
use crate::vault::{RequestDigester, Rotation, Sealer};
use compute::Compute;
use writer::Writer;

/// Registry reads at once; further callers are told to try again.
const READS_MAX: usize = 64;

/// What exists once the number of dimensions is known. Cheap to clone.
#[derive(Clone)]
pub struct Core {
    /// What is searched.
    pub gallery: Arc<Gallery>,
    /// Admission to the searches.
    pub batcher: Arc<Batcher>,
    /// Makes changes.
    pub writer: Arc<Writer>,
    /// The secret rotation.
    pub rotation: Arc<Rotation>,
    /// Seals templates for the registry.
    pub sealer: Arc<Sealer>,
}

/// Opens the gallery of a folder with the given number of dimensions. Blocks.
pub type OpenCore = Box<dyn Fn(usize) -> Result<Core, ServiceError> + Send + Sync>;

/// What the use cases are made of.
pub struct Parts {
    /// The system of record.
    pub registry: Arc<dyn Registry>,
    /// The open gallery; `None` if nobody has been enrolled and no dimension is configured.
    pub core: Option<Core>,
    /// Opens it for the first enrolment.
    pub open: OpenCore,
    /// The engine, as it is before there is a gallery.
    pub engine: EngineDescription,
    /// Identifies requests without revealing what is in them.
    pub digester: RequestDigester,
    /// A policy for each purpose.
    pub policies: Policies,
    /// The certificate of searches that do not ask for one.
    pub certificate: Certificate,
    /// Venues that may search; empty means any.
    pub venues: BTreeSet<VenueId>,
    /// Tells when the server stops, and learns of panics.
    pub supervisor: Supervisor,
}

/// The use cases.
pub struct Service {
    parts: Parts,
    core: OnceCell<Core>,
    reads: Arc<Semaphore>,
    compute: Compute,
    filters: filters::Filters,
    started: Instant,
    searches: AtomicU64,
    search_ids: AtomicU64,
    /// Distinguishes this run's search ids from those of other runs.
    run: u32,
}

/// The server's status.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// Components of an embedding; 0 if the first enrolment is to decide.
    pub dim: usize,
    /// What the registry holds.
    pub counts: RegistryCounts,
    /// What searches see.
    pub gallery: GalleryStatus,
    /// Since the start.
    pub uptime: Duration,
    /// Searches answered since then.
    pub searches: u64,
    /// The policy of each purpose.
    pub policies: Vec<(Purpose, Policy)>,
    /// Anonymous resident memory of the process, or 0 if unknown.
    pub resident_anonymous_bytes: u64,
}

impl Service {
    /// The use cases over `parts`.
    #[must_use]
    pub fn new(mut parts: Parts) -> Self {
        let run = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| u32::try_from(since.as_secs() & 0xffff_ffff).unwrap_or_default());
        Self {
            compute: Compute::new(parts.supervisor.clone()),
            core: OnceCell::new_with(parts.core.take()),
            parts,
            reads: Arc::new(Semaphore::new(READS_MAX)),
            filters: filters::Filters::default(),
            started: Instant::now(),
            searches: AtomicU64::new(0),
            search_ids: AtomicU64::new(1),
            run,
        }
    }

    /// The open gallery; `None` before the first enrolment, if that decides on the dimension.
    #[must_use]
    pub fn core(&self) -> Option<&Core> {
        self.core.get()
    }

    /// The gallery, which the caller has opened or found open.
    fn opened(&self) -> &Core {
        self.core.get().expect("the caller has opened it")
    }

    /// Opens the gallery with `dim` dimensions, if none is open.
    async fn open(self: &Arc<Self>, dim: usize) -> Result<(), ServiceError> {
        let service = Arc::clone(self);
        let opening = || async { self.compute.run(Busy::Writes, move || (service.parts.open)(dim)).await? };
        self.core.get_or_try_init(opening).await.map(|_| ())
    }

    /// Runs rotations and seals.
    #[cfg(test)]
    pub(crate) fn compute(&self) -> &Compute {
        &self.compute
    }

    /// Cancelled when the server begins to stop.
    #[must_use]
    pub fn draining(&self) -> &CancellationToken {
        self.parts.supervisor.draining()
    }

    /// Cancelled when no more changes are taken before a restart.
    #[must_use]
    pub fn read_only(&self) -> &CancellationToken {
        self.parts.supervisor.read_only()
    }

    /// The subject of that name.
    ///
    /// # Errors
    /// [`ServiceError::NoSuchSubject`] if there is none.
    pub async fn subject(&self, id: SubjectId) -> Result<SubjectRecord, ServiceError> {
        let wanted = id.clone();
        self.read(move |registry| registry.subject(&wanted)).await?.ok_or(ServiceError::NoSuchSubject(id))
    }

    /// The server's status.
    ///
    /// # Errors
    /// [`ServiceError::Registry`] if the registry fails.
    pub async fn status(&self) -> Result<Status, ServiceError> {
        let (core, engine) = (self.core().cloned(), self.parts.engine.clone());
        let dim = core.as_ref().map_or(0, |core| core.rotation.dim());
        let (counts, gallery, resident_anonymous_bytes) = self
            .read(move |registry| {
                let gallery = core.map_or_else(|| GalleryStatus::nothing(engine), |core| core.gallery.status());
                Ok((registry.counts()?, gallery, resident_anonymous_bytes()))
            })
            .await?;
        Ok(Status {
            dim,
            counts,
            gallery,
            uptime: self.started.elapsed(),
            searches: self.searches.load(Ordering::Relaxed),
            policies: Purpose::ALL.map(|p| (p, self.parts.policies.of(p))).to_vec(),
            resident_anonymous_bytes,
        })
    }

    /// Reads from the registry, or does other work that waits for locks, on a thread that may block.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&dyn Registry) -> Result<T, crate::registry::RegistryError> + Send + 'static,
    ) -> Result<T, ServiceError> {
        let permit = Arc::clone(&self.reads)
            .try_acquire_owned()
            .map_err(|_| ServiceError::Busy { what: Busy::Reads, retry_after: Duration::from_millis(50) })?;
        let registry = Arc::clone(&self.parts.registry);
        let supervisor = self.parts.supervisor.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let done = supervisor.watch("registry", || read(&*registry));
            zeroing_alloc::clear_stack();
            done
        });
        let result = done.await.ok().and_then(Result::ok).ok_or(ServiceError::Draining)?;
        result.map_err(|e| ServiceError::Registry(Arc::new(e)))
    }
}

/// Anonymous resident memory of this process; 0 if the operating system does not say.
fn resident_anonymous_bytes() -> u64 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        })
        .unwrap_or(0)
        * 1024
}
