//! The bytes on disk: they are where `FORMAT.md` says, and stay what they were.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use thenar_index::codes::{BLOCK_ROWS, sketch_bytes};
use thenar_index::{
    DamageKind, Error, Geometry, Index, KeyId, Lsn, NewRow, OwnedRow, SubjectNumber, TemplateId, Unrepaired, VERSION,
    VerifyReport, sketch, verify,
};
use xxhash_rust::xxh3::xxh3_64;

use crate::crash::{TORN, assert_no_bytes_of};
use crate::model::live_rows;
use crate::palms;
use crate::sim::{Disk, Mishap, disk_of};

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

fn golden_dir(version: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/v{version}"))
}

const FILES: [&str; 3] = ["MANIFEST", "seg-00000000.idx", "seg-00000001.idx"];
// Where the areas of codes start in a segment of 64 rows of 32 components, each less than a page.
const SIGN_AT: usize = 4096 + 64 * 128 + 64 * 64;
const TWO_AT: usize = SIGN_AT + 4096;
const FINE_AT: usize = TWO_AT + 4096;
const TERMS_AT: usize = FINE_AT + 4096;
const SKETCH_AT: usize = TERMS_AT + 4096;
const SUMS_AT: usize = SKETCH_AT + 4096;

#[test]
fn the_format_has_not_changed() {
    let dir = tempfile::tempdir().unwrap();
    make_golden(dir.path());
    let golden_dir = golden_dir(VERSION);
    // For the first files of a new version, and for nothing else.
    if std::env::var_os("THENAR_GOLDEN_WRITE").is_some() {
        fs::create_dir_all(&golden_dir).unwrap();
        for name in FILES {
            fs::copy(dir.path().join(name), golden_dir.join(name)).unwrap();
        }
    }
    for name in FILES {
        let made = fs::read(dir.path().join(name)).unwrap();
        let golden = fs::read(golden_dir.join(name)).unwrap();
        let differs = made.iter().zip(&golden).position(|(made, golden)| made != golden);
        assert_eq!(
            (made.len(), differs),
            (golden.len(), None),
            "{name}: a new format needs a new version, and old files need a reader"
        );
    }
}

fn copy_golden(version: u32, dir: &Path) {
    for name in FILES {
        fs::copy(golden_dir(version).join(name), dir.join(name)).unwrap();
    }
}

/// What the golden index shows once it is open: what was forgotten is erased.
fn assert_golden(index: &Index) {
    let mut rows = golden_rows();
    rows.retain(|row| row.subject != SubjectNumber(4) && row.template != TemplateId(650));
    assert!(live_rows(&index.snapshot()).into_values().eq(rows));
}

fn verified(dir: &Path) -> VerifyReport {
    verify(dir, KEY, &|_, _| ControlFlow::Continue(())).unwrap()
}

#[test]
fn an_index_of_the_present_format_opens() {
    let dir = tempfile::tempdir().unwrap();
    copy_golden(VERSION, dir.path());
    let unrepaired = Index::open(dir.path(), KEY).unwrap();
    assert_eq!((unrepaired.damage(), unrepaired.codes_damage()), (&[][..], &[][..]));
    assert_eq!((unrepaired.version(), unrepaired.lsn(), unrepaired.geometry()), (VERSION, Lsn(77), SHAPE));
    let index = unrepaired.finish_with(&mut |_, _| panic!("there is nothing to upgrade")).unwrap();
    assert_golden(&index);
}

