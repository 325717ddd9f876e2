//! Bounded admission and micro-batches.
//!
//! A batch forms while the engine is busy: the search thread takes whatever waits, up to a limit of
//! probes, the moment the batch before it is done, and never waits when it is idle. `schedule`
//! decides which searches those are, by their [`Class`], and whether one more would wait too long.
//! A caller is told that at once, before any work is done for it, with a time after which trying
//! again makes sense. A search whose deadline has passed, or whose caller has gone, is dropped before
//! it costs anything.
//!
//! Knows searches and time. Does not know subjects' names, policies or transports.

mod schedule;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use self::schedule::Schedule;
pub use self::schedule::{Class, Priority};
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
    /// How long an urgent search may have to wait, by the pace of the batches before; more are refused.
    pub wait_max: Duration,
}

/// Why a search was not answered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BatchError {
    /// The queue is full, or takes longer than the caller or the configuration allows.
    #[error("{waiting} searches are waiting, too many; try again in {} ms", retry_after.as_millis())]
    Overloaded {
        /// Searches in the queue.
        waiting: usize,
        /// After which it is worth trying again.
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

/// An answer with where its time went.
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
    /// For each priority: something was queued for it, or the queue was closed.
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
            // A panic is the supervisor's to report.
            let _ = thread.join();
        }
    }
}

impl Batcher {
    /// Starts the search threads: one for searches with a floor, one for those without, which is to let
    /// the first have the engine.
    ///
    /// # Errors
    /// Where the system gives no thread.
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

    /// Reserves a place for a search of `probes` probes. Takes microseconds; meant to be asked before
    /// anything else is done for a search.
    ///
    /// # Errors
    /// [`BatchError::Overloaded`] where the search would have no place, or wait for too long.
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

