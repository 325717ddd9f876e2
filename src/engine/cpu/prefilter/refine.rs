//! The second step of the prefilter: rows that passed the first pass are compared by their 4-bit codes with
//! the probe in eight bits: one exact integer sum, one bound for the rounding of the probe.
//!
//! What all instruction sets share. Knows codes and bounds; does not know live bits.

use thenar_index::codes::{Codes, Factors};

use super::layout::Hit;
use crate::engine::certificate::{Bound, Bounds};
use crate::engine::quantised_probe::QuantisedProbe;

/// Hits to be compared with their probes by 4-bit codes.
pub(super) struct RefineCall<'a> {
    /// Of a piece. Shape: `[rows, dim / 2]`.
    pub(super) four_bit: &'a [u8],
    /// Shape: `[rows]`.
    pub(super) factors: &'a [Factors],
    /// The probes that hits refer to.
    pub(super) probes: &'a [RefineProbe<'a>],
    pub(super) bounds: &'a Bounds,
}

/// What a comparison by 4-bit codes needs of a probe.
#[derive(Debug, Clone, Copy)]
pub(super) struct RefineProbe<'a> {
    integers: &'a [i8],
    scale: f32,
    /// 15 times the sum of the integers.
    sum: i32,
    /// The parts of the bound. The slack includes what the quantisation error may take from <q, u>.
    along: f32,
    across: f32,
    slack: f32,
}

impl<'a> RefineProbe<'a> {
    /// Without a bound every row passes.
    pub(super) fn new(probe: &'a QuantisedProbe, bound: Option<Bound>) -> Self {
        let (along, across, slack) = bound.map_or((0.0, 0.0, f32::INFINITY), |bound| bound.parts());
        let slack = slack + (probe.error() as f32).next_up();
        Self { integers: probe.integers(), scale: probe.scale(), sum: 15 * probe.sum(), along, across, slack }
    }
}

/// Prefetches what refining `hits` reads. If few rows pass, their 4-bit codes lie far apart, and reading
/// one after the other would take as long as the whole first pass.
#[inline]
pub(super) fn prefetch_hits(codes: &Codes<'_>, hits: &[Hit]) {
    let code = four_bit_codes(codes.four_bit, codes.factors);
    for hit in hits {
        prefetch_lines(code(*hit));
        prefetch((&raw const codes.factors[hit.row()]).cast());
    }
}

/// The 4-bit code of a hit's row, in a piece with these codes and factors.
#[inline(always)]
fn four_bit_codes<'a>(four_bit: &'a [u8], factors: &[Factors]) -> impl Fn(Hit) -> &'a [u8] {
    let code_bytes = four_bit.len() / factors.len().max(1);
    move |hit| &four_bit[hit.row() * code_bytes..][..code_bytes]
}

/// Prefetches the lines of a 4-bit code.
#[inline]
fn prefetch_lines(code: &[u8]) {
    code.chunks(64).for_each(|line| prefetch(line.as_ptr()));
}

/// Prefetches the line at `at`.
#[inline]
fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetching reads nothing.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// How many hits ahead codes are prefetched.
const HITS_AHEAD: usize = 16;

/// Moves the hits whose 4-bit codes reach their bounds to the front, by a path's sum of products of nibbles
/// and probe, and returns how many there are.
#[inline(always)]
pub(super) fn refine_by(call: &RefineCall<'_>, hits: &mut [Hit], dot: impl Fn(&[u8], &[i8]) -> i32) -> usize {
    let mut kept = 0;
    let (loss, code) = (call.bounds.loss(), four_bit_codes(call.four_bit, call.factors));
    for at in 0..hits.len() {
        let hit = hits[at];
        prefetch_lines(code(hits[(at + HITS_AHEAD).min(hits.len() - 1)]));
        let probe = &call.probes[hit.probe()];
        let factors = call.factors[hit.row()];
        // `Bound::least_product`, and `QuantisedProbe`: 2 <k, n> - 15 <k, 1>.
        let cosine = (factors.four_bit_cosine() - loss).max(0.0);
        let sine = (1.0 - cosine * cosine).max(0.0).sqrt();
        let least = probe.along * cosine - probe.across * sine - probe.slack;
        let product = 2 * dot(code(hit), probe.integers) - probe.sum;
        let below = probe.scale * (product as f32) < least * (factors.four_bit_square() as f32).sqrt();
        // Without a bound every row passes, also a row of zeros, whose product is not a number. A hit that
        // does not pass is overwritten by the next.
        hits[kept] = hit;
        kept += usize::from(!below);
    }
    kept
}
