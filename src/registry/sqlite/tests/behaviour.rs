//! What the contract says in words, one by one.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;

use super::*;
use crate::registry::REQUESTS_KEPT;

fn record(outcome: Outcome) -> (u64, SubjectRecord, bool) {
    match outcome {
        Outcome::Done { lsn, subject, replayed } => (lsn.0, subject, replayed),
        other => panic!("{other:?}"),
    }
}

fn ids(subject: &SubjectRecord) -> Vec<u64> {
    subject.templates.iter().map(|t| t.id.0).collect()
}

#[test]
fn a_new_registry_is_empty_and_its_owners_alone() {
    let home = Home::new();
    assert_eq!((home.last_lsn().unwrap(), home.counts().unwrap()), (Lsn(0), RegistryCounts::default()));
    assert_eq!(home.identity().unwrap(), None);
    assert!(home.log_after(Lsn(0), 10).unwrap().is_empty());
    commit_one(&home, enrol("r", "ann", &[1]));
    for entry in std::fs::read_dir(home.folder.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().mode() & 0o777, 0o600, "{:?}", entry.file_name());
    }
}

#[test]
fn an_enrolment_is_answered_and_read_back_with_its_time() {
    let home = Home::new();
    let before = SystemTime::now();
    let (lsn, subject, replayed) = record(commit_one(&home, enrol("r", "ann", &[1, 2])));
    assert_eq!((lsn, ids(&subject), replayed), (2, vec![1, 2], false));
    let millisecond = Duration::from_millis(1);
    assert!(subject.enrolled_at >= before - millisecond && subject.enrolled_at <= SystemTime::now());
    assert_eq!(home.subject(&name("ann")).unwrap(), Some(subject));
    assert_eq!(home.subject(&name("Ann")).unwrap(), None);
}

#[test]
fn a_request_repeated_in_the_same_commit_happens_once() {
    let home = Home::new();
    let committed = home.commit(&[enrol("r", "ann", &[1]), enrol("r", "ann", &[1]), enrol("s", "ann", &[1])]).unwrap();
    let [first, again, other] = <[Outcome; 3]>::try_from(committed.outcomes).unwrap();
    let ((lsn, subject, _), again) = (record(first), record(again));
    assert_eq!(again, (lsn, subject, true));
    assert_eq!(other, Outcome::SubjectExists);
    assert_eq!(committed.records.len(), 1);
}

#[test]
fn a_replay_answers_as_the_first_time_after_reopening_and_later_changes() {
    let mut home = Home::new();
    let (_, first, _) = record(commit_one(&home, enrol("r", "ann", &[1, 2])));
    commit_one(&home, update("u", "ann", &[3], &[1]));
    home.reopen();
    let (lsn, subject, replayed) = record(commit_one(&home, enrol("r", "ann", &[1, 2])));
    assert_eq!((lsn, replayed, subject.enrolled_at), (2, true, first.enrolled_at));
    assert_eq!(ids(&subject), [2], "1 is gone, 3 came later");
    assert_eq!(home.last_lsn().unwrap(), Lsn(4));
}

#[test]
fn a_replayed_enrolment_does_not_bring_a_forgotten_subject_back() {
    let home = Home::new();
    let (_, first, _) = record(commit_one(&home, enrol("r", "ann", &[1])));
    commit_one(&home, forget("f", "ann"));
    let (lsn, subject, replayed) = record(commit_one(&home, enrol("r", "ann", &[1])));
    assert_eq!((lsn, subject.number, subject.enrolled_at, replayed), (1, first.number, first.enrolled_at, true));
    assert!(subject.templates.is_empty());
    assert_eq!(home.subject(&name("ann")).unwrap(), None);
    // Nor does a later owner of the name lend it templates.
    commit_one(&home, enrol("s", "ann", &[2]));
    let (_, subject, _) = record(commit_one(&home, enrol("r", "ann", &[1])));
    assert_eq!((subject.number, subject.templates.len()), (first.number, 0));
}

#[test]
fn a_list_does_not_bring_the_forgotten_back_unless_it_says_so() {
    let mut home = Home::new();
    let kept = SystemTime::now() - Duration::from_secs(1);
    record(commit_one(&home, listed("line", "ann", 1, None)));
    assert!(record(commit_one(&home, listed("line", "ann", 1, None))).2, "the same list again");
    commit_one(&home, forget("f", "ann"));
    // While the requests are remembered, and when they have been forgotten, which takes 30 days.
    for pruned in [2, 0] {
        for after_forget in [None, Some(UNIX_EPOCH), Some(kept)] {
            for request in ["line", "other"] {
                let outcome = commit_one(&home, listed(request, "ann", 1, after_forget));
                let Outcome::Forgotten { at } = outcome else { panic!("{request}, {after_forget:?}: {outcome:?}") };
                assert!(at >= kept && at <= SystemTime::now());
            }
        }
        home.writer.lock().pass(REQUESTS_KEPT + Duration::from_secs(1));
        assert_eq!(home.prune_requests(REQUESTS_KEPT, 99).unwrap(), pruned);
        home.reopen();
    }
    let (_, back, replayed) = record(commit_one(&home, listed("line", "ann", 1, Some(SystemTime::now()))));
    assert!(!replayed && home.subject(&name("ann")).unwrap() == Some(back.clone()));
    // Sent again, in doubt about the answer, it is done.
    assert_eq!(record(commit_one(&home, listed("line", "ann", 1, Some(SystemTime::now())))).1, back);
    // Somebody forgotten while the list is under way stays forgotten.
    let began = SystemTime::now() - Duration::from_millis(1);
    commit_one(&home, forget("g", "ann"));
    assert!(matches!(commit_one(&home, listed("line", "ann", 1, Some(began))), Outcome::Forgotten { .. }));
}

