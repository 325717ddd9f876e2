//! Compares one answer of Thenar with what FAISS says about the same rows.
//!
//! Thenar's score E of a row x and a probe q is an f64 sum, FAISS's score F one in f32, and both
//! are near the true product s. Every term x_i q_i is rounded at most n times, whatever the order of
//! the additions, fused or not, blocked by a BLAS or not: once as a product and once at each of at
//! most n - 1 additions. So (Higham, Accuracy and Stability of Numerical Algorithms, 2nd
//! ed., section 3.1), with gamma_n(u) = n u / (1 - n u), and by Cauchy-Schwarz
//!
//! ```text
//! |F - s| <= gamma_n(2^-24) sum |x_i q_i| + n 2^-125 <= gamma_n(2^-24) ‖x‖ ‖q‖ + n 2^-125
//! |E - s| <= gamma_n(2^-53) ‖x‖ ‖q‖
//! ```
//!
//! where 2^-125 per term covers products and sums below f32's normal range, even if they are flushed
//! to zero. [`tolerance`] is the sum of the two, with the lengths as they are measured:
//! 3.1e-5 at n = 512. FAISS gets the row as it is stored, since every f16 is an f32.
//!
//! A subject's score is the largest of its rows', so it differs by no more than the largest of those
//! differences. Hence a right answer never fails: every listed subject has |E - F| within the
//! tolerance, and every subject that is rightly not listed has F <= E + tolerance, where E is at most
//! the score that was needed (the last score listed if the list is full, otherwise the floor). A tie at
//! the last rank, or two subjects that f32 cannot tell apart, are not differences. Anything beyond is.
//!
//! Pure functions. Does not know FAISS or how Thenar found its answer.

use std::collections::HashSet;

use thenar_index::SubjectNumber;

use super::exhaustive::Exhaustive;
use crate::search::{Answer, Search};

/// How an answer differs from FAISS's by more than rounding.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Difference {
    /// A subject belongs in the answer and is not listed.
    #[error("{subject_id} is missing: FAISS gives it {faiss:.6}, {needed:.6} was enough to be listed")]
    Missing {
        /// Who.
        subject_id: Box<str>,
        /// FAISS's score.
        faiss: f32,
        /// The score that was enough to be listed.
        needed: f64,
    },
    /// A listed subject has no live template that can be compared.
    #[error("{subject_id} is listed, and no template of it can be compared with this probe")]
    NotThere {
        /// Who.
        subject_id: Box<str>,
    },
    /// A score is wrong.
    #[error("{subject_id} has a score of {thenar:.6}, in FAISS {faiss:.6}")]
    Score {
        /// Who.
        subject_id: Box<str>,
        /// Thenar's.
        thenar: f64,
        /// FAISS's.
        faiss: f32,
    },
    /// The template, hand or count of probes that come with a score are not those of its best row.
    #[error("{subject_id} is listed with template {template}, which does not have that score and hand")]
    Template {
        /// Who.
        subject_id: Box<str>,
        /// As listed.
        template: u64,
    },
    /// A listed subject is below the floor of the search.
    #[error("{subject_id} is listed with {thenar:.6}, below the floor of {floor:.6}")]
    UnderFloor {
        /// Who.
        subject_id: Box<str>,
        /// Thenar's score.
        thenar: f64,
        /// The floor of the search.
        floor: f64,
    },
    /// The list is not ordered by falling score, ties by the smaller template.
    #[error("rank {rank} ({subject_id}) should be before the one above it")]
    Order {
        /// From 1.
        rank: usize,
        /// Who is there.
        subject_id: Box<str>,
    },
    /// A subject is listed twice.
    #[error("{subject_id} is listed twice")]
    Twice {
        /// Who.
        subject_id: Box<str>,
    },
    /// More are listed than were asked for.
    #[error("{listed} subjects are listed, {asked} were asked for")]
    TooMany {
        /// Listed.
        listed: usize,
        /// Asked for.
        asked: usize,
    },
    /// The answer states another size of the gallery.
    #[error("the answer is over {stated} templates, there are {counted}")]
    GallerySize {
        /// In the answer.
        stated: u64,
        /// Live rows.
        counted: u64,
    },
    /// The answer's certificate is weaker than the one asked for.
    #[error("the answer's certificate has a miss probability of {held:e}, {asked:e} was asked for")]
    Certificate {
        /// Of the answer.
        held: f64,
        /// Of the search.
        asked: f64,
    },
}

