//! Enrolling people, changing their templates, and forgetting them.

use std::sync::Arc;

use rayon::prelude::*;
use thenar_index::{Lsn, TemplateId};

use super::{Busy, Sample, Service, ServiceError};
use crate::model::{self, Embedding, Hand, Invalid, RequestId, SubjectId, TEMPLATES_PER_SUBJECT_MAX};
use crate::process::zeroing_alloc;
use crate::registry::{Action, Change, Outcome, SealedTemplate, Source, SubjectRecord};

/// Items of a bulk message rotated together, so that the matrix is read once for all of them.
const ROTATE_TOGETHER: usize = 32;

/// Enrols somebody new.
pub struct Enrol {
    /// The change happens once under this id.
    pub request_id: RequestId,
    /// Must not be enrolled.
    pub subject: SubjectId,
    /// Decides whether somebody who was forgotten may be enrolled again.
    pub source: Source,
    /// 1 to `TEMPLATES_PER_SUBJECT_MAX`.
    pub samples: Vec<Sample>,
}

/// Changes somebody's templates.
pub struct Update {
    /// The change happens once under this id.
    pub request_id: RequestId,
    /// Must exist.
    pub subject: SubjectId,
    /// To add.
    pub add: Vec<Sample>,
    /// To delete.
    pub remove: Vec<TemplateId>,
}

/// Deletes somebody.
pub struct Forget {
    /// The change happens once under this id.
    pub request_id: RequestId,
    /// Must exist.
    pub subject: SubjectId,
}

/// An enrolment or update that is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolled {
    /// As it is now.
    pub subject: SubjectRecord,
    /// The change's place in the log.
    pub lsn: Lsn,
    /// Whether it had been done before under the same request id.
    pub replayed: bool,
}

/// A deletion that is in force: no byte of the templates is left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forgotten {
    /// Templates erased.
    pub templates: usize,
    /// The change's place in the log.
    pub lsn: Lsn,
}

/// One of the enrolments of a bulk message.
pub struct BulkItem {
    /// The enrolment, or what is wrong with it, which is only reported.
    pub enrol: Result<Enrol, ServiceError>,
}

/// Bulk enrolments, each checked and sealed, or what is wrong with it.
pub struct Prepared(Vec<Result<(Change, SubjectId), ServiceError>>);

/// The result of one bulk enrolment.
pub type BulkOutcome = Result<Enrolled, ServiceError>;

impl Service {
    /// Enrols.
    ///
    /// # Errors
    /// [`ServiceError`]. Nothing was changed, except in the case of [`ServiceError::NotYetInForce`] and
    /// possibly [`ServiceError::InDoubt`].
    pub async fn enrol(self: &Arc<Self>, enrol: Enrol) -> Result<Enrolled, ServiceError> {
        self.refuse_while_draining()?;
        if self.core().is_none() {
            self.open(dimension_of(&enrol.samples)?).await?;
        }
        let (request_id, subject) = (enrol.request_id.clone(), enrol.subject.clone());
        let service = Arc::clone(self);
        let change = self.compute.run(Busy::Writes, move || service.enrolment(enrol)).await??;
        let outcome = self.write_one(change).await?;
        enrolled(outcome, request_id, subject)
    }

    /// Checks, rotates and seals many enrolments, each on its own: an invalid one does not affect
    /// the others. Changes nothing yet.
    ///
    /// # Errors
    /// [`ServiceError::Draining`] if the server is stopping.
    pub async fn prepare_many(self: &Arc<Self>, items: Vec<BulkItem>) -> Result<Prepared, ServiceError> {
        self.refuse_while_draining()?;
        if self.core().is_none() {
            // The first valid item decides.
            let good = |item: &BulkItem| dimension_of(&item.enrol.as_ref().ok()?.samples).ok();
            let Some(dim) = items.iter().find_map(good) else {
                let problem = |item: BulkItem| match item.enrol {
                    Ok(enrol) => dimension_of(&enrol.samples).err().map_or(ServiceError::Draining, Into::into),
                    Err(error) => error,
                };
                return Ok(Prepared(items.into_iter().map(|item| Err(problem(item))).collect()));
            };
            self.open(dim).await?;
        }
        let service = Arc::clone(self);
        Ok(Prepared(self.compute.run_bulk(move || service.enrolments(items)).await?))
    }

