//! The comparison and FAISS's side of it, against brute force and against answers that lie.

use tempfile::TempDir;
use thenar_index::{GalleryId, Geometry, Index, KeyId, Lsn, NewRow, Origin, TemplateId};

use super::exhaustive::{Exhaustive, NamedRow, Ranked};
use super::*;
use crate::engine::cpu::CpuEngine;
use crate::engine::testing::{Hooked, Hooks};
use crate::engine::{CandidateRequest, CandidateRows, Engine, EngineError, GalleryView};
use crate::search::{Found, plan, score};
use crate::vault::to_row;

const DIM: usize = 64;

/// A gallery whose subjects have one to five templates of any hand; every seventh is deleted.
struct Fixture {
    index: Index,
    _dir: TempDir,
}

impl Fixture {
    /// `subjects` people whose templates are drawn by `vector`, in this order.
    fn new(subjects: u64, mut vector: impl FnMut(u64) -> Vec<f32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut index = Index::create(
            dir.path(),
            Geometry { dim: DIM, segment_rows: 1024 },
            Origin { gallery: GalleryId([6; 16]), key: KeyId([7; 16]) },
        )
        .unwrap();
        let mut template = 0;
        for subject in 0..subjects {
            for nth in 0..1 + subject % 5 {
                template += 1;
                let row = NewRow {
                    template: TemplateId(template),
                    subject: SubjectNumber(subject),
                    hand: u8::try_from((subject + nth) % 3).unwrap(),
                    label: &format!("subject-{subject}"),
                    source: template,
                    vector: &to_row(&vector(subject)).0,
                };
                index.append(&[row]).unwrap();
            }
        }
        for subject in (0..subjects).step_by(7) {
            let gone = index.forget(SubjectNumber(subject));
            index.erase(&gone[..gone.len() / 2]).unwrap();
        }
        drop(index.publish(Lsn(1)));
        Self { index, _dir: dir }
    }

    fn random(subjects: u64) -> Self {
        let gallery = SyntheticGallery::new(1, DIM);
        let mut number = 0;
        Self::new(subjects, move |_| {
            let mut row = vec![0.0; DIM];
            gallery.row(number, &mut row);
            number += 1;
            row
        })
    }

    fn probes(&self, count: u32) -> Vec<Probe> {
        let gallery = SyntheticGallery::new(1, DIM);
        let probe = |number: u32| {
            let mut vector = vec![0.0; DIM];
            if number.is_multiple_of(4) {
                gallery.stranger(number, &mut vector);
            } else {
                gallery.mate(3 * number, 0, &mut vector);
            }
            let hand = [Hand::Unspecified, Hand::Left, Hand::Right][number as usize % 3];
            Probe { hand, vector: vector.into() }
        };
        (0..count).map(probe).collect()
    }

    /// Every subject's exact score against a probe, best first, by the words of the protocol.
    fn brute_force(&self, probe: &Probe) -> Vec<(SubjectNumber, f64)> {
        let snapshot = self.index.snapshot();
        let mut scores: std::collections::BTreeMap<SubjectNumber, f64> = Default::default();
        for row in (0..snapshot.rows_end()).map(Row) {
            let Some(meta) = snapshot.meta(row) else { continue };
            if probe.hand == Hand::Unspecified || meta.hand == 0 || meta.hand == probe.hand as u8 {
                let score = score::exact(snapshot.row(row), &probe.vector);
                let best = scores.entry(meta.subject).or_insert(f64::NEG_INFINITY);
                *best = best.max(score);
            }
        }
        let mut ranked: Vec<_> = scores.into_iter().collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        ranked
    }

    /// Runs an audit of `engine`.
    fn audit(&self, engine: &dyn Engine, asked: Asked, probes: &[Probe]) -> Report {
        let snapshot = self.index.snapshot();
        let mut candidates = CandidateRows::default();
        let mut answer = |searches: &[&Search]| {
            Ok(plan::search_batch(engine, &snapshot, searches, false, &mut candidates).map(|(answers, _)| answers)?)
        };
        let mut audit = Audit::new(asked, &mut answer);
        audit.pass(&snapshot, probes, &mut |_| ControlFlow::Continue(())).unwrap();
        audit.into_report()
    }
}

