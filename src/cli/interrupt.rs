//! Ctrl-C and SIGTERM, as something a command can wait for.
//!
//! The first asks the command to finish what is under way and stop; a second ends the process at
//! once, so that nobody is held hostage by a server that does not answer.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Starts to listen. The token is cancelled by the first signal.
///
/// # Errors
/// Where the process cannot take the signals.
pub fn watch() -> std::io::Result<CancellationToken> {
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
            if asked.is_cancelled() {
                std::process::exit(1);
            }
            asked.cancel();
        }
    });
    Ok(token)
}
