//! Cooperative matrices against the plain kernel, in processes of their own.
//!
//! A driver that crashes on them takes its process with it, and a race shows itself only now and then:
//! so several processes, one after the other, compare both kernels repeatedly.

use std::fs::File;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};
use thenar::engine::gpu::{AdapterChoice, GpuEngine};
use thenar::engine::{Engine as _, GalleryView};
use thenar_bench::gallery::{Gallery, GalleryKind};

use crate::Common;
use crate::report::Report;
use crate::segments::{Segment, ms, view};

/// Arguments of `matrices`.
#[derive(Args, Clone)]
pub(crate) struct Arguments {
    /// Rows of the gallery.
    #[arg(long, default_value_t = 200_000)]
    n: usize,
    /// Probes of a batch, at most 256.
    #[arg(long, default_value_t = 256)]
    probes: usize,
    /// Processes, one after the other.
    #[arg(long, default_value_t = 4)]
    processes: u32,
    /// Seconds that each of them compares.
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// Compare in this process: what the call does in each of the others.
    #[arg(long, hide = true)]
    here: bool,
}

/// Where the bounds of a round lie, in standard deviations above the mean of a probe's sums: half of all
/// pairs reach the first, and few enough the last that they are compared one by one.
const DEVIATIONS: [f64; 7] = [0.0, 3.0, 0.5, 2.5, 1.0, 3.5, 2.0];
/// Rounds that a process does at least.
const ROUNDS_MIN: usize = DEVIATIONS.len();

pub(crate) fn run(common: &Common, arguments: &Arguments, report: &mut Report) -> anyhow::Result<()> {
    let mut arguments = arguments.clone();
    if common.smoke {
        (arguments.n, arguments.probes, arguments.processes, arguments.seconds) = (4096, 70, 2, 0.0);
    }
    if arguments.here {
        return here(common, &arguments);
    }
    println!("process    rounds       pairs     passed  one by one   plain ms  tested ms");
    for process in 1..=arguments.processes {
        if report.left().as_secs_f64() < arguments.seconds {
            report.wrong(format!("no time was left for process {process}"));
            break;
        }
        let ended = in_a_process(common, &arguments, report.left())?;
        let number = |name: &str| ended.last[name].as_f64().unwrap_or(f64::NAN);
        println!(
            "{process:7} {:9} {:11.3e} {:10.3e} {:11.3e} {:10.3} {:10.3}",
            number("rounds"),
            number("pairs"),
            number("passed"),
            number("listed"),
            number("plain_ms"),
            number("tested_ms"),
        );
        report.row("processes", json!({ "ended": ended.how, "found": ended.last }));
        if let Some(kernels) = ended.last["kernels"].as_str() {
            report.note("compared", format!("{kernels}, on {}", ended.last["adapter"].as_str().unwrap_or("?")));
        }
        if let Some(wrong) = ended.last["wrong"].as_str() {
            report.wrong(format!("process {process}, round {}: {wrong}", number("rounds")));
        }
        if let Some(how) = ended.how {
            report.wrong(format!("process {process} {how} after round {}", number("rounds")));
        }
    }
    Ok(())
}

/// How a process ended.
struct Ended {
    /// None if it ended well.
    how: Option<String>,
    /// The last line that it printed.
    last: Value,
}

fn in_a_process(common: &Common, arguments: &Arguments, patience: Duration) -> anyhow::Result<Ended> {
    let said = tempfile::NamedTempFile::new()?;
    let Common { dim, adapter, seed, .. } = common;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["matrices", "--here"]);
    let numbers = [
        ("--dim", dim.to_string()),
        ("--seed", seed.to_string()),
        ("--n", arguments.n.to_string()),
        ("--probes", arguments.probes.to_string()),
        ("--seconds", arguments.seconds.to_string()),
    ];
    for (name, value) in &numbers {
        command.args([name, value.as_str()]);
    }
    if let Some(name) = adapter {
        command.args(["--adapter", name]);
    }
    let mut child = command.stdout(Stdio::from(File::create(said.path())?)).spawn()?;
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if started.elapsed() > patience {
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let text = std::fs::read_to_string(said.path())?;
    let last = text.lines().filter_map(|line| serde_json::from_str(line).ok()).next_back().unwrap_or_default();
    let how = match status {
        None => Some(format!("did not end within {:.0} s and was killed", patience.as_secs_f64())),
        Some(status) if status.success() => None,
        Some(status) => Some(match status.signal() {
            Some(signal) => format!("was ended by signal {signal}"),
            None => format!("failed: {status}"),
        }),
    };
    Ok(Ended { how, last })
}

/// Compares until the time is over, and prints what it came to so far after every round.
fn here(common: &Common, arguments: &Arguments) -> anyhow::Result<()> {
    let Common { dim, adapter, seed, .. } = common.clone();
    let choice = adapter.map_or(AdapterChoice::Any, AdapterChoice::Named);
    let engine = GpuEngine::new(choice).context("no engine")?;
    let gallery = Gallery::new(GalleryKind::Standard, seed, arguments.n, dim);
    let segments: Vec<Segment<'_>> = Segment::all(&gallery);
    let view: GalleryView<'_> = view(&segments, dim, 1);
    engine.follow(&view)?;
    let probes = gallery.probes(arguments.probes);
    let started = Instant::now();
    let (mut pairs, mut passed, mut listed, mut times) = (0, 0, 0, [Duration::MAX; 2]);
    for (round, deviations) in DEVIATIONS.into_iter().cycle().enumerate() {
        if round >= ROUNDS_MIN && started.elapsed().as_secs_f64() >= arguments.seconds {
            break;
        }
        let check = engine.check_matrices(&view, probes.values(0..probes.len()), deviations)?;
        pairs += check.pairs;
        passed += check.passed;
        listed += check.listed;
        for (best, time) in times.iter_mut().zip(check.device_times.unwrap_or([Duration::MAX; 2])) {
            *best = (*best).min(time);
        }
        let known = |time: Duration| (time < Duration::MAX).then(|| ms(time));
        let so_far = json!({
            "adapter": engine.describe().adapter, "kernels": check.kernels, "rounds": round + 1, "pairs": pairs,
            "passed": passed, "listed": listed, "wrong": check.wrong, "tested_ms": known(times[0]),
            "plain_ms": known(times[1]),
        });
        println!("{so_far}");
        if check.wrong.is_some() {
            break;
        }
    }
    Ok(())
}