#[test]
fn an_index_of_an_earlier_format_opens_and_is_given_codes() {
    for version in 1..VERSION {
        let dir = tempfile::tempdir().unwrap();
        copy_golden(version, dir.path());
        let report = verified(dir.path());
        assert_eq!((report.version, report.damage.len(), report.codes_unfinished), (version, 0, 0));
        let bytes = FILES[1..].iter().map(|name| fs::metadata(dir.path().join(name)).unwrap().len());
        assert_eq!(report.bytes, bytes.sum::<u64>());
        let unrepaired = Index::open(dir.path(), KEY).unwrap();
        assert_eq!((unrepaired.damage(), unrepaired.codes_damage()), (&[][..], &[][..]));
        assert_eq!((unrepaired.version(), unrepaired.lsn(), unrepaired.geometry()), (version, Lsn(77), SHAPE));
        let mut told = Vec::new();
        let index = unrepaired.finish_with(&mut |done, total| told.push((done, total))).unwrap();
        assert_eq!(told, [(64, 70), (64, 70), (70, 70)]);
        assert_golden(&index);
        drop(index);
        // Every byte is that of a segment made by this version, but for the header, which stays.
        for name in &FILES[1..] {
            let upgraded = fs::read(dir.path().join(name)).unwrap();
            let mut made = fs::read(golden_dir(VERSION).join(name)).unwrap();
            made[..4096].copy_from_slice(&fs::read(golden_dir(version).join(name)).unwrap()[..4096]);
            if *name == "seg-00000001.idx" {
                // The forgotten row is erased by now.
                made[4096..4096 + 128].fill(0);
                made[4096 + 24..4096 + 28].copy_from_slice(b"GONE");
                made[4096 + 64 * 128..][..64].fill(0);
            }
            assert!(upgraded == made, "{name} of version {version}");
        }
        let report = verified(dir.path());
        assert!(report.is_sound() && report.version == VERSION, "{report:?}");
        let again = Index::open(dir.path(), KEY).unwrap();
        assert_golden(&again.finish_with(&mut |_, _| panic!("upgraded twice")).unwrap());
    }
}

/// Where the areas behind the rows start, and their bytes a block: sign, two, fine, terms, sketches,
/// checksums.
fn areas(shape: Geometry) -> [(usize, usize); 6] {
    let mut end = bare_bytes(shape);
    [shape.dim * 8, shape.dim * 8, shape.dim * 32, 768, sketch_bytes(shape.dim), 8].map(|bytes| {
        let start = end.next_multiple_of(4096);
        end = start + shape.segment_rows as usize / BLOCK_ROWS * bytes;
        (start, bytes)
    })
}

/// Length of a segment without codes.
fn bare_bytes(shape: Geometry) -> usize {
    4096 + shape.segment_rows as usize * (128 + shape.dim * 2)
}

/// Makes a segment of the present version one of version 2: without sketches, the checksums taking
/// in no more than what is left.
fn take_sketches(bytes: &mut Vec<u8>, shape: Geometry) {
    let [planes @ .., (sketch_at, _), (sums_at, _)] = areas(shape);
    let mut sums = Vec::new();
    for block in 0..shape.segment_rows as usize / BLOCK_ROWS {
        let mut hashed: Vec<u8> = planes
            .iter()
            .flat_map(|&(at, each): &(usize, usize)| xxh3_64(&bytes[at + block * each..][..each]).to_le_bytes())
            .collect();
        hashed.extend_from_slice(&bytes[24..32]);
        hashed.extend_from_slice(&(block as u64).to_le_bytes());
        let has_codes = u64_at(bytes, sums_at + block * 8) != 0;
        sums.extend_from_slice(&if has_codes { xxh3_64(&hashed) } else { 0 }.to_le_bytes());
    }
    bytes.truncate(sketch_at);
    bytes.extend_from_slice(&sums);
}

/// Sets the version in a header page or a manifest.
fn set_version(bytes: &mut [u8], version: u32) {
    let sum_at = if bytes.starts_with(b"THNRMANI") { bytes.len() - 8 } else { 4088 };
    bytes[8..12].copy_from_slice(&version.to_le_bytes());
    let sum = xxh3_64(&bytes[..sum_at]);
    bytes[sum_at..sum_at + 8].copy_from_slice(&sum.to_le_bytes());
}

/// Makes an index of the present version in `dir` one of `version`, with segments as
/// `files_version` has them.
fn downgrade(dir: &Path, shape: Geometry, version: u32, files_version: u32) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        let is_segment = bytes.starts_with(b"THNRSEGM");
        if !is_segment && !bytes.starts_with(b"THNRMANI") {
            continue;
        }
        assert_eq!(u32_at(&bytes, 8), VERSION);
        match files_version {
            1 if is_segment => bytes.truncate(bare_bytes(shape)),
            2 if is_segment => take_sketches(&mut bytes, shape),
            _ => {}
        }
        set_version(&mut bytes, version);
        fs::write(&path, &bytes).unwrap();
    }
}