    /// Queues prepared enrolments at the writer and waits for room: what is queued first is
    /// done first. Returns a future with the result of each.
    ///
    /// # Errors
    /// [`ServiceError::Draining`] if the server is stopping.
    pub async fn enrol_many(
        &self,
        prepared: Prepared,
    ) -> Result<impl Future<Output = Result<Vec<BulkOutcome>, ServiceError>> + Send + use<>, ServiceError> {
        let mut changes = Vec::new();
        let mut names = Vec::with_capacity(prepared.0.len());
        for item in prepared.0 {
            names.push(item.map(|(change, subject)| {
                let request_id = change.request_id.clone();
                changes.push(change);
                (request_id, subject)
            }));
        }
        let queued = match changes.is_empty() {
            true => None,
            false => Some(self.opened().writer.queue_when_there_is_room(changes).await?),
        };
        Ok(async move {
            let outcomes = match queued {
                Some(queued) => queued.outcomes().await?,
                None => Vec::new(),
            };
            let mut outcomes = outcomes.into_iter();
            let ended = names.into_iter().map(|name| {
                let (request_id, subject) = name?;
                let outcome = outcomes.next().ok_or(ServiceError::Draining)?;
                enrolled(outcome, request_id, subject)
            });
            Ok(ended.collect())
        })
    }

    /// Changes templates.
    ///
    /// # Errors
    /// [`ServiceError`]. Nothing was changed, except in the case of [`ServiceError::NotYetInForce`] and
    /// possibly [`ServiceError::InDoubt`].
    pub async fn update(self: &Arc<Self>, update: Update) -> Result<Enrolled, ServiceError> {
        self.refuse_while_draining()?;
        if update.add.is_empty() && update.remove.is_empty() {
            return Err(
                Invalid::new("add_samples", "is empty, and so is remove_template_ids: there is nothing to do").into()
            );
        }
        let templates_max = TEMPLATES_PER_SUBJECT_MAX;
        if update.add.len() > templates_max {
            let problem = format!("has {} samples, at most {templates_max} are taken", update.add.len());
            return Err(Invalid::new("add_samples", problem).into());
        }
        if update.remove.len() > templates_max {
            let problem = format!("has {} ids, at most {templates_max} are taken", update.remove.len());
            return Err(Invalid::new("remove_template_ids", problem).into());
        }
        if self.core().is_none() {
            return Err(ServiceError::NoSuchSubject(update.subject));
        }
        let (request_id, subject) = (update.request_id.clone(), update.subject.clone());
        let service = Arc::clone(self);
        let change = self.compute.run(Busy::Writes, move || service.updating(update)).await??;
        enrolled(self.write_one(change).await?, request_id, subject)
    }

    /// Deletes a subject: when this returns, no byte of the templates is left.
    ///
    /// # Errors
    /// [`ServiceError::NoSuchSubject`] if there is none, and any other.
    pub async fn forget(&self, forget: Forget) -> Result<Forgotten, ServiceError> {
        self.refuse_while_draining()?;
        if self.core().is_none() {
            return Err(ServiceError::NoSuchSubject(forget.subject));
        }
        let mut digest = self.parts.digester.begin();
        digest.part(b"forget");
        digest.part(forget.subject.as_str().as_bytes());
        let change = Change {
            request_id: forget.request_id.clone(),
            digest: digest.finish(),
            action: Action::Forget { subject: forget.subject.clone() },
        };
        let done = enrolled(self.write_one(change).await?, forget.request_id, forget.subject)?;
        Ok(Forgotten { templates: done.subject.templates.len(), lsn: done.lsn })
    }

    fn refuse_while_draining(&self) -> Result<(), ServiceError> {
        if self.draining().is_cancelled() { Err(ServiceError::Draining) } else { Ok(()) }
    }

    async fn write_one(&self, change: Change) -> Result<Outcome, ServiceError> {
        let mut outcomes = self.opened().writer.write(vec![change]).await?;
        outcomes.pop().ok_or(ServiceError::Draining)
    }

    fn enrolment(&self, enrol: Enrol) -> Result<Change, ServiceError> {
        let Checked { enrol, digest, embeddings } = self.checked(enrol)?;
        let templates = self.sealed(&enrol.subject, &embeddings);
        let action = Action::Enrol { subject: enrol.subject, source: enrol.source, templates };
        Ok(Change { request_id: enrol.request_id, digest, action })
    }

    fn updating(&self, update: Update) -> Result<Change, ServiceError> {
        let mut digest = self.parts.digester.begin();
        digest.part(b"update");
        digest.part(update.subject.as_str().as_bytes());
        digest_samples(&mut digest, &update.add);
        for id in &update.remove {
            digest.part(&id.0.to_le_bytes());
        }
        let digest = digest.finish();
        let embeddings = self.embeddings(update.add, "add_samples")?;
        let add = self.sealed(&update.subject, &embeddings);
        let action = Action::Update { subject: update.subject, add, remove: update.remove };
        Ok(Change { request_id: update.request_id, digest, action })
    }

