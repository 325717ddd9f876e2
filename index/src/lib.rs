//! The template index on disk.

/// Bytes of a row's label, at most.
pub const LABEL_BYTES_MAX: usize = 64;
