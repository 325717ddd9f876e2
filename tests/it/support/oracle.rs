//! The answer by definition: every template of every subject, one after the other.
//!
//! Written from the words of the protocol alone: a subject's score for a probe is that of its best
//! comparable template, its fused score the mean over the probes that have one, at least the smallest and
//! at most the largest of these scores; ties go to the smaller template id. Shares no code with the server
//! except the secret rotation, for [`Rotated`]: with the rows that the server stores, scores must agree to
//! the bit.

use half::f16;
use thenar::api::proto;
use thenar::model::{Embedding, Hand};
use thenar::vault::{KeySource, MasterKey, Rotation, Vault, to_row};

use super::palms::Palm;

/// How far rotation and the rounding of a row to f16 may move a score.
pub(crate) const TOLERANCE: f64 = 2e-3;

/// A subject with stored templates: number, hand, vector.
#[derive(Clone)]
pub(crate) struct Subject<V> {
    pub(crate) id: String,
    pub(crate) templates: Vec<(u64, Hand, V)>,
}

/// Everybody, as the client knows them.
pub(crate) type Gallery = Vec<Subject<Vec<f32>>>;

/// One subject of the ranking.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ranked {
    pub(crate) subject: String,
    pub(crate) score: f64,
    pub(crate) template: u64,
    pub(crate) hand: Hand,
    pub(crate) compared: u32,
}

/// Everybody who can be compared, best first.
pub(crate) fn rank<V, P>(gallery: &[Subject<V>], probes: &[(Hand, P)], score: impl Fn(&V, &P) -> f64) -> Vec<Ranked> {
    let comparable = |a: Hand, b: Hand| a == b || a == Hand::Unspecified || b == Hand::Unspecified;
    let mut ranked = Vec::new();
    for subject in gallery {
        let mut best_of_probes = Vec::new();
        let mut best: Option<(f64, u64, Hand)> = None;
        for (hand, probe) in probes {
            let scores: Vec<(f64, u64, Hand)> = subject
                .templates
                .iter()
                .filter(|(_, template_hand, _)| comparable(*hand, *template_hand))
                .map(|(number, template_hand, vector)| (score(vector, probe), *number, *template_hand))
                .collect();
            let better = |a: &(f64, u64, Hand), b: &(f64, u64, Hand)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
            if let Some(top) = scores.into_iter().min_by(better) {
                best_of_probes.push(top.0);
                best = Some(best.map_or(top, |old| if better(&top, &old).is_lt() { top } else { old }));
            }
        }
        if let Some((_, template, hand)) = best {
            let compared = best_of_probes.len() as u32;
            let mean = best_of_probes.iter().sum::<f64>() / f64::from(compared);
            // A mean lies within its scores, except for rounding.
            best_of_probes.sort_by(f64::total_cmp);
            let score = mean.max(best_of_probes[0]).min(best_of_probes[best_of_probes.len() - 1]);
            ranked.push(Ranked { subject: subject.id.clone(), score, template, hand, compared });
        }
    }
    ranked.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.template.cmp(&b.template)));
    ranked
}

