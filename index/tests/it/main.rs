//! What the index promises, tested from the outside: against a model, against crashes, against
//! damage, and with threads.

mod compact;
mod crash;
mod damage;
mod format;
mod fuzz;
mod layers;
mod model;
mod palms;
mod readers;
mod reopening;
mod sim;
mod unreadable;
