//! `thenar demo` as a newcomer runs it: one command, a server of its own, every answer checked,
//! and nothing left behind, however it ends.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::disk::SmallDisk;
use crate::support::processes::{Running, command, text};

/// A demo that has not ended by then hangs. Generous: tests share two cores.
const PATIENCE: Duration = Duration::from_secs(100);

/// Where a demo runs: its temporary files go to a folder of the test's.
struct Stage {
    temp: TempDir,
}

impl Stage {
    fn new() -> Self {
        Self { temp: tempfile::Builder::new().prefix("thenar-demo-it-").tempdir().expect("a temporary folder") }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = command(&[&["demo"], args].concat());
        // As a newcomer runs it: the memory of its server is closed.
        command.env("TMPDIR", self.temp.path()).env_remove("THENAR_DEBUGGABLE");
        command
    }

    fn start(&self, args: &[&str]) -> Demo<'_> {
        self.run_as(self.command(args))
    }

    fn run_as(&self, command: Command) -> Demo<'_> {
        Demo { process: Running::start(command), stage: self }
    }

    fn run(&self, args: &[&str]) -> Output {
        self.start(args).end()
    }

    /// Names in the folder of temporary files.
    fn left_behind(&self) -> Vec<PathBuf> {
        fs::read_dir(self.temp.path()).expect("it is there").map(|entry| entry.expect("it is read").path()).collect()
    }

    /// Processes that have this stage's folder on their command line: its servers.
    fn servers(&self) -> Vec<i32> {
        let folder = self.temp.path().to_str().expect("a plain path");
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").expect("this is Linux") {
            let entry = entry.expect("it is read");
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A process that is ending has no command line any more.
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            if line.contains(folder) && line.contains("\0serve\0") {
                found.push(pid);
            }
        }
        found
    }

    fn kill_servers(&self) {
        for server in self.servers() {
            let _ = Pid::from_raw(server).map(|pid| kill_process(pid, Signal::KILL));
        }
    }

    fn assert_nothing_is_left(&self) {
        assert_eq!(self.left_behind(), [] as [PathBuf; 0], "the folder is removed");
        assert_eq!(self.servers(), [] as [i32; 0], "the server is stopped");
    }
}

/// Whatever a failing demo leaves running goes with its test.
impl Drop for Stage {
    fn drop(&mut self) {
        self.kill_servers();
    }
}

/// A demo under way.
struct Demo<'s> {
    process: Running,
    stage: &'s Stage,
}

