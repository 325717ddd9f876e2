//! The demo against a server that lies: whatever it gets wrong must show in the figures.

use tonic::Code;

use super::load::{Verdict, churn, gate, judge, stable_subjects, terminal};
use super::*;
use crate::api::proto::{Candidate, Decision, EnrollRequest, IdentifyResponse};
use crate::cli::mock_server::MockServer;

/// Enough dimensions for generated palms to be told apart in a gallery of a few hundred.
const DIM: usize = 256;
const PALMS: u32 = 100;

fn people() -> Arc<Population> {
    Arc::new(Population::new(11, DIM, PALMS))
}

/// A mock server with everybody enrolled.
async fn full(people: &Population) -> MockServer {
    let mock = MockServer::start(DIM).await;
    (0..people.subjects()).for_each(|subject| mock.state().put(&people.enrollment(subject)));
    mock
}

fn scene(people: &Arc<Population>, mock: &MockServer, milliseconds: u64) -> Scene {
    Scene {
        people: people.clone(),
        stable: stable_subjects(people, 1),
        server: mock.server(),
        until: Instant::now() + Duration::from_millis(milliseconds),
        seed: 5,
    }
}

fn answered(decision: Decision, subjects: &[u32]) -> IdentifyResponse {
    let candidate = |subject: &u32| Candidate { subject_id: Population::subject_id(*subject), ..Candidate::default() };
    IdentifyResponse {
        decision: decision.into(),
        candidates: subjects.iter().map(candidate).collect(),
        ..IdentifyResponse::default()
    }
}

#[test]
fn an_answer_is_held_against_the_truth() {
    use Decision::{Inconclusive, Match, NoMatch, Unspecified};
    for (truth, decision, subjects, verdict) in [
        (Some(3), Match, &[3][..], Verdict::Correct),
        (Some(3), Match, &[3, 4], Verdict::Correct),
        (Some(3), Match, &[4, 3], Verdict::Wrong),
        (Some(3), Match, &[], Verdict::Wrong),
        (Some(3), NoMatch, &[3], Verdict::Missed),
        (Some(3), Inconclusive, &[3, 4], Verdict::Missed),
        (Some(3), Unspecified, &[3], Verdict::Missed),
        (None, NoMatch, &[], Verdict::Correct),
        (None, NoMatch, &[4], Verdict::Correct),
        (None, Inconclusive, &[4, 5], Verdict::Correct),
        (None, Match, &[4], Verdict::Wrong),
        (None, Match, &[], Verdict::Wrong),
    ] {
        assert_eq!(judge(truth, &answered(decision, subjects)), verdict, "{truth:?}, {decision:?}, {subjects:?}");
    }
}

#[test]
fn those_who_come_and_go_are_never_those_who_stay() {
    for (palms, seconds) in [(100, 1), (100, 86_400), (2_000, 1), (2_000, 10), (100_000, 10), (1_000_000, u64::MAX)] {
        let people = Population::new(1, 32, palms);
        let stable = stable_subjects(&people, seconds);
        let (stay, go) = (stable, people.subjects() - stable);
        assert!(go >= 16 && go <= people.subjects() / 4, "{palms} palms, {seconds} s: {stay} stay, {go} go");
        // The examples show subjects 0 and 9 when all is over: they must be there still.
        assert!(stay > 9 && people.has_two(9));
    }
    // Four rounds a second for ten seconds find somebody each time.
    let people = Population::new(1, 32, 100_000);
    assert_eq!(people.subjects() - stable_subjects(&people, 10), 80);
}

#[tokio::test]
async fn gates_and_terminals_of_an_honest_server_find_nothing_wrong() {
    let people = people();
    let mock = full(&people).await;
    let (gate, terminal) = (gate(scene(&people, &mock, 300)), terminal(scene(&people, &mock, 300)));
    let (gate, terminal) = tokio::try_join!(gate, terminal).unwrap();
    for tally in [gate, terminal] {
        assert!(tally.searches() > 10, "{tally:?}");
        assert_eq!((tally.wrong, tally.missed, tally.refused), (0, 0, 0));
        assert!(tally.mated > 0 && tally.mated < tally.searches(), "{} of {}", tally.mated, tally.searches());
        assert_eq!(tally.latencies.calls(), tally.searches());
    }
}

