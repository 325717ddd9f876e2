// The documentation is in `mod.rs`: this file is compiled twice, see there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Condvar, Mutex};
use crate::error::Error;

#[derive(Debug, Default)]
pub(super) struct State {
    /// Number of tickets held.
    pub(super) held: usize,
    /// Whether the writer waits for exclusive access, or has it.
    pub(super) closed: bool,
    /// Number of readers that came while it was closed.
    pub(super) waiting: usize,
    /// How often it was opened again. Waiting readers wait for a change of it.
    openings: u64,
    /// Whether there is a [`WriteToken`].
    has_writer: bool,
    /// Whether nobody may enter any more.
    retired: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct ReaderBarrier {
    pub(super) state: Mutex<State>,
    pub(super) opened: Condvar,
    pub(super) emptied: Condvar,
}

/// Proof that its holder has entered as a reader.
#[derive(Debug)]
pub(crate) struct Ticket {
    reader_barrier: Arc<ReaderBarrier>,
}

/// Proof of being the one writer.
#[derive(Debug)]
pub(crate) struct WriteToken {
    reader_barrier: Arc<ReaderBarrier>,
}

/// Proof that no reader holds a ticket, and that none gets one before this is dropped.
#[derive(Debug)]
pub(crate) struct Exclusive<'w> {
    token: &'w mut WriteToken,
}

/// A new barrier, open, and its one writer.
pub(crate) fn reader_barrier() -> (Arc<ReaderBarrier>, WriteToken) {
    let reader_barrier = Arc::new(ReaderBarrier::default());
    let token = reader_barrier.token().expect("a new barrier has no token yet");
    (reader_barrier, token)
}

impl ReaderBarrier {
    /// The one token; none if it is taken, or once the barrier is retired.
    pub(crate) fn token(self: &Arc<Self>) -> Option<WriteToken> {
        let mut state = self.state.lock();
        let free = !state.has_writer && !state.retired;
        state.has_writer |= free;
        free.then(|| WriteToken { reader_barrier: Arc::clone(self) })
    }

    /// Whether nobody may enter any more.
    pub(crate) fn is_retired(&self) -> bool {
        self.state.lock().retired
    }

    /// Waits while the barrier is closed, then enters. None if the barrier is retired.
    pub(crate) fn enter(self: &Arc<Self>) -> Option<Ticket> {
        let mut state = self.state.lock();
        if state.closed {
            state.waiting += 1;
            let openings = state.openings;
            while state.openings == openings {
                self.opened.wait(&mut state);
            }
        } else {
            state.held += 1;
        }
        // If it had to wait, whoever opened the barrier has counted this ticket.
        assert!(state.held > 0);
        let ticket = Ticket { reader_barrier: Arc::clone(self) };
        let admitted = !state.retired;
        drop(state);
        admitted.then_some(ticket)
    }

    /// Closes the barrier and waits until no ticket is held. Opens it again if that takes longer than
    /// `timeout`.
    fn close(&self, timeout: Duration) -> Result<(), Error> {
        let began = Instant::now();
        let mut state = self.state.lock();
        assert!(!state.closed && !state.retired);
        state.closed = true;
        while state.held > 0 {
            let late = self.emptied.wait_until(&mut state, began + timeout).timed_out();
            if late && state.held > 0 {
                let held = state.held;
                self.open(&mut state);
                return Err(Error::Readers { held, waited: began.elapsed() });
            }
        }
        Ok(())
    }

    fn open(&self, state: &mut State) {
        assert!(state.closed);
        state.closed = false;
        state.held += std::mem::take(&mut state.waiting);
        state.openings += 1;
        self.opened.notify_all();
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.reader_barrier.state.lock();
        assert!(state.held > 0);
        state.held -= 1;
        if state.held == 0 {
            self.reader_barrier.emptied.notify_all();
        }
    }
}

impl WriteToken {
    /// Closes the barrier and waits until no ticket is held, for at most `timeout`.
    ///
    /// # Errors
    /// [`Error::Readers`] if tickets are still held. The barrier is open again then.
    pub(crate) fn exclusive(&mut self, timeout: Duration) -> Result<Exclusive<'_>, Error> {
        self.reader_barrier.close(timeout)?;
        Ok(Exclusive { token: self })
    }

    /// Waits until no ticket is held, for at most `timeout`, and admits nobody from then on.
    ///
    /// # Errors
    /// [`Error::Readers`] if tickets are still held. The barrier is open again then.
    pub(crate) fn retire(&mut self, timeout: Duration) -> Result<(), Error> {
        self.reader_barrier.close(timeout)?;
        let mut state = self.reader_barrier.state.lock();
        state.retired = true;
        self.reader_barrier.open(&mut state);
        Ok(())
    }
}

impl Drop for WriteToken {
    fn drop(&mut self) {
        self.reader_barrier.state.lock().has_writer = false;
    }
}

impl Exclusive<'_> {
    /// The writer's token, to read as the writer. Such a slice ends before the next byte is overwritten,
    /// because that borrows the `Exclusive` mutably.
    pub(crate) fn token(&self) -> &WriteToken {
        self.token
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        let reader_barrier = &self.token.reader_barrier;
        let mut state = reader_barrier.state.lock();
        assert_eq!(state.held, 0);
        reader_barrier.open(&mut state);
    }
}
