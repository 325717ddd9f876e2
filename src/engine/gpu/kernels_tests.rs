//! The shaders and the Rust side of them say the same.

use naga::valid::{Capabilities, ValidationFlags, Validator};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::adapter::{self, AdapterChoice};
use super::super::bindings::{Bar, Card, Entry};
use super::super::device::{Batch, Device, Run, Sizes};
use super::super::probe::{self, Quantised};
use super::super::scan_coop::scan_coop as coop_twin;
use super::super::scan_many::scan_many as many_twin;
use super::super::selftest::{self, Fault, Trial};
use super::super::slack::Bars;
use super::*;
use crate::engine::EngineError;
use crate::engine::certificate::Certificate;

fn parsed(source: &str) -> naga::Module {
    naga::front::wgsl::parse_str(source).unwrap_or_else(|e| panic!("{}", e.emit_to_string(source)))
}

fn is_valid(source: &str, capabilities: Capabilities) -> bool {
    Validator::new(ValidationFlags::all(), capabilities).validate(&parsed(source)).is_ok()
}

#[test]
fn every_kernel_is_valid_with_the_capabilities_it_has_and_with_no_fewer() {
    for source in [SCAN_FEW, SCAN_MANY, LOOK] {
        assert!(is_valid(source, Capabilities::empty()));
    }
    let needed = Capabilities::SHADER_FLOAT16 | Capabilities::COOPERATIVE_MATRIX;
    for side in [Side::Eight, Side::Sixteen] {
        let source = scan_coop(side);
        assert!(is_valid(&source, needed));
        for one in needed.iter() {
            assert!(!is_valid(&source, needed - one), "{one:?} is asked for in vain");
        }
        // A driver ends the process where subgroup operations and matrices meet in a module.
        assert!(
            !source.contains("@builtin(subgroup")
                && !source.contains("subgroupA")
                && !source.contains("enable subgroups")
        );
        assert_eq!(source.contains("coop_mat8x8"), side == Side::Eight);
        assert!(source.contains(&format!("const TILE: u32 = {}u;", side.length())));
    }
}

/// As far as this machine can go without matrices: through naga's back end, which the driver follows.
#[test]
fn matrices_come_out_of_the_compiler_as_matrix_products_at_both_sides_and_levels() {
    /// `OpCooperativeMatrixMulAddKHR` and the store, of SPV_KHR_cooperative_matrix.
    const MUL_ADD: u32 = 4459;
    const STORE: u32 = 4458;
    for (side, level) in [Side::Eight, Side::Sixteen].into_iter().flat_map(|s| Level::ALL.map(|l| (s, l))) {
        let module = parsed(&scan_coop(side));
        let capabilities = Capabilities::SHADER_FLOAT16 | Capabilities::COOPERATIVE_MATRIX;
        let info = Validator::new(ValidationFlags::all(), capabilities).validate(&module).unwrap();
        let entry_point = (naga::ShaderStage::Compute, "scan_coop");
        let constants = Kernel::Coop { side }.overrides(level).into_iter();
        let constants = constants.map(|(name, value)| (name.to_owned(), value)).collect();
        let (module, info) =
            naga::back::pipeline_constants::process_overrides(&module, &info, Some(entry_point), &constants).unwrap();
        let options = naga::back::spv::Options { lang_version: (1, 6), ..Default::default() };
        let pipeline = naga::back::spv::PipelineOptions {
            shader_stage: naga::ShaderStage::Compute,
            entry_point: "scan_coop".to_owned(),
        };
        let words = naga::back::spv::write_vec(&module, &info, &options, Some(&pipeline)).unwrap();
        let (mut at, mut products, mut stores) = (5, 0, 0);
        while at < words.len() {
            products += u32::from(words[at] & 0xffff == MUL_ADD);
            stores += u32::from(words[at] & 0xffff == STORE);
            at += (words[at] >> 16) as usize;
        }
        assert_eq!((products, stores), (8, 8), "{side:?} {level:?}");
    }
}

