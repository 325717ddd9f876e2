//! `thenar.v1.Identification`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::convert;
use super::messages::stream_of;
use super::status::{invalid, retry_after, status};
use crate::api::proto;
use crate::api::proto::identify_stream_response::Outcome;
use crate::service::{Driven, Service, ServiceError};

/// Requests of one stream that are searched at the same time.
const STREAM_IN_FLIGHT_MAX: usize = 64;

/// The implementation of the service.
pub(super) struct Api(pub(super) Arc<Service>);

#[tonic::async_trait]
impl proto::identification_server::Identification for Api {
    async fn identify(
        &self,
        request: Request<proto::IdentifyRequest>,
    ) -> Result<Response<proto::IdentifyResponse>, Status> {
        let arrived = Instant::now();
        let deadline = convert::deadline(request.metadata(), arrived);
        let identify = convert::identify(request.into_inner(), arrived, deadline).map_err(invalid)?;
        let answer = self.0.identify(identify).await.map_err(|e| status(&e))?;
        Ok(Response::new(convert::identification(answer)))
    }

    type IdentifyStreamStream = Pin<Box<dyn Stream<Item = Result<proto::IdentifyStreamResponse, Status>> + Send>>;

    async fn identify_stream(
        &self,
        request: Request<Streaming<proto::IdentifyRequest>>,
    ) -> Result<Response<Self::IdentifyStreamStream>, Status> {
        let service = Arc::clone(&self.0);
        let draining = service.draining().clone().cancelled_owned();
        let answers = stream_of(&request)
            // A turnstile's stream ends in order when the server stops: what was read is answered.
            .take_until(draining)
            .map(move |request| {
                let service = Arc::clone(&service);
                // In a task of its own: this stream is polled only while its client reads, and a search must not
                // keep its place in the queue until then.
                let answered = request.map(|(request, charge)| {
                    Driven::new(async move {
                        let _charge = charge;
                        answer(&service, request).await
                    })
                });
                async move { answered?.done().await.ok_or_else(|| status(&ServiceError::Draining)) }
            })
            .buffer_unordered(STREAM_IN_FLIGHT_MAX);
        Ok(Response::new(Box::pin(answers)))
    }

    async fn verify(&self, request: Request<proto::VerifyRequest>) -> Result<Response<proto::VerifyResponse>, Status> {
        let verify = convert::verify(request.into_inner()).map_err(invalid)?;
        let request_id = verify.request_id.as_str().into();
        let verification = self.0.verify(verify).await.map_err(|e| status(&e))?;
        Ok(Response::new(proto::VerifyResponse {
            request_id,
            decision: convert::proto_decision(verification.decision),
            score: verification.score,
            threshold: verification.threshold,
        }))
    }
}

async fn answer(service: &Arc<Service>, request: proto::IdentifyRequest) -> proto::IdentifyStreamResponse {
    let request_id = request.request_id.clone();
    let identified = match convert::identify(request, Instant::now(), None) {
        Ok(identify) => service.identify(identify).await,
        Err(invalid) => Err(ServiceError::Invalid(invalid)),
    };
    let outcome = match identified {
        Ok(answer) => Outcome::Response(convert::identification(answer)),
        Err(error) => {
            let status = status(&error);
            Outcome::Error(proto::StreamError {
                code: status.code().into(),
                message: status.message().into(),
                retry_after: retry_after(&error).map(convert::proto_duration),
            })
        }
    };
    proto::IdentifyStreamResponse { request_id, outcome: Some(outcome) }
}
