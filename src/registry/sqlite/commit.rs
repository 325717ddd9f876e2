//! One commit of many changes, each checked before it changes a row.
//!
//! Only its checks refuse a change, so nothing has to be undone within a commit, and no savepoints are
//! needed. Any other failure is the database's and undoes the whole commit.

use std::path::Path;
use std::time::SystemTime;

use rusqlite::{Connection, OptionalExtension as _};
use thenar_index::{Lsn, RowMeta, SubjectNumber, TemplateId, source_of};

use super::read::{self, ADDED, Counters, FORGOTTEN, REMOVED};
use super::requests::request;
use super::slots::Slots;
use super::statements::Statements;
use super::sums::{self, Row};
use super::writer::{Failure, sql};
use super::{damaged, from_millis, stored, to_millis};
use crate::model::{SubjectId, TEMPLATES_PER_SUBJECT_MAX};
use crate::registry::{
    Action, Change, Event, LogRecord, Outcome, RegistryError, SealedTemplate, Source, StoredTemplate, SubjectRecord,
    TemplateRecord,
};
use crate::vault::{Filed, RegistryKeys};

/// What is known of a request.
enum Before {
    Never,
    Done(Outcome),
    /// It is a line of a list, and its subject was deleted since: the answer "done" would be wrong, so it is
    /// processed again. The row's number.
    Stale(i64),
}

/// A commit in progress.
pub(super) struct Commit<'c> {
    path: &'c Path,
    conn: &'c Connection,
    keys: &'c RegistryKeys,
    statements: Statements<'c>,
    now: i64,
    /// See [`super::writer::Writer::open_ms`].
    open_ms: i64,
    counters: Counters,
    slots: Slots,
    records: Vec<LogRecord>,
}

/// What a commit leaves to the writer if it succeeds.
pub(super) struct Ended {
    pub(super) counters: Counters,
    pub(super) slots: Slots,
    pub(super) records: Vec<LogRecord>,
}

impl<'c> Commit<'c> {
    /// A commit on `conn`, which is in a transaction. `open_ms` dates the requests, see
    /// [`super::writer::Writer::open_ms`].
    pub(super) fn begin(
        conn: &'c Connection,
        path: &'c Path,
        keys: &'c RegistryKeys,
        open_ms: i64,
        counters: Counters,
        slots: Slots,
    ) -> Result<Self, Failure> {
        let statements = Statements::new(conn).map_err(sql("preparing a commit"))?;
        let now = to_millis(SystemTime::now());
        Ok(Self { path, conn, keys, statements, now, open_ms, counters, slots, records: Vec::new() })
    }

    pub(super) fn end(self) -> Ended {
        Ended { counters: self.counters, slots: self.slots, records: self.records }
    }

    pub(super) fn apply(&mut self, change: &Change) -> Result<Outcome, Failure> {
        let key = self.keys.request(change.request_id.as_str());
        let stale = match self.answered_before(&key, change)? {
            Before::Done(outcome) => return Ok(outcome),
            Before::Never => None,
            Before::Stale(seq) => Some(seq),
        };
        let outcome = match &change.action {
            Action::Enrol { subject, source, templates } => self.enrol(subject, *source, templates)?,
            Action::Update { subject, add, remove } => self.update(subject, add, remove)?,
            Action::Forget { subject } => self.forget(subject)?,
        };
        if let Outcome::Done { lsn, subject, .. } = &outcome {
            let at = sql("storing a request");
            if let Some(seq) = stale {
                let keys = self.keys;
                let sums = &mut self.counters.sums;
                let one = self.statements.find_request_row.query_row([seq], |row| {
                    sums.remove(keys, request(row)?);
                    Ok(())
                });
                one.and_then(|()| self.statements.delete_request.execute([seq])).map_err(&at)?;
            }
            let numbers = [
                self.open_ms,
                stored(lsn.0),
                stored(subject.number.0),
                to_millis(subject.enrolled_at),
                self.counters.last_template,
            ];
            let [done_at, lsn, subject, enrolled_at, last_template] = numbers;
            let row = (key, change.digest, done_at, lsn, subject, enrolled_at, last_template);
            let seq = self.statements.add_request.insert(row).map_err(&at)?;
            let numbers = [seq, done_at, lsn, subject, enrolled_at, last_template];
            self.counters.sums.add(self.keys, Row::Request(numbers, &key, &change.digest));
        }
        Ok(outcome)
    }

