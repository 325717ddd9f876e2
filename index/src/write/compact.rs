//! Compaction: copies the live rows of neighbouring segments into a new one and removes the old files.
//!
//! It works in short steps, so that a caller can do other things in between. Until the new segment is
//! published, searches see the old ones. A copy is a row like any other that does not count yet, so a row
//! that is forgotten meanwhile is forgotten and erased in both. Row numbers of old segments stay valid for
//! snapshots that have them.
//!
//! Knows segments, their slots and rows. Does not know who reads, or when there is time for this.
//!
//! Invariants: a segment that is being compacted gets no more rows; a new segment counts once it is whole
//! and on disk; an old file is overwritten once no snapshot has it and no manifest names it, and until
//! then each of its rows can be erased.

use std::ops::Range;
use std::sync::Arc;

use super::Index;
use super::compaction::{Compaction, Step};
use super::publish::published_segment;
use super::segment_writer::RowBatch;
use super::slots::Slot;
use crate::codes::BLOCK_ROWS;
use crate::error::Error;
use crate::format::{Found, Layout, check_row};
use crate::read::PublishedSegment;
use crate::storage::{Segment, destroy};
use crate::types::{NewRow, OwnedRow, RowMeta};

/// Rows copied in one step: whole blocks, so that each is encoded at once.
const COPIED_ROWS: usize = BLOCK_ROWS;
/// Rows copied between two syncs, and between two calls of [`Index::stage`].
const SYNCED_ROWS: u32 = 8192;
/// Blocks of an old file overwritten in one step.
const ZEROED_BLOCKS: u32 = 4;
/// At least one in this many rows of a full segment must be dead to make compaction worthwhile.
const DEAD_SHARE: u64 = 64;

/// The result of one step of compaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compacting {
    /// There is nothing to compact.
    Nothing,
    /// There is more to do.
    More,
    /// There is more to do, and an engine must follow [`Index::stage`] first: the next step may publish rows
    /// of which the engine has no copy yet.
    Staged,
}

impl Index {
    /// Does one step of compaction. Begins one if neighbouring segments can be merged or at least half of
    /// their rows are dead. Call it repeatedly, and do other things in between. It does not begin a
    /// compaction that would write more than `room_bytes`.
    ///
    /// # Errors
    /// [`Error::Unpublished`] if rows were appended or forgotten and not published. [`Error::Io`] while rows
    /// are copied, such as a full disk: the copy is abandoned and the writer continues. At any other time
    /// the writer stops, unless the step [changed nothing](Error::changed_nothing). [`Error::Damaged`] if a
    /// row is damaged. [`Error::Stopped`].
    pub fn compact(&mut self, room_bytes: u64) -> Result<Compacting, Error> {
        self.running()?;
        let view = Arc::clone(&self.shared.current.lock());
        let is_shown = |(number, slot): (u32, &Slot)| {
            view.segment_in(number)
                .is_some_and(|part| part.rows == slot.rows && slot.live.is_unchanged_since(&part.live))
        };
        if !self.slots.listed().all(is_shown) {
            return Err(Error::Unpublished);
        }
        drop(view);
        let step = self.compaction.as_ref().map(|compaction| compaction.step);
        let done = match step {
            None => self.begin_compaction(room_bytes),
            Some(Step::Copy { source, offset }) => self.copy_some(source, offset),
            Some(Step::Publish) => {
                self.publish_compacted();
                Ok(Compacting::More)
            }
            Some(Step::Checkpoint) => self.checkpoint_compacted(),
            Some(Step::Release) => Ok(self.release_sources()),
            Some(Step::Zero { source, block }) => self.zero_some(source, block),
        };
        match (done, step) {
            (Err(error @ Error::Io { .. }), None | Some(Step::Copy { .. })) => {
                // Nothing depends on the copy, so it only has to be removed again.
                let abandoned = self.abandon_copy();
                self.stop_if_failed(abandoned)?;
                Err(error)
            }
            (Err(error), Some(Step::Checkpoint)) if error.changed_nothing() => Err(error),
            (done, _) => self.stop_if_failed(done),
        }
    }

