//! Checks a whole folder without changing it.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use crate::coding::Depth;
use crate::error::{Damage, Error};
use crate::manifest::Manifest;
use crate::nouns::{Contents, Geometry, Lsn, Origin};
use crate::open::Unrepaired;
use crate::storage::{Files, Storage};

/// What a check of a whole folder found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyReport {
    /// The shape of the index.
    pub geometry: Geometry,
    /// The change up to which it has everything.
    pub lsn: Lsn,
    /// Segments the manifest names.
    pub segments: usize,
    /// Rows the manifest counts, dead ones too.
    pub rows: u64,
    /// Rows that are whole and live, in segments without damage.
    pub live: u64,
    /// What those rows say of themselves: to compare with what the registry has.
    pub contents: Contents,
    /// Rows that are erased, in segments without damage.
    pub erased: u64,
    /// Erasures a crash cut short: their bytes are not all zero. Opening finishes them.
    pub erasures_unfinished: u64,
    /// Rows that are forgotten by the manifest and not erased yet. Opening erases them.
    pub forgotten: u64,
    /// Rows beyond those that count, which are not all zero. Opening scrubs them.
    pub stale: u64,
    /// Bytes of segment files, holes included.
    pub bytes: u64,
    /// The damaged segments, each once.
    pub damage: Vec<Damage>,
    /// Segments among the others whose codes are not those of their rows, each once. Opening makes
    /// them anew.
    pub codes_damage: Vec<Damage>,
    /// Blocks of rows whose codes are not those of the rows, or should be none, because a crash cut
    /// a change short. Opening puts them right.
    pub codes_unfinished: u64,
}

impl VerifyReport {
    /// Whether every row is as it was written and nothing remains to be erased.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let unfinished = self.erasures_unfinished + self.forgotten + self.stale + self.codes_unfinished;
        self.damage.is_empty() && self.codes_damage.is_empty() && unfinished == 0
    }
}

/// Checks the index in `dir`: manifest, headers, the checksum of every row, erased rows all zero,
/// and that codes are, byte for byte, those that are made from the rows. Takes the folder's lock
/// for as long as it runs and changes nothing. `progress` hears `(rows done, rows in all)` now and
/// then, and may break off.
///
/// # Errors
/// [`Error::Locked`] while a writer has the folder; [`Error::ManifestMissing`],
/// [`Error::ManifestCorrupt`], [`Error::Version`], [`Error::WrongKey`],
/// [`Error::WrongGallery`], [`Error::Io`];
/// [`Error::Cancelled`] where `progress` broke off. Damage of segments is in the report instead.
pub fn verify(
    dir: &Path,
    origin: Origin,
    progress: &dyn Fn(u64, u64) -> ControlFlow<()>,
) -> Result<VerifyReport, Error> {
    verify_on(Arc::new(Files), dir, origin, progress)
}

/// [`verify`] on a storage of the caller's.
///
/// # Errors
/// As [`verify`].
pub fn verify_on(
    storage: Arc<dyn Storage>,
    dir: &Path,
    origin: Origin,
    progress: &dyn Fn(u64, u64) -> ControlFlow<()>,
) -> Result<VerifyReport, Error> {
    let total = |manifest: &Manifest| manifest.segments.iter().map(|entry| u64::from(entry.rows)).sum();
    let index = Unrepaired::read(storage, dir, None, origin, Depth::Bytes, &mut |manifest, done_rows| {
        progress(done_rows, total(manifest)).is_continue()
    })?;
    let scans = || index.parts.iter().filter_map(|part| part.found.as_ref()).map(|(_, scan)| scan);
    let geometry = index.geometry();
    let mut contents = Contents::default();
    for part in &index.parts {
        let Some((segment, scan)) = &part.found else { continue };
        let records = segment.pages.records(&index.writer);
        let live = (0..part.entry.rows).filter(|&offset| scan.is_live(offset));
        live.for_each(|offset| contents.add(&records[offset as usize].meta()));
    }
    Ok(VerifyReport {
        geometry,
        lsn: index.lsn(),
        segments: index.parts.len(),
        rows: total(&index.manifest),
        live: scans().map(|scan| scan.live_count).sum(),
        contents,
        erased: scans().map(|scan| scan.erased).sum(),
        erasures_unfinished: scans().map(|scan| scan.half_gone.len() as u64).sum(),
        forgotten: index.forgotten_live(),
        stale: scans().map(|scan| scan.stale.len() as u64).sum(),
        bytes: index.parts.len() as u64 * index.manifest.layout().file_bytes() as u64,
        damage: index.damage().to_vec(),
        codes_damage: index.codes_damage().to_vec(),
        codes_unfinished: scans().map(|scan| (scan.half_coded.len() + scan.stale_codes.len()) as u64).sum(),
    })
}
