//! The barrier between readers and the one writer: when may bytes that readers see be overwritten?
//!
//! A reader enters and holds a [`Ticket`] for as long as it looks at rows. The writer, before it
//! overwrites rows that were shown, closes the barrier and waits until no ticket is held; the proof
//! of that is a [`Exclusive`]. Once the barrier is closing, who comes to enter waits, so readers that
//! keep coming cannot starve an erasure. When it opens, all who wait are handed their tickets in
//! the same step, so erasures that keep coming cannot starve a reader either.
//!
//! The three types are proofs that `map` asks for: `&Ticket` to read what was shown,
//! `&mut WriteToken` to write what was not, `&mut Exclusive` to overwrite anything.
//!
//! Knows nothing of files or rows.
//!
//! A barrier that is *retired* lets nobody in any more: the files behind it belong to another barrier.
//!
//! Invariants: while a `Exclusive` lives no `Ticket` does; there is one `WriteToken` a barrier at most, and none
//! is made once it is retired.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::Error;

/// What someone hears who enters a retired barrier.
const RETIRED: &str = "the index was opened again: snapshots come from its own reader";

#[derive(Debug, Default)]
struct State {
    /// Tickets held.
    held: usize,
    /// Whether the writer waits for quiet, or has it.
    closed: bool,
    /// Readers that came while it was closed.
    waiting: usize,
    /// How often it was opened again: what those who wait look at.
    openings: u64,
    /// Whether there is a [`WriteToken`].
    has_writer: bool,
    /// Whether nobody may enter ever again.
    retired: bool,
}

/// Counts readers in and out.
#[derive(Debug, Default)]
pub(crate) struct ReaderBarrier {
    state: Mutex<State>,
    opened: Condvar,
    emptied: Condvar,
}

/// Proof that its holder entered as a reader.
#[derive(Debug)]
pub(crate) struct Ticket {
    reader_barrier: Arc<ReaderBarrier>,
}

/// Proof of being the one writer.
#[derive(Debug)]
pub(crate) struct WriteToken {
    reader_barrier: Arc<ReaderBarrier>,
}

/// Proof that no reader holds a ticket, and none will get one before this is dropped.
#[derive(Debug)]
pub(crate) struct Exclusive<'w> {
    token: &'w mut WriteToken,
}

/// A new barrier, open, and its one writer.
pub(crate) fn reader_barrier() -> (Arc<ReaderBarrier>, WriteToken) {
    let reader_barrier = Arc::new(ReaderBarrier::default());
    let token = reader_barrier.token().expect("a new reader_barrier has no token");
    (reader_barrier, token)
}

impl ReaderBarrier {
    /// The one writer; none while there is one, or once the barrier is retired.
    pub(crate) fn token(self: &Arc<Self>) -> Option<WriteToken> {
        let mut state = self.state.lock();
        let free = !state.has_writer && !state.retired;
        state.has_writer |= free;
        free.then(|| WriteToken { reader_barrier: Arc::clone(self) })
    }

    /// Whether nobody may enter ever again.
    pub(crate) fn is_retired(&self) -> bool {
        self.state.lock().retired
    }

    /// Waits while the barrier is closed, then enters.
    ///
    /// # Panics
    /// If the barrier is retired.
    pub(crate) fn enter(self: &Arc<Self>) -> Ticket {
        let mut state = self.state.lock();
        assert!(!state.retired, "{RETIRED}");
        if state.closed {
            state.waiting += 1;
            let openings = state.openings;
            while state.openings == openings {
                self.opened.wait(&mut state);
            }
            assert!(!state.retired, "{RETIRED}");
            // Whoever opened the barrier has counted this ticket among those held.
            assert!(state.held > 0);
        } else {
            state.held += 1;
        }
        Ticket { reader_barrier: Arc::clone(self) }
    }

    /// Closes and waits until no ticket is held, `timeout` at most; opens again if that is not enough.
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
    /// Closes the barrier and waits until no ticket is held, `timeout` at most.
    ///
    /// # Errors
    /// [`Error::Readers`] where tickets are held after that; the barrier is open again then.
    pub(crate) fn exclusive(&mut self, timeout: Duration) -> Result<Exclusive<'_>, Error> {
        self.reader_barrier.close(timeout)?;
        Ok(Exclusive { token: self })
    }

    /// Waits until no ticket is held, `timeout` at most, and lets nobody in from then on.
    ///
    /// # Errors
    /// [`Error::Readers`] if tickets are held after that; the barrier is open again then.
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
    /// The writer whose quiet it is, to read as it does. What is read this way ends before the
    /// next byte is overwritten, since that borrows the quiet mutably.
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn quiet_waits_for_tickets_and_tickets_for_quiet() {
        let (reader_barrier, mut token) = reader_barrier();
        let first = reader_barrier.enter();
        let (asked, entered) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                // Asks while the writer waits for the first ticket; must not overtake it.
                while !reader_barrier.state.lock().closed {
                    thread::yield_now();
                }
                asked.store(true, Ordering::SeqCst);
                let ticket = reader_barrier.enter();
                entered.store(true, Ordering::SeqCst);
                drop(ticket);
            });
            scope.spawn(|| {
                while reader_barrier.state.lock().waiting == 0 {
                    thread::yield_now();
                }
                assert!(asked.load(Ordering::SeqCst) && !entered.load(Ordering::SeqCst));
                drop(first);
            });
            let exclusive = token.exclusive(Duration::from_secs(10)).unwrap();
            assert!(!entered.load(Ordering::SeqCst));
            thread::sleep(Duration::from_millis(5));
            assert!(!entered.load(Ordering::SeqCst));
            drop(exclusive);
        });
        assert!(entered.into_inner());
        assert_eq!(reader_barrier.state.lock().held, 0);
    }

    #[test]
    fn who_waited_is_let_in_before_the_next_quiet() {
        let (reader_barrier, mut token) = reader_barrier();
        thread::scope(|scope| {
            let exclusive = token.exclusive(Duration::ZERO).unwrap();
            let (go, wait) = std::sync::mpsc::channel::<()>();
            let reader = Arc::clone(&reader_barrier);
            scope.spawn(move || {
                let _ticket = reader.enter();
                wait.recv().unwrap();
            });
            while reader_barrier.state.lock().waiting == 0 {
                thread::yield_now();
            }
            drop(exclusive);
            // The reader has its ticket already, whether its thread has run again or not.
            match token.exclusive(Duration::ZERO) {
                Err(Error::Readers { held: 1, .. }) => {}
                other => panic!("{other:?}"),
            }
            go.send(()).unwrap();
            drop(token.exclusive(Duration::from_secs(10)).unwrap());
        });
    }

    #[test]
    fn a_retired_gate_waited_for_its_tickets_and_has_no_more_writers_or_readers() {
        let (reader_barrier, mut token) = reader_barrier();
        assert!(reader_barrier.token().is_none());
        let ticket = reader_barrier.enter();
        assert!(matches!(token.retire(Duration::ZERO), Err(Error::Readers { held: 1, .. })));
        drop((ticket, reader_barrier.enter()));
        drop(token);
        let mut token = reader_barrier.token().expect("the other one is gone");
        token.retire(Duration::ZERO).unwrap();
        drop(token);
        assert!(reader_barrier.is_retired() && reader_barrier.token().is_none());
        assert!(thread::spawn(move || drop(reader_barrier.enter())).join().is_err());
    }
}
