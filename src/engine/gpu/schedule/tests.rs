//! The schedule over an executor that is only the twin: numbers off by up to the slack, pairs in any order,
//! little room.

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use thenar_index::codes::OwnedCodes;

use super::super::twin::Twin;
use super::*;
use crate::engine::dot::dot_slack;

const DIM: usize = 128;
const RANDOMISED: Certificate = Certificate::Randomised { miss_probability: 1e-12 };

/// A gallery (row = slot + 1000), of which some rows are dead. Its last slots are zeroed.
struct Fake {
    rows: Vec<f16>,
    twin: Twin,
    live: Vec<u64>,
    entries_max: u32,
}

/// The twin, with little room, and what it was asked.
struct TwinExecutor<'a> {
    fake: &'a Fake,
    probes: &'a [QuantisedProbe],
    scans: Vec<(Level, Range<u32>, usize)>,
    done: VecDeque<Report>,
    rng: ChaCha8Rng,
}

impl Fake {
    fn new(rows: &[Vec<f32>], entries_max: u32, rng: &mut ChaCha8Rng, dead: f64) -> Self {
        let slots = rows.len().next_multiple_of(SLOT_STEP as usize);
        let mut flat: Vec<f16> = rows.iter().flatten().map(|v| f16::from_f32(*v)).collect();
        flat.resize(slots * DIM, f16::ZERO);
        let twin = Twin::new(&OwnedCodes::of(&flat, DIM).as_codes(), DIM, 0);
        let mut live = vec![0_u64; slots / 64];
        for slot in 0..rows.len() {
            live[slot / 64] |= u64::from(!rng.random_bool(dead)) << (slot % 64);
        }
        Self { rows: flat, twin, live, entries_max }
    }

    fn slots(&self) -> u32 {
        self.live.len() as u32 * 64
    }

    fn is_live(&self, slot: u32) -> bool {
        self.live[slot as usize / 64] >> (slot % 64) & 1 == 1
    }

    fn score(&self, slot: u32, probe: &[f32]) -> f64 {
        let row = &self.rows[slot as usize * DIM..][..DIM];
        row.iter().zip(probe).map(|(x, q)| f64::from(x.to_f32()) * f64::from(*q)).sum()
    }
}

impl Executor for TwinExecutor<'_> {
    /// As the kernels do: counts all, stores within the quota and the room, in a random order.
    fn submit(&mut self, scan: &Scan) -> Result<(), EngineError> {
        assert!(scan.slots.start.is_multiple_of(SLOT_STEP) && self.done.len() < IN_FLIGHT_MAX);
        self.scans.push((scan.level, scan.slots.clone(), scan.probes.len()));
        let mut report = Report { counts: vec![0; scan.probes.len()], ..Report::default() };
        let probes: Vec<&QuantisedProbe> = scan.probes.iter().map(|number| &self.probes[*number]).collect();
        let twin = &self.fake.twin;
        let mut entries = twin.scan(scan.slots.clone(), scan.level, &probes, &scan.bounds, scan.loss_parts);
        for i in (1..entries.len()).rev() {
            entries.swap(i, self.rng.random_range(0..=i));
        }
        entries.retain(|entry| {
            let count = &mut report.counts[entry.probe as usize];
            *count += 1;
            *count <= scan.bounds[entry.probe as usize].quota
        });
        report.stored = entries.len() as u64;
        report.overflowed = report.stored > self.fake.entries_max.into();
        entries.truncate(self.fake.entries_max as usize);
        report.entries = match &scan.refine_bounds {
            Some(bounds) => twin.refine(&entries, &probes, bounds),
            None => entries,
        };
        self.done.push_back(report);
        Ok(())
    }

    fn collect(&mut self) -> Result<Report, EngineError> {
        Ok(self.done.pop_front().expect("a scan is in flight"))
    }
}

/// What a search of a fake gallery found, and what was scanned for it.
type Searched = (CandidateRows, Vec<(Level, Range<u32>, usize)>);

fn search_fake(fake: &Fake, probes: &[Vec<f32>], request: &CandidateRequest<'_>, seed: u64) -> Searched {
    let quantised: Vec<QuantisedProbe> = probes.iter().map(|probe| QuantisedProbe::new(probe)).collect();
    let compare = |probe: usize, slot: u32| {
        // Anything within the slack of the exact score, but always the same.
        let noise = f64::from(slot.wrapping_mul(0x9e37_79b9) ^ seed as u32) / f64::from(u32::MAX) * 1.998 - 0.999;
        let score = fake.score(slot, &probes[probe]) + noise * f64::from(dot_slack(DIM));
        fake.is_live(slot).then_some((score as f32, slot + 1000))
    };
    let context = Context {
        slots: fake.slots(),
        limits: Limits { dim: DIM, entries_max: fake.entries_max, products_max: 1 << 33 },
        compare: &compare,
        without_codes: &|_| Vec::new(),
    };
    let rng = ChaCha8Rng::seed_from_u64(seed);
    let mut executor = TwinExecutor { fake, probes: &quantised, scans: Vec::new(), done: VecDeque::new(), rng };
    let mut candidates = CandidateRows::default();
    candidates.reset(probes.len());
    find_candidates(&context, request, 0..probes.len(), &quantised, &mut executor, &mut candidates).unwrap();
    (candidates, executor.scans)
}