impl Demo<'_> {
    /// Waits until its server is there and has enrolled somebody.
    fn wait_until_it_enrols(&self) -> i32 {
        let until = Instant::now() + PATIENCE;
        loop {
            let full = |folder: &PathBuf| {
                let index = fs::read_dir(folder.join("data/index")).into_iter().flatten().flatten();
                index.into_iter().any(|file| file.file_name().to_string_lossy().starts_with("seg-"))
            };
            if let ([server], true) = (&self.stage.servers()[..], self.stage.left_behind().iter().any(full)) {
                return *server;
            }
            assert!(Instant::now() < until, "no server enrolled anybody");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for its end by itself.
    fn end(self) -> Output {
        self.process.end(PATIENCE)
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

#[test]
fn the_demo_answers_everything_rightly_and_says_so_to_programs() {
    let stage = Stage::new();
    let output = stage.run(&["--palms", "2000", "--seconds", "2", "--json", "--engine", "cpu"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let said = stdout(&output);
    assert_eq!(said.lines().count(), 1, "one object on a line: {said}");
    let promised = [
        "gallery",
        "dim",
        "engine",
        "adapter",
        "searches",
        "correct",
        "wrong",
        "missed",
        "latency_ms",
        "searches_per_second",
        "enrolled_per_second",
    ];
    let mut from = 0;
    for key in promised {
        let at = said[from..].find(&format!("\"{key}\":"));
        from += at.unwrap_or_else(|| panic!("{key} is missing or out of order: {said}"));
    }
    let report: Value = serde_json::from_str(&said).expect("one JSON object");
    let count = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("{key} is no count: {said}"));
    let figure = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} is no figure"));
    assert_eq!((count("gallery"), count("dim"), &report["engine"]), (2000, 512, &Value::from("cpu")));
    assert!(!report["adapter"].as_str().expect("a name").is_empty());
    assert_eq!((count("wrong"), count("missed"), count("stale")), (0, 0, 0));
    // 22 clients ask for two seconds, mated and non-mated.
    assert!(count("searches") >= 22, "{said}");
    assert_eq!(count("correct"), count("searches"));
    assert!(count("mated") > 0 && count("mated") < count("searches"), "{said}");
    assert!(count("fresh_checks") >= 2, "people are forgotten and enrolled meanwhile: {said}");
    assert_eq!((&report["gates"]["count"], &report["terminals"]["count"]), (&Value::from(20), &Value::from(2)));
    let [p50, p99, p999] = ["p50", "p99", "p999"].map(|key| figure(&report["latency_ms"][key]));
    assert!(0.0 < p50 && p50 <= p99 && p99 <= p999, "{said}");
    assert!(figure(&report["searches_per_second"]) > 0.0 && figure(&report["enrolled_per_second"]) > 0.0);
    stage.assert_nothing_is_left();
}

#[test]
fn the_demo_prints_a_page_for_people_and_keeps_its_folder_when_asked() {
    let stage = Stage::new();
    let kept = stage.temp.path().join("kept");
    let args =
        ["--palms", "1000", "--seconds", "1", "--gates", "3", "--terminals", "1", "--engine", "cpu", "--seed", "9"];
    let output = stage.run(&[&args[..], &["--keep", kept.to_str().expect("a plain path")]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let page = stdout(&output);
    let line = |words: &[&str]| {
        let fits = |line: &&str| words.iter().all(|word| line.contains(word));
        page.lines().find(fits).unwrap_or_else(|| panic!("no line with {words:?} in\n{page}"))
    };
    line(&["gallery", "1,000 palms", "512 dimensions", "seed 9"]);
    line(&["engine", "cpu: "]);
    line(&["enrolled", "palms per second"]);
    line(&["searched", "enrolled palms", "strangers", "per second"]);
    line(&["answers", "correct", "0 wrong", "0 missed", "refused"]);
    line(&["freshness", "0 not seen by the next search"]);
    line(&["p50 ms", "p99 ms", "p99.9 ms"]);
    for row in ["3 gates", "1 terminals", "together"] {
        let figures = line(&[row]).replace(',', "");
        let numbers = figures.split_whitespace().filter_map(|word| word.parse::<f64>().ok()).count();
        assert!(numbers >= 4, "searches and three percentiles: {figures}");
    }
    // Three answers with their ranked identities.
    line(&["an enrolled palm", "match", "1", "palm-0000001", "0."]);
    line(&["a stranger's palm", "no_match"]);
    line(&["both palms, to pay", "match", "1", "palm-0000010", "0."]);

    assert_eq!(stage.servers(), [] as [i32; 0], "the server is stopped");
    assert_eq!(stage.left_behind(), std::slice::from_ref(&kept));
    for name in ["data", "master.key", "thenar.toml"] {
        assert!(kept.join(name).exists(), "{name} is kept");
    }
    // A folder with something in it is nobody's to use again.
    let again = stage.run(&["--palms", "100", "--keep", kept.to_str().expect("a plain path")]);
    assert_eq!(again.status.code(), Some(2), "{}", text(&again));
    assert!(text(&again).contains("is not empty"), "{}", text(&again));
    assert!(kept.join("data").exists());
}

#[test]
fn few_dimensions_are_warned_of_and_what_is_then_wrong_fails_the_demo() {
    let stage = Stage::new();
    let args = ["--palms", "1000", "--seconds", "1", "--dim", "64", "--json", "--engine", "cpu"];
    let output = stage.run(&args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("note: with 64 dimensions generated palms are alike"), "{said}");
    let report: Value = serde_json::from_str(&stdout(&output)).expect("one JSON object");
    let bad = ["wrong", "missed", "stale"].iter().map(|key| report[*key].as_u64().expect("a count")).sum::<u64>();
    assert!(bad > 0, "64 dimensions do not tell a thousand palms apart: {report}");
    assert_eq!(output.status.code(), Some(1), "a wrong answer fails the demo: {report}");
    stage.assert_nothing_is_left();
}

#[test]
fn an_interrupted_demo_stops_its_server_and_removes_its_folder() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let stage = Stage::new();
        let mut demo = stage.start(&["--palms", "3000", "--seconds", "600", "--engine", "cpu"]);
        let server = demo.wait_until_it_enrols();
        demo.process.signal(signal);
        let output = demo.end();
        assert_eq!(output.status.code(), Some(1), "{signal:?}: {}", text(&output));
        assert!(text(&output).contains("interrupted; the demo's server is stopped and its folder removed"));
        assert_eq!(stdout(&output), "", "no figures of half a demo");
        assert!(!Path::new(&format!("/proc/{server}")).exists(), "{signal:?}: the server still runs");
        stage.assert_nothing_is_left();
    }
}

#[test]
fn an_interrupted_demo_does_not_claim_to_have_removed_what_it_was_to_keep() {
    let stage = Stage::new();
    let kept = stage.temp.path().join("kept");
    let args = ["--palms", "3000", "--seconds", "600", "--engine", "cpu", "--keep"];
    let mut demo = stage.start(&[&args[..], &[kept.to_str().expect("a plain path")]].concat());
    demo.wait_until_it_enrols();
    demo.process.signal(Signal::INT);
    let output = demo.end();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("its folder kept"), "{}", text(&output));
    assert!(kept.join("data").exists());
    assert_eq!(stage.servers(), [] as [i32; 0]);
}

#[test]
fn a_server_that_dies_in_the_middle_fails_the_demo_with_its_reason() {
    let stage = Stage::new();
    let demo = stage.start(&["--palms", "3000", "--seconds", "600", "--engine", "cpu"]);
    let server = demo.wait_until_it_enrols();
    let pid = Pid::from_raw(server).expect("a process");
    kill_process(pid, Signal::KILL).expect("it runs");
    let output = demo.end();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("the demo's server ended in the middle (signal: 9"), "{}", text(&output));
    stage.assert_nothing_is_left();
}

#[test]
fn a_server_that_cannot_start_has_the_last_word() {
    let stage = Stage::new();
    // Without a Vulkan driver there is no GPU, on any machine.
    let mut command = stage.command(&["--palms", "100", "--engine", "gpu"]);
    command.env("VK_DRIVER_FILES", "/nonexistent").env("VK_ICD_FILENAMES", "/nonexistent");
    let output = stage.run_as(command).end();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let said = text(&output);
    assert!(said.contains("the demo's server ended before it was ready (exit status: 1); its last lines:"), "{said}");
    assert!(said.contains("no usable GPU adapter"), "{said}");
    assert_eq!(stdout(&output), "");
    stage.assert_nothing_is_left();
}

#[test]
fn a_disk_that_is_too_small_is_named_with_a_way_out() {
    let stage = Stage::new();
    let Some(disk) = SmallDisk::mount(stage.temp.path(), 8) else { return };
    let mut command = stage.command(&["--palms", "2000"]);
    command.env("TMPDIR", disk.path());
    let output = stage.run_as(command).end();
    let left: Vec<_> = fs::read_dir(disk.path()).expect("it is there").collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let said = text(&output);
    for words in ["RESOURCE_EXHAUSTED", "kept free for deletions", "TMPDIR or --keep"] {
        assert!(said.contains(words), "no {words:?} in {said}");
    }
    assert!(!said.contains("cannot reach"), "the server is there, the disk is not: {said}");
    assert_eq!(stage.servers(), [] as [i32; 0]);
}

#[test]
fn a_folder_that_cannot_be_made_is_an_error_with_its_path() {
    let stage = Stage::new();
    let file = stage.temp.path().join("a-file");
    fs::write(&file, "in the way").expect("it is written");
    let mut command = stage.command(&[]);
    command.env("TMPDIR", &file);
    let output = stage.run_as(command).end();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains(&format!("cannot create {}", file.display())), "{}", text(&output));
}

#[test]
fn bad_usage_of_the_demo_is_told_from_failure() {
    let stage = Stage::new();
    let mut wrong = String::new();
    for args in [
        &["--palms", "99"][..],
        &["--palms", "many"],
        &["--dim", "65"],
        &["--dim", "0"],
        &["--dim", "4096"],
        &["--seconds", "0"],
        &["--gates", "0"],
        &["--engine", "tpu"],
        &["--nothing"],
        &["one"],
    ] {
        let output = stage.run(args);
        if output.status.code() != Some(2) || !output.stdout.is_empty() {
            let _ = writeln!(wrong, "{args:?}: {}: {}", output.status, text(&output));
        }
    }
    assert_eq!(wrong, "");
    stage.assert_nothing_is_left();
}
