//! The `thenar` command: parse, run, exit code.

use std::process::ExitCode;

use clap::Parser as _;
use thenar::cli::{self, Cli};
use thenar::process;
use thenar::process::zeroing_alloc::{self, ZeroingAllocator};

/// No palm is left in freed memory, nor on the stacks of threads that wait.
#[global_allocator]
static ALLOCATOR: ZeroingAllocator = ZeroingAllocator;

/// Threads that may block at once on the registry or on preparing enrolments.
const BLOCKING_THREADS_MAX: usize = 128;

fn main() -> ExitCode {
    // SAFETY: no thread has been started yet.
    unsafe { process::prepare() };
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .on_thread_park(zeroing_alloc::clear_stack)
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(cli::run(cli)),
        Err(error) => {
            eprintln!("thenar: could not start: {error}");
            ExitCode::FAILURE
        }
    }
}
