//! The bytes on disk: they are where `FORMAT.md` says, and stay what they were.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use thenar_index::{Geometry, Index, KeyId, Lsn, NewRow, OwnedRow, SubjectNumber, TemplateId};
use xxhash_rust::xxh3::xxh3_64;

use crate::model::live_rows;
use crate::sim::disk_of;

const KEY: KeyId = KeyId(*b"golden-key-id-01");
const SHAPE: Geometry = Geometry { dim: 32, segment_rows: 64 };

fn golden_rows() -> Vec<OwnedRow> {
    let row = |n: u64| OwnedRow {
        template: TemplateId(n * 10),
        subject: SubjectNumber(n / 2),
        hand: (n % 3) as u8,
        label: format!("palm-{n}"),
        vector: (0..32).map(|i| f16::from_f64((n * 32 + i) as f64 / 4096.0)).collect(),
    };
    (1..=70).map(row).collect()
}

/// Makes the golden index in `dir`: 70 rows, two of them erased and one forgotten. The test disk
/// deals identities in sequence, so its bytes are always the same.
fn make_golden(dir: &Path) {
    let mut index = Index::create_on(Arc::new(disk_of(dir)), dir, SHAPE, KEY).unwrap();
    let rows = golden_rows();
    let rows: Vec<NewRow<'_>> = rows.iter().map(OwnedRow::as_new).collect();
    index.append(&rows).unwrap();
    let gone = index.forget(SubjectNumber(4));
    index.forget_template(TemplateId(650)).unwrap();
    drop(index.publish(Lsn(77)));
    index.erase(&gone).unwrap();
    index.checkpoint().unwrap();
}

fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

const FILES: [&str; 3] = ["MANIFEST", "seg-00000000.idx", "seg-00000001.idx"];

#[test]
fn the_format_has_not_changed() {
    let dir = tempfile::tempdir().unwrap();
    make_golden(dir.path());
    // For the first files of a new version, and for nothing else.
    if std::env::var_os("THENAR_GOLDEN_WRITE").is_some() {
        fs::create_dir_all(golden_dir()).unwrap();
        for name in FILES {
            fs::copy(dir.path().join(name), golden_dir().join(name)).unwrap();
        }
    }
    for name in FILES {
        let made = fs::read(dir.path().join(name)).unwrap();
        let golden = fs::read(golden_dir().join(name)).unwrap();
        let differs = made.iter().zip(&golden).position(|(made, golden)| made != golden);
        assert_eq!(
            (made.len(), differs),
            (golden.len(), None),
            "{name}: a new format needs a new version, and old files need a reader"
        );
    }
}

#[test]
fn an_index_of_format_version_1_opens() {
    let dir = tempfile::tempdir().unwrap();
    for name in FILES {
        fs::copy(golden_dir().join(name), dir.path().join(name)).unwrap();
    }
    let unrepaired = Index::open(dir.path(), KEY).unwrap();
    assert_eq!((unrepaired.damage(), unrepaired.lsn(), unrepaired.geometry()), (&[][..], Lsn(77), SHAPE));
    let index = unrepaired.finish().unwrap();
    let mut rows = golden_rows();
    rows.retain(|row| row.subject != SubjectNumber(4) && row.template != TemplateId(650));
    assert!(live_rows(&index.snapshot()).into_values().eq(rows));
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
    assert_eq!(words, [1, 32, 64, 2], "version, components, rows a segment, next file");
    assert_eq!(u64_at(&bytes, 24), 77, "LSN");
    assert_eq!(bytes[32..48], KEY.0);
    assert_eq!(
        (u32_at(&bytes, 48), u32_at(&bytes, 52), u64_at(&bytes, 56)),
        (2, 1, 0),
        "segments, forgotten, reserved"
    );
    let first: Vec<u64> = (64..88).step_by(8).map(|at| u64_at(&bytes, at)).collect();
    assert_eq!(first[1..], [10, 640], "first and last template");
    assert_eq!((u32_at(&bytes, 88), u32_at(&bytes, 92)), (0, 64), "file, rows");
    assert_eq!((u64_at(&bytes, 104), u64_at(&bytes, 112)), (650, 700));
    assert_eq!((u32_at(&bytes, 120), u32_at(&bytes, 124)), (1, 6));
    assert_eq!((u32_at(&bytes, 128), u32_at(&bytes, 132)), (64, 0), "forgotten row, padding");
    assert_eq!((u64_at(&bytes, 136), bytes.len()), (xxh3_64(&bytes[..136]), 144));
}

#[test]
fn a_segment_is_as_format_md_says() {
    let manifest = fs::read(golden_dir().join("MANIFEST")).unwrap();
    let bytes = fs::read(golden_dir().join("seg-00000000.idx")).unwrap();
    assert_eq!(bytes.len(), 4096 + 64 * 128 + 64 * 64);
    assert_eq!(&bytes[..8], b"THNRSEGM");
    let words: Vec<u32> = (8..24).step_by(4).map(|at| u32_at(&bytes, at)).collect();
    assert_eq!(words, [1, 32, 64, 128], "version, components, rows, bytes of a record");
    let identity = u64_at(&bytes, 24);
    assert_eq!(identity, u64_at(&manifest, 64));
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
        assert!(record[30..32].iter().chain(&record[32 + row.label.len()..]).all(|byte| *byte == 0));
        assert!(vector.iter().copied().eq(row.vector.iter().flat_map(|x| x.to_le_bytes())));
        // The checksum: the record with the row's hash in the checksum's place, then the
        // segment's identity, then the offset.
        let mut hashed = record.to_vec();
        hashed[16..24].copy_from_slice(&xxh3_64(vector).to_le_bytes());
        hashed.extend_from_slice(&identity.to_le_bytes());
        hashed.extend_from_slice(&(offset as u64).to_le_bytes());
        assert_eq!(u64_at(record, 16), xxh3_64(&hashed));
    }
}
