//! The bytes of a segment file: header page, metadata records, rows, codes, checksums.
//!
//! Pure: bytes in, values out. Does not know files or maps. Little-endian throughout.
//!
//! Invariants: a metadata record never straddles a 512-byte sector, so a torn write leaves it
//! whole, old or new; every row starts on a 64-byte boundary, every area of codes on a page.

use bytemuck::{Pod, Zeroable};
use xxhash_rust::xxh3::xxh3_64;

use crate::codes::{BLOCK_ROWS, Codes, Factors, codebook_bytes, four_bit_bytes, one_bit_bytes};
use crate::error::DamageKind;
use crate::nouns::{Geometry, LABEL_BYTES_MAX, NewRow, RowMeta, SUBJECT_NUMBER_MAX, SubjectNumber, TemplateId};

/// Version of the format, in the manifest and in segments. An index of another version is refused.
pub const VERSION: u32 = 4;
/// Bytes of the header page.
pub(crate) const HEADER_BYTES: usize = 4096;
/// Boundary on which areas of codes start.
const PAGE_BYTES: usize = 4096;
/// Bytes of a metadata record.
pub(crate) const META_BYTES: usize = 128;
/// Where the state word sits in a metadata record. Readers' slices never cover these 4 bytes.
pub(crate) const STATE_AT: usize = 24;
/// Where the checksum of a row's source sits in a metadata record.
pub(crate) const SOURCE_AT: usize = 96;

/// Bytes of the factors of a block.
const TERMS_BYTES: usize = BLOCK_ROWS * size_of::<Factors>();

const SEGMENT_MAGIC: [u8; 8] = *b"THNRSEGM";

/// State of a row that was never written.
pub(crate) const STATE_NEVER: u32 = 0;
/// State of a live row: the letters `LIVE`. Words, not small numbers, so that no few flipped bits
/// turn one state into another.
pub(crate) const STATE_LIVE: u32 = u32::from_le_bytes(*b"LIVE");
/// State of an erased row, or of one whose erasure has begun: the letters `GONE`.
pub(crate) const STATE_GONE: u32 = u32::from_le_bytes(*b"GONE");

/// Where things are in a segment file.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) dim: usize,
    pub(crate) capacity: u32,
}

impl Layout {
    pub(crate) fn of(geometry: Geometry) -> Self {
        Self { dim: geometry.dim, capacity: geometry.segment_rows }
    }

    /// Bytes of one row.
    pub(crate) fn row_bytes(self) -> usize {
        self.dim * 2
    }

    /// Byte where the record of the row at `offset` starts.
    pub(crate) fn meta_at(self, offset: u32) -> usize {
        HEADER_BYTES + offset as usize * META_BYTES
    }

    /// Byte where the row at `offset` starts.
    pub(crate) fn row_at(self, offset: u32) -> usize {
        self.meta_at(self.capacity) + offset as usize * self.row_bytes()
    }

    /// Blocks of rows that have codes once they are full.
    pub(crate) fn blocks(self) -> u32 {
        self.capacity / BLOCK_ROWS as u32
    }

    /// Byte where the sign codes of `block` start.
    pub(crate) fn one_bit_at(self, block: u32) -> usize {
        self.row_at(self.capacity).next_multiple_of(PAGE_BYTES) + block as usize * one_bit_bytes(self.dim)
    }

    /// Byte where the two codes of `block` start.
    pub(crate) fn two_bit_at(self, block: u32) -> usize {
        self.one_bit_at(self.blocks()).next_multiple_of(PAGE_BYTES) + block as usize * one_bit_bytes(self.dim)
    }

    /// Byte where the fine codes of `block` start.
    pub(crate) fn four_bit_at(self, block: u32) -> usize {
        self.two_bit_at(self.blocks()).next_multiple_of(PAGE_BYTES) + block as usize * four_bit_bytes(self.dim)
    }

