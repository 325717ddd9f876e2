//! The GPU engine: the codes of the gallery resident on a graphics device, and most rows passed over
//! by them.
//!
//! Kernels in WGSL scan codes for what reaches the bar of a probe's floor ([`crate::engine::certificate`]); the
//! few pairs that do are compared with the row itself on the host, which has it. Rows are never on
//! the card. Knows codes, rows, live bits and numbers; the only home of wgpu. Does not know subjects,
//! policies or transports.
//!
//! - `adapter`: which device. `device`: its buffers and commands. `owner`: the thread it
//!   lives on. `kernels`: the shaders and their sizes. `selftest`: whether it computes rightly.
//!   `cache`: compiled kernels on disk.
//! - `level`, `card`, `probe`: how codes and probes lie on the card. `resident`: where each row's do.
//! - `sifting`: in which order, at which level, with which floors. `slack`: the bars, and how far
//!   device arithmetic may be off.
//! - `matrix_check`: whether matrices agree with packed dot products on a whole gallery.
//! - `bindings`, `scan_few`, `scan_many`, `scan_coop`, `look`: twins of the shaders of these names.
//!
//! Invariants: a sift is only answered if the device holds every code of its view; a lost device is
//! an error and then an empty device, never a panic or a wrong answer; codes given up are zeroed.

mod adapter;
mod bindings;
mod cache;
mod card;
mod device;
mod kernels;
mod level;
mod look;
mod matrix_check;
mod owner;
mod probe;
mod resident;
mod scan_coop;
mod scan_few;
mod scan_many;
mod selftest;
mod sifting;
mod slack;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use half::f16;
use half::slice::HalfFloatSliceExt as _;
use parking_lot::RwLock;
use rayon::prelude::*;
use roaring::RoaringBitmap;
use thenar_index::codes::BLOCK_ROWS;
use zeroize::{Zeroize as _, Zeroizing};

pub use adapter::{AdapterChoice, AdapterSummary, available_adapters};
pub use matrix_check::MatrixCheck;

use self::bindings::{Bar, PROBES_MAX};
use self::card::{CardCodes, row_bytes};
use self::device::{Batch, Look, RUNS_MAX, Report, Run, STAGING_BYTES, Sizes};
use self::kernels::{Kernel, SLOT_STEP};
use self::level::Level;
use self::owner::{Action, Command, Facts, Owner, Reply, Standing};
use self::probe::Quantised;
use self::resident::{Resident, RowsOf, piece};
use self::sifting::{Field, Machine, Order};
use super::{CandidateRequest, CandidateRows, Engine, EngineDescription, EngineError, GalleryView, SegmentView};
use crate::process::supervisor::Supervisor;

/// Commands that may wait for the device.
const COMMANDS_MAX: usize = 16;
/// Rows of a block of codes, as slots are counted.
const GRAIN: u32 = BLOCK_ROWS as u32;
/// Uploads that may wait for the device, each of at most [`STAGING_BYTES`].
const UPLOADS_MAX: usize = 2;
/// A follow that uploads more than this does not let searches wait for it.
const QUICK_FOLLOW_BYTES: u64 = 64 << 20;
/// A filter that lets through at most one row in so many is followed row by row, on the host.
const FEW_OF: u64 = 16;
/// Rows from which a narrow filter is divided between threads.
const FILTERED_TOGETHER: usize = 1024;

/// How an engine uses its adapter.
#[derive(Debug, Clone)]
pub struct GpuOptions {
    /// Whether cooperative matrices are used where the adapter has them and computes rightly with them.
    /// Without them they are not even asked about: a driver that crashes takes the process with it.
    pub matrices: bool,
    /// Folder in which compiled kernels are kept, which exists and is this user's.
    pub kernels_in: Option<PathBuf>,
    /// Learns of it if the thread that owns the device panics.
    pub supervisor: Supervisor,
}

impl Default for GpuOptions {
    fn default() -> Self {
        Self { matrices: true, kernels_in: None, supervisor: Supervisor::default() }
    }
}

/// Sifts on a graphics device. Shared between threads; each call waits for its answer.
pub struct GpuEngine {
    /// `None` only while the engine is dropped.
    commands: Option<Sender<Command>>,
    standing: Arc<Standing>,
    resident: RwLock<Resident>,
    /// Follows under way that take so long that searches had better go elsewhere.
    following: AtomicUsize,
    thread: Option<JoinHandle<()>>,
}

