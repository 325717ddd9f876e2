//! The kernels: their text, their sizes, and which of them scans a batch.
//!
//! | kernel | for | bound by |
//! |---|---|---|
//! | `scan_few` | one to eight probes | memory |
//! | `scan_many` | more, on every adapter | packed dot products of bytes |
//! | `scan_coop` | many, with cooperative matrices | f16 matrix products |
//! | `refine` | what a scan of 1-bit codes left | gathering |
//!
//! Each scan comes for 1-bit and for 4-bit codes. The build script assembles and validates the text. Does not
//! know galleries, floors or threads.
//!
//! The modules are compiled without injected bounds checks and loop limits; [`Pipelines::compile`] has the
//! proof that every index is in range.

use super::bindings::{DeviceBound, Entry, PROBES_MAX, Slice};
use super::layout::Level;

/// Slots are handed to kernels in multiples of this, and slabs hold a multiple of it, so that every tile of
/// every kernel lies within its slab.
pub(crate) const SLOT_STEP: u32 = 512;

const SCAN_FEW: &str = include_str!(concat!(env!("OUT_DIR"), "/shaders/scan_few.wgsl"));
const SCAN_MANY: &str = include_str!(concat!(env!("OUT_DIR"), "/shaders/scan_many.wgsl"));
const SCAN_COOP: &str = include_str!(concat!(env!("OUT_DIR"), "/shaders/scan_coop.wgsl"));
const REFINE: &str = include_str!(concat!(env!("OUT_DIR"), "/shaders/refine.wgsl"));

/// Invocations in a workgroup of `scan_few`, and its rows.
const FEW_THREADS: u32 = 256;
/// Most probes of `scan_few`.
pub(crate) const FEW_PROBES: usize = 8;
/// Rows of a workgroup of `scan_many`.
const MANY_ROWS: u32 = 64;
/// Probes of a workgroup of `scan_many`.
const MANY_PROBES: usize = 32;
/// Rows of a workgroup of `scan_coop`, and its probes: eight matrices of 16 by 16 along each.
const COOP_TILE: u32 = 128;
/// Probes from which cooperative matrices are worth their tiles of 128 probes. By arithmetic: on an H100
/// such a tile takes about as long as 50 probes of packed dot products.
const COOP_PROBES_MIN: usize = 49;
/// Workgroups of `refine`, each of 64 invocations: enough to fill any device.
pub(super) const REFINE_GROUPS: u32 = 1024;

const _: () = assert!(SLOT_STEP.is_multiple_of(FEW_THREADS) && SLOT_STEP.is_multiple_of(MANY_ROWS));
const _: () = assert!(SLOT_STEP.is_multiple_of(COOP_TILE) && PROBES_MAX.is_multiple_of(COOP_TILE as usize));
const _: () = assert!(PROBES_MAX.is_multiple_of(MANY_PROBES));

/// A scanning kernel at one size of batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    /// `scan_few` for this many probes: 1, 2, 4 or 8.
    Few {
        /// The override `PROBES`.
        probes: u32,
    },
    /// `scan_many`.
    Many,
    /// `scan_coop`.
    Coop,
}

impl Kernel {
    /// Every kernel; the last needs cooperative matrices.
    const ALL: [Self; 6] = [
        Self::Few { probes: 1 },
        Self::Few { probes: 2 },
        Self::Few { probes: 4 },
        Self::Few { probes: 8 },
        Self::Many,
        Self::Coop,
    ];

    /// The kernel for `probes` probes, 1 to [`PROBES_MAX`]; `matrices`: whether the device has them.
    pub(crate) fn for_batch(probes: usize, matrices: bool) -> Self {
        match probes {
            1 => Self::Few { probes: 1 },
            2 => Self::Few { probes: 2 },
            3 | 4 => Self::Few { probes: 4 },
            5..=FEW_PROBES => Self::Few { probes: 8 },
            COOP_PROBES_MIN.. if matrices => Self::Coop,
            _ => Self::Many,
        }
    }

    /// Probes computed at a time, padding included.
    pub(crate) fn tile_probes(self) -> usize {
        match self {
            Self::Few { probes } => probes as usize,
            Self::Many => MANY_PROBES,
            Self::Coop => COOP_TILE as usize,
        }
    }

    /// `probes` rounded up to whole tiles.
    pub(crate) fn padded(self, probes: usize) -> usize {
        probes.next_multiple_of(self.tile_probes())
    }

    /// Rows of a workgroup.
    fn tile_rows(self) -> u32 {
        match self {
            Self::Few { .. } => FEW_THREADS,
            Self::Many => MANY_ROWS,
            Self::Coop => COOP_TILE,
        }
    }

    /// Workgroups for a run of `slots` slots and `probes` probes, in three dimensions, each within the 65,535
    /// that every adapter allows.
    pub(super) fn workgroups(self, slots: u32, probes: usize) -> [u32; 3] {
        /// Workgroups in one dimension, so that two reach every slot of any slab.
        const ACROSS_MAX: u32 = 32_768;
        let tiles = slots.div_ceil(self.tile_rows());
        let across = tiles.min(ACROSS_MAX);
        let down = tiles.div_ceil(across.max(1));
        match self {
            Self::Few { .. } => [across, down, 1],
            Self::Many | Self::Coop => {
                let probe_tiles = self.padded(probes) / self.tile_probes();
                [u32::try_from(probe_tiles).expect("a batch is small"), across, down]
            }
        }
    }

    /// Entry point of the kernel, which is also its file's stem, and its text.
    fn source(self) -> (&'static str, &'static str) {
        match self {
            Self::Few { .. } => ("scan_few", SCAN_FEW),
            Self::Many => ("scan_many", SCAN_MANY),
            Self::Coop => ("scan_coop", SCAN_COOP),
        }
    }

