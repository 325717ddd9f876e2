//! Bounded admission of searches, and micro-batches.
//!
//! A batch forms while the engine is busy: as soon as a batch is done, the search thread takes what waits, up
//! to a limit of probes; an idle thread never waits for more. `schedule` decides which searches those are, by
//! their [`Class`], and whether a further one would wait too long. Its caller is told so at once, before any
//! work is done, with a time after which trying again makes sense. A search whose deadline has passed, or
//! whose caller has gone, is dropped before it costs anything.
//!
//! Knows searches and time. Does not know subjects' names, policies or transports.

mod class;
mod schedule;
#[cfg(test)]
mod tests;
mod times;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

pub use self::class::{Class, Priority};
use self::schedule::Schedule;
use crate::engine::CandidateRows;
use crate::process::supervisor::Supervisor;
use crate::process::zeroing_alloc;
use crate::search::{Answer, BatchTiming, Search, SearchError};
use crate::telemetry;

/// Limits of the batcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchConfig {
    /// Searches that may wait. At least 1.
    pub queue_max: usize,
    /// Probes searched together, at most. At least `PROBES_MAX`.
    pub probes_max: usize,
    /// How long an urgent search may have to wait, estimated from earlier batches. If it is longer, it is
    /// refused.
    pub wait_max: Duration,
}

/// Why a search was not answered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BatchError {
    /// The queue is full, or the wait would be longer than the caller or the configuration allows.
    #[error("{waiting} searches are waiting, too many; try again in {} ms", retry_after.as_millis())]
    Overloaded {
        /// Searches in the queue.
        waiting: usize,
        /// When it is worth trying again.
        retry_after: Duration,
    },
    /// The caller's deadline passed while the search waited.
    #[error("the deadline passed after {} ms in the queue", waited.as_millis())]
    DeadlineExceeded {
        /// Time in the queue.
        waited: Duration,
    },
    /// The batch could not be answered.
    #[error("the search failed: {0}")]
    Failed(#[source] Arc<SearchError>),
    /// The server is stopping.
    #[error("the server is stopping")]
    Stopped,
}

/// An answer, and where the time went.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    /// The answer.
    pub answer: Answer,
    /// Time in the queue.
    pub queue: Duration,
    /// Times of the batch it was answered in.
    pub batch: BatchTiming,
}

/// Answers batches. The gallery does; tests put another in its place.
pub trait Searcher: Send + Sync + 'static {
    /// One answer per search, in order, all over one snapshot. With [`Priority::Low`] the engine lets
    /// searches of the other priority go first if it can. `candidates` is scratch, reused between batches.
    ///
    /// # Errors
    /// [`SearchError`] if there is no index or no engine that could answer.
    fn search(
        &self,
        searches: &[&Search],
        priority: Priority,
        candidates: &mut CandidateRows,
    ) -> Result<(Vec<Answer>, BatchTiming), SearchError>;
}

struct Waiting {
    search: Search,
    since: Instant,
    deadline: Option<Instant>,
    reply: oneshot::Sender<Result<Answered, BatchError>>,
}

/// The queue before the search thread.
pub struct Batcher(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// For each priority: something was queued, or the queue was closed.
    changed: [Condvar; Priority::ALL.len()],
}

struct State {
    schedule: Schedule<Waiting>,
    closed: bool,
}

impl Shared {
    fn close(&self) {
        self.state.lock().closed = true;
        for changed in &self.changed {
            changed.notify_all();
        }
    }
}

/// A place in the queue, given up when dropped.
pub struct Place {
    shared: Arc<Shared>,
    class: Class,
    probes: usize,
    deadline: Option<Instant>,
    is_used: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.is_used {
            self.shared.state.lock().schedule.release(self.class, self.probes);
        }
    }
}

/// The search threads. Joined when the [`Batcher`] is closed or gone and the queue is empty.
pub struct SearchThreads(Vec<JoinHandle<()>>);

impl SearchThreads {
    /// Waits until what was admitted has been answered.
    pub fn join(self) {
        for thread in self.0 {
            // The supervisor reports panics.
            let _ = thread.join();
        }
    }
}

impl Batcher {
    /// Starts the search threads: one per priority.
    ///
    /// # Errors
    /// If the operating system refuses to create a thread.
    pub fn start(
        config: BatchConfig,
        searcher: &Arc<impl Searcher>,
        supervisor: &Supervisor,
    ) -> std::io::Result<(Self, SearchThreads)> {
        assert!(config.queue_max > 0 && config.probes_max > 0, "the configuration is checked");
        let state = Mutex::new(State { schedule: Schedule::new(config), closed: false });
        let batcher = Self(Arc::new(Shared { state, changed: Priority::ALL.map(|_| Condvar::new()) }));
        let mut threads = Vec::new();
        for (priority, name) in Priority::ALL.into_iter().zip(["search", "search-low"]) {
            let (shared, searcher) = (Arc::clone(&batcher.0), Arc::clone(searcher));
            threads.push(supervisor.spawn(name, move || run(&shared, priority, &*searcher))?);
        }
        Ok((batcher, SearchThreads(threads)))
    }

