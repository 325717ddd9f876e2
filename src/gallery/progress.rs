//! How far an index has followed the log, and how a record of the log changes an index.
//!
//! A template that cannot be opened is damage of the registry: it is reported and left out.

use std::collections::BTreeMap;

use thenar_index::{Index, Lsn, NewRow, SubjectNumber, TemplateId, source_of};

use super::GalleryError;
use crate::model::TemplateRow;
use crate::registry::{Event, LogRecord, StoredTemplate};
use crate::vault::Sealer;

/// Log records read at once while catching up.
pub(super) const REPLAY_CHUNK: usize = 4096;

/// Templates that cannot be opened, with their subjects.
pub(super) type LeftOut = BTreeMap<TemplateId, SubjectNumber>;

/// How far an index has followed the log.
pub(super) struct Progress {
    /// The last change that the index has in full, whether or not searches see it.
    pub(super) given: Lsn,
    /// What was left out of the index.
    pub(super) left_out: LeftOut,
}

impl Progress {
    /// Of an index that has everything up to `given`.
    pub(super) fn new(given: Lsn) -> Self {
        Self { given, left_out: LeftOut::new() }
    }

    /// Gives records to the index without publishing them. If this fails, some may have been given.
    pub(super) fn give(
        &mut self,
        index: &mut Index,
        sealer: &Sealer,
        records: &[LogRecord],
    ) -> Result<(), GalleryError> {
        let mut added: Vec<(&StoredTemplate, TemplateRow)> = Vec::new();
        for record in records {
            match &record.event {
                // Deleted since: the record of the deletion follows.
                Event::Added { template: None, .. } => {}
                Event::Added { template: Some(template), .. } => match open_template(sealer, template) {
                    Some(row) => added.push((template, row)),
                    None => drop(self.left_out.insert(template.id, template.subject)),
                },
                Event::Removed { id, .. } => {
                    append(index, &mut added)?;
                    index.forget_template(*id);
                    self.left_out.remove(id);
                }
                Event::Forgotten { subject } => {
                    append(index, &mut added)?;
                    index.forget(*subject);
                    self.left_out.retain(|_, of| of != subject);
                }
            }
            // Those in `added` are appended together.
            if added.is_empty() {
                self.given = record.lsn;
            }
        }
        append(index, &mut added)?;
        self.given = records.last().map_or(self.given, |record| record.lsn);
        Ok(())
    }
}

fn append(index: &mut Index, added: &mut Vec<(&StoredTemplate, TemplateRow)>) -> Result<(), GalleryError> {
    let rows: Vec<NewRow<'_>> = added
        .iter()
        .map(|(template, row)| NewRow {
            template: template.id,
            subject: template.subject,
            hand: template.hand as u8,
            label: template.subject_id.as_str(),
            source: source_of(&template.sealed),
            vector: &row.0,
        })
        .collect();
    if !rows.is_empty() {
        index.append(&rows)?;
    }
    added.clear();
    Ok(())
}

/// The row of a template. `None`, and an error in the log, if the template cannot be opened: it is then left
/// out.
pub(super) fn open_template(sealer: &Sealer, template: &StoredTemplate) -> Option<TemplateRow> {
    let opened = sealer.open(template.subject_id.as_str(), template.hand, &template.sealed);
    opened
        .inspect_err(|error| {
            tracing::error!(template = template.id.0, %error, "a template of the registry is damaged; it is left out");
        })
        .ok()
}
