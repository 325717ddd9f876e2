//! A server that is told to stop answers what it has taken, says goodbye, and is gone in time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use rustix::process::Signal;
use thenar::api::proto::{self, BulkEnrollProgress, identify_stream_response::Outcome};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::support::client::{Client, bulk_messages, enrolments, identify_request};
use crate::support::palms::{Palm, Palms};
use crate::support::server::{Options, TestServer};

const SEED: u64 = 111;
const DIM: usize = 64;
/// Longer than any of these tests: whoever ends earlier did not wait for it.
const LONG_DRAIN: &str = "drain_seconds = 120";
const IN_TIME: Duration = Duration::from_secs(60);

async fn with_people(options: Options, count: usize) -> (TestServer, Client, Vec<(String, Palm)>) {
    let people = Palms::new(SEED, DIM).people("person", count);
    let (server, client) = TestServer::with(options, &people).await;
    (server, client, people)
}

fn patient() -> Options {
    Options { server: LONG_DRAIN.into(), ..Options::dim(DIM) }
}

/// A stream of identifications whose requests end only when the returned sender is dropped.
async fn open_stream(
    client: &mut Client,
) -> (tokio::sync::mpsc::Sender<proto::IdentifyRequest>, tonic::Streaming<proto::IdentifyStreamResponse>) {
    let (requests, waiting) = tokio::sync::mpsc::channel(64);
    let waiting = tokio_stream::wrappers::ReceiverStream::new(waiting);
    let answers = client.identification.identify_stream(waiting).await.unwrap().into_inner();
    (requests, answers)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn searches_that_were_taken_are_answered_and_streams_end_in_order() {
    let (mut server, client, people) = with_people(patient(), 3000).await;
    let mut running = Vec::new();
    // Gates with a stream each, always with a few searches under way.
    for gate in 0..4 {
        let mut client = server.client().await;
        let people = people.clone();
        running.push(tokio::spawn(async move {
            let (requests, mut answers) = open_stream(&mut client).await;
            let asked = people.clone();
            let asking = tokio::spawn(async move {
                for (id, palm) in asked.iter().cycle().skip(gate * 700) {
                    let mut request = identify_request(std::slice::from_ref(palm), 1, Some(0.9));
                    request.request_id.clone_from(id);
                    if requests.send(request).await.is_err() {
                        return;
                    }
                }
            });
            let (mut right, mut refused) = (0, 0);
            // No error instead of an end: the stream itself is closed in order.
            while let Some(answer) = answers.message().await.expect("a stream ends in order") {
                match answer.outcome.unwrap() {
                    Outcome::Response(response) => {
                        assert_eq!(response.candidates[0].subject_id, answer.request_id, "seed {SEED}");
                        right += 1;
                    }
                    Outcome::Error(error) => {
                        assert_eq!(error.code, i32::from(Code::Unavailable), "{error:?}");
                        refused += 1;
                    }
                }
            }
            asking.abort();
            assert!(refused <= 64, "at most what was read is refused in the stream: {refused}");
            right
        }));
    }
    // Terminals with single calls, many at once.
    let answered = Arc::new(AtomicUsize::new(0));
    let singles = tokio::spawn({
        let (client, people, answered) = (client.clone(), people.clone(), Arc::clone(&answered));
        async move {
            let calls = futures::stream::iter(0..20_000).map(|i: usize| {
                let (mut client, (id, palm)) = (client.clone(), people[i % people.len()].clone());
                let answered = Arc::clone(&answered);
                async move {
                    let who = client.who(&palm).await;
                    answered.fetch_add(1, Ordering::Relaxed);
                    (id, who)
                }
            });
            calls.buffer_unordered(200).collect::<Vec<_>>().await
        }
    });
    while answered.load(Ordering::Relaxed) < 300 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    server.sigterm();
    let mut right = 0;
    for (id, answer) in singles.await.unwrap() {
        match answer {
            Ok(who) => {
                assert_eq!(who, Some(id), "seed {SEED}");
                right += 1;
            }
            Err(status) => {
                // What the server did not take, tonic itself reports in one of two ways: it had not
                // sent the call when the connection closed, or the server's goodbye excluded it.
                let own = std::error::Error::source(&status).is_some();
                let unsent = own && status.code() == Code::Cancelled;
                let excluded = own && format!("{status:?}").contains("GoAway(b\"\", NO_ERROR, Remote)");
                assert!(unsent || excluded || status.code() == Code::Unavailable, "cut off: {status:?}");
            }
        }
    }
    assert!((300..20_000).contains(&right), "{right} of 20000");
    for gate in running {
        assert!(gate.await.unwrap() > 0);
    }
    assert_eq!(server.wait(IN_TIME).code(), Some(0));
    assert!(!server.log().contains("cut off"), "nobody had to be cut off");
    let (code, said) = server.into_site().verify();
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn idle_streams_end_at_once_and_new_calls_are_refused() {
    let (mut server, mut client, people) = with_people(patient(), 10).await;
    let (_requests, mut answers) = open_stream(&mut client).await;
    let (_messages, waiting) = tokio::sync::mpsc::channel::<proto::BulkEnrollRequest>(1);
    let waiting = tokio_stream::wrappers::ReceiverStream::new(waiting);
    let mut progress = client.enrollment.bulk_enroll(waiting).await.unwrap().into_inner();
    let told = Instant::now();
    server.sigterm();
    assert_eq!(answers.message().await.unwrap(), None, "the stream of a gate ends in order");
    let status = progress.message().await.expect_err("a client that goes on enrolling must hear of it");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!(server.wait(IN_TIME).code(), Some(0));
    assert!(told.elapsed() < Duration::from_secs(100), "well before the drain's end");
    assert!(client.who(&people[0].1).await.is_err(), "new calls are refused");
    assert!(std::net::TcpStream::connect(server.addr).is_err(), "and new connections");
}

/// Asks for far more than a client that does not read is given room for, so that its answers cannot
/// be delivered and its stream cannot end.
async fn stuck(
    server: &TestServer,
    palm: &Palm,
) -> (Client, tokio::task::JoinHandle<()>, tonic::Streaming<proto::IdentifyStreamResponse>) {
    let mut client = server.client().await;
    let (requests, answers) = open_stream(&mut client).await;
    let request = identify_request(std::slice::from_ref(palm), 100, Some(-1.0));
    let asking = tokio::spawn(async move { while requests.send(request.clone()).await.is_ok() {} });
    // Until nothing moves any more.
    let searches = || server.metric("thenar_searches_total{purpose=\"entry\",outcome=\"match\"}").unwrap_or(0.0);
    let mut before = -1.0;
    while searches() < 64.0 || searches() > before {
        before = searches();
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    (client, asking, answers)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_cut_off_at_the_end_of_the_drain() {
    let options = Options { server: "drain_seconds = 3".into(), ..Options::dim(DIM) };
    let (mut server, mut client, people) = with_people(options, 300).await;
    let mut health = HealthClient::new(server.channel().await);
    let watched = HealthCheckRequest { service: "thenar.v1.Identification".into() };
    let mut watch = health.watch(watched).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status, i32::from(ServingStatus::Serving));
    assert_eq!(server.http("/readyz").unwrap().0, 200);
    let held = stuck(&server, &people[0].1).await;
    client.enroll("late", &[Palms::new(SEED + 1, DIM).palm()]).await.unwrap();
    server.sigterm();
    // The drain goes on as long as the stuck client: now it can be seen.
    assert_eq!(watch.message().await.unwrap().unwrap().status, i32::from(ServingStatus::NotServing));
    let (code, body) = server.http("/readyz").unwrap();
    assert_eq!((code, body.as_str()), (503, "draining\n"));
    assert_eq!(server.http("/livez").unwrap().0, 200, "a server that drains is alive");
    assert!(std::net::TcpStream::connect(server.addr).is_err(), "no new connection is taken");
    assert_eq!(server.wait(IN_TIME).code(), Some(0), "cut off, and ended well all the same");
    assert!(server.log().contains("cut off"), "{}", server.log());
    drop(held);
    let server = server.into_site().start();
    assert_eq!(server.client().await.status().await.unwrap().subjects, 301);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_does_not_wait_for_anybody() {
    for second in [Signal::TERM, Signal::INT] {
        let (mut server, _client, people) = with_people(patient(), 300).await;
        let held = stuck(&server, &people[0].1).await;
        let told = Instant::now();
        server.signal(Signal::INT);
        server.wait_for_log("draining");
        assert!(server.is_running(), "somebody is still being answered");
        server.signal(second);
        assert_eq!(server.wait(IN_TIME).code(), Some(0));
        assert!(told.elapsed() < Duration::from_secs(100), "the drain was cut short");
        drop(held);
        let (code, said) = server.into_site().verify();
        assert_eq!(code, Some(0), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bulk_enrolment_that_is_cut_short_keeps_what_it_acknowledged() {
    let mut server = TestServer::start(patient());
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED + 2, DIM);
    let people = palms.people("person", 4000);
    let requests = enrolments(&people);
    let messages = futures::stream::iter(bulk_messages(requests.clone(), 8)).then(|message| async {
        tokio::time::sleep(Duration::from_millis(2)).await;
        message
    });
    let mut stream = client.enrollment.bulk_enroll(messages).await.unwrap().into_inner();
    let mut last = BulkEnrollProgress::default();
    let ended = loop {
        match stream.message().await {
            Ok(Some(progress)) => {
                last = progress;
                if last.received == 160 {
                    server.sigterm();
                }
            }
            Ok(None) => panic!("cut short without a word after {} of 4000", last.received),
            Err(status) => break status,
        }
    };
    assert_eq!(ended.code(), Code::Unavailable, "{ended:?}");
    assert!((160..4000).contains(&last.received), "{}", last.received);
    assert_eq!(server.wait(IN_TIME).code(), Some(0));
    let server = server.into_site().start();
    let mut client = server.client().await;
    for (id, palm) in &people[..last.received as usize] {
        assert_eq!(client.who(palm).await.unwrap().as_ref(), Some(id), "seed {}", SEED + 2);
    }
    client.bulk_again(requests).await;
    assert_eq!(client.status().await.unwrap().subjects, 4000, "repeated, everybody is in once");
}
