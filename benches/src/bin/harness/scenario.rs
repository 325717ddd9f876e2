//! What a run asks for, and when: the options, the kinds of calls, and their arrivals.
//!
//! Arrivals are a Poisson process of each kind, drawn before the clock starts and sent at their time,
//! whether earlier calls have been answered or not: an open loop, so that a server that falls behind
//! shows its queue as latency. Knows rates and time; does not know palms or servers.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution as _, Exp};
use serde::Serialize;
use thenar::api::proto::Purpose;
use thenar::cli::own_server::EngineChoice;

/// Arrivals of one measurement, at most: each is held in memory with its answer.
const ARRIVALS_MAX: f64 = 4e6;

#[derive(Debug, Clone, Args)]
pub(crate) struct LoadArgs {
    /// Load this server instead of one of its own. The palms stay enrolled there.
    #[arg(long, value_name = "URL")]
    pub(crate) server: Option<String>,
    /// Run this `thenar` instead of the server in this program.
    #[arg(long, value_name = "FILE", conflicts_with = "server")]
    pub(crate) program: Option<PathBuf>,
    /// Palms to enrol.
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(100..))]
    pub(crate) palms: u32,
    /// Components of an embedding; under 512 generated palms are so alike that some answers are wrong.
    #[arg(long, default_value_t = 512)]
    pub(crate) dim: usize,
    /// What its own server searches with: auto, cpu or gpu.
    #[arg(long, value_enum, default_value_t = EngineChoice::Auto)]
    pub(crate) engine: EngineChoice,
    /// Searches with a threshold a second, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "100")]
    pub(crate) rate: Vec<f64>,
    /// What those searches are for, in shares.
    #[arg(long, default_value = "entry=6,payment=3,loyalty=1")]
    pub(crate) purposes: Shares,
    /// Searches without a threshold a second, one measurement of every rate for each.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    pub(crate) floorless: Vec<f64>,
    /// Comparisons with one subject (1:1) a second.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) verify: f64,
    /// Enrolments a second; each is searched for at once.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) enrol: f64,
    /// Deletions a second; each is searched for at once.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) forget: f64,
    /// Clients that read their answers slowly.
    #[arg(long, default_value_t = 0)]
    pub(crate) slow: u32,
    /// Gates, with a stream each, that searches for entry come from.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=250))]
    pub(crate) gates: u32,
    /// Connections for all other calls.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=250))]
    pub(crate) terminals: u32,
    /// An answer after this is of no use to anybody; it is the deadline of every call but the gates'.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub(crate) deadline_ms: u64,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) seconds: u64,
    /// Seconds before each measurement whose answers are checked and not timed.
    #[arg(long, default_value_t = 2)]
    pub(crate) warmup: u64,
    /// Errors that do not fail the run: refused (RESOURCE_EXHAUSTED), expired (DEADLINE_EXCEEDED).
    #[arg(long, value_delimiter = ',', value_parser = ["refused", "expired"])]
    pub(crate) allow: Vec<String>,
    /// Seed of the palms and of the arrivals.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Thirty seconds of everything over 3,000 palms. For tests.
    #[arg(long)]
    pub(crate) smoke: bool,
    /// Print JSON instead of the table.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write PATH.json, and PATH.html with latency over time.
    #[arg(long, value_name = "PATH")]
    pub(crate) save: Option<PathBuf>,
}

impl LoadArgs {
    /// What `--smoke` stands for.
    pub(crate) fn resolved(mut self) -> Self {
        if self.smoke {
            (self.palms, self.rate, self.floorless) = (3000, vec![120.0], vec![4.0]);
            (self.verify, self.enrol, self.forget, self.slow) = (4.0, 4.0, 4.0, 2);
            (self.gates, self.terminals, self.seconds, self.warmup) = (8, 4, 30, 0);
            // A machine that does other work may stand still for a while, which is no fault of the server.
            (self.deadline_ms, self.allow) = (20_000, vec!["refused".to_owned(), "expired".to_owned()]);
        }
        self
    }

    /// Why the options make no sense, if they do not.
    pub(crate) fn problem(&self) -> Option<String> {
        let others = [self.verify, self.enrol, self.forget];
        let rates = self.rate.iter().chain(&self.floorless).chain(&others);
        if let Some(bad) = rates.clone().find(|rate| !rate.is_finite() || **rate < 0.0) {
            return Some(format!("a rate of {bad} a second"));
        }
        let most = |rates: &[f64]| rates.iter().copied().fold(0.0, f64::max);
        let all = most(&self.rate) + most(&self.floorless) + others.iter().sum::<f64>();
        let arrivals = all * (self.seconds + self.warmup) as f64;
        if arrivals > ARRIVALS_MAX {
            return Some(format!("{arrivals:.0} calls in one measurement; at most {ARRIVALS_MAX:.0} are possible"));
        }
        (all == 0.0).then(|| "every rate is 0".to_owned())
    }
}

/// What a call is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    Entry,
    Payment,
    Workplace,
    Loyalty,
    /// A search for the best of all, whatever their score.
    Floorless,
    /// 1:1.
    Verify,
    Enrol,
    Forget,
    /// A search for somebody who was enrolled or forgotten by the call before.
    Fresh,
    /// A search of a client that reads slowly.
    Slow,
}

