//! The template index of Thenar on disk: segments of f16 rows, memory-mapped, that never lie
//! about what they hold.
//!
//! The index is derived. The registry is the system of record; it keeps an ordered change log,
//! and the index holds the rows that log leaves alive up to one log sequence number ([`Lsn`]).
//! Whatever is lost here can be rebuilt from there, so the index has one duty above all: a row
//! it serves is the row that was appended, and a row that was erased is gone from its files.
//!
//! - [`Index`] is the one writer of a folder: append, forget, publish, erase, checkpoint, compact.
//! - [`Reader`] gives searches a [`Snapshot`]: rows, their [`codes`], live bits and metadata,
//!   straight from the map.
//! - [`Index::open`] yields an [`Unrepaired`] index that says what is damaged and becomes an
//!   [`Index`] only when nothing is.
//! - [`verify()`] checks a whole folder without changing it.
//!
//! `FORMAT.md` beside this crate has the bytes, the crash argument and the erase protocol.
//!
//! Knows rows, templates, subjects and files. Does not know keys (only their fingerprint),
//! scores, transports, or what a change means.
//!
//! Invariants:
//! - What a reader may see is fixed when a snapshot is published, live bits included.
//! - Bytes under a slice that a reader holds do not change (`map` and `reader_barrier` argue why).
//! - Only rows that the manifest counts survive a restart; the rest is scrubbed.
//! - After an I/O error the writer stops for good.

#![deny(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("the files are little-endian and are read in place; big-endian machines are not supported");

mod birth;
mod chains;
pub mod codebook;
pub mod codes;
mod coding;
mod compact;
mod erase;
mod error;
mod fill;
mod folder;
mod format;
mod live;
mod lock;
mod manifest;
mod map;
mod nouns;
mod open;
mod readable;
mod reader_barrier;
mod scan;
mod segment;
mod slots;
mod snapshot;
pub mod storage;
mod verify;
mod writer;

pub use compact::Compacting;
pub use error::{Damage, DamageKind, Error};
pub use format::VERSION;
pub use map::Map;
pub use nouns::{
    Contents, GalleryId, Geometry, KeyId, LABEL_BYTES_MAX, Lsn, NewRow, Origin, OwnedRow, Row, RowMeta,
    SUBJECT_NUMBER_MAX, SubjectNumber, TemplateId, source_of,
};
pub use open::Unrepaired;
pub use snapshot::{Block, Reader, RowsOf, Snapshot};
pub use verify::{VerifyReport, verify, verify_on};
pub use writer::{Index, SegmentInfo};
