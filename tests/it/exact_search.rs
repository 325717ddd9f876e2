//! The planner and the engines over real snapshots, without a server: ids and scores are those of
//! brute force, to the bit, on every path of the CPU engine and on the GPU engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use roaring::RoaringBitmap;
use tempfile::TempDir;
use thenar::engine::cpu::CpuEngine;
use thenar::engine::gpu::{AdapterChoice, GpuEngine};
use thenar::engine::{CandidateRows, Engine, GalleryView};
use thenar::model::Hand;
use thenar::search::{Answer, Certificate, NO_FLOOR, Probe, Search, plan};
use thenar::simd::Simd;
use thenar_index::{GalleryId, Geometry, Index, KeyId, Lsn, NewRow, Origin, SubjectNumber, TemplateId};

use crate::support::machine::{gpu_is_required, llvmpipe_is_here, skip};
use crate::support::oracle::{Ranked, Subject, published_score, rank};
use crate::support::palms::{Palms, Shape};

const SEED: u64 = 31;

/// An index with rows, and the same rows as the oracle knows them.
struct Fixture {
    index: Index,
    subjects: Vec<Subject<Vec<f16>>>,
    templates: u64,
    lsn: u64,
    _dir: TempDir,
}

impl Fixture {
    /// `count` rows of `shape`, one to five a subject.
    fn new(palms: &mut Palms, shape: Shape, dim: usize, count: usize, segment_rows: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let index = Index::create(
            dir.path(),
            Geometry { dim, segment_rows },
            Origin { gallery: GalleryId([6; 16]), key: KeyId([7; 16]) },
        )
        .unwrap();
        let mut fixture = Self { index, subjects: Vec::new(), templates: 0, lsn: 0, _dir: dir };
        let vectors = shape.vectors(palms, count);
        let mut rest = vectors.as_slice();
        while !rest.is_empty() {
            // Every other subject has one template.
            let own = if palms.below(2) == 0 { 1 } else { 1 + palms.below(5) }.min(rest.len());
            let (now, later) = rest.split_at(own);
            rest = later;
            let number = fixture.subjects.len();
            let templates = now.iter().map(|vector| {
                fixture.templates += 1;
                let row: Vec<f16> = vector.iter().map(|v| f16::from_f32(*v)).collect();
                (fixture.templates, palms.hand(), row)
            });
            let subject = Subject { id: format!("subject-{number}"), templates: templates.collect() };
            fixture.subjects.push(subject);
        }
        fixture.append();
        fixture.publish();
        fixture
    }

    fn append(&mut self) {
        let rows: Vec<NewRow<'_>> = self
            .subjects
            .iter()
            .zip(0..)
            .flat_map(|(subject, number)| {
                subject.templates.iter().map(move |(template, hand, row)| NewRow {
                    template: TemplateId(*template),
                    subject: SubjectNumber(number),
                    hand: *hand as u8,
                    label: &subject.id,
                    source: *template,
                    vector: row,
                })
            })
            .collect();
        self.index.append(&rows).unwrap();
    }

    fn publish(&mut self) {
        self.lsn += 1;
        drop(self.index.publish(Lsn(self.lsn)));
    }

    /// Takes out every `nth` subject and single templates of others; half of those rows are
    /// overwritten too, the rest are only dead. Tells the engines as the gallery would.
    fn forget_some(&mut self, nth: usize, engines: &[Arc<dyn Engine>]) {
        let mut gone = Vec::new();
        for (number, subject) in self.subjects.iter_mut().enumerate() {
            if number % nth == 0 {
                gone.extend(self.index.forget(SubjectNumber(number as u64)));
                subject.templates.clear();
            } else if number % nth == 1 && subject.templates.len() > 1 {
                let (template, ..) = subject.templates.remove(0);
                gone.extend(self.index.forget_template(TemplateId(template)));
            }
        }
        self.publish();
        gone.truncate(gone.len() / 2);
        let rows: Vec<u32> = gone.iter().map(|r| r.0).collect();
        for engine in engines {
            let snapshot = self.index.snapshot();
            engine.follow(&GalleryView::of(&snapshot)).unwrap();
            engine.erase(&rows).unwrap();
        }
        self.index.erase(&gone).unwrap();
    }

    fn live(&self) -> u64 {
        self.subjects.iter().map(|s| s.templates.len() as u64).sum()
    }
}

