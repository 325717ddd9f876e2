//! `thenar.v1.Enrollment`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use futures::{Stream, StreamExt};
use thenar_index::TemplateId;
use tonic::{Request, Response, Status, Streaming};

use super::convert;
use super::messages::stream_of;
use super::status::{invalid, status};
use crate::api::proto;
use crate::model::{Invalid, RequestId, SubjectId};
use crate::registry::Source;
use crate::service::{BulkItem, BulkOutcome, Forget, Prepared, Service, ServiceError, Update};

/// Subjects in one message of a bulk stream.
const BULK_ITEMS_MAX: usize = 1024;
/// Messages of one bulk stream that are rotated and sealed at a time.
const BULK_PREPARED_MAX: usize = 2;
/// Messages of one bulk stream that are on their way to the disk at a time, while the next are
/// prepared.
const BULK_IN_FLIGHT_MAX: usize = 4;

/// The server's side of the service.
pub(super) struct Api(Arc<Service>);

impl Api {
    pub(super) fn new(service: Arc<Service>) -> Self {
        Self(service)
    }
}

fn request_id(text: &str) -> Result<RequestId, Status> {
    RequestId::new(text).map_err(invalid)
}

fn subject_id(text: &str) -> Result<SubjectId, Status> {
    SubjectId::new(text).map_err(invalid)
}

#[tonic::async_trait]
impl proto::enrollment_server::Enrollment for Api {
    async fn enroll(&self, request: Request<proto::EnrollRequest>) -> Result<Response<proto::EnrollResponse>, Status> {
        let enrol = convert::enrol(request.into_inner(), Source::Person).map_err(|e| status(&e))?;
        let enrolled = self.0.enrol(enrol).await.map_err(|e| status(&e))?;
        Ok(Response::new(proto::EnrollResponse {
            subject: Some(convert::subject(enrolled.subject)),
            lsn: enrolled.lsn.0,
        }))
    }

    type BulkEnrollStream = Pin<Box<dyn Stream<Item = Result<proto::BulkEnrollProgress, Status>> + Send>>;

    async fn bulk_enroll(
        &self,
        request: Request<Streaming<proto::BulkEnrollRequest>>,
    ) -> Result<Response<Self::BulkEnrollStream>, Status> {
        Ok(Response::new(Box::pin(bulk_enroll(Arc::clone(&self.0), stream_of(&request)))))
    }

    async fn get_subject(
        &self,
        request: Request<proto::GetSubjectRequest>,
    ) -> Result<Response<proto::Subject>, Status> {
        let id = subject_id(&request.get_ref().subject_id)?;
        let record = self.0.subject(id).await.map_err(|e| status(&e))?;
        Ok(Response::new(convert::subject(record)))
    }

    async fn update_subject(
        &self,
        request: Request<proto::UpdateSubjectRequest>,
    ) -> Result<Response<proto::Subject>, Status> {
        let request = request.into_inner();
        let update = Update {
            request_id: request_id(&request.request_id)?,
            subject: subject_id(&request.subject_id)?,
            add: convert::samples(request.add_samples, "add_samples").map_err(|e| status(&e))?,
            remove: request.remove_template_ids.into_iter().map(TemplateId).collect(),
        };
        let updated = self.0.update(update).await.map_err(|e| status(&e))?;
        Ok(Response::new(convert::subject(updated.subject)))
    }

    async fn forget(&self, request: Request<proto::ForgetRequest>) -> Result<Response<proto::ForgetResponse>, Status> {
        let request = request.into_inner();
        let forget = Forget { request_id: request_id(&request.request_id)?, subject: subject_id(&request.subject_id)? };
        let forgotten = self.0.forget(forget).await.map_err(|e| status(&e))?;
        Ok(Response::new(proto::ForgetResponse {
            subject_id: request.subject_id,
            templates_erased: u32::try_from(forgotten.templates).unwrap_or(u32::MAX),
            lsn: forgotten.lsn.0,
        }))
    }
}

