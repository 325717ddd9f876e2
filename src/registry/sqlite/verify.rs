//! Checks all of a registry, and reports what is wrong with it.

use std::path::Path;

use rayon::prelude::*;
use rusqlite::{Connection, Row as SqlRow};

use super::requests::{ALL_REQUESTS_IN_ORDER, request};
use super::sums::{self, NO_TEMPLATE, Row, Sums};
use super::{SqliteRegistry, damaged, failed, read};
use crate::registry::{RegistryError, StoredTemplate};
use crate::vault::{RegistryKeys, SealError};

/// Problems that are listed; others are only counted.
const PROBLEMS_MAX: usize = 50;
/// Templates that are opened in parallel, in one go.
const CHUNK: usize = 1024;

/// What a check of a whole registry found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistryReport {
    /// Subjects enrolled.
    pub subjects: u64,
    /// Templates enrolled.
    pub templates: u64,
    /// Records of the change log.
    pub log: u64,
    /// Requests that are remembered.
    pub requests: u64,
    /// Deletions that are remembered.
    pub deletions: u64,
    /// What is wrong: at most fifty problems, and a line with the number of others. Empty for a sound registry.
    pub problems: Vec<String>,
}

impl SqliteRegistry {
    /// Reads everything and checks its consistency: SQLite's own check of every page, `open` for every
    /// sealed template, every row against the keyed sums of its table, names against their keyed hashes,
    /// owners of slots. Calls `progress` with the templates done and their total.
    pub fn verify(
        &self,
        open: &(dyn Fn(&StoredTemplate) -> Result<(), SealError> + Sync),
        progress: &dyn Fn(u64, u64),
    ) -> RegistryReport {
        let conn = self.readers.get();
        let mut check = Check {
            conn: &conn,
            path: &self.path,
            keys: &self.keys,
            sums: Sums::default(),
            more: 0,
            report: RegistryReport::default(),
        };
        if let Err(error) = check.all(open, progress) {
            check.problem(error.to_string());
        }
        if check.more > 0 {
            check.report.problems.push(format!("and {} more problems of the registry", check.more));
        }
        check.report
    }
}

/// A check in progress.
struct Check<'c> {
    conn: &'c Connection,
    path: &'c Path,
    keys: &'c RegistryKeys,
    /// Of the rows read so far.
    sums: Sums,
    more: u64,
    report: RegistryReport,
}

