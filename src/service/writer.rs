//! The one thread that changes things.
//!
//! It takes whatever changes wait, up to a limit, commits them to the registry as one group, lets
//! the gallery follow, erases what was forgotten, and only then answers each of them: durable, in
//! force for the next search, and gone where it was a deletion. So many clients share one sync of
//! the disk, and the order of the log is the order of the gallery.
//!
//! A deletion whose bytes could not be cleared from the registry's files (another program was reading
//! them, or this one was killed) is never left at that: they are cleared at the next start, and by a
//! running writer as soon as it can.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::RwLock;
use tokio::sync::{mpsc, oneshot};

use super::{Busy, ServiceError};
use crate::gallery::{self, Gallery, GalleryError};
use crate::registry::{Action, Change, Outcome, REQUESTS_KEPT, Registry};
use crate::supervisor::Supervisor;
use crate::telemetry::{self, Write, WriteResult};

/// Jobs that may wait.
const JOBS_MAX: usize = 128;
/// Changes committed as one group, at most, unless one job alone has more.
const GROUP_CHANGES_MAX: usize = 4096;
/// Between looks at whether a checkpoint is due or the gallery is behind.
const IDLE: Duration = Duration::from_secs(2);
/// Between looks at which request ids are old enough to be forgotten.
const PRUNE: Duration = Duration::from_secs(3600);
/// What a caller is told to wait when the queue is full: about one group.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// How the writer treats the disk.
#[derive(Debug, Clone)]
pub struct WriterConfig {
    /// A folder on the disk that must keep room.
    pub data: PathBuf,
    /// Enrolments are refused where less would be left, so that deletions always work.
    pub reserve_bytes: u64,
}

struct Job {
    changes: Vec<Change>,
    reply: oneshot::Sender<Result<Vec<Outcome>, ServiceError>>,
}

/// The queue before the writer thread; `None` once closed.
pub struct Writer(RwLock<Option<mpsc::Sender<Job>>>);

/// The writer thread. Joined when the [`Writer`] is closed or gone and the queue is empty.
pub struct WriterThread(JoinHandle<()>);

impl WriterThread {
    /// Waits until what was admitted has been answered, and the index is checkpointed.
    pub fn join(self) {
        // A panic is the supervisor's to report.
        let _ = self.0.join();
    }
}

/// Changes in the queue. They are done whether or not anybody waits.
pub struct Queued(oneshot::Receiver<Result<Vec<Outcome>, ServiceError>>);

impl Queued {
    /// Waits until they are done.
    ///
    /// # Errors
    /// Where the group failed.
    pub async fn outcomes(self) -> Result<Vec<Outcome>, ServiceError> {
        self.0.await.unwrap_or(Err(ServiceError::Draining))
    }
}

impl Writer {
    /// Clears what an earlier process may have left of deleted templates, and starts the writer
    /// thread.
    ///
    /// # Errors
    /// Where the system gives no thread.
    pub fn start(
        config: WriterConfig,
        registry: Arc<dyn Registry>,
        gallery: Arc<Gallery>,
        supervisor: &Supervisor,
    ) -> std::io::Result<(Self, WriterThread)> {
        let (jobs, waiting) = mpsc::channel(JOBS_MAX);
        let timer = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let mut scrub = Scrub { due: true };
        scrub.if_due(&*registry);
        let thread = supervisor.spawn("writer", move || {
            run(waiting, &timer, &config, &*registry, &gallery, scrub);
        })?;
        Ok((Self(RwLock::new(Some(jobs))), WriterThread(thread)))
    }

