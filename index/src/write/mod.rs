//! The writer: [`Index`] and what it does to the files of its folder.

mod append;
mod compact;
mod compaction;
mod encode;
mod erase;
mod forget;
mod index;
mod publish;
mod segment_writer;
mod slots;

pub(crate) use append::file_numbers_exhausted;
pub use compact::Compacting;
pub(crate) use encode::re_encode;
pub(crate) use index::READER_WAIT_DEFAULT;
pub use index::{Index, SegmentInfo};
pub(crate) use segment_writer::write_segment;
pub(crate) use slots::Slot;
