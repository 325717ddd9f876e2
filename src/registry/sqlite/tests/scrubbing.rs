//! Forgotten means gone: the bytes of the files are searched for what was deleted.

use std::collections::HashSet;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::*;

/// The 8-byte pieces of a template: a copy of any 15 bytes of it holds one whole.
fn pieces(sealed: &[u8]) -> impl Iterator<Item = u64> + '_ {
    sealed.chunks_exact(8).map(|piece| u64::from_le_bytes(piece.try_into().unwrap()))
}

/// How many of the pieces are somewhere in the files of the folder.
fn traces(home: &Home, wanted: &HashSet<u64>) -> usize {
    let mut found = HashSet::new();
    for entry in std::fs::read_dir(home.folder.path()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        let all = bytes.windows(8).map(|w| u64::from_le_bytes(w.try_into().unwrap()));
        found.extend(all.filter(|piece| wanted.contains(piece)));
    }
    found.len()
}

/// All but the few pieces that lie across the border of two pages.
fn most(found: usize, all: usize) -> bool {
    found <= all && found * 100 >= all * 99
}

fn template(seed: u64, bytes: usize) -> (SealedTemplate, HashSet<u64>) {
    let template = sealed(seed, bytes);
    let pieces = pieces(&template.sealed).collect();
    (template, pieces)
}

#[test]
fn after_forgetting_and_scrubbing_no_byte_of_the_template_is_in_any_file() {
    let home = Home::new();
    // Around it, so that its page holds others and lives on.
    for i in 0..20 {
        commit_one(&home, change(&format!("r{i}"), 0, enrolment(&format!("s{i}"), vec![sealed(i, 1100)])));
    }
    for bytes in [1100, 4125, 20_000] {
        let (template, wanted) = template(1000 + bytes as u64, bytes);
        commit_one(&home, change(&format!("e{bytes}"), 0, enrolment("ann", vec![template])));
        assert!(most(traces(&home, &wanted), wanted.len()), "the search finds what is there");
        commit_one(&home, forget(&format!("f{bytes}"), "ann"));
        assert_ne!(traces(&home, &wanted), 0, "a deletion alone leaves the write-ahead log as it is");
        home.scrub().unwrap();
        assert_eq!(traces(&home, &wanted), 0, "{bytes} bytes");
    }
}

#[test]
fn no_amount_of_churn_leaves_a_copy_behind() {
    for seed in 0..3 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let home = Home::new();
        let (mut living, mut gone) = (Vec::<(String, HashSet<u64>)>::new(), HashSet::new());
        let mut pending = Vec::new();
        for request in 0..1500 {
            if living.is_empty() || rng.random_bool(if request < 700 { 0.7 } else { 0.35 }) {
                let id = format!("s{request}");
                let bytes = [333, 1100, 1100, 9001][rng.random_range(0..4)];
                let (template, pieces) = template(rng.random(), bytes);
                pending.push(change(&format!("e{request}"), 0, enrolment(&id, vec![template])));
                living.push((id, pieces));
            } else {
                let (id, pieces) = living.swap_remove(rng.random_range(0..living.len()));
                pending.push(forget(&format!("f{request}"), &id));
                gone.extend(pieces);
            }
            if request % 10 == 9 {
                home.commit(&std::mem::take(&mut pending)).unwrap();
            }
            if request % 500 == 499 {
                home.scrub().unwrap();
                assert_eq!(traces(&home, &gone), 0, "seed {seed}, request {request}");
                let all: HashSet<u64> = living.iter().flat_map(|(_, pieces)| pieces.iter().copied()).collect();
                assert!(most(traces(&home, &all), all.len()), "seed {seed}, request {request}: the living are there");
            }
        }
    }
}

/// Letters that nobody else has; a copy of any 15 of them holds a whole piece.
fn letters(rng: &mut ChaCha8Rng, count: usize) -> String {
    (0..count).map(|_| char::from(rng.random_range(b'a'..=b'z'))).collect()
}

