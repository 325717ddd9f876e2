//! Opening: from files to an index, by way of knowing what is wrong with them.
//!
//! Opening reads and writes nothing; [`Unrepaired::finish`] writes: it finishes erasures that a
//! crash cut short, scrubs rows that the manifest does not count, makes codes that are not right
//! anew from their rows, and removes files that the manifest does not name. Only then is there an
//! [`Index`] to read from.
//!
//! An index whose writer failed is opened again under the lock it has, while its readers go on: they
//! read the same files, so finishing waits until they hold no snapshot and lets them take no more.
//!
//! Does not know the registry: the caller brings the rows of a damaged segment.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::codes::BLOCK_ROWS;
use crate::coding::{Depth, recode};
use crate::error::{Damage, DamageKind, Error};
use crate::fill::write_segment;
use crate::folder;
use crate::format::{Fault, HEADER_BYTES, Layout, MetaRecord, check_header};
use crate::live::LiveBits;
use crate::lock::Lock;
use crate::manifest::{Manifest, SegmentEntry};
use crate::map::Pages;
use crate::nouns::{Geometry, Lsn, Origin, OwnedRow, TemplateId};
use crate::readable::{PAGE_BYTES, first_unreadable, is_unreadable};
use crate::reader_barrier::{ReaderBarrier, Writer, reader_barrier};
use crate::scan::{Scan, scan};
use crate::segment::{Segment, destroy, file_name};
use crate::slots::Slot;
use crate::snapshot::Reader;
use crate::storage::Storage;
use crate::writer::{Index, READER_WAIT_DEFAULT};

/// An index that was read and checked, and serves nobody yet.
pub struct Unrepaired {
    pub(crate) lock: Arc<Lock>,
    /// The writer's place of the index that is being opened again. Its readers may hold snapshots.
    before: Option<Writer>,
    reader_wait: Duration,
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) dir: PathBuf,
    pub(crate) manifest: Manifest,
    pub(crate) reader_barrier: Arc<ReaderBarrier>,
    pub(crate) writer: Writer,
    pub(crate) parts: Vec<Part>,
    damage: Vec<Damage>,
    codes_damage: Vec<Damage>,
    /// Files to destroy once a manifest that does not name them is durable.
    doomed: Vec<PathBuf>,
    replaced: bool,
    /// Those of them that the disk lets nobody overwrite.
    pub(crate) left_over: Vec<PathBuf>,
}

/// One segment of the manifest; without contents while it is damaged.
pub(crate) struct Part {
    pub(crate) entry: SegmentEntry,
    pub(crate) found: Option<(Segment, Scan)>,
}

