//! Checks the codes of a block.

use crate::bytes::is_zero;
use crate::codes::{BLOCK_ROWS, OwnedCodes};
use crate::error::{DamageKind, Fault};
use crate::format::codes_checksum;
use crate::reader_barrier::WriteToken;
use crate::storage::Pages;

/// How the codes of a block are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CodesCheck {
    /// Against their checksum.
    Checksum,
    /// Against codes computed again from the rows.
    Recompute,
}

/// Whether a block has no codes, as one that was never full should.
pub(super) fn is_uncoded(pages: &Pages, block: u32, token: &WriteToken) -> bool {
    let codes = pages.block_codes(block, token);
    let factors: &[u8] = bytemuck::cast_slice(codes.factors);
    let planes = [codes.one_bit, codes.two_bit, codes.four_bit, factors, codes.codebook];
    planes.into_iter().all(is_zero) && pages.block_checksum(block, token) == 0
}

/// A fault in the codes of a block.
pub(super) struct CodesFault {
    pub(super) fault: Fault,
    /// Whether an interrupted erasure can be the cause: a row is erased, and either the checksum does not
    /// match the codes or the erased row still has codes.
    pub(super) may_be_interrupted: bool,
}

/// Checks the codes of a block whose rows are all whole or erased. `erased` has one bit per row.
pub(super) fn check_codes(
    pages: &Pages,
    identity: u64,
    block: u32,
    erased: u64,
    how: CodesCheck,
    token: &WriteToken,
) -> Result<(), CodesFault> {
    let (layout, codes) = (pages.layout(), pages.block_codes(block, token));
    let (expected, found) = (codes_checksum(identity, block, &codes), pages.block_checksum(block, token));
    let sum_fault =
        Fault { offset: layout.checksum_at(block) as u64, kind: DamageKind::CodesChecksum, expected, found };
    // A power cut can leave a row erased, and its codes and their old checksum unchanged.
    let is_left = |lane: usize| erased >> lane & 1 == 1 && !codes.is_clear(layout.dim, lane);
    let is_any_left = (0..BLOCK_ROWS).any(is_left);
    let may_be_interrupted = erased != 0 && (expected != found || is_any_left);
    let wrong = |fault| Err(CodesFault { fault, may_be_interrupted });
    if how == CodesCheck::Recompute {
        let mut computed = OwnedCodes::of(pages.block_rows(block, token), layout.dim);
        let areas = [
            (layout.one_bit_at(block), &*computed.one_bit, codes.one_bit),
            (layout.two_bit_at(block), &*computed.two_bit, codes.two_bit),
            (layout.four_bit_at(block), &*computed.four_bit, codes.four_bit),
            (layout.factors_at(block), bytemuck::cast_slice(&computed.factors), bytemuck::cast_slice(codes.factors)),
            (layout.codebook_at(block), &*computed.codebook, codes.codebook),
        ];
        let differs = areas.into_iter().find_map(|(at, expected, found)| {
            let place = expected.iter().zip(found).position(|(expected, found)| expected != found)?;
            let (expected, found) = (u64::from(expected[place]), u64::from(found[place]));
            Some(Fault { offset: (at + place) as u64, kind: DamageKind::Codes, expected, found })
        });
        computed.wipe();
        return match differs {
            Some(fault) => wrong(fault),
            None if expected != found => wrong(sum_fault),
            None => Ok(()),
        };
    }
    if expected != found || is_any_left { wrong(sum_fault) } else { Ok(()) }
}
