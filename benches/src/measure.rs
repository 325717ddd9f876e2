//! Turns: every peer answers in turn, round after round, so that what disturbs the machine
//! disturbs them all.
//!
//! Knows peers and clocks; does not know galleries.

use std::ops::Range;
use std::time::Duration;

use crate::gallery::Probes;
use crate::peer::{Peer, Stages};
use crate::truth::Judge;

/// Pause before a turn: threads of the peer before that still spin in wait for work give up.
const PAUSE: Duration = Duration::from_millis(150);
/// Calls of a turn at most, so that answers are judged in moderate time.
const CALLS_MAX: usize = 64;

/// How long to measure.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Rounds; each peer has a turn in each.
    pub rounds: usize,
    /// Time a turn should take; one call at least.
    pub turn: Duration,
}

/// What the turns of one peer came to.
#[derive(Debug, Clone)]
pub struct Figures {
    /// Probes answered a second in each round.
    pub rates: Vec<f64>,
    /// Seconds of every call.
    pub calls: Vec<f64>,
    /// Median seconds of the stages, where the peer can tell.
    pub stages: Option<Stages>,
}

impl Figures {
    /// Median rate.
    #[must_use]
    pub fn searches_per_second(&self) -> f64 {
        median(&self.rates)
    }

    /// Median latency of a call.
    #[must_use]
    pub fn latency_ms_p50(&self) -> f64 {
        median(&self.calls) * 1e3
    }

    /// How many times faster than `other`, as the median over the rounds: both had a turn in each.
    #[must_use]
    pub fn ratio_to(&self, other: &Self) -> f64 {
        let ratios: Vec<f64> = self.rates.iter().zip(&other.rates).map(|(own, other)| own / other).collect();
        median(&ratios)
    }
}

/// Lets every peer answer batches of `batch` probes, and its judge look at every answer.
///
/// # Errors
/// Where a peer fails.
pub fn interleaved(
    peers: &mut [Box<dyn Peer>],
    judges: &mut [Judge<'_>],
    probes: &Probes,
    batch: usize,
    k: usize,
    pace: Pace,
) -> anyhow::Result<Vec<Figures>> {
    let places = probes.len() / batch;
    let place = |call: usize| -> Range<usize> {
        let first = call % places * batch;
        first..first + batch
    };
    let mut next = vec![0; peers.len()];
    let mut calls_a_turn = Vec::with_capacity(peers.len());
    for (peer, judge) in peers.iter_mut().zip(judges.iter_mut()) {
        // The first call warms up and tells how many fill a turn.
        let first = peer.turn(probes, &[place(0)], k)?;
        let second = peer.turn(probes, &[place(0)], k)?;
        first.iter().chain(&second).for_each(|call| judge.take(&call.answered));
        let calls = pace.turn.as_secs_f64() / second[0].seconds.max(1e-9);
        calls_a_turn.push((calls.ceil() as usize).clamp(1, CALLS_MAX));
    }
    let none = || Figures { rates: Vec::new(), calls: Vec::new(), stages: None };
    let mut figures: Vec<Figures> = peers.iter().map(|_| none()).collect();
    let mut stages: Vec<Vec<Stages>> = vec![Vec::new(); peers.len()];
    for round in 0..pace.rounds {
        for step in 0..peers.len() {
            // Who is first changes from round to round.
            let at = (step + round) % peers.len();
            std::thread::sleep(PAUSE);
            let ranges: Vec<_> = (0..calls_a_turn[at]).map(|call| place(next[at] + call)).collect();
            next[at] += calls_a_turn[at];
            let calls = peers[at].turn(probes, &ranges, k)?;
            let seconds: f64 = calls.iter().map(|call| call.seconds).sum();
            figures[at].rates.push((batch * calls.len()) as f64 / seconds);
            for call in calls {
                figures[at].calls.push(call.seconds);
                stages[at].extend(call.stages);
                judges[at].take(&call.answered);
            }
        }
    }
    for (figures, stages) in figures.iter_mut().zip(stages) {
        let median_of = |part: fn(&Stages) -> f64| median(&stages.iter().map(part).collect::<Vec<_>>());
        figures.stages = (!stages.is_empty()).then(|| Stages {
            prefilter: median_of(|stages| stages.prefilter),
            refine: median_of(|stages| stages.refine),
        });
    }
    Ok(figures)
}

/// The middle value; of two, the lower. 0 of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    if sorted.is_empty() { 0.0 } else { sorted[(sorted.len() - 1) / 2] }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::gallery::{Gallery, GalleryKind};
    use crate::peer::{Answered, Call, PeerKind};
    use crate::truth::Truth;

    /// Who was asked for which ranges, in order.
    type Log = Arc<Mutex<Vec<(usize, Vec<Range<usize>>)>>>;

    /// Notes what it is asked.
    struct Scribe(Log, usize);

    impl Peer for Scribe {
        fn name(&self) -> &'static str {
            "scribe"
        }
        fn kind(&self) -> PeerKind {
            PeerKind::Approximate
        }
        fn turn(&mut self, _: &Probes, calls: &[Range<usize>], _: usize) -> anyhow::Result<Vec<Call>> {
            self.0.lock().unwrap().push((self.1, calls.to_vec()));
            let call = |range: &Range<usize>| Call {
                seconds: 0.25,
                answered: Answered { first: range.start, hits: vec![Vec::new(); range.len()] },
                stages: None,
            };
            Ok(calls.iter().map(call).collect())
        }
    }

    #[test]
    fn every_peer_has_a_turn_of_the_same_searches_in_every_round() {
        let gallery = Gallery::new(GalleryKind::Standard, 1, 64, 32);
        let probes = gallery.probes(8);
        let truth = Truth::new(&gallery, &probes, 1);
        let log = Log::default();
        let mut peers: Vec<Box<dyn Peer>> =
            (0..3).map(|name| Box::new(Scribe(Arc::clone(&log), name)) as Box<dyn Peer>).collect();
        let mut judges: Vec<_> = (0..3).map(|_| Judge::new(&gallery, &probes, &truth, PeerKind::Approximate)).collect();
        let pace = Pace { rounds: 4, turn: Duration::from_millis(400) };
        let figures = interleaved(&mut peers, &mut judges, &probes, 4, 1, pace).unwrap();
        let log = log.lock().unwrap();
        for (peer, figures) in figures.iter().enumerate() {
            let own: Vec<_> = log.iter().filter(|(name, _)| *name == peer).skip(2).collect();
            assert_eq!(own.len(), 4);
            assert!(own.iter().all(|(_, calls)| *calls == [0..4, 4..8]), "{own:?}");
            assert_eq!(figures.rates, [16.0; 4]);
            assert_eq!(figures.calls.len(), 8);
        }
        let firsts: Vec<usize> = log[6..].chunks(3).map(|round| round[0].0).collect();
        assert_eq!(firsts, [0, 1, 2, 0], "who is first changes");
    }

    #[test]
    fn a_median_is_the_middle_and_a_ratio_is_taken_round_by_round() {
        assert!((median(&[9.0, 1.0, 5.0]) - 5.0).abs() < 1e-12);
        assert!(median(&[]).abs() < 1e-12);
        let of = |rates: &[f64]| Figures { rates: rates.to_vec(), calls: Vec::new(), stages: None };
        // In the second round all were slow: that cancels.
        assert!((of(&[20.0, 2.0, 20.0]).ratio_to(&of(&[10.0, 1.0, 10.0])) - 2.0).abs() < 1e-12);
    }
}