#[tokio::test]
async fn a_swapped_name_is_wrong_and_a_lost_palm_is_missed() {
    let people = people();
    let mock = MockServer::start(DIM).await;
    // Everybody goes by the next one's name, but for the last third, who are not there at all.
    let there = people.subjects() * 2 / 3;
    for subject in 0..there {
        let subject_id = Population::subject_id((subject + 1) % there);
        mock.state().put(&EnrollRequest { subject_id, ..people.enrollment(subject) });
    }
    for tally in [gate(scene(&people, &mock, 300)).await.unwrap(), terminal(scene(&people, &mock, 300)).await.unwrap()]
    {
        assert!(tally.wrong > 0 && tally.missed > 0, "{tally:?}");
        assert_eq!(tally.wrong + tally.missed, tally.mated, "strangers alone are answered rightly");
    }
}

#[tokio::test]
async fn refused_searches_are_counted_and_do_not_end_the_load() {
    let people = people();
    for code in [Code::ResourceExhausted, Code::DeadlineExceeded, Code::Unavailable] {
        let mock = full(&people).await;
        mock.state().refuse_searches = (3, Some(code));
        let at_gate = gate(scene(&people, &mock, 300)).await.unwrap();
        assert_eq!((at_gate.refused, at_gate.wrong, at_gate.missed), (3, 0, 0), "{code:?}");
        mock.state().refuse_searches = (3, Some(code));
        let at_terminal = terminal(scene(&people, &mock, 300)).await.unwrap();
        assert_eq!((at_terminal.refused, at_terminal.wrong, at_terminal.missed), (3, 0, 0), "{code:?}");
        assert!(at_gate.searches() > 0 && at_terminal.searches() > 0);
    }
}

#[tokio::test]
async fn a_server_that_says_no_for_good_ends_the_load() {
    let people = people();
    let mock = full(&people).await;
    mock.state().refuse_searches = (usize::MAX, Some(Code::Internal));
    for error in [
        gate(scene(&people, &mock, 10_000)).await.unwrap_err(),
        terminal(scene(&people, &mock, 10_000)).await.unwrap_err(),
    ] {
        assert!(matches!(&error, CliError::Refused { status, .. } if status.code() == Code::Internal), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_does_not_forget_is_stale() {
    let people = people();
    let mock = full(&people).await;
    let fresh = churn(scene(&people, &mock, 600)).await.unwrap();
    assert!(fresh.forgotten >= 2 && fresh.enrolled >= 2, "{fresh:?}");
    assert_eq!(fresh.stale, 0);

    let mock = full(&people).await;
    mock.state().keep_ghosts = true;
    let ghosts = churn(scene(&people, &mock, 600)).await.unwrap();
    assert_eq!(ghosts.stale, ghosts.forgotten, "{ghosts:?}");
}

#[tokio::test]
async fn everybody_is_enrolled_once_and_a_rejected_one_ends_the_demo() {
    let people = people();
    let mock = MockServer::start(DIM).await;
    let server = mock.server();
    let interrupted = CancellationToken::new();
    enrol_all(&server, messages(people.clone()), PALMS.into(), &interrupted).await.unwrap();
    {
        let state = mock.state();
        assert_eq!(state.subjects.len(), people.subjects() as usize);
        assert_eq!(state.subjects.values().map(Vec::len).sum::<usize>(), PALMS as usize);
    }

    let mock = MockServer::start(DIM / 2).await;
    let server = mock.server();
    let error = enrol_all(&server, messages(people.clone()), PALMS.into(), &interrupted).await.unwrap_err();
    assert!(error.to_string().contains("palm-0000001 was rejected: INVALID_ARGUMENT"), "{error}");

    // A server without room says so itself; it is not "unreachable".
    let mock = MockServer::start(DIM).await;
    mock.state().refuse_bulk = Some(Code::ResourceExhausted);
    let server = mock.server();
    let error = enrol_all(&server, messages(people.clone()), PALMS.into(), &interrupted).await.unwrap_err();
    assert!(matches!(&error, CliError::Refused { status, .. } if status.code() == Code::ResourceExhausted), "{error}");
}

#[tokio::test]
async fn examples_are_judged_like_every_other_answer() {
    let people = people();
    let mock = full(&people).await;
    let server = mock.server();
    let shown = examples(&people, &server).await.unwrap();
    assert_eq!(
        shown.iter().map(|example| example.decision.as_str()).collect::<Vec<_>>(),
        ["match", "no_match", "match"]
    );
    assert!(shown.iter().all(|example| example.right));
    assert_eq!(shown[0].candidates[0].subject_id, "palm-0000001");
    assert_eq!(shown[2].candidates[0].subject_id, "palm-0000010");

    mock.state().subjects.remove("palm-0000010");
    let shown = examples(&people, &server).await.unwrap();
    assert_eq!(shown.iter().map(|example| example.right).collect::<Vec<_>>(), [true, true, false]);
}
