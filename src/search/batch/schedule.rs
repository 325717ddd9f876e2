//! Which searches go next, with which others, and how long the rest will wait.
//!
//! Searches are divided by [`Class`]. A batch is of one class of floor: a probe without a floor is
//! compared with far more rows, and those beside it would wait for it. Batches without a floor have a
//! [`Priority`] of their own, whose sifts let those of the other priority go first, so that nobody waits for
//! them. In the other priority urgent searches go first, and two things bound what that means:
//!
//! - While urgent searches arrive, batches of ordinary ones are small.
//! - Ordinary searches that have waited for [`ORDINARY_PATIENCE`] have one batch in between; after it
//!   urgent ones have the engine for [`ORDINARY_PAUSE`] times as long.
//!
//! How long a search will wait follows from how long batches took lately, by class and size. Time is
//! passed in: knows no clock, no threads and no searches.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::BatchConfig;

/// Urgent probes that are admitted however long they may take: an engine that needs longer than the
/// limit for a single batch is to have batches at least.
const ALWAYS_ADMITTED_PROBES: usize = 16;
/// Probes up to which an urgent batch is filled up with ordinary ones, which cost little more there.
const FILLED_PROBES: usize = 16;
/// Urgent searches are expected for so long after one was admitted.
const URGENT_EXPECTED: Duration = Duration::from_secs(1);
/// A batch that took this many times longer than those before says little: the machine stood still.
const OUTLIER: u64 = 4;
/// How long ordinary searches let urgent ones go first, and after a batch that did not, how many times
/// as long urgent ones have the engine.
const ORDINARY_PATIENCE: Duration = Duration::from_millis(100);
const ORDINARY_PAUSE: u32 = 3;
/// Of what a batch is expected to take, so much is added before it is held against a limit: a place in
/// the queue that is late by a hair is worth as little as any.
const MARGIN_OF: u32 = 8;
/// Sizes of batches, by powers of two, whose times are remembered.
const SIZES: usize = 16;
/// The time to come back that callers are told is in this range.
const RETRY_MIN: Duration = Duration::from_millis(1);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// What a search is to those it shares the engine with. The more urgent is the lesser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// With a floor, and somebody waits at a gate or a till.
    Urgent,
    /// With a floor, for other purposes.
    Ordinary,
    /// Without a floor, or with one that rules few rows out.
    Floorless,
}

impl Class {
    const ALL: [Self; 3] = [Self::Urgent, Self::Ordinary, Self::Floorless];

    /// Where its batches are sifted.
    pub(super) fn priority(self) -> Priority {
        match self {
            Self::Urgent | Self::Ordinary => Priority::High,
            Self::Floorless => Priority::Low,
        }
    }

    /// Probes of a batch while urgent searches arrive: an engine may not be able to let them go first.
    fn probes_beside_urgent(self) -> usize {
        match self {
            Self::Urgent => usize::MAX,
            Self::Ordinary => 32,
            Self::Floorless => crate::model::PROBES_MAX,
        }
    }

    /// Of the places in the queue, how many this class may have.
    fn places(self, queue_max: usize) -> usize {
        match self {
            Self::Urgent => queue_max,
            Self::Ordinary => queue_max.div_ceil(2),
            Self::Floorless => queue_max.div_ceil(4),
        }
    }
}

/// One of two threads that search.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// For searches with a floor.
    High,
    /// For the others, which let those go first.
    Low,
}

impl Priority {
    pub(super) const ALL: [Self; 2] = [Self::High, Self::Low];
}

/// How long batches of one class take, by their size.
#[derive(Debug, Default)]
struct Pace {
    /// Nanoseconds a probe in batches of 1, 2 to 3, 4 to 7, ... probes; 0 while unknown.
    probe_nanos: [u64; SIZES],
}

impl Pace {
    fn bucket(probes: usize) -> usize {
        (probes.max(1).ilog2() as usize).min(SIZES - 1)
    }

