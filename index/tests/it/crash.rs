//! The power fails at every single operation of a workload, and every operation fails once. Afterwards
//! everything that was made durable is there, and nothing that was erased.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use thenar_index::codes::{BLOCK_ROWS, OwnedCodes, codebook_bytes};
use thenar_index::{Compacting, Error, Geometry, Index, Lsn, OwnedRow, SubjectNumber, TemplateId, verify};

use crate::support::contents::{live_rows, live_rows_of_a_stopped};
use crate::support::disk::{Disk, Mishap, disk_of};
use crate::support::rows::{Dice, KEY, borrowed, row, vector};

/// Rows of 320 bytes straddle sectors, so that torn writes tear them. So do codes. A segment has two
/// blocks.
pub(crate) const TORN: Geometry = Geometry { dim: 160, segment_rows: 128 };
const STEPS: u64 = 45;

/// What a manifest promises.
#[derive(Debug, Clone, Default)]
struct Durable {
    lsn: u64,
    rows: BTreeMap<u64, OwnedRow>,
}

/// A workload and everything that the index has promised to it.
struct World {
    dice: Dice,
    lsn: u64,
    next_template: u64,
    rows: BTreeMap<u64, OwnedRow>,
    published: BTreeSet<u64>,
    forgotten: BTreeSet<u64>,
    erase_begun: BTreeSet<u64>,
    erase_done: BTreeSet<u64>,
    /// Every template that was appended, whether that succeeded or not.
    ever: BTreeSet<u64>,
    /// Number of compactions that were published, and of copies forgotten before that.
    compacted: usize,
    copies_forgotten: usize,
    /// Whether the next step of compaction writes a manifest.
    to_be_written: bool,
    durable: Option<Durable>,
    /// The manifest that the running call writes, if it writes one.
    attempt: Option<Durable>,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            dice: Dice(seed),
            lsn: 0,
            next_template: 1,
            rows: BTreeMap::new(),
            published: BTreeSet::new(),
            forgotten: BTreeSet::new(),
            erase_begun: BTreeSet::new(),
            erase_done: BTreeSet::new(),
            ever: BTreeSet::new(),
            compacted: 0,
            copies_forgotten: 0,
            to_be_written: false,
            durable: None,
            attempt: None,
        }
    }

    fn published_now(&self) -> Durable {
        let rows = self.rows.iter().filter(|(template, _)| self.published.contains(template));
        Durable { lsn: self.lsn, rows: rows.map(|(template, row)| (*template, row.clone())).collect() }
    }

    /// Runs `write`, which leaves the old manifest or one for the current publication.
    fn writing_manifest(&mut self, write: impl FnOnce(&Self) -> Result<(), Error>) -> Result<(), Error> {
        self.attempt = Some(self.published_now());
        write(self)?;
        self.durable = self.attempt.take();
        Ok(())
    }

    /// Works until something fails. Returns the error, and the index if there was one.
    fn work(&mut self, disk: &Disk, dir: &Path) -> (Option<Index>, Result<(), Error>) {
        self.attempt = Some(Durable::default());
        let mut index = match Index::create_on(Arc::new(disk.clone()), dir, TORN, KEY) {
            Ok(index) => index,
            Err(error) => return (None, Err(error)),
        };
        self.durable = self.attempt.take();
        for _ in 0..STEPS {
            if let Err(error) = self.step(&mut index) {
                return (Some(index), Err(error));
            }
        }
        (Some(index), Ok(()))
    }

    fn step(&mut self, index: &mut Index) -> Result<(), Error> {
        match self.dice.below(18) {
            0..=2 => {
                let count = 1 + self.dice.below(50);
                let rows: Vec<OwnedRow> = (0..count)
                    .map(|_| {
                        self.next_template += 1 + self.dice.below(2);
                        row(self.next_template, self.dice.below(30), TORN.dim)
                    })
                    .collect();
                self.ever.extend(rows.iter().map(|row| row.template.0));
                index.append(&borrowed(&rows))?;
                self.rows.extend(rows.into_iter().map(|row| (row.template.0, row)));
            }
            3 => {
                let subject = SubjectNumber(self.dice.below(30));
                let templates: Vec<u64> =
                    self.rows.values().filter(|row| row.subject == subject).map(|row| row.template.0).collect();
                let rows = index.forget(subject);
                self.copies_forgotten += rows.len() - templates.len();
                self.forgotten.extend(&templates);
                templates.iter().for_each(|template| drop(self.rows.remove(template)));
            }
            12 | 13 => {
                // Enough to make compaction worthwhile.
                let first = self.dice.below(30);
                for subject in first..first + 12 {
                    let templates: Vec<u64> =
                        self.rows.values().filter(|row| row.subject.0 == subject).map(|row| row.template.0).collect();
                    self.copies_forgotten += index.forget(SubjectNumber(subject)).len() - templates.len();
                    self.forgotten.extend(&templates);
                    templates.iter().for_each(|template| drop(self.rows.remove(template)));
                }
            }
            4 => {
                let template = self.dice.below(self.next_template + 1);
                let found = index.forget_template(TemplateId(template));
                assert_eq!(!found.is_empty(), self.rows.remove(&template).is_some());
                self.forgotten.extend((!found.is_empty()).then_some(template));
            }
            5 | 6 => self.publish(index),
            7 => {
                // Rows forgotten since the last publication must wait.
                let shown = index.snapshot();
                let rows: Vec<_> = index.forgotten().into_iter().filter(|row| !shown.is_live(*row)).collect();
                drop(shown);
                let (waits, going): (BTreeSet<u64>, BTreeSet<u64>) =
                    self.forgotten.iter().partition(|template| self.published.contains(template));
                self.erase_begun.extend(&going);
                index.erase(&rows)?;
                self.forgotten = waits;
                self.erase_done.extend(going);
            }
            8 => self.writing_manifest(|_| index.checkpoint())?,
            _ => self.compact(index)?,
        }
        Ok(())
    }

    fn publish(&mut self, index: &mut Index) {
        self.lsn += 1;
        self.published = self.rows.keys().copied().collect();
        drop(index.publish(Lsn(self.lsn)));
    }

    /// Some steps of compaction, one of which may write a manifest.
    fn compact(&mut self, index: &mut Index) -> Result<(), Error> {
        self.publish(index);
        let identities = |index: &Index| -> Vec<u64> { index.segments().iter().map(|s| s.identity).collect() };
        for _ in 0..1 + self.dice.below(6) {
            let before = identities(index);
            self.attempt = Some(self.published_now());
            let done = index.compact(u64::MAX);
            let written = self.attempt.take_if(|_| !matches!(done, Err(Error::Io { .. })));
            match done {
                Ok(Compacting::Nothing) | Err(Error::Unpublished) => return Ok(()),
                done => done?,
            };
            if self.to_be_written {
                self.durable = written;
                self.compacted += 1;
            }
            self.to_be_written = identities(index) != before;
        }
        Ok(())
    }

    /// Compares the contents of `dir` with what was promised, and opens it.
    fn judge(&self, dir: &Path, context: &str) -> Option<Index> {
        assert_no_bytes_of(self.erase_done.iter().copied(), dir, context);
        self.open_and_judge(&disk_of(dir), dir, context)
    }

    fn open_and_judge(&self, disk: &Disk, dir: &Path, context: &str) -> Option<Index> {
        let unrepaired = match Index::open_on(Arc::new(disk.clone()), dir, KEY) {
            Err(Error::ManifestMissing { .. }) if self.durable.is_none() => return None,
            unrepaired => unrepaired.unwrap_or_else(|error| panic!("{context}: {error:?}")),
        };
        // A power cut tears only what was not synced, and everything that counts was synced.
        assert_eq!(unrepaired.damage(), [], "{context}");
        let index = unrepaired.finish().unwrap_or_else(|error| panic!("{context}: {error:?}"));
        let shown = (index.snapshot().lsn().0, live_rows(&index.snapshot()));
        let candidates: Vec<&Durable> = self.durable.iter().chain(&self.attempt).collect();
        assert!(
            candidates.iter().any(|durable| self.allows(durable, &shown)),
            "{context}: lsn {} with templates {:?}",
            shown.0,
            shown.1.keys()
        );
        let gone = self.ever.iter().copied().filter(|template| !shown.1.contains_key(template));
        assert_no_bytes_of(gone, dir, context);
        Some(index)
    }

    fn allows(&self, durable: &Durable, (lsn, shown): &(u64, BTreeMap<u64, OwnedRow>)) -> bool {
        durable.lsn == *lsn
            && shown
                .iter()
                .all(|(template, row)| durable.rows.get(template) == Some(row) && !self.erase_done.contains(template))
            && durable.rows.keys().all(|template| shown.contains_key(template) || self.erase_begun.contains(template))
    }
}

