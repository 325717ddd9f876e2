//! One graphics device with its slabs of codes: uploads, clears, runs kernels, reads back.
//!
//! Scanning itself is in [`batch`]. A slab is the codes of row slots, their factors and their live bits.
//! Knows slots and bytes; does not know blocks, views, floors or threads. Everything here runs on the
//! owner's thread.
//!
//! Invariants: code and probe bytes reach the device only through staging buffers, which are
//! overwritten with zeros after each use, and the probe buffers, which are cleared at the end of each
//! batch. After any [`EngineError::DeviceLost`] the device is to be dropped.

mod batch;

use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use thenar_index::codes::BLOCK_ROWS;

use self::batch::Lane;
pub(super) use self::batch::{Batch, Look, RUNS_MAX, Report, Run};
use super::adapter::{self, AdapterChoice, AdapterSummary};
use super::cache::KernelCache;
use super::card::{self, CardCodes, TERMS_BYTES};
use super::kernels::{self, Kernel, Pipelines, SLOT_STEP, Side};
use super::level::Level;
use super::selftest;
use crate::engine::EngineError;
use crate::model::DIM_MAX;

/// Most bytes a buffer of a slab may take, whatever the adapter offers: `vec4<u32>` indices and byte
/// offsets stay far from 2^32.
const BUFFER_BYTES_MAX: u64 = 2 << 30;
/// Bytes of the upload buffer, so of the largest piece handed to [`Device::write_codes`].
pub(super) const STAGING_BYTES: usize = 16 << 20;
/// Products of a batch on a graphics processor, for about a second at most on a weak one: drivers
/// end what takes much longer.
const WORK_MAX: u64 = 1 << 40;
/// The same on a software adapter.
const WORK_MAX_SOFTWARE: u64 = 1 << 33;
/// How long a batch may take before the device counts as hung.
const PATIENCE: Duration = Duration::from_secs(60);
/// Batches that may be on the device at once: while one is read, the next is computed.
pub(super) const LANES: usize = 2;

/// Sizes that tests make small, and where compiled kernels are kept.
#[derive(Debug, Clone)]
pub(super) struct Sizes {
    /// Most bytes of one buffer of a slab.
    pub buffer_bytes_max: u64,
    /// Places for candidates in one batch.
    pub entries_max: u32,
    /// Folder of compiled kernels.
    pub cache: Option<PathBuf>,
    /// Whether cooperative matrices may be used.
    pub matrices: bool,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { buffer_bytes_max: BUFFER_BYTES_MAX, entries_max: 1 << 20, cache: None, matrices: true }
    }
}

struct Slab {
    /// Of signs and of fine codes.
    codes: [wgpu::Buffer; 2],
    factors: wgpu::Buffer,
    live: wgpu::Buffer,
    /// For each level.
    bound: [wgpu::BindGroup; 2],
    slots: u32,
    dim: usize,
}

impl Slab {
    fn bytes(&self) -> u64 {
        self.codes[0].size() + self.codes[1].size() + self.factors.size() + self.live.size()
    }

    /// Where the bytes of some slots of one block lie: buffers, offsets, lengths. In a whole block
    /// they are one stretch a buffer, else one a quad.
    fn stretches(&self, slots: &Range<u32>) -> Vec<(&wgpu::Buffer, u64, u64)> {
        let block = u64::from(slots.start) / BLOCK_ROWS as u64;
        let (first, count) = (u64::from(slots.start) % BLOCK_ROWS as u64, u64::from(slots.end - slots.start));
        assert!(first + count <= BLOCK_ROWS as u64, "slots of one block");
        let mut stretches = Vec::new();
        for level in Level::ALL {
            let quads = level.quads(self.dim) as u64;
            let quad_bytes = BLOCK_ROWS as u64 * 16;
            let buffer = &self.codes[level.index()];
            if count == BLOCK_ROWS as u64 {
                stretches.push((buffer, block * quads * quad_bytes, quads * quad_bytes));
            } else {
                let at = |quad| (block * quads + quad) * quad_bytes + first * 16;
                stretches.extend((0..quads).map(|quad| (buffer, at(quad), count * 16)));
            }
        }
        stretches.push((&self.factors, u64::from(slots.start) * TERMS_BYTES as u64, count * TERMS_BYTES as u64));
        stretches
    }
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
    slab_layout: wgpu::BindGroupLayout,
    pipelines: Pipelines,
    /// The adapter's cooperative matrices, if they are used.
    coop: Option<Side>,
    entries_max: u32,
    lanes: Vec<Lane>,
    /// Lanes with a batch on the device, the oldest first.
    flying: VecDeque<usize>,
    staging: wgpu::Buffer,
    /// For reading codes back, of one block.
    readback: wgpu::Buffer,
    buffer_bytes_max: u64,
    work_max: u64,
    slabs: Vec<Slab>,
}

