//! The demo's own server: a folder, a key, a configuration and a child process.
//!
//! Runs the program it is part of, as an operator would: `keys generate`, then `serve`. The child
//! has a process group of its own, so that Ctrl-C reaches the demo alone, which then stops it.

use std::collections::VecDeque;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use tokio::io::{AsyncBufReadExt as _, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use crate::cli::error::CliError;
use crate::cli::sample::random_request_id;

/// What the server says once it takes calls.
const READY: &str = "thenar listening on ";
/// Time a server may take to be ready; finding a GPU and compiling shaders is part of it.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// Time it may take to stop, which is more than its own limit for draining.
const STOPPED_WITHIN: Duration = Duration::from_secs(60);
/// Lines of its log that are kept for the case that it fails.
const LOG_LINES_KEPT: usize = 20;

/// The folder of a demo: removed when dropped, unless it is to be kept.
#[derive(Debug)]
pub struct DemoFolder {
    path: PathBuf,
    kept: bool,
}

impl DemoFolder {
    /// `keep`, which must be new or empty, or a fresh folder where temporary files go.
    ///
    /// # Errors
    /// [`CliError`] where it cannot be made or has something in it.
    pub fn new(keep: Option<&Path>) -> Result<Self, CliError> {
        let path = match keep {
            // The server's child process may see another working directory.
            Some(path) => std::path::absolute(path)?,
            None => std::env::temp_dir().join(random_request_id("thenar-demo")?),
        };
        let failed = |source| CliError::File { action: "create", path: path.clone(), source };
        std::fs::DirBuilder::new().recursive(keep.is_some()).mode(0o700).create(&path).map_err(failed)?;
        if std::fs::read_dir(&path).map_err(failed)?.next().is_some() {
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

impl Drop for DemoFolder {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            eprintln!("thenar: cannot remove {}: {error}", self.path.display());
        }
    }
}

/// The configuration that the demo writes.
#[derive(Debug, Serialize)]
struct ServeConfig<'a> {
    data: PathBuf,
    key_file: PathBuf,
    dim: usize,
    server: Listen,
    metrics: Listen,
    engine: EngineKind<'a>,
}

#[derive(Debug, Serialize)]
struct Listen {
    listen: &'static str,
}

#[derive(Debug, Serialize)]
struct EngineKind<'a> {
    kind: &'a str,
}

/// A free port of this machine, for nobody else.
const LOOPBACK: Listen = Listen { listen: "127.0.0.1:0" };

/// A running server.
#[derive(Debug)]
pub struct DemoServer {
    child: Child,
    address: String,
    log: Log,
}

/// The last lines a server wrote.
type Log = Arc<Mutex<VecDeque<String>>>;

impl DemoServer {
    /// Makes a key and a configuration in `folder` and starts `program` on it.
    ///
    /// # Errors
    /// [`CliError`] with the server's last words where it does not get ready.
    pub async fn start(program: &Path, folder: &Path, dim: usize, engine: &str) -> Result<Self, CliError> {
        let (data, key_file, config) = (folder.join("data"), folder.join("master.key"), folder.join("thenar.toml"));
        let cannot_run = |source| CliError::File { action: "run", path: program.to_owned(), source };
        let made = Command::new(program)
            .args(["keys", "generate", "--out"])
            .arg(&key_file)
            .stdin(Stdio::null())
            .output()
            .await
            .map_err(cannot_run)?;
        if !made.status.success() {
            return Err(CliError::DemoServer {
                problem: format!("got no key: `keys generate` ended with {}", made.status),
                log: String::from_utf8_lossy(&made.stderr).lines().map(str::to_owned).collect(),
            });
        }
        let written = toml::to_string(&ServeConfig {
            data,
            key_file,
            dim,
            server: LOOPBACK,
            metrics: LOOPBACK,
            engine: EngineKind { kind: engine },
        });
        std::fs::write(&config, written.map_err(std::io::Error::other)?).map_err(|source| CliError::File {
            action: "write",
            path: config.clone(),
            source,
        })?;

        let mut child = Command::new(program)
            .arg("serve")
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(cannot_run)?;
        let log = Log::default();
        let (ready, listening) = oneshot::channel();
        follow(child.stdout.take(), log.clone(), Some(ready));
        follow(child.stderr.take(), log.clone(), None);
        let mut server = Self { child, address: String::new(), log };
        match tokio::time::timeout(READY_WITHIN, listening).await {
            Ok(Ok(address)) => {
                server.address = format!("http://{address}");
                Ok(server)
            }
            Ok(Err(_closed)) => {
                let status = server.child.wait().await?;
                Err(server.failure(format!("ended before it was ready ({status})")))
            }
            Err(_elapsed) => {
                server.child.kill().await?;
                Err(server.failure(format!("was not ready within {} s", READY_WITHIN.as_secs())))
            }
        }
    }

    /// Where it listens, as a client's `--server`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Waits for it to end by itself, which it should not.
    pub async fn ended(&mut self) -> CliError {
        match self.child.wait().await {
            Ok(status) => {
                // The last lines may still be on their way.
                tokio::time::sleep(Duration::from_millis(50)).await;
                self.failure(format!("ended in the middle ({status})"))
            }
            Err(error) => error.into(),
        }
    }

    /// Asks it to stop and waits.
    ///
    /// # Errors
    /// [`CliError::DemoServer`] where it does not end in time or not with exit code 0.
    pub async fn stop(mut self) -> Result<(), CliError> {
        // No id: it has ended, and `wait` says how.
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            kill_process(pid, Signal::TERM).map_err(std::io::Error::from)?;
        }
        match tokio::time::timeout(STOPPED_WITHIN, self.child.wait()).await {
            Ok(status) => {
                let status: ExitStatus = status?;
                if status.success() { Ok(()) } else { Err(self.failure(format!("did not stop well ({status})"))) }
            }
            Err(_elapsed) => {
                self.child.kill().await?;
                Err(self.failure(format!("did not stop within {} s", STOPPED_WITHIN.as_secs())))
            }
        }
    }

    fn failure(&self, problem: String) -> CliError {
        CliError::DemoServer { problem, log: self.log.lock().iter().cloned().collect() }
    }
}

/// Keeps the last lines of `output`, and tells `ready` the address when it comes by.
fn follow(
    output: Option<impl AsyncRead + Unpin + Send + 'static>,
    log: Log,
    mut ready: Option<oneshot::Sender<String>>,
) {
    let Some(output) = output else { return };
    tokio::spawn(async move {
        let mut lines = BufReader::new(output).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if let Some(address) = line.strip_prefix(READY)
                && let Some(ready) = ready.take()
            {
                // Nobody waits any more once it took too long.
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
