//! The kernels: their text, their sizes, and which of them scans a batch.
//!
//! | kernel | for | bound by |
//! |---|---|---|
//! | `scan_few` | one to eight probes | memory |
//! | `scan_many` | more, on every adapter | packed dot products of bytes |
//! | `scan_coop` | many, with cooperative matrices | f16 matrix products |
//! | `look` | what a scan of signs left | gathering |
//!
//! The scans come for signs and for fine codes. Does not know galleries, floors or threads.
//!
//! The modules are compiled without injected bounds checks and loop limits; [`Pipelines::compile`]
//! carries the proof that every index is in range.

use super::bindings::{Bar, Entry, PROBES_MAX, Slice};
use super::level::Level;

/// Slots are handed to kernels in multiples of this, and slabs hold a multiple of it, so that
/// every tile of every kernel lies within its slab.
pub(super) const SLOT_STEP: u32 = 512;

/// Text of `scan_few`, complete.
pub(super) const SCAN_FEW: &str =
    concat!(include_str!("../../../shaders/bindings.wgsl"), include_str!("../../../shaders/scan_few.wgsl"));
/// Text of `scan_many`, complete.
pub(super) const SCAN_MANY: &str =
    concat!(include_str!("../../../shaders/bindings.wgsl"), include_str!("../../../shaders/scan_many.wgsl"));
/// Text of `look`, complete.
pub(super) const LOOK: &str =
    concat!(include_str!("../../../shaders/bindings.wgsl"), include_str!("../../../shaders/look.wgsl"));
/// Text of `scan_coop` for 16 x 16 matrices, complete.
const SCAN_COOP: &str = concat!(
    "enable f16;\nenable wgpu_cooperative_matrix;\n",
    include_str!("../../../shaders/bindings.wgsl"),
    include_str!("../../../shaders/scan_coop.wgsl")
);

/// Text of `scan_coop` for matrices of `side` by `side`, complete.
pub(super) fn scan_coop(side: Side) -> String {
    match side {
        Side::Sixteen => SCAN_COOP.to_owned(),
        Side::Eight => {
            SCAN_COOP.replace("coop_mat16x16", "coop_mat8x8").replace("const TILE: u32 = 16u;", "const TILE: u32 = 8u;")
        }
    }
}

/// Rows and columns of a cooperative matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Side {
    /// 8 by 8.
    Eight,
    /// 16 by 16.
    Sixteen,
}

impl Side {
    fn length(self) -> u32 {
        match self {
            Self::Eight => 8,
            Self::Sixteen => 16,
        }
    }
}

/// Invocations in a workgroup of `scan_few`, and its rows.
pub(super) const FEW_THREADS: u32 = 256;
/// Most probes of `scan_few`.
pub(super) const FEW_PROBES: usize = 8;
/// Rows of a workgroup of `scan_many`.
pub(super) const MANY_ROWS: u32 = 64;
/// Probes of a workgroup of `scan_many`.
pub(super) const MANY_PROBES: usize = 32;
/// Matrices along the rows of a workgroup of `scan_coop`, and along its probes.
const COOP_TILES: u32 = 8;
/// Probes from which cooperative matrices are worth their tiles of 128 probes. By arithmetic: on an
/// H100 such a tile takes about as long as 50 probes of packed dot products.
const COOP_FROM: usize = 49;
/// Workgroups of `look`, each of 64 invocations: enough to fill any device.
const LOOK_GROUPS: u32 = 1024;

const _: () = assert!(SLOT_STEP.is_multiple_of(FEW_THREADS) && SLOT_STEP.is_multiple_of(MANY_ROWS));
const _: () = assert!(PROBES_MAX.is_multiple_of(MANY_PROBES) && PROBES_MAX.is_multiple_of(128));

