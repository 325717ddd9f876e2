//! A client of the three services with short calls for tests.

use std::sync::atomic::{AtomicU64, Ordering};

use thenar::api::proto::administration_client::AdministrationClient;
use thenar::api::proto::enrollment_client::EnrollmentClient;
use thenar::api::proto::identification_client::IdentificationClient;
use thenar::api::proto::{self, palm_sample::Content};
use thenar::model::Hand;
use tonic::Status;
use tonic::transport::Channel;

use super::palms::Palm;

/// One connection with stubs of every service.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) identification: IdentificationClient<Channel>,
    pub(crate) enrollment: EnrollmentClient<Channel>,
    pub(crate) administration: AdministrationClient<Channel>,
}

/// A request id that nothing in this process has used.
pub(crate) fn fresh_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("request-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

fn proto_hand(hand: Hand) -> i32 {
    match hand {
        Hand::Unspecified => proto::Hand::Unspecified,
        Hand::Left => proto::Hand::Left,
        Hand::Right => proto::Hand::Right,
    }
    .into()
}

pub(crate) fn sample(palm: &Palm) -> proto::PalmSample {
    proto::PalmSample {
        hand: proto_hand(palm.hand),
        content: Some(Content::Embedding(proto::Embedding { values: palm.values.clone() })),
    }
}

pub(crate) fn samples(palms: &[Palm]) -> Vec<proto::PalmSample> {
    palms.iter().map(sample).collect()
}

/// An identification for entry, under a fresh request id.
pub(crate) fn identify_request(probes: &[Palm], max_candidates: u32, threshold: Option<f64>) -> proto::IdentifyRequest {
    proto::IdentifyRequest {
        request_id: fresh_id(),
        venue_id: "gate-1".into(),
        purpose: proto::Purpose::Entry.into(),
        probes: samples(probes),
        max_candidates,
        threshold,
        certificate: None,
        only: None,
    }
}

pub(crate) fn verify_request(subject: &str, probes: &[Palm]) -> proto::VerifyRequest {
    proto::VerifyRequest {
        request_id: fresh_id(),
        venue_id: "gate-1".into(),
        purpose: proto::Purpose::Entry.into(),
        subject_id: subject.into(),
        probes: samples(probes),
    }
}

pub(crate) fn enroll_request(subject: &str, palms: &[Palm]) -> proto::EnrollRequest {
    proto::EnrollRequest { request_id: fresh_id(), subject_id: subject.into(), samples: samples(palms) }
}

/// An enrolment per person, with one template each.
pub(crate) fn enrolments(people: &[(String, Palm)]) -> Vec<proto::EnrollRequest> {
    people.iter().map(|(subject, palm)| enroll_request(subject, std::slice::from_ref(palm))).collect()
}

pub(crate) fn forget_request(subject: &str) -> proto::ForgetRequest {
    proto::ForgetRequest { request_id: fresh_id(), subject_id: subject.into() }
}

pub(crate) fn update_request(subject: &str, add: &[Palm], remove: &[u64]) -> proto::UpdateSubjectRequest {
    proto::UpdateSubjectRequest {
        request_id: fresh_id(),
        subject_id: subject.into(),
        add_samples: samples(add),
        remove_template_ids: remove.to_vec(),
    }
}

/// Cuts enrolments into bulk messages of `size` items; the sequence number is the place in `enrolments`.
pub(crate) fn bulk_messages(enrolments: Vec<proto::EnrollRequest>, size: usize) -> Vec<proto::BulkEnrollRequest> {
    let items: Vec<proto::BulkEnrollItem> = enrolments
        .into_iter()
        .zip(0..)
        .map(|(enrollment, sequence)| proto::BulkEnrollItem { sequence, enrollment: Some(enrollment) })
        .collect();
    items.chunks(size).map(|items| proto::BulkEnrollRequest { items: items.to_vec(), after_forget: None }).collect()
}

impl Client {
    pub(crate) fn new(channel: Channel) -> Self {
        Self {
            identification: IdentificationClient::new(channel.clone()),
            enrollment: EnrollmentClient::new(channel.clone())
                .max_encoding_message_size(64 << 20)
                .max_decoding_message_size(64 << 20),
            administration: AdministrationClient::new(channel),
        }
    }

    pub(crate) async fn enroll(&mut self, subject: &str, palms: &[Palm]) -> Result<proto::EnrollResponse, Status> {
        self.enrollment.enroll(enroll_request(subject, palms)).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn forget(&mut self, subject: &str) -> Result<proto::ForgetResponse, Status> {
        self.enrollment.forget(forget_request(subject)).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn update(
        &mut self,
        subject: &str,
        add: &[Palm],
        remove: &[u64],
    ) -> Result<proto::Subject, Status> {
        self.enrollment.update_subject(update_request(subject, add, remove)).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn get(&mut self, subject: &str) -> Result<proto::Subject, Status> {
        let request = proto::GetSubjectRequest { subject_id: subject.into() };
        self.enrollment.get_subject(request).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn identify(
        &mut self,
        probes: &[Palm],
        max_candidates: u32,
        threshold: Option<f64>,
    ) -> Result<proto::IdentifyResponse, Status> {
        let request = identify_request(probes, max_candidates, threshold);
        self.identification.identify(request).await.map(tonic::Response::into_inner)
    }

    /// The subject that matches this one probe best with at least 0.9, if any does.
    pub(crate) async fn who(&mut self, probe: &Palm) -> Result<Option<String>, Status> {
        let answer = self.identify(std::slice::from_ref(probe), 1, Some(0.9)).await?;
        Ok(answer.candidates.into_iter().next().map(|c| c.subject_id))
    }

    pub(crate) async fn verify(&mut self, subject: &str, probes: &[Palm]) -> Result<proto::VerifyResponse, Status> {
        self.identification.verify(verify_request(subject, probes)).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn status(&mut self) -> Result<proto::Status, Status> {
        self.administration.get_status(proto::GetStatusRequest {}).await.map(tonic::Response::into_inner)
    }

    /// Enrols many in one bulk stream and returns the last progress; all must go in.
    pub(crate) async fn bulk(&mut self, enrolments: Vec<proto::EnrollRequest>) -> proto::BulkEnrollProgress {
        let count = enrolments.len() as u64;
        let last = self.bulk_again(enrolments).await;
        assert_eq!((last.received, last.enrolled), (count, count), "everybody went in");
        last
    }

    /// Enrols many under request ids that may have been used for them before; all must be in then.
    pub(crate) async fn bulk_again(&mut self, enrolments: Vec<proto::EnrollRequest>) -> proto::BulkEnrollProgress {
        let count = enrolments.len() as u64;
        let messages = bulk_messages(enrolments, 256);
        let stream = self.enrollment.bulk_enroll(tokio_stream::iter(messages)).await.expect("bulk enrolment starts");
        let mut stream = stream.into_inner();
        let mut last = proto::BulkEnrollProgress::default();
        while let Some(progress) = stream.message().await.expect("bulk enrolment goes on") {
            assert_eq!(progress.errors, [], "nothing is rejected");
            last = progress;
        }
        assert_eq!((last.received, last.enrolled + last.unchanged), (count, count), "everybody is in");
        last
    }
}
