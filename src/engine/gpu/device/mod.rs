//! One graphics device with its slabs of codes: uploads, zeroes, runs kernels, reads back.
//!
//! - `shared`: the device that threads share, its generation and its loss. `connection`: wgpu's handles.
//! - `slabs`: codes and factors of row slots. `layout`: how codes and probes lie there.
//! - `batch`: one batch of probes on the device. `bindings`: the structs that host and kernels share.
//! - `kernels`: the shaders and their sizes. `kernel_cache`: compiled kernels on disk. `self_test`: whether
//!   the device computes what the kernels say.
//!
//! Knows slots and bytes. Does not know segments, views or floors.
//!
//! Invariants: code and probe bytes reach the device only through staging buffers, which are overwritten
//! with zeros after each use, and through the probe buffers, which are cleared at the end of each batch.
//! After any [`EngineError::DeviceLost`] the device is to be dropped.

pub(crate) mod batch;
pub(crate) mod bindings;
mod connection;
mod kernel_cache;
pub(crate) mod kernels;
pub(crate) mod layout;
pub(crate) mod self_test;
pub(crate) mod shared;
mod slabs;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use thenar_index::codes::BLOCK_ROWS;

use self::batch::Lane;
use self::connection::Connection;
use self::kernel_cache::KernelCache;
use self::kernels::{Kernel, Pipelines, SLOT_STEP};
use self::layout::Level;
use self::slabs::Slab;
use super::adapter::{self, AdapterChoice, AdapterSummary};
use crate::engine::EngineError;
use crate::model::DIM_MAX;

/// Most bytes a buffer of a slab may take, whatever the adapter offers: `vec4<u32>` indices and byte
/// offsets stay far from 2^32.
const BUFFER_BYTES_MAX: u64 = 2 << 30;
/// Bytes of the upload buffer, so of the largest piece that [`Device::write_codes`] takes.
pub(crate) const STAGING_BYTES: usize = 16 << 20;
/// Products of a component of a probe and one of a code that one batch may ask for, not counting the padding
/// of probes. A graphics processor takes a fraction of a second for them, and drivers end what takes much
/// longer; the host compares one batch's pairs while the device scans the next.
const PRODUCTS_MAX: u64 = 1 << 37;
/// The same on a software adapter.
const PRODUCTS_MAX_SOFTWARE: u64 = 1 << 33;
/// Batches that may be on the device at once: while one is read, the next is scanned.
pub(crate) const LANES: usize = 2;

/// How a device is opened. Tests make sizes small.
#[derive(Debug, Clone)]
pub(crate) struct DeviceOptions {
    /// Most bytes of one buffer of a slab.
    pub(crate) buffer_bytes_max: u64,
    /// Places for pairs in one batch.
    pub(crate) entries_max: u32,
    /// Folder of compiled kernels.
    pub(crate) cache: Option<PathBuf>,
    /// Whether cooperative matrices may be used.
    pub(crate) matrices: bool,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self { buffer_bytes_max: BUFFER_BYTES_MAX, entries_max: 1 << 20, cache: None, matrices: true }
    }
}

/// What a device is, fixed while it is open.
#[derive(Debug, Clone, Default)]
pub(crate) struct DeviceInfo {
    /// Name, driver and backend of the adapter.
    pub(crate) adapter: String,
    /// Most bytes of one buffer of a slab.
    pub(crate) buffer_bytes_max: u64,
    /// Places for pairs in one batch.
    pub(crate) entries_max: u32,
    /// Whether cooperative matrices are used.
    pub(crate) matrices: bool,
    /// Products that one batch may ask for.
    pub(crate) products_max: u64,
}

/// See the module's page.
pub(crate) struct Device {
    connection: Connection,
    info: DeviceInfo,
    slab_layout: wgpu::BindGroupLayout,
    pipelines: Pipelines,
    idle_lanes: Vec<Lane>,
    lane_bytes: (u64, u64),
    staging: wgpu::Buffer,
    /// For reading codes back, of one block.
    readback: wgpu::Buffer,
    slabs: Vec<Slab>,
}

impl Device {
    /// Opens the chosen adapter, compiles the kernels and compares them with their twin. An adapter whose
    /// cooperative matrices are wrong or do not compile is opened without them.
    ///
    /// # Errors
    /// [`EngineError::NoAdapter`] if there is none, it cannot be opened or it computes wrongly.
    pub(crate) fn open(choice: &AdapterChoice, options: &DeviceOptions) -> Result<Self, EngineError> {
        let adapter = adapter::choose(choice)?;
        if options.matrices && adapter::has_matrices(&adapter) {
            match Self::open_with(&adapter, options, true) {
                Ok(device) => return Ok(device),
                Err(error) => tracing::warn!(%error, "cooperative matrices are not used"),
            }
            return Self::open_with(&adapter::choose(choice)?, options, false);
        }
        Self::open_with(&adapter, options, false)
    }

