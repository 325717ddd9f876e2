//! A small server for tests of the client: it keeps subjects in memory, scans them one by one,
//! and fails on request. Speaks the protocol through the generated traits and shares no code
//! with the real server.

mod services;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::args::ServerArgs;
use super::client::{ENROLLMENT_BYTES_MAX, Server};
use crate::api::proto::administration_server::AdministrationServer;
use crate::api::proto::enrollment_server::EnrollmentServer;
use crate::api::proto::identification_server::IdentificationServer;
use crate::api::proto::*;

/// The decision's threshold of every purpose.
const THRESHOLD: f64 = 0.5;
/// Scores this close to the first make a decision inconclusive.
const MARGIN: f64 = 0.02;

/// Templates with the codes of their hands.
type Templates = Vec<(Vec<f32>, i32)>;

/// What the server has, and what it is asked to do wrong.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) dim: usize,
    pub(crate) subjects: BTreeMap<String, Templates>,
    pub(crate) requests: HashMap<String, EnrollRequest>,
    /// Items of every bulk message, in order of arrival.
    pub(crate) messages: Vec<usize>,
    /// Bulk streams that were opened.
    pub(crate) streams: usize,
    /// The stream breaks after this many more messages: those are enrolled and not acknowledged.
    pub(crate) break_after: Option<usize>,
    /// How often `break_after` is set again after it broke.
    pub(crate) breaks_left: usize,
    /// Every bulk stream is refused with this code.
    pub(crate) refuse_bulk: Option<Code>,
    /// Cancels the token when this many messages have been acknowledged.
    pub(crate) cancel_after: Option<(usize, CancellationToken)>,
    /// Sends one progress for two messages, and two answers at a time, the later one first.
    pub(crate) coalesce: bool,
    /// Searches that are refused first, with this code.
    pub(crate) refuse_searches: (usize, Option<Code>),
    /// Searches answer as if nobody had been forgotten.
    pub(crate) keep_ghosts: bool,
    forgotten: BTreeMap<String, Templates>,
    searches: u64,
}

/// A running mock server. Stops when dropped.
#[derive(Debug)]
pub(crate) struct MockServer {
    pub(crate) address: SocketAddr,
    pub(crate) shared: Arc<Mutex<State>>,
    stop: CancellationToken,
}

impl Drop for MockServer {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl MockServer {
    /// Starts one on a free port.
    pub(crate) async fn start(dim: usize) -> Self {
        let state = Arc::new(Mutex::new(State { dim, ..State::default() }));
        Self::start_with(state, "127.0.0.1:0".parse().unwrap()).await
    }

    /// Starts one with the state of another one, at an address.
    pub(crate) async fn start_with(shared: Arc<Mutex<State>>, address: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let services = services::Services(shared.clone());
        let serve = tonic::transport::Server::builder()
            .add_service(IdentificationServer::new(services.clone()))
            .add_service(EnrollmentServer::new(services.clone()).max_decoding_message_size(ENROLLMENT_BYTES_MAX))
            .add_service(AdministrationServer::new(services))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.clone().cancelled_owned());
        tokio::spawn(serve);
        Self { address, shared, stop }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }

    /// Arguments that lead to it.
    pub(crate) fn args(&self) -> ServerArgs {
        ServerArgs::plain(&format!("http://{}", self.address))
    }

    /// It, as clients know it.
    pub(crate) fn server(&self) -> Server {
        Server::new(&self.args()).unwrap()
    }
}

