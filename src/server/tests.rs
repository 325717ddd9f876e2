//! Whole servers in this process: what a panic of one of their threads looks like from outside, and
//! whether one caller's work makes others wait.

use std::io::{Read as _, Write as _};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::data_folder::DataFolder;
use super::engines::Engines;
use super::open::open_taken;
use super::*;
use crate::api::proto;
use crate::api::proto::administration_client::AdministrationClient;
use crate::api::proto::enrollment_client::EnrollmentClient;
use crate::api::proto::identification_client::IdentificationClient;
use crate::engine::GalleryView;
use crate::engine::cpu::CpuEngine;
use crate::engine::failover::Failover;
use crate::engine::testing::{Hooked, Hooks};
use crate::model::synthetic::SyntheticGallery;
use crate::registry::sqlite::SqliteRegistry;
use crate::server::config::Raw;
use crate::service::Service;
use crate::vault::MasterKey;

const DIM: usize = 64;
/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

const FIND_PANICS: u8 = 1;
const FOLLOW_PANICS: u8 = 2;
const FIND_FAILS: u8 = 4;

/// Defects of an engine that can be switched on.
#[derive(Default)]
struct Defects(AtomicU8);

impl Defects {
    fn set(&self, defects: u8) {
        self.0.store(defects, Ordering::SeqCst);
    }

    fn has(&self, defect: u8) -> bool {
        self.0.load(Ordering::SeqCst) & defect != 0
    }
}

impl Hooks for Defects {
    fn before_follow(&self, _: &GalleryView<'_>) -> Result<(), EngineError> {
        assert!(!self.has(FOLLOW_PANICS), "on purpose");
        Ok(())
    }

    fn before_find(&self, _: &GalleryView<'_>) -> Result<(), EngineError> {
        assert!(!self.has(FIND_PANICS), "on purpose");
        if self.has(FIND_FAILS) { Err(EngineError::DeviceLost { reason: "on purpose".into() }) } else { Ok(()) }
    }
}

/// The CPU engine, with defects that can be switched on.
fn rigged() -> Arc<Hooked<Defects>> {
    Arc::new(Hooked::new(1, Defects::default()))
}

/// A server on a runtime of its own, whose connections share one thread.
struct Running {
    listening: Listening,
    service: Arc<Service>,
    channel: Channel,
    stop: Stop,
    thread: std::thread::JoinHandle<Result<(), ServerError>>,
    registry: Arc<SqliteRegistry>,
    folder: tempfile::TempDir,
}

impl Running {
    async fn start(engines: Engines) -> Self {
        Self::start_with(engines, Some(DIM)).await
    }

    /// With a number of dimensions configured, or none.
    async fn start_with(engines: Engines, dim: Option<usize>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        MasterKey::generate().unwrap().write_new(&folder.path().join("master.key")).unwrap();
        Self::start_in(folder, engines, dim).await
    }

    /// Over the key, and the data if there are any, in `folder`.
    async fn start_in(folder: tempfile::TempDir, engines: Engines, dim: Option<usize>) -> Self {
        let key = folder.path().join("master.key");
        let dim = dim.map(|dim| format!("dim = {dim}\n")).unwrap_or_default();
        let text = format!(
            "data = {:?}\nkey_file = {key:?}\n{dim}[server]\nlisten = \"127.0.0.1:0\"\ndrain_seconds = 120\n\
             [metrics]\nlisten = \"127.0.0.1:0\"\n[engine]\nkind = \"cpu\"\nthreads = 1\n",
            folder.path().join("data")
        );
        let config = toml::from_str::<Raw>(&text).unwrap().validated().unwrap();
        let stop = Stop::default();
        let (opened_in, opened) = mpsc::channel();
        let (ready_in, ready) = mpsc::channel();
        let thread = std::thread::spawn({
            let stop = stop.clone();
            move || {
                let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
                let open = move |config: &Config, supervisor: &Supervisor| {
                    let mut registry = None;
                    let meddle = |opened: &Arc<SqliteRegistry>| registry = Some(Arc::clone(opened));
                    let opened = open_taken(config, supervisor, DataFolder::take, |_, _| Ok(engines), meddle)?;
                    let _ = opened_in.send((Arc::clone(&opened.service), registry));
                    Ok(opened)
                };
                runtime.unwrap().block_on(run_over(config, stop, |listening| ready_in.send(listening).unwrap(), open))
            }
        });
        let (service, registry) = opened.recv_timeout(PATIENCE).unwrap();
        let registry = registry.unwrap();
        let listening: Listening = ready.recv_timeout(PATIENCE).unwrap();
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", listening.grpc)).unwrap();
        let channel = endpoint.connect().await.unwrap();
        Self { listening, service, channel, stop, thread, registry, folder }
    }

