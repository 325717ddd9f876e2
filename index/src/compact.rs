//! Compaction: what is live in neighbouring segments goes into a new one, and their files go.
//!
//! In pieces, each of which takes a moment, so that a caller can let others in between them. Until the
//! new segment is published searches see the old ones; rows that are forgotten meanwhile are forgotten
//! and erased in both, because a copy is a row like any other, which only does not count yet. Row
//! numbers of old segments stay good for whoever holds a snapshot with them.
//!
//! Knows segments, their slots and rows. Does not know who reads, or when there is time for this.
//!
//! Invariants: a segment that is compacted gets no more rows; a new segment counts once it is whole
//! and on disk; an old file is overwritten once no snapshot has it and no manifest names it, and a row
//! in it can be erased until it has been.

use std::ops::Range;
use std::sync::Arc;

use crate::codes::BLOCK_ROWS;
use crate::error::{Damage, Error};
use crate::fill::Piece;
use crate::format::{Found, Layout, check_row};
use crate::nouns::{NewRow, OwnedRow, RowMeta};
use crate::segment::{Segment, destroy};
use crate::slots::Slot;
use crate::snapshot::ViewSegment;
use crate::writer::{Index, view_segment};

/// Rows copied in one piece: whole blocks, so that their codes are made at once.
const COPIED_ROWS: usize = BLOCK_ROWS;
/// Rows copied between two syncs, and between two words to the engine.
const SYNCED_ROWS: u32 = 8192;
/// Blocks of an old file overwritten in one piece.
const WIPED_BLOCKS: u32 = 4;
/// One in so many rows of a full segment must be dead for it to be worth the trouble.
const DEAD_SHARE: u64 = 64;

/// What a piece of compaction came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compacting {
    /// There is nothing to compact.
    Nothing,
    /// There is more to do.
    More,
    /// There is more to do, and an engine must follow [`Index::stage`] before it is done: the next
    /// piece may show rows to searches of which the engine has no copy yet.
    Staged,
}

/// A compaction under way.
#[derive(Debug)]
pub(crate) struct Compaction {
    /// The slots of the old segments, by ascending templates.
    pub(crate) sources: Vec<u32>,
    /// The slot of the new segment, if anything was live.
    target: Option<u32>,
    step: Step,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// Rows are copied; the next one is at or after this offset of this source.
    Copy { source: usize, offset: u32 },
    /// The new segment is whole and on disk, and is to be published.
    Publish,
    /// Searches see it, and a manifest is to name it.
    Checkpoint,
    /// Searches that began before that may still read the old segments.
    Release,
    /// The old files are overwritten; next is this block of this source.
    Wipe { source: usize, block: u32 },
}

impl Index {
    /// Does a piece of compaction, and begins one where neighbouring segments have room for the live
    /// rows of each other, or are dead by half: call it again and again, and do other things in between.
    /// None is begun that would write more than `room_bytes`.
    ///
    /// # Errors
    /// [`Error::Unpublished`] where rows were appended or forgotten and not published. [`Error::Io`] while rows are copied, such as
    /// a full disk: the copy is given up and the writer goes on. At any other time the writer stops, unless
    /// the error [left everything as it was](Error::left_all_as_it_was).
    /// [`Error::Damaged`] where a row is not as it was written. [`Error::Stopped`].
    pub fn compact(&mut self, room_bytes: u64) -> Result<Compacting, Error> {
        self.running()?;
        let view = Arc::clone(&self.shared.current.lock());
        let is_shown = |(number, slot): (u32, &Slot)| {
            view.part(number).is_some_and(|part| part.rows == slot.rows && slot.live.is_unchanged_since(&part.live))
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
            Some(Step::Wipe { source, block }) => self.wipe_some(source, block),
        };
        match (done, step) {
            (Err(error @ Error::Io { .. }), None | Some(Step::Copy { .. })) => {
                // Nobody counts on what was written, so it matters only that it goes again.
                let given_up = self.give_up_copy();
                self.stop_if_failed(given_up)?;
                Err(error)
            }
            (Err(error), Some(Step::Checkpoint)) if error.left_all_as_it_was() => Err(error),
            (done, _) => self.stop_if_failed(done),
        }
    }

