//! The services of the mock server: the generated traits over its state.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::State;
use crate::api::proto::administration_server::Administration;
use crate::api::proto::enrollment_server::Enrollment;
use crate::api::proto::identification_server::Identification;
use crate::api::proto::*;

#[derive(Debug, Clone)]
pub(super) struct Services(pub(super) Arc<Mutex<State>>);

fn unused<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("no client command asks this"))
}

#[tonic::async_trait]
impl Enrollment for Services {
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
        self.0.lock().streams += 1;
        if let Some(code) = self.0.lock().refuse_bulk {
            return Err(Status::new(code, "refused"));
        }
        let state = self.0.clone();
        let mut messages = request.into_inner();
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            let mut progress = BulkEnrollProgress::default();
            let mut held_back = false;
            while let Some(Ok(message)) = messages.next().await {
                {
                    let mut state = state.lock();
                    state.bulk_enroll(&message, &mut progress);
                    if state.breaks() {
                        return;
                    }
                    held_back = state.coalesce && !held_back;
                }
                if !held_back && sender.send(Ok(progress.clone())).await.is_err() {
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
        unused()
    }

    async fn update_subject(&self, _: Request<UpdateSubjectRequest>) -> Result<Response<Subject>, Status> {
        unused()
    }

    async fn forget(&self, request: Request<ForgetRequest>) -> Result<Response<ForgetResponse>, Status> {
        self.0.lock().forget(&request.get_ref().subject_id).map(Response::new)
    }
}

#[tonic::async_trait]
impl Identification for Services {
    async fn identify(&self, request: Request<IdentifyRequest>) -> Result<Response<IdentifyResponse>, Status> {
        self.0.lock().identify(request.get_ref()).map(Response::new)
    }

    type IdentifyStreamStream = ReceiverStream<Result<IdentifyStreamResponse, Status>>;

    async fn identify_stream(
        &self,
        request: Request<Streaming<IdentifyRequest>>,
    ) -> Result<Response<Self::IdentifyStreamStream>, Status> {
        let state = self.0.clone();
        let mut requests = request.into_inner();
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            // The earlier answer of a pair, until the later one has left or none has come for a while.
            let mut earlier: Option<IdentifyStreamResponse> = None;
            loop {
                let next = tokio::time::timeout(Duration::from_millis(20), requests.next()).await;
                let (answer, ended) = match next {
                    Ok(Some(Ok(request))) => (Some(answer(&mut state.lock(), request)), false),
                    Ok(_) => (None, true),
                    Err(_) => (None, false),
                };
                if state.lock().coalesce && earlier.is_none() && answer.is_some() {
                    earlier = answer;
                    continue;
                }
                for answer in [answer, earlier.take()].into_iter().flatten() {
                    if sender.send(Ok(answer)).await.is_err() {
                        return;
                    }
                }
                if ended {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn verify(&self, _: Request<VerifyRequest>) -> Result<Response<VerifyResponse>, Status> {
        unused()
    }
}

fn answer(state: &mut State, request: IdentifyRequest) -> IdentifyStreamResponse {
    let outcome = match state.identify(&request) {
        Ok(response) => identify_stream_response::Outcome::Response(response),
        Err(status) => identify_stream_response::Outcome::Error(StreamError {
            code: status.code().into(),
            message: status.message().to_owned(),
            retry_after: Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 }),
        }),
    };
    IdentifyStreamResponse { request_id: request.request_id, outcome: Some(outcome) }
}

#[tonic::async_trait]
impl Administration for Services {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<crate::api::proto::Status>, Status> {
        Ok(Response::new(self.0.lock().status()))
    }
}