    fn identification(&self) -> IdentificationClient<Channel> {
        IdentificationClient::new(self.channel.clone())
    }

    fn enrollment(&self) -> EnrollmentClient<Channel> {
        EnrollmentClient::new(self.channel.clone())
    }

    fn administration(&self) -> AdministrationClient<Channel> {
        AdministrationClient::new(self.channel.clone())
    }

    fn health(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel.clone())
    }

    async fn is_healthy(&self) {
        let mut health = self.health();
        let answer = tokio::time::timeout(Duration::from_secs(8), health.check(HealthCheckRequest::default()));
        let answer = answer.await.expect("health is answered at once").unwrap();
        assert_eq!(answer.get_ref().status(), ServingStatus::Serving);
    }

    /// Code of the answer to `GET /readyz`.
    fn readyz(&self) -> String {
        let mut stream = std::net::TcpStream::connect(self.listening.metrics.unwrap()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().to_owned()
    }

    /// How the server ends, once nobody holds a connection to it.
    async fn ended(self) -> Result<(), ServerError> {
        let Self { thread, channel, service, registry, .. } = self;
        drop((channel, service, registry));
        tokio::task::spawn_blocking(move || thread.join().expect("the server returns")).await.unwrap()
    }
}

fn samples(person: u32) -> Vec<proto::PalmSample> {
    samples_of(DIM, person)
}

fn samples_of(dim: usize, person: u32) -> Vec<proto::PalmSample> {
    let mut values = vec![0.0; dim];
    SyntheticGallery::new(3, dim).row(person, &mut values);
    let content = Some(proto::palm_sample::Content::Embedding(proto::Embedding { values }));
    vec![proto::PalmSample { hand: proto::Hand::Left.into(), content }]
}

fn enroll(person: u32) -> proto::EnrollRequest {
    proto::EnrollRequest {
        request_id: format!("enrol-{person}"),
        subject_id: format!("person-{person}"),
        samples: samples(person),
    }
}

fn identify(person: u32) -> proto::IdentifyRequest {
    proto::IdentifyRequest {
        request_id: "identify".into(),
        venue_id: "gate-1".into(),
        purpose: proto::Purpose::Entry.into(),
        probes: samples(person),
        max_candidates: 1,
        ..Default::default()
    }
}

fn verify(person: u32) -> proto::VerifyRequest {
    proto::VerifyRequest {
        request_id: "verify".into(),
        venue_id: "gate-1".into(),
        purpose: proto::Purpose::Entry.into(),
        subject_id: format!("person-{person}"),
        probes: samples(person),
    }
}

/// `provoke` makes the thread panic; then health and readiness change while calls may still be open, and
/// the server ends with an error that names the thread.
async fn is_seen_and_ends_the_server(thread: &'static str, engines: Engines, provoke: impl AsyncFnOnce(&Running)) {
    let server = Running::start(engines).await;
    server.enrollment().enroll(enroll(1)).await.unwrap();
    assert_eq!(server.readyz(), "200");
    let mut health = server.health().watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(health.message().await.unwrap().unwrap().status(), ServingStatus::Serving);

    provoke(&server).await;

    let turned = tokio::time::timeout(PATIENCE, health.message()).await.expect("health turns by itself");
    assert_eq!(turned.unwrap().unwrap().status(), ServingStatus::NotServing, "{thread}");
    assert_eq!(server.readyz(), "503", "{thread}");
    drop(health);
    let ended = tokio::time::timeout(PATIENCE, server.ended()).await.expect("the server ends by itself");
    let Err(ServerError::Died(died)) = ended else { panic!("{thread}: {ended:?}") };
    assert_eq!(died.thread, thread);
}

#[tokio::test]
async fn a_panic_of_the_search_thread_ends_the_server() {
    let engine = rigged();
    is_seen_and_ends_the_server("search", (Arc::clone(&engine) as _, None), async |server: &Running| {
        engine.set(FIND_PANICS);
        let refused = server.identification().identify(identify(1)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable);
    })
    .await;
}

#[tokio::test]
async fn a_panic_of_the_writer_thread_ends_the_server() {
    let engine = rigged();
    is_seen_and_ends_the_server("writer", (Arc::clone(&engine) as _, None), async |server: &Running| {
        engine.set(FOLLOW_PANICS);
        let refused = server.enrollment().enroll(enroll(2)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable);
    })
    .await;
}

