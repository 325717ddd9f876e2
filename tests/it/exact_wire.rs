//! Over the wire, every answer is that of an exhaustive scan: within the rounding of rows of the
//! client's own vectors, and to the bit of the rows as they are stored.

use std::collections::BTreeMap;

use thenar::api::proto;
use thenar::model::Hand;

use crate::support::client::{Client, enroll_request, identify_request};
use crate::support::disk::copy_folder;
use crate::support::machine::{gpu_is_required, llvmpipe_is_here, skip};
use crate::support::oracle::{Gallery, Ranked, Rotated, Subject, answered, check_close, expected, rank_by_cosine};
use crate::support::palms::{Palm, Palms, Shape};
use crate::support::server::{Options, Site, TestServer};

const SEED: u64 = 21;
const DIM: usize = 64;
const SUBJECTS: usize = 2000;
/// Of the purpose entry, as deploy/thenar.toml says.
const ENTRY: (f64, f64) = (0.58, 0.03);

/// Most subjects have one template, every fifth two to four.
fn subjects(shape: Shape, palms: &mut Palms) -> Vec<(String, Vec<Palm>)> {
    let counts: Vec<usize> = (0..SUBJECTS).map(|i| if i % 5 == 0 { 2 + i / 5 % 3 } else { 1 }).collect();
    let mut vectors = shape.vectors(palms, counts.iter().sum()).into_iter();
    let mut subjects = Vec::with_capacity(SUBJECTS);
    for (i, count) in counts.into_iter().enumerate() {
        let captures = vectors.by_ref().take(count).map(|v| Palm::new(palms.hand(), v)).collect();
        subjects.push((format!("subject-{i}"), captures));
    }
    subjects
}

/// Enrols everybody and learns the numbers their templates got.
async fn enrol(client: &mut Client, subjects: &[(String, Vec<Palm>)]) -> Gallery {
    client.bulk(subjects.iter().map(|(id, palms)| enroll_request(id, palms)).collect()).await;
    let mut gallery = Gallery::new();
    for (id, palms) in subjects {
        let stored = client.get(id).await.unwrap();
        assert_eq!(stored.templates.len(), palms.len());
        let templates = stored.templates.iter().zip(palms).map(|(t, palm)| {
            assert_eq!(t.hand, i32::from(palm.hand as u8), "templates are in the order they were sent");
            (t.template_id, palm.hand, palm.values.clone())
        });
        gallery.push(Subject { id: id.clone(), templates: templates.collect() });
    }
    gallery
}

/// One to four probes: captures of one subject, of strangers, or of both.
fn probes(shape: Shape, palms: &mut Palms, subjects: &[(String, Vec<Palm>)], number: usize) -> Vec<Palm> {
    let noise = if shape == Shape::Clustered { 0.001 } else { 0.8 };
    let (_, captures) = &subjects[palms.below(subjects.len())];
    let mut probes = Vec::new();
    for p in 0..1 + number % 4 {
        let origin = &captures[p % captures.len()];
        let hand = if number.is_multiple_of(3) { Hand::Unspecified } else { palms.hand() };
        let values = match number % 5 {
            0 => palms.vector(),
            1 => origin.values.clone(),
            _ => palms.near(&origin.values, noise),
        };
        probes.push(Palm::new(hand, values));
    }
    probes
}

/// What is asked: probes, candidates, threshold.
type Question = (Vec<Palm>, u32, Option<f64>);

fn questions(shape: Shape, palms: &mut Palms, subjects: &[(String, Vec<Palm>)]) -> Vec<Question> {
    let mut questions = Vec::new();
    let mut number = 0;
    for threshold in [None, Some(-1.0), Some(0.5), Some(0.0)] {
        for max_candidates in [1, 10, 100] {
            for _ in 0..5 {
                questions.push((probes(shape, palms, subjects, number), max_candidates, threshold));
                number += 1;
            }
        }
    }
    questions
}

