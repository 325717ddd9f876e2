//! The GPU engine: every row of the gallery resident on a graphics device, sifted exhaustively.
//!
//! Kernels in WGSL score f16 rows against f32 probes and report the pairs that reach a floor less
//! the proven slack of their arithmetic; the host turns slots into rows. Knows rows, live bits and
//! numbers; the only home of wgpu. Does not know subjects, policies, files or transports.
//!
//! - `adapter`: which device. `device`: its buffers and commands. `owner`: the thread it
//!   lives on. `kernels`: the shaders and their sizes. `selftest`: whether it computes rightly.
//! - `resident`: where each row lies. `sifting`: in which order, with which floors.
//!   `slack`: how far a device score may be off.
//!
//! Invariants: a sift is only answered if the device holds every row of its view; a lost device is
//! an error and then an empty device, never a panic or a wrong answer; rows given up are zeroed.

mod adapter;
mod device;
mod kernels;
mod owner;
mod resident;
mod selftest;
mod sift_few;
mod sift_many;
mod sifting;
mod slack;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::RwLock;
use zeroize::Zeroizing;

pub use adapter::{AdapterChoice, AdapterSummary, available_adapters};

use self::device::{Batch, RUNS_MAX, Report, Run, STAGING_BYTES, Sizes};
use self::kernels::{Bar, Kernel, PROBES_MAX, SLOT_STEP};
use self::owner::{Action, Command, Facts, Owner, Reply, Standing};
use self::resident::{Resident, piece};
use super::{Engine, EngineDescription, EngineError, GalleryView, SiftRequest, Survivors};

