//! Engines find candidates: out of millions of rows they name the few that can matter.
//!
//! An engine never decides. It returns, for each probe, a superset of the rows whose exact score
//! reaches a floor; `search` scores those rows exactly, so engines agree to the bit and a
//! fault in one can cost speed but never an answer.
//!
//! Knows rows, live bits and numbers. Does not know subjects, policies, files or transports.

pub mod certificate;
pub mod cpu;
pub mod dot;
pub mod failover;
pub mod gpu;
mod narrow_filter;
mod quantised_probe;
#[cfg(test)]
pub(crate) mod testing;
mod top_k;
mod view;

use std::time::Duration;

use roaring::RoaringBitmap;

use self::certificate::Certificate;
pub use self::view::{GalleryView, SegmentView};

/// Seeds everything that an engine draws at random for one probe. Every round of a search carries the
/// same seed, so that all rounds pass the same rows over by the same chance; `search::plan` has the argument. Different searches have independent seeds.
pub type Seed = [u8; 32];

/// What candidates to find.
#[derive(Default)]
pub struct CandidateRequest<'a> {
    /// Rotated probes, row-major, each of unit length to rounding. Shape: `[count, dim]`.
    pub probes: &'a [f32],
    /// One floor per probe. Every live row whose exact score (`search::score::exact`) is at least
    /// this must be among the candidates. Shape: `[count]`.
    pub floors: &'a [f32],
    /// If not zero, only the `keep` best rows of the probe (with every row tied with the last of
    /// them) are needed, so the engine may raise that probe's floor during the search; [`CandidateRows::floors`]
    /// says how far. Shape: `[count]`.
    pub keep: &'a [u32],
    /// The most candidates of a probe. A probe with more is marked as overflowed; its list is
    /// meaningless, and the caller answers it in another way. Nothing is dropped silently.
    pub candidates_max: usize,
    /// The weakest certificate that will do: an engine may pass rows over by codes under it, or
    /// give a stronger one.
    pub certificate: Certificate,
    /// For each probe, the rows it may find, or none for all; empty if no probe has a filter.
    pub filters: &'a [Option<&'a RoaringBitmap>],
    /// One seed per probe; may be empty under the deterministic certificate, which needs none.
    /// Shape: `[count]`.
    pub seeds: &'a [Seed],
    /// Whether requests of other threads go first if the engine supports it, including those that come while
    /// this one is under way. For one thread at a time.
    pub yields: bool,
}

impl<'a> CandidateRequest<'a> {
    /// A probe. Shape: `[dim]`.
    #[must_use]
    pub fn probe(&self, probe: usize, dim: usize) -> &'a [f32] {
        &self.probes[probe * dim..][..dim]
    }

    /// The rows that a probe may find, or none for all.
    #[must_use]
    pub fn filter(&self, probe: usize) -> Option<&'a RoaringBitmap> {
        self.filters.get(probe).copied().flatten()
    }

    /// The seed of a probe. Zeros if there are none, which only the deterministic certificate allows.
    ///
    /// # Panics
    /// If the certificate is randomised and there are no seeds: every search would draw the same numbers.
    #[must_use]
    pub fn seed(&self, probe: usize) -> Seed {
        assert!(
            !self.seeds.is_empty() || self.certificate == Certificate::Deterministic,
            "a randomised certificate needs a seed per probe"
        );
        self.seeds.get(probe).copied().unwrap_or_default()
    }
}

/// What an engine found.
#[derive(Debug, Default)]
pub struct CandidateRows {
    /// For each probe, row numbers in any order, without repeats.
    pub rows: Vec<Vec<u32>>,
    /// For each probe, the floor that it had in the end: every row that is live in the view, that the filter
    /// allows and whose exact score is at least this is among `rows`, whatever raised the
    /// floor. Infinite for a probe that overflowed, for which nothing is promised.
    pub floors: Vec<f32>,
    /// For each probe, whether it overflowed.
    pub overflowed: Vec<bool>,
    /// Time the device itself took, if it has timestamps.
    pub device_time: Option<Duration>,
    /// Under which certificate rows were passed over.
    pub certificate: Certificate,
}

impl CandidateRows {
    /// Empties the lists, makes room for `probes` of them, and sets all floors to infinity.
    pub fn reset(&mut self, probes: usize) {
        self.rows.truncate(probes);
        self.rows.iter_mut().for_each(Vec::clear);
        self.rows.resize_with(probes, Vec::new);
        self.floors.clear();
        self.floors.resize(probes, f32::INFINITY);
        self.overflowed.clear();
        self.overflowed.resize(probes, false);
        self.device_time = None;
        self.certificate = Certificate::Deterministic;
    }
}

/// What an engine is, for status pages, metrics and benchmark tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineDescription {
    /// `cpu` or `gpu`.
    pub kind: &'static str,
    /// The processor's instruction set in use or the adapter's name, driver and backend.
    pub adapter: String,
    /// Threads that compute (CPU) or 1.
    pub threads: usize,
    /// Bytes this engine holds for itself in main memory now (scratch, packed probes).
    pub host_bytes: u64,
    /// Bytes it holds on a device now.
    pub device_bytes: u64,
}

/// Why an engine could not find candidates. The caller can always take another engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// No adapter fits what was asked for.
    #[error("no usable GPU adapter: {reason}")]
    NoAdapter {
        /// What was looked for and what was found.
        reason: String,
    },
    /// The device was lost or refused a command; it must be rebuilt.
    #[error("the GPU device was lost: {reason}")]
    DeviceLost {
        /// The driver's message.
        reason: String,
    },
    /// The gallery does not fit the device.
    #[error("the device has no memory for {needed_bytes} more bytes: {reason}")]
    OutOfDeviceMemory {
        /// Bytes of the allocation that failed.
        needed_bytes: u64,
        /// The driver's message.
        reason: String,
    },
    /// The engine is being rebuilt and cannot answer yet.
    #[error("the engine is being rebuilt")]
    Rebuilding,
}

/// Finds candidates in a gallery. Implementations: [`cpu::CpuEngine`], [`gpu::GpuEngine`].
pub trait Engine: Send + Sync {
    /// What this engine is, and what it holds now.
    fn describe(&self) -> EngineDescription;

    /// Brings the engine's own copy of the rows, if it keeps one, up to `view`. The gallery calls
    /// this before it shows `view` to searches, and the rows in it stay as they are until then. While
    /// it compacts, `view` has segments beside those that searches see now or will see next.
    ///
    /// # Errors
    /// [`EngineError`] if the device cannot take them; the engine then refuses requests.
    fn follow(&self, view: &GalleryView<'_>) -> Result<(), EngineError>;

    /// Overwrites the engine's own copy of these rows with zeros, on the device too, and returns
    /// once that is done. Views in which they are live are not searched any more.
    ///
    /// # Errors
    /// [`EngineError`] if the device cannot be reached; all of its memory is then given up.
    fn erase(&self, rows: &[u32]) -> Result<(), EngineError>;

    /// Fills `candidates` with a superset of the rows that reach each probe's floor, and says which floors
    /// those were.
    ///
    /// # Errors
    /// [`EngineError`] if the device fails; `candidates` is then meaningless.
    fn find_candidates(
        &self,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError>;
}
