//! Decoding and conversion of hostile messages: no panic, bounded memory, refusals that name a field.

use std::time::Instant;

use prost::Message;

use super::Mutator;
use super::corpus::{self, Request};
use crate::api::messages::elements;
use crate::api::{convert, proto};
use crate::model::{Embedding, Invalid};
use crate::policy;
use crate::process::testing::{fuzz, most_bytes};
use crate::registry::Source;
use crate::service::{Sample, ServiceError};

/// Memory that a message may take while it is decoded and converted, besides its own bytes: so many bytes per
/// byte of the message, per element of its lists, and at all. With [`elements::ELEMENTS_MAX`], a bulk message
/// of 8 MiB takes less than 64 MiB.
const BYTES_PER_BYTE: usize = 4;
const BYTES_PER_ELEMENT: usize = 1 << 10;
const BYTES_AT_ALL: usize = 4 << 10;

/// Decodes and converts as the server does, and checks thresholds and embeddings (of 32 components) as its
/// service does. `None` if the message cannot be decoded.
fn convert(request: Request, bytes: &[u8]) -> Option<Vec<Result<(), Invalid>>> {
    let all = |samples: Vec<Sample>| {
        let checked = samples.into_iter().map(|sample| Embedding::new(sample.values, 32).map(drop));
        checked.map(|checked| checked.map_err(|invalid| invalid.within("values"))).collect()
    };
    let converted = match request {
        Request::Identify => {
            let message = proto::IdentifyRequest::decode(bytes).ok()?;
            convert::identify(message, Instant::now(), None).and_then(|identify| {
                identify.threshold.map(policy::checked_threshold).transpose()?;
                Ok(all(identify.samples))
            })
        }
        Request::Verify => {
            let message = proto::VerifyRequest::decode(bytes).ok()?;
            convert::verify(message).map(|verify| all(verify.samples))
        }
        Request::Enroll => {
            let message = proto::EnrollRequest::decode(bytes).ok()?;
            convert::enrol(message, Source::Person).map(|enrol| all(enrol.samples))
        }
        Request::Update => {
            let message = proto::UpdateSubjectRequest::decode(bytes).ok()?;
            convert::update(message).map(|update| all(update.add))
        }
        Request::Forget => {
            let message = proto::ForgetRequest::decode(bytes).ok()?;
            convert::forget(&message).map(|_| Vec::new())
        }
        Request::Bulk => {
            let message = proto::BulkEnrollRequest::decode(bytes).ok()?;
            convert::bulk(message).map(|(_, items)| {
                let each = items.into_iter().map(|item| match item.enrol {
                    Ok(enrol) => all(enrol.samples).into_iter().collect(),
                    Err(ServiceError::Invalid(invalid)) => Err(invalid),
                    Err(other) => panic!("a conversion fails by what is invalid alone: {other}"),
                });
                each.collect()
            })
        }
    };
    Some(converted.unwrap_or_else(|invalid| vec![Err(invalid)]))
}

fn fields(request: Request) -> &'static [elements::Field] {
    match request {
        Request::Identify => elements::IDENTIFY,
        Request::Verify => elements::VERIFY,
        Request::Enroll => elements::ENROLL,
        Request::Update => elements::UPDATE,
        Request::Forget => &[],
        Request::Bulk => elements::BULK,
    }
}

/// Does what the server does with a message, and checks it. Returns how many refusals there were.
fn check(what: &str, request: Request, bytes: &[u8]) -> Option<usize> {
    let elements = match elements::count(bytes, fields(request)) {
        Ok(elements) => elements,
        Err(invalid) => {
            assert!(!invalid.field.is_empty(), "{what}: {invalid}");
            return Some(1);
        }
    };
    let (converted, most) = most_bytes(|| convert(request, bytes));
    let allowed = BYTES_PER_BYTE * bytes.len() + BYTES_PER_ELEMENT * elements + BYTES_AT_ALL;
    assert!(most <= allowed, "{what}: {most} bytes for {} bytes with {elements} elements", bytes.len());
    let refusals: Vec<Invalid> = converted?.into_iter().filter_map(Result::err).collect();
    for invalid in &refusals {
        assert!(!invalid.field.is_empty() && !invalid.problem.is_empty(), "{what}: {invalid:?}");
    }
    Some(refusals.len())
}

#[test]
fn the_corpus_is_accepted_or_refused_by_name() {
    for (request, name, bytes) in corpus::files() {
        let refusals = check(&name, request, &bytes);
        let is_valid = name.ends_with("-valid") || name == "identify-plain";
        assert_eq!(refusals == Some(0), is_valid, "{name}: {refusals:?}");
    }
}

#[test]
fn mutated_messages_panic_nowhere_take_bounded_memory_and_are_refused_by_name() {
    let files = corpus::files();
    let (mut accepted, mut refused) = (0_usize, 0_usize);
    fuzz(|seed| {
        let mut mutator = Mutator::new(seed);
        let (request, name, bytes) = &files[mutator.below(files.len())];
        let (_, _, other) = &files[mutator.below(files.len())];
        // Long files would take all of the time, so most cases begin with a part of them.
        let bytes = if bytes.len() > 4096 && mutator.below(8) > 0 { &bytes[..4096] } else { bytes };
        let other = &other[..other.len().min(1024)];
        let mutated = mutator.mutate(bytes, other);
        match check(&format!("seed {seed}, from {name}"), *request, &mutated) {
            Some(0) => accepted += 1,
            Some(_) => refused += 1,
            None => {}
        }
    });
    assert!(accepted > 0 && refused > 0, "the mutations reach both: {accepted} accepted, {refused} refused");
}

#[test]
fn lists_that_no_valid_message_has_are_refused_before_they_are_decoded() {
    let empty = [0x0a, 0].repeat(elements::ELEMENTS_MAX);
    assert_eq!(elements::count(&empty, elements::BULK).unwrap(), elements::ELEMENTS_MAX);
    let refused = elements::count(&[&empty[..], &[0x0a, 0]].concat(), elements::BULK).unwrap_err();
    assert_eq!(refused.field, "items");
    let named = [&[0x42, 6, 0x0a, 4][..], b"anna", &[0x22, 0].repeat(2000)].concat();
    assert_eq!(elements::count(&named, elements::IDENTIFY).unwrap(), 2001, "a name is no message");
    let largest = proto::BulkEnrollRequest {
        items: vec![
            proto::BulkEnrollItem {
                sequence: 1,
                enrollment: Some(proto::EnrollRequest {
                    samples: vec![proto::PalmSample::default(); 16],
                    ..Default::default()
                }),
            };
            1024
        ],
        after_forget: None,
    };
    assert_eq!(elements::count(&largest.encode_to_vec(), elements::BULK).unwrap(), 1024 * 17);
}
