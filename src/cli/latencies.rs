//! How long calls took, in a histogram of microseconds with three digits.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Longest time, in microseconds, that is told apart from longer ones.
const LONGEST_US: u64 = 600_000_000;

/// The latencies of some calls.
#[derive(Debug, Clone)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        let histogram = Histogram::new_with_bounds(1, LONGEST_US, 3);
        Self(histogram.unwrap_or_else(|error| unreachable!("the bounds are in range: {error}")))
    }
}

impl Latencies {
    /// Counts a call.
    pub fn add(&mut self, took: Duration) {
        self.0.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1));
    }

    /// Counts the calls of `other` too.
    pub fn add_all(&mut self, other: &Self) {
        self.0 += &other.0;
    }

    /// Calls counted.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.0.len()
    }

    /// The milliseconds that this share of the calls did not exceed.
    #[must_use]
    pub fn ms(&self, share: f64) -> f64 {
        self.0.value_at_quantile(share) as f64 / 1e3
    }

    /// Upper end of each bucket that is not empty, in microseconds, and the calls in it.
    #[must_use]
    pub fn buckets_us(&self) -> Vec<(u64, u64)> {
        self.0.iter_recorded().map(|b| (b.value_iterated_to(), b.count_since_last_iteration())).collect()
    }
}
