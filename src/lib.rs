//! Thenar identifies people by the palm of their hand, exactly, out of millions, in milliseconds.
//!
//! ARCHITECTURE.md tells which room is which. Dependencies point down only.

pub mod engine;
pub mod palm;