#[tokio::test]
async fn a_panic_of_the_recovery_thread_ends_the_server() {
    let engine = rigged();
    let both = Arc::new(Failover::new(Arc::clone(&engine) as _, Arc::new(CpuEngine::new(1).unwrap())));
    let engines: Engines = (Arc::clone(&both) as _, Some(both));
    is_seen_and_ends_the_server("engine-recovery", engines, async |server: &Running| {
        engine.set(FIND_FAILS | FOLLOW_PANICS);
        let answer = server.identification().identify(identify(1)).await.unwrap();
        assert_eq!(answer.get_ref().candidates[0].subject_id, "person-1", "the standby answers");
    })
    .await;
}

#[tokio::test]
async fn while_every_computing_thread_is_busy_work_waits_and_other_calls_are_answered() {
    let server = Running::start((rigged() as _, None)).await;
    server.enrollment().enroll(enroll(1)).await.unwrap();
    let busy = server.service.compute().take_all().await;
    let (mut identification, mut enrollment) = (server.identification(), server.enrollment());
    let search = tokio::spawn(async move { identification.identify(identify(1)).await });
    let mut identification = server.identification();
    let verification = tokio::spawn(async move { identification.verify(verify(1)).await });
    let enrolment = tokio::spawn(async move { enrollment.enroll(enroll(2)).await });
    for _ in 0..20 {
        server.is_healthy().await;
        server.administration().get_status(proto::GetStatusRequest {}).await.unwrap();
        server.enrollment().get_subject(proto::GetSubjectRequest { subject_id: "person-1".into() }).await.unwrap();
    }
    assert!(!search.is_finished() && !verification.is_finished() && !enrolment.is_finished());
    drop(busy);
    assert_eq!(search.await.unwrap().unwrap().get_ref().candidates[0].subject_id, "person-1");
    assert!(verification.await.unwrap().unwrap().get_ref().score > 0.99);
    assert_eq!(enrolment.await.unwrap().unwrap().get_ref().lsn, 2);
    server.stop.drain.cancel();
    server.ended().await.unwrap();
}

#[tokio::test]
async fn while_the_gallery_makes_verifications_wait_other_calls_are_answered() {
    let server = Running::start((rigged() as _, None)).await;
    for person in 1..=2 {
        server.enrollment().enroll(enroll(person)).await.unwrap();
    }
    // An erasure waits for this snapshot, and everybody who needs the gallery waits for the erasure.
    let gallery = &server.service.core().unwrap().gallery;
    let held = gallery.snapshot().unwrap();
    let mut enrollment = server.enrollment();
    let forget = proto::ForgetRequest { request_id: "forget".into(), subject_id: "person-2".into() };
    let deletion = tokio::spawn(async move { enrollment.forget(forget).await });
    while gallery.lsn() < thenar_index::Lsn(3) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (mut verifications, mut pages) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let (mut identification, mut administration) = (server.identification(), server.administration());
        verifications.push(tokio::spawn(async move { identification.verify(verify(1)).await }));
        pages.push(tokio::spawn(async move { administration.get_status(proto::GetStatusRequest {}).await }));
        server.is_healthy().await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(held);
    assert_eq!(deletion.await.unwrap().unwrap().get_ref().templates_erased, 1);
    for (verification, page) in verifications.into_iter().zip(pages) {
        assert!(verification.await.unwrap().unwrap().get_ref().score > 0.99);
        assert_eq!(page.await.unwrap().unwrap().get_ref().templates, 1);
    }
    server.stop.drain.cancel();
    server.ended().await.unwrap();
}

/// A copy of what kill -9 would leave of a running server.
fn left_by_kill_9(server: &Running) -> tempfile::TempDir {
    let left = tempfile::tempdir().unwrap();
    for folder in ["", "data", "data/index"] {
        std::fs::create_dir_all(left.path().join(folder)).unwrap();
        for entry in std::fs::read_dir(server.folder.path().join(folder)).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_file() {
                std::fs::copy(entry.path(), left.path().join(folder).join(entry.file_name())).unwrap();
            }
        }
    }
    left
}