    fn took(&mut self, probes: usize, took: Duration) {
        let now = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX) / (probes.max(1) as u64);
        let known = &mut self.probe_nanos[Self::bucket(probes)];
        *known = match *known {
            0 => now.max(1),
            before => (before.saturating_mul(7) + now.min(before.saturating_mul(OUTLIER))) / 8,
        };
    }

    /// Time for `probes` probes in whole batches of at most `batch_max`; zero while nothing is known.
    fn expected(&self, probes: usize, batch_max: usize) -> Duration {
        let size = probes.min(batch_max);
        let bucket = Self::bucket(size);
        // Smaller batches cost more a probe and would say too much: what waits may be one large batch,
        // which then is known.
        let known = self.probe_nanos[bucket..].iter().find(|nanos| **nanos > 0);
        let in_batches = probes.div_ceil(batch_max.max(1)) * size;
        Duration::from_nanos(known.map_or(0, |nanos| nanos.saturating_mul(in_batches as u64)))
    }
}

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

struct Line<T> {
    queue: VecDeque<Queued<T>>,
    /// Searches and probes that have a place: queued, or soon to be.
    searches: usize,
    probes: usize,
    pace: Pace,
}

/// What a priority is at.
struct Running {
    class: Class,
    since: Instant,
    expected: Duration,
}

/// The queues before the search thread, and what is known about their speed.
pub(super) struct Schedule<T> {
    config: BatchConfig,
    lines: [Line<T>; Class::ALL.len()],
    running: [Option<Running>; Priority::ALL.len()],
    urgent_last: Option<Instant>,
    /// Not before this do ordinary searches go before urgent ones.
    ordinary_from: Option<Instant>,
}

impl<T> Schedule<T> {
    pub(super) fn new(config: BatchConfig) -> Self {
        let line = |_| Line { queue: VecDeque::new(), searches: 0, probes: 0, pace: Pace::default() };
        let running = Priority::ALL.map(|_| None);
        Self { config, lines: Class::ALL.map(line), running, urgent_last: None, ordinary_from: None }
    }

    fn line(&self, class: Class) -> &Line<T> {
        &self.lines[class as usize]
    }

    fn line_mut(&mut self, class: Class) -> &mut Line<T> {
        &mut self.lines[class as usize]
    }

    /// Searches that have a place and are not in the engine.
    pub(super) fn waiting(&self) -> usize {
        self.lines.iter().map(|line| line.searches).sum()
    }

