//! One batch on the device: upload, dispatch, read back.
//!
//! Knows the layout of the slices, tally and download buffers. Does not know floors or blocks.

use std::time::Duration;

use bytemuck::Zeroable;
use zeroize::Zeroizing;

use super::Device;
use crate::engine::EngineError;
use crate::engine::gpu::kernels::{Bar, Entry, Kernel, PROBES_MAX, SLOT_STEP, Slice, WORD_COMPONENTS};

/// Runs of slots in one batch.
pub(in crate::engine::gpu) const RUNS_MAX: usize = 256;
/// Distance of two [`Slice`]s in their buffer: the largest uniform alignment WebGPU allows.
pub(super) const SLICE_STRIDE: u64 = 256;
/// Entries that come back with the counts, without a second round trip.
const ENTRIES_FIRST: u32 = 8192;
/// Bytes of the two timestamps before the tally in the download buffer.
pub(super) const TIMES_BYTES: u64 = 16;
/// Bytes of the tally: the stored counter and a count a probe.
pub(super) const TALLY_BYTES: u64 = 4 + 4 * PROBES_MAX as u64;
/// Where the entries begin in the download buffer.
pub(super) const ENTRIES_AT: u64 = (TIMES_BYTES + TALLY_BYTES).next_multiple_of(16);

/// Slots of one slab to sift.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine::gpu) struct Run {
    /// Index of the slab.
    pub slab: usize,
    /// First slot, a multiple of [`SLOT_STEP`].
    pub slot_first: u32,
    /// One past the last slot.
    pub slot_end: u32,
    /// Number of the slab's slot 0 among all slots.
    pub slot_base: u32,
}

/// One batch of probes against some runs of slots.
pub(in crate::engine::gpu) struct Batch {
    /// Components of a row.
    pub dim: usize,
    /// Probes in the batch, at most [`PROBES_MAX`].
    pub probes: usize,
    /// The probes as [`Kernel::pack`] lays them out.
    pub packed: Zeroizing<Vec<f32>>,
    /// A bar a probe, padded with [`Bar::CLOSED`] like the probes.
    pub bars: Vec<Bar>,
    /// What to sift, at most [`RUNS_MAX`] runs.
    pub runs: Vec<Run>,
}

/// What a batch left.
#[derive(Debug, Default)]
pub(in crate::engine::gpu) struct Report {
    /// The stored pairs, in any order.
    pub entries: Vec<Entry>,
    /// For each probe, how many pairs reached its bar, stored or not.
    pub counts: Vec<u32>,
    /// Time the kernels took, where the adapter can tell.
    pub device_time: Option<Duration>,
}

impl Device {
    /// Sifts one batch.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(in crate::engine::gpu) fn run(&mut self, batch: &Batch) -> Result<Report, EngineError> {
        let kernel = Kernel::for_batch(batch.probes);
        let padded = kernel.padded(batch.probes);
        assert!(batch.probes <= PROBES_MAX && batch.runs.len() <= RUNS_MAX);
        assert!(batch.packed.len() == padded * batch.dim && batch.bars.len() == padded);

        let mut slices = vec![0_u8; batch.runs.len() * usize_of(SLICE_STRIDE)];
        for (run, place) in batch.runs.iter().zip(slices.chunks_exact_mut(usize_of(SLICE_STRIDE))) {
            let slab = &self.slabs[run.slab];
            assert!(run.slot_first.is_multiple_of(SLOT_STEP) && run.slot_end <= slab.slots);
            assert!(slab.dim == batch.dim && batch.dim.is_multiple_of(32));
            let slice = Slice {
                row_words: u32::try_from(batch.dim / WORD_COMPONENTS).expect("a dimension is small"),
                slot_first: run.slot_first,
                slot_end: run.slot_end,
                slot_base: run.slot_base,
                entries_max: self.entries_max,
                ..Slice::zeroed()
            };
            place[..size_of::<Slice>()].copy_from_slice(bytemuck::bytes_of(&slice));
        }
        let probe_bytes: &[u8] = bytemuck::cast_slice(&batch.packed);
        let bar_bytes: &[u8] = bytemuck::cast_slice(&batch.bars);
        let staged = self.stage(&[probe_bytes, bar_bytes, &slices])?;

