//! One graphics device with its slabs of rows: uploads, clears, runs kernels, reads back.
//!
//! Sifting itself is in [`batch`]. A slab is a buffer of row slots and a buffer of their live bits. Knows slots and bytes; does
//! not know blocks, views, floors or threads. Everything here runs on the owner's thread.
//!
//! Invariants: template and probe bytes reach the device only through the one staging buffer,
//! which is overwritten with zeros after each use, and the probes buffer, which is cleared at the
//! end of each batch. After any [`EngineError::DeviceLost`] the device is to be dropped.

mod batch;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

pub(super) use self::batch::{Batch, RUNS_MAX, Report, Run};
use self::batch::{ENTRIES_AT, SLICE_STRIDE, TALLY_BYTES, TIMES_BYTES};
use super::adapter::{self, AdapterChoice, AdapterSummary};
use super::kernels::{self, Bar, Entry, PROBES_MAX, SLOT_STEP, Slice};
use super::selftest;
use crate::engine::EngineError;
use crate::palm::DIM_MAX;

/// Most bytes a slab's rows may take, whatever the adapter offers: `vec4<u32>` indices and byte
/// offsets stay far from 2^32.
const SLAB_BYTES_MAX: u64 = 2 << 30;
/// Shared memory asked for, where the adapter has as much.
const SHARED_BYTES_WANTED: u32 = 32 << 10;
/// Bytes of the upload buffer, so of the largest piece handed to [`Device::write_rows`].
pub(super) const STAGING_BYTES: usize = 16 << 20;
/// Products of a batch on a graphics processor, for about a second at most on a weak one: drivers
/// end what takes much longer.
const WORK_MAX: u64 = 1 << 40;
/// The same on a software adapter.
const WORK_MAX_SOFTWARE: u64 = 1 << 33;
/// How long a batch may take before the device counts as hung.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sizes that tests make small.
#[derive(Debug, Clone)]
pub(super) struct Sizes {
    /// Most bytes of rows in one slab.
    pub slab_bytes_max: u64,
    /// Places for survivors in one batch.
    pub entries_max: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { slab_bytes_max: SLAB_BYTES_MAX, entries_max: 1 << 20 }
    }
}

struct Slab {
    rows: wgpu::Buffer,
    live: wgpu::Buffer,
    bound: wgpu::BindGroup,
    slots: u32,
    dim: usize,
}

/// What went wrong behind wgpu's back.
#[derive(Default)]
struct Fault {
    raised: AtomicBool,
    words: Mutex<Option<String>>,
}

impl Fault {
    fn raise(&self, words: String) {
        self.words.lock().get_or_insert(words);
        self.raised.store(true, Ordering::Release);
    }
}

/// See the module's page.
pub(super) struct Device {
    device: wgpu::Device,
    queue: wgpu::Queue,
    fault: Arc<Fault>,
    description: String,
    layout: wgpu::BindGroupLayout,
    pipelines: Vec<wgpu::ComputePipeline>,
    slices: wgpu::Buffer,
    probes: wgpu::Buffer,
    bars: wgpu::Buffer,
    tally: wgpu::Buffer,
    entries: wgpu::Buffer,
    entries_max: u32,
    staging: wgpu::Buffer,
    download: wgpu::Buffer,
    times: Option<(wgpu::QuerySet, wgpu::Buffer)>,
    slab_bytes_max: u64,
    work_max: u64,
    slabs: Vec<Slab>,
    f16_subnormals_kept: bool,
}