/// Every engine of this machine, named.
fn engines() -> Vec<Arc<dyn Engine>> {
    let mut engines: Vec<Arc<dyn Engine>> = Vec::new();
    for simd in Simd::ALL.into_iter().filter(|s| s.is_available()) {
        engines.push(Arc::new(CpuEngine::with_simd(2, simd).unwrap()));
    }
    if llvmpipe_is_here() || gpu_is_required() {
        engines.push(Arc::new(GpuEngine::new(AdapterChoice::Named("llvmpipe".into())).unwrap()));
    } else {
        skip("the GPU engine: there is no adapter named llvmpipe");
    }
    engines
}

fn searches(palms: &mut Palms, fixture: &Fixture, dim: usize, count: usize) -> Vec<Search> {
    let mut searches = Vec::new();
    for number in 0..count {
        let mut probes = Vec::new();
        for _ in 0..[1, 1, 2, 4, 3][number % 5] {
            let vector = match fixture.subjects.get(palms.below(fixture.subjects.len().max(1))) {
                Some(subject) if number % 3 != 0 && !subject.templates.is_empty() => {
                    let origin: Vec<f32> = subject.templates[0].2.iter().map(|v| v.to_f32()).collect();
                    let noise = [0.0, 0.001, 0.5, 0.9][palms.below(4)];
                    palms.near(&origin, noise)
                }
                _ => palms.vector(),
            };
            assert_eq!(vector.len(), dim);
            let hand = if number % 4 == 0 { Hand::Unspecified } else { palms.hand() };
            probes.push(Probe { hand, vector: vector.into() });
        }
        let k = [1, 2, 10, 100, 7, 33][number % 6];
        let floor = [NO_FLOOR, 0.5, 0.05, -0.3, 0.999, NO_FLOOR, -1.0][number % 7];
        let certificate = if palms.below(2) == 0 {
            Certificate::Deterministic
        } else {
            Certificate::randomised(1e-12).expect("it is in the range")
        };
        // Everybody, nearly nobody, or half of all.
        let one_in = [0, 0, 50, 2][number % 4];
        let allowed = (one_in > 0).then(|| {
            let numbers = 0..u32::try_from(fixture.subjects.len()).expect("few subjects");
            Arc::new(numbers.filter(|_| palms.below(one_in) == 0).collect::<RoaringBitmap>())
        });
        searches.push(Search { probes, floor, k, certificate, allowed });
    }
    searches
}

/// The answer by definition.
fn truth(fixture: &Fixture, search: &Search) -> Vec<Ranked> {
    let probes: Vec<_> = search.probes.iter().map(|p| (p.hand, p.vector.to_vec())).collect();
    let subjects: Vec<Subject<Vec<f16>>> = fixture
        .subjects
        .iter()
        .zip(0..)
        .filter(|(_, number)| search.allowed.as_ref().is_none_or(|allowed| allowed.contains(*number)))
        .map(|(subject, _)| subject.clone())
        .collect();
    let mut ranked = rank(&subjects, &probes, |row, probe| published_score(row, probe));
    ranked.retain(|r| r.score >= search.floor);
    ranked.truncate(search.k);
    ranked
}

fn as_ranked(answer: &Answer) -> Vec<Ranked> {
    let each = answer.found.iter().map(|f| Ranked {
        subject: f.subject_id.as_ref().into(),
        score: f.score,
        template: f.template.0,
        hand: f.hand,
        compared: f.probes_compared,
    });
    each.collect()
}

/// An engine that counts what overflowed, so that a test knows that it did.
struct Counting(Arc<dyn Engine>, AtomicUsize);

impl Engine for Counting {
    fn describe(&self) -> thenar::engine::EngineDescription {
        self.0.describe()
    }
    fn follow(&self, view: &GalleryView<'_>) -> Result<(), thenar::engine::EngineError> {
        self.0.follow(view)
    }
    fn erase(&self, rows: &[u32]) -> Result<(), thenar::engine::EngineError> {
        self.0.erase(rows)
    }
    fn find_candidates(
        &self,
        view: &GalleryView<'_>,
        request: &thenar::engine::CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) -> Result<(), thenar::engine::EngineError> {
        self.0.find_candidates(view, request, candidates)?;
        self.1.fetch_add(candidates.overflowed.iter().filter(|o| **o).count(), Ordering::Relaxed);
        Ok(())
    }
}