    /// Byte where the factors of `block` start.
    pub(crate) fn terms_at(self, block: u32) -> usize {
        self.four_bit_at(self.blocks()).next_multiple_of(PAGE_BYTES) + block as usize * TERMS_BYTES
    }

    /// Byte where the codebook codes of `block` start.
    pub(crate) fn codebook_at(self, block: u32) -> usize {
        self.terms_at(self.blocks()).next_multiple_of(PAGE_BYTES) + block as usize * codebook_bytes(self.dim)
    }

    /// Byte where the checksum of the codes of `block` is.
    pub(crate) fn sum_at(self, block: u32) -> usize {
        self.codebook_at(self.blocks()).next_multiple_of(PAGE_BYTES) + block as usize * 8
    }

    /// Length of the file.
    pub(crate) fn file_bytes(self) -> usize {
        self.sum_at(self.blocks())
    }
}

/// The header page. The rest of the page is zero.
#[derive(Copy, Clone, Pod, Zeroable, Debug, PartialEq, Eq)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u32,
    dim: u32,
    capacity: u32,
    meta_bytes: u32,
    identity: u64,
}

/// The header page of a segment.
pub(crate) fn encode_header(layout: Layout, identity: u64) -> Vec<u8> {
    let header = Header {
        magic: SEGMENT_MAGIC,
        version: VERSION,
        dim: u32::try_from(layout.dim).expect("dim was checked against DIM_MAX"),
        capacity: layout.capacity,
        meta_bytes: META_BYTES as u32,
        identity,
    };
    let mut page = vec![0; HEADER_BYTES];
    page[..size_of::<Header>()].copy_from_slice(bytemuck::bytes_of(&header));
    let checksum = xxh3_64(&page[..HEADER_BYTES - 8]);
    page[HEADER_BYTES - 8..].copy_from_slice(&checksum.to_le_bytes());
    page
}

/// A bad place in a segment file.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) offset: u64,
    pub(crate) kind: DamageKind,
    pub(crate) expected: u64,
    pub(crate) found: u64,
}

/// Checks a header page against what the manifest says of the segment.
pub(crate) fn check_header(page: &[u8], layout: Layout, identity: u64) -> Result<(), Fault> {
    assert_eq!(page.len(), HEADER_BYTES);
    let expected = xxh3_64(&page[..HEADER_BYTES - 8]);
    let found = u64_at(page, HEADER_BYTES - 8);
    if expected != found {
        return Err(Fault { offset: (HEADER_BYTES - 8) as u64, kind: DamageKind::HeaderChecksum, expected, found });
    }
    let header: Header = bytemuck::pod_read_unaligned(&page[..size_of::<Header>()]);
    let fields = [
        (0, u64::from_le_bytes(SEGMENT_MAGIC), u64::from_le_bytes(header.magic)),
        (8, u64::from(VERSION), u64::from(header.version)),
        (12, layout.dim as u64, u64::from(header.dim)),
        (16, u64::from(layout.capacity), u64::from(header.capacity)),
        (20, META_BYTES as u64, u64::from(header.meta_bytes)),
        (24, identity, header.identity),
    ];
    match fields.into_iter().find(|(_, expected, found)| expected != found) {
        Some((offset, expected, found)) => Err(Fault { offset, kind: DamageKind::HeaderField, expected, found }),
        None => Ok(()),
    }
}

/// The little-endian u64 at byte `at`.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The checksum of the codes of one block. Takes in the segment and the block's number, so that
/// codes written to the wrong place are found out.
pub(crate) fn codes_sum(identity: u64, block: u32, codes: &Codes<'_>) -> u64 {
    let hashed = [
        xxh3_64(codes.one_bit),
        xxh3_64(codes.two_bit),
        xxh3_64(codes.four_bit),
        xxh3_64(bytemuck::cast_slice(codes.factors)),
        xxh3_64(codes.codebook),
        identity,
        u64::from(block),
    ];
    xxh3_64(bytemuck::cast_slice(&hashed))
}

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
    /// Checksum of what the registry made the row from.
    pub(crate) source: u64,
    pub(crate) reserved_tail: [u8; 24],
}

