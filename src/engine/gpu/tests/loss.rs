//! A lost device is an error, then an empty device, then correct again.

use super::*;

#[test]
fn a_lost_device_is_an_error_and_the_next_follow_brings_it_back() {
    let (dim, seed) = (64, 1);
    let Some(engine) = engine_with(DeviceOptions::default()) else { return };
    assert!(!engine.is_ready(), "nothing was followed yet");
    let mut rng = rng(seed);
    let values = unit_vectors(900, dim, &mut rng);
    let gallery = Gallery::new(dim, &to_rows(&values), &[900]);
    let asked = Asked::alike(probes_near(&values, 6, dim, &mut rng), dim, 0.4, 5, 900);
    let search = || {
        let mut candidates = CandidateRows::default();
        engine.find_candidates(&gallery.view(), &asked.request(), &mut candidates).map(|()| candidates)
    };
    assert!(matches!(search(), Err(EngineError::Rebuilding)), "nothing was followed yet");
    engine.follow(&gallery.view()).unwrap();
    assert!(engine.is_ready());
    hold(&engine, &gallery, &asked, "before");

    for round in 0..2 {
        engine.lose_device().unwrap();
        // The first search that notices gets the loss; from then on the engine is not ready.
        let first = search();
        assert!(matches!(first, Err(EngineError::DeviceLost { .. })), "{first:?}");
        let second = search();
        assert!(matches!(second, Err(EngineError::Rebuilding)), "{second:?}");
        assert!(!engine.is_ready());
        engine.follow(&gallery.view()).unwrap();
        assert!(engine.is_ready());
        hold(&engine, &gallery, &asked, &format!("seed {seed} round {round}"));
    }
}

#[test]
fn a_device_lost_before_follow_or_erase_is_an_error_there_too() {
    let (dim, seed) = (32, 2);
    let Some(engine) = engine_with(DeviceOptions::default()) else { return };
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
    other.segments[0].identity = fresh_identity();
    engine.follow(&other.view()).unwrap();
    hold(&engine, &other, &asked, &format!("seed {seed}"));
}

#[test]
fn a_device_lost_by_one_thread_fails_the_batches_of_others_and_leaves_nobody_waiting() {
    let (dim, seed) = (32, 3);
    let Some(engine) = engine_with(DeviceOptions::default()) else { return };
    let mut rng = rng(seed);
    let values = unit_vectors(2000, dim, &mut rng);
    let gallery = Gallery::new(dim, &to_rows(&values), &[2000]);
    let asked = Asked::alike(probes_near(&values, 9, dim, &mut rng), dim, 0.4, 5, 900);
    for round in 0..3 {
        engine.follow(&gallery.view()).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let mut candidates = CandidateRows::default();
                    let failed = (0..1000)
                        .find_map(|_| engine.find_candidates(&gallery.view(), &asked.request(), &mut candidates).err());
                    let failed = failed.expect("the device was lost");
                    assert!(
                        matches!(failed, EngineError::DeviceLost { .. } | EngineError::Rebuilding),
                        "round {round}: {failed:?}"
                    );
                });
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
            engine.lose_device().unwrap();
        });
        assert!(!engine.is_ready());
    }
    engine.follow(&gallery.view()).unwrap();
    hold(&engine, &gallery, &asked, &format!("seed {seed}"));
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
    // Not even one step of slots fits into a slab.
    let Some(engine) = engine_with(DeviceOptions { buffer_bytes_max: 512 * 64 / 2, ..DeviceOptions::default() }) else {
        return;
    };
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
