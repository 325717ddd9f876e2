//! The one thread that owns the device.
//!
//! Takes commands from a bounded channel and answers each through its own. A lost device is a
//! state, not an end: the command that met it is answered with the error, the device is dropped
//! and opened anew, and from then on commands of the old generation are refused, because the new
//! device is empty. Does not know blocks, views or floors.
//!
//! Batches are submitted as long as the device has room and collected when nothing else is asked
//! for, so that it computes one while another is read.
//!
//! Invariants: a command of generation `g` only ever touches the device of generation `g`; commands
//! take effect in the order in which they came.

use std::collections::VecDeque;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use parking_lot::Mutex;

use super::adapter::AdapterChoice;
use super::card::CardCodes;
use super::device::{Batch, Device, LivePiece, Report, Sizes};
use super::kernels::Side;
use crate::engine::EngineError;

/// Answers to a command.
pub(super) type Reply<T> = Sender<Result<T, EngineError>>;

/// What the owner is asked to do to the device of a generation.
pub(super) struct Command {
    /// The generation it is meant for.
    pub generation: u64,
    /// What to do.
    pub action: Action,
}

/// See the methods of [`Device`] of the same names.
pub(super) enum Action {
    /// Frees every slab.
    Clear(Reply<()>),
    /// Adds a slab of so many slots of rows of so many components.
    AddSlab { slots: u32, dim: usize, reply: Reply<()> },
    /// Writes codes of whole blocks from a slot on.
    WriteCodes { slab: usize, slot: u32, codes: Box<CardCodes>, reply: Reply<()> },
    /// Writes live words.
    WriteLive { pieces: Vec<LivePiece>, reply: Reply<()> },
    /// Zeroes runs of rows.
    ZeroRows { runs: Vec<(usize, Range<u32>)>, reply: Reply<()> },
    /// Sifts a batch: submitted at once, answered when it is done.
    Run { batch: Box<Batch>, reply: Reply<Report> },
    /// Reads a row's codes back, for checks.
    ReadRow { slab: usize, slot: u32, reply: Reply<Vec<u8>> },
    /// Times copies of memory, for reports.
    CopyRate(Reply<f64>),
    /// Opens the device again if there is none.
    Ensure(Reply<()>),
    /// Gives up the device and all it holds.
    Abandon(Reply<()>),
    /// Ends the device as a driver failure would, for tests.
    Destroy(Reply<()>),
    /// Ends the thread as a bug would, for tests.
    #[cfg(test)]
    Panic(Reply<()>),
}

/// What everyone may know of the device.
#[derive(Default)]
pub(super) struct Standing {
    /// Counts devices; the first is 1.
    pub generation: AtomicU64,
    /// Whether there is a device.
    pub open: AtomicBool,
    /// Bytes on the device.
    pub device_bytes: AtomicU64,
    /// Bytes in main memory.
    pub host_bytes: AtomicU64,
    /// Facts about the device, as of when it was opened.
    pub facts: Mutex<Facts>,
}

/// What a device is, fixed while it is open.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    /// Name, driver and backend of the adapter.
    pub description: String,
    /// Bytes that a buffer of a slab may have.
    pub buffer_bytes_max: u64,
    /// Places for candidates in one batch.
    pub entries_max: u32,
    /// The cooperative matrices in use.
    pub coop: Option<Side>,
    /// Products a batch may ask for at once.
    pub work_max: u64,
}

/// The thread's own state.
pub(super) struct Owner {
    choice: AdapterChoice,
    sizes: Sizes,
    device: Option<Device>,
    /// Who waits for the batches on the device, the oldest first.
    waiting: VecDeque<Reply<Report>>,
    standing: Arc<Standing>,
}

impl Owner {
    /// Opens the first device.
    ///
    /// # Errors
    /// [`EngineError::NoAdapter`].
    pub(super) fn open(choice: AdapterChoice, sizes: Sizes, standing: Arc<Standing>) -> Result<Self, EngineError> {
        let mut owner = Self { choice, sizes, device: None, waiting: VecDeque::new(), standing };
        owner.reopen()?;
        Ok(owner)
    }

    /// Serves until every sender is gone.
    pub(super) fn serve(mut self, commands: &Receiver<Command>) {
        loop {
            let next = if self.waiting.is_empty() {
                commands.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                commands.try_recv()
            };
            match next {
                Ok(command) => self.act(command),
                Err(_) if !self.waiting.is_empty() => self.collect(),
                Err(_) => break,
            }
            if let Some(device) = &self.device {
                self.standing.device_bytes.store(device.device_bytes(), Ordering::Relaxed);
            }
        }
        // Memory goes back to the driver zeroed. If the device fails now, nobody is left to tell.
        if let Some(device) = &mut self.device {
            let _closing = catch_unwind(AssertUnwindSafe(|| device.clear()));
        }
        self.drop_device();
    }