    /// Which of the listed segments to compact, so that no more than `room_bytes` are written.
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
                let half_dead = dead >= live.max(capacity / DEAD_SHARE).max(1);
                // Those that do not grow any more are not to become many either. Twice what the largest
                // of them has: so a row is copied for this a few times at most.
                let doubles = !grows && last > first && 2 * largest <= live;
                let empty = !grows && live == 0;
                let gain = dead.cast_signed() - live.cast_signed();
                if (half_dead || doubles || empty) && best.as_ref().is_none_or(|(most, _)| gain > *most) {
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
        let range = |number: u32| self.slots[number].range.expect("rows of it were published");
        let range = (range(sources[0]).0, range(sources[sources.len() - 1]).1);
        if let Some(number) = target {
            self.slots[number].range = Some(range);
        }
        let step = if target.is_some() { Step::Copy { source: 0, offset: 0 } } else { Step::Publish };
        self.compaction = Some(Compaction { sources, target, step });
        Ok(Compacting::More)
    }

    fn step(&mut self, step: Step) {
        self.compaction.as_mut().expect("a compaction is under way").step = step;
    }

    fn copy_some(&mut self, mut source: usize, mut offset: u32) -> Result<Compacting, Error> {
        let Compaction { sources, target, .. } = self.compaction.as_ref().expect("a compaction is under way");
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
        for news in news.chunks(Piece::new(Layout::of(self.shared.geometry)).rows_max()) {
            Piece::new(Layout::of(self.shared.geometry)).write(&slot.segment, slot.rows, news, &mut self.writer)?;
            slot.rows += news.len() as u32;
        }
        let mut chains = self.shared.chains.write();
        for (offset, row) in (first..).zip(&news) {
            chains.link(row.subject.0, number * segment_rows + offset);
            slot.live.set(offset);
        }
        drop(chains);
        let is_whole = source == sources.len();
        let is_due = is_whole || slot.rows / SYNCED_ROWS > first / SYNCED_ROWS;
        if is_due {
            slot.segment.pages.sync()?;
            slot.dirty = false;
        }
        self.step(if is_whole { Step::Publish } else { Step::Copy { source, offset } });
        Ok(if is_due { Compacting::Staged } else { Compacting::More })
    }

