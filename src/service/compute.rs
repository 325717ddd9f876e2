//! Work that takes a while, off the threads that talk to clients.
//!
//! Rotating an embedding takes a number of products that is the square of its dimension: on a thread of the
//! transport, everybody else on that thread would wait for it. At most one piece of work per core runs at once,
//! because more would only take longer; the rest waits in order of arrival, up to a limit.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinHandle;

use super::{Busy, ServiceError};
use crate::process::supervisor::Supervisor;
use crate::process::zeroing_alloc;

/// Pieces of work that run or wait. Further callers are told to try again.
const ADMITTED_MAX: usize = 1024;
/// Most threads that compute; they are blocking threads of the runtime.
const RUNNING_MAX: usize = 32;
/// Bulk messages processed at once. Each divides its work among all cores itself, so that more
/// would only delay the earlier ones.
const BULK_MAX: usize = 2;
/// When a refused caller is told to try again.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// Runs work on blocking threads, a bounded amount at a time.
pub(crate) struct Compute {
    admitted: Semaphore,
    running: Arc<Semaphore>,
    bulk: Arc<Semaphore>,
    supervisor: Supervisor,
}

impl Compute {
    pub(super) fn new(supervisor: Supervisor) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            admitted: Semaphore::new(ADMITTED_MAX),
            running: Arc::new(Semaphore::new(cores.min(RUNNING_MAX))),
            bulk: Arc::new(Semaphore::new(BULK_MAX)),
            supervisor,
        }
    }

    /// Does `work` for one caller. `what` is reported if there is too much.
    ///
    /// # Errors
    /// [`ServiceError::Busy`] at once if too many wait; [`ServiceError::Draining`] if the work
    /// panicked, which ends the server.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        what: Busy,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ServiceError> {
        let _admitted: SemaphorePermit<'_> =
            self.admitted.try_acquire().map_err(|_| ServiceError::Busy { what, retry_after: RETRY_AFTER })?;
        self.when_free(&self.running, work).await
    }

    /// Does `work` for a bulk stream, which does not read on meanwhile.
    ///
    /// # Errors
    /// [`ServiceError::Draining`] if the work panicked, which ends the server.
    pub(super) async fn run_bulk<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ServiceError> {
        self.when_free(&self.bulk, work).await
    }

    /// Takes every place of [`Compute::run`] until the returned permit is dropped.
    #[cfg(test)]
    pub(crate) async fn take_all(&self) -> tokio::sync::OwnedSemaphorePermit {
        let places = u32::try_from(self.running.available_permits()).unwrap();
        Arc::clone(&self.running).acquire_many_owned(places).await.unwrap()
    }

    async fn when_free<T: Send + 'static>(
        &self,
        places: &Arc<Semaphore>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ServiceError> {
        let (places, supervisor) = (Arc::clone(places), self.supervisor.clone());
        // A task of its own: the caller is not polled while its client does not read, and would block the
        // place that it was given.
        let work = Driven::new(async move {
            let place = places.acquire_owned().await.ok()?;
            let done = tokio::task::spawn_blocking(move || {
                // Held for as long as the work takes, even if nobody waits for it any more.
                let _place = place;
                let done = supervisor.watch("compute", work);
                zeroing_alloc::clear_stack();
                done
            });
            done.await.ok()?.ok()
        });
        work.done().await.flatten().ok_or(ServiceError::Draining)
    }
}

/// A future that makes progress without being polled, until this is dropped.
pub(crate) struct Driven<T>(JoinHandle<T>);

impl<T: Send + 'static> Driven<T> {
    pub(crate) fn new(future: impl Future<Output = T> + Send + 'static) -> Self {
        Self(tokio::spawn(future))
    }

    /// Its result; `None` if it panicked, or the runtime ends.
    pub(crate) async fn done(mut self) -> Option<T> {
        (&mut self.0).await.ok()
    }
}

impl<T> Drop for Driven<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_waits_for_a_place_up_to_a_limit() {
        let compute = Arc::new(Compute::new(Supervisor::default()));
        let places = compute.take_all().await;
        let waiting: Vec<_> = (0..ADMITTED_MAX)
            .map(|_| {
                let compute = Arc::clone(&compute);
                tokio::spawn(async move { compute.run(Busy::Writes, || 7).await })
            })
            .collect();
        while compute.admitted.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let over = compute.run(Busy::Searches, || 7).await;
        assert!(matches!(over, Err(ServiceError::Busy { what: Busy::Searches, .. })), "{over:?}");
        assert_eq!(compute.run_bulk(|| 7).await.unwrap(), 7, "bulk work has places of its own");
        assert!(waiting.iter().all(|work| !work.is_finished()));
        drop(places);
        for work in waiting {
            assert_eq!(work.await.unwrap().unwrap(), 7);
        }
        assert_eq!(compute.admitted.available_permits(), ADMITTED_MAX);
    }

    /// A stream polls its calls only while its client reads.
    #[tokio::test]
    async fn a_caller_that_is_not_polled_keeps_no_place() {
        let compute = Compute::new(Supervisor::default());
        let count = compute.running.available_permits();
        let places = compute.take_all().await;
        let mut stuck: Vec<_> = (0..count).map(|_| Box::pin(compute.run(Busy::Searches, || 7))).collect();
        for call in &mut stuck {
            assert!(futures::poll!(call).is_pending());
        }
        // They queue before anybody else.
        tokio::task::yield_now().await;
        drop(places);
        let other = tokio::time::timeout(Duration::from_secs(60), compute.run(Busy::Searches, || 8));
        assert_eq!(other.await.expect("the places are free").unwrap(), 8);
        for call in stuck {
            assert_eq!(call.await.unwrap(), 7, "it was done meanwhile");
        }
    }

    #[tokio::test]
    async fn work_is_not_done_on_the_threads_of_the_runtime() {
        let compute = Compute::new(Supervisor::default());
        let here = std::thread::current().id();
        let there = compute.run(Busy::Searches, || std::thread::current().id()).await.unwrap();
        assert_ne!(there, here, "this runtime has one thread");
    }

    #[tokio::test]
    async fn a_panic_of_the_work_is_the_end_of_the_server() {
        let supervisor = Supervisor::default();
        let compute = Compute::new(supervisor.clone());
        let work: Result<(), _> = compute.run(Busy::Searches, || panic!("on purpose")).await;
        assert!(matches!(work, Err(ServiceError::Draining)), "{work:?}");
        assert_eq!(supervisor.died().map(|died| died.thread), Some("compute"));
        assert!(supervisor.draining().is_cancelled());
    }
}