/// No file in `dir` has 16 consecutive bytes of one of these templates or of its 4-bit code, or its 1-bit
/// code, 2-bit code or codebook code at any position of a block.
pub(crate) fn assert_no_bytes_of(templates: impl Iterator<Item = u64>, dir: &Path, context: &str) {
    let mut needles: BTreeMap<[u8; 16], u64> = BTreeMap::new();
    let mut lanes: BTreeMap<[u8; PLANE_LINES], u64> = BTreeMap::new();
    let mut codebook_codes: BTreeMap<[u8; CODEBOOK_LINES], u64> = BTreeMap::new();
    for template in templates {
        let row = vector(template, TORN.dim);
        let mut codes = OwnedCodes::zeroed(TORN.dim, BLOCK_ROWS);
        codes.put(0, &row);
        let mut put = |bytes: &[u8]| {
            needles.extend(bytes.chunks_exact(16).map(|piece| (piece.try_into().unwrap(), template)));
        };
        put(bytemuck::cast_slice(&row));
        put(&codes.four_bit[..TORN.dim / 2]);
        for plane in [&codes.one_bit, &codes.two_bit] {
            lanes.insert(lane_of(plane, 0), template);
        }
        codebook_codes.insert(lane_of(&codes.codebook, 0), template);
    }
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        // Rows and 4-bit codes start on 16-byte boundaries, and so does every sixteenth byte of them.
        for (at, piece) in bytes.chunks_exact(16).enumerate() {
            if let Some(template) = needles.get(piece) {
                panic!("{context}: bytes of template {template} at {} of {}", at * 16, path.display());
            }
        }
        // A failed append leaves it without codes.
        if bytes.len() <= ONE_BIT_AT {
            continue;
        }
        let found = [ONE_BIT_AT, TWO_BIT_AT].map(|at| left_in(&bytes[at..][..2 * PLANE], PLANE, &lanes));
        let codebook_code = left_in(&bytes[CODEBOOK_AT..][..2 * CODEBOOK_BYTES], CODEBOOK_BYTES, &codebook_codes);
        if let Some((template, block)) = found.into_iter().chain([codebook_code]).flatten().next() {
            panic!("{context}: bits of template {template} in block {block} of {}", path.display());
        }
    }
}

