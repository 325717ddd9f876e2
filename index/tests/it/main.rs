//! Tests of the public interface: against a model, with crashes, damage, any bytes, and threads; and the
//! order of the modules.

mod compact;
mod crash;
mod damage;
mod format;
mod fuzz;
mod layers;
mod model;
mod readers;
mod reopening;
mod support;
mod unreadable;