#[test]
fn structs_have_the_same_offsets_and_sizes_on_both_sides() {
    let module = parsed(SCAN_FEW);
    let members = |name: &str| {
        let found = module.types.iter().find(|(_, ty)| ty.name.as_deref() == Some(name));
        let naga::TypeInner::Struct { members, span } = &found.expect(name).1.inner else {
            panic!("{name} is not a struct");
        };
        let members: Vec<(String, usize)> =
            members.iter().map(|m| (m.name.clone().unwrap(), m.offset as usize)).collect();
        (members, *span as usize)
    };
    let same = |name: &str, size: usize, fields: &[(&str, usize)]| {
        let (members, span) = members(name);
        let members: Vec<(&str, usize)> = members.iter().map(|(name, at)| (name.as_str(), *at)).collect();
        assert_eq!(members, fields, "{name}");
        assert_eq!(span, size, "{name}");
    };
    use std::mem::offset_of;
    macro_rules! fields {
        ($of:ty: $($name:ident),*) => { [$((stringify!($name), offset_of!($of, $name))),*] };
    }
    let mut slice = fields!(
        Slice: quads, slot_first, slot_end, slot_base, entries_max, parts_off, look_parts_off, look_at, fine_quads,
        sign_norm
    )
    .to_vec();
    slice.push(("reserved_0", offset_of!(Slice, reserved)));
    slice.push(("reserved_1", offset_of!(Slice, reserved) + 4));
    same("Slice", size_of::<Slice>(), &slice);
    same("Bar", size_of::<Bar>(), &fields!(Bar: scale, along, across, rest, base, quota));
    same("Entry", size_of::<Entry>(), &fields!(Entry: probe, slot));
    // The host reads the tally as two counters followed by the counts.
    let (members, _) = members("Tally");
    assert_eq!(members, [("stored".to_owned(), 0), ("passed".to_owned(), 4), ("counts".to_owned(), 8)]);
    assert!(SCAN_FEW.contains(&format!("const PROBES_MAX: u32 = {PROBES_MAX}u;")));
}

#[test]
fn bindings_and_entry_points_are_those_the_layouts_name() {
    let coop = scan_coop(Side::Sixteen);
    let sources = [(SCAN_FEW, "scan_few"), (SCAN_MANY, "scan_many"), (LOOK, "look"), (&*coop, "scan_coop")];
    for (source, entry_point) in sources {
        let module = parsed(source);
        let mut bindings: Vec<(u32, u32, String)> = module
            .global_variables
            .iter()
            .filter_map(|(_, variable)| {
                let binding = variable.binding.as_ref()?;
                Some((binding.group, binding.binding, format!("{} {:?}", variable.name.clone()?, variable.space)))
            })
            .collect();
        bindings.sort();
        let read = "Storage { access: StorageAccess(LOAD) }";
        let write = "Storage { access: StorageAccess(LOAD | STORE) }";
        let mut expected = vec![
            (0, 0, format!("codes {read}")),
            (0, 1, format!("factors {read}")),
            (0, 2, format!("live {read}")),
            (1, 0, "slice Uniform".to_owned()),
            (1, 3, format!("bars {read}")),
            (1, 4, format!("tally {write}")),
            (1, 5, format!("entries {write}")),
        ];
        match entry_point {
            "scan_few" => expected.push((1, 1, "few Uniform".to_owned())),
            "look" => expected.extend([(1, 2, format!("probes {read}")), (1, 6, format!("passed {write}"))]),
            _ => expected.push((1, 2, format!("probes {read}"))),
        }
        expected.sort();
        assert_eq!(bindings, expected, "{entry_point}");
        let names: Vec<&str> = module.entry_points.iter().map(|point| point.name.as_str()).collect();
        assert_eq!(names, [entry_point]);
    }
}

#[test]
fn every_override_that_rust_sets_exists_and_the_constants_agree() {
    let coop = scan_coop(Side::Eight);
    for kernel in Kernel::EVERYWHERE.into_iter().chain([Kernel::Coop { side: Side::Eight }]) {
        let module = parsed(match kernel {
            Kernel::Few { .. } => SCAN_FEW,
            Kernel::Many => SCAN_MANY,
            Kernel::Coop { .. } => &coop,
        });
        for (name, _) in kernel.overrides(Level::FourBit) {
            assert!(module.overrides.iter().any(|(_, o)| o.name.as_deref() == Some(name)), "{name}");
        }
        let threads = module.entry_points[0].workgroup_size[0];
        match kernel {
            Kernel::Few { .. } => assert_eq!(threads, FEW_THREADS),
            Kernel::Many => assert_eq!(threads, MANY_ROWS / 2 * MANY_PROBES as u32 / 8),
            Kernel::Coop { .. } => assert_eq!(threads, 8 * 32),
        }
        assert!(SLOT_STEP.is_multiple_of(kernel.tile_rows()) && PROBES_MAX.is_multiple_of(kernel.tile_probes()));
    }
    assert!(SCAN_MANY.contains(&format!("const ROWS: u32 = {MANY_ROWS}u;")));
    assert!(SCAN_MANY.contains(&format!("const COLUMNS: u32 = {MANY_PROBES}u;")));
    assert!(coop.contains(&format!("const ROWS: u32 = {COOP_TILES}u * TILE;")));
    assert!(coop.contains(&format!("const COLUMNS: u32 = {COOP_TILES}u * TILE;")));
    assert_eq!(FEW_BYTES as usize, FEW_PROBES * crate::model::DIM_MAX);
}

