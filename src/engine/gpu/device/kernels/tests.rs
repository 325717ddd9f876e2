//! The shaders and the Rust side of them agree.

use std::sync::Arc;

use naga::valid::{Capabilities, ValidationFlags, Validator};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::batch::{Batch, Run};
use super::super::bindings::DeviceBound;
use super::super::layout;
use super::super::self_test::{self, Ask, Fault, SLOT_BASE, Trial};
use super::super::{Device, DeviceOptions};
use super::*;
use crate::engine::EngineError;
use crate::engine::certificate::Certificate;
use crate::engine::gpu::adapter::{self, AdapterChoice};
use crate::engine::gpu::bounds::DeviceBounds;
use crate::engine::gpu::twin::Twin;
use crate::engine::quantised_probe::QuantisedProbe;

/// Capabilities of the kernel with cooperative matrices.
const MATRICES: Capabilities = Capabilities::SHADER_FLOAT16.union(Capabilities::COOPERATIVE_MATRIX);

fn parsed(source: &str) -> naga::Module {
    naga::front::wgsl::parse_str(source).unwrap_or_else(|e| panic!("{}", e.emit_to_string(source)))
}

fn is_valid(source: &str, capabilities: Capabilities) -> bool {
    Validator::new(ValidationFlags::all(), capabilities).validate(&parsed(source)).is_ok()
}

#[test]
fn every_kernel_is_valid_with_the_capabilities_it_has_and_with_no_fewer() {
    for source in [SCAN_FEW, SCAN_MANY, REFINE] {
        assert!(is_valid(source, Capabilities::empty()));
    }
    assert!(is_valid(SCAN_COOP, MATRICES));
    for one in MATRICES.iter() {
        assert!(!is_valid(SCAN_COOP, MATRICES - one), "{one:?} is not needed");
    }
    // A driver ends the process if subgroup operations and matrices meet in a module.
    for word in ["@builtin(subgroup", "subgroupA", "enable subgroups"] {
        assert!(!SCAN_COOP.contains(word), "{word}");
    }
}

/// As far as this machine can go without matrices: through naga's back end, which the driver follows.
#[test]
fn matrices_come_out_of_the_compiler_as_matrix_products_at_both_levels() {
    /// `OpCooperativeMatrixMulAddKHR` and the store, of SPV_KHR_cooperative_matrix.
    const MUL_ADD: u32 = 4459;
    const STORE: u32 = 4458;
    for level in Level::ALL {
        let module = parsed(SCAN_COOP);
        let info = Validator::new(ValidationFlags::all(), MATRICES).validate(&module).unwrap();
        let entry_point = (naga::ShaderStage::Compute, "scan_coop");
        let constants = Kernel::Coop.overrides(level).into_iter();
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
        assert_eq!((products, stores), (8, 8), "{level:?}");
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
        Slice: quads, slot_first, slot_end, slot_base, entries_max, loss_parts, refine_at, four_bit_quads, one_bit_norm
    )
    .to_vec();
    for (nth, name) in ["reserved_0", "reserved_1", "reserved_2"].into_iter().enumerate() {
        slice.push((name, offset_of!(Slice, reserved) + 4 * nth));
    }
    same("Slice", size_of::<Slice>(), &slice);
    same("Bound", size_of::<DeviceBound>(), &fields!(DeviceBound: scale, along, across, slack, base, quota));
    same("Entry", size_of::<Entry>(), &fields!(Entry: probe, slot));
    // The host reads the tally as two counters followed by the counts.
    let (members, _) = members("Tally");
    assert_eq!(members, [("stored".to_owned(), 0), ("refined".to_owned(), 4), ("counts".to_owned(), 8)]);
    assert!(SCAN_FEW.contains(&format!("const PROBES_MAX: u32 = {PROBES_MAX}u;")));
}

