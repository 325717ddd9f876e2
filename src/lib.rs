//! Thenar identifies people by the palm of their hand, exactly, out of millions, in milliseconds.
//!
//! ARCHITECTURE.md tells which room is which. Dependencies point down only.

pub mod api;
#[cfg(feature = "faiss")]
pub mod audit;
pub mod batch;
pub mod certificate;
pub mod cli;
pub mod config;
pub mod data;
pub mod engine;
pub mod gallery;
pub mod gate;
pub mod net;
pub mod palm;
pub mod process;
pub mod registry;
pub mod search;
pub mod server;
pub mod service;
pub mod simd;
pub mod standard;
pub mod supervisor;
pub mod telemetry;
pub mod vault;
pub mod web;
pub mod wipe;
pub mod wire;
