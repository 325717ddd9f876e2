//! The only thread that makes changes.
//!
//! It takes the waiting changes, up to a limit, commits them to the registry as one group, lets the gallery
//! follow, erases what was forgotten, and only then answers each of them. By then a change is durable and in
//! force for the next search, and deleted data is gone. In this way many clients share one sync of the disk,
//! and the gallery sees changes in the order of the log.
//!
//! If the bytes of a deletion could not be cleared from the registry's files (because another program was
//! reading them, or this one was killed), they are cleared at the next start, or by a running writer as soon
//! as it can. This and all other upkeep is due by the clock and done between groups of changes, however many
//! come: at most a tenth of the thread's time goes into slow upkeep.

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use tokio::sync::{mpsc, oneshot};

use super::{Busy, ServiceError};
use crate::gallery::{self, Gallery, GalleryError};
use crate::process::supervisor::Supervisor;
use crate::registry::{Action, Change, Event, LogRecord, Outcome, REQUESTS_KEPT, Registry, RegistryError};
use crate::telemetry::{self, Write, WriteResult};

/// Jobs that may wait.
const JOBS_MAX: usize = 128;
/// Most changes committed as one group, unless a single job has more.
const GROUP_CHANGES_MAX: usize = 4096;
/// After so long without a change, all upkeep is done.
const IDLE: Duration = Duration::from_secs(2);
/// Between checkpoints while changes come without a pause.
const CHECKPOINT: Duration = Duration::from_secs(60);
/// Between checks for request ids that are old enough to be forgotten.
const PRUNE: Duration = Duration::from_secs(3600);
/// Request ids forgotten at once, while changes wait.
const PRUNED_AT_ONCE: usize = 4096;
/// When a caller is told to try again if the queue is full: about one group later.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// How the writer treats the disk.
#[derive(Debug, Clone)]
pub struct WriterConfig {
    /// A folder on the disk that must keep free room.
    pub data: PathBuf,
    /// Enrolments are refused if less is free, so that deletions always work.
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
        // The supervisor reports panics.
        let _ = self.0.join();
    }
}

/// Changes in the queue. They are done whether or not anybody waits.
pub struct Queued(oneshot::Receiver<Result<Vec<Outcome>, ServiceError>>);

impl Queued {
    /// Waits until they are done.
    ///
    /// # Errors
    /// If the group failed.
    pub async fn outcomes(self) -> Result<Vec<Outcome>, ServiceError> {
        self.0.await.unwrap_or(Err(ServiceError::Draining))
    }
}

impl Writer {
    /// Clears what an earlier process may have left of deleted templates, and starts the writer
    /// thread.
    ///
    /// # Errors
    /// If the operating system refuses to create a thread.
    pub fn start(
        config: WriterConfig,
        registry: Arc<dyn Registry>,
        gallery: Arc<Gallery>,
        supervisor: &Supervisor,
    ) -> std::io::Result<(Self, WriterThread)> {
        let (jobs, waiting) = mpsc::channel(JOBS_MAX);
        let timer = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let mut work = Work {
            config,
            registry,
            gallery,
            supervisor: supervisor.clone(),
            scrub_due: true,
            scrub_at: Instant::now(),
            follow_at: Instant::now(),
            checkpoint_at: Instant::now() + CHECKPOINT,
            prune_at: Instant::now(),
        };
        work.scrub_if_due();
        let thread = supervisor.spawn("writer", move || work.run(waiting, &timer))?;
        Ok((Self(RwLock::new(Some(jobs))), WriterThread(thread)))
    }

