//! Compaction: disk space is reclaimed however often a gallery is replaced, searches see the same rows
//! before, during and after, and nothing removed is left anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use thenar_index::{Compacting, Error, Geometry, Index, Lsn, OwnedRow, Row, Snapshot, SubjectNumber, TemplateId};

use crate::crash::{TORN, assert_no_bytes_of};
use crate::support::contents::{live_rows, staged_rows};
use crate::support::disk::{Mishap, disk_of};
use crate::support::rows::{Dice, KEY, borrowed, row};

/// An index with rows 1 to `count`, each of its own subject, published.
fn filled(dir: &Path, shape: Geometry, count: u64) -> Index {
    let mut index = Index::create_on(Arc::new(disk_of(dir)), dir, shape, KEY).unwrap();
    append(&mut index, 1..count + 1);
    index
}

fn append(index: &mut Index, templates: std::ops::Range<u64>) {
    let rows: Vec<OwnedRow> = templates.map(|n| row(n, n, index.geometry().dim)).collect();
    index.append(&borrowed(&rows)).unwrap();
    let lsn = index.snapshot().lsn().0 + 1;
    drop(index.publish(Lsn(lsn)));
}

fn forget(index: &mut Index, subjects: impl Iterator<Item = u64>) {
    subjects.for_each(|subject| drop(index.forget(SubjectNumber(subject))));
    let lsn = index.snapshot().lsn().0 + 1;
    drop(index.publish(Lsn(lsn)));
}

/// Compacts until there is nothing to do.
fn compact_all(index: &mut Index) {
    while index.compact(u64::MAX).unwrap() != Compacting::Nothing {}
}

fn templates(snapshot: &Snapshot) -> BTreeSet<u64> {
    live_rows(snapshot).into_keys().collect()
}

/// Bytes that the folder's files occupy on the disk.
fn allocated(dir: &Path) -> u64 {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

/// Replaces all rows of a gallery repeatedly. Returns the space that it occupies after each round.
fn turn_over(random: bool) {
    const PEOPLE: u64 = 700;
    const TURNS: u64 = 20;
    const AT_ONCE: u64 = 35;
    let shape = Geometry { dim: 64, segment_rows: 256 };
    let dir = tempfile::tempdir().unwrap();
    let mut index = filled(dir.path(), shape, PEOPLE);
    let mut people: Vec<u64> = (1..=PEOPLE).collect();
    let (mut dice, mut memory) = (Dice(5), Vec::new());
    for turn in 0..TURNS {
        for step in 0..PEOPLE / AT_ONCE {
            let first = PEOPLE + 1 + turn * PEOPLE + step * AT_ONCE;
            append(&mut index, first..first + AT_ONCE);
            people.extend(first..first + AT_ONCE);
            let mut gone = Vec::new();
            for _ in 0..AT_ONCE {
                gone.push(people.remove(if random { dice.below(people.len() as u64) as usize } else { 0 }));
            }
            forget(&mut index, gone.into_iter());
            index.erase(&index.forgotten()).unwrap();
            compact_all(&mut index);
        }
        let snapshot = index.snapshot();
        memory.push((snapshot.mapped_bytes(), snapshot.host_bytes()));
        assert_eq!(templates(&snapshot), people.iter().copied().collect());
    }
    let fresh = tempfile::tempdir().unwrap();
    let mut compared = Index::create(fresh.path(), shape, KEY).unwrap();
    let rows: Vec<OwnedRow> = live_rows(&index.snapshot()).into_values().collect();
    compared.append(&borrowed(&rows)).unwrap();
    drop(compared.publish(Lsn(1)));
    let (found, live) = (allocated(dir.path()), allocated(fresh.path()));
    assert!(found <= 2 * live, "{found} bytes of files for {live} that are live");
    // Its memory does not depend on how often it was replaced.
    let segment = compared.segments().len() as u64;
    let segment = compared.snapshot().mapped_bytes() / segment;
    let (mapped_most, host_most) = (2 * compared.snapshot().mapped_bytes() + 2 * segment, memory[2].1 + 40_000);
    assert!(memory.iter().all(|(mapped, host)| *mapped <= mapped_most && *host <= host_most), "{memory:?}");
}

#[test]
fn a_gallery_replaced_twenty_times_takes_at_most_twice_the_space_of_its_live_rows() {
    turn_over(false);
}

#[test]
fn so_does_a_gallery_whose_subjects_are_forgotten_in_any_order() {
    turn_over(true);
}

#[test]
fn a_gallery_without_subjects_takes_no_space() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = filled(dir.path(), TORN, 400);
    forget(&mut index, 1..=400);
    compact_all(&mut index);
    let snapshot = index.snapshot();
    assert_eq!((snapshot.live(), snapshot.dead(), snapshot.mapped_bytes()), (0, 0, 0));
    drop(snapshot);
    let names = || fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names().all(|name| !name.ends_with(".idx")), "{:?}", names().collect::<Vec<_>>());
    assert_no_bytes_of(1..=400, dir.path(), "everybody left");
    // The next subject is found, with a larger template number than all before.
    assert!(matches!(index.append(&borrowed(&[row(400, 1, TORN.dim)])), Err(Error::Order { .. })));
    append(&mut index, 401..402);
    index.checkpoint().unwrap();
    drop(index);
    let index = Index::open(dir.path(), KEY).unwrap().finish().unwrap();
    assert_eq!(templates(&index.snapshot()), BTreeSet::from([401]));
}

