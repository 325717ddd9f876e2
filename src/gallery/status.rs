//! The gallery in numbers.

use std::sync::atomic::Ordering;

use thenar_index::{Lsn, Snapshot};

use super::Gallery;
use super::open::OpenReport;
use crate::engine::EngineDescription;
use crate::telemetry;

/// The gallery in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GalleryStatus {
    /// Live templates.
    pub templates: u64,
    /// Rows that are erased but whose room is not reclaimed yet.
    pub tombstones: u64,
    /// Templates of the registry that cannot be opened and are left out.
    pub left_out: u64,
    /// The last change that searches see.
    pub lsn: Lsn,
    /// The registry's last change known here.
    pub registry_lsn: Lsn,
    /// Index files in the address space.
    pub mapped_bytes: u64,
    /// What the index holds in main memory.
    pub index_bytes: u64,
    /// The engine that answers now.
    pub engine: EngineDescription,
    /// Whether that is the preferred engine.
    pub preferred: bool,
    /// How the gallery was opened.
    pub opened: OpenReport,
}

impl GalleryStatus {
    /// Before a gallery has been opened.
    #[must_use]
    pub fn nothing(engine: EngineDescription) -> Self {
        Self {
            templates: 0,
            tombstones: 0,
            lsn: Lsn(0),
            registry_lsn: Lsn(0),
            mapped_bytes: 0,
            index_bytes: 0,
            engine,
            preferred: true,
            left_out: 0,
            opened: OpenReport::default(),
        }
    }
}

impl Gallery {
    /// The gallery in numbers. Counts are zero while the index is lost.
    #[must_use]
    pub fn status(&self) -> GalleryStatus {
        let snapshot = self.snapshot();
        let count = |of: fn(&Snapshot) -> u64| snapshot.as_deref().map_or(0, of);
        GalleryStatus {
            templates: count(Snapshot::live),
            tombstones: count(Snapshot::dead),
            left_out: self.left_out.load(Ordering::Acquire),
            lsn: self.lsn(),
            registry_lsn: Lsn(self.registry_lsn.load(Ordering::Acquire)),
            mapped_bytes: count(Snapshot::mapped_bytes),
            index_bytes: count(Snapshot::host_bytes),
            engine: self.engine.describe(),
            preferred: self.failover.as_ref().is_none_or(|failover| failover.is_preferred_answering()),
            opened: self.opened.clone(),
        }
    }

    /// Updates the metrics of the gallery.
    pub(super) fn report(&self) {
        let Some((live, erased)) = self.snapshot().map(|s| (s.live(), s.dead())) else { return };
        let lag = self.registry_lsn.load(Ordering::Acquire).saturating_sub(self.lsn().0);
        telemetry::gallery(live, erased, lag);
        telemetry::left_out(self.left_out.load(Ordering::Acquire));
        let engine = self.engine.describe();
        telemetry::engine_memory(engine.kind, engine.host_bytes, engine.device_bytes);
    }
}
