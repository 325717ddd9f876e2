//! Policies: pure functions from scores to a decision.
//!
//! Knows no subjects, no clocks and no I/O, so every rule can be tested by a table.

pub use crate::model::Decision;
use crate::model::{Invalid, Purpose};

/// What a match for one purpose requires.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// The least fused score of a match. Cosine, -1 to 1.
    pub threshold: f64,
    /// How far the best subject's score must be above the next. 0 to 1.
    pub margin: f64,
}

impl Policy {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Invalid`] if the threshold is not within -1..=1 or the margin not within 0..=1.
    pub fn new(threshold: f64, margin: f64) -> Result<Self, Invalid> {
        checked_threshold(threshold)?;
        if !(0.0..=1.0).contains(&margin) {
            return Err(Invalid::new("margin", format!("{margin} is not from 0 to 1")));
        }
        Ok(Self { threshold, margin })
    }

    /// This policy for a request with its own threshold, which can make it stricter, never laxer.
    #[must_use]
    pub fn at_least(self, threshold: Option<f64>) -> Self {
        Self { threshold: threshold.map_or(self.threshold, |t| t.max(self.threshold)), ..self }
    }

    /// The lowest score that can change the decision.
    #[must_use]
    pub fn lowest_that_matters(self) -> f64 {
        self.threshold - self.margin
    }
}

/// Checks that a score can reach this threshold.
///
/// # Errors
/// [`Invalid`] if it is not a number from -1 to 1.
pub fn checked_threshold(threshold: f64) -> Result<f64, Invalid> {
    if (-1.0..=1.0).contains(&threshold) {
        Ok(threshold)
    } else {
        Err(Invalid::new("threshold", format!("{threshold} is not from -1 to 1")))
    }
}

/// One policy per purpose.
#[derive(Debug, Clone, PartialEq)]
pub struct Policies([Policy; Purpose::ALL.len()]);

impl Policies {
    /// The policy of each purpose from a function.
    pub fn from_fn(policy: impl FnMut(Purpose) -> Policy) -> Self {
        Self(Purpose::ALL.map(policy))
    }

    /// The policy of `purpose`.
    #[must_use]
    pub fn of(&self, purpose: Purpose) -> Policy {
        self.0[purpose as usize]
    }
}

/// A decision, and how many of the ranked candidates are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// The decision.
    pub decision: Decision,
    /// This many of the first candidates are listed.
    pub listed: usize,
}

/// Decides by `policy` from the fused scores of different subjects, best first.
///
/// Lists the candidates at or above `list_from` and, if the decision is inconclusive, also those within
/// the margin of the best, so that the client sees why.
#[must_use]
pub fn decide(policy: Policy, list_from: f64, ranked: &[f64]) -> Verdict {
    debug_assert!(ranked.is_sorted_by(|a, b| a >= b), "candidates come ranked");
    let listed = ranked.partition_point(|s| *s >= list_from);
    let Some(&best) = ranked.first().filter(|best| **best >= policy.threshold) else {
        return Verdict { decision: Decision::NoMatch, listed };
    };
    let close = ranked.partition_point(|s| *s >= best || best - *s < policy.margin);
    if close > 1 {
        Verdict { decision: Decision::Inconclusive, listed: listed.max(close) }
    } else {
        Verdict { decision: Decision::Match, listed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn policy() -> Policy {
        Policy::new(0.6, 0.05).unwrap()
    }

    #[test]
    fn decisions_follow_the_table() {
        use Decision::{Inconclusive, Match, NoMatch};
        for (ranked, decision, listed) in [
            (&[][..], NoMatch, 0),
            (&[0.59], NoMatch, 0),
            (&[0.6], Match, 1),
            (&[0.8, 0.3], Match, 1),
            (&[0.8, 0.75], Match, 2),
            (&[0.8, 0.76], Inconclusive, 2),
            (&[0.62, 0.58], Inconclusive, 2),
            (&[0.62, 0.58, 0.56], Inconclusive, 2),
            (&[0.7, 0.7], Inconclusive, 2),
        ] {
            assert_eq!(decide(policy(), 0.6, ranked), Verdict { decision, listed }, "{ranked:?}");
        }
    }

    #[test]
    fn equal_scores_are_inconclusive_even_without_a_margin() {
        let policy = Policy::new(0.6, 0.0).unwrap();
        assert_eq!(decide(policy, 0.6, &[0.9, 0.9]).decision, Decision::Inconclusive);
        assert_eq!(decide(policy, 0.6, &[0.9, 0.8999]).decision, Decision::Match);
    }

    #[test]
    fn a_request_can_be_stricter_but_not_laxer() {
        assert_eq!(policy().at_least(Some(0.2)).threshold, 0.6);
        assert_eq!(policy().at_least(Some(0.9)).threshold, 0.9);
        assert_eq!(policy().at_least(None).threshold, 0.6);
    }

    #[test]
    fn a_lower_listing_floor_lists_more_and_decides_the_same() {
        let verdict = decide(policy(), -1.0, &[0.8, 0.3, -0.2]);
        assert_eq!(verdict, Verdict { decision: Decision::Match, listed: 3 });
    }

    #[test]
    fn policies_out_of_range_are_refused_by_name() {
        assert_eq!(Policy::new(f64::NAN, 0.0).unwrap_err().field, "threshold");
        assert_eq!(Policy::new(1.01, 0.0).unwrap_err().field, "threshold");
        assert_eq!(Policy::new(0.5, -0.1).unwrap_err().field, "margin");
        assert_eq!(Policy::new(0.5, f64::NAN).unwrap_err().field, "margin");
    }

    proptest! {
        #[test]
        fn nobody_below_the_threshold_ever_matches(
            mut scores in proptest::collection::vec(-1.0_f64..1.0, 0..20),
            threshold in -1.0_f64..1.0,
            margin in 0.0_f64..0.5,
        ) {
            scores.sort_by(|a, b| b.total_cmp(a));
            let verdict = decide(Policy::new(threshold, margin).unwrap(), threshold, &scores);
            let reached = scores.first().is_some_and(|s| *s >= threshold);
            prop_assert_eq!(verdict.decision == Decision::NoMatch, !reached);
            if verdict.decision == Decision::Match {
                prop_assert!(scores.iter().skip(1).all(|s| scores[0] - s >= margin));
            }
        }

        #[test]
        fn what_a_search_may_leave_out_never_changes_the_decision(
            mut scores in proptest::collection::vec(-1.0_f64..1.0, 0..20),
            threshold in -0.5_f64..1.0,
            margin in 0.0_f64..0.5,
        ) {
            scores.sort_by(|a, b| b.total_cmp(a));
            let policy = Policy::new(threshold, margin).unwrap();
            let kept: Vec<f64> = scores.iter().copied().filter(|s| *s >= policy.lowest_that_matters()).collect();
            prop_assert_eq!(decide(policy, threshold, &scores), decide(policy, threshold, &kept));
        }
    }
}
