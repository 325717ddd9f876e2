//! Thenar identifies people by the palm of their hand, exactly, out of millions, in milliseconds.
//!
//! ARCHITECTURE.md tells which room is which. Imports point down its list only.

pub mod api;
#[cfg(feature = "faiss")]
pub mod audit;
pub mod cli;
pub mod engine;
pub mod gallery;
pub mod model;
pub mod net;
pub mod policy;
pub mod process;
pub mod registry;
pub mod search;
pub mod server;
pub mod service;
pub mod simd;
pub mod telemetry;
pub mod vault;
pub mod web;
