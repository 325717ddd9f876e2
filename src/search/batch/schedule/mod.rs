//! Which searches go next, with which others, and how long the rest will wait.
//!
//! Searches are divided by [`Class`]. The searches of a batch either all have a floor or all have none: a probe
//! without a floor is compared with far more rows, and probes beside it would have to wait for it. Batches
//! without a floor have low [`Priority`]: the engine lets the others go first, so that nobody waits for
//! them. Among searches with a floor the urgent ones go first, within two bounds:
//!
//! - While urgent searches arrive, batches of ordinary ones are small.
//! - After [`ORDINARY_PATIENCE`], waiting ordinary searches get one batch; after it
//!   urgent ones have the engine for [`ORDINARY_PAUSE`] times as long.
//!
//! How long a search will wait follows from how long batches took lately, by class and size. Time is
//! passed in. Knows no clock, no threads and no searches.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::BatchConfig;
use super::class::{Class, Priority};
use super::times::BatchTimes;

/// Urgent probes that are admitted however long they may take, so that an engine that needs longer than the
/// limit for a single batch gets batches nevertheless.
const ALWAYS_ADMITTED_PROBES: usize = 16;
/// An urgent batch is filled up with ordinary searches to this many probes, since they cost little more there.
const FILLED_PROBES: usize = 16;
/// For so long after an urgent search was admitted, more are expected.
const URGENT_EXPECTED: Duration = Duration::from_secs(1);
/// How long ordinary searches let urgent ones go first. When they then get a batch, urgent ones have the
/// engine for `ORDINARY_PAUSE` times as long after it.
const ORDINARY_PATIENCE: Duration = Duration::from_millis(100);
const ORDINARY_PAUSE: u32 = 3;
/// One in so many parts of the expected wait is added before it is compared with a limit: an answer that
/// is slightly late is as useless as any late answer.
const MARGIN_OF: u32 = 8;
/// Range of the time after which callers are told to try again.
const RETRY_MIN: Duration = Duration::from_millis(1);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Why a search was not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) waiting: usize,
    pub(super) retry_after: Duration,
}

struct Queued<T> {
    item: T,
    probes: usize,
    since: Instant,
}

struct ClassQueue<T> {
    entries: VecDeque<Queued<T>>,
    /// Searches and probes that have a place: queued, or soon to be.
    searches: usize,
    probes: usize,
    times: BatchTimes,
}

/// A batch that is being searched.
struct Running {
    class: Class,
    since: Instant,
    expected: Duration,
}

/// The queues before the search threads, and what is known about the time that batches take.
pub(super) struct Schedule<T> {
    config: BatchConfig,
    queues: [ClassQueue<T>; Class::ALL.len()],
    running: [Option<Running>; Priority::ALL.len()],
    urgent_last: Option<Instant>,
    /// Ordinary searches do not go before urgent ones until then.
    ordinary_from: Option<Instant>,
}

impl<T> Schedule<T> {
    pub(super) fn new(config: BatchConfig) -> Self {
        let queue = |_| ClassQueue { entries: VecDeque::new(), searches: 0, probes: 0, times: BatchTimes::default() };
        let running = Priority::ALL.map(|_| None);
        Self { config, queues: Class::ALL.map(queue), running, urgent_last: None, ordinary_from: None }
    }

    fn queue(&self, class: Class) -> &ClassQueue<T> {
        &self.queues[class as usize]
    }

    fn queue_mut(&mut self, class: Class) -> &mut ClassQueue<T> {
        &mut self.queues[class as usize]
    }

    /// Searches that have a place and are not being searched yet.
    pub(super) fn waiting(&self) -> usize {
        self.queues.iter().map(|queue| queue.searches).sum()
    }

    /// Reserves a place for a search of `probes` probes. Refuses, and says when to try again, if its class or
    /// the whole queue is full, or if it would wait longer than its deadline or the limit allows.
    pub(super) fn reserve(
        &mut self,
        class: Class,
        probes: usize,
        deadline: Option<Instant>,
        now: Instant,
    ) -> Result<(), Refused> {
        let waiting = self.waiting();
        let queue_max = self.config.queue_max;
        let expected = self.expected_wait(class, probes, now);
        let queue = self.queue(class);
        let full = waiting >= queue_max || queue.searches >= class.places(queue_max);
        let with_margin = expected + expected / MARGIN_OF;
        let over = |limit: Duration| with_margin.saturating_sub(limit);
        // An estimate for a single search is no reason to refuse it: if none waits before it, it is tried.
        let after_deadline = deadline.filter(|_| queue.probes > 0).map(|at| over(at.saturating_duration_since(now)));
        let many = class == Class::Urgent && queue.probes + probes > ALWAYS_ADMITTED_PROBES;
        let after_limit = many.then(|| over(self.config.wait_max));
        let late = after_deadline.max(after_limit).unwrap_or_default();
        if full || !late.is_zero() {
            let retry_after = if full { expected } else { late };
            return Err(Refused { waiting, retry_after: retry_after.clamp(RETRY_MIN, RETRY_MAX) });
        }
        if class == Class::Urgent {
            self.urgent_last = Some(now);
        }
        let queue = self.queue_mut(class);
        queue.searches += 1;
        queue.probes += probes;
        Ok(())
    }

