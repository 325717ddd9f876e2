//! What an engine holds and forgets, what it refuses, and what it makes of nothing.

use super::*;

#[test]
fn an_engine_says_what_it_is_and_forgets_what_it_read() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let gallery = Gallery::new(&mut rng, Kind::Random, 128, 2000, 0.0);
    let values = gallery.probes(&mut rng, 80);
    let request = CandidateRequest {
        probes: &values,
        floors: &[0.5; 80],
        keep: &[10; 80],
        candidates_max: 100,
        ..CandidateRequest::default()
    };
    for path in paths() {
        let engine = CpuEngine::with_simd(2, path).unwrap();
        assert_eq!(engine.describe().host_bytes, 0);
        let mut candidates = CandidateRows::default();
        engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
        let description = engine.describe();
        assert_eq!((description.kind, description.threads), ("cpu", 2));
        assert_eq!(description.adapter, path.as_str());
        // Packed probes alone are 80 x 128 numbers of two or four bytes.
        assert!((20_000..4_000_000).contains(&description.host_bytes), "{description:?}");
        engine.find_candidates(&gallery.view(), &request, &mut candidates).unwrap();
        assert_eq!(engine.describe().host_bytes, description.host_bytes, "{path}: scratch is used again");

        let rows_left = |engine: &CpuEngine| {
            let mut kept = engine.scratch.lock();
            kept.iter_mut().flat_map(|scratch| scratch.threads.iter_mut()).any(|thread| thread.get_mut().holds_rows())
        };
        assert!(rows_left(&engine), "{path}: a request leaves the last panels behind");
        engine.follow(&gallery.view()).unwrap();
        let whole = &gallery.blocks[..gallery.blocks.len() - 1];
        let copied: usize = whole.iter().map(|block| block.codes.codebook.len()).sum();
        assert!(copied > 0, "{path}: there are whole blocks");
        assert_eq!(engine.describe().host_bytes, description.host_bytes + copied as u64, "{path}");
        let first = whole.iter().position(|block| !block.codes.codebook.is_empty()).unwrap();
        engine.erase(&[whole[first].first_row + 1]).unwrap();
        assert!(!rows_left(&engine), "{path}: an erasure does not");
        let mut left = whole[first].codes.clone();
        left.clear(1);
        let codebook_copy = engine.codebook_copy.read();
        assert!(
            codebook_copy.over(&gallery.view()).segments[first].codes.codebook == left.codebook,
            "{path}: and clears the copy"
        );
    }
}

#[test]
fn no_threads_and_missing_instructions_are_refused() {
    assert!(matches!(CpuEngine::with_simd(0, Simd::Portable), Err(CpuEngineError::NoThreads)));
    for path in Simd::ALL.into_iter().filter(|path| !path.is_available()) {
        assert!(matches!(CpuEngine::with_simd(1, path), Err(CpuEngineError::Simd(_))), "{path}");
    }
}

#[test]
fn no_probes_and_no_rows_are_nothing_to_find() {
    let empty = GalleryView { dim: 64, segments: Vec::new() };
    let mut values = vec![0.0; 64];
    values[3] = 1.0;
    for path in paths() {
        let engine = CpuEngine::with_simd(1, path).unwrap();
        let mut candidates = CandidateRows::default();
        let nothing =
            CandidateRequest { probes: &[], floors: &[], keep: &[], candidates_max: 10, ..CandidateRequest::default() };
        engine.find_candidates(&empty, &nothing, &mut candidates).unwrap();
        assert!(candidates.rows.is_empty());
        let one = CandidateRequest {
            probes: &values,
            floors: &[-1.1],
            keep: &[5],
            candidates_max: 10,
            ..CandidateRequest::default()
        };
        engine.find_candidates(&empty, &one, &mut candidates).unwrap();
        assert_eq!(
            (candidates.rows.as_slice(), candidates.overflowed.as_slice()),
            ([vec![]].as_slice(), [false].as_slice())
        );
    }
}