#[test]
fn a_person_who_is_there_is_enrolled_after_a_deletion_which_is_then_no_longer_held_against_lists() {
    let home = Home::new();
    commit_one(&home, listed("line", "ann", 1, None));
    commit_one(&home, forget("f", "ann"));
    let (_, ann, replayed) = record(commit_one(&home, enrol("r", "ann", &[2])));
    assert!(!replayed && ann.templates.len() == 1);
    assert_eq!(commit_one(&home, listed("line", "ann", 1, None)), Outcome::SubjectExists);
    let in_ledger = || {
        let conn = Connection::open(home.path()).unwrap();
        conn.query_row("SELECT count(*) FROM forgotten", [], |row| row.get::<_, i64>(0)).unwrap()
    };
    assert_eq!(in_ledger(), 0);
    commit_one(&home, forget("g", "ann"));
    assert_eq!(in_ledger(), 1);
    assert!(matches!(commit_one(&home, listed("line", "ann", 1, None)), Outcome::Forgotten { .. }));
}

#[test]
fn a_refused_request_leaves_no_trace_and_may_be_tried_again() {
    let home = Home::new();
    assert_eq!(commit_one(&home, forget("r", "ann")), Outcome::NoSuchSubject);
    commit_one(&home, enrol("s", "ann", &[1]));
    assert_eq!(record(commit_one(&home, forget("r", "ann"))).0, 2);
}

#[test]
fn refusals_say_why() {
    let home = Home::new();
    assert_eq!(commit_one(&home, enrol("a", "ann", &[])), Outcome::TemplateCount(0));
    assert_eq!(commit_one(&home, enrol("a", "ann", &[0; 17])), Outcome::TemplateCount(17));
    record(commit_one(&home, enrol("a", "ann", &[0; 16])));
    record(commit_one(&home, enrol("b", "bob", &[1])));
    assert_eq!(commit_one(&home, update("c", "ann", &[1], &[])), Outcome::TemplateCount(17));
    assert_eq!(commit_one(&home, update("c", "bob", &[], &[17])), Outcome::TemplateCount(0));
    assert_eq!(commit_one(&home, update("c", "bob", &[1], &[16])), Outcome::NoSuchTemplate(TemplateId(16)));
    assert_eq!(commit_one(&home, update("c", "bob", &[1], &[17, 17])), Outcome::NoSuchTemplate(TemplateId(17)));
    assert_eq!(commit_one(&home, update("c", "bob", &[1], &[u64::MAX])), Outcome::NoSuchTemplate(TemplateId(u64::MAX)));
    assert_eq!(commit_one(&home, update("c", "cleo", &[1], &[])), Outcome::NoSuchSubject);
    let other = change("b", 1, Action::Forget { subject: name("bob") });
    assert_eq!(commit_one(&home, other), Outcome::RequestIdReused);
    assert_eq!(home.counts().unwrap(), RegistryCounts { subjects: 2, templates: 17 });
    assert_eq!(ids(&record(commit_one(&home, update("c", "bob", &[1], &[17]))).1), [18]);
}

#[test]
fn an_update_of_nothing_is_done_and_logs_nothing() {
    let home = Home::new();
    commit_one(&home, enrol("r", "ann", &[1]));
    let (lsn, subject, replayed) = record(commit_one(&home, update("u", "ann", &[], &[])));
    assert_eq!((lsn, ids(&subject), replayed), (1, vec![1], false));
    assert!(record(commit_one(&home, update("u", "ann", &[], &[]))).2);
}

#[test]
fn numbers_are_never_given_out_twice() {
    let mut home = Home::new();
    let (_, first, _) = record(commit_one(&home, enrol("a", "ann", &[1, 2])));
    commit_one(&home, forget("b", "ann"));
    home.reopen();
    let (lsn, second, _) = record(commit_one(&home, enrol("c", "ann", &[1, 2])));
    assert_eq!((lsn, second.number.0, ids(&second)), (5, first.number.0 + 1, vec![3, 4]));
}

#[test]
fn slots_of_forgotten_templates_are_used_again() {
    let home = Home::new();
    let slots = || {
        let conn = Connection::open(home.path()).unwrap();
        conn.query_row("SELECT count(*) FROM slots", [], |row| row.get::<_, i64>(0)).unwrap()
    };
    for round in 0..5 {
        commit_one(&home, enrol(&format!("e{round}"), "ann", &[round, round + 1]));
        commit_one(&home, forget(&format!("f{round}"), "ann"));
        assert_eq!(slots(), 3, "round {round}: two templates and a name");
    }
    check_tables(&home.path());
}

