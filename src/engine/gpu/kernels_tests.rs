//! The shaders and the Rust side of them say the same.

use half::f16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::super::adapter::AdapterChoice;
use super::super::device::{Batch, Device, LivePiece, Run, Sizes};
use super::super::sift_few::sift_few;
use super::super::sift_many::sift_many;
use super::super::slack::slack;
use super::*;
use crate::engine::EngineError;

fn parsed(source: &str) -> naga::Module {
    naga::front::wgsl::parse_str(source).unwrap_or_else(|e| panic!("{}", e.emit_to_string(source)))
}

#[test]
fn every_kernel_is_valid_and_needs_only_f16_unpacking() {
    for source in [SIFT_FEW, SIFT_MANY] {
        let module = parsed(source);
        let validate = |capabilities| {
            naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities)
                .validate(&module)
                .map_err(Box::new)
        };
        validate(naga::valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32).expect("a valid kernel");
        assert!(validate(naga::valid::Capabilities::empty()).is_err(), "the capability is asked for in vain");
    }
}

#[test]
fn structs_have_the_same_offsets_and_sizes_on_both_sides() {
    let module = parsed(SIFT_FEW);
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
    same(
        "Slice",
        size_of::<Slice>(),
        &[
            ("row_words", offset_of!(Slice, row_words)),
            ("slot_first", offset_of!(Slice, slot_first)),
            ("slot_end", offset_of!(Slice, slot_end)),
            ("slot_base", offset_of!(Slice, slot_base)),
            ("entries_max", offset_of!(Slice, entries_max)),
            ("reserved_0", offset_of!(Slice, reserved)),
            ("reserved_1", offset_of!(Slice, reserved) + 4),
            ("reserved_2", offset_of!(Slice, reserved) + 8),
        ],
    );
    same("Bar", size_of::<Bar>(), &[("cut", offset_of!(Bar, cut)), ("quota", offset_of!(Bar, quota))]);
    same(
        "Entry",
        size_of::<Entry>(),
        &[("probe", offset_of!(Entry, probe)), ("slot", offset_of!(Entry, slot)), ("score", offset_of!(Entry, score))],
    );
    // The host reads the tally as the stored count followed by the counts.
    let (members, _) = members("Tally");
    assert_eq!(members, [("stored".to_owned(), 0), ("counts".to_owned(), 4)]);
}

#[test]
fn bindings_and_entry_points_are_those_the_layout_names() {
    for (source, entry_point) in [(SIFT_FEW, "sift_few"), (SIFT_MANY, "sift_many")] {
        let module = parsed(source);
        let mut bindings: Vec<(u32, String)> = module
            .global_variables
            .iter()
            .filter_map(|(_, variable)| {
                let binding = variable.binding.as_ref()?;
                assert_eq!(binding.group, 0);
                Some((binding.binding, format!("{} {:?}", variable.name.clone()?, variable.space)))
            })
            .collect();
        bindings.sort();
        let read = "Storage { access: StorageAccess(LOAD) }";
        let write = "Storage { access: StorageAccess(LOAD | STORE) }";
        let expected = [
            (0, "slice Uniform".to_owned()),
            (1, format!("rows {read}")),
            (2, format!("live {read}")),
            (3, format!("probes {read}")),
            (4, format!("bars {read}")),
            (5, format!("tally {write}")),
            (6, format!("entries {write}")),
        ];
        assert_eq!(bindings, expected, "{entry_point}");
        let names: Vec<&str> = module.entry_points.iter().map(|point| point.name.as_str()).collect();
        assert_eq!(names, [entry_point]);
    }
}

#[test]
fn every_override_that_rust_sets_exists_and_the_constants_agree() {
    for kernel in Kernel::ALL {
        let module = parsed(match kernel {
            Kernel::Few { .. } => SIFT_FEW,
            Kernel::Many { .. } => SIFT_MANY,
        });
        for (name, _) in kernel.overrides(32 << 10) {
            assert!(module.overrides.iter().any(|(_, o)| o.name.as_deref() == Some(name)), "{name}");
        }
    }
    assert!(SIFT_FEW.contains(&format!("const LANES: u32 = {FEW_LANES}u;")));
    assert!(SIFT_FEW.contains("const ROWS_EACH: u32 = 4u;"));
    assert_eq!(FEW_ROWS, FEW_THREADS / FEW_LANES * 4);
}

#[test]
fn tiles_fit_the_least_workgroup_memory_that_webgpu_allows() {
    for (columns, shared_bytes, depth) in
        [(4, 32 << 10, 32), (8, 32 << 10, 32), (16, 32 << 10, 32), (4, 16 << 10, 16), (16, 16 << 10, 16)]
    {
        assert_eq!(many_depth(columns, shared_bytes), depth);
        assert!(depth * 16 * (MANY_BANDS * 2 + columns) <= shared_bytes);
    }
    const { assert!(4 * FEW_THREADS * 16 <= 16 << 10) };
}

