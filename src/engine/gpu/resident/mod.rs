//! Where on the device do the codes of each row lie?
//!
//! A table of segments and of the extents of slots that they occupy in the slabs. Rows without codes, the last
//! few of a segment, are not in it. Pure bookkeeping: sends nothing, does not know wgpu or which rows are live.
//!
//! Invariants: extents begin at multiples of 64 in their slab and in their segment, so that blocks of
//! codes stay whole; all extents of a segment but the last are full; free slots are zero.

use std::collections::BTreeMap;
use std::ops::Range;

use thenar_index::codes::BLOCK_ROWS;

use super::device::batch::Run;
use super::device::kernels::SLOT_STEP;
use super::device::layout::row_bytes;
use crate::engine::{GalleryView, SegmentView};

/// Slots are allocated in multiples of this: one block of codes.
const BLOCK: u32 = BLOCK_ROWS as u32;
/// Fewest slots of a new slab, so that a small gallery can grow.
const SLAB_SLOTS_MIN: u32 = 4096;

/// Consecutive slots that hold consecutive rows of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// Index of the slab.
    pub slab: usize,
    /// First slot in the slab.
    pub slot: u32,
    /// First row in the segment.
    pub offset: u32,
    /// Slots.
    pub room: u32,
}

/// Rows of a segment whose codes are to be uploaded to consecutive slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placement {
    /// Index of the segment in the view.
    pub segment: usize,
    /// Rows of the segment.
    pub rows: Range<u32>,
    /// Index of the slab.
    pub slab: usize,
    /// First slot in the slab.
    pub slot: u32,
}

/// A slab must be added before everything fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SlabWanted {
    /// Slots that would leave room to grow.
    pub slots: u32,
    /// Fewest slots with which everything fits.
    pub slots_least: u32,
}

#[derive(Debug)]
struct SlabSpace {
    base: u32,
    slots: u32,
    /// Ascending, not touching.
    free: Vec<Range<u32>>,
}

impl SlabSpace {
    /// One past the last slot in use.
    fn used_end(&self) -> u32 {
        self.free.last().filter(|range| range.end == self.slots).map_or(self.slots, |range| range.start)
    }
}

#[derive(Debug, Default)]
struct ResidentSegment {
    identity: u64,
    count: u32,
    extents: Vec<Extent>,
}

impl ResidentSegment {
    fn room(&self) -> u32 {
        self.extents.last().map_or(0, |last| last.offset + last.room)
    }
}

/// Slots of all slabs, and the segment they belong to.
#[derive(Debug, Clone, Copy)]
struct Placed {
    slot_first: u32,
    slot_end: u32,
    first_row: u32,
    offset: u32,
}

/// See the module's page.
#[derive(Debug, Default)]
pub(super) struct Resident {
    /// The generation of the device that this table describes; 0 is none.
    pub generation: u64,
    /// Components of a row.
    pub dim: usize,
    slabs: Vec<SlabSpace>,
    segments: BTreeMap<u32, ResidentSegment>,
    placed: Vec<Placed>,
}

impl Resident {
    /// An empty table for an empty device.
    pub(super) fn empty(generation: u64, dim: usize) -> Self {
        Self { generation, dim, ..Self::default() }
    }

    /// Slots of all slabs together.
    pub(super) fn slots(&self) -> u32 {
        self.slabs.last().map_or(0, |last| last.base + last.slots)
    }

    /// Number of slabs.
    pub(super) fn slab_count(&self) -> usize {
        self.slabs.len()
    }

    /// Adds the slots of a slab that was added to the device.
    pub(super) fn add_slab(&mut self, slots: u32) {
        let base = self.slots();
        self.slabs.push(SlabSpace { base, slots, free: std::iter::once(0..slots).collect() });
    }

    /// Whether every code of `view` lies on the device.
    pub(super) fn covers(&self, view: &GalleryView<'_>) -> bool {
        self.dim == view.dim
            && view.segments.iter().all(|segment| {
                let count = segment.coded(view.dim);
                count == 0
                    || self
                        .segments
                        .get(&segment.first_row)
                        .is_some_and(|held| held.identity == segment.identity && held.count as usize >= count)
            })
    }

