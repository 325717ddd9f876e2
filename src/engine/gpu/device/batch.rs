//! One batch of probes on the device: upload, scan, refine, read back.
//!
//! A [`Lane`] has the buffers of one batch, so that as many batches as there are lanes can be in flight.
//! [`Device::submit`] begins one, [`InFlight::collect`] waits for it. Knows the layout of the slices, tally
//! and download buffers. Does not know floors or segments.

use std::sync::Arc;
use std::time::Duration;

use bytemuck::Zeroable;
use zeroize::Zeroizing;

use super::Device;
use super::bindings::{DeviceBound, Entry, PROBES_MAX, Slice};
use super::connection::{Connection, Submission};
use super::kernels::{self, BOUND_BYTES, ENTRY_BYTES, FEW_BYTES, Kernel, SLOT_STEP};
use super::layout::Level;
use crate::engine::EngineError;
use crate::model::DIM_MAX;

/// Runs of slots in one batch, so slabs of a device.
pub(crate) const RUNS_MAX: usize = 256;
/// Distance of two [`Slice`]s in their buffer: the largest uniform alignment that WebGPU allows.
const SLICE_STRIDE: u64 = 256;
/// Entries that come back with the counts, without a second round trip.
const ENTRIES_FIRST: u32 = 8192;
/// Bytes of the two timestamps before the tally in the download buffer.
const TIMES_BYTES: u64 = 16;
/// Bytes of the tally: two counters and a count per probe.
const TALLY_BYTES: u64 = 8 + 4 * PROBES_MAX as u64;
/// Where the entries begin in the download buffer.
const ENTRIES_AT: u64 = (TIMES_BYTES + TALLY_BYTES).next_multiple_of(16);
/// Bytes of the largest batch of probes: f16 for the scan, bytes for the refinement.
const PROBES_BYTES: u64 = (PROBES_MAX * DIM_MAX * 3) as u64;
/// Bytes of the bounds of scan and refinement.
const BOUNDS_BYTES: u64 = 2 * PROBES_MAX as u64 * BOUND_BYTES;

/// Slots of one slab to scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Index of the slab.
    pub(crate) slab: usize,
    /// First slot, a multiple of [`SLOT_STEP`].
    pub(crate) slot_first: u32,
    /// One past the last slot.
    pub(crate) slot_end: u32,
    /// Number of the slab's slot 0 among all slots.
    pub(crate) slot_base: u32,
}

/// What the refinement of a scan's pairs by their 4-bit codes needs.
#[derive(Clone)]
pub(crate) struct Refinement {
    /// The probes as [`super::layout::pack_rows`] lays them out.
    pub(crate) packed: Arc<Zeroizing<Vec<u32>>>,
    /// One bound per probe.
    pub(crate) bounds: Vec<DeviceBound>,
}

/// One batch of probes against some runs of slots.
#[derive(Clone)]
pub(crate) struct Batch {
    /// Components of a row.
    pub(crate) dim: usize,
    /// Which kernel scans.
    pub(crate) kernel: Kernel,
    /// Which code it scans.
    pub(crate) level: Level,
    /// Probes in the batch, at most [`PROBES_MAX`].
    pub(crate) probes: usize,
    /// The probes as [`super::layout::pack`] lays them out.
    pub(crate) packed: Arc<Zeroizing<Vec<u32>>>,
    /// One bound per probe.
    pub(crate) bounds: Vec<DeviceBound>,
    /// Parts that the scan takes off a row's cosine.
    pub(crate) loss_parts: u32,
    /// How the pairs of a scan of 1-bit codes are refined, if they are.
    pub(crate) refinement: Option<Refinement>,
    /// What to scan, at most [`RUNS_MAX`] runs, which do not overlap.
    pub(crate) runs: Vec<Run>,
}

/// What a batch found.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// The pairs that reached every bound, in any order; incomplete if `overflowed`.
    pub(crate) entries: Vec<Entry>,
    /// Pairs that the scan had to store.
    pub(crate) stored: u64,
    /// Whether there were more of them than places.
    pub(crate) overflowed: bool,
    /// For each probe, how many pairs reached the bound of the scan, stored or not.
    pub(crate) counts: Vec<u32>,
    /// Time the kernels took, if the adapter can tell.
    pub(crate) device_time: Option<Duration>,
}

/// Buffers of one batch.
pub(crate) struct Lane {
    slices: wgpu::Buffer,
    few: wgpu::Buffer,
    probes: wgpu::Buffer,
    bounds: wgpu::Buffer,
    tally: wgpu::Buffer,
    entries: wgpu::Buffer,
    refined: wgpu::Buffer,
    staging: wgpu::Buffer,
    download: wgpu::Buffer,
    times: Option<(wgpu::QuerySet, wgpu::Buffer)>,
    bind_group: wgpu::BindGroup,
}

