//! Sums over the rows, by which verification finds rows that were changed, swapped, lost, duplicated or
//! restored by anything but a commit.
//!
//! Every row of the five tables with content has a keyed hash, and each table the sum of its rows' hashes
//! modulo 2^128: a digest of a multiset that a commit updates by adding and subtracting. The place of a row
//! does not count; a template's row is hashed with its sealed bytes and a subject's with its name, whatever
//! slots they are in. The sums are stored with the counters under another keyed hash, which is checked
//! whenever the registry is opened. Without the key nobody can make a hash that fits; an older copy of the
//! whole registry is consistent with itself.

use rusqlite::Connection;
use rusqlite::types::ValueRef;

use super::read::Counters;
use super::{schema, stored};
use crate::vault::RegistryKeys;

/// Bytes of a sum.
const SUM_BYTES: usize = 16;

/// The template of a row of the log that has none.
pub(super) const NO_TEMPLATE: i64 = -1;

/// The tables whose rows are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Table {
    Subjects,
    Templates,
    Log,
    Requests,
    Forgotten,
}

impl Table {
    pub(super) const ALL: [Self; 5] = [Self::Subjects, Self::Templates, Self::Log, Self::Requests, Self::Forgotten];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Subjects => "subjects",
            Self::Templates => "templates",
            Self::Log => "log",
            Self::Requests => "requests",
            Self::Forgotten => "forgotten",
        }
    }
}

/// The content of a row, in a fixed order for each table.
#[derive(Clone, Copy)]
pub(super) enum Row<'a> {
    /// Number, time of enrolment; the name as its slot has it.
    Subject([i64; 2], &'a [u8]),
    /// Id, subject, hand, time of enrolment; the sealed bytes.
    Template([i64; 4], &'a [u8]),
    /// LSN, kind, subject, template or [`NO_TEMPLATE`].
    Log([i64; 4]),
    /// Sequence number, time, LSN, subject, its time of enrolment, the newest template; key and digest.
    Request([i64; 6], &'a [u8], &'a [u8]),
    /// Time; the key.
    Forgotten([i64; 1], &'a [u8]),
}

/// A sum for each table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Sums([u128; Table::ALL.len()]);

impl Sums {
    /// A row was added.
    pub(super) fn add(&mut self, keys: &RegistryKeys, row: Row<'_>) {
        let (table, hash) = hash(keys, row);
        self.0[table as usize] = self.0[table as usize].wrapping_add(hash);
    }

    /// A row was deleted.
    pub(super) fn remove(&mut self, keys: &RegistryKeys, row: Row<'_>) {
        let (table, hash) = hash(keys, row);
        self.0[table as usize] = self.0[table as usize].wrapping_sub(hash);
    }

    /// The tables whose rows differ.
    pub(super) fn differing(&self, other: &Self) -> impl Iterator<Item = Table> {
        Table::ALL.into_iter().filter(|table| self.0[*table as usize] != other.0[*table as usize])
    }

    pub(super) fn to_bytes(self) -> [u8; SUM_BYTES * Table::ALL.len()] {
        std::array::from_fn(|i| self.0[i / SUM_BYTES].to_le_bytes()[i % SUM_BYTES])
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (sums, rest) = bytes.as_chunks::<SUM_BYTES>();
        let sums: &[[u8; SUM_BYTES]; Table::ALL.len()] = sums.try_into().ok().filter(|_| rest.is_empty())?;
        Some(Self(sums.map(u128::from_le_bytes)))
    }
}

fn hash(keys: &RegistryKeys, row: Row<'_>) -> (Table, u128) {
    let of = |table: Table, numbers: &[i64], bytes: &[&[u8]]| {
        (table, u128::from_le_bytes(keys.row(table.name(), numbers, bytes)))
    };
    match row {
        Row::Subject(numbers, name) => of(Table::Subjects, &numbers, &[name]),
        Row::Template(numbers, sealed) => of(Table::Templates, &numbers, &[sealed]),
        Row::Log(numbers) => of(Table::Log, &numbers, &[]),
        Row::Request(numbers, key, digest) => of(Table::Requests, &numbers, &[key, digest]),
        Row::Forgotten(numbers, key) => of(Table::Forgotten, &numbers, &[key]),
    }
}

/// The hash over the counters, the sums and all columns of the gallery's row.
pub(super) fn mac(conn: &Connection, keys: &RegistryKeys, counters: &Counters) -> rusqlite::Result<[u8; 16]> {
    let mut statement = conn.prepare_cached("SELECT * FROM gallery")?;
    let columns = statement.column_count();
    let mut gallery: Vec<Vec<u8>> = Vec::new();
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        for column in 0..columns {
            gallery.push(match row.get_ref(column)? {
                ValueRef::Integer(number) => number.to_le_bytes().to_vec(),
                ValueRef::Real(number) => number.to_le_bytes().to_vec(),
                ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes.to_vec(),
                ValueRef::Null => Vec::new(),
            });
        }
    }
    let Counters { last_lsn, last_subject, last_template, subjects, contents, open_ms, sums } = *counters;
    let numbers = [schema::VERSION, last_lsn, last_subject, last_template, subjects, stored(contents.rows), open_ms];
    let (digest, sums) = (contents.digest.to_le_bytes(), sums.to_bytes());
    let bytes: Vec<&[u8]> = [&digest[..], &sums[..]].into_iter().chain(gallery.iter().map(Vec::as_slice)).collect();
    Ok(keys.row("counters", &numbers, &bytes))
}

/// Stores the counters, with the hash over them.
pub(super) fn store(conn: &Connection, keys: &RegistryKeys, counters: &Counters) -> rusqlite::Result<()> {
    let mac = mac(conn, keys, counters)?;
    let Counters { last_lsn, last_subject, last_template, subjects, contents, open_ms, sums } = *counters;
    let mut statement = conn.prepare_cached(
        "UPDATE counters SET last_lsn = ?1, last_subject = ?2, last_template = ?3, subjects = ?4, templates = ?5,
         digest = ?6, open_ms = ?7, sums = ?8, mac = ?9 WHERE id = 1",
    )?;
    let (templates, digest) = (stored(contents.rows), contents.digest.to_le_bytes());
    let row = (last_lsn, last_subject, last_template, subjects, templates, digest, open_ms, sums.to_bytes(), mac);
    statement.execute(row).map(|_| ())
}

/// Whether the stored counters and the gallery's row are as this program stored them.
pub(super) fn are_sound(conn: &Connection, keys: &RegistryKeys, counters: &Counters) -> rusqlite::Result<bool> {
    let mac = mac(conn, keys, counters)?;
    // The tables were just created, and nothing is hashed yet.
    let claimed: i64 = conn.query_row("SELECT count(*) FROM gallery", [], |row| row.get(0))?;
    let new = *counters == Counters::default() && claimed == 0;
    let stored: Vec<u8> = conn.query_row("SELECT mac FROM counters WHERE id = 1", [], |row| row.get(0))?;
    Ok(stored == mac || new && stored == [0; 16])
}
