//! The kernels: their text, their sizes and the structs they share with the host.
//!
//! The one place that sets workgroup and tile sizes: they go into the pipelines as override
//! constants, and packing and dispatching take them from here. Does not know galleries, floors or
//! threads.
//!
//! The modules are compiled without injected bounds checks and loop limits; [`compile`] carries
//! the proof that every index is in range.

use bytemuck::{Pod, Zeroable};
use zeroize::Zeroizing;

/// Slots are handed to kernels in multiples of this, and slabs hold a multiple of it, so that
/// every tile of every kernel lies within its slab.
pub(super) const SLOT_STEP: u32 = 512;
/// Most probes in one batch.
pub(super) const PROBES_MAX: usize = 256;
/// Components of a row in one `vec4<u32>`.
pub(super) const WORD_COMPONENTS: usize = 8;

/// Text of the kernel for few probes, complete.
pub(super) const SIFT_FEW: &str =
    concat!(include_str!("../../../shaders/sift_bindings.wgsl"), include_str!("../../../shaders/sift_few.wgsl"));
/// Text of the kernel for many probes, complete.
pub(super) const SIFT_MANY: &str =
    concat!(include_str!("../../../shaders/sift_bindings.wgsl"), include_str!("../../../shaders/sift_many.wgsl"));

/// Invocations in a workgroup of `sift_few`.
pub(super) const FEW_THREADS: u32 = 256;
/// Invocations that share a row in `sift_few`; the constant `LANES` of the kernel.
pub(super) const FEW_LANES: u32 = 8;
/// Rows a workgroup of `sift_few` covers: four for every group of lanes.
pub(super) const FEW_ROWS: u32 = FEW_THREADS / FEW_LANES * 4;
/// Invocations along the rows in `sift_many`, eight rows each.
pub(super) const MANY_BANDS: u32 = 16;
/// Rows a workgroup of `sift_many` covers.
pub(super) const MANY_ROWS: u32 = MANY_BANDS * 8;
/// Components in shared memory at a time in `sift_many`, where the adapter has room for them.
const MANY_DEPTH: u32 = 32;

const _: () = assert!(SLOT_STEP.is_multiple_of(FEW_ROWS) && SLOT_STEP.is_multiple_of(MANY_ROWS));
const _: () = assert!(PROBES_MAX.is_multiple_of(64));

/// One run of slots of one slab; `Slice` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Slice {
    /// Words of a row.
    pub row_words: u32,
    /// First slot in the slab.
    pub slot_first: u32,
    /// One past the last slot in the slab.
    pub slot_end: u32,
    /// Number of the slab's slot 0 among all slots.
    pub slot_base: u32,
    /// Places in the entries buffer.
    pub entries_max: u32,
    /// Zero.
    pub reserved: [u32; 3],
}

/// What a row must reach for one probe; `Bar` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub(super) struct Bar {
    /// The probe's floor less the slack of f32 arithmetic.
    pub cut: f32,
    /// Entries the probe may store; more are only counted.
    pub quota: u32,
}

impl Bar {
    /// The bar of a padding probe: nothing passes, nothing is stored.
    pub(super) const CLOSED: Self = Self { cut: f32::INFINITY, quota: 0 };
}

/// A (probe, slot) pair that reached its bar; `Entry` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub(super) struct Entry {
    /// Number of the probe in the batch.
    pub probe: u32,
    /// Number of the slot among the slots of all slabs.
    pub slot: u32,
    /// The device's score.
    pub score: f32,
}

/// A kernel at one size of batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    /// `sift_few` for this many probes: 1, 2 or 4.
    Few {
        /// The override `PROBES`.
        probes: u32,
    },
    /// `sift_many` in tiles of four times this many probes: 4, 8 or 16.
    Many {
        /// The override `COLUMNS`.
        columns: u32,
    },
}

impl Kernel {
    /// Every kernel an engine compiles.
    pub(super) const ALL: [Self; 6] = [
        Self::Few { probes: 1 },
        Self::Few { probes: 2 },
        Self::Few { probes: 4 },
        Self::Many { columns: 4 },
        Self::Many { columns: 8 },
        Self::Many { columns: 16 },
    ];

    /// The kernel for `probes` probes, 1 to [`PROBES_MAX`].
    pub(super) fn for_batch(probes: usize) -> Self {
        match probes {
            1 => Self::Few { probes: 1 },
            2 => Self::Few { probes: 2 },
            3 | 4 => Self::Few { probes: 4 },
            5..=16 => Self::Many { columns: 4 },
            17..=32 => Self::Many { columns: 8 },
            _ => Self::Many { columns: 16 },
        }
    }

    /// Its place in [`Kernel::ALL`].
    pub(super) fn index(self) -> usize {
        Self::ALL.iter().position(|&kernel| kernel == self).expect("only kernels of ALL are made")
    }

    /// Probes computed at a time, padding included.
    pub(super) fn tile_probes(self) -> usize {
        match self {
            Self::Few { probes } => probes as usize,
            Self::Many { columns } => 4 * columns as usize,
        }
    }

    /// `probes` rounded up to whole tiles.
    pub(super) fn padded(self, probes: usize) -> usize {
        probes.next_multiple_of(self.tile_probes())
    }

    /// The probes as the kernel reads them, padded with zeros. `probes`: row-major, `[count, dim]`.
    pub(super) fn pack(self, probes: &[f32], dim: usize) -> Zeroizing<Vec<f32>> {
        let count = probes.len() / dim;
        let mut packed = Zeroizing::new(vec![0.0; self.padded(count) * dim]);
        match self {
            Self::Few { .. } => packed[..probes.len()].copy_from_slice(probes),
            Self::Many { .. } => {
                let wide = self.tile_probes();
                for (number, probe) in probes.chunks_exact(dim).enumerate() {
                    let tile = &mut packed[number / wide * wide * dim..][..wide * dim];
                    for (component, &value) in probe.iter().enumerate() {
                        tile[component * wide + number % wide] = value;
                    }
                }
            }
        }
        packed
    }

