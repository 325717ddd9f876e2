//! The GPU engine: the codes of the gallery are resident on a graphics device, and rule out most rows.
//!
//! Kernels in WGSL scan codes for what reaches the bound of a probe's floor ([`crate::engine::certificate`]);
//! the few pairs that do are compared with the row itself on the host, which has it, and which knows the
//! rows that are live. Rows are never on the device. Knows codes, rows, live bits and numbers; the only home
//! of wgpu. Does not know subjects, policies or transports.
//!
//! - `adapter`: which device. `device/`: its buffers, kernels and batches, and how threads share it.
//! - `resident`: where each row's codes lie. `compare`: rows on the host.
//! - `schedule/`: in which order, at which level, with which floors. `executor`: scans as batches.
//! - `bounds`: from floors to bounds, and how far device arithmetic may be off.
//! - `twin`: the CPU twin of all shaders. `matrix_check`: whether matrices agree with packed dot products on a
//!   whole gallery.
//!
//! Invariants: a request is only answered if the device holds every code of its view; a lost device is an
//! error and then an empty device, never a panic or a wrong answer; codes given up are zeroed.

mod adapter;
mod bounds;
mod compare;
mod device;
mod executor;
mod matrix_check;
mod resident;
mod schedule;
#[cfg(test)]
mod tests;
mod twin;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::RwLock;
use thenar_index::codes::BLOCK_ROWS;

pub use adapter::{AdapterChoice, AdapterSummary, available_adapters};
pub use matrix_check::MatrixCheck;

use self::compare::Comparison;
use self::device::batch::RUNS_MAX;
use self::device::bindings::PROBES_MAX;
use self::device::kernels::SLOT_STEP;
use self::device::layout::{DeviceCodes, Level, row_bytes};
use self::device::shared::SharedDevice;
use self::device::{DeviceInfo, DeviceOptions, STAGING_BYTES};
use self::executor::BatchExecutor;
use self::resident::{Placement, Resident, SlabWanted};
use self::schedule::slices::Limits;
use self::schedule::{Context, Found};
use super::dot::Dot;
use super::narrow_filter;
use super::quantised_probe::QuantisedProbe;
use super::{CandidateRequest, CandidateRows, Engine, EngineDescription, EngineError, GalleryView};
use crate::simd::{self, Simd};

/// A follow that uploads more than this does not let searches wait for it.
const QUICK_FOLLOW_BYTES: u64 = 64 << 20;

/// How an engine uses its adapter.
#[derive(Debug, Clone)]
pub struct GpuOptions {
    /// Whether cooperative matrices are used if the adapter has them and computes rightly with them. Without
    /// them they are not even asked about: a driver that crashes takes the process with it.
    pub matrices: bool,
    /// Folder in which compiled kernels are kept, which exists and is this user's.
    pub kernels_in: Option<PathBuf>,
}

impl Default for GpuOptions {
    fn default() -> Self {
        Self { matrices: true, kernels_in: None }
    }
}

/// Finds candidates on a graphics device. Shared between threads; each call waits for its answer.
pub struct GpuEngine {
    device: SharedDevice,
    resident: RwLock<Resident>,
    /// Follows under way that take so long that searches had better go elsewhere.
    following: AtomicUsize,
    dot: Dot,
}

impl GpuEngine {
    /// Opens an adapter and checks that it computes rightly. The engine is ready after the first
    /// [`Engine::follow`].
    ///
    /// # Errors
    /// [`EngineError::NoAdapter`] saying what was found.
    pub fn new(choice: AdapterChoice) -> Result<Self, EngineError> {
        Self::open(choice, DeviceOptions::default())
    }

    /// The same, with `options`.
    ///
    /// # Errors
    /// As [`GpuEngine::new`]. If compiled kernels cannot be kept, that is no error.
    pub fn with_options(choice: AdapterChoice, options: GpuOptions) -> Result<Self, EngineError> {
        let GpuOptions { matrices, kernels_in: cache } = options;
        Self::open(choice, DeviceOptions { matrices, cache, ..DeviceOptions::default() })
    }

    fn open(choice: AdapterChoice, options: DeviceOptions) -> Result<Self, EngineError> {
        let device = SharedDevice::open(choice, options)?;
        // An instruction set that was asked for and is not there is refused by the CPU engine.
        let dot = Dot::of(simd::chosen().unwrap_or(Simd::Portable));
        Ok(Self { device, resident: RwLock::default(), following: AtomicUsize::new(0), dot })
    }

