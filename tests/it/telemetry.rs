//! What a server tells operators: every metric of the catalogue, health, reflection; and never a palm.

use std::time::{Duration, Instant};

use thenar::telemetry::{CATALOGUE, Kind};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::support::client::{enroll_request, enrolments, identify_request};
use crate::support::palms::{Palm, Palms};
use crate::support::processes::soon;
use crate::support::server::{Options, Site, TestServer};

const SEED: u64 = 131;
const DIM: usize = 64;

/// Series of the page whose name is `name`: labels and value.
fn series<'a>(page: &'a str, name: &str) -> Vec<(&'a str, f64)> {
    page.lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let (labels, value) = rest.rsplit_once(' ')?;
            (labels.is_empty() || labels.starts_with('{')).then(|| (labels, value.parse().unwrap()))
        })
        .collect()
}

fn total(page: &str, name: &str) -> f64 {
    series(page, name).iter().map(|(_, value)| value).sum()
}

/// Real traffic of every kind; returns the palms and the names that were in it.
async fn traffic(server: &TestServer) -> (Vec<Palm>, Vec<String>) {
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED, DIM);
    let people = palms.people("somebody", 60);
    client.bulk(enrolments(&people[..50])).await;
    for (id, palm) in &people[50..] {
        client.enroll(id, std::slice::from_ref(palm)).await.unwrap();
    }
    let (repeated, extra, stranger) = (palms.palm(), palms.palm(), palms.palm());
    let again = enroll_request("twice", std::slice::from_ref(&repeated));
    for _ in 0..2 {
        client.enrollment.enroll(again.clone()).await.unwrap();
    }
    client.enroll("twice", std::slice::from_ref(&repeated)).await.unwrap_err();
    client.update("somebody-1", std::slice::from_ref(&extra), &[]).await.unwrap();
    client.forget("somebody-2").await.unwrap();
    // A palm that two have: nobody can say who.
    client.enroll("twin", std::slice::from_ref(&people[3].1)).await.unwrap();
    for (_, palm) in &people[4..10] {
        client.identify(std::slice::from_ref(palm), 5, None).await.unwrap();
    }
    client.identify(std::slice::from_ref(&people[3].1), 5, None).await.unwrap();
    client.identify(std::slice::from_ref(&stranger), 5, None).await.unwrap();
    client.verify("somebody-5", std::slice::from_ref(&people[5].1)).await.unwrap();
    // Refused, with a palm in hand.
    let bad = |change: &dyn Fn(&mut thenar::api::proto::IdentifyRequest)| {
        let mut request = identify_request(std::slice::from_ref(&stranger), 5, None);
        change(&mut request);
        request
    };
    client.identification.identify(bad(&|r| r.max_candidates = 0)).await.unwrap_err();
    client.identification.identify(bad(&|r| r.venue_id = "elsewhere".into())).await.unwrap_err();
    let mut nan = people[6].1.clone();
    nan.values[9] = f32::NAN;
    client.identify(std::slice::from_ref(&nan), 5, None).await.unwrap_err();
    client.enroll("nan", std::slice::from_ref(&nan)).await.unwrap_err();
    let names = people.iter().map(|(id, _)| id.clone()).chain(["twice".into(), "twin".into()]).collect();
    let palms = people.into_iter().map(|(_, palm)| palm).chain([repeated, extra, stranger]).collect();
    (palms, names)
}