    fn open_with(adapter: &wgpu::Adapter, options: &DeviceOptions, matrices: bool) -> Result<Self, EngineError> {
        assert!(options.entries_max >= SLOT_STEP, "the smallest slice must fit");
        let adapter_info = adapter.get_info();
        let offered = adapter.limits();
        let buffer_bytes_max = options
            .buffer_bytes_max
            .min(BUFFER_BYTES_MAX)
            .min(offered.max_storage_buffer_binding_size)
            .min(offered.max_buffer_size);
        let is_software = adapter_info.device_type == wgpu::DeviceType::Cpu;
        // The self-test needs its places, even if a test of the engine asks for few.
        let entries_max = options.entries_max.max(self_test::ENTRIES);
        let info = DeviceInfo {
            adapter: AdapterSummary::describe(&adapter_info),
            buffer_bytes_max,
            entries_max,
            matrices,
            products_max: if is_software { PRODUCTS_MAX_SOFTWARE } else { PRODUCTS_MAX },
        };
        let connection = connect(adapter, &info)?;

        let device = &connection.device;
        let slab_layout = kernels::slab_layout(device);
        let batch_layout = kernels::batch_layout(device);
        let cache = KernelCache::open(device, &adapter_info, options.cache.as_deref());
        let pipelines = Pipelines::compile(device, [&slab_layout, &batch_layout], matrices, cache.pipelines());
        let idle_lanes: Vec<Lane> = (0..LANES).map(|_| Lane::new(&connection, &batch_layout, entries_max)).collect();
        let readback_bytes = (layout::row_bytes(DIM_MAX) * BLOCK_ROWS) as u64;
        let mut opened = Self {
            lane_bytes: idle_lanes.iter().fold((0, 0), |sum, lane| {
                let (on_device, on_host) = lane.bytes();
                (sum.0 + on_device, sum.1 + on_host)
            }),
            idle_lanes,
            staging: connection.staging_buffer("staging", STAGING_BYTES as u64),
            readback: connection.buffer(
                "readback",
                readback_bytes,
                wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            ),
            slabs: Vec::new(),
            connection,
            info,
            slab_layout,
            pipelines,
        };
        opened.connection.check()?;
        if let Err(fault) = self_test::run(&mut opened) {
            return Err(EngineError::NoAdapter { reason: format!("{} was refused: {fault}", opened.info.adapter) });
        }
        opened.info.entries_max = options.entries_max;
        cache.save();
        Ok(opened)
    }

    /// What the device is.
    pub(crate) fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The kernels that were compiled.
    pub(crate) fn kernels(&self) -> Vec<(Kernel, Level)> {
        self.pipelines.kernels()
    }

    /// Bytes in buffers on the device.
    pub(crate) fn device_bytes(&self) -> u64 {
        self.slabs.iter().map(Slab::bytes).sum::<u64>() + self.lane_bytes.0
    }

    /// Bytes in buffers in main memory.
    pub(crate) fn host_bytes(&self) -> u64 {
        self.staging.size() + self.readback.size() + self.lane_bytes.1
    }

    /// Ends the device as a driver failure would. Its memory is given back at once.
    pub(crate) fn destroy(&self) {
        self.connection.device.destroy();
    }

    /// Bytes that the device reads and writes per second while it copies memory: a yardstick for scans in
    /// reports.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`]; [`EngineError::OutOfDeviceMemory`] if there is no room for it.
    pub(crate) fn copy_rate(&mut self) -> Result<f64, EngineError> {
        const BYTES: u64 = 256 << 20;
        const COPIES: u32 = 32;
        let size = BYTES.min(self.info.buffer_bytes_max);
        let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        let connection = &self.connection;
        let buffer = || connection.buffer("copied", size, usage);
        let (from, to) = connection.allocate(2 * size, || (buffer(), buffer()))?;
        let mut best = Duration::MAX;
        // The first round makes the driver allocate the memory; the fastest of the others counts.
        for copies in [1, COPIES, COPIES, COPIES] {
            let mut encoder = connection.encoder();
            for nth in 0..copies {
                let (from, to) = if nth % 2 == 0 { (&from, &to) } else { (&to, &from) };
                encoder.copy_buffer_to_buffer(from, 0, to, 0, size);
            }
            let begun = Instant::now();
            connection.wait(connection.submit(encoder, &[]))?;
            if copies == COPIES {
                best = best.min(begun.elapsed());
            }
        }
        Ok(2.0 * size as f64 * f64::from(COPIES) / best.as_secs_f64())
    }
}

/// Opens the device of an adapter with the features and limits that the kernels need.
fn connect(adapter: &wgpu::Adapter, info: &DeviceInfo) -> Result<Connection, EngineError> {
    let defaults = wgpu::Limits::default();
    let mut required_limits = wgpu::Limits {
        max_storage_buffer_binding_size: info.buffer_bytes_max.max(defaults.max_storage_buffer_binding_size),
        max_buffer_size: info.buffer_bytes_max.max(defaults.max_buffer_size),
        ..defaults
    };
    let mut required_features = adapter.features() & (wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::PIPELINE_CACHE);
    let mut experimental_features = wgpu::ExperimentalFeatures::disabled();
    if info.matrices {
        required_limits.max_compute_workgroup_storage_size = adapter::MATRIX_SHARED_BYTES;
        required_features |= adapter::MATRIX_FEATURES;
        // SAFETY: of what is experimental, only cooperative matrices are used, in one kernel, by the rules of
        // their page, and the device serves only after the self-test.
        experimental_features = unsafe { wgpu::ExperimentalFeatures::enabled() };
    }
    let opened = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
        label: Some("thenar"),
        required_features,
        required_limits,
        memory_hints: wgpu::MemoryHints::MemoryUsage,
        experimental_features,
        ..wgpu::DeviceDescriptor::default()
    }));
    let (device, queue) =
        opened.map_err(|e| EngineError::NoAdapter { reason: format!("{} could not be opened: {e}", info.adapter) })?;
    Ok(Connection::new(device, queue))
}
