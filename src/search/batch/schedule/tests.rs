//! Arrivals and an engine that are simulated, on a clock of their own.

use super::*;

const MS: Duration = Duration::from_millis(1);

fn config(queue_max: usize, probes_max: usize) -> BatchConfig {
    BatchConfig { queue_max, probes_max, wait_max: 500 * MS }
}

/// An engine on a clock of its own. A batch takes it for `batch`, and `probe` longer for each probe.
struct Simulation {
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

impl Simulation {
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

    /// One batch, during which `arrivals` (class and time from the start) happen.
    fn step(&mut self, arrivals: &mut VecDeque<(Class, Duration)>, deadline: Option<Duration>) -> bool {
        let mut arrive_until = |sim: &mut Self, until: Instant| {
            while let Some((class, at)) = arrivals.front().copied().filter(|(_, at)| sim.start + *at <= until) {
                arrivals.pop_front();
                sim.arrive(class, deadline, sim.start + at);
            }
            arrivals.front().map(|(_, at)| sim.start + *at)
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

/// `rate` per second for `seconds`, evenly but for a shift that is different each time.
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
    let mut sim = Simulation::new(config(64, 32), Priority::High);
    let ordinary = std::iter::repeat_n(Class::Ordinary, 20);
    for class in [Class::Floorless].into_iter().chain(ordinary).chain([Class::Urgent, Class::Urgent]) {
        sim.arrive(class, None, sim.start);
    }
    sim.run(Vec::new(), None);
    // Ordinary ones fill an urgent batch up to where they would hold it up.
    assert_eq!(sim.batches, [(Class::Urgent, FILLED_PROBES), (Class::Ordinary, 6)]);
    sim.priority = Priority::Low;
    sim.run(Vec::new(), None);
    assert_eq!(sim.batches[2..], [(Class::Floorless, 1)], "floorless ones never do");
}

#[test]
fn other_batches_are_small_while_urgent_searches_arrive_and_large_when_none_do() {
    let first_of_60 = |class: Class, after_urgent: Option<Duration>| {
        let mut sim = Simulation::new(config(256, 64), Priority::High);
        if let Some(after) = after_urgent {
            sim.arrive(Class::Urgent, None, sim.start);
            sim.run(Vec::new(), None);
            sim.now = sim.start + after;
        }
        sim.priority = class.priority();
        sim.batches.clear();
        (0..60).for_each(|_| sim.arrive(class, None, sim.now));
        sim.run(Vec::new(), None);
        sim.batches[0]
    };
    for (class, beside_urgent) in [(Class::Ordinary, 32), (Class::Floorless, 4), (Class::Urgent, 60)] {
        assert_eq!(first_of_60(class, None), (class, 60));
        assert_eq!(first_of_60(class, Some(URGENT_EXPECTED)), (class, 60));
        assert_eq!(first_of_60(class, Some(URGENT_EXPECTED / 2)), (class, beside_urgent));
    }
}

#[test]
fn ordinary_searches_do_not_starve_and_the_urgent_keep_most_of_the_engine() {
    let mut sim = Simulation::new(config(1024, 256), Priority::High);
    // Twice what the engine can do for the urgent alone, and more ordinary ones than it could do.
    sim.run(arrivals(&[(Class::Urgent, 8000.0), (Class::Ordinary, 5000.0)], 4.0), None);
    let took = |of: Class| -> Duration {
        let of = sim.batches.iter().filter(move |(class, _)| *class == of);
        of.map(|(_, size)| sim.batch + sim.probe * u32::try_from(*size).unwrap()).sum()
    };
    let (urgent, ordinary) = (took(Class::Urgent), took(Class::Ordinary));
    let all = urgent + ordinary;
    assert!(ordinary > all / 20 && ordinary < all / 3, "{ordinary:?} of {all:?}");
    assert!(sim.p99(Class::Urgent) < 700 * MS, "{:?}", sim.p99(Class::Urgent));
    // At a load that the engine can bear, they hardly hold an urgent one up.
    let p99 = |of: &[(Class, f64)]| {
        let mut sim = Simulation::new(config(1024, 256), Priority::High);
        sim.run(arrivals(of, 10.0), None);
        assert!(sim.refused.is_empty());
        sim.p99(Class::Urgent)
    };
    let (without, with) = (p99(&[(Class::Urgent, 1000.0)]), p99(&[(Class::Urgent, 1000.0), (Class::Ordinary, 100.0)]));
    assert!(with < without * 13 / 10, "{with:?} with, {without:?} without");
}

#[test]
fn at_three_times_capacity_what_is_admitted_is_answered_in_time_and_the_engine_never_idles() {
    // Batches of 64 take 17 ms: 3,765 a second.
    let (deadline, capacity) = (300 * MS, 3765.0 * 5.0);
    let mut sim = Simulation::new(config(65_536, 64), Priority::High);
    sim.run(arrivals(&[(Class::Urgent, 11_300.0)], 5.0), Some(deadline));
    let in_time = sim.answered.iter().filter(|(_, took)| *took <= deadline).count();
    assert!(in_time as f64 > 0.9 * capacity, "{in_time} of {capacity}");
    let late = sim.answered.len() - in_time;
    assert!((late as f64) < 0.02 * capacity, "{late} were admitted and late");
    assert!(!sim.refused.is_empty());
    for (_, refused) in &sim.refused {
        assert!((RETRY_MIN..=RETRY_MAX).contains(&refused.retry_after), "{refused:?}");
    }
    // Without a deadline the limit of the configuration holds.
    let mut sim = Simulation::new(config(65_536, 64), Priority::High);
    sim.run(arrivals(&[(Class::Urgent, 11_300.0)], 5.0), None);
    assert!(sim.p99(Class::Urgent) < 520 * MS, "{:?}", sim.p99(Class::Urgent));
    assert!(sim.answered.len() as f64 > 0.9 * capacity, "{}", sim.answered.len());
}

#[test]
fn an_engine_that_is_slower_than_every_limit_still_gets_batches() {
    let mut sim = Simulation::new(config(1024, 256), Priority::High);
    (sim.batch, sim.probe) = (2000 * MS, 10 * MS);
    sim.run(arrivals(&[(Class::Urgent, 20.0)], 60.0), None);
    let (_, size) = sim.batches[sim.batches.len() - 2];
    assert!(size >= ALWAYS_ADMITTED_PROBES - 1, "{size}");
}

#[test]
fn places_are_limited_in_all_and_for_each_class() {
    let mut sim = Simulation::new(config(8, 4), Priority::High);
    (0..3).for_each(|_| sim.arrive(Class::Floorless, None, sim.start));
    assert_eq!(sim.refused.len(), 1, "two of eight places");
    (0..7).for_each(|_| sim.arrive(Class::Urgent, None, sim.start));
    assert_eq!(sim.refused.len(), 2, "six are left for others");
    assert_eq!(sim.refused[1].1.waiting, 8);
    let place = |sim: &mut Simulation| sim.schedule.reserve(Class::Urgent, 1, None, sim.start);
    sim.schedule.next(Priority::High, sim.start).unwrap();
    assert!(place(&mut sim).is_ok(), "what is being searched does not wait");
    sim.schedule.release(Class::Urgent, 1);
    assert!(place(&mut sim).is_ok(), "a place given up is free");
    sim.schedule.clear();
    assert_eq!((sim.schedule.queued(), sim.schedule.waiting()), (0, 1), "what is queued is dropped");
}