#[tokio::test]
async fn a_change_whose_sync_failed_is_told_as_in_doubt_and_done_once_when_repeated() {
    let server = Running::start((rigged() as _, None)).await;
    // The second answer comes after the upkeep behind the first, which commits too and would be the one to
    // meet the failing sync.
    for _ in 0..2 {
        server.enrollment().enroll(enroll(1)).await.unwrap();
    }
    let mut health = server.health().watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(health.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    assert_eq!(server.readyz(), "200");

    server.registry.fail_syncs();
    let doubt = server.enrollment().enroll(enroll(2)).await.unwrap_err();
    assert_eq!(doubt.code(), tonic::Code::Unavailable, "a code that clients repeat a request after: {doubt:?}");
    for words in ["in doubt", "repeat", "same request_id"] {
        assert!(doubt.message().contains(words), "{doubt:?}");
    }
    assert!(!doubt.message().contains("nothing was changed"), "{doubt:?}");
    // A caller that repeats it before a restart is not told that nothing was changed either.
    let refused = server.enrollment().enroll(enroll(2)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused:?}");
    assert!(refused.message().contains("same request_id"), "{refused:?}");
    assert!(!refused.message().contains("nothing was changed"), "{refused:?}");
    let turned = tokio::time::timeout(PATIENCE, health.message()).await.expect("health turns by itself");
    assert_eq!(turned.unwrap().unwrap().status(), ServingStatus::NotServing);
    assert_eq!(server.readyz(), "503");
    // Searches go on over what was in force.
    let answer = server.identification().identify(identify(1)).await.unwrap();
    assert_eq!(answer.get_ref().candidates[0].subject_id, "person-1");

    let again = Running::start_in(left_by_kill_9(&server), (rigged() as _, None), Some(DIM)).await;
    assert_eq!(again.readyz(), "200");
    let answer = again.identification().identify(identify(2)).await.unwrap();
    assert_eq!(answer.get_ref().candidates[0].subject_id, "person-2", "it was there after all");
    assert_eq!(again.enrollment().enroll(enroll(2)).await.unwrap().get_ref().lsn, 2);
    let status = again.administration().get_status(proto::GetStatusRequest {}).await.unwrap();
    assert_eq!((status.get_ref().subjects, status.get_ref().registry_lsn), (2, 2), "done once");
    drop(health);
    for server in [server, again] {
        server.stop.drain.cancel();
        server.ended().await.unwrap();
    }
}

#[tokio::test]
async fn without_a_configured_dimension_the_first_good_enrolment_decides() {
    let server = Running::start_with((rigged() as _, None), None).await;
    let mut administration = server.administration();
    let mut status = async || administration.get_status(proto::GetStatusRequest {}).await.unwrap().into_inner();
    let page = status().await;
    assert_eq!((page.dim, page.templates, page.engine.unwrap().kind.as_str()), (0, 0, "cpu"));
    assert_eq!(server.readyz(), "200");

    // Nobody is enrolled: nobody is found, and invalid requests are refused as usual.
    let nobody = server.identification().identify(identify(1)).await.unwrap().into_inner();
    assert_eq!((nobody.decision(), nobody.gallery_size), (proto::Decision::NoMatch, 0));
    assert_eq!(nobody.certificate.unwrap().miss_probability, 1e-12);
    let odd = proto::IdentifyRequest { probes: samples_of(33, 1), ..identify(1) };
    assert_eq!(server.identification().identify(odd).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    let none = proto::IdentifyRequest { probes: Vec::new(), ..identify(1) };
    assert_eq!(server.identification().identify(none).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    assert_eq!(server.identification().verify(verify(1)).await.unwrap_err().code(), tonic::Code::NotFound);
    let forget = proto::ForgetRequest { request_id: "forget".into(), subject_id: "person-1".into() };
    assert_eq!(server.enrollment().forget(forget).await.unwrap_err().code(), tonic::Code::NotFound);
    let mut zero = enroll(1);
    zero.samples = vec![proto::PalmSample {
        hand: proto::Hand::Left.into(),
        content: Some(proto::palm_sample::Content::Embedding(proto::Embedding { values: vec![0.0; 128] })),
    }];
    for bad in [zero.clone(), proto::EnrollRequest { samples: samples_of(33, 1), ..enroll(1) }] {
        assert_eq!(server.enrollment().enroll(bad).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    }
    assert_eq!(status().await.dim, 0, "what is refused decides nothing");

    // Many first enrolments at once, of two dimensions: one is accepted, and the other is told why not.
    let narrow = (1..=4).map(|person| (64, proto::EnrollRequest { samples: samples_of(64, person), ..enroll(person) }));
    let wide = (5..=8).map(|person| (96, proto::EnrollRequest { samples: samples_of(96, person), ..enroll(person) }));
    let calls: Vec<_> = narrow
        .chain(wide)
        .map(|(dim, request)| {
            let mut enrollment = server.enrollment();
            tokio::spawn(async move { (dim, enrollment.enroll(request).await) })
        })
        .collect();
    let mut ended = Vec::new();
    for call in calls {
        ended.push(call.await.unwrap());
    }
    let decided = status().await.dim;
    for (dim, end) in ended {
        match end {
            Ok(_) => assert_eq!(dim, decided),
            Err(status) => {
                assert_ne!(dim, decided);
                assert_eq!(status.code(), tonic::Code::InvalidArgument);
                assert!(status.message().contains(&format!("{decided} dimensions")), "{status}");
            }
        }
    }
    assert_eq!(status().await.templates, 4);
    server.stop.drain.cancel();
    server.ended().await.unwrap();
}
