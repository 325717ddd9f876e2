//! The barrier with real threads and real time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::reader_barrier;
use crate::error::Error;

#[test]
fn the_writer_waits_for_tickets_and_new_readers_wait_for_the_writer() {
    let (reader_barrier, mut token) = reader_barrier();
    let first = reader_barrier.enter().unwrap();
    let (asked, entered) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            // Asks while the writer waits for the first ticket; must not overtake it.
            while !reader_barrier.state.lock().closed {
                thread::yield_now();
            }
            asked.store(true, Ordering::SeqCst);
            let ticket = reader_barrier.enter().unwrap();
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
fn waiting_readers_enter_before_the_barrier_closes_again() {
    let (reader_barrier, mut token) = reader_barrier();
    thread::scope(|scope| {
        let exclusive = token.exclusive(Duration::ZERO).unwrap();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let reader = Arc::clone(&reader_barrier);
        scope.spawn(move || {
            let _ticket = reader.enter().unwrap();
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
fn a_retired_barrier_has_waited_for_its_tickets_and_admits_nobody() {
    let (reader_barrier, mut token) = reader_barrier();
    assert!(reader_barrier.token().is_none());
    let ticket = reader_barrier.enter().unwrap();
    assert!(matches!(token.retire(Duration::ZERO), Err(Error::Readers { held: 1, .. })));
    drop((ticket, reader_barrier.enter()));
    drop(token);
    let mut token = reader_barrier.token().expect("the other one is gone");
    token.retire(Duration::ZERO).unwrap();
    drop(token);
    assert!(reader_barrier.is_retired() && reader_barrier.token().is_none());
    assert!(reader_barrier.enter().is_none());
}
