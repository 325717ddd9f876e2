//! `thenar serve`: run a server.

use std::io::Write as _;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::Outcome;
use super::args::DataFolderArgs;
use super::error::CliError;
use super::output::start_log;
use crate::server;

/// Run a server over a data folder until SIGTERM or Ctrl-C, then answer what is in flight and stop.
/// A second signal cuts open calls off.
///
/// Prints `thenar listening on ADDRESS:PORT` on standard output when it takes calls; logs go to
/// standard error. Every key of the file is explained in deploy/thenar.toml.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    folder: DataFolderArgs,
    /// Address and port for gRPC; port 0 picks a free one. Beyond loopback, [server.tls] is needed.
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<String>,
    /// Address and port for metrics, or `off`. Beyond loopback, the file must allow it explicitly.
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics_listen: Option<String>,
}

/// Runs until told to stop.
///
/// # Errors
/// [`CliError`] if the configuration is invalid, or the server cannot run.
pub(crate) async fn run(args: ServeArgs) -> Result<Outcome, CliError> {
    let config = args.folder.config(|raw| {
        raw.server.listen = args.listen.or(raw.server.listen.take());
        raw.metrics.listen = args.metrics_listen.or(raw.metrics.listen.take());
    })?;
    start_log(&config.log);
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
        // The parent may have closed the server's standard output; it serves all the same.
        let _ = writeln!(out, "thenar listening on {}", listening.grpc);
        if let Some(metrics) = listening.metrics {
            let _ = writeln!(out, "metrics at http://{metrics}/metrics");
        }
        let _ = out.flush();
    };
    server::run(config, stop, ready).await?;
    Ok(Outcome::Done)
}