    fn act(&mut self, Command { generation, action }: Command) {
        if !matches!(action, Action::Run { .. }) {
            // What was submitted before is done before.
            while !self.waiting.is_empty() {
                self.collect();
            }
        }
        match action {
            Action::Clear(reply) => self.answer(generation, &reply, |device| device.clear()),
            Action::AddSlab { slots, dim, reply } => {
                self.answer(generation, &reply, |device| device.add_slab(slots, dim));
            }
            Action::WriteCodes { slab, slot, codes, reply } => {
                self.answer(generation, &reply, |device| device.write_codes(slab, slot, &codes));
            }
            Action::WriteLive { pieces, reply } => {
                self.answer(generation, &reply, |device| device.write_live(&pieces));
            }
            Action::ZeroRows { runs, reply } => {
                self.answer(generation, &reply, |device| device.zero_rows(&runs));
            }
            Action::Run { batch, reply } => self.submit(generation, &batch, reply),
            Action::ReadRow { slab, slot, reply } => {
                self.answer(generation, &reply, |device| device.read_row(slab, slot));
            }
            Action::CopyRate(reply) => self.answer(generation, &reply, Device::copy_rate),
            Action::Destroy(reply) => self.answer(generation, &reply, |device| {
                device.destroy();
                Ok(())
            }),
            #[cfg(test)]
            Action::Panic(unanswered) => {
                drop(unanswered);
                panic!("on purpose");
            }
            Action::Abandon(reply) => {
                if self.standing.generation.load(Ordering::Acquire) == generation {
                    self.drop_device();
                }
                send(&reply, Ok(()));
            }
            Action::Ensure(reply) => {
                let opened = if self.device.is_some() { Ok(()) } else { self.reopen() };
                send(&reply, opened);
            }
        }
    }

    /// Puts a batch on the device, after the oldest one if there is no room; [`Self::collect`] answers.
    fn submit(&mut self, generation: u64, batch: &Batch, reply: Reply<Report>) {
        if self.device.as_ref().is_some_and(|device| !device.has_room()) {
            self.collect();
        }
        match self.attempt(generation, |device| device.submit(batch)) {
            Ok(()) => self.waiting.push_back(reply),
            Err(error) => self.fail(&reply, error),
        }
    }

    /// Waits for the oldest batch on the device and answers who asked for it.
    fn collect(&mut self) {
        let reply = self.waiting.pop_front().expect("a batch is under way");
        let generation = self.standing.generation.load(Ordering::Acquire);
        match self.attempt(generation, Device::collect) {
            Ok(report) => send(&reply, Ok(report)),
            Err(error) => self.fail(&reply, error),
        }
    }

    /// Runs `work` on the device of `generation` and answers.
    fn answer<T>(
        &mut self,
        generation: u64,
        reply: &Reply<T>,
        work: impl FnOnce(&mut Device) -> Result<T, EngineError>,
    ) {
        match self.attempt(generation, work) {
            Ok(done) => send(reply, Ok(done)),
            Err(error) => self.fail(reply, error),
        }
    }

    /// Runs `work` on the device of `generation`.
    fn attempt<T>(
        &mut self,
        generation: u64,
        work: impl FnOnce(&mut Device) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let current = self.standing.generation.load(Ordering::Acquire);
        let device = self.device.as_mut().filter(|_| current == generation).ok_or(EngineError::Rebuilding)?;
        // wgpu panics where a driver fails in a way it has no error for.
        catch_unwind(AssertUnwindSafe(|| work(device)))
            .unwrap_or_else(|panic| Err(EngineError::DeviceLost { reason: panic_words(panic.as_ref()) }))
    }

    /// Answers with an error. If the device was lost, answers all who wait for it too, and then opens
    /// it anew.
    fn fail<T>(&mut self, reply: &Reply<T>, error: EngineError) {
        if matches!(error, EngineError::Rebuilding) {
            return send(reply, Err(error));
        }
        tracing::warn!(%error, "GPU command failed");
        let lost = match &error {
            EngineError::DeviceLost { reason } => Some(reason.clone()),
            _ => None,
        };
        if lost.is_some() {
            self.standing.open.store(false, Ordering::Release);
        }
        send(reply, Err(error));
        let Some(reason) = lost else { return };
        for reply in self.waiting.drain(..) {
            send(&reply, Err(EngineError::DeviceLost { reason: reason.clone() }));
        }
        self.drop_device();
        if let Err(error) = self.reopen() {
            tracing::error!(%error, "GPU device could not be opened again");
        }
    }

    fn drop_device(&mut self) {
        self.standing.open.store(false, Ordering::Release);
        self.standing.device_bytes.store(0, Ordering::Relaxed);
        let device = self.device.take();
        if catch_unwind(AssertUnwindSafe(|| drop(device))).is_err() {
            tracing::error!("the driver failed while its device was closed");
        }
    }

    fn reopen(&mut self) -> Result<(), EngineError> {
        let opened = catch_unwind(AssertUnwindSafe(|| Device::open(&self.choice, &self.sizes)));
        let device =
            opened.unwrap_or_else(|panic| Err(EngineError::NoAdapter { reason: panic_words(panic.as_ref()) }))?;
        let standing = &self.standing;
        *standing.facts.lock() = Facts {
            description: device.description().to_owned(),
            buffer_bytes_max: device.buffer_bytes_max(),
            entries_max: device.entries_max(),
            coop: device.coop(),
            work_max: device.work_max(),
        };
        standing.device_bytes.store(device.device_bytes(), Ordering::Relaxed);
        standing.host_bytes.store(device.host_bytes(), Ordering::Relaxed);
        self.device = Some(device);
        standing.generation.fetch_add(1, Ordering::AcqRel);
        standing.open.store(true, Ordering::Release);
        Ok(())
    }
}

/// Answers; whoever asked may have stopped waiting.
fn send<T>(reply: &Reply<T>, result: Result<T, EngineError>) {
    let _gone = reply.send(result);
}

fn panic_words(panic: &(dyn std::any::Any + Send)) -> String {
    let words = panic.downcast_ref::<String>().map(String::as_str);
    let words = words.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("the driver failed: {}", words.unwrap_or("no reason given"))
}