/// Cosine of two vectors in f64, whatever their lengths.
pub(crate) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The score as published: sixteen f64 sums, component `i` into sum `i % 16`, then the upper half
/// added onto the lower until one is left.
pub(crate) fn published_score(row: &[f16], probe: &[f32]) -> f64 {
    let mut sums = [0.0_f64; 16];
    for (i, (x, q)) in row.iter().zip(probe).enumerate() {
        sums[i % 16] += f64::from(*x) * f64::from(*q);
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}

/// The ranking over the client's own vectors.
pub(crate) fn rank_by_cosine(gallery: &Gallery, probes: &[Palm]) -> Vec<Ranked> {
    let probes: Vec<_> = probes.iter().map(|p| (p.hand, p.values.clone())).collect();
    rank(gallery, &probes, |a, b| cosine(a, b))
}

/// The server's key, to see what it stores.
pub(crate) struct Rotated {
    rotation: Rotation,
    dim: usize,
}

impl Rotated {
    pub(crate) fn new(key_file: &std::path::Path, dim: usize) -> Self {
        let key = MasterKey::load(&KeySource::File(key_file.to_owned())).expect("the key is there");
        let rotation = Rotation::new(&Vault::new(key), dim).expect("a good dimension");
        Self { rotation, dim }
    }

    pub(crate) fn probe(&self, values: &[f32]) -> Vec<f32> {
        let embedding = Embedding::new(values.to_vec(), self.dim).expect("a good embedding");
        self.rotation.rotate(embedding.values())
    }

    /// What the index and the registry keep of this embedding.
    pub(crate) fn row(&self, values: &[f32]) -> Vec<f16> {
        to_row(&self.probe(values)).0.into_vec()
    }

    /// The gallery as it is stored.
    pub(crate) fn gallery(&self, gallery: &Gallery) -> Vec<Subject<Vec<f16>>> {
        let store = |s: &Subject<Vec<f32>>| Subject {
            id: s.id.clone(),
            templates: s.templates.iter().map(|(n, h, v)| (*n, *h, self.row(v))).collect(),
        };
        gallery.iter().map(store).collect()
    }

    /// The ranking over what is stored: to the bit.
    pub(crate) fn rank(&self, stored: &[Subject<Vec<f16>>], probes: &[Palm]) -> Vec<Ranked> {
        let probes: Vec<_> = probes.iter().map(|p| (p.hand, self.probe(&p.values))).collect();
        rank(stored, &probes, |row, probe| published_score(row, probe))
    }
}

pub(crate) fn hand(code: i32) -> Hand {
    match proto::Hand::try_from(code).expect("a hand") {
        proto::Hand::Unspecified => Hand::Unspecified,
        proto::Hand::Left => Hand::Left,
        proto::Hand::Right => Hand::Right,
    }
}

/// The candidates of an answer as ranked subjects; ranks must count from 1.
pub(crate) fn answered(answer: &proto::IdentifyResponse) -> Vec<Ranked> {
    let each = answer.candidates.iter().zip(1..).map(|(c, rank)| {
        assert_eq!(c.rank, rank, "ranks count from 1");
        Ranked {
            subject: c.subject_id.clone(),
            score: c.score,
            template: c.template_id,
            hand: hand(c.hand),
            compared: c.probes_compared,
        }
    });
    each.collect()
}

/// Checks an answer against the ranking over the client's own vectors, within the tolerance: the
/// scores, the order wherever the gap is wider, and that nobody is missing or listed wrongly.
pub(crate) fn check_close(what: &str, found: &[Ranked], all: &[Ranked], from: f64, max_candidates: usize) {
    let score_of = |subject: &str| all.iter().find(|r| r.subject == subject);
    for (place, f) in found.iter().enumerate() {
        let truth = score_of(&f.subject).unwrap_or_else(|| panic!("{what}: {} cannot be compared", f.subject));
        assert!((f.score - truth.score).abs() <= TOLERANCE, "{what}: {f:?} should be {truth:?}");
        assert_eq!(f.compared, truth.compared, "{what}: {f:?} should be {truth:?}");
        assert!(truth.score >= all[place].score - 2.0 * TOLERANCE, "{what}: {f:?} is no {place}th of {all:?}");
        assert!(f.score >= from, "{what}: {f:?} is under {from}");
    }
    let sure = all.iter().take_while(|r| r.score >= from + TOLERANCE).count().min(max_candidates);
    let possible = all.iter().take_while(|r| r.score >= from - TOLERANCE).count().min(max_candidates);
    assert!((sure..=possible).contains(&found.len()), "{what}: {} listed, not {sure}..={possible}", found.len());
    // Everybody clearly better than the last one listed (or than the floor) is listed.
    let floor = if found.len() == max_candidates { found.last().map_or(from, |f| f.score) } else { from };
    for r in all.iter().take_while(|r| r.score > floor + 2.0 * TOLERANCE) {
        assert!(found.iter().any(|f| f.subject == r.subject), "{what}: {r:?} is missing");
    }
}

/// What the policy (threshold, margin) makes of a ranking: the decision, and who is listed.
pub(crate) fn expected(
    all: &[Ranked],
    (threshold, margin): (f64, f64),
    asked: Option<f64>,
    max_candidates: usize,
) -> (proto::Decision, Vec<Ranked>) {
    let threshold = asked.map_or(threshold, |a| a.max(threshold));
    let list_from = match asked {
        None => threshold,
        Some(-1.0) => f64::NEG_INFINITY,
        Some(asked) => asked,
    };
    let mut listed = all.iter().filter(|r| r.score >= list_from).count();
    let decision = match all.first() {
        Some(best) if best.score >= threshold => {
            let close = all.iter().filter(|r| r.score == best.score || best.score - r.score < margin).count();
            if close > 1 {
                listed = listed.max(close);
                proto::Decision::Inconclusive
            } else {
                proto::Decision::Match
            }
        }
        _ => proto::Decision::NoMatch,
    };
    (decision, all[..listed.min(max_candidates)].to_vec())
}
