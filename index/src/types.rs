//! The values that the index takes and gives: numbers with a meaning, its geometry, rows.
//!
//! Nothing here does I/O or fails.

use std::fmt;

use half::f16;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

/// Maximum number of UTF-8 bytes in a row's label (the client's name for the subject).
pub const LABEL_BYTES_MAX: usize = 64;
/// The largest [`SubjectNumber`]. Numbers are handed out in sequence, and with 32 bits the map from
/// subjects to rows takes a few bytes per row.
pub const SUBJECT_NUMBER_MAX: u64 = u32::MAX as u64;
/// The dimension is a multiple of this, so that every row starts on a 64-byte boundary.
pub(crate) const DIM_STEP: usize = 32;
/// Maximum number of components in a row. Keeps the byte arithmetic far from overflow, and lets
/// counts of components fit 16 bits.
pub(crate) const DIM_MAX: usize = (1 << 16) - DIM_STEP;
/// Maximum number of rows in one segment.
pub(crate) const SEGMENT_ROWS_MAX: u32 = 1 << 20;

/// Number of one biometric template, assigned by the registry. Later templates have larger numbers.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct TemplateId(pub u64);

/// Number of one subject, assigned by the registry. At most [`SUBJECT_NUMBER_MAX`].
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct SubjectNumber(pub u64);

/// Log sequence number: a position in the registry's change log.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct Lsn(pub u64);

/// Number of a row: the slot of its segment times the rows per segment, plus its offset in the
/// segment. Compaction gives a row another number.
#[derive(Copy, Clone, Eq, PartialEq, Ord, PartialOrd, Hash, Debug)]
pub struct Row(pub u32);

/// The sizes of an index, fixed when it is created.
#[derive(Copy, Clone, Eq, PartialEq, Debug)]
pub struct Geometry {
    /// Components per row: a multiple of 32.
    pub dim: usize,
    /// Capacity of one segment file in rows: a multiple of 64.
    pub segment_rows: u32,
}

impl Geometry {
    /// Segments of 65,536 rows of `dim` components each.
    #[must_use]
    pub fn new(dim: usize) -> Self {
        Self { dim, segment_rows: 65_536 }
    }

    /// Whether both numbers are within their limits.
    pub(crate) fn is_valid(self) -> bool {
        let Self { dim, segment_rows } = self;
        (1..=DIM_MAX).contains(&dim)
            && dim.is_multiple_of(DIM_STEP)
            && (1..=SEGMENT_ROWS_MAX).contains(&segment_rows)
            && segment_rows.is_multiple_of(64)
    }

    /// Number of slots for segments. Row numbers stay below `u32::MAX`, which stands for "no row".
    pub(crate) fn slot_count(self) -> u32 {
        u32::MAX / self.segment_rows
    }
}

/// Fingerprint of the key that rotated the rows. Rows under different keys cannot be compared, so an
/// index opens only under the key that filled it. The fingerprint reveals nothing about the key.
#[derive(Copy, Clone, Eq, PartialEq, Hash)]
pub struct KeyId(pub [u8; 16]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

/// Identifies one gallery: a random number, chosen when the gallery's registry is created. The index
/// of one gallery is never opened for another, even if their change logs are alike.
#[derive(Copy, Clone, Eq, PartialEq, Hash)]
pub struct GalleryId(pub [u8; 16]);

impl fmt::Display for GalleryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
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
    /// The gallery that the rows belong to.
    pub gallery: GalleryId,
    /// The key that rotated them.
    pub key: KeyId,
}

/// Summary of a set of templates: their number, and a digest that does not depend on their order.
/// Sets that differ in a template's number, subject, hand, label or source have different digests
/// (barring a collision of 128-bit hashes; this does not protect against forgery).
#[derive(Copy, Clone, Eq, PartialEq, Debug, Default)]
pub struct Contents {
    /// Templates in the set.
    pub rows: u64,
    /// The sum of the hashes of the templates, modulo 2^128.
    pub digest: u128,
}

impl Contents {
    /// Adds one template to the set.
    pub fn add(&mut self, row: &RowMeta<'_>) {
        self.rows = self.rows.wrapping_add(1);
        self.digest = self.digest.wrapping_add(row.digest());
    }

    /// Removes one template from the set. Removing a template that is not in the set leaves a summary
    /// that matches no set, so a later comparison fails.
    pub fn remove(&mut self, row: &RowMeta<'_>) {
        self.rows = self.rows.wrapping_sub(1);
        self.digest = self.digest.wrapping_sub(row.digest());
    }
}

/// Checksum of the sealed template that a row is made from, for [`NewRow::source`]. It reveals
/// nothing about the template to anyone who cannot open the seal.
#[must_use]
pub fn source_of(sealed: &[u8]) -> u64 {
    xxh3_64(sealed)
}

/// A row to append. `Debug` leaves the vector out: no biometric data in any log.
#[derive(Copy, Clone)]
pub struct NewRow<'a> {
    /// The template's number. Larger than that of every earlier row.
    pub template: TemplateId,
    /// Whose template it is.
    pub subject: SubjectNumber,
    /// Code of the hand. The index stores it without interpreting it.
    pub hand: u8,
    /// The client's name for the subject: at most [`LABEL_BYTES_MAX`] bytes.
    pub label: &'a str,
    /// Checksum of the sealed template that the row is made from. The index stores it without
    /// interpreting it.
    pub source: u64,
    /// The rotated template. Shape: `[dim]`.
    pub vector: &'a [f16],
}

impl NewRow<'_> {
    /// The row without its vector.
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

/// A row that owns its data: what a damaged segment is rebuilt from.
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
    /// Checksum of the sealed template that the row is made from.
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

/// A live row without its vector.
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
    /// Checksum of the sealed template that the row is made from.
    pub source: u64,
}

impl RowMeta<'_> {
    /// The row's contribution to the digest of [`Contents`].
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
