//! Flipped bits, truncated files and missing files are found or harmless, and never served.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use thenar_index::codes::codebook_bytes;
use thenar_index::{
    Damage, DamageKind, Error, GalleryId, Index, KeyId, Lsn, Origin, OwnedRow, SubjectNumber, TemplateId, VERSION,
    verify,
};

use crate::support::contents::live_rows;
use crate::support::rows::{Dice, KEY, SMALL, borrowed, row};

const HEADER: usize = 4096;
const META: usize = 128;
const ROWS_AT: usize = HEADER + 64 * META;
/// Areas of codes of the single block of a segment: 1-bit, 2-bit and 4-bit codes, factors, codebook codes,
/// checksum. Each starts on a page and is at most a page long.
const CODES: [(usize, usize); 6] = [
    (ROWS_AT + 64 * 64, 64 * 32 / 8),
    (ROWS_AT + 64 * 64 + 4096, 64 * 32 / 8),
    (ROWS_AT + 64 * 64 + 2 * 4096, 64 * 32 / 2),
    (ROWS_AT + 64 * 64 + 3 * 4096, 64 * 12),
    (ROWS_AT + 64 * 64 + 4 * 4096, codebook_bytes(32)),
    (ROWS_AT + 64 * 64 + 5 * 4096, 8),
];
const CODEBOOK: usize = 4;
const SUM: usize = 5;
const SEGMENT: usize = CODES[SUM].0 + CODES[SUM].1;
/// Rows in the index: two full segments and one with 30 rows.
const ROWS: u64 = 2 * 64 + 30;

/// An index on disk, its bytes and its rows.
struct Sample {
    dir: tempfile::TempDir,
    files: BTreeMap<String, Vec<u8>>,
    rows: BTreeMap<u64, OwnedRow>,
}

fn sample() -> Sample {
    let dir = tempfile::tempdir().unwrap();
    let mut index = Index::create(dir.path(), SMALL, KEY).unwrap();
    let rows: Vec<OwnedRow> = (1..=ROWS).map(|n| row(n * 2, n / 3, SMALL.dim)).collect();
    index.append(&borrowed(&rows)).unwrap();
    let mut gone = index.forget(SubjectNumber(5));
    gone.extend(index.forget(SubjectNumber(45)));
    drop(index.publish(Lsn(9)));
    index.erase(&gone).unwrap();
    index.checkpoint().unwrap();
    let live = live_rows(&index.snapshot());
    assert_eq!(live.len() as u64, ROWS - 6);
    drop(index);
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        files.insert(name_of(&path), fs::read(&path).unwrap());
    }
    assert_eq!(
        files.keys().collect::<Vec<_>>(),
        ["LOCK", "MANIFEST", "seg-00000000.idx", "seg-00000001.idx", "seg-00000002.idx"]
    );
    Sample { dir, files, rows: live }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

fn segment_name(place: usize) -> String {
    format!("seg-{place:08x}.idx")
}

impl Sample {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Restores `name`.
    fn heal(&self, name: &str) {
        fs::write(self.path(name), &self.files[name]).unwrap();
    }

    /// The only damage, if there is any. Opening and verifying must find the same.
    fn the_damage(&self) -> Option<Damage> {
        let unrepaired = Index::open(self.dir.path(), KEY).unwrap();
        let damage = unrepaired.damage().to_vec();
        if damage.is_empty() {
            drop(unrepaired);
        } else {
            assert!(matches!(unrepaired.finish(), Err(Error::Damaged { count: 1, .. })));
        }
        let report = verify(self.dir.path(), KEY, &|_, _| std::ops::ControlFlow::Continue(())).unwrap();
        assert_eq!(report.damage, damage);
        assert!(damage.is_empty() || !report.is_sound());
        assert!(damage.len() < 2);
        damage.into_iter().next()
    }

    /// The damage, which must be in segment `place` and of one of `kinds`.
    fn assert_damaged(&self, place: usize, kinds: &[DamageKind], context: &str) -> Damage {
        let damage = self.the_damage().unwrap_or_else(|| panic!("{context}: not found"));
        assert_eq!(damage.segment, place, "{context}");
        assert_eq!(name_of(&damage.path), segment_name(place), "{context}");
        assert!(kinds.contains(&damage.kind), "{context}: {damage}");
        let (first, last) = (place as u64 * 128 + 2, ((place as u64 + 1) * 128).min(ROWS * 2));
        assert_eq!((damage.first_template, damage.last_template), (TemplateId(first), TemplateId(last)), "{context}");
        assert_ne!(damage.expected, damage.found, "{context}");
        damage
    }

