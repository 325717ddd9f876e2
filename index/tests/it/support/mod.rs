//! What the tests share.

pub(crate) mod contents;
pub(crate) mod disk;
pub(crate) mod rows;
