//! A server of one's own, for the demo and the load harness: a folder, a key, a configuration and a
//! child process.
//!
//! Runs a `thenar` as an operator would: `keys generate`, then `serve`. The child has a process group
//! of its own, so that Ctrl-C reaches the parent alone, which then stops it.
//!
//! Invariant: a server that was started is stopped and waited for, or has ended by itself.

use std::collections::VecDeque;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::client::random_request_id;
use super::error::CliError;

/// What the server prints once it takes calls.
const READY: &str = "thenar listening on ";
/// Time a server may take to be ready; finding a GPU and compiling shaders is part of it.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// Time it may take to stop, which is more than its own limit for draining.
const STOPPED_WITHIN: Duration = Duration::from_secs(60);
/// Time for the last lines of a server that has ended to arrive.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(1);
/// Lines of its log that are kept in case it fails.
const LOG_LINES_KEPT: usize = 20;

/// What a server searches with, by the words of its configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// The GPU if there is one, otherwise the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU, or no server at all.
    Gpu,
}

/// A server's folder: removed when dropped, unless it is to be kept.
#[derive(Debug)]
pub struct ServerFolder {
    path: PathBuf,
    kept: bool,
}

impl ServerFolder {
    /// `keep`, which must be new or empty, or a fresh folder where temporary files go.
    ///
    /// # Errors
    /// If it cannot be made or is not empty.
    pub fn new(keep: Option<&Path>) -> Result<Self, CliError> {
        let path = match keep {
            // The server's child process may see another working directory.
            Some(path) => std::path::absolute(path)?,
            None => std::env::temp_dir().join(random_request_id("thenar-demo")),
        };
        let failed = CliError::file("create", &path);
        std::fs::DirBuilder::new().recursive(keep.is_some()).mode(0o700).create(&path).map_err(&failed)?;
        if std::fs::read_dir(&path).map_err(&failed)?.next().is_some() {
            return Err(CliError::NotEmpty { path });
        }
        Ok(Self { path, kept: keep.is_some() })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ServerFolder {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            eprintln!("thenar: cannot remove {}: {error}", self.path.display());
        }
    }
}

/// The configuration that is written.
#[derive(Debug, Serialize)]
struct ServeConfig<'a> {
    data: PathBuf,
    key_file: &'a Path,
    dim: usize,
    server: Listen,
    metrics: Listen,
    engine: EngineConfig,
}

#[derive(Debug, Serialize)]
struct Listen {
    listen: &'static str,
}

#[derive(Debug, Serialize)]
struct EngineConfig {
    kind: EngineChoice,
}

/// A free port that only this machine reaches.
const LOOPBACK: Listen = Listen { listen: "127.0.0.1:0" };

/// A server process, ready or not yet.
#[derive(Debug)]
pub struct OwnServer {
    child: Child,
    log: Log,
    /// Gets the address once it is ready; closed if it ended before.
    listening: oneshot::Receiver<String>,
    /// They end with the child's output.
    followers: JoinSet<()>,
}

/// The last lines a server wrote.
type Log = Arc<Mutex<VecDeque<String>>>;

impl OwnServer {
    /// Makes a key and a configuration in `folder` and starts `program` on it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub async fn start(program: &Path, folder: &Path, dim: usize, engine: EngineChoice) -> Result<Self, CliError> {
        let (key_file, config) = (folder.join("master.key"), folder.join("thenar.toml"));
        let cannot_run = CliError::file("run", program);
        let made = Command::new(program)
            .args(["keys", "generate", "--out"])
            .arg(&key_file)
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(&cannot_run)?;
        if !made.status.success() {
            return Err(CliError::OwnServer {
                problem: format!("got no key: `keys generate` ended with {}", made.status),
                log: String::from_utf8_lossy(&made.stderr).lines().map(str::to_owned).collect(),
            });
        }
        let text = toml::to_string(&ServeConfig {
            data: folder.join("data"),
            key_file: &key_file,
            dim,
            server: LOOPBACK,
            metrics: LOOPBACK,
            engine: EngineConfig { kind: engine },
        });
        let text = text.map_err(std::io::Error::other)?;
        std::fs::write(&config, text).map_err(CliError::file("write", &config))?;

        let child = Command::new(program)
            .arg("serve")
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(&cannot_run)?;
        let (ready, listening) = oneshot::channel();
        let mut server = Self { child, log: Log::default(), listening, followers: JoinSet::new() };
        follow(server.child.stdout.take(), &server.log, Some(ready), &mut server.followers);
        follow(server.child.stderr.take(), &server.log, None, &mut server.followers);
        Ok(server)
    }

    /// Waits until it takes calls, and returns its address as a client's `--server`.
    ///
    /// # Errors
    /// If it does not get ready, with its last words.
    pub async fn ready(&mut self) -> Result<String, CliError> {
        match tokio::time::timeout(READY_WITHIN, &mut self.listening).await {
            Ok(Ok(address)) => Ok(format!("http://{address}")),
            Ok(Err(_closed)) => {
                let status = self.child.wait().await?;
                Err(self.failure(format!("ended before it was ready ({status})")).await)
            }
            Err(_elapsed) => {
                self.child.kill().await?;
                Err(self.failure(format!("was not ready within {} s", READY_WITHIN.as_secs())).await)
            }
        }
    }

    /// Waits for it to end by itself, which it should not do.
    pub async fn ended(&mut self) -> CliError {
        match self.child.wait().await {
            Ok(status) => self.failure(format!("ended in the middle ({status})")).await,
            Err(error) => error.into(),
        }
    }

    /// Asks it to stop and waits.
    ///
    /// # Errors
    /// If it does not end in time or not with exit code 0.
    pub async fn stop(mut self) -> Result<(), CliError> {
        // No id: it has ended, and `wait` says how.
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            kill_process(pid, Signal::TERM).map_err(std::io::Error::from)?;
        }
        match tokio::time::timeout(STOPPED_WITHIN, self.child.wait()).await {
            Ok(status) => {
                let status: ExitStatus = status?;
                if status.success() { Ok(()) } else { Err(self.failure(format!("did not stop well ({status})")).await) }
            }
            Err(_elapsed) => {
                self.child.kill().await?;
                Err(self.failure(format!("did not stop within {} s", STOPPED_WITHIN.as_secs())).await)
            }
        }
    }

    /// The error of a child that has ended, with its last words, which may still be on their way.
    async fn failure(&mut self, problem: String) -> CliError {
        let all_read = async { while self.followers.join_next().await.is_some() {} };
        // A process of the child's that holds the pipe open would keep the reader waiting.
        let _ = tokio::time::timeout(LAST_WORDS_WITHIN, all_read).await;
        CliError::OwnServer { problem, log: self.log.lock().iter().cloned().collect() }
    }
}

/// Keeps the last lines of `output`, and sends the address to `ready` when it is printed.
fn follow(
    output: Option<impl AsyncRead + Unpin + Send + 'static>,
    log: &Log,
    mut ready: Option<oneshot::Sender<String>>,
    followers: &mut JoinSet<()>,
) {
    let Some(output) = output else { return };
    let log = log.clone();
    followers.spawn(async move {
        let mut lines = BufReader::new(output).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if let Some(address) = line.strip_prefix(READY)
                && let Some(ready) = ready.take()
            {
                // Nobody waits any more once it has taken too long.
                let _ = ready.send(address.trim().to_owned());
            }
            let mut log = log.lock();
            if log.len() == LOG_LINES_KEPT {
                log.pop_front();
            }
            log.push_back(line);
        }
    });
}