    /// Opens the index, which must have all rows.
    fn assert_whole(&self, context: &str) {
        let index = Index::open(self.dir.path(), KEY).unwrap().finish().unwrap();
        assert!(live_rows(&index.snapshot()) == self.rows, "{context}");
    }
}

#[test]
fn every_flipped_bit_of_the_manifest_is_found() {
    let sample = sample();
    let whole = &sample.files["MANIFEST"];
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << bit;
            fs::write(sample.path("MANIFEST"), &bytes).unwrap();
            match Index::open(sample.dir.path(), KEY) {
                Err(Error::ManifestCorrupt { path, expected, found, .. }) => {
                    assert_eq!(path, sample.path("MANIFEST"));
                    assert_ne!(expected, found);
                }
                other => panic!("bit {bit} of byte {at}: {other:?}"),
            }
        }
    }
    sample.heal("MANIFEST");
    sample.assert_whole("healed");
}

#[test]
fn every_truncation_of_the_manifest_is_found() {
    let sample = sample();
    let whole = &sample.files["MANIFEST"];
    for len in 0..whole.len() {
        fs::write(sample.path("MANIFEST"), &whole[..len]).unwrap();
        assert!(matches!(Index::open(sample.dir.path(), KEY), Err(Error::ManifestCorrupt { .. })), "{len} bytes left");
    }
    let longer: Vec<u8> = whole.iter().copied().chain([0; 8]).collect();
    fs::write(sample.path("MANIFEST"), longer).unwrap();
    assert!(matches!(Index::open(sample.dir.path(), KEY), Err(Error::ManifestCorrupt { .. })));
    fs::remove_file(sample.path("MANIFEST")).unwrap();
    assert!(matches!(Index::open(sample.dir.path(), KEY), Err(Error::ManifestMissing { .. })));
    // No index is created over the remains of another, which can be wiped.
    assert!(Index::exists(sample.dir.path()));
    assert!(matches!(Index::create(sample.dir.path(), SMALL, KEY), Err(Error::Exists { .. })));
    Index::wipe(sample.dir.path()).unwrap();
    assert!(!Index::exists(sample.dir.path()));
    Index::create(sample.dir.path(), SMALL, KEY).unwrap();
}

#[test]
fn every_flipped_byte_of_a_header_is_found() {
    let sample = sample();
    let name = segment_name(1);
    let mut dice = Dice(11);
    for at in 0..HEADER {
        let mut bytes = sample.files[&name].clone();
        bytes[at] ^= 1 << dice.below(8);
        fs::write(sample.path(&name), &bytes).unwrap();
        sample.assert_damaged(1, &[DamageKind::HeaderChecksum], &format!("byte {at}"));
    }
    sample.heal(&name);
    sample.assert_whole("healed");
}

#[test]
fn flipped_bits_of_records_and_rows_are_found_or_harmless() {
    let sample = sample();
    for place in [0, 2] {
        let name = segment_name(place);
        let counted = if place == 2 { 30 } else { 64 };
        let mut dice = Dice(place as u64);
        // Steps that reach every byte of a record and of a row, in one row or another.
        let records = (HEADER..ROWS_AT).step_by(3);
        let rows = (ROWS_AT..CODES[0].0).step_by(5);
        for at in records.chain(rows) {
            let mut bytes = sample.files[&name].clone();
            bytes[at] ^= 1 << dice.below(8);
            fs::write(sample.path(&name), &bytes).unwrap();
            let (offset, in_record) =
                if at < ROWS_AT { ((at - HEADER) / META, (at - HEADER) % META) } else { ((at - ROWS_AT) / 64, 0) };
            let template = place as u64 * 128 + offset as u64 * 2 + 2;
            let context = format!("byte {at} of segment {place}, template {template}");
            let is_state = at < ROWS_AT && (24..28).contains(&in_record);
            if offset < counted && (sample.rows.contains_key(&template) || is_state) {
                let damage = sample.assert_damaged(place, &[DamageKind::RowChecksum, DamageKind::RowState], &context);
                assert_eq!(damage.bad_rows, 1, "{context}");
                let record_at = HEADER + offset * META;
                assert!((record_at..record_at + META).contains(&(damage.offset as usize)), "{context}");
            } else {
                // An erased row, or one that does not count, is scrubbed, and nothing is lost.
                assert_eq!(sample.the_damage(), None, "{context}");
                let report = verify(sample.dir.path(), KEY, &|_, _| std::ops::ControlFlow::Continue(())).unwrap();
                assert_eq!(report.erasures_unfinished + report.stale, 1, "{context}");
                sample.assert_whole(&context);
                assert!(fs::read(sample.path(&name)).unwrap() == sample.files[&name], "{context}: scrubbed");
            }
        }
        sample.heal(&name);
    }
    sample.assert_whole("healed");
}