    /// Workgroups for a run of `slots` slots and `probes` probes, in three dimensions, each within
    /// the 65,535 that every adapter allows.
    pub(super) fn workgroups(self, slots: u32, probes: usize) -> [u32; 3] {
        /// Rows of workgroups, so that two dimensions reach any slab.
        const ACROSS_MAX: u32 = 32_768;
        match self {
            Self::Few { .. } => {
                let tiles = slots.div_ceil(FEW_ROWS);
                let across = tiles.min(ACROSS_MAX);
                [across, tiles.div_ceil(across.max(1)), 1]
            }
            Self::Many { .. } => {
                let tiles = slots.div_ceil(MANY_ROWS);
                let across = tiles.min(ACROSS_MAX);
                let probe_tiles = self.padded(probes) / self.tile_probes();
                let probe_tiles = u32::try_from(probe_tiles).expect("a batch is small");
                [probe_tiles, across, tiles.div_ceil(across.max(1))]
            }
        }
    }

    /// Entry point of the kernel, which is also its file's stem.
    fn entry_point(self) -> &'static str {
        match self {
            Self::Few { .. } => "sift_few",
            Self::Many { .. } => "sift_many",
        }
    }

    /// Override constants for an adapter with `shared_bytes` of workgroup memory.
    pub(super) fn overrides(self, shared_bytes: u32) -> Vec<(&'static str, f64)> {
        match self {
            Self::Few { probes } => {
                vec![("PROBES", f64::from(probes)), ("THREADS", f64::from(FEW_THREADS))]
            }
            Self::Many { columns } => vec![
                ("COLUMNS", f64::from(columns)),
                ("BANDS", f64::from(MANY_BANDS)),
                ("DEPTH", f64::from(many_depth(columns, shared_bytes))),
            ],
        }
    }
}

/// Components in shared memory at a time: the most that fits, at least 8.
fn many_depth(columns: u32, shared_bytes: u32) -> u32 {
    let bytes_each = 16 * (MANY_BANDS * 2 + columns);
    let mut depth = MANY_DEPTH;
    while depth > 8 && depth * bytes_each > shared_bytes {
        depth /= 2;
    }
    depth
}

/// The layout all kernels share.
pub(super) fn bind_group_layout(device: &wgpu::Device) -> wgpu::BindGroupLayout {
    let storage = |binding: u32, read_only: bool| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only },
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    };
    let uniform = wgpu::BindGroupLayoutEntry {
        binding: 0,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Uniform,
            has_dynamic_offset: true,
            min_binding_size: wgpu::BufferSize::new(size_of::<Slice>() as u64),
        },
        count: None,
    };
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some("sift"),
        entries: &[
            uniform,
            storage(1, true),
            storage(2, true),
            storage(3, true),
            storage(4, true),
            storage(5, false),
            storage(6, false),
        ],
    })
}

/// Compiles every kernel, in the order of [`Kernel::ALL`].
pub(super) fn compile(device: &wgpu::Device, layout: &wgpu::BindGroupLayout) -> Vec<wgpu::ComputePipeline> {
    let trusted = |label: &'static str, source: &'static str| {
        let descriptor =
            wgpu::ShaderModuleDescriptor { label: Some(label), source: wgpu::ShaderSource::Wgsl(source.into()) };
        // SAFETY: no index of either kernel leaves its buffer, and every loop ends.
        // - rows: a tile starts at slot_first + k * T below slot_end, T (128) divides SLOT_STEP;
        //   `Device::run` asserts that slot_first is a multiple of SLOT_STEP and slot_end at most
        //   the slab's slots, and `Device::add_slab` that those are a multiple of SLOT_STEP. So the
        //   whole tile lies within the slab. words is dim / 8 of the slab (asserted), and a word
        //   index stays below it (sift_few: loop bound; sift_many: DEPTH divides dim).
        // - live holds a bit for every slot of the slab.
        // - probes and bars hold padded(count) probes, asserted by `Device::run`; group.x is below
        //   padded / tile and column below COLUMNS. tally.counts has PROBES_MAX places.
        // - entries is indexed below entries_max only, which is its length.
        // - partial, row_tile and probe_tile: the indices are below their sizes by the loop bounds
        //   and the workgroup size, which come from the same override constants.
        // - Loops count a u32 up to a bound below 2^27 in steps of at least one; divisors are
        //   override constants and never zero.
        // - Slabs and batch buffers are created by this engine and bound whole, so no memory
        //   that wgpu has not initialised is visible.
        unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
    };
    let few = trusted("sift_few", SIFT_FEW);
    let many = trusted("sift_many", SIFT_MANY);
    let shared_bytes = device.limits().max_compute_workgroup_storage_size;
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: Some("sift"),
        bind_group_layouts: &[Some(layout)],
        immediate_size: 0,
    });
    Kernel::ALL
        .iter()
        .map(|kernel| {
            device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(kernel.entry_point()),
                layout: Some(&pipeline_layout),
                module: match kernel {
                    Kernel::Few { .. } => &few,
                    Kernel::Many { .. } => &many,
                },
                entry_point: Some(kernel.entry_point()),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: &kernel.overrides(shared_bytes),
                    // Both kernels write every place of workgroup memory before they read it.
                    zero_initialize_workgroup_memory: false,
                },
                cache: None,
            })
        })
        .collect()
}

#[cfg(test)]
#[path = "kernels_tests.rs"]
mod tests;
