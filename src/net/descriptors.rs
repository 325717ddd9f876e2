//! The operating system's limit on open files and sockets of this process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors reserved for files: the index, the registry, the runtime and a graphics driver.
const FILES: usize = 128;

/// The system grants too few descriptors for the configured connections.
#[derive(Debug, thiserror::Error)]
#[error(
    "server.connections_max: {connections} connections need {needed} open files and sockets, the system grants {granted}; lower it, or raise the limit (LimitNOFILE, ulimit -n)"
)]
pub struct TooFewDescriptors {
    connections: usize,
    needed: u64,
    granted: u64,
}

/// Raises this process's limit as far as allowed, and checks that there are enough for `connections` of
/// gRPC, `operators` connections of metrics and the server's own files.
///
/// # Errors
/// [`TooFewDescriptors`] if they do not.
pub(crate) fn raise(connections: usize, operators: usize) -> Result<(), TooFewDescriptors> {
    let needed = (connections + operators + FILES) as u64;
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let granted = match raised {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    match granted {
        Some(granted) if granted < needed => Err(TooFewDescriptors { connections, needed, granted }),
        _ => Ok(()),
    }
}
