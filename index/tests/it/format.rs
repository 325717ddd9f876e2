//! The bytes on disk are as `FORMAT.md` says, and have not changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use thenar_index::codes::{BLOCK_ROWS, codebook_bytes};
use thenar_index::{
    DamageKind, GalleryId, Geometry, Index, KeyId, Lsn, NewRow, Origin, OwnedRow, Row, SubjectNumber, TemplateId,
    VERSION, codebook,
};
use xxhash_rust::xxh3::xxh3_64;

use crate::support::contents::live_rows;
use crate::support::disk::disk_of;
use crate::support::rows;

pub(crate) const GOLDEN_KEY: Origin =
    Origin { gallery: GalleryId(*b"golden-gallery-1"), key: KeyId(*b"golden-key-id-01") };
const SHAPE: Geometry = Geometry { dim: 32, segment_rows: 64 };

fn golden_rows() -> Vec<OwnedRow> {
    let row = |n: u64| OwnedRow {
        template: TemplateId(n * 10),
        subject: SubjectNumber(n / 2),
        hand: (n % 3) as u8,
        label: format!("palm-{n}"),
        source: 0x1234_5678_0000 + n,
        vector: (0..32).map(|i| f16::from_f64((n * 32 + i) as f64 / 4096.0)).collect(),
    };
    (1..=70).map(row).collect()
}

/// Creates the golden index in `dir`: 70 rows, of which two are erased and one is forgotten. The test disk
/// assigns identities in sequence, so the bytes are always the same.
fn make_golden(dir: &Path) {
    let mut index = Index::create_on(Arc::new(disk_of(dir)), dir, SHAPE, GOLDEN_KEY).unwrap();
    let rows = golden_rows();
    let rows: Vec<NewRow<'_>> = rows.iter().map(OwnedRow::as_new).collect();
    index.append(&rows).unwrap();
    let gone = index.forget(SubjectNumber(4));
    assert_eq!(index.forget_template(TemplateId(650)), [Row(64)]);
    drop(index.publish(Lsn(77)));
    index.erase(&gone).unwrap();
    index.checkpoint().unwrap();
}

pub(crate) fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

const FILES: [&str; 3] = ["MANIFEST", "seg-00000000.idx", "seg-00000001.idx"];
// Starts of the areas of codes in a segment of 64 rows of 32 components. Each is shorter than a page.
const ONE_BIT_AT: usize = 4096 + 64 * 128 + 64 * 64;
const TWO_BIT_AT: usize = ONE_BIT_AT + 4096;
const FOUR_BIT_AT: usize = TWO_BIT_AT + 4096;
const FACTORS_AT: usize = FOUR_BIT_AT + 4096;
const CODEBOOK_AT: usize = FACTORS_AT + 4096;
const SUMS_AT: usize = CODEBOOK_AT + 4096;

#[test]
fn the_format_has_not_changed() {
    let dir = tempfile::tempdir().unwrap();
    make_golden(dir.path());
    let golden_dir = golden_dir();
    // Only for a deliberate change of the format.
    if std::env::var_os("THENAR_GOLDEN_WRITE").is_some() {
        for name in FILES {
            fs::copy(dir.path().join(name), golden_dir.join(name)).unwrap();
        }
    }
    for name in FILES {
        let made = fs::read(dir.path().join(name)).unwrap();
        let golden = fs::read(golden_dir.join(name)).unwrap();
        let differs = made.iter().zip(&golden).position(|(made, golden)| made != golden);
        assert_eq!((made.len(), differs), (golden.len(), None), "{name}: the format has changed");
    }
}

fn copy_golden(dir: &Path) {
    for name in FILES {
        fs::copy(golden_dir().join(name), dir.join(name)).unwrap();
    }
}

/// The rows of the golden index once it is open: forgotten rows are erased.
fn assert_golden(index: &Index) {
    let mut rows = golden_rows();
    rows.retain(|row| row.subject != SubjectNumber(4) && row.template != TemplateId(650));
    assert!(live_rows(&index.snapshot()).into_values().eq(rows));
}