    /// Does the changes, or says at once that there are too many.
    ///
    /// # Errors
    /// [`ServiceError::Busy`] where the queue is full; others where the group failed.
    pub async fn write(&self, changes: Vec<Change>) -> Result<Vec<Outcome>, ServiceError> {
        let (reply, outcome) = oneshot::channel();
        self.jobs()?.try_send(Job { changes, reply }).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => ServiceError::Busy { what: Busy::Writes, retry_after: RETRY_AFTER },
            mpsc::error::TrySendError::Closed(_) => ServiceError::Draining,
        })?;
        outcome.await.unwrap_or(Err(ServiceError::Draining))
    }

    /// Queues the changes, waiting for room: for streams, which then read no further. What is
    /// queued first is done first.
    ///
    /// # Errors
    /// Where the server is stopping.
    pub async fn queue_when_there_is_room(&self, changes: Vec<Change>) -> Result<Queued, ServiceError> {
        let (reply, outcome) = oneshot::channel();
        // Dropped as soon as the job is in: a closed queue ends when nobody can send any more.
        let jobs = self.jobs()?;
        jobs.send(Job { changes, reply }).await.map_err(|_| ServiceError::Draining)?;
        Ok(Queued(outcome))
    }

    /// Takes no more changes; the thread ends once it has done those it has.
    pub fn close(&self) {
        *self.0.write() = None;
    }

    fn jobs(&self) -> Result<mpsc::Sender<Job>, ServiceError> {
        self.0.read().clone().ok_or(ServiceError::Draining)
    }
}

/// Whether bytes of deleted templates may be left in the registry's files.
struct Scrub {
    due: bool,
}

impl Scrub {
    /// Clears them where they may be there; tried again later where that fails.
    fn if_due(&mut self, registry: &dyn Registry) {
        if self.due {
            match registry.scrub() {
                Ok(()) => self.due = false,
                Err(error) => tracing::warn!(%error, "deleted templates could not be cleared yet"),
            }
        }
    }
}

fn run(
    mut jobs: mpsc::Receiver<Job>,
    timer: &tokio::runtime::Runtime,
    config: &WriterConfig,
    registry: &dyn Registry,
    gallery: &Gallery,
    mut scrub: Scrub,
) {
    let mut pruned = Instant::now();
    loop {
        let first = timer.block_on(async { tokio::time::timeout(IDLE, jobs.recv()).await });
        let first = match first {
            Ok(Some(job)) => job,
            Ok(None) => break,
            Err(_) => {
                scrub.if_due(registry);
                tidy(registry, gallery);
                if pruned.elapsed() >= PRUNE {
                    prune(registry);
                    pruned = Instant::now();
                }
                continue;
            }
        };
        let mut group = vec![first];
        let mut changes = group[0].changes.len();
        while changes < GROUP_CHANGES_MAX
            && let Ok(job) = jobs.try_recv()
        {
            changes += job.changes.len();
            group.push(job);
        }
        commit(group, config, registry, gallery, &mut scrub);
        crate::wipe::stack();
    }
    scrub.if_due(registry);
    tidy(registry, gallery);
}

/// What can wait until nobody does: catching up, and checkpoints.
fn tidy(registry: &dyn Registry, gallery: &Gallery) {
    match registry.last_lsn() {
        Ok(last) if last > gallery.lsn() => {
            if let Err(error) = gallery.catch_up(last) {
                tracing::warn!(%error, "the gallery is behind the registry");
            }
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "the registry does not say how far it is"),
    }
    if let Err(error) = gallery.checkpoint() {
        tracing::error!(%error, "the index could not be checkpointed");
    }
}

/// Forgets request ids that nobody will send again.
fn prune(registry: &dyn Registry) {
    match registry.prune_requests(SystemTime::now() - REQUESTS_KEPT) {
        Ok(0) => {}
        Ok(requests) => tracing::info!(requests, "old request ids were forgotten"),
        Err(error) => tracing::warn!(%error, "old request ids could not be forgotten"),
    }
}

fn adds(action: &Action) -> bool {
    match action {
        Action::Enrol { .. } => true,
        Action::Update { add, .. } => !add.is_empty(),
        Action::Forget { .. } => false,
    }
}

