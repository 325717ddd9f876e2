//! One search, from rotated probes to ranked subjects, exactly.
//!
//! The engine finds candidate rows; this room scores and ranks them, so that the answer does not depend on
//! the engine. Knows rows, subjects' numbers and hands. Does not know policies, transports or GPUs.
//!
//! - [`score`]: the comparison score of one row, to the bit.
//! - [`plan`]: which rows to ask an engine for until the ranking is complete, and the exhaustive
//!   scan that answers if an engine cannot.
//! - [`rank`]: scores of rows to scores of subjects, fused over the probes of a person.
//! - [`batch`]: when a search is admitted, and with which others it is searched.

pub mod batch;
pub mod plan;
pub mod rank;
pub mod score;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use roaring::RoaringBitmap;
use thenar_index::{SubjectNumber, TemplateId};

use crate::engine::EngineError;
pub use crate::engine::certificate::Certificate;
use crate::model::Hand;

/// The floor of a search without a threshold: below every possible score.
pub const NO_FLOOR: f64 = -2.0;

/// One rotated capture.
#[derive(Clone)]
pub struct Probe {
    /// The hand it shows.
    pub hand: Hand,
    /// The rotated unit vector. Shape: `[dim]`.
    pub vector: Box<[f32]>,
}

/// What to search for: the `k` best subjects whose fused score is at least `floor`.
#[derive(Clone)]
pub struct Search {
    /// 1 to `PROBES_MAX` captures of one person.
    pub probes: Vec<Probe>,
    /// Subjects below this fused score are not wanted; [`NO_FLOOR`] for the k best of all.
    pub floor: f64,
    /// Subjects wanted, at most. At least 1.
    pub k: usize,
    /// The weakest certificate that is acceptable.
    pub certificate: Certificate,
    /// The subjects that may be found, by number (`SubjectNumber`); `None` for all.
    pub allowed: Option<Arc<RoaringBitmap>>,
}

impl Search {
    /// Whether a subject may be found.
    #[must_use]
    pub fn allows(&self, subject: SubjectNumber) -> bool {
        self.allowed.as_ref().is_none_or(|allowed| u32::try_from(subject.0).is_ok_and(|n| allowed.contains(n)))
    }
}

/// A subject that was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The registry's number of the subject.
    pub subject: SubjectNumber,
    /// The client's name of the subject.
    pub subject_id: Box<str>,
    /// Mean over the compared probes, each with its best comparable template.
    pub score: f64,
    /// The hand of the best template.
    pub hand: Hand,
    /// The template with the best single score; among equals the smallest id.
    pub template: TemplateId,
    /// Probes that had a comparable template.
    pub probes_compared: u32,
}

/// The answer to one search.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Best first; ties by the smaller template id.
    pub found: Vec<Found>,
    /// Under which certificate this is complete.
    pub certificate: Certificate,
    /// Live templates in the gallery, including those that may not be found.
    pub gallery_size: u64,
}

/// Why a search has no answer.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// No engine could find candidates.
    #[error("no engine could answer: {0}")]
    Engine(#[from] EngineError),
    /// There is no index to search: it failed, and could not be opened again yet.
    #[error("the index is lost; it is opened again with the next write")]
    IndexLost,
}

/// Where the time of a batch went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchTiming {
    /// In the engine.
    pub prefilter: Duration,
    /// In exact scores and ranking.
    pub refine: Duration,
    /// On the device, if the engine can tell.
    pub device: Option<Duration>,
}