#[test]
fn workgroup_memory_fits_what_is_asked_for() {
    let bytes = |source: &str| -> u32 {
        let module = parsed(source);
        let context = module.to_ctx();
        let shared = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
        shared.map(|(_, v)| module.types[v.ty].inner.size(context)).sum()
    };
    assert!(bytes(SCAN_MANY) <= wgpu::Limits::default().max_compute_workgroup_storage_size);
    let coop = bytes(&scan_coop(Side::Sixteen));
    assert!(coop <= adapter::MATRIX_SHARED_BYTES && coop > adapter::MATRIX_SHARED_BYTES / 2, "{coop}");
}

#[test]
fn workgroups_cover_every_slot_and_stay_within_every_adapters_limit() {
    for kernel in Kernel::EVERYWHERE.into_iter().chain([Kernel::Coop { side: Side::Sixteen }]) {
        for slots in [1, 127, 128, 129, 512, 4_194_304, 4_194_305, 8_388_608] {
            for probes in [1, 5, 64, 65, 256] {
                let [x, y, z] = kernel.workgroups(slots, probes);
                assert!(x.max(y).max(z) <= 65_535, "{kernel:?} {slots}");
                let tiles = match kernel {
                    Kernel::Few { .. } => u64::from(x) * u64::from(y),
                    Kernel::Many | Kernel::Coop { .. } => u64::from(y) * u64::from(z),
                };
                assert!(tiles * u64::from(kernel.tile_rows()) >= u64::from(slots), "{kernel:?} {slots}");
            }
        }
    }
}

#[test]
fn every_batch_has_a_kernel_that_takes_it_whole() {
    for coop in [None, Some(Side::Eight), Some(Side::Sixteen)] {
        for probes in 1..=PROBES_MAX {
            let kernel = Kernel::for_batch(probes, coop);
            let fits = !matches!(kernel, Kernel::Few { .. }) || kernel.tile_probes() >= probes;
            assert!(fits && kernel.padded(probes) <= PROBES_MAX, "{probes}");
            assert!(coop.is_some() || !matches!(kernel, Kernel::Coop { .. }));
        }
    }
}

