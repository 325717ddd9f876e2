//! Reading: each call is one SELECT, so it sees one snapshot.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension as _, Row};
use thenar_index::{Contents, GalleryId, Lsn, SubjectNumber, TemplateId};

use super::sums::Sums;
use super::{damaged, failed, from_millis, stored};
use crate::model::{Hand, SUBJECT_ID_BYTES_MAX, SubjectId};
use crate::registry::{
    Event, GalleryIdentity, LogRecord, RegistryCounts, RegistryError, StoredTemplate, SubjectRecord, TemplateRecord,
};
use crate::vault::Filed;

/// Kind of a log record: a template was added.
pub(super) const ADDED: i64 = 1;
/// Kind of a log record: a template was deleted.
pub(super) const REMOVED: i64 = 2;
/// Kind of a log record: a subject was deleted.
pub(super) const FORGOTTEN: i64 = 3;

/// The row of counters. Numbers count from 1, so 0 is "none yet".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counters {
    pub(super) last_lsn: i64,
    pub(super) last_subject: i64,
    pub(super) last_template: i64,
    pub(super) subjects: i64,
    /// Of all templates.
    pub(super) contents: Contents,
    /// Milliseconds that the registry has been open altogether, as of the last commit.
    pub(super) open_ms: i64,
    pub(super) sums: Sums,
}

impl Counters {
    pub(super) fn last_lsn(&self) -> Lsn {
        Lsn(self.last_lsn.unsigned_abs())
    }

    pub(super) fn counts(&self) -> RegistryCounts {
        RegistryCounts { subjects: self.subjects.unsigned_abs(), templates: self.contents.rows }
    }
}

/// The counters as of the last commit.
pub(super) fn counters(conn: &Connection, path: &Path) -> Result<Counters, RegistryError> {
    let at = |e| failed(path, "reading its counters", e);
    let sql = "SELECT last_lsn, last_subject, last_template, subjects, templates, digest, sums, open_ms
               FROM counters WHERE id = 1";
    let (counters, templates) = conn
        .prepare_cached(sql)
        .map_err(at)?
        .query_row([], |row| {
            let templates: i64 = row.get(4)?;
            let digest = u128::from_le_bytes(row.get(5)?);
            let counters = Counters {
                last_lsn: row.get(0)?,
                last_subject: row.get(1)?,
                last_template: row.get(2)?,
                subjects: row.get(3)?,
                contents: Contents { rows: templates.unsigned_abs(), digest },
                sums: row.get_ref(6)?.as_blob().ok().and_then(Sums::from_bytes).unwrap_or_default(),
                open_ms: row.get(7)?,
            };
            Ok((counters, templates))
        })
        .map_err(at)?;
    let Counters { last_lsn, last_subject, last_template, subjects, open_ms, .. } = counters;
    if [last_lsn, last_subject, last_template, subjects, templates, open_ms].iter().any(|n| *n < 0) {
        return Err(damaged(path, "counter", 1));
    }
    Ok(counters)
}

/// The gallery's identity and its id, if they have been claimed.
pub(super) fn identity(conn: &Connection, path: &Path) -> Result<Option<(GalleryIdentity, GalleryId)>, RegistryError> {
    let row = conn
        .query_row("SELECT dim, key_id, gallery_id FROM gallery WHERE id = 1", [], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?, row.get::<_, Vec<u8>>(2)?))
        })
        .optional()
        .map_err(|e| failed(path, "reading the gallery's identity", e))?;
    let Some((dim, key_id, gallery_id)) = row else { return Ok(None) };
    match (usize::try_from(dim), key_id.try_into(), gallery_id.try_into()) {
        (Ok(dim), Ok(key_id), Ok(gallery_id)) => Ok(Some((GalleryIdentity { dim, key_id }, GalleryId(gallery_id)))),
        _ => Err(damaged(path, "gallery identity", 1)),
    }
}