/// How one answer compares.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Verdict {
    /// Listed subjects whose scores were compared.
    pub compared: u64,
    /// The largest distance between Thenar's and FAISS's score of a listed subject.
    pub score_difference_max: f64,
    /// Ranks at which FAISS, rounding to f32, has another subject.
    pub ranks_within_rounding: u64,
    /// What is wrong beyond rounding.
    pub differences: Vec<Difference>,
}

/// How far FAISS's score of a row may be from Thenar's, by the module's argument.
#[must_use]
pub fn tolerance(dim: usize, row_norm: f64, probe_norm: f64) -> f64 {
    let gamma = |roundoff: f64| {
        let sum = dim as f64 * roundoff;
        sum / (1.0 - sum)
    };
    let (single, double) = (gamma(f64::from(f32::EPSILON) / 2.0), gamma(f64::EPSILON / 2.0));
    // The lengths are f64 sums themselves, right to parts in 10^13.
    let lengths = row_norm * probe_norm * (1.0 + 1e-12);
    (single + double) * lengths + dim as f64 * 2.0 * f64::from(f32::MIN_POSITIVE)
}

/// Compares the answer to `search`, a search with one probe, with what FAISS found over `rows` live
/// rows: `k + 1` ranked subjects at least, or all, and the rows of every subject listed.
#[must_use]
pub fn compare(search: &Search, answer: &Answer, faiss: &Exhaustive, rows: u64, tolerance: f64) -> Verdict {
    assert_eq!(search.probes.len(), 1, "fused scores are not compared");
    let mut verdict = Verdict::default();
    let wrong = &mut verdict.differences;
    let listed = &answer.found;
    if answer.gallery_size != rows {
        wrong.push(Difference::GallerySize { stated: answer.gallery_size, counted: rows });
    }
    let (held, asked) = (answer.certificate.miss_probability(), search.certificate.miss_probability());
    if held > asked {
        wrong.push(Difference::Certificate { held, asked });
    }
    if listed.len() > search.k {
        wrong.push(Difference::TooMany { listed: listed.len(), asked: search.k });
    }

    let rows_of = faiss.rows_by_subject();
    let mut seen: HashSet<SubjectNumber> = HashSet::new();
    for (at, found) in listed.iter().enumerate() {
        let subject_id = || found.subject_id.clone();
        if !seen.insert(found.subject) {
            wrong.push(Difference::Twice { subject_id: subject_id() });
        }
        if found.score < search.floor {
            let (thenar, floor) = (found.score, search.floor);
            wrong.push(Difference::UnderFloor { subject_id: subject_id(), thenar, floor });
        }
        let above = at.checked_sub(1).map(|above| &listed[above]);
        let is_after = |above: &crate::search::Found| {
            above.score > found.score || (above.score == found.score && above.template < found.template)
        };
        if above.is_some_and(|above| !is_after(above)) {
            wrong.push(Difference::Order { rank: at + 1, subject_id: subject_id() });
        }

        let rows = rows_of.get(&found.subject).map_or(&[][..], Vec::as_slice);
        let best = rows.iter().map(|row| row.score).max_by(f32::total_cmp);
        let Some(best) = best.filter(|_| rows.iter().all(|row| row.subject_id == found.subject_id)) else {
            wrong.push(Difference::NotThere { subject_id: subject_id() });
            continue;
        };
        verdict.compared += 1;
        let apart = (found.score - f64::from(best)).abs();
        verdict.score_difference_max = verdict.score_difference_max.max(apart);
        // Written so that a NaN score fails.
        let is_near = |score: f32| (found.score - f64::from(score)).abs() <= tolerance;
        if !is_near(best) {
            wrong.push(Difference::Score { subject_id: subject_id(), thenar: found.score, faiss: best });
        }
        let its_row = rows.iter().find(|row| row.template == found.template);
        let has_it = its_row.is_some_and(|row| is_near(row.score) && row.hand == found.hand as u8);
        if !has_it || found.probes_compared != 1 {
            wrong.push(Difference::Template { subject_id: subject_id(), template: found.template.0 });
        }
    }

    let needed = match listed.last() {
        Some(last) if listed.len() >= search.k => last.score,
        _ => search.floor,
    };
    for ranked in faiss.best.iter().filter(|ranked| !seen.contains(&ranked.subject)) {
        if f64::from(ranked.score) - tolerance > needed {
            let subject_id = ranked.subject_id.clone();
            wrong.push(Difference::Missing { subject_id, faiss: ranked.score, needed });
        }
    }
    let moved = listed.iter().zip(&faiss.best).filter(|(found, ranked)| found.subject != ranked.subject);
    verdict.ranks_within_rounding = if verdict.differences.is_empty() { moved.count() as u64 } else { 0 };
    verdict
}
