//! Narrow filters: a probe that may find few rows is compared with those rows, one by one.
//!
//! Reading the codes of the whole gallery would take longer. Both engines do this on the host; this
//! module tells the probes apart and finds the rows, the engines compare them.

use std::ops::Range;

use roaring::RoaringBitmap;
use zeroize::Zeroizing;

use super::{CandidateRequest, CandidateRows, EngineError, GalleryView, Seed, SegmentView};

/// A filter is narrow if it allows at most one row in so many.
const ROWS_PER_ALLOWED: u64 = 16;

/// Answers `request`: probes with a narrow filter by `narrow`, the others by `wide`, which gets none if
/// there are none. `candidates` has been reset; device time and certificate are those of `wide`.
///
/// # Errors
/// Those of `narrow` and `wide`.
pub(super) fn split(
    view: &GalleryView<'_>,
    request: &CandidateRequest<'_>,
    candidates: &mut CandidateRows,
    narrow: impl FnOnce(&CandidateRequest<'_>, &mut CandidateRows) -> Result<(), EngineError>,
    wide: impl FnOnce(&CandidateRequest<'_>, &mut CandidateRows) -> Result<(), EngineError>,
) -> Result<(), EngineError> {
    let allowed_max = view.rows() as u64 / ROWS_PER_ALLOWED;
    let is_narrow = |probe: &usize| request.filter(*probe).is_some_and(|filter| filter.len() <= allowed_max);
    let (of_narrow, of_wide): (Vec<usize>, Vec<usize>) = (0..request.floors.len()).partition(is_narrow);
    if of_narrow.is_empty() {
        return wide(request, candidates);
    }
    if !of_wide.is_empty() {
        let found = Subset::new(request, view.dim, of_wide).answer(request, candidates, wide)?;
        candidates.device_time = found.device_time;
        candidates.certificate = found.certificate;
    }
    Subset::new(request, view.dim, of_narrow).answer(request, candidates, narrow)?;
    Ok(())
}

/// The offsets in `range` of the live rows of `segment` that `filter` allows, ascending.
pub(super) fn allowed<'a>(
    segment: &'a SegmentView<'_>,
    filter: &'a RoaringBitmap,
    range: Range<usize>,
) -> impl Iterator<Item = usize> + 'a {
    let number = |offset: usize| segment.first_row.saturating_add(u32::try_from(offset).unwrap_or(u32::MAX));
    let offsets = filter.range(number(range.start)..number(range.end)).map(|row| (row - segment.first_row) as usize);
    offsets.filter(|offset| segment.is_live(*offset))
}

/// Some of a request's probes, with everything that belongs to them.
struct Subset<'a> {
    /// Their numbers in the whole request.
    numbers: Vec<usize>,
    probes: Zeroizing<Vec<f32>>,
    floors: Vec<f32>,
    keep: Vec<u32>,
    filters: Vec<Option<&'a RoaringBitmap>>,
    seeds: Vec<Seed>,
}

impl<'a> Subset<'a> {
    fn new(whole: &CandidateRequest<'a>, dim: usize, numbers: Vec<usize>) -> Self {
        let probes: Vec<f32> = numbers.iter().flat_map(|probe| whole.probe(*probe, dim)).copied().collect();
        Self {
            probes: probes.into(),
            floors: numbers.iter().map(|probe| whole.floors[*probe]).collect(),
            keep: numbers.iter().map(|probe| whole.keep[*probe]).collect(),
            filters: numbers.iter().map(|probe| whole.filter(*probe)).collect(),
            seeds: numbers.iter().map(|probe| whole.seed(*probe)).collect(),
            numbers,
        }
    }

