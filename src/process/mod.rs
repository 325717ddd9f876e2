//! What is set up for the whole process before it has a second thread.

pub mod supervisor;
#[cfg(test)]
pub(crate) mod testing;
pub mod zeroing_alloc;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// If this variable is 1, debuggers, profilers and core dumps may access the process: only for
/// development, since its memory holds keys and embeddings.
const DEBUGGABLE: &str = "THENAR_DEBUGGABLE";
/// The folder of a desktop session's sockets.
const RUNTIME_DIR: &str = "XDG_RUNTIME_DIR";

/// Closes the process's memory to core dumps and to other programs of the same user, raises its limit of
/// locked memory as far as allowed, and keeps graphics drivers from looking for a desktop.
///
/// # Safety
/// The process must have only one thread.
pub unsafe fn prepare() {
    if std::env::var_os(DEBUGGABLE).is_none_or(|value| value != "1") {
        close_memory();
    }
    let lockable = getrlimit(Resource::Memlock).maximum;
    // Not fatal: keys that cannot be locked are reported when they are made.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: lockable, maximum: lockable });
    if std::env::var_os(RUNTIME_DIR).is_none() {
        // Mesa asks Wayland's library for a display even if no window will ever be opened, and that
        // library writes to standard error if the variable is missing. A folder that does not exist is enough.
        // SAFETY: the caller says that no other thread can be reading the environment.
        unsafe { std::env::set_var(RUNTIME_DIR, "/nonexistent") };
    }
}

/// No core dumps, neither to a file nor to a program that collects them, and nobody but root may read
/// this process's memory.
fn close_memory() {
    // Neither needs a privilege; a system without these calls has no such dumps.
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    #[cfg(target_os = "linux")]
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_closed_process_is_not_dumped() {
        close_memory();
        let core = getrlimit(Resource::Core);
        assert_eq!((core.current, core.maximum), (Some(0), Some(0)));
        let dumpable = rustix::process::dumpable_behavior().unwrap();
        assert_eq!(dumpable, rustix::process::DumpableBehavior::NotDumpable);
    }
}
