//! Opening the database file, and the tables in it.
//!
//! `user_version` is the schema's version, `application_id` says that the file is a registry. Schemas
//! only go forward, with one migration per version, each in a transaction.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};

use super::failed;
use crate::registry::RegistryError;

/// `THNR`, in the database header.
const APPLICATION_ID: i32 = 0x5448_4e52;
/// How long a call waits for a lock that another program holds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a page, for new databases: seven sealed templates of 512 dimensions.
const PAGE_BYTES: u32 = 8192;
/// Page cache of the writing connection, in KiB. It must hold the pages that one commit changes, or
/// they are written to the log early.
const WRITER_CACHE_KIB: i32 = 64 << 10;
/// Page cache of a reading connection, in KiB.
const READER_CACHE_KIB: i32 = 8 << 10;
/// Bytes of the smallest database.
const DATABASE_BYTES_MIN: u64 = 512;
/// Pages in the write-ahead log before a commit copies them into the database.
const CHECKPOINT_PAGES: i32 = 4096;

/// Migration `i` goes from version `i` to `i + 1`.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE gallery(
        id INTEGER PRIMARY KEY CHECK (id = 1),
        dim INTEGER NOT NULL,
        key_id BLOB NOT NULL,
        gallery_id BLOB NOT NULL -- random
    ) STRICT;
    CREATE TABLE counters(
        id INTEGER PRIMARY KEY CHECK (id = 1),
        last_lsn INTEGER NOT NULL,
        last_subject INTEGER NOT NULL,
        last_template INTEGER NOT NULL,
        subjects INTEGER NOT NULL,
        templates INTEGER NOT NULL,
        open_ms INTEGER NOT NULL, -- for how long it has been open altogether
        digest BLOB NOT NULL, -- of all templates, see `Contents` of the index
        sums BLOB NOT NULL, -- of the rows' keyed hashes, by table
        mac BLOB NOT NULL -- keyed hash of this row and that of the gallery
    ) STRICT;
    INSERT INTO counters VALUES (1, 0, 0, 0, 0, 0, 0, zeroblob(16), zeroblob(80), zeroblob(16));
    CREATE TABLE subjects(
        number INTEGER PRIMARY KEY,
        key BLOB NOT NULL UNIQUE, -- keyed hash of the name
        slot INTEGER NOT NULL, -- of the name, with zeros after it
        enrolled_at INTEGER NOT NULL -- milliseconds since 1970, as all times here
    ) STRICT;
    CREATE TABLE templates(
        id INTEGER PRIMARY KEY,
        subject INTEGER NOT NULL REFERENCES subjects(number),
        hand INTEGER NOT NULL,
        enrolled_at INTEGER NOT NULL,
        slot INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX templates_by_subject ON templates(subject);
    -- Rows are overwritten with bytes of equal length, never deleted: see the module.
    CREATE TABLE slots(
        slot INTEGER PRIMARY KEY,
        content BLOB NOT NULL -- a sealed template, or the name of a subject
    ) STRICT;
    CREATE TABLE free_slots(
        bytes INTEGER NOT NULL,
        slot INTEGER NOT NULL,
        PRIMARY KEY (bytes, slot)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE log(
        lsn INTEGER PRIMARY KEY,
        kind INTEGER NOT NULL, -- 1 added, 2 removed, 3 forgotten
        subject INTEGER NOT NULL,
        template INTEGER -- NULL for forgotten
    ) STRICT;
    -- Who was forgotten and is not enrolled. Never pruned: a list that is older can always come.
    CREATE TABLE forgotten(
        key BLOB PRIMARY KEY, -- as in subjects
        forgotten_at INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    -- By time, so that pruning cuts a range; `key` is a keyed hash of the request id.
    CREATE TABLE requests(
        seq INTEGER PRIMARY KEY,
        key BLOB NOT NULL UNIQUE,
        digest BLOB NOT NULL,
        done_at INTEGER NOT NULL, -- by `open_ms` of the counters
        lsn INTEGER NOT NULL,
        subject INTEGER NOT NULL,
        enrolled_at INTEGER NOT NULL, -- of the subject
        last_template INTEGER NOT NULL -- the newest template of all when it was done
    ) STRICT;
"];

/// The schema version this program writes.
pub(super) const VERSION: i64 = MIGRATIONS.len() as i64;

/// Creates an empty file with mode 0600 if there is none, and syncs its folder. An empty file is
/// an empty database.
pub(super) fn create_file(path: &Path) -> Result<(), RegistryError> {
    let refuse = |doing| move |source| RegistryError::File { path: path.to_owned(), doing, source };
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(file) => {
            file.sync_all().map_err(refuse("creating it"))?;
            let folder = path.parent().unwrap_or(Path::new("/"));
            File::open(folder).and_then(|f| f.sync_all()).map_err(refuse("syncing its folder"))
        }
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            let metadata = std::fs::metadata(path).map_err(refuse("looking at it"))?;
            let unusable = |why| Err(RegistryError::Unusable { path: path.to_owned(), why });
            match metadata.len() {
                _ if !metadata.is_file() => unusable("it is not a file"),
                // SQLite would take it for an empty database and write over it.
                1..DATABASE_BYTES_MIN => unusable("it is cut off"),
                _ => Ok(()),
            }
        }
        Err(e) => Err(refuse("creating it")(e)),
    }
}

/// Opens the connection that writes, and brings the schema up to date.
pub(super) fn open_writer(path: &Path) -> Result<Connection, RegistryError> {
    let mut conn = connect(path)?;
    let at = |doing| move |e| opening_failed(path, doing, e);
    let version = checked_version(&conn, path)?;
    if version == 0 {
        conn.pragma_update(None, "page_size", PAGE_BYTES).map_err(at("setting the page size"))?;
    }
    let mode: String = conn
        .pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0))
        .map_err(at("switching to a write-ahead log"))?;
    if mode != "wal" {
        let why = "its file system cannot keep a write-ahead log";
        return Err(RegistryError::Unusable { path: path.to_owned(), why });
    }
    for (name, value) in
        [("foreign_keys", 1), ("cache_size", -WRITER_CACHE_KIB), ("wal_autocheckpoint", CHECKPOINT_PAGES)]
    {
        conn.pragma_update(None, name, value).map_err(at("configuring the connection"))?;
    }
    conn.pragma_update(None, "synchronous", "full").map_err(at("configuring the connection"))?;
    conn.pragma_update(None, "secure_delete", "on").map_err(at("configuring the connection"))?;
    migrate(&mut conn, path, version)?;
    check_schema(&conn, path)?;
    conn.set_prepared_statement_cache_capacity(64);
    Ok(conn)
}