    /// Which neighbours in the order to compact, if any, so that at most `room_bytes` are written.
    fn due(&self, room_bytes: u64) -> Option<Range<usize>> {
        let capacity = u64::from(self.shared.geometry.segment_rows);
        let row_bytes = (Layout::of(self.shared.geometry).file_bytes() as u64).div_ceil(capacity);
        let count = |(_, slot): (u32, &Slot)| (u64::from(slot.rows), slot.live.count(slot.rows));
        let counts: Vec<(u64, u64)> = self.slots.listed().map(count).collect();
        let mut best: Option<(i64, Range<usize>)> = None;
        for first in 0..counts.len() {
            let (mut rows, mut live, mut largest) = (0, 0, 0);
            for (last, &(more_rows, more_live)) in counts.iter().enumerate().skip(first) {
                rows += more_rows;
                live += more_live;
                largest = largest.max(more_live);
                if live > capacity || live * row_bytes > room_bytes {
                    break;
                }
                let (dead, grows) = (rows - live, last + 1 == counts.len());
                let is_half_dead = dead >= live.max(capacity / DEAD_SHARE).max(1);
                // Small segments that no longer grow are merged too. The merged one has twice the rows of the
                // largest, so that a row is copied only a few times for this.
                let is_doubled = !grows && last > first && 2 * largest <= live;
                let is_empty = !grows && live == 0;
                let gain = dead.cast_signed() - live.cast_signed();
                if (is_half_dead || is_doubled || is_empty) && best.as_ref().is_none_or(|(most, _)| gain > *most) {
                    best = Some((gain, first..last + 1));
                }
            }
        }
        best.map(|(_, places)| places)
    }

    fn begin_compaction(&mut self, room_bytes: u64) -> Result<Compacting, Error> {
        let Some(places) = self.due(room_bytes) else { return Ok(Compacting::Nothing) };
        let sources = self.slots.order()[places].to_vec();
        let is_live = |number: &u32| self.slots[*number].live.next(0, self.slots[*number].rows).is_some();
        let target = if !sources.iter().any(is_live) {
            None
        } else if self.slots.free().is_none() {
            return Ok(Compacting::Nothing);
        } else {
            let file = self.take_file_number()?;
            let segment = Segment::create(&*self.storage, &self.dir, file, Layout::of(self.shared.geometry))?;
            Some(self.add_segment(segment))
        };
        let range = |number: u32| self.slots[number].range.expect("it has published rows");
        let range = (range(sources[0]).0, range(sources[sources.len() - 1]).1);
        if let Some(number) = target {
            self.slots[number].range = Some(range);
        }
        let step = if target.is_some() { Step::Copy { source: 0, offset: 0 } } else { Step::Publish };
        self.compaction = Some(Compaction { sources, target, step });
        Ok(Compacting::More)
    }

    fn step(&mut self, step: Step) {
        self.compaction.as_mut().expect("a compaction is running").step = step;
    }

