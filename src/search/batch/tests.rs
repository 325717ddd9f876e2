//! Batches under a searcher that follows a script.

use super::*;
use crate::model::Hand;
use crate::search::{Certificate, NO_FLOOR, Probe};
use std::sync::mpsc as std_mpsc;

/// Reports the size of each batch, and answers it when told to.
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
    // The script can no longer receive: it panics.
    drop(go);
    for search in all {
        assert!(matches!(search.await.unwrap(), Err(BatchError::Stopped)));
    }
    assert!(matches!(ask(&batcher, 1, None).await, Err(BatchError::Stopped)));
    thread.join();
}
