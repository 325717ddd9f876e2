//! What can go wrong at the edge of the index. No message carries biometric data.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::nouns::{GalleryId, KeyId, Row, SubjectNumber, TemplateId};

/// Why the index could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused. A writer that meets this stops, unless the call that met it says
    /// otherwise.
    #[error("could not {action} {path}", path = .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done to it.
        action: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Another process, or another index of this one, holds the folder.
    #[error("the index in {dir} is in use by another writer", dir = .dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
    },
    /// There is an index already, or what is left of one.
    #[error("{dir} holds an index already", dir = .dir.display())]
    Exists {
        /// The folder.
        dir: PathBuf,
    },
    /// The folder has no manifest: no index was finished there.
    #[error("{path} is missing", path = .path.display())]
    ManifestMissing {
        /// Where it should be.
        path: PathBuf,
    },
    /// The manifest is not as it was written; the index must be rebuilt.
    #[error("{path} is corrupt at byte {offset}: expected {expected:#x}, found {found:#x}", path = .path.display())]
    ManifestCorrupt {
        /// The manifest.
        path: PathBuf,
        /// Byte in it.
        offset: u64,
        /// The value (or length, or checksum) that belongs there.
        expected: u64,
        /// The value that is there.
        found: u64,
    },
    /// The files are of a format this version does not read.
    #[error("{path} has format version {found}, this program reads {supported}", path = .path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version read here.
        supported: u32,
    },
    /// The rows were rotated by another key.
    #[error("the index was filled under key {found}, not {expected}")]
    WrongKey {
        /// Fingerprint of the key it was opened with.
        expected: KeyId,
        /// Fingerprint in the manifest.
        found: KeyId,
    },
    /// The rows are those of another gallery.
    #[error("the index in {dir} is of gallery {found}, not of {expected}", dir = .dir.display())]
    WrongGallery {
        /// The folder.
        dir: PathBuf,
        /// The gallery it was opened for.
        expected: GalleryId,
        /// The gallery in the manifest.
        found: GalleryId,
    },
    /// The shape is not one an index can have.
    #[error(
        "rows of {dim} components in segments of {segment_rows} rows: components are a multiple of 32 up to 65504, rows a multiple of 64 up to 1048576"
    )]
    Geometry {
        /// Components of a row.
        dim: usize,
        /// Rows of a segment.
        segment_rows: u32,
    },
    /// Segments are damaged and not replaced yet.
    #[error("{count} damaged segments, the first: {first}")]
    Damaged {
        /// How many segments.
        count: usize,
        /// The damage of the first.
        first: Box<Damage>,
    },
    /// A vector has the wrong number of components.
    #[error("template {} has {found} components, the index takes {expected}", .template.0)]
    Dim {
        /// The row's template.
        template: TemplateId,
        /// Components a row has.
        expected: usize,
        /// Components the vector has.
        found: usize,
    },
    /// A label is longer than a row has room for.
    #[error("the label of template {} has {found} bytes, the limit is {limit}", .template.0)]
    Label {
        /// The row's template.
        template: TemplateId,
        /// Bytes the label has.
        found: usize,
        /// Bytes it may have.
        limit: usize,
    },
    /// A subject number is larger than the index can map.
    #[error("subject number {} is over {limit}", .subject.0)]
    SubjectRange {
        /// The number.
        subject: SubjectNumber,
        /// The largest that fits.
        limit: u64,
    },
    /// Rows must come with ascending template numbers.
    #[error("template {} does not come after template {}", .template.0, .after.0)]
    Order {
        /// The row's template.
        template: TemplateId,
        /// The template before it.
        after: TemplateId,
    },
    /// A replacing row does not belong into the segment.
    #[error("template {} is outside of the segment's {} to {}", .template.0, .first.0, .last.0)]
    TemplateRange {
        /// The row's template.
        template: TemplateId,
        /// The segment's first.
        first: TemplateId,
        /// The segment's last.
        last: TemplateId,
    },
    /// More rows than a segment, or the numbering of rows, has room for.
    #[error("{found} rows, there is room for {limit}")]
    RowLimit {
        /// Rows there would be.
        found: u64,
        /// Rows there may be.
        limit: u64,
    },
    /// The row was never appended.
    #[error("there is no row {}", .row.0)]
    NoSuchRow {
        /// The row.
        row: Row,
    },
    /// The row must be forgotten before it can be erased.
    #[error("row {} is live; forget it first", .row.0)]
    StillLive {
        /// The row.
        row: Row,
    },
    /// The index has no such segment.
    #[error("there is no segment {segment}")]
    NoSuchSegment {
        /// Its place.
        segment: usize,
    },
    /// Rows were appended or forgotten and no publication has followed, which this needs.
    #[error("rows were appended or forgotten and not published yet")]
    Unpublished,
    /// Readers did not let go of their snapshots in time. The rows stay forgotten and remain to
    /// be erased; ask again.
    #[error("{held} snapshots were still held after {waited:?}")]
    Readers {
        /// Snapshots held.
        held: usize,
        /// How long was waited.
        waited: Duration,
    },
    /// An earlier I/O error stopped this writer; the index must be opened again.
    #[error("the index stopped after an I/O error and must be opened again")]
    Stopped,
    /// The caller broke off.
    #[error("cancelled after {done_rows} rows")]
    Cancelled {
        /// Rows done until then.
        done_rows: u64,
    },
}