#[test]
fn flipped_bits_of_codes_are_found_and_the_rows_encoded_again() {
    let sample = sample();
    // Segment 0 has erased rows, segment 1 has none, segment 2 is not full and has no codes.
    for place in 0..3 {
        let name = segment_name(place);
        let mut dice = Dice(place as u64);
        for (area, &(start, len)) in CODES.iter().enumerate() {
            // Steps that reach every line, and every byte of the codebook codes, which are few.
            for at in (start..start + len).step_by(if area >= CODEBOOK { 1 } else { 7 }) {
                let context = format!("byte {at} of segment {place}");
                let mut bytes = sample.files[&name].clone();
                bytes[at] ^= 1 << dice.below(8);
                fs::write(sample.path(&name), &bytes).unwrap();

                let unrepaired = Index::open(sample.dir.path(), KEY).unwrap();
                assert_eq!(unrepaired.damage(), [], "{context}");
                let opened = unrepaired.codes_damage().to_vec();
                drop(unrepaired);
                let report = verify(sample.dir.path(), KEY, &|_, _| std::ops::ControlFlow::Continue(())).unwrap();
                assert!(report.damage.is_empty() && !report.is_sound(), "{context}");
                if place == 1 {
                    assert_eq!((opened.len(), report.codes_damage.len(), report.codes_unfinished), (1, 1, 0));
                    let (opened, verified) = (&opened[0], &report.codes_damage[0]);
                    assert_eq!((opened.segment, opened.kind), (1, DamageKind::CodesChecksum), "{context}");
                    let (kind, offset) =
                        if area == SUM { (DamageKind::CodesChecksum, start) } else { (DamageKind::Codes, at) };
                    assert_eq!((verified.kind, verified.offset), (kind, offset as u64), "{context}");
                    for damage in [opened, verified] {
                        assert_eq!(
                            (damage.bad_rows, damage.first_template, damage.last_template),
                            (0, TemplateId(130), TemplateId(256))
                        );
                        assert_ne!(damage.expected, damage.found, "{context}");
                    }
                } else {
                    assert_eq!(
                        (opened.len(), report.codes_damage.len(), report.codes_unfinished),
                        (0, 0, 1),
                        "{context}"
                    );
                }
                // Never served, and corrected in the file.
                sample.assert_whole(&context);
                assert!(fs::read(sample.path(&name)).unwrap() == sample.files[&name], "{context}: made anew");
            }
        }
    }
    let report = verify(sample.dir.path(), KEY, &|_, _| std::ops::ControlFlow::Continue(())).unwrap();
    assert!(report.is_sound());
}

#[test]
fn verifying_finds_wrong_codes_with_a_correct_checksum() {
    // Segment 0 has erased rows: wrong codes of other rows do not pass for an interrupted erasure.
    for segment in [0, 1] {
        // The live row at offset 6: its 4-bit code, its codebook code and the codebook code's cosine.
        let cosine = CODES[CODEBOOK].0 + CODES[CODEBOOK].1 - 64 + 6;
        for at in [CODES[2].0 + 100, CODES[CODEBOOK].0 + 6, cosine] {
            wrong_codes_are_found(segment, at);
        }
    }
}

fn wrong_codes_are_found(segment: usize, at: usize) {
    let sample = sample();
    let name = segment_name(segment);
    let mut bytes = sample.files[&name].clone();
    bytes[at] ^= 1;
    let sums: Vec<u64> =
        CODES[..SUM].iter().map(|&(at, len)| xxhash_rust::xxh3::xxh3_64(&bytes[at..at + len])).collect();
    let mut hashed: Vec<u8> = sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
    hashed.extend_from_slice(&sample.files[&name][24..32]);
    hashed.extend_from_slice(&0_u64.to_le_bytes());
    bytes[CODES[SUM].0..].copy_from_slice(&xxhash_rust::xxh3::xxh3_64(&hashed).to_le_bytes());
    fs::write(sample.path(&name), &bytes).unwrap();
    assert_eq!(Index::open(sample.dir.path(), KEY).unwrap().codes_damage(), []);
    let report = verify(sample.dir.path(), KEY, &|_, _| std::ops::ControlFlow::Continue(())).unwrap();
    assert!(!report.is_sound());
    assert_eq!((report.codes_damage.len(), report.codes_unfinished), (1, 0));
    let damage = &report.codes_damage[0];
    assert_eq!((damage.kind, damage.offset), (DamageKind::Codes, at as u64));
}

