//! One budget for the bytes of messages in memory, over all connections.
//!
//! A message is charged as it arrives, by the memory reserved for it, until its handler has finished
//! with it. Large messages may use three quarters of the budget, so that searches are accepted
//! while imports wait; one connection may use a quarter, or as much as a bulk enrolment needs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::telemetry;

/// Messages over this size are large.
const LARGE: usize = 64 << 10;
/// The least share of one connection: seven messages of a bulk stream are processed at the same time.
const SHARE_MIN: usize = 64 << 20;

/// A number of bytes with a limit.
struct Bounded {
    used: AtomicUsize,
    max: usize,
}

impl Bounded {
    fn new(max: usize) -> Self {
        Self { used: AtomicUsize::new(0), max }
    }

    fn take(&self, bytes: usize) -> bool {
        let fits = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.max);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// The budget of a server.
pub(super) struct Budget {
    all: Bounded,
    large: Bounded,
}

/// The part of the budget that one connection may use.
pub(super) struct Share {
    budget: Arc<Budget>,
    own: Bounded,
}

/// The budget is used up, or the connection's share of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Exhausted;

impl Budget {
    pub(super) fn new(bytes_max: usize) -> Arc<Self> {
        Arc::new(Self { all: Bounded::new(bytes_max), large: Bounded::new(bytes_max / 4 * 3) })
    }

    /// The share of a new connection.
    pub(super) fn share(self: &Arc<Self>) -> Arc<Share> {
        Arc::new(Share { budget: Arc::clone(self), own: Bounded::new((self.all.max / 4).max(SHARE_MIN)) })
    }
}

/// The bytes of one message, returned to the budget when dropped.
pub(super) struct Charge {
    share: Arc<Share>,
    large: bool,
    bytes: usize,
}

impl Charge {
    /// No bytes yet, for a message of `declared` bytes.
    pub(super) fn new(share: &Arc<Share>, declared: usize) -> Self {
        Self { share: Arc::clone(share), large: declared > LARGE, bytes: 0 }
    }

    /// Charges `more` bytes.
    pub(super) fn add(&mut self, more: usize) -> Result<(), Exhausted> {
        let Share { budget, own } = &*self.share;
        if !own.take(more) {
            return Err(Exhausted);
        }
        if self.large && !budget.large.take(more) {
            own.give(more);
            return Err(Exhausted);
        }
        if !budget.all.take(more) {
            own.give(more);
            if self.large {
                budget.large.give(more);
            }
            return Err(Exhausted);
        }
        self.bytes += more;
        telemetry::message_bytes(more, true);
        Ok(())
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let Share { budget, own } = &*self.share;
        own.give(self.bytes);
        budget.all.give(self.bytes);
        if self.large {
            budget.large.give(self.bytes);
        }
        telemetry::message_bytes(self.bytes, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn charge(share: &Arc<Share>, bytes: usize) -> Result<Charge, Exhausted> {
        let mut charge = Charge::new(share, bytes);
        charge.add(bytes).map(|()| charge)
    }

    #[test]
    fn large_messages_leave_room_for_small_ones_and_connections_for_each_other() {
        let budget = Budget::new(256 * MIB);
        let connections: Vec<_> = (0..5).map(|_| budget.share()).collect();
        let mut held: Vec<_> = (0..8).map(|_| charge(&connections[0], 8 * MIB).unwrap()).collect();
        assert!(charge(&connections[0], 1).is_err(), "a connection has a quarter");
        for share in &connections[1..3] {
            held.extend((0..8).map(|_| charge(share, 8 * MIB).unwrap()));
        }
        assert!(charge(&connections[3], MIB).is_err(), "large messages have three quarters");
        let small: Vec<_> = (0..1024).map(|_| charge(&connections[3], LARGE).unwrap()).collect();
        assert!(charge(&connections[4], 1).is_err(), "that was all");
        drop(small);
        held.truncate(20);
        assert!(charge(&connections[3], MIB).is_ok());
        drop(held);
        assert_eq!(budget.all.used.load(Ordering::Relaxed), 0);
        assert_eq!(budget.large.used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_was_refused_is_not_charged() {
        let budget = Budget::new(4 * MIB);
        let share = budget.share();
        let mut one = charge(&share, 2 * MIB).unwrap();
        assert_eq!(one.add(2 * MIB), Err(Exhausted), "large messages have three quarters");
        one.add(MIB).unwrap();
        assert_eq!(one.bytes(), 3 * MIB);
    }
}