impl GpuEngine {
    /// Opens an adapter, checks that it computes rightly and starts the thread that owns it.
    /// The engine is ready after the first [`Engine::follow`].
    ///
    /// # Errors
    /// [`EngineError::NoAdapter`] saying what was found.
    pub fn new(choice: AdapterChoice) -> Result<Self, EngineError> {
        Self::with_sizes(choice, Sizes::default(), &Supervisor::default())
    }

    /// The same, as `options` say.
    ///
    /// # Errors
    /// As [`GpuEngine::new`]; a cache of kernels that fails is none.
    pub fn with_options(choice: AdapterChoice, options: GpuOptions) -> Result<Self, EngineError> {
        let GpuOptions { matrices, kernels_in: cache, supervisor } = options;
        Self::with_sizes(choice, Sizes { matrices, cache, ..Sizes::default() }, &supervisor)
    }

    fn with_sizes(choice: AdapterChoice, sizes: Sizes, supervisor: &Supervisor) -> Result<Self, EngineError> {
        let standing = Arc::new(Standing::default());
        let (commands, to_do) = bounded::<Command>(COMMANDS_MAX);
        let (opened, is_open) = bounded(1);
        let of_thread = Arc::clone(&standing);
        let thread = supervisor.spawn("gpu-owner", move || match Owner::open(choice, sizes, of_thread) {
            Ok(owner) => {
                if opened.send(Ok(())).is_ok() {
                    owner.serve(&to_do);
                }
            }
            Err(error) => {
                let _gone = opened.send(Err(error));
            }
        });
        let thread = thread
            .map_err(|e| EngineError::NoAdapter { reason: format!("the device's thread could not be started: {e}") })?;
        is_open.recv().unwrap_or_else(|_| Err(thread_ended()))?;
        Ok(Self {
            commands: Some(commands),
            standing,
            resident: RwLock::default(),
            following: AtomicUsize::new(0),
            thread: Some(thread),
        })
    }

