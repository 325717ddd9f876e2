//! Turns scans into batches for the device, and waits for them in their order.
//!
//! Knows the resident table and the kernels; does not know floors or views.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use zeroize::Zeroizing;

use super::device::batch::{Batch, InFlight, Refinement, Report};
use super::device::kernels::Kernel;
use super::device::layout::{self, Level};
use super::device::shared::SharedDevice;
use super::resident::Resident;
use super::schedule::{Executor, Scan};
use crate::engine::EngineError;
use crate::engine::quantised_probe::QuantisedProbe;

/// Which kernel and level probes are packed for, and which probes.
type Packing = (Kernel, Level, Vec<usize>);

/// See the module's page.
pub(super) struct BatchExecutor<'a> {
    device: &'a SharedDevice,
    resident: &'a Resident,
    /// Whether cooperative matrices may be used.
    matrices: bool,
    /// Number in the request of the first of the probes.
    first: usize,
    probes: &'a [QuantisedProbe],
    /// By kernel, level and probes: slices of one gallery need the same again and again.
    packed: HashMap<Packing, [Arc<Zeroizing<Vec<u32>>>; 2]>,
    /// Reports that were collected before they were asked for, older than all that is in flight.
    collected: VecDeque<Report>,
    in_flight: VecDeque<InFlight>,
}

impl<'a> BatchExecutor<'a> {
    pub(super) fn new(
        device: &'a SharedDevice,
        resident: &'a Resident,
        matrices: bool,
        first: usize,
        probes: &'a [QuantisedProbe],
    ) -> Self {
        let (packed, collected, in_flight) = Default::default();
        Self { device, resident, matrices, first, probes, packed, collected, in_flight }
    }

    fn collect_oldest(&mut self) -> Result<Report, EngineError> {
        let oldest = self.in_flight.pop_front().expect("a batch is in flight");
        self.device.collect(self.resident.generation, oldest)
    }
}

impl Executor for BatchExecutor<'_> {
    fn submit(&mut self, scan: &Scan) -> Result<(), EngineError> {
        let (dim, level) = (self.resident.dim, scan.level);
        let kernel = Kernel::for_batch(scan.probes.len(), self.matrices);
        // The refinement comes with scans of 1-bit codes, and with all of them.
        let pack = || {
            let probes: Vec<&QuantisedProbe> = scan.probes.iter().map(|n| &self.probes[n - self.first]).collect();
            let refined: &[&QuantisedProbe] = if scan.refine_bounds.is_some() { &probes } else { &[] };
            [layout::pack(kernel, level, &probes, dim), layout::pack_rows(Level::FourBit, refined, dim)].map(Arc::new)
        };
        let [packed, to_refine] = self.packed.entry((kernel, level, scan.probes.clone())).or_insert_with(pack).clone();
        let batch = Batch {
            dim,
            kernel,
            level,
            probes: scan.probes.len(),
            packed,
            bounds: scan.bounds.clone(),
            loss_parts: scan.loss_parts,
            refinement: scan.refine_bounds.clone().map(|bounds| Refinement { packed: to_refine, bounds }),
            runs: self.resident.runs(&scan.slots),
        };
        let generation = self.resident.generation;
        let in_flight = loop {
            if let Some(in_flight) = self.device.submit(generation, &batch, self.in_flight.is_empty())? {
                break in_flight;
            }
            // Other threads have the other lanes: one of this thread's own must become idle.
            let report = self.collect_oldest()?;
            self.collected.push_back(report);
        };
        self.in_flight.push_back(in_flight);
        Ok(())
    }

    fn collect(&mut self) -> Result<Report, EngineError> {
        match self.collected.pop_front() {
            Some(report) => Ok(report),
            None => self.collect_oldest(),
        }
    }
}

impl Drop for BatchExecutor<'_> {
    fn drop(&mut self) {
        // After an error, lanes in flight go back to the device for others.
        while !self.in_flight.is_empty() {
            let _report = self.collect_oldest();
        }
    }
}