impl Unrepaired {
    /// Reads and checks the index in `dir`. `progress` hears of rows checked and says whether to
    /// go on.
    pub(crate) fn read(
        storage: Arc<dyn Storage>,
        dir: &Path,
        before: Option<&Reader>,
        origin: Origin,
        depth: Depth,
        progress: &mut dyn FnMut(&Manifest, u64) -> bool,
    ) -> Result<Self, Error> {
        if !folder::has_index(&*storage, dir)? {
            return Err(Error::ManifestMissing { path: dir.join(crate::manifest::MANIFEST_NAME) });
        }
        let (lock, before) = match before {
            None => (Arc::new(Lock::take(dir)?), None),
            Some(reader) => {
                let (lock, writer) = reader.take_over()?;
                (lock, Some(writer))
            }
        };
        let mut manifest = folder::read_manifest(&*storage, dir)?;
        if manifest.origin.key != origin.key {
            return Err(Error::WrongKey { expected: origin.key, found: manifest.origin.key });
        }
        if manifest.origin.gallery != origin.gallery {
            let (expected, found) = (origin.gallery, manifest.origin.gallery);
            return Err(Error::WrongGallery { dir: dir.to_owned(), expected, found });
        }
        let (reader_barrier, writer) = reader_barrier();
        let (mut parts, mut damage, mut codes_damage, mut done_rows) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for (place, entry) in manifest.segments.iter().enumerate() {
            let mut on_step = |rows| {
                done_rows += rows;
                progress(&manifest, done_rows)
            };
            let found = read_segment(&*storage, dir, entry, manifest.layout(), depth, &writer, &mut on_step)?;
            let segment_damage = |fault: Fault, bad_rows| Damage {
                path: dir.join(file_name(entry.file)),
                segment: place,
                first_template: TemplateId(entry.first_template),
                last_template: TemplateId(entry.last_template),
                offset: fault.offset,
                kind: fault.kind,
                expected: fault.expected,
                found: fault.found,
                bad_rows,
            };
            let found = match found {
                Err(fault) => {
                    damage.push(segment_damage(fault, u64::from(entry.rows)));
                    None
                }
                Ok((segment, scan)) => match scan.first_fault {
                    Some(fault) => {
                        damage.push(segment_damage(fault, scan.bad_rows));
                        None
                    }
                    None => {
                        codes_damage.extend(scan.first_code_fault.map(|fault| segment_damage(fault, 0)));
                        Some((segment, scan))
                    }
                },
            };
            parts.push(Part { entry: *entry, found });
        }
        let files = folder::segment_files(&*storage, dir)?;
        let named: BTreeSet<u32> = manifest.segments.iter().map(|entry| entry.file).collect();
        let doomed = files.iter().filter(|file| !named.contains(file)).map(|&file| dir.join(file_name(file))).collect();
        // A file made after the manifest was written has a number the manifest thinks is free.
        if let Some(last) = files.iter().max() {
            manifest.next_file = manifest.next_file.max(last.checked_add(1).ok_or_else(file_numbers_spent)?);
        }
        Ok(Self {
            lock,
            before,
            reader_wait: READER_WAIT_DEFAULT,
            storage,
            dir: dir.to_owned(),
            manifest,
            reader_barrier,
            writer,
            parts,
            damage,
            codes_damage,
            doomed,
            replaced: false,
            left_over: Vec::new(),
        })
    }

