//! The barrier under loom: `barrier.rs`, compiled with loom's lock and condition variable, is run through
//! all interleavings of a writer and readers with at most [`PREEMPTIONS`] preemptions.
//!
//! Threads may wake for no reason, and the writer's time may run out at any moment: a clock thread does
//! both. Exclusion is checked by a lock that is only tried: a thread that does not get it at once is not
//! alone. A lost wake-up is a deadlock, which loom reports.

mod loom_sync;

mod barrier {
    include!("../barrier.rs");
}

use std::sync::Arc;
use std::time::Duration;

use loom::sync::RwLock;
use loom::thread;

use self::barrier::{ReaderBarrier, WriteToken, reader_barrier};
use self::loom_sync::{Condvar, Mutex};
use crate::error::Error;

/// `LOOM_MAX_PREEMPTIONS` sets another number.
const PREEMPTIONS: usize = 3;

/// What the barrier protects.
type Rows = Arc<RwLock<()>>;

/// Runs `model` through its interleavings. The barrier must be open and empty after each.
fn explore(model: impl Fn(&Arc<ReaderBarrier>, &mut WriteToken, &Rows) + Sync + Send + 'static) {
    let mut explorer = loom::model::Builder::new();
    explorer.preemption_bound = explorer.preemption_bound.or(Some(PREEMPTIONS));
    explorer.check(move || {
        let (barrier, mut token) = reader_barrier();
        let rows = Rows::default();
        model(&barrier, &mut token, &rows);
        let state = barrier.state.lock();
        assert_eq!((state.held, state.waiting, state.closed), (0, 0, false));
    });
}

/// A thread that enters once. Returns whether it was admitted.
fn reader(barrier: &Arc<ReaderBarrier>, rows: &Rows) -> thread::JoinHandle<bool> {
    let (barrier, rows) = (Arc::clone(barrier), Arc::clone(rows));
    thread::spawn(move || {
        let Some(ticket) = barrier.enter() else { return false };
        drop(rows.try_read().expect("nothing is overwritten while a ticket is held"));
        drop(ticket);
        true
    })
}

/// A thread that wakes everybody for no reason, and then ends the writer's time.
fn clock(barrier: &Arc<ReaderBarrier>) -> thread::JoinHandle<()> {
    let barrier = Arc::clone(barrier);
    thread::spawn(move || {
        barrier.emptied.notify_all();
        barrier.opened.notify_all();
        // Under the lock, so that it is not lost between the writer's look and its wait.
        let state = barrier.state.lock();
        barrier.emptied.time_out();
        drop(state);
    })
}

fn overwrite(token: &mut WriteToken, rows: &Rows) -> Result<(), Error> {
    let exclusive = token.exclusive(Duration::ZERO)?;
    let _: &WriteToken = exclusive.token();
    drop(rows.try_write().expect("no ticket is held while rows are overwritten"));
    drop(exclusive);
    Ok(())
}

#[test]
fn no_row_is_overwritten_under_a_ticket_and_everybody_gets_a_turn() {
    explore(|barrier, token, rows| {
        let readers = [reader(barrier, rows), reader(barrier, rows)];
        overwrite(token, rows).unwrap();
        overwrite(token, rows).unwrap();
        assert_eq!(readers.map(|reader| reader.join().unwrap()), [true; 2]);
    });
}

#[test]
fn a_writer_whose_time_is_up_leaves_the_barrier_open() {
    explore(|barrier, token, rows| {
        let (reader, clock) = (reader(barrier, rows), clock(barrier));
        match overwrite(token, rows) {
            Ok(()) | Err(Error::Readers { held: 1, .. }) => {}
            Err(error) => panic!("{error}"),
        }
        assert!(reader.join().unwrap());
        clock.join().unwrap();
        overwrite(token, rows).unwrap();
    });
}

#[test]
fn a_retired_barrier_admits_nobody_and_keeps_nobody_waiting() {
    explore(|barrier, token, rows| {
        let readers = [reader(barrier, rows), reader(barrier, rows)];
        token.retire(Duration::ZERO).unwrap();
        drop(rows.try_write().expect("no ticket is held from now on"));
        assert!(barrier.is_retired() && barrier.enter().is_none() && barrier.token().is_none());
        for reader in readers {
            reader.join().unwrap();
        }
    });
}
