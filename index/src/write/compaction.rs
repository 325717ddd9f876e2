//! The state of a compaction.

/// A running compaction.
#[derive(Debug)]
pub(crate) struct Compaction {
    /// The slots of the old segments, by ascending templates.
    pub(super) sources: Vec<u32>,
    /// The slot of the new segment; none if the old ones have no live rows.
    pub(super) target: Option<u32>,
    pub(super) step: Step,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    /// Copies rows. The next one is at or after this offset of this source.
    Copy { source: usize, offset: u32 },
    /// Publishes the new segment, which is whole and on disk.
    Publish,
    /// Searches see the new segment; writes a manifest that names it.
    Checkpoint,
    /// Waits for searches that began earlier and may still read the old segments.
    Release,
    /// Overwrites the old files. The next block is this block of this source.
    Zero { source: usize, block: u32 },
}
