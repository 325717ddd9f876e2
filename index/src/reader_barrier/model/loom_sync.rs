//! loom's lock and condition variable, with the interface of parking_lot's.

use std::ops::{Deref, DerefMut};
use std::time::Instant;

use loom::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug, Default)]
pub(super) struct Mutex<T>(loom::sync::Mutex<T>);

/// Without a guard only while it is waited.
pub(super) struct Guard<'a, T>(Option<loom::sync::MutexGuard<'a, T>>);

#[derive(Debug, Default)]
pub(super) struct Condvar {
    condvar: loom::sync::Condvar,
    is_late: AtomicBool,
}

pub(super) struct Waited {
    is_late: bool,
}

impl<T> Mutex<T> {
    pub(super) fn lock(&self) -> Guard<'_, T> {
        Guard(Some(self.0.lock().unwrap()))
    }
}

impl Condvar {
    pub(super) fn wait<T>(&self, guard: &mut Guard<'_, T>) {
        guard.0 = guard.0.take().map(|guard| self.condvar.wait(guard).unwrap());
    }

    /// Waits until it is notified. The time is up when [`Condvar::time_out`] says so.
    pub(super) fn wait_until<T>(&self, guard: &mut Guard<'_, T>, _deadline: Instant) -> Waited {
        if !self.is_late.load(Ordering::SeqCst) {
            self.wait(guard);
        }
        Waited { is_late: self.is_late.load(Ordering::SeqCst) }
    }

    /// Ends all waits with a deadline.
    pub(super) fn time_out(&self) {
        self.is_late.store(true, Ordering::SeqCst);
        self.condvar.notify_all();
    }

    pub(super) fn notify_all(&self) {
        self.condvar.notify_all();
    }
}

impl Waited {
    pub(super) fn timed_out(&self) -> bool {
        self.is_late
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("nobody waits")
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("nobody waits")
    }
}
