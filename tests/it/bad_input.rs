//! Whatever is wrong with a request is told by status code, field and limit; the server goes on.

use thenar::api::proto::{self, palm_sample::Content};
use thenar::model::Hand;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::support::client::{
    Client, enroll_request, forget_request, fresh_id, identify_request, sample, update_request, verify_request,
};
use crate::support::palms::{Palm, Palms};
use crate::support::server::{Options, TestServer};

const SEED: u64 = 41;
const DIM: usize = 64;

async fn started() -> (TestServer, Client, Palms) {
    let options = Options { top: "venues = [\"gate-1\", \"store-7\"]".into(), ..Options::dim(DIM) };
    let server = TestServer::start(options);
    let client = server.client().await;
    (server, client, Palms::new(SEED, DIM))
}

/// The status must have this code and every one of these words in its message.
fn refused<T: std::fmt::Debug>(what: &str, result: Result<T, Status>, code: Code, words: &[&str]) -> Status {
    let status = result.expect_err(what);
    assert_eq!(status.code(), code, "{what}: {status:?}");
    for word in words {
        assert!(status.message().contains(word), "{what}: no {word:?} in {:?}", status.message());
    }
    status
}

/// The server answers as if nothing had been.
async fn still_answers(client: &mut Client, known: &Palm) {
    assert_eq!(client.who(known).await.unwrap().as_deref(), Some("known"));
}

fn with_values(values: Vec<f32>) -> Palm {
    Palm::new(Hand::Left, values)
}

/// A vector of norm `norm` along the first axis.
fn of_norm(norm: f32) -> Vec<f32> {
    let mut values = vec![0.0; DIM];
    values[0] = norm;
    values
}

