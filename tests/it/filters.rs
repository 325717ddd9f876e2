//! A search for some subjects alone is answered as if nobody else were enrolled.

use std::collections::{BTreeMap, BTreeSet};

use half::f16;
use prost::Message as _;
use thenar::api::SEARCH_MESSAGE_BYTES_MAX;
use thenar::api::proto::{self, certificate::Kind, identify_stream_response::Outcome};
use thenar::model::{
    CANDIDATES_MAX, DIM_MAX, FILTER_SUBJECTS_MAX, Hand, NAME_BYTES_MAX, PROBES_MAX, SUBJECT_ID_BYTES_MAX,
};

use crate::support::client::{Client, enroll_request, identify_request};
use crate::support::oracle::{Rotated, Subject, answered, expected};
use crate::support::palms::{Palm, Palms};
use crate::support::server::{Options, TestServer};

const SEED: u64 = 131;
const DIM: usize = 64;
const SUBJECTS: usize = 2400;
/// Of the purpose entry, as deploy/thenar.toml says.
const ENTRY: (f64, f64) = (0.58, 0.03);

fn filter(ids: impl IntoIterator<Item = impl Into<String>>) -> Option<proto::SubjectFilter> {
    Some(proto::SubjectFilter { subject_ids: ids.into_iter().map(Into::into).collect() })
}

/// Somebody enrolled: their palms as a client has them and as the server stores them.
struct Person {
    palms: Vec<Palm>,
    stored: Subject<Vec<f16>>,
}