/// Opens a connection that only reads.
pub(super) fn open_reader(path: &Path) -> Result<Connection, RegistryError> {
    let conn = connect(path)?;
    let at = |e| opening_failed(path, "configuring a reading connection", e);
    conn.pragma_update(None, "cache_size", -READER_CACHE_KIB).map_err(at)?;
    conn.pragma_update(None, "query_only", 1).map_err(at)?;
    Ok(conn)
}

/// A connection with the settings that reading and writing connections share.
fn connect(path: &Path) -> Result<Connection, RegistryError> {
    let at = |doing| move |e| opening_failed(path, doing, e);
    // The path is absolute, so SQLite does not interpret it as a URI.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(path, flags).map_err(at("opening it"))?;
    conn.busy_timeout(BUSY_TIMEOUT).map_err(at("opening it"))?;
    conn.pragma_update(None, "temp_store", "memory").map_err(at("opening it"))?;
    conn.pragma_update(None, "trusted_schema", 0).map_err(at("opening it"))?;
    Ok(conn)
}

/// The schema version of the file, if the file is a registry or empty.
fn checked_version(conn: &Connection, path: &Path) -> Result<i64, RegistryError> {
    let at = |e| opening_failed(path, "reading its header", e);
    let application: i32 = conn.pragma_query_value(None, "application_id", |row| row.get(0)).map_err(at)?;
    let version: i64 = conn.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(at)?;
    if application == 0 && version == 0 {
        let tables: i64 = conn.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).map_err(at)?;
        if tables == 0 {
            return Ok(0);
        }
    }
    if application != APPLICATION_ID {
        let why = "it is a database of another program";
        return Err(RegistryError::Unusable { path: path.to_owned(), why });
    }
    if version > VERSION {
        return Err(RegistryError::SchemaTooNew { path: path.to_owned(), found: version, known: VERSION });
    }
    if version < 1 {
        return Err(super::damaged(path, "schema version", version));
    }
    Ok(version)
}

/// Runs the migrations that the file has not had yet, each in its own transaction.
fn migrate(conn: &mut Connection, path: &Path, version: i64) -> Result<(), RegistryError> {
    for (from, sql) in (0_i64..).zip(MIGRATIONS).skip_while(|(from, _)| *from < version) {
        let at = |e| opening_failed(path, "bringing its schema up to date", e);
        let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate).map_err(at)?;
        tx.execute_batch(sql).map_err(at)?;
        tx.pragma_update(None, "application_id", APPLICATION_ID).map_err(at)?;
        tx.pragma_update(None, "user_version", from + 1).map_err(at)?;
        tx.commit().map_err(at)?;
    }
    Ok(())
}

/// Refuses tables and indexes whose definitions are not exactly those that this program makes.
fn check_schema(conn: &Connection, path: &Path) -> Result<(), RegistryError> {
    let at = |e| opening_failed(path, "reading its schema", e);
    let of = |conn: &Connection| -> rusqlite::Result<Vec<[Option<String>; 4]>> {
        let mut statement = conn.prepare("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name")?;
        statement.query_map([], |row| Ok([row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?]))?.collect()
    };
    let fresh = Connection::open_in_memory().map_err(at)?;
    MIGRATIONS.iter().try_for_each(|sql| fresh.execute_batch(sql)).map_err(at)?;
    if of(conn).map_err(at)? == of(&fresh).map_err(at)? {
        return Ok(());
    }
    Err(super::damaged(path, "schema", VERSION))
}

/// [`failed`], with its own message for a file that is not a database.
fn opening_failed(path: &Path, doing: &'static str, source: rusqlite::Error) -> RegistryError {
    if source.sqlite_error_code() == Some(ErrorCode::NotADatabase) {
        let why = "it is not an SQLite database, or its header is damaged";
        return RegistryError::Unusable { path: path.to_owned(), why };
    }
    failed(path, doing, source)
}
