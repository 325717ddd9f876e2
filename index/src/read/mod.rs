//! What searches read: snapshots over one publication of the writer.

mod live_bits;
mod snapshot;
mod subject_rows;
mod view;

pub(crate) use live_bits::LiveBits;
pub use snapshot::{Reader, SegmentView, Snapshot};
pub(crate) use subject_rows::SubjectRows;
pub(crate) use view::{PublishedSegment, Shared, View};