    fn answered_before(&mut self, key: &Filed, change: &Change) -> Result<Before, Failure> {
        let at = sql("looking for an earlier request");
        let mut rows = self.statements.find_request.query([key]).map_err(&at)?;
        let Some(row) = rows.next().map_err(&at)? else { return Ok(Before::Never) };
        if row.get_ref(0).map_err(&at)?.as_blob().ok() != Some(change.digest.as_slice()) {
            return Ok(Before::Done(Outcome::RequestIdReused));
        }
        let number: i64 = row.get(2).map_err(&at)?;
        let last_template: i64 = row.get(4).map_err(&at)?;
        let seq = row.get(5).map_err(&at)?;
        let lsn = Lsn(row.get::<_, i64>(1).map_err(&at)?.unsigned_abs());
        let enrolled_at =
            from_millis(row.get(3).map_err(&at)?).ok_or_else(|| damaged(self.path, "request of a subject", number))?;
        drop(rows);
        let name = match &change.action {
            Action::Enrol { subject, .. } | Action::Update { subject, .. } | Action::Forget { subject } => subject,
        };
        let number = SubjectNumber(number.unsigned_abs());
        // The name may belong to another subject by now, with another number.
        let templates = match self.subject(name)? {
            Some(mut now) if now.number == number => {
                now.templates.retain(|t| t.id.0 <= last_template.unsigned_abs());
                now.templates
            }
            _ if matches!(change.action, Action::Enrol { source: Source::List { .. }, .. }) => {
                return Ok(Before::Stale(seq));
            }
            _ => Vec::new(),
        };
        let subject = SubjectRecord { number, id: name.clone(), enrolled_at, templates };
        Ok(Before::Done(Outcome::Done { lsn, subject, replayed: true }))
    }

    fn enrol(&mut self, id: &SubjectId, source: Source, templates: &[SealedTemplate]) -> Result<Outcome, Failure> {
        let key = self.keys.subject(id.as_str());
        if self.statements.find_subject.exists([key]).map_err(sql("looking for a subject"))? {
            return Ok(Outcome::SubjectExists);
        }
        let forgotten = self.statements.find_forgotten.query_row([key], |row| row.get(0)).optional();
        let forgotten: Option<i64> = forgotten.map_err(sql("looking for an earlier deletion"))?;
        if let (Some(at), Source::List { after_forget }) = (forgotten, source)
            && after_forget.is_none_or(|until| to_millis(until) < at)
        {
            let at = from_millis(at).ok_or_else(|| damaged(self.path, "time of a deletion", at))?;
            return Ok(Outcome::Forgotten { at });
        }
        if !(1..=TEMPLATES_PER_SUBJECT_MAX).contains(&templates.len()) {
            return Ok(Outcome::TemplateCount(templates.len()));
        }
        if let Some(at) = forgotten {
            self.counters.sums.remove(self.keys, Row::Forgotten([at], &key));
            self.statements.delete_forgotten.execute([key]).map_err(sql("taking an earlier deletion back"))?;
        }
        self.counters.last_subject += 1;
        self.counters.subjects += 1;
        let number = self.counters.last_subject;
        let slot = self.slots.put(&mut self.statements, &read::padded(id))?;
        let row = (number, key, slot, self.now);
        self.statements.add_subject.execute(row).map_err(sql("storing a subject"))?;
        self.counters.sums.add(self.keys, Row::Subject([number, self.now], &read::padded(id)));
        let mut subject = SubjectRecord {
            number: SubjectNumber(number.unsigned_abs()),
            id: id.clone(),
            enrolled_at: from_millis(self.now).ok_or_else(|| damaged(self.path, "system clock", self.now))?,
            templates: Vec::with_capacity(templates.len()),
        };
        for template in templates {
            self.add(&mut subject, template)?;
        }
        Ok(self.done(subject))
    }

    fn update(&mut self, id: &SubjectId, add: &[SealedTemplate], remove: &[TemplateId]) -> Result<Outcome, Failure> {
        let Some(mut subject) = self.subject(id)? else { return Ok(Outcome::NoSuchSubject) };
        let mut kept = subject.templates.clone();
        for gone in remove {
            match kept.iter().position(|t| t.id == *gone) {
                Some(at) => drop(kept.remove(at)),
                None => return Ok(Outcome::NoSuchTemplate(*gone)),
            }
        }
        let count = kept.len() + add.len();
        if !(1..=TEMPLATES_PER_SUBJECT_MAX).contains(&count) {
            return Ok(Outcome::TemplateCount(count));
        }
        subject.templates = kept;
        for template in add {
            self.add(&mut subject, template)?;
        }
        for gone in remove {
            self.delete_template(&subject, *gone)?;
            self.append(subject.number, Event::Removed { subject: subject.number, id: *gone })?;
        }
        Ok(self.done(subject))
    }