/// Asks on one stream, many at a time, so that batches form; answers by place of the question.
async fn ask_all(client: &mut Client, questions: &[Question]) -> Vec<proto::IdentifyResponse> {
    let mut places = BTreeMap::new();
    let requests: Vec<_> = questions
        .iter()
        .enumerate()
        .map(|(place, (probes, k, threshold))| {
            let request = identify_request(probes, *k, *threshold);
            places.insert(request.request_id.clone(), place);
            request
        })
        .collect();
    let mut stream = client.identification.identify_stream(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let mut answers = vec![None; questions.len()];
    while let Some(answer) = stream.message().await.unwrap() {
        let place = places.remove(&answer.request_id).expect("each request is answered once");
        match answer.outcome.unwrap() {
            proto::identify_stream_response::Outcome::Response(response) => {
                assert_eq!(response.request_id, answer.request_id);
                answers[place] = Some(response);
            }
            proto::identify_stream_response::Outcome::Error(error) => panic!("{error:?}"),
        }
    }
    answers.into_iter().map(|a| a.expect("every request is answered")).collect()
}

fn check(what: &str, question: &Question, answer: &proto::IdentifyResponse, close: &[Ranked], exact: &[Ranked]) {
    let (probes, max_candidates, threshold) = question;
    let what = format!("{what}: {} probes, {max_candidates} candidates, threshold {threshold:?}", probes.len());
    let found = answered(answer);
    let (decision, listed) = expected(exact, ENTRY, *threshold, *max_candidates as usize);
    assert_eq!(found.len(), listed.len(), "{what}");
    for (found, listed) in found.iter().zip(&listed) {
        assert_eq!(found, listed, "{what}");
        assert_eq!(found.score.to_bits(), listed.score.to_bits(), "{what}");
    }
    assert_eq!(answer.decision, i32::from(decision), "{what}");
    assert_eq!(answer.threshold, threshold.map_or(ENTRY.0, |t| t.max(ENTRY.0)), "{what}");
    let certificate = answer.certificate.as_ref().expect("an answer says why it is exact");
    match certificate.kind() {
        proto::certificate::Kind::Deterministic => assert_eq!(certificate.miss_probability, 0.0, "{what}"),
        // The server's default.
        proto::certificate::Kind::Randomised => assert_eq!(certificate.miss_probability, 1e-12, "{what}"),
        proto::certificate::Kind::Unspecified => panic!("{what}: no certificate"),
    }
    // The runner-up of an inconclusive answer may be listed under the bar.
    if decision != proto::Decision::Inconclusive {
        let from = threshold.unwrap_or(ENTRY.0);
        let from = if from == -1.0 { -2.0 } else { from };
        check_close(&what, &found, close, from, *max_candidates as usize);
    }
}

async fn answers_are_those_of_an_exhaustive_scan(shape: Shape) {
    let server = TestServer::start(Options::dim(DIM));
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED + shape as u64, DIM);
    let subjects = subjects(shape, &mut palms);
    let gallery = enrol(&mut client, &subjects).await;
    let rotated = Rotated::new(&server.site.key(), DIM);
    let stored = rotated.gallery(&gallery);
    let questions = questions(shape, &mut palms, &subjects);
    let answers = ask_all(&mut client, &questions).await;
    let templates: usize = gallery.iter().map(|s| s.templates.len()).sum();
    for (number, (question, answer)) in questions.iter().zip(&answers).enumerate() {
        let what = format!("{shape:?}, seed {}, question {number}", SEED + shape as u64);
        assert_eq!(answer.gallery_size, templates as u64, "{what}");
        let (close, exact) = (rank_by_cosine(&gallery, &question.0), rotated.rank(&stored, &question.0));
        check(&what, question, answer, &close, &exact);
        let single = client.identify(&question.0, question.1, question.2).await.unwrap();
        assert_eq!(single.candidates, answer.candidates, "{what}: alone as in a batch");
    }
    // A verification is the same score.
    for number in 0..40 {
        let what = format!("{shape:?}, seed {}, verification {number}", SEED + shape as u64);
        let probes = probes(shape, &mut palms, &subjects, number);
        let claimed = &gallery[palms.below(gallery.len())];
        let verified = client.verify(&claimed.id, &probes).await.unwrap();
        let exact = rotated.rank(&stored, &probes);
        let score = exact.iter().find(|r| r.subject == claimed.id).map_or(-1.0, |r| r.score);
        assert_eq!(verified.score.to_bits(), score.to_bits(), "{what}");
        let decision = if score >= ENTRY.0 { proto::Decision::Match } else { proto::Decision::NoMatch };
        assert_eq!(verified.decision, i32::from(decision), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn among_random_palms_answers_are_those_of_an_exhaustive_scan() {
    answers_are_those_of_an_exhaustive_scan(Shape::Random).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn among_near_duplicates_answers_are_those_of_an_exhaustive_scan() {
    answers_are_those_of_an_exhaustive_scan(Shape::Clustered).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn among_equal_palms_answers_are_those_of_an_exhaustive_scan() {
    answers_are_those_of_an_exhaustive_scan(Shape::AllEqual).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn among_antipodes_answers_are_those_of_an_exhaustive_scan() {
    answers_are_those_of_an_exhaustive_scan(Shape::Antipodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn templates_of_the_other_hand_are_not_compared() {
    let server = TestServer::start(Options::dim(DIM));
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED + 9, DIM);
    let (left, right) = (palms.vector(), palms.vector());
    let both = [Palm::new(Hand::Left, left.clone()), Palm::new(Hand::Right, right.clone())];
    client.enroll("both", &both).await.unwrap();
    client.enroll("right-only", &[Palm::new(Hand::Right, left.clone())]).await.unwrap();
    let ask = |hand, values: &Vec<f32>| Palm::new(hand, values.clone());

    let answer = client.identify(&[ask(Hand::Left, &left)], 10, Some(-1.0)).await.unwrap();
    let found = answered(&answer);
    assert_eq!(found.len(), 1, "a right template is no candidate for a left probe: {found:?}");
    assert_eq!((found[0].subject.as_str(), found[0].hand, found[0].compared), ("both", Hand::Left, 1));

    let answer = client.identify(&[ask(Hand::Unspecified, &left)], 10, Some(-1.0)).await.unwrap();
    assert_eq!(answered(&answer).len(), 2, "an unspecified hand is compared with both");
    assert_eq!(answer.decision, i32::from(proto::Decision::Inconclusive), "two subjects have the same template");

    // Of two probes only one can be compared with right-only: its mean is over that one.
    let probes = [ask(Hand::Left, &right), ask(Hand::Right, &left)];
    let found = answered(&client.identify(&probes, 10, Some(-1.0)).await.unwrap());
    assert_eq!((found[0].subject.as_str(), found[0].compared), ("right-only", 1), "{found:?}");
    assert!((found[0].score - 1.0).abs() < 2e-3);
    assert_eq!((found[1].subject.as_str(), found[1].compared), ("both", 2), "{found:?}");

    let nothing = client.verify("right-only", &[ask(Hand::Left, &left)]).await.unwrap();
    assert_eq!(nothing.score, -1.0, "nothing to compare");
    assert_eq!(nothing.decision, i32::from(proto::Decision::NoMatch));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_empty_gallery_answers_nobody() {
    let server = TestServer::start(Options::dim(DIM));
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED + 10, DIM);
    let answer = client.identify(&[palms.palm()], 100, Some(-1.0)).await.unwrap();
    assert_eq!((answer.candidates.len(), answer.gallery_size), (0, 0));
    assert_eq!(answer.decision, i32::from(proto::Decision::NoMatch));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_scale_of_a_vector_does_not_change_a_score() {
    let server = TestServer::start(Options::dim(DIM));
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED + 11, DIM);
    let (palm, probe) = (palms.vector(), palms.vector());
    let scaled = |values: &[f32], by: f32| Palm::new(Hand::Left, values.iter().map(|v| v * by).collect());
    client.enroll("one", &[scaled(&palm, 1.0)]).await.unwrap();
    // Powers of two scale exactly, so the normalised vector has the same bits.
    client.enroll("large", &[scaled(&palm, 2.0_f32.powi(60))]).await.unwrap();
    client.enroll("small", &[scaled(&palm, 2.0_f32.powi(-15))]).await.unwrap();
    for by in [1.0, 2.0_f32.powi(80), 2.0_f32.powi(-15)] {
        let found = answered(&client.identify(&[scaled(&probe, by)], 10, Some(-1.0)).await.unwrap());
        assert_eq!(found.iter().map(|f| f.subject.as_str()).collect::<Vec<_>>(), ["one", "large", "small"]);
        assert!(found.iter().all(|f| f.score.to_bits() == found[0].score.to_bits()), "{found:?}");
        assert!((found[0].score - crate::support::oracle::cosine(&palm, &probe)).abs() < 2e-3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_gpu_and_the_cpu_give_the_same_answers_to_the_bit() {
    let mut cpu = TestServer::start(Options::dim(DIM));
    let mut palms = Palms::new(SEED + 12, DIM);
    let mut all_questions = Vec::new();
    for (part, shape) in [Shape::Random, Shape::Clustered, Shape::Antipodes].into_iter().enumerate() {
        let mut some = subjects(shape, &mut palms);
        some.truncate(700);
        some.iter_mut().for_each(|(id, _)| *id = format!("{id}-{part}"));
        let mut client = cpu.client().await;
        let messages: Vec<_> = some.iter().map(|(id, captures)| enroll_request(id, captures)).collect();
        client.bulk(messages).await;
        for (id, _) in some.iter().step_by(9) {
            client.forget(id).await.unwrap();
        }
        all_questions.extend(questions(shape, &mut palms, &some));
    }
    let cpu_site = cpu.terminate();
    let gpu_site = Site::new(Options { engine: "kind = \"gpu\"\nadapter = \"llvmpipe\"".into(), ..Options::dim(DIM) });
    copy_folder(&cpu_site.data(), &gpu_site.data());
    std::fs::copy(cpu_site.key(), gpu_site.key()).unwrap();
    if !gpu_is_required() && !llvmpipe_is_here() {
        skip("there is no adapter named llvmpipe; with THENAR_REQUIRE_GPU=1 that is a failure");
        return;
    }
    cpu = cpu_site.start();
    let gpu = gpu_site.start();
    let (mut on_cpu, mut on_gpu) = (cpu.client().await, gpu.client().await);
    assert_eq!(on_cpu.status().await.unwrap().engine.unwrap().kind, "cpu");
    let engine = on_gpu.status().await.unwrap().engine.unwrap();
    assert!(engine.kind == "gpu" && engine.preferred, "{engine:?}");

    let (from_cpu, from_gpu) = (ask_all(&mut on_cpu, &all_questions).await, ask_all(&mut on_gpu, &all_questions).await);
    for (number, (a, b)) in from_cpu.iter().zip(&from_gpu).enumerate() {
        let what = format!("seed {}, question {number}", SEED + 12);
        assert_eq!(answered(a), answered(b), "{what}");
        assert!(a.candidates.iter().zip(&b.candidates).all(|(a, b)| a.score.to_bits() == b.score.to_bits()), "{what}");
        assert_eq!((a.decision, a.gallery_size, a.threshold), (b.decision, b.gallery_size, b.threshold), "{what}");
    }
    assert!(from_cpu.iter().any(|a| !a.candidates.is_empty()));

    // What changes later reaches the device too.
    let newcomer = Palm::new(Hand::Left, palms.vector());
    on_gpu.enroll("newcomer", std::slice::from_ref(&newcomer)).await.unwrap();
    assert_eq!(on_gpu.who(&newcomer).await.unwrap().as_deref(), Some("newcomer"));
    on_gpu.forget("newcomer").await.unwrap();
    assert_eq!(on_gpu.who(&newcomer).await.unwrap(), None);
    let engine = on_gpu.status().await.unwrap().engine.unwrap();
    assert!(engine.kind == "gpu" && engine.preferred, "the device answered all along: {engine:?}");
    assert_eq!(gpu.metric("thenar_engine_fallbacks_total").unwrap_or(0.0), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_chooses_its_certificate_and_every_certificate_gives_the_same_answer() {
    use proto::certificate::Kind;
    const DIM: usize = 256;
    let server = TestServer::start(Options::dim(DIM));
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED + 13, DIM);
    let people: Vec<Palm> = (0..4096).map(|_| palms.palm()).collect();
    let enrolments =
        people.iter().zip(0..).map(|(palm, i)| enroll_request(&format!("s{i}"), std::slice::from_ref(palm)));
    client.bulk(enrolments.collect()).await;
    let mut held = Vec::new();
    for (kind, miss_probability) in [(Kind::Deterministic, 0.0), (Kind::Randomised, 1e-6), (Kind::Randomised, 1e-15)] {
        for wanted in [0, 777, 4000] {
            let mut request = identify_request(std::slice::from_ref(&people[wanted]), 3, Some(0.6));
            request.certificate = Some(proto::Certificate { kind: kind.into(), miss_probability });
            let answer = client.identification.identify(request).await.unwrap().into_inner();
            assert_eq!(answered(&answer)[0].subject, format!("s{wanted}"), "{kind:?}");
            let certificate = answer.certificate.unwrap();
            assert!(certificate.miss_probability <= miss_probability, "{kind:?}: {certificate:?}");
            held.push(certificate.kind());
        }
    }
    assert_eq!(held[..3], [Kind::Deterministic; 3], "nothing weaker than what was asked for");
    assert!(held[3..].contains(&Kind::Randomised), "codes were used under what was asked for: {held:?}");
}
