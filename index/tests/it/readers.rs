//! Readers and the writer at the same time: snapshots do not change, erasures are not starved, and a
//! folder has one writer.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use half::f16;
use thenar_index::codes::Codes;
use thenar_index::{Error, Geometry, Index, Lsn, NewRow, Row, SubjectNumber, TemplateId, verify};

use xxhash_rust::xxh3::xxh3_64;

use crate::support::rows::{KEY, SMALL, borrowed, row};

/// Rows of two pages, so that overwriting one takes some time.
const WIDE: Geometry = Geometry { dim: 4096, segment_rows: 64 };

/// Appends one row with the component `tag` throughout, for a subject with the same number.
fn append_tagged(index: &mut Index, tag: u16) {
    let vector = vec![f16::from_bits(tag); index.geometry().dim];
    let (template, subject) = (TemplateId(u64::from(tag)), SubjectNumber(u64::from(tag)));
    index.append(&[NewRow { template, subject, hand: 0, label: "tagged", source: 0, vector: &vector }]).unwrap();
}

#[test]
fn a_scan_never_sees_a_row_change_under_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = Index::create(dir.path(), WIDE, KEY).unwrap();
    let done = AtomicBool::new(false);
    let scans = AtomicU64::new(0);
    let mut erasures = 0;
    thread::scope(|scope| {
        for _ in 0..3 {
            let (reader, done, scans) = (index.reader(), &done, &scans);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let snapshot = reader.snapshot();
                    // Two passes over one snapshot: each row is whole and does not change, nor do the codes.
                    let codes = || -> Vec<u64> {
                        let hash = |codes: Codes<'_>| {
                            let factors = bytemuck::cast_slice(codes.factors);
                            [codes.one_bit, codes.two_bit, codes.four_bit, factors, codes.codebook].map(xxh3_64)
                        };
                        snapshot.segments().flat_map(|block| hash(block.codes)).collect()
                    };
                    let pass = || -> Vec<u16> {
                        let tag = |row: &[f16]| {
                            assert!(row.iter().all(|x| *x == row[0]), "a row is half overwritten");
                            row[0].to_bits()
                        };
                        snapshot
                            .segments()
                            .flat_map(|block| block.rows.chunks_exact(WIDE.dim).map(tag).collect::<Vec<_>>())
                            .collect()
                    };
                    let live: Vec<u32> = (0..snapshot.rows_end()).filter(|row| snapshot.is_live(Row(*row))).collect();
                    let first_codes = codes();
                    let (first, second) = (pass(), pass());
                    assert_eq!(first, second, "a row changed under a snapshot");
                    assert_eq!(first_codes, codes(), "a code changed under a snapshot");
                    // The codes are those of the rows, including erased ones.
                    for block in snapshot.segments() {
                        for at in 0..block.codes.rows() {
                            let erased = first[block.first_row as usize + at] == 0;
                            assert_eq!(block.codes.is_clear(WIDE.dim, at), erased);
                        }
                    }
                    // Row n has tag n + 1 unless it is erased. A live row has its bytes.
                    for (row, tag) in first.iter().enumerate() {
                        assert!(*tag == 0 || usize::from(*tag) == row + 1);
                    }
                    assert!(live.iter().all(|row| first[*row as usize] != 0));
                    scans.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let began = Instant::now();
        let mut tag = 0;
        while began.elapsed() < Duration::from_millis(1500) && tag < 2000 {
            for _ in 0..4 {
                tag += 1;
                append_tagged(&mut index, tag);
            }
            drop(index.publish(Lsn(u64::from(tag))));
            let mut rows = index.forget(SubjectNumber(u64::from(tag - 1)));
            rows.extend(index.forget_template(TemplateId(u64::from(tag - 3))));
            assert_eq!(rows.len(), 2);
            drop(index.publish(Lsn(u64::from(tag))));
            index.erase(&rows).unwrap();
            erasures += 1;
        }
        done.store(true, Ordering::Relaxed);
    });
    let scans = scans.into_inner();
    assert!(erasures >= 10 && scans >= 30, "{erasures} erasures among {scans} scans prove little");
}

