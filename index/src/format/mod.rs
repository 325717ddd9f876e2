//! The bytes of the files: segments ([`Layout`], header page, codes), metadata records, the manifest.
//!
//! `FORMAT.md` has the diagrams. Pure: bytes in, values out. Does not know files or maps. All numbers
//! are little-endian.

mod manifest;
mod record;
mod segment;

pub(crate) use manifest::{MANIFEST_BYTES_MAX, Manifest, SegmentEntry};
pub(crate) use record::{Found, META_BYTES, MetaRecord, SOURCE_AT, STATE_AT, STATE_GONE, check_row};
pub(crate) use segment::{HEADER_BYTES, Layout, check_header, codes_checksum, encode_header};

/// Version of the format, in the manifest and in segments. An index of another version is refused.
pub const VERSION: u32 = 4;
