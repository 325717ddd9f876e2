//! One batch on the device: upload, scan, look again, read back.
//!
//! A [`Lane`] has what one batch needs, so that as many batches as there are lanes can be under way:
//! [`Device::submit`] begins one, [`Device::collect`] waits for the oldest. Knows the layout of the
//! slices, tally and download buffers. Does not know floors or blocks.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bytemuck::Zeroable;
use zeroize::Zeroizing;

use super::{Device, note, stage, unstage};
use crate::engine::EngineError;
use crate::engine::gpu::bindings::{Bar, Entry, PROBES_MAX, Slice};
use crate::engine::gpu::kernels::{self, BAR_BYTES, ENTRY_BYTES, FEW_BYTES, Kernel, SLOT_STEP};
use crate::engine::gpu::level::Level;
use crate::model::DIM_MAX;

/// Runs of slots in one batch.
pub(in crate::engine::gpu) const RUNS_MAX: usize = 256;
/// Distance of two [`Slice`]s in their buffer: the largest uniform alignment WebGPU allows.
const SLICE_STRIDE: u64 = 256;
/// Entries that come back with the counts, without a second round trip.
const ENTRIES_FIRST: u32 = 8192;
/// Bytes of the two timestamps before the tally in the download buffer.
const TIMES_BYTES: u64 = 16;
/// Bytes of the tally: two counters and a count a probe.
const TALLY_BYTES: u64 = 8 + 4 * PROBES_MAX as u64;
/// Where the entries begin in the download buffer.
const ENTRIES_AT: u64 = (TIMES_BYTES + TALLY_BYTES).next_multiple_of(16);
/// Bytes of the largest batch of probes: f16 for the scan, bytes for the second look.
const PROBES_BYTES: u64 = (PROBES_MAX * DIM_MAX * 3) as u64;
/// Bytes of the bars of scan and second look.
const BARS_BYTES: u64 = 2 * PROBES_MAX as u64 * BAR_BYTES;

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

/// What the second look needs.
#[derive(Clone)]
pub(in crate::engine::gpu) struct Look {
    /// The probes as `probe::look` lays them out.
    pub packed: Arc<Zeroizing<Vec<u32>>>,
    /// A bar a probe.
    pub bars: Vec<Bar>,
}

/// One batch of probes against some runs of slots.
#[derive(Clone)]
pub(in crate::engine::gpu) struct Batch {
    /// Components of a row.
    pub dim: usize,
    /// Which kernel scans.
    pub kernel: Kernel,
    /// Which code it scans.
    pub level: Level,
    /// Probes in the batch, at most [`PROBES_MAX`].
    pub probes: usize,
    /// The probes as `probe::pack` lays them out.
    pub packed: Arc<Zeroizing<Vec<u32>>>,
    /// A bar a probe, padded with [`Bar::CLOSED`] like the probes.
    pub bars: Vec<Bar>,
    /// Parts taken off a row's cosine at the scan.
    pub parts_off: u32,
    /// The second look at what a scan of signs leaves, if there is one.
    pub look: Option<Look>,
    /// What to sift, at most [`RUNS_MAX`] runs, which do not overlap.
    pub runs: Vec<Run>,
}

/// What a batch left.
#[derive(Debug, Default)]
pub(in crate::engine::gpu) struct Report {
    /// The pairs that passed every look, in any order; too few of them if `stored` is more than the
    /// device has places.
    pub entries: Vec<Entry>,
    /// Pairs that the scan wanted to store.
    pub stored: u64,
    /// Whether some of them found no place.
    pub spilled: bool,
    /// For each probe, how many pairs reached the bar of the scan, stored or not.
    pub counts: Vec<u32>,
    /// Time the kernels took, where the adapter can tell.
    pub device_time: Option<Duration>,
}

/// Buffers of one batch, and the batch under way.
pub(super) struct Lane {
    slices: wgpu::Buffer,
    few: wgpu::Buffer,
    probes: wgpu::Buffer,
    bars: wgpu::Buffer,
    tally: wgpu::Buffer,
    entries: wgpu::Buffer,
    passed: wgpu::Buffer,
    staging: wgpu::Buffer,
    download: wgpu::Buffer,
    times: Option<(wgpu::QuerySet, wgpu::Buffer)>,
    bound: wgpu::BindGroup,
    flight: Option<Flight>,
}