    /// Whether a sift of the view last followed would be answered now.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.following.load(Ordering::Acquire) == 0
            && self.standing.open.load(Ordering::Acquire)
            && self.resident.try_read().is_some_and(|resident| resident.generation == self.generation())
    }

    /// Which kernels scan on this adapter, for people.
    #[must_use]
    pub fn kernels(&self) -> String {
        match self.standing.facts.lock().coop {
            Some(side) => {
                format!("packed dot products, and {side:?} by {side:?} cooperative matrices for large batches")
            }
            None => "packed dot products".to_owned(),
        }
    }

    /// Bytes that the device moves in a second when it copies memory (read and written), measured now.
    ///
    /// # Errors
    /// [`EngineError`] where the device fails or has no room for half a gigabyte.
    pub fn copy_rate(&self) -> Result<f64, EngineError> {
        self.call(self.generation(), Action::CopyRate)
    }

    /// Ends the device as a driver failure would, so that recovery can be tested.
    #[doc(hidden)]
    pub fn lose_device(&self) -> Result<(), EngineError> {
        self.call(self.generation(), Action::Destroy)
    }

    /// The codes and factors of a row that lie on the device, if there are any, read back from there.
    #[doc(hidden)]
    pub fn resident_codes(&self, row: u32) -> Result<Option<Vec<u8>>, EngineError> {
        let resident = self.resident.read();
        let Some((slab, slot)) = resident.slot_of(row) else {
            return Ok(None);
        };
        self.call(resident.generation, |reply| Action::ReadRow { slab, slot, reply }).map(Some)
    }

    fn generation(&self) -> u64 {
        self.standing.generation.load(Ordering::Acquire)
    }

    fn send<T>(
        &self,
        generation: u64,
        action: impl FnOnce(Reply<T>) -> Action,
    ) -> Result<Receiver<Result<T, EngineError>>, EngineError> {
        let (reply, answer) = bounded(1);
        let command = Command { generation, action: action(reply) };
        let commands = self.commands.as_ref().expect("present until the engine is dropped");
        commands.send(command).map_err(|_| thread_ended())?;
        Ok(answer)
    }

    fn call<T>(&self, generation: u64, action: impl FnOnce(Reply<T>) -> Action) -> Result<T, EngineError> {
        receive(&self.send(generation, action)?)
    }

    /// Brings the table and the device up to `view`.
    fn take_in(&self, resident: &mut Resident, view: &GalleryView<'_>) -> Result<(), EngineError> {
        self.call(0, Action::Ensure)?;
        let generation = self.generation();
        if resident.generation != generation || resident.dim != view.dim {
            *resident = Resident::default();
            self.call(generation, Action::Clear)?;
            *resident = Resident::empty(generation, view.dim);
        }
        let freed = resident.drop_stale(view);
        if !freed.is_empty() {
            let live = resident.live.get_mut();
            let mut pieces = Vec::new();
            for extent in &freed {
                let words = extent.slot as usize / 64..(extent.slot + extent.room) as usize / 64;
                live[extent.slab][words.clone()].fill(0);
                pieces.push(piece(live, extent.slab, words));
            }
            self.call(generation, |reply| Action::WriteLive { pieces, reply })?;
            let runs = freed.iter().map(|extent| (extent.slab, extent.slot..extent.slot + extent.room)).collect();
            self.call(generation, |reply| Action::ZeroRows { runs, reply })?;
        }
        let placements = loop {
            match resident.place(view) {
                Ok(placements) => break placements,
                Err(wanted) => self.add_slab(resident, wanted)?,
            }
        };
        let mut waiting = VecDeque::new();
        let rows_max = (STAGING_BYTES / row_bytes(view.dim)) as u32 / GRAIN * GRAIN;
        for placement in placements {
            let mut first = placement.rows.start;
            while first < placement.rows.end {
                let end = placement.rows.end.min(first + rows_max);
                let codes = view.segments[placement.block].codes;
                let blocks = ((end - first) / GRAIN) as usize;
                let codes = codes.blocks(view.dim, (first / GRAIN) as usize, blocks);
                let codes = Box::new(CardCodes::new(&codes, view.dim));
                let (slab, slot) = (placement.slab, placement.slot + (first - placement.rows.start));
                let write = |reply| Action::WriteCodes { slab, slot, codes, reply };
                waiting.push_back(self.send(generation, write)?);
                if waiting.len() >= UPLOADS_MAX {
                    receive(&waiting.pop_front().expect("not empty"))?;
                }
                first = end;
            }
        }
        for answer in waiting {
            receive(&answer)?;
        }
        let mut live = resident.live.lock();
        let pieces = resident.refresh_live(view, &mut live);
        self.call(generation, |reply| Action::WriteLive { pieces, reply })
    }

    /// Adds a slab as large as wanted, or as the limits of the device allow, or at least as large
    /// as needed.
    fn add_slab(&self, resident: &mut Resident, wanted: resident::SlabWanted) -> Result<(), EngineError> {
        let four_bit_bytes = Level::FourBit.row_bytes(resident.dim) as u64;
        let slots_max = self.standing.facts.lock().buffer_bytes_max / four_bit_bytes;
        let slots_max = u32::try_from(slots_max).unwrap_or(u32::MAX) / SLOT_STEP * SLOT_STEP;
        let left = (u32::MAX - resident.slots()) / SLOT_STEP * SLOT_STEP;
        let most = slots_max.min(left);
        if most == 0 {
            return Err(EngineError::OutOfDeviceMemory {
                needed_bytes: u64::from(SLOT_STEP) * row_bytes(resident.dim) as u64,
                reason: format!("a slab takes at most {slots_max} rows and {} slots are in use", resident.slots()),
            });
        }
        let dim = resident.dim;
        let mut result = Ok(());
        for slots in [wanted.slots.min(most), wanted.slots_least.min(most)] {
            result = self.call(resident.generation, |reply| Action::AddSlab { slots, dim, reply });
            match result {
                Ok(()) => {
                    resident.add_slab(slots);
                    return Ok(());
                }
                Err(EngineError::OutOfDeviceMemory { .. }) => {}
                Err(_) => break,
            }
        }
        result
    }
}

impl Engine for GpuEngine {
    fn describe(&self) -> EngineDescription {
        EngineDescription {
            kind: "gpu",
            adapter: self.standing.facts.lock().description.clone(),
            threads: 1,
            host_bytes: self.standing.host_bytes.load(Ordering::Relaxed),
            device_bytes: self.standing.device_bytes.load(Ordering::Relaxed),
        }
    }

