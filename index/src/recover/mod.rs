//! Opening: from files to an index, and what is wrong with them.
//!
//! Opening ([`Index::open`](crate::Index::open)) reads and checks, and writes nothing.
//! [`Unrepaired::finish`] writes: it finishes erasures that a crash interrupted, scrubs rows that the
//! manifest does not count, encodes rows again whose codes are wrong, and removes files that the manifest
//! does not name. Only then is there an [`Index`](crate::Index) to read from. [`verify()`] checks and reports.
//!
//! An index whose writer failed is opened again under the lock that it has, while its readers continue.
//! They read the same files, so finishing waits until they hold no snapshot, and then gives them none.
//!
//! Does not know the registry: the caller brings the rows of a damaged segment.

mod check_codes;
mod open;
mod repair;
mod scan;
mod unrepaired;
mod verify;

pub use unrepaired::Unrepaired;
pub use verify::{VerifyReport, verify, verify_on};
