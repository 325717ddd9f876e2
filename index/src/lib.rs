//! The template index of Thenar on disk: memory-mapped segments of f16 rows, with their codes.
//!
//! The index is derived. The registry is the system of record. It keeps an ordered change log, and the
//! index has the rows that are live in it up to one log sequence number ([`Lsn`]). The registry can restore
//! whatever is lost here. So the index has one duty above all: a row that it serves is the row that was
//! appended, and a row that was erased is gone from its files.
//!
//! - [`Index`] is the one writer of a folder: append, forget, publish, erase, checkpoint, compact.
//! - [`Reader`] gives searches a [`Snapshot`]: rows, their [`codes`], live bits and metadata, straight from
//!   the map.
//! - [`Index::open`] returns an [`Unrepaired`] index that lists its damage. It becomes an [`Index`] once
//!   there is none.
//! - [`verify()`] checks a whole folder without changing it.
//!
//! `FORMAT.md` beside this crate has the bytes, the crash argument and the erase protocol.
//!
//! Knows rows, templates, subjects and files. Does not know keys (only their fingerprint), scores,
//! transports, or what a change means.
//!
//! Modules import only from modules to their left (`tests/it/layers.rs` checks this):
//!
//! > `types`, `error`, `bytes`, `codes`, `format`, `reader_barrier`, `storage`, `read`, `write`,
//! > `lifecycle`, `recover`
//!
//! Invariants:
//! - What a reader sees is fixed when a snapshot is published, including live bits.
//! - Bytes under a slice that a reader holds do not change (`storage/pages.rs` and `reader_barrier` argue
//!   why).
//! - Only rows that the manifest counts survive a restart. All others are scrubbed.
//! - After an I/O error the writer stops for good.

#![deny(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("the files are little-endian and are read in place; big-endian machines are not supported");

mod bytes;
pub mod codes;
mod error;
mod format;
mod lifecycle;
mod read;
mod reader_barrier;
mod recover;
pub mod storage;
mod types;
mod write;

pub use codes::codebook;
pub use error::{Damage, DamageKind, Error};
pub use format::VERSION;
pub use read::{Reader, SegmentView, Snapshot};
pub use recover::{Unrepaired, VerifyReport, verify, verify_on};
pub use storage::Map;
pub use types::{
    Contents, GalleryId, Geometry, KeyId, LABEL_BYTES_MAX, Lsn, NewRow, Origin, OwnedRow, Row, RowMeta,
    SUBJECT_NUMBER_MAX, SubjectNumber, TemplateId, source_of,
};
pub use write::{Compacting, Index, SegmentInfo};
