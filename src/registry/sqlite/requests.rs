//! The stored requests, by which a repeated request is done once, and the pruning of the oldest.

use rusqlite::Transaction;

use super::read::Counters;
use super::stored;
use super::sums::{self, Row};
use crate::vault::RegistryKeys;

/// Requests with the columns that [`request`] expects.
pub(super) const ALL_REQUESTS_IN_ORDER: &str =
    "SELECT seq, done_at, lsn, subject, enrolled_at, last_template, key, digest
    FROM requests ORDER BY seq LIMIT ?1";

/// The request in the columns of [`ALL_REQUESTS_IN_ORDER`].
pub(super) fn request<'r>(row: &'r rusqlite::Row<'_>) -> rusqlite::Result<Row<'r>> {
    let numbers = [row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?];
    Ok(Row::Request(numbers, row.get_ref(6)?.as_blob()?, row.get_ref(7)?.as_blob()?))
}

/// Deletes up to `limit` of the oldest requests that were done before `young`; returns how many.
pub(super) fn prune(
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
