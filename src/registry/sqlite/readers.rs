//! A fixed set of reading connections, each lent to one call at a time.

use std::ops::Deref;
use std::path::Path;

use parking_lot::{Condvar, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use rusqlite::Connection;

use super::schema;
use crate::registry::RegistryError;

/// Reading connections. More callers than this wait.
const READERS: usize = 4;

/// The connections that are not in use, and a lock that holds new readers back.
pub(super) struct Readers {
    idle: Mutex<Vec<Connection>>,
    returned: Condvar,
    barrier: RwLock<()>,
}

/// A borrowed connection; dropping it gives it back.
pub(super) struct Reader<'a> {
    readers: &'a Readers,
    /// `None` only while being dropped.
    conn: Option<Connection>,
    _barrier: RwLockReadGuard<'a, ()>,
}

impl Readers {
    /// Opens all of them.
    pub(super) fn open(path: &Path) -> Result<Self, RegistryError> {
        let idle = (0..READERS).map(|_| schema::open_reader(path)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { idle: Mutex::new(idle), returned: Condvar::new(), barrier: RwLock::new(()) })
    }

    /// A connection; waits if all are in use.
    pub(super) fn get(&self) -> Reader<'_> {
        let barrier = self.barrier.read();
        let mut idle = self.idle.lock();
        loop {
            if let Some(conn) = idle.pop() {
                return Reader { readers: self, conn: Some(conn), _barrier: barrier };
            }
            self.returned.wait(&mut idle);
        }
    }

    /// Waits until every connection is returned, and lends none until the guard is dropped.
    pub(super) fn hold_back(&self) -> RwLockWriteGuard<'_, ()> {
        self.barrier.write()
    }
}

impl Deref for Reader<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.conn.as_ref().expect("a reader has its connection until it is dropped")
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        self.readers.idle.lock().extend(self.conn.take());
        self.readers.returned.notify_one();
    }
}
