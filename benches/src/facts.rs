//! What a figure needs beside it: machine, commit, command, date, and how busy the machine was.

use std::path::PathBuf;
use std::process::Command;

use serde::Serialize;
use time::OffsetDateTime;

/// Where and how a run was made.
#[derive(Debug, Clone, Serialize)]
pub struct Facts {
    /// UTC.
    pub date: String,
    /// Model of the processor.
    pub processor: String,
    /// Processors this process may use.
    pub cores: usize,
    /// Main memory.
    pub memory_gib: u64,
    /// System and kernel.
    pub system: String,
    /// Load average over a minute at the start: near 0 on a machine that does nothing else.
    pub load_average: f64,
    /// Commit of the checkout the program was built in; `+` where it had changes.
    pub commit: String,
    /// The command line, without the program's folder.
    pub command: String,
    /// Whether this is an optimised build.
    pub profile: &'static str,
}

impl Facts {
    /// Looks around.
    #[must_use]
    pub fn gather() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let processor = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim().to_owned()))
            .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
        let memory_kib = read("/proc/meminfo")
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
            .unwrap_or(0);
        let load_average = read("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0);
        let mut words = std::env::args();
        let program = words.next().map(PathBuf::from).unwrap_or_default();
        let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self {
            date: OffsetDateTime::now_utc().date().to_string(),
            processor,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: memory_kib.div_ceil(1 << 20),
            system: format!("{} {}", std::env::consts::OS, read("/proc/sys/kernel/osrelease").trim()),
            load_average,
            commit: commit(),
            command: std::iter::once(program).chain(words).collect::<Vec<_>>().join(" "),
            profile: if cfg!(debug_assertions) { "dev" } else { "release" },
        }
    }

    /// Names and values for a table.
    #[must_use]
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        vec![
            ("date", self.date.clone()),
            ("machine", format!("{}, {} cores, {} GiB, {}", self.processor, self.cores, self.memory_gib, self.system)),
            ("load average", format!("{:.2}", self.load_average)),
            ("commit", self.commit.clone()),
            ("command", format!("{} ({} build)", self.command, self.profile)),
        ]
    }
}

/// The commit that is checked out, if git can tell.
fn commit() -> String {
    let git = |words: &[&str]| {
        let output = Command::new("git").arg("-C").arg(env!("CARGO_MANIFEST_DIR")).args(words).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".to_owned() };
    // Results that a run is about to write are not changes of what it measures.
    let changed = git(&["status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"]);
    format!("{commit}{}", if changed.is_some_and(|changed| !changed.is_empty()) { "+" } else { "" })
}