/// Compacts step by step, in a new index for each step, before which it runs `meanwhile` once.
fn at_every_piece(meanwhile: impl Fn(&mut Index, &Path, &str)) {
    for at in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let mut index = filled(dir.path(), TORN, 300);
        // A third of the rows of all but the last segment is left: they fit one segment.
        forget(&mut index, (1..=256).filter(|n| n % 3 != 0));
        index.erase(&index.forgotten()).unwrap();
        for piece in 0.. {
            if piece == at {
                meanwhile(&mut index, dir.path(), &format!("before piece {at}"));
            }
            match index.compact(u64::MAX).unwrap() {
                Compacting::Nothing if piece < at => {
                    assert!(at > 8, "{at} pieces prove little");
                    return;
                }
                Compacting::Nothing => break,
                Compacting::Staged => drop(staged_rows(&index.stage(index.snapshot().lsn()))),
                Compacting::More => {}
            }
        }
        let lsn = index.snapshot().lsn();
        let before = live_rows(&index.publish(lsn));
        index.checkpoint().unwrap();
        drop(index);
        let index = Index::open(dir.path(), KEY).unwrap().finish().unwrap();
        assert_eq!(live_rows(&index.snapshot()), before, "piece {at}, opened again");
    }
}

#[test]
fn a_subject_forgotten_during_a_copy_stays_forgotten_and_leaves_no_bytes() {
    at_every_piece(|index, dir, context| {
        // The first, some middle and the last of the rows to be copied; a single template; one in another segment.
        let mut rows: Vec<Row> =
            [3, 126, 129, 255, 290].into_iter().flat_map(|n| index.forget(SubjectNumber(n))).collect();
        rows.extend(index.forget_template(TemplateId(60)));
        assert!(rows.len() >= 6, "{context}");
        let lsn = Lsn(index.snapshot().lsn().0 + 1);
        drop(index.publish(lsn));
        index.erase(&rows).unwrap();
        assert_eq!(index.forgotten(), [], "{context}");
        let gone = [3, 60, 126, 129, 255, 290];
        assert_no_bytes_of(gone.into_iter(), dir, context);
        let expected = (1..=300).filter(|n| (*n > 256 || n % 3 == 0) && !gone.contains(n));
        assert_eq!(templates(&index.snapshot()), expected.collect(), "{context}");
    });
}

#[test]
fn a_subject_forgotten_but_not_erased_during_a_copy_is_erased_later() {
    at_every_piece(|index, _, context| {
        assert!(!index.forget(SubjectNumber(126)).is_empty(), "{context}");
        let lsn = Lsn(index.snapshot().lsn().0 + 1);
        drop(index.publish(lsn));
    });
    // Opening has erased it if it was still there; here it is erased after the compaction.
    let dir = tempfile::tempdir().unwrap();
    let mut index = filled(dir.path(), TORN, 300);
    forget(&mut index, (1..=256).filter(|n| n % 3 != 0));
    for _ in 0..3 {
        index.compact(u64::MAX).unwrap();
    }
    forget(&mut index, std::iter::once(3));
    compact_all(&mut index);
    let left = index.forgotten();
    assert_eq!(left.len(), 1, "of the row that was copied before, the copy is left");
    index.erase(&left).unwrap();
    assert_no_bytes_of((1..=256).filter(|n| n % 3 != 0 || *n == 3), dir.path(), "all erased");
}

#[test]
fn a_subject_enrolled_during_a_copy_is_found() {
    at_every_piece(|index, _, context| {
        append(index, 301..460);
        let rows = live_rows(&index.snapshot());
        assert_eq!(rows.len(), 85 + 44 + 159, "{context}");
    });
}