    /// Whether a search of the view last followed would be answered now.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.following.load(Ordering::Acquire) == 0
            && self.resident.try_read().is_some_and(|resident| self.device.is_open(resident.generation))
    }

    /// Which kernels scan on this adapter, for people.
    #[must_use]
    pub fn kernels(&self) -> &'static str {
        if self.device.info().matrices {
            "packed dot products, and 16 by 16 cooperative matrices for large batches"
        } else {
            "packed dot products"
        }
    }

    /// Bytes that the device moves in a second when it copies memory (read and written), measured now.
    ///
    /// # Errors
    /// [`EngineError`] if the device fails or has no room for half a gigabyte.
    pub fn copy_rate(&self) -> Result<f64, EngineError> {
        self.device.with(self.device.generation(), |device| device.copy_rate())
    }

    /// Ends the device as a driver failure would, so that recovery can be tested.
    #[doc(hidden)]
    pub fn lose_device(&self) -> Result<(), EngineError> {
        self.device.with(self.device.generation(), |device| {
            device.destroy();
            Ok(())
        })
    }

    /// The codes and factors of a row that lie on the device, if there are any, read back from there.
    #[doc(hidden)]
    pub fn resident_codes(&self, row: u32) -> Result<Option<Vec<u8>>, EngineError> {
        let resident = self.resident.read();
        let Some((slab, slot)) = resident.slot_of(row) else {
            return Ok(None);
        };
        self.device.with(resident.generation, |device| device.read_row(slab, slot)).map(Some)
    }

    /// Brings the table and the device up to `view`.
    fn take_in(&self, resident: &mut Resident, view: &GalleryView<'_>) -> Result<(), EngineError> {
        let generation = self.device.ensure_open()?;
        if resident.generation != generation || resident.dim != view.dim {
            *resident = Resident::default();
            self.device.with(generation, |device| device.clear())?;
            *resident = Resident::empty(generation, view.dim);
        }
        let freed = resident.drop_stale(view);
        if !freed.is_empty() {
            let runs: Vec<_> =
                freed.iter().map(|extent| (extent.slab, extent.slot..extent.slot + extent.room)).collect();
            self.device.with(generation, |device| device.zero_rows(&runs))?;
        }
        let placements = loop {
            match resident.place(view) {
                Ok(placements) => break placements,
                Err(wanted) => self.add_slab(resident, wanted)?,
            }
        };
        self.upload(generation, view, &placements)
    }

    /// Uploads the codes of `view` to where they were placed. While a piece is uploaded, another thread lays out
    /// the next.
    fn upload(&self, generation: u64, view: &GalleryView<'_>, placements: &[Placement]) -> Result<(), EngineError> {
        const BLOCK: u32 = BLOCK_ROWS as u32;
        let rows_max = (STAGING_BYTES / row_bytes(view.dim)) as u32 / BLOCK * BLOCK;
        let mut pieces = placements.iter().flat_map(|placement| {
            placement.rows.clone().step_by(rows_max as usize).map(move |first| (placement, first))
        });
        let mut next_laid_out = || {
            let (placement, first) = pieces.next()?;
            let end = placement.rows.end.min(first + rows_max);
            let codes = &view.segments[placement.segment].codes;
            let codes = codes.blocks(view.dim, (first / BLOCK) as usize, ((end - first) / BLOCK) as usize);
            let slot = placement.slot + (first - placement.rows.start);
            Some((placement.slab, slot, DeviceCodes::new(&codes, view.dim)))
        };
        let mut laid_out = next_laid_out();
        while let Some((slab, slot, codes)) = laid_out {
            let mut next = None;
            let written = rayon::in_place_scope(|scope| {
                scope.spawn(|_| next = next_laid_out());
                self.device.with(generation, |device| device.write_codes(slab, slot, &codes))
            });
            written?;
            laid_out = next;
        }
        Ok(())
    }

    /// Adds a slab as large as wanted, or as the limits of the device allow, or at least as large as needed.
    fn add_slab(&self, resident: &mut Resident, wanted: SlabWanted) -> Result<(), EngineError> {
        let dim = resident.dim;
        let slots_max = self.device.info().buffer_bytes_max / Level::FourBit.row_bytes(dim) as u64;
        let slots_max = u32::try_from(slots_max).unwrap_or(u32::MAX) / SLOT_STEP * SLOT_STEP;
        let left = (u32::MAX - resident.slots()) / SLOT_STEP * SLOT_STEP;
        let most = slots_max.min(left);
        if most == 0 || resident.slab_count() == RUNS_MAX {
            return Err(EngineError::OutOfDeviceMemory {
                needed_bytes: u64::from(SLOT_STEP) * row_bytes(dim) as u64,
                reason: format!(
                    "{} slots are in use in {} slabs, each of at most {slots_max} slots",
                    resident.slots(),
                    resident.slab_count()
                ),
            });
        }
        let mut add = |slots: u32| {
            self.device.with(resident.generation, |device| device.add_slab(slots, dim))?;
            resident.add_slab(slots);
            Ok(())
        };
        match add(wanted.slots.min(most)) {
            Err(EngineError::OutOfDeviceMemory { .. }) => add(wanted.slots_least.min(most)),
            added => added,
        }
    }
}