#[test]
fn an_erasure_in_a_block_with_decayed_codes_does_not_make_them_look_correct() {
    // A 1-bit code, a codebook code, the cosine of a codebook code.
    for at in [CODES[0].0 + 40, CODES[CODEBOOK].0 + 40, CODES[CODEBOOK].0 + CODES[CODEBOOK].1 - 24] {
        bad_codes_are_not_vouched_for(at);
    }
}

fn bad_codes_are_not_vouched_for(at: usize) {
    let sample = sample();
    let name = segment_name(1);
    let mut index = Index::open(sample.dir.path(), KEY).unwrap().finish().unwrap();
    let mut bytes = fs::read(sample.path(&name)).unwrap();
    bytes[at] ^= 4;
    // In the file, under the map.
    std::os::unix::fs::FileExt::write_all_at(
        &fs::OpenOptions::new().write(true).open(sample.path(&name)).unwrap(),
        &bytes[at..=at],
        at as u64,
    )
    .unwrap();
    let gone = index.forget(SubjectNumber(30));
    assert!(!gone.is_empty() && gone.iter().all(|row| row.0 / 64 == 1));
    drop(index.publish(Lsn(10)));
    index.erase(&gone).unwrap();
    drop(live_rows(&index.snapshot()));
    index.checkpoint().unwrap();
    drop(index);
    let report = verify(sample.dir.path(), KEY, &|_, _| std::ops::ControlFlow::Continue(())).unwrap();
    assert!(report.is_sound(), "{report:?}");
}

#[test]
fn truncated_extended_and_missing_segments_are_found() {
    let sample = sample();
    let name = segment_name(2);
    let lens = [
        0,
        1,
        100,
        HEADER - 1,
        HEADER,
        HEADER + 1,
        ROWS_AT - 1,
        ROWS_AT,
        ROWS_AT + 64 * 30,
        ROWS_AT + 64 * 64,
        CODES[3].0,
        CODES[SUM].0,
        SEGMENT - 1,
        SEGMENT + 1,
        SEGMENT * 2,
    ];
    for len in lens {
        let mut bytes = sample.files[&name].clone();
        bytes.resize(len, 0);
        fs::write(sample.path(&name), &bytes).unwrap();
        let damage = sample.assert_damaged(2, &[DamageKind::Length], &format!("{len} bytes"));
        assert_eq!((damage.expected, damage.found, damage.bad_rows), (SEGMENT as u64, len as u64, 30));
    }
    fs::remove_file(sample.path(&name)).unwrap();
    sample.assert_damaged(2, &[DamageKind::Missing], "missing");
    // A valid file that belongs elsewhere.
    fs::copy(sample.path(&segment_name(1)), sample.path(&name)).unwrap();
    sample.assert_damaged(2, &[DamageKind::HeaderField], "another segment's file");
}

#[test]
fn rows_in_the_wrong_place_are_found() {
    let sample = sample();
    let name = segment_name(1);
    let mut bytes = sample.files[&name].clone();
    // Row 3 with its record and its correct checksum, over row 4.
    bytes.copy_within(HEADER + 3 * META..HEADER + 4 * META, HEADER + 4 * META);
    bytes.copy_within(ROWS_AT + 3 * 64..ROWS_AT + 4 * 64, ROWS_AT + 4 * 64);
    fs::write(sample.path(&name), &bytes).unwrap();
    sample.assert_damaged(1, &[DamageKind::RowChecksum], "copied row");
}

