//! The product in plain Rust, for every processor: the twin that the other kernels are held against.

use half::f16;

/// The sum of products, in a shape that compilers vectorise.
pub(super) fn dot(row: &[f16], probe: &[f32]) -> f32 {
    row.iter().zip(probe).map(|(x, q)| widened(*x) * q).sum()
}

/// An f16 as f32, exactly, for finite values. Without branches or tables, unlike a conversion in
/// software that must care for NaN, so that loops over it can be vectorised.
#[inline]
pub(in crate::engine) fn widened(value: f16) -> f32 {
    const SMALLEST_NORMAL: u32 = 113 << 23; // 2^-14
    let bits = u32::from(value.to_bits());
    let magnitude = (bits & 0x7fff) << 13;
    // The exponent's bias is 15 there and 127 here.
    let normal = magnitude + (112 << 23);
    // Below the normal range the number is fraction * 2^-24: put it behind 2^-14's leading bit,
    // then take that away.
    let subnormal = (f32::from_bits(magnitude + SMALLEST_NORMAL) - f32::from_bits(SMALLEST_NORMAL)).to_bits();
    let chosen = if magnitude < 1 << 23 { subnormal } else { normal };
    f32::from_bits(chosen | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_finite_f16() {
        for bits in 0..=u16::MAX {
            let value = f16::from_bits(bits);
            if value.is_finite() {
                assert_eq!(widened(value).to_bits(), value.to_f32().to_bits(), "{bits:#06x}");
            }
        }
    }
}
