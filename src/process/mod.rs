//! What is settled for the whole process before it has a second thread.

pub mod supervisor;
pub mod zeroing_alloc;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// With this variable set to 1, debuggers, profilers and core dumps get at the process: for
/// development alone, since its memory holds keys and palms.
const DEBUGGABLE: &str = "THENAR_DEBUGGABLE";
/// Where programs of a desktop session look for its sockets.
const RUNTIME_DIR: &str = "XDG_RUNTIME_DIR";

/// Closes the process's memory to core dumps and to other programs of the same user, lets it lock as
/// much memory as it may, and keeps graphics drivers from looking for a desktop.
///
/// # Safety
/// The process has one thread.
pub unsafe fn prepare() {
    if std::env::var_os(DEBUGGABLE).is_none_or(|value| value != "1") {
        close_memory();
    }
    let lockable = getrlimit(Resource::Memlock).maximum;
    // Not fatal: keys that cannot be locked are reported where they are made.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: lockable, maximum: lockable });
    if std::env::var_os(RUNTIME_DIR).is_none() {
        // Mesa asks Wayland's library for a display even where no window will ever be opened, and that
        // library writes to standard error if the variable is missing. A folder that is not there will do.
        // SAFETY: the caller says that no other thread can be reading the environment.
        unsafe { std::env::set_var(RUNTIME_DIR, "/nonexistent") };
    }
}

/// No core dumps, neither to a file nor to a program that collects them, and no reading of this
/// process's memory but by root.
fn close_memory() {
    // Neither can fail for want of a privilege; a system that has none of this has no such dumps.
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
