//! Who is compared: everything that finds the best rows of a gallery for a batch of probes.

#[cfg(feature = "faiss")]
pub mod faiss;
pub mod python;
pub mod thenar;

use std::ops::Range;

use serde::Serialize;

use crate::gallery::Probes;

/// A row that was found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hit {
    /// Its number.
    pub row: u32,
    /// The peer's own score for it.
    pub score: f64,
}

/// The answers of one call, best first, for consecutive probes.
#[derive(Debug, Clone)]
pub struct Answered {
    /// Number of the first probe.
    pub first: usize,
    /// What was found for each.
    pub hits: Vec<Vec<Hit>>,
}

/// Seconds of a call's parts.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Stages {
    /// In the engine.
    pub prefilter: f64,
    /// In exact scores and ranking.
    pub refine: f64,
}

/// One timed call.
#[derive(Debug, Clone)]
pub struct Call {
    /// From call to answer.
    pub seconds: f64,
    /// What it answered.
    pub answered: Answered,
    /// Where the time went, where the peer can tell.
    pub stages: Option<Stages>,
}

/// What is asked of a peer's answers, and what it is compared as.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PeerKind {
    /// Thenar: right to the last row, or the run fails. Returns rows at or above a threshold, or
    /// without one the best of all.
    Exact {
        /// The threshold.
        tau: Option<f64>,
    },
    /// An exhaustive f32 search: right but for rounding, or the run fails; speeds are ratios to it.
    Baseline,
    /// Its recall is a result: it rounds probes or rows, or looks at a part of them.
    Approximate,
}

/// One that can be compared.
pub trait Peer {
    /// What tables call it.
    fn name(&self) -> &str;

    /// What it claims.
    fn kind(&self) -> PeerKind;

    /// The engine it runs on.
    fn engine(&self) -> &'static str {
        "cpu"
    }

    /// Why its answers are complete; `none` where nothing says so.
    fn certificate(&self) -> &'static str {
        "none"
    }

    /// Answers `calls`, each a range of probes, one after the other, and times each.
    ///
    /// # Errors
    /// Where the peer fails.
    fn turn(&mut self, probes: &Probes, calls: &[Range<usize>], k: usize) -> anyhow::Result<Vec<Call>>;
}