/// A template with bits in `area`, and the block they are in.
fn left_in<const N: usize>(area: &[u8], block: usize, lanes: &BTreeMap<[u8; N], u64>) -> Option<(u64, usize)> {
    area.chunks_exact(block).enumerate().find_map(|(number, plane)| {
        (0..BLOCK_ROWS).find_map(|lane| lanes.get(&lane_of(plane, lane)).map(|template| (*template, number)))
    })
}

/// Bytes of the 1-bit code of one row, and of its 2-bit code.
const PLANE_LINES: usize = TORN.dim / 8;
/// Bytes of the 1-bit codes of a block.
const PLANE: usize = PLANE_LINES * BLOCK_ROWS;
/// Bytes of the codebook codes of a block.
const CODEBOOK_BYTES: usize = codebook_bytes(TORN.dim);
/// Bytes of the codebook code of one row, without its cosine, which other rows may share.
const CODEBOOK_LINES: usize = CODEBOOK_BYTES / BLOCK_ROWS - 1;
// Two blocks of 1,280 bytes fit one page, and those of codebook codes are shorter.
const ONE_BIT_AT: usize = (4096 + 128 * (128 + TORN.dim * 2)).next_multiple_of(4096);
const TWO_BIT_AT: usize = ONE_BIT_AT + 4096;
const FOUR_BIT_AT: usize = TWO_BIT_AT + 4096;
const FACTORS_AT: usize = (FOUR_BIT_AT + 128 * TORN.dim / 2).next_multiple_of(4096);
const CODEBOOK_AT: usize = FACTORS_AT + 4096;
const SUMS_AT: usize = CODEBOOK_AT + 4096;
const SEGMENT: usize = SUMS_AT + 2 * 8;
const _: () = assert!(2 * PLANE <= 4096 && 2 * CODEBOOK_BYTES <= 4096);

