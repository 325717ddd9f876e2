//! `thenar serve`: run a server.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::Outcome;
use crate::server;
use crate::server::config::{Config, ConfigError, LogConfig, Raw};

/// Run a server over a data folder until SIGTERM or Ctrl-C, then answer what is in flight and stop.
/// A second signal cuts open calls off.
///
/// Prints `thenar listening on ADDRESS:PORT` on standard output when it takes calls; logs go to
/// standard error. Every key of the file is explained in deploy/thenar.toml.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Configuration file (TOML). Flags lie over it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "the flags carry their own")]
    pub over: Overrides,
    /// Address and port for gRPC; port 0 picks a free one. Beyond loopback, [server.tls] is needed.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// Address and port for metrics, or `off`. Beyond loopback, the file has to say that it is meant.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics_listen: Option<String>,
}

/// Flags that lie over the configuration file wherever a data folder is opened.
#[derive(Debug, Default, Args)]
pub struct Overrides {
    /// Folder of the registry and the index.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Master key, made by `thenar keys generate`.
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Dimensions of an embedding, for an empty gallery; else the first enrolment decides.
    #[arg(long, value_name = "N")]
    pub dim: Option<usize>,
    /// auto, cpu or gpu.
    #[arg(long, value_name = "ENGINE")]
    pub engine: Option<String>,
    /// With --engine gpu: part of the adapter's name; software adapters are taken only by name.
    #[arg(long, value_name = "NAME")]
    pub adapter: Option<String>,
    /// Threads of the CPU engine.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl Overrides {
    /// Reads the file, if there is one, lays the flags over it and checks everything.
    ///
    /// # Errors
    /// [`ConfigError`] with every problem.
    pub fn config(self, file: Option<&std::path::Path>, more: impl FnOnce(&mut Raw)) -> Result<Config, ConfigError> {
        let mut raw = file.map(Raw::read).transpose()?.unwrap_or_default();
        raw.data = self.data.or(raw.data);
        raw.key_file = self.key_file.or(raw.key_file);
        raw.dim = self.dim.or(raw.dim);
        raw.engine.kind = self.engine.or(raw.engine.kind);
        raw.engine.adapter = self.adapter.or(raw.engine.adapter);
        raw.engine.threads = self.threads.or(raw.engine.threads);
        more(&mut raw);
        raw.validated()
    }
}

/// Starts logging to standard error.
pub fn log(config: &LogConfig) {
    let filter = config.level.parse::<tracing_subscriber::EnvFilter>().unwrap_or_default();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // A second server in one process logs to the first one's subscriber.
    let _ = if config.json { builder.json().try_init() } else { builder.try_init() };
}

/// Runs until told to stop.
///
/// # Errors
/// Where the configuration is not one, or the server cannot run.
pub async fn run(args: ServeArgs) -> anyhow::Result<Outcome> {
    let config = args.over.config(args.config.as_deref(), |raw| {
        raw.server.listen = args.listen.or(raw.server.listen.take());
        raw.metrics.listen = args.metrics_listen.or(raw.metrics.listen.take());
    })?;
    log(&config.log);
    let stop = server::Stop::default();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let on_signal = stop.clone();
    tokio::spawn(async move {
        for then in [on_signal.drain, on_signal.hurry] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            then.cancel();
        }
    });
    let ready = |listening: server::Listening| {
        let mut out = std::io::stdout().lock();
        // Whoever started the server may have closed its standard output; it serves all the same.
        let _ = writeln!(out, "thenar listening on {}", listening.grpc);
        if let Some(metrics) = listening.metrics {
            let _ = writeln!(out, "metrics at http://{metrics}/metrics");
        }
        let _ = out.flush();
    };
    server::run(config, stop, ready).await?;
    Ok(Outcome::Done)
}
