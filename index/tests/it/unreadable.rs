//! Sectors that cannot be read or written are damage like any other, and do not end the process.

use std::fs;
use std::io;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use thenar_index::storage::{Files, Storage, StoredFile};
use thenar_index::{DamageKind, Error, Index, Lsn, Map, OwnedRow, TemplateId, verify_on};

use crate::support::contents::live_rows;
use crate::support::rows::{KEY, SMALL, borrowed, row};

/// The kernel's error for a bad sector.
const EIO: i32 = 5;

/// A disk with a bad sector.
#[derive(Debug, Clone, Default)]
struct BadDisk(Arc<Mutex<Option<Bad>>>);

#[derive(Debug)]
struct Bad {
    name: String,
    bytes: Range<u64>,
    /// Whether overwriting replaces it by a good one.
    heals: bool,
}

impl BadDisk {
    fn of(name: &str, bytes: Range<u64>, heals: bool) -> Self {
        Self(Arc::new(Mutex::new(Some(Bad { name: name.into(), bytes, heals }))))
    }

    fn file(&self, path: &Path, real: Box<dyn StoredFile>) -> Box<dyn StoredFile> {
        Box::new(BadFile { disk: self.clone(), path: path.to_owned(), real })
    }
}

impl Storage for BadDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn StoredFile>> {
        Ok(self.file(path, Files.create(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn StoredFile>> {
        Ok(self.file(path, Files.open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Files.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        Files.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        Files.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        Files.list(dir)
    }

    fn fresh_identity(&self) -> u64 {
        Files.fresh_identity()
    }
}

#[derive(Debug)]
struct BadFile {
    disk: BadDisk,
    path: PathBuf,
    real: Box<dyn StoredFile>,
}

impl BadFile {
    fn meets(&self, bad: &Bad, bytes: &Range<u64>) -> bool {
        self.path.ends_with(&bad.name) && bytes.start < bad.bytes.end && bad.bytes.start < bytes.end
    }
}

impl StoredFile for BadFile {
    fn size(&self) -> io::Result<u64> {
        self.real.size()
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let range = at..at + bytes.len() as u64;
        if self.disk.0.lock().as_ref().is_some_and(|bad| self.meets(bad, &range)) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        self.real.read_at(bytes, at)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let range = at..at + bytes.len() as u64;
        let mut disk = self.disk.0.lock();
        if let Some(bad) = disk.as_ref().filter(|bad| self.meets(bad, &range)) {
            // To write a part of a sector, the system would have to read the rest.
            if !bad.heals || range.start > bad.bytes.start || range.end < bad.bytes.end {
                return Err(io::Error::from_raw_os_error(EIO));
            }
            *disk = None;
        }
        drop(disk);
        self.real.write_at(bytes, at)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.real.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.real.sync()
    }

    fn map(&self, len: usize) -> io::Result<Map> {
        self.real.map(len)
    }
}

/// 150 rows in three segments.
fn sample() -> (tempfile::TempDir, Vec<OwnedRow>) {
    let dir = tempfile::tempdir().unwrap();
    let rows: Vec<OwnedRow> = (1..=150).map(|n| row(n, n, SMALL.dim)).collect();
    let mut index = Index::create(dir.path(), SMALL, KEY).unwrap();
    index.append(&borrowed(&rows)).unwrap();
    drop(index.publish(Lsn(1)));
    index.checkpoint().unwrap();
    (dir, rows)
}

/// Opens the index on a disk that is bad at these bytes of the second segment, and replaces that segment.
fn rewritten(dir: &Path, rows: &[OwnedRow], disk: &BadDisk, bytes: &Range<u64>) -> Index {
    let storage = || Arc::new(disk.clone());
    let report = verify_on(storage(), dir, KEY, &|_, _| ControlFlow::Continue(())).unwrap();
    let mut found = Index::open_on(storage(), dir, KEY).unwrap();
    assert_eq!(report.damage, found.damage(), "{bytes:?}");
    assert!(!report.is_sound() && report.live == 64 + 22, "{bytes:?}: {report:?}");
    let [damage] = found.damage() else { panic!("{bytes:?}: {:?}", found.damage()) };
    assert_eq!((damage.segment, damage.kind, damage.offset), (1, DamageKind::Unreadable, bytes.start), "{damage}");
    assert_eq!((damage.bad_rows, damage.first_template, damage.last_template), (64, TemplateId(65), TemplateId(128)));
    found.replace_segment(1, rows[64..128].to_vec()).unwrap();
    let index = found.finish().unwrap();
    let live = live_rows(&index.snapshot());
    assert!(live.values().eq(rows), "{bytes:?}: {} rows", live.len());
    index
}

#[test]
fn a_segment_with_a_bad_sector_is_rewritten_and_its_file_overwritten() {
    let (dir, _) = sample();
    let second = fs::metadata(dir.path().join("seg-00000001.idx")).unwrap().len();
    // A page of each area of the file: header, records, rows, and each area of codes.
    for page in (0..second).step_by(4096) {
        let (dir, rows) = sample();
        let bytes = page..page + 4096;
        let disk = BadDisk::of("seg-00000001.idx", bytes.clone(), true);
        let index = rewritten(dir.path(), &rows, &disk, &bytes);
        assert!(index.left_over().is_empty() && !dir.path().join("seg-00000001.idx").exists());
        assert!(disk.0.lock().is_none(), "the sector was overwritten");
        drop(index);
        assert!(verify_on(Arc::new(disk), dir.path(), KEY, &|_, _| ControlFlow::Continue(())).unwrap().is_sound());
    }
}

#[test]
fn a_file_that_can_be_neither_read_nor_overwritten_is_reported_and_tried_again() {
    let (dir, rows) = sample();
    let (bytes, bad) = (8192..12288, dir.path().join("seg-00000001.idx"));
    let disk = BadDisk::of("seg-00000001.idx", bytes.clone(), false);
    let index = rewritten(dir.path(), &rows, &disk, &bytes);
    assert_eq!(index.left_over(), std::slice::from_ref(&bad));
    drop(index);
    let again = Index::open_on(Arc::new(disk.clone()), dir.path(), KEY).unwrap();
    assert_eq!(again.damage(), []);
    let index = again.finish().unwrap();
    assert_eq!(index.left_over(), std::slice::from_ref(&bad));
    drop(index);
    *disk.0.lock() = None;
    let index = Index::open_on(Arc::new(disk), dir.path(), KEY).unwrap().finish().unwrap();
    assert!(index.left_over().is_empty() && !bad.exists());
    assert!(live_rows(&index.snapshot()).values().eq(&rows));
}

#[test]
fn a_manifest_with_a_bad_sector_is_corrupt_and_can_be_wiped() {
    let (dir, _) = sample();
    let disk = BadDisk::of("MANIFEST", 0..4096, true);
    assert!(matches!(
        Index::open_on(Arc::new(disk.clone()), dir.path(), KEY),
        Err(Error::ManifestCorrupt { offset: 0, .. })
    ));
    Index::wipe_on(&disk, dir.path()).unwrap();
    drop(Index::create_on(Arc::new(Files), dir.path(), SMALL, KEY).unwrap());
}
