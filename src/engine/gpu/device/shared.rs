//! The device that all threads share: one at a time, with its generation, and what follows its loss.
//!
//! A lost device is a state. Whoever meets the loss gets the error and the device is dropped. Every later
//! call is refused with [`EngineError::Rebuilding`] until [`SharedDevice::ensure_open`] has opened another
//! device, which is empty and has another generation. Does not know segments, views or floors.
//!
//! Calls take the lock one after the other. A batch needs it only while it is submitted: threads wait for
//! their batches without it, so that the device scans one lane's batch while another's is read and compared.
//!
//! Invariants: a call for generation `g` only ever touches the device of generation `g`; the device does
//! what it is given in the order in which it is given.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::batch::{Batch, InFlight, Report};
use super::{Device, DeviceInfo, DeviceOptions};
use crate::engine::EngineError;
use crate::engine::gpu::adapter::AdapterChoice;

/// See the module's page.
pub(crate) struct SharedDevice {
    choice: AdapterChoice,
    options: DeviceOptions,
    state: Mutex<State>,
    /// Signalled when a lane becomes idle and when the device is lost.
    lane_idle: Condvar,
    /// Generation of the open device, 0 if none is open. Written under the lock.
    generation: AtomicU64,
    device_bytes: AtomicU64,
    host_bytes: AtomicU64,
    info: Mutex<Arc<DeviceInfo>>,
}

#[derive(Default)]
struct State {
    device: Option<Device>,
    /// Devices opened so far.
    opened: u64,
}

impl SharedDevice {
    /// Opens the first device.
    ///
    /// # Errors
    /// [`EngineError::NoAdapter`].
    pub(crate) fn open(choice: AdapterChoice, options: DeviceOptions) -> Result<Self, EngineError> {
        let shared = Self {
            choice,
            options,
            state: Mutex::default(),
            lane_idle: Condvar::new(),
            generation: AtomicU64::new(0),
            device_bytes: AtomicU64::new(0),
            host_bytes: AtomicU64::new(0),
            info: Mutex::default(),
        };
        shared.ensure_open()?;
        Ok(shared)
    }

    /// Whether the device of that generation is open.
    pub(crate) fn is_open(&self, generation: u64) -> bool {
        generation > 0 && self.generation.load(Ordering::Acquire) == generation
    }

    /// Generation of the open device, 0 if none is open.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Bytes in buffers on the device, and in main memory.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        (self.device_bytes.load(Ordering::Relaxed), self.host_bytes.load(Ordering::Relaxed))
    }

    /// What the device is that was opened last.
    pub(crate) fn info(&self) -> Arc<DeviceInfo> {
        Arc::clone(&self.info.lock())
    }

    /// Opens a device if none is open, and returns the generation of the open one.
    ///
    /// # Errors
    /// [`EngineError::NoAdapter`].
    pub(crate) fn ensure_open(&self) -> Result<u64, EngineError> {
        let mut state = self.state.lock();
        if state.device.is_none() {
            let device = catch_unwind(AssertUnwindSafe(|| Device::open(&self.choice, &self.options)))
                .unwrap_or_else(|panic| Err(EngineError::NoAdapter { reason: panic_message(&*panic) }))?;
            *self.info.lock() = Arc::new(device.info().clone());
            self.device_bytes.store(device.device_bytes(), Ordering::Relaxed);
            self.host_bytes.store(device.host_bytes(), Ordering::Relaxed);
            state.device = Some(device);
            state.opened += 1;
            self.generation.store(state.opened, Ordering::Release);
        }
        Ok(state.opened)
    }

    /// Does `work` with the device of `generation`.
    ///
    /// # Errors
    /// Those of `work`; [`EngineError::Rebuilding`] if the device of that generation is not open.
    pub(crate) fn with<T>(
        &self,
        generation: u64,
        work: impl FnOnce(&mut Device) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        self.attempt(&mut self.state.lock(), generation, work)
    }

    /// Submits a batch. If all lanes are in use, returns none, or waits if `wait` is set. A thread that has
    /// batches in flight itself must not wait: their lanes may be the ones it waits for.
    ///
    /// # Errors
    /// As [`SharedDevice::with`]; [`EngineError::DeviceLost`].
    pub(crate) fn submit(&self, generation: u64, batch: &Batch, wait: bool) -> Result<Option<InFlight>, EngineError> {
        let mut state = self.state.lock();
        while self.is_open(generation) && state.device.as_ref().is_some_and(|device| !device.has_idle_lane()) {
            if !wait {
                return Ok(None);
            }
            self.lane_idle.wait(&mut state);
        }
        self.attempt(&mut state, generation, |device| device.submit(batch)).map(Some)
    }

    /// Waits for a batch that was submitted to the device of `generation`.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(crate) fn collect(&self, generation: u64, in_flight: InFlight) -> Result<Report, EngineError> {
        let collected = guarded(|| in_flight.collect());
        let mut state = self.state.lock();
        match collected {
            Ok((report, lane)) => {
                if self.is_open(generation)
                    && let Some(device) = &mut state.device
                {
                    device.return_lane(lane);
                    self.lane_idle.notify_one();
                }
                Ok(report)
            }
            Err(error) => Err(self.failed(&mut state, generation, error)),
        }
    }

    /// Drops the device of `generation` and all it holds, if it is still open.
    pub(crate) fn abandon(&self, generation: u64) {
        let mut state = self.state.lock();
        if self.is_open(generation) {
            self.drop_device(&mut state);
        }
    }

    fn attempt<T>(
        &self,
        state: &mut MutexGuard<'_, State>,
        generation: u64,
        work: impl FnOnce(&mut Device) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let device = state.device.as_mut().filter(|_| self.is_open(generation)).ok_or(EngineError::Rebuilding)?;
        let done = guarded(|| work(device));
        self.device_bytes.store(device.device_bytes(), Ordering::Relaxed);
        done.map_err(|error| self.failed(state, generation, error))
    }

    /// Drops the device if `error` says that it is lost.
    fn failed(&self, state: &mut MutexGuard<'_, State>, generation: u64, error: EngineError) -> EngineError {
        tracing::warn!(%error, "GPU command failed");
        if matches!(error, EngineError::DeviceLost { .. }) && self.is_open(generation) {
            self.drop_device(state);
        }
        error
    }

    fn drop_device(&self, state: &mut MutexGuard<'_, State>) {
        self.generation.store(0, Ordering::Release);
        self.device_bytes.store(0, Ordering::Relaxed);
        let device = state.device.take();
        // Threads that wait for a batch have handles of it, which must not keep its memory.
        let dropped = catch_unwind(AssertUnwindSafe(|| device.map(|device| device.destroy())));
        if dropped.is_err() {
            tracing::error!("the driver failed while its device was closed");
        }
        self.lane_idle.notify_all();
    }
}

impl Drop for SharedDevice {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        // Memory goes back to the driver zeroed. If the device fails now, nobody is left to tell.
        let _closed = catch_unwind(AssertUnwindSafe(|| {
            if let Some(mut device) = state.device.take() {
                let _lost = device.clear();
            }
        }));
    }
}

/// Does `work`. wgpu panics if a driver fails in a way for which it has no error.
fn guarded<T>(work: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(EngineError::DeviceLost { reason: panic_message(&*panic) }))
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let message = panic.downcast_ref::<String>().map(String::as_str);
    let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("the driver failed: {}", message.unwrap_or("no reason given"))
}
