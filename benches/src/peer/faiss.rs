//! FAISS, compiled from source by its crate: the flat index that is the baseline, and the
//! approximate ones it is known for.
//!
//! Knows FAISS's C interface. Does not know what the right answers are.

use std::ops::Range;
use std::time::Instant;

use anyhow::Context as _;
use faiss::index::IndexImpl;
use faiss::{Index as _, MetricType, index_factory};
use half::slice::HalfFloatSliceExt as _;
pub use thenar::audit::faiss::{blas, set_threads, simd};

use super::{Answered, Call, Hit, Peer, PeerKind};
use crate::gallery::{Gallery, Probes};

/// Rows widened and added at a time.
const ADDED: usize = 16_384;
/// Rows an index is trained on, at most: FAISS itself takes no more for these.
const TRAINED_MAX: usize = 65_536;

/// One index of FAISS.
pub struct Faiss {
    name: String,
    kind: PeerKind,
    index: IndexImpl,
}

impl Faiss {
    /// The index that `factory` describes (`Flat`, `SQfp16`, ...) by inner product, with every row.
    ///
    /// # Errors
    /// Where FAISS knows no such index for this dimension, or has no memory for it.
    pub fn new(factory: &str, gallery: &Gallery) -> anyhow::Result<Self> {
        let dim = gallery.dim();
        let mut index = index_factory(u32::try_from(dim)?, factory, MetricType::InnerProduct)
            .with_context(|| format!("FAISS makes no {factory} of {dim} dimensions"))?;
        if !index.is_trained() {
            let step = gallery.len().div_ceil(TRAINED_MAX).max(1);
            let mut rows = Vec::new();
            for row in (0..gallery.len()).step_by(step) {
                rows.extend(gallery.row(row).iter().map(|value| value.to_f32()));
            }
            index.train(&rows).with_context(|| format!("FAISS does not train {factory}"))?;
        }
        let mut wide = vec![0.0; ADDED * dim];
        for rows in gallery.rows().chunks(ADDED * dim) {
            let wide = &mut wide[..rows.len()];
            rows.convert_to_f32_slice(wide);
            index.add(wide).with_context(|| format!("FAISS does not add to {factory}"))?;
        }
        let kind = if factory == "Flat" { PeerKind::Baseline } else { PeerKind::Approximate };
        Ok(Self { name: format!("FAISS {factory}"), kind, index })
    }
}

impl Peer for Faiss {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> PeerKind {
        self.kind
    }

    fn turn(&mut self, probes: &Probes, calls: &[Range<usize>], k: usize) -> anyhow::Result<Vec<Call>> {
        let mut done = Vec::with_capacity(calls.len());
        for call in calls {
            let asked = probes.values(call.clone());
            let began = Instant::now();
            let result = self.index.search(asked, k)?;
            let seconds = began.elapsed().as_secs_f64();
            let hits = result.labels.chunks(k).zip(result.distances.chunks(k)).map(|(labels, scores)| {
                let hits = labels.iter().zip(scores);
                // Fewer than k: FAISS fills up with no label.
                hits.filter_map(|(label, score)| {
                    Some(Hit { row: u32::try_from(label.get()?).ok()?, score: f64::from(*score) })
                })
                .collect()
            });
            done.push(Call { seconds, answered: Answered { first: call.start, hits: hits.collect() }, stages: None });
        }
        Ok(done)
    }
}
