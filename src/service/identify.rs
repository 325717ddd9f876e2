//! Identification (who is this?) and verification (is this that person?).

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use roaring::RoaringBitmap;
use thenar_index::TemplateId;

use super::{Busy, Core, Service, ServiceError};
use crate::model::{
    self, CANDIDATES_MAX, Embedding, Hand, Invalid, PROBES_MAX, Purpose, RequestId, SubjectFilter, SubjectId, VenueId,
};
use crate::policy::{self, Decision};
use crate::search::batch::{BatchError, Class};
use crate::search::{Certificate, NO_FLOOR, Probe, Search, SearchError, rank};
use crate::telemetry::{self, Refusal, StageTimes};

/// A floor at or above this rules out nearly every row of a usual gallery, where the standard deviation of
/// non-mated scores is below a tenth.
const SELECTIVE_FLOOR: f64 = 0.4;

/// One capture, as an embedding from a client.
pub struct Sample {
    /// The hand it shows.
    pub hand: Hand,
    /// As sent, not yet normalised. Shape: `[dim]`; any other is refused.
    pub values: Vec<f32>,
}

/// A request to identify somebody.
pub struct Identify {
    /// Echoed.
    pub request_id: RequestId,
    /// Where.
    pub venue: VenueId,
    /// What for.
    pub purpose: Purpose,
    /// 1 to `PROBES_MAX` captures of one person.
    pub samples: Vec<Sample>,
    /// 1 to `CANDIDATES_MAX`.
    pub max_candidates: u32,
    /// Candidates below this are not listed; the decision is never laxer than the policy.
    pub threshold: Option<f64>,
    /// The weakest certificate that is acceptable; `None`: the server's.
    pub certificate: Option<Certificate>,
    /// The only subjects that may be found; `None`: everybody.
    pub only: Option<SubjectFilter>,
    /// When the request arrived.
    pub arrived: Instant,
    /// Nobody waits for the answer after this.
    pub deadline: Option<Instant>,
}

/// A subject whose score is high enough to be listed.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// From 1.
    pub rank: u32,
    /// The client's name.
    pub subject_id: Box<str>,
    /// Fused.
    pub score: f64,
    /// Of the best template.
    pub hand: Hand,
    /// The best template.
    pub template: TemplateId,
    /// Probes that could be compared.
    pub probes_compared: u32,
}

/// The result of an identification.
#[derive(Debug, Clone, PartialEq)]
pub struct Identification {
    /// Of the request.
    pub request_id: RequestId,
    /// Of this search.
    pub search_id: String,
    /// What to do.
    pub decision: Decision,
    /// By rank.
    pub candidates: Vec<Candidate>,
    /// Of the decision.
    pub threshold: f64,
    /// Live templates in the gallery, including those that `only` excludes.
    pub gallery_size: u64,
    /// Why it is exact.
    pub certificate: Certificate,
    /// Where the time went.
    pub times: StageTimes,
}

/// A request to verify that somebody is a certain subject.
pub struct Verify {
    /// Echoed.
    pub request_id: RequestId,
    /// Where.
    pub venue: VenueId,
    /// What for.
    pub purpose: Purpose,
    /// Who they say they are.
    pub subject: SubjectId,
    /// 1 to `PROBES_MAX`.
    pub samples: Vec<Sample>,
}

/// The result of a verification.
#[derive(Debug, Clone, PartialEq)]
pub struct Verification {
    /// `Match` or `NoMatch`.
    pub decision: Decision,
    /// Fused; -1 if no template can be compared with any probe.
    pub score: f64,
    /// Of the decision.
    pub threshold: f64,
}

impl Service {
    /// 1:N.
    ///
    /// # Errors
    /// [`ServiceError`]; each is counted by reason.
    pub async fn identify(self: &Arc<Self>, identify: Identify) -> Result<Identification, ServiceError> {
        let purpose = identify.purpose;
        match self.identify_uncounted(identify).await {
            Ok(identification) => {
                self.searches.fetch_add(1, Ordering::Relaxed);
                telemetry::search_answered(purpose, identification.decision, identification.times);
                Ok(identification)
            }
            Err(error) => {
                telemetry::search_refused(refusal(&error));
                Err(error)
            }
        }
    }

