//! The prepared statements of a commit.

use rusqlite::{CachedStatement, Connection};

/// The statements of a commit, looked up once for all its changes.
pub(super) struct Statements<'c> {
    pub(super) find_request: CachedStatement<'c>,
    pub(super) find_request_row: CachedStatement<'c>,
    pub(super) delete_request: CachedStatement<'c>,
    pub(super) add_request: CachedStatement<'c>,
    pub(super) find_subject: CachedStatement<'c>,
    pub(super) add_subject: CachedStatement<'c>,
    pub(super) delete_subject: CachedStatement<'c>,
    pub(super) add_template: CachedStatement<'c>,
    pub(super) delete_template: CachedStatement<'c>,
    pub(super) find_template: CachedStatement<'c>,
    pub(super) find_name: CachedStatement<'c>,
    pub(super) find_bytes: CachedStatement<'c>,
    pub(super) add_slot: CachedStatement<'c>,
    pub(super) fill_slot: CachedStatement<'c>,
    pub(super) zero_slot: CachedStatement<'c>,
    pub(super) find_free: CachedStatement<'c>,
    pub(super) add_free: CachedStatement<'c>,
    pub(super) delete_free: CachedStatement<'c>,
    pub(super) add_record: CachedStatement<'c>,
    pub(super) find_forgotten: CachedStatement<'c>,
    pub(super) add_forgotten: CachedStatement<'c>,
    pub(super) delete_forgotten: CachedStatement<'c>,
}

impl<'c> Statements<'c> {
    pub(super) fn new(conn: &'c Connection) -> rusqlite::Result<Self> {
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
