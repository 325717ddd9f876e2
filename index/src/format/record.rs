//! The metadata record of a row, and the check of a row against it.

use bytemuck::{Pod, Zeroable};
use xxhash_rust::xxh3::xxh3_64;

use crate::bytes::is_zero;
use crate::error::{DamageKind, Fault};
use crate::types::{LABEL_BYTES_MAX, NewRow, RowMeta, SUBJECT_NUMBER_MAX, SubjectNumber, TemplateId};

/// Bytes of a metadata record.
pub(crate) const META_BYTES: usize = 128;
/// Offset of the state in a metadata record. Readers' slices never cover these 4 bytes.
pub(crate) const STATE_AT: usize = 24;
/// Offset of the source checksum in a metadata record.
pub(crate) const SOURCE_AT: usize = 96;

/// State of a row that was never written.
const STATE_UNWRITTEN: u32 = 0;
/// State of a live row: the letters `LIVE`. The states are letters and not small numbers, so that a few
/// flipped bits do not turn one state into another.
const STATE_LIVE: u32 = u32::from_le_bytes(*b"LIVE");
/// State of an erased row, or of a row whose erasure has begun: the letters `GONE`.
pub(crate) const STATE_GONE: u32 = u32::from_le_bytes(*b"GONE");

/// One metadata record.
#[derive(Copy, Clone, Pod, Zeroable, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct MetaRecord {
    pub(crate) template: u64,
    pub(crate) subject: u64,
    pub(crate) checksum: u64,
    pub(crate) state: u32,
    pub(crate) hand: u8,
    pub(crate) label_len: u8,
    pub(crate) reserved: [u8; 2],
    pub(crate) label: [u8; LABEL_BYTES_MAX],
    /// Checksum of the sealed template that the row is made from.
    pub(crate) source: u64,
    pub(crate) reserved_tail: [u8; 24],
}

const _: () = assert!(size_of::<MetaRecord>() == META_BYTES);
const _: () = assert!(std::mem::offset_of!(MetaRecord, state) == STATE_AT);
const _: () = assert!(std::mem::offset_of!(MetaRecord, source) == SOURCE_AT);

impl MetaRecord {
    /// The record of a live row at `offset` of the segment `identity`.
    pub(crate) fn live(row: &NewRow<'_>, identity: u64, offset: u32) -> Self {
        let label = row.label.as_bytes();
        assert!(label.len() <= LABEL_BYTES_MAX);
        let mut record = Self::zeroed();
        record.template = row.template.0;
        record.subject = row.subject.0;
        record.state = STATE_LIVE;
        record.hand = row.hand;
        record.label_len = label.len() as u8;
        record.source = row.source;
        record.label[..label.len()].copy_from_slice(label);
        record.checksum = record.sum(identity, offset, bytemuck::cast_slice(row.vector));
        record
    }

    /// The metadata of a live row whose record was checked.
    pub(crate) fn meta(&self) -> RowMeta<'_> {
        RowMeta {
            template: TemplateId(self.template),
            subject: SubjectNumber(self.subject),
            hand: self.hand,
            label: std::str::from_utf8(&self.label[..usize::from(self.label_len)])
                .expect("labels are checked before they are written and when a segment is opened"),
            source: self.source,
        }
    }

    /// The record of a row that was never written.
    pub(crate) fn unwritten() -> Self {
        Self { state: STATE_UNWRITTEN, ..Self::zeroed() }
    }

    /// The record of an erased row: nothing but its state.
    pub(crate) fn erased() -> Self {
        Self { state: STATE_GONE, ..Self::zeroed() }
    }

    /// The checksum that this record should have. Covers the segment's identity and the row's offset, so
    /// that a record in the wrong place is detected.
    fn sum(&self, identity: u64, offset: u32, row: &[u8]) -> u64 {
        let mut hashed = [0; META_BYTES + 16];
        let record = Self { checksum: xxh3_64(row), ..*self };
        hashed[..META_BYTES].copy_from_slice(bytemuck::bytes_of(&record));
        hashed[META_BYTES..META_BYTES + 8].copy_from_slice(&identity.to_le_bytes());
        hashed[META_BYTES + 8..].copy_from_slice(&u64::from(offset).to_le_bytes());
        xxh3_64(&hashed)
    }
}

/// The result of checking a row that the manifest counts.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Whole and live.
    Live,
    /// Erased, every byte zero.
    Erased,
    /// Its erasure has begun and must be finished.
    HalfErased,
    /// Cannot be trusted.
    Damaged(Fault),
}

/// Checks the row at `offset`, which the manifest counts. Its record starts at byte `at` of the file.
pub(crate) fn check_row(at: usize, identity: u64, offset: u32, record: &MetaRecord, row: &[u8]) -> Found {
    let at = at as u64;
    match record.state {
        STATE_GONE if *record == MetaRecord::erased() && is_zero(row) => Found::Erased,
        STATE_GONE => Found::HalfErased,
        STATE_LIVE => {
            let expected = record.sum(identity, offset, row);
            if expected != record.checksum {
                return Found::Damaged(Fault {
                    offset: at,
                    kind: DamageKind::RowChecksum,
                    expected,
                    found: record.checksum,
                });
            }
            let label_end = usize::from(record.label_len);
            if label_end > LABEL_BYTES_MAX || std::str::from_utf8(&record.label[..label_end]).is_err() {
                let (expected, found) = (LABEL_BYTES_MAX as u64, label_end as u64);
                return Found::Damaged(Fault { offset: at, kind: DamageKind::RowMeta, expected, found });
            }
            if record.subject > SUBJECT_NUMBER_MAX {
                let (expected, found) = (SUBJECT_NUMBER_MAX, record.subject);
                return Found::Damaged(Fault { offset: at, kind: DamageKind::RowMeta, expected, found });
            }
            Found::Live
        }
        state => Found::Damaged(Fault {
            offset: at + STATE_AT as u64,
            kind: DamageKind::RowState,
            expected: u64::from(STATE_LIVE),
            found: u64::from(state),
        }),
    }
}
