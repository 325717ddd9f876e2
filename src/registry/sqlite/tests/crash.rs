//! kill -9: what was acknowledged is there, and no commit is half there.
//!
//! The test runs itself again as a child process, which commits batches that depend only on their
//! number and prints each number once its commit has returned. The parent kills it at a random
//! moment, opens the registry, and compares it with the model after as many batches.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::model::Model;
use super::*;

/// Set for the child: where the registry is, and the batch to begin with.
const CHILD: &str = "THENAR_TEST_CRASH_CHILD";
const TEST: &str = "registry::sqlite::tests::crash::acknowledged_changes_survive_kill_9";
const ROUNDS: u64 = 10;

/// The changes of a batch: some enrol, and one of an earlier batch is updated, one forgotten.
fn batch(number: u64) -> Vec<Change> {
    let mut rng = ChaCha8Rng::seed_from_u64(number);
    let count = rng.random_range(1..12);
    let mut changes: Vec<Change> = (0..count)
        .map(|i| {
            let templates = (0..rng.random_range(1..4)).map(|_| sealed(rng.random(), 1100)).collect();
            let subject = name(&format!("s{number}-{i}"));
            change(&format!("e{number}-{i}"), 0, Action::Enrol { subject, source: Source::Person, templates })
        })
        .collect();
    if let Some(earlier) = number.checked_sub(2) {
        let add = vec![sealed(rng.random(), 1100)];
        let subject = name(&format!("s{earlier}-0"));
        changes.push(change(&format!("u{number}"), 0, Action::Update { subject, add, remove: vec![] }));
    }
    if let Some(earlier) = number.checked_sub(4) {
        changes.push(forget(&format!("f{number}"), &format!("s{earlier}-0")));
    }
    changes
}

fn commit_for_ever(child: &str) -> ! {
    let (path, first) = child.rsplit_once(' ').unwrap();
    let registry = open(Path::new(path)).unwrap();
    for number in first.parse().unwrap().. {
        registry.commit(&batch(number)).unwrap();
        // Not println: the harness would keep it.
        writeln!(std::io::stdout(), "acknowledged {number}").unwrap();
        if number % 16 == 15 {
            registry.scrub().unwrap();
        }
    }
    unreachable!("batches do not run out")
}

#[test]
fn acknowledged_changes_survive_kill_9() {
    if let Ok(child) = std::env::var(CHILD) {
        commit_for_ever(&child);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("registry.db");
    let (mut model, mut batches) = (Model::default(), 0);
    for seed in 0..ROUNDS {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture", "--test-threads=1"])
            .env(CHILD, format!("{} {batches}", path.display()))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut acknowledged = None;
        let mut note = |line: std::io::Result<String>| {
            // A line cut off by the kill is not an acknowledgement that anybody read.
            if let Some(number) = line.ok().and_then(|l| l.strip_prefix("acknowledged ")?.parse::<u64>().ok()) {
                acknowledged = Some(number);
            }
        };
        // Some kills come before the first commit, while the registry is made or recovered.
        let wait_for = rng.random_range(0..30);
        let mut seen = 0;
        while seen < wait_for {
            let line = lines.next().expect("the child runs until it is killed");
            seen += u32::from(line.as_ref().is_ok_and(|l| l.starts_with("acknowledged")));
            note(line);
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(0..5000)));
        child.kill().unwrap();
        child.wait().unwrap();
        lines.for_each(&mut note);

        let registry = open(&path).unwrap();
        let lsn = registry.last_lsn().unwrap().0;
        let promised = acknowledged.map_or(batches, |number| number + 1);
        // One commit may have been done and not yet acknowledged.
        while batches < promised || model.log_len() as u64 != lsn {
            assert!(batches <= promised, "seed {seed}: log ends at {lsn}, which no batch does");
            batch(batches).iter().for_each(|change| drop(model.apply(change)));
            batches += 1;
        }
        model.check(&registry, &["s0-0", "s1-0", "s5-0", "s9-0"], &format!("seed {seed}"));
        drop(registry);
        check_tables(&path);
    }
    assert!(batches > 20, "only {batches} batches in all rounds");
}