    /// Lets `engine` answer for these probes, and moves their rows to where they belong among those of all.
    fn answer(
        &self,
        whole: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
        engine: impl FnOnce(&CandidateRequest<'_>, &mut CandidateRows) -> Result<(), EngineError>,
    ) -> Result<CandidateRows, EngineError> {
        let request = CandidateRequest {
            probes: &self.probes,
            floors: &self.floors,
            keep: &self.keep,
            filters: &self.filters,
            seeds: &self.seeds,
            ..*whole
        };
        let mut found = CandidateRows::default();
        found.reset(self.numbers.len());
        engine(&request, &mut found)?;
        for (nth, probe) in self.numbers.iter().enumerate() {
            std::mem::swap(&mut found.rows[nth], &mut candidates.rows[*probe]);
            candidates.overflowed[*probe] = found.overflowed[nth];
            candidates.floors[*probe] = found.floors[nth];
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use thenar_index::codes::Codes;

    use super::*;

    const DIM: usize = 32;

    /// Answers with each probe's first component, keep and allowed rows, so that a mix-up shows.
    fn echo(request: &CandidateRequest<'_>, candidates: &mut CandidateRows) -> Result<(), EngineError> {
        for (probe, values) in request.probes.chunks_exact(DIM).enumerate() {
            assert_eq!(values[0].to_bits(), request.floors[probe].to_bits());
            assert_eq!(request.seed(probe)[0], request.keep[probe] as u8);
            candidates.rows[probe].extend([request.keep[probe], request.filter(probe).map_or(0, |f| f.len() as u32)]);
            candidates.floors[probe] = request.floors[probe];
            candidates.overflowed[probe] = request.keep[probe] == 3;
        }
        Ok(())
    }

    #[test]
    fn probes_are_told_apart_by_their_filters_and_get_their_own_answers() {
        let rows = vec![f16::ZERO; 320 * DIM];
        let segment =
            SegmentView { identity: 1, first_row: 64, rows: &rows, live: &[u64::MAX; 5], codes: Codes::default() };
        let view = GalleryView { dim: DIM, segments: vec![segment] };
        // One row in sixteen is narrow, one more is not.
        let (few, many): (RoaringBitmap, RoaringBitmap) = ((0..20).collect(), (0..21).collect());
        let filters = [None, Some(&few), Some(&many), Some(&few), None];
        let floors: Vec<f32> = (0..5).map(|probe| probe as f32).collect();
        let probes: Vec<f32> = floors.iter().flat_map(|floor| [*floor; DIM]).collect();
        let seeds: Vec<Seed> = (0..5).map(|probe| [probe; 32]).collect();
        let request = CandidateRequest {
            probes: &probes,
            floors: &floors,
            keep: &[0, 1, 2, 3, 4],
            filters: &filters,
            seeds: &seeds,
            ..CandidateRequest::default()
        };
        let mut candidates = CandidateRows::default();
        candidates.reset(5);
        let narrow = |request: &CandidateRequest<'_>, candidates: &mut CandidateRows| {
            assert_eq!(request.keep, [1, 3]);
            echo(request, candidates)
        };
        let wide = |request: &CandidateRequest<'_>, candidates: &mut CandidateRows| {
            assert_eq!(request.keep, [0, 2, 4]);
            echo(request, candidates)
        };
        split(&view, &request, &mut candidates, narrow, wide).unwrap();
        assert_eq!(candidates.rows, [[0, 0], [1, 20], [2, 21], [3, 20], [4, 0]]);
        assert_eq!(candidates.floors, floors);
        assert_eq!(candidates.overflowed, [false, false, false, true, false]);
    }

    #[test]
    fn allowed_rows_are_live_ones_of_the_segment_and_the_range() {
        let rows = vec![f16::ZERO; 128 * DIM];
        // Rows 3 and 70 are dead.
        let live = [!(1 << 3), !(1 << 6)];
        let segment = SegmentView { identity: 1, first_row: 1000, rows: &rows, live: &live, codes: Codes::default() };
        let filter: RoaringBitmap = [999, 1000, 1003, 1064, 1070, 1127, 1128].into_iter().collect();
        let offsets = |range| allowed(&segment, &filter, range).collect::<Vec<_>>();
        assert_eq!(offsets(0..128), [0, 64, 127]);
        assert_eq!(offsets(0..64), [0]);
        assert_eq!(offsets(64..128), [64, 127]);
    }
}
