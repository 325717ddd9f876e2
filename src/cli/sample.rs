//! Embeddings as the protocol carries them.

use crate::api::proto::{self, palm_sample};
use crate::model::Hand;

/// One capture from an embedding. Shape of `values`: `[dim]`.
#[must_use]
pub fn sample(values: Vec<f32>, hand: Hand) -> proto::PalmSample {
    proto::PalmSample {
        content: Some(palm_sample::Content::Embedding(proto::Embedding { values })),
        hand: wire_hand(hand).into(),
    }
}

fn wire_hand(hand: Hand) -> proto::Hand {
    match hand {
        Hand::Unspecified => proto::Hand::Unspecified,
        Hand::Left => proto::Hand::Left,
        Hand::Right => proto::Hand::Right,
    }
}

/// The word for a hand of the protocol.
#[must_use]
pub fn hand_word(hand: i32) -> &'static str {
    match proto::Hand::try_from(hand) {
        Ok(proto::Hand::Left) => Hand::Left.as_str(),
        Ok(proto::Hand::Right) => Hand::Right.as_str(),
        Ok(proto::Hand::Unspecified) | Err(_) => Hand::Unspecified.as_str(),
    }
}

/// The word for a decision of the protocol.
#[must_use]
pub fn decision_word(decision: i32) -> &'static str {
    match proto::Decision::try_from(decision) {
        Ok(proto::Decision::Match) => "match",
        Ok(proto::Decision::NoMatch) => "no_match",
        Ok(proto::Decision::Inconclusive) => "inconclusive",
        Ok(proto::Decision::Unspecified) | Err(_) => "unspecified",
    }
}

/// A span of the protocol in milliseconds; 0 where it is absent or negative.
#[must_use]
pub fn milliseconds(duration: Option<prost_types::Duration>) -> f64 {
    duration.and_then(|span| std::time::Duration::try_from(span).ok()).map_or(0.0, |span| span.as_secs_f64() * 1e3)
}

/// A name that no other request has: `prefix-` and 128 random bits.
///
/// # Errors
/// Where the system has no randomness.
pub fn random_request_id(prefix: &str) -> std::io::Result<String> {
    let mut bits = [0; 16];
    getrandom::fill(&mut bits).map_err(|error| std::io::Error::other(error.to_string()))?;
    Ok(format!("{prefix}-{:032x}", u128::from_le_bytes(bits)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_codes_agree_with_the_nouns() {
        for hand in [Hand::Unspecified, Hand::Left, Hand::Right] {
            assert_eq!(hand_word(sample(vec![], hand).hand), hand.as_str());
        }
        assert_eq!(hand_word(99), "unspecified");
        assert_eq!(decision_word(proto::Decision::Match.into()), "match");
        assert_eq!(decision_word(99), "unspecified");
    }

    #[test]
    fn spans_become_milliseconds() {
        let span = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
        assert!((milliseconds(span(1, 500_000)) - 1000.5).abs() < 1e-9);
        assert!(milliseconds(None).abs() < 1e-9);
        assert!(milliseconds(span(-1, 0)).abs() < 1e-9);
    }
}