/// The process, or the system, has as many files open as it may.
const NO_DESCRIPTOR: [i32; 2] = [24, 23];

impl Error {
    /// Whether this kept a step from being begun and changed nothing: a file could not be made, or there
    /// was no descriptor to open one with.
    #[must_use]
    pub fn left_all_as_it_was(&self) -> bool {
        match self {
            Self::Io { action, source, .. } => {
                *action == "create" || source.raw_os_error().is_some_and(|code| NO_DESCRIPTOR.contains(&code))
            }
            _ => false,
        }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, action, source }
    }
}

/// What is wrong with one segment: its first bad place, and how many rows are bad.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("segment {segment} ({path}) at byte {offset}: {kind}: expected {expected:#x}, found {found:#x} ({bad_rows} rows lost)", path = .path.display())]
pub struct Damage {
    /// The segment's file.
    pub path: PathBuf,
    /// The segment's place in the order of the index.
    pub segment: usize,
    /// The smallest template number that belongs into it.
    pub first_template: TemplateId,
    /// The largest template number that belongs into it.
    pub last_template: TemplateId,
    /// The first bad byte or record.
    pub offset: u64,
    /// What is wrong there.
    pub kind: DamageKind,
    /// What should be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
    /// Rows that cannot be trusted.
    pub bad_rows: u64,
}

/// What kind of damage it is; says what `expected` and `found` of a [`Damage`] mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DamageKind {
    /// The file is not there.
    #[error("file missing")]
    Missing,
    /// The file's length, in bytes.
    #[error("file length")]
    Length,
    /// The disk does not give these bytes: so many were asked for.
    #[error("bytes that the disk does not give")]
    Unreadable,
    /// Checksum of the header page.
    #[error("header checksum")]
    HeaderChecksum,
    /// A field of a header whose checksum is right: the file belongs elsewhere.
    #[error("header field")]
    HeaderField,
    /// Checksum of a row with its metadata.
    #[error("row checksum")]
    RowChecksum,
    /// The state of a row.
    #[error("row state")]
    RowState,
    /// A row's metadata has a right checksum and a wrong value.
    #[error("row metadata")]
    RowMeta,
    /// Codes that are not those of their rows: the first byte that differs.
    #[error("codes")]
    Codes,
    /// Checksum of a block's codes.
    #[error("checksum of codes")]
    CodesChecksum,
    /// Template numbers do not ascend, or leave the segment's range.
    #[error("template order")]
    Order,
}