    fn follow(&self, view: &GalleryView<'_>) -> Result<(), EngineError> {
        let slow = {
            let resident = self.resident.read();
            resident.generation != self.generation() || resident.missing_bytes(view) > QUICK_FOLLOW_BYTES
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
        if resident.generation != self.generation() {
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
        let marked = {
            let mut live = resident.live.lock();
            let mut pieces = Vec::new();
            for &(slab, slot) in &slots {
                let word = slot as usize / 64;
                live[slab][word] &= !(1 << (slot % 64));
                pieces.push((slab, word));
            }
            pieces.dedup();
            let pieces = pieces.into_iter().map(|(slab, word)| piece(&live, slab, word..word + 1)).collect();
            self.send(resident.generation, |reply| Action::WriteLive { pieces, reply })
        };
        let erased = marked
            .and_then(|answer| receive(&answer))
            .and_then(|()| self.call(resident.generation, |reply| Action::ZeroRows { runs, reply }));
        if erased.is_err() {
            // Rows that cannot be erased must not stay: the device is given up whole. The thread
            // may have done so already, or be gone and the device with it.
            let _given_up = self.call(resident.generation, Action::Abandon);
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
        if count == 0 || view.segments.iter().all(|block| block.rows.is_empty()) {
            candidates.floors.copy_from_slice(request.floors);
            return Ok(());
        }
        if self.following.load(Ordering::Acquire) > 0 || !self.standing.open.load(Ordering::Acquire) {
            return Err(EngineError::Rebuilding);
        }
        let resident = self.resident.read();
        if resident.generation != self.generation() || !resident.covers(view) {
            return Err(EngineError::Rebuilding);
        }
        {
            let mut live = resident.live.lock();
            let pieces = resident.refresh_live(view, &mut live);
            if !pieces.is_empty() {
                // Not waited for: the batches below come after it in the channel.
                self.send(resident.generation, |reply| Action::WriteLive { pieces, reply })?;
            }
        }
        let rows: u64 = view.segments.iter().map(|block| block.count(view.dim) as u64).sum();
        let narrow = |probe: &usize| filter_of(request, *probe).is_some_and(|filter| filter.len() <= rows / FEW_OF);
        let (narrow, wide): (Vec<usize>, Vec<usize>) = (0..count).partition(narrow);
        for probe in narrow {
            let filter = filter_of(request, probe).expect("narrow filters are filters");
            sifting::sift_narrow(request, view.dim, probe, filtered(view, request, probe, filter), candidates);
        }
        if wide.len() == count {
            return self.sift_wide(view, request, &resident, candidates);
        }
        // Among the others, what belongs to each is picked out and put back.
        let mut picked = CandidateRows::default();
        picked.reset(wide.len());
        let probes = wide.iter().flat_map(|p| &request.probes[p * view.dim..(p + 1) * view.dim]).copied();
        let probes: Zeroizing<Vec<f32>> = Zeroizing::new(probes.collect());
        let filters: Vec<Option<&RoaringBitmap>> = wide.iter().map(|&probe| filter_of(request, probe)).collect();
        let of_wide = CandidateRequest {
            probes: &probes,
            floors: &wide.iter().map(|&probe| request.floors[probe]).collect::<Vec<_>>(),
            keep: &wide.iter().map(|&probe| request.keep[probe]).collect::<Vec<_>>(),
            candidates_max: request.candidates_max,
            certificate: request.certificate,
            filters: &filters,
            // Nothing is drawn here: both scans are certified over the rotation alone.
            seeds: &[],
        };
        self.sift_wide(view, &of_wide, &resident, &mut picked)?;
        for (nth, probe) in wide.into_iter().enumerate() {
            candidates.rows[probe] = std::mem::take(&mut picked.rows[nth]);
            candidates.overflowed[probe] = picked.overflowed[nth];
            candidates.floors[probe] = picked.floors[nth];
        }
        candidates.device_time = picked.device_time;
        candidates.certificate = picked.certificate;
        Ok(())
    }
}

impl GpuEngine {
    /// Sifts probes by the codes on the device. What a filter does not allow is passed over where a
    /// pair is compared: a scan is no shorter for it, but neither does it cost more.
    fn sift_wide(
        &self,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        resident: &Resident,
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        let dim = view.dim;
        let rows_of = resident.rows_of(view);
        let compare = |probe: usize, slot: u32| compare(&rows_of, request, dim, probe, slot);
        let without_codes = |probe: usize| without_codes(view, request, probe);
        let facts = self.standing.facts.lock().clone();
        let field = Field {
            slots: resident.slots(),
            dim,
            entries_max: facts.entries_max,
            compare: &compare,
            without_codes: &without_codes,
        };
        let count = request.floors.len();
        for first in (0..count).step_by(PROBES_MAX) {
            let batch = first..count.min(first + PROBES_MAX);
            let probes = request.probes[batch.start * dim..batch.end * dim].chunks_exact(dim);
            let quantised: Vec<Quantised> = probes.map(Quantised::new).collect();
            let mut machine = Batches {
                engine: self,
                resident,
                facts: &facts,
                first,
                quantised: &quantised,
                packed: HashMap::new(),
                under_way: VecDeque::new(),
            };
            sifting::find_candidates(&field, request, batch, &quantised, &mut machine, candidates)?;
        }
        Ok(())
    }
}

/// Which kernel and level probes are packed for, and which probes.
type Packing = (Kernel, Level, Vec<usize>);

/// Where a batch is answered.
type Answer<T> = Receiver<Result<T, EngineError>>;

/// Turns orders into batches for the owner of the device.
struct Batches<'a> {
    engine: &'a GpuEngine,
    resident: &'a Resident,
    facts: &'a Facts,
    first: usize,
    quantised: &'a [Quantised],
    /// By kernel, level and probes: slices of one gallery ask for the same again and again.
    packed: HashMap<Packing, [Arc<Zeroizing<Vec<u32>>>; 2]>,
    /// Of each order under way: its probes, and where its batches are answered.
    under_way: VecDeque<(usize, Vec<Answer<Report>>)>,
}

impl Machine for Batches<'_> {
    fn submit(&mut self, order: &Order) -> Result<(), EngineError> {
        let dim = self.resident.dim;
        let count = order.numbers.len();
        let kernel = Kernel::for_batch(count, self.facts.coop);
        // The second look comes with scans of signs, and with all of them.
        let pack = || {
            let probes: Vec<&Quantised> = order.numbers.iter().map(|n| &self.quantised[n - self.first]).collect();
            let looks: &[&Quantised] = if order.look.is_some() { &probes } else { &[] };
            [probe::pack(kernel, order.level, &probes, dim), probe::look(Level::FourBit, looks, dim)].map(Arc::new)
        };
        let [packed, look] =
            self.packed.entry((kernel, order.level, order.numbers.clone())).or_insert_with(pack).clone();
        let mut bars = order.bars.clone();
        bars.resize(kernel.padded(count), Bar::CLOSED);
        let look = order.look.as_ref().map(|bars| Look { packed: look, bars: bars.clone() });
        let slots_max = self.facts.work_max / (kernel.padded(count) * dim) as u64;
        let mut answers = Vec::new();
        for runs in portions(&self.resident.runs(&order.slots), slots_max) {
            let batch = Box::new(Batch {
                dim,
                kernel,
                level: order.level,
                probes: count,
                packed: Arc::clone(&packed),
                bars: bars.clone(),
                parts_off: order.parts_off,
                look: look.clone(),
                runs,
            });
            answers.push(self.engine.send(self.resident.generation, |reply| Action::Run { batch, reply })?);
        }
        self.under_way.push_back((count, answers));
        Ok(())
    }

    fn collect(&mut self) -> Result<Report, EngineError> {
        let (count, answers) = self.under_way.pop_front().expect("an order is under way");
        let mut whole = Report { counts: vec![0; count], ..Report::default() };
        for answer in answers {
            let report = receive(&answer)?;
            whole.entries.extend(report.entries);
            whole.stored += report.stored;
            whole.spilled |= report.spilled;
            whole.counts.iter_mut().zip(&report.counts).for_each(|(sum, count)| *sum = sum.saturating_add(*count));
            if let Some(time) = report.device_time {
                *whole.device_time.get_or_insert_default() += time;
            }
        }
        Ok(whole)
    }
}

fn filter_of<'a>(request: &CandidateRequest<'a>, probe: usize) -> Option<&'a RoaringBitmap> {
    request.filters.get(probe).copied().flatten()
}

