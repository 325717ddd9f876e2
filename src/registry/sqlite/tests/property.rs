//! Random changes, compared with the model after every commit. A failure prints its seed.

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::model::{Model, timeless_outcome};
use super::*;
use crate::registry::REQUESTS_KEPT;

const NAMES: [&str; 7] = ["ann", "bob", "cleo", "dora", "emil", "fay", "gus"];

/// Digests stand for the content of a request; here for which of a few contents it is.
fn random_change(rng: &mut ChaCha8Rng, model: &Model, earlier: &mut Vec<Change>) -> Change {
    if !earlier.is_empty() && rng.random_bool(0.25) {
        let again = &earlier[rng.random_range(0..earlier.len())];
        let mut again = copy(again);
        if rng.random_bool(0.2) {
            again.digest[15] ^= 1;
        }
        return again;
    }
    let subject = name(NAMES[rng.random_range(0..NAMES.len())]);
    let some = |rng: &mut ChaCha8Rng, least: usize| {
        let count = if rng.random_bool(0.05) { rng.random_range(14..20) } else { rng.random_range(least..4) };
        (0..count).map(|_| sealed(rng.random(), [0, 90, 1100, 9000][rng.random_range(0..4)])).collect::<Vec<_>>()
    };
    let action = match rng.random_range(0..10) {
        0..4 => {
            let least = usize::from(rng.random_bool(0.9));
            // Before any deletion here, and after all.
            let (before, after) = (Some(UNIX_EPOCH), Some(SystemTime::now() + REQUESTS_KEPT));
            let source = match rng.random_range(0..4) {
                0 | 1 => Source::Person,
                2 => Source::List { after_forget: after },
                _ => Source::List { after_forget: before.filter(|_| rng.random()) },
            };
            Action::Enrol { subject, source, templates: some(rng, least) }
        }
        4..8 => {
            // Mostly templates that exist, seldom this subject's: bias by trying those first.
            let ids = model.template_ids();
            let count = rng.random_range(0..3);
            let remove = (0..count)
                .map(|_| match ids.get(rng.random_range(0..ids.len().max(1))) {
                    Some(id) if rng.random_bool(0.95) => TemplateId(*id),
                    _ => TemplateId(rng.random_range(0..u64::MAX)),
                })
                .collect();
            Action::Update { subject, add: some(rng, 0), remove }
        }
        _ => Action::Forget { subject },
    };
    let change = Change {
        request_id: RequestId::new(&format!("request-{}", earlier.len())).unwrap(),
        digest: [rng.random(); 16],
        action,
    };
    earlier.push(copy(&change));
    change
}

fn copy(change: &Change) -> Change {
    let action = match &change.action {
        Action::Enrol { subject, source, templates } => {
            Action::Enrol { subject: subject.clone(), source: *source, templates: templates.clone() }
        }
        Action::Update { subject, add, remove } => {
            Action::Update { subject: subject.clone(), add: add.clone(), remove: remove.clone() }
        }
        Action::Forget { subject } => Action::Forget { subject: subject.clone() },
    };
    Change { request_id: change.request_id.clone(), digest: change.digest, action }
}

#[test]
fn random_changes_do_what_the_model_says() {
    let mut kinds = std::collections::BTreeMap::<String, usize>::new();
    for seed in 0..8 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (mut home, mut model, mut earlier) = (Home::new(), Model::default(), Vec::new());
        for commit in 0..60 {
            let context = format!("seed {seed}, commit {commit}");
            let count = rng.random_range(0..12);
            let mut changes = Vec::new();
            // The generator looks at the model, so it must see the changes before.
            let (mut ahead, before) = (model.clone(), model.log_len());
            for _ in 0..count {
                changes.push(random_change(&mut rng, &ahead, &mut earlier));
                ahead.apply(changes.last().unwrap());
            }
            let expected: Vec<Outcome> = changes.iter().map(|change| model.apply(change)).collect();
            let committed = home.commit(&changes).unwrap();
            let found: Vec<Outcome> = committed.outcomes.into_iter().map(timeless_outcome).collect();
            assert_eq!(found, expected, "{context}");
            for outcome in &found {
                let word = format!("{outcome:?}");
                let replayed = if word.contains("replayed: true") { " replayed" } else { "" };
                *kinds.entry(format!("{}{replayed}", word.split([' ', '(']).next().unwrap())).or_default() += 1;
            }
            let lsns: Vec<u64> = committed.records.iter().map(|r| r.lsn.0).collect();
            assert!(lsns.iter().copied().eq(before as u64 + 1..=model.log_len() as u64), "{context}");
            let entries: Vec<_> = committed.records.iter().map(|r| model.entry(r, true)).collect();
            assert_eq!(entries, model.log_from(before), "{context}");
            if commit % 5 == 4 {
                model.check(&home, &NAMES, &context);
            }
            match rng.random_range(0..12) {
                0 => home.reopen(),
                1 => home.scrub().unwrap(),
                _ => {}
            }
        }
        model.check(&home, &NAMES, &format!("seed {seed}"));
        check_tables(&home.path());
    }
    // The test is worth something only if it came everywhere.
    for kind in [
        "Done",
        "Done replayed",
        "SubjectExists",
        "Forgotten",
        "NoSuchSubject",
        "NoSuchTemplate",
        "TemplateCount",
        "RequestIdReused",
    ] {
        assert!(kinds.get(kind).is_some_and(|n| *n > 10), "{kind}: {kinds:?}");
    }
}
