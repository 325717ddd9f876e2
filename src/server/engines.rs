//! Which engine searches: the configured one, with the CPU as standby of a GPU.

use std::path::Path;
use std::sync::Arc;

use super::ServerError;
use crate::engine::Engine;
use crate::engine::cpu::CpuEngine;
use crate::engine::failover::Failover;
use crate::engine::gpu::{AdapterChoice, GpuEngine, GpuOptions};

/// Which engine searches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// The choice.
    pub kind: EngineKind,
    /// Whether a GPU's cooperative matrices may be used.
    pub matrices: bool,
    /// Threads of the CPU engine.
    pub threads: usize,
}

/// The choice of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineKind {
    /// A real GPU if there is one, otherwise the CPU.
    Auto,
    /// The CPU engine.
    Cpu,
    /// A GPU: the named adapter (a software one too), or the first real one.
    Gpu {
        /// Part of the adapter's name.
        adapter: Option<String>,
    },
}

/// The engine that answers, and the same as a failover if it is a preferred one with a standby.
pub(super) type Engines = (Arc<dyn Engine>, Option<Arc<Failover>>);

/// The engine that is configured. A GPU's compiled kernels are kept in `folder`.
pub(super) fn build(config: &EngineConfig, folder: &Path) -> Result<Engines, ServerError> {
    let cpu: Arc<dyn Engine> = Arc::new(CpuEngine::new(config.threads)?);
    let options = GpuOptions { matrices: config.matrices, kernels_in: Some(folder.to_owned()) };
    let gpu = match &config.kind {
        EngineKind::Cpu => None,
        EngineKind::Auto => match GpuEngine::with_options(AdapterChoice::RealGpu, options) {
            Ok(gpu) => Some(gpu),
            Err(error) => {
                tracing::info!(%error, "the CPU engine is used");
                None
            }
        },
        EngineKind::Gpu { adapter } => {
            let choice = adapter.clone().map_or(AdapterChoice::RealGpu, AdapterChoice::Named);
            Some(GpuEngine::with_options(choice, options)?)
        }
    };
    Ok(match gpu {
        None => (cpu, None),
        Some(gpu) => {
            let both = Arc::new(Failover::new(Arc::new(gpu), cpu));
            (Arc::clone(&both) as Arc<dyn Engine>, Some(both))
        }
    })
}