/// The row at a slot and its number for a probe, if the view has the row, it is live and allowed.
fn compare(
    rows_of: &RowsOf<'_>,
    request: &CandidateRequest<'_>,
    dim: usize,
    probe: usize,
    slot: u32,
) -> Option<(f32, u32)> {
    let (block, offset) = rows_of.live_row(slot)?;
    compare_row(block, offset, request, dim, probe)
}

/// The number and the row at a place of a block, if the probe's filter allows it.
fn compare_row(
    block: &SegmentView<'_>,
    offset: usize,
    request: &CandidateRequest<'_>,
    dim: usize,
    probe: usize,
) -> Option<(f32, u32)> {
    let row = block.first_row + u32::try_from(offset).expect("rows are numbered in u32");
    let allowed = filter_of(request, probe).is_none_or(|filter| filter.contains(row));
    allowed.then(|| (number(&block.rows[offset * dim..][..dim], &request.probes[probe * dim..][..dim]), row))
}

/// The f32 number of a row and a probe: a sum of products, which in any order is within
/// [`super::dot::dot_slack`] of the exact score. Wipes what it widened of the row.
fn number(row: &[f16], probe: &[f32]) -> f32 {
    const LANES: usize = 16;
    const TOGETHER: usize = 4 * LANES;
    let mut widened = [0.0_f32; TOGETHER];
    let mut sums = [0.0_f32; LANES];
    for (row, probe) in row.chunks(TOGETHER).zip(probe.chunks(TOGETHER)) {
        let values = &mut widened[..row.len()];
        row.convert_to_f32_slice(values);
        for (values, factors) in values.chunks_exact(LANES).zip(probe.chunks_exact(LANES)) {
            for lane in 0..LANES {
                sums[lane] += values[lane] * factors[lane];
            }
        }
    }
    widened.zeroize();
    sums.iter().sum()
}