    fn copy_some(&mut self, mut source: usize, mut offset: u32) -> Result<Compacting, Error> {
        let Compaction { sources, target, .. } = self.compaction.as_ref().expect("a compaction is running");
        let (sources, number) = (sources.clone(), target.expect("rows are copied to a new segment"));
        let mut rows: Vec<OwnedRow> = Vec::with_capacity(COPIED_ROWS);
        while rows.len() < COPIED_ROWS && source < sources.len() {
            let slot = &self.slots[sources[source]];
            if let Some(at) = slot.live.next(offset, slot.rows) {
                rows.push(self.read_row(sources[source], at)?);
                offset = at + 1;
            } else {
                (source, offset) = (source + 1, 0);
            }
        }
        let segment_rows = self.shared.geometry.segment_rows;
        let slot = &mut self.slots[number];
        let news: Vec<NewRow<'_>> = rows.iter().map(OwnedRow::as_new).collect();
        let first = slot.rows;
        slot.dirty = true;
        for news in news.chunks(RowBatch::new(Layout::of(self.shared.geometry)).rows_max()) {
            RowBatch::new(Layout::of(self.shared.geometry)).write(&slot.segment, slot.rows, news, &mut self.token)?;
            slot.rows += news.len() as u32;
        }
        let mut subject_rows = self.shared.subject_rows.write();
        for (offset, row) in (first..).zip(&news) {
            subject_rows.link(row.subject.0, number * segment_rows + offset);
            slot.live.set(offset);
        }
        drop(subject_rows);
        let is_whole = source == sources.len();
        let is_due = is_whole || slot.rows / SYNCED_ROWS > first / SYNCED_ROWS;
        if is_due {
            slot.segment.pages.sync()?;
            slot.dirty = false;
        }
        self.step(if is_whole { Step::Publish } else { Step::Copy { source, offset } });
        Ok(if is_due { Compacting::Staged } else { Compacting::More })
    }

    /// Reads and checks a live row: a row that has decayed must not get a correct checksum.
    fn read_row(&self, number: u32, offset: u32) -> Result<OwnedRow, Error> {
        let slot = &self.slots[number];
        let (pages, identity) = (&slot.segment.pages, slot.segment.identity);
        let record = &pages.records(&self.token)[offset as usize];
        let bytes = pages.row_bytes(offset, &self.token);
        let fault = match check_row(pages.layout().meta_at(offset), identity, offset, record, bytes) {
            Found::Live => None,
            Found::Damaged(fault) => Some(fault),
            found => unreachable!("a live row is {found:?}"),
        };
        if let Some(fault) = fault {
            let place = self.slots.order().iter().position(|&other| other == number).unwrap_or(0);
            let range = slot.range.expect("it has rows");
            let first = fault.in_segment(slot.segment.path.clone(), place, range, 1);
            return Err(Error::Damaged { count: 1, first: Box::new(first) });
        }
        let RowMeta { template, subject, hand, label, source } = record.meta();
        Ok(OwnedRow {
            template,
            subject,
            hand,
            label: label.to_owned(),
            source,
            vector: bytemuck::cast_slice(bytes).to_vec(),
        })
    }

    /// Replaces the old segments by the new one, for searches that begin from now on.
    fn publish_compacted(&mut self) {
        let Compaction { sources, target, .. } = self.compaction.as_ref().expect("a compaction is running");
        let target = *target;
        let first = self.slots.order().iter().position(|number| *number == sources[0]).expect("sources are listed");
        let dead = |number: u32| {
            let slot = &self.slots[number];
            u64::from(slot.rows) - slot.live.count(slot.rows)
        };
        let (dead_before, dead_now) = (sources.iter().copied().map(dead).sum::<u64>(), target.map_or(0, dead));
        self.dead = self.dead - dead_before + dead_now;
        self.slots.replace(first..first + sources.len(), target);
        if let Some(number) = target {
            let slot = &self.slots[number];
            slot.segment.pages.show(slot.rows, &mut self.token);
        }
        let lsn = self.shared.current.lock().lsn;
        let view = Arc::new(self.view(lsn));
        *self.shared.current.lock() = view;
        self.step(Step::Checkpoint);
    }

    /// Makes the replacement durable.
    fn checkpoint_compacted(&mut self) -> Result<Compacting, Error> {
        self.checkpoint_now()?;
        self.step(Step::Release);
        Ok(Compacting::More)
    }

    /// Continues once no snapshot has the old segments.
    fn release_sources(&mut self) -> Compacting {
        let sources = &self.compaction.as_ref().expect("a compaction is running").sources;
        if sources.iter().any(|&number| Arc::strong_count(&self.slots[number].segment) > 1) {
            return Compacting::More;
        }
        self.step(Step::Zero { source: 0, block: 0 });
        Compacting::Staged
    }

