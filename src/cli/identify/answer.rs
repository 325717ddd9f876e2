//! One row's answer, for programs and for people.

use serde::Serialize;

use crate::api::proto::IdentifyResponse;
use crate::cli::output::{Failure, certificate_word, decision_word, hand_word, seconds};

/// One row's answer.
#[derive(Debug, Serialize)]
pub(super) struct Answer {
    pub(super) row: u64,
    #[serde(flatten)]
    pub(super) outcome: Outcome,
    /// From sending to the answer, as this client saw it.
    pub(super) ms: f64,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Outcome {
    Found(Found),
    Failed { error: Failure },
}

#[derive(Debug, Serialize)]
pub(super) struct Found {
    decision: String,
    threshold: f64,
    gallery_size: u64,
    candidates: Vec<Candidate>,
    certificate: Certificate,
    search_id: String,
    server_ms: f64,
}

#[derive(Debug, Serialize)]
struct Candidate {
    rank: u32,
    subject_id: String,
    score: f64,
    hand: String,
    template_id: u64,
    probes_compared: u32,
}

#[derive(Debug, Serialize)]
struct Certificate {
    kind: String,
    miss_probability: f64,
}

impl From<IdentifyResponse> for Found {
    fn from(response: IdentifyResponse) -> Self {
        let certificate = response.certificate.unwrap_or_default();
        let candidates = response.candidates.into_iter().map(|candidate| Candidate {
            rank: candidate.rank,
            subject_id: candidate.subject_id,
            score: candidate.score,
            hand: hand_word(candidate.hand),
            template_id: candidate.template_id,
            probes_compared: candidate.probes_compared,
        });
        Self {
            decision: decision_word(response.decision),
            threshold: response.threshold,
            gallery_size: response.gallery_size,
            candidates: candidates.collect(),
            certificate: Certificate {
                kind: certificate_word(certificate.kind),
                miss_probability: certificate.miss_probability,
            },
            search_id: response.search_id,
            server_ms: seconds(response.timing.and_then(|timing| timing.total)) * 1e3,
        }
    }
}

impl Answer {
    /// Whether the row was not answered.
    pub(super) fn is_failure(&self) -> bool {
        matches!(self.outcome, Outcome::Failed { .. })
    }

    /// The cells of the row's line: row, decision, the first two candidates with their scores, and ms.
    pub(super) fn cells(&self) -> Vec<String> {
        let (decision, candidates) = match &self.outcome {
            Outcome::Found(found) => (found.decision.clone(), found.candidates.as_slice()),
            Outcome::Failed { error } => (error.to_string(), &[][..]),
        };
        let mut cells = vec![self.row.to_string(), decision];
        for at in 0..2 {
            match candidates.get(at) {
                Some(candidate) => cells.extend([candidate.subject_id.clone(), format!("{:.4}", candidate.score)]),
                None => cells.extend(["-".to_owned(), "-".to_owned()]),
            }
        }
        cells.push(format!("{:.1}", self.ms));
        cells
    }
}