    /// A live row, checked: what went bad since it was written must not get a checksum that is right.
    fn read_row(&self, number: u32, offset: u32) -> Result<OwnedRow, Error> {
        let slot = &self.slots[number];
        let (pages, identity) = (&slot.segment.pages, slot.segment.identity);
        let record = &pages.records(&self.writer)[offset as usize];
        let bytes = pages.row_bytes(offset, &self.writer);
        let fault = match check_row(pages.layout(), identity, offset, record, bytes) {
            Found::Live => None,
            Found::Bad(fault) => Some(fault),
            found => unreachable!("a live row is {found:?}"),
        };
        if let Some(fault) = fault {
            let (first_template, last_template) = slot.range.expect("it has rows");
            let first = Damage {
                path: slot.segment.path.clone(),
                segment: self.slots.order().iter().position(|&other| other == number).unwrap_or(0),
                first_template,
                last_template,
                offset: fault.offset,
                kind: fault.kind,
                expected: fault.expected,
                found: fault.found,
                bad_rows: 1,
            };
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

    /// Lets the new segment count in the place of the old ones, for searches that begin from now on.
    fn publish_compacted(&mut self) {
        let Compaction { sources, target, .. } = self.compaction.as_ref().expect("a compaction is under way");
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
            slot.segment.pages.show(slot.rows, &mut self.writer);
        }
        let lsn = self.shared.current.lock().lsn;
        let view = Arc::new(self.view(lsn));
        *self.shared.current.lock() = view;
        self.step(Step::Checkpoint);
    }

    /// Lets it count for whoever opens the index.
    fn checkpoint_compacted(&mut self) -> Result<Compacting, Error> {
        self.checkpoint_now()?;
        self.step(Step::Release);
        Ok(Compacting::More)
    }

    /// Goes on once no snapshot has the old segments.
    fn release_sources(&mut self) -> Compacting {
        let sources = &self.compaction.as_ref().expect("a compaction is under way").sources;
        if sources.iter().any(|&number| Arc::strong_count(&self.slots[number].segment) > 1) {
            return Compacting::More;
        }
        self.step(Step::Wipe { source: 0, block: 0 });
        Compacting::Staged
    }

    fn wipe_some(&mut self, source: usize, block: u32) -> Result<Compacting, Error> {
        let sources = &self.compaction.as_ref().expect("a compaction is under way").sources;
        let Some(&number) = sources.get(source) else {
            self.compaction = None;
            return Ok(Compacting::More);
        };
        let segment_rows = self.shared.geometry.segment_rows;
        let slot = &mut self.slots[number];
        let segment = Arc::get_mut(&mut slot.segment).expect("no snapshot has it, and none can take it now");
        let blocks = slot.rows.div_ceil(BLOCK_ROWS as u32);
        let end = blocks.min(block + WIPED_BLOCKS);
        let rows = block * BLOCK_ROWS as u32..slot.rows.min(end * BLOCK_ROWS as u32);
        let mut chains = self.shared.chains.write();
        for offset in rows {
            let row = number * segment_rows + offset;
            let mut subject = self.forgotten.remove(&row);
            if slot.live.has(offset) {
                slot.live.clear(offset);
                subject = Some(segment.pages.records(&self.writer)[offset as usize].subject);
            }
            // Those erased before are in no list.
            if let Some(subject) = subject {
                chains.unlink(subject, row);
            }
        }
        drop(chains);
        slot.dirty = true;
        for block in block..end {
            segment.pages.wipe_block(block)?;
        }
        if end < blocks {
            self.step(Step::Wipe { source, block: end });
            return Ok(Compacting::More);
        }
        segment.pages.sync()?;
        let slot = self.slots.take(number);
        let path = slot.segment.path.clone();
        drop(slot);
        self.storage.remove(&path).map_err(Error::io(&path, "remove"))?;
        self.dir_dirty = true;
        self.shared.chains.write().drop_segment(number);
        self.step(Step::Wipe { source: source + 1, block: 0 });
        Ok(Compacting::More)
    }

    /// The segment that is being made, and the old ones while searches may still read them.
    pub(crate) fn segments_beside(&mut self) -> Vec<ViewSegment> {
        let Some(Compaction { sources, target, step }) = &self.compaction else { return Vec::new() };
        let beside = match step {
            Step::Copy { .. } | Step::Publish => target.as_slice(),
            Step::Checkpoint | Step::Release => sources,
            Step::Wipe { .. } => &[],
        };
        for &number in beside {
            let slot = &self.slots[number];
            slot.segment.pages.show(slot.rows, &mut self.writer);
        }
        beside.iter().filter_map(|&number| view_segment(number, &self.slots[number])).collect()
    }

    /// Old segments of which a part was overwritten since they were synced.
    pub(crate) fn wiped_and_not_synced(&self) -> Vec<u32> {
        match &self.compaction {
            Some(Compaction { sources, step: Step::Wipe { source, .. }, .. }) => {
                sources[*source..].iter().copied().filter(|&number| self.slots[number].dirty).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Takes back a copy that does not count, and removes its file.
    fn give_up_copy(&mut self) -> Result<(), Error> {
        let Some(Compaction { target: Some(number), .. }) = self.compaction.take() else { return Ok(()) };
        let segment_rows = self.shared.geometry.segment_rows;
        let slot = self.slots.take(number);
        let mut chains = self.shared.chains.write();
        for offset in 0..slot.rows {
            let row = number * segment_rows + offset;
            let is_live = slot.live.has(offset);
            let subject = is_live.then(|| slot.segment.pages.records(&self.writer)[offset as usize].subject);
            if let Some(subject) = subject.or_else(|| self.forgotten.remove(&row)) {
                chains.unlink(subject, row);
            }
        }
        chains.drop_segment(number);
        drop(chains);
        let path = slot.segment.path.clone();
        drop(slot);
        destroy(&*self.storage, &path)
    }
}