/// Enrols what `messages` bring, several at a time, and tells after each how far it is: what a
/// `BulkEnroll` call does, without the call. Ends after the first error, and when the service
/// drains; what was not acknowledged by then is to be sent again. What comes with a message is dropped
/// when the server has done with the message.
pub(crate) fn bulk_enroll<M, G>(
    service: Arc<Service>,
    messages: M,
) -> impl Stream<Item = Result<proto::BulkEnrollProgress, Status>> + Send + use<M, G>
where
    M: Stream<Item = Result<(proto::BulkEnrollRequest, G), Status>> + Send + 'static,
    G: Send + 'static,
{
    let draining = service.draining().clone();
    let preparing = Arc::clone(&service);
    let mut totals = Totals::new();
    let mut failed = false;
    let progress = messages
        .take_until(draining.clone().cancelled_owned())
        .map(move |message| {
            let service = Arc::clone(&preparing);
            async move {
                let (message, charge) = message?;
                Ok::<_, Status>((prepare_message(&service, message).await?, charge))
            }
        })
        .buffered(BULK_PREPARED_MAX)
        // One after the other: of two items with one subject the first wins, as the client wrote it.
        .then(move |message| {
            let service = Arc::clone(&service);
            async move {
                let (message, charge) = message?;
                Ok::<_, Status>((enrol_message(&service, message).await?, charge))
            }
        })
        .map(|message| async move {
            let (outcomes, _charge) = message?;
            outcomes.await
        })
        .buffered(BULK_IN_FLIGHT_MAX)
        .map(move |message| message.map(|ended| totals.after(ended)));
    let stopping =
        futures::stream::once(async move { draining.is_cancelled().then(|| Err(status(&ServiceError::Draining))) })
            .filter_map(futures::future::ready);
    // After an error nothing more is said: what was not acknowledged is to be sent again.
    progress.chain(stopping).take_while(move |message| {
        let go_on = !failed;
        failed |= message.is_err();
        futures::future::ready(go_on)
    })
}

/// How the items of one message ended, each with the client's sequence number and subject id.
struct Ended(Vec<(u64, String, BulkOutcome)>);

/// The items of one message on their way, with their names.
struct UnderWay {
    names: Vec<(u64, String)>,
    prepared: Prepared,
}

async fn prepare_message(service: &Arc<Service>, message: proto::BulkEnrollRequest) -> Result<UnderWay, Status> {
    let count = message.items.len();
    if count == 0 || count > BULK_ITEMS_MAX {
        return Err(invalid(Invalid::new("items", format!("has {count} items, 1 to {BULK_ITEMS_MAX} are taken"))));
    }
    let after_forget = message.after_forget.map(SystemTime::try_from).transpose();
    let after_forget = after_forget.map_err(|_| invalid(Invalid::new("after_forget", "is no time that exists")))?;
    let source = Source::List { after_forget };
    let mut names = Vec::with_capacity(count);
    let mut items = Vec::with_capacity(count);
    for item in message.items {
        let enrollment = item.enrollment.unwrap_or_default();
        names.push((item.sequence, enrollment.subject_id.clone()));
        items.push(BulkItem { enrol: convert::enrol(enrollment, source) });
    }
    let prepared = service.prepare_many(items).await.map_err(|e| status(&e))?;
    Ok(UnderWay { names, prepared })
}

/// Queues the items of a message; the answer is a future of how they ended.
async fn enrol_message(
    service: &Service,
    UnderWay { names, prepared }: UnderWay,
) -> Result<impl Future<Output = Result<Ended, Status>> + Send + use<>, Status> {
    let outcomes = service.enrol_many(prepared).await.map_err(|e| status(&e))?;
    Ok(async move {
        let outcomes = outcomes.await.map_err(|e| status(&e))?;
        let ended = names.into_iter().zip(outcomes).map(|((sequence, subject), outcome)| (sequence, subject, outcome));
        Ok(Ended(ended.collect()))
    })
}

/// Totals of one bulk stream.
struct Totals {
    since: Instant,
    so_far: proto::BulkEnrollProgress,
}

impl Totals {
    fn new() -> Self {
        Self { since: Instant::now(), so_far: proto::BulkEnrollProgress::default() }
    }

    fn after(&mut self, Ended(items): Ended) -> proto::BulkEnrollProgress {
        let so_far = &mut self.so_far;
        so_far.errors.clear();
        for (sequence, subject_id, outcome) in items {
            so_far.received += 1;
            match outcome {
                Ok(enrolled) => {
                    if enrolled.replayed {
                        so_far.unchanged += 1;
                    } else {
                        so_far.enrolled += 1;
                        so_far.templates += enrolled.subject.templates.len() as u64;
                        so_far.lsn = so_far.lsn.max(enrolled.lsn.0);
                    }
                }
                Err(error) => {
                    so_far.rejected += 1;
                    let status = status(&error);
                    so_far.errors.push(proto::BulkEnrollError {
                        sequence,
                        subject_id,
                        code: status.code().into(),
                        message: status.message().into(),
                    });
                }
            }
        }
        so_far.elapsed = Some(convert::proto_duration(self.since.elapsed()));
        so_far.clone()
    }
}