    /// Reserves a place for a search of `probes` probes. Takes microseconds; call it before
    /// anything else is done for the search.
    ///
    /// # Errors
    /// [`BatchError::Overloaded`] if there is no place or the wait would be too long.
    pub fn admit(&self, class: Class, probes: usize, deadline: Option<Instant>) -> Result<Place, BatchError> {
        let now = Instant::now();
        let mut state = self.0.state.lock();
        if state.closed {
            return Err(BatchError::Stopped);
        }
        match state.schedule.reserve(class, probes, deadline, now) {
            Ok(()) => Ok(Place { shared: Arc::clone(&self.0), class, probes, deadline, is_used: false }),
            Err(refused) => Err(BatchError::Overloaded { waiting: refused.waiting, retry_after: refused.retry_after }),
        }
    }

    /// Searches, in the next batch that takes this search.
    ///
    /// # Panics
    /// If the search has another number of probes than was admitted.
    ///
    /// # Errors
    /// [`BatchError`], except for [`BatchError::Overloaded`].
    pub async fn search(&self, mut place: Place, search: Search) -> Result<Answered, BatchError> {
        assert_eq!(search.probes.len(), place.probes, "a search has the probes it was admitted with");
        let (reply, answer) = oneshot::channel();
        let now = Instant::now();
        let priority = place.class.priority();
        let waiting = Waiting { search, since: now, deadline: place.deadline, reply };
        {
            let mut state = self.0.state.lock();
            if state.closed {
                // Dropping the place takes the lock.
                drop(state);
                return Err(BatchError::Stopped);
            }
            state.schedule.push(place.class, place.probes, waiting, now);
            place.is_used = true;
            telemetry::queue_length(state.schedule.queued());
        }
        self.0.changed[priority as usize].notify_one();
        answer.await.unwrap_or(Err(BatchError::Stopped))
    }

    /// Admits no more searches; the threads end once they have answered those that were admitted.
    pub fn close(&self) {
        self.0.close();
    }
}

impl Drop for Batcher {
    fn drop(&mut self) {
        self.close();
    }
}

/// Closes and empties the queue if a search thread panics, so that nobody waits for it.
struct AtPanic<'a>(&'a Shared);

impl Drop for AtPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.close();
            self.0.state.lock().schedule.clear();
        }
    }
}

fn run(shared: &Shared, priority: Priority, searcher: &impl Searcher) {
    let _at_panic = AtPanic(shared);
    let mut candidates = CandidateRows::default();
    loop {
        let mut batch = {
            let mut state = shared.state.lock();
            loop {
                if let Some(batch) = state.schedule.next(priority, Instant::now()) {
                    telemetry::queue_length(state.schedule.queued());
                    break batch;
                }
                if state.closed {
                    return;
                }
                shared.changed[priority as usize].wait(&mut state);
            }
        };
        let now = Instant::now();
        batch.retain_mut(|w| {
            let expired = w.deadline.is_some_and(|d| d <= now);
            if expired {
                let (reply, _) = oneshot::channel();
                let reply = std::mem::replace(&mut w.reply, reply);
                // The caller may be gone.
                let _ = reply.send(Err(BatchError::DeadlineExceeded { waited: now - w.since }));
            }
            !expired && !w.reply.is_closed()
        });
        let searches: Vec<&Search> = batch.iter().map(|w| &w.search).collect();
        let probes = searches.iter().map(|s| s.probes.len()).sum();
        let outcome = (!searches.is_empty()).then(|| searcher.search(&searches, priority, &mut candidates));
        zeroing_alloc::clear_stack();
        shared.state.lock().schedule.done(priority, probes, Instant::now());
        match outcome {
            None => {}
            Some(Ok((answers, timing))) => {
                assert_eq!(answers.len(), batch.len(), "one answer per search");
                telemetry::batch_searched(probes, timing.device);
                for (waiting, answer) in batch.into_iter().zip(answers) {
                    let answered = Answered { answer, queue: now - waiting.since, batch: timing };
                    let _ = waiting.reply.send(Ok(answered));
                }
            }
            Some(Err(error)) => {
                let error = Arc::new(error);
                for waiting in batch {
                    let _ = waiting.reply.send(Err(BatchError::Failed(Arc::clone(&error))));
                }
            }
        }
    }
}
