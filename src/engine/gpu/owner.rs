//! The one thread that owns the device.
//!
//! Takes commands from a bounded channel and answers each through its own. A lost device is a
//! state, not an end: the command that met it is answered with the error, the device is dropped
//! and opened anew, and from then on commands of the old generation are refused, because the new
//! device is empty. Does not know blocks, views or floors.
//!
//! Invariant: a command of generation `g` only ever touches the device of generation `g`.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;
use zeroize::Zeroizing;

use super::adapter::AdapterChoice;
use super::device::{Batch, Device, LivePiece, Report, Sizes};
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
    /// Writes row bytes from a slot on.
    WriteRows { slab: usize, slot: u32, bytes: Zeroizing<Vec<u8>>, reply: Reply<()> },
    /// Writes live words.
    WriteLive { pieces: Vec<LivePiece>, reply: Reply<()> },
    /// Zeroes runs of rows.
    ZeroRows { runs: Vec<(usize, Range<u32>)>, reply: Reply<()> },
    /// Sifts a batch.
    Run { batch: Box<Batch>, reply: Reply<Report> },
    /// Reads rows back, for checks.
    ReadRows { slab: usize, slot: u32, count: u32, reply: Reply<Vec<u8>> },
    /// Opens the device again if there is none.
    Ensure(Reply<()>),
    /// Gives up the device and all it holds.
    Abandon(Reply<()>),
    /// Ends the device as a driver failure would, for tests.
    Destroy(Reply<()>),
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
    /// Whether f16 subnormals keep their value.
    pub f16_subnormals_kept: bool,
    /// Bytes of rows a slab may have.
    pub slab_bytes_max: u64,
    /// Products a batch may ask for at once.
    pub work_max: u64,
}

/// The thread's own state.
pub(super) struct Owner {
    choice: AdapterChoice,
    sizes: Sizes,
    device: Option<Device>,
    standing: Arc<Standing>,
}

impl Owner {
    /// Opens the first device.
    ///
    /// # Errors
    /// [`EngineError::NoAdapter`].
    pub(super) fn open(choice: AdapterChoice, sizes: Sizes, standing: Arc<Standing>) -> Result<Self, EngineError> {
        let mut owner = Self { choice, sizes, device: None, standing };
        owner.reopen()?;
        Ok(owner)
    }

    /// Serves until every sender is gone.
    pub(super) fn serve(mut self, commands: &Receiver<Command>) {
        for command in commands {
            self.act(command);
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
        match action {
            Action::Clear(reply) => self.answer(generation, &reply, |device| device.clear()),
            Action::AddSlab { slots, dim, reply } => {
                self.answer(generation, &reply, |device| device.add_slab(slots, dim));
            }
            Action::WriteRows { slab, slot, bytes, reply } => {
                self.answer(generation, &reply, |device| device.write_rows(slab, slot, &bytes));
            }
            Action::WriteLive { pieces, reply } => {
                self.answer(generation, &reply, |device| device.write_live(&pieces));
            }
            Action::ZeroRows { runs, reply } => {
                self.answer(generation, &reply, |device| device.zero_rows(&runs));
            }
            Action::Run { batch, reply } => {
                self.answer(generation, &reply, |device| device.run(&batch));
            }
            Action::ReadRows { slab, slot, count, reply } => {
                self.answer(generation, &reply, |device| device.read_rows(slab, slot, count));
            }
            Action::Destroy(reply) => self.answer(generation, &reply, |device| {
                device.destroy();
                Ok(())
            }),
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

    /// Runs `work` on the device of `generation` and answers. If that loses the device, answers
    /// first and then opens it anew.
    fn answer<T>(
        &mut self,
        generation: u64,
        reply: &Reply<T>,
        work: impl FnOnce(&mut Device) -> Result<T, EngineError>,
    ) {
        let current = self.standing.generation.load(Ordering::Acquire);
        let Some(device) = self.device.as_mut().filter(|_| current == generation) else {
            send(reply, Err(EngineError::Rebuilding));
            return;
        };
        // wgpu panics where a driver fails in a way it has no error for.
        let result = catch_unwind(AssertUnwindSafe(|| work(device)))
            .unwrap_or_else(|panic| Err(EngineError::DeviceLost { reason: panic_words(panic.as_ref()) }));
        let lost = matches!(result, Err(EngineError::DeviceLost { .. }));
        if lost {
            self.standing.open.store(false, Ordering::Release);
        }
        if let Err(error) = &result {
            tracing::warn!(%error, "GPU command failed");
        }
        send(reply, result);
        if lost {
            self.drop_device();
            if let Err(error) = self.reopen() {
                tracing::error!(%error, "GPU device could not be opened again");
            }
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
            f16_subnormals_kept: device.f16_subnormals_kept(),
            slab_bytes_max: device.slab_bytes_max(),
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
