//! Writing: commits of many changes, each checked before it touches a row.
//!
//! A change is refused by its checks alone, so nothing has to be undone within a commit and no
//! savepoints are paid for. Any other failure is the database's and undoes the whole commit; the
//! counters in memory move only when SQLite's COMMIT has returned.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rusqlite::{CachedStatement, Connection, OptionalExtension as _, Transaction, TransactionBehavior, ffi};
use thenar_index::{GalleryId, Lsn, RowMeta, SubjectNumber, TemplateId, source_of};

use super::read::{self, ADDED, Counters, FORGOTTEN, REMOVED};
use super::sums::{self, Row};
use super::{damaged, failed, from_millis, scrub, stored, to_millis};
use crate::model::{SubjectId, TEMPLATES_PER_SUBJECT_MAX};
use crate::registry::{
    Action, Change, Committed, Event, GalleryIdentity, LogRecord, Outcome, RegistryError, SealedTemplate, Source,
    StoredTemplate, SubjectRecord, TemplateRecord,
};
use crate::vault::{Filed, RegistryKeys};

/// Requests as [`request`] takes them.
pub(super) const ALL_REQUESTS_IN_ORDER: &str =
    "SELECT seq, done_at, lsn, subject, enrolled_at, last_template, key, digest
    FROM requests ORDER BY seq LIMIT ?1";

/// The writing connection and what it knows of the committed state.
pub(super) struct Writer {
    conn: Connection,
    keys: RegistryKeys,
    counters: Counters,
    last_slot: i64,
    free_slots: i64,
    opened: Instant,
    /// How long the registry had been open before that.
    open_ms_before: i64,
    /// A sync failed: nothing more is written (see [`RegistryError::WriterStopped`]).
    stopped: bool,
}

impl Writer {
    /// Reads the counters, and checks that they are those that were stored under this key, and that no row
    /// is beyond them: numbers would be given out twice.
    pub(super) fn new(conn: Connection, path: &Path, keys: RegistryKeys) -> Result<Self, RegistryError> {
        let counters = read::counters(&conn, path)?;
        if let Some((claimed, _)) = read::identity(&conn, path)? {
            let found = GalleryIdentity { key_id: keys.key_id(), ..claimed };
            refuse_another(&claimed, &found)?;
        }
        if !sums::are_sound(&conn, &keys, &counters).map_err(|e| failed(path, "checking its counters", e))? {
            return Err(damaged(path, "row of counters", 1));
        }
        let number = |sql| {
            conn.query_row(sql, [], |row| row.get::<_, Option<i64>>(0))
                .map(Option::unwrap_or_default)
                .map_err(|e| failed(path, "reading its newest rows", e))
        };
        if number("SELECT max(lsn) FROM log")? != counters.last_lsn {
            return Err(damaged(path, "counter of log records", counters.last_lsn));
        }
        if number("SELECT max(number) FROM subjects")? > counters.last_subject {
            return Err(damaged(path, "counter of subjects", counters.last_subject));
        }
        if number("SELECT max(id) FROM templates")? > counters.last_template {
            return Err(damaged(path, "counter of templates", counters.last_template));
        }
        let last_slot = number("SELECT max(slot) FROM slots")?;
        let free_slots = number("SELECT count(*) FROM free_slots")?;
        Ok(Self {
            conn,
            keys,
            counters,
            last_slot,
            free_slots,
            opened: Instant::now(),
            open_ms_before: counters.open_ms,
            stopped: false,
        })
    }

    #[cfg(test)]
    pub(super) fn connection(&self) -> &Connection {
        &self.conn
    }

    /// See `Registry::scrub`. A registry in doubt is left as it is: its log may hold the commit.
    pub(super) fn scrub(&self, path: &Path) -> Result<(), RegistryError> {
        self.refuse_if_stopped(path)?;
        scrub::scrub(&self.conn, path)
    }

    /// See `Registry::claim_identity`.
    pub(super) fn claim_identity(
        &mut self,
        path: &Path,
        identity: &GalleryIdentity,
    ) -> Result<GalleryId, RegistryError> {
        if let Some((claimed, id)) = read::identity(&self.conn, path)? {
            // As long as nothing has happened in it, it may become another gallery.
            if claimed.key_id != identity.key_id || claimed.dim == identity.dim || self.counters.last_lsn > 0 {
                return refuse_another(&claimed, identity).map(|()| id);
            }
        }
        self.refuse_if_stopped(path)?;
        let dim = stored(identity.dim as u64);
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(RegistryError::NoRandomness)?;
        let claim = |writer: &mut Self| -> rusqlite::Result<()> {
            let tx = Transaction::new(&mut writer.conn, TransactionBehavior::Immediate)?;
            tx.execute("INSERT OR REPLACE INTO gallery VALUES (1, ?1, ?2, ?3)", (dim, identity.key_id, id))?;
            sums::store(&tx, &writer.keys, &writer.counters)?;
            tx.commit()
        };
        claim(self).map(|()| GalleryId(id)).map_err(|e| self.write_failed(path, "claiming its identity", e))
    }

