//! Hostile messages: seeded mutations of the corpus in `tests/corpus/proto`, decoded and converted as the
//! server does it.
//!
//! `THENAR_FUZZ_SECONDS` sets how long each of these tests runs (2 s unless set), `THENAR_FUZZ_SEED` the seed
//! of its first case. A failure prints the seed that repeats it.

mod conversion;
mod corpus;
mod mutator;

use std::time::{Duration, Instant};

pub(super) use mutator::Mutator;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a whole number"))
}

/// Runs `case` with one seed after another until the time is over.
pub(super) fn fuzz(mut case: impl FnMut(u64)) {
    struct Told(u64);
    impl Drop for Told {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("repeat this with THENAR_FUZZ_SEED={}", self.0);
            }
        }
    }
    let until = Instant::now() + Duration::from_secs(setting("THENAR_FUZZ_SECONDS").unwrap_or(2));
    let mut told = Told(setting("THENAR_FUZZ_SEED").unwrap_or(1));
    let first = told.0;
    // At least some, however slow the machine is.
    while told.0 < first + 200 || Instant::now() < until {
        case(told.0);
        told.0 += 1;
    }
    println!("{} cases from seed {first}", told.0 - first);
}