    /// Override constants.
    fn overrides(self, level: Level) -> Vec<(&'static str, f64)> {
        let mut overrides = vec![("FOUR_BIT", f64::from(u8::from(level == Level::FourBit)))];
        if let Self::Few { probes } = self {
            overrides.push(("PROBES", f64::from(probes)));
        }
        overrides
    }
}

/// The layout of what belongs to a slab: codes and factors.
pub(super) fn slab_layout(device: &wgpu::Device) -> wgpu::BindGroupLayout {
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some("slab"),
        entries: &[storage(0, true), storage(1, true)],
    })
}

/// The layout of what belongs to a batch.
pub(super) fn batch_layout(device: &wgpu::Device) -> wgpu::BindGroupLayout {
    let uniform = |binding: u32, has_dynamic_offset: bool, size: u64| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Uniform,
            has_dynamic_offset,
            min_binding_size: wgpu::BufferSize::new(size),
        },
        count: None,
    };
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some("batch"),
        entries: &[
            uniform(0, true, size_of::<Slice>() as u64),
            uniform(1, false, FEW_BYTES),
            storage(2, true),
            storage(3, true),
            storage(4, false),
            storage(5, false),
            storage(6, false),
        ],
    })
}

/// Bytes of the uniform probes of `scan_few`.
pub(super) const FEW_BYTES: u64 = 1024 * 16;

fn storage(binding: u32, read_only: bool) -> wgpu::BindGroupLayoutEntry {
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only },
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    }
}

/// The compiled kernels of a device.
pub(super) struct Pipelines {
    scans: Vec<((Kernel, Level), wgpu::ComputePipeline)>,
    refine: wgpu::ComputePipeline,
}

impl Pipelines {
    /// Compiles every kernel, and the one with cooperative matrices if the device has them.
    pub(super) fn compile(
        device: &wgpu::Device,
        layouts: [&wgpu::BindGroupLayout; 2],
        matrices: bool,
        cache: Option<&wgpu::PipelineCache>,
    ) -> Self {
        let trusted = |label: &str, source: &str| {
            let descriptor =
                wgpu::ShaderModuleDescriptor { label: Some(label), source: wgpu::ShaderSource::Wgsl(source.into()) };
            // SAFETY: no index of any kernel leaves its buffer, and every loop ends.
            // - codes, factors: a tile starts at slot_first + k * T below slot_end, T (64 to 256) divides
            //   SLOT_STEP; `Device::slices` asserts that slot_first is a multiple of SLOT_STEP and slot_end at
            //   most the slab's slots, and `Device::add_slab` that those are a multiple of SLOT_STEP. So the
            //   whole tile lies within the slab. quads is that of the slab's dimension (asserted); the chunks
            //   of scan_coop are dim / 32, at most 4 * quads of 1-bit codes.
            // - few, probes and bounds hold padded(count) probes, asserted by `Device::slices`, and those of
            //   the refinement after them; few has 8 probes of 2048 components. tally.counts has PROBES_MAX
            //   places, and a probe's number is below padded(count) <= PROBES_MAX.
            // - entries is indexed below entries_max only, which is its length. refined has as many places,
            //   and each entry is put there at most once: runs of a batch do not overlap.
            // - refine: entries were written by a scan of the same batch, and their slots are checked against
            //   the run before they are used.
            // - Workgroup memory: indices are below the sizes by the loop bounds and the workgroup size, which
            //   are constants of one file.
            // - Loops count a u32 up to a bound below 2^27 in steps of at least one.
            // - Slabs and batch buffers are created by this engine and bound whole, so no memory that wgpu has
            //   not initialised is visible.
            unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some("kernels"),
            bind_group_layouts: &[Some(layouts[0]), Some(layouts[1])],
            immediate_size: 0,
        });
        let pipeline = |entry_point: &str, module: &wgpu::ShaderModule, constants: &[(&str, f64)]| {
            device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(entry_point),
                layout: Some(&layout),
                module,
                entry_point: Some(entry_point),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants,
                    // The kernels write every place of workgroup memory before they read it; padding between
                    // rows is never read.
                    zero_initialize_workgroup_memory: false,
                },
                cache,
            })
        };
        let mut scans = Vec::new();
        for kernel in Kernel::ALL.into_iter().filter(|kernel| matrices || *kernel != Kernel::Coop) {
            let (entry_point, source) = kernel.source();
            let module = trusted(entry_point, source);
            scans.extend(
                Level::ALL.map(|level| ((kernel, level), pipeline(entry_point, &module, &kernel.overrides(level)))),
            );
        }
        Self { scans, refine: pipeline("refine", &trusted("refine", REFINE), &[]) }
    }

    /// The pipeline of a scan.
    pub(super) fn scan(&self, kernel: Kernel, level: Level) -> &wgpu::ComputePipeline {
        let found = self.scans.iter().find(|(which, _)| *which == (kernel, level));
        &found.expect("only kernels that were compiled are asked for").1
    }

    /// The pipeline of the refinement.
    pub(super) fn refine(&self) -> &wgpu::ComputePipeline {
        &self.refine
    }

    /// The scans that were compiled.
    pub(super) fn kernels(&self) -> Vec<(Kernel, Level)> {
        self.scans.iter().map(|(which, _)| *which).collect()
    }
}

/// Bytes of a bound and of an entry, as the buffers have them.
pub(super) const BOUND_BYTES: u64 = size_of::<DeviceBound>() as u64;
/// See [`BOUND_BYTES`].
pub(super) const ENTRY_BYTES: u64 = size_of::<Entry>() as u64;

#[cfg(test)]
mod tests;