/// Numbers of the rows of the view that have no codes, for one probe.
fn without_codes(view: &GalleryView<'_>, request: &CandidateRequest<'_>, probe: usize) -> Vec<(f32, u32)> {
    let mut found = Vec::new();
    for block in &view.segments {
        let offsets = block.coded(view.dim)..block.count(view.dim);
        let live = offsets.filter(|&offset| block.is_live(offset));
        found.extend(live.filter_map(|offset| compare_row(block, offset, request, view.dim, probe)));
    }
    found
}

/// Numbers of the rows that a narrow filter lets through.
fn filtered(
    view: &GalleryView<'_>,
    request: &CandidateRequest<'_>,
    probe: usize,
    filter: &RoaringBitmap,
) -> Vec<(f32, u32)> {
    let mut places: Vec<(&SegmentView<'_>, usize)> = Vec::new();
    for block in &view.segments {
        let count = u32::try_from(block.count(view.dim)).unwrap_or(u32::MAX);
        let rows = filter.range(block.first_row..block.first_row.saturating_add(count));
        let offsets = rows.map(|row| (row - block.first_row) as usize);
        places.extend(offsets.filter(|&offset| block.is_live(offset)).map(|offset| (block, offset)));
    }
    let compare = |&(block, offset): &(&SegmentView<'_>, usize)| compare_row(block, offset, request, view.dim, probe);
    places.par_iter().with_min_len(FILTERED_TOGETHER).filter_map(compare).collect()
}

impl Drop for GpuEngine {
    fn drop(&mut self) {
        // The thread ends when the channel does.
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// Cuts runs into portions of about `slots_max` slots, at least [`SLOT_STEP`], and of at most
/// [`RUNS_MAX`] runs, so that no batch keeps the device busy for long.
fn portions(runs: &[Run], slots_max: u64) -> Vec<Vec<Run>> {
    let slots_max = u32::try_from(slots_max).unwrap_or(u32::MAX);
    let slots_max = (slots_max / SLOT_STEP * SLOT_STEP).max(SLOT_STEP);
    let mut portions: Vec<Vec<Run>> = Vec::new();
    let mut left = 0;
    for run in runs {
        let mut slot_first = run.slot_first;
        while slot_first < run.slot_end {
            if left == 0 || portions.last().is_none_or(|portion| portion.len() == RUNS_MAX) {
                portions.push(Vec::new());
                left = slots_max;
            }
            let slot_end = run.slot_end.min(slot_first.saturating_add(left));
            portions.last_mut().expect("pushed above").push(Run { slot_first, slot_end, ..*run });
            // Whole steps are used up, so that the next run begins at a step again.
            left -= (slot_end - slot_first).next_multiple_of(SLOT_STEP).min(left);
            slot_first = slot_end;
        }
    }
    portions
}

fn receive<T>(answer: &Receiver<Result<T, EngineError>>) -> Result<T, EngineError> {
    answer.recv().unwrap_or_else(|_| Err(thread_ended()))
}

fn thread_ended() -> EngineError {
    EngineError::DeviceLost { reason: "the thread that owns the device has ended".to_owned() }
}