fn values(sample: &PalmSample) -> &[f32] {
    match &sample.content {
        Some(palm_sample::Content::Embedding(embedding)) => &embedding.values,
        _ => &[],
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The mean, over the probes that can be compared, of the best score with a template; and its hand.
fn score(probes: &[PalmSample], templates: &Templates) -> Option<(f64, i32)> {
    let best_of = |probe: &PalmSample| {
        let comparable = templates.iter().filter(|(_, hand)| *hand == probe.hand || *hand == 0 || probe.hand == 0);
        let scores = comparable.map(|(template, hand)| (cosine(values(probe), template), *hand));
        scores.max_by(|a, b| a.0.total_cmp(&b.0))
    };
    let bests: Vec<(f64, i32)> = probes.iter().filter_map(best_of).collect();
    let (_, hand) = bests.last()?;
    Some((bests.iter().map(|(score, _)| score).sum::<f64>() / bests.len() as f64, *hand))
}

impl State {
    /// Enrols; false if the same request has done so before.
    fn enroll(&mut self, request: &EnrollRequest) -> Result<bool, Status> {
        if let Some(before) = self.requests.get(&request.request_id) {
            return if before == request { Ok(false) } else { Err(Status::failed_precondition("request_id is used")) };
        }
        if self.subjects.contains_key(&request.subject_id) {
            return Err(Status::already_exists("subject_id is taken"));
        }
        if request.samples.iter().any(|sample| values(sample).len() != self.dim) {
            return Err(Status::invalid_argument("samples: wrong number of values"));
        }
        self.requests.insert(request.request_id.clone(), request.clone());
        self.put(request);
        Ok(true)
    }

    /// Adds somebody unchecked.
    pub(crate) fn put(&mut self, request: &EnrollRequest) {
        let templates = request.samples.iter().map(|sample| (values(sample).to_vec(), sample.hand)).collect();
        self.subjects.insert(request.subject_id.clone(), templates);
    }

    fn identify(&mut self, request: &IdentifyRequest) -> Result<IdentifyResponse, Status> {
        if self.refuse_searches.0 > 0 {
            self.refuse_searches.0 -= 1;
            return Err(Status::new(self.refuse_searches.1.unwrap_or(Code::ResourceExhausted), "the queue is full"));
        }
        if request.purpose == Purpose::Unspecified as i32 || request.max_candidates == 0 {
            return Err(Status::invalid_argument("purpose and max_candidates are needed"));
        }
        if request.probes.iter().any(|probe| values(probe).len() != self.dim) {
            return Err(Status::invalid_argument("probes: wrong number of values"));
        }
        self.searches += 1;
        let ghosts = self.keep_ghosts.then_some(&self.forgotten).into_iter().flatten();
        let is_allowed = |subject: &String| request.only.as_ref().is_none_or(|only| only.subject_ids.contains(subject));
        let mut scored: Vec<(f64, i32, &String)> = (self.subjects.iter().chain(ghosts))
            .filter(|(subject, _)| is_allowed(subject))
            .filter_map(|(subject, templates)| {
                score(&request.probes, templates).map(|(score, hand)| (score, hand, subject))
            })
            .collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0));
        let threshold = request.threshold.unwrap_or(THRESHOLD).max(THRESHOLD);
        let decision = match scored.as_slice() {
            [best, second, ..] if best.0 >= threshold && best.0 - second.0 < MARGIN => Decision::Inconclusive,
            [best, ..] if best.0 >= threshold => Decision::Match,
            _ => Decision::NoMatch,
        };
        let listed = scored.iter().filter(|(score, ..)| *score >= request.threshold.unwrap_or(THRESHOLD));
        let candidate = |(rank, (score, hand, subject)): (u32, &(f64, i32, &String))| Candidate {
            rank,
            subject_id: (*subject).clone(),
            score: *score,
            hand: *hand,
            ..Candidate::default()
        };
        let candidates = (1..).zip(listed.take(request.max_candidates as usize)).map(candidate);
        Ok(IdentifyResponse {
            request_id: request.request_id.clone(),
            search_id: format!("search-{}", self.searches),
            decision: decision.into(),
            candidates: candidates.collect(),
            threshold,
            gallery_size: self.templates(),
            certificate: Some(Certificate { kind: certificate::Kind::Deterministic.into(), miss_probability: 0.0 }),
            timing: None,
        })
    }

    fn forget(&mut self, subject_id: &str) -> Result<ForgetResponse, Status> {
        let templates = self.subjects.remove(subject_id).ok_or_else(|| Status::not_found("no such subject"))?;
        let templates_erased = u32::try_from(templates.len()).unwrap();
        self.forgotten.insert(subject_id.to_owned(), templates);
        Ok(ForgetResponse { subject_id: subject_id.to_owned(), templates_erased, lsn: 2 })
    }

    /// Enrols a bulk message and adds it to `progress`.
    fn bulk_enroll(&mut self, message: &BulkEnrollRequest, progress: &mut BulkEnrollProgress) {
        self.messages.push(message.items.len());
        progress.errors.clear();
        for item in &message.items {
            let enrollment = item.enrollment.as_ref().unwrap();
            progress.received += 1;
            match self.enroll(enrollment) {
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
    }

    /// Whether a bulk stream breaks after the message that has just been enrolled.
    fn breaks(&mut self) -> bool {
        let breaks = self.break_after == Some(0);
        if breaks {
            self.break_after = (self.breaks_left > 0).then_some(0);
            self.breaks_left = self.breaks_left.saturating_sub(1);
        } else {
            self.break_after = self.break_after.map(|left| left - 1);
            if let Some((left, token)) = &mut self.cancel_after {
                *left = left.saturating_sub(1);
                (*left == 0).then(|| token.cancel());
            }
        }
        breaks
    }

    fn templates(&self) -> u64 {
        self.subjects.values().map(|templates| templates.len() as u64).sum()
    }

    fn status(&self) -> crate::api::proto::Status {
        crate::api::proto::Status {
            version: "0.0.0-mock".to_owned(),
            dim: u32::try_from(self.dim).unwrap(),
            templates: self.templates(),
            subjects: self.subjects.len() as u64,
            tombstones: self.forgotten.len() as u64,
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
            searches: self.searches,
            policies: vec![PolicyStatus { purpose: "payment".to_owned(), threshold: THRESHOLD, margin: MARGIN }],
            opened_in: Some(prost_types::Duration { seconds: 1, nanos: 250_000_000 }),
        }
    }
}