fn kind(action: &Action) -> Write {
    match action {
        Action::Enrol { .. } => Write::Enrol,
        Action::Update { .. } => Write::Update,
        Action::Forget { .. } => Write::Forget,
    }
}

fn commit(mut group: Vec<Job>, config: &WriterConfig, registry: &dyn Registry, gallery: &Gallery, scrub: &mut Scrub) {
    let started = Instant::now();
    if let Ok(free_bytes) = gallery::free_bytes(&config.data)
        && free_bytes < config.reserve_bytes
    {
        let full = ServiceError::DiskFull { free_bytes, reserve_bytes: config.reserve_bytes };
        let (refused, rest): (Vec<_>, Vec<_>) =
            group.into_iter().partition(|job| job.changes.iter().any(|c| adds(&c.action)));
        refused.into_iter().for_each(|job| answer(job, Err(full.clone())));
        group = rest;
        if group.is_empty() {
            return;
        }
    }

    let sizes: Vec<usize> = group.iter().map(|job| job.changes.len()).collect();
    let changes: Vec<Change> = group.iter_mut().flat_map(|job| std::mem::take(&mut job.changes)).collect();
    let kinds: Vec<Write> = changes.iter().map(|c| kind(&c.action)).collect();

    let result = in_force(&changes, registry, gallery, scrub);
    telemetry::group_committed(started.elapsed());
    match result {
        Ok(outcomes) => {
            assert_eq!(outcomes.len(), kinds.len(), "one outcome a change");
            for (kind, outcome) in kinds.iter().zip(&outcomes) {
                let result = match outcome {
                    Outcome::Done { replayed: false, .. } => WriteResult::Done,
                    Outcome::Done { replayed: true, .. } => WriteResult::Replayed,
                    _ => WriteResult::Refused,
                };
                telemetry::writes(*kind, result, 1);
            }
            let mut outcomes = outcomes.into_iter();
            for (job, size) in group.into_iter().zip(sizes) {
                let own = outcomes.by_ref().take(size).collect();
                answer(job, Ok(own));
            }
        }
        Err(error) => {
            kinds.iter().for_each(|kind| telemetry::writes(*kind, WriteResult::Failed, 1));
            group.into_iter().for_each(|job| answer(job, Err(error.clone())));
        }
    }
}

fn answer(job: Job, outcome: Result<Vec<Outcome>, ServiceError>) {
    // A caller that has gone can ask again under the same request id.
    let _ = job.reply.send(outcome);
}

/// Commits, shows and erases: the steps behind an acknowledgement, in their order.
fn in_force(
    changes: &[Change],
    registry: &dyn Registry,
    gallery: &Gallery,
    scrub: &mut Scrub,
) -> Result<Vec<Outcome>, ServiceError> {
    let committed = registry.commit(changes).map_err(|e| ServiceError::Registry(Arc::new(e)))?;
    let takes_away = |a: &Action| match a {
        Action::Enrol { .. } => false,
        Action::Update { remove, .. } => !remove.is_empty(),
        Action::Forget { .. } => true,
    };
    let takes_away = changes.iter().any(|c| takes_away(&c.action));
    // Due from here on, whatever fails before it is done.
    scrub.due |= takes_away;
    let not_yet = |e: GalleryError| ServiceError::NotYetInForce(Arc::new(e));
    gallery.apply(&committed.records).map_err(not_yet)?;
    // A replayed request may be one whose first answer was "not yet in force".
    let answered = committed.outcomes.iter().filter_map(|o| match o {
        Outcome::Done { lsn, .. } => Some(*lsn),
        _ => None,
    });
    if let Some(last) = answered.max()
        && last > gallery.lsn()
    {
        gallery.catch_up(last).map_err(not_yet)?;
    }
    if takes_away {
        registry.scrub().map_err(|e| not_yet(e.into()))?;
        scrub.due = false;
    }
    Ok(committed.outcomes)
}