const _: () = assert!(size_of::<MetaRecord>() == META_BYTES);
const _: () = assert!(std::mem::offset_of!(MetaRecord, state) == STATE_AT);
const _: () = assert!(std::mem::offset_of!(MetaRecord, source) == SOURCE_AT);
const _: () = assert!(512usize.is_multiple_of(META_BYTES) && HEADER_BYTES.is_multiple_of(512));

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

    /// What the record says of a live row, which was checked.
    pub(crate) fn meta(&self) -> RowMeta<'_> {
        RowMeta {
            template: TemplateId(self.template),
            subject: SubjectNumber(self.subject),
            hand: self.hand,
            label: std::str::from_utf8(&self.label[..usize::from(self.label_len)])
                .expect("labels were checked when written and when opened"),
            source: self.source,
        }
    }

    /// The record of a row that was never written.
    pub(crate) fn never() -> Self {
        Self { state: STATE_NEVER, ..Self::zeroed() }
    }

    /// The record of an erased row: its state and nothing else.
    pub(crate) fn gone() -> Self {
        Self { state: STATE_GONE, ..Self::zeroed() }
    }

    /// The checksum this record should have. Takes in the segment and the place, so that a record
    /// written to the wrong place is found out.
    fn sum(&self, identity: u64, offset: u32, row: &[u8]) -> u64 {
        let mut hashed = [0; META_BYTES + 16];
        let record = Self { checksum: xxh3_64(row), ..*self };
        hashed[..META_BYTES].copy_from_slice(bytemuck::bytes_of(&record));
        hashed[META_BYTES..META_BYTES + 8].copy_from_slice(&identity.to_le_bytes());
        hashed[META_BYTES + 8..].copy_from_slice(&u64::from(offset).to_le_bytes());
        xxh3_64(&hashed)
    }
}

/// What a row that the manifest counts turned out to be.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Whole and live.
    Live,
    /// Erased, every byte zero.
    Gone,
    /// Its erasure had begun and is to be finished.
    HalfGone,
    /// Not to be trusted.
    Bad(Fault),
}

/// Checks the row at `offset`, which the manifest counts.
pub(crate) fn check_row(layout: Layout, identity: u64, offset: u32, record: &MetaRecord, row: &[u8]) -> Found {
    let at = layout.meta_at(offset) as u64;
    match record.state {
        STATE_GONE if *record == MetaRecord::gone() && is_zero(row) => Found::Gone,
        STATE_GONE => Found::HalfGone,
        STATE_LIVE => {
            let expected = record.sum(identity, offset, row);
            if expected != record.checksum {
                return Found::Bad(Fault {
                    offset: at,
                    kind: DamageKind::RowChecksum,
                    expected,
                    found: record.checksum,
                });
            }
            let label_end = usize::from(record.label_len);
            if label_end > LABEL_BYTES_MAX || std::str::from_utf8(&record.label[..label_end]).is_err() {
                let (expected, found) = (LABEL_BYTES_MAX as u64, label_end as u64);
                return Found::Bad(Fault { offset: at, kind: DamageKind::RowMeta, expected, found });
            }
            if record.subject > SUBJECT_NUMBER_MAX {
                let (expected, found) = (SUBJECT_NUMBER_MAX, record.subject);
                return Found::Bad(Fault { offset: at, kind: DamageKind::RowMeta, expected, found });
            }
            Found::Live
        }
        state => Found::Bad(Fault {
            offset: at + STATE_AT as u64,
            kind: DamageKind::RowState,
            expected: u64::from(STATE_LIVE),
            found: u64::from(state),
        }),
    }
}

/// Whether every byte is zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // In pieces, so that each is one vectorised fold and a nonzero piece ends the search.
    bytes.chunks(256).all(|piece| piece.iter().fold(0, |any, byte| any | byte) == 0)
}
