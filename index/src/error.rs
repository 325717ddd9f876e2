//! The errors of the index, and damage of its files. No message carries biometric data.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::types::{GalleryId, KeyId, Row, SubjectNumber, TemplateId};

/// Why the index could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system reported an error. The writer stops, unless the documentation of the
    /// failed call says otherwise.
    #[error("could not {action} {path}", path = .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done to it.
        action: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Another process, or another index in this process, holds the folder.
    #[error("the index in {dir} is in use by another token", dir = .dir.display())]
    Locked {
        /// The folder.
        dir: PathBuf,
    },
    /// The folder already holds an index, or the remains of one.
    #[error("{dir} already holds an index", dir = .dir.display())]
    Exists {
        /// The folder.
        dir: PathBuf,
    },
    /// The folder has no manifest: it holds no complete index.
    #[error("{path} is missing", path = .path.display())]
    ManifestMissing {
        /// Its expected path.
        path: PathBuf,
    },
    /// The manifest is corrupt. The index must be rebuilt.
    #[error("{path} is corrupt at byte {offset}: expected {expected:#x}, found {found:#x}", path = .path.display())]
    ManifestCorrupt {
        /// The manifest.
        path: PathBuf,
        /// Offset of the byte.
        offset: u64,
        /// The expected value, length or checksum.
        expected: u64,
        /// The value found.
        found: u64,
    },
    /// The files have a format version that this program does not read.
    #[error("{path} has format version {found}, this program reads {supported}", path = .path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version that this program reads.
        supported: u32,
    },
    /// The rows were rotated under another key.
    #[error("the index was filled under key {found}, not {expected}")]
    WrongKey {
        /// Fingerprint of the key it was opened with.
        expected: KeyId,
        /// Fingerprint in the manifest.
        found: KeyId,
    },
    /// The rows belong to another gallery.
    #[error("the index in {dir} belongs to gallery {found}, not to {expected}", dir = .dir.display())]
    WrongGallery {
        /// The folder.
        dir: PathBuf,
        /// The gallery it was opened for.
        expected: GalleryId,
        /// The gallery in the manifest.
        found: GalleryId,
    },
    /// The geometry is outside the limits.
    #[error(
        "invalid geometry: {dim} components (must be a multiple of 32, at most 65504), {segment_rows} rows per segment (must be a multiple of 64, at most 1048576)"
    )]
    Geometry {
        /// Components per row.
        dim: usize,
        /// Rows per segment.
        segment_rows: u32,
    },
    /// Segments are damaged and have not been replaced yet.
    #[error("{count} damaged segments, the first: {first}")]
    Damaged {
        /// How many segments.
        count: usize,
        /// The damage of the first.
        first: Box<Damage>,
    },
    /// A vector has the wrong number of components.
    #[error("template {} has {found} components, the index expects {expected}", .template.0)]
    Dim {
        /// The row's template.
        template: TemplateId,
        /// Components of the index's rows.
        expected: usize,
        /// Components of the vector.
        found: usize,
    },
    /// A label is too long.
    #[error("the label of template {} has {found} bytes, the limit is {limit}", .template.0)]
    Label {
        /// The row's template.
        template: TemplateId,
        /// Bytes of the label.
        found: usize,
        /// Maximum number of bytes.
        limit: usize,
    },
    /// A subject number is too large.
    #[error("subject number {} is over {limit}", .subject.0)]
    SubjectRange {
        /// The number.
        subject: SubjectNumber,
        /// The largest allowed number.
        limit: u64,
    },
    /// Template numbers of rows must ascend.
    #[error("template {} does not come after template {}", .template.0, .after.0)]
    Order {
        /// The row's template.
        template: TemplateId,
        /// The template before it.
        after: TemplateId,
    },
    /// A replacement row does not belong to the segment.
    #[error("template {} is outside the segment's range {} to {}", .template.0, .first.0, .last.0)]
    TemplateRange {
        /// The row's template.
        template: TemplateId,
        /// The segment's first.
        first: TemplateId,
        /// The segment's last.
        last: TemplateId,
    },
    /// More rows than fit into a segment, or than there are row numbers.
    #[error("{found} rows do not fit, the limit is {limit}")]
    RowLimit {
        /// Number of rows there would be.
        found: u64,
        /// Maximum number of rows.
        limit: u64,
    },
    /// There is no such row.
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
    /// There is no such segment.
    #[error("there is no segment {segment}")]
    NoSuchSegment {
        /// Its position in the order of the index.
        segment: usize,
    },
    /// Rows were appended or forgotten and have not been published, which this call requires.
    #[error("rows were appended or forgotten and have not been published")]
    Unpublished,
    /// Readers did not drop their snapshots in time. The rows stay forgotten and still have to be
    /// erased: call again.
    #[error("{held} snapshots were still held after {waited:?}")]
    Readers {
        /// Number of snapshots held.
        held: usize,
        /// How long the writer waited.
        waited: Duration,
    },
    /// An earlier I/O error stopped this writer. The index must be opened again.
    #[error("the index stopped after an I/O error and must be opened again")]
    Stopped,
    /// The caller cancelled the call.
    #[error("cancelled after {done_rows} rows")]
    Cancelled {
        /// Rows checked until then.
        done_rows: u64,
    },
}

