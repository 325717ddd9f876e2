//! The `thenar` command: parse, run, exit code.

use std::process::ExitCode;

use clap::Parser as _;
use thenar::cli::{self, Cli, Command};
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
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("thenar: could not start: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(async {
        match cli.command {
            Command::Import(args) => cli::conclude(cli::import::run(args).await),
            Command::Identify(args) => cli::conclude(cli::identify::run(args).await),
            Command::Forget(args) => cli::conclude(cli::forget::run(args).await),
            Command::Demo(args) => cli::conclude(cli::demo::run(args).await),
            Command::Status(args) => cli::conclude(cli::status::run(args).await),
            Command::Audit(args) => cli::conclude(cli::audit::run(args).await),
            Command::Serve(args) => cli::conclude_local(cli::serve::run(args).await),
            Command::Keys(args) => cli::conclude_local(cli::keys::run(args)),
            Command::Verify(args) => cli::conclude_local(cli::verify::run(args)),
        }
    })
}
