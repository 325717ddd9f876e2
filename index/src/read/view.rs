//! What the writer publishes and readers share: the segments, row counts and live bits of one moment.

use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::{LiveBits, SubjectRows};
use crate::reader_barrier::ReaderBarrier;
use crate::storage::{Lock, Segment};
use crate::types::{Geometry, Lsn, TemplateId};

/// What the writer shares with readers. It holds the lock, which therefore outlives all of them; an
/// index that is opened again shares the lock too.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) reader_barrier: Arc<ReaderBarrier>,
    pub(crate) current: Mutex<Arc<View>>,
    pub(crate) subject_rows: RwLock<SubjectRows>,
    pub(crate) geometry: Geometry,
    pub(crate) lock: Arc<Lock>,
}

/// One publication: which segments there are, and which of their rows are live.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) lsn: Lsn,
    /// By ascending templates.
    pub(crate) segments: Vec<PublishedSegment>,
    pub(crate) live: u64,
    pub(crate) dead: u64,
    /// By slot: the position in `segments`, if the slot is published.
    places: Vec<Option<u32>>,
}

impl View {
    pub(crate) fn new(lsn: Lsn, segments: Vec<PublishedSegment>, live: u64, dead: u64) -> Self {
        let mut places = Vec::new();
        for (place, part) in (0..).zip(&segments) {
            let slot = part.slot as usize;
            if places.len() <= slot {
                places.resize(slot + 1, None);
            }
            assert_eq!(places[slot].replace(place), None);
        }
        Self { lsn, segments, live, dead, places }
    }

    /// The position of the segment in a slot.
    pub(super) fn place(&self, slot: u32) -> Option<usize> {
        Some((*self.places.get(slot as usize)?)? as usize)
    }

    /// The segment in a slot, if it is published.
    pub(crate) fn segment_in(&self, slot: u32) -> Option<&PublishedSegment> {
        Some(&self.segments[self.place(slot)?])
    }
}

/// One segment of a publication.
#[derive(Debug, Clone)]
pub(crate) struct PublishedSegment {
    pub(crate) segment: Arc<Segment>,
    pub(crate) live: LiveBits,
    pub(crate) slot: u32,
    pub(crate) rows: u32,
    pub(crate) first_template: TemplateId,
    pub(crate) last_template: TemplateId,
}