/// Commands that may wait for the device.
const COMMANDS_MAX: usize = 16;
/// Uploads that may wait for the device, each of at most [`STAGING_BYTES`].
const UPLOADS_MAX: usize = 2;
/// A follow that uploads more than this does not let searches wait for it.
const QUICK_FOLLOW_BYTES: u64 = 64 << 20;

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
        Self::with_sizes(choice, Sizes::default())
    }

    fn with_sizes(choice: AdapterChoice, sizes: Sizes) -> Result<Self, EngineError> {
        let standing = Arc::new(Standing::default());
        let (commands, to_do) = bounded::<Command>(COMMANDS_MAX);
        let (opened, is_open) = bounded(1);
        let of_thread = Arc::clone(&standing);
        let thread = std::thread::Builder::new().name("gpu-owner".to_owned()).spawn(move || {
            match Owner::open(choice, sizes, of_thread) {
                Ok(owner) => {
                    if opened.send(Ok(())).is_ok() {
                        owner.serve(&to_do);
                    }
                }
                Err(error) => {
                    let _gone = opened.send(Err(error));
                }
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

    /// Ends the device as a driver failure would, so that recovery can be tested.
    #[doc(hidden)]
    pub fn lose_device(&self) -> Result<(), EngineError> {
        self.call(self.generation(), Action::Destroy)
    }

    /// The resident copy of a row, if there is one, read back from the device.
    #[doc(hidden)]
    pub fn resident_row(&self, row: u32) -> Result<Option<Vec<u8>>, EngineError> {
        let resident = self.resident.read();
        let Some((slab, slot)) = resident.slot_of(row) else {
            return Ok(None);
        };
        let read = |reply| Action::ReadRows { slab, slot, count: 1, reply };
        self.call(resident.generation, read).map(Some)
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
        let rows_max = u32::try_from(STAGING_BYTES / (view.dim * 2)).expect("the staging buffer is small");
        for placement in placements {
            let mut first = placement.rows.start;
            while first < placement.rows.end {
                let end = placement.rows.end.min(first + rows_max);
                let rows = &view.blocks[placement.block].rows[first as usize * view.dim..end as usize * view.dim];
                let bytes = Zeroizing::new(bytemuck::cast_slice(rows).to_vec());
                let (slab, slot) = (placement.slab, placement.slot + (first - placement.rows.start));
                let write = |reply| Action::WriteRows { slab, slot, bytes, reply };
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
        let row_bytes = resident.dim as u64 * 2;
        let slots_max = self.standing.facts.lock().slab_bytes_max / row_bytes;
        let slots_max = u32::try_from(slots_max).unwrap_or(u32::MAX) / SLOT_STEP * SLOT_STEP;
        let left = (u32::MAX - resident.slots()) / SLOT_STEP * SLOT_STEP;
        let most = slots_max.min(left);
        if most == 0 {
            return Err(EngineError::OutOfDeviceMemory {
                needed_bytes: u64::from(SLOT_STEP) * row_bytes,
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

    /// Runs one batch over the used slots of a range.
    fn run(
        &self,
        resident: &Resident,
        request: &SiftRequest<'_>,
        numbers: &[usize],
        bars: &[Bar],
        slots: &Range<u32>,
    ) -> Result<Report, EngineError> {
        let dim = resident.dim;
        let kernel = Kernel::for_batch(numbers.len());
        let mut probes = Zeroizing::new(Vec::with_capacity(numbers.len() * dim));
        for &number in numbers {
            probes.extend_from_slice(&request.probes[number * dim..][..dim]);
        }
        let packed = kernel.pack(&probes, dim);
        let mut bars = bars.to_vec();
        bars.resize(kernel.padded(numbers.len()), Bar::CLOSED);
        let mut whole = Report { counts: vec![0; numbers.len()], ..Report::default() };
        let work_max = self.standing.facts.lock().work_max;
        let slots_max = work_max / (kernel.padded(numbers.len()) * dim) as u64;
        for runs in portions(&resident.runs(slots), slots_max) {
            let batch =
                Box::new(Batch { dim, probes: numbers.len(), packed: packed.clone(), bars: bars.clone(), runs });
            let report = self.call(resident.generation, |reply| Action::Run { batch, reply })?;
            whole.entries.extend(report.entries);
            whole.counts.iter_mut().zip(&report.counts).for_each(|(sum, count)| *sum += count);
            if let Some(time) = report.device_time {
                *whole.device_time.get_or_insert_default() += time;
            }
        }
        Ok(whole)
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

    fn sift(
        &self,
        view: &GalleryView<'_>,
        request: &SiftRequest<'_>,
        survivors: &mut Survivors,
    ) -> Result<(), EngineError> {
        let count = request.floors.len();
        assert!(request.probes.len() == count * view.dim && request.keep.len() == count);
        if request.filters.iter().any(Option::is_some) {
            return self.sift_filtered(view, request, survivors);
        }
        survivors.reset(count);
        if count == 0 || view.blocks.iter().all(|block| block.rows.is_empty()) {
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
        let Facts { f16_subnormals_kept, .. } = *self.standing.facts.lock();
        let rows_of = resident.rows_of(view);
        let field = sifting::Field {
            slots: resident.slots(),
            dim: view.dim,
            f16_subnormals_kept,
            live_row: &|slot| rows_of.live_row(slot),
        };
        let mut run =
            |numbers: &[usize], bars: &[Bar], slots: &Range<u32>| self.run(&resident, request, numbers, bars, slots);
        for first in (0..count).step_by(PROBES_MAX) {
            let batch = first..count.min(first + PROBES_MAX);
            sifting::sift(&field, request, batch, &mut run, survivors)?;
        }
        Ok(())
    }
}

impl GpuEngine {
    /// The device knows no filters: a probe that has one gets everything from its floor up, and
    /// what the filter holds back is taken out here. Rows that are filtered out must not raise a
    /// floor, so such a probe keeps nothing.
    fn sift_filtered(
        &self,
        view: &GalleryView<'_>,
        request: &SiftRequest<'_>,
        survivors: &mut Survivors,
    ) -> Result<(), EngineError> {
        let filter = |probe: usize| request.filters.get(probe).copied().flatten();
        let keep: Vec<u32> =
            (0..request.keep.len()).map(|p| if filter(p).is_some() { 0 } else { request.keep[p] }).collect();
        let unfiltered = SiftRequest {
            probes: request.probes,
            floors: request.floors,
            keep: &keep,
            survivors_max: request.survivors_max,
            certificate: request.certificate,
            filters: &[],
        };
        self.sift(view, &unfiltered, survivors)?;
        for (probe, rows) in survivors.rows.iter_mut().enumerate() {
            if let Some(filter) = filter(probe) {
                rows.retain(|row| filter.contains(*row));
            }
        }
        Ok(())
    }
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