impl Engine for GpuEngine {
    fn describe(&self) -> EngineDescription {
        let (device_bytes, host_bytes) = self.device.bytes();
        let adapter = self.device.info().adapter.clone();
        EngineDescription { kind: "gpu", adapter, threads: 1, host_bytes, device_bytes }
    }

    fn follow(&self, view: &GalleryView<'_>) -> Result<(), EngineError> {
        let slow = {
            let resident = self.resident.read();
            !self.device.is_open(resident.generation) || resident.missing_bytes(view) > QUICK_FOLLOW_BYTES
        };
        self.following.fetch_add(usize::from(slow), Ordering::AcqRel);
        let mut resident = self.resident.write();
        let result = self.take_in(&mut resident, view);
        match &result {
            // Nothing of the new view was taken in, but what was there still is.
            Ok(()) | Err(EngineError::OutOfDeviceMemory { .. }) => {}
            Err(_) => *resident = Resident::default(),
        }
        drop(resident);
        self.following.fetch_sub(usize::from(slow), Ordering::AcqRel);
        result
    }

    fn erase(&self, rows: &[u32]) -> Result<(), EngineError> {
        let resident = self.resident.read();
        if !self.device.is_open(resident.generation) {
            // The device that held them is gone, and a new one is empty.
            return Ok(());
        }
        let mut slots: Vec<(usize, u32)> = rows.iter().filter_map(|&row| resident.slot_of(row)).collect();
        slots.sort_unstable();
        slots.dedup();
        let mut runs: Vec<(usize, Range<u32>)> = Vec::new();
        for &(slab, slot) in &slots {
            match runs.last_mut() {
                Some((last, run)) if *last == slab && run.end == slot => run.end += 1,
                _ => runs.push((slab, slot..slot + 1)),
            }
        }
        if runs.is_empty() {
            return Ok(());
        }
        let erased = self.device.with(resident.generation, |device| device.zero_rows(&runs));
        if erased.is_err() {
            // Rows that cannot be erased must not stay: the device is given up whole.
            self.device.abandon(resident.generation);
        }
        erased
    }

    fn find_candidates(
        &self,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        let count = request.floors.len();
        assert!(request.probes.len() == count * view.dim && request.keep.len() == count);
        candidates.reset(count);
        if count == 0 || view.segments.iter().all(|segment| segment.rows.is_empty()) {
            candidates.floors.copy_from_slice(request.floors);
            return Ok(());
        }
        if self.following.load(Ordering::Acquire) > 0 || self.device.generation() == 0 {
            return Err(EngineError::Rebuilding);
        }
        let resident = self.resident.read();
        if !self.device.is_open(resident.generation) || !resident.covers(view) {
            return Err(EngineError::Rebuilding);
        }
        narrow_filter::split(
            view,
            request,
            candidates,
            |request, candidates| {
                let comparison = Comparison { view, request, dot: self.dot };
                for probe in 0..request.floors.len() {
                    let filter = request.filter(probe).expect("a narrow filter is a filter");
                    let mut found = Found::new(request, probe, view.dim);
                    found.take(comparison.filtered(probe, filter));
                    found.store(probe, candidates);
                }
                Ok(())
            },
            |request, candidates| self.find_by_codes(view, request, &resident, candidates),
        )
    }
}

impl GpuEngine {
    /// Finds candidates by the codes on the device. What a filter does not allow is passed over when a pair is
    /// compared: a scan is no shorter for it, but neither does it cost more.
    fn find_by_codes(
        &self,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        resident: &Resident,
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        let dim = view.dim;
        let rows_of = resident.rows_of(view);
        let comparison = Comparison { view, request, dot: self.dot };
        let compare = |probe: usize, slot: u32| {
            let (segment, offset) = rows_of.live_row(slot)?;
            comparison.row(segment, offset, probe)
        };
        let without_codes = |probe: usize| comparison.without_codes(probe);
        let info = self.device.info();
        let context = Context {
            slots: resident.slots(),
            limits: limits(&info, dim),
            compare: &compare,
            without_codes: &without_codes,
        };
        let count = request.floors.len();
        for first in (0..count).step_by(PROBES_MAX) {
            let batch = first..count.min(first + PROBES_MAX);
            let probes = request.probes[batch.start * dim..batch.end * dim].chunks_exact(dim);
            let probes: Vec<QuantisedProbe> = probes.map(QuantisedProbe::new).collect();
            let mut executor = BatchExecutor::new(&self.device, resident, info.matrices, first, &probes);
            schedule::find_candidates(&context, request, batch, &probes, &mut executor, candidates)?;
        }
        Ok(())
    }
}

/// What a device can take at once.
fn limits(info: &DeviceInfo, dim: usize) -> Limits {
    Limits { dim, entries_max: info.entries_max, products_max: info.products_max }
}