/// A scanning kernel at one size of batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    /// `scan_few` for this many probes: 1, 2, 4 or 8.
    Few {
        /// The override `PROBES`.
        probes: u32,
    },
    /// `scan_many`.
    Many,
    /// `scan_coop`.
    Coop {
        /// The adapter's matrices.
        side: Side,
    },
}

impl Kernel {
    /// Every kernel that runs on every adapter.
    pub(super) const EVERYWHERE: [Self; 5] = [
        Self::Few { probes: 1 },
        Self::Few { probes: 2 },
        Self::Few { probes: 4 },
        Self::Few { probes: 8 },
        Self::Many,
    ];

    /// The kernel for `probes` probes, 1 to [`PROBES_MAX`], where the adapter's matrices can be
    /// used as `coop` says.
    pub(super) fn for_batch(probes: usize, coop: Option<Side>) -> Self {
        match (probes, coop) {
            (1, _) => Self::Few { probes: 1 },
            (2, _) => Self::Few { probes: 2 },
            (3 | 4, _) => Self::Few { probes: 4 },
            (5..=FEW_PROBES, _) => Self::Few { probes: 8 },
            (COOP_FROM.., Some(side)) => Self::Coop { side },
            _ => Self::Many,
        }
    }

    /// Probes computed at a time, padding included.
    pub(super) fn tile_probes(self) -> usize {
        match self {
            Self::Few { probes } => probes as usize,
            Self::Many => MANY_PROBES,
            Self::Coop { side } => (COOP_TILES * side.length()) as usize,
        }
    }

    /// `probes` rounded up to whole tiles.
    pub(super) fn padded(self, probes: usize) -> usize {
        probes.next_multiple_of(self.tile_probes())
    }

    /// Rows of a workgroup.
    pub(super) fn tile_rows(self) -> u32 {
        match self {
            Self::Few { .. } => FEW_THREADS,
            Self::Many => MANY_ROWS,
            Self::Coop { side } => COOP_TILES * side.length(),
        }
    }

    /// Workgroups for a run of `slots` slots and `probes` probes, in three dimensions, each within
    /// the 65,535 that every adapter allows.
    pub(super) fn workgroups(self, slots: u32, probes: usize) -> [u32; 3] {
        /// Rows of workgroups, so that two dimensions reach any slab.
        const ACROSS_MAX: u32 = 32_768;
        let tiles = slots.div_ceil(self.tile_rows());
        let across = tiles.min(ACROSS_MAX);
        let down = tiles.div_ceil(across.max(1));
        match self {
            Self::Few { .. } => [across, down, 1],
            Self::Many | Self::Coop { .. } => {
                let probe_tiles = self.padded(probes) / self.tile_probes();
                [u32::try_from(probe_tiles).expect("a batch is small"), across, down]
            }
        }
    }

    /// Entry point of the kernel, which is also its file's stem.
    fn entry_point(self) -> &'static str {
        match self {
            Self::Few { .. } => "scan_few",
            Self::Many => "scan_many",
            Self::Coop { .. } => "scan_coop",
        }
    }

    /// Override constants.
    pub(super) fn overrides(self, level: Level) -> Vec<(&'static str, f64)> {
        let mut overrides = vec![("FINE", f64::from(u8::from(level == Level::FourBit)))];
        if let Self::Few { probes } = self {
            overrides.push(("PROBES", f64::from(probes)));
        }
        overrides
    }
}

/// Workgroups of the second look.
pub(super) fn look_workgroups() -> u32 {
    LOOK_GROUPS
}

/// The layout of what belongs to a slab: codes, factors, live bits.
pub(super) fn slab_layout(device: &wgpu::Device) -> wgpu::BindGroupLayout {
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some("slab"),
        entries: &[storage(0, true), storage(1, true), storage(2, true)],
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
    look: wgpu::ComputePipeline,
}