#[test]
fn a_damaged_segment_is_replaced_by_the_caller_and_its_old_file_removed() {
    let sample = sample();
    let breakages: [fn(&Path); 4] = [
        |path| fs::remove_file(path).unwrap(),
        |path| fs::write(path, [7; 300]).unwrap(),
        |path| {
            let mut bytes = fs::read(path).unwrap();
            bytes[0] ^= 1;
            fs::write(path, bytes).unwrap();
        },
        |path| {
            let mut bytes = fs::read(path).unwrap();
            bytes[HEADER + 5 * META..HEADER + 9 * META].fill(0xaa);
            fs::write(path, bytes).unwrap();
        },
    ];
    for (number, breakage) in breakages.into_iter().enumerate() {
        for name in sample.files.keys() {
            sample.heal(name);
        }
        let _ = fs::remove_file(sample.path("seg-00000003.idx"));
        let old = sample.path(&segment_name(1));
        breakage(&old);
        let mut unrepaired = Index::open(sample.dir.path(), KEY).unwrap();
        assert_eq!(unrepaired.lsn(), Lsn(9));
        let damage = unrepaired.damage()[0].clone();
        // The registry has forgotten one row since: it does not come back.
        let (first, last) = (damage.first_template.0, damage.last_template.0);
        let mut rows: Vec<OwnedRow> = sample.rows.range(first..=last).map(|(_, row)| row.clone()).collect();
        let forgotten = rows.remove(10).template.0;
        let mut reversed = rows.clone();
        reversed.reverse();
        assert!(matches!(unrepaired.replace_segment(1, reversed), Err(Error::Order { .. })));
        assert!(matches!(unrepaired.replace_segment(1, vec![row(last + 1, 1, 32)]), Err(Error::TemplateRange { .. })));
        assert!(matches!(unrepaired.replace_segment(9, Vec::new()), Err(Error::NoSuchSegment { segment: 9 })));
        unrepaired.replace_segment(1, rows).unwrap();
        assert_eq!(unrepaired.damage(), []);
        let index = unrepaired.finish().unwrap();
        let mut expected = sample.rows.clone();
        expected.remove(&forgotten);
        assert!(live_rows(&index.snapshot()) == expected, "breakage {number}");
        assert!(!old.exists());
        drop(index);
        let index = Index::open(sample.dir.path(), KEY).unwrap().finish().unwrap();
        assert!(live_rows(&index.snapshot()) == expected, "breakage {number}, opened again");
    }
}

#[test]
fn another_key_another_gallery_and_another_version_are_refused() {
    let sample = sample();
    let other = KeyId([9; 16]);
    match Index::open(sample.dir.path(), Origin { key: other, ..KEY }) {
        Err(Error::WrongKey { expected, found }) => assert_eq!((expected, found), (other, KEY.key)),
        opened => panic!("{opened:?}"),
    }
    let other = GalleryId([9; 16]);
    match Index::open(sample.dir.path(), Origin { gallery: other, ..KEY }) {
        Err(Error::WrongGallery { expected, found, .. }) => assert_eq!((expected, found), (other, KEY.gallery)),
        opened => panic!("{opened:?}"),
    }
    let mut bytes = sample.files["MANIFEST"].clone();
    bytes[8] = VERSION as u8 + 1;
    let end = bytes.len() - 8;
    let checksum = xxhash_rust::xxh3::xxh3_64(&bytes[..end]);
    bytes[end..].copy_from_slice(&checksum.to_le_bytes());
    fs::write(sample.path("MANIFEST"), bytes).unwrap();
    match Index::open(sample.dir.path(), KEY) {
        Err(Error::Version { found, supported, .. }) => assert_eq!((found, supported), (VERSION + 1, VERSION)),
        opened => panic!("{opened:?}"),
    }
}

#[test]
fn files_that_the_manifest_does_not_name_are_removed() {
    let sample = sample();
    fs::copy(sample.path(&segment_name(0)), sample.path("seg-0000002a.idx")).unwrap();
    fs::write(sample.path("MANIFEST.new"), [1, 2, 3]).unwrap();
    fs::write(sample.path("notes.txt"), "not the index's").unwrap();
    sample.assert_whole("with strays");
    assert!(!sample.path("seg-0000002a.idx").exists());
    assert!(!sample.path("MANIFEST.new").exists());
    assert!(sample.path("notes.txt").exists());
}

#[test]
fn a_verification_counts_reports_progress_and_can_be_cancelled() {
    let sample = sample();
    let told = std::cell::RefCell::new(Vec::new());
    let report = verify(sample.dir.path(), KEY, &|done, total| {
        told.borrow_mut().push((done, total));
        std::ops::ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(*told.borrow(), [(64, ROWS), (128, ROWS), (ROWS, ROWS)]);
    assert!(report.is_sound());
    assert_eq!((report.segments, report.rows, report.live, report.erased), (3, ROWS, ROWS - 6, 6));
    assert_eq!((report.lsn, report.geometry, report.bytes), (Lsn(9), SMALL, 3 * SEGMENT as u64));
    let broken_off = verify(sample.dir.path(), KEY, &|_, _| std::ops::ControlFlow::Break(()));
    assert!(matches!(broken_off, Err(Error::Cancelled { done_rows: 64 })));
    for (name, bytes) in &sample.files {
        assert!(fs::read(sample.path(name)).unwrap() == *bytes, "{name} was changed");
    }
}
