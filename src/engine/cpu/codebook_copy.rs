//! The engine's own copy of codebook codes, in large pages.
//!
//! A first pass over codebook codes for one probe is bound by memory, and a file is mapped in pages of 4 KiB:
//! the processor prefetches only within a page, and translates the address of each. Anonymous memory comes in
//! pages of 2 MiB if the system has them, which saves a sixth of the time. So the codebook codes of whole
//! segments, 49 bytes per row of 512, are copied once; the last segment, which still grows, is read from the map.
//!
//! Knows segments and their identities. Does not know probes or certificates.
//!
//! Invariants: a copy has the codebook codes that its segment had, except for rows that were erased
//! since, which are zeros; memory is zeroed before it is given to another segment or back to the
//! system. If there is no memory for a copy, there is no copy, and the map is read.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use memmap2::MmapMut;
use thenar_index::codes::{BLOCK_ROWS, clear_lane};
use zeroize::Zeroize;

use crate::engine::{GalleryView, SegmentView};

/// Bytes of a slab: many large pages, so that little is lost at its end.
const SLAB_BYTES: usize = 64 << 20;

/// Where a segment's copy is.
struct Place {
    slab: usize,
    at: usize,
    bytes: usize,
    /// Bytes of each of the blocks in it.
    block_bytes: usize,
    first_row: u32,
}

/// See the module.
#[derive(Default)]
pub(super) struct CodebookCopy {
    /// Zeros outside of copies.
    slabs: Vec<MmapMut>,
    /// The parts of slabs without a copy: slab and bytes, ascending, not touching each other.
    free: Vec<(usize, Range<usize>)>,
    /// By the identity of a segment.
    places: HashMap<u64, Place>,
}

impl CodebookCopy {
    /// Bytes of all copies.
    pub(super) fn bytes(&self) -> usize {
        self.places.values().map(|place| place.bytes).sum()
    }

    /// The segments that should have copies: all but the last are whole.
    fn whole<'v, 'a>(view: &'v GalleryView<'a>) -> impl Iterator<Item = &'v SegmentView<'a>> {
        let count = view.segments.len().saturating_sub(1);
        view.segments[..count].iter().filter(|block| !block.codes.codebook.is_empty())
    }

