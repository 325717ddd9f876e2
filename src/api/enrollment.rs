//! `thenar.v1.Enrollment`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::convert;
use super::messages::stream_of;
use super::status::{invalid, status};
use crate::api::proto;
use crate::model::SubjectId;
use crate::registry::Source;
use crate::service::{BulkOutcome, Prepared, Service, ServiceError};

/// Messages of one bulk stream that are rotated and sealed at the same time.
const BULK_PREPARED_MAX: usize = 2;
/// Messages of one bulk stream that are being written to the disk at the same time, while the next are
/// prepared.
const BULK_IN_FLIGHT_MAX: usize = 4;

/// The implementation of the service.
pub(super) struct Api(pub(super) Arc<Service>);

#[tonic::async_trait]
impl proto::enrollment_server::Enrollment for Api {
    async fn enroll(&self, request: Request<proto::EnrollRequest>) -> Result<Response<proto::EnrollResponse>, Status> {
        let enrol = convert::enrol(request.into_inner(), Source::Person).map_err(invalid)?;
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
        let id = SubjectId::new(&request.get_ref().subject_id).map_err(invalid)?;
        let record = self.0.subject(id).await.map_err(|e| status(&e))?;
        Ok(Response::new(convert::subject(record)))
    }

    async fn update_subject(
        &self,
        request: Request<proto::UpdateSubjectRequest>,
    ) -> Result<Response<proto::Subject>, Status> {
        let update = convert::update(request.into_inner()).map_err(invalid)?;
        let updated = self.0.update(update).await.map_err(|e| status(&e))?;
        Ok(Response::new(convert::subject(updated.subject)))
    }

    async fn forget(&self, request: Request<proto::ForgetRequest>) -> Result<Response<proto::ForgetResponse>, Status> {
        let request = request.into_inner();
        let forget = convert::forget(&request).map_err(invalid)?;
        let forgotten = self.0.forget(forget).await.map_err(|e| status(&e))?;
        Ok(Response::new(proto::ForgetResponse {
            subject_id: request.subject_id,
            templates_erased: u32::try_from(forgotten.templates).unwrap_or(u32::MAX),
            lsn: forgotten.lsn.0,
        }))
    }
}

/// Enrols the items of `messages`, several messages at a time, and reports the progress after each: what a
/// `BulkEnroll` call does, without the call. Ends after the first error, and when the service
/// drains; what was not acknowledged by then is to be sent again. The value beside a message is dropped
/// when the message has been dealt with.
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
        // In order: of two items with one subject the first wins, as the client wrote them.
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
    // Nothing follows an error: what was not acknowledged is to be sent again.
    progress.chain(stopping).take_while(move |message| {
        let go_on = !failed;
        failed |= message.is_err();
        futures::future::ready(go_on)
    })
}

/// How the items of one message ended, each with the client's sequence number and subject id.
struct Ended(Vec<(u64, String, BulkOutcome)>);

/// The prepared items of one message, with their names.
struct PreparedMessage {
    names: convert::ItemNames,
    prepared: Prepared,
}

async fn prepare_message(service: &Arc<Service>, message: proto::BulkEnrollRequest) -> Result<PreparedMessage, Status> {
    let (names, items) = convert::bulk(message).map_err(invalid)?;
    let prepared = service.prepare_many(items).await.map_err(|e| status(&e))?;
    Ok(PreparedMessage { names, prepared })
}

/// Queues the items of a message; the returned future says how they ended.
async fn enrol_message(
    service: &Service,
    PreparedMessage { names, prepared }: PreparedMessage,
) -> Result<impl Future<Output = Result<Ended, Status>> + Send + use<>, Status> {
    let outcomes = service.enrol_many(prepared).await.map_err(|e| status(&e))?;
    Ok(async move {
        let outcomes = outcomes.await.map_err(|e| status(&e))?;
        let ended = names.into_iter().zip(outcomes).map(|((sequence, subject), outcome)| (sequence, subject, outcome));
        Ok(Ended(ended.collect()))
    })
}

/// The totals of one bulk stream.
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