impl Lane {
    pub(super) fn new(connection: &Connection, layout: &wgpu::BindGroupLayout, entries_max: u32) -> Self {
        use wgpu::BufferUsages as Usage;
        let device = &connection.device;
        let buffer = |label: &str, size: u64, usage: Usage| connection.buffer(label, size, usage);
        let entries_bytes = u64::from(entries_max) * ENTRY_BYTES;
        let slices = buffer("slices", RUNS_MAX as u64 * SLICE_STRIDE, Usage::UNIFORM | Usage::COPY_DST);
        let few = buffer("few", FEW_BYTES, Usage::UNIFORM | Usage::COPY_DST);
        let probes = buffer("probes", PROBES_BYTES, Usage::STORAGE | Usage::COPY_DST);
        let bounds = buffer("bounds", BOUNDS_BYTES, Usage::STORAGE | Usage::COPY_DST);
        let tally = buffer("tally", TALLY_BYTES, Usage::STORAGE | Usage::COPY_DST | Usage::COPY_SRC);
        let entries = buffer("entries", entries_bytes, Usage::STORAGE | Usage::COPY_SRC);
        let refined = buffer("refined", entries_bytes, Usage::STORAGE | Usage::COPY_SRC);
        let whole = |binding: u32, buffer| wgpu::BindGroupEntry { binding, resource: buffer };
        let one_slice = wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &slices,
            offset: 0,
            size: wgpu::BufferSize::new(size_of::<Slice>() as u64),
        });
        let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("batch"),
            layout,
            entries: &[
                whole(0, one_slice),
                whole(1, few.as_entire_binding()),
                whole(2, probes.as_entire_binding()),
                whole(3, bounds.as_entire_binding()),
                whole(4, tally.as_entire_binding()),
                whole(5, entries.as_entire_binding()),
                whole(6, refined.as_entire_binding()),
            ],
        });
        let times = device.features().contains(wgpu::Features::TIMESTAMP_QUERY).then(|| {
            let ty = wgpu::QueryType::Timestamp;
            let set = device.create_query_set(&wgpu::QuerySetDescriptor { label: Some("times"), ty, count: 2 });
            (set, buffer("times", TIMES_BYTES, Usage::QUERY_RESOLVE | Usage::COPY_SRC))
        });
        let staging_bytes = FEW_BYTES + PROBES_BYTES + BOUNDS_BYTES + RUNS_MAX as u64 * SLICE_STRIDE;
        let staging = connection.staging_buffer("batch staging", staging_bytes);
        let download = buffer("download", ENTRIES_AT + entries_bytes, Usage::MAP_READ | Usage::COPY_DST);
        Self { slices, few, probes, bounds, tally, entries, refined, staging, download, times, bind_group }
    }

    /// Bytes on the device and in main memory.
    pub(super) fn bytes(&self) -> (u64, u64) {
        let on_device =
            [&self.slices, &self.few, &self.probes, &self.bounds, &self.tally, &self.entries, &self.refined];
        let on_host = self.staging.size() + self.download.size();
        (on_device.iter().map(|buffer| buffer.size()).sum(), on_host)
    }

    /// The timestamps that a pass writes.
    fn timestamps(&self, at_begin: bool, at_end: bool) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        self.times.as_ref().map(|(query_set, _)| wgpu::ComputePassTimestampWrites {
            query_set,
            beginning_of_pass_write_index: at_begin.then_some(0),
            end_of_pass_write_index: at_end.then_some(1),
        })
    }
}

/// A batch on the device, with its lane.
pub(crate) struct InFlight {
    lane: Lane,
    connection: Connection,
    submission: Submission,
    staged_bytes: usize,
    /// Entries that come back with the counts.
    entries_first: u32,
    entries_max: u32,
    probes: usize,
    refines: bool,
}

impl Device {
    /// Whether a batch can be submitted.
    pub(crate) fn has_idle_lane(&self) -> bool {
        !self.idle_lanes.is_empty()
    }

    /// Takes back the lane of a batch that was collected.
    pub(crate) fn return_lane(&mut self, lane: Lane) {
        self.idle_lanes.push(lane);
    }