/// Rows that must be candidates: at the floor or above, and not below the `keep`-th best.
fn wanted(fake: &Fake, probe: &[f32], floor: f32, keep: u32) -> Vec<u32> {
    let slots = (0..fake.slots()).filter(|slot| fake.is_live(*slot));
    let scores: Vec<(u32, f64)> = slots.map(|slot| (slot + 1000, fake.score(slot, probe))).collect();
    let mut best: Vec<f64> = scores.iter().map(|(_, score)| *score).collect();
    best.sort_by(|a, b| b.total_cmp(a));
    let mut line = f64::from(floor);
    if keep > 0 && best.len() >= keep as usize {
        line = line.max(best[keep as usize - 1]);
    }
    scores.into_iter().filter(|(_, score)| *score >= line).map(|(row, _)| row).collect()
}

fn unit(rng: &mut ChaCha8Rng) -> Vec<f32> {
    let values: Vec<f32> = (0..DIM).map(|_| rng.sample(StandardNormal)).collect();
    normalised(&values)
}

fn normalised(values: &[f32]) -> Vec<f32> {
    let norm = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.iter().map(|v| v / norm).collect()
}

fn near(rng: &mut ChaCha8Rng, row: &[f32], noise: f32) -> Vec<f32> {
    let other = unit(rng);
    normalised(&row.iter().zip(&other).map(|(x, e)| x + noise * e).collect::<Vec<_>>())
}

#[test]
fn no_order_of_rows_no_error_within_the_slack_and_no_lack_of_room_loses_a_row() {
    let mut levels = [0, 0];
    for seed in 0..70 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let count = [1, 500, 1024, 3000, 2000, 5000, 17_000][seed as usize % 7];
        let mut rows: Vec<Vec<f32>> = (0..count).map(|_| unit(&mut rng)).collect();
        let probes: Vec<Vec<f32>> =
            (0..1 + seed as usize % 3).map(|nth| near(&mut rng, &rows[nth * 7 % count].clone(), 0.8)).collect();
        let score = |row: &[f32]| row.iter().zip(&probes[0]).map(|(x, q)| x * q).sum::<f32>();
        match seed % 4 {
            0 => rows.sort_by(|a, b| score(a).total_cmp(&score(b))),
            1 => rows.sort_by(|a, b| score(b).total_cmp(&score(a))),
            2 => {
                let centre = rows[0].clone();
                rows.iter_mut().step_by(3).for_each(|row| *row = near(&mut rng, &centre, 0.3));
            }
            _ => {}
        }
        let fake = Fake::new(&rows, [512, 5000, 1 << 20][seed as usize % 3], &mut rng, 0.1);
        let keep = [0, 1, 10, 100][seed as usize / 4 % 4];
        let floor = [-1.1, 0.3, 0.6, 0.9][seed as usize / 16 % 4];
        let request = CandidateRequest {
            floors: &vec![floor; probes.len()],
            keep: &vec![keep; probes.len()],
            probes: &probes.concat(),
            candidates_max: 8000,
            certificate: if seed % 2 == 0 { RANDOMISED } else { Certificate::Deterministic },
            ..CandidateRequest::default()
        };
        let (candidates, scans) = search_fake(&fake, &probes, &request, seed);
        scans.iter().for_each(|(level, ..)| levels[level.index()] += 1);
        assert!(candidates.certificate.miss_probability() <= request.certificate.miss_probability());
        for (((rows, overflowed), held), probe) in
            candidates.rows.iter().zip(&candidates.overflowed).zip(&candidates.floors).zip(&probes)
        {
            let wanted = wanted(&fake, probe, floor, keep);
            let mut rows = rows.clone();
            rows.sort_unstable();
            assert!(rows.windows(2).all(|pair| pair[0] != pair[1]), "seed {seed}: repeats");
            if *overflowed {
                assert!(rows.is_empty() && wanted.len() > 7000, "seed {seed}: overflow of {}", wanted.len());
            } else {
                let missing = wanted.iter().find(|row| rows.binary_search(row).is_err());
                assert_eq!(missing, None, "seed {seed}: missing row");
                assert!(rows.len() <= wanted.len() + wanted.len() / 50 + 20, "seed {seed}: {} rows", rows.len());
                // The floor stated is kept, and is not above what it has to be.
                let stated = self::wanted(&fake, probe, *held, 0);
                assert!(stated.iter().all(|row| rows.binary_search(row).is_ok()), "seed {seed}: not held to {held}");
                assert!(*held >= floor && wanted.iter().all(|row| stated.contains(row)), "seed {seed}: {held}");
            }
        }
    }
    assert!(levels.iter().all(|scans| *scans > 8), "scans by level: {levels:?}");
}