/// A batch on the device.
struct Flight {
    index: wgpu::SubmissionIndex,
    failed: Arc<AtomicBool>,
    staged_bytes: usize,
    download_bytes: u64,
    probes: usize,
    looked: bool,
}

impl Lane {
    pub(super) fn new(device: &wgpu::Device, layout: &wgpu::BindGroupLayout, entries_max: u32, times: bool) -> Self {
        use wgpu::BufferUsages as Usage;
        let buffer = |label: &str, size: u64, usage: Usage| {
            device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false })
        };
        let entries_bytes = u64::from(entries_max) * ENTRY_BYTES;
        let slices = buffer("slices", RUNS_MAX as u64 * SLICE_STRIDE, Usage::UNIFORM | Usage::COPY_DST);
        let few = buffer("few", FEW_BYTES, Usage::UNIFORM | Usage::COPY_DST);
        let probes = buffer("probes", PROBES_BYTES, Usage::STORAGE | Usage::COPY_DST);
        let bars = buffer("bars", BARS_BYTES, Usage::STORAGE | Usage::COPY_DST);
        let tally = buffer("tally", TALLY_BYTES, Usage::STORAGE | Usage::COPY_DST | Usage::COPY_SRC);
        let entries = buffer("entries", entries_bytes, Usage::STORAGE | Usage::COPY_SRC);
        let passed = buffer("passed", entries_bytes, Usage::STORAGE | Usage::COPY_SRC);
        let bound = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("batch"),
            layout,
            entries: &[
                wgpu::BindGroupEntry {
                    binding: 0,
                    resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                        buffer: &slices,
                        offset: 0,
                        size: wgpu::BufferSize::new(size_of::<Slice>() as u64),
                    }),
                },
                wgpu::BindGroupEntry { binding: 1, resource: few.as_entire_binding() },
                wgpu::BindGroupEntry { binding: 2, resource: probes.as_entire_binding() },
                wgpu::BindGroupEntry { binding: 3, resource: bars.as_entire_binding() },
                wgpu::BindGroupEntry { binding: 4, resource: tally.as_entire_binding() },
                wgpu::BindGroupEntry { binding: 5, resource: entries.as_entire_binding() },
                wgpu::BindGroupEntry { binding: 6, resource: passed.as_entire_binding() },
            ],
        });
        let times = times.then(|| {
            let set = device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("times"),
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            });
            (set, buffer("times", TIMES_BYTES, Usage::QUERY_RESOLVE | Usage::COPY_SRC))
        });
        let staging = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("batch staging"),
            size: FEW_BYTES + PROBES_BYTES + BARS_BYTES + RUNS_MAX as u64 * SLICE_STRIDE,
            usage: Usage::MAP_WRITE | Usage::COPY_SRC,
            mapped_at_creation: true,
        });
        let download = buffer("download", ENTRIES_AT + entries_bytes, Usage::MAP_READ | Usage::COPY_DST);
        let flight = None;
        Self { slices, few, probes, bars, tally, entries, passed, staging, download, times, bound, flight }
    }

    pub(super) fn device_bytes(&self) -> u64 {
        let buffers = [&self.slices, &self.few, &self.probes, &self.bars, &self.tally, &self.entries, &self.passed];
        buffers.iter().map(|buffer| buffer.size()).sum()
    }

    pub(super) fn host_bytes(&self) -> u64 {
        self.staging.size() + self.download.size()
    }
}

impl Device {
    /// Whether another batch can be submitted before one is collected.
    pub(in crate::engine::gpu) fn has_room(&self) -> bool {
        self.flying.len() < self.lanes.len()
    }

    /// Begins one batch.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(in crate::engine::gpu) fn submit(&mut self, batch: &Batch) -> Result<(), EngineError> {
        let free = (0..self.lanes.len()).find(|lane| !self.flying.contains(lane));
        let number = free.expect("the caller collects first");
        let padded = batch.kernel.padded(batch.probes);
        assert!(batch.probes <= PROBES_MAX && batch.runs.len() <= RUNS_MAX && batch.bars.len() == padded);
        assert!(batch.dim.is_multiple_of(32));
        let is_few = matches!(batch.kernel, Kernel::Few { .. });
        let words = match batch.kernel {
            Kernel::Few { .. } | Kernel::Many => batch.level.quads(batch.dim) * batch.level.spreads() * 4,
            Kernel::Coop { .. } => batch.dim / 2,
        };
        assert_eq!(batch.packed.len(), padded * words);
        let scan_bytes: &[u8] = bytemuck::cast_slice(&batch.packed);
        let look_bytes: &[u8] = batch.look.as_ref().map_or(&[], |look| bytemuck::cast_slice(&look.packed));
        assert!(
            batch
                .look
                .as_ref()
                .is_none_or(|look| { look.bars.len() == batch.probes && look_bytes.len() == batch.probes * batch.dim })
        );
        let look_at = if is_few { 0 } else { scan_bytes.len() as u64 };

