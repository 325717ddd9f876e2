//! The nouns of the index: numbers with meaning, the shape of a folder, rows going in and out.
//!
//! Pure values. Nothing here does I/O.

use std::fmt;

use half::f16;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::error::Error;

/// Bytes of UTF-8 in a row's label (the client's name for the subject), at most.
pub const LABEL_BYTES_MAX: usize = 64;
/// The largest [`SubjectNumber`]: numbers are handed out in sequence, and 32 bits of them keep
/// the map from subjects to rows at a few bytes a row.
pub const SUBJECT_NUMBER_MAX: u64 = u32::MAX as u64;
/// Rows are multiples of this many components, so that every row starts on a 64-byte boundary.
pub(crate) const DIM_STEP: usize = 32;
/// Components of a row, at most: what keeps the byte arithmetic far from overflow, and counts of
/// components in 16 bits.
pub(crate) const DIM_MAX: usize = (1 << 16) - DIM_STEP;
/// Rows of one segment, at most.
pub(crate) const SEGMENT_ROWS_MAX: u32 = 1 << 20;

/// Number of one biometric template, given by the registry; later templates have larger numbers.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct TemplateId(pub u64);

/// Number of one subject, given by the registry; at most [`SUBJECT_NUMBER_MAX`].
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct SubjectNumber(pub u64);

/// Log sequence number: a place in the registry's change log.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct Lsn(pub u64);

/// Number of a row: the slot of its segment times rows a segment, plus the place in the segment. A
/// row that is compacted gets another number.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct Row(pub u32);

/// The shape of an index, fixed when it is created.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct Geometry {
    /// Components of a row: a multiple of 32.
    pub dim: usize,
    /// Rows one segment file has room for: a multiple of 64.
    pub segment_rows: u32,
}

impl Geometry {
    /// Segments of 65,536 rows of `dim` components each.
    #[must_use]
    pub fn new(dim: usize) -> Self {
        Self { dim, segment_rows: 65_536 }
    }

    /// # Errors
    /// [`Error::Geometry`] where a number is out of its range.
    pub(crate) fn checked(self) -> Result<Self, Error> {
        let dim_fits = self.dim > 0 && self.dim <= DIM_MAX && self.dim.is_multiple_of(DIM_STEP);
        let rows_fit =
            self.segment_rows > 0 && self.segment_rows <= SEGMENT_ROWS_MAX && self.segment_rows.is_multiple_of(64);
        if dim_fits && rows_fit {
            Ok(self)
        } else {
            Err(Error::Geometry { dim: self.dim, segment_rows: self.segment_rows })
        }
    }
}

/// Fingerprint of the key that rotated the rows. Rows of two keys cannot be compared, so an index
/// is opened only by the key that filled it. Tells nothing of the key itself.
#[derive(Copy, Clone, Eq, PartialEq, Hash)]
pub struct KeyId(pub [u8; 16]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

/// Names one gallery: drawn at random when the registry of the gallery is made. An index of one
/// gallery is never opened as that of another, however alike their change logs are.
#[derive(Copy, Clone, Eq, PartialEq, Hash)]
pub struct GalleryId(pub [u8; 16]);

impl fmt::Display for GalleryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for GalleryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GalleryId({self})")
    }
}

/// Whose rows an index holds. Fixed when it is created, and checked when it is opened.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
pub struct Origin {
    /// The gallery that the rows are of.
    pub gallery: GalleryId,
    /// The key that rotated them.
    pub key: KeyId,
}

/// What a set of templates is, in a few bytes: how many, and a digest that does not depend on
/// their order. Two sets that differ in a template's number, subject, hand, label or source have
/// different digests (but for a collision of 128-bit hashes; it is no defence against forgery).
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct Contents {
    /// Templates in the set.
    pub rows: u64,
    /// The sum of the hashes of the templates, modulo 2^128.
    pub digest: u128,
}

impl Contents {
    /// The set with one template more.
    pub fn add(&mut self, row: &RowMeta<'_>) {
        self.rows = self.rows.wrapping_add(1);
        self.digest = self.digest.wrapping_add(row.digest());
    }

    /// The set with one template less. A template that was not in it leaves numbers that are no
    /// set's: whoever compares them with another set finds out.
    pub fn remove(&mut self, row: &RowMeta<'_>) {
        self.rows = self.rows.wrapping_sub(1);
        self.digest = self.digest.wrapping_sub(row.digest());
    }
}

/// Checksum of the sealed template that a row is made from, as [`NewRow::source`] has it. It says
/// nothing about the template to anybody who cannot open the seal.
#[must_use]
pub fn source_of(sealed: &[u8]) -> u64 {
    xxh3_64(sealed)
}

/// A row to append. Without `Debug` on its vector: no biometric data in any log.
#[derive(Copy, Clone)]
pub struct NewRow<'a> {
    /// The template's number; larger than that of every row before.
    pub template: TemplateId,
    /// Whose template it is.
    pub subject: SubjectNumber,
    /// Code of the hand; the index keeps it and gives it no meaning.
    pub hand: u8,
    /// The client's name for the subject: at most [`LABEL_BYTES_MAX`] bytes.
    pub label: &'a str,
    /// Checksum of what the registry made the row from; the index keeps it and gives it no meaning.
    pub source: u64,
    /// The rotated template. Shape: `[dim]`.
    pub vector: &'a [f16],
}

impl NewRow<'_> {
    /// What the row will say of itself.
    pub(crate) fn meta(&self) -> RowMeta<'_> {
        let Self { template, subject, hand, label, source, .. } = *self;
        RowMeta { template, subject, hand, label, source }
    }
}

impl fmt::Debug for NewRow<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NewRow({}, {}, [{}])", self.template.0, self.subject.0, self.vector.len())
    }
}

/// A row that owns what it holds: what a damaged segment is rebuilt from.
#[derive(Clone, PartialEq)]
pub struct OwnedRow {
    /// The template's number.
    pub template: TemplateId,
    /// Whose template it is.
    pub subject: SubjectNumber,
    /// Code of the hand.
    pub hand: u8,
    /// The client's name for the subject: at most [`LABEL_BYTES_MAX`] bytes.
    pub label: String,
    /// Checksum of what the registry made the row from.
    pub source: u64,
    /// The rotated template. Shape: `[dim]`.
    pub vector: Vec<f16>,
}

impl OwnedRow {
    /// The same row, borrowed.
    #[must_use]
    pub fn as_new(&self) -> NewRow<'_> {
        NewRow {
            template: self.template,
            subject: self.subject,
            hand: self.hand,
            label: &self.label,
            source: self.source,
            vector: &self.vector,
        }
    }
}

impl fmt::Debug for OwnedRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnedRow({}, {}, [{}])", self.template.0, self.subject.0, self.vector.len())
    }
}

/// What a live row says of itself.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct RowMeta<'a> {
    /// The template's number.
    pub template: TemplateId,
    /// Whose template it is.
    pub subject: SubjectNumber,
    /// Code of the hand.
    pub hand: u8,
    /// The client's name for the subject.
    pub label: &'a str,
    /// Checksum of what the registry made the row from.
    pub source: u64,
}

impl RowMeta<'_> {
    /// The row's share of the digest of [`Contents`].
    #[must_use]
    pub fn digest(&self) -> u128 {
        let mut bytes = [0; 25 + LABEL_BYTES_MAX];
        bytes[..8].copy_from_slice(&self.template.0.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.subject.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.source.to_le_bytes());
        bytes[24] = self.hand;
        let end = 25 + self.label.len();
        bytes[25..end].copy_from_slice(self.label.as_bytes());
        xxh3_128(&bytes[..end])
    }
}
