//! Messages to commands and answers to messages.

use std::time::{Duration, Instant, SystemTime};

use thenar_index::TemplateId;
use tonic::metadata::MetadataMap;

use crate::api::proto;
use crate::api::proto::palm_sample::Content;
use crate::model::{Hand, Invalid, Purpose, RequestId, SubjectFilter, SubjectId, VenueId};
use crate::policy::Decision;
use crate::registry::{Source, SubjectRecord};
use crate::search::Certificate;
use crate::service::{BulkItem, Enrol, Forget, Identification, Identify, Sample, ServiceError, Update, Verify};

/// Subjects in one message of a bulk stream.
const BULK_ITEMS_MAX: usize = 1024;

/// The moment after which the client no longer waits, from the `grpc-timeout` header.
pub(super) fn deadline(metadata: &MetadataMap, arrived: Instant) -> Option<Instant> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count: u64 = digits.parse().ok()?;
    let timeout = match unit {
        "H" => Duration::from_secs(count.checked_mul(3600)?),
        "M" => Duration::from_secs(count.checked_mul(60)?),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    };
    arrived.checked_add(timeout)
}

fn hand(code: i32, field: &str) -> Result<Hand, Invalid> {
    u8::try_from(code)
        .ok()
        .and_then(Hand::from_code)
        .ok_or_else(|| Invalid::new(field, format!("{code} is not a Hand")))
}

pub(super) fn proto_hand(hand: Hand) -> i32 {
    i32::from(hand as u8)
}

fn purpose(code: i32) -> Result<Purpose, Invalid> {
    match proto::Purpose::try_from(code) {
        Ok(proto::Purpose::Payment) => Ok(Purpose::Payment),
        Ok(proto::Purpose::Entry) => Ok(Purpose::Entry),
        Ok(proto::Purpose::Workplace) => Ok(Purpose::Workplace),
        Ok(proto::Purpose::Loyalty) => Ok(Purpose::Loyalty),
        Ok(proto::Purpose::Unspecified) => Err(Invalid::new("purpose", "is missing")),
        Err(_) => Err(Invalid::new("purpose", format!("{code} is not a Purpose"))),
    }
}

fn samples(samples: Vec<proto::PalmSample>, field: &str) -> Result<Vec<Sample>, Invalid> {
    let converted = samples.into_iter().enumerate().map(|(at, sample)| {
        let place = |inner: &str| format!("{field}[{at}].{inner}");
        let hand = hand(sample.hand, &place("hand"))?;
        match sample.content {
            Some(Content::Embedding(embedding)) => Ok(Sample { hand, values: embedding.values }),
            Some(Content::Picture(_)) => {
                let problem = "cannot be taken: this server has no encoder; send an embedding";
                Err(Invalid::new(place("picture"), problem))
            }
            None => Err(Invalid::new(place("content"), "is missing")),
        }
    });
    converted.collect()
}

pub(super) fn identify(
    request: proto::IdentifyRequest,
    arrived: Instant,
    deadline: Option<Instant>,
) -> Result<Identify, Invalid> {
    Ok(Identify {
        request_id: RequestId::new(&request.request_id)?,
        venue: VenueId::new(&request.venue_id)?,
        purpose: purpose(request.purpose)?,
        samples: samples(request.probes, "probes")?,
        max_candidates: request.max_candidates,
        threshold: request.threshold,
        certificate: request.certificate.map(certificate).transpose()?,
        only: request
            .only
            .map(|only| SubjectFilter::new(&only.subject_ids).map_err(|e| e.within("only")))
            .transpose()?,
        arrived,
        deadline,
    })
}

fn certificate(wanted: proto::Certificate) -> Result<Certificate, Invalid> {
    match proto::certificate::Kind::try_from(wanted.kind) {
        Ok(proto::certificate::Kind::Deterministic) if wanted.miss_probability == 0.0 => Ok(Certificate::Deterministic),
        Ok(proto::certificate::Kind::Deterministic) => {
            let problem = "is for KIND_RANDOMISED; a deterministic search misses nothing";
            Err(Invalid::new("certificate.miss_probability", problem))
        }
        Ok(proto::certificate::Kind::Randomised) => {
            Certificate::randomised(wanted.miss_probability).map_err(|e| e.within("certificate"))
        }
        Ok(proto::certificate::Kind::Unspecified) => Err(Invalid::new("certificate.kind", "is missing")),
        Err(_) => Err(Invalid::new("certificate.kind", format!("{} is not a Kind", wanted.kind))),
    }
}

pub(super) fn verify(request: proto::VerifyRequest) -> Result<Verify, Invalid> {
    Ok(Verify {
        request_id: RequestId::new(&request.request_id)?,
        venue: VenueId::new(&request.venue_id)?,
        purpose: purpose(request.purpose)?,
        subject: SubjectId::new(&request.subject_id)?,
        samples: samples(request.probes, "probes")?,
    })
}

pub(super) fn enrol(request: proto::EnrollRequest, source: Source) -> Result<Enrol, Invalid> {
    Ok(Enrol {
        request_id: RequestId::new(&request.request_id)?,
        subject: SubjectId::new(&request.subject_id)?,
        source,
        samples: samples(request.samples, "samples")?,
    })
}