    /// Checks, rotates and seals many enrolments on all threads.
    fn enrolments(&self, items: Vec<BulkItem>) -> Vec<Result<(Change, SubjectId), ServiceError>> {
        let rotation = &self.opened().rotation;
        let mut checked: Vec<Result<Checked, ServiceError>> =
            items.into_par_iter().map(|item| self.checked(item.enrol?)).collect();
        checked
            .par_chunks_mut(ROTATE_TOGETHER)
            .flat_map_iter(|chunk| {
                let mut flat: Vec<f32> = Vec::new();
                for (_, embedding) in chunk.iter().flatten().flat_map(|c| &c.embeddings) {
                    flat.extend_from_slice(embedding.values());
                }
                let mut rotated = vec![0.0; flat.len()];
                rotation.rotate_many(&flat, &mut rotated);
                let mut rows = rotated.chunks_exact(rotation.dim());
                let sealed: Vec<_> = chunk
                    .iter_mut()
                    .map(|item| {
                        let item = std::mem::replace(item, Err(ServiceError::Draining));
                        let Checked { enrol, digest, embeddings } = item?;
                        let templates = embeddings
                            .iter()
                            .map(|(hand, _)| self.seal_row(&enrol.subject, *hand, rows.next().unwrap_or_default()))
                            .collect();
                        let subject = enrol.subject.clone();
                        let action = Action::Enrol { subject: enrol.subject, source: enrol.source, templates };
                        Ok((Change { request_id: enrol.request_id, digest, action }, subject))
                    })
                    .collect();
                zeroing_alloc::clear_stack();
                sealed
            })
            .collect()
    }

    fn checked(&self, mut enrol: Enrol) -> Result<Checked, ServiceError> {
        let samples = std::mem::take(&mut enrol.samples);
        let mut digest = self.parts.digester.begin();
        digest.part(b"enrol");
        digest.part(enrol.subject.as_str().as_bytes());
        digest_samples(&mut digest, &samples);
        let digest = digest.finish();
        if samples.is_empty() || samples.len() > TEMPLATES_PER_SUBJECT_MAX {
            return Err(sample_count(samples.len()).into());
        }
        let embeddings = self.embeddings(samples, "samples")?;
        Ok(Checked { enrol, digest, embeddings })
    }

    fn embeddings(&self, samples: Vec<Sample>, field: &str) -> Result<Vec<(Hand, Embedding)>, Invalid> {
        let dim = self.opened().rotation.dim();
        let embeddings = samples.into_iter().enumerate().map(|(at, sample)| {
            Embedding::new(sample.values, dim)
                .map(|e| (sample.hand, e))
                .map_err(|e| e.within(&format!("{field}[{at}].embedding.values")))
        });
        embeddings.collect()
    }

    fn sealed(&self, subject: &SubjectId, embeddings: &[(Hand, Embedding)]) -> Vec<SealedTemplate> {
        let rotated = embeddings.iter().map(|(hand, e)| (*hand, self.opened().rotation.rotate(e.values())));
        rotated.map(|(hand, row)| self.seal_row(subject, hand, &row)).collect()
    }

    fn seal_row(&self, subject: &SubjectId, hand: Hand, rotated: &[f32]) -> SealedTemplate {
        let row = crate::vault::to_row(rotated);
        SealedTemplate { hand, sealed: self.opened().sealer.seal(subject.as_str(), hand, &row) }
    }
}

/// An enrolment whose values are all valid.
struct Checked {
    enrol: Enrol,
    digest: [u8; 16],
    embeddings: Vec<(Hand, Embedding)>,
}

/// The dimension that the first enrolment decides on, by its first sample.
fn dimension_of(samples: &[Sample]) -> Result<usize, Invalid> {
    let first = samples.first().ok_or_else(|| sample_count(0))?;
    let dim = first.values.len();
    model::checked_dim(dim)
        .and_then(|_| Embedding::new(first.values.clone(), dim))
        .map_err(|e| e.within("samples[0].embedding.values"))?;
    Ok(dim)
}

fn sample_count(count: usize) -> Invalid {
    Invalid::new("samples", format!("has {count} samples, 1 to {TEMPLATES_PER_SUBJECT_MAX} are taken"))
}

fn digest_samples(digest: &mut crate::vault::RequestDigest, samples: &[Sample]) {
    for sample in samples {
        digest.part(&[sample.hand as u8]);
        digest.values(&sample.values);
    }
}

fn enrolled(outcome: Outcome, request_id: RequestId, subject: SubjectId) -> Result<Enrolled, ServiceError> {
    match outcome {
        Outcome::Done { lsn, subject, replayed } => Ok(Enrolled { subject, lsn, replayed }),
        Outcome::SubjectExists => Err(ServiceError::SubjectExists(subject)),
        Outcome::Forgotten { at } => Err(ServiceError::Forgotten { subject, at }),
        Outcome::NoSuchSubject => Err(ServiceError::NoSuchSubject(subject)),
        Outcome::NoSuchTemplate(id) => Err(ServiceError::NoSuchTemplate(id)),
        Outcome::TemplateCount(count) => Err(ServiceError::TemplateCount { count, max: TEMPLATES_PER_SUBJECT_MAX }),
        Outcome::RequestIdReused => Err(ServiceError::RequestIdReused(request_id)),
    }
}
