//! Which graphics adapters are there, and which one is wanted?
//!
//! Knows wgpu's instances and adapters. Does not know kernels, galleries or devices in use.

use crate::engine::EngineError;

/// Features that the kernel with cooperative matrices needs.
pub(super) const MATRIX_FEATURES: wgpu::Features =
    wgpu::Features::SHADER_F16.union(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
/// Most workgroup memory that it takes.
pub(super) const MATRIX_SHARED_BYTES: u32 = 32 << 10;
/// Invocations of a subgroup that it relies on.
const MATRIX_SUBGROUP: u32 = 32;

/// Which adapter an engine should take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdapterChoice {
    /// A graphics processor: discrete before integrated before virtual. Never a software adapter.
    RealGpu,
    /// The first adapter whose name contains this, whatever its case. Selects software adapters
    /// too, such as `llvmpipe`.
    Named(String),
    /// A graphics processor if there is one, otherwise a software adapter.
    Any,
}

/// One adapter, for status pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSummary {
    /// The driver's name for it.
    pub name: String,
    /// `vulkan`, `metal` or `dx12`.
    pub backend: String,
    /// The driver's name and version.
    pub driver: String,
    /// `discrete`, `integrated`, `virtual`, `cpu` or `other`.
    pub device_type: &'static str,
    /// Whether it runs on the CPU.
    pub software: bool,
}

impl AdapterSummary {
    fn of(info: &wgpu::AdapterInfo) -> Self {
        Self {
            name: info.name.clone(),
            backend: info.backend.to_str().to_owned(),
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
            device_type: match info.device_type {
                wgpu::DeviceType::DiscreteGpu => "discrete",
                wgpu::DeviceType::IntegratedGpu => "integrated",
                wgpu::DeviceType::VirtualGpu => "virtual",
                wgpu::DeviceType::Cpu => "cpu",
                wgpu::DeviceType::Other => "other",
            },
            software: info.device_type == wgpu::DeviceType::Cpu,
        }
    }

    /// `name (driver, backend)`.
    pub(super) fn describe(info: &wgpu::AdapterInfo) -> String {
        let summary = Self::of(info);
        format!("{} ({}, {})", summary.name, summary.driver, summary.backend)
    }
}

/// Every adapter the machine offers, best first. Empty if no driver is installed.
#[must_use]
pub fn available_adapters() -> Vec<AdapterSummary> {
    enumerate().iter().map(|adapter| AdapterSummary::of(&adapter.get_info())).collect()
}

/// The wanted adapter.
///
/// # Errors
/// [`EngineError::NoAdapter`] saying what was looked for and what was found.
pub(super) fn choose(choice: &AdapterChoice) -> Result<wgpu::Adapter, EngineError> {
    let mut adapters = enumerate();
    let found = adapters.iter().position(|adapter| {
        let info = adapter.get_info();
        match choice {
            AdapterChoice::RealGpu => is_real(info.device_type),
            AdapterChoice::Named(part) => info.name.to_lowercase().contains(&part.to_lowercase()),
            AdapterChoice::Any => true,
        }
    });
    match found {
        Some(index) => Ok(adapters.swap_remove(index)),
        None => {
            let names: Vec<String> =
                adapters.iter().map(|adapter| AdapterSummary::describe(&adapter.get_info())).collect();
            let wanted = match choice {
                AdapterChoice::RealGpu => "a graphics processor".to_owned(),
                AdapterChoice::Named(part) => format!("an adapter named like {part:?}"),
                AdapterChoice::Any => "any adapter".to_owned(),
            };
            let present = if names.is_empty() { "none".to_owned() } else { names.join("; ") };
            Err(EngineError::NoAdapter { reason: format!("looked for {wanted}, found {present}") })
        }
    }
}

/// Whether the adapter has the cooperative matrices that the kernel uses: 16 by 16 of f16 with sums in f32, in
/// subgroups of exactly 32.
pub(super) fn has_matrices(adapter: &wgpu::Adapter) -> bool {
    let info = adapter.get_info();
    adapter.features().contains(MATRIX_FEATURES)
        && adapter.limits().max_compute_workgroup_storage_size >= MATRIX_SHARED_BYTES
        && (info.subgroup_min_size, info.subgroup_max_size) == (MATRIX_SUBGROUP, MATRIX_SUBGROUP)
        && adapter.cooperative_matrix_properties().iter().any(|p| {
            (p.m_size, p.n_size, p.k_size) == (16, 16, 16)
                && p.ab_type == wgpu::CooperativeScalarType::F16
                && p.cr_type == wgpu::CooperativeScalarType::F32
                && !p.saturating_accumulation
        })
}

fn enumerate() -> Vec<wgpu::Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        // Validation layers only if an engineer asks for them in the environment.
        flags: wgpu::InstanceFlags::empty().with_env(),
        // A gallery that nearly fills the device must fail as an error, not as a lost device.
        memory_budget_thresholds: wgpu::MemoryBudgetThresholds {
            for_resource_creation: Some(97),
            for_device_loss: None,
        },
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let mut adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

fn is_real(device_type: wgpu::DeviceType) -> bool {
    match device_type {
        wgpu::DeviceType::DiscreteGpu | wgpu::DeviceType::IntegratedGpu | wgpu::DeviceType::VirtualGpu => true,
        wgpu::DeviceType::Cpu | wgpu::DeviceType::Other => false,
    }
}