/// The bytes of one row in the lines of a block's plane.
fn lane_of<const N: usize>(plane: &[u8], lane: usize) -> [u8; N] {
    std::array::from_fn(|line| plane[line * BLOCK_ROWS + lane])
}

#[test]
fn the_search_for_bytes_finds_each_kind() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = Index::create(dir.path(), TORN, KEY).unwrap();
    let rows: Vec<OwnedRow> = (1..=128).map(|n| row(n, n, TORN.dim)).collect();
    index.append(&borrowed(&rows)).unwrap();
    drop(index);
    let (name, whole) = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "idx"))
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .unwrap();
    assert_eq!(whole.len(), SEGMENT);
    let areas = [
        4096 + 128 * 128..ONE_BIT_AT,
        ONE_BIT_AT..TWO_BIT_AT,
        TWO_BIT_AT..FOUR_BIT_AT,
        FOUR_BIT_AT..FACTORS_AT,
        CODEBOOK_AT..SUMS_AT,
    ];
    for (number, area) in areas.into_iter().enumerate() {
        let mut bytes = vec![0; SEGMENT];
        bytes[area.clone()].copy_from_slice(&whole[area]);
        fs::write(&name, bytes).unwrap();
        let searched = std::panic::catch_unwind(|| assert_no_bytes_of([77].into_iter(), dir.path(), "looked for"));
        assert!(searched.is_err(), "area {number}");
        assert_no_bytes_of([1077].into_iter(), dir.path(), "another's");
    }
}

/// The opened index works: what is written now is there after a clean restart.
fn goes_on(mut index: Index, dir: &Path, context: &str) {
    let template = index.last_template().map_or(1, |last| last.0 + 1).max(1_000_000);
    let added = row(template, 7, TORN.dim);
    index.append(&borrowed(std::slice::from_ref(&added))).unwrap();
    let lsn = Lsn(index.snapshot().lsn().0 + 1);
    let mut expected = live_rows(&index.snapshot());
    expected.insert(template, added);
    drop(index.publish(lsn));
    index.checkpoint().unwrap();
    drop(index);
    let report = verify(dir, KEY, &|_, _| std::ops::ControlFlow::Continue(())).unwrap();
    assert!(report.is_sound(), "{context}: {report:?}");
    assert_eq!(report.live, expected.len() as u64, "{context}");
    let index = Index::open_on(Arc::new(disk_of(dir)), dir, KEY).unwrap().finish().unwrap();
    assert_eq!(live_rows(&index.snapshot()), expected, "{context}");
}

/// Operations of the whole workload when nothing goes wrong.
fn ops_of(seed: u64) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk_of(dir.path());
    let mut world = World::new(seed);
    let (_, done) = world.work(&disk, dir.path());
    done.unwrap();
    // A workload without erasures or a second segment would prove little.
    assert!(!world.erase_done.is_empty() && world.rows.len() > 70 && world.lsn > 3, "seed {seed} is a dull one");
    assert!(world.compacted > 1 && world.copies_forgotten > 0, "seed {seed} compacts too little");
    disk.ops()
}

const SEEDS: [u64; 3] = [103, 208, 274];

#[test]
fn a_power_cut_at_any_operation_leaves_the_last_durable_state() {
    for seed in SEEDS {
        for op in 0..ops_of(seed) {
            let dir = tempfile::tempdir().unwrap();
            let disk = disk_of(dir.path());
            disk.plan(op, Mishap::PowerCut);
            let mut world = World::new(seed);
            let (index, done) = world.work(&disk, dir.path());
            assert!(disk.is_dead() && done.is_err());
            drop(index);
            for luck in 0..3 {
                let context = format!("seed {seed}, power cut at operation {op}, luck {luck}");
                let left = tempfile::tempdir().unwrap();
                disk.leave(left.path(), op * 8 + luck);
                if let Some(index) = world.judge(left.path(), &context) {
                    goes_on(index, left.path(), &context);
                }
            }
        }
    }
}

