//! Hostile clients: messages that are declared and never sent, calls that never end, connections that
//! do nothing. They are refused, cut off or run out; memory stays flat, and everybody else is served.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tonic::transport::Endpoint;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::support::client::{Client, bulk_messages, enroll_request, enrolments, identify_request};
use crate::support::palms::{Palm, Palms};
use crate::support::processes::{processor_time, soon, status_bytes};
use crate::support::server::{Options, Site, TestServer};

const SEED: u64 = 141;
const DIM: usize = 64;
const MIB: usize = 1 << 20;
const BULK: &str = "/thenar.v1.Enrollment/BulkEnroll";
const ENROLL: &str = "/thenar.v1.Enrollment/Enroll";
const IDENTIFY: &str = "/thenar.v1.Identification/Identify";
const IDENTIFY_STREAM: &str = "/thenar.v1.Identification/IdentifyStream";

/// A connection of HTTP/2 whose owner decides about every byte.
struct Hostile {
    requests: SendRequest<Bytes>,
    connection: tokio::task::JoinHandle<()>,
}

/// A call whose request has not ended.
struct Open {
    answer: ResponseFuture,
    body: SendStream<Bytes>,
}

impl Hostile {
    async fn to(server: &TestServer) -> Self {
        let stream = TcpStream::connect(server.addr).await.unwrap();
        let (requests, connection) = h2::client::handshake(stream).await.unwrap();
        let connection = tokio::spawn(async move { drop(connection.await) });
        Self { requests, connection }
    }