    /// Makes the changes, or refuses at once if too many wait.
    ///
    /// # Errors
    /// [`ServiceError::Busy`] if the queue is full; others if the group failed.
    pub async fn write(&self, changes: Vec<Change>) -> Result<Vec<Outcome>, ServiceError> {
        let (reply, outcome) = oneshot::channel();
        self.jobs()?.try_send(Job { changes, reply }).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => ServiceError::Busy { what: Busy::Writes, retry_after: RETRY_AFTER },
            mpsc::error::TrySendError::Closed(_) => ServiceError::Draining,
        })?;
        outcome.await.unwrap_or(Err(ServiceError::Draining))
    }

    /// Queues the changes, and waits for room: for streams, which do not read on meanwhile. What is
    /// queued first is done first.
    ///
    /// # Errors
    /// If the server is stopping.
    pub async fn queue_when_there_is_room(&self, changes: Vec<Change>) -> Result<Queued, ServiceError> {
        let (reply, outcome) = oneshot::channel();
        // Dropped as soon as the job is queued, since a closed queue ends once there are no senders.
        let jobs = self.jobs()?;
        jobs.send(Job { changes, reply }).await.map_err(|_| ServiceError::Draining)?;
        Ok(Queued(outcome))
    }

    /// Takes no more changes; the thread ends once it has done those that are queued.
    pub fn close(&self) {
        *self.0.write() = None;
    }

    fn jobs(&self) -> Result<mpsc::Sender<Job>, ServiceError> {
        self.0.read().clone().ok_or(ServiceError::Draining)
    }
}

/// What the writer thread works with, and when its upkeep is due.
struct Work {
    config: WriterConfig,
    registry: Arc<dyn Registry>,
    gallery: Arc<Gallery>,
    supervisor: Supervisor,
    /// Whether bytes of deleted templates may be left in the registry's files.
    scrub_due: bool,
    scrub_at: Instant,
    follow_at: Instant,
    checkpoint_at: Instant,
    prune_at: Instant,
}

/// When upkeep that began at `began` and is done now is due again. It gets at most a tenth of the
/// thread's time while changes come, since they wait for it.
fn next(began: Instant, pause: Duration) -> Instant {
    Instant::now() + pause.max(9 * began.elapsed())
}

impl Work {
    fn run(mut self, mut jobs: mpsc::Receiver<Job>, timer: &tokio::runtime::Runtime) {
        loop {
            let first = timer.block_on(async { tokio::time::timeout(IDLE, jobs.recv()).await });
            let is_quiet = first.is_err();
            match first {
                Ok(Some(job)) => {
                    let mut group = vec![job];
                    let mut changes = group[0].changes.len();
                    while changes < GROUP_CHANGES_MAX
                        && let Ok(job) = jobs.try_recv()
                    {
                        changes += job.changes.len();
                        group.push(job);
                    }
                    self.commit(group);
                    crate::process::zeroing_alloc::clear_stack();
                }
                Ok(None) => break,
                Err(_) => {}
            }
            self.upkeep(is_quiet);
        }
        self.scrub_if_due();
        self.follow();
        self.checkpoint();
    }

    /// Does the upkeep that is due by the clock, or all of it if no changes come.
    fn upkeep(&mut self, is_quiet: bool) {
        let now = Instant::now();
        if is_quiet || now >= self.scrub_at {
            self.scrub_if_due();
        }
        if is_quiet || now >= self.follow_at {
            self.follow();
        }
        if is_quiet || now >= self.checkpoint_at {
            self.checkpoint();
        }
        if now >= self.prune_at {
            self.prune();
        }
    }

    fn scrub_if_due(&mut self) {
        if self.scrub_due
            && let Err(error) = self.scrub()
        {
            tracing::warn!(%error, "deleted templates could not be cleared yet");
        }
    }

    /// Clears the bytes of deleted templates from the registry's files.
    fn scrub(&mut self) -> Result<(), RegistryError> {
        let began = Instant::now();
        let done = self.registry.scrub();
        self.scrub_due = done.is_err();
        self.scrub_at = next(began, Duration::ZERO);
        done
    }

    /// Lets the gallery catch up if it could not follow a change or could not erase what the change removed.
    fn follow(&mut self) {
        let began = Instant::now();
        match self.registry.last_lsn() {
            Ok(last) if last > self.gallery.lsn() || self.gallery.has_rows_to_erase() => {
                if let Err(error) = self.gallery.catch_up(last) {
                    tracing::warn!(%error, "the gallery is behind the registry");
                }
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "the registry could not be read"),
        }
        self.follow_at = next(began, Duration::ZERO);
    }