    /// The change up to which the index has everything: replay the log from there.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        self.manifest.lsn
    }

    /// The shape the index was created with.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.manifest.geometry
    }

    /// The damaged segments that were not replaced yet, each once.
    #[must_use]
    pub fn damage(&self) -> &[Damage] {
        &self.damage
    }

    /// Segments whose rows are whole and whose codes are not those of the rows, each once. No row
    /// is lost: [`Unrepaired::finish`] makes the codes anew.
    #[must_use]
    pub fn codes_damage(&self) -> &[Damage] {
        &self.codes_damage
    }

    /// Writes a new file for a segment, with `rows` in it: every template of the registry that is
    /// alive and numbered from the damage's first to its last template, ascending. The old file is
    /// overwritten and removed by [`Unrepaired::finish`].
    ///
    /// # Errors
    /// [`Error::NoSuchSegment`], [`Error::Order`], [`Error::TemplateRange`], [`Error::RowLimit`],
    /// [`Error::Dim`], [`Error::Label`], [`Error::SubjectRange`] where the rows do not fit;
    /// [`Error::Io`] where they could not be written.
    pub fn replace_segment(&mut self, segment: usize, rows: Vec<OwnedRow>) -> Result<(), Error> {
        let entry = self.parts.get(segment).ok_or(Error::NoSuchSegment { segment })?.entry;
        let file = self.manifest.next_file;
        self.manifest.next_file = file.checked_add(1).ok_or_else(file_numbers_spent)?;
        let layout = Layout::of(self.manifest.geometry);
        let range = (TemplateId(entry.first_template), TemplateId(entry.last_template));
        let (new, count) =
            write_segment(&*self.storage, &self.dir, file, layout, &mut self.writer, range, rows.into_iter())?;
        folder::sync_dir(&*self.storage, &self.dir)?;
        let scan = Scan::of_new(layout.capacity, count);
        let entry = SegmentEntry { identity: new.identity, file, rows: count, ..entry };
        let old = std::mem::replace(&mut self.parts[segment], Part { entry, found: Some((new, scan)) });
        self.manifest.segments[segment] = entry;
        let rows = self.manifest.geometry.segment_rows;
        self.manifest.forgotten.retain(|row| row / rows != entry.slot);
        self.damage.retain(|damage| damage.segment != segment);
        self.codes_damage.retain(|damage| damage.segment != segment);
        self.doomed.push(self.dir.join(file_name(old.entry.file)));
        self.replaced = true;
        Ok(())
    }

    /// How long [`Unrepaired::finish`] waits for readers of an index that is opened again: 10 s unless set.
    pub fn set_reader_wait(&mut self, wait: Duration) {
        self.reader_wait = wait;
    }

    /// Finishes what a crash cut short and opens the index to readers.
    ///
    /// If it is opened again, this waits until no snapshot of it is held. From then on the reader it was
    /// opened over [is retired](Reader::is_retired), whether this succeeds or not.
    ///
    /// # Errors
    /// [`Error::Damaged`] while there is damage and [`Error::Readers`]: nothing was done.
    /// [`Error::Io`] if a repair could not be written; but a file that is no longer needed, and that the
    /// disk lets nobody overwrite, is only [reported](Index::left_over).
    pub fn finish(mut self) -> Result<Index, Error> {
        if let Some(first) = self.damage.first() {
            return Err(Error::Damaged { count: self.damage.len(), first: Box::new(first.clone()) });
        }
        if let Some(before) = &mut self.before {
            before.retire(self.reader_wait)?;
        }
        // A process that ended may have given the manifest its name and not synced that. Nothing is
        // overwritten that the manifest before it counts until that one cannot come back.
        folder::sync_dir(&*self.storage, &self.dir)?;
        self.finish_erasures()?;
        if self.replaced {
            // Whatever was forgotten is erased and synced by now.
            self.manifest.forgotten.clear();
            folder::write_manifest(&*self.storage, &self.dir, &self.manifest)?;
        }
        let mut removed = false;
        for path in std::mem::take(&mut self.doomed) {
            match destroy(&*self.storage, &path) {
                // A missing file was the damage.
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                // No manifest names it, so nothing of it is served; the next opening tries again.
                Err(Error::Io { source, .. }) if is_unreadable(&source) => self.left_over.push(path),
                destroyed => destroyed?,
            }
            removed = true;
        }
        folder::remove_new_manifest(&*self.storage, &self.dir)?;
        if removed {
            folder::sync_dir(&*self.storage, &self.dir)?;
        }
        Ok(Index::opened(self))
    }

    /// Erases rows that the manifest or the disk say are to be erased, and scrubs those that the
    /// manifest does not count: they may be templates of people who were forgotten since. Codes
    /// follow their rows.
    fn finish_erasures(&mut self) -> Result<(), Error> {
        let segment_rows = self.manifest.geometry.segment_rows;
        for part in &mut self.parts {
            let (segment, scan) = part.found.as_mut().expect("no segment is damaged");
            let forgotten: Vec<u32> = self
                .manifest
                .forgotten
                .iter()
                .filter(|&row| row / segment_rows == part.entry.slot)
                .map(|row| row % segment_rows)
                .collect();
            let mut gone = std::mem::take(&mut scan.half_gone);
            let live: Vec<u32> = forgotten.into_iter().filter(|&offset| scan.is_live(offset)).collect();
            for &offset in &live {
                segment.pages.mark_gone(offset, &mut self.writer)?;
            }
            // Also where the rows were found to be going: that may not have reached the disk.
            if !live.is_empty() || !gone.is_empty() {
                segment.pages.sync()?;
            }
            for offset in live {
                scan.live[offset as usize / 64] &= !(1 << (offset % 64));
                scan.live_count -= 1;
                scan.erased += 1;
                gone.push(offset);
            }
            // Nobody reads yet, and nobody any more, so this does not wait.
            let mut quiet = self.writer.quiet(Duration::ZERO)?;
            for &offset in &gone {
                segment.pages.scrub(offset, &MetaRecord::gone(), &mut quiet)?;
            }
            for &offset in &scan.stale {
                segment.pages.scrub(offset, &MetaRecord::never(), &mut quiet)?;
            }
            // Only after their rows are what they will be.
            let mut codes: BTreeSet<u32> = scan.half_coded.drain(..).chain(scan.miscoded.drain(..)).collect();
            let full = part.entry.rows / BLOCK_ROWS as u32;
            codes.extend(gone.iter().map(|offset| offset / BLOCK_ROWS as u32).filter(|&block| block < full));
            for &block in &codes {
                recode(&segment.pages, segment.identity, block, &mut quiet)?;
            }
            for &block in &scan.stale_codes {
                segment.pages.scrub_codes(block, &mut quiet)?;
            }
            drop(quiet);
            if !(gone.is_empty() && scan.stale.is_empty() && codes.is_empty() && scan.stale_codes.is_empty()) {
                segment.pages.sync()?;
                scan.stale.clear();
                scan.stale_codes.clear();
            }
        }
        Ok(())
    }

    /// Rows that the manifest says are to be erased and that have not begun to go.
    pub(crate) fn forgotten_live(&self) -> u64 {
        let rows = self.manifest.geometry.segment_rows;
        let is_live = |&&row: &&u32| {
            let part = self.parts.iter().find(|part| part.entry.slot == row / rows);
            let found = part.and_then(|part| part.found.as_ref());
            found.is_some_and(|(_, scan)| scan.is_live(row % rows))
        };
        self.manifest.forgotten.iter().filter(is_live).count() as u64
    }

    /// The segments with the numbers of their slots and their counts, for the writer.
    pub(crate) fn into_slots(parts: Vec<Part>) -> Vec<(u32, Slot, Scan)> {
        let slot = |part: Part| {
            let (segment, mut scan) = part.found.expect("no segment is damaged");
            let range = Some((TemplateId(part.entry.first_template), TemplateId(part.entry.last_template)));
            let live = LiveBits::of(std::mem::take(&mut scan.live));
            let segment = Arc::new(segment);
            let slot = Slot { segment, live, rows: part.entry.rows, range, dirty: false, listed: false };
            (part.entry.slot, slot, scan)
        };
        parts.into_iter().map(slot).collect()
    }
}

