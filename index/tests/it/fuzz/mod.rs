//! Any bytes as a manifest or a segment: opening refuses them, reports damage, or serves what they say.
//!
//! Every file of the corpus and of the golden index is tried as it is and with its checksums repaired, then
//! inputs mutated from them. `THENAR_FUZZ_ROUNDS` is the number of mutated inputs, `THENAR_FUZZ_SEED` the seed
//! of the first one; the next ones count up. A failure prints the seed of its input.

mod mutate;

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use thenar_index::{Error, Geometry, Index, LABEL_BYTES_MAX, Lsn, Row, Snapshot, verify};
use xxhash_rust::xxh3::xxh3_64;

use self::mutate::{corpus, mutated};
use crate::format::{GOLDEN_KEY, golden_dir};
use crate::support::disk::disk_of;
use crate::support::rows::{Dice, borrowed, row};

const MANIFEST: &str = "MANIFEST";
const SEGMENT: &str = "seg-00000000.idx";

fn number_from(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// Prints the seed of the input if its test panics.
struct Input(u64);

impl Drop for Input {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("THENAR_FUZZ_SEED={}", self.0);
        }
    }
}

/// Opens the golden index with other bytes in its file `name`. `repair` makes the checksums of an input right.
fn fuzz(name: &str, corpus_name: &str, rounds: u64, repair: fn(&mut [u8])) {
    let (golden, home) = (golden_dir(), tempfile::tempdir().unwrap());
    let mut seeds = corpus(&golden.with_file_name("corpus").join(corpus_name));
    seeds.push(fs::read(golden.join(name)).unwrap());
    let restore = || {
        for entry in fs::read_dir(home.path()).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        for entry in fs::read_dir(&golden).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, home.path().join(path.file_name().unwrap())).unwrap();
        }
    };
    restore();
    let opens = |bytes: &[u8]| {
        fs::write(home.path().join(name), bytes).unwrap();
        let opened = open_and_use(home.path());
        if opened {
            restore();
        }
        opened
    };
    assert!(opens(seeds.last().unwrap()), "the golden index opens");
    for seed in &seeds {
        opens(seed);
        let mut repaired = seed.clone();
        repair(&mut repaired);
        opens(&repaired);
    }
    let (first, rounds) = (number_from("THENAR_FUZZ_SEED", 0), number_from("THENAR_FUZZ_ROUNDS", rounds));
    let mut opened = 0;
    for seed in first..first + rounds {
        let _input = Input(seed);
        let mut dice = Dice(seed);
        let mut bytes = mutated(&mut dice, &seeds);
        if dice.below(8) > 0 {
            repair(&mut bytes);
        }
        opened += u64::from(opens(&bytes));
    }
    println!("{name}: {opened} of {rounds} mutated inputs opened");
    assert!(opened > 0 || rounds < 100, "nothing gets past the first checks");
}

/// Opens the folder and, if it has no damage, uses all of it. Returns whether it opened.
fn open_and_use(dir: &Path) -> bool {
    let before = fs::read(dir.join(SEGMENT)).unwrap();
    let unrepaired = match Index::open_on(Arc::new(disk_of(dir)), dir, GOLDEN_KEY) {
        Ok(unrepaired) => unrepaired,
        Err(
            Error::ManifestCorrupt { .. }
            | Error::Version { .. }
            | Error::WrongKey { .. }
            | Error::WrongGallery { .. }
            | Error::RowLimit { .. },
        ) => return false,
        Err(error) => panic!("{error:?}"),
    };
    let damage = unrepaired.damage().to_vec();
    let finished = unrepaired.finish();
    if !damage.is_empty() {
        assert!(matches!(finished, Err(Error::Damaged { count, .. }) if count == damage.len()));
        assert!(fs::read(dir.join(SEGMENT)).unwrap() == before, "nothing is written while there is damage");
        return false;
    }
    let mut index = finished.unwrap();
    read_all(&index.snapshot());
    append_one(&mut index);
    drop(index);
    let report = verify(dir, GOLDEN_KEY, &|_, _| ControlFlow::Continue(())).unwrap();
    // Wrong codes with a correct checksum may be left: opening does not compute codes again.
    let unfinished = report.erasures_unfinished + report.forgotten + report.stale + report.codes_unfinished;
    assert_eq!((report.damage, unfinished), (Vec::new(), 0));
    true
}