    /// See `Registry::commit`.
    pub(super) fn commit(&mut self, path: &Path, changes: &[Change]) -> Result<Committed, RegistryError> {
        self.refuse_if_stopped(path)?;
        match self.try_commit(path, changes) {
            Ok(committed) => Ok(committed),
            Err(failure) => Err(self.failure(path, failure)),
        }
    }

    fn try_commit(&mut self, path: &Path, changes: &[Change]) -> Result<Committed, Failure> {
        let open_ms = self.open_ms();
        // Dropped on the way out of an error, it rolls back.
        let tx = Transaction::new(&mut self.conn, TransactionBehavior::Immediate).map_err(sql("beginning a commit"))?;
        let (outcomes, records, mut counters, last_slot, free_slots) = {
            let mut batch = Batch {
                path,
                conn: &tx,
                keys: &self.keys,
                statements: Statements::new(&tx).map_err(sql("preparing a commit"))?,
                now: to_millis(SystemTime::now()),
                open_ms,
                counters: self.counters,
                last_slot: self.last_slot,
                free_slots: self.free_slots,
                records: Vec::with_capacity(changes.len()),
            };
            let outcomes = changes.iter().map(|change| batch.apply(change)).collect::<Result<Vec<_>, _>>()?;
            (outcomes, batch.records, batch.counters, batch.last_slot, batch.free_slots)
        };
        if counters != self.counters {
            counters.open_ms = open_ms;
            sums::store(&tx, &self.keys, &counters).map_err(sql("storing its counters"))?;
        }
        tx.commit().map_err(Failure::Commit)?;
        self.counters = counters;
        self.last_slot = last_slot;
        self.free_slots = free_slots;
        Ok(Committed { outcomes, records })
    }

    /// See `Registry::prune_requests`. Keeps the time that the registry was open, too, for one to
    /// which nothing is written.
    pub(super) fn prune_requests(&mut self, path: &Path, kept: Duration, limit: usize) -> Result<u64, RegistryError> {
        self.refuse_if_stopped(path)?;
        match self.try_prune(kept, limit) {
            Ok(pruned) => Ok(pruned),
            Err(failure) => Err(self.failure(path, failure)),
        }
    }

    fn try_prune(&mut self, kept: Duration, limit: usize) -> Result<u64, Failure> {
        let at = sql("forgetting old requests");
        let mut counters = self.counters;
        counters.open_ms = self.open_ms();
        let young = counters.open_ms.saturating_sub(i64::try_from(kept.as_millis()).unwrap_or(i64::MAX));
        let tx = Transaction::new(&mut self.conn, TransactionBehavior::Immediate).map_err(&at)?;
        let pruned = Self::prune(&tx, &self.keys, &mut counters, young, limit).map_err(&at)?;
        tx.commit().map_err(Failure::Commit)?;
        self.counters = counters;
        Ok(pruned)
    }

    fn prune(
        tx: &Transaction<'_>,
        keys: &RegistryKeys,
        counters: &mut Counters,
        young: i64,
        limit: usize,
    ) -> rusqlite::Result<u64> {
        let mut old = tx.prepare_cached(ALL_REQUESTS_IN_ORDER)?;
        let mut rows = old.query([stored(limit as u64)])?;
        let (mut pruned, mut last) = (0, None);
        while let Some(row) = rows.next()?
            && row.get::<_, i64>(1)? < young
        {
            counters.sums.remove(keys, request(row)?);
            last = Some(row.get::<_, i64>(0)?);
            pruned += 1;
        }
        if let Some(last) = last {
            tx.prepare_cached("DELETE FROM requests WHERE seq <= ?1")?.execute([last])?;
        }
        sums::store(tx, keys, counters)?;
        Ok(pruned)
    }

    /// How long the registry has been open altogether, in milliseconds: what requests are dated by.
    /// No clock that can be set goes into it, so none that leaps makes a request older than it is.
    fn open_ms(&self) -> i64 {
        let elapsed = i64::try_from(self.opened.elapsed().as_millis()).unwrap_or(i64::MAX);
        self.open_ms_before.saturating_add(elapsed)
    }

    /// Lets time pass.
    #[cfg(test)]
    pub(super) fn pass(&mut self, time: Duration) {
        self.open_ms_before += i64::try_from(time.as_millis()).unwrap();
    }

