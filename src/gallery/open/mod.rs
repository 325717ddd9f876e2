//! Bringing the index up: from its own files if they are sound, otherwise from the registry.
//!
//! In order: a missing index is created; if the manifest cannot be read, or is ahead of the registry (an
//! older backup was restored), the whole index is rebuilt; a damaged segment is rewritten from the registry's
//! templates; then the log is replayed from the manifest's LSN. Then the index is compared with the registry:
//! if they differ, the registry was rolled back or replaced under the index, and the index is rebuilt. An
//! index of another gallery is refused. Each of these is reported. Whatever can fail without changing a file
//! of the index comes first, in `check`: an index that is being reopened serves searches until then.
//! Templates that cannot be opened are left out.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thenar_index::storage::Storage;
use thenar_index::{
    Contents, Error as IndexError, GalleryId, Geometry, Index, KeyId, Lsn, Origin, OwnedRow, Reader, Row, TemplateId,
    Unrepaired, source_of,
};

use super::progress::{LeftOut, Progress, REPLAY_CHUNK, open_template};
use super::{GalleryError, Setup};
use crate::registry::{GalleryIdentity, Registry};

/// Templates read from the registry at once while a segment is rebuilt.
const REBUILD_CHUNK: usize = 4096;
/// Replayed records between checkpoints, so that an interrupted rebuild continues from the last one.
const REPLAY_CHECKPOINT: u64 = 262_144;

/// How an index was opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OpenReport {
    /// Segments that were damaged and rewritten from the registry.
    pub segments_rebuilt: usize,
    /// Why the whole index was rebuilt, if it was.
    pub rebuilt_because: Option<String>,
    /// Log records replayed.
    pub replayed: u64,
    /// In total, until the first search could start.
    pub took: Duration,
}