impl Check<'_> {
    fn problem(&mut self, problem: String) {
        match self.report.problems.len() < PROBLEMS_MAX {
            true => self.report.problems.push(problem),
            false => self.more += 1,
        }
    }

    fn all(
        &mut self,
        open: &(dyn Fn(&StoredTemplate) -> Result<(), SealError> + Sync),
        progress: &dyn Fn(u64, u64),
    ) -> Result<(), RegistryError> {
        let path = self.path;
        let at = move |e| failed(path, "checking it", e);
        // One snapshot for everything that follows.
        let snapshot = self.conn.unchecked_transaction().map_err(at)?;
        self.each("PRAGMA integrity_check(20)", |check, row| {
            let verdict: String = row.get(0)?;
            if verdict != "ok" {
                check.problem(format!("the registry's database: {verdict}"));
            }
            Ok(())
        });
        let counters = read::counters(self.conn, self.path)?;
        if !sums::are_sound(self.conn, self.keys, &counters).map_err(at)? {
            self.problem(damaged(self.path, "row of counters", 1).to_string());
        }
        self.subjects();
        self.templates(counters.contents.rows, open, progress);
        self.log();
        self.each(&ALL_REQUESTS_IN_ORDER.replace("?1", "-1"), |check, row| {
            check.report.requests += 1;
            check.sums.add(check.keys, request(row)?);
            Ok(())
        });
        self.each("SELECT forgotten_at, key FROM forgotten", |check, row| {
            check.report.deletions += 1;
            check.sums.add(check.keys, Row::Forgotten([row.get(0)?], row.get_ref(1)?.as_blob()?));
            Ok(())
        });
        self.slots()?;
        let read = self.sums;
        for table in counters.sums.differing(&read) {
            let name = table.name();
            self.problem(format!("the registry's table {name} does not hold the rows that were written to it"));
        }
        let found = [self.report.log, self.report.subjects, self.report.templates];
        if found != [counters.last_lsn.unsigned_abs(), counters.subjects.unsigned_abs(), counters.contents.rows] {
            self.problem("the registry's counters are not those of its rows".to_owned());
        }
        snapshot.finish().map_err(at)
    }

    /// Calls `look` with each row of `sql`; an error is a problem.
    fn each(&mut self, sql: &str, mut look: impl FnMut(&mut Self, &SqlRow<'_>) -> rusqlite::Result<()>) {
        let conn = self.conn;
        let mut all = || -> rusqlite::Result<()> {
            let mut statement = conn.prepare(sql)?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                // A row that cannot be read may be followed by rows that can.
                if let Err(error) = look(self, row) {
                    self.problem(failed(self.path, "reading a row", error).to_string());
                }
            }
            Ok(())
        };
        if let Err(error) = all() {
            self.problem(failed(self.path, "reading it", error).to_string());
        }
    }

    fn subjects(&mut self) {
        let sql = "SELECT s.number, s.enrolled_at, s.key, n.content,
                          EXISTS (SELECT 1 FROM templates t WHERE t.subject = s.number)
                   FROM subjects s NOT INDEXED LEFT JOIN slots n ON n.slot = s.slot";
        self.each(sql, |check, row| {
            check.report.subjects += 1;
            let (number, enrolled_at) = (row.get(0)?, row.get(1)?);
            let padded = row.get_ref(3)?.as_blob_or_null()?.unwrap_or_default();
            check.sums.add(check.keys, Row::Subject([number, enrolled_at], padded));
            let filed = read::name(padded).map(|name| check.keys.subject(name.as_str()));
            if filed.as_ref().map(<[u8; _]>::as_slice) != Some(row.get_ref(2)?.as_blob()?) {
                check.problem(damaged(check.path, "name of a subject", number).to_string());
            }
            if !row.get::<_, bool>(4)? {
                check.problem(damaged(check.path, "subject without templates", number).to_string());
            }
            Ok(())
        });
    }

    fn templates(
        &mut self,
        total: u64,
        open: &(dyn Fn(&StoredTemplate) -> Result<(), SealError> + Sync),
        progress: &dyn Fn(u64, u64),
    ) {
        let sql = "SELECT t.id, t.subject, n.content, t.hand, b.content, t.enrolled_at
                   FROM templates t NOT INDEXED
                   LEFT JOIN subjects s ON s.number = t.subject
                   LEFT JOIN slots n ON n.slot = s.slot
                   LEFT JOIN slots b ON b.slot = t.slot
                   ORDER BY t.id";
        let mut some: Vec<StoredTemplate> = Vec::with_capacity(CHUNK);
        let opened = |check: &mut Self, some: &mut Vec<StoredTemplate>| {
            let refused: Vec<String> = some
                .par_iter()
                .filter_map(|t| Some(format!("template {} of the registry does not open: {}", t.id.0, open(t).err()?)))
                .collect();
            refused.into_iter().for_each(|problem| check.problem(problem));
            some.clear();
            progress(check.report.templates, total);
        };
        self.each(sql, |check, row| {
            check.report.templates += 1;
            match read::stored_template(check.path, row) {
                Ok(template) => {
                    let numbers = [row.get(0)?, row.get(1)?, row.get(3)?, row.get(5)?];
                    check.sums.add(check.keys, Row::Template(numbers, &template.sealed));
                    some.push(template);
                }
                Err(error) => check.problem(error.to_string()),
            }
            if some.len() == CHUNK {
                opened(check, &mut some);
            }
            Ok(())
        });
        opened(self, &mut some);
    }

    fn log(&mut self) {
        self.each("SELECT lsn, kind, subject, template FROM log ORDER BY lsn", |check, row| {
            check.report.log += 1;
            let template = row.get::<_, Option<i64>>(3)?.unwrap_or(NO_TEMPLATE);
            let numbers = [row.get(0)?, row.get(1)?, row.get(2)?, template];
            check.sums.add(check.keys, Row::Log(numbers));
            if numbers[0].unsigned_abs() != check.report.log {
                check.problem(damaged(check.path, "place in the change log", numbers[0]).to_string());
            }
            Ok(())
        });
    }

    /// Every slot belongs to exactly one template or subject or is free, and the free ones hold zeros.
    fn slots(&mut self) -> Result<(), RegistryError> {
        const OWNED: &str =
            "SELECT slot FROM templates UNION ALL SELECT slot FROM subjects UNION ALL SELECT slot FROM free_slots";
        let count = |sql: &str| {
            let count = self.conn.query_row(sql, [], |row| row.get::<_, i64>(0));
            count.map_err(|e| failed(self.path, "counting its slots", e))
        };
        let slots = count("SELECT count(*) FROM slots")?;
        let owned = count(&format!("SELECT count(*) FROM slots WHERE slot IN ({OWNED})"))?;
        let owners = count(&format!("SELECT count(*) FROM ({OWNED})"))?;
        let free = count("SELECT count(*) FROM free_slots")?;
        let zeros = "SELECT count(*) FROM free_slots f JOIN slots s USING (slot) WHERE s.content = zeroblob(f.bytes)";
        let zeros = count(zeros)?;
        if (owned, owners, zeros) != (slots, slots, free) {
            let problem = format!(
                "the registry has {slots} slots, of which {owned} are in use or free, by {owners} entries; \
                 {zeros} of {free} free ones hold nothing"
            );
            self.problem(problem);
        }
        Ok(())
    }
}