    /// Bytes of codes that `view` has and the device does not have.
    pub(super) fn missing_bytes(&self, view: &GalleryView<'_>) -> u64 {
        let rows: u64 = view
            .segments
            .iter()
            .map(|segment| {
                let held = self.segments.get(&segment.first_row).filter(|held| held.identity == segment.identity);
                let held = held.map_or(0, |held| held.count as usize);
                segment.coded(view.dim).saturating_sub(held) as u64
            })
            .sum();
        rows * row_bytes(view.dim) as u64
    }

    /// Drops the segments that `view` does not have, or has under another identity. Returns the slots that they
    /// occupied, which the device must zero before it does anything else.
    pub(super) fn drop_stale(&mut self, view: &GalleryView<'_>) -> Vec<Extent> {
        let wanted: BTreeMap<u32, u64> =
            view.segments.iter().map(|segment| (segment.first_row, segment.identity)).collect();
        let mut freed = Vec::new();
        self.segments.retain(|first_row, segment| {
            let keep = wanted.get(first_row) == Some(&segment.identity);
            if !keep {
                freed.append(&mut segment.extents);
            }
            keep
        });
        for extent in &freed {
            self.give_back(extent);
        }
        self.index();
        freed
    }

    /// Finds room for the codes that `view` has and the device does not have. On success the table says that they
    /// are there, and the caller must upload them. On failure nothing has changed.
    pub(super) fn place(&mut self, view: &GalleryView<'_>) -> Result<Vec<Placement>, SlabWanted> {
        let mut added: Vec<(u32, Extent)> = Vec::new();
        let mut shortfall = 0_u64;
        for segment in &view.segments {
            let count = u32_of(segment.coded(view.dim));
            let held = self.segments.get(&segment.first_row);
            let (held_room, growing) = held.map_or((0, false), |held| (held.room(), held.count > 0));
            let mut needed = count.saturating_sub(held_room).next_multiple_of(BLOCK);
            if needed == 0 || count == 0 {
                continue;
            }
            // A segment that has grown will grow again: leave room, if there is some.
            let mut spare = if growing { (held_room / 2).next_multiple_of(BLOCK) } else { 0 };
            let mut offset = held_room;
            while needed > 0 {
                let Some((slab, slot, room)) = self.take(needed, spare) else {
                    break;
                };
                added.push((segment.first_row, Extent { slab, slot, offset, room }));
                offset += room;
                spare = 0;
                needed = needed.saturating_sub(room);
            }
            shortfall += u64::from(needed);
        }
        if shortfall > 0 {
            for (_, extent) in &added {
                self.give_back(extent);
            }
            let least = u32::try_from(shortfall).unwrap_or(u32::MAX - SLOT_STEP).next_multiple_of(SLOT_STEP);
            let grown = (self.slots() / 2).next_multiple_of(SLOT_STEP);
            return Err(SlabWanted { slots: least.max(grown).max(SLAB_SLOTS_MIN), slots_least: least });
        }
        for (first_row, extent) in added {
            self.segments.entry(first_row).or_default().extents.push(extent);
        }
        let mut placements = Vec::new();
        for (number, segment) in view.segments.iter().enumerate() {
            let count = u32_of(segment.coded(view.dim));
            let Some(held) = self.segments.get_mut(&segment.first_row) else {
                continue;
            };
            let new = held.count..count;
            for extent in &held.extents {
                let rows = new.start.max(extent.offset)..new.end.min(extent.offset + extent.room);
                if rows.start < rows.end {
                    placements.push(Placement {
                        segment: number,
                        slab: extent.slab,
                        slot: extent.slot + (rows.start - extent.offset),
                        rows,
                    });
                }
            }
            held.identity = segment.identity;
            held.count = held.count.max(count);
        }
        self.index();
        Ok(placements)
    }

    /// The runs of used slots within a range of all slots, at most one per slab. `range.start`: a multiple of
    /// [`SLOT_STEP`].
    pub(super) fn runs(&self, range: &Range<u32>) -> Vec<Run> {
        let first = self.slabs.partition_point(|slab| slab.base + slab.slots <= range.start);
        let mut runs = Vec::new();
        for (index, slab) in self.slabs.iter().enumerate().skip(first) {
            if slab.base >= range.end {
                break;
            }
            let slot_first = range.start.saturating_sub(slab.base);
            let slot_end = (range.end - slab.base).min(slab.used_end());
            if slot_first < slot_end {
                runs.push(Run { slab: index, slot_first, slot_end, slot_base: slab.base });
            }
        }
        runs
    }