#[test]
fn a_snapshot_keeps_its_rows_and_their_numbers_until_it_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = filled(dir.path(), TORN, 300);
    forget(&mut index, (1..=256).filter(|n| n % 3 != 0));
    let held = index.snapshot();
    let rows = live_rows(&held);
    let numbers: BTreeMap<u64, Vec<Row>> =
        rows.keys().map(|n| (*n, held.rows_of(SubjectNumber(*n)).to_vec())).collect();
    let segments = index.segments();
    // Compaction takes more steps than it could need: it waits.
    for _ in 0..100 {
        assert_ne!(index.compact(u64::MAX).unwrap(), Compacting::Nothing);
        assert_eq!(live_rows(&held), rows);
        for (n, numbers) in &numbers {
            assert_eq!(*held.rows_of(SubjectNumber(*n)), numbers[..]);
            let now = index.snapshot();
            let [number] = now.rows_of(SubjectNumber(*n))[..] else { panic!("subject {n} has one row") };
            assert_eq!(now.row(number), held.row(numbers[0]));
        }
    }
    assert_eq!(index.segments().len(), 2);
    assert!(segments.iter().all(|segment| segment.path.exists()));
    // A subject that is forgotten now is forgotten under both numbers, except for earlier searches.
    let rows = index.forget(SubjectNumber(3));
    assert_eq!(rows.len(), 2);
    let lsn = Lsn(index.snapshot().lsn().0 + 1);
    drop(index.publish(lsn));
    assert_eq!(*held.rows_of(SubjectNumber(3)), [Row(2)]);
    assert!(index.snapshot().rows_of(SubjectNumber(3)).is_empty());
    drop(held);
    index.erase(&rows).unwrap();
    compact_all(&mut index);
    assert!(!segments[0].path.exists() && !segments[1].path.exists() && segments[2].path.exists());
    // Old row numbers are used again.
    append(&mut index, 301..700);
    assert!(index.snapshot().rows_end() <= 5 * 128);
}

#[test]
fn a_full_disk_during_a_copy_changes_nothing() {
    let mut given_up = 0;
    for op in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk_of(dir.path());
        let mut index = Index::create_on(Arc::new(disk.clone()), dir.path(), TORN, KEY).unwrap();
        append(&mut index, 1..301);
        forget(&mut index, (1..=256).filter(|n| n % 3 != 0));
        index.erase(&index.forgotten()).unwrap();
        index.checkpoint().unwrap();
        let (rows, files) = (live_rows(&index.snapshot()), fs::read_dir(dir.path()).unwrap().count());
        disk.plan(disk.ops() + op, Mishap::Fails(io::ErrorKind::StorageFull));
        let failed = loop {
            match index.compact(u64::MAX) {
                Ok(Compacting::Nothing) => break false,
                Ok(_) => {}
                Err(Error::Io { source, .. }) => {
                    assert_eq!(source.kind(), io::ErrorKind::StorageFull);
                    break true;
                }
                Err(other) => panic!("{other}"),
            }
        };
        if !failed {
            assert!(given_up > 10, "{given_up} failures while copying prove little");
            return;
        }
        assert_eq!(live_rows(&index.snapshot()), rows, "operation {op}");
        if index.is_stopped() {
            drop(index);
            index = Index::open(dir.path(), KEY).unwrap().finish().unwrap();
        } else {
            given_up += 1;
            // The copy is removed, or searches see it and a manifest will name it.
            let shown = usize::from(index.segments().len() == 2);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), files + shown, "operation {op}");
        }
        // With free space it succeeds, and nothing of the failed attempt is left.
        append(&mut index, 301..302);
        compact_all(&mut index);
        assert_eq!(live_rows(&index.snapshot()).len(), rows.len() + 1, "operation {op}");
        assert_eq!(index.segments().len(), 2, "operation {op}");
    }
}

#[test]
fn no_compaction_begins_without_disk_space_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = filled(dir.path(), TORN, 300);
    forget(&mut index, (1..=256).filter(|n| n % 3 != 0));
    assert_eq!(index.compact(4096).unwrap(), Compacting::Nothing);
    // Removing a segment without live rows takes no space.
    forget(&mut index, 1..=128);
    assert_eq!(index.compact(0).unwrap(), Compacting::More);
    compact_all(&mut index);
    assert_eq!(templates(&index.snapshot()), (129..=300).filter(|n| *n > 256 || n % 3 == 0).collect());
}

#[test]
fn a_decayed_row_is_not_copied() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = filled(dir.path(), TORN, 300);
    forget(&mut index, (1..=256).filter(|n| n % 3 != 0));
    let segment = index.segments()[0].path.clone();
    // Row 30, which is live, decays under the map.
    let file = fs::OpenOptions::new().read(true).write(true).open(&segment).unwrap();
    let at = 4096 + 128 * 128 + 29 * TORN.dim as u64 * 2 + 7;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    let damage = loop {
        match index.compact(u64::MAX) {
            Ok(done) => assert_ne!(done, Compacting::Nothing),
            Err(Error::Damaged { first, .. }) => break first,
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!((damage.path, damage.segment, damage.bad_rows), (segment, 0, 1));
    assert_eq!((damage.first_template, damage.last_template), (TemplateId(1), TemplateId(128)));
}

#[test]
fn unpublished_rows_are_not_compacted() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = filled(dir.path(), TORN, 300);
    forget(&mut index, 1..=200);
    index.append(&borrowed(&[row(301, 301, TORN.dim)])).unwrap();
    assert!(matches!(index.compact(u64::MAX), Err(Error::Unpublished)));
    drop(index.publish(Lsn(9)));
    compact_all(&mut index);
    assert_eq!(templates(&index.snapshot()), (201..=301).collect());
}
