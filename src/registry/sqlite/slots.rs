//! Slots: rows whose bytes never move. A freed slot is zeroed, and reused for bytes of the same length.

use rusqlite::{Connection, OptionalExtension as _};

use super::statements::Statements;
use super::stored;
use super::writer::{Failure, sql};

/// The newest slot and the number of free ones, so that a commit need not query them.
#[derive(Clone, Copy)]
pub(super) struct Slots {
    last: i64,
    free: i64,
}

impl Slots {
    pub(super) fn read(conn: &Connection) -> rusqlite::Result<Self> {
        let number = |sql| conn.query_row(sql, [], |row| row.get(0));
        Ok(Self {
            last: number("SELECT ifnull(max(slot), 0) FROM slots")?,
            free: number("SELECT count(*) FROM free_slots")?,
        })
    }

    /// Stores bytes in a slot: a free one of their length if there is one.
    pub(super) fn put(&mut self, statements: &mut Statements<'_>, content: &[u8]) -> Result<i64, Failure> {
        let at = sql("filling a slot");
        let bytes = stored(content.len() as u64);
        let free = if self.free == 0 {
            None
        } else {
            statements.find_free.query_row([bytes], |row| row.get::<_, i64>(0)).optional().map_err(&at)?
        };
        if let Some(slot) = free {
            self.free -= 1;
            statements.delete_free.execute([bytes, slot]).map_err(&at)?;
            statements.fill_slot.execute((slot, content)).map_err(&at)?;
            return Ok(slot);
        }
        self.last += 1;
        statements.add_slot.execute((self.last, content)).map_err(&at)?;
        Ok(self.last)
    }

    /// Zeroes a slot and frees it. The inner error is `None` if there is no such slot.
    pub(super) fn clear(&mut self, statements: &mut Statements<'_>, slot: i64) -> Result<(), Option<Failure>> {
        let at = |e| Some(sql("clearing a slot")(e));
        let bytes = statements.find_bytes.query_row([slot], |row| row.get::<_, i64>(0)).optional();
        let bytes = bytes.map_err(at)?.ok_or(None)?;
        statements.zero_slot.execute([slot]).map_err(at)?;
        statements.add_free.execute([bytes, slot]).map_err(at)?;
        self.free += 1;
        Ok(())
    }
}