    /// Reserves a place for a search of `probes` probes, or says when to come back: where its class or
    /// all have no place left, or it would wait for longer than its deadline or the limit.
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
        let line = self.line(class);
        let full = waiting >= queue_max || line.searches >= class.places(queue_max);
        let with_margin = expected + expected / MARGIN_OF;
        let over = |limit: Duration| with_margin.saturating_sub(limit);
        // Nobody is turned away on a guess about a single search: with none before it, it is tried.
        let after_deadline = deadline.filter(|_| line.probes > 0).map(|at| over(at.saturating_duration_since(now)));
        let many = class == Class::Urgent && line.probes + probes > ALWAYS_ADMITTED_PROBES;
        let after_limit = many.then(|| over(self.config.wait_max));
        let late = after_deadline.max(after_limit).unwrap_or_default();
        if full || !late.is_zero() {
            let retry_after = if full { expected } else { late };
            return Err(Refused { waiting, retry_after: retry_after.clamp(RETRY_MIN, RETRY_MAX) });
        }
        if class == Class::Urgent {
            self.urgent_last = Some(now);
        }
        let line = self.line_mut(class);
        line.searches += 1;
        line.probes += probes;
        Ok(())
    }

    /// Gives a reserved place up.
    pub(super) fn release(&mut self, class: Class, probes: usize) {
        let line = self.line_mut(class);
        line.searches -= 1;
        line.probes -= probes;
    }

    /// Queues a search that has a place.
    pub(super) fn push(&mut self, class: Class, probes: usize, item: T, now: Instant) {
        self.line_mut(class).queue.push_back(Queued { item, probes, since: now });
    }

    /// Drops everything that is queued.
    pub(super) fn clear(&mut self) {
        for line in &mut self.lines {
            for queued in line.queue.drain(..) {
                line.searches -= 1;
                line.probes -= queued.probes;
            }
        }
    }

    /// Searches that are queued, without those that only have a place.
    pub(super) fn queued(&self) -> usize {
        self.lines.iter().map(|line| line.queue.len()).sum()
    }

    /// The next batch of a priority, if anything waits. [`Schedule::done`] follows before the one after.
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
        let expected = self.line(class).pace.expected(probes, all);
        self.running[priority as usize] = Some(Running { class, since: now, expected });
        Some(batch)
    }

    fn choose(&self, priority: Priority, now: Instant) -> Option<Class> {
        let waits = |class: &Class| !self.line(*class).queue.is_empty();
        let ordinary = self.line(Class::Ordinary).queue.front();
        let overdue = ordinary.is_some_and(|first| now.saturating_duration_since(first.since) >= ORDINARY_PATIENCE)
            && self.ordinary_from.is_none_or(|from| from <= now);
        if priority == Priority::High && overdue {
            return Some(Class::Ordinary);
        }
        Class::ALL.into_iter().filter(|class| class.priority() == priority).find(waits)
    }

    /// Moves searches to a batch of `probes` probes while it has room; one always fits an empty batch.
    fn take(&mut self, class: Class, most: usize, mut probes: usize, batch: &mut Vec<T>) -> usize {
        let line = self.line_mut(class);
        while let Some(next) = line.queue.front()
            && (batch.is_empty() || probes + next.probes <= most)
        {
            let Some(Queued { item, probes: more, .. }) = line.queue.pop_front() else { break };
            line.searches -= 1;
            line.probes -= more;
            probes += more;
            batch.push(item);
        }
        probes
    }

    /// A priority's batch is done; it had `probes` probes, none where nobody waited for it any more.
    pub(super) fn done(&mut self, priority: Priority, probes: usize, now: Instant) {
        let running = self.running[priority as usize].take().expect("a batch was begun");
        let took = now.saturating_duration_since(running.since);
        if probes > 0 {
            self.line_mut(running.class).pace.took(probes, took);
        }
        if running.class == Class::Ordinary {
            self.ordinary_from = Some(now + took * ORDINARY_PAUSE);
        }
    }

    /// From now until a further search of `probes` probes would be answered.
    fn expected_wait(&self, class: Class, probes: usize, now: Instant) -> Duration {
        let all = self.config.probes_max;
        let running = self.running[class.priority() as usize].as_ref().map_or(Duration::ZERO, |running| {
            running.expected.saturating_sub(now.saturating_duration_since(running.since))
        });
        let line = self.line(class);
        let own = line.pace.expected(line.probes + probes, all.min(class.probes_beside_urgent()));
        let urgent = self.line(Class::Urgent);
        running
            + match class {
                Class::Urgent | Class::Floorless => own,
                // After the urgent ones, or by turns with those that keep coming.
                Class::Ordinary => {
                    let after = own + urgent.pace.expected(urgent.probes, all);
                    after.min(ORDINARY_PATIENCE + own * (1 + ORDINARY_PAUSE))
                }
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn config(queue_max: usize, probes_max: usize) -> BatchConfig {
        BatchConfig { queue_max, probes_max, wait_max: 500 * MS }
    }

    /// An engine on a clock of its own, with a priority that a batch occupies for `batch`, and `probe`
    /// longer for each probe.
    struct Bench {
        schedule: Schedule<(Class, Instant)>,
        priority: Priority,
        now: Instant,
        start: Instant,
        batch: Duration,
        probe: Duration,
        /// Class, and from arrival to answer.
        answered: Vec<(Class, Duration)>,
        /// Class of the first and probes of each batch.
        batches: Vec<(Class, usize)>,
        refused: Vec<(Class, Refused)>,
    }

    impl Bench {
        fn new(config: BatchConfig, priority: Priority) -> Self {
            let start = Instant::now();
            Self {
                schedule: Schedule::new(config),
                priority,
                now: start,
                start,
                batch: MS,
                probe: MS / 4,
                answered: Vec::new(),
                batches: Vec::new(),
                refused: Vec::new(),
            }
        }

        fn arrive(&mut self, class: Class, deadline: Option<Duration>, at: Instant) {
            match self.schedule.reserve(class, 1, deadline.map(|d| at + d), at) {
                Ok(()) => self.schedule.push(class, 1, (class, at), at),
                Err(refused) => self.refused.push((class, refused)),
            }
        }

        /// One batch, during which `arrivals` (class and time from the start) come.
        fn step(&mut self, arrivals: &mut VecDeque<(Class, Duration)>, deadline: Option<Duration>) -> bool {
            let mut arrive_until = |bench: &mut Self, until: Instant| {
                while let Some((class, at)) = arrivals.front().copied().filter(|(_, at)| bench.start + *at <= until) {
                    arrivals.pop_front();
                    bench.arrive(class, deadline, bench.start + at);
                }
                arrivals.front().map(|(_, at)| bench.start + *at)
            };
            let next = arrive_until(self, self.now);
            let Some(batch) = self.schedule.next(self.priority, self.now) else {
                self.now = next.unwrap_or(self.now);
                return next.is_some();
            };
            let until = self.now + self.batch + self.probe * u32::try_from(batch.len()).unwrap();
            arrive_until(self, until);
            self.now = until;
            self.schedule.done(self.priority, batch.len(), until);
            self.batches.push((batch[0].0, batch.len()));
            self.answered.extend(batch.into_iter().map(|(class, since)| (class, until - since)));
            true
        }

        fn run(&mut self, arrivals: Vec<(Class, Duration)>, deadline: Option<Duration>) {
            let mut arrivals = VecDeque::from(arrivals);
            while self.step(&mut arrivals, deadline) {}
        }

        fn p99(&self, class: Class) -> Duration {
            let mut took: Vec<Duration> = self.answered.iter().filter(|(c, _)| *c == class).map(|(_, t)| *t).collect();
            took.sort_unstable();
            took[took.len() * 99 / 100]
        }
    }

    /// `rate` a second for `seconds`, evenly but for a shift that is different each time.
    fn arrivals(of: &[(Class, f64)], seconds: f64) -> Vec<(Class, Duration)> {
        let mut all = Vec::new();
        for (class, rate) in of {
            for i in 0..(rate * seconds) as u32 {
                let shift = f64::from(i.wrapping_mul(2_654_435_769) >> 8) / f64::from(1 << 24);
                all.push((*class, Duration::from_secs_f64((f64::from(i) + shift) / rate)));
            }
        }
        all.sort_by_key(|(_, at)| *at);
        all
    }

    #[test]
    fn a_batch_is_of_one_class_of_floor_and_the_urgent_go_first() {
        let mut bench = Bench::new(config(64, 32), Priority::High);
        let ordinary = std::iter::repeat_n(Class::Ordinary, 20);
        for class in [Class::Floorless].into_iter().chain(ordinary).chain([Class::Urgent, Class::Urgent]) {
            bench.arrive(class, None, bench.start);
        }
        bench.run(Vec::new(), None);
        // Ordinary ones fill an urgent batch up to where they would hold it up.
        assert_eq!(bench.batches, [(Class::Urgent, FILLED_PROBES), (Class::Ordinary, 6)]);
        bench.priority = Priority::Low;
        bench.run(Vec::new(), None);
        assert_eq!(bench.batches[2..], [(Class::Floorless, 1)], "floorless ones never do");
    }

    #[test]
    fn other_batches_are_small_while_urgent_searches_arrive_and_large_when_none_do() {
        let first_of_60 = |class: Class, after_urgent: Option<Duration>| {
            let mut bench = Bench::new(config(256, 64), Priority::High);
            if let Some(after) = after_urgent {
                bench.arrive(Class::Urgent, None, bench.start);
                bench.run(Vec::new(), None);
                bench.now = bench.start + after;
            }
            bench.priority = class.priority();
            bench.batches.clear();
            (0..60).for_each(|_| bench.arrive(class, None, bench.now));
            bench.run(Vec::new(), None);
            bench.batches[0]
        };
        for (class, beside_urgent) in [(Class::Ordinary, 32), (Class::Floorless, 4), (Class::Urgent, 60)] {
            assert_eq!(first_of_60(class, None), (class, 60));
            assert_eq!(first_of_60(class, Some(URGENT_EXPECTED)), (class, 60));
            assert_eq!(first_of_60(class, Some(URGENT_EXPECTED / 2)), (class, beside_urgent));
        }
    }

    #[test]
    fn ordinary_searches_do_not_starve_and_the_urgent_keep_most_of_the_engine() {
        let mut bench = Bench::new(config(1024, 256), Priority::High);
        // Twice what the engine can do for the urgent alone, and more ordinary ones than it could do.
        bench.run(arrivals(&[(Class::Urgent, 8000.0), (Class::Ordinary, 5000.0)], 4.0), None);
        let took = |of: Class| -> Duration {
            let of = bench.batches.iter().filter(move |(class, _)| *class == of);
            of.map(|(_, size)| bench.batch + bench.probe * u32::try_from(*size).unwrap()).sum()
        };
        let (urgent, ordinary) = (took(Class::Urgent), took(Class::Ordinary));
        let all = urgent + ordinary;
        assert!(ordinary > all / 20 && ordinary < all / 3, "{ordinary:?} of {all:?}");
        assert!(bench.p99(Class::Urgent) < 700 * MS, "{:?}", bench.p99(Class::Urgent));
        // At a load that the engine can bear, they hardly hold an urgent one up.
        let p99 = |of: &[(Class, f64)]| {
            let mut bench = Bench::new(config(1024, 256), Priority::High);
            bench.run(arrivals(of, 10.0), None);
            assert!(bench.refused.is_empty());
            bench.p99(Class::Urgent)
        };
        let (without, with) =
            (p99(&[(Class::Urgent, 1000.0)]), p99(&[(Class::Urgent, 1000.0), (Class::Ordinary, 100.0)]));
        assert!(with < without * 13 / 10, "{with:?} with, {without:?} without");
    }

    #[test]
    fn at_three_times_capacity_what_is_admitted_is_answered_in_time_and_the_engine_never_idles() {
        // Batches of 64 take 17 ms: 3,765 a second.
        let (deadline, capacity) = (300 * MS, 3765.0 * 5.0);
        let mut bench = Bench::new(config(65_536, 64), Priority::High);
        bench.run(arrivals(&[(Class::Urgent, 11_300.0)], 5.0), Some(deadline));
        let in_time = bench.answered.iter().filter(|(_, took)| *took <= deadline).count();
        assert!(in_time as f64 > 0.9 * capacity, "{in_time} of {capacity}");
        let late = bench.answered.len() - in_time;
        assert!((late as f64) < 0.02 * capacity, "{late} were admitted and late");
        assert!(!bench.refused.is_empty());
        for (_, refused) in &bench.refused {
            assert!((RETRY_MIN..=RETRY_MAX).contains(&refused.retry_after), "{refused:?}");
        }
        // Without a deadline the limit of the configuration holds.
        let mut bench = Bench::new(config(65_536, 64), Priority::High);
        bench.run(arrivals(&[(Class::Urgent, 11_300.0)], 5.0), None);
        assert!(bench.p99(Class::Urgent) < 520 * MS, "{:?}", bench.p99(Class::Urgent));
        assert!(bench.answered.len() as f64 > 0.9 * capacity, "{}", bench.answered.len());
    }

    #[test]
    fn an_engine_that_is_slower_than_every_limit_still_gets_batches() {
        let mut bench = Bench::new(config(1024, 256), Priority::High);
        (bench.batch, bench.probe) = (2000 * MS, 10 * MS);
        bench.run(arrivals(&[(Class::Urgent, 20.0)], 60.0), None);
        let (_, size) = bench.batches[bench.batches.len() - 2];
        assert!(size >= ALWAYS_ADMITTED_PROBES - 1, "{size}");
    }

    #[test]
    fn places_are_limited_in_all_and_for_each_class() {
        let mut bench = Bench::new(config(8, 4), Priority::High);
        (0..3).for_each(|_| bench.arrive(Class::Floorless, None, bench.start));
        assert_eq!(bench.refused.len(), 1, "two of eight places");
        (0..7).for_each(|_| bench.arrive(Class::Urgent, None, bench.start));
        assert_eq!(bench.refused.len(), 2, "six are left for others");
        assert_eq!(bench.refused[1].1.waiting, 8);
        let place = |bench: &mut Bench| bench.schedule.reserve(Class::Urgent, 1, None, bench.start);
        bench.schedule.next(Priority::High, bench.start).unwrap();
        assert!(place(&mut bench).is_ok(), "who is in the engine does not wait");
        bench.schedule.release(Class::Urgent, 1);
        assert!(place(&mut bench).is_ok(), "a place given up is free");
        bench.schedule.clear();
        assert_eq!((bench.schedule.queued(), bench.schedule.waiting()), (0, 1), "what is queued is dropped");
    }

    #[test]
    fn a_machine_that_stood_still_once_is_not_taken_for_slow() {
        let mut pace = Pace::default();
        (0..20).for_each(|_| pace.took(1, MS));
        pace.took(1, 5000 * MS);
        assert!(pace.expected(1, 1) < 2 * MS);
        (0..40).for_each(|_| pace.took(1, 100 * MS));
        assert!(pace.expected(1, 1) > 90 * MS, "one that is slow is, after a while");
        assert_eq!(Pace::default().expected(100, 10), Duration::ZERO);
    }
}