    fn zero_some(&mut self, source: usize, block: u32) -> Result<Compacting, Error> {
        let sources = &self.compaction.as_ref().expect("a compaction is running").sources;
        let Some(&number) = sources.get(source) else {
            self.compaction = None;
            return Ok(Compacting::More);
        };
        let segment_rows = self.shared.geometry.segment_rows;
        let slot = &mut self.slots[number];
        let segment = Arc::get_mut(&mut slot.segment).expect("no snapshot has it, and none can get it any more");
        let blocks = slot.rows.div_ceil(BLOCK_ROWS as u32);
        let end = blocks.min(block + ZEROED_BLOCKS);
        let rows = block * BLOCK_ROWS as u32..slot.rows.min(end * BLOCK_ROWS as u32);
        let mut subject_rows = self.shared.subject_rows.write();
        for offset in rows {
            let row = number * segment_rows + offset;
            let mut subject = self.forgotten.remove(&row);
            if slot.live.has(offset) {
                slot.live.clear(offset);
                subject = Some(segment.pages.records(&self.token)[offset as usize].subject);
            }
            // Rows that are already erased are in no list.
            if let Some(subject) = subject {
                subject_rows.unlink(subject, row);
            }
        }
        drop(subject_rows);
        slot.dirty = true;
        for block in block..end {
            segment.pages.zero_block(block)?;
        }
        if end < blocks {
            self.step(Step::Zero { source, block: end });
            return Ok(Compacting::More);
        }
        segment.pages.sync()?;
        let slot = self.slots.take(number);
        let path = slot.segment.path.clone();
        drop(slot);
        self.storage.remove(&path).map_err(Error::io(&path, "remove"))?;
        self.dir_dirty = true;
        self.shared.subject_rows.write().drop_segment(number);
        self.step(Step::Zero { source: source + 1, block: 0 });
        Ok(Compacting::More)
    }

    /// The new segment before it is published, or the old ones while searches may still read them.
    pub(super) fn segments_to_stage(&mut self) -> Vec<PublishedSegment> {
        let Some(Compaction { sources, target, step }) = &self.compaction else { return Vec::new() };
        let numbers = match step {
            Step::Copy { .. } | Step::Publish => target.as_slice(),
            Step::Checkpoint | Step::Release => sources,
            Step::Zero { .. } => &[],
        };
        for &number in numbers {
            let slot = &self.slots[number];
            slot.segment.pages.show(slot.rows, &mut self.token);
        }
        numbers.iter().filter_map(|&number| published_segment(number, &self.slots[number])).collect()
    }

    /// Old segments that were partly overwritten since they were last synced.
    pub(super) fn zeroed_and_not_synced(&self) -> Vec<u32> {
        match &self.compaction {
            Some(Compaction { sources, step: Step::Zero { source, .. }, .. }) => {
                sources[*source..].iter().copied().filter(|&number| self.slots[number].dirty).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Abandons an unfinished copy and removes its file.
    fn abandon_copy(&mut self) -> Result<(), Error> {
        let Some(Compaction { target: Some(number), .. }) = self.compaction.take() else { return Ok(()) };
        let segment_rows = self.shared.geometry.segment_rows;
        let slot = self.slots.take(number);
        let mut subject_rows = self.shared.subject_rows.write();
        for offset in 0..slot.rows {
            let row = number * segment_rows + offset;
            let is_live = slot.live.has(offset);
            let subject = is_live.then(|| slot.segment.pages.records(&self.token)[offset as usize].subject);
            if let Some(subject) = subject.or_else(|| self.forgotten.remove(&row)) {
                subject_rows.unlink(subject, row);
            }
        }
        subject_rows.drop_segment(number);
        drop(subject_rows);
        let path = slot.segment.path.clone();
        drop(slot);
        destroy(&*self.storage, &path)
    }
}