#[test]
fn a_row_of_512_components_takes_the_bytes_that_format_md_says() {
    let (dir, shape) = (tempfile::tempdir().unwrap(), Geometry::new(512));
    let mut index = Index::create(dir.path(), shape, KEY).unwrap();
    index.append(&palms::borrowed(&[palms::row(1, 1, shape.dim)])).unwrap();
    let bytes = fs::metadata(dir.path().join(FILES[1])).unwrap().len() as usize;
    let rows = shape.segment_rows as usize;
    assert_eq!((bare_bytes(shape) - 4096) / rows, 1152);
    let (codes, sketch) = ((bytes - bare_bytes(shape)) / rows, sketch_bytes(shape.dim) / BLOCK_ROWS);
    let page = include_str!("../../FORMAT.md");
    for said in [
        format!("a row and its record take 1,152 bytes, its codes {codes}, of which its sketch is {sketch}."),
        format!("a row takes {codes} bytes more than in version 1, where it took 1,152, and {sketch} more than"),
    ] {
        assert!(page.contains(&said), "{said}");
    }
}

#[test]
fn the_files_of_earlier_versions_are_those_of_this_one_without_codes() {
    for version in 1..VERSION {
        let dir = tempfile::tempdir().unwrap();
        copy_golden(VERSION, dir.path());
        downgrade(dir.path(), SHAPE, version, version);
        for name in FILES {
            let made = fs::read(dir.path().join(name)).unwrap();
            assert!(made == fs::read(golden_dir(version).join(name)).unwrap(), "{name} of version {version}");
        }
    }
}

#[test]
fn files_of_an_earlier_format_have_its_length_or_that_of_a_change_cut_short() {
    let lengths = [bare_bytes(SHAPE), SKETCH_AT + 8, SUMS_AT + 8];
    for version in 1..=VERSION {
        let expected = lengths[version as usize - 1];
        for at in lengths {
            for len in [at - 1, at, at + 1] {
                let dir = tempfile::tempdir().unwrap();
                copy_golden(version, dir.path());
                let path = dir.path().join(FILES[1]);
                let mut bytes = fs::read(&path).unwrap();
                bytes.resize(len, 0x5a);
                fs::write(&path, bytes).unwrap();
                let context = format!("{len} bytes in version {version}");
                let unrepaired = Index::open(dir.path(), KEY).unwrap();
                if len == at && at >= expected {
                    let index = unrepaired.finish().unwrap_or_else(|error| panic!("{context}: {error}"));
                    assert_golden(&index);
                    drop(index);
                    assert!(verified(dir.path()).is_sound(), "{context}");
                } else {
                    let [damage] = unrepaired.damage() else { panic!("{context}: {unrepaired:?}") };
                    let found = (damage.kind, damage.expected, damage.found);
                    assert_eq!(found, (DamageKind::Length, expected as u64, len as u64), "{context}");
                }
            }
        }
    }
}

#[test]
fn a_header_is_of_the_version_of_its_index_or_of_an_earlier_one() {
    for version in 1..=VERSION {
        for header in 0..=VERSION + 1 {
            let dir = tempfile::tempdir().unwrap();
            copy_golden(version, dir.path());
            let path = dir.path().join(FILES[1]);
            let mut bytes = fs::read(&path).unwrap();
            set_version(&mut bytes, header);
            fs::write(&path, bytes).unwrap();
            let unrepaired = Index::open(dir.path(), KEY).unwrap();
            let damage: Vec<_> = unrepaired.damage().iter().map(|d| (d.kind, d.offset, d.expected, d.found)).collect();
            let wrong = (DamageKind::HeaderField, 8, u64::from(version), u64::from(header));
            let expected = if (1..=version).contains(&header) { vec![] } else { vec![wrong] };
            assert_eq!(damage, expected, "header {header} in an index of version {version}");
        }
    }
}