    /// The error for what undid a transaction.
    fn failure(&mut self, path: &Path, failure: Failure) -> RegistryError {
        match failure {
            Failure::Sql(doing, e) => self.write_failed(path, doing, e),
            Failure::Commit(e) => self.commit_failed(path, "committing", e),
            Failure::Registry(e) => e,
        }
    }

    fn refuse_if_stopped(&self, path: &Path) -> Result<(), RegistryError> {
        if self.stopped { Err(RegistryError::WriterStopped { path: path.to_owned() }) } else { Ok(()) }
    }

    /// The error for a failed statement. Only one that commits by itself syncs.
    fn write_failed(&mut self, path: &Path, doing: &'static str, e: rusqlite::Error) -> RegistryError {
        match e.sqlite_error().map(|e| e.extended_code) {
            Some(ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC) => self.commit_failed(path, doing, e),
            _ => failed(path, doing, e),
        }
    }

    /// The error for a failed COMMIT. The mark that makes a transaction one is written last, so a
    /// write that failed, for want of room say, means that it is not there. After any other failure
    /// it may be: SQLite recovers it from the log where it finds it whole. And after a failed sync
    /// the kernel may have dropped the dirty pages and call the next sync a success, so there must
    /// be no next one.
    fn commit_failed(&mut self, path: &Path, doing: &'static str, source: rusqlite::Error) -> RegistryError {
        if let Some(ffi::SQLITE_FULL | ffi::SQLITE_IOERR_WRITE) = source.sqlite_error().map(|e| e.extended_code) {
            return failed(path, doing, source);
        }
        self.stopped = true;
        RegistryError::InDoubt { path: path.to_owned(), doing, source }
    }
}

/// What undoes a commit.
enum Failure {
    Sql(&'static str, rusqlite::Error),
    /// The last step failed.
    Commit(rusqlite::Error),
    Registry(RegistryError),
}

impl From<RegistryError> for Failure {
    fn from(e: RegistryError) -> Self {
        Self::Registry(e)
    }
}

fn sql(doing: &'static str) -> impl Fn(rusqlite::Error) -> Failure {
    move |e| Failure::Sql(doing, e)
}

/// What there is of a request.
enum Before {
    Never,
    Done(Outcome),
    /// It is a line of a list, and its subject has gone since: "done" would be wrong, so it is looked at
    /// anew. The row's number.
    Stale(i64),
}

/// The request in the columns of [`ALL_REQUESTS_IN_ORDER`].
pub(super) fn request<'r>(row: &'r rusqlite::Row<'_>) -> rusqlite::Result<Row<'r>> {
    let numbers = [row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?];
    Ok(Row::Request(numbers, row.get_ref(6)?.as_blob()?, row.get_ref(7)?.as_blob()?))
}

/// One commit under way.
struct Batch<'c> {
    path: &'c Path,
    conn: &'c Connection,
    keys: &'c RegistryKeys,
    statements: Statements<'c>,
    now: i64,
    /// See [`Writer::open_ms`].
    open_ms: i64,
    counters: Counters,
    last_slot: i64,
    free_slots: i64,
    records: Vec<LogRecord>,
}

