//! Ctrl-C, SIGTERM and a closed terminal, as something a command can wait for.
//!
//! The first asks the command to finish what is in flight and stop.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// What a second signal does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    /// Ends the process at once, so that nobody has to wait for a server that does not answer.
    Ends,
    /// Nothing: the command has to clean up, and does so in bounded time. A terminal that is closed
    /// (SIGHUP) asks it to stop as well, because what it started would stay behind otherwise.
    IsIgnored,
}

/// Starts to listen. The token is cancelled by the first signal.
///
/// # Errors
/// If the process cannot receive the signals.
pub(crate) fn watch(again: Again) -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    // An import under nohup is meant to go on after a hang-up.
    let mut hangup = (again == Again::IsIgnored).then(|| signal(SignalKind::hangup())).transpose()?;
    let asked = token.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                () = hung_up(hangup.as_mut()) => {}
            }
            if asked.is_cancelled() && again == Again::Ends {
                std::process::exit(1);
            }
            asked.cancel();
        }
    });
    Ok(token)
}

/// Waits for the next hang-up; for ever if nobody listens for one.
async fn hung_up(hangup: Option<&mut Signal>) {
    match hangup {
        Some(hangup) => {
            hangup.recv().await;
        }
        None => std::future::pending().await,
    }
}