impl Device {
    /// Opens the chosen adapter, compiles the kernels and holds them against known answers.
    ///
    /// # Errors
    /// [`EngineError::NoAdapter`] if there is none, it cannot be opened or it computes wrongly.
    pub(super) fn open(choice: &AdapterChoice, sizes: &Sizes) -> Result<Self, EngineError> {
        assert!(sizes.entries_max >= SLOT_STEP, "the smallest run must fit");
        let adapter = adapter::choose(choice)?;
        let info = adapter.get_info();
        let description = AdapterSummary::describe(&info);
        let offered = adapter.limits();
        let slab_bytes_max = sizes
            .slab_bytes_max
            .min(SLAB_BYTES_MAX)
            .min(offered.max_storage_buffer_binding_size)
            .min(offered.max_buffer_size);
        let defaults = wgpu::Limits::default();
        let required_limits = wgpu::Limits {
            max_storage_buffer_binding_size: slab_bytes_max.max(defaults.max_storage_buffer_binding_size),
            max_buffer_size: slab_bytes_max.max(defaults.max_buffer_size),
            max_compute_workgroup_storage_size: offered
                .max_compute_workgroup_storage_size
                .min(SHARED_BYTES_WANTED)
                .max(defaults.max_compute_workgroup_storage_size),
            ..defaults
        };
        let required_features = adapter.features() & wgpu::Features::TIMESTAMP_QUERY;
        let opened = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("thenar"),
            required_features,
            required_limits,
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..wgpu::DeviceDescriptor::default()
        }));
        let (device, queue) =
            opened.map_err(|e| EngineError::NoAdapter { reason: format!("{description} could not be opened: {e}") })?;

        let fault = Arc::new(Fault::default());
        let on_error = Arc::clone(&fault);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| on_error.raise(error.to_string())));
        let on_loss = Arc::clone(&fault);
        device.set_device_lost_callback(move |reason, words| {
            // wgpu also calls this when the last handle is dropped; nobody listens by then.
            on_loss.raise(format!("{reason:?}: {words}"));
        });

        let layout = kernels::bind_group_layout(&device);
        let pipelines = kernels::compile(&device, &layout);
        let buffer = |label: &str, size: u64, usage: wgpu::BufferUsages| {
            device.create_buffer(&wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false })
        };
        use wgpu::BufferUsages as Usage;
        let entries_bytes = u64::from(sizes.entries_max) * size_of::<Entry>() as u64;
        let times = required_features.contains(wgpu::Features::TIMESTAMP_QUERY).then(|| {
            let set = device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("times"),
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            });
            (set, buffer("times", TIMES_BYTES, Usage::QUERY_RESOLVE | Usage::COPY_SRC))
        });
        let mut opened = Self {
            slices: buffer("slices", RUNS_MAX as u64 * SLICE_STRIDE, Usage::UNIFORM | Usage::COPY_DST),
            probes: buffer("probes", (PROBES_MAX * DIM_MAX * 4) as u64, Usage::STORAGE | Usage::COPY_DST),
            bars: buffer("bars", (PROBES_MAX * size_of::<Bar>()) as u64, Usage::STORAGE | Usage::COPY_DST),
            tally: buffer("tally", TALLY_BYTES, Usage::STORAGE | Usage::COPY_DST | Usage::COPY_SRC),
            entries: buffer("entries", entries_bytes, Usage::STORAGE | Usage::COPY_SRC),
            entries_max: sizes.entries_max,
            staging: device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("staging"),
                size: STAGING_BYTES as u64,
                usage: Usage::MAP_WRITE | Usage::COPY_SRC,
                mapped_at_creation: true,
            }),
            download: buffer("download", ENTRIES_AT + entries_bytes, Usage::MAP_READ | Usage::COPY_DST),
            times,
            slab_bytes_max,
            work_max: if info.device_type == wgpu::DeviceType::Cpu { WORK_MAX_SOFTWARE } else { WORK_MAX },
            slabs: Vec::new(),
            f16_subnormals_kept: false,
            device,
            queue,
            fault,
            description,
            layout,
            pipelines,
        };
        let tested = opened.check().map_err(selftest::Fault::from).and_then(|()| selftest::run(&mut opened));
        opened.f16_subnormals_kept = tested.map_err(|fault| EngineError::NoAdapter {
            reason: format!("{} was refused: {fault}", opened.description),
        })?;
        Ok(opened)
    }

    /// Name, driver and backend of the adapter.
    pub(super) fn description(&self) -> &str {
        &self.description
    }

    /// Whether the adapter was seen to unpack f16 subnormals to their value.
    pub(super) fn f16_subnormals_kept(&self) -> bool {
        self.f16_subnormals_kept
    }

    /// Places for survivors in one batch.
    pub(super) fn entries_max(&self) -> u32 {
        self.entries_max
    }

    /// Most bytes of rows in a slab.
    pub(super) fn slab_bytes_max(&self) -> u64 {
        self.slab_bytes_max
    }

    /// Products, padding included, that one batch may ask for.
    pub(super) fn work_max(&self) -> u64 {
        self.work_max
    }

    /// Bytes in buffers on the device.
    pub(super) fn device_bytes(&self) -> u64 {
        let slabs: u64 = self.slabs.iter().map(|slab| slab.rows.size() + slab.live.size()).sum();
        let shared = [&self.slices, &self.probes, &self.bars, &self.tally, &self.entries];
        slabs + shared.iter().map(|buffer| buffer.size()).sum::<u64>()
    }

    /// Bytes in buffers in main memory.
    pub(super) fn host_bytes(&self) -> u64 {
        self.staging.size() + self.download.size()
    }

    /// Ends the device as a driver failure would.
    pub(super) fn destroy(&self) {
        self.device.destroy();
    }

    /// Zeroes and frees every slab.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(super) fn clear(&mut self) -> Result<(), EngineError> {
        let whole: Vec<_> = self.slabs.iter().enumerate().map(|(index, slab)| (index, 0..slab.slots)).collect();
        if !whole.is_empty() {
            self.zero_rows(&whole)?;
        }
        self.slabs.clear();
        Ok(())
    }

    /// Adds a slab of `slots` zeroed slots, none of them live. `slots`: a multiple of
    /// [`SLOT_STEP`], so few that the rows take at most [`Device::slab_bytes_max`].
    ///
    /// # Errors
    /// [`EngineError::OutOfDeviceMemory`] if it does not fit; the device stays usable.
    pub(super) fn add_slab(&mut self, slots: u32, dim: usize) -> Result<(), EngineError> {
        let row_bytes = u64::from(slots) * dim as u64 * 2;
        assert!(slots > 0 && slots.is_multiple_of(SLOT_STEP) && row_bytes <= self.slab_bytes_max);
        let live_bytes = u64::from(slots) / 8;
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let buffer = |label: &str, size: u64| {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            })
        };
        let rows = buffer("rows", row_bytes);
        let live = buffer("live", live_bytes);
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(EngineError::OutOfDeviceMemory {
                needed_bytes: row_bytes + live_bytes,
                reason: error.to_string(),
            });
        }
        let bound = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("slab"),
            layout: &self.layout,
            entries: &[
                wgpu::BindGroupEntry {
                    binding: 0,
                    resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                        buffer: &self.slices,
                        offset: 0,
                        size: wgpu::BufferSize::new(size_of::<Slice>() as u64),
                    }),
                },
                wgpu::BindGroupEntry { binding: 1, resource: rows.as_entire_binding() },
                wgpu::BindGroupEntry { binding: 2, resource: live.as_entire_binding() },
                wgpu::BindGroupEntry { binding: 3, resource: self.probes.as_entire_binding() },
                wgpu::BindGroupEntry { binding: 4, resource: self.bars.as_entire_binding() },
                wgpu::BindGroupEntry { binding: 5, resource: self.tally.as_entire_binding() },
                wgpu::BindGroupEntry { binding: 6, resource: self.entries.as_entire_binding() },
            ],
        });
        self.slabs.push(Slab { rows, live, bound, slots, dim });
        self.check()
    }

    /// Writes row bytes (`[count, dim]` f16) from slot `slot` of a slab on, and returns once the
    /// device has them. At most [`STAGING_BYTES`].
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(super) fn write_rows(&mut self, slab: usize, slot: u32, bytes: &[u8]) -> Result<(), EngineError> {
        let row_bytes = self.slabs[slab].dim * 2;
        assert!(bytes.len().is_multiple_of(row_bytes) && bytes.len() <= STAGING_BYTES);
        let offset = u64::from(slot) * row_bytes as u64;
        assert!(offset + bytes.len() as u64 <= self.slabs[slab].rows.size());
        self.stage(&[bytes])?;
        let mut encoder = self.encoder();
        let rows = &self.slabs[slab].rows;
        encoder.copy_buffer_to_buffer(&self.staging, 0, rows, offset, bytes.len() as u64);
        self.finish(encoder, bytes.len(), None)
    }

    /// Overwrites live words, each piece from a word of a slab on. Live bits are no secret, so
    /// they go through the queue and this does not wait.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(super) fn write_live(&mut self, pieces: &[LivePiece]) -> Result<(), EngineError> {
        for piece in pieces {
            let live = &self.slabs[piece.slab].live;
            self.queue.write_buffer(live, u64::from(piece.word) * 8, bytemuck::cast_slice(&piece.words));
        }
        self.check()
    }

    /// Zeroes runs of rows and returns once that is done.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(super) fn zero_rows(&mut self, runs: &[(usize, std::ops::Range<u32>)]) -> Result<(), EngineError> {
        let mut encoder = self.encoder();
        for (slab, slots) in runs {
            let slab = &self.slabs[*slab];
            let row_bytes = slab.dim as u64 * 2;
            let size = u64::from(slots.end - slots.start) * row_bytes;
            encoder.clear_buffer(&slab.rows, u64::from(slots.start) * row_bytes, Some(size));
        }
        self.stage(&[])?;
        self.finish(encoder, 0, None)
    }

    /// The bytes of `count` rows from slot `slot` on. For checks: slow.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(super) fn read_rows(&mut self, slab: usize, slot: u32, count: u32) -> Result<Vec<u8>, EngineError> {
        let row_bytes = self.slabs[slab].dim as u64 * 2;
        let size = u64::from(count) * row_bytes;
        assert!(size <= self.download.size());
        self.stage(&[])?;
        let mut encoder = self.encoder();
        let rows = &self.slabs[slab].rows;
        encoder.copy_buffer_to_buffer(rows, u64::from(slot) * row_bytes, &self.download, 0, size);
        self.finish(encoder, 0, Some(size))?;
        self.downloaded(0, size, <[u8]>::to_vec)
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None })
    }

    /// Copies the pieces one after the other into the staging buffer and hands it to the device.
    /// The number of bytes staged. [`Device::finish`] takes the buffer back.
    fn stage(&self, pieces: &[&[u8]]) -> Result<usize, EngineError> {
        let mut at = 0;
        if pieces.iter().any(|piece| !piece.is_empty()) {
            let mut view = self.staging.get_mapped_range_mut(..).map_err(|e| self.lost(&e.to_string()))?;
            for piece in pieces {
                view.slice(at..at + piece.len()).copy_from_slice(piece);
                at += piece.len();
            }
        }
        self.staging.unmap();
        Ok(at)
    }

    /// Submits, waits, maps the staging buffer again and zeroes what was staged; maps the first
    /// `download_bytes` of the download buffer for [`Device::downloaded`].
    fn finish(
        &self,
        encoder: wgpu::CommandEncoder,
        staged_bytes: usize,
        download_bytes: Option<u64>,
    ) -> Result<(), EngineError> {
        let index = self.queue.submit([encoder.finish()]);
        let failed = Arc::new(AtomicBool::new(false));
        let note = |failed: &Arc<AtomicBool>| {
            let failed = Arc::clone(failed);
            move |result: Result<(), wgpu::BufferAsyncError>| {
                if result.is_err() {
                    failed.store(true, Ordering::Release);
                }
            }
        };
        self.staging.map_async(wgpu::MapMode::Write, .., note(&failed));
        if let Some(bytes) = download_bytes {
            self.download.map_async(wgpu::MapMode::Read, ..bytes, note(&failed));
        }
        self.device
            .poll(wgpu::PollType::Wait { submission_index: Some(index), timeout: Some(PATIENCE) })
            .map_err(|e| self.lost(&e.to_string()))?;
        self.check()?;
        if failed.load(Ordering::Acquire) {
            return Err(self.lost("a buffer could not be mapped"));
        }
        if staged_bytes > 0 {
            let mut view = self.staging.get_mapped_range_mut(..).map_err(|e| self.lost(&e.to_string()))?;
            view.slice(..staged_bytes).fill(0);
        }
        Ok(())
    }

    /// Reads from the mapped download buffer and unmaps it.
    fn downloaded<T>(&self, from: u64, to: u64, read: impl FnOnce(&[u8]) -> T) -> Result<T, EngineError> {
        let view = self.download.get_mapped_range(from..to).map_err(|e| self.lost(&e.to_string()))?;
        let result = read(&view);
        drop(view);
        self.download.unmap();
        Ok(result)
    }

    /// Whether wgpu reported anything since the device was opened.
    fn check(&self) -> Result<(), EngineError> {
        if self.fault.raised.load(Ordering::Acquire) {
            return Err(self.lost("no reason given"));
        }
        Ok(())
    }

    fn lost(&self, words: &str) -> EngineError {
        let noted = self.fault.words.lock().clone();
        EngineError::DeviceLost { reason: noted.unwrap_or_else(|| words.to_owned()) }
    }
}

/// Live words to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LivePiece {
    /// Index of the slab.
    pub slab: usize,
    /// First 64-bit word of the slab's live bits.
    pub word: u32,
    /// The words.
    pub words: Vec<u64>,
}