/// The subject with that name, whose keyed hash is `key`, with its templates by ascending id.
pub(super) fn subject(
    conn: &Connection,
    path: &Path,
    key: &Filed,
    id: &SubjectId,
) -> Result<Option<SubjectRecord>, RegistryError> {
    let at = |e| failed(path, "reading a subject", e);
    let sql = "SELECT s.number, s.enrolled_at, t.id, t.hand, t.enrolled_at
               FROM subjects s LEFT JOIN templates t ON t.subject = s.number
               WHERE s.key = ?1 ORDER BY t.id";
    let mut statement = conn.prepare_cached(sql).map_err(at)?;
    let mut rows = statement.query([key]).map_err(at)?;
    let mut found: Option<SubjectRecord> = None;
    while let Some(row) = rows.next().map_err(at)? {
        let number: i64 = row.get(0).map_err(at)?;
        let record = match &mut found {
            Some(record) => record,
            None => found.insert(SubjectRecord {
                number: SubjectNumber(unsigned(path, "subject number", number, number)?),
                id: id.clone(),
                enrolled_at: from_millis(row.get(1).map_err(at)?)
                    .ok_or_else(|| damaged(path, "enrolment time of a subject", number))?,
                templates: Vec::new(),
            }),
        };
        let Some(template) = row.get::<_, Option<i64>>(2).map_err(at)? else {
            return Err(damaged(path, "subject without templates", number));
        };
        record.templates.push(TemplateRecord {
            id: TemplateId(unsigned(path, "template id", template, template)?),
            hand: hand(path, template, row.get(3).map_err(at)?)?,
            enrolled_at: from_millis(row.get(4).map_err(at)?)
                .ok_or_else(|| damaged(path, "enrolment time of a template", template))?,
        });
    }
    Ok(found)
}

/// The numbers of those of these subjects that are enrolled. The keys are passed as one JSON array, so that
/// any number of them takes one SELECT; CROSS JOIN makes SQLite look up each of them in the index.
pub(super) fn subject_numbers(
    conn: &Connection,
    path: &Path,
    keys: impl Iterator<Item = Filed>,
) -> Result<Vec<SubjectNumber>, RegistryError> {
    let at = |e| failed(path, "reading the numbers of subjects", e);
    let sql = "SELECT s.number FROM json_each(?1) AS wanted CROSS JOIN subjects s WHERE s.key = unhex(wanted.value)";
    let in_hex = |key: Filed| key.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let keys = serde_json::json!(keys.map(in_hex).collect::<Vec<_>>()).to_string();
    let mut statement = conn.prepare_cached(sql).map_err(at)?;
    let mut rows = statement.query([keys]).map_err(at)?;
    let mut numbers = Vec::new();
    while let Some(row) = rows.next().map_err(at)? {
        let number: i64 = row.get(0).map_err(at)?;
        numbers.push(SubjectNumber(unsigned(path, "subject number", number, number)?));
    }
    Ok(numbers)
}

/// Up to `limit` log records after `after`, ascending.
pub(super) fn log_after(
    conn: &Connection,
    path: &Path,
    after: Lsn,
    limit: usize,
) -> Result<Vec<LogRecord>, RegistryError> {
    let at = |e| failed(path, "reading its change log", e);
    let sql = "SELECT t.id, t.subject, n.content, t.hand, b.content, l.lsn, l.kind, l.subject, l.template
               FROM log l
               LEFT JOIN templates t ON l.kind = 1 AND t.id = l.template
               LEFT JOIN subjects s ON s.number = t.subject
               LEFT JOIN slots n ON n.slot = s.slot
               LEFT JOIN slots b ON b.slot = t.slot
               WHERE l.lsn > ?1 ORDER BY l.lsn LIMIT ?2";
    let mut statement = conn.prepare_cached(sql).map_err(at)?;
    let mut rows = statement.query([stored(after.0), limit.try_into().unwrap_or(i64::MAX)]).map_err(at)?;
    let mut records = Vec::new();
    while let Some(row) = rows.next().map_err(at)? {
        let lsn: i64 = row.get(5).map_err(at)?;
        let what = "log record";
        let subject = SubjectNumber(unsigned(path, what, lsn, row.get(7).map_err(at)?)?);
        let id = match row.get::<_, Option<i64>>(8).map_err(at)? {
            Some(id) => Some(TemplateId(unsigned(path, what, lsn, id)?)),
            None => None,
        };
        let event = match (row.get::<_, i64>(6).map_err(at)?, id) {
            (ADDED, Some(id)) => {
                let exists = row.get::<_, Option<i64>>(0).map_err(at)?.is_some();
                let template = if exists { Some(template_or_damaged(path, row)?) } else { None };
                Event::Added { id, template }
            }
            (REMOVED, Some(id)) => Event::Removed { subject, id },
            (FORGOTTEN, None) => Event::Forgotten { subject },
            _ => return Err(damaged(path, what, lsn)),
        };
        records.push(LogRecord { lsn: Lsn(unsigned(path, what, lsn, lsn)?), event });
    }
    Ok(records)
}

