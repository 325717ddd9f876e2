//! End to end: the real binary in its own process, tested over gRPC; and the search planner over real
//! index snapshots, compared with brute force.
//!
//! All randomness comes from a seed, which a failure prints with the server's log.

mod audit;
mod bad_input;
mod commands;
mod damage;
mod deletion;
mod demo;
mod disk_full;
mod drain;
mod exact_search;
mod exact_wire;
mod filters;
mod floods;
mod freshness;
mod import;
mod kill9;
mod layers;
mod left_behind;
mod limits;
mod startup;
mod support;
mod telemetry;
mod tls;