/// An index of an earlier version, and the templates that are no longer in it.
struct Outdated {
    dir: tempfile::TempDir,
    live: BTreeMap<u64, OwnedRow>,
    gone: Vec<u64>,
}

/// An index of `version` in which all was cut short that can be, its files as `files_version` has
/// them: two rows are erased whose codes are not, one is to be erased, and behind the rows that
/// count are others, with codes, which fill up two blocks. Four blocks are full, and the last
/// segment has none: what version 2 has where this one has sketches, checksums, lies there where a
/// block has no sketches.
fn outdated(version: u32, files_version: u32) -> Outdated {
    let dir = tempfile::tempdir().unwrap();
    let mut index = Index::create_on(Arc::new(disk_of(dir.path())), dir.path(), TORN, KEY).unwrap();
    let rows: Vec<OwnedRow> = (1..=384).map(|n| palms::row(n, n / 2, TORN.dim)).collect();
    index.append(&palms::borrowed(&rows[..276])).unwrap();
    let erased = index.forget(SubjectNumber(9));
    drop(index.publish(Lsn(5)));
    let first = dir.path().join(FILES[1]);
    let before = fs::read(&first).unwrap();
    index.erase(&erased).unwrap();
    index.forget_template(TemplateId(200)).unwrap();
    index.checkpoint().unwrap();
    let live = live_rows(&index.snapshot());
    index.append(&palms::borrowed(&rows[276..])).unwrap();
    drop(index);
    let codes_at = areas(TORN)[0].0;
    let mut bytes = fs::read(&first).unwrap();
    bytes[codes_at..].copy_from_slice(&before[codes_at..]);
    fs::write(&first, bytes).unwrap();
    downgrade(dir.path(), TORN, version, files_version);
    let gone: Vec<u64> = (1..=384).filter(|template| !live.contains_key(template)).collect();
    assert_eq!((gone[..3].to_vec(), gone.len()), (vec![18, 19, 200], 3 + 108));
    Outdated { dir, live, gone }
}

impl Outdated {
    fn copy(&self) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(self.dir.path()).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
        }
        copy
    }

    /// Whatever was left in `dir` becomes an index of the present version, with nothing lost and
    /// nothing left over.
    fn assert_upgraded(&self, dir: &Path, context: &str) {
        let index = open(&disk_of(dir), dir).unwrap_or_else(|error| panic!("{context}: {error}"));
        assert!(live_rows(&index.snapshot()) == self.live, "{context}");
        drop(index);
        let report = verified(dir);
        assert!(report.is_sound() && report.version == VERSION, "{context}: {report:?}");
        assert_no_bytes_of(self.gone.iter().copied(), dir, context);
    }
}

fn open(disk: &Disk, dir: &Path) -> Result<Index, Error> {
    Index::open_on(Arc::new(disk.clone()), dir, KEY).and_then(Unrepaired::finish)
}

/// Versions of an index and of its files: a change from 1 to 2 may have been cut short as well.
const OUTDATED: [(u32, u32); 3] = [(1, 1), (1, 2), (2, 2)];

#[test]
fn verifying_an_index_of_an_earlier_format_finds_codes_of_rows_that_are_gone() {
    for (version, files_version) in OUTDATED {
        let outdated = outdated(version, files_version);
        let report = verified(outdated.dir.path());
        assert_eq!((report.version, report.damage.len(), report.codes_damage.len()), (version, 0, 0));
        assert_eq!((report.live, report.erased, report.forgotten), (276 - 2, 2, 1));
        // In version 1 what is behind the rows means nothing.
        assert_eq!((report.stale, report.codes_unfinished), (108, if version == 2 { 3 } else { 0 }));
        assert!(!report.is_sound());
        outdated.assert_upgraded(outdated.dir.path(), "verified");
    }
}