#[test]
fn a_power_cut_while_opening_leaves_the_last_durable_state() {
    let seed = SEEDS[0];
    for op in (0..ops_of(seed)).step_by(11) {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk_of(dir.path());
        disk.plan(op, Mishap::PowerCut);
        let mut world = World::new(seed);
        drop(world.work(&disk, dir.path()));
        for second in 0.. {
            let context = format!("seed {seed}, power cut at operation {op} and at operation {second} of opening");
            let left = tempfile::tempdir().unwrap();
            disk.leave(left.path(), op);
            let again = disk_of(left.path());
            again.plan(second, Mishap::PowerCut);
            let opened =
                Index::open_on(Arc::new(again.clone()), left.path(), KEY).and_then(thenar_index::Unrepaired::finish);
            if !again.is_dead() {
                break;
            }
            assert!(opened.is_err());
            let last = tempfile::tempdir().unwrap();
            again.leave(last.path(), second);
            drop(world.judge(last.path(), &context));
        }
    }
}

#[test]
fn a_power_cut_while_opening_after_the_process_ended_leaves_the_last_durable_state() {
    // A process sees what it wrote, synced or not; the disk may not have it yet.
    let seed = SEEDS[1];
    for op in (0..ops_of(seed)).step_by(7) {
        for second in 0.. {
            let context = format!("seed {seed}, end at operation {op}, power cut at operation {second} of opening");
            let dir = tempfile::tempdir().unwrap();
            let disk = disk_of(dir.path());
            disk.plan(op, Mishap::Fails(io::ErrorKind::Other));
            let mut world = World::new(seed);
            drop(world.work(&disk, dir.path()));
            disk.plan(disk.ops() + second, Mishap::PowerCut);
            let opened =
                Index::open_on(Arc::new(disk.clone()), dir.path(), KEY).and_then(thenar_index::Unrepaired::finish);
            if !disk.is_dead() {
                break;
            }
            assert!(opened.is_err());
            for luck in 0..2 {
                let left = tempfile::tempdir().unwrap();
                disk.leave(left.path(), op * 64 + second * 2 + luck);
                drop(world.judge(left.path(), &context));
            }
        }
    }
}

#[test]
fn an_opening_makes_the_manifest_it_found_durable_before_it_overwrites_anything() {
    // The process ends while it compacts a segment, perhaps between renaming the manifest and syncing the
    // folder. The next process sees the new name; the disk may not have it yet.
    let rows: Vec<OwnedRow> = (1..=100).map(|n| row(n, n % 9, TORN.dim)).collect();
    let kept: Vec<OwnedRow> = rows.iter().filter(|row| row.subject.0 < 4).cloned().collect();
    let by_template = |rows: &[OwnedRow]| rows.iter().map(|row| (row.template.0, row.clone())).collect();
    let allowed: [(Lsn, BTreeMap<u64, OwnedRow>); 2] = [(Lsn(1), by_template(&rows)), (Lsn(2), by_template(&kept))];
    for op in 0.. {
        for second in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let disk = disk_of(dir.path());
            let mut index = Index::create_on(Arc::new(disk.clone()), dir.path(), TORN, KEY).unwrap();
            index.append(&borrowed(&rows)).unwrap();
            drop(index.publish(Lsn(1)));
            index.checkpoint().unwrap();
            (4..9).for_each(|subject| drop(index.forget(SubjectNumber(subject))));
            drop(index.publish(Lsn(2)));
            disk.plan(disk.ops() + op, Mishap::Fails(io::ErrorKind::Other));
            let compacted = loop {
                match index.compact(u64::MAX) {
                    Ok(Compacting::Nothing) => break Ok(()),
                    Ok(_) => {}
                    Err(error) => break Err(error),
                }
            };
            let is_new = index.segments()[0].rows == kept.len() as u32;
            drop(index);
            if compacted.is_ok() {
                assert!(op > 10 && is_new, "a compaction of {op} operations proves little");
                return;
            }
            disk.plan(disk.ops() + second, Mishap::PowerCut);
            drop(Index::open_on(Arc::new(disk.clone()), dir.path(), KEY).and_then(thenar_index::Unrepaired::finish));
            if !disk.is_dead() {
                break;
            }
            for luck in 0..2 {
                let context = format!("end at operation {op}, power cut at operation {second} of opening, luck {luck}");
                let left = tempfile::tempdir().unwrap();
                disk.leave(left.path(), op * 64 + second * 2 + luck);
                let unrepaired = Index::open_on(Arc::new(disk_of(left.path())), left.path(), KEY).unwrap();
                assert_eq!(unrepaired.damage(), [], "{context}");
                let index = unrepaired.finish().unwrap();
                let shown = (index.snapshot().lsn(), live_rows(&index.snapshot()));
                assert!(allowed.contains(&shown), "{context}: {:?}", shown.0);
            }
        }
    }
}

