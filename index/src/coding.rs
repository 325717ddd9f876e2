//! Codes on their way into a segment's file, and out of it again when a row goes.
//!
//! Knows rows, their codes and where both lie. Does not know which rows count.
//!
//! Invariants: the codes written for a block are those of the rows in it, where an erased row is
//! all zeros and so are its codes; the checksum beside them is theirs.

use std::ops::Range;

use crate::codes::{BLOCK_ROWS, OwnedCodes};
use crate::error::{DamageKind, Error};
use crate::format::{Fault, codes_sum};
use crate::map::Pages;
use crate::reader_barrier::{Quiet, Writer};

/// The codes of a block, made from its rows, and their checksum.
fn made(pages: &Pages, identity: u64, block: u32, writer: &Writer) -> (OwnedCodes, u64) {
    let codes = OwnedCodes::of(pages.block_rows(block, writer), pages.layout().dim);
    let sum = codes_sum(identity, block, &codes.as_codes());
    (codes, sum)
}

/// Writes the codes of `blocks`, whose rows are all written and not all shown.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn code_blocks(pages: &Pages, identity: u64, blocks: Range<u32>, writer: &mut Writer) -> Result<(), Error> {
    for block in blocks {
        let (mut codes, sum) = made(pages, identity, block, writer);
        let written = pages.write_fresh_codes(block, &codes, sum, writer);
        codes.wipe();
        written?;
    }
    Ok(())
}

/// Takes the codes of the rows at `offsets`, all of them in `block` and erased already, out of it.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn clear_codes(
    pages: &Pages,
    identity: u64,
    block: u32,
    offsets: impl Iterator<Item = u32>,
    quiet: &mut Quiet<'_>,
) -> Result<(), Error> {
    let dim = pages.layout().dim;
    let old = pages.block_codes(block, quiet.writer());
    // Codes that went bad on the disk must not come out with a checksum that says they are right.
    let mut codes = if codes_sum(identity, block, &old) == pages.block_sum(block, quiet.writer()) {
        OwnedCodes::copied(&old, dim)
    } else {
        OwnedCodes::of(pages.block_rows(block, quiet.writer()), dim)
    };
    offsets.for_each(|offset| codes.clear(offset as usize % BLOCK_ROWS));
    let sum = codes_sum(identity, block, &codes.as_codes());
    rewrite(pages, block, (codes, sum), quiet)
}

/// Makes the codes of a block anew from its rows.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn recode(pages: &Pages, identity: u64, block: u32, quiet: &mut Quiet<'_>) -> Result<(), Error> {
    let made = made(pages, identity, block, quiet.writer());
    rewrite(pages, block, made, quiet)
}

fn rewrite(pages: &Pages, block: u32, (mut codes, sum): (OwnedCodes, u64), quiet: &mut Quiet<'_>) -> Result<(), Error> {
    let written = pages.rewrite_codes(block, &codes, sum, quiet);
    codes.wipe();
    written
}

/// How the codes of a block are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// By their checksum.
    Sums,
    /// By making them again from the rows.
    Bytes,
}

/// Whether a block that was never full has no codes.
pub(crate) fn is_uncoded(pages: &Pages, block: u32, writer: &Writer) -> bool {
    let codes = pages.block_codes(block, writer);
    let factors: &[u8] = bytemuck::cast_slice(codes.factors);
    let planes = [codes.one_bit, codes.two_bit, codes.four_bit, factors, codes.codebook];
    planes.into_iter().all(crate::format::is_zero) && pages.block_sum(block, writer) == 0
}

/// What is wrong with the codes of a block.
pub(crate) struct CodesFault {
    /// Where, and how.
    pub(crate) fault: Fault,
    /// Whether an erasure that was cut short can have left them so: a row is erased, and the checksum
    /// is not that of the codes or the erased row still has some.
    pub(crate) may_be_cut: bool,
}

/// Checks the codes of a block whose rows are all whole or erased, `gone` having a bit for each
/// erased one.
pub(crate) fn check_codes(
    pages: &Pages,
    identity: u64,
    block: u32,
    gone: u64,
    depth: Depth,
    writer: &Writer,
) -> Result<(), CodesFault> {
    let (layout, codes) = (pages.layout(), pages.block_codes(block, writer));
    let (expected, found) = (codes_sum(identity, block, &codes), pages.block_sum(block, writer));
    let sum_fault = Fault { offset: layout.sum_at(block) as u64, kind: DamageKind::CodesChecksum, expected, found };
    // A power cut can leave a row erased and its codes, with their old checksum, in place.
    let is_left = |lane: usize| gone >> lane & 1 == 1 && !codes.is_clear(layout.dim, lane);
    let is_any_left = (0..BLOCK_ROWS).any(is_left);
    let may_be_cut = gone != 0 && (expected != found || is_any_left);
    let wrong = |fault| Err(CodesFault { fault, may_be_cut });
    if depth == Depth::Bytes {
        let mut made = OwnedCodes::of(pages.block_rows(block, writer), layout.dim);
        let areas = [
            (layout.one_bit_at(block), &*made.one_bit, codes.one_bit),
            (layout.two_bit_at(block), &*made.two_bit, codes.two_bit),
            (layout.four_bit_at(block), &*made.four_bit, codes.four_bit),
            (layout.terms_at(block), bytemuck::cast_slice(&made.factors), bytemuck::cast_slice(codes.factors)),
            (layout.codebook_at(block), &*made.codebook, codes.codebook),
        ];
        let differs = areas.into_iter().find_map(|(at, expected, found)| {
            let place = expected.iter().zip(found).position(|(expected, found)| expected != found)?;
            let (expected, found) = (u64::from(expected[place]), u64::from(found[place]));
            Some(Fault { offset: (at + place) as u64, kind: DamageKind::Codes, expected, found })
        });
        made.wipe();
        return match differs {
            Some(fault) => wrong(fault),
            None if expected != found => wrong(sum_fault),
            None => Ok(()),
        };
    }
    if expected != found || is_any_left { wrong(sum_fault) } else { Ok(()) }
}
