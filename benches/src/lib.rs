//! How fast is Thenar, beside what else there is?
//!
//! - `peers`: Thenar, FAISS and others on the same gallery, with the same threads, in one run,
//!   turn by turn, every answer held against a brute force.
//! - `kernels`: the CPU engine's sift on every instruction set, beside the processor's own limits.
//! - `gpu_check`: the GPU engine checked and timed on the machine at hand.
//! - `open`: the index on disk: append, open, erase, verify.
//! - `harness`: a real server under load: bulk enrolment, then an open loop of gates, terminals and
//!   writers, every answer checked.
//!
//! Each has `--smoke`, which takes seconds, checks answers, and is part of the tests
//! (`benches/smoke.sh`). Does not know how the server's
//! transports work beyond being their client.

pub mod facts;
pub mod gallery;
pub mod measure;
pub mod peer;
pub mod plot;
pub mod truth;
