//! A segment file: where its areas are, its header page, and the checksum of its codes.
//!
//! Invariants: a metadata record never straddles a 512-byte sector, so that a torn write leaves it
//! whole, old or new; every row starts on a 64-byte boundary, every area of codes on a page.

use bytemuck::{Pod, Zeroable};
use xxhash_rust::xxh3::xxh3_64;

use super::{META_BYTES, VERSION};
use crate::bytes::u64_at;
use crate::codes::{BLOCK_ROWS, Codes, Factors, codebook_bytes, four_bit_bytes, one_bit_bytes};
use crate::error::{DamageKind, Fault};
use crate::types::Geometry;

/// Length of the header page in bytes.
pub(crate) const HEADER_BYTES: usize = 4096;
/// Areas of codes start at multiples of this.
const PAGE_BYTES: usize = 4096;
/// Bytes of the factors of a block.
const FACTORS_BYTES: usize = BLOCK_ROWS * size_of::<Factors>();
const SEGMENT_MAGIC: [u8; 8] = *b"THNRSEGM";
const _: () = assert!(512usize.is_multiple_of(META_BYTES) && HEADER_BYTES.is_multiple_of(512));

/// Offsets in a segment file.
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

    /// Start of the record of the row at `offset`.
    pub(crate) fn meta_at(self, offset: u32) -> usize {
        HEADER_BYTES + offset as usize * META_BYTES
    }

    /// Start of the row at `offset`.
    pub(crate) fn row_at(self, offset: u32) -> usize {
        self.meta_at(self.capacity) + offset as usize * self.row_bytes()
    }

    /// Number of blocks.
    pub(crate) fn block_count(self) -> u32 {
        self.capacity / BLOCK_ROWS as u32
    }

    /// Start of the 1-bit codes of `block`.
    pub(crate) fn one_bit_at(self, block: u32) -> usize {
        self.row_at(self.capacity).next_multiple_of(PAGE_BYTES) + block as usize * one_bit_bytes(self.dim)
    }

    /// Start of the 2-bit codes of `block`.
    pub(crate) fn two_bit_at(self, block: u32) -> usize {
        self.one_bit_at(self.block_count()).next_multiple_of(PAGE_BYTES) + block as usize * one_bit_bytes(self.dim)
    }

    /// Start of the 4-bit codes of `block`.
    pub(crate) fn four_bit_at(self, block: u32) -> usize {
        self.two_bit_at(self.block_count()).next_multiple_of(PAGE_BYTES) + block as usize * four_bit_bytes(self.dim)
    }

    /// Start of the factors of `block`.
    pub(crate) fn factors_at(self, block: u32) -> usize {
        self.four_bit_at(self.block_count()).next_multiple_of(PAGE_BYTES) + block as usize * FACTORS_BYTES
    }

    /// Start of the codebook codes of `block`.
    pub(crate) fn codebook_at(self, block: u32) -> usize {
        self.factors_at(self.block_count()).next_multiple_of(PAGE_BYTES) + block as usize * codebook_bytes(self.dim)
    }

    /// Start of the checksum of the codes of `block`.
    pub(crate) fn checksum_at(self, block: u32) -> usize {
        self.codebook_at(self.block_count()).next_multiple_of(PAGE_BYTES) + block as usize * 8
    }

    /// Length of the file.
    pub(crate) fn file_bytes(self) -> usize {
        self.checksum_at(self.block_count())
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

/// Checks a header page against the manifest's entry for the segment.
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

/// The checksum of the codes of one block. Covers the segment's identity and the block's number, so
/// that codes in the wrong place are detected.
pub(crate) fn codes_checksum(identity: u64, block: u32, codes: &Codes<'_>) -> u64 {
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