#[test]
fn what_does_not_fit_is_scanned_again_by_4_bit_codes_and_then_in_smaller_slices() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let probe = unit(&mut rng);
    // All rows near the probe: every level passes them all.
    let rows: Vec<Vec<f32>> = (0..4096).map(|_| near(&mut rng, &probe, 0.1)).collect();
    let fake = Fake::new(&rows, 1024, &mut rng, 0.0);
    let request = CandidateRequest {
        probes: &probe,
        floors: &[0.9],
        keep: &[0],
        candidates_max: 5000,
        certificate: RANDOMISED,
        ..CandidateRequest::default()
    };
    let (candidates, scans) = search_fake(&fake, std::slice::from_ref(&probe), &request, 1);
    assert_eq!((candidates.overflowed[0], candidates.rows[0].len()), (false, 4096));
    assert_eq!(scans[0], (Level::OneBit, 0..4096, 1));
    assert_eq!(scans[1], (Level::FourBit, 0..4096, 1));
    let rest = &scans[2..];
    assert!(
        rest.iter().all(|(level, slots, _)| *level == Level::FourBit && slots.end - slots.start <= 1024),
        "{rest:?}"
    );
    assert_eq!(rest.iter().map(|(_, slots, _)| slots.end - slots.start).sum::<u32>(), 4096, "{rest:?}");
}

#[test]
fn rows_tied_with_the_last_of_the_best_are_candidates_whatever_their_numbers_within_the_slack() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let probe = unit(&mut rng);
    let twin = near(&mut rng, &probe, 0.5);
    for count in [2000, 20_000] {
        let mut rows = noise(count, &mut rng);
        rows.iter_mut().step_by(40).take(60).for_each(|row| *row = twin.clone());
        let fake = Fake::new(&rows, 1 << 20, &mut rng, 0.0);
        for (keep, certificate) in [(1, RANDOMISED), (10, Certificate::Deterministic), (45, RANDOMISED)] {
            let request = CandidateRequest {
                probes: &probe,
                floors: &[-1.1],
                keep: &[keep],
                candidates_max: 100,
                certificate,
                ..CandidateRequest::default()
            };
            let (candidates, _) = search_fake(&fake, std::slice::from_ref(&probe), &request, 5);
            let ties = (0..count as u32).filter(|slot| fake.score(*slot, &probe) > 0.8).count();
            assert!((50..=60).contains(&ties), "{ties}");
            assert_eq!(
                (candidates.overflowed[0], candidates.rows[0].len()),
                (false, ties),
                "{count} rows, keep {keep}"
            );
        }
    }
}

fn noise(count: usize, rng: &mut ChaCha8Rng) -> Vec<Vec<f32>> {
    (0..count).map(|_| unit(rng)).collect()
}

#[test]
fn a_low_floor_is_found_by_a_sample_and_a_scout() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let fake = Fake::new(&noise(40_000, &mut rng), 1 << 20, &mut rng, 0.0);
    let probe = unit(&mut rng);
    let request = CandidateRequest {
        probes: &probe,
        floors: &[-1.1],
        keep: &[10],
        candidates_max: 100,
        certificate: RANDOMISED,
        ..CandidateRequest::default()
    };
    let (candidates, scans) = search_fake(&fake, std::slice::from_ref(&probe), &request, 2);
    assert!((10..14).contains(&candidates.rows[0].len()), "{}", candidates.rows[0].len());
    assert!(scans.len() <= 4, "{scans:?}");
    assert!(scans[0].1.end <= fake.slots() / 8, "{scans:?}");
}

#[test]
fn a_gallery_of_equals_overflows_at_a_bounded_cost() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let row = unit(&mut rng);
    let fake = Fake::new(&vec![row; 100_000], 1 << 14, &mut rng, 0.0);
    let probe = unit(&mut rng);
    let request = CandidateRequest {
        probes: &probe,
        floors: &[-1.1],
        keep: &[10],
        candidates_max: 1000,
        certificate: RANDOMISED,
        ..CandidateRequest::default()
    };
    let (candidates, scans) = search_fake(&fake, std::slice::from_ref(&probe), &request, 3);
    assert_eq!(candidates.overflowed, [true]);
    let slots: u32 = scans.iter().map(|(_, slots, _)| slots.end - slots.start).sum();
    assert!(slots < 4 * fake.slots(), "{slots} slots were scanned");
}

#[test]
fn rows_at_the_front_that_nobody_wants_do_not_make_a_probe_overflow() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let probe = unit(&mut rng);
    let mut rows = noise(20_000, &mut rng);
    let away: Vec<f32> = probe.iter().map(|v| -v).collect();
    rows[..3000].iter_mut().for_each(|row| *row = away.clone());
    let fake = Fake::new(&rows, 1 << 20, &mut rng, 0.0);
    let probes = [probe.clone(), probe];
    let request = CandidateRequest {
        probes: &probes.concat(),
        floors: &[-1.1; 2],
        keep: &[10; 2],
        candidates_max: 100,
        certificate: Certificate::Deterministic,
        ..CandidateRequest::default()
    };
    let (candidates, _) = search_fake(&fake, &probes, &request, 4);
    assert_eq!(candidates.overflowed, [false, false]);
    assert_eq!(candidates.certificate, Certificate::Deterministic);
}
