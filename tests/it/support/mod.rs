//! What several tests need: a server of their own, a client, people to enrol, and the right answers.
//!
//! Holds no test. What only one test needs stays with that test.

pub(crate) mod arrays;
pub(crate) mod client;
pub(crate) mod disk;
pub(crate) mod index_files;
pub(crate) mod machine;
pub(crate) mod oracle;
pub(crate) mod palms;
pub(crate) mod processes;
pub(crate) mod server;
pub(crate) mod tls;
