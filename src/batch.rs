//! Bounded admission and micro-batches.
//!
//! A batch forms while the engine is busy: the search thread takes whatever waits, up to a limit of
//! probes, the moment the batch before it is done, and never waits when it is idle. Over the bound
//! the caller is told at once, with a time after which trying again makes sense. A search whose
//! deadline has passed, or whose caller has gone, is dropped before it costs anything.
//!
//! Knows searches and time. Does not know subjects' names, policies or transports.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use tokio::sync::{mpsc, oneshot};

use crate::search::{Answer, BatchTiming, Search};
use crate::supervisor::Supervisor;
use crate::telemetry;

/// Limits of the batcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchConfig {
    /// Searches that may wait. At least 1.
    pub queue_max: usize,
    /// Probes searched together, at most. At least `PROBES_MAX`.
    pub probes_max: usize,
}

/// Why a search was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// The queue is full.
    #[error("{waiting} searches are waiting, the limit; try again in {} ms", retry_after.as_millis())]
    Overloaded {
        /// Searches in the queue.
        waiting: usize,
        /// About how long the queue takes to drain.
        retry_after: Duration,
    },
    /// The caller's deadline passed while the search waited.
    #[error("the deadline passed after {} ms in the queue", waited.as_millis())]
    DeadlineExceeded {
        /// Time in the queue.
        waited: Duration,
    },
    /// No engine could answer.
    #[error("the search failed: {reason}")]
    Failed {
        /// What the engine said.
        reason: String,
    },
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
pub trait BatchSearcher: Send + 'static {
    /// One answer a search, in order, over one snapshot.
    ///
    /// # Errors
    /// The reason, where no engine could answer.
    fn search(&mut self, searches: &[&Search]) -> Result<(Vec<Answer>, BatchTiming), String>;
}

struct Waiting {
    search: Search,
    since: Instant,
    deadline: Option<Instant>,
    reply: oneshot::Sender<Result<Answered, BatchError>>,
}

/// The queue before the search thread.
pub struct Batcher {
    /// `None` once closed.
    queue: RwLock<Option<mpsc::Sender<Waiting>>>,
    load: Arc<Load>,
    queue_max: usize,
}

/// How long batches take and how many searches are in them, smoothed, for the retry hint.
#[derive(Default)]
struct Load {
    waiting: AtomicUsize,
    batch_nanos: AtomicU64,
    batch_searches: AtomicU64,
}

impl Load {
    fn batch_done(&self, took: Duration, searches: usize) {
        let smooth = |cell: &AtomicU64, new: u64| {
            let old = cell.load(Ordering::Relaxed);
            cell.store(if old == 0 { new } else { (old * 7 + new) / 8 }, Ordering::Relaxed);
        };
        smooth(&self.batch_nanos, u64::try_from(took.as_nanos()).unwrap_or(u64::MAX / 8));
        smooth(&self.batch_searches, searches as u64);
    }

    fn retry_after(&self, waiting: usize) -> Duration {
        let searches = self.batch_searches.load(Ordering::Relaxed).max(1);
        let batches = (waiting as u64).div_ceil(searches).clamp(1, 1000);
        let nanos = self.batch_nanos.load(Ordering::Relaxed).max(1_000_000);
        Duration::from_nanos(nanos.saturating_mul(batches)).clamp(Duration::from_millis(1), Duration::from_secs(5))
    }
}

/// The search thread. Joined when the [`Batcher`] is closed or gone and the queue is empty.
pub struct SearchThread(JoinHandle<()>);

impl SearchThread {
    /// Waits until what was admitted has been answered.
    pub fn join(self) {
        // A panic is the supervisor's to report.
        let _ = self.0.join();
    }
}

impl Batcher {
    /// Starts the search thread.
    ///
    /// # Errors
    /// Where the system gives no thread.
    pub fn start(
        config: BatchConfig,
        searcher: impl BatchSearcher,
        supervisor: &Supervisor,
    ) -> std::io::Result<(Self, SearchThread)> {
        assert!(config.queue_max > 0 && config.probes_max > 0, "the configuration is checked");
        let (queue, waiting) = mpsc::channel(config.queue_max);
        let load = Arc::new(Load::default());
        let thread = {
            let load = Arc::clone(&load);
            supervisor.spawn("search", move || run(waiting, config.probes_max, searcher, &load))?
        };
        Ok((Self { queue: RwLock::new(Some(queue)), load, queue_max: config.queue_max }, SearchThread(thread)))
    }