/// A server over people with one to four templates.
async fn crowd(palms: &mut Palms) -> (TestServer, Client, Vec<Person>) {
    let server = TestServer::start(Options::dim(DIM));
    let mut client = server.client().await;
    let mut people = Vec::new();
    for number in 0..SUBJECTS {
        let count = if number % 4 == 0 { 1 + palms.below(4) } else { 1 };
        people.push((format!("person-{number}"), (0..count).map(|_| palms.palm()).collect::<Vec<_>>()));
    }
    client.bulk(people.iter().map(|(id, palms)| enroll_request(id, palms)).collect()).await;
    let rotated = Rotated::new(&server.site.key(), DIM);
    let mut crowd = Vec::new();
    for (id, palms) in people {
        let numbers = client.get(&id).await.unwrap().templates;
        let templates =
            numbers.iter().zip(&palms).map(|(t, palm)| (t.template_id, palm.hand, rotated.row(&palm.values)));
        crowd.push(Person { stored: Subject { templates: templates.collect(), id }, palms });
    }
    (server, client, crowd)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn answers_are_those_of_an_exhaustive_scan_over_the_subjects_named() {
    let mut palms = Palms::new(SEED, DIM);
    let (server, mut client, crowd) = crowd(&mut palms).await;
    let rotated = Rotated::new(&server.site.key(), DIM);
    let templates: usize = crowd.iter().map(|person| person.palms.len()).sum();

    // Of each size twice: among those named is the one whose palm is shown, or not. Every search is
    // of another kind, and some name people who are not enrolled.
    let mut requests = Vec::new();
    let mut truths = BTreeMap::new();
    for number in 0..96 {
        let size = [1, 2, 24, 300, 1200, SUBJECTS][number % 6];
        let mut named: BTreeSet<usize> = BTreeSet::new();
        while named.len() < size {
            named.insert(palms.below(SUBJECTS));
        }
        let shown = if number % 4 < 2 { *named.iter().nth(size / 2).unwrap() } else { palms.below(SUBJECTS) };
        let mut probes = Vec::new();
        for _ in 0..1 + number % 3 {
            let own = &crowd[shown].palms[palms.below(crowd[shown].palms.len())];
            let hand = if number % 5 == 0 { Hand::Unspecified } else { own.hand };
            probes.push(Palm::new(hand, palms.near(&own.values, 0.6)));
        }
        let threshold = [Some(-1.0), None, Some(0.2)][number % 3];
        let k = [1, 10, CANDIDATES_MAX][number / 3 % 3];
        let mut request = identify_request(&probes, k, threshold);
        let strangers = (0..number % 7).map(|at| format!("nobody-{at}"));
        request.only = filter(named.iter().map(|at| crowd[*at].stored.id.clone()).chain(strangers));
        request.certificate =
            (number % 2 == 0).then(|| proto::Certificate { kind: Kind::Deterministic.into(), miss_probability: 0.0 });
        let allowed: Vec<_> = named.iter().map(|at| crowd[*at].stored.clone()).collect();
        let (decision, listed) = expected(&rotated.rank(&allowed, &probes), ENTRY, threshold, k as usize);
        truths.insert(request.request_id.clone(), (format!("seed {SEED}, search {number}"), decision, listed));
        requests.push(request);
    }

    let check = |request_id: &str, answer: &proto::IdentifyResponse| {
        let (what, decision, listed) = &truths[request_id];
        let found = answered(answer);
        assert_eq!(&found, listed, "{what}");
        assert!(found.iter().zip(listed).all(|(a, b)| a.score.to_bits() == b.score.to_bits()), "{what}");
        assert_eq!(answer.decision, i32::from(*decision), "{what}");
        assert_eq!(answer.gallery_size, templates as u64, "{what}: the whole gallery's");
    };
    // On one stream, so that batches mix filters, certificates and searches without a filter.
    let mut mixed = requests.clone();
    for number in 0..32 {
        let at = palms.below(mixed.len());
        mixed.insert(at, identify_request(&[palms.palm()], 1 + number, Some(-1.0)));
    }
    let mut stream = client.identification.identify_stream(tokio_stream::iter(mixed)).await.unwrap().into_inner();
    let mut seen = 0;
    while let Some(answer) = stream.message().await.unwrap() {
        let Some(Outcome::Response(response)) = answer.outcome else { panic!("{answer:?}") };
        if truths.contains_key(&answer.request_id) {
            check(&answer.request_id, &response);
            seen += 1;
        }
    }
    assert_eq!(seen, requests.len());
    for decision in [proto::Decision::Match, proto::Decision::NoMatch] {
        assert!(
            truths.values().filter(|(_, expected, _)| *expected == decision).count() >= 10,
            "{decision:?} is tested"
        );
    }
    for request in requests.into_iter().step_by(5) {
        let id = request.request_id.clone();
        check(&id, client.identification.identify(request).await.unwrap().get_ref());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn whoever_is_left_out_is_not_found_and_stands_in_nobodys_way() {
    let server = TestServer::start(Options::dim(DIM));
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED + 1, DIM);
    let palm = palms.palm();
    let twin = Palm::new(palm.hand, palms.near(&palm.values, 0.05));
    client.enroll("ada", std::slice::from_ref(&palm)).await.unwrap();
    client.enroll("twin", &[twin]).await.unwrap();
    client.enroll("bob", &[palms.palm()]).await.unwrap();
    let mut ask = async |only: Option<proto::SubjectFilter>| {
        let mut request = identify_request(std::slice::from_ref(&palm), 5, None);
        request.only = only;
        let answer = client.identification.identify(request).await.unwrap().into_inner();
        let ids: Vec<String> = answer.candidates.iter().map(|c| c.subject_id.clone()).collect();
        assert_eq!(answer.gallery_size, 3);
        (answer.decision(), ids.join(" "))
    };
    assert_eq!(ask(None).await, (proto::Decision::Inconclusive, "ada twin".into()));
    assert_eq!(ask(filter(["ada", "bob"])).await, (proto::Decision::Match, "ada".into()));
    assert_eq!(ask(filter(["twin"])).await, (proto::Decision::Match, "twin".into()));
    assert_eq!(ask(filter(["bob"])).await, (proto::Decision::NoMatch, String::new()));
    assert_eq!(ask(filter(["nobody", "noone"])).await, (proto::Decision::NoMatch, String::new()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_filter_follows_enrolments_and_deletions_from_one_call_to_the_next() {
    let server = TestServer::start(Options::dim(DIM));
    let (mut writer, mut gate) = (server.client().await, server.client().await);
    let mut palms = Palms::new(SEED + 2, DIM);
    for number in 0..200 {
        writer.enroll(&format!("crowd-{number}"), &[palms.palm()]).await.unwrap();
    }
    // "guest" comes and goes under one id; each time it is another person.
    let mut found = async |probe: &Palm| {
        let mut request = identify_request(std::slice::from_ref(probe), 1, Some(0.9));
        // Long enough to be remembered between calls.
        request.only = filter((0..150).map(|number| format!("crowd-{number}")).chain(["guest".into()]));
        let answer = gate.identification.identify(request).await.unwrap().into_inner();
        answer.candidates.first().map(|c| c.subject_id.clone())
    };
    let mut last: Option<Palm> = None;
    for round in 0..60 {
        let what = format!("seed {}, round {round}", SEED + 2);
        let palm = palms.palm();
        assert_eq!(found(&palm).await, None, "{what}: before");
        writer.enroll("guest", std::slice::from_ref(&palm)).await.unwrap();
        assert_eq!(found(&palm).await.as_deref(), Some("guest"), "{what}: enrolled");
        if let Some(last) = &last {
            assert_eq!(found(last).await, None, "{what}: who had that id before");
        }
        let second = palms.palm();
        writer.update("guest", std::slice::from_ref(&second), &[]).await.unwrap();
        assert_eq!(found(&second).await.as_deref(), Some("guest"), "{what}: a template more");
        writer.forget("guest").await.unwrap();
        assert_eq!(found(&palm).await, None, "{what}: forgotten");
        last = Some(palm);
    }
}

#[test]
fn the_largest_filter_with_the_largest_probes_fits_a_message() {
    let palm = Palm::new(Hand::Right, vec![f32::MIN; DIM_MAX]);
    let mut request = identify_request(&vec![palm; PROBES_MAX], CANDIDATES_MAX, Some(-1.0));
    request.request_id = "x".repeat(NAME_BYTES_MAX);
    request.venue_id = "x".repeat(NAME_BYTES_MAX);
    request.certificate = Some(proto::Certificate { kind: Kind::Randomised.into(), miss_probability: 1e-9 });
    let width = SUBJECT_ID_BYTES_MAX;
    request.only = filter((0..FILTER_SUBJECTS_MAX).map(|number| format!("{number:0width$}")));
    let bytes = request.encoded_len();
    assert!(bytes <= SEARCH_MESSAGE_BYTES_MAX, "{bytes} bytes");
    assert!(bytes > SEARCH_MESSAGE_BYTES_MAX * 8 / 10, "{bytes} bytes: the limit could be higher");
}