        let mut slices = vec![0_u8; batch.runs.len() * usize_of(SLICE_STRIDE)];
        for (run, place) in batch.runs.iter().zip(slices.chunks_exact_mut(usize_of(SLICE_STRIDE))) {
            let slab = &self.slabs[run.slab];
            assert!(run.slot_first.is_multiple_of(SLOT_STEP) && run.slot_end <= slab.slots && slab.dim == batch.dim);
            let small = |number: usize| u32::try_from(number).expect("a dimension is small");
            let slice = Slice {
                quads: small(batch.level.quads(batch.dim)),
                slot_first: run.slot_first,
                slot_end: run.slot_end,
                slot_base: run.slot_base,
                entries_max: self.entries_max,
                parts_off: batch.parts_off,
                look_parts_off: 0,
                look_at: u32::try_from(look_at / 16).expect("a batch is small"),
                fine_quads: small(Level::FourBit.quads(batch.dim)),
                sign_norm: (batch.dim as f32).sqrt(),
                ..Slice::zeroed()
            };
            place[..size_of::<Slice>()].copy_from_slice(bytemuck::bytes_of(&slice));
        }
        let bar_bytes: &[u8] = bytemuck::cast_slice(&batch.bars);
        let look_bar_bytes: &[u8] = batch.look.as_ref().map_or(&[], |look| bytemuck::cast_slice(&look.bars));

