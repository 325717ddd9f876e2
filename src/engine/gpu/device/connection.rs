//! An open wgpu device with its queue, and whether anything went wrong behind wgpu's back.
//!
//! Cheap to clone: whoever waits for a batch has a clone, and needs no lock. Also what every transfer
//! shares: a staging buffer is mapped, filled, copied from, mapped again and overwritten with zeros.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::engine::EngineError;

/// How long a submission may take before the device counts as hung.
const SUBMISSION_TIME_MAX: Duration = Duration::from_secs(60);

/// The first error that wgpu reported outside a call.
#[derive(Default)]
struct Fault {
    raised: AtomicBool,
    message: Mutex<Option<String>>,
}

impl Fault {
    fn raise(&self, message: String) {
        self.message.lock().get_or_insert(message);
        self.raised.store(true, Ordering::Release);
    }
}

/// See the module's page.
#[derive(Clone)]
pub(crate) struct Connection {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    fault: Arc<Fault>,
}

impl Connection {
    pub(crate) fn new(device: wgpu::Device, queue: wgpu::Queue) -> Self {
        let fault = Arc::new(Fault::default());
        let on_error = Arc::clone(&fault);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| on_error.raise(error.to_string())));
        let on_loss = Arc::clone(&fault);
        device.set_device_lost_callback(move |reason, message| {
            // wgpu also calls this when the last handle is dropped, when nobody asks any more.
            on_loss.raise(format!("{reason:?}: {message}"));
        });
        Self { device, queue, fault }
    }

    pub(crate) fn buffer(&self, label: &str, size: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false };
        self.device.create_buffer(&descriptor)
    }

    /// A buffer that is mapped for writing, for [`Connection::stage`].
    pub(crate) fn staging_buffer(&self, label: &str, size: u64) -> wgpu::Buffer {
        let usage = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC;
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: true };
        self.device.create_buffer(&descriptor)
    }

    /// What `create` returns, unless the device has no memory for it.
    ///
    /// # Errors
    /// [`EngineError::OutOfDeviceMemory`]; the device stays usable.
    pub(crate) fn allocate<T>(&self, needed_bytes: u64, create: impl FnOnce() -> T) -> Result<T, EngineError> {
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let created = create();
        match pollster::block_on(scope.pop()) {
            None => Ok(created),
            Some(error) => Err(EngineError::OutOfDeviceMemory { needed_bytes, reason: error.to_string() }),
        }
    }

    pub(crate) fn encoder(&self) -> wgpu::CommandEncoder {
        self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None })
    }

    /// Copies the pieces one after the other into a mapped staging buffer and hands it to the device, if
    /// there is anything to copy. Returns the number of bytes. [`Connection::unstage`] takes it back.
    pub(crate) fn stage(&self, staging: &wgpu::Buffer, pieces: &[&[u8]]) -> Result<usize, EngineError> {
        let mut at = 0;
        {
            let mut view = staging.get_mapped_range_mut(..).map_err(|e| self.lost(&e.to_string()))?;
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
    pub(crate) fn unstage(&self, staging: &wgpu::Buffer, staged_bytes: usize) -> Result<(), EngineError> {
        if staged_bytes > 0 {
            let mut view = staging.get_mapped_range_mut(..).map_err(|e| self.lost(&e.to_string()))?;
            view.slice(..staged_bytes).fill(0);
        }
        Ok(())
    }

    /// Submits commands, and asks for a range of a buffer to be mapped once they are done.
    pub(crate) fn submit(
        &self,
        encoder: wgpu::CommandEncoder,
        mappings: &[(&wgpu::Buffer, wgpu::MapMode, u64)],
    ) -> Submission {
        let index = self.queue.submit([encoder.finish()]);
        let mapping_failed = Arc::new(AtomicBool::new(false));
        for (buffer, mode, bytes) in mappings.iter().filter(|(.., bytes)| *bytes > 0) {
            let failed = Arc::clone(&mapping_failed);
            buffer.map_async(*mode, ..*bytes, move |result| {
                if result.is_err() {
                    failed.store(true, Ordering::Release);
                }
            });
        }
        Submission { index, mapping_failed }
    }

    /// Waits for a submission and its mappings.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(crate) fn wait(&self, submission: Submission) -> Result<(), EngineError> {
        let poll =
            wgpu::PollType::Wait { submission_index: Some(submission.index), timeout: Some(SUBMISSION_TIME_MAX) };
        self.device.poll(poll).map_err(|e| self.lost(&e.to_string()))?;
        self.check()?;
        if submission.mapping_failed.load(Ordering::Acquire) {
            return Err(self.lost("a buffer could not be mapped"));
        }
        Ok(())
    }

    /// Reads from a mapped buffer and unmaps it.
    pub(crate) fn read<T>(
        &self,
        buffer: &wgpu::Buffer,
        bytes: u64,
        read: impl FnOnce(&[u8]) -> T,
    ) -> Result<T, EngineError> {
        let view = buffer.get_mapped_range(..bytes).map_err(|e| self.lost(&e.to_string()))?;
        let result = read(&view);
        drop(view);
        buffer.unmap();
        Ok(result)
    }

    /// Whether wgpu reported anything since the device was opened.
    pub(crate) fn check(&self) -> Result<(), EngineError> {
        if self.fault.raised.load(Ordering::Acquire) {
            return Err(self.lost("no reason given"));
        }
        Ok(())
    }

    fn lost(&self, message: &str) -> EngineError {
        let noted = self.fault.message.lock().clone();
        EngineError::DeviceLost { reason: noted.unwrap_or_else(|| message.to_owned()) }
    }
}

/// Commands that the device was given.
pub(crate) struct Submission {
    index: wgpu::SubmissionIndex,
    mapping_failed: Arc<AtomicBool>,
}
