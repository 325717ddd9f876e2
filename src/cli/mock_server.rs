//! A small server for tests of the client: it keeps subjects in memory, scans them one by one,
//! and fails on request. Speaks the protocol through the generated traits and shares no code
//! with the real server.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};

use super::connect::{ENROLLMENT_BYTES_MAX, ServerArgs};
use crate::api::proto::administration_server::{Administration, AdministrationServer};
use crate::api::proto::enrollment_server::{Enrollment, EnrollmentServer};
use crate::api::proto::identification_server::{Identification, IdentificationServer};
use crate::api::proto::*;

/// The decision's threshold of every purpose.
pub(crate) const THRESHOLD: f64 = 0.5;
/// Scores this close to the first make a decision inconclusive.
const MARGIN: f64 = 0.02;

/// What the fake server has and what it is asked to do wrong.
#[derive(Debug, Default)]
pub(crate) struct Held {
    pub(crate) dim: usize,
    pub(crate) subjects: BTreeMap<String, Vec<(Vec<f32>, i32)>>,
    pub(crate) requests: HashMap<String, EnrollRequest>,
    /// Items of every bulk message, in order of arrival.
    pub(crate) messages: Vec<usize>,
    /// Bulk streams that were opened.
    pub(crate) streams: usize,
    /// The stream breaks after this many more messages: they are taken in, not acknowledged.
    pub(crate) break_after: Option<usize>,
    /// How often `break_after` is set again after it broke.
    pub(crate) breaks_left: usize,
    /// Every bulk stream is refused with this code.
    pub(crate) refuse_bulk: Option<Code>,
    /// Ends this when so many messages have been acknowledged.
    pub(crate) cancel_after: Option<(usize, CancellationToken)>,
    /// One progress for two messages.
    pub(crate) coalesce: bool,
    /// Searches that are refused first, with this code and pause.
    pub(crate) refuse_searches: (usize, Option<Code>),
    /// Searches answer as if nobody had been forgotten.
    pub(crate) keep_ghosts: bool,
    pub(crate) ghosts: BTreeMap<String, Vec<(Vec<f32>, i32)>>,
    pub(crate) forgotten: HashSet<String>,
    pub(crate) searches: u64,
}

/// A running fake server.
#[derive(Debug)]
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    pub(crate) held: Arc<Mutex<Held>>,
    stop: CancellationToken,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Fake {
    /// Starts one on a free port.
    pub(crate) async fn start(dim: usize) -> Self {
        let held = Arc::new(Mutex::new(Held { dim, ..Held::default() }));
        Self::start_with(held, "127.0.0.1:0".parse().unwrap()).await
    }

    /// Starts one with what another one had, at an address.
    pub(crate) async fn start_with(held: Arc<Mutex<Held>>, address: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let service = Service(held.clone());
        let serve = tonic::transport::Server::builder()
            .add_service(IdentificationServer::new(service.clone()))
            .add_service(EnrollmentServer::new(service.clone()).max_decoding_message_size(ENROLLMENT_BYTES_MAX))
            .add_service(AdministrationServer::new(service))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.clone().cancelled_owned());
        tokio::spawn(serve);
        Self { address, held, stop }
    }

    /// Arguments that lead to it.
    pub(crate) fn args(&self) -> ServerArgs {
        ServerArgs::plain(&format!("http://{}", self.address))
    }
}

#[derive(Debug, Clone)]
struct Service(Arc<Mutex<Held>>);

