//! The list of what passed a scan, by AVX-512 with VBMI2. Twin: [`super::super::portable::list`].

use std::arch::x86_64::*;

use thenar_index::codes::BLOCK_ROWS;

use super::super::layout::{Hit, ListCall};

/// See [`super::super::kernels::List`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2")]
pub(in super::super) fn list(call: &ListCall<'_>, hits: &mut [Hit]) -> usize {
    const LANES: usize = 16;
    // SAFETY: 64 bytes.
    let places = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
    let mut listed = 0;
    for probe in 0..call.probes {
        for block in 0..call.blocks {
            let mask = (call.found[probe][block] | call.always_pass[block]) & call.live[block];
            if mask == 0 {
                continue;
            }
            let first = Hit::new(call.first_probe + probe, call.first_row + block * BLOCK_ROWS);
            let first = _mm512_set1_epi32(first.0.cast_signed());
            let rows = _mm512_maskz_compress_epi8(mask, places);
            let count = mask.count_ones() as usize;
            let to = hits[listed..listed + BLOCK_ROWS].as_mut_ptr();
            let quarters = [
                _mm512_castsi512_si128(rows),
                _mm512_extracti32x4_epi32::<1>(rows),
                _mm512_extracti32x4_epi32::<2>(rows),
                _mm512_extracti32x4_epi32::<3>(rows),
            ];
            for (n, rows) in quarters.into_iter().enumerate() {
                if n * LANES >= count {
                    break;
                }
                let some = _mm512_add_epi32(first, _mm512_cvtepu8_epi32(rows));
                // SAFETY: sixteen of 64 places, what is behind the last hit included.
                unsafe { _mm512_storeu_si512(to.wrapping_add(n * LANES).cast(), some) };
            }
            listed += count;
        }
    }
    listed
}

/// The numbers below 64.
const PLACES: [u8; BLOCK_ROWS] = {
    let mut places = [0; BLOCK_ROWS];
    let mut at = 0;
    while at < places.len() {
        places[at] = at as u8;
        at += 1;
    }
    places
};