    /// Whether [`CodebookCopy::follow`] has nothing to do.
    pub(super) fn is_up_to(&self, view: &GalleryView<'_>) -> bool {
        let is_here = |block: &SegmentView<'_>| {
            let place = self.places.get(&block.identity);
            place.is_some_and(|place| place.bytes == block.codes.codebook.len() && place.first_row == block.first_row)
        };
        Self::whole(view).all(is_here) && self.places.len() == Self::whole(view).count()
    }

    /// Gives up the copies of segments that are not whole in `view`, and copies those that are new in it.
    pub(super) fn follow(&mut self, view: &GalleryView<'_>) {
        let mut gone: Vec<u64> = self.places.keys().copied().collect();
        gone.retain(|identity| !Self::whole(view).any(|block| block.identity == *identity));
        gone.into_iter().for_each(|identity| self.give_up(identity));
        for block in Self::whole(view) {
            match self.places.entry(block.identity) {
                Entry::Occupied(mut place) if place.get().bytes == block.codes.codebook.len() => {
                    place.get_mut().first_row = block.first_row;
                }
                Entry::Occupied(_) => {
                    self.give_up(block.identity);
                    self.copy(block);
                }
                Entry::Vacant(_) => self.copy(block),
            }
        }
    }

    fn copy(&mut self, block: &SegmentView<'_>) {
        let bytes = block.codes.codebook.len();
        let Some(place) = self.room(bytes) else { return };
        self.slabs[place.slab][place.at..][..bytes].copy_from_slice(block.codes.codebook);
        let block_bytes = bytes / (block.codes.rows() / BLOCK_ROWS);
        self.places.insert(block.identity, Place { first_row: block.first_row, block_bytes, ..place });
    }

    fn give_up(&mut self, identity: u64) {
        let Some(place) = self.places.remove(&identity) else { return };
        let mut room = place.at..place.at + place.bytes;
        self.slabs[place.slab][room.clone()].zeroize();
        let at = self.free.partition_point(|(slab, hole)| (*slab, hole.start) < (place.slab, room.start));
        if self.free.get(at).is_some_and(|(slab, next)| *slab == place.slab && next.start == room.end) {
            room.end = self.free.remove(at).1.end;
        }
        match self.free[..at].last_mut() {
            Some((slab, before)) if *slab == place.slab && before.end == room.start => before.end = room.end,
            _ => self.free.insert(at, (place.slab, room)),
        }
    }

    /// A place of so many bytes, all zero: in the smallest hole that is large enough, so that segments of all
    /// sizes may come and go.
    fn room(&mut self, bytes: usize) -> Option<Place> {
        let fits = self.free.iter().enumerate().filter(|(_, (_, hole))| hole.len() >= bytes);
        let at = match fits.min_by_key(|(_, (_, hole))| hole.len()) {
            Some((at, _)) => at,
            None => {
                let slab = MmapMut::map_anon(SLAB_BYTES.max(bytes)).ok()?;
                // Without large pages this is slower but still correct.
                #[cfg(target_os = "linux")]
                let _ = slab.advise(memmap2::Advice::HugePage);
                self.free.push((self.slabs.len(), 0..slab.len()));
                self.slabs.push(slab);
                self.free.len() - 1
            }
        };
        let (slab, hole) = &mut self.free[at];
        let place = Place { slab: *slab, at: hole.start, bytes, block_bytes: 0, first_row: 0 };
        hole.start += bytes;
        if hole.start == hole.end {
            self.free.remove(at);
        }
        Some(place)
    }

    /// Overwrites the codebook codes of these rows with zeros.
    pub(super) fn erase(&mut self, rows: &[u32]) {
        for place in self.places.values() {
            let block_bytes = place.block_bytes;
            let copy = &mut self.slabs[place.slab][place.at..][..place.bytes];
            let count = copy.len() / block_bytes * BLOCK_ROWS;
            for row in rows {
                let Some(offset) = row.checked_sub(place.first_row).map(|offset| offset as usize) else { continue };
                if offset < count {
                    clear_lane(copy, block_bytes, offset);
                }
            }
        }
    }

    /// `view`, with codebook codes read from the copies that there are.
    pub(super) fn over<'s>(&'s self, view: &GalleryView<'s>) -> GalleryView<'s> {
        let over = |block: &SegmentView<'s>| {
            let mut codes = block.codes;
            // A view older than the copy has fewer blocks.
            if let Some(place) = self.places.get(&block.identity)
                && place.bytes >= codes.codebook.len()
            {
                codes.codebook = &self.slabs[place.slab][place.at..][..codes.codebook.len()];
            }
            SegmentView { codes, ..*block }
        };
        GalleryView { dim: view.dim, segments: view.segments.iter().map(over).collect() }
    }
}