impl Kind {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Entry => "entry",
            Self::Payment => "payment",
            Self::Workplace => "workplace",
            Self::Loyalty => "loyalty",
            Self::Floorless => "floorless",
            Self::Verify => "verify",
            Self::Enrol => "enrol",
            Self::Forget => "forget",
            Self::Fresh => "after a write",
            Self::Slow => "slow client",
        }
    }

    /// What it asks in the name of.
    pub(crate) fn purpose(self) -> Purpose {
        match self {
            Self::Payment | Self::Verify => Purpose::Payment,
            Self::Workplace => Purpose::Workplace,
            Self::Loyalty | Self::Floorless => Purpose::Loyalty,
            Self::Entry | Self::Enrol | Self::Forget | Self::Fresh | Self::Slow => Purpose::Entry,
        }
    }
}

/// How the searches with a threshold divide into purposes. Sums to 1.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Shares(Vec<(Kind, f64)>);

impl FromStr for Shares {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut shares = Vec::new();
        for part in text.split(',') {
            let (name, share) = part.split_once('=').ok_or_else(|| format!("{part:?} is not PURPOSE=SHARE"))?;
            let kinds = [Kind::Entry, Kind::Payment, Kind::Workplace, Kind::Loyalty];
            let kind = kinds.into_iter().find(|kind| kind.word() == name);
            let kind = kind.ok_or_else(|| format!("{name:?} is not entry, payment, workplace or loyalty"))?;
            let share: f64 = share.parse().map_err(|_| format!("{share:?} is not a number"))?;
            if !share.is_finite() || share < 0.0 {
                return Err(format!("{share} is no share"));
            }
            shares.push((kind, share));
        }
        let sum: f64 = shares.iter().map(|(_, share)| share).sum();
        if sum <= 0.0 {
            return Err("every share is 0".to_owned());
        }
        shares.iter_mut().for_each(|(_, share)| *share /= sum);
        Ok(Self(shares))
    }
}

/// A call to be made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Arrival {
    /// From the start.
    pub(crate) at: Duration,
    pub(crate) kind: Kind,
    /// Decides what exactly is asked.
    pub(crate) pick: u64,
}

/// Every call of one measurement, by time.
pub(crate) fn arrivals(arguments: &LoadArgs, rate: f64, floorless: f64, seed: u64) -> Vec<Arrival> {
    let mut rates: Vec<(Kind, f64)> = arguments.purposes.0.iter().map(|(kind, share)| (*kind, share * rate)).collect();
    rates.extend([
        (Kind::Floorless, floorless),
        (Kind::Verify, arguments.verify),
        (Kind::Enrol, arguments.enrol),
        (Kind::Forget, arguments.forget),
    ]);
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    poisson(&rates, (arguments.seconds + arguments.warmup) as f64, &mut random)
}

fn poisson(rates: &[(Kind, f64)], seconds: f64, random: &mut ChaCha8Rng) -> Vec<Arrival> {
    let mut arrivals = Vec::new();
    for &(kind, rate) in rates {
        let Ok(gaps) = Exp::new(rate) else { continue };
        let mut at = gaps.sample(random);
        while at < seconds {
            arrivals.push(Arrival { at: Duration::from_secs_f64(at), kind, pick: random.random() });
            at += gaps.sample(random);
        }
    }
    arrivals.sort_by_key(|arrival| arrival.at);
    arrivals
}

/// A seed of its own for each of several uses of one seed.
pub(crate) fn seed_of(seed: u64, number: u64) -> u64 {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(number);
    random.next_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_are_a_poisson_process_of_each_kind() {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let rates = [(Kind::Entry, 200.0), (Kind::Floorless, 20.0), (Kind::Enrol, 0.0)];
        let arrivals = poisson(&rates, 100.0, &mut random);
        assert!(arrivals.is_sorted_by_key(|arrival| arrival.at));
        let of = |kind| arrivals.iter().filter(move |arrival| arrival.kind == kind);
        // Six deviations of the counts.
        assert!(of(Kind::Entry).count().abs_diff(20_000) < 850, "{}", of(Kind::Entry).count());
        assert!(of(Kind::Floorless).count().abs_diff(2_000) < 270, "{}", of(Kind::Floorless).count());
        assert_eq!(of(Kind::Enrol).count(), 0);
        // The share of gaps longer than the mean is 1/e, which no regular beat has.
        let times: Vec<f64> = of(Kind::Entry).map(|arrival| arrival.at.as_secs_f64()).collect();
        let long = times.windows(2).filter(|pair| pair[1] - pair[0] > 1.0 / 200.0).count();
        let share = long as f64 / times.len() as f64;
        assert!((share - (-1.0_f64).exp()).abs() < 0.03, "{share}");
    }

    #[test]
    fn shares_are_of_one_and_name_purposes() {
        let shares: Shares = "entry=6,payment=2".parse().unwrap();
        assert_eq!(shares, Shares(vec![(Kind::Entry, 0.75), (Kind::Payment, 0.25)]));
        for bad in ["entry", "entry=x", "exit=1", "entry=0", "entry=-1", "verify=1"] {
            assert!(bad.parse::<Shares>().is_err(), "{bad}");
        }
    }
}