    /// Begins a batch in an idle lane.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    ///
    /// # Panics
    /// If no lane is idle, or the batch contradicts itself or the slabs.
    pub(crate) fn submit(&mut self, batch: &Batch) -> Result<InFlight, EngineError> {
        let scan_bytes: &[u8] = bytemuck::cast_slice(&batch.packed);
        let is_few = matches!(batch.kernel, Kernel::Few { .. });
        let refine_at = if is_few { 0 } else { scan_bytes.len() as u64 };
        let slices = self.slices(batch, refine_at);
        let mut bounds = batch.bounds.clone();
        bounds.resize(batch.kernel.padded(batch.probes), DeviceBound::CLOSED);
        let (refine_bytes, refine_bounds): (&[u8], &[u8]) = match &batch.refinement {
            Some(refinement) => (bytemuck::cast_slice(&refinement.packed), bytemuck::cast_slice(&refinement.bounds)),
            None => (&[], &[]),
        };

        let lane = self.idle_lanes.pop().expect("the caller waits for an idle lane");
        let connection = &self.connection;
        let pieces = [
            (scan_bytes, if is_few { &lane.few } else { &lane.probes }, 0),
            (refine_bytes, &lane.probes, refine_at),
            (bytemuck::cast_slice(&bounds), &lane.bounds, 0),
            (refine_bounds, &lane.bounds, PROBES_MAX as u64 * BOUND_BYTES),
            (&slices, &lane.slices, 0),
        ];
        let staged_bytes = connection.stage(&lane.staging, &pieces.map(|(bytes, ..)| bytes))?;
        let mut encoder = connection.encoder();
        let mut from = 0;
        for (bytes, to, at) in pieces {
            let size = bytes.len() as u64;
            if size > 0 {
                encoder.copy_buffer_to_buffer(&lane.staging, from, to, at, size);
            }
            from += size;
        }
        encoder.clear_buffer(&lane.tally, 0, None);
        let refines = batch.refinement.is_some();
        self.encode_passes(&mut encoder, batch, &lane);
        encoder.clear_buffer(&lane.few, 0, None);
        encoder.clear_buffer(&lane.probes, 0, Some(refine_at + refine_bytes.len() as u64).filter(|size| *size > 0));
        if let Some((set, resolved)) = &lane.times {
            encoder.resolve_query_set(set, 0..2, resolved, 0);
            encoder.copy_buffer_to_buffer(resolved, 0, &lane.download, 0, TIMES_BYTES);
        }
        encoder.copy_buffer_to_buffer(&lane.tally, 0, &lane.download, TIMES_BYTES, TALLY_BYTES);
        let entries_first = ENTRIES_FIRST.min(self.info.entries_max);
        let list = if refines { &lane.refined } else { &lane.entries };
        let list_bytes = u64::from(entries_first) * ENTRY_BYTES;
        encoder.copy_buffer_to_buffer(list, 0, &lane.download, ENTRIES_AT, list_bytes);
        let submission = connection.submit(
            encoder,
            &[
                (&lane.staging, wgpu::MapMode::Write, lane.staging.size()),
                (&lane.download, wgpu::MapMode::Read, ENTRIES_AT + list_bytes),
            ],
        );
        connection.check()?;
        let (connection, entries_max) = (connection.clone(), self.info.entries_max);
        let probes = batch.probes;
        Ok(InFlight { lane, connection, submission, staged_bytes, entries_first, entries_max, probes, refines })
    }

    /// The slices of a batch as their buffer has them, after a check of all that kernels take for granted.
    fn slices(&self, batch: &Batch, refine_at: u64) -> Vec<u8> {
        let Batch { dim, kernel, level, probes, packed, bounds, runs, .. } = batch;
        let words_per_probe = match kernel {
            Kernel::Few { .. } | Kernel::Many => level.quads(*dim) * level.spreads() * 4,
            Kernel::Coop => dim / 2,
        };
        assert!(dim.is_multiple_of(32) && *probes <= PROBES_MAX && runs.len() <= RUNS_MAX);
        assert_eq!((packed.len(), bounds.len()), (kernel.padded(*probes) * words_per_probe, *probes));
        if let Some(Refinement { packed, bounds }) = &batch.refinement {
            assert_eq!((packed.len(), bounds.len()), (probes * dim / 4, *probes));
        }
        let stride = usize_of(SLICE_STRIDE);
        let mut slices = vec![0_u8; runs.len() * stride];
        for (run, place) in runs.iter().zip(slices.chunks_exact_mut(stride)) {
            let slab = &self.slabs[run.slab];
            assert!(run.slot_first.is_multiple_of(SLOT_STEP) && run.slot_end <= slab.slots && slab.dim == *dim);
            let small = |number: usize| u32::try_from(number).expect("a dimension is small");
            let slice = Slice {
                quads: small(level.quads(*dim)),
                slot_first: run.slot_first,
                slot_end: run.slot_end,
                slot_base: run.slot_base,
                entries_max: self.info.entries_max,
                loss_parts: batch.loss_parts,
                refine_at: u32::try_from(refine_at / 16).expect("a batch is small"),
                four_bit_quads: small(Level::FourBit.quads(*dim)),
                one_bit_norm: (*dim as f32).sqrt(),
                ..Slice::zeroed()
            };
            place[..size_of::<Slice>()].copy_from_slice(bytemuck::bytes_of(&slice));
        }
        slices
    }

