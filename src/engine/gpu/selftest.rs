//! Does this adapter compute what the kernels say?
//!
//! Runs every kernel on a small gallery of awkward rows and holds the scores against the CPU
//! twins, before the device may serve. Knows the device and the twins; keeps nothing.

use half::f16;

use super::device::{Batch, Device, LivePiece, Run};
use super::kernels::{Bar, Kernel, SLOT_STEP};
use super::sift_few::sift_few;
use super::sift_many::sift_many;
use super::slack::slack;
use crate::engine::EngineError;

const DIM: usize = 64;
/// One past the last slot sifted; the ones after it are live and must not be reported.
const SLOT_END: u32 = SLOT_STEP - 7;

/// What an adapter did wrong.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// A command failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A count differs from the twin's.
    #[error("{kernel:?}: probe {probe} counted {found} rows at a cut of {cut}, expected {expected}")]
    Count {
        /// The kernel at fault.
        kernel: Kernel,
        /// Number of the probe.
        probe: usize,
        /// The bar.
        cut: f32,
        /// The device's count.
        found: usize,
        /// The twin's.
        expected: usize,
    },
    /// A pair was reported that the twin does not have, or twice.
    #[error("{kernel:?}: reported probe {probe} with slot {slot}, which is dead, outside or a repeat")]
    Stray {
        /// The kernel at fault.
        kernel: Kernel,
        /// Number of the probe.
        probe: u32,
        /// Number of the slot.
        slot: u32,
    },
    /// A score lies further from the twin's than the arithmetic of WGSL allows.
    #[error("{kernel:?}: probe {probe} with slot {slot} scored {found}, expected {expected}")]
    Score {
        /// The kernel at fault.
        kernel: Kernel,
        /// Number of the probe.
        probe: u32,
        /// Number of the slot.
        slot: u32,
        /// The device's score.
        found: f32,
        /// The twin's.
        expected: f32,
    },
}

/// Checks every kernel. Whether f16 subnormals keep their value on this adapter.
///
/// # Errors
/// The first [`Fault`] found.
pub(super) fn run(device: &mut Device) -> Result<bool, Fault> {
    let rows = awkward_rows();
    let live = awkward_live();
    device.clear()?;
    device.add_slab(SLOT_STEP, DIM)?;
    device.write_rows(0, 0, bytemuck::cast_slice(&rows))?;
    device.write_live(&[LivePiece { slab: 0, word: 0, words: live.clone() }])?;
    let mut subnormals_kept = true;
    for kernel in Kernel::ALL {
        // One probe short of whole tiles where the kernel allows it, so that padding is seen.
        let probes_count = kernel.tile_probes() - usize::from(kernel.tile_probes() > 2);
        let probes = unit_probes(probes_count);
        subnormals_kept &= check(device, kernel, &rows, &live, &probes, -3.0)?;
        check(device, kernel, &rows, &live, &probes, 0.25)?;
    }
    device.clear()?;
    Ok(subnormals_kept)
}