impl fmt::Debug for Unrepaired {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Unrepaired({}, lsn {}, {} damaged)", self.dir.display(), self.manifest.lsn.0, self.damage.len())
    }
}

/// Rows of all numbers a file could have: four thousand million files ago something went wrong.
pub(crate) fn file_numbers_spent() -> Error {
    Error::RowLimit { found: u64::from(u32::MAX) + 1, limit: u64::from(u32::MAX) }
}

/// Reads and checks one segment. The inner error is damage.
fn read_segment(
    storage: &dyn Storage,
    dir: &Path,
    entry: &SegmentEntry,
    layout: Layout,
    depth: Depth,
    writer: &Writer,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<Result<(Segment, Scan), Fault>, Error> {
    let path = dir.join(file_name(entry.file));
    let file = match storage.open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Err(Fault { offset: 0, kind: DamageKind::Missing, expected: 1, found: 0 }));
        }
        file => file.map_err(Error::io(&path, "open"))?,
    };
    let (expected, found) = (layout.file_bytes() as u64, file.len().map_err(Error::io(&path, "measure"))?);
    if found != expected {
        return Ok(Err(Fault { offset: expected.min(found), kind: DamageKind::Length, expected, found }));
    }
    if let Some(offset) = first_unreadable(&*file, expected).map_err(Error::io(&path, "read"))? {
        let expected = PAGE_BYTES as u64;
        return Ok(Err(Fault { offset, kind: DamageKind::Unreadable, expected, found: 0 }));
    }
    let mut header = vec![0; HEADER_BYTES];
    file.read_at(&mut header, 0).map_err(Error::io(&path, "read"))?;
    if let Err(fault) = check_header(&header, layout, entry.identity) {
        return Ok(Err(fault));
    }
    let pages = Pages::new(file, &path, layout)?;
    let mut done_rows = 0;
    let scan = scan(&pages, entry, depth, writer, &mut |rows| {
        done_rows += rows;
        progress(rows)
    });
    match scan {
        Some(scan) => Ok(Ok((Segment { identity: entry.identity, file: entry.file, path, pages }, scan))),
        None => Err(Error::Cancelled { done_rows }),
    }
}