impl Pipelines {
    /// Compiles every kernel; those with cooperative matrices where `coop` has the adapter's.
    pub(super) fn compile(
        device: &wgpu::Device,
        layouts: [&wgpu::BindGroupLayout; 2],
        coop: Option<Side>,
        cache: Option<&wgpu::PipelineCache>,
    ) -> Self {
        let trusted = |label: &str, source: &str| {
            let descriptor =
                wgpu::ShaderModuleDescriptor { label: Some(label), source: wgpu::ShaderSource::Wgsl(source.into()) };
            // SAFETY: no index of any kernel leaves its buffer, and every loop ends.
            // - codes, factors, live: a tile starts at slot_first + k * T below slot_end, T (64 to 256)
            //   divides SLOT_STEP; `Device::submit` asserts that slot_first is a multiple of SLOT_STEP
            //   and slot_end at most the slab's slots, and `Device::add_slab` that those are a multiple
            //   of SLOT_STEP. So the whole tile lies within the slab. quads is that of the slab's
            //   dimension (asserted); scan_coop's chunks are dim / 32, at most 4 * quads of signs.
            // - few, probes and bars hold padded(count) probes, asserted by `Device::submit`, and those of
            //   the second look after them; few has 8 probes of 2048 components. tally.counts has
            //   PROBES_MAX places, and a probe's number is below padded(count) <= PROBES_MAX.
            // - entries is indexed below entries_max only, which is its length. passed has as many
            //   places, and each entry is put there at most once: runs of a batch do not overlap.
            // - look: entries were written by a scan of the same batch, and their slots are checked
            //   against the run before they are used.
            // - Workgroup memory: indices are below the sizes by the loop bounds and the workgroup
            //   size, which are constants of one file.
            // - Loops count a u32 up to a bound below 2^27 in steps of at least one.
            // - Slabs and batch buffers are created by this engine and bound whole, so no memory
            //   that wgpu has not initialised is visible.
            unsafe { device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
        };
        let layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some("sift"),
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
                    // The kernels write every place of workgroup memory before they read it; padding
                    // between rows is never read.
                    zero_initialize_workgroup_memory: false,
                },
                cache,
            })
        };
        let (few, many) = (trusted("scan_few", SCAN_FEW), trusted("scan_many", SCAN_MANY));
        let coop = coop.map(|side| (Kernel::Coop { side }, trusted("scan_coop", &scan_coop(side))));
        let mut scans = Vec::new();
        let kernels = Kernel::EVERYWHERE.map(|kernel| match kernel {
            Kernel::Few { .. } => (kernel, &few),
            _ => (kernel, &many),
        });
        for (kernel, module) in kernels.into_iter().chain(coop.as_ref().map(|(kernel, module)| (*kernel, module))) {
            for level in Level::ALL {
                let compiled = pipeline(kernel.entry_point(), module, &kernel.overrides(level));
                scans.push(((kernel, level), compiled));
            }
        }
        Self { scans, look: pipeline("look", &trusted("look", LOOK), &[]) }
    }

    /// The pipeline of a scan.
    pub(super) fn scan(&self, kernel: Kernel, level: Level) -> &wgpu::ComputePipeline {
        let found = self.scans.iter().find(|(which, _)| *which == (kernel, level));
        &found.expect("only kernels that were compiled are asked for").1
    }

    /// The pipeline of the second look.
    pub(super) fn look(&self) -> &wgpu::ComputePipeline {
        &self.look
    }

    /// The kernels that were compiled, without the second look.
    pub(super) fn kernels(&self) -> Vec<(Kernel, Level)> {
        self.scans.iter().map(|(which, _)| *which).collect()
    }
}

/// Bytes of a bar and of an entry, as the buffers have them.
pub(super) const BAR_BYTES: u64 = size_of::<Bar>() as u64;
/// See [`BAR_BYTES`].
pub(super) const ENTRY_BYTES: u64 = size_of::<Entry>() as u64;

#[cfg(test)]
#[path = "kernels_tests.rs"]
mod tests;
