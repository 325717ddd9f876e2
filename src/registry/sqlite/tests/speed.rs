//! How fast it is. Prints the figures: run with `--nocapture`. Asserts a small part of them.

use std::time::Instant;

use super::*;

/// Bytes of a sealed template of 512 dimensions and a little more.
const SEALED_BYTES: usize = 1100;
const COMMIT: usize = 2000;
const COMMITS: usize = 10;

/// Seconds of processor time this thread has spent, where the system says.
fn spent() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1e9
}

#[test]
fn enrolments_a_second() {
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
        let (start, before) = (Instant::now(), spent());
        let committed = home.commit(&changes).unwrap();
        wall += start.elapsed().as_secs_f64();
        processor += spent() - before;
        assert_eq!(committed.records.len(), COMMIT);
    }
    let count = (COMMITS * COMMIT) as f64;
    println!(
        "enrolments with {SEALED_BYTES} bytes in commits of {COMMIT}, {count} of them: {:.0}/s of wall time, {:.0}/s of processor time",
        count / wall,
        count / processor
    );
    assert!(count / wall > 500.0);

    let (start, before) = (Instant::now(), spent());
    let mut after = Lsn(0);
    loop {
        let records = home.log_after(after, 4096).unwrap();
        let Some(last) = records.last() else { break };
        after = last.lsn;
    }
    assert_eq!(after.0, (COMMITS * COMMIT) as u64);
    println!(
        "log replay with templates: {:.0} records/s of wall time, {:.0} of processor time",
        count / start.elapsed().as_secs_f64(),
        count / (spent() - before)
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