#[test]
fn bindings_and_entry_points_are_those_the_layouts_name() {
    let kernels = [Kernel::Few { probes: 8 }, Kernel::Many, Kernel::Coop].map(Kernel::source);
    for (entry_point, source) in kernels.into_iter().chain([("refine", REFINE)]) {
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
            (1, 0, "slice Uniform".to_owned()),
            (1, 3, format!("bounds {read}")),
            (1, 4, format!("tally {write}")),
            (1, 5, format!("entries {write}")),
        ];
        match entry_point {
            "scan_few" => expected.push((1, 1, "few Uniform".to_owned())),
            "refine" => expected.extend([(1, 2, format!("probes {read}")), (1, 6, format!("refined {write}"))]),
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
    for kernel in Kernel::ALL {
        let module = parsed(kernel.source().1);
        for (name, _) in kernel.overrides(Level::FourBit) {
            assert!(module.overrides.iter().any(|(_, o)| o.name.as_deref() == Some(name)), "{name}");
        }
        let threads = module.entry_points[0].workgroup_size[0];
        match kernel {
            Kernel::Few { .. } => assert_eq!(threads, FEW_THREADS),
            Kernel::Many => assert_eq!(threads, MANY_ROWS / 2 * MANY_PROBES as u32 / 8),
            Kernel::Coop => assert_eq!(threads, 8 * 32),
        }
        assert!(SLOT_STEP.is_multiple_of(kernel.tile_rows()) && PROBES_MAX.is_multiple_of(kernel.tile_probes()));
    }
    assert!(SCAN_MANY.contains(&format!("const ROWS: u32 = {MANY_ROWS}u;")));
    assert!(SCAN_MANY.contains(&format!("const COLUMNS: u32 = {MANY_PROBES}u;")));
    assert!(SCAN_COOP.contains("const TILE: u32 = 16u;") && COOP_TILE == 8 * 16);
    assert!(SCAN_COOP.contains("const ROWS: u32 = 8u * TILE;"));
    assert!(SCAN_COOP.contains("const COLUMNS: u32 = 8u * TILE;"));
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
    let coop = bytes(SCAN_COOP);
    assert!(coop <= adapter::MATRIX_SHARED_BYTES && coop > adapter::MATRIX_SHARED_BYTES / 2, "{coop}");
}

#[test]
fn workgroups_cover_every_slot_and_stay_within_every_adapters_limit() {
    for kernel in Kernel::ALL {
        for slots in [1, 127, 128, 129, 512, 4_194_304, 4_194_305, 8_388_608] {
            for probes in [1, 5, 64, 65, 256] {
                let [x, y, z] = kernel.workgroups(slots, probes);
                assert!(x.max(y).max(z) <= 65_535, "{kernel:?} {slots}");
                let tiles = match kernel {
                    Kernel::Few { .. } => u64::from(x) * u64::from(y),
                    Kernel::Many | Kernel::Coop => u64::from(y) * u64::from(z),
                };
                assert!(tiles * u64::from(kernel.tile_rows()) >= u64::from(slots), "{kernel:?} {slots}");
            }
        }
    }
}

#[test]
fn every_batch_has_a_kernel_that_takes_it_whole() {
    for matrices in [false, true] {
        for probes in 1..=PROBES_MAX {
            let kernel = Kernel::for_batch(probes, matrices);
            let fits = !matches!(kernel, Kernel::Few { .. }) || kernel.tile_probes() >= probes;
            assert!(fits && kernel.padded(probes) <= PROBES_MAX, "{probes}");
            assert!(matrices || kernel != Kernel::Coop);
        }
    }
}

/// An open device, or a reported skip.
fn device() -> Option<Device> {
    match Device::open(&AdapterChoice::Any, &DeviceOptions::default()) {
        Ok(device) => Some(device),
        Err(EngineError::NoAdapter { reason }) => {
            assert!(std::env::var("THENAR_REQUIRE_GPU").as_deref() != Ok("1"), "{reason}");
            println!("skipped: no adapter ({reason})");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn unit_probes(dim: usize, count: usize, rng: &mut ChaCha8Rng) -> Vec<QuantisedProbe> {
    (0..count)
        .map(|_| {
            let values: Vec<f32> = (0..dim).map(|_| rng.random_range(-1.0..1.0)).collect();
            let norm = values.iter().map(|x| x * x).sum::<f32>().sqrt();
            QuantisedProbe::new(&values.iter().map(|x| x / norm).collect::<Vec<_>>())
        })
        .collect()
}

#[test]
fn every_kernel_agrees_with_its_twin_for_whole_bounds_and_for_those_of_certificates() {
    let Some(mut device) = device() else { return };
    let mut pairs = 0;
    for (slab, dim) in [32_usize, 160, 544].into_iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(dim as u64);
        let trial = Trial::upload(&mut device, slab, dim).unwrap();
        for (kernel, level) in device.kernels() {
            for count in [1, 2, 3, 7, 29, 33, 70] {
                if matches!(kernel, Kernel::Few { .. }) && count > kernel.tile_probes() {
                    continue;
                }
                let probes = self_test::whole_probes(dim, count);
                let bounds = trial.whole_bounds(&probes, level);
                let ask = Ask { probes: &probes, bounds: &bounds, loss_parts: 0, refine_bounds: None };
                trial.check(&mut device, kernel, level, &ask).unwrap();
                // Cosines of the trial run from none to all, so bounds of floors stop some and pass others.
                let probes = unit_probes(dim, count, &mut rng);
                for (certificate, floor) in
                    [(Certificate::Deterministic, 0.05), (Certificate::Randomised { miss_probability: 1e-6 }, 0.1)]
                {
                    let of_floor = DeviceBounds::new(certificate, dim);
                    let bounds: Vec<_> = probes.iter().map(|p| of_floor.scan(level, p, floor, u32::MAX)).collect();
                    let refine: Vec<_> = probes.iter().map(|p| of_floor.refine(p, floor)).collect();
                    let ask = Ask {
                        probes: &probes,
                        bounds: &bounds,
                        loss_parts: of_floor.loss_parts(level),
                        refine_bounds: (level == Level::OneBit).then_some(&*refine),
                    };
                    pairs += trial.check(&mut device, kernel, level, &ask).unwrap();
                }
            }
        }
    }
    assert!(pairs > 10_000, "{pairs} pairs: a weak test");
}

#[test]
fn batches_in_flight_together_are_collected_each_with_its_own_pairs() {
    let Some(mut device) = device() else { return };
    device.clear().unwrap();
    Trial::upload(&mut device, 0, 64).unwrap();
    let probes = self_test::whole_probes(64, 1);
    let kernel = Kernel::Few { probes: 1 };
    let batch = |bound: DeviceBound| Batch {
        dim: 64,
        kernel,
        level: Level::FourBit,
        probes: 1,
        packed: Arc::new(layout::pack(kernel, Level::FourBit, &[&probes[0]], 64)),
        bounds: vec![bound],
        loss_parts: 0,
        refinement: None,
        runs: vec![Run { slab: 0, slot_first: 0, slot_end: 512, slot_base: 0 }],
    };
    for order in [[0, 1], [1, 0]] {
        let mut in_flight = Vec::new();
        for bound in [DeviceBound::open(u32::MAX), DeviceBound::open(7)] {
            assert!(device.has_idle_lane());
            in_flight.push(Some(device.submit(&batch(bound)).unwrap()));
        }
        assert!(!device.has_idle_lane());
        for place in order {
            let (report, lane) = in_flight[place].take().unwrap().collect().unwrap();
            device.return_lane(lane);
            let stored = [512, 7][place];
            assert_eq!((report.entries.len(), report.counts[0], report.stored), (stored, 512, stored as u64));
        }
        let (nothing, lane) = device.submit(&batch(DeviceBound::CLOSED)).unwrap().collect().unwrap();
        device.return_lane(lane);
        assert_eq!((nothing.entries.len(), nothing.counts[0]), (0, 0));
    }
}

#[test]
fn the_self_test_declines_an_adapter_that_is_off_by_one_bit() {
    let Some(mut device) = device() else { return };
    device.clear().unwrap();
    let mut trial = Trial::upload(&mut device, 0, 96).unwrap();
    let probes = self_test::whole_probes(96, 3);
    for level in Level::ALL {
        trial.twin = Twin::new(&self_test::awkward_codes(96).as_codes(), 96, SLOT_BASE);
        let bounds = trial.whole_bounds(&probes, level);
        let kernel = Kernel::Few { probes: 4 };
        let ask = Ask { probes: &probes, bounds: &bounds, loss_parts: 0, refine_bounds: None };
        trial.check(&mut device, kernel, level, &ask).unwrap();
        // One bit of the row that the second probe's bound is made of, on one side, so that its sum sinks.
        let mut codes = self_test::awkward_codes(96);
        match level {
            Level::OneBit => codes.one_bit[0] ^= 1,
            Level::FourBit => codes.four_bit[1] ^= 1,
        }
        trial.twin = Twin::new(&codes.as_codes(), 96, SLOT_BASE);
        let refused = trial.check(&mut device, kernel, level, &ask);
        assert!(matches!(refused, Err(Fault::Pairs { slot: SLOT_BASE, .. })), "{refused:?}");
    }
}