/// Claims `identity` for the gallery of `registry`, whose index is in `dir`, and returns its id. As long as
/// nobody has been enrolled, another dimension makes it another gallery; the index of the former one, in which
/// there is nobody, is then removed first.
///
/// # Errors
/// [`GalleryError::Swapped`] if the index is another gallery's: it is left as it is. Others if registry or
/// index fail, or the gallery has another identity.
pub fn claim(
    registry: &dyn Registry,
    storage: &Arc<dyn Storage>,
    dir: &Path,
    identity: &GalleryIdentity,
) -> Result<GalleryId, GalleryError> {
    if let Some((claimed, gallery)) = registry.identity()?
        && claimed.key_id == identity.key_id
        && registry.last_lsn()? == Lsn(0)
        && Index::exists(dir)
    {
        match Index::open_on(Arc::clone(storage), dir, Origin { gallery, key: KeyId(claimed.key_id) }) {
            Ok(index) => {
                drop(index);
                if claimed.dim != identity.dim {
                    Index::wipe_on(&**storage, dir)?;
                }
            }
            // Its gallery is unknown; it is rebuilt when the gallery is opened.
            Err(IndexError::ManifestCorrupt { .. } | IndexError::ManifestMissing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(registry.claim_identity(identity)?)
}

/// What to do with the files in the index's folder, none of which has been changed yet.
pub(super) struct Checked {
    plan: Plan,
    report: OpenReport,
    started: Instant,
}

enum Plan {
    /// There is no index.
    Create,
    /// The index cannot be used, for this reason.
    Rebuild(String),
    /// The index is sound; its damaged segments have been rewritten, beside the others.
    Finish(Box<Unrepaired>),
}

/// Reads and checks the index. Readers of `before` continue meanwhile.
pub(super) fn check(setup: &Setup, before: Option<&Reader>) -> Result<Checked, GalleryError> {
    let started = Instant::now();
    let mut report = OpenReport::default();
    std::fs::create_dir_all(&setup.dir).map_err(|source| GalleryError::Folder { path: setup.dir.clone(), source })?;
    let last = setup.registry.last_lsn()?;
    let storage = Arc::clone(&setup.storage);
    let found = match before {
        Some(before) => Index::reopen_on(storage, before, setup.origin),
        None if Index::exists(&setup.dir) => Index::open_on(storage, &setup.dir, setup.origin),
        None => return Ok(Checked { plan: Plan::Create, report, started }),
    };
    let plan = match found {
        Ok(index) if index.lsn() > last => Plan::Rebuild(format!(
            "it holds change {} but the registry ends at {}: the registry is from an older backup",
            index.lsn().0,
            last.0
        )),
        Ok(mut index) => {
            rewrite_damaged(setup, &mut index, &mut report)?;
            Plan::Finish(Box::new(index))
        }
        Err(error @ (IndexError::ManifestCorrupt { .. } | IndexError::ManifestMissing { .. })) => {
            Plan::Rebuild(error.to_string())
        }
        Err(error) => return Err(error.into()),
    };
    Ok(Checked { plan, report, started })
}

impl Checked {
    /// Repairs and replays. Waits until readers of `before` hold no snapshot; they get none after that.
    pub(super) fn finish(
        self,
        setup: &Setup,
        before: Option<&Reader>,
    ) -> Result<(Index, Progress, OpenReport), GalleryError> {
        let Self { plan, mut report, started } = self;
        let (storage, geometry) = (Arc::clone(&setup.storage), Geometry::new(setup.dim));
        let mut index = match plan {
            Plan::Create => Index::create_on(storage, &setup.dir, geometry, setup.origin)?,
            Plan::Finish(index) => index.finish()?,
            Plan::Rebuild(reason) => {
                report.rebuild(reason);
                if let Some(before) = before {
                    Index::create_over(storage, before, geometry, setup.origin)?
                } else {
                    Index::wipe_on(&*storage, &setup.dir)?;
                    Index::create_on(storage, &setup.dir, geometry, setup.origin)?
                }
            }
        };
        for path in index.left_over() {
            let path = path.display();
            tracing::error!(%path, "a damaged file can be neither read nor overwritten; replace the disk");
        }
        let followed = match replay(setup, &mut index, &mut report) {
            Ok((progress, held)) => match compare(setup, &index, held)? {
                Ok(left_out) => Ok(Progress { left_out, ..progress }),
                Err(found) => Err(found.to_string()),
            },
            // A template of another history has this number.
            Err(GalleryError::Index(error @ IndexError::Order { .. })) => Err(error.to_string()),
            Err(error) => return Err(error),
        };
        let progress = match followed {
            Ok(progress) => progress,
            Err(found) => {
                report.rebuild(format!(
                    "it is not that of this registry, which was rolled back or replaced under it: {found}. What was \
                     changed after this copy of the registry was made is lost: enrolments are missing, and deletions \
                     must be made again"
                ));
                let reader = index.reader();
                drop(index);
                index = Index::create_over(Arc::clone(&setup.storage), &reader, geometry, setup.origin)?;
                let (progress, held) = replay(setup, &mut index, &mut report)?;
                let left_out = compare(setup, &index, held)?.map_err(|_| GalleryError::Contradiction)?;
                Progress { left_out, ..progress }
            }
        };
        report.took = started.elapsed();
        Ok((index, progress, report))
    }
}

impl OpenReport {
    fn rebuild(&mut self, reason: String) {
        tracing::error!(%reason, "the index is rebuilt from the registry");
        self.rebuilt_because = Some(reason);
    }
}

fn rewrite_damaged(setup: &Setup, index: &mut Unrepaired, report: &mut OpenReport) -> Result<(), GalleryError> {
    let mut damaged: Vec<(usize, TemplateId, TemplateId)> = Vec::new();
    for damage in index.damage() {
        tracing::error!(%damage, "a segment of the index is damaged; it is rewritten from the registry");
        damaged.push((damage.segment, damage.first_template, damage.last_template));
    }
    damaged.dedup_by_key(|d| d.0);
    for (segment, first, last) in damaged {
        let mut rows = Vec::new();
        let mut next = first;
        loop {
            let templates = setup.registry.templates_between(next, last, REBUILD_CHUNK)?;
            let Some(end) = templates.last() else { break };
            next = TemplateId(end.id.0 + 1);
            for template in &templates {
                let Some(row) = open_template(&setup.sealer, template) else { continue };
                rows.push(OwnedRow {
                    template: template.id,
                    subject: template.subject,
                    hand: template.hand as u8,
                    label: template.subject_id.as_str().into(),
                    source: source_of(&template.sealed),
                    vector: row.0.into_vec(),
                });
            }
        }
        index.replace_segment(segment, rows)?;
        report.segments_rebuilt += 1;
    }
    for damage in index.codes_damage() {
        tracing::error!(%damage, "codes of a segment are damaged; they are rebuilt from its rows");
    }
    Ok(())
}

/// Replays the log to its end. Returns the progress, and what the registry holds at that point.
fn replay(setup: &Setup, index: &mut Index, report: &mut OpenReport) -> Result<(Progress, Contents), GalleryError> {
    let mut progress = Progress::new(index.snapshot().lsn());
    let mut since_checkpoint = 0;
    let contents = loop {
        let records = setup.registry.log_after(progress.given, REPLAY_CHUNK)?;
        if records.is_empty() {
            let (last, contents) = setup.registry.contents()?;
            if last > progress.given {
                continue;
            }
            break contents;
        }
        progress.give(index, &setup.sealer, &records)?;
        drop(index.publish(progress.given));
        index.erase(&index.forgotten())?;
        report.replayed += records.len() as u64;
        since_checkpoint += records.len() as u64;
        if since_checkpoint >= REPLAY_CHECKPOINT {
            index.checkpoint()?;
            since_checkpoint = 0;
        }
    };
    if report.replayed > 0 || report.segments_rebuilt > 0 {
        index.checkpoint()?;
    }
    Ok((progress, contents))
}

/// How an index differs from the registry whose log it follows.
#[derive(Debug, Default, PartialEq, Eq)]
struct Differences {
    /// Templates that are on record but not in the index: their subjects are not found by them.
    missing: u64,
    /// Rows of templates that are not on record: people are found who are not enrolled.
    surplus: u64,
    /// Rows of another subject or another template than those on record.
    other: u64,
}

impl std::fmt::Display for Differences {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { missing, surplus, other } = self;
        write!(
            f,
            "{missing} templates on record are not in the index, {surplus} rows of it are not on record, and {other} \
             are another's"
        )
    }
}

/// Compares `index` with the registry, which holds `held`. Returns how they differ, or else which templates are
/// left out of the index because they cannot be opened. Reads nothing if the digests agree; otherwise compares
/// the two row by row.
fn compare(setup: &Setup, index: &Index, held: Contents) -> Result<Result<LeftOut, Differences>, GalleryError> {
    let mut left_out = LeftOut::new();
    if held == index.contents() {
        return Ok(Ok(left_out));
    }
    let snapshot = index.snapshot();
    let rows = 0..snapshot.rows_end();
    let mut held: HashMap<TemplateId, u128> =
        rows.filter_map(|row| snapshot.meta(Row(row))).map(|meta| (meta.template, meta.digest())).collect();
    let mut found = Differences::default();
    let mut next = TemplateId(0);
    loop {
        let templates = setup.registry.templates_between(next, TemplateId(u64::MAX), REBUILD_CHUNK)?;
        let Some(end) = templates.last() else { break };
        next = TemplateId(end.id.0 + 1);
        for template in &templates {
            match held.remove(&template.id) {
                // Such a template has no row, and none can be made from it.
                None if open_template(&setup.sealer, template).is_none() => {
                    left_out.insert(template.id, template.subject);
                }
                None => found.missing += 1,
                Some(digest) => found.other += u64::from(digest != template.meta().digest()),
            }
        }
    }
    found.surplus = held.len() as u64;
    if found != Differences::default() {
        return Ok(Err(found));
    }
    if left_out.is_empty() {
        return Err(GalleryError::Contradiction);
    }
    Ok(Ok(left_out))
}
