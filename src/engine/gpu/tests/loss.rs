//! A lost device is an error, then an empty device, then right again.

use super::*;
use crate::engine::gpu::owner::Action;

#[test]
fn a_lost_device_is_an_error_and_the_next_follow_brings_it_back() {
    let (dim, seed) = (64, 1);
    let supervisor = Supervisor::default();
    let Some(engine) = engine_watched(Sizes::default(), &supervisor) else { return };
    assert!(!engine.is_ready(), "nothing was followed yet");
    let mut rng = rng(seed);
    let values = unit_vectors(900, dim, &mut rng);
    let gallery = Gallery::new(dim, &to_rows(&values), &[900]);
    let asked = Asked::alike(probes_near(&values, 6, dim, &mut rng), dim, 0.4, 5, 900);
    let sift = || {
        let mut candidates = CandidateRows::default();
        engine.find_candidates(&gallery.view(), &asked.request(), &mut candidates).map(|()| candidates)
    };
    assert!(matches!(sift(), Err(EngineError::Rebuilding)), "nothing was followed yet");
    engine.follow(&gallery.view()).unwrap();
    assert!(engine.is_ready());
    hold(&engine, &gallery, &asked, "before");

    for round in 0..2 {
        engine.lose_device().unwrap();
        // The first to notice is told; from then on the engine says that it is not ready.
        let first = sift();
        assert!(matches!(first, Err(EngineError::DeviceLost { .. })), "{first:?}");
        let second = sift();
        assert!(matches!(second, Err(EngineError::Rebuilding)), "{second:?}");
        assert!(!engine.is_ready());
        engine.follow(&gallery.view()).unwrap();
        assert!(engine.is_ready());
        hold(&engine, &gallery, &asked, &format!("seed {seed} round {round}"));
    }

    // A bug in the thread that owns the device is no lost device.
    assert!(supervisor.died().is_none());
    let ended = engine.call(engine.generation(), Action::Panic);
    assert!(matches!(ended, Err(EngineError::DeviceLost { .. })), "{ended:?}");
    drop(engine);
    assert_eq!(supervisor.died().map(|died| died.thread), Some("gpu-owner"));
}

#[test]
fn a_device_lost_before_follow_or_erase_is_an_error_there_too() {
    let (dim, seed) = (32, 2);
    let Some(engine) = engine_with(Sizes::default()) else { return };
    let mut rng = rng(seed);
    let values = unit_vectors(400, dim, &mut rng);
    let gallery = Gallery::new(dim, &to_rows(&values), &[200, 200]);
    let asked = Asked::alike(probes_near(&values, 2, dim, &mut rng), dim, 0.4, 5, 900);

    engine.follow(&gallery.view()).unwrap();
    engine.lose_device().unwrap();
    let erased = engine.erase(&[4, 5]);
    assert!(matches!(erased, Err(EngineError::DeviceLost { .. })), "{erased:?}");
    engine.erase(&[4, 5]).expect("nothing is left to erase");

    engine.follow(&gallery.view()).unwrap();
    engine.lose_device().unwrap();
    let mut other = Gallery::new(dim, &to_rows(&values), &[400]);
    let followed = engine.follow(&other.view());
    assert!(matches!(followed, Err(EngineError::DeviceLost { .. })), "{followed:?}");
    engine.follow(&other.view()).unwrap();
    hold(&engine, &other, &asked, &format!("seed {seed}"));
    other.blocks[0].identity = fresh_identity();
    engine.follow(&other.view()).unwrap();
    hold(&engine, &other, &asked, &format!("seed {seed}"));
}

#[test]
fn an_adapter_that_is_not_there_is_an_error_with_what_was_found() {
    let choice = AdapterChoice::Named("no such adapter".to_owned());
    let Err(EngineError::NoAdapter { reason }) = GpuEngine::new(choice) else {
        panic!("an engine on an adapter that does not exist");
    };
    assert!(reason.contains("no such adapter"), "{reason}");
}

#[test]
fn a_gallery_too_large_for_the_device_is_an_error_and_the_engine_lives_on() {
    let dim = 64;
    // Not even one step of slots fits a slab.
    let Some(engine) = engine_with(Sizes { buffer_bytes_max: 512 * 64 / 2, ..Sizes::default() }) else { return };
    let mut rng = rng(3);
    let values = unit_vectors(100, 128, &mut rng);
    let large = Gallery::new(128, &to_rows(&values), &[100]);
    let refused = engine.follow(&large.view());
    assert!(matches!(refused, Err(EngineError::OutOfDeviceMemory { .. })), "{refused:?}");
    let small = Gallery::new(dim, &to_rows(&values[..100 * dim]), &[100]);
    engine.follow(&small.view()).unwrap();
    let asked = Asked::alike(normalised(&values[..dim]), dim, -1.1, 1, 100);
    hold(&engine, &small, &asked, "small");
}
