//! Opens an index: reads and checks its files, without writing to them.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::Unrepaired;
use super::check_codes::CodesCheck;
use super::scan::{Scan, scan};
use super::unrepaired::Part;
use crate::error::{DamageKind, Error, Fault};
use crate::format::{HEADER_BYTES, Layout, Manifest, SegmentEntry, check_header};
use crate::read::Reader;
use crate::reader_barrier::{WriteToken, reader_barrier};
use crate::storage::readable::{PAGE_BYTES, first_unreadable};
use crate::storage::{Files, Lock, Pages, Segment, Storage, directory};
use crate::types::{Origin, TemplateId};
use crate::write::{Index, READER_WAIT_DEFAULT, file_numbers_exhausted};

impl Index {
    /// Reads and checks the index in `dir`: every row, and the codes of every block. Nothing is written, and
    /// readers see nothing, until [`Unrepaired::finish`].
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::ManifestMissing`], [`Error::ManifestCorrupt`], [`Error::Version`],
    /// [`Error::WrongKey`], [`Error::WrongGallery`], [`Error::Io`]. Damaged segments are not an error here.
    pub fn open(dir: &Path, origin: Origin) -> Result<Unrepaired, Error> {
        Self::open_on(Arc::new(Files), dir, origin)
    }

    /// [`Index::open`] on the caller's storage.
    ///
    /// # Errors
    /// As [`Index::open`].
    pub fn open_on(storage: Arc<dyn Storage>, dir: &Path, origin: Origin) -> Result<Unrepaired, Error> {
        Unrepaired::read(storage, dir, None, origin, CodesCheck::Checksum, &mut |_, _| true)
    }

    /// As [`Index::open_on`], for the index that `before` reads from, whose writer must have been dropped. The
    /// lock is not released. `before` gives snapshots until [`Unrepaired::finish`].
    ///
    /// # Errors
    /// As [`Index::open`]; [`Error::Locked`] if there is another writer.
    pub fn reopen_on(storage: Arc<dyn Storage>, before: &Reader, origin: Origin) -> Result<Unrepaired, Error> {
        Unrepaired::read(storage, &before.shared.lock.dir, Some(before), origin, CodesCheck::Checksum, &mut |_, _| true)
    }
}

impl Unrepaired {
    /// Reads and checks the index in `dir`. `progress` gets the number of rows checked so far and returns
    /// whether to continue.
    pub(super) fn read(
        storage: Arc<dyn Storage>,
        dir: &Path,
        before: Option<&Reader>,
        origin: Origin,
        check: CodesCheck,
        progress: &mut dyn FnMut(&Manifest, u64) -> bool,
    ) -> Result<Self, Error> {
        if !directory::has_index(&*storage, dir)? {
            return Err(Error::ManifestMissing { path: dir.join(directory::MANIFEST_NAME) });
        }
        let (lock, before) = match before {
            None => (Arc::new(Lock::take(dir)?), None),
            Some(reader) => {
                let (lock, token) = reader.take_over()?;
                (lock, Some(token))
            }
        };
        let mut manifest = directory::read_manifest(&*storage, dir)?;
        if manifest.origin.key != origin.key {
            return Err(Error::WrongKey { expected: origin.key, found: manifest.origin.key });
        }
        if manifest.origin.gallery != origin.gallery {
            let (expected, found) = (origin.gallery, manifest.origin.gallery);
            return Err(Error::WrongGallery { dir: dir.to_owned(), expected, found });
        }
        let (reader_barrier, token) = reader_barrier();
        let (mut parts, mut damage, mut codes_damage, mut done_rows) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for (place, entry) in manifest.segments.iter().enumerate() {
            let mut on_step = |rows| {
                done_rows += rows;
                progress(&manifest, done_rows)
            };
            let found = read_segment(&*storage, dir, entry, manifest.layout(), check, &token, &mut on_step)?;
            let templates = (TemplateId(entry.first_template), TemplateId(entry.last_template));
            let segment_damage = |fault: Fault, bad_rows| {
                fault.in_segment(dir.join(directory::file_name(entry.file)), place, templates, bad_rows)
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
        let files = directory::segment_files(&*storage, dir)?;
        let named: BTreeSet<u32> = manifest.segments.iter().map(|entry| entry.file).collect();
        let obsolete = files
            .iter()
            .filter(|file| !named.contains(file))
            .map(|&file| dir.join(directory::file_name(file)))
            .collect();
        // The manifest counts the number of a file that was created after it as free.
        if let Some(last) = files.iter().max() {
            manifest.next_file = manifest.next_file.max(last.checked_add(1).ok_or_else(file_numbers_exhausted)?);
        }
        Ok(Self {
            lock,
            before,
            reader_wait: READER_WAIT_DEFAULT,
            storage,
            dir: dir.to_owned(),
            manifest,
            reader_barrier,
            token,
            parts,
            damage,
            codes_damage,
            obsolete,
            replaced: false,
            left_over: Vec::new(),
        })
    }
}

/// Reads and checks one segment. The inner error is its damage.
fn read_segment(
    storage: &dyn Storage,
    dir: &Path,
    entry: &SegmentEntry,
    layout: Layout,
    check: CodesCheck,
    token: &WriteToken,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<Result<(Segment, Scan), Fault>, Error> {
    let path = dir.join(directory::file_name(entry.file));
    let file = match storage.open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Err(Fault { offset: 0, kind: DamageKind::Missing, expected: 1, found: 0 }));
        }
        file => file.map_err(Error::io(&path, "open"))?,
    };
    let (expected, found) = (layout.file_bytes() as u64, file.size().map_err(Error::io(&path, "measure"))?);
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
    let scan = scan(&pages, entry, check, token, &mut |rows| {
        done_rows += rows;
        progress(rows)
    });
    match scan {
        Some(scan) => Ok(Ok((Segment { identity: entry.identity, file: entry.file, path, pages }, scan))),
        None => Err(Error::Cancelled { done_rows }),
    }
}
