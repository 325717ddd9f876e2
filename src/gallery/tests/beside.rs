//! Searches during a compaction: each answer is right. Prints how long they take with and without it,
//! and how much room it reclaims. For meaningful figures use an optimised build, `--no-capture` and
//! `THENAR_COMPACT_ROWS=171072`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;

use super::*;
use crate::engine::cpu::CpuEngine;
use crate::gallery::compaction::{PAUSE_IDLE, lower_priority};
use crate::model::synthetic::SyntheticGallery;

const WIDE: usize = 512;
const COMMIT: u32 = 4096;
/// Rows of a run that only checks answers.
const ROWS_FEW: u32 = 3000;
/// Between searches, if there are many rows.
const PAUSE: Duration = Duration::from_millis(10);
/// Compaction runs for so long, and is then held back for as long.
const WINDOW: Duration = Duration::from_millis(500);

/// Bytes that the files of a folder take on the disk.
fn allocated(dir: &Path) -> u64 {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

/// Whether a person leaves.
fn leaves(person: u32) -> bool {
    person % 5 < 3
}

/// Milliseconds that one in `of` exceeds.
fn quantile(times: &mut [Duration], of: usize) -> f64 {
    times.sort_unstable();
    times[times.len() - 1 - times.len() / of].as_secs_f64() * 1e3
}

#[test]
fn searches_beside_a_compaction_are_right() {
    let rows = std::env::var("THENAR_COMPACT_ROWS").map_or(ROWS_FEW, |rows| rows.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let registry = Arc::new(testing::registry(folder.path()));
    let setup = testing::setup(folder.path(), WIDE, Arc::new(Files), Arc::clone(&registry) as _).unwrap();
    let sealer = Arc::clone(&setup.sealer);
    let dir = setup.dir.clone();
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let gallery = Gallery::open(setup, Arc::new(CpuEngine::new(threads).unwrap()), None).unwrap();
    let standard = SyntheticGallery::new(7, WIDE);
    let id = |person: u32| format!("p{person}");
    for first in (0..rows).step_by(COMMIT as usize) {
        let enrol = |person: u32| {
            let mut values = vec![0.0; WIDE];
            standard.row(person, &mut values);
            let row = TemplateRow(values.iter().map(|x| f16::from_f32(*x)).collect());
            testing::change(&format!("enrol-{person}"), testing::enrol(&sealer, &id(person), &row))
        };
        let changes: Vec<Change> = (first..rows.min(first + COMMIT)).map(enrol).collect();
        gallery.apply(&registry.commit(&changes).unwrap().records).unwrap();
    }
    for first in (0..rows).step_by(COMMIT as usize) {
        let gone = (first..rows.min(first + COMMIT)).filter(|person| leaves(*person));
        let forget = |person| testing::change(&format!("forget-{person}"), testing::forget(&id(person)));
        let changes: Vec<Change> = gone.map(forget).collect();
        gallery.apply(&registry.commit(&changes).unwrap().records).unwrap();
    }
    let before = (gallery.status(), allocated(&dir));

    let (on, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let mut times = [Vec::new(), Vec::new()];
    thread::scope(|scope| {
        scope.spawn(|| {
            lower_priority();
            while !done.load(Ordering::Acquire) {
                if !on.load(Ordering::Acquire) {
                    thread::sleep(Duration::from_millis(1));
                    continue;
                }
                let pause = gallery.compact_and_pause(0);
                done.store(pause >= PAUSE_IDLE, Ordering::Release);
                thread::sleep(pause.min(WINDOW));
            }
        });
        let began = Instant::now();
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let (mut vector, mut candidates) = (vec![0.0; WIDE], CandidateRows::default());
        while !done.load(Ordering::Acquire) {
            let beside = began.elapsed().as_millis() / WINDOW.as_millis() % 2 == 1;
            on.store(beside || rows == ROWS_FEW, Ordering::Release);
            let person = rng.random_range(0..rows);
            standard.mate(person, 1, &mut vector);
            let probes = vec![Probe { hand: Hand::Left, vector: vector.as_slice().into() }];
            let search = Search { probes, floor: 0.5, k: 10, certificate: Certificate::default(), allowed: None };
            let started = Instant::now();
            let (answers, _) = gallery.search(&[&search], Priority::High, &mut candidates).unwrap();
            times[usize::from(beside)].push(started.elapsed());
            let found: Vec<&str> = answers[0].found.iter().map(|found| &*found.subject_id).collect();
            let expected = id(person);
            if leaves(person) {
                assert!(!found.contains(&&*expected), "person {person}");
            } else {
                assert_eq!(found.first().copied(), Some(&*expected));
            }
            if rows > ROWS_FEW {
                thread::sleep(PAUSE.saturating_sub(started.elapsed()));
            }
        }
    });
    let after = (gallery.status(), allocated(&dir));
    assert_eq!(after.0.templates, before.0.templates);
    assert!(after.0.tombstones < after.0.templates && after.1 < before.1, "{before:?}, then {after:?}");
    if rows > ROWS_FEW {
        println!("{rows} rows x {WIDE}, tau 0.5, k 10, one probe each {PAUSE:?}, CPU, {threads} threads");
        let [mut without, mut beside] = times;
        for (name, times) in [("without", &mut without), ("beside", &mut beside)] {
            let (p50, p99) = (quantile(times, 2), quantile(times, 100));
            println!("{name}: {} searches, p50 {p50:.2} ms, p99 {p99:.2} ms", times.len());
        }
        println!("p99 beside compaction / without: {:.2}", quantile(&mut beside, 100) / quantile(&mut without, 100));
        for (name, (status, bytes)) in [("before", before), ("after", after)] {
            let (live, dead, mib) = (status.templates, status.tombstones, bytes >> 20);
            println!("{name}: {live} live rows, {dead} dead ones, {mib} MiB of index files");
        }
    }
}