pub(super) fn update(request: proto::UpdateSubjectRequest) -> Result<Update, Invalid> {
    Ok(Update {
        request_id: RequestId::new(&request.request_id)?,
        subject: SubjectId::new(&request.subject_id)?,
        add: samples(request.add_samples, "add_samples")?,
        remove: request.remove_template_ids.into_iter().map(TemplateId).collect(),
    })
}

pub(super) fn forget(request: &proto::ForgetRequest) -> Result<Forget, Invalid> {
    Ok(Forget { request_id: RequestId::new(&request.request_id)?, subject: SubjectId::new(&request.subject_id)? })
}

/// The client's sequence number and subject id of each item of a bulk message.
pub(super) type ItemNames = Vec<(u64, String)>;

/// The items of a bulk message with their names. An invalid item does not make the message invalid.
pub(super) fn bulk(message: proto::BulkEnrollRequest) -> Result<(ItemNames, Vec<BulkItem>), Invalid> {
    let count = message.items.len();
    if count == 0 || count > BULK_ITEMS_MAX {
        return Err(Invalid::new("items", format!("has {count} items, 1 to {BULK_ITEMS_MAX} are taken")));
    }
    let after_forget = message.after_forget.map(SystemTime::try_from).transpose();
    let after_forget = after_forget.map_err(|_| Invalid::new("after_forget", "is not a time that exists"))?;
    let source = Source::List { after_forget };
    let items = message.items.into_iter().map(|item| {
        let enrollment = item.enrollment.unwrap_or_default();
        let name = (item.sequence, enrollment.subject_id.clone());
        (name, BulkItem { enrol: enrol(enrollment, source).map_err(ServiceError::Invalid) })
    });
    Ok(items.unzip())
}

pub(super) fn proto_decision(decision: Decision) -> i32 {
    match decision {
        Decision::Match => proto::Decision::Match.into(),
        Decision::NoMatch => proto::Decision::NoMatch.into(),
        Decision::Inconclusive => proto::Decision::Inconclusive.into(),
    }
}

/// A duration as a message; one beyond the range of the message is cut to its largest.
pub(super) fn proto_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(duration).unwrap_or(prost_types::Duration { seconds: i64::MAX, nanos: 0 })
}

pub(super) fn identification(answer: Identification) -> proto::IdentifyResponse {
    let certificate = match answer.certificate {
        Certificate::Deterministic => {
            proto::Certificate { kind: proto::certificate::Kind::Deterministic.into(), miss_probability: 0.0 }
        }
        Certificate::Randomised { miss_probability } => {
            proto::Certificate { kind: proto::certificate::Kind::Randomised.into(), miss_probability }
        }
    };
    proto::IdentifyResponse {
        request_id: answer.request_id.as_str().into(),
        search_id: answer.search_id,
        decision: proto_decision(answer.decision),
        candidates: answer
            .candidates
            .into_iter()
            .map(|c| proto::Candidate {
                rank: c.rank,
                subject_id: c.subject_id.into(),
                score: c.score,
                hand: proto_hand(c.hand),
                template_id: c.template.0,
                probes_compared: c.probes_compared,
            })
            .collect(),
        threshold: answer.threshold,
        gallery_size: answer.gallery_size,
        certificate: Some(certificate),
        timing: Some(proto::Timing {
            queue: Some(proto_duration(answer.times.queue)),
            prefilter: Some(proto_duration(answer.times.prefilter)),
            refine: Some(proto_duration(answer.times.refine)),
            total: Some(proto_duration(answer.times.total)),
        }),
    }
}

pub(super) fn subject(record: SubjectRecord) -> proto::Subject {
    let at = |time: SystemTime| Some(prost_types::Timestamp::from(time));
    proto::Subject {
        subject_id: record.id.as_str().into(),
        enrolled_at: at(record.enrolled_at),
        templates: record
            .templates
            .into_iter()
            .map(|t| proto::Template { template_id: t.id.0, hand: proto_hand(t.hand), enrolled_at: at(t.enrolled_at) })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_callers_timeout_becomes_a_deadline() {
        let arrived = Instant::now();
        let after = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            deadline(&metadata, arrived).map(|d| d - arrived)
        };
        assert_eq!(after("250m"), Some(Duration::from_millis(250)));
        assert_eq!(after("3S"), Some(Duration::from_secs(3)));
        assert_eq!(after("1H"), Some(Duration::from_secs(3600)));
        assert_eq!(after("100u"), Some(Duration::from_micros(100)));
        for bad in ["", "S", "12", "12x", "-1S", "99999999999999999999S", "9999999999999999H"] {
            assert_eq!(after(bad), None, "{bad:?}");
        }
        assert_eq!(deadline(&MetadataMap::new(), arrived), None);
    }

    #[test]
    fn the_enums_of_messages_and_of_the_model_agree() {
        for (hand, message) in [
            (Hand::Unspecified, proto::Hand::Unspecified),
            (Hand::Left, proto::Hand::Left),
            (Hand::Right, proto::Hand::Right),
        ] {
            assert_eq!(proto_hand(hand), i32::from(message));
        }
        assert_eq!(hand(3, "probes[0].hand").unwrap_err().field, "probes[0].hand");
        assert_eq!(purpose(0).unwrap_err().problem, "is missing");
        assert!(purpose(9).unwrap_err().problem.contains('9'));
    }
}