    async fn identify_uncounted(self: &Arc<Self>, identify: Identify) -> Result<Identification, ServiceError> {
        if self.draining().is_cancelled() {
            return Err(ServiceError::Draining);
        }
        self.check_venue(&identify.venue)?;
        if identify.max_candidates == 0 || identify.max_candidates > CANDIDATES_MAX {
            let problem = format!("{} is not from 1 to {CANDIDATES_MAX}", identify.max_candidates);
            return Err(Invalid::new("max_candidates", problem).into());
        }
        let asked = identify.threshold.map(policy::checked_threshold).transpose()?;
        let policy = self.parts.policies.of(identify.purpose).at_least(asked);
        let list_from = match asked {
            // Rounding may take the score of an opposite vector slightly below -1.
            Some(lowest) if lowest <= -1.0 => NO_FLOOR,
            Some(threshold) => threshold,
            None => policy.threshold,
        };
        checked_count(&identify.samples)?;
        let Some(core) = self.core() else { return self.find_nobody(identify, policy, list_from) };
        let needed = policy.lowest_that_matters();
        let floor = list_from.min(needed).max(NO_FLOOR);
        let class = class(identify.purpose, floor, needed);
        // Before any work that takes time.
        let place = core.batcher.admit(class, identify.samples.len(), identify.deadline).map_err(batch_error)?;
        let probes = self.rotated(identify.samples).await?;
        let allowed = match identify.only {
            Some(only) => Some(self.numbers_of(core, only).await?),
            None => None,
        };
        let search = Search {
            probes,
            floor,
            // One more than is shown: the runner-up decides whether the first is alone.
            k: identify.max_candidates as usize + 1,
            certificate: identify.certificate.unwrap_or(self.parts.certificate),
            allowed,
        };
        let answered = core.batcher.search(place, search).await.map_err(batch_error)?;
        let scores: Vec<f64> = answered.answer.found.iter().map(|f| f.score).collect();
        let verdict = policy::decide(policy, list_from, &scores);
        let listed = verdict.listed.min(identify.max_candidates as usize);
        let candidates = answered.answer.found.into_iter().take(listed).zip(1..).map(|(found, rank)| Candidate {
            rank,
            subject_id: found.subject_id,
            score: found.score,
            hand: found.hand,
            template: found.template,
            probes_compared: found.probes_compared,
        });
        Ok(Identification {
            request_id: identify.request_id,
            search_id: self.next_search_id(),
            decision: verdict.decision,
            candidates: candidates.collect(),
            threshold: policy.threshold,
            gallery_size: answered.answer.gallery_size,
            certificate: answered.answer.certificate,
            times: StageTimes {
                queue: answered.queue,
                prefilter: answered.batch.prefilter,
                refine: answered.batch.refine,
                total: identify.arrived.elapsed(),
            },
        })
    }

    /// The answer to a valid search before anybody was enrolled.
    fn find_nobody(
        &self,
        identify: Identify,
        policy: policy::Policy,
        list_from: f64,
    ) -> Result<Identification, ServiceError> {
        for (at, sample) in identify.samples.into_iter().enumerate() {
            let dim = sample.values.len();
            model::checked_dim(dim)
                .and_then(|_| Embedding::new(sample.values, dim))
                .map_err(|e| e.within(&format!("probes[{at}].embedding.values")))?;
        }
        Ok(Identification {
            request_id: identify.request_id,
            search_id: self.next_search_id(),
            decision: policy::decide(policy, list_from, &[]).decision,
            candidates: Vec::new(),
            threshold: policy.threshold,
            gallery_size: 0,
            certificate: identify.certificate.unwrap_or(self.parts.certificate),
            times: StageTimes { total: identify.arrived.elapsed(), ..StageTimes::default() },
        })
    }

    /// 1:1.
    ///
    /// # Errors
    /// [`ServiceError::NoSuchSubject`] if there is no such subject, and as for `identify`.
    pub async fn verify(self: &Arc<Self>, verify: Verify) -> Result<Verification, ServiceError> {
        if self.draining().is_cancelled() {
            return Err(ServiceError::Draining);
        }
        self.check_venue(&verify.venue)?;
        let Some(core) = self.core() else { return Err(ServiceError::NoSuchSubject(verify.subject)) };
        let probes = self.rotated(verify.samples).await?;
        let (gallery, wanted) = (Arc::clone(&core.gallery), verify.subject.clone());
        let compared = self
            .read(move |registry| {
                let Some(subject) = registry.subject(&wanted)? else { return Ok(None) };
                // Waits while rows are erased, or the index is reopened.
                let snapshot = gallery.snapshot();
                let score = snapshot.map(|s| rank::fuse(&s, subject.number, &probes).map_or(-1.0, |found| found.score));
                Ok(Some(score.ok_or(SearchError::IndexLost)))
            })
            .await?;
        let compared = compared.ok_or(ServiceError::NoSuchSubject(verify.subject))?;
        let score = compared.map_err(|e| ServiceError::SearchFailed(Arc::new(e)))?;
        let threshold = self.parts.policies.of(verify.purpose).threshold;
        let decision = if score >= threshold { Decision::Match } else { Decision::NoMatch };
        Ok(Verification { decision, score, threshold })
    }

    fn check_venue(&self, venue: &VenueId) -> Result<(), ServiceError> {
        if self.parts.venues.is_empty() || self.parts.venues.contains(venue) {
            return Ok(());
        }
        Err(ServiceError::UnknownVenue(venue.clone()))
    }

