//! Clients that vanish, ask too much, hurry, or do not read cost the server nothing for long.

use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt as _;
use thenar::api::proto::{self, BulkEnrollProgress, identify_stream_response::Outcome};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::Endpoint;
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

use crate::support::client::{Client, bulk_messages, enrolments, identify_request};
use crate::support::palms::{Palm, Palms};
use crate::support::processes::{open_files, soon, status_bytes};
use crate::support::server::{Options, TestServer};

const SEED: u64 = 121;
const DIM: usize = 64;

/// A cable between a client and the server that can be cut.
struct Cable {
    addr: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Cable {
    async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = TcpStream::connect(server).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
        });
        Self { addr, task }
    }

    async fn client(&self) -> Client {
        let channel = Endpoint::from_shared(format!("http://{}", self.addr)).unwrap().connect().await.unwrap();
        Client::new(channel)
    }

    /// Both ends are closed, in the middle of whatever was under way.
    fn bound(self) {
        self.task.abort();
    }
}

fn crowd(seed: u64, count: usize) -> Vec<(String, Palm)> {
    Palms::new(seed, DIM).people("person", count)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_vanishes_amid_a_bulk_enrolment_leaves_what_was_acknowledged_and_nothing_else() {
    let (server, mut client) = TestServer::with(Options::dim(DIM), &crowd(SEED, 10)).await;
    let (files, memory) = (open_files(server.pid()), status_bytes(server.pid(), "RssAnon"));
    let mut palms = Palms::new(SEED + 1, DIM);
    for round in 0..12 {
        let cable = Cable::to(server.addr).await;
        let mut vanishing = cable.client().await;
        let people: Vec<_> = (0..400).map(|i| (format!("round-{round}-{i}"), palms.palm())).collect();
        let requests = enrolments(&people);
        let messages = futures::stream::iter(bulk_messages(requests.clone(), 10)).then(|message| async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            message
        });
        let mut stream = vanishing.enrollment.bulk_enroll(messages).await.unwrap().into_inner();
        let mut last = BulkEnrollProgress::default();
        let enough = 10 * (1 + palms.below(20)) as u64;
        while last.received < enough {
            last = stream.message().await.unwrap().unwrap();
        }
        cable.bound();
        while let Ok(Some(progress)) = stream.message().await {
            last = progress;
        }
        drop((stream, vanishing));
        for (id, palm) in &people[..last.received as usize] {
            assert_eq!(client.who(palm).await.unwrap().as_ref(), Some(id), "seed {}, round {round}", SEED + 1);
        }
        client.bulk_again(requests).await;
    }
    assert_eq!(client.status().await.unwrap().subjects, 10 + 12 * 400);
    soon("the sockets are closed", || open_files(server.pid()) <= files).await;
    let grown = status_bytes(server.pid(), "RssAnon").saturating_sub(memory);
    assert!(grown < 48 << 20, "{} MiB are left behind", grown >> 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gates_that_vanish_amid_their_streams_leave_nothing_behind() {
    let people = crowd(SEED + 2, 2000);
    let (server, mut client) = TestServer::with(Options::dim(DIM), &people).await;
    let files = open_files(server.pid());
    for round in 0..20 {
        let cable = Cable::to(server.addr).await;
        let mut vanishing = cable.client().await;
        let endless: Vec<_> =
            people.iter().map(|(_, p)| identify_request(std::slice::from_ref(p), 100, Some(-1.0))).collect();
        let requests = futures::stream::iter(endless.into_iter().cycle());
        let mut stream = vanishing.identification.identify_stream(requests).await.unwrap().into_inner();
        for _ in 0..round {
            stream.message().await.unwrap().unwrap();
        }
        cable.bound();
        drop((stream, vanishing));
        assert_eq!(client.who(&people[round].1).await.unwrap().as_ref(), Some(&people[round].0));
    }
    soon("the sockets are closed", || open_files(server.pid()) <= files).await;
    soon("the queue is empty", || server.metric("thenar_queue_searches") == Some(0.0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_the_bound_of_the_queue_callers_are_told_when_to_come_back() {
    let batch = "queue_max = 2\nprobes_max = 4".into();
    let people = crowd(SEED + 3, 20_000);
    let (server, client) = TestServer::with(Options { batch, ..Options::dim(DIM) }, &people).await;
    let calls = futures::stream::iter(0..1500).map(|i: usize| {
        let (mut client, (id, palm)) = (client.clone(), people[i].clone());
        async move {
            let request = identify_request(std::slice::from_ref(&palm), 100, Some(0.9));
            (id, client.identification.identify(request).await)
        }
    });
    let answers: Vec<_> = calls.buffer_unordered(200).collect().await;
    let (mut right, mut refused) = (0, 0);
    for (id, answer) in answers {
        match answer {
            Ok(answer) => {
                assert_eq!(answer.into_inner().candidates[0].subject_id, id, "seed {}", SEED + 3);
                right += 1;
            }
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                let hint = status.get_details_retry_info().and_then(|r| r.retry_delay).expect("a time to come back");
                assert!(hint >= Duration::from_millis(1) && hint <= Duration::from_secs(5), "{hint:?}");
                assert!(status.message().contains("searches"), "{status:?}");
                refused += 1;
            }
        }
    }
    assert!(right > 0 && refused > 0, "{right} right, {refused} refused");
    assert_eq!(server.metric("thenar_searches_refused_total{reason=\"overloaded\"}"), Some(f64::from(refused)));
    // In a stream too, and the stream goes on.
    let mut client = server.client().await;
    let requests = people[..1000].iter().map(|(id, p)| {
        let mut request = identify_request(std::slice::from_ref(p), 1, Some(0.9));
        request.request_id.clone_from(id);
        request
    });
    let requests: Vec<_> = requests.collect();
    let stream = client.identification.identify_stream(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let answers: Vec<_> = stream.map(|a| a.expect("the stream goes on")).collect().await;
    assert_eq!(answers.len(), 1000);
    for answer in answers {
        match answer.outcome.unwrap() {
            Outcome::Response(response) => assert_eq!(response.candidates[0].subject_id, answer.request_id),
            Outcome::Error(error) => {
                assert_eq!(error.code, i32::from(Code::ResourceExhausted), "{error:?}");
                assert!(error.retry_after.is_some(), "{error:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_has_64_searches_under_way_and_reads_no_further() {
    let batch = "queue_max = 64\nprobes_max = 4\nwait_ms_max = 60000".into();
    let people = crowd(SEED + 4, 5000);
    let (_server, mut client) = TestServer::with(Options { batch, ..Options::dim(DIM) }, &people).await;
    // More than 64 at a time would overflow the queue, and one of these would be refused.
    let requests: Vec<_> = people[..1500]
        .iter()
        .map(|(id, p)| {
            let mut request = identify_request(std::slice::from_ref(p), 1, Some(0.9));
            request.request_id.clone_from(id);
            request
        })
        .collect();
    let stream = client.identification.identify_stream(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let answers: Vec<proto::IdentifyStreamResponse> = stream.map(|a| a.unwrap()).collect().await;
    let mut answered: Vec<String> = Vec::new();
    for answer in answers {
        match answer.outcome.unwrap() {
            Outcome::Response(response) => assert_eq!(response.candidates[0].subject_id, answer.request_id),
            Outcome::Error(error) => panic!("{}: {error:?}", answer.request_id),
        }
        answered.push(answer.request_id);
    }
    answered.sort_unstable();
    let mut asked: Vec<String> = people[..1500].iter().map(|(id, _)| id.clone()).collect();
    asked.sort_unstable();
    assert_eq!(answered, asked, "each is answered once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_whose_deadline_passes_ends_then_and_the_server_goes_on() {
    let people = crowd(SEED + 5, 20_000);
    let batch = "probes_max = 4".into();
    let (server, client) = TestServer::with(Options { batch, ..Options::dim(DIM) }, &people).await;
    // A queue that takes longer than the deadline.
    let busy = tokio::spawn({
        let (client, people) = (client.clone(), people.clone());
        async move {
            let calls = futures::stream::iter(0..2000).map(|i: usize| {
                let (mut client, palm) = (client.clone(), people[i].1.clone());
                async move { client.identify(std::slice::from_ref(&palm), 100, Some(-1.0)).await }
            });
            calls.buffer_unordered(250).filter(|a| futures::future::ready(a.is_ok())).count().await
        }
    });
    soon("the queue is long", || server.metric("thenar_queue_searches").is_some_and(|q| q > 50.0)).await;
    let mut hurried = server.client().await;
    let mut late = 0;
    for (_, palm) in &people[..20] {
        let mut request = Request::new(identify_request(std::slice::from_ref(palm), 1, Some(-1.0)));
        request.set_timeout(Duration::from_millis(2));
        if let Err(status) = hurried.identification.identify(request).await {
            // The server may see at once that it cannot be done. The client's own clock may be the first
            // to say that it was not, and tonic's word for that is CANCELLED.
            let codes = [Code::ResourceExhausted, Code::DeadlineExceeded, Code::Cancelled];
            assert!(codes.contains(&status.code()), "{status:?}");
            late += 1;
        }
    }
    assert!(late > 0, "two milliseconds were enough behind a long queue");
    assert_eq!(busy.await.unwrap(), 2000, "everybody else is answered");
    assert_eq!(hurried.who(&people[0].1).await.unwrap().as_deref(), Some("person-0"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_does_not_fill_the_servers_memory() {
    let people = crowd(SEED + 6, 500);
    let (server, mut client) = TestServer::with(Options::dim(DIM), &people).await;
    let mut slow = Vec::new();
    let before = status_bytes(server.pid(), "RssAnon");
    for _ in 0..8 {
        let mut client = server.client().await;
        let request = identify_request(std::slice::from_ref(&people[0].1), 100, Some(-1.0));
        // A hundred candidates an answer, for ever.
        let requests = futures::stream::repeat(request);
        let answers = client.identification.identify_stream(requests).await.unwrap().into_inner();
        slow.push((client, answers));
    }
    let searches = || server.metric("thenar_searches_total{purpose=\"entry\",outcome=\"match\"}").unwrap_or(0.0);
    // They are held back: after a while nothing is searched for them any more.
    let mut last = -1.0;
    let mut pauses = 0;
    while pauses < 3 {
        let now = searches();
        pauses = if now > 0.0 && now == last { pauses + 1 } else { 0 };
        assert!(now < 200_000.0, "a client that does not read is searched for without end");
        last = now;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let grown = status_bytes(server.pid(), "RssAnon").saturating_sub(before);
    assert!(grown < 96 << 20, "{} MiB for eight clients that do not read", grown >> 20);
    assert_eq!(client.who(&people[7].1).await.unwrap().as_deref(), Some("person-7"), "others are served");
}