#[test]
fn an_identity_is_claimed_once() {
    let mut home = Home::new();
    let identity = GalleryIdentity { dim: 512, key_id: keys().key_id() };
    let id = home.claim_identity(&identity).unwrap();
    assert_eq!(home.claim_identity(&identity).unwrap(), id);
    assert_ne!(Home::new().claim_identity(&identity).unwrap(), id, "no two galleries have one id");
    home.reopen();
    assert_eq!(home.identity().unwrap(), Some((identity.clone(), id)));
    // As long as nobody was enrolled, it can become another gallery of the same key.
    let other = home.claim_identity(&GalleryIdentity { dim: 64, key_id: identity.key_id }).unwrap();
    assert_ne!(other, id);
    let id = home.claim_identity(&identity).unwrap();
    assert_ne!(other, id);
    assert_eq!(home.identity().unwrap(), Some((identity.clone(), id)));
    commit_one(&home, enrol("r", "ann", &[1]));
    commit_one(&home, change("f", 2, Action::Forget { subject: name("ann") }));
    let key: String = identity.key_id.iter().map(|b| format!("{b:02x}")).collect();
    let error = home.claim_identity(&GalleryIdentity { dim: 256, key_id: identity.key_id }).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "the gallery was made with dimension 512 and key {key}, but this server has dimension 256 and key {key}: \
             set the dimension the gallery was made with, or use another data folder"
        )
    );
    let error = home.claim_identity(&GalleryIdentity { key_id: [1; 16], ..identity }).unwrap_err().to_string();
    let advice = "give the master key the gallery was made with, or use another data folder";
    assert!(error.ends_with(advice), "{error}");
    home.registry = None;
    let other = Vault::new(MasterKey::from_bytes([8; 32])).registry_keys();
    let error = SqliteRegistry::open(&home.path(), other).err().expect("another key's").to_string();
    assert!(error.contains(&key) && error.ends_with(advice), "{error}");
}

#[test]
fn old_requests_are_forgotten_in_steps_and_young_ones_are_not() {
    let mut home = Home::new();
    let many: u64 = 10_000;
    let changes: Vec<Change> = (0..many).map(|i| enrol(&format!("r{i}"), &format!("s{i}"), &[i])).collect();
    home.commit(&changes).unwrap();
    let (prune, pass) = (|home: &Home| home.prune_requests(REQUESTS_KEPT, 4096).unwrap(), REQUESTS_KEPT / 2);
    assert_eq!(prune(&home), 0);
    home.writer.lock().pass(pass);
    home.commit(&[enrol("young", "ben", &[1])]).unwrap();
    assert_eq!(prune(&home), 0, "half the time is over");
    // The time that it is closed does not count, nor what the clock on the wall says.
    home.reopen();
    assert_eq!(prune(&home), 0);
    home.writer.lock().pass(pass + Duration::from_secs(1));
    assert_eq!([prune(&home), prune(&home), prune(&home), prune(&home)], [4096, 4096, 1808, 0]);
    assert_eq!(commit_one(&home, enrol("r0", "s0", &[0])), Outcome::SubjectExists, "forgotten: a new request");
    assert!(record(commit_one(&home, enrol("young", "ben", &[1]))).2, "remembered: a replay");
    home.writer.lock().pass(pass);
    assert_eq!(prune(&home), 1);
}

#[test]
fn a_commit_of_nothing_is_nothing() {
    let home = Home::new();
    let committed = home.commit(&[]).unwrap();
    assert!(committed.outcomes.is_empty() && committed.records.is_empty());
    assert_eq!(home.last_lsn().unwrap(), Lsn(0));
}

#[test]
fn names_become_the_numbers_of_those_who_are_enrolled_now() {
    let home = Home::new();
    // Names that look like numbers, JSON and SQL are names.
    let names = ["ann", "12", "0", "[\"x\"]", "a\\b", "'--", "1e3"];
    let mut numbers = BTreeMap::new();
    for (at, id) in names.into_iter().enumerate() {
        let (_, subject, _) = record(commit_one(&home, enrol(&format!("r{at}"), id, &[1])));
        numbers.insert(id, subject.number);
    }
    let asked = |ids: &[&str]| {
        let ids: Vec<SubjectId> = ids.iter().map(|id| name(id)).collect();
        let mut numbers = home.subject_numbers(&ids).unwrap();
        numbers.sort_unstable();
        numbers
    };
    for id in names {
        assert_eq!(asked(&[id]), [numbers[id]], "{id}");
    }
    assert_eq!(asked(&names), numbers.values().copied().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>());
    assert_eq!(asked(&["bob", "12", "12.0", "Ann", "1000"]), [numbers["12"]]);
    assert_eq!(asked(&[]), []);
    commit_one(&home, forget("f", "ann"));
    assert_eq!(asked(&["ann"]), []);
    let (_, again, _) = record(commit_one(&home, enrol("again", "ann", &[1])));
    assert_eq!(asked(&["ann"]), [again.number]);
    assert!(!numbers.values().any(|number| *number == again.number), "a number is given out once");
}
