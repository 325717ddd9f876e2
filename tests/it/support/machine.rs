//! What a test needs of the machine, and what happens if it is not there.

/// Whether everything that a test may need must be there, as in CI: then a test that would be skipped fails.
pub(crate) fn gpu_is_required() -> bool {
    std::env::var("THENAR_REQUIRE_GPU").is_ok_and(|v| v == "1")
}

/// Whether this machine has the software adapter that the GPU tests run on.
pub(crate) fn llvmpipe_is_here() -> bool {
    thenar::engine::gpu::available_adapters().iter().any(|a| a.name.to_lowercase().contains("llvmpipe"))
}

/// Says that a test did not run, and why.
pub(crate) fn skip(reason: &str) {
    println!("skipped: {reason}");
}