#[test]
fn any_operation_that_fails_stops_the_writer_and_costs_nothing_durable() {
    let seed = SEEDS[1];
    for op in 0..ops_of(seed) {
        for mishap in [Mishap::Fails(io::ErrorKind::StorageFull), Mishap::Fails(io::ErrorKind::Other), Mishap::Full] {
            let context = format!("seed {seed}, {mishap:?} at operation {op}");
            let dir = tempfile::tempdir().unwrap();
            let disk = disk_of(dir.path());
            disk.plan(op, mishap);
            let mut world = World::new(seed);
            let (index, done) = world.work(&disk, dir.path());
            match done {
                // The disk was full, and nothing was written afterwards.
                Ok(()) => assert_eq!(mishap, Mishap::Full),
                Err(Error::Io { source, .. }) => match mishap {
                    Mishap::Fails(kind) => assert_eq!(source.kind(), kind, "{context}"),
                    _ => assert_eq!(source.kind(), io::ErrorKind::StorageFull, "{context}"),
                },
                Err(other) => panic!("{context}: {other:?}"),
            }
            if let Some(mut index) = index.filter(Index::is_stopped) {
                assert!(matches!(index.append(&[]), Err(Error::Stopped)));
                assert!(matches!(index.erase(&[]), Err(Error::Stopped)));
                assert!(matches!(index.checkpoint(), Err(Error::Stopped)));
                assert!(matches!(index.compact(u64::MAX), Err(Error::Stopped)));
                // Readers still see the publication, including what was forgotten since.
                let served = live_rows_of_a_stopped(&index.snapshot());
                assert!(served.keys().eq(&world.published), "{context}");
                let same = |(template, row)| world.rows.get(template).is_none_or(|kept| kept == row);
                assert!(served.iter().all(same), "{context}");
            }
            assert_no_bytes_of(world.erase_done.iter().copied(), dir.path(), &context);
            drop(world.judge(dir.path(), &context));
        }
    }
}

#[test]
fn a_power_cut_while_a_damaged_segment_is_replaced_loses_nothing() {
    let seed = SEEDS[2];
    let dir = tempfile::tempdir().unwrap();
    let disk = disk_of(dir.path());
    let mut world = World::new(seed);
    let (index, done) = world.work(&disk, dir.path());
    done.unwrap();
    let mut index = index.unwrap();
    world.lsn += 1;
    world.published = world.rows.keys().copied().collect();
    drop(index.publish(Lsn(world.lsn)));
    index.checkpoint().unwrap();
    world.durable = Some(world.published_now());
    let damaged = index.segments().into_iter().next().unwrap();
    drop(index);
    let mut bytes = fs::read(&damaged.path).unwrap();
    bytes[100] ^= 1;
    fs::write(&damaged.path, &bytes).unwrap();
    let (first, last) = damaged.templates.unwrap();
    let rows: Vec<OwnedRow> = world.rows.range(first.0..=last.0).map(|(_, row)| row.clone()).collect();
    for op in 0.. {
        let context = format!("seed {seed}, power cut at operation {op} of the repair");
        let copy = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(dir.path()).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
        }
        let disk = disk_of(copy.path());
        disk.plan(op, Mishap::PowerCut);
        let repaired = Index::open_on(Arc::new(disk.clone()), copy.path(), KEY).and_then(|mut unrepaired| {
            assert_eq!(unrepaired.damage().len(), 1);
            unrepaired.replace_segment(0, rows.clone())?;
            unrepaired.finish()
        });
        if !disk.is_dead() {
            assert_eq!(live_rows(&repaired.unwrap().snapshot()), world.rows, "{context}");
            break;
        }
        assert!(repaired.is_err());
        let left = tempfile::tempdir().unwrap();
        disk.leave(left.path(), op);
        let mut again = Index::open_on(Arc::new(disk_of(left.path())), left.path(), KEY).unwrap();
        if !again.damage().is_empty() {
            again.replace_segment(0, rows.clone()).unwrap();
        }
        let index = again.finish().unwrap();
        assert_eq!(live_rows(&index.snapshot()), world.rows, "{context}");
        let gone = world.ever.iter().copied().filter(|template| !world.rows.contains_key(template));
        assert_no_bytes_of(gone, left.path(), &context);
    }
}