    fn checkpoint(&mut self) {
        let began = Instant::now();
        if let Err(error) = self.gallery.checkpoint() {
            tracing::error!(%error, "the index could not be checkpointed");
        }
        self.checkpoint_at = next(began, CHECKPOINT);
    }

    /// Forgets some of the request ids that are too old to be sent again.
    fn prune(&mut self) {
        let began = Instant::now();
        let pause = match self.registry.prune_requests(REQUESTS_KEPT, PRUNED_AT_ONCE) {
            Ok(0) => PRUNE,
            Ok(requests) => {
                tracing::info!(requests, "old request ids were forgotten");
                if requests < PRUNED_AT_ONCE as u64 { PRUNE } else { Duration::ZERO }
            }
            Err(error) => {
                self.turn_read_only_after(&error);
                tracing::warn!(%error, "old request ids could not be forgotten");
                PRUNE
            }
        };
        self.prune_at = next(began, pause);
    }

    /// Turns readiness off if the registry takes no more changes.
    fn turn_read_only_after(&self, error: &RegistryError) {
        if matches!(error, RegistryError::InDoubt { .. } | RegistryError::WriterStopped { .. }) {
            self.supervisor.read_only().cancel();
        }
    }

    fn commit(&mut self, mut group: Vec<Job>) {
        let started = Instant::now();
        if let Ok(free_bytes) = gallery::free_bytes(&self.config.data)
            && free_bytes < self.config.reserve_bytes
        {
            let full = ServiceError::DiskFull { free_bytes, reserve_bytes: self.config.reserve_bytes };
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

        let result = self.in_force(&changes);
        telemetry::group_committed(started.elapsed());
        match result {
            Ok(outcomes) => {
                assert_eq!(outcomes.len(), kinds.len(), "one outcome per change");
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

    /// Commits, publishes and erases: the steps before an acknowledgement, in their order.
    fn in_force(&mut self, changes: &[Change]) -> Result<Vec<Outcome>, ServiceError> {
        let committed = self.registry.commit(changes).map_err(|e| {
            self.turn_read_only_after(&e);
            match e {
                RegistryError::InDoubt { .. } => ServiceError::InDoubt(Arc::new(e)),
                RegistryError::WriterStopped { .. } => ServiceError::ReadOnly(Arc::new(e)),
                e => ServiceError::Registry(Arc::new(e)),
            }
        })?;
        let is_gone = |r: &LogRecord| matches!(r.event, Event::Removed { .. } | Event::Forgotten { .. });
        // It stays due until it is done, whatever fails before.
        self.scrub_due |= committed.records.iter().any(is_gone);
        let not_yet = |e: GalleryError| ServiceError::NotYetInForce(Arc::new(e));
        self.gallery.apply(&committed.records).map_err(not_yet)?;
        // A replayed request may be one whose first answer was "not yet in force".
        let done = |o: &Outcome| match o {
            Outcome::Done { lsn, .. } => Some(*lsn),
            _ => None,
        };
        if let Some(last) = committed.outcomes.iter().filter_map(done).max()
            && last > self.gallery.lsn()
        {
            self.gallery.catch_up(last).map_err(not_yet)?;
        }
        // Only callers that are told that something is gone wait for it.
        let told = changes.iter().zip(&committed.outcomes).any(|(c, o)| takes_away(&c.action) && done(o).is_some());
        if told && self.scrub_due {
            self.scrub().map_err(|e| not_yet(e.into()))?;
        }
        Ok(committed.outcomes)
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

fn takes_away(action: &Action) -> bool {
    match action {
        Action::Enrol { .. } => false,
        Action::Update { remove, .. } => !remove.is_empty(),
        Action::Forget { .. } => true,
    }
}

fn answer(job: Job, outcome: Result<Vec<Outcome>, ServiceError>) {
    // A caller that has gone can send the request again under the same request id.
    let _ = job.reply.send(outcome);
}