/// Up to `limit` templates from `first` to `last`, ascending.
pub(super) fn templates_between(
    conn: &Connection,
    path: &Path,
    first: TemplateId,
    last: TemplateId,
    limit: usize,
) -> Result<Vec<StoredTemplate>, RegistryError> {
    let at = |e| failed(path, "reading templates", e);
    let sql = "SELECT t.id, t.subject, n.content, t.hand, b.content
               FROM templates t
               LEFT JOIN subjects s ON s.number = t.subject
               LEFT JOIN slots n ON n.slot = s.slot
               LEFT JOIN slots b ON b.slot = t.slot
               WHERE t.id BETWEEN ?1 AND ?2 ORDER BY t.id LIMIT ?3";
    let mut statement = conn.prepare_cached(sql).map_err(at)?;
    let mut rows =
        statement.query([stored(first.0), stored(last.0), limit.try_into().unwrap_or(i64::MAX)]).map_err(at)?;
    let mut templates = Vec::new();
    while let Some(row) = rows.next().map_err(at)? {
        templates.push(template_or_damaged(path, row)?);
    }
    Ok(templates)
}

/// The template in columns 0 to 4: id, subject, name of the subject, hand, sealed bytes.
pub(super) fn stored_template(path: &Path, row: &Row<'_>) -> Result<StoredTemplate, RegistryError> {
    let at = |e| failed(path, "reading a template", e);
    let id: i64 = row.get(0).map_err(at)?;
    let subject: i64 = row.get(1).map_err(at)?;
    let name = row.get_ref(2).map_err(at)?.as_blob_or_null().ok().flatten().and_then(name);
    // Borrowed and copied once: rows are about a kilobyte.
    let Some(sealed) = row.get_ref(4).map_err(at)?.as_blob_or_null().ok().flatten() else {
        return Err(damaged(path, "template without its bytes", id));
    };
    Ok(StoredTemplate {
        id: TemplateId(unsigned(path, "template id", id, id)?),
        subject: SubjectNumber(unsigned(path, "subject of a template", id, subject)?),
        subject_id: name.ok_or_else(|| damaged(path, "subject of a template", id))?,
        hand: hand(path, id, row.get(3).map_err(at)?)?,
        sealed: sealed.into(),
    })
}

/// [`stored_template`] for an index, which continues without a damaged template: here that has no sealed
/// bytes, so that it cannot be opened, and nobody's name.
fn template_or_damaged(path: &Path, row: &Row<'_>) -> Result<StoredTemplate, RegistryError> {
    let at = |e| failed(path, "reading a template", e);
    match stored_template(path, row) {
        Err(RegistryError::Damaged { .. }) => {
            let (id, subject): (i64, i64) = (row.get(0).map_err(at)?, row.get(1).map_err(at)?);
            Ok(StoredTemplate {
                id: TemplateId(unsigned(path, "template id", id, id)?),
                subject: SubjectNumber(unsigned(path, "subject of a template", id, subject)?),
                subject_id: SubjectId::new("damaged").expect("it is a name"),
                hand: Hand::Unspecified,
                sealed: Box::default(),
            })
        }
        template => template,
    }
}

/// A name as its slot stores it: followed by zeros, so that names of all lengths can reuse the same slots.
pub(super) fn padded(name: &SubjectId) -> [u8; SUBJECT_ID_BYTES_MAX] {
    let bytes = name.as_str().as_bytes();
    std::array::from_fn(|i| bytes.get(i).copied().unwrap_or_default())
}

/// The name in [`padded`] bytes, if they are valid.
pub(super) fn name(padded: &[u8]) -> Option<SubjectId> {
    let end = padded.iter().position(|b| *b == 0).unwrap_or(padded.len());
    let (name, rest) = padded.split_at(end);
    let whole = padded.len() == SUBJECT_ID_BYTES_MAX && rest.iter().all(|b| *b == 0);
    SubjectId::new(std::str::from_utf8(name).ok().filter(|_| whole)?).ok()
}

fn hand(path: &Path, template: i64, code: i64) -> Result<Hand, RegistryError> {
    u8::try_from(code).ok().and_then(Hand::from_code).ok_or_else(|| damaged(path, "hand of a template", template))
}

fn unsigned(path: &Path, what: &'static str, key: i64, value: i64) -> Result<u64, RegistryError> {
    u64::try_from(value).map_err(|_| damaged(path, what, key))
}