    /// Searches, in the next batch that has room.
    ///
    /// # Errors
    /// [`BatchError::Overloaded`] at once where the queue is full; the others as they happen.
    pub async fn search(&self, search: Search, deadline: Option<Instant>) -> Result<Answered, BatchError> {
        let (reply, answer) = oneshot::channel();
        let waiting = Waiting { search, since: Instant::now(), deadline, reply };
        // Counted before it is sent: the search thread may take it at once.
        telemetry::queue_length(self.load.waiting.fetch_add(1, Ordering::Relaxed) + 1);
        let sent = match &*self.queue.read() {
            Some(queue) => queue.try_send(waiting),
            None => Err(mpsc::error::TrySendError::Closed(waiting)),
        };
        if let Err(refused) = sent {
            self.load.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(match refused {
                mpsc::error::TrySendError::Full(_) => BatchError::Overloaded {
                    waiting: self.queue_max,
                    retry_after: self.load.retry_after(self.queue_max),
                },
                mpsc::error::TrySendError::Closed(_) => BatchError::Stopped,
            });
        }
        answer.await.unwrap_or(Err(BatchError::Stopped))
    }

    /// Admits no more searches; the thread ends once it has answered those it has.
    pub fn close(&self) {
        *self.queue.write() = None;
    }
}

fn run(mut queue: mpsc::Receiver<Waiting>, probes_max: usize, mut searcher: impl BatchSearcher, load: &Load) {
    let mut carried = None;
    loop {
        let Some(first) = carried.take().or_else(|| queue.blocking_recv()) else { return };
        let mut probes = first.search.probes.len();
        let mut batch = vec![first];
        while let Ok(next) = queue.try_recv() {
            if probes + next.search.probes.len() > probes_max {
                carried = Some(next);
                break;
            }
            probes += next.search.probes.len();
            batch.push(next);
        }
        let left = load.waiting.fetch_sub(batch.len(), Ordering::Relaxed).saturating_sub(batch.len());
        telemetry::queue_length(left);

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
        if batch.is_empty() {
            continue;
        }
        let searches: Vec<&Search> = batch.iter().map(|w| &w.search).collect();
        let probes = searches.iter().map(|s| s.probes.len()).sum();
        let outcome = searcher.search(&searches);
        load.batch_done(now.elapsed(), batch.len());
        match outcome {
            Ok((answers, timing)) => {
                assert_eq!(answers.len(), batch.len(), "one answer a search");
                telemetry::batch_searched(probes, timing.device);
                for (waiting, answer) in batch.into_iter().zip(answers) {
                    let answered = Answered { answer, queue: now - waiting.since, batch: timing };
                    let _ = waiting.reply.send(Ok(answered));
                }
            }
            Err(reason) => {
                for waiting in batch {
                    let _ = waiting.reply.send(Err(BatchError::Failed { reason: reason.clone() }));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::palm::Hand;
    use crate::search::{Certificate, NO_FLOOR, Probe};
    use std::sync::mpsc as std_mpsc;

    /// Says what batches it got, and answers each when told to.
    struct Scripted {
        sizes: std_mpsc::Sender<usize>,
        go: std_mpsc::Receiver<Result<(), String>>,
    }

    impl BatchSearcher for Scripted {
        fn search(&mut self, searches: &[&Search]) -> Result<(Vec<Answer>, BatchTiming), String> {
            self.sizes.send(searches.len()).unwrap();
            self.go.recv().unwrap()?;
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

    type Script = (Arc<Batcher>, SearchThread, std_mpsc::Receiver<usize>, std_mpsc::Sender<Result<(), String>>);

    fn scripted(queue_max: usize, probes_max: usize) -> Script {
        let (sizes_in, sizes) = std_mpsc::channel();
        let (go, go_out) = std_mpsc::channel();
        let searcher = Scripted { sizes: sizes_in, go: go_out };
        let (batcher, thread) =
            Batcher::start(BatchConfig { queue_max, probes_max }, searcher, &Supervisor::default()).unwrap();
        (Arc::new(batcher), thread, sizes, go)
    }

    fn submit(
        batcher: &Arc<Batcher>,
        probes: usize,
        deadline: Option<Instant>,
    ) -> tokio::task::JoinHandle<Result<Answered, BatchError>> {
        let batcher = Arc::clone(batcher);
        tokio::spawn(async move { batcher.search(search(probes), deadline).await })
    }

    async fn admitted(batcher: &Batcher, searches: usize) {
        let length = || batcher.queue.read().as_ref().map_or(0, |q| q.max_capacity() - q.capacity());
        while length() < searches {
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
        let started = Instant::now();
        let refused = batcher.search(search(1), None).await.unwrap_err();
        assert!(started.elapsed() < Duration::from_millis(100));
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
        go.send(Err("no device".into())).unwrap();
        assert_eq!(failing.await.unwrap(), Err(BatchError::Failed { reason: "no device".into() }));
        let next = submit(&batcher, 1, None);
        sizes.recv().unwrap();
        go.send(Ok(())).unwrap();
        assert!(next.await.unwrap().is_ok());
        drop(batcher);
        thread.join();
    }
}