        let lane = &self.lanes[number];
        let pieces = [
            (scan_bytes, if is_few { &lane.few } else { &lane.probes }, 0),
            (look_bytes, &lane.probes, look_at),
            (bar_bytes, &lane.bars, 0),
            (look_bar_bytes, &lane.bars, PROBES_MAX as u64 * BAR_BYTES),
            (&slices, &lane.slices, 0),
        ];
        let staged_bytes = stage(&lane.staging, &pieces.map(|(bytes, ..)| bytes)).map_err(|words| self.lost(&words))?;
        let mut encoder = self.encoder();
        let mut from = 0;
        for (bytes, to, at) in pieces {
            let size = bytes.len() as u64;
            if size > 0 {
                encoder.copy_buffer_to_buffer(&lane.staging, from, to, at, size);
            }
            from += size;
        }
        encoder.clear_buffer(&lane.tally, 0, None);
        let looks = batch.look.is_some();
        let stamps = |begin: bool, end: bool| {
            lane.times.as_ref().map(|(set, _)| wgpu::ComputePassTimestampWrites {
                query_set: set,
                beginning_of_pass_write_index: begin.then_some(0),
                end_of_pass_write_index: end.then_some(1),
            })
        };
        {
            let timestamp_writes = stamps(true, !looks);
            let mut pass =
                encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("scan"), timestamp_writes });
            pass.set_pipeline(self.pipelines.scan(batch.kernel, batch.level));
            for (number, run) in (0_u32..).zip(&batch.runs) {
                let [x, y, z] = batch.kernel.workgroups(run.slot_end - run.slot_first, batch.probes);
                pass.set_bind_group(0, &self.slabs[run.slab].bound[batch.level.index()], &[]);
                pass.set_bind_group(1, &lane.bound, &[number * SLICE_STRIDE as u32]);
                pass.dispatch_workgroups(x, y, z);
            }
        }
        if looks {
            let timestamp_writes = stamps(false, true);
            let mut pass =
                encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("look"), timestamp_writes });
            pass.set_pipeline(self.pipelines.look());
            for (number, run) in (0_u32..).zip(&batch.runs) {
                pass.set_bind_group(0, &self.slabs[run.slab].bound[Level::FourBit.index()], &[]);
                pass.set_bind_group(1, &lane.bound, &[number * SLICE_STRIDE as u32]);
                pass.dispatch_workgroups(kernels::look_workgroups(), 1, 1);
            }
        }
        encoder.clear_buffer(&lane.few, 0, None);
        encoder.clear_buffer(&lane.probes, 0, Some(look_at + look_bytes.len() as u64).filter(|size| *size > 0));
        if let Some((set, resolved)) = &lane.times {
            encoder.resolve_query_set(set, 0..2, resolved, 0);
            encoder.copy_buffer_to_buffer(resolved, 0, &lane.download, 0, TIMES_BYTES);
        }
        encoder.copy_buffer_to_buffer(&lane.tally, 0, &lane.download, TIMES_BYTES, TALLY_BYTES);
        let first = u64::from(ENTRIES_FIRST.min(self.entries_max)) * ENTRY_BYTES;
        let list = if looks { &lane.passed } else { &lane.entries };
        encoder.copy_buffer_to_buffer(list, 0, &lane.download, ENTRIES_AT, first);
        let index = self.queue.submit([encoder.finish()]);
        let failed = Arc::new(AtomicBool::new(false));
        let download_bytes = ENTRIES_AT + first;
        lane.staging.map_async(wgpu::MapMode::Write, .., note(&failed));
        lane.download.map_async(wgpu::MapMode::Read, ..download_bytes, note(&failed));
        let flight = Flight { index, failed, staged_bytes, download_bytes, probes: batch.probes, looked: looks };
        self.lanes[number].flight = Some(flight);
        self.flying.push_back(number);
        self.check()
    }

    /// Waits for the batch that was submitted first of those under way.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(in crate::engine::gpu) fn collect(&mut self) -> Result<Report, EngineError> {
        let number = self.flying.pop_front().expect("a batch is under way");
        let flight = self.lanes[number].flight.take().expect("its lane has it");
        self.wait(flight.index, &flight.failed)?;
        let lane = &self.lanes[number];
        unstage(&lane.staging, flight.staged_bytes).map_err(|words| self.lost(&words))?;

        let period_ns = f64::from(self.queue.get_timestamp_period());
        let timed = lane.times.is_some();
        let (mut report, here, in_all) = self.downloaded(lane, flight.download_bytes, |bytes| {
            let times: &[u64] = bytemuck::cast_slice(&bytes[..usize_of(TIMES_BYTES)]);
            let ticks = times[1].saturating_sub(times[0]);
            let tally: &[u32] = bytemuck::cast_slice(&bytes[usize_of(TIMES_BYTES)..][..usize_of(TALLY_BYTES)]);
            let listed = if flight.looked { tally[1] } else { tally[0] }.min(self.entries_max);
            let here = listed.min(ENTRIES_FIRST);
            let list = &bytes[usize_of(ENTRIES_AT)..][..here as usize * size_of::<Entry>()];
            let report = Report {
                entries: bytemuck::cast_slice(list).to_vec(),
                stored: tally[0].into(),
                spilled: tally[0] > self.entries_max,
                counts: tally[2..2 + flight.probes].to_vec(),
                device_time: timed.then(|| Duration::from_secs_f64(ticks as f64 * period_ns * 1e-9)),
            };
            (report, here, listed)
        })?;
        // Of a batch that is done again only those at hand are of use.
        if in_all > here && !report.spilled {
            let rest = u64::from(in_all - here) * ENTRY_BYTES;
            let list = if flight.looked { &lane.passed } else { &lane.entries };
            let mut encoder = self.encoder();
            encoder.copy_buffer_to_buffer(list, u64::from(here) * ENTRY_BYTES, &lane.download, 0, rest);
            let index = self.queue.submit([encoder.finish()]);
            let failed = Arc::new(AtomicBool::new(false));
            lane.download.map_async(wgpu::MapMode::Read, ..rest, note(&failed));
            self.wait(index, &failed)?;
            let more = self.downloaded(lane, rest, |bytes| bytemuck::cast_slice::<u8, Entry>(bytes).to_vec())?;
            report.entries.extend(more);
        }
        Ok(report)
    }

    /// Reads from the mapped download buffer and unmaps it.
    fn downloaded<T>(&self, lane: &Lane, bytes: u64, read: impl FnOnce(&[u8]) -> T) -> Result<T, EngineError> {
        let view = lane.download.get_mapped_range(..bytes).map_err(|e| self.lost(&e.to_string()))?;
        let result = read(&view);
        drop(view);
        lane.download.unmap();
        Ok(result)
    }
}

fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a host buffer's size fits usize")
}