        let mut encoder = self.encoder();
        let (probes_len, bars_len) = (probe_bytes.len() as u64, bar_bytes.len() as u64);
        encoder.copy_buffer_to_buffer(&self.staging, 0, &self.probes, 0, probes_len);
        encoder.copy_buffer_to_buffer(&self.staging, probes_len, &self.bars, 0, bars_len);
        let slices_at = probes_len + bars_len;
        encoder.copy_buffer_to_buffer(&self.staging, slices_at, &self.slices, 0, slices.len() as u64);
        encoder.clear_buffer(&self.tally, 0, None);
        {
            let timestamp_writes = self.times.as_ref().map(|(set, _)| wgpu::ComputePassTimestampWrites {
                query_set: set,
                beginning_of_pass_write_index: Some(0),
                end_of_pass_write_index: Some(1),
            });
            let mut pass =
                encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("sift"), timestamp_writes });
            pass.set_pipeline(&self.pipelines[kernel.index()]);
            for (number, run) in (0_u32..).zip(&batch.runs) {
                let [x, y, z] = kernel.workgroups(run.slot_end - run.slot_first, batch.probes);
                pass.set_bind_group(0, &self.slabs[run.slab].bound, &[number * SLICE_STRIDE as u32]);
                pass.dispatch_workgroups(x, y, z);
            }
        }
        encoder.clear_buffer(&self.probes, 0, Some(probes_len));
        if let Some((set, resolved)) = &self.times {
            encoder.resolve_query_set(set, 0..2, resolved, 0);
            encoder.copy_buffer_to_buffer(resolved, 0, &self.download, 0, TIMES_BYTES);
        }
        encoder.copy_buffer_to_buffer(&self.tally, 0, &self.download, TIMES_BYTES, TALLY_BYTES);
        let entry_bytes = size_of::<Entry>() as u64;
        let first = u64::from(ENTRIES_FIRST.min(self.entries_max)) * entry_bytes;
        encoder.copy_buffer_to_buffer(&self.entries, 0, &self.download, ENTRIES_AT, first);
        self.finish(encoder, staged, Some(ENTRIES_AT + first))?;

        let period_ns = f64::from(self.queue.get_timestamp_period());
        let timed = self.times.is_some();
        let (mut report, stored) = self.downloaded(0, ENTRIES_AT + first, |bytes| {
            let times: &[u64] = bytemuck::cast_slice(&bytes[..usize_of(TIMES_BYTES)]);
            let ticks = times[1].saturating_sub(times[0]);
            let tally: &[u32] = bytemuck::cast_slice(&bytes[usize_of(TIMES_BYTES)..][..usize_of(TALLY_BYTES)]);
            let stored = tally[0].min(self.entries_max);
            let here = stored.min(ENTRIES_FIRST) as usize;
            let entries: &[Entry] = bytemuck::cast_slice(&bytes[usize_of(ENTRIES_AT)..][..here * size_of::<Entry>()]);
            let report = Report {
                entries: entries.to_vec(),
                counts: tally[1..=batch.probes].to_vec(),
                device_time: timed.then(|| Duration::from_secs_f64(ticks as f64 * period_ns * 1e-9)),
            };
            (report, stored)
        })?;
        if stored > ENTRIES_FIRST {
            let rest = u64::from(stored - ENTRIES_FIRST) * entry_bytes;
            self.stage(&[])?;
            let mut encoder = self.encoder();
            encoder.copy_buffer_to_buffer(&self.entries, first, &self.download, 0, rest);
            self.finish(encoder, 0, Some(rest))?;
            let more = self.downloaded(0, rest, |bytes| bytemuck::cast_slice::<u8, Entry>(bytes).to_vec())?;
            report.entries.extend(more);
        }
        Ok(report)
    }
}

fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a host buffer's size fits usize")
}
