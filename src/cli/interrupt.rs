//! Ctrl-C and SIGTERM, as something a command can wait for.
//!
//! The first asks the command to finish what is under way and stop.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// What a second signal does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// Ends the process at once, so that nobody is held up by a server that does not answer.
    Ends,
    /// Nothing: the command has to clean up, and does so in bounded time.
    IsIgnored,
}

/// Starts to listen. The token is cancelled by the first signal.
///
/// # Errors
/// Where the process cannot take the signals.
pub fn watch(again: Again) -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let asked = token.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if asked.is_cancelled() && again == Again::Ends {
                std::process::exit(1);
            }
            asked.cancel();
        }
    });
    Ok(token)
}