    /// Searches, in the next batch of its class that has room.
    ///
    /// # Panics
    /// If the search has another number of probes than it was admitted with.
    ///
    /// # Errors
    /// [`BatchError`], but for [`BatchError::Overloaded`].
    pub async fn search(&self, mut place: Place, search: Search) -> Result<Answered, BatchError> {
        assert_eq!(search.probes.len(), place.probes, "a search has the probes it was admitted with");
        let (reply, answer) = oneshot::channel();
        let now = Instant::now();
        let priority = place.class.priority();
        let waiting = Waiting { search, since: now, deadline: place.deadline, reply };
        {
            let mut state = self.0.state.lock();
            if state.closed {
                // Before the place is given up, which takes the lock.
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

    /// Admits no more searches; the thread ends once it has answered those it has.
    pub fn close(&self) {
        self.0.close();
    }
}

impl Drop for Batcher {
    fn drop(&mut self) {
        self.close();
    }
}

/// Ends the queue with a thread that panics, so that nobody waits for it.
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
                // The caller may be gone; then nobody needs the news.
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
                assert_eq!(answers.len(), batch.len(), "one answer a search");
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Hand;
    use crate::search::{Certificate, NO_FLOOR, Probe};
    use std::sync::mpsc as std_mpsc;

    /// Says what batches it got, and answers each when told to.
    struct Scripted {
        sizes: std_mpsc::Sender<usize>,
        go: Mutex<std_mpsc::Receiver<Result<(), SearchError>>>,
    }

    impl Searcher for Scripted {
        fn search(
            &self,
            searches: &[&Search],
            _: Priority,
            _: &mut CandidateRows,
        ) -> Result<(Vec<Answer>, BatchTiming), SearchError> {
            self.sizes.send(searches.len()).unwrap();
            self.go.lock().recv().unwrap()?;
            let answer = Answer { found: Vec::new(), certificate: Certificate::Deterministic, gallery_size: 7 };
            Ok((vec![answer; searches.len()], BatchTiming::default()))
        }
    }

    fn search(probes: usize) -> Search {
        let probe = Probe { hand: Hand::Left, vector: vec![1.0; 32].into() };
        Search {
            probes: vec![probe; probes],
            floor: NO_FLOOR,
            k: 1,
            certificate: Certificate::Deterministic,
            allowed: None,
        }
    }

    type Script = (Arc<Batcher>, SearchThreads, std_mpsc::Receiver<usize>, std_mpsc::Sender<Result<(), SearchError>>);

    fn scripted(queue_max: usize, probes_max: usize) -> Script {
        let (sizes_in, sizes) = std_mpsc::channel();
        let (go, go_out) = std_mpsc::channel();
        let searcher = Arc::new(Scripted { sizes: sizes_in, go: Mutex::new(go_out) });
        // These tests are about what happens, not about how long it takes.
        let config = BatchConfig { queue_max, probes_max, wait_max: Duration::from_secs(3600) };
        let (batcher, thread) = Batcher::start(config, &searcher, &Supervisor::default()).unwrap();
        (Arc::new(batcher), thread, sizes, go)
    }

    async fn ask(batcher: &Batcher, probes: usize, deadline: Option<Instant>) -> Result<Answered, BatchError> {
        let place = batcher.admit(Class::Urgent, probes, deadline)?;
        batcher.search(place, search(probes)).await
    }

    fn submit(
        batcher: &Arc<Batcher>,
        probes: usize,
        deadline: Option<Instant>,
    ) -> tokio::task::JoinHandle<Result<Answered, BatchError>> {
        let batcher = Arc::clone(batcher);
        tokio::spawn(async move { ask(&batcher, probes, deadline).await })
    }

    async fn admitted(batcher: &Batcher, searches: usize) {
        while batcher.0.state.lock().schedule.queued() < searches {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_batch_forms_while_the_engine_is_busy_and_not_before() {
        let (batcher, thread, sizes, go) = scripted(16, 16);
        let first = submit(&batcher, 1, None);
        assert_eq!(sizes.recv().unwrap(), 1, "an idle engine starts at once");
        let rest: Vec<_> = (0..5).map(|_| submit(&batcher, 1, None)).collect();
        admitted(&batcher, 5).await;
        go.send(Ok(())).unwrap();
        assert_eq!(first.await.unwrap().unwrap().answer.gallery_size, 7);
        assert_eq!(sizes.recv().unwrap(), 5, "what came meanwhile is one batch");
        go.send(Ok(())).unwrap();
        for search in rest {
            assert!(search.await.unwrap().is_ok());
        }
        drop(batcher);
        thread.join();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn over_the_bound_the_caller_is_told_at_once_with_a_retry_hint() {
        let (batcher, thread, sizes, go) = scripted(2, 16);
        let busy = submit(&batcher, 1, None);
        sizes.recv().unwrap();
        let waiting = [submit(&batcher, 1, None), submit(&batcher, 1, None)];
        admitted(&batcher, 2).await;
        // Told by `admit` itself, which waits for nothing.
        let refused = batcher.admit(Class::Urgent, 1, None).err().unwrap();
        let BatchError::Overloaded { waiting: 2, retry_after } = refused else { panic!("{refused:?}") };
        assert!(retry_after >= Duration::from_millis(1));
        go.send(Ok(())).unwrap();
        go.send(Ok(())).unwrap();
        assert!(busy.await.unwrap().is_ok());
        for search in waiting {
            assert!(search.await.unwrap().is_ok(), "what was admitted is answered");
        }
        drop(batcher);
        thread.join();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_batch_never_has_more_probes_than_its_limit_and_loses_none() {
        let (batcher, thread, sizes, go) = scripted(16, 4);
        let mut all = vec![submit(&batcher, 1, None)];
        sizes.recv().unwrap();
        for waiting in 1..=5 {
            all.push(submit(&batcher, 2, None));
            admitted(&batcher, waiting).await;
        }
        for _ in 0..4 {
            go.send(Ok(())).unwrap();
        }
        assert_eq!([sizes.recv().unwrap(), sizes.recv().unwrap(), sizes.recv().unwrap()], [2, 2, 1]);
        for search in all {
            assert!(search.await.unwrap().is_ok());
        }
        drop(batcher);
        thread.join();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_search_past_its_deadline_or_abandoned_is_dropped_before_the_engine() {
        let (batcher, thread, sizes, go) = scripted(16, 16);
        let busy = submit(&batcher, 1, None);
        sizes.recv().unwrap();
        let late = submit(&batcher, 1, Some(Instant::now()));
        let abandoned = submit(&batcher, 1, None);
        let good = submit(&batcher, 1, Some(Instant::now() + Duration::from_secs(60)));
        admitted(&batcher, 3).await;
        abandoned.abort();
        assert!(abandoned.await.unwrap_err().is_cancelled());
        go.send(Ok(())).unwrap();
        assert_eq!(sizes.recv().unwrap(), 1, "only the good one is searched");
        go.send(Ok(())).unwrap();
        assert!(matches!(late.await.unwrap(), Err(BatchError::DeadlineExceeded { .. })));
        assert!(good.await.unwrap().is_ok());
        assert!(busy.await.unwrap().is_ok());
        drop(batcher);
        thread.join();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_engine_failure_is_told_to_every_caller_of_the_batch_and_the_next_goes_on() {
        let (batcher, thread, sizes, go) = scripted(16, 16);
        let failing = submit(&batcher, 1, None);
        sizes.recv().unwrap();
        go.send(Err(SearchError::IndexLost)).unwrap();
        let Err(BatchError::Failed(error)) = failing.await.unwrap() else { panic!("it failed") };
        assert!(matches!(*error, SearchError::IndexLost));
        let next = submit(&batcher, 1, None);
        sizes.recv().unwrap();
        go.send(Ok(())).unwrap();
        assert!(next.await.unwrap().is_ok());
        drop(batcher);
        thread.join();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_place_that_is_not_used_is_free_again() {
        let (batcher, thread, ..) = scripted(1, 16);
        let place = batcher.admit(Class::Urgent, 1, None).unwrap();
        assert!(matches!(batcher.admit(Class::Urgent, 1, None), Err(BatchError::Overloaded { waiting: 1, .. })));
        drop(place);
        drop(batcher.admit(Class::Urgent, 1, None).unwrap());
        batcher.close();
        assert!(matches!(batcher.admit(Class::Urgent, 1, None), Err(BatchError::Stopped)));
        drop(batcher);
        thread.join();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_search_thread_that_panics_leaves_nobody_waiting() {
        let (batcher, thread, sizes, go) = scripted(16, 1);
        let all: Vec<_> = (0..3).map(|_| submit(&batcher, 1, None)).collect();
        sizes.recv().unwrap();
        admitted(&batcher, 2).await;
        // Whom the script waits for is gone: it panics.
        drop(go);
        for search in all {
            assert!(matches!(search.await.unwrap(), Err(BatchError::Stopped)));
        }
        assert!(matches!(ask(&batcher, 1, None).await, Err(BatchError::Stopped)));
        thread.join();
    }
}
