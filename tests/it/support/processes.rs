//! The program under test as a process: started, waited for, signalled, and looked into through /proc.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// The program under test.
pub(crate) const THENAR: &str = env!("CARGO_BIN_EXE_thenar");

/// The program with `args` and an environment that names neither keys nor servers.
pub(crate) fn command(args: &[&str]) -> Command {
    program(THENAR, args)
}

/// Any program, in the same environment.
pub(crate) fn program(name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(name);
    command
        .args(args)
        .env_remove("THENAR_MASTER_KEY")
        .env_remove("CREDENTIALS_DIRECTORY")
        .env_remove("THENAR_SERVER")
        .env_remove("OMP_WAIT_POLICY")
        .env_remove("XDG_RUNTIME_DIR")
        // Tests look into the memory of servers, whichever user runs them.
        .env("THENAR_DEBUGGABLE", "1")
        .env("NO_COLOR", "1")
        .env("RUST_BACKTRACE", "0");
    command.stdin(Stdio::null());
    command
}

/// Runs the program to its end.
pub(crate) fn thenar(args: &[&str]) -> Output {
    command(args).output().expect("the program runs")
}

/// Everything that a program printed.
pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Waits for a process to end by itself; `None` if it has not after `patience`.
pub(crate) fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let until = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().expect("the child is ours") {
            return Some(status);
        }
        if Instant::now() > until {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A program under way whose output is kept. Killed when dropped.
pub(crate) struct Running(Option<Child>);

impl Running {
    pub(crate) fn start(mut command: Command) -> Self {
        Self(Some(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program runs")))
    }

    fn child(&mut self) -> &mut Child {
        self.0.as_mut().expect("it has not been waited for")
    }

    pub(crate) fn signal(&mut self, signal: Signal) {
        kill_process(Pid::from_child(self.child()), signal).expect("it has not been waited for");
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child().try_wait().expect("the child is ours").is_none()
    }

    /// Waits for its end, and fails if it does not come in time. What it prints must fit into a pipe.
    pub(crate) fn end(mut self, patience: Duration) -> Output {
        let ended = wait(self.child(), patience).is_some();
        let mut child = self.0.take().expect("it has not been waited for");
        if !ended {
            child.kill().expect("it can be killed");
        }
        let output = child.wait_with_output().expect("its output is read");
        assert!(ended, "the program does not end: {}", text(&output));
        output
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until `is` holds, 30 s at most.
pub(crate) async fn soon(what: &str, is: impl Fn() -> bool) {
    for _ in 0..600 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never: {what}");
}

/// A number of /proc/PID/status, in bytes.
pub(crate) fn status_bytes(pid: u32, key: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':')).expect("Linux says it");
    line.trim().trim_end_matches("kB").trim().parse::<usize>().expect("a number") << 10
}

/// Open files of a process, its sockets among them.
pub(crate) fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the process runs").count()
}

/// Time that a process has spent on processors, in the system's ticks of 10 ms.
pub(crate) fn processor_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name in parentheses").1.split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 10)
}

/// A part of a process's address space that it may read.
pub(crate) struct Mapping {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) is_writable: bool,
    /// The file it maps, what Linux calls it, or "anonymous".
    pub(crate) name: String,
}

/// The memory of a process. `None` if it may not be read.
pub(crate) fn memory(pid: u32) -> Option<(File, Vec<Mapping>)> {
    let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let mut mappings = Vec::new();
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (range, access) = (words.next()?, words.next()?);
        let name = words.nth(3).unwrap_or("anonymous");
        if !access.starts_with('r') || name == "[vvar]" || name == "[vsyscall]" {
            continue;
        }
        let (from, to) = range.split_once('-')?;
        let (from, to) = (u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?);
        mappings.push(Mapping { from, to, is_writable: access.starts_with("rw"), name: name.to_owned() });
    }
    Some((memory, mappings))
}

impl Mapping {
    /// What is in it, as far as it can still be read: the rest may be gone by now, and a page of a file
    /// beyond its end cannot be read.
    pub(crate) fn bytes(&self, memory: &File) -> Option<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.to - self.from).ok()?];
        let mut read = 0;
        while let Ok(some @ 1..) = memory.read_at(&mut bytes[read..], self.from + read as u64) {
            read += some;
        }
        bytes.truncate(read);
        Some(bytes)
    }
}
