//! An index whose writer failed is opened again under the same lock, while its readers continue. A step that
//! could not begin needs no reopening.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use thenar_index::storage::Files;
use thenar_index::{Error, Index, Lsn, OwnedRow, SubjectNumber, Unrepaired, verify};

use crate::support::contents::live_rows;
use crate::support::disk::{Mishap, disk_of};
use crate::support::rows::{KEY, SMALL, borrowed, row};

fn rows(templates: std::ops::RangeInclusive<u64>) -> Vec<OwnedRow> {
    templates.map(|n| row(n, n, SMALL.dim)).collect()
}

fn by_template(rows: Vec<OwnedRow>) -> BTreeMap<u64, OwnedRow> {
    rows.into_iter().map(|row| (row.template.0, row)).collect()
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let file = |entry: io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
    };
    fs::read_dir(dir).unwrap().map(file).collect()
}

#[test]
fn readers_continue_and_files_do_not_change_until_the_index_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = Index::create(dir.path(), SMALL, KEY).unwrap();
    index.append(&borrowed(&rows(1..=100))).unwrap();
    drop(index.publish(Lsn(1)));
    index.checkpoint().unwrap();
    // The manifest does not count these rows: searches see them, and opening again overwrites them.
    index.append(&borrowed(&rows(101..=150))).unwrap();
    index.forget(SubjectNumber(5));
    drop(index.publish(Lsn(2)));
    let reader = index.reader();
    let reopen = || Index::reopen_on(Arc::new(Files), &reader, KEY);
    let is_locked = |opened: Result<Unrepaired, Error>| matches!(opened, Err(Error::Locked { .. }));
    assert!(is_locked(reopen()), "its writer still exists");
    drop(index);
    let before = files(dir.path());
    let seen = live_rows(&reader.snapshot());
    assert_eq!(seen.len(), 149);

    let held = reader.snapshot();
    let mut again = reopen().unwrap();
    assert!(is_locked(reopen()), "it is already being opened again");
    again.set_reader_wait(Duration::ZERO);
    assert!(matches!(again.finish(), Err(Error::Readers { held: 1, .. })));
    assert!(!reader.is_retired() && files(dir.path()) == before);
    assert!(live_rows(&held) == seen && live_rows(&reader.snapshot()) == seen);

    // Nothing happens until the snapshots are dropped.
    let again = reopen().unwrap();
    let index = std::thread::scope(|scope| {
        let finished = scope.spawn(|| again.finish().unwrap());
        assert!(live_rows(&held) == seen && files(dir.path()) == before);
        drop(held);
        finished.join().unwrap()
    });
    assert!(reader.is_retired() && is_locked(reopen()));
    assert!(is_locked(Index::open(dir.path(), KEY)), "the lock was passed on");
    assert_eq!((index.snapshot().lsn(), live_rows(&index.snapshot())), (Lsn(1), by_template(rows(1..=100))));
    drop(reader);
    assert!(is_locked(Index::open(dir.path(), KEY)));
    drop(index);
    let report = verify(dir.path(), KEY, &|_, _| ControlFlow::Continue(())).unwrap();
    assert!(report.is_sound() && report.live == 100, "{report:?}");
}

#[test]
fn a_new_index_replaces_one_without_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = Index::create(dir.path(), SMALL, KEY).unwrap();
    index.append(&borrowed(&rows(1..=100))).unwrap();
    drop(index.publish(Lsn(1)));
    let reader = index.reader();
    drop(index);
    fs::write(dir.path().join("MANIFEST"), b"none").unwrap();
    assert!(matches!(Index::reopen_on(Arc::new(Files), &reader, KEY), Err(Error::ManifestCorrupt { .. })));
    assert_eq!(reader.snapshot().live(), 100, "the reader continues");
    let index = Index::create_over(Arc::new(Files), &reader, SMALL, KEY).unwrap();
    assert!(reader.is_retired());
    assert_eq!((index.snapshot().lsn(), index.snapshot().live()), (Lsn(0), 0));
    assert!(matches!(Index::open(dir.path(), KEY), Err(Error::Locked { .. })));
    assert_eq!(files(dir.path()).keys().collect::<Vec<_>>(), ["LOCK", "MANIFEST"]);
}

#[test]
fn a_segment_that_cannot_be_created_changes_nothing_and_is_created_later() {
    // Each operation of creating it: the file, its length, its header, its map; and of the second segment.
    for op in 0..8 {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk_of(dir.path());
        let mut index = Index::create_on(Arc::new(disk.clone()), dir.path(), SMALL, KEY).unwrap();
        index.append(&borrowed(&rows(1..=60))).unwrap();
        drop(index.publish(Lsn(1)));
        let before = files(dir.path());
        disk.plan(disk.ops() + op, Mishap::Fails(io::ErrorKind::StorageFull));
        // Four rows into the first segment, the others into two new ones.
        let refused = index.append(&borrowed(&rows(61..=150)));
        assert!(matches!(refused, Err(Error::Io { .. })), "operation {op}: {refused:?}");
        assert!(!index.is_stopped() && files(dir.path()) == before, "operation {op}");
        index.append(&borrowed(&rows(61..=150))).unwrap();
        drop(index.publish(Lsn(2)));
        index.checkpoint().unwrap();
        drop(index);
        let index = Index::open(dir.path(), KEY).unwrap().finish().unwrap();
        assert_eq!(live_rows(&index.snapshot()), by_template(rows(1..=150)), "operation {op}");
    }
}

#[test]
fn a_manifest_that_cannot_be_created_is_created_later() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk_of(dir.path());
    let mut index = Index::create_on(Arc::new(disk.clone()), dir.path(), SMALL, KEY).unwrap();
    index.append(&borrowed(&rows(1..=10))).unwrap();
    drop(index.publish(Lsn(1)));
    // After the segment and the folder are synced.
    disk.plan(disk.ops() + 2, Mishap::Fails(io::ErrorKind::StorageFull));
    let refused = index.checkpoint().unwrap_err();
    assert!(refused.changed_nothing() && !index.is_stopped(), "{refused:?}");
    index.checkpoint().unwrap();
    // A failed write or sync is not ignored.
    for op in [1, 2] {
        drop(index);
        index = Index::open_on(Arc::new(disk.clone()), dir.path(), KEY).unwrap().finish().unwrap();
        disk.plan(disk.ops() + op, Mishap::Fails(io::ErrorKind::StorageFull));
        let refused = index.checkpoint().unwrap_err();
        assert!(!refused.changed_nothing() && index.is_stopped(), "{refused:?}");
    }
    drop(index);
    let index = Index::open(dir.path(), KEY).unwrap().finish().unwrap();
    assert_eq!(live_rows(&index.snapshot()), by_template(rows(1..=10)));
}