impl Batch<'_> {
    fn apply(&mut self, change: &Change) -> Result<Outcome, Failure> {
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
        // The name may belong to somebody else by now: a subject of another number.
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
        let slot = self.put(&read::padded(id))?;
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
        self.clear(slot)
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

    /// Stores bytes in a slot: a free one of their length if there is one.
    fn put(&mut self, content: &[u8]) -> Result<i64, Failure> {
        let at = sql("filling a slot");
        let bytes = stored(content.len() as u64);
        let free = if self.free_slots == 0 {
            None
        } else {
            self.statements.find_free.query_row([bytes], |row| row.get::<_, i64>(0)).optional().map_err(&at)?
        };
        if let Some(slot) = free {
            self.free_slots -= 1;
            self.statements.delete_free.execute([bytes, slot]).map_err(&at)?;
            self.statements.fill_slot.execute((slot, content)).map_err(&at)?;
            return Ok(slot);
        }
        self.last_slot += 1;
        self.statements.add_slot.execute((self.last_slot, content)).map_err(&at)?;
        Ok(self.last_slot)
    }

    /// Zeroes a slot and frees it. The inner error is `None` if there is no such slot.
    fn clear(&mut self, slot: i64) -> Result<(), Option<Failure>> {
        let at = |e| Some(sql("clearing a slot")(e));
        let bytes = self.statements.find_bytes.query_row([slot], |row| row.get::<_, i64>(0)).optional();
        let bytes = bytes.map_err(at)?.ok_or(None)?;
        self.statements.zero_slot.execute([slot]).map_err(at)?;
        self.statements.add_free.execute([bytes, slot]).map_err(at)?;
        self.free_slots += 1;
        Ok(())
    }

    fn add(&mut self, subject: &mut SubjectRecord, template: &SealedTemplate) -> Result<(), Failure> {
        let slot = self.put(&template.sealed)?;
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
        self.clear(slot).map_err(|e| e.unwrap_or_else(without_bytes))?;
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

/// The statements of a commit, looked up once for all of its changes.
struct Statements<'c> {
    find_request: CachedStatement<'c>,
    find_request_row: CachedStatement<'c>,
    delete_request: CachedStatement<'c>,
    add_request: CachedStatement<'c>,
    find_subject: CachedStatement<'c>,
    add_subject: CachedStatement<'c>,
    delete_subject: CachedStatement<'c>,
    add_template: CachedStatement<'c>,
    delete_template: CachedStatement<'c>,
    find_template: CachedStatement<'c>,
    find_name: CachedStatement<'c>,
    find_bytes: CachedStatement<'c>,
    add_slot: CachedStatement<'c>,
    fill_slot: CachedStatement<'c>,
    zero_slot: CachedStatement<'c>,
    find_free: CachedStatement<'c>,
    add_free: CachedStatement<'c>,
    delete_free: CachedStatement<'c>,
    add_record: CachedStatement<'c>,
    find_forgotten: CachedStatement<'c>,
    add_forgotten: CachedStatement<'c>,
    delete_forgotten: CachedStatement<'c>,
}

impl<'c> Statements<'c> {
    fn new(conn: &'c Connection) -> rusqlite::Result<Self> {
        let prepare = |sql| conn.prepare_cached(sql);
        Ok(Self {
            find_request: prepare(
                "SELECT digest, lsn, subject, enrolled_at, last_template, seq FROM requests WHERE key = ?1",
            )?,
            find_request_row: prepare(
                "SELECT seq, done_at, lsn, subject, enrolled_at, last_template, key, digest
                 FROM requests WHERE seq = ?1",
            )?,
            delete_request: prepare("DELETE FROM requests WHERE seq = ?1")?,
            add_request: prepare("INSERT INTO requests VALUES (NULL, ?1, ?2, ?3, ?4, ?5, ?6, ?7)")?,
            find_subject: prepare("SELECT 1 FROM subjects WHERE key = ?1")?,
            add_subject: prepare("INSERT INTO subjects VALUES (?1, ?2, ?3, ?4)")?,
            delete_subject: prepare("DELETE FROM subjects WHERE number = ?1")?,
            add_template: prepare("INSERT INTO templates VALUES (?1, ?2, ?3, ?4, ?5)")?,
            delete_template: prepare("DELETE FROM templates WHERE id = ?1")?,
            find_template: prepare(
                "SELECT t.slot, t.subject, t.hand, t.enrolled_at, b.content
                 FROM templates t JOIN slots b ON b.slot = t.slot WHERE t.id = ?1",
            )?,
            find_name: prepare("SELECT slot FROM subjects WHERE number = ?1")?,
            find_bytes: prepare("SELECT length(content) FROM slots WHERE slot = ?1")?,
            add_slot: prepare("INSERT INTO slots VALUES (?1, ?2)")?,
            fill_slot: prepare("UPDATE slots SET content = ?2 WHERE slot = ?1")?,
            zero_slot: prepare("UPDATE slots SET content = zeroblob(length(content)) WHERE slot = ?1")?,
            find_free: prepare("SELECT slot FROM free_slots WHERE bytes = ?1 ORDER BY slot LIMIT 1")?,
            add_free: prepare("INSERT INTO free_slots VALUES (?1, ?2)")?,
            delete_free: prepare("DELETE FROM free_slots WHERE bytes = ?1 AND slot = ?2")?,
            add_record: prepare("INSERT INTO log VALUES (?1, ?2, ?3, ?4)")?,
            find_forgotten: prepare("SELECT forgotten_at FROM forgotten WHERE key = ?1")?,
            add_forgotten: prepare("INSERT INTO forgotten VALUES (?1, ?2)")?,
            delete_forgotten: prepare("DELETE FROM forgotten WHERE key = ?1")?,
        })
    }
}

/// An error unless both are the same.
fn refuse_another(claimed: &GalleryIdentity, found: &GalleryIdentity) -> Result<(), RegistryError> {
    if claimed == found {
        return Ok(());
    }
    let advice = if claimed.key_id == found.key_id {
        "set the dimension the gallery was made with, or use another data folder"
    } else {
        "give the master key the gallery was made with, or use another data folder"
    };
    Err(RegistryError::WrongIdentity { expected: in_words(claimed), found: in_words(found), advice })
}

fn in_words(identity: &GalleryIdentity) -> String {
    let key: String = identity.key_id.iter().map(|b| format!("{b:02x}")).collect();
    format!("dimension {} and key {key}", identity.dim)
}
