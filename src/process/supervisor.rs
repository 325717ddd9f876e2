//! The threads that a server cannot run without, and what happens if one of them panics.
//!
//! A panic ends only its own thread: callers of that thread would be told for ever that the server
//! is stopping, while health checks would still succeed. A [`Supervisor`] catches the panic,
//! remembers which thread it was and begins the drain, so that health and readiness change at once and
//! the process ends with an error, to be started again from outside. A panic is a bug, and its
//! consequences are unknown; so nothing is restarted within this process.
//!
//! Ending the process at once (`panic = "abort"`) would be less code, but would cut off answers that other
//! threads can still give, and turn a panic in a graphics driver, which is only a lost device, into
//! the end of the server.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use tokio_util::sync::CancellationToken;

/// A thread panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the {thread} thread panicked; the server has to be started again")]
pub struct Died {
    /// Which.
    pub thread: &'static str,
}

/// Watches the threads of a server. Cheap to clone; clones share their state.
#[derive(Debug, Clone, Default)]
pub struct Supervisor {
    draining: CancellationToken,
    died: Arc<OnceLock<Died>>,
    read_only: CancellationToken,
}

impl Supervisor {
    /// Cancels `draining` when a thread panics.
    #[must_use]
    pub fn new(draining: CancellationToken) -> Self {
        Self { draining, ..Self::default() }
    }

    /// Cancelled when the server begins to stop, for whatever reason.
    #[must_use]
    pub fn draining(&self) -> &CancellationToken {
        &self.draining
    }

    /// Cancelled when no more changes are accepted before a restart, because the disk failed to store
    /// one. Readiness changes then; searches go on.
    #[must_use]
    pub fn read_only(&self) -> &CancellationToken {
        &self.read_only
    }

    /// The first thread that panicked, if any has.
    #[must_use]
    pub fn died(&self) -> Option<Died> {
        self.died.get().copied()
    }

    /// Starts a thread whose panic ends the server. Joining it never fails.
    ///
    /// # Errors
    /// If the operating system refuses to create a thread.
    pub fn spawn(&self, thread: &'static str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
        let supervisor = self.clone();
        std::thread::Builder::new().name(thread.into()).spawn(move || {
            // The error can be read from `died`.
            let _ = supervisor.watch(thread, work);
        })
    }

    /// Runs `work` on this thread.
    ///
    /// # Errors
    /// [`Died`] if it panicked, which ends the server.
    pub fn watch<T>(&self, thread: &'static str, work: impl FnOnce() -> T) -> Result<T, Died> {
        // Nothing continues with half-done work: its thread is gone, and while the server drains, the
        // others only read what was complete before.
        catch_unwind(AssertUnwindSafe(work)).map_err(|_| {
            let died = Died { thread };
            // The panic itself has been reported by the panic hook.
            tracing::error!("{died}");
            let _ = self.died.set(died);
            self.draining.cancel();
            died
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_panic_of_any_thread_begins_the_drain_and_is_remembered() {
        let supervisor = Supervisor::default();
        supervisor.spawn("good", || ()).unwrap().join().unwrap();
        assert_eq!(supervisor.watch("compute", || 7), Ok(7));
        assert!(!supervisor.draining().is_cancelled() && supervisor.died().is_none());

        supervisor.spawn("first", || panic!("on purpose")).unwrap().join().unwrap();
        assert!(supervisor.draining().is_cancelled());
        assert_eq!(supervisor.watch("second", || panic!("on purpose")), Err::<(), _>(Died { thread: "second" }));
        assert_eq!(supervisor.died(), Some(Died { thread: "first" }));
    }
}