#[test]
fn a_power_cut_or_a_failure_while_the_format_changes_loses_nothing_and_leaves_nothing() {
    for (version, files_version) in OUTDATED {
        let outdated = outdated(version, files_version);
        // Every write of a change from either version; fewer of one that was cut short before.
        let step = if version == files_version { 1 } else { 3 };
        for op in (0..).step_by(step) {
            let context = |what: &str| format!("version {version}, files {files_version}: {what} at operation {op}");
            let dir = outdated.copy();
            let disk = disk_of(dir.path());
            disk.plan(op, Mishap::PowerCut);
            let opened = open(&disk, dir.path());
            if !disk.is_dead() {
                assert!(opened.is_ok() && op > 40, "an upgrade of {op} operations proves little");
                break;
            }
            assert!(opened.is_err());
            for luck in 0..2 {
                let left = tempfile::tempdir().unwrap();
                disk.leave(left.path(), op * 8 + luck);
                outdated.assert_upgraded(left.path(), &context(&format!("power cut, luck {luck},")));
            }
            let mishap = if op % 2 == 0 { Mishap::Full } else { Mishap::Fails(io::ErrorKind::StorageFull) };
            let dir = outdated.copy();
            let disk = disk_of(dir.path());
            disk.plan(op, mishap);
            match open(&disk, dir.path()) {
                Err(Error::Io { source, .. }) => assert_eq!(source.kind(), io::ErrorKind::StorageFull),
                // Full, and nothing was written after that.
                opened => assert!(opened.is_ok() && mishap == Mishap::Full, "{}: {opened:?}", context("full")),
            }
            outdated.assert_upgraded(dir.path(), &context(&format!("{mishap:?}")));
        }
    }
}