/// Embeddings that are refused, with the words of the refusal.
fn bad_embeddings(palms: &mut Palms) -> Vec<(&'static str, Vec<f32>, Vec<&'static str>)> {
    let mut broken = |at: usize, value: f32| {
        let mut values = palms.vector();
        values[at] = value;
        values
    };
    vec![
        ("NaN", broken(3, f32::NAN), vec!["value 3", "finite"]),
        ("infinity", broken(63, f32::INFINITY), vec!["value 63", "finite"]),
        ("minus infinity", broken(0, f32::NEG_INFINITY), vec!["value 0", "finite"]),
        ("a zero vector", vec![0.0; DIM], vec!["norm", "1e-6"]),
        ("a norm under 1e-6", of_norm(9.9e-7), vec!["norm", "1e-6"]),
        ("no values", vec![], vec!["0 values", "64"]),
        ("a value too few", vec![0.1; DIM - 1], vec!["63 values", "64"]),
        ("a value too many", vec![0.1; DIM + 1], vec!["65 values", "64"]),
        ("512 values", vec![0.1; 512], vec!["512 values", "64"]),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_bad_embedding_is_refused_in_every_call_and_named_by_its_place() {
    let (_server, mut client, mut palms) = started().await;
    let known = palms.palm();
    client.enroll("known", std::slice::from_ref(&known)).await.unwrap();
    for (what, values, words) in bad_embeddings(&mut palms) {
        let bad = with_values(values);
        let good = palms.palm();
        let with_field = |field: &'static str| [vec![field], words.clone()].concat();
        let pair = [good.clone(), bad.clone()];
        let field = "probes[1].embedding.values";
        let result = client.identify(&pair, 5, None).await;
        let status = refused(what, result, Code::InvalidArgument, &with_field(field));
        let details = status.get_details_bad_request().expect("the field is in the details");
        assert_eq!(details.field_violations[0].field, field, "{what}");
        let result = client.verify("known", &pair).await;
        refused(what, result, Code::InvalidArgument, &with_field(field));
        let result = client.enroll("new", &pair).await;
        refused(what, result, Code::InvalidArgument, &with_field("samples[1].embedding.values"));
        let result = client.update("known", &pair, &[]).await;
        refused(what, result, Code::InvalidArgument, &with_field("add_samples[1].embedding.values"));
        refused(what, client.get("new").await, Code::NotFound, &["new"]);
        still_answers(&mut client, &known).await;
    }
    assert_eq!(client.get("known").await.unwrap().templates.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_norm_of_a_hundred_thousandth_is_enough() {
    let (_server, mut client, _) = started().await;
    client.enroll("faint", &[with_values(of_norm(1e-5))]).await.unwrap();
    let answer = client.identify(&[with_values(of_norm(1e-5))], 1, None).await.unwrap();
    assert_eq!(answer.candidates[0].subject_id, "faint");
    assert!((answer.candidates[0].score - 1.0).abs() < 2e-3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_bad_identification_is_refused_with_field_and_limit() {
    use Code::{InvalidArgument, NotFound};
    use proto::certificate::Kind;
    let (server, mut client, mut palms) = started().await;
    let known = palms.palm();
    client.enroll("known", std::slice::from_ref(&known)).await.unwrap();
    let probe = sample(&known);
    let base = || identify_request(std::slice::from_ref(&known), 5, None);
    let request = |change: &dyn Fn(&mut proto::IdentifyRequest)| {
        let mut request = base();
        change(&mut request);
        request
    };
    let certified = |kind: Kind, miss_probability: f64| {
        request(&|r| r.certificate = Some(proto::Certificate { kind: kind.into(), miss_probability }))
    };
    let long = "x".repeat(129);
    let only = |ids: &[&str]| {
        let subject_ids = ids.iter().map(|id| (*id).to_owned()).collect();
        request(&|r| r.only = Some(proto::SubjectFilter { subject_ids: Clone::clone(&subject_ids) }))
    };
    let crowd: Vec<String> = (0..3001).map(|number| format!("s{number}")).collect();
    let crowd: Vec<&str> = crowd.iter().map(String::as_str).collect();
    let cases: Vec<(&str, proto::IdentifyRequest, Code, &[&str])> = vec![
        ("no probes", request(&|r| r.probes.clear()), InvalidArgument, &["probes", "0", "1 to 4"]),
        ("5 probes", request(&|r| r.probes = vec![probe.clone(); 5]), InvalidArgument, &["probes", "5", "1 to 4"]),
        ("no candidates", request(&|r| r.max_candidates = 0), InvalidArgument, &["max_candidates", "0", "100"]),
        ("101 candidates", request(&|r| r.max_candidates = 101), InvalidArgument, &["max_candidates", "101", "100"]),
        ("all candidates", request(&|r| r.max_candidates = u32::MAX), InvalidArgument, &["max_candidates", "100"]),
        ("threshold 1.5", request(&|r| r.threshold = Some(1.5)), InvalidArgument, &["threshold", "1.5", "-1 to 1"]),
        ("threshold -1.1", request(&|r| r.threshold = Some(-1.1)), InvalidArgument, &["threshold", "-1.1", "-1 to 1"]),
        ("threshold NaN", request(&|r| r.threshold = Some(f64::NAN)), InvalidArgument, &["threshold", "NaN"]),
        ("threshold inf", request(&|r| r.threshold = Some(f64::INFINITY)), InvalidArgument, &["threshold", "inf"]),
        ("no kind", certified(Kind::Unspecified, 1e-12), InvalidArgument, &["certificate.kind", "missing"]),
        (
            "P 1e-3",
            certified(Kind::Randomised, 1e-3),
            InvalidArgument,
            &["certificate.miss_probability", "1e-3", "1e-6"],
        ),
        ("P 0", certified(Kind::Randomised, 0.0), InvalidArgument, &["certificate.miss_probability", "1e-15"]),
        ("P NaN", certified(Kind::Randomised, f64::NAN), InvalidArgument, &["certificate.miss_probability", "NaN"]),
        ("P of none", certified(Kind::Deterministic, 1e-9), InvalidArgument, &["certificate.miss_probability"]),
        ("no purpose", request(&|r| r.purpose = 0), InvalidArgument, &["purpose", "missing"]),
        ("purpose 99", request(&|r| r.purpose = 99), InvalidArgument, &["purpose", "99"]),
        ("hand 7", request(&|r| r.probes[0].hand = 7), InvalidArgument, &["probes[0].hand", "7"]),
        ("hand -1", request(&|r| r.probes[0].hand = -1), InvalidArgument, &["probes[0].hand", "-1"]),
        ("no request_id", request(&|r| r.request_id.clear()), InvalidArgument, &["request_id", "empty"]),
        ("long request_id", request(&|r| r.request_id = long.clone()), InvalidArgument, &["request_id", "129", "128"]),
        ("space in request_id", request(&|r| r.request_id = "a b".into()), InvalidArgument, &["request_id", "' '"]),
        ("control in request_id", request(&|r| r.request_id = "a\nb".into()), InvalidArgument, &["request_id", "\\n"]),
        ("no venue_id", request(&|r| r.venue_id.clear()), InvalidArgument, &["venue_id", "empty"]),
        ("long venue_id", request(&|r| r.venue_id = long.clone()), InvalidArgument, &["venue_id", "129", "128"]),
        ("space in venue_id", request(&|r| r.venue_id = "gate 1".into()), InvalidArgument, &["venue_id"]),
        ("nobody may be found", only(&[]), InvalidArgument, &["only.subject_ids", "empty"]),
        ("3,001 may be found", only(&crowd), InvalidArgument, &["only.subject_ids", "3001", "3000"]),
        ("one twice", only(&["a", "known", "a"]), InvalidArgument, &["only.subject_ids[2]", "same as subject_ids[0]"]),
        ("an empty id", only(&["known", ""]), InvalidArgument, &["only.subject_ids[1]", "empty"]),
        ("a space in an id", only(&["two words"]), InvalidArgument, &["only.subject_ids[0]", "' '"]),
        ("a long id", only(&["known", &long]), InvalidArgument, &["only.subject_ids[1]", "129", "64"]),
        ("unknown venue", request(&|r| r.venue_id = "gate-9".into()), NotFound, &["venue_id", "gate-9"]),
        ("nothing in a probe", request(&|r| r.probes[0].content = None), InvalidArgument, &["probes[0].content"]),
        (
            "a picture",
            request(&|r| r.probes[0].content = Some(Content::Picture(vec![0x89, b'P', b'N', b'G']))),
            InvalidArgument,
            &["probes[0].picture", "no encoder", "embedding"],
        ),
    ];
    for (what, request, code, words) in cases {
        refused(what, client.identification.identify(request.clone()).await, code, words);
        // On a stream the same is said, and the stream goes on.
        let good = base();
        let (bad_id, good_id) = (request.request_id.clone(), good.request_id.clone());
        let stream = client.identification.identify_stream(tokio_stream::iter([request, good])).await.unwrap();
        let mut stream = stream.into_inner();
        let mut seen = Vec::new();
        while let Some(answer) = stream.message().await.unwrap() {
            match answer.outcome.unwrap() {
                proto::identify_stream_response::Outcome::Response(response) => {
                    assert_eq!(answer.request_id, good_id, "{what}");
                    assert_eq!(response.candidates[0].subject_id, "known", "{what}");
                    seen.push("answered");
                }
                proto::identify_stream_response::Outcome::Error(error) => {
                    assert_eq!((answer.request_id.as_str(), error.code), (bad_id.as_str(), i32::from(code)), "{what}");
                    assert!(words.iter().all(|w| error.message.contains(w)), "{what}: {error:?}");
                    seen.push("refused");
                }
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, ["answered", "refused"], "{what}");
        still_answers(&mut client, &known).await;
    }
    assert!(server.metric("thenar_searches_refused_total{reason=\"invalid\"}").unwrap() >= 2.0);
    assert_eq!(server.metric("thenar_searches_refused_total{reason=\"unknown_venue\"}"), Some(2.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_bad_verification_is_refused_with_field_and_limit() {
    use Code::{InvalidArgument, NotFound};
    let (_server, mut client, mut palms) = started().await;
    let known = palms.palm();
    client.enroll("known", std::slice::from_ref(&known)).await.unwrap();
    let request = |change: &dyn Fn(&mut proto::VerifyRequest)| {
        let mut request = verify_request("known", std::slice::from_ref(&known));
        change(&mut request);
        request
    };
    let cases: Vec<(&str, proto::VerifyRequest, Code, &[&str])> = vec![
        ("unknown subject", request(&|r| r.subject_id = "nobody".into()), NotFound, &["subject_id", "nobody"]),
        ("no subject", request(&|r| r.subject_id.clear()), InvalidArgument, &["subject_id", "empty"]),
        ("long subject", request(&|r| r.subject_id = "s".repeat(65)), InvalidArgument, &["subject_id", "65", "64"]),
        ("unknown venue", request(&|r| r.venue_id = "gate-9".into()), NotFound, &["venue_id", "gate-9"]),
        ("no probes", request(&|r| r.probes.clear()), InvalidArgument, &["probes", "1 to 4"]),
        ("5 probes", request(&|r| r.probes = vec![sample(&known); 5]), InvalidArgument, &["probes", "5", "1 to 4"]),
        ("no purpose", request(&|r| r.purpose = 0), InvalidArgument, &["purpose"]),
        ("hand 7", request(&|r| r.probes[0].hand = 7), InvalidArgument, &["probes[0].hand", "7"]),
        ("no request_id", request(&|r| r.request_id.clear()), InvalidArgument, &["request_id"]),
    ];
    for (what, request, code, words) in cases {
        refused(what, client.identification.verify(request).await, code, words);
        still_answers(&mut client, &known).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_bad_enrolment_is_refused_with_field_and_limit_alone_and_among_many() {
    use Code::{AlreadyExists, InvalidArgument};
    let (_server, mut client, mut palms) = started().await;
    let known = palms.palm();
    client.enroll("known", std::slice::from_ref(&known)).await.unwrap();
    let other = palms.palm();
    let request = |change: &dyn Fn(&mut proto::EnrollRequest)| {
        let mut request = enroll_request("new", std::slice::from_ref(&other));
        change(&mut request);
        request
    };
    let too_many = vec![sample(&other); 17];
    let picture = Some(Content::Picture(vec![1, 2, 3]));
    let cases: Vec<(&str, proto::EnrollRequest, Code, &[&str])> = vec![
        ("subject taken", request(&|r| r.subject_id = "known".into()), AlreadyExists, &["subject_id", "known"]),
        ("no subject", request(&|r| r.subject_id.clear()), InvalidArgument, &["subject_id", "empty"]),
        ("long subject", request(&|r| r.subject_id = "s".repeat(65)), InvalidArgument, &["subject_id", "65", "64"]),
        ("space in subject", request(&|r| r.subject_id = "a b".into()), InvalidArgument, &["subject_id", "' '"]),
        ("not ASCII", request(&|r| r.subject_id = "zoë".into()), InvalidArgument, &["subject_id", "ë"]),
        ("no request_id", request(&|r| r.request_id.clear()), InvalidArgument, &["request_id", "empty"]),
        ("long request_id", request(&|r| r.request_id = "r".repeat(129)), InvalidArgument, &["request_id", "128"]),
        ("space in request_id", request(&|r| r.request_id = " ".into()), InvalidArgument, &["request_id", "' '"]),
        ("no samples", request(&|r| r.samples.clear()), InvalidArgument, &["samples", "0", "1 to 16"]),
        ("17 samples", request(&|r| r.samples.clone_from(&too_many)), InvalidArgument, &["samples", "17", "1 to 16"]),
        ("hand 7", request(&|r| r.samples[0].hand = 7), InvalidArgument, &["samples[0].hand", "7"]),
        (
            "a picture",
            request(&|r| r.samples[0].content.clone_from(&picture)),
            InvalidArgument,
            &["picture", "encoder"],
        ),
        ("nothing", request(&|r| r.samples[0].content = None), InvalidArgument, &["samples[0].content"]),
    ];
    let before = client.status().await.unwrap();
    for (what, request, code, words) in &cases {
        refused(what, client.enrollment.enroll(request.clone()).await, *code, words);
        still_answers(&mut client, &known).await;
    }
    assert_eq!(client.status().await.unwrap().subjects, before.subjects);

    // Good ones between the bad ones; each bad one is reported by its number, the rest goes in.
    let mut items = Vec::new();
    for (number, (_, request, ..)) in cases.iter().enumerate() {
        let mut request = request.clone();
        if !request.request_id.is_empty() && request.request_id.starts_with("request-") {
            request.request_id = fresh_id();
        }
        items.push(proto::BulkEnrollItem { sequence: 1000 + number as u64, enrollment: Some(request) });
        let good = enroll_request(&format!("good-{number}"), &[palms.palm()]);
        items.push(proto::BulkEnrollItem { sequence: 2000 + number as u64, enrollment: Some(good) });
    }
    items.push(proto::BulkEnrollItem { sequence: 1999, enrollment: None });
    let messages = vec![proto::BulkEnrollRequest { items, after_forget: None }];
    let mut stream = client.enrollment.bulk_enroll(tokio_stream::iter(messages)).await.unwrap().into_inner();
    let progress = stream.message().await.unwrap().unwrap();
    assert_eq!(progress.enrolled, cases.len() as u64);
    assert_eq!(progress.rejected, cases.len() as u64 + 1);
    assert_eq!(progress.received, 2 * cases.len() as u64 + 1);
    let mut sequences: Vec<u64> = progress.errors.iter().map(|e| e.sequence).collect();
    sequences.sort_unstable();
    let expected: Vec<u64> = (0..cases.len() as u64).map(|n| 1000 + n).chain([1999]).collect();
    assert_eq!(sequences, expected);
    for error in progress.errors.iter().filter(|e| e.sequence < 1999) {
        let (what, request, code, words) = &cases[error.sequence as usize - 1000];
        assert_eq!((error.code, &error.subject_id), (i32::from(*code), &request.subject_id), "{what}");
        assert!(words.iter().all(|w| error.message.contains(w)), "{what}: {error:?}");
    }
    assert!(stream.message().await.unwrap().is_none());
    for number in 0..cases.len() {
        assert_eq!(client.get(&format!("good-{number}")).await.unwrap().templates.len(), 1);
    }
    refused("the bad one", client.get("new").await, Code::NotFound, &["new"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_bulk_message_of_none_or_1025_is_refused_and_1024_are_taken() {
    let (_server, mut client, mut palms) = started().await;
    let known = palms.palm();
    client.enroll("known", std::slice::from_ref(&known)).await.unwrap();
    let items = |count: usize, prefix: &str, palms: &mut Palms| {
        let items = (0..count).map(|n| proto::BulkEnrollItem {
            sequence: n as u64,
            enrollment: Some(enroll_request(&format!("{prefix}-{n}"), &[palms.palm()])),
        });
        proto::BulkEnrollRequest { items: items.collect(), after_forget: None }
    };
    for (count, words) in [(0, ["items", "0", "1 to 1024"]), (1025, ["items", "1025", "1 to 1024"])] {
        let message = items(count, "refused", &mut palms);
        let result = match client.enrollment.bulk_enroll(tokio_stream::iter([message])).await {
            Ok(stream) => stream.into_inner().message().await,
            Err(status) => Err(status),
        };
        refused(&format!("{count} items"), result, Code::InvalidArgument, &words);
        still_answers(&mut client, &known).await;
    }
    refused("none of them went in", client.get("refused-0").await, Code::NotFound, &[]);
    let message = items(1024, "taken", &mut palms);
    let mut stream = client.enrollment.bulk_enroll(tokio_stream::iter([message])).await.unwrap().into_inner();
    let progress = stream.message().await.unwrap().unwrap();
    assert_eq!((progress.enrolled, progress.templates, progress.rejected), (1024, 1024, 0));
    assert_eq!(client.status().await.unwrap().subjects, 1025);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_id_names_one_request_for_ever() {
    let (server, mut client, mut palms) = started().await;
    let (ada, bob) = (palms.palm(), palms.palm());
    let request = enroll_request("known", std::slice::from_ref(&ada));
    let first = client.enrollment.enroll(request.clone()).await.unwrap().into_inner();
    let again = client.enrollment.enroll(request.clone()).await.unwrap().into_inner();
    assert_eq!(first, again, "the same request is answered as the first time");
    assert_eq!(client.status().await.unwrap().templates, 1);

    let mut changed = request.clone();
    changed.samples = vec![sample(&bob)];
    let words = ["request_id", request.request_id.as_str()];
    refused("another vector", client.enrollment.enroll(changed).await, Code::FailedPrecondition, &words);
    let mut changed = request.clone();
    changed.subject_id = "bob".into();
    refused("another subject", client.enrollment.enroll(changed).await, Code::FailedPrecondition, &words);
    let mut changed = request.clone();
    changed.samples[0].hand = (changed.samples[0].hand + 1) % 3;
    refused("another hand", client.enrollment.enroll(changed).await, Code::FailedPrecondition, &words);
    let mut forget = forget_request("known");
    forget.request_id.clone_from(&request.request_id);
    refused("another call", client.enrollment.forget(forget).await, Code::FailedPrecondition, &words);
    let mut update = update_request("known", std::slice::from_ref(&bob), &[]);
    update.request_id.clone_from(&request.request_id);
    refused("another call", client.enrollment.update_subject(update).await, Code::FailedPrecondition, &words);
    still_answers(&mut client, &ada).await;

    let update = update_request("known", std::slice::from_ref(&bob), &[]);
    let first_update = client.enrollment.update_subject(update.clone()).await.unwrap().into_inner();
    assert_eq!(client.enrollment.update_subject(update.clone()).await.unwrap().into_inner(), first_update);
    assert_eq!(client.get("known").await.unwrap().templates.len(), 2);

    // In a bulk message what is there under the same request id is unchanged.
    let items = vec![
        proto::BulkEnrollItem { sequence: 1, enrollment: Some(request.clone()) },
        proto::BulkEnrollItem { sequence: 2, enrollment: Some(enroll_request("eve", &[palms.palm()])) },
    ];
    let messages = vec![proto::BulkEnrollRequest { items, after_forget: None }];
    let mut stream = client.enrollment.bulk_enroll(tokio_stream::iter(messages)).await.unwrap().into_inner();
    let progress = stream.message().await.unwrap().unwrap();
    assert_eq!((progress.enrolled, progress.unchanged, progress.rejected), (1, 1, 0));

    let forget = forget_request("known");
    let forgotten = client.enrollment.forget(forget.clone()).await.unwrap().into_inner();
    assert_eq!(forgotten.templates_erased, 2);
    let again = client.enrollment.forget(forget.clone()).await.unwrap().into_inner();
    assert_eq!((again.subject_id.as_str(), again.lsn), ("known", forgotten.lsn));

    // All of this survives a restart, and so does what the request ids stand for.
    drop(client);
    let server = server.restart();
    let mut client = server.client().await;
    let again = client.enrollment.forget(forget).await.unwrap().into_inner();
    assert_eq!(again.lsn, forgotten.lsn);
    refused("known", client.get("known").await, Code::NotFound, &["known"]);
    assert_eq!(client.status().await.unwrap().subjects, 1, "a late repetition brings nobody back");
    let late = client.enrollment.enroll(request).await.unwrap().into_inner();
    assert_eq!(late.lsn, first.lsn, "answered as the first time, and nothing is done");
    refused("known", client.get("known").await, Code::NotFound, &["known"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn unknown_subjects_and_impossible_updates_are_refused() {
    use Code::{FailedPrecondition, InvalidArgument, NotFound};
    let (_server, mut client, mut palms) = started().await;
    let known = palms.palm();
    let templates = client.enroll("known", std::slice::from_ref(&known)).await.unwrap().subject.unwrap().templates;
    let own = templates[0].template_id;
    let others = client.enroll("other", &[palms.palm()]).await.unwrap().subject.unwrap().templates[0].template_id;
    let some: Vec<Palm> = (0..17).map(|_| palms.palm()).collect();

    refused("forget", client.forget("nobody").await, NotFound, &["subject_id", "nobody"]);
    refused("get", client.get("nobody").await, NotFound, &["subject_id", "nobody"]);
    refused("get", client.get("").await, InvalidArgument, &["subject_id", "empty"]);
    refused("get", client.get("a b").await, InvalidArgument, &["subject_id"]);
    refused("update", client.update("nobody", &some[..1], &[]).await, NotFound, &["subject_id", "nobody"]);
    let mut request = forget_request("known");
    request.request_id = String::new();
    refused("forget", client.enrollment.forget(request).await, InvalidArgument, &["request_id", "empty"]);

    refused("nothing to do", client.update("known", &[], &[]).await, InvalidArgument, &["add_samples"]);
    refused("none left", client.update("known", &[], &[own]).await, FailedPrecondition, &["0 templates", "1 to 16"]);
    let result = client.update("known", &some[..16], &[]).await;
    refused("17 left", result, FailedPrecondition, &["17 templates", "1 to 16"]);
    let result = client.update("known", &some, &[]).await;
    refused("17 added", result, InvalidArgument, &["add_samples", "17", "16"]);
    let result = client.update("known", &some[..1], &[u64::MAX]).await;
    refused("no such template", result, NotFound, &["remove_template_ids"]);
    let result = client.update("known", &some[..1], &[others]).await;
    refused("another's template", result, NotFound, &["remove_template_ids", &others.to_string()]);
    let result = client.update("known", &some[..1], &[own; 17]).await;
    refused("17 removed", result, InvalidArgument, &["remove_template_ids", "17", "16"]);
    assert_eq!(client.get("known").await.unwrap().templates, templates, "nothing was changed");
    still_answers(&mut client, &known).await;

    // Up to the limit, and a full subject can still be exchanged whole.
    let full = client.update("known", &some[..15], &[]).await.unwrap();
    assert_eq!(full.templates.len(), 16);
    let all: Vec<u64> = full.templates.iter().map(|t| t.template_id).collect();
    let exchanged = client.update("known", &some[..16], &all).await.unwrap();
    assert_eq!(exchanged.templates.len(), 16);
    assert_eq!(client.who(&known).await.unwrap(), None);
    assert_eq!(client.who(&some[0]).await.unwrap().as_deref(), Some("known"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_message_over_the_limit_is_refused_by_either_service() {
    let (server, mut client, mut palms) = started().await;
    let known = palms.palm();
    client.enroll("known", std::slice::from_ref(&known)).await.unwrap();
    let huge = |bytes: usize| with_values(vec![0.5; bytes / 4]);

    let result = client.identify(&[huge(300 << 10)], 1, None).await;
    refused("300 KiB to Identify", result, Code::ResourceExhausted, &["over the limit", &(256 << 10).to_string()]);
    still_answers(&mut server.client().await, &known).await;
    let result = client.enroll("new", &[huge(2 << 20)]).await;
    refused("2 MiB to Enroll", result, Code::ResourceExhausted, &["over the limit", &(1 << 20).to_string()]);
    still_answers(&mut server.client().await, &known).await;
    // Under the limit it is the content that is refused.
    let result = client.enroll("new", &[huge(1000 << 10)]).await;
    refused("1000 KiB to Enroll", result, Code::InvalidArgument, &["samples[0].embedding.values", "64"]);
    still_answers(&mut client, &known).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn bytes_that_are_no_grpc_do_not_disturb_the_server() {
    use std::io::{Read as _, Write as _};
    let (server, mut client, mut palms) = started().await;
    let known = palms.palm();
    client.enroll("known", std::slice::from_ref(&known)).await.unwrap();
    let garbage: Vec<u8> = (0..4096).map(|_| palms.below(256) as u8).collect();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    for bytes in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), garbage.clone(), [preface, garbage].concat(), vec![]] {
        let mut stream = std::net::TcpStream::connect(server.addr).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
        // The server may close the connection while this is still being written.
        let _ = stream.write_all(&bytes);
        let _ = stream.read(&mut [0; 1024]);
    }
    still_answers(&mut client, &known).await;
}