fn check(
    device: &mut Device,
    kernel: Kernel,
    rows: &[f16],
    live: &[u64],
    probes: &[f32],
    cut: f32,
) -> Result<bool, Fault> {
    let probes_count = probes.len() / DIM;
    let padded = kernel.padded(probes_count);
    let quota = (device.entries_max() as usize / probes_count).min(SLOT_STEP as usize);
    let mut bars = vec![Bar::CLOSED; padded];
    bars[..probes_count].fill(Bar { cut, quota: u32::try_from(quota).expect("at most SLOT_STEP") });
    let packed = kernel.pack(probes, DIM);
    // The twin reports everything, so that a score near the cut can be told from a stray one.
    let mut open = bars.clone();
    open[..probes_count].iter_mut().for_each(|bar| bar.cut = -3.0);
    let sifted_rows = &rows[..SLOT_END as usize * DIM];
    let expected = match kernel {
        Kernel::Few { .. } => sift_few(sifted_rows, live, probes, &open[..probes_count], DIM),
        Kernel::Many { .. } => sift_many(sifted_rows, live, &packed, kernel.tile_probes(), &open, DIM),
    };
    let mut scores = vec![None; probes_count * SLOT_STEP as usize];
    for entry in &expected {
        scores[entry.probe as usize * SLOT_STEP as usize + entry.slot as usize] = Some(entry.score);
    }
    let run = Run { slab: 0, slot_first: 0, slot_end: SLOT_END, slot_base: 0 };
    let report = device.run(&Batch { dim: DIM, probes: probes_count, packed, bars, runs: vec![run] })?;

    // Both sides are within a slack of the exact score.
    let tight: Vec<f64> = probes.chunks_exact(DIM).map(|probe| 2.0 * slack(probe, true)).collect();
    let wide: Vec<f64> = probes.chunks_exact(DIM).map(|probe| 2.0 * slack(probe, false)).collect();
    for (probe, &count) in report.counts.iter().enumerate() {
        let of_probe = &scores[probe * SLOT_STEP as usize..][..SLOT_STEP as usize];
        let above = |line: f64| of_probe.iter().flatten().filter(|&&s| f64::from(s) >= line).count();
        let (least, most) = (above(f64::from(cut) + wide[probe]), above(f64::from(cut) - wide[probe]));
        if !(least..=most).contains(&(count as usize)) {
            return Err(Fault::Count { kernel, probe, cut, found: count as usize, expected: least });
        }
    }
    let mut subnormals_kept = true;
    let mut received = vec![0_usize; probes_count];
    for entry in &report.entries {
        let place = entry.probe as usize * SLOT_STEP as usize + entry.slot as usize;
        let score = scores.get_mut(place).and_then(Option::take);
        let Some(score) = score else {
            return Err(Fault::Stray { kernel, probe: entry.probe, slot: entry.slot });
        };
        received[entry.probe as usize] += 1;
        let distance = f64::from((score - entry.score).abs());
        subnormals_kept &= distance <= tight[entry.probe as usize];
        // Written so that a NaN is a fault too.
        let near = distance <= wide[entry.probe as usize];
        if !near {
            return Err(Fault::Score {
                kernel,
                probe: entry.probe,
                slot: entry.slot,
                found: entry.score,
                expected: score,
            });
        }
    }
    for (probe, (&count, &received)) in report.counts.iter().zip(&received).enumerate() {
        let expected = (count as usize).min(quota);
        if received != expected {
            return Err(Fault::Count { kernel, probe, cut, found: received, expected });
        }
    }
    Ok(subnormals_kept)
}

/// A stream of numbers in -1..1, the same on every machine.
fn noise() -> impl FnMut() -> f32 {
    let mut state = 0x7468_656e_6172_u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let top = i16::from_ne_bytes([(state >> 48) as u8, (state >> 56) as u8]);
        f32::from(top) / 32_768.0
    }
}

/// Unit rows, and among them zeros of both signs, nothing but subnormals, one large component,
/// duplicates, antipodes and sums that cancel.
fn awkward_rows() -> Vec<f16> {
    let mut next = noise();
    let mut rows = Vec::with_capacity(SLOT_STEP as usize * DIM);
    for _ in 0..SLOT_STEP {
        let row: Vec<f32> = (0..DIM).map(|_| next()).collect();
        let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        rows.extend(row.iter().map(|v| f16::from_f32(v / norm)));
    }
    let mut set = |slot: usize, value: &dyn Fn(usize) -> f16| {
        for (i, place) in rows[slot * DIM..][..DIM].iter_mut().enumerate() {
            *place = value(i);
        }
    };
    let subnormal = f16::from_bits(0x02aa);
    set(0, &|_| f16::ZERO);
    set(1, &|_| f16::NEG_ZERO);
    set(2, &|_| subnormal);
    set(3, &|i| if i == 40 { f16::ONE } else { f16::from_bits(1) });
    set(4, &|i| if i == DIM - 1 { f16::NEG_ONE } else { f16::ZERO });
    set(5, &|_| f16::from_f32(0.125));
    set(6, &|_| f16::from_f32(0.125));
    set(7, &|_| f16::from_f32(-0.125));
    set(8, &|i| f16::from_f32(if i % 2 == 0 { 0.125 } else { -0.125 }));
    set(9, &|i| f16::from_f32(if i < DIM / 2 { 0.125 } else { -0.125 }));
    set(255, &|_| f16::from_f32(0.125));
    rows
}

/// All live but some: at both ends of words and of the run.
fn awkward_live() -> Vec<u64> {
    let mut live = vec![u64::MAX; SLOT_STEP as usize / 64];
    for dead in [6_usize, 31, 32, 63, 64, 100, 127, 128, 300, 504] {
        live[dead / 64] &= !(1 << (dead % 64));
    }
    live
}

/// Unit probes, the first with equal components, so that subnormals add up.
fn unit_probes(count: usize) -> Vec<f32> {
    let mut next = noise();
    let mut probes = vec![0.125_f32; DIM];
    while probes.len() < count * DIM {
        let probe: Vec<f32> = (0..DIM).map(|_| next()).collect();
        let norm = probe.iter().map(|v| v * v).sum::<f32>().sqrt();
        probes.extend(probe.iter().map(|v| v / norm));
    }
    probes
}