impl Drop for CodebookCopy {
    fn drop(&mut self) {
        for place in self.places.values() {
            self.slabs[place.slab][place.at..][..place.bytes].zeroize();
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use thenar_index::codes::{OwnedCodes, codebook_bytes};

    use super::*;

    const DIM: usize = 64;

    fn codes(seed: usize, blocks: usize) -> OwnedCodes {
        let value = |i: usize| f16::from_f32(((i * 7919 + seed * 104_729) % 1009) as f32 / 1009.0 - 0.5);
        OwnedCodes::of(&(0..blocks * BLOCK_ROWS * DIM).map(value).collect::<Vec<_>>(), DIM)
    }

    fn view<'a>(segments: &'a [(u64, u32, OwnedCodes)]) -> GalleryView<'a> {
        let block = |(identity, first_row, codes): &'a (u64, u32, OwnedCodes)| SegmentView {
            identity: *identity,
            first_row: *first_row,
            rows: &[],
            live: &[],
            codes: codes.as_codes(),
        };
        GalleryView { dim: DIM, segments: segments.iter().map(block).collect() }
    }

    /// Whether what is read of each segment lies in a slab.
    fn copied(copy: &CodebookCopy, view: &GalleryView<'_>) -> Vec<bool> {
        let seen = copy.over(view);
        for (seen, block) in seen.segments.iter().zip(&view.segments) {
            assert_eq!(seen.codes.codebook, block.codes.codebook);
            assert_eq!((seen.identity, seen.first_row), (block.identity, block.first_row));
        }
        let is_elsewhere = |(seen, block): (&SegmentView<'_>, &SegmentView<'_>)| {
            !std::ptr::eq(seen.codes.codebook.as_ptr(), block.codes.codebook.as_ptr())
        };
        seen.segments.iter().zip(&view.segments).map(is_elsewhere).collect()
    }

    #[test]
    fn whole_segments_are_copied_once_and_their_place_is_used_again() {
        let mut codebook_copy = CodebookCopy::default();
        let mut segments = vec![(7, 0, codes(1, 4)), (8, 256, codes(2, 4)), (9, 512, codes(3, 2))];
        assert!(!codebook_copy.is_up_to(&view(&segments)));
        codebook_copy.follow(&view(&segments));
        assert!(codebook_copy.is_up_to(&view(&segments)));
        assert_eq!(copied(&codebook_copy, &view(&segments)), [true, true, false], "the last one still grows");
        // It grows and another comes; one before it is written anew.
        segments[2].2 = codes(3, 4);
        segments[1] = (10, 256, codes(4, 4));
        segments.push((11, 768, codes(5, 1)));
        assert!(!codebook_copy.is_up_to(&view(&segments)));
        codebook_copy.follow(&view(&segments));
        assert_eq!(copied(&codebook_copy, &view(&segments)), [true, true, true, false]);
        assert_eq!(
            (codebook_copy.slabs.len(), &*codebook_copy.free),
            (1, &[(0, 3 * 4 * codebook_bytes(DIM)..SLAB_BYTES)][..]),
            "the place was used again"
        );
        // A view of before has fewer rows of a segment.
        segments[2].2 = codes(3, 4);
        let older = [(9, 512, codes(3, 2)), (11, 768, codes(5, 1))];
        let older_view = view(&older);
        assert_eq!(codebook_copy.over(&older_view).segments[0].codes.codebook.len(), 2 * codebook_bytes(DIM));
    }

    #[test]
    fn of_an_erased_row_nothing_is_left_and_of_others_everything() {
        let mut codebook_copy = CodebookCopy::default();
        let segments = vec![(7, 128, codes(1, 4)), (8, 1024, codes(2, 4)), (9, 2048, codes(3, 1))];
        codebook_copy.follow(&view(&segments));
        // Before the first segment, in it, behind it, in the second, in the one that is not copied.
        codebook_copy.erase(&[3, 128 + 70, 128 + 256, 1024 + 255, 2048]);
        let mut expected = segments.clone();
        expected[0].2.clear(70);
        expected[1].2.clear(255);
        copied(&codebook_copy, &view(&expected));
        codebook_copy.follow(&view(&segments));
        copied(&codebook_copy, &view(&expected));
    }

    #[test]
    fn segments_of_all_sizes_come_and_go_in_the_same_memory() {
        let mut codebook_copy = CodebookCopy::default();
        let mut segments: Vec<(u64, u32, OwnedCodes)> = Vec::new();
        for round in 0..200_u64 {
            // Four are there at a time, of 1 to 8 blocks, and leave out of order.
            if segments.len() > 4 {
                segments.remove((round * 7 % 4) as usize);
            }
            segments.insert(
                0,
                (1000 + round, (round % 5 * 1024) as u32, codes(round as usize, 1 + (round * 5 % 8) as usize)),
            );
            codebook_copy.follow(&view(&segments));
            copied(&codebook_copy, &view(&segments));
        }
        let held: usize = codebook_copy.places.values().map(|place| place.bytes).sum();
        let free: usize = codebook_copy.free.iter().map(|(_, hole)| hole.len()).sum();
        assert_eq!((codebook_copy.slabs.len(), held + free), (1, SLAB_BYTES));
        // The holes are as few as they can be: what follows them is held.
        for (slab, hole) in &codebook_copy.free {
            let next = codebook_copy.places.values().any(|place| (place.slab, place.at) == (*slab, hole.end));
            assert!(next || hole.end == SLAB_BYTES);
            assert!(codebook_copy.slabs[*slab][hole.clone()].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn what_is_given_up_is_zeros() {
        let mut codebook_copy = CodebookCopy::default();
        let segments = vec![(7, 0, codes(1, 4)), (9, 512, codes(3, 1))];
        codebook_copy.follow(&view(&segments));
        assert!(codebook_copy.slabs[0].iter().any(|byte| *byte != 0));
        codebook_copy.follow(&view(&segments[1..]));
        assert!(codebook_copy.slabs[0].iter().all(|byte| *byte == 0));
        assert!(codebook_copy.places.is_empty());
    }
}
