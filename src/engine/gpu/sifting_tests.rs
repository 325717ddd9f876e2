//! The schedule on a device that is only arithmetic: scores off by up to the slack, entries in
//! any order, little room.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::kernels::Entry;
use super::*;

const DIM: usize = 32;

/// A gallery of one probe's exact scores by slot (row = slot + 1000), of which some are dead.
struct Fake {
    scores: Vec<f64>,
    live: Vec<bool>,
    entries_max: usize,
    runs: Vec<Range<u32>>,
}

impl Fake {
    fn field(slots: usize, live_row: &dyn Fn(u32) -> Option<u32>) -> Field<'_> {
        Field {
            slots: u32::try_from(slots.next_multiple_of(SLOT_STEP as usize)).unwrap(),
            dim: DIM,
            f16_subnormals_kept: true,
            live_row,
        }
    }

    /// As the kernels do: count all, store within the quota and the room, in a random order.
    fn run(&mut self, bars: &[Bar], slots: &Range<u32>, noise: f64, rng: &mut ChaCha8Rng) -> Report {
        self.runs.push(slots.clone());
        assert!(slots.start.is_multiple_of(SLOT_STEP));
        let mut report = Report { counts: vec![0; bars.len()], ..Report::default() };
        let mut order: Vec<u32> = (slots.start..slots.end.min(self.scores.len() as u32)).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, rng.random_range(0..=i));
        }
        for slot in order {
            let score = (self.scores[slot as usize] + rng.random_range(-1.0..=1.0) * noise) as f32;
            for (probe, bar) in (0_u32..).zip(bars) {
                if self.live[slot as usize] && score >= bar.cut {
                    report.counts[probe as usize] += 1;
                    if report.counts[probe as usize] <= bar.quota && report.entries.len() < self.entries_max {
                        report.entries.push(Entry { probe, slot, score });
                    }
                }
            }
        }
        report
    }
}

/// Sifts `copies` probes that all see the same scores; their survivors as slots.
fn sift_fake(fake: &mut Fake, floor: f32, keep: u32, survivors_max: usize, copies: usize, seed: u64) -> Survivors {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let probes = vec![1.0 / 32.0_f32.sqrt(); DIM * copies];
    let noise = slack(&probes[..DIM], true) * 0.999;
    let request = SiftRequest {
        probes: &probes,
        floors: &vec![floor; copies],
        keep: &vec![keep; copies],
        survivors_max,
        ..SiftRequest::default()
    };
    let mut survivors = Survivors::default();
    survivors.reset(copies);
    let live = fake.live.clone();
    let live_row = |slot: u32| live[slot as usize].then_some(slot + 1000);
    let field = Fake::field(fake.scores.len(), &live_row);
    let mut run = |_: &[usize], bars: &[Bar], slots: &Range<u32>| Ok(fake.run(bars, slots, noise, &mut rng));
    sift(&field, &request, 0..copies, &mut run, &mut survivors).unwrap();
    survivors
}

/// Rows that must survive: at the floor or above, and not below the `keep`-th best.
fn wanted(fake: &Fake, floor: f32, keep: u32) -> Vec<u32> {
    let mut best: Vec<f64> =
        fake.scores.iter().zip(&fake.live).filter(|(_, live)| **live).map(|(score, _)| *score).collect();
    best.sort_by(|a, b| b.total_cmp(a));
    let mut line = f64::from(floor);
    if keep > 0 && best.len() >= keep as usize {
        line = line.max(best[keep as usize - 1]);
    }
    let rows = (1000_u32..).zip(fake.scores.iter().zip(&fake.live));
    rows.filter(|(_, (score, live))| **live && **score >= line).map(|(row, _)| row).collect()
}

#[test]
fn no_order_of_rows_and_no_error_within_the_slack_loses_a_row() {
    for seed in 0..120 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let slots = [1, 500, 1024, 3000, 40_000][seed as usize % 5];
        let mut scores: Vec<f64> = (0..slots).map(|_| rng.random_range(-1.0..1.0_f64)).collect();
        match seed % 4 {
            0 => scores.sort_by(f64::total_cmp),
            1 => scores.sort_by(|a, b| b.total_cmp(a)),
            2 => scores.iter_mut().for_each(|score| *score = (*score * 20.0).round() / 20.0),
            _ => {}
        }
        let mut fake = Fake {
            live: (0..slots).map(|_| rng.random_bool(0.9)).collect(),
            scores,
            entries_max: [512, 5000, 1 << 20][seed as usize % 3],
            runs: Vec::new(),
        };
        let keep = [0, 1, 10, 100][seed as usize / 4 % 4];
        let floor = [-1.1, 0.5, 0.95][seed as usize / 16 % 3];
        let survivors = sift_fake(&mut fake, floor, keep, 8000, 1 + seed as usize % 3, seed);
        let wanted = wanted(&fake, floor, keep);
        for (rows, overflowed) in survivors.rows.iter().zip(&survivors.overflowed) {
            let mut rows = rows.clone();
            rows.sort_unstable();
            assert!(rows.windows(2).all(|pair| pair[0] != pair[1]), "seed {seed}: repeats");
            if *overflowed {
                assert!(rows.is_empty() && wanted.len() > 7000, "seed {seed}: overflow of {}", wanted.len());
            } else {
                let missing = wanted.iter().find(|row| rows.binary_search(row).is_err());
                assert_eq!(missing, None, "seed {seed}: missing row");
                assert!(rows.len() <= wanted.len() + wanted.len() / 50 + 20, "seed {seed}: {} rows", rows.len());
            }
        }
    }
}

fn uniform(slots: usize, seed: u64) -> Fake {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Fake {
        scores: (0..slots).map(|_| rng.random_range(-0.4..0.4_f64)).collect(),
        live: vec![true; slots],
        entries_max: 1 << 20,
        runs: Vec::new(),
    }
}

#[test]
fn a_threshold_search_takes_one_run() {
    for keep in [0, 10] {
        let mut fake = uniform(100_000, 1);
        fake.scores[77_777] = 2.0;
        let survivors = sift_fake(&mut fake, 1.5, keep, 100, 3, 1);
        assert_eq!(survivors.rows, vec![vec![78_777]; 3]);
        assert_eq!(fake.runs.len(), 1, "{:?}", fake.runs);
    }
}

#[test]
fn a_search_without_a_floor_takes_few_runs_and_reads_back_little() {
    let mut fake = uniform(1_000_000, 2);
    let survivors = sift_fake(&mut fake, -1.1, 10, 100, 1, 2);
    assert!((10..60).contains(&survivors.rows[0].len()), "{}", survivors.rows[0].len());
    assert!(fake.runs.len() <= 4, "{:?}", fake.runs);
}

#[test]
fn a_gallery_of_equals_overflows_at_a_bounded_price() {
    let mut fake = uniform(300_000, 3);
    fake.scores.fill(0.25);
    let survivors = sift_fake(&mut fake, -1.1, 10, 1000, 1, 3);
    assert_eq!(survivors.overflowed, [true]);
    let slots: u32 = fake.runs.iter().map(|run| run.end - run.start).sum();
    assert!(slots < 2_000_000, "{slots} slots were sifted");
}

#[test]
fn duplicates_at_the_front_do_not_make_a_probe_overflow() {
    let mut fake = uniform(50_000, 4);
    fake.scores[..3000].fill(-0.9);
    let survivors = sift_fake(&mut fake, -1.1, 10, 100, 2, 4);
    assert_eq!(survivors.overflowed, [false, false]);
}