fn values(sample: &PalmSample) -> Option<&[f32]> {
    match &sample.content {
        Some(palm_sample::Content::Embedding(embedding)) => Some(&embedding.values),
        _ => None,
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

impl Held {
    fn enroll(&mut self, request: &EnrollRequest) -> Result<bool, Status> {
        if let Some(before) = self.requests.get(&request.request_id) {
            return if before == request { Ok(false) } else { Err(Status::failed_precondition("request_id is used")) };
        }
        if self.subjects.contains_key(&request.subject_id) {
            return Err(Status::already_exists("subject_id is taken"));
        }
        let mut templates = Vec::new();
        for sample in &request.samples {
            match values(sample) {
                Some(values) if values.len() == self.dim => templates.push((values.to_vec(), sample.hand)),
                _ => return Err(Status::invalid_argument("samples: wrong number of values")),
            }
        }
        self.requests.insert(request.request_id.clone(), request.clone());
        self.subjects.insert(request.subject_id.clone(), templates);
        Ok(true)
    }

    fn identify(&mut self, request: &IdentifyRequest) -> Result<IdentifyResponse, Status> {
        if self.refuse_searches.0 > 0 {
            self.refuse_searches.0 -= 1;
            return Err(Status::new(self.refuse_searches.1.unwrap_or(Code::ResourceExhausted), "the queue is full"));
        }
        if request.purpose == Purpose::Unspecified as i32 || request.max_candidates == 0 {
            return Err(Status::invalid_argument("purpose and max_candidates are needed"));
        }
        self.searches += 1;
        let mut scored: Vec<(f64, &String, i32)> = Vec::new();
        let ghosts = self.keep_ghosts.then_some(&self.ghosts).into_iter().flatten();
        let may_be_found =
            |subject: &String| request.only.as_ref().is_none_or(|only| only.subject_ids.contains(subject));
        for (subject, templates) in self.subjects.iter().chain(ghosts).filter(|(subject, _)| may_be_found(subject)) {
            let (mut sum, mut compared, mut best_hand) = (0.0, 0, 0);
            for probe in &request.probes {
                let Some(probe_values) = values(probe).filter(|values| values.len() == self.dim) else {
                    return Err(Status::invalid_argument("probes: wrong number of values"));
                };
                let best = templates
                    .iter()
                    .filter(|(_, hand)| *hand == probe.hand || *hand == 0 || probe.hand == 0)
                    .map(|(template, hand)| (cosine(probe_values, template), *hand))
                    .max_by(|a, b| a.0.total_cmp(&b.0));
                if let Some((score, hand)) = best {
                    sum += score;
                    compared += 1;
                    best_hand = hand;
                }
            }
            if compared > 0 {
                scored.push((sum / f64::from(compared), subject, best_hand));
            }
        }
        scored.sort_by(|a, b| b.0.total_cmp(&a.0));
        let threshold = request.threshold.unwrap_or(THRESHOLD).max(THRESHOLD);
        let reached = |at: usize| scored.get(at).is_some_and(|(score, ..)| *score >= threshold);
        let close = scored.len() > 1 && scored[0].0 - scored[1].0 < MARGIN;
        let decision = match (reached(0), close) {
            (false, _) => Decision::NoMatch,
            (true, true) => Decision::Inconclusive,
            (true, false) => Decision::Match,
        };
        let listed = request.threshold.unwrap_or(THRESHOLD);
        let candidates = scored
            .iter()
            .filter(|(score, ..)| *score >= listed)
            .take(request.max_candidates as usize)
            .enumerate()
            .map(|(at, (score, subject, hand))| Candidate {
                rank: u32::try_from(at).unwrap() + 1,
                subject_id: (*subject).clone(),
                score: *score,
                hand: *hand,
                template_id: at as u64,
                probes_compared: 1,
            })
            .collect();
        Ok(IdentifyResponse {
            request_id: request.request_id.clone(),
            search_id: format!("search-{}", self.searches),
            decision: decision.into(),
            candidates,
            threshold,
            gallery_size: self.templates(),
            certificate: Some(Certificate { kind: certificate::Kind::Deterministic.into(), miss_probability: 0.0 }),
            timing: Some(Timing::default()),
        })
    }

    fn templates(&self) -> u64 {
        self.subjects.values().map(|templates| templates.len() as u64).sum()
    }
}

#[tonic::async_trait]
impl Enrollment for Service {
    async fn enroll(&self, request: Request<EnrollRequest>) -> Result<Response<EnrollResponse>, Status> {
        let request = request.into_inner();
        self.0.lock().enroll(&request)?;
        let subject = Subject { subject_id: request.subject_id, templates: vec![], enrolled_at: None };
        Ok(Response::new(EnrollResponse { subject: Some(subject), lsn: 1 }))
    }

    type BulkEnrollStream = ReceiverStream<Result<BulkEnrollProgress, Status>>;

    async fn bulk_enroll(
        &self,
        request: Request<Streaming<BulkEnrollRequest>>,
    ) -> Result<Response<Self::BulkEnrollStream>, Status> {
        {
            let mut held = self.0.lock();
            held.streams += 1;
            if let Some(code) = held.refuse_bulk {
                return Err(Status::new(code, "refused"));
            }
        }
        let held = self.0.clone();
        let mut messages = request.into_inner();
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            let mut progress = BulkEnrollProgress::default();
            let mut held_back = false;
            while let Some(Ok(message)) = messages.next().await {
                let send = {
                    let mut held = held.lock();
                    held.messages.push(message.items.len());
                    progress.errors.clear();
                    for item in &message.items {
                        let enrollment = item.enrollment.as_ref().unwrap();
                        progress.received += 1;
                        match held.enroll(enrollment) {
                            Ok(true) => {
                                progress.enrolled += 1;
                                progress.templates += enrollment.samples.len() as u64;
                            }
                            Ok(false) => progress.unchanged += 1,
                            Err(status) => {
                                progress.rejected += 1;
                                progress.errors.push(BulkEnrollError {
                                    sequence: item.sequence,
                                    subject_id: enrollment.subject_id.clone(),
                                    code: status.code().into(),
                                    message: status.message().to_owned(),
                                });
                            }
                        }
                    }
                    if let Some(left) = held.break_after {
                        if left == 0 {
                            held.break_after = (held.breaks_left > 0).then_some(0);
                            held.breaks_left = held.breaks_left.saturating_sub(1);
                            return;
                        }
                        held.break_after = Some(left - 1);
                    }
                    if let Some((left, token)) = &mut held.cancel_after {
                        *left = left.saturating_sub(1);
                        if *left == 0 {
                            token.cancel();
                        }
                    }
                    held_back = held.coalesce && !held_back;
                    !held_back
                };
                if send && sender.send(Ok(progress.clone())).await.is_err() {
                    return;
                }
            }
            if held_back {
                let _ = sender.send(Ok(progress)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn get_subject(&self, _: Request<GetSubjectRequest>) -> Result<Response<Subject>, Status> {
        Err(Status::unimplemented("no client command asks this"))
    }

    async fn update_subject(&self, _: Request<UpdateSubjectRequest>) -> Result<Response<Subject>, Status> {
        Err(Status::unimplemented("no client command asks this"))
    }

    async fn forget(&self, request: Request<ForgetRequest>) -> Result<Response<ForgetResponse>, Status> {
        let ForgetRequest { subject_id, .. } = request.into_inner();
        let mut held = self.0.lock();
        let Some(templates) = held.subjects.remove(&subject_id) else {
            return Err(Status::not_found("no such subject"));
        };
        let templates_erased = u32::try_from(templates.len()).unwrap();
        held.forgotten.insert(subject_id.clone());
        held.ghosts.insert(subject_id.clone(), templates);
        Ok(Response::new(ForgetResponse { subject_id, templates_erased, lsn: 2 }))
    }
}

#[tonic::async_trait]
impl Identification for Service {
    async fn identify(&self, request: Request<IdentifyRequest>) -> Result<Response<IdentifyResponse>, Status> {
        self.0.lock().identify(request.get_ref()).map(Response::new)
    }

    type IdentifyStreamStream = ReceiverStream<Result<IdentifyStreamResponse, Status>>;

    async fn identify_stream(
        &self,
        request: Request<Streaming<IdentifyRequest>>,
    ) -> Result<Response<Self::IdentifyStreamStream>, Status> {
        let held = self.0.clone();
        let mut requests = request.into_inner();
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            // Answers leave in pairs, the later one first: the protocol allows another order.
            let mut kept: Option<IdentifyStreamResponse> = None;
            loop {
                let next = tokio::time::timeout(Duration::from_millis(20), requests.next()).await;
                let answer = match next {
                    Ok(Some(Ok(request))) => {
                        let outcome = match held.lock().identify(&request) {
                            Ok(response) => identify_stream_response::Outcome::Response(response),
                            Err(status) => identify_stream_response::Outcome::Error(StreamError {
                                code: status.code().into(),
                                message: status.message().to_owned(),
                                retry_after: Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 }),
                            }),
                        };
                        Some(IdentifyStreamResponse { request_id: request.request_id, outcome: Some(outcome) })
                    }
                    Ok(_) => {
                        if let Some(answer) = kept.take() {
                            let _ = sender.send(Ok(answer)).await;
                        }
                        return;
                    }
                    Err(_) => None,
                };
                let both = match (answer, kept.take()) {
                    (Some(answer), None) if held.lock().coalesce => {
                        kept = Some(answer);
                        continue;
                    }
                    both => both,
                };
                for answer in [both.0, both.1].into_iter().flatten() {
                    if sender.send(Ok(answer)).await.is_err() {
                        return;
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn verify(&self, _: Request<VerifyRequest>) -> Result<Response<VerifyResponse>, Status> {
        Err(Status::unimplemented("no client command asks this"))
    }
}

#[tonic::async_trait]
impl Administration for Service {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<crate::api::proto::Status>, Status> {
        let held = self.0.lock();
        Ok(Response::new(crate::api::proto::Status {
            version: "0.0.0-fake".to_owned(),
            dim: u32::try_from(held.dim).unwrap(),
            templates: held.templates(),
            subjects: held.subjects.len() as u64,
            tombstones: held.forgotten.len() as u64,
            engine: Some(EngineStatus {
                kind: "cpu".to_owned(),
                adapter: "one by one".to_owned(),
                threads: 1,
                preferred: true,
            }),
            memory: Some(MemoryStatus { mapped_bytes: 3 << 20, ..MemoryStatus::default() }),
            registry_lsn: 12,
            gallery_lsn: 10,
            uptime: Some(prost_types::Duration { seconds: 93_784, nanos: 0 }),
            searches: held.searches,
            policies: vec![PolicyStatus { purpose: "payment".to_owned(), threshold: THRESHOLD, margin: MARGIN }],
            opened_in: Some(prost_types::Duration { seconds: 1, nanos: 250_000_000 }),
        }))
    }
}