/// The process or the system has reached its limit of open files: EMFILE, ENFILE.
const NO_DESCRIPTOR: [i32; 2] = [24, 23];

impl Error {
    /// Whether the failed step changed nothing: a file could not be created, or no descriptor was free to
    /// open one.
    #[must_use]
    pub fn changed_nothing(&self) -> bool {
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

/// Damage of one segment: the first damaged place, and the number of damaged rows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("segment {segment} ({path}) at byte {offset}: {kind}: expected {expected:#x}, found {found:#x} ({bad_rows} rows lost)", path = .path.display())]
pub struct Damage {
    /// The segment's file.
    pub path: PathBuf,
    /// The segment's position in the order of the index.
    pub segment: usize,
    /// The smallest template number that belongs to it.
    pub first_template: TemplateId,
    /// The largest template number that belongs to it.
    pub last_template: TemplateId,
    /// Offset of the first damaged byte or record.
    pub offset: u64,
    /// The kind of damage.
    pub kind: DamageKind,
    /// The expected value.
    pub expected: u64,
    /// The value found.
    pub found: u64,
    /// Number of rows that cannot be trusted.
    pub bad_rows: u64,
}

/// A damaged place in a segment file.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) offset: u64,
    pub(crate) kind: DamageKind,
    pub(crate) expected: u64,
    pub(crate) found: u64,
}

impl Fault {
    /// The damage of the segment that has this fault.
    pub(crate) fn in_segment(
        self,
        path: PathBuf,
        segment: usize,
        (first_template, last_template): (TemplateId, TemplateId),
        bad_rows: u64,
    ) -> Damage {
        let Self { offset, kind, expected, found } = self;
        Damage { path, segment, first_template, last_template, offset, kind, expected, found, bad_rows }
    }
}

/// A kind of damage. Defines what `expected` and `found` of a [`Damage`] mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DamageKind {
    /// The file is missing.
    #[error("file missing")]
    Missing,
    /// The file's length, in bytes.
    #[error("file length")]
    Length,
    /// Bytes that the disk cannot read; `expected` is how many were requested.
    #[error("unreadable bytes")]
    Unreadable,
    /// Checksum of the header page.
    #[error("header checksum")]
    HeaderChecksum,
    /// A field of a header whose checksum is correct: the file does not belong here.
    #[error("header field")]
    HeaderField,
    /// Checksum of a row with its metadata.
    #[error("row checksum")]
    RowChecksum,
    /// The state of a row.
    #[error("row state")]
    RowState,
    /// An invalid value in metadata whose checksum is correct.
    #[error("row metadata")]
    RowMeta,
    /// Codes that do not follow from their rows: the first byte that differs.
    #[error("codes")]
    Codes,
    /// Checksum of a block's codes.
    #[error("checksum of codes")]
    CodesChecksum,
    /// Template numbers that do not ascend, or are outside the segment's range.
    #[error("template order")]
    Order,
}