/// Checks every engine on one fixture; returns how many probes overflowed in all.
fn check(what: &str, fixture: &Fixture, engines: &[Arc<dyn Engine>], searches: &[Search]) -> usize {
    let truths: Vec<Vec<Ranked>> = searches.iter().map(|s| truth(fixture, s)).collect();
    let snapshot = fixture.index.snapshot();
    let mut candidates = CandidateRows::default();
    let mut overflowed = 0;
    for engine in engines {
        let engine = Counting(Arc::clone(engine), AtomicUsize::new(0));
        let name = engine.describe().adapter;
        engine.follow(&GalleryView::of(&snapshot)).unwrap();
        // One batch of all, and each alone: other kernels are taken for few probes.
        let batch: Vec<&Search> = searches.iter().collect();
        let (answers, _) = plan::search_batch(&engine, &snapshot, &batch, false, &mut candidates).unwrap();
        for (number, (answer, truth)) in answers.iter().zip(&truths).enumerate() {
            let search = &searches[number];
            let what = format!("{what}, {name}, search {number}: k {}, floor {}", search.k, search.floor);
            assert_eq!(answer.gallery_size, fixture.live(), "{what}");
            assert_eq!(as_ranked(answer), *truth, "{what}");
            assert!(answer.found.iter().zip(truth).all(|(a, b)| a.score.to_bits() == b.score.to_bits()), "{what}");
            if number % 4 == 0 {
                let (alone, _) =
                    plan::search_batch(&engine, &snapshot, &batch[number..=number], false, &mut candidates).unwrap();
                assert_eq!(as_ranked(&alone[0]), *truth, "{what}, alone");
            }
        }
        overflowed += engine.1.load(Ordering::Relaxed);
    }
    // The scan that answers an overflow is held against the same truth.
    for (number, (search, truth)) in searches.iter().zip(&truths).enumerate().step_by(3) {
        let found = plan::scan(&snapshot, search);
        let scanned = Answer { found, certificate: thenar::search::Certificate::Deterministic, gallery_size: 0 };
        assert_eq!(as_ranked(&scanned), *truth, "{what}, scan, search {number}");
    }
    overflowed
}

fn every_gallery_of(dim: usize) {
    let engines = engines();
    let mut palms = Palms::new(SEED + dim as u64, dim);
    for count in [0, 1, 2, 63, 64, 65, 1000] {
        for shape in Shape::ALL {
            if count < 60 && shape != Shape::Random && shape != Shape::AllEqual {
                continue;
            }
            let what = format!("seed {}, dim {dim}, {count} rows, {shape:?}", SEED + dim as u64);
            let mut fixture = Fixture::new(&mut palms, shape, dim, count, 256);
            let number = if count == 1000 { 42 } else { 14 };
            let some = searches(&mut palms, &fixture, dim, number);
            check(&what, &fixture, &engines, &some);
            if count > 2 {
                fixture.forget_some(3, &engines);
                let some = searches(&mut palms, &fixture, dim, number);
                check(&format!("{what}, some forgotten"), &fixture, &engines, &some);
            }
        }
    }
}

#[test]
fn with_64_dimensions_every_engine_answers_as_brute_force() {
    every_gallery_of(64);
}

#[test]
fn with_128_dimensions_every_engine_answers_as_brute_force() {
    every_gallery_of(128);
}

#[test]
fn with_256_dimensions_every_engine_answers_as_brute_force() {
    every_gallery_of(256);
}

#[test]
fn with_512_dimensions_every_engine_answers_as_brute_force() {
    every_gallery_of(512);
}

#[test]
fn with_1024_dimensions_every_engine_answers_as_brute_force() {
    every_gallery_of(1024);
}

fn large(dim: usize, count: usize) {
    let engines = engines();
    let mut palms = Palms::new(SEED + 5000 + dim as u64, dim);
    let mut fixture = Fixture::new(&mut palms, Shape::Random, dim, count, 65_536);
    fixture.forget_some(50, &engines);
    let some = searches(&mut palms, &fixture, dim, 12);
    let what = format!("seed {}, dim {dim}, {count} rows", SEED + 5000 + dim as u64);
    check(&what, &fixture, &engines, &some);
}

#[test]
fn among_200_000_rows_of_64_every_engine_answers_as_brute_force() {
    large(64, 200_000);
}

#[test]
fn among_20_000_rows_of_512_every_engine_answers_as_brute_force() {
    large(512, 20_000);
}

#[test]
fn more_equal_rows_than_an_engine_may_return_overflow_and_are_scanned() {
    let engines = engines();
    let mut palms = Palms::new(SEED + 9000, 32);
    let fixture = Fixture::new(&mut palms, Shape::AllEqual, 32, plan::CANDIDATE_ROWS_MAX + 4000, 65_536);
    let some = searches(&mut palms, &fixture, 32, 3);
    let what = format!("seed {}", SEED + 9000);
    let overflowed = check(&what, &fixture, &engines, &some);
    assert!(overflowed >= engines.len(), "{what}: every engine overflows, {overflowed} probes did");
}
