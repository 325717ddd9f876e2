//! How an [`Index`] comes to be, and to its end: create, open, wipe.
//!
//! Does not know what the index does in between.
//!
//! Invariant: an index is never made over what is left of another.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use crate::chains::Chains;
use crate::coding::Depth;
use crate::error::Error;
use crate::folder;
use crate::lock::Lock;
use crate::manifest::Manifest;
use crate::nouns::{Contents, Geometry, Lsn, Origin};
use crate::open::Unrepaired;
use crate::reader_barrier::{ReaderBarrier, Writer, reader_barrier};
use crate::segment::{destroy, file_name};
use crate::slots::Slots;
use crate::snapshot::{Reader, Shared, View};
use crate::storage::{Files, Storage};
use crate::writer::{Index, READER_WAIT_DEFAULT};

impl Index {
    /// Makes an empty index in `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// [`Error::Exists`] where there is one or what is left of one, [`Error::Locked`],
    /// [`Error::Geometry`], [`Error::Io`].
    pub fn create(dir: &Path, geometry: Geometry, origin: Origin) -> Result<Self, Error> {
        Self::create_on(Arc::new(Files), dir, geometry, origin)
    }

    /// [`Index::create`] on a storage of the caller's.
    ///
    /// # Errors
    /// As [`Index::create`].
    pub fn create_on(storage: Arc<dyn Storage>, dir: &Path, geometry: Geometry, origin: Origin) -> Result<Self, Error> {
        let geometry = geometry.checked()?;
        Self::create_locked(storage, Arc::new(Lock::take_or_make(dir)?), geometry, origin)
    }

    fn create_locked(
        storage: Arc<dyn Storage>,
        lock: Arc<Lock>,
        geometry: Geometry,
        origin: Origin,
    ) -> Result<Self, Error> {
        let dir = lock.dir.as_path();
        if folder::has_index(&*storage, dir)? {
            return Err(Error::Exists { dir: dir.to_owned() });
        }
        let manifest =
            Manifest { geometry, origin, lsn: Lsn(0), next_file: 0, segments: Vec::new(), forgotten: Vec::new() };
        folder::write_manifest(&*storage, dir, &manifest)?;
        let (reader_barrier, writer) = reader_barrier();
        let chains = Chains::new(geometry.segment_rows);
        Ok(Self::assemble(Parts {
            storage,
            dir: dir.to_owned(),
            lock,
            reader_barrier,
            writer,
            manifest,
            chains,
            slots: Slots::new(geometry.segment_rows),
            contents: Contents::default(),
            dead: 0,
        }))
    }