    /// Opens a call and declares a message of `declared` bytes.
    async fn declare(&mut self, path: &str, declared: usize) -> Open {
        let request = axum::http::Request::post(format!("http://thenar{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .unwrap();
        self.requests = self.requests.clone().ready().await.unwrap();
        let (answer, mut body) = self.requests.send_request(request, false).unwrap();
        body.send_data(prefix(declared), false).unwrap();
        Open { answer, body }
    }

    /// Closes the connection without a word.
    fn vanish(self) {
        self.connection.abort();
    }
}

fn prefix(declared: usize) -> Bytes {
    let length = u32::try_from(declared).unwrap().to_be_bytes();
    Bytes::from([&[0], length.as_slice()].concat())
}

impl Open {
    /// Sends `bytes` zeros as fast as the server takes them. Ends early if the server ends the call.
    async fn send(&mut self, mut bytes: usize) {
        let zeros = Bytes::from(vec![0; 16 << 10]);
        while bytes > 0 {
            self.body.reserve_capacity(bytes.min(zeros.len()));
            let Some(Ok(room)) = std::future::poll_fn(|cx| self.body.poll_capacity(cx)).await else { return };
            let now = room.min(bytes).min(zeros.len());
            if self.body.send_data(zeros.slice(..now), false).is_err() {
                return;
            }
            bytes -= now;
        }
    }

    /// How the call ended.
    async fn status(self) -> Status {
        let in_time = tokio::time::timeout(Duration::from_secs(60), async {
            let answer = self.answer.await.unwrap();
            if let Some(status) = Status::from_header_map(answer.headers()) {
                return status;
            }
            let mut body: RecvStream = answer.into_body();
            while let Some(data) = body.data().await {
                body.flow_control().release_capacity(data.unwrap().len()).unwrap();
            }
            Status::from_header_map(&body.trailers().await.unwrap().unwrap()).unwrap()
        });
        in_time.await.expect("the server ends the call")
    }

    /// Whether the call goes on for that long.
    async fn lasts(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, std::future::poll_fn(|cx| self.body.poll_reset(cx))).await.is_err()
    }
}

async fn with_people(options: Options, count: usize) -> (TestServer, Client, Vec<(String, Palm)>) {
    let people = Palms::new(SEED, DIM).people("person", count);
    let (server, client) = TestServer::with(options, &people).await;
    (server, client, people)
}

/// Searches for everybody, all of whom must be found; returns the longest time of a search.
async fn all_are_found(client: &mut Client, people: &[(String, Palm)]) -> Duration {
    let mut worst = Duration::ZERO;
    for (id, palm) in people {
        let asked = Instant::now();
        assert_eq!(client.who(palm).await.unwrap().as_ref(), Some(id), "seed {SEED}");
        worst = worst.max(asked.elapsed());
    }
    worst
}

fn options(server: &str) -> Options {
    Options { server: format!("drain_seconds = 20\n{server}"), ..Options::dim(DIM) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_messages_that_are_declared_and_not_sent_take_no_memory() {
    let (server, mut client, people) = with_people(Options::dim(DIM), 50).await;
    let (space, resident) = (status_bytes(server.pid(), "VmSize"), status_bytes(server.pid(), "RssAnon"));
    let (mut hostile, mut calls) = (Vec::new(), Vec::new());
    for _ in 0..40 {
        let mut connection = Hostile::to(&server).await;
        for _ in 0..250 {
            calls.push(connection.declare(BULK, 8 * MIB).await);
        }
        hostile.push(connection);
    }
    let charged = f64::from(10_000 * (16 << 10));
    soon("every call has arrived", || server.metric("thenar_message_bytes") >= Some(charged)).await;
    let during = all_are_found(&mut client, &people).await;
    let (more_space, more) =
        (status_bytes(server.pid(), "VmSize") - space, status_bytes(server.pid(), "RssAnon").saturating_sub(resident));
    let before = processor_time(server.pid());
    drop(calls);
    hostile.into_iter().for_each(Hostile::vanish);
    let closing = all_are_found(&mut client, &people).await;
    soon("the calls have ended", || server.metric("thenar_message_bytes") == Some(0.0)).await;
    let spent = processor_time(server.pid()) - before;
    println!(
        "{} MiB of addresses, {} MiB resident, searches {during:?} and {closing:?}, {spent:?} to close",
        more_space / MIB,
        more / MIB
    );
    assert!(more_space < 1024 * MIB, "{} MiB of addresses", more_space / MIB);
    assert!(more < 256 * MIB, "{} MiB", more / MIB);
    assert!(during.max(closing) < Duration::from_secs(1), "a search took {during:?}, then {closing:?}");
    assert!(spent < Duration::from_secs(3), "{spent:?} of processor to close the connections");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_length_over_the_methods_limit_is_refused_before_anything_follows() {
    let server = TestServer::start(Options::dim(DIM));
    let mut hostile = Hostile::to(&server).await;
    for (path, limit) in [(BULK, 8 * MIB), (ENROLL, MIB), (IDENTIFY, MIB / 4), (IDENTIFY_STREAM, MIB / 4)] {
        let status = hostile.declare(path, limit + 1).await.status().await;
        assert_eq!(status.code(), Code::ResourceExhausted, "{path}: {status:?}");
        assert!(status.message().contains(&limit.to_string()), "{path}: {status:?}");
        let mut taken = hostile.declare(path, limit).await;
        assert!(taken.lasts(Duration::from_millis(200)).await, "{path}: as long as that is taken");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_the_budget_of_bytes_newcomers_come_back_later_and_searches_go_on() {
    let (server, mut client, people) = with_people(options("messages_mib = 128\nmessage_seconds = 8"), 50).await;
    let resident = status_bytes(server.pid(), "RssAnon");
    let mut calls = Vec::new();
    let mut hostile = Vec::new();
    for _ in 0..4 {
        let mut connection = Hostile::to(&server).await;
        for _ in 0..5 {
            let mut call = connection.declare(BULK, 8 * MIB).await;
            // All but one byte.
            calls.push(tokio::spawn(async move {
                call.send(8 * MIB - 1).await;
                call.status().await
            }));
        }
        hostile.push(connection);
    }
    soon("the large share is used up", || server.metric("thenar_message_bytes") > Some(88.0 * MIB as f64)).await;
    let full = Instant::now();
    all_are_found(&mut client, &people).await;
    client.enroll("late", &[Palms::new(SEED + 1, DIM).palm()]).await.unwrap();
    let more = status_bytes(server.pid(), "RssAnon").saturating_sub(resident);
    let mut refused = 0;
    for call in calls {
        let status = call.await.unwrap();
        match status.code() {
            Code::ResourceExhausted => {
                let hint = status.get_details_retry_info().and_then(|r| r.retry_delay);
                assert!(hint.is_some_and(|hint| hint < Duration::from_secs(5)), "{status:?}");
                refused += 1;
            }
            code => assert_eq!(code, Code::DeadlineExceeded, "{status:?}"),
        }
    }
    println!("{refused} of 20 refused, {} MiB, over after {:?}", more / MIB, full.elapsed());
    assert!((8..20).contains(&refused), "{refused} of 20");
    assert!(more < 160 * MIB, "{} MiB", more / MIB);
    assert_eq!(server.metric("thenar_message_bytes"), Some(0.0));
    let mut palms = Palms::new(SEED + 2, DIM);
    client.bulk((0..100).map(|i| enroll_request(&format!("later-{i}"), &[palms.palm()])).collect()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_call_or_message_that_does_not_come_to_its_end_is_ended() {
    let server = TestServer::start(options("call_seconds = 2\nmessage_seconds = 1"));
    let mut hostile = Hostile::to(&server).await;
    let begun = Instant::now();
    for (path, sent, word) in
        [(ENROLL, 1000, "took longer"), (BULK, 1000, "took longer"), (IDENTIFY_STREAM, 1000, "took longer")]
    {
        let mut call = hostile.declare(path, 2000).await;
        call.send(sent).await;
        let status = call.status().await;
        assert_eq!(status.code(), Code::DeadlineExceeded, "{path}: {status:?}");
        assert!(status.message().contains(word), "{path}: {status:?}");
    }
    assert!(begun.elapsed() < Duration::from_secs(30));
    // Between messages too, in bulk; a gate may be silent as long as nobody comes.
    let mut gate = server.client().await;
    let (requests, waiting) = tokio::sync::mpsc::channel(1);
    let waiting = tokio_stream::wrappers::ReceiverStream::new(waiting);
    let mut answers = gate.identification.identify_stream(waiting).await.unwrap().into_inner();
    let mut client = server.client().await;
    let palm = Palms::new(SEED + 3, DIM).palm();
    let one = bulk_messages(vec![enroll_request("ada", std::slice::from_ref(&palm))], 1);
    let messages = tokio_stream::StreamExt::chain(tokio_stream::iter(one), tokio_stream::pending());
    let mut progress = client.enrollment.bulk_enroll(messages).await.unwrap().into_inner();
    assert_eq!(progress.message().await.unwrap().unwrap().enrolled, 1);
    let status = progress.message().await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    requests.send(identify_request(std::slice::from_ref(&palm), 1, None)).await.unwrap();
    assert!(answers.message().await.unwrap().is_some(), "the gate's stream went on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_ends_at_its_age_and_nobody_loses_an_answer() {
    let (server, mut client, people) = with_people(options("age_seconds = 2"), 20).await;
    let mut gate = server.client().await;
    let (requests, waiting) = tokio::sync::mpsc::channel(64);
    let waiting = tokio_stream::wrappers::ReceiverStream::new(waiting);
    let mut answers = gate.identification.identify_stream(waiting).await.unwrap().into_inner();
    let mut bulk = server.client().await;
    let mut progress = bulk.enrollment.bulk_enroll(tokio_stream::pending()).await.unwrap().into_inner();
    for (_, palm) in &people {
        requests.send(identify_request(std::slice::from_ref(palm), 1, None)).await.unwrap();
    }
    let mut answered = 0;
    while let Some(answer) = answers.message().await.expect("a stream ends in order") {
        assert!(answer.outcome.is_some());
        answered += 1;
    }
    assert_eq!(answered, people.len());
    let status = progress.message().await.expect_err("who goes on enrolling must hear of it");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        all_are_found(&mut client, &people).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A connection from an address of this machine's own.
async fn connect_from(last: u8, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((IpAddr::V4(Ipv4Addr::new(127, 0, 0, last)), 0).into())?;
    socket.connect(to).await
}

/// How many of these the server keeps open.
async fn kept(connections: &mut [TcpStream]) -> usize {
    let mut open = 0;
    for connection in connections {
        let mut said = [0; 64];
        open += loop {
            match tokio::time::timeout(Duration::from_millis(5), connection.read(&mut said)).await {
                Err(_) => break 1,
                Ok(Ok(0) | Err(_)) => break 0,
                Ok(Ok(_)) => {}
            }
        };
    }
    open
}

/// A server that may open 256 files and sockets.
fn cramped(server: &str) -> Site {
    let mut site = Site::new(options(server));
    site.nofile = Some(256);
    site
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_stop_nobody_and_run_out() {
    let site = cramped("connections_max = 60\nconnections_per_address_max = 40\nfirst_request_seconds = 3");
    let server = site.start();
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED + 4, DIM);
    let people = palms.people("person", 20);
    client.bulk(enrolments(&people)).await;
    let mut flood = Vec::new();
    for _ in 0..350 {
        flood.push(TcpStream::connect(server.addr).await.unwrap());
    }
    assert_eq!(kept(&mut flood).await, 39, "40 from one address, with the client that was there");
    // From elsewhere there is room, until there is none in total.
    let mut others = Vec::new();
    for at in 0..40 {
        others.push(connect_from(2 + at % 2, server.addr).await.unwrap());
    }
    assert_eq!(kept(&mut others).await, 20);
    let (since, before) = (Instant::now(), processor_time(server.pid()));
    all_are_found(&mut client, &people).await;
    for at in 0..5 {
        client.enroll(&format!("late-{at}"), &[palms.palm()]).await.unwrap();
    }
    assert!(client.forget("person-0").await.is_ok());
    let refused = |limit| server.metric(&format!("thenar_connections_refused_total{{limit=\"{limit}\"}}"));
    assert_eq!((refused("address"), refused("total")), (Some(311.0), Some(20.0)));
    // A new client gets in as soon as the idle ones have run out.
    let endpoint = Endpoint::from_shared(format!("http://{}", server.addr)).unwrap();
    let mut newcomer = loop {
        assert!(since.elapsed() < Duration::from_secs(30), "the flood never runs out");
        if let Ok(channel) = endpoint.connect().await {
            let mut newcomer = Client::new(channel);
            if newcomer.status().await.is_ok() {
                break newcomer;
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    all_are_found(&mut newcomer, &people[1..]).await;
    let spent = processor_time(server.pid()) - before;
    println!("{spent:?} of processor in {:?}", since.elapsed());
    assert!(spent < since.elapsed().mul_f64(0.4) + Duration::from_millis(300), "the server spins: {spent:?}");
    while kept(&mut flood).await + kept(&mut others).await > 0 {
        assert!(since.elapsed() < Duration::from_secs(40), "the flood never runs out");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_free_descriptor_the_server_waits_and_searches_go_on() {
    let (server, mut client, people) = with_people(Options::dim(DIM), 20).await;
    let pid = Pid::from_raw(server.pid() as i32).unwrap();
    let open = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count() as u64;
    let limit = |descriptors| {
        let limit = Rlimit { current: Some(descriptors), maximum: Some(4096) };
        prlimit(Some(pid), Resource::Nofile, limit).unwrap()
    };
    limit(open + 2);
    let mut flood = Vec::new();
    for _ in 0..50 {
        flood.push(TcpStream::connect(server.addr).await.unwrap());
    }
    server.wait_for_log("connections cannot be accepted");
    let before = processor_time(server.pid());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let spent = processor_time(server.pid()) - before;
    assert!(spent < Duration::from_millis(300), "the server spins: {spent:?} of 2 s");
    all_are_found(&mut client, &people).await;
    limit(1024);
    all_are_found(&mut server.client().await, &people).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_free_descriptor_the_index_is_not_lost_and_is_checkpointed_later() {
    let (server, mut client, people) = with_people(Options::dim(DIM), 20).await;
    let pid = Pid::from_raw(server.pid() as i32).unwrap();
    let limit = |descriptors| {
        let limit = Rlimit { current: Some(descriptors), maximum: Some(4096) };
        prlimit(Some(pid), Resource::Nofile, limit).unwrap()
    };
    // What is open stays open; nothing more can be opened.
    limit(3);
    let mut palms = Palms::new(SEED + 5, DIM);
    client.enroll("late-0", &[palms.palm()]).await.unwrap();
    server.wait_for_log("could not be checkpointed");
    all_are_found(&mut client, &people).await;
    client.enroll("late-1", &[palms.palm()]).await.unwrap();
    all_are_found(&mut client, &people).await;
    limit(1024);
    client.enroll("late-2", &[palms.palm()]).await.unwrap();
    all_are_found(&mut client, &people).await;
    assert_eq!(client.status().await.unwrap().templates, 23);
    drop(client);
    let (code, said) = server.terminate().verify();
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn more_connections_than_the_system_grants_are_refused_at_the_start() {
    let site = cramped("connections_max = 65");
    let (code, said) = site.expect_no_start();
    assert_eq!(code, Some(1), "{said}");
    for word in ["server.connections_max", "65", "257", "256", "LimitNOFILE"] {
        assert!(said.contains(word), "no {word:?} in {said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_client_that_has_asked_is_let_go_when_it_asks_no_more_and_comes_back_unawares() {
    let (server, mut client, people) = with_people(options("idle_seconds = 1"), 5).await;
    soon("the connection is closed", || server.metric("thenar_connections") == Some(1.0)).await;
    all_are_found(&mut client, &people).await;
    // A gate that waits for the next visitor is not idle.
    let (requests, waiting) = tokio::sync::mpsc::channel(1);
    let waiting = tokio_stream::wrappers::ReceiverStream::new(waiting);
    let mut answers = client.identification.identify_stream(waiting).await.unwrap().into_inner();
    tokio::time::sleep(Duration::from_secs(3)).await;
    requests.send(identify_request(std::slice::from_ref(&people[0].1), 1, None)).await.unwrap();
    assert!(answers.message().await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn idle_connections_to_the_metrics_leave_room_for_others() {
    let server = TestServer::start(Options::dim(DIM));
    let mut flood = Vec::new();
    for _ in 0..100 {
        flood.push(TcpStream::connect(server.metrics).await.unwrap());
    }
    assert_eq!(kept(&mut flood).await, 32);
    let mut operator = connect_from(2, server.metrics).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut operator, b"GET /livez HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    operator.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("200") && answer.ends_with("alive\n"), "{answer}");
}