fn read_all(snapshot: &Snapshot) {
    let (mut live, mut last_template) = (0, None);
    for segment in snapshot.segments() {
        assert_eq!(segment.codes.rows(), segment.rows.len() / snapshot.dim() / 64 * 64);
        for (offset, vector) in segment.rows.chunks_exact(snapshot.dim()).enumerate() {
            let row = Row(segment.first_row + offset as u32);
            assert_eq!(snapshot.row(row).as_ptr(), vector.as_ptr());
            let Some(meta) = snapshot.meta(row) else { continue };
            live += 1;
            assert!(meta.label.len() <= LABEL_BYTES_MAX && last_template < Some(meta.template));
            last_template = Some(meta.template);
            assert!(snapshot.rows_of(meta.subject).contains(&row));
        }
    }
    assert_eq!(snapshot.live(), live);
}

/// Writes to the index if it can: template, row or file numbers may be used up.
fn append_one(index: &mut Index) {
    let template = index.last_template().map_or(Some(1), |last| last.0.checked_add(1));
    let Geometry { dim, segment_rows } = index.geometry();
    let Some(template) = template.filter(|_| dim <= 1024 && segment_rows <= 1024) else { return };
    let row = row(template, 7, dim);
    match index.append(&borrowed(&[row])) {
        Ok(()) | Err(Error::RowLimit { .. }) => {}
        Err(error) => panic!("{error:?}"),
    }
    let lsn = index.snapshot().lsn();
    drop(index.publish(Lsn(lsn.0.saturating_add(1))));
    index.checkpoint().unwrap();
}

/// Repairs the checksum of a manifest, its key and its gallery.
fn repair_manifest(bytes: &mut [u8]) {
    let Some((content, sum)) = bytes.split_last_chunk_mut::<8>() else { return };
    if let Some((head, entries)) = content.split_first_chunk_mut::<80>() {
        head[32..48].copy_from_slice(&GOLDEN_KEY.key.0);
        head[48..64].copy_from_slice(&GOLDEN_KEY.gallery.0);
        let count = u32::from_le_bytes(head[64..68].try_into().unwrap()) as usize;
        // No slots in the millions: tables are as long as the largest slot.
        entries.chunks_exact_mut(40).take(count).for_each(|entry| entry[34..36].fill(0));
    }
    *sum = xxh3_64(content).to_le_bytes();
}

/// Repairs the checksums of a segment of 64 rows of 32 components, and its header's identity.
fn repair_segment(bytes: &mut [u8]) {
    const ROWS_AT: usize = 4096 + 64 * 128;
    const CODES_AT: usize = ROWS_AT + 64 * 64;
    const IDENTITY: u64 = 0x1d01;
    let Some(header) = bytes.first_chunk_mut::<4096>() else { return };
    header[24..32].copy_from_slice(&IDENTITY.to_le_bytes());
    let sum = xxh3_64(&header[..4088]);
    header[4088..].copy_from_slice(&sum.to_le_bytes());
    if bytes.len() < CODES_AT + 5 * 4096 + 8 {
        return;
    }
    for offset in 0..64 {
        let row_sum = xxh3_64(&bytes[ROWS_AT + offset * 64..][..64]);
        let record = &mut bytes[4096 + offset * 128..][..128];
        if record[24..28] == *b"LIVE" {
            record[16..24].copy_from_slice(&row_sum.to_le_bytes());
            let sum = xxh3_64(&[&*record, &IDENTITY.to_le_bytes(), &(offset as u64).to_le_bytes()].concat());
            record[16..24].copy_from_slice(&sum.to_le_bytes());
        }
    }
    let areas = [256, 256, 1024, 768, 256];
    let sums = areas.iter().enumerate().map(|(n, len)| xxh3_64(&bytes[CODES_AT + n * 4096..][..*len]));
    let hashed: Vec<u8> = sums.chain([IDENTITY, 0]).flat_map(u64::to_le_bytes).collect();
    bytes[CODES_AT + 5 * 4096..][..8].copy_from_slice(&xxh3_64(&hashed).to_le_bytes());
}

#[test]
fn any_bytes_are_refused_as_a_manifest_or_opened() {
    fuzz(MANIFEST, "manifest", 1000, repair_manifest);
}

#[test]
fn any_bytes_are_damage_as_a_segment_or_opened() {
    fuzz(SEGMENT, "segment", 400, repair_segment);
}