#[test]
fn a_power_cut_while_the_format_changes_after_the_process_ended_in_it_loses_nothing_and_leaves_nothing() {
    // The second process sees what the first wrote, synced or not; the disk need not have it yet.
    let outdated = outdated(2, 2);
    let all = {
        let dir = outdated.copy();
        let disk = disk_of(dir.path());
        drop(open(&disk, dir.path()).unwrap());
        disk.ops()
    };
    for op in (0..all).step_by(7) {
        for second in (op % 4..).step_by(4) {
            let dir = outdated.copy();
            let disk = disk_of(dir.path());
            disk.plan(op, Mishap::Fails(io::ErrorKind::Other));
            assert!(open(&disk, dir.path()).is_err());
            disk.plan(disk.ops() + second, Mishap::PowerCut);
            drop(open(&disk, dir.path()));
            if !disk.is_dead() {
                break;
            }
            let left = tempfile::tempdir().unwrap();
            disk.leave(left.path(), op * 64 + second);
            let context = format!("end at operation {op}, power cut at operation {second} after that");
            outdated.assert_upgraded(left.path(), &context);
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn the_manifest_is_as_format_md_says() {
    let bytes = fs::read(golden_dir(VERSION).join("MANIFEST")).unwrap();
    assert_eq!(&bytes[..8], b"THNRMANI");
    let words: Vec<u32> = (8..24).step_by(4).map(|at| u32_at(&bytes, at)).collect();
    assert_eq!(words, [VERSION, 32, 64, 2], "version, components, rows a segment, next file");
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
    let manifest = fs::read(golden_dir(VERSION).join("MANIFEST")).unwrap();
    let bytes = fs::read(golden_dir(VERSION).join("seg-00000000.idx")).unwrap();
    assert_eq!(bytes.len(), SUMS_AT + 8);
    assert_eq!(&bytes[..8], b"THNRSEGM");
    let words: Vec<u32> = (8..24).step_by(4).map(|at| u32_at(&bytes, at)).collect();
    assert_eq!(words, [VERSION, 32, 64, 128], "version, components, rows, bytes of a record");
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

#[test]
fn codes_are_as_format_md_says() {
    let bytes = fs::read(golden_dir(VERSION).join("seg-00000000.idx")).unwrap();
    let terms_of = |n: usize| &bytes[TERMS_AT + n * 12..][..12];
    for (n, row) in golden_rows()[..64].iter().enumerate() {
        let words: Vec<u16> =
            (0..8).step_by(2).map(|at| u16::from_le_bytes([terms_of(n)[at], terms_of(n)[at + 1]])).collect();
        let bit = |at: usize, i: usize| bytes[at + i / 8 * 64 + n] >> (i % 8) & 1;
        let nibble = |i: usize| bytes[FINE_AT + n * 16 + i % 16] >> (if i < 16 { 0 } else { 4 }) & 15;
        let word = |group: usize| (0..6).map(|k| usize::from(bit(SKETCH_AT, group * 6 + k)) << k).sum::<usize>();
        let sketch_cosine = bytes[SKETCH_AT + sketch_bytes(32) - 64 + n];
        if row.subject == SubjectNumber(4) {
            assert!((0..32).all(|i| bit(SIGN_AT, i) == 0 && bit(TWO_AT, i) == 0 && nibble(i) == 0));
            assert_eq!(terms_of(n), [0; 12]);
            assert!((0..sketch_bytes(32)).step_by(64).all(|line| bytes[SKETCH_AT + line + n] == 0));
            continue;
        }
        let values: Vec<f64> = row.vector.iter().map(|x| x.to_f64()).collect();
        let length = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
        let rms = length(&values) / 32_f64.sqrt();
        let sign: Vec<f64> = (0..32).map(|i| 1.0 - 2.0 * f64::from(bit(SIGN_AT, i))).collect();
        let two: Vec<f64> = (0..32).map(|i| sign[i] * (1.0 + 2.0 * f64::from(bit(TWO_AT, i)))).collect();
        let fine: Vec<f64> = (0..32).map(|i| 2.0 * f64::from(nibble(i)) - 15.0).collect();
        for (i, x) in values.iter().enumerate() {
            assert_eq!(sign[i], x.signum());
            assert_eq!(two[i].abs() == 3.0, x.abs() > 0.9957 * rms);
            assert_eq!(fine[i], x.signum() * (2.0 * (x.abs() / (0.3352 * rms)).floor().min(7.0) + 1.0));
        }
        for (code, word) in [&sign, &two, &fine].into_iter().zip(&words) {
            let dot: f64 = values.iter().zip(code).map(|(x, c)| x * c).sum();
            assert_eq!(*word, (65_536.0 * dot / length(&values) / length(code) - 1e-5) as u16);
        }
        assert_eq!(usize::from(words[3]), two.iter().filter(|c| c.abs() == 3.0).count());
        assert_eq!(f64::from(u32_at(terms_of(n), 8)), fine.iter().map(|c| c * c).sum::<f64>());
        let (mut dot, mut square) = (0.0, 0.0);
        for (group, values) in values.chunks(sketch::GROUP_DIMS).enumerate() {
            let with =
                |word: &[i8; sketch::GROUP_DIMS]| values.iter().zip(word).map(|(x, c)| x * f64::from(*c)).sum::<f64>();
            let chosen = with(&sketch::WORDS[word(group)]);
            assert!(sketch::WORDS.iter().all(|other| with(other) <= chosen * (1.0 + 1e-6)), "group {group} of row {n}");
            dot += chosen;
            square += 10_000.0;
        }
        // Bits behind the last group are zero.
        let bits = sketch::groups(32) * 6;
        assert!((bits..bits.next_multiple_of(8)).all(|i| bit(SKETCH_AT, i) == 0));
        assert_eq!(sketch_cosine, (256.0 * dot / length(&values) / f64::sqrt(square) - 1e-5) as u8);
    }
    // What lies between the areas is zero, and the checksum takes in all five, segment and block.
    let areas = [(SIGN_AT, 256), (TWO_AT, 256), (FINE_AT, 1024), (TERMS_AT, 768), (SKETCH_AT, sketch_bytes(32))];
    for (at, len) in areas {
        assert!(bytes[at + len..at + 4096].iter().all(|byte| *byte == 0));
    }
    let mut hashed: Vec<u8> = areas.iter().flat_map(|&(at, len)| xxh3_64(&bytes[at..at + len]).to_le_bytes()).collect();
    hashed.extend_from_slice(&bytes[24..32]);
    hashed.extend_from_slice(&0_u64.to_le_bytes());
    assert_eq!(u64_at(&bytes, SUMS_AT), xxh3_64(&hashed));
    // A block that is not full has none.
    let bytes = fs::read(golden_dir(VERSION).join("seg-00000001.idx")).unwrap();
    assert!(bytes[SIGN_AT..].iter().all(|byte| *byte == 0));
}