#[test]
fn a_stream_of_searches_does_not_starve_an_erasure_nor_erasures_a_search() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = Index::create(dir.path(), SMALL, KEY).unwrap();
    let done = AtomicBool::new(false);
    let searches = AtomicU64::new(0);
    thread::scope(|scope| {
        // Four threads with overlapping searches of 2 ms: a snapshot is held at every moment.
        for lag in 0..4 {
            let (reader, done, searches) = (index.reader(), &done, &searches);
            scope.spawn(move || {
                thread::sleep(Duration::from_micros(500 * lag));
                while !done.load(Ordering::Relaxed) {
                    let _snapshot = reader.snapshot();
                    thread::sleep(Duration::from_millis(2));
                    searches.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        thread::sleep(Duration::from_millis(20));
        for number in 1..=30u16 {
            append_tagged(&mut index, number);
            drop(index.publish(Lsn(u64::from(number))));
            let rows = index.forget(SubjectNumber(u64::from(number)));
            drop(index.publish(Lsn(u64::from(number))));
            let (began, before) = (Instant::now(), searches.load(Ordering::Relaxed));
            index.erase(&rows).unwrap();
            // A starved writer would give up after 10 s.
            assert!(began.elapsed() < Duration::from_secs(3), "erasure {number} took {:?}", began.elapsed());
            while searches.load(Ordering::Relaxed) < before + 4 {
                assert!(began.elapsed() < Duration::from_secs(3), "searches are starved");
                thread::yield_now();
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn an_erasure_waits_for_a_held_snapshot_gives_up_and_can_be_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = Index::create(dir.path(), SMALL, KEY).unwrap();
    index.set_reader_wait(Duration::from_millis(50));
    append_tagged(&mut index, 1);
    let held = index.publish(Lsn(1));
    let rows = index.forget(SubjectNumber(1));
    assert_eq!(rows, [Row(0)]);
    assert!(matches!(index.erase(&rows), Err(Error::Unpublished)), "a new search would find it");
    drop(index.publish(Lsn(2)));
    let later = index.snapshot();
    assert!(!later.is_live(Row(0)) && later.meta(Row(0)).is_none() && later.rows_of(SubjectNumber(1)).is_empty());
    drop(later);
    match index.erase(&rows) {
        Err(Error::Readers { held: 1, waited }) => assert!(waited >= Duration::from_millis(50)),
        other => panic!("{other:?}"),
    }
    // Nothing has changed under the reader, others can read, and the row still has to be erased.
    assert_eq!(held.row(Row(0)), [f16::from_bits(1); 32]);
    assert_eq!((held.meta(Row(0)).unwrap().subject, held.live()), (SubjectNumber(1), 1));
    assert_eq!(*held.rows_of(SubjectNumber(1)), [Row(0)]);
    assert_eq!(index.snapshot().lsn(), Lsn(2));
    assert_eq!(index.forgotten(), rows);
    assert!(!index.is_stopped());
    drop(held);
    index.erase(&rows).unwrap();
    assert_eq!(index.forgotten(), []);
    assert_eq!(index.snapshot().row(Row(0)), [f16::from_bits(0); 32]);
    index.erase(&rows).unwrap();
}

#[test]
fn a_live_or_nonexistent_row_is_not_erased() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = Index::create(dir.path(), SMALL, KEY).unwrap();
    append_tagged(&mut index, 1);
    drop(index.publish(Lsn(1)));
    assert!(matches!(index.erase(&[Row(0)]), Err(Error::StillLive { row: Row(0) })));
    assert!(matches!(index.erase(&[Row(1)]), Err(Error::NoSuchRow { row: Row(1) })));
    assert!(matches!(index.erase(&[Row(64)]), Err(Error::NoSuchRow { row: Row(64) })));
    assert_eq!(index.snapshot().row(Row(0)), [f16::from_bits(1); 32]);
}

#[test]
fn rows_are_invisible_until_published_and_stay_invisible_to_old_snapshots() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = Index::create(dir.path(), SMALL, KEY).unwrap();
    let reader = index.reader();
    let rows: Vec<_> = (1..=100).map(|n| row(n, n % 7, SMALL.dim)).collect();
    index.append(&borrowed(&rows[..60])).unwrap();
    let first = index.publish(Lsn(1));
    index.append(&borrowed(&rows[60..])).unwrap();
    assert_eq!((first.rows_end(), first.live()), (60, 60));
    assert_eq!(reader.snapshot().rows_end(), 60);
    let staged = index.stage(Lsn(2));
    assert_eq!((staged.rows_end(), staged.live(), staged.lsn()), (100, 100, Lsn(2)));
    assert_eq!((reader.snapshot().rows_end(), reader.snapshot().lsn()), (60, Lsn(1)));
    assert!(!reader.snapshot().is_live(Row(60)) && staged.is_live(Row(60)));
    assert_eq!(index.publish(Lsn(2)).rows_end(), 100);
    assert_eq!((first.rows_end(), first.rows_of(SubjectNumber(3)).len()), (60, 9));
    assert_eq!(reader.snapshot().rows_of(SubjectNumber(3)).len(), 14);
    // A segment's identity is the same in every snapshot that has it.
    let identities = |blocks: Vec<u64>| blocks;
    let old = identities(first.segments().map(|block| block.identity).collect());
    let new = identities(staged.segments().map(|block| block.identity).collect());
    assert_eq!((old.len(), new.len(), old[0]), (1, 2, new[0]));
}

#[test]
fn invalid_rows_are_refused_and_the_writer_continues() {
    let dir = tempfile::tempdir().unwrap();
    let mut index = Index::create(dir.path(), SMALL, KEY).unwrap();
    index.append(&borrowed(&[row(10, 1, 32)])).unwrap();
    assert!(matches!(index.append(&borrowed(&[row(10, 1, 32)])), Err(Error::Order { .. })));
    assert!(matches!(index.append(&borrowed(&[row(12, 1, 32), row(11, 1, 32)])), Err(Error::Order { .. })));
    assert!(matches!(index.append(&borrowed(&[row(11, 1, 64)])), Err(Error::Dim { expected: 32, found: 64, .. })));
    assert!(matches!(
        index.append(&borrowed(&[row(11, u64::from(u32::MAX) + 1, 32)])),
        Err(Error::SubjectRange { .. })
    ));
    let mut long = row(11, 1, 32);
    long.label = "é".repeat(33);
    assert!(matches!(index.append(&borrowed(&[long.clone()])), Err(Error::Label { found: 66, .. })));
    long.label = "é".repeat(32);
    // The largest subject number costs one page of heads, not sixteen gigabytes.
    long.subject = SubjectNumber(u64::from(u32::MAX));
    index.append(&borrowed(&[long.clone()])).unwrap();
    let snapshot = index.publish(Lsn(1));
    assert_eq!((snapshot.live(), snapshot.meta(Row(1)).unwrap().label), (2, long.label.as_str()));
    assert_eq!(*snapshot.rows_of(long.subject), [Row(1)]);
    assert!(snapshot.host_bytes() < 20 << 20);
    assert!(snapshot.rows_of(SubjectNumber(u64::MAX)).is_empty());
    assert!(index.forget(SubjectNumber(u64::MAX)).is_empty());
}

#[test]
fn invalid_geometries_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (dim, segment_rows) in [(0, 64), (33, 64), (1 << 16, 64), (32, 0), (32, 65), (32, 1 << 21)] {
        let made = Index::create(dir.path(), Geometry { dim, segment_rows }, KEY);
        assert!(matches!(made, Err(Error::Geometry { .. })), "{dim} components, {segment_rows} rows");
    }
    assert!(!Index::exists(dir.path()));
    assert_eq!(Geometry::new(512), Geometry { dim: 512, segment_rows: 65_536 });
}

#[test]
fn a_folder_has_one_writer_until_the_last_snapshot_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let nested = dir.path().join("index");
    let mut index = Index::create(&nested, SMALL, KEY).unwrap();
    let locked = |result: Result<(), Error>| matches!(result, Err(Error::Locked { dir }) if dir == nested);
    let all_locked = || {
        let verified = verify(&nested, KEY, &|_, _| std::ops::ControlFlow::Continue(()));
        locked(Index::open(&nested, KEY).map(drop))
            && locked(Index::create(&nested, SMALL, KEY).map(drop))
            && locked(Index::wipe(&nested))
            && locked(verified.map(drop))
    };
    assert!(all_locked());
    append_tagged(&mut index, 1);
    let snapshot = index.publish(Lsn(1));
    let reader = index.reader();
    drop(index);
    assert!(all_locked(), "a second writer could erase rows under the snapshot");
    drop(snapshot);
    assert!(all_locked(), "a reader can still take snapshots");
    drop(reader);
    let unrepaired = Index::open(&nested, KEY).unwrap();
    assert!(all_locked());
    let index = unrepaired.finish().unwrap();
    assert!(matches!(Index::open(&nested, KEY), Err(Error::Locked { .. })));
    drop(index);
    assert!(matches!(Index::create(&nested, SMALL, KEY), Err(Error::Exists { .. })));
    Index::wipe(&nested).unwrap();
    Index::create(&nested, SMALL, KEY).unwrap();
}