#[test]
fn the_golden_index_opens() {
    let dir = tempfile::tempdir().unwrap();
    copy_golden(dir.path());
    let unrepaired = Index::open(dir.path(), GOLDEN_KEY).unwrap();
    assert_eq!((unrepaired.damage(), unrepaired.codes_damage()), (&[][..], &[][..]));
    assert_eq!((unrepaired.lsn(), unrepaired.geometry()), (Lsn(77), SHAPE));
    assert_golden(&unrepaired.finish().unwrap());
}

#[test]
fn a_segment_of_another_format_is_damaged() {
    for version in [0, VERSION - 1, VERSION + 1] {
        let dir = tempfile::tempdir().unwrap();
        copy_golden(dir.path());
        let path = dir.path().join(FILES[1]);
        let mut bytes = fs::read(&path).unwrap();
        bytes[8..12].copy_from_slice(&version.to_le_bytes());
        let sum = xxh3_64(&bytes[..4088]);
        bytes[4088..4096].copy_from_slice(&sum.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        let unrepaired = Index::open(dir.path(), GOLDEN_KEY).unwrap();
        let [damage] = unrepaired.damage() else { panic!("{unrepaired:?}") };
        let found = (damage.kind, damage.offset, damage.expected, damage.found);
        assert_eq!(found, (DamageKind::HeaderField, 8, u64::from(VERSION), u64::from(version)));
    }
}

/// Length of a segment without its codes.
fn bare_bytes(shape: Geometry) -> usize {
    4096 + shape.segment_rows as usize * (128 + shape.dim * 2)
}

#[test]
fn a_row_of_512_components_takes_the_bytes_that_format_md_says() {
    let (dir, shape) = (tempfile::tempdir().unwrap(), Geometry::new(512));
    let mut index = Index::create(dir.path(), shape, GOLDEN_KEY).unwrap();
    index.append(&rows::borrowed(&[rows::row(1, 1, shape.dim)])).unwrap();
    let bytes = fs::metadata(dir.path().join(FILES[1])).unwrap().len() as usize;
    let rows = shape.segment_rows as usize;
    assert_eq!((bare_bytes(shape) - 4096) / rows, 1152);
    let (codes, codebook) = ((bytes - bare_bytes(shape)) / rows, codebook_bytes(shape.dim) / BLOCK_ROWS);
    let page = include_str!("../../FORMAT.md");
    let said =
        format!("a row and its record take 1,152 bytes, its codes {codes}, of which its codebook code is {codebook}.");
    assert!(page.contains(&said), "{said}");
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn the_manifest_is_as_format_md_says() {
    let bytes = fs::read(golden_dir().join("MANIFEST")).unwrap();
    assert_eq!(&bytes[..8], b"THNRMANI");
    let words: Vec<u32> = (8..24).step_by(4).map(|at| u32_at(&bytes, at)).collect();
    assert_eq!(words, [VERSION, 32, 64, 2], "version, components, rows a segment, next file");
    assert_eq!(u64_at(&bytes, 24), 77, "LSN");
    assert_eq!((&bytes[32..48], &bytes[48..64]), (&GOLDEN_KEY.key.0[..], &GOLDEN_KEY.gallery.0[..]));
    assert_eq!((u32_at(&bytes, 64), u32_at(&bytes, 68), u64_at(&bytes, 72)), (2, 1, 0), "segments, forgotten, zero");
    let first: Vec<u64> = (80..104).step_by(8).map(|at| u64_at(&bytes, at)).collect();
    assert_eq!(first[1..], [10, 640], "first and last template");
    let of_first: Vec<u32> = (104..120).step_by(4).map(|at| u32_at(&bytes, at)).collect();
    assert_eq!(of_first, [0, 64, 0, 0], "file, rows, slot, zero");
    assert_eq!((u64_at(&bytes, 128), u64_at(&bytes, 136)), (650, 700));
    let of_second: Vec<u32> = (144..160).step_by(4).map(|at| u32_at(&bytes, at)).collect();
    assert_eq!(of_second, [1, 6, 1, 0]);
    assert_eq!((u32_at(&bytes, 160), u32_at(&bytes, 164)), (64, 0), "forgotten row, padding");
    assert_eq!((u64_at(&bytes, 168), bytes.len()), (xxh3_64(&bytes[..168]), 176));
}

#[test]
fn a_segment_is_as_format_md_says() {
    let manifest = fs::read(golden_dir().join("MANIFEST")).unwrap();
    let bytes = fs::read(golden_dir().join("seg-00000000.idx")).unwrap();
    assert_eq!(bytes.len(), SUMS_AT + 8);
    assert_eq!(&bytes[..8], b"THNRSEGM");
    let words: Vec<u32> = (8..24).step_by(4).map(|at| u32_at(&bytes, at)).collect();
    assert_eq!(words, [VERSION, 32, 64, 128], "version, components, rows, bytes of a record");
    let identity = u64_at(&bytes, 24);
    assert_eq!(identity, u64_at(&manifest, 80));
    assert!(bytes[32..4088].iter().all(|byte| *byte == 0));
    assert_eq!(u64_at(&bytes, 4088), xxh3_64(&bytes[..4088]));
    for (offset, row) in golden_rows()[..64].iter().enumerate() {
        let record = &bytes[4096 + offset * 128..][..128];
        let vector = &bytes[4096 + 64 * 128 + offset * 64..][..64];
        if row.subject == SubjectNumber(4) {
            assert_eq!(&record[24..28], b"GONE");
            assert!(record.iter().enumerate().all(|(at, byte)| (24..28).contains(&at) || *byte == 0));
            assert!(vector.iter().all(|byte| *byte == 0));
            continue;
        }
        assert_eq!((u64_at(record, 0), u64_at(record, 8)), (row.template.0, row.subject.0));
        assert_eq!((&record[24..28], record[28], usize::from(record[29])), (&b"LIVE"[..], row.hand, row.label.len()));
        assert_eq!(&record[32..32 + row.label.len()], row.label.as_bytes());
        assert_eq!(u64_at(record, 96), row.source);
        let rest = record[30..32].iter().chain(&record[32 + row.label.len()..96]).chain(&record[104..]);
        assert!(rest.copied().all(|byte| byte == 0));
        assert!(vector.iter().copied().eq(row.vector.iter().flat_map(|x| x.to_le_bytes())));
        // The checksum covers the record with the row's hash in place of the checksum, then the segment's
        // identity, then the offset.
        let mut hashed = record.to_vec();
        hashed[16..24].copy_from_slice(&xxh3_64(vector).to_le_bytes());
        hashed.extend_from_slice(&identity.to_le_bytes());
        hashed.extend_from_slice(&(offset as u64).to_le_bytes());
        assert_eq!(u64_at(record, 16), xxh3_64(&hashed));
    }
}

#[test]
fn codes_are_as_format_md_says() {
    let bytes = fs::read(golden_dir().join("seg-00000000.idx")).unwrap();
    let factors_of = |n: usize| &bytes[FACTORS_AT + n * 12..][..12];
    for (n, row) in golden_rows()[..64].iter().enumerate() {
        let stored: Vec<u16> =
            (0..8).step_by(2).map(|at| u16::from_le_bytes([factors_of(n)[at], factors_of(n)[at + 1]])).collect();
        let bit = |at: usize, i: usize| bytes[at + i / 8 * 64 + n] >> (i % 8) & 1;
        let nibble = |i: usize| bytes[FOUR_BIT_AT + n * 16 + i % 16] >> (if i < 16 { 0 } else { 4 }) & 15;
        let codeword = |group: usize| (0..6).map(|k| usize::from(bit(CODEBOOK_AT, group * 6 + k)) << k).sum::<usize>();
        let codebook_cosine = bytes[CODEBOOK_AT + codebook_bytes(32) - 64 + n];
        if row.subject == SubjectNumber(4) {
            assert!((0..32).all(|i| bit(ONE_BIT_AT, i) == 0 && bit(TWO_BIT_AT, i) == 0 && nibble(i) == 0));
            assert_eq!(factors_of(n), [0; 12]);
            assert!((0..codebook_bytes(32)).step_by(64).all(|line| bytes[CODEBOOK_AT + line + n] == 0));
            continue;
        }
        let values: Vec<f64> = row.vector.iter().map(|x| x.to_f64()).collect();
        let length = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
        let rms = length(&values) / 32_f64.sqrt();
        let one_bit: Vec<f64> = (0..32).map(|i| 1.0 - 2.0 * f64::from(bit(ONE_BIT_AT, i))).collect();
        let two_bit: Vec<f64> = (0..32).map(|i| one_bit[i] * (1.0 + 2.0 * f64::from(bit(TWO_BIT_AT, i)))).collect();
        let four_bit: Vec<f64> = (0..32).map(|i| 2.0 * f64::from(nibble(i)) - 15.0).collect();
        for (i, x) in values.iter().enumerate() {
            assert_eq!(one_bit[i], x.signum());
            assert_eq!(two_bit[i].abs() == 3.0, x.abs() > 0.9957 * rms);
            assert_eq!(four_bit[i], x.signum() * (2.0 * (x.abs() / (0.3352 * rms)).floor().min(7.0) + 1.0));
        }
        for (code, stored) in [&one_bit, &two_bit, &four_bit].into_iter().zip(&stored) {
            let dot: f64 = values.iter().zip(code).map(|(x, c)| x * c).sum();
            assert_eq!(*stored, (65_536.0 * dot / length(&values) / length(code) - 1e-5) as u16);
        }
        assert_eq!(usize::from(stored[3]), two_bit.iter().filter(|c| c.abs() == 3.0).count());
        assert_eq!(f64::from(u32_at(factors_of(n), 8)), four_bit.iter().map(|c| c * c).sum::<f64>());
        let (mut dot, mut square) = (0.0, 0.0);
        for (group, values) in values.chunks(codebook::GROUP_DIMS).enumerate() {
            let with = |codeword: &[i8; codebook::GROUP_DIMS]| {
                values.iter().zip(codeword).map(|(x, c)| x * f64::from(*c)).sum::<f64>()
            };
            let chosen = with(&codebook::CODEWORDS[codeword(group)]);
            assert!(
                codebook::CODEWORDS.iter().all(|other| with(other) <= chosen * (1.0 + 1e-6)),
                "group {group} of row {n}"
            );
            dot += chosen;
            square += 10_000.0;
        }
        // Bits after the last group are zero.
        let bits = codebook::groups(32) * 6;
        assert!((bits..bits.next_multiple_of(8)).all(|i| bit(CODEBOOK_AT, i) == 0));
        assert_eq!(codebook_cosine, (256.0 * dot / length(&values) / f64::sqrt(square) - 1e-5) as u8);
    }
    // Bytes between the areas are zero, and the checksum covers all five, the segment and the block.
    let areas = [
        (ONE_BIT_AT, 256),
        (TWO_BIT_AT, 256),
        (FOUR_BIT_AT, 1024),
        (FACTORS_AT, 768),
        (CODEBOOK_AT, codebook_bytes(32)),
    ];
    for (at, len) in areas {
        assert!(bytes[at + len..at + 4096].iter().all(|byte| *byte == 0));
    }
    let mut hashed: Vec<u8> = areas.iter().flat_map(|&(at, len)| xxh3_64(&bytes[at..at + len]).to_le_bytes()).collect();
    hashed.extend_from_slice(&bytes[24..32]);
    hashed.extend_from_slice(&0_u64.to_le_bytes());
    assert_eq!(u64_at(&bytes, SUMS_AT), xxh3_64(&hashed));
    // A block that is not full has no codes.
    let bytes = fs::read(golden_dir().join("seg-00000001.idx")).unwrap();
    assert!(bytes[ONE_BIT_AT..].iter().all(|byte| *byte == 0));
}
