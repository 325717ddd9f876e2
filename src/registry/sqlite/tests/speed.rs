//! How fast it is. Prints the figures: run with `--nocapture`. Asserts a small part of them.

use std::time::Instant;

use super::*;
use crate::vault::tests::processor_time;

/// Bytes of a sealed template of 512 dimensions and a little more.
const SEALED_BYTES: usize = 1100;
const COMMIT: usize = 2000;
const COMMITS: usize = 10;

#[test]
fn enrolments_per_second() {
    let home = Home::new();
    let (mut wall, mut processor) = (0.0, 0.0);
    for commit in 0..COMMITS {
        let changes: Vec<Change> = (0..COMMIT)
            .map(|i| {
                let n = commit * COMMIT + i;
                let template = sealed(n as u64, SEALED_BYTES);
                let subject = name(&format!("subject-{n:08}"));
                let action = Action::Enrol { subject, source: Source::Person, templates: vec![template] };
                change(&format!("import-{n:08}"), 1, action)
            })
            .collect();
        let start = Instant::now();
        let (committed, spent) = processor_time(|| home.commit(&changes).unwrap());
        wall += start.elapsed().as_secs_f64();
        processor += spent;
        assert_eq!(committed.records.len(), COMMIT);
    }
    let count = (COMMITS * COMMIT) as f64;
    println!(
        "enrolments with {SEALED_BYTES} bytes in commits of {COMMIT}, {count} of them: {:.0}/s of wall time, {:.0}/s of processor time",
        count / wall,
        count / processor
    );
    assert!(count / wall > 500.0);

    let start = Instant::now();
    let (after, spent) = processor_time(|| {
        let mut after = Lsn(0);
        while let Some(last) = home.log_after(after, 4096).unwrap().last() {
            after = last.lsn;
        }
        after
    });
    assert_eq!(after.0, (COMMITS * COMMIT) as u64);
    println!(
        "log replay with templates: {:.0} records/s of wall time, {:.0} of processor time",
        count / start.elapsed().as_secs_f64(),
        count / spent
    );

    let ids: Vec<Change> =
        (0..200).map(|i| forget(&format!("forget-{i}"), &format!("subject-{:08}", i * 97))).collect();
    let start = Instant::now();
    home.commit(&ids).unwrap();
    let forgetting = start.elapsed();
    let start = Instant::now();
    home.scrub().unwrap();
    println!("forgetting {} subjects: {forgetting:.1?}, scrubbing after it: {:.1?}", ids.len(), start.elapsed());
}