#[test]
fn no_file_has_a_forgotten_name_or_any_request_id() {
    for seed in 0..2 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let home = Home::new();
        let (mut living, mut gone, mut requests) = (Vec::<String>::new(), HashSet::new(), HashSet::new());
        let mut pending = Vec::new();
        for step in 0..6000 {
            let number: u64 = rng.random_range(1 << 58..1 << 59);
            let request = format!("{}{number}", letters(&mut rng, 24));
            requests.extend(pieces(request.as_bytes()));
            requests.extend([number, number.swap_bytes()]);
            if living.is_empty() || rng.random_bool(if step < 3000 { 0.7 } else { 0.35 }) {
                let length = rng.random_range(16..=64);
                living.push(letters(&mut rng, length));
                pending.push(enrol(&request, living.last().unwrap(), &[step]));
            } else {
                let name = living.swap_remove(rng.random_range(0..living.len()));
                gone.extend(pieces(name.as_bytes()));
                pending.push(forget(&request, &name));
            }
            if step % 8 == 7 {
                home.commit(&std::mem::take(&mut pending)).unwrap();
            }
            if step % 2000 == 1999 {
                home.writer.lock().pass(Duration::from_millis(1));
                home.prune_requests(Duration::ZERO, usize::MAX).unwrap();
                home.scrub().unwrap();
                assert_eq!(traces(&home, &gone), 0, "seed {seed}, step {step}: names");
                assert_eq!(traces(&home, &requests), 0, "seed {seed}, step {step}: request ids");
                let all: HashSet<u64> = living.iter().flat_map(|name| pieces(name.as_bytes())).collect();
                assert!(most(traces(&home, &all), all.len()), "seed {seed}, step {step}: the living are there");
            }
        }
    }
}

#[test]
fn a_commit_that_was_undone_leaves_nothing_after_a_scrub() {
    let home = Home::new();
    commit_one(&home, enrol("r", "ann", &[1]));
    home.writer.lock().connection().pragma_update(None, "max_page_count", 40).unwrap();
    // A small cache, so that the pages spill into the log before the failure.
    home.writer.lock().connection().pragma_update(None, "cache_size", 10).unwrap();
    let mut wanted = HashSet::new();
    let templates = (100..116)
        .map(|seed| {
            let (template, pieces) = template(seed, 40_000);
            wanted.extend(pieces);
            template
        })
        .collect();
    let error = home.commit(&[change("s", 0, enrolment("bob", templates))]).err();
    assert!(matches!(error, Some(RegistryError::DiskFull { .. })), "{error:?}");
    assert_ne!(traces(&home, &wanted), 0, "else this shows nothing");
    home.scrub().unwrap();
    assert_eq!(traces(&home, &wanted), 0);
}

#[test]
fn a_scrubbed_registry_goes_on_and_opens_again() {
    let mut home = Home::new();
    for round in 0..3 {
        commit_one(&home, enrol(&format!("e{round}"), &format!("s{round}"), &[round]));
        home.scrub().unwrap();
        home.scrub().unwrap();
        assert_eq!(std::fs::metadata(scrub::log_path(&home.path())).unwrap().len(), 0);
        assert_eq!(home.counts().unwrap().subjects, round + 1);
        if round == 1 {
            home.reopen();
        }
    }
    check_tables(&home.path());
}

#[test]
fn another_programs_reader_blocks_a_scrub_and_it_can_be_done_later() {
    let home = Home::new();
    commit_one(&home, enrol("r", "ann", &[1]));
    let other = Connection::open(home.path()).unwrap();
    other.execute_batch("BEGIN; SELECT * FROM counters").unwrap();
    commit_one(&home, forget("f", "ann"));
    home.writer.lock().connection().busy_timeout(Duration::from_millis(50)).unwrap();
    let error = home.scrub().unwrap_err();
    assert!(matches!(error, RegistryError::ScrubBlocked { .. }), "{error}");
    assert!(error.to_string().contains("another program is reading it"), "{error}");
    commit_one(&home, enrol("s", "bob", &[2]));
    other.execute_batch("COMMIT").unwrap();
    home.scrub().unwrap();
}