#[test]
fn workgroups_cover_every_slot_and_stay_within_every_adapters_limit() {
    for kernel in Kernel::ALL {
        for slots in [1, 127, 128, 129, 512, 4_194_304, 4_194_305, 33_554_432, u32::MAX] {
            for probes in [1, 5, 64, 65, 256] {
                let [x, y, z] = kernel.workgroups(slots, probes);
                assert!(x.max(y).max(z) <= 65_535, "{kernel:?} {slots}");
                let (tiles, rows) = match kernel {
                    Kernel::Few { .. } => (u64::from(x) * u64::from(y), FEW_ROWS),
                    Kernel::Many { .. } => (u64::from(y) * u64::from(z), MANY_ROWS),
                };
                assert!(tiles * u64::from(rows) >= u64::from(slots), "{kernel:?} {slots}");
            }
        }
    }
}

#[test]
fn packed_probes_lie_where_the_kernel_reads_them() {
    let dim = 32;
    for count in [1_usize, 2, 3, 4, 5, 16, 17, 33, 40, 65, 256] {
        let probes: Vec<f32> = (0..count * dim).map(|i| i as f32).collect();
        let kernel = Kernel::for_batch(count);
        let packed = kernel.pack(&probes, dim);
        assert_eq!(packed.len(), kernel.padded(count) * dim);
        assert!(kernel.padded(count) <= PROBES_MAX);
        for probe in 0..kernel.padded(count) {
            for component in 0..dim {
                let wide = kernel.tile_probes();
                let at = match kernel {
                    Kernel::Few { .. } => probe * dim + component,
                    Kernel::Many { .. } => (probe / wide * dim + component) * wide + probe % wide,
                };
                let expected = if probe < count { probes[probe * dim + component] } else { 0.0 };
                assert_eq!(packed[at], expected, "{count} probes: probe {probe} component {component}");
            }
        }
    }
}

#[test]
fn every_kernel_agrees_with_its_twin() {
    let mut device = match Device::open(&AdapterChoice::Any, &Sizes::default()) {
        Ok(device) => device,
        Err(EngineError::NoAdapter { reason }) => {
            assert!(std::env::var("THENAR_REQUIRE_GPU").as_deref() != Ok("1"), "{reason}");
            println!("skipped: no adapter ({reason})");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    for (slab, dim) in [32_usize, 96, 544].into_iter().enumerate() {
        let mut rng = ChaCha8Rng::seed_from_u64(slab as u64);
        let mut unit = |count: usize| -> Vec<f32> {
            let values: Vec<f32> = (0..count * dim).map(|_| rng.random_range(-1.0..1.0)).collect();
            let norm = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>().sqrt();
            values.chunks_exact(dim).flat_map(|v| v.iter().map(move |x| x / norm(v))).collect()
        };
        let rows: Vec<f16> = unit(1024).into_iter().map(f16::from_f32).collect();
        let live: Vec<u64> = (0..16).map(|i| 0xfff0_f7ff_ffff_ff7f_u64.rotate_left(i * 5)).collect();
        device.add_slab(1024, dim).unwrap();
        device.write_rows(slab, 0, bytemuck::cast_slice(&rows)).unwrap();
        device.write_live(&[LivePiece { slab, word: 0, words: live.clone() }]).unwrap();
        for count in [1, 2, 3, 4, 5, 16, 29, 64, 70] {
            let kernel = Kernel::for_batch(count);
            let probes = unit(count);
            let packed = kernel.pack(&probes, dim);
            let mut bars = vec![Bar::CLOSED; kernel.padded(count)];
            for (number, bar) in bars[..count].iter_mut().enumerate() {
                *bar = Bar { cut: number as f32 * 0.005 - 0.1, quota: 1024 };
            }
            // The second half of the slab, so that first slots and bases count.
            let (first, base) = (512, 5120);
            let run = Run { slab, slot_first: first, slot_end: 1000, slot_base: base };
            let expected = match kernel {
                Kernel::Few { .. } => sift_few(&rows[..1000 * dim], &live, &probes, &bars[..count], dim),
                Kernel::Many { .. } => sift_many(&rows[..1000 * dim], &live, &packed, kernel.tile_probes(), &bars, dim),
            };
            let batch = Batch { dim, probes: count, packed, bars: bars.clone(), runs: vec![run] };
            let report = device.run(&batch).unwrap();
            let sorted = |entries: Vec<Entry>| {
                let mut entries = entries;
                entries.sort_by_key(|entry| (entry.probe, entry.slot));
                entries
            };
            let expected: Vec<Entry> = expected
                .into_iter()
                .filter(|entry| entry.slot >= first)
                .map(|entry| Entry { slot: entry.slot + base, ..entry })
                .collect();
            let near = |entry: &Entry| 2.0 * slack(&probes[entry.probe as usize * dim..][..dim], false) as f32;
            let clear = |entries: &[Entry]| -> Vec<Entry> {
                let far = |e: &&Entry| (e.score - bars[e.probe as usize].cut).abs() > 2.0 * near(e);
                entries.iter().filter(far).copied().collect()
            };
            let (found, expected) = (clear(&sorted(report.entries)), clear(&sorted(expected)));
            let pairs = |e: &[Entry]| e.iter().map(|e| (e.probe, e.slot)).collect::<Vec<_>>();
            assert_eq!(pairs(&found), pairs(&expected), "dim {dim} probes {count}");
            assert!(expected.len() > 20 * count, "dim {dim} probes {count}: a weak test");
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found.score - expected.score).abs() <= near(found), "{found:?} {expected:?}");
            }
        }
    }
}