    async fn rotated(self: &Arc<Self>, samples: Vec<Sample>) -> Result<Vec<Probe>, ServiceError> {
        let service = Arc::clone(self);
        Ok(self.compute.run(Busy::Searches, move || service.rotate(samples)).await??)
    }

    fn rotate(&self, samples: Vec<Sample>) -> Result<Vec<Probe>, Invalid> {
        checked_count(&samples)?;
        let rotation = &self.opened().rotation;
        let rotated = samples.into_iter().enumerate().map(|(at, sample)| {
            let embedding = Embedding::new(sample.values, rotation.dim())
                .map_err(|e| e.within(&format!("probes[{at}].embedding.values")))?;
            Ok(Probe { hand: sample.hand, vector: rotation.rotate(embedding.values()).into() })
        });
        rotated.collect()
    }

    /// The numbers of those who are enrolled now. Numbers are never reused, so that somebody who
    /// is forgotten before the search is simply not found, and nobody else in their place.
    async fn numbers_of(&self, core: &Core, only: SubjectFilter) -> Result<Arc<RoaringBitmap>, ServiceError> {
        // Before the registry is asked, so that the registry is never behind it.
        let lsn = core.gallery.lsn();
        if let Some(numbers) = self.filters.recall(&only, lsn) {
            return Ok(numbers);
        }
        let (only, numbers) = self
            .read(move |registry| {
                let numbers = registry.subject_numbers(only.ids())?;
                let numbers: RoaringBitmap = numbers.into_iter().filter_map(|n| u32::try_from(n.0).ok()).collect();
                Ok((only, Arc::new(numbers)))
            })
            .await?;
        self.filters.remember(only, lsn, Arc::clone(&numbers));
        Ok(numbers)
    }

    fn next_search_id(&self) -> String {
        format!("{:08x}-{:x}", self.run, self.search_ids.fetch_add(1, Ordering::Relaxed))
    }
}

fn checked_count(samples: &[Sample]) -> Result<(), Invalid> {
    if samples.is_empty() || samples.len() > PROBES_MAX {
        return Err(Invalid::new("probes", format!("{} were sent, 1 to {PROBES_MAX} are taken", samples.len())));
    }
    Ok(())
}

/// The class of a search. For payment and entry somebody is waiting; but a search that asks for candidates far
/// below what the decision needs has another purpose, and takes the engine for longer.
fn class(purpose: Purpose, floor: f64, needed: f64) -> Class {
    match purpose {
        _ if floor < needed.min(SELECTIVE_FLOOR) => Class::Floorless,
        Purpose::Payment | Purpose::Entry => Class::Urgent,
        Purpose::Workplace | Purpose::Loyalty => Class::Ordinary,
    }
}

fn batch_error(error: BatchError) -> ServiceError {
    match error {
        BatchError::Overloaded { retry_after, .. } => ServiceError::Busy { what: Busy::Searches, retry_after },
        BatchError::DeadlineExceeded { waited } => ServiceError::DeadlineExceeded { waited },
        BatchError::Failed(error) => ServiceError::SearchFailed(error),
        BatchError::Stopped => ServiceError::Draining,
    }
}

fn refusal(error: &ServiceError) -> Refusal {
    match error {
        ServiceError::UnknownVenue(_) => Refusal::UnknownVenue,
        ServiceError::Busy { .. } => Refusal::Overloaded,
        ServiceError::DeadlineExceeded { .. } => Refusal::Deadline,
        ServiceError::Draining => Refusal::Draining,
        ServiceError::Invalid(_)
        | ServiceError::NoSuchSubject(_)
        | ServiceError::SubjectExists(_)
        | ServiceError::Forgotten { .. }
        | ServiceError::NoSuchTemplate(_)
        | ServiceError::TemplateCount { .. }
        | ServiceError::RequestIdReused(_) => Refusal::Invalid,
        ServiceError::DiskFull { .. }
        | ServiceError::Registry(_)
        | ServiceError::InDoubt(_)
        | ServiceError::ReadOnly(_)
        | ServiceError::NotYetInForce(_)
        | ServiceError::NoGallery(_)
        | ServiceError::SearchFailed(_) => Refusal::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_and_payment_are_urgent_unless_they_ask_for_candidates_without_a_floor() {
        let needed = 0.55;
        assert_eq!(class(Purpose::Entry, needed, needed), Class::Urgent);
        assert_eq!(class(Purpose::Payment, 0.45, needed), Class::Urgent);
        assert_eq!(class(Purpose::Loyalty, needed, needed), Class::Ordinary);
        for purpose in Purpose::ALL {
            assert_eq!(class(purpose, NO_FLOOR, needed), Class::Floorless);
            assert_eq!(class(purpose, 0.3, needed), Class::Floorless);
        }
        // A policy may need a low floor itself.
        assert_eq!(class(Purpose::Entry, 0.3, 0.3), Class::Urgent);
    }
}