/// An open device, or a reported skip.
fn device() -> Option<Device> {
    match Device::open(&AdapterChoice::Any, &Sizes::default()) {
        Ok(device) => Some(device),
        Err(EngineError::NoAdapter { reason }) => {
            assert!(std::env::var("THENAR_REQUIRE_GPU").as_deref() != Ok("1"), "{reason}");
            println!("skipped: no adapter ({reason})");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn unit_probes(dim: usize, count: usize, rng: &mut ChaCha8Rng) -> Vec<Quantised> {
    (0..count)
        .map(|_| {
            let values: Vec<f32> = (0..dim).map(|_| rng.random_range(-1.0..1.0)).collect();
            let norm = values.iter().map(|x| x * x).sum::<f32>().sqrt();
            Quantised::new(&values.iter().map(|x| x / norm).collect::<Vec<_>>())
        })
        .collect()
}

#[test]
fn every_kernel_agrees_with_its_twin_for_whole_bars_and_for_those_of_certificates() {
    let Some(mut device) = device() else { return };
    let mut pairs = 0;
    for (slab, dim) in [32_usize, 160, 544].into_iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
        let trial = Trial::upload(&mut device, slab, dim).unwrap();
        let kernels = device.kernels();
        for (kernel, level) in kernels {
            for count in [1, 2, 3, 7, 29, 33, 70] {
                if matches!(kernel, Kernel::Few { .. }) && count > kernel.tile_probes() {
                    continue;
                }
                let whole = selftest::whole_probes(dim, count);
                let bars = trial.whole_bars(&whole, level);
                trial.check(&mut device, kernel, level, &whole, &bars, 0, None).unwrap();
                // Cosines of the trial run from none to all, so bars of floors stop some and pass others.
                let probes = unit_probes(dim, count, &mut rng);
                for (certificate, floor) in
                    [(Certificate::Deterministic, 0.05), (Certificate::Randomised { miss_probability: 1e-6 }, 0.1)]
                {
                    let of_floor = Bars::new(certificate, dim);
                    let bars: Vec<Bar> = probes.iter().map(|p| of_floor.scan(level, p, floor, u32::MAX)).collect();
                    let look: Vec<Bar> = probes.iter().map(|p| of_floor.look(p, floor)).collect();
                    let look = (level == Level::OneBit).then_some(&*look);
                    let off = of_floor.parts_off(level);
                    pairs += trial.check(&mut device, kernel, level, &probes, &bars, off, look).unwrap();
                }
            }
        }
    }
    assert!(pairs > 10_000, "{pairs} pairs: a weak test");
}

#[test]
fn batches_that_are_under_way_together_are_collected_in_their_order_each_with_its_own() {
    let Some(mut device) = device() else { return };
    device.clear().unwrap();
    let trial = Trial::upload(&mut device, 0, 64).unwrap();
    let probes = selftest::whole_probes(64, 1);
    let kernel = Kernel::Few { probes: 1 };
    let batch = |bar: Bar| Batch {
        dim: 64,
        kernel,
        level: Level::FourBit,
        probes: 1,
        packed: std::sync::Arc::new(probe::pack(kernel, Level::FourBit, &[&probes[0]], 64)),
        bars: vec![bar],
        parts_off: 0,
        look: None,
        runs: vec![Run { slab: trial.slab, slot_first: 0, slot_end: 512, slot_base: 0 }],
    };
    let live: u32 = trial.live.iter().map(|word| word.count_ones()).sum();
    for _ in 0..3 {
        for (bar, expected) in [(Bar::open(u32::MAX), live), (Bar::CLOSED, 0), (Bar::open(7), live)] {
            while !device.has_room() {
                device.collect().unwrap();
            }
            device.submit(&batch(bar)).unwrap();
            if expected == 0 {
                // The one before it is still under way.
                let first = device.collect().unwrap();
                assert_eq!((first.entries.len(), first.counts[0]), (live as usize, live));
                let second = device.collect().unwrap();
                assert_eq!((second.entries.len(), second.counts[0]), (0, 0));
            } else if bar.quota == 7 {
                let third = device.collect().unwrap();
                assert_eq!((third.entries.len(), third.counts[0], third.stored), (7, live, 7));
            }
        }
    }
}

#[test]
fn the_start_up_test_declines_an_adapter_that_is_off_by_one_bit() {
    let Some(mut device) = device() else { return };
    device.clear().unwrap();
    let mut trial = Trial::upload(&mut device, 0, 96).unwrap();
    let probes = selftest::whole_probes(96, 3);
    for level in Level::ALL {
        let bars = trial.whole_bars(&probes, level);
        let kernel = Kernel::Few { probes: 4 };
        trial.check(&mut device, kernel, level, &probes, &bars, 0, None).unwrap();
        // One bit of the row that the second probe's bar is made of, on one side.
        let words = if level == Level::OneBit { &mut trial.codes.one_bit } else { &mut trial.codes.four_bit };
        words[0] ^= 1 << 8;
        let refused = trial.check(&mut device, kernel, level, &probes, &bars, 0, None);
        assert!(matches!(refused, Err(Fault::Pairs { slot, .. }) if slot == 5 * SLOT_STEP), "{refused:?}");
    }
}

/// Matrices do not run on every machine that tests; their twin does, and agrees with the other one.
#[test]
fn the_twin_of_the_matrices_reports_what_the_other_does() {
    for dim in [32, 160, 512] {
        let trial = Trial::in_memory(dim);
        for level in Level::ALL {
            let probes = selftest::whole_probes(dim, 40);
            let all: Vec<&Quantised> = probes.iter().collect();
            let bars = trial.whole_bars(&probes, level);
            let twin = |kernel: Kernel| {
                let mut padded = bars.clone();
                padded.resize(kernel.padded(bars.len()), Bar::CLOSED);
                let packed = probe::pack(kernel, level, &all, dim);
                let card: Card<'_> = trial.card(level, &padded);
                let mut entries: Vec<Entry> = match kernel {
                    Kernel::Many => many_twin(&card, level, &packed),
                    _ => coop_twin(&card, kernel, level, &packed),
                };
                entries.sort_unstable();
                entries
            };
            let expected = twin(Kernel::Many);
            assert!(expected.len() > 500, "dim {dim} {level:?}: {}", expected.len());
            for side in [Side::Eight, Side::Sixteen] {
                assert_eq!(twin(Kernel::Coop { side }), expected, "dim {dim} {level:?} {side:?}");
            }
        }
    }
}