    /// Reads and checks the index in `dir`, every row of it and the codes of every block. Nothing is written and nothing is
    /// open to readers until [`Unrepaired::finish`].
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::ManifestMissing`], [`Error::ManifestCorrupt`],
    /// [`Error::Version`], [`Error::WrongKey`], [`Error::WrongGallery`], [`Error::Io`]. Damaged segments are no error here.
    pub fn open(dir: &Path, origin: Origin) -> Result<Unrepaired, Error> {
        Self::open_on(Arc::new(Files), dir, origin)
    }

    /// [`Index::open`] on a storage of the caller's.
    ///
    /// # Errors
    /// As [`Index::open`].
    pub fn open_on(storage: Arc<dyn Storage>, dir: &Path, origin: Origin) -> Result<Unrepaired, Error> {
        Unrepaired::read(storage, dir, None, origin, Depth::Sums, &mut |_, _| true)
    }

    /// As [`Index::open_on`], for the index that `before` reads from and whose writer has been dropped,
    /// without letting go of its lock. `before` goes on until [`Unrepaired::finish`].
    ///
    /// # Errors
    /// As [`Index::open`]; [`Error::Locked`] while there is another writer.
    pub fn reopen_on(storage: Arc<dyn Storage>, before: &Reader, origin: Origin) -> Result<Unrepaired, Error> {
        Unrepaired::read(storage, &before.shared.lock.dir, Some(before), origin, Depth::Sums, &mut |_, _| true)
    }

    /// Wipes the index that `before` reads from and whose writer has been dropped, and makes an empty
    /// one in its place, without letting go of its lock. Waits until no snapshot is held, 10 s at most;
    /// from then on `before` [is retired](Reader::is_retired).
    ///
    /// # Errors
    /// [`Error::Locked`] while there is another writer and [`Error::Readers`]: nothing was done.
    /// [`Error::Geometry`], [`Error::Io`].
    pub fn create_over(
        storage: Arc<dyn Storage>,
        before: &Reader,
        geometry: Geometry,
        origin: Origin,
    ) -> Result<Self, Error> {
        let geometry = geometry.checked()?;
        let (lock, mut writer) = before.take_over()?;
        writer.retire(READER_WAIT_DEFAULT)?;
        Self::wipe_locked(&*storage, &lock.dir)?;
        Self::create_locked(storage, lock, geometry, origin)
    }

    /// Whether `dir` holds an index, or what is left of one: a manifest or segment files.
    #[must_use]
    pub fn exists(dir: &Path) -> bool {
        // A folder that cannot be listed is not known to be free.
        folder::has_index(&Files, dir).unwrap_or(true)
    }

    /// Overwrites and removes every file of the index in `dir`, so that it can be made anew.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::Io`].
    pub fn wipe(dir: &Path) -> Result<(), Error> {
        Self::wipe_on(&Files, dir)
    }

    /// [`Index::wipe`] on a storage of the caller's.
    ///
    /// # Errors
    /// As [`Index::wipe`].
    pub fn wipe_on(storage: &dyn Storage, dir: &Path) -> Result<(), Error> {
        let _lock = Lock::take_or_make(dir)?;
        Self::wipe_locked(storage, dir)
    }

    fn wipe_locked(storage: &dyn Storage, dir: &Path) -> Result<(), Error> {
        folder::remove_new_manifest(storage, dir)?;
        folder::remove_manifest(storage, dir)?;
        // First of all nothing names the segments any more; then they go.
        folder::sync_dir(storage, dir)?;
        for file in folder::segment_files(storage, dir)? {
            destroy(storage, &dir.join(file_name(file)))?;
        }
        folder::sync_dir(storage, dir)
    }

    pub(crate) fn opened(from: Unrepaired) -> Self {
        let Unrepaired { lock, storage, dir, manifest, reader_barrier, mut writer, parts, left_over, .. } = from;
        let segment_rows = manifest.geometry.segment_rows;
        let (mut chains, mut slots) = (Chains::new(segment_rows), Slots::new(segment_rows));
        let (mut contents, mut dead) = (Contents::default(), 0);
        for (number, slot, scan) in Unrepaired::into_slots(parts) {
            chains.add_segment(number);
            let first_row = number * segment_rows;
            let records = slot.segment.pages.records(&writer);
            let mut from = 0;
            while let Some(offset) = slot.live.next(from, slot.rows) {
                let record = &records[offset as usize];
                chains.link(record.subject, first_row + offset);
                contents.add(&record.meta());
                from = offset + 1;
            }
            slot.segment.pages.show(slot.rows, &mut writer);
            dead += scan.erased;
            slots.put(number, slot);
            slots.list(number);
        }
        let index = Self::assemble(Parts {
            storage,
            dir,
            lock,
            reader_barrier,
            writer,
            manifest,
            chains,
            slots,
            contents,
            dead,
        });
        Self { left_over, ..index }
    }

    fn assemble(parts: Parts) -> Self {
        let Parts { storage, dir, lock, reader_barrier, writer, manifest, chains, slots, contents, dead } = parts;
        let last_template = slots.listed().filter_map(|(_, slot)| slot.range).next_back().map(|(_, last)| last);
        let shared = Shared {
            reader_barrier,
            // Nothing yet: the rows follow below.
            current: Mutex::new(Arc::new(View::new(manifest.lsn, Vec::new(), 0, 0))),
            chains: RwLock::new(chains),
            geometry: manifest.geometry,
            lock,
        };
        let index = Self {
            dir,
            storage,
            origin: manifest.origin,
            shared: Arc::new(shared),
            writer,
            slots,
            compaction: None,
            forgotten: BTreeMap::new(),
            last_template,
            contents,
            dead,
            next_file: manifest.next_file,
            dir_dirty: false,
            stopped: false,
            left_over: Vec::new(),
            reader_wait: READER_WAIT_DEFAULT,
        };
        *index.shared.current.lock() = Arc::new(index.view(manifest.lsn));
        index
    }
}

/// What an index is put together from.
struct Parts {
    storage: Arc<dyn Storage>,
    dir: PathBuf,
    lock: Arc<Lock>,
    reader_barrier: Arc<ReaderBarrier>,
    writer: Writer,
    manifest: Manifest,
    chains: Chains,
    slots: Slots,
    contents: Contents,
    dead: u64,
}
