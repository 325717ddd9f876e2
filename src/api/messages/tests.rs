//! Framing: any messages, in any chunks, however mutated.

use super::elements::Field;
use super::*;
use crate::api::budget::Budget;
use crate::api::tests::Mutator;
use crate::process::testing::fuzz;

const BYTES_MAX: usize = 32 << 10;

fn frame(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0][..], &length[..], message].concat()
}

/// Reads `sent` in chunks of random lengths: the messages before the first error, and that error.
fn read(mutator: &mut Mutator, sent: &[u8], fields: &'static [Field]) -> (Vec<Message>, Option<Status>, bool) {
    let budget = Budget::new(1 << 30);
    let mut reader = Reader::new(MessageLimits { bytes_max: BYTES_MAX, fields }, budget.share());
    let (mut messages, mut rest) = (Vec::new(), sent);
    let longest = [1, 3, 100, 20_000][mutator.below(4)];
    while !rest.is_empty() {
        let (chunk, after) = rest.split_at((1 + mutator.below(longest)).min(rest.len()));
        rest = after;
        let mut chunk = Bytes::copy_from_slice(chunk);
        while !chunk.is_empty() {
            match reader.read(&mut chunk) {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => assert!(chunk.is_empty(), "what is left belongs to the next message"),
                Err(status) => return (messages, Some(status), false),
            }
        }
        // No more than twice what has arrived is reserved, beyond the first bytes of each message.
        if let Some((message, _)) = &reader.incomplete {
            let reserved = message.bytes.capacity();
            assert_eq!(message.charge.bytes(), reserved, "what is reserved is charged");
            assert!(reserved <= (2 * message.bytes.len()).max(FIRST_BYTES), "{reserved} for {}", message.bytes.len());
        }
    }
    (messages, None, reader.is_midway())
}

#[test]
fn messages_come_out_as_they_went_in_whatever_the_chunks() {
    fuzz(|seed| {
        let mut mutator = Mutator::new(seed);
        let count = mutator.below(6);
        let lengths: Vec<usize> = (0..count).map(|_| [0, 1, 4091, 4096, BYTES_MAX][mutator.below(5)]).collect();
        let sent: Vec<Vec<u8>> = lengths.iter().map(|length| vec![*length as u8; *length]).collect();
        let all: Vec<u8> = sent.iter().flat_map(|message| frame(message)).collect();
        let cut = if mutator.below(2) == 0 { all.len() } else { mutator.below(all.len() + 1) };
        let (messages, error, midway) = read(&mut mutator, &all[..cut], &[]);
        assert!(error.is_none(), "seed {seed}: {error:?}");
        let mut end = 0;
        let whole = sent.iter().take_while(|message| {
            end += PREFIX_BYTES + message.len();
            end <= cut
        });
        let whole: Vec<&[u8]> = whole.map(Vec::as_slice).collect();
        let read: Vec<&[u8]> = messages.iter().map(|message| &message.bytes[PREFIX_BYTES..]).collect();
        assert!(read == whole, "seed {seed}: {} of {} messages", read.len(), whole.len());
        let ends: usize = whole.iter().map(|message| PREFIX_BYTES + message.len()).sum();
        assert_eq!(midway, ends < cut, "seed {seed}");
    });
}

#[test]
fn mutated_frames_are_read_or_refused_for_a_reason() {
    fuzz(|seed| {
        let mut mutator = Mutator::new(seed);
        let (one, other) = (frame(&[1; 40]), frame(&[0x0a, 0].repeat(500)));
        let sent = mutator.mutate(&[&one[..], &other[..], &one[..]].concat(), &other);
        let (messages, error, _) = read(&mut mutator, &sent, elements::BULK);
        for message in &messages {
            assert!(message.bytes.len() <= PREFIX_BYTES + BYTES_MAX, "seed {seed}");
        }
        if let Some(status) = error {
            let expected = [Code::Unimplemented, Code::ResourceExhausted, Code::InvalidArgument];
            assert!(expected.contains(&status.code()) && !status.message().is_empty(), "seed {seed}: {status:?}");
        }
    });
}