impl Device {
    /// Opens the chosen adapter, compiles the kernels and holds them against known answers. What
    /// cannot do cooperative matrices rightly is opened without them.
    ///
    /// # Errors
    /// [`EngineError::NoAdapter`] if there is none, it cannot be opened or it computes wrongly.
    pub(super) fn open(choice: &AdapterChoice, sizes: &Sizes) -> Result<Self, EngineError> {
        let adapter = adapter::choose(choice)?;
        if sizes.matrices
            && let Some(side) = adapter::matrices(&adapter)
        {
            match Self::open_with(&adapter, sizes, Some(side)) {
                Ok(device) => return Ok(device),
                Err(error) => tracing::warn!(%error, "cooperative matrices are left alone"),
            }
            return Self::open_with(&adapter::choose(choice)?, sizes, None);
        }
        Self::open_with(&adapter, sizes, None)
    }

    fn open_with(adapter: &wgpu::Adapter, sizes: &Sizes, coop: Option<Side>) -> Result<Self, EngineError> {
        assert!(sizes.entries_max >= SLOT_STEP, "the smallest run must fit");
        let info = adapter.get_info();
        let description = AdapterSummary::describe(&info);
        let offered = adapter.limits();
        let buffer_bytes_max = sizes
            .buffer_bytes_max
            .min(BUFFER_BYTES_MAX)
            .min(offered.max_storage_buffer_binding_size)
            .min(offered.max_buffer_size);
        let defaults = wgpu::Limits::default();
        let required_limits = wgpu::Limits {
            max_storage_buffer_binding_size: buffer_bytes_max.max(defaults.max_storage_buffer_binding_size),
            max_buffer_size: buffer_bytes_max.max(defaults.max_buffer_size),
            max_compute_workgroup_storage_size: match coop {
                Some(_) => adapter::MATRIX_SHARED_BYTES,
                None => defaults.max_compute_workgroup_storage_size,
            },
            ..defaults
        };
        let mut required_features =
            adapter.features() & (wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::PIPELINE_CACHE);
        if coop.is_some() {
            required_features |= adapter::MATRIX_FEATURES;
        }
        let opened = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("thenar"),
            required_features,
            required_limits,
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            experimental_features: match coop {
                // SAFETY: of what is experimental, only cooperative matrices are used, in one kernel, by
                // the rules of its page, and the device serves only after the start-up test.
                Some(_) => unsafe { wgpu::ExperimentalFeatures::enabled() },
                None => wgpu::ExperimentalFeatures::disabled(),
            },
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

        let slab_layout = kernels::slab_layout(&device);
        let batch_layout = kernels::batch_layout(&device);
        let cache = KernelCache::open(&device, &info, sizes.cache.as_deref());
        let pipelines = Pipelines::compile(&device, [&slab_layout, &batch_layout], coop, cache.pipelines());
        let times = required_features.contains(wgpu::Features::TIMESTAMP_QUERY);
        // The start-up test needs its places, even where a test of the engine wants it to have few.
        let places = sizes.entries_max.max(selftest::ENTRIES);
        let mut opened = Self {
            lanes: (0..LANES).map(|_| Lane::new(&device, &batch_layout, places, times)).collect(),
            flying: VecDeque::new(),
            entries_max: places,
            staging: device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("staging"),
                size: STAGING_BYTES as u64,
                usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: true,
            }),
            readback: device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("readback"),
                size: (card::row_bytes(DIM_MAX) * BLOCK_ROWS) as u64,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            }),
            buffer_bytes_max,
            work_max: if info.device_type == wgpu::DeviceType::Cpu { WORK_MAX_SOFTWARE } else { WORK_MAX },
            slabs: Vec::new(),
            device,
            queue,
            fault,
            description,
            slab_layout,
            pipelines,
            coop,
        };
        opened.check()?;
        if let Err(fault) = selftest::run(&mut opened) {
            let reason = format!("{} was refused: {fault}", opened.description);
            return Err(EngineError::NoAdapter { reason });
        }
        opened.entries_max = sizes.entries_max;
        cache.save();
        Ok(opened)
    }

    /// The kernels that were compiled.
    pub(super) fn kernels(&self) -> Vec<(Kernel, Level)> {
        self.pipelines.kernels()
    }

    /// Name, driver and backend of the adapter.
    pub(super) fn description(&self) -> &str {
        &self.description
    }

    /// The adapter's cooperative matrices, if they are used.
    pub(super) fn coop(&self) -> Option<Side> {
        self.coop
    }

    /// Places for candidates in one batch.
    pub(super) fn entries_max(&self) -> u32 {
        self.entries_max
    }

    /// Most bytes of one buffer of a slab.
    pub(super) fn buffer_bytes_max(&self) -> u64 {
        self.buffer_bytes_max
    }

    /// Products, padding included, that one batch may ask for.
    pub(super) fn work_max(&self) -> u64 {
        self.work_max
    }

    /// Bytes in buffers on the device.
    pub(super) fn device_bytes(&self) -> u64 {
        self.slabs.iter().map(Slab::bytes).sum::<u64>() + self.lanes.iter().map(Lane::device_bytes).sum::<u64>()
    }

    /// Bytes in buffers in main memory.
    pub(super) fn host_bytes(&self) -> u64 {
        self.staging.size() + self.readback.size() + self.lanes.iter().map(Lane::host_bytes).sum::<u64>()
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
    /// [`SLOT_STEP`], so few that no buffer takes more than [`Device::buffer_bytes_max`].
    ///
    /// # Errors
    /// [`EngineError::OutOfDeviceMemory`] if it does not fit; the device stays usable.
    pub(super) fn add_slab(&mut self, slots: u32, dim: usize) -> Result<(), EngineError> {
        let slots_bytes = |row_bytes: usize| u64::from(slots) * row_bytes as u64;
        assert!(slots > 0 && slots.is_multiple_of(SLOT_STEP) && dim.is_multiple_of(32) && dim <= DIM_MAX);
        assert!(slots_bytes(Level::FourBit.row_bytes(dim)) <= self.device.limits().max_storage_buffer_binding_size);
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let buffer = |label: &str, size: u64| {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            })
        };
        let codes = Level::ALL.map(|level| buffer("codes", slots_bytes(level.row_bytes(dim))));
        let factors = buffer("factors", slots_bytes(TERMS_BYTES));
        let live = buffer("live", u64::from(slots) / 8);
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(EngineError::OutOfDeviceMemory {
                needed_bytes: slots_bytes(card::row_bytes(dim)) + u64::from(slots) / 8,
                reason: error.to_string(),
            });
        }
        let bound = Level::ALL.map(|level| {
            self.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("slab"),
                layout: &self.slab_layout,
                entries: &[
                    wgpu::BindGroupEntry { binding: 0, resource: codes[level.index()].as_entire_binding() },
                    wgpu::BindGroupEntry { binding: 1, resource: factors.as_entire_binding() },
                    wgpu::BindGroupEntry { binding: 2, resource: live.as_entire_binding() },
                ],
            })
        });
        self.slabs.push(Slab { codes, factors, live, bound, slots, dim });
        self.check()
    }

    /// Writes codes of whole blocks from slot `slot` of a slab on, and returns once the device has
    /// them. At most [`STAGING_BYTES`].
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(super) fn write_codes(&mut self, slab: usize, slot: u32, codes: &CardCodes) -> Result<(), EngineError> {
        let place = &self.slabs[slab];
        let count = codes.factors.len();
        assert!(count.is_multiple_of(BLOCK_ROWS) && slot.is_multiple_of(BLOCK_ROWS as u32));
        assert!(count <= (place.slots - slot) as usize && count * card::row_bytes(place.dim) <= STAGING_BYTES);
        let pieces: [&[u8]; 3] = [
            bytemuck::cast_slice(&codes.one_bit),
            bytemuck::cast_slice(&codes.four_bit),
            bytemuck::cast_slice(&codes.factors),
        ];
        let staged = stage(&self.staging, &pieces).map_err(|words| self.lost(&words))?;
        let mut encoder = self.encoder();
        let mut from = 0;
        for (piece, to) in pieces.iter().zip([&place.codes[0], &place.codes[1], &place.factors]) {
            let (size, each) = (piece.len() as u64, piece.len() as u64 / count.max(1) as u64);
            encoder.copy_buffer_to_buffer(&self.staging, from, to, u64::from(slot) * each, size);
            from += size;
        }
        self.finish(encoder, staged)
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

    /// Zeroes codes and factors of runs of slots and returns once that is done.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(super) fn zero_rows(&mut self, runs: &[(usize, Range<u32>)]) -> Result<(), EngineError> {
        const BLOCK: u32 = BLOCK_ROWS as u32;
        let mut encoder = self.encoder();
        for (slab, slots) in runs {
            let slab = &self.slabs[*slab];
            if *slots == (0..slab.slots) {
                for buffer in slab.codes.iter().chain([&slab.factors]) {
                    encoder.clear_buffer(buffer, 0, None);
                }
                continue;
            }
            let mut first = slots.start;
            while first < slots.end {
                let end = slots.end.min((first / BLOCK + 1) * BLOCK);
                for (buffer, at, size) in slab.stretches(&(first..end)) {
                    encoder.clear_buffer(buffer, at, Some(size));
                }
                first = end;
            }
        }
        self.finish(encoder, 0)
    }

    /// The codes and factors of the row at a slot, as they lie on the device. For checks: slow.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(super) fn read_row(&mut self, slab: usize, slot: u32) -> Result<Vec<u8>, EngineError> {
        let mut encoder = self.encoder();
        let mut size = 0;
        for (buffer, at, length) in self.slabs[slab].stretches(&(slot..slot + 1)) {
            encoder.copy_buffer_to_buffer(buffer, at, &self.readback, size, length);
            size += length;
        }
        let index = self.queue.submit([encoder.finish()]);
        let failed = Arc::new(AtomicBool::new(false));
        self.readback.map_async(wgpu::MapMode::Read, ..size, note(&failed));
        self.wait(index, &failed)?;
        let view = self.readback.get_mapped_range(..size).map_err(|e| self.lost(&e.to_string()))?;
        let bytes = view.to_vec();
        drop(view);
        self.readback.unmap();
        Ok(bytes)
    }

    /// Bytes that the device reads and writes in a second while it copies memory. For reports: what a
    /// scan's bytes are held against.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`]; [`EngineError::OutOfDeviceMemory`] where there is no room for it.
    pub(super) fn copy_rate(&mut self) -> Result<f64, EngineError> {
        const BYTES: u64 = 256 << 20;
        const COPIES: u32 = 32;
        let size = BYTES.min(self.buffer_bytes_max);
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let buffer = || {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("copied"),
                size,
                usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            })
        };
        let (from, to) = (buffer(), buffer());
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(EngineError::OutOfDeviceMemory { needed_bytes: 2 * size, reason: error.to_string() });
        }
        let mut best = Duration::MAX;
        // The first makes the memory; the fastest of the others counts.
        for copies in [1, COPIES, COPIES, COPIES] {
            let mut encoder = self.encoder();
            for nth in 0..copies {
                let (from, to) = if nth % 2 == 0 { (&from, &to) } else { (&to, &from) };
                encoder.copy_buffer_to_buffer(from, 0, to, 0, size);
            }
            let begun = Instant::now();
            self.finish(encoder, 0)?;
            if copies == COPIES {
                best = best.min(begun.elapsed());
            }
        }
        Ok(2.0 * size as f64 * f64::from(COPIES) / best.as_secs_f64())
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None })
    }

    /// Submits, waits, and, where something was staged, maps the staging buffer again and zeroes it.
    fn finish(&self, encoder: wgpu::CommandEncoder, staged_bytes: usize) -> Result<(), EngineError> {
        let index = self.queue.submit([encoder.finish()]);
        let failed = Arc::new(AtomicBool::new(false));
        if staged_bytes > 0 {
            self.staging.map_async(wgpu::MapMode::Write, .., note(&failed));
        }
        self.wait(index, &failed)?;
        unstage(&self.staging, staged_bytes).map_err(|words| self.lost(&words))
    }

    /// Waits for a submission and for the mappings asked for with it.
    fn wait(&self, index: wgpu::SubmissionIndex, failed: &AtomicBool) -> Result<(), EngineError> {
        self.device
            .poll(wgpu::PollType::Wait { submission_index: Some(index), timeout: Some(PATIENCE) })
            .map_err(|e| self.lost(&e.to_string()))?;
        self.check()?;
        if failed.load(Ordering::Acquire) {
            return Err(self.lost("a buffer could not be mapped"));
        }
        Ok(())
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

/// Copies the pieces one after the other into a mapped staging buffer and hands it to the device, if
/// there is anything to copy. The number of bytes staged, or what went wrong. [`unstage`] takes it back.
fn stage(staging: &wgpu::Buffer, pieces: &[&[u8]]) -> Result<usize, String> {
    let mut at = 0;
    {
        let mut view = staging.get_mapped_range_mut(..).map_err(|e| e.to_string())?;
        for piece in pieces {
            view.slice(at..at + piece.len()).copy_from_slice(piece);
            at += piece.len();
        }
    }
    if at > 0 {
        staging.unmap();
    }
    Ok(at)
}

/// Overwrites what was staged in a buffer that is mapped again.
fn unstage(staging: &wgpu::Buffer, staged_bytes: usize) -> Result<(), String> {
    if staged_bytes > 0 {
        let mut view = staging.get_mapped_range_mut(..).map_err(|e| e.to_string())?;
        view.slice(..staged_bytes).fill(0);
    }
    Ok(())
}

/// Takes note of a mapping that fails.
fn note(failed: &Arc<AtomicBool>) -> impl FnOnce(Result<(), wgpu::BufferAsyncError>) + Send + 'static {
    let failed = Arc::clone(failed);
    move |result| {
        if result.is_err() {
            failed.store(true, Ordering::Release);
        }
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