    fn encode_passes(&self, encoder: &mut wgpu::CommandEncoder, batch: &Batch, lane: &Lane) {
        let refines = batch.refinement.is_some();
        let scan =
            wgpu::ComputePassDescriptor { label: Some("scan"), timestamp_writes: lane.timestamps(true, !refines) };
        let mut pass = encoder.begin_compute_pass(&scan);
        pass.set_pipeline(self.pipelines.scan(batch.kernel, batch.level));
        for (number, run) in (0_u32..).zip(&batch.runs) {
            let [x, y, z] = batch.kernel.workgroups(run.slot_end - run.slot_first, batch.probes);
            pass.set_bind_group(0, self.slabs[run.slab].bind_group(batch.level), &[]);
            pass.set_bind_group(1, &lane.bind_group, &[number * SLICE_STRIDE as u32]);
            pass.dispatch_workgroups(x, y, z);
        }
        drop(pass);
        if !refines {
            return;
        }
        let refine =
            wgpu::ComputePassDescriptor { label: Some("refine"), timestamp_writes: lane.timestamps(false, true) };
        let mut pass = encoder.begin_compute_pass(&refine);
        pass.set_pipeline(self.pipelines.refine());
        for (number, run) in (0_u32..).zip(&batch.runs) {
            pass.set_bind_group(0, self.slabs[run.slab].bind_group(Level::FourBit), &[]);
            pass.set_bind_group(1, &lane.bind_group, &[number * SLICE_STRIDE as u32]);
            pass.dispatch_workgroups(kernels::REFINE_GROUPS, 1, 1);
        }
    }
}

impl InFlight {
    /// Waits for the batch. What it found, and its lane for another batch.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(crate) fn collect(self) -> Result<(Report, Lane), EngineError> {
        let Self { lane, connection, submission, staged_bytes, entries_first, entries_max, probes, refines } = self;
        connection.wait(submission)?;
        connection.unstage(&lane.staging, staged_bytes)?;

        let period_ns = f64::from(connection.queue.get_timestamp_period());
        let first_bytes = ENTRIES_AT + u64::from(entries_first) * ENTRY_BYTES;
        let (mut report, here, listed) = connection.read(&lane.download, first_bytes, |bytes| {
            let times: &[u64] = bytemuck::cast_slice(&bytes[..usize_of(TIMES_BYTES)]);
            let ticks = times[1].saturating_sub(times[0]);
            let device_time = Duration::from_secs_f64(ticks as f64 * period_ns * 1e-9);
            let tally: &[u32] = bytemuck::cast_slice(&bytes[usize_of(TIMES_BYTES)..][..usize_of(TALLY_BYTES)]);
            let listed = if refines { tally[1] } else { tally[0] }.min(entries_max);
            let here = listed.min(entries_first);
            let list = &bytes[usize_of(ENTRIES_AT)..][..here as usize * size_of::<Entry>()];
            let report = Report {
                entries: bytemuck::cast_slice(list).to_vec(),
                stored: tally[0].into(),
                overflowed: tally[0] > entries_max,
                counts: tally[2..2 + probes].to_vec(),
                device_time: lane.times.is_some().then_some(device_time),
            };
            (report, here, listed)
        })?;
        // Of a batch that is scanned again only those at hand are of use.
        if listed > here && !report.overflowed {
            let rest_bytes = u64::from(listed - here) * ENTRY_BYTES;
            let list = if refines { &lane.refined } else { &lane.entries };
            let mut encoder = connection.encoder();
            encoder.copy_buffer_to_buffer(list, u64::from(here) * ENTRY_BYTES, &lane.download, 0, rest_bytes);
            connection.wait(connection.submit(encoder, &[(&lane.download, wgpu::MapMode::Read, rest_bytes)]))?;
            let rest = connection
                .read(&lane.download, rest_bytes, |bytes| bytemuck::cast_slice::<u8, Entry>(bytes).to_vec())?;
            report.entries.extend(rest);
        }
        Ok((report, lane))
    }
}

fn usize_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a host buffer's size fits usize")
}