fn asked(k: usize, threshold: f64) -> Asked {
    let certificates = vec![Certificate::Deterministic, Certificate::Randomised { miss_probability: 1e-12 }];
    Asked { k, threshold, certificates, batch: 7 }
}

/// An engine that finds everything but one row.
struct Blind {
    row: u32,
}

impl Hooks for Blind {
    fn after_find(
        &self,
        _view: &GalleryView<'_>,
        _request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        candidates.rows.iter_mut().for_each(|rows| rows.retain(|row| *row != self.row));
        Ok(())
    }
}

#[test]
fn faiss_ranks_the_subjects_that_brute_force_ranks() {
    let fixture = Fixture::random(900);
    let snapshot = fixture.index.snapshot();
    let probes = fixture.probes(40);
    for k in [1, 11, 101, 2000] {
        let named: Vec<HashSet<SubjectNumber>> = probes
            .iter()
            .map(|probe| fixture.brute_force(probe).iter().skip(5).step_by(90).map(|r| r.0).collect())
            .collect();
        let seen = exhaustive::search(&snapshot, &probes, k, &named, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(seen.rows, snapshot.live());
        assert!((seen.row_norm_max - 1.0).abs() < 1e-3, "{}", seen.row_norm_max);
        let tolerance = tolerance(DIM, seen.row_norm_max, 1.0 + 1e-6);
        for ((probe, found), named) in probes.iter().zip(&seen.found).zip(&named) {
            let truth = fixture.brute_force(probe);
            assert_eq!(found.best.len(), k.min(truth.len()));
            let of = |subject: SubjectNumber| truth.iter().find(|truth| truth.0 == subject).expect("comparable").1;
            let mut subjects = HashSet::new();
            for (found, truth) in found.best.iter().zip(&truth) {
                // In the place of another only where f32 cannot tell the two apart.
                assert!((of(found.subject) - truth.1).abs() <= 2.0 * tolerance, "{found:?}, {truth:?}");
                assert!((f64::from(found.score) - of(found.subject)).abs() <= tolerance);
                assert_eq!(&*found.subject_id, format!("subject-{}", found.subject.0));
                assert!(subjects.insert(found.subject), "{found:?} has two places");
            }
            let rows = found.rows_by_subject();
            assert_eq!(rows.keys().copied().collect::<HashSet<_>>(), *named);
            for (subject, rows) in rows {
                let best = rows.iter().map(|row| f64::from(row.score)).fold(f64::NEG_INFINITY, f64::max);
                assert!((best - of(subject)).abs() <= tolerance, "{subject:?}");
            }
        }
    }
}

#[test]
fn a_right_engine_agrees_also_where_everybody_is_alike_or_has_many_templates() {
    let mut same = vec![0.0; DIM];
    SyntheticGallery::new(2, DIM).row(0, &mut same);
    let engine = CpuEngine::new(2).unwrap();
    for fixture in [Fixture::random(700), Fixture::new(700, |_| same.clone())] {
        for k in [1, 10, 100] {
            let report = fixture.audit(&engine, asked(k, 0.4), &fixture.probes(33));
            assert!(report.agrees(), "{:?}", report.disagreements);
            assert_eq!((report.lines.len(), report.probes), (4, 33));
            for line in &report.lines {
                assert_eq!(line.searches, 33);
                assert!(line.score_difference_max <= report.tolerance);
            }
            let compared = |line: usize| report.lines[line].compared;
            assert_eq!(compared(1), 33 * k as u64, "without a threshold every place is taken");
            assert!((0..=compared(1)).contains(&compared(0)));
        }
    }
}

#[test]
fn an_engine_that_misses_one_row_is_found_out() {
    let fixture = Fixture::random(900);
    let probe = fixture.probes(2).remove(1);
    let (best, _) = fixture.brute_force(&probe)[0];
    let snapshot = fixture.index.snapshot();
    for row in snapshot.rows_of(best).iter() {
        if !probe.hand.comparable(Hand::from_code(snapshot.meta(*row).unwrap().hand).unwrap()) {
            continue;
        }
        let engine = Hooked::new(1, Blind { row: row.0 });
        let report = fixture.audit(&engine, asked(10, 0.4), std::slice::from_ref(&probe));
        // Another template of the same person may be as good for a place, never for the score.
        let exact = score::exact(snapshot.row(*row), &probe.vector);
        if exact == fixture.brute_force(&probe)[0].1 {
            assert!(!report.agrees(), "row {row:?}");
            assert!(report.lines.iter().all(|line| line.disagreements == 1), "{:?}", report.lines);
        }
    }
}

/// An honest pair: ten listed of a hundred, at 0.90, 0.89, ... and FAISS's view of them.
fn honest() -> (Search, Answer, Exhaustive) {
    let scores: Vec<f64> = (0..11).map(|at| 0.9 - 0.01 * f64::from(at)).collect();
    let found = scores[..10].iter().zip(1_u64..).map(|(score, number)| Found {
        subject: SubjectNumber(number),
        subject_id: format!("s{number}").into(),
        score: *score,
        hand: Hand::Left,
        template: TemplateId(100 + number),
        probes_compared: 1,
    });
    let answer = Answer { found: found.collect(), certificate: Certificate::Deterministic, gallery_size: 100 };
    let probe = Probe { hand: Hand::Left, vector: vec![0.0; DIM].into() };
    let search = asked(10, 0.5).search(
        &Line {
            certificate: Certificate::Randomised { miss_probability: 1e-12 },
            threshold: Some(0.5),
            searches: 0,
            held_deterministic: 0,
            compared: 0,
            score_difference_max: 0.0,
            ranks_within_rounding: 0,
            disagreements: 0,
            thenar: Duration::ZERO,
        },
        &probe,
    );
    let ranked = scores.iter().zip(1_u64..).map(|(score, number)| Ranked {
        subject: SubjectNumber(number),
        subject_id: format!("s{number}").into(),
        score: *score as f32,
    });
    let named = scores[..10].iter().zip(1_u64..).map(|(score, number)| NamedRow {
        subject: SubjectNumber(number),
        subject_id: format!("s{number}").into(),
        template: TemplateId(100 + number),
        hand: 1,
        score: *score as f32,
    });
    (search, answer, Exhaustive { best: ranked.collect(), named: named.collect() })
}

const TOLERANCE: f64 = 1e-5;

fn differences(change: impl FnOnce(&mut Search, &mut Answer, &mut Exhaustive)) -> Vec<Difference> {
    let (mut search, mut answer, mut faiss) = honest();
    change(&mut search, &mut answer, &mut faiss);
    compare(&search, &answer, &faiss, 100, TOLERANCE).differences
}

#[test]
fn an_honest_answer_has_no_difference() {
    let (search, answer, faiss) = honest();
    let verdict = compare(&search, &answer, &faiss, 100, TOLERANCE);
    assert_eq!(verdict.differences, []);
    assert_eq!((verdict.compared, verdict.ranks_within_rounding), (10, 0));
    assert!(verdict.score_difference_max < 1e-7);
}

#[test]
fn a_dropped_candidate_is_a_difference_wherever_it_was() {
    for at in 0..10 {
        let wrong = differences(|_, answer, _| drop(answer.found.remove(at)));
        assert!(matches!(&wrong[..], [Difference::Missing { .. }, ..]), "{at}: {wrong:?}");
    }
    // The list is full again, with the eleventh in place of the one dropped.
    let wrong = differences(|_, answer, faiss| {
        let mut eleventh = answer.found[9].clone();
        (eleventh.subject, eleventh.subject_id) = (SubjectNumber(11), "s11".into());
        (eleventh.score, eleventh.template) = (0.8, TemplateId(111));
        let mut row = faiss.named[9].clone();
        (row.subject, row.subject_id, row.template, row.score) =
            (SubjectNumber(11), "s11".into(), TemplateId(111), 0.8);
        faiss.named.push(row);
        answer.found.remove(4);
        answer.found.push(eleventh);
    });
    assert!(matches!(&wrong[..], [Difference::Missing { subject_id, .. }] if &**subject_id == "s5"), "{wrong:?}");
}

#[test]
fn whoever_is_under_the_threshold_may_be_missing() {
    // Nine are listed and FAISS's tenth is under the floor, or over it by less than rounding.
    for score in [0.4999, 0.5 + 0.9 * TOLERANCE] {
        let wrong = differences(|_, answer, faiss| {
            answer.found.truncate(9);
            faiss.best.truncate(10);
            faiss.best[9].score = score as f32;
        });
        assert_eq!(wrong, [], "{score}");
    }
    let wrong = differences(|_, answer, faiss| {
        answer.found.truncate(9);
        faiss.best[9].score = (0.5 + 1.1 * TOLERANCE) as f32;
        faiss.best.truncate(10);
    });
    assert!(matches!(wrong[..], [Difference::Missing { .. }]), "{wrong:?}");
}

#[test]
fn near_ties_are_told_and_are_no_difference() {
    // FAISS has rank 3 before rank 2, and the eleventh before the tenth, all within its rounding.
    let (search, mut answer, mut faiss) = honest();
    answer.found[2].score = answer.found[1].score - 1e-7;
    (faiss.named[2].score, faiss.best[2].score) = (0.890_001, 0.890_001);
    faiss.best.swap(1, 2);
    faiss.best[10].score = faiss.best[9].score + 5e-6;
    faiss.best.swap(9, 10);
    let verdict = compare(&search, &answer, &faiss, 100, TOLERANCE);
    assert_eq!(verdict.differences, []);
    assert_eq!(verdict.ranks_within_rounding, 3);
}

#[test]
fn swapped_ranks_are_a_difference_with_their_scores_or_without() {
    let wrong = differences(|_, answer, _| answer.found.swap(3, 4));
    assert!(matches!(wrong[..], [Difference::Order { rank: 5, .. }]), "{wrong:?}");
    let wrong = differences(|_, answer, _| {
        let (a, b) = (answer.found[3].score, answer.found[4].score);
        answer.found.swap(3, 4);
        (answer.found[3].score, answer.found[4].score) = (a, b);
    });
    assert_eq!(wrong.iter().filter(|w| matches!(w, Difference::Score { .. })).count(), 2, "{wrong:?}");
    // Equals are ordered by template.
    let wrong = differences(|_, answer, faiss| {
        answer.found[4].score = answer.found[3].score;
        faiss.named[4].score = faiss.named[3].score;
        answer.found.swap(3, 4);
    });
    assert!(matches!(wrong[..], [Difference::Order { rank: 5, .. }]), "{wrong:?}");
}

#[test]
fn a_wrong_score_is_a_difference_in_both_directions_from_the_tolerance_on() {
    for sign in [-1.0, 1.0] {
        assert_eq!(differences(|_, answer, _| answer.found[9].score += sign * 0.9 * TOLERANCE), []);
        let wrong = differences(|_, answer, _| answer.found[9].score += sign * 1.2 * TOLERANCE);
        assert!(matches!(wrong[..], [Difference::Score { .. }, Difference::Template { .. }]), "{wrong:?}");
    }
    let wrong = differences(|_, answer, _| answer.found[9].score = f64::NAN);
    assert!(wrong.iter().any(|w| matches!(w, Difference::Score { .. })), "{wrong:?}");
}

#[test]
fn what_should_not_be_listed_is_a_difference() {
    let of = |change: fn(&mut Search, &mut Answer, &mut Exhaustive)| differences(change);
    let extra = of(|_, answer, faiss| {
        // Deleted, say: FAISS has no row of it.
        faiss.named.pop();
        faiss.best.remove(9);
        answer.found[9].subject = SubjectNumber(10);
    });
    assert!(extra.iter().any(|w| matches!(w, Difference::NotThere { .. })), "{extra:?}");
    let renamed = of(|_, answer, _| answer.found[0].subject_id = "somebody".into());
    assert!(matches!(renamed[..], [Difference::NotThere { .. }]), "{renamed:?}");
    let low = of(|search, _, _| search.floor = 0.815);
    assert!(matches!(low[..], [Difference::UnderFloor { .. }]), "{low:?}");
    let twice = of(|_, answer, _| answer.found[1] = answer.found[0].clone());
    assert!(twice.iter().any(|w| matches!(w, Difference::Twice { .. })), "{twice:?}");
    let many = of(|search, _, _| search.k = 9);
    assert!(matches!(many[..], [Difference::TooMany { listed: 10, asked: 9 }]), "{many:?}");
    let template = of(|_, answer, _| answer.found[2].template = TemplateId(777));
    assert!(matches!(template[..], [Difference::Template { template: 777, .. }]), "{template:?}");
    let hand = of(|_, answer, _| answer.found[2].hand = Hand::Right);
    assert!(matches!(hand[..], [Difference::Template { .. }]), "{hand:?}");
    let size = of(|_, answer, _| answer.gallery_size = 99);
    assert!(matches!(size[..], [Difference::GallerySize { stated: 99, counted: 100 }]), "{size:?}");
    let weak = of(|_, answer, _| answer.certificate = Certificate::Randomised { miss_probability: 1e-9 });
    assert!(matches!(weak[..], [Difference::Certificate { .. }]), "{weak:?}");
}

#[test]
fn the_tolerance_is_as_documented_and_holds_for_sums_in_bad_orders() {
    assert!((tolerance(512, 1.0, 1.0) - 3.05e-5).abs() < 0.05e-5, "{}", tolerance(512, 1.0, 1.0));
    // All factors of one sign and one size: the rounding errors of a plain f32 sum add up.
    for dim in [64, 512, 2048] {
        let value = half::f16::from_f64(0.999 / (dim as f64).sqrt());
        let (row, probe) = (vec![value; dim], vec![(0.7331 / (dim as f64).sqrt()) as f32; dim]);
        let plain: f32 = row.iter().zip(&probe).fold(0.0, |sum, (x, q)| sum + x.to_f32() * q);
        let wide: Vec<f32> = row.iter().map(|x| x.to_f32()).collect();
        let error = (f64::from(plain) - score::exact(&row, &probe)).abs();
        let bound = tolerance(dim, norm(&wide), norm(&probe));
        assert!(error <= bound, "{dim}: {error:e} of {bound:e}");
        assert!(error > bound / 1000.0, "{dim}: {error:e} comes nowhere near {bound:e}");
    }
}

#[test]
fn sampled_probes_follow_from_the_seed_and_noise_is_as_long_as_asked() {
    let fixture = Fixture::random(300);
    let snapshot = fixture.index.snapshot();
    let vault = crate::vault::Vault::new(crate::vault::MasterKey::from_bytes([5; 32]));
    let rotation = Rotation::new(&vault, DIM).unwrap();
    let made = |noise: f32, seed: u64| {
        let sampler = Sampler::new(&snapshot, 50, noise, seed).unwrap();
        let probes = sampler.probes(&snapshot, &rotation, 0, 50);
        let scores: Vec<f64> =
            probes.iter().zip(&sampler.rows).map(|(p, row)| score::exact(snapshot.row(*row), &p.vector)).collect();
        assert!(sampler.rows.iter().all(|row| snapshot.is_live(*row)));
        assert!(sampler.rows.iter().collect::<HashSet<_>>().len() > 30, "from all over the gallery");
        assert!(probes.iter().all(|p| (norm(&p.vector) - 1.0).abs() < 1e-6));
        (probes.into_iter().map(|p| p.vector).collect::<Vec<_>>(), scores.iter().sum::<f64>() / 50.0)
    };
    let (first, mean) = made(0.85, 3);
    assert_eq!(first, made(0.85, 3).0);
    assert_ne!(first, made(0.85, 4).0);
    assert!((mean - 1.0 / (1.0_f64 + 0.85 * 0.85).sqrt()).abs() < 0.05, "{mean}");
    assert!(made(0.0, 3).1 > 0.999);
    let empty = Fixture::random(0);
    assert!(matches!(Sampler::new(&empty.index.snapshot(), 1, 0.0, 1), Err(AuditError::EmptyGallery)));
}