    /// Gives a reserved place up.
    pub(super) fn release(&mut self, class: Class, probes: usize) {
        let queue = self.queue_mut(class);
        queue.searches -= 1;
        queue.probes -= probes;
    }

    /// Queues a search that has a place.
    pub(super) fn push(&mut self, class: Class, probes: usize, item: T, now: Instant) {
        self.queue_mut(class).entries.push_back(Queued { item, probes, since: now });
    }

    /// Drops everything that is queued.
    pub(super) fn clear(&mut self) {
        for queue in &mut self.queues {
            for queued in queue.entries.drain(..) {
                queue.searches -= 1;
                queue.probes -= queued.probes;
            }
        }
    }

    /// Searches that are queued, without those that only have a place.
    pub(super) fn queued(&self) -> usize {
        self.queues.iter().map(|queue| queue.entries.len()).sum()
    }

    /// The next batch of a priority, if anything waits. Call [`Schedule::done`] before asking for another.
    pub(super) fn next(&mut self, priority: Priority, now: Instant) -> Option<Vec<T>> {
        assert!(self.running[priority as usize].is_none(), "one batch at a time");
        let class = self.choose(priority, now)?;
        let urgent = self.urgent_last.is_some_and(|last| now.saturating_duration_since(last) < URGENT_EXPECTED);
        let all = self.config.probes_max;
        let most = if urgent { all.min(class.probes_beside_urgent()) } else { all };
        let mut batch = Vec::new();
        let mut probes = self.take(class, most, 0, &mut batch);
        if class == Class::Urgent {
            probes = self.take(Class::Ordinary, all.min(FILLED_PROBES), probes, &mut batch);
        }
        let expected = self.queue(class).times.expected(probes, all);
        self.running[priority as usize] = Some(Running { class, since: now, expected });
        Some(batch)
    }

    fn choose(&self, priority: Priority, now: Instant) -> Option<Class> {
        let waits = |class: &Class| !self.queue(*class).entries.is_empty();
        let ordinary = self.queue(Class::Ordinary).entries.front();
        let overdue = ordinary.is_some_and(|first| now.saturating_duration_since(first.since) >= ORDINARY_PATIENCE)
            && self.ordinary_from.is_none_or(|from| from <= now);
        if priority == Priority::High && overdue {
            return Some(Class::Ordinary);
        }
        Class::ALL.into_iter().filter(|class| class.priority() == priority).find(waits)
    }

    /// Moves searches to a batch, which has `probes` probes, while it has room. An empty batch takes any one
    /// search.
    fn take(&mut self, class: Class, most: usize, mut probes: usize, batch: &mut Vec<T>) -> usize {
        let queue = self.queue_mut(class);
        while let Some(next) = queue.entries.front()
            && (batch.is_empty() || probes + next.probes <= most)
        {
            let Some(Queued { item, probes: more, .. }) = queue.entries.pop_front() else { break };
            queue.searches -= 1;
            queue.probes -= more;
            probes += more;
            batch.push(item);
        }
        probes
    }

    /// The batch of a priority is done. It had `probes` probes: none if nobody waited for it any more.
    pub(super) fn done(&mut self, priority: Priority, probes: usize, now: Instant) {
        let running = self.running[priority as usize].take().expect("a batch was begun");
        let took = now.saturating_duration_since(running.since);
        if probes > 0 {
            self.queue_mut(running.class).times.record(probes, took);
        }
        if running.class == Class::Ordinary {
            self.ordinary_from = Some(now + took * ORDINARY_PAUSE);
        }
    }

    /// Time until a further search of `probes` probes would be answered.
    fn expected_wait(&self, class: Class, probes: usize, now: Instant) -> Duration {
        let all = self.config.probes_max;
        let running = self.running[class.priority() as usize].as_ref().map_or(Duration::ZERO, |running| {
            running.expected.saturating_sub(now.saturating_duration_since(running.since))
        });
        let queue = self.queue(class);
        let own = queue.times.expected(queue.probes + probes, all.min(class.probes_beside_urgent()));
        let urgent = self.queue(Class::Urgent);
        running
            + match class {
                Class::Urgent | Class::Floorless => own,
                // After the urgent ones, or in turn with those that keep coming.
                Class::Ordinary => {
                    let after = own + urgent.times.expected(urgent.probes, all);
                    after.min(ORDINARY_PATIENCE + own * (1 + ORDINARY_PAUSE))
                }
            }
    }
}
