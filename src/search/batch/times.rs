//! How long batches took lately, and so how long the next will take.

use std::time::Duration;

/// A batch that took this many times longer than those before says little: the machine was paused.
const OUTLIER: u64 = 4;
/// Sizes of batches, by powers of two, whose times are remembered.
const SIZES: usize = 16;

/// How long batches of one class take, by their size.
#[derive(Debug, Default)]
pub(super) struct BatchTimes {
    /// Nanoseconds per probe in batches of 1, 2 to 3, 4 to 7, ... probes; 0 while unknown.
    probe_nanos: [u64; SIZES],
}

impl BatchTimes {
    fn bucket(probes: usize) -> usize {
        (probes.max(1).ilog2() as usize).min(SIZES - 1)
    }

    /// Records a batch of `probes` probes.
    pub(super) fn record(&mut self, probes: usize, took: Duration) {
        let now = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX) / (probes.max(1) as u64);
        let known = &mut self.probe_nanos[Self::bucket(probes)];
        *known = match *known {
            0 => now.max(1),
            before => (before.saturating_mul(7) + now.min(before.saturating_mul(OUTLIER))) / 8,
        };
    }

    /// Time for `probes` probes in whole batches of at most `batch_max`; zero while nothing is known.
    pub(super) fn expected(&self, probes: usize, batch_max: usize) -> Duration {
        let size = probes.min(batch_max);
        let bucket = Self::bucket(size);
        // Smaller batches cost more per probe and would overestimate: what waits may become one large batch,
        // whose size is known then.
        let known = self.probe_nanos[bucket..].iter().find(|nanos| **nanos > 0);
        let in_batches = probes.div_ceil(batch_max.max(1)) * size;
        Duration::from_nanos(known.map_or(0, |nanos| nanos.saturating_mul(in_batches as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn one_pause_of_the_machine_does_not_count_as_slow() {
        let mut times = BatchTimes::default();
        (0..20).for_each(|_| times.record(1, MS));
        times.record(1, 5000 * MS);
        assert!(times.expected(1, 1) < 2 * MS);
        (0..40).for_each(|_| times.record(1, 100 * MS));
        assert!(times.expected(1, 1) > 90 * MS, "a slow one counts after a while");
        assert_eq!(BatchTimes::default().expected(100, 10), Duration::ZERO);
    }
}