    fn forget(&mut self, id: &SubjectId) -> Result<Outcome, Failure> {
        let Some(subject) = self.subject(id)? else { return Ok(Outcome::NoSuchSubject) };
        for template in &subject.templates {
            self.delete_template(&subject, template.id)?;
        }
        let number = stored(subject.number.0);
        let slot =
            self.statements.find_name.query_row([number], |row| row.get(0)).map_err(sql("deleting a subject"))?;
        let numbers = [number, to_millis(subject.enrolled_at)];
        self.counters.sums.remove(self.keys, Row::Subject(numbers, &read::padded(id)));
        self.slots
            .clear(&mut self.statements, slot)
            .map_err(|e| e.unwrap_or_else(|| damaged(self.path, "subject without a name", number).into()))?;
        self.statements.delete_subject.execute([number]).map_err(sql("deleting a subject"))?;
        let key = self.keys.subject(id.as_str());
        self.statements.add_forgotten.execute((key, self.now)).map_err(sql("remembering a deletion"))?;
        self.counters.sums.add(self.keys, Row::Forgotten([self.now], &key));
        self.counters.subjects -= 1;
        self.append(subject.number, Event::Forgotten { subject: subject.number })?;
        Ok(self.done(subject))
    }

    fn done(&self, subject: SubjectRecord) -> Outcome {
        Outcome::Done { lsn: self.counters.last_lsn(), subject, replayed: false }
    }

    fn subject(&self, id: &SubjectId) -> Result<Option<SubjectRecord>, RegistryError> {
        read::subject(self.conn, self.path, &self.keys.subject(id.as_str()), id)
    }

    fn add(&mut self, subject: &mut SubjectRecord, template: &SealedTemplate) -> Result<(), Failure> {
        let slot = self.slots.put(&mut self.statements, &template.sealed)?;
        self.counters.last_template += 1;
        let id = self.counters.last_template;
        let row = (id, stored(subject.number.0), template.hand as u8, self.now, slot);
        self.statements.add_template.execute(row).map_err(sql("storing a template"))?;
        let numbers = [id, stored(subject.number.0), i64::from(template.hand as u8), self.now];
        self.counters.sums.add(self.keys, Row::Template(numbers, &template.sealed));
        let id = TemplateId(id.unsigned_abs());
        let enrolled_at = from_millis(self.now).ok_or_else(|| damaged(self.path, "system clock", self.now))?;
        subject.templates.push(TemplateRecord { id, hand: template.hand, enrolled_at });
        let copy = StoredTemplate {
            id,
            subject: subject.number,
            subject_id: subject.id.clone(),
            hand: template.hand,
            sealed: template.sealed.clone(),
        };
        self.counters.contents.add(&copy.meta());
        self.append(subject.number, Event::Added { id, template: Some(copy) })
    }

    fn delete_template(&mut self, subject: &SubjectRecord, template: TemplateId) -> Result<(), Failure> {
        let at = sql("deleting a template");
        let id = stored(template.0);
        let path = self.path;
        let without_bytes = || Failure::from(damaged(path, "template without its bytes", id));
        let (keys, sums) = (self.keys, &mut self.counters.sums);
        let found = self.statements.find_template.query_row([id], |row| {
            let sealed = row.get_ref(4)?.as_blob()?;
            let (hand, enrolled_at): (u8, i64) = (row.get(2)?, row.get(3)?);
            let numbers = [id, row.get(1)?, i64::from(hand), enrolled_at];
            sums.remove(keys, Row::Template(numbers, sealed));
            Ok((row.get(0)?, hand, source_of(sealed)))
        });
        let (slot, hand, source) = found.optional().map_err(&at)?.ok_or_else(without_bytes)?;
        self.slots.clear(&mut self.statements, slot).map_err(|e| e.unwrap_or_else(without_bytes))?;
        self.statements.delete_template.execute([id]).map_err(&at)?;
        let label = subject.id.as_str();
        self.counters.contents.remove(&RowMeta { template, subject: subject.number, hand, label, source });
        Ok(())
    }

    fn append(&mut self, subject: SubjectNumber, event: Event) -> Result<(), Failure> {
        let (kind, template) = match &event {
            Event::Added { id, .. } => (ADDED, Some(stored(id.0))),
            Event::Removed { id, .. } => (REMOVED, Some(stored(id.0))),
            Event::Forgotten { .. } => (FORGOTTEN, None),
        };
        self.counters.last_lsn += 1;
        let row = (self.counters.last_lsn, kind, stored(subject.0), template);
        self.statements.add_record.execute(row).map_err(sql("appending to its change log"))?;
        let numbers = [self.counters.last_lsn, kind, stored(subject.0), template.unwrap_or(sums::NO_TEMPLATE)];
        self.counters.sums.add(self.keys, Row::Log(numbers));
        self.records.push(LogRecord { lsn: self.counters.last_lsn(), event });
        Ok(())
    }
}
