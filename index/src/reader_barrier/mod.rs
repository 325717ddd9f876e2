//! The barrier between readers and the one writer: when may bytes that readers see be overwritten?
//!
//! A reader enters and holds a [`Ticket`] while it looks at rows. Before the writer overwrites rows that
//! were shown, it closes the barrier and waits until no ticket is held; [`Exclusive`] is the proof of that.
//! While the barrier is closed, new readers wait, so a stream of readers cannot starve an erasure. When it
//! opens, all waiting readers get their tickets in the same step, so a stream of erasures cannot starve a
//! reader.
//!
//! The three types are proofs that [`crate::storage::Pages`] requires: `&Ticket` to read what was shown,
//! `&mut WriteToken` to write what was not, `&mut Exclusive` to overwrite anything.
//!
//! A barrier that is *retired* admits nobody any more: the files behind it belong to another barrier.
//!
//! Knows nothing of files or rows. `model` runs `barrier.rs` through all interleavings of its threads.
//!
//! Invariants: while an `Exclusive` lives there is no `Ticket`; a barrier has at most one `WriteToken`, and
//! gives none once it is retired.

mod barrier;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

// `barrier` takes these from its parent, so that `model` can give it others.
use parking_lot::{Condvar, Mutex};

pub(crate) use self::barrier::{Exclusive, ReaderBarrier, Ticket, WriteToken, reader_barrier};
