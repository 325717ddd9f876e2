//! Checks a whole folder and reports, without changing it.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use super::Unrepaired;
use super::check_codes::CodesCheck;
use crate::error::{Damage, Error};
use crate::format::Manifest;
use crate::storage::{Files, Storage};
use crate::types::{Contents, Geometry, Lsn, Origin};

/// The result of checking a whole folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyReport {
    /// The geometry of the index.
    pub geometry: Geometry,
    /// The LSN up to which it is complete.
    pub lsn: Lsn,
    /// Number of segments in the manifest.
    pub segments: usize,
    /// Number of rows that the manifest counts, including dead ones.
    pub rows: u64,
    /// Number of live rows in undamaged segments.
    pub live: u64,
    /// Summary of those rows, for comparison with the registry.
    pub contents: Contents,
    /// Number of erased rows in undamaged segments.
    pub erased: u64,
    /// Number of half-erased rows: a crash interrupted their erasure. Opening finishes it.
    pub erasures_unfinished: u64,
    /// Number of rows that the manifest calls forgotten and that are not erased yet. Opening erases them.
    pub forgotten: u64,
    /// Number of rows beyond those that count which are not all zero. Opening scrubs them.
    pub stale: u64,
    /// Length of all segment files, including holes.
    pub bytes: u64,
    /// The damaged segments, each once.
    pub damage: Vec<Damage>,
    /// Other segments whose codes are wrong, each once. Opening encodes their rows again.
    pub codes_damage: Vec<Damage>,
    /// Number of blocks whose codes are wrong, or should not exist, because a crash interrupted a change.
    /// Opening corrects them.
    pub codes_unfinished: u64,
}

impl VerifyReport {
    /// Whether there is no damage and nothing remains to be erased.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let unfinished = self.erasures_unfinished + self.forgotten + self.stale + self.codes_unfinished;
        self.damage.is_empty() && self.codes_damage.is_empty() && unfinished == 0
    }
}

/// Checks the index in `dir`: the manifest, headers, the checksum of every row, that erased rows are all
/// zero, and that codes are, byte for byte, those computed from the rows. Holds the folder's lock while it
/// runs, and changes nothing. `progress` gets `(rows done, rows in total)` from time to time and may cancel.
///
/// # Errors
/// [`Error::Locked`] if a writer has the folder; [`Error::ManifestMissing`], [`Error::ManifestCorrupt`],
/// [`Error::Version`], [`Error::WrongKey`], [`Error::WrongGallery`], [`Error::Io`]; [`Error::Cancelled`] if
/// `progress` cancelled. Damaged segments are in the report instead.
pub fn verify(
    dir: &Path,
    origin: Origin,
    progress: &dyn Fn(u64, u64) -> ControlFlow<()>,
) -> Result<VerifyReport, Error> {
    verify_on(Arc::new(Files), dir, origin, progress)
}

/// [`verify`] on the caller's storage.
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
    let index = Unrepaired::read(storage, dir, None, origin, CodesCheck::Recompute, &mut |manifest, done_rows| {
        progress(done_rows, total(manifest)).is_continue()
    })?;
    let scans = || index.parts.iter().filter_map(|part| part.found.as_ref()).map(|(_, scan)| scan);
    let geometry = index.geometry();
    let mut contents = Contents::default();
    for part in &index.parts {
        let Some((segment, scan)) = &part.found else { continue };
        let records = segment.pages.records(&index.token);
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
        erasures_unfinished: scans().map(|scan| scan.half_erased.len() as u64).sum(),
        forgotten: index.forgotten_live(),
        stale: scans().map(|scan| scan.stale.len() as u64).sum(),
        bytes: index.parts.len() as u64 * index.manifest.layout().file_bytes() as u64,
        damage: index.damage().to_vec(),
        codes_damage: index.codes_damage().to_vec(),
        codes_unfinished: scans().map(|scan| (scan.unfinished_codes.len() + scan.stale_codes.len()) as u64).sum(),
    })
}
