//! Writes the codes of blocks into a segment's file, and takes erased rows out of them.
//!
//! Knows rows, their codes and where both are stored. Does not know which rows count.
//!
//! Invariants: the codes written for a block are those of its rows (an erased row is all zeros, and so
//! are its codes); the checksum beside them matches them.

use std::ops::Range;

use crate::codes::{BLOCK_ROWS, OwnedCodes};
use crate::error::Error;
use crate::format::codes_checksum;
use crate::reader_barrier::{Exclusive, WriteToken};
use crate::storage::Pages;

/// Encodes the rows of a block. Returns the codes and their checksum.
fn encode(pages: &Pages, identity: u64, block: u32, token: &WriteToken) -> (OwnedCodes, u64) {
    let codes = OwnedCodes::of(pages.block_rows(block, token), pages.layout().dim);
    let sum = codes_checksum(identity, block, &codes.as_codes());
    (codes, sum)
}

/// Encodes `blocks`, whose rows are all written and not all shown.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn encode_blocks(
    pages: &Pages,
    identity: u64,
    blocks: Range<u32>,
    token: &mut WriteToken,
) -> Result<(), Error> {
    for block in blocks {
        let (mut codes, sum) = encode(pages, identity, block, token);
        let written = pages.write_fresh_codes(block, &codes, sum, token);
        codes.wipe();
        written?;
    }
    Ok(())
}

/// Zeroes the codes of the rows at `offsets`, all of which are in `block` and already erased.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn clear_codes(
    pages: &Pages,
    identity: u64,
    block: u32,
    offsets: impl Iterator<Item = u32>,
    exclusive: &mut Exclusive<'_>,
) -> Result<(), Error> {
    let dim = pages.layout().dim;
    let old = pages.block_codes(block, exclusive.token());
    // Codes that have decayed on the disk must not get a correct checksum.
    let mut codes = if codes_checksum(identity, block, &old) == pages.block_checksum(block, exclusive.token()) {
        OwnedCodes::copied(&old, dim)
    } else {
        OwnedCodes::of(pages.block_rows(block, exclusive.token()), dim)
    };
    offsets.for_each(|offset| codes.clear(offset as usize % BLOCK_ROWS));
    let sum = codes_checksum(identity, block, &codes.as_codes());
    rewrite(pages, block, (codes, sum), exclusive)
}

/// Encodes a block again.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn re_encode(pages: &Pages, identity: u64, block: u32, exclusive: &mut Exclusive<'_>) -> Result<(), Error> {
    let encoded = encode(pages, identity, block, exclusive.token());
    rewrite(pages, block, encoded, exclusive)
}

fn rewrite(
    pages: &Pages,
    block: u32,
    (mut codes, sum): (OwnedCodes, u64),
    exclusive: &mut Exclusive<'_>,
) -> Result<(), Error> {
    let written = pages.rewrite_codes(block, &codes, sum, exclusive);
    codes.wipe();
    written
}