fn options(level: &'static str) -> Options {
    Options { level, top: "venues = [\"gate-1\"]".into(), ..Options::dim(DIM) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn after_real_traffic_every_metric_has_moved_that_should() {
    let server = TestServer::start(options("info"));
    traffic(&server).await;
    // The last call gives its bytes back a moment after its answer has arrived.
    soon("the calls have ended", || server.metric("thenar_message_bytes") == Some(0.0)).await;
    let page = server.metrics_text();
    for metric in CATALOGUE {
        let moved = match metric.kind {
            Kind::Histogram => total(&page, &format!("{}_count", metric.name)),
            Kind::Counter | Kind::Gauge => total(&page, metric.name),
        };
        // Nothing waits, nothing lags, there is no GPU, and the CPU engine searches the map itself.
        let still = [
            "thenar_connections_refused_total",
            "thenar_message_bytes",
            "thenar_queue_searches",
            "thenar_gallery_left_out",
            "thenar_log_lag",
            "thenar_device_memory_bytes",
            "thenar_device_seconds",
            "thenar_engine_host_bytes",
            "thenar_engine_fallbacks_total",
        ];
        let still = still.contains(&metric.name);
        assert_eq!(moved > 0.0, !still, "{} is {moved} in\n{page}", metric.name);
        for (labels, _) in series(&page, metric.name) {
            let labels = labels.trim_matches(['{', '}']);
            for label in labels.split(',').filter(|l| !l.is_empty()) {
                let (name, value) = label.split_once('=').unwrap();
                let declared = metric.labels.iter().find(|(n, _)| *n == name);
                let value = value.trim_matches('"');
                assert!(declared.is_some_and(|(_, values)| values.contains(&value)), "{}: {label}", metric.name);
            }
        }
    }
    for gauge in ["thenar_queue_searches", "thenar_log_lag"] {
        assert_eq!(series(&page, gauge), [("", 0.0)], "{page}");
    }
    for (name, expected) in [
        ("thenar_searches_total{purpose=\"entry\",outcome=\"match\"}", 6.0),
        ("thenar_searches_total{purpose=\"entry\",outcome=\"no_match\"}", 1.0),
        ("thenar_searches_total{purpose=\"entry\",outcome=\"inconclusive\"}", 1.0),
        ("thenar_searches_refused_total{reason=\"invalid\"}", 2.0),
        ("thenar_searches_refused_total{reason=\"unknown_venue\"}", 1.0),
        ("thenar_search_seconds_count{stage=\"queue\"}", 8.0),
        ("thenar_search_seconds_count{stage=\"prefilter\"}", 8.0),
        ("thenar_search_seconds_count{stage=\"refine\"}", 8.0),
        ("thenar_search_seconds_count{stage=\"total\"}", 8.0),
        ("thenar_batch_probes_sum", 8.0),
        ("thenar_gallery_templates", 62.0),
        ("thenar_gallery_tombstones", 1.0),
        ("thenar_writes_total{kind=\"enrol\",result=\"done\"}", 62.0),
        ("thenar_writes_total{kind=\"enrol\",result=\"replayed\"}", 1.0),
        ("thenar_writes_total{kind=\"enrol\",result=\"refused\"}", 1.0),
        ("thenar_writes_total{kind=\"update\",result=\"done\"}", 1.0),
        ("thenar_writes_total{kind=\"forget\",result=\"done\"}", 1.0),
    ] {
        assert_eq!(server.metric(name), Some(expected), "{name} in\n{page}");
    }
    let described = page.lines().filter(|l| l.starts_with("# HELP thenar_")).count();
    assert!(described >= 10, "metrics say what they mean:\n{page}");
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Whole groups of base64 only: what is in the middle of any encoding of `bytes`.
fn base64(bytes: &[u8]) -> String {
    let groups = bytes.chunks_exact(3).flat_map(|three| {
        let bits = u32::from(three[0]) << 16 | u32::from(three[1]) << 8 | u32::from(three[2]);
        [18, 12, 6, 0].map(|shift| char::from(BASE64[(bits >> shift & 63) as usize]))
    });
    groups.collect()
}

/// Every way in which a palm could be written out.
fn written(palm: &Palm) -> Vec<String> {
    let bytes: Vec<u8> = palm.values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut forms: Vec<String> = Vec::new();
    for run in bytes.windows(12).step_by(4) {
        let hex: String = run.iter().map(|b| format!("{b:02x}")).collect();
        forms.push(hex.to_uppercase());
        forms.push(hex);
        forms.push(base64(run));
        forms.push(format!("{run:?}").trim_matches(['[', ']']).to_owned());
    }
    for shift in [1, 2] {
        forms.extend(bytes[shift..].windows(12).step_by(4).map(base64));
    }
    for value in &palm.values {
        // Seven digits of one value are no accident; signs and exponents are others' affair.
        let digits: String = format!("{value}").chars().filter(char::is_ascii_digit).collect();
        let digits = digits.trim_start_matches('0');
        if digits.len() >= 7 {
            forms.push(digits[..7].to_owned());
        }
    }
    forms
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn no_log_and_no_metric_ever_has_a_palm_and_no_metric_a_name() {
    let server = TestServer::start(options("debug,thenar=trace"));
    let (palms, names) = traffic(&server).await;
    let (log, page) = (server.log(), server.metrics_text());
    assert!(log.contains("DEBUG"), "this log says much: {log}");
    for palm in &palms {
        for form in written(palm) {
            assert!(!log.contains(&form), "the log has {form}, seed {SEED}");
            assert!(!page.contains(&form), "the metrics have {form}, seed {SEED}");
        }
    }
    for name in &names {
        assert!(!page.contains(name.as_str()), "the metrics have {name}");
        assert!(!log.contains(name.as_str()), "the log has {name}");
    }
}

/// Another program holds the registry, so that the server takes a moment to start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_is_alive_before_it_is_ready() {
    let site = TestServer::start(Options::dim(DIM)).terminate();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut site: Site = site;
    site.options.metrics = free.to_string();
    let held = rusqlite::Connection::open(site.data().join("registry.sqlite")).unwrap();
    held.execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; CREATE TABLE held(x)").unwrap();
    let starting = std::thread::spawn(move || site.start());
    let get = |path: &str| {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(free).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: thenar\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    };
    let until = Instant::now() + Duration::from_secs(30);
    let ready = loop {
        if let Some(answer) = get("/readyz") {
            break answer;
        }
        assert!(Instant::now() < until, "nobody answers while the server starts");
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    assert!(ready.starts_with("HTTP/1.1 503") && ready.ends_with("starting\n"), "{ready}");
    assert!(get("/livez").is_some_and(|a| a.starts_with("HTTP/1.1 200")), "it is alive");
    held.execute_batch("ROLLBACK").unwrap();
    drop(held);
    let server = starting.join().unwrap();
    assert_eq!(server.http("/readyz").unwrap(), (200, "ready\n".into()));
    assert_eq!(server.http("/livez").unwrap(), (200, "alive\n".into()));
    assert_eq!(server.http("/nothing").unwrap().0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn health_and_reflection_answer() {
    let server = TestServer::start(Options::dim(DIM));
    let mut health = HealthClient::new(server.channel().await);
    for service in ["", "thenar.v1.Identification", "thenar.v1.Enrollment", "thenar.v1.Administration"] {
        let answer = health.check(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
        assert_eq!(answer.status, i32::from(ServingStatus::Serving), "{service:?}");
    }
    let unknown = health.check(HealthCheckRequest { service: "thenar.v1.Nothing".into() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);

    let mut reflection = ServerReflectionClient::new(server.channel().await);
    let ask = |request| ServerReflectionRequest { host: String::new(), message_request: Some(request) };
    let asked = [
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol("thenar.v1.Identification".into())),
    ];
    let mut answers = reflection.server_reflection_info(tokio_stream::iter(asked)).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("services are listed");
    };
    let listed: Vec<String> = list.service.into_iter().map(|s| s.name).collect();
    for service in ["Identification", "Enrollment", "Administration"] {
        assert!(listed.contains(&format!("thenar.v1.{service}")), "{listed:?}");
    }
    assert!(listed.contains(&"grpc.health.v1.Health".into()), "{listed:?}");
    let described = answers.message().await.unwrap().unwrap().message_response;
    assert!(
        matches!(described, Some(MessageResponse::FileDescriptorResponse(f)) if !f.file_descriptor_proto.is_empty())
    );
}