    /// The slab and slot of a row, if its codes lie on the device.
    pub(super) fn slot_of(&self, row: u32) -> Option<(usize, u32)> {
        let (first_row, segment) = self.segments.range(..=row).next_back()?;
        let offset = row - first_row;
        if offset >= segment.count {
            return None;
        }
        let extent = segment.extents[segment.extents.partition_point(|extent| extent.offset <= offset) - 1];
        Some((extent.slab, extent.slot + (offset - extent.offset)))
    }

    /// Turns slots into rows of `view`.
    pub(super) fn rows_of<'a>(&'a self, view: &'a GalleryView<'a>) -> RowsOf<'a> {
        let by_first_row = view.segments.iter().map(|segment| (segment.first_row, segment)).collect();
        RowsOf { placed: &self.placed, by_first_row, dim: view.dim }
    }

    fn take(&mut self, needed: u32, spare: u32) -> Option<(usize, u32, u32)> {
        // Room for everything if there is, otherwise the largest hole.
        let mut best: Option<(usize, usize, u32)> = None;
        for (slab, space) in self.slabs.iter().enumerate() {
            for (hole, range) in space.free.iter().enumerate() {
                let size = range.end - range.start;
                let fits = |size: u32| size >= needed;
                let better = match best {
                    None => true,
                    Some((_, _, held)) if fits(held) => fits(size) && size < held,
                    Some((_, _, held)) => size > held,
                };
                if better {
                    best = Some((slab, hole, size));
                }
            }
        }
        let (slab, hole, size) = best?;
        let room = size.min(needed.saturating_add(spare));
        let free = &mut self.slabs[slab].free;
        let slot = free[hole].start;
        free[hole].start += room;
        if free[hole].is_empty() {
            free.remove(hole);
        }
        Some((slab, slot, room))
    }

    fn give_back(&mut self, extent: &Extent) {
        let free = &mut self.slabs[extent.slab].free;
        let mut range = extent.slot..extent.slot + extent.room;
        let at = free.partition_point(|hole| hole.start < range.start);
        if free.get(at).is_some_and(|next| next.start == range.end) {
            range.end = free.remove(at).end;
        }
        if at > 0 && free[at - 1].end == range.start {
            free[at - 1].end = range.end;
        } else {
            free.insert(at, range);
        }
    }

    fn index(&mut self) {
        self.placed.clear();
        for (&first_row, segment) in &self.segments {
            for extent in &segment.extents {
                let slot_first = self.slabs[extent.slab].base + extent.slot;
                self.placed.push(Placed {
                    slot_first,
                    slot_end: slot_first + extent.room,
                    first_row,
                    offset: extent.offset,
                });
            }
        }
        self.placed.sort_unstable_by_key(|placed| placed.slot_first);
    }
}

/// Turns slots into rows of a view; made by [`Resident::rows_of`].
pub(super) struct RowsOf<'a> {
    placed: &'a [Placed],
    by_first_row: BTreeMap<u32, &'a SegmentView<'a>>,
    dim: usize,
}

impl RowsOf<'_> {
    /// The row at a slot, if the view has its codes and it is live there: the segment of the view and the row's
    /// place in it. A row whose codes are newer than the view is one of its rows without codes.
    pub(super) fn live_row(&self, slot: u32) -> Option<(&SegmentView<'_>, usize)> {
        let next = self.placed.partition_point(|placed| placed.slot_first <= slot);
        let placed = self.placed[..next].last().filter(|placed| slot < placed.slot_end)?;
        let segment = self.by_first_row.get(&placed.first_row)?;
        let offset = (placed.offset + (slot - placed.slot_first)) as usize;
        (offset < segment.coded(self.dim) && segment.is_live(offset)).then_some((*segment, offset))
    }
}

fn u32_of(count: usize) -> u32 {
    u32::try_from(count).expect("rows are numbered in u32")
}

#[cfg(test)]
mod tests;
