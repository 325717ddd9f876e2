//! Errors of the registry.

use std::path::PathBuf;

/// Why the registry could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The database failed. Nothing of the commit is stored.
    #[error("the registry at {} failed while {doing}: {source}", path.display())]
    Database {
        /// The database's place.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The database's own error.
        source: rusqlite::Error,
    },
    /// The disk is full. Nothing of the commit is stored; everything acknowledged before still is.
    #[error("the disk of the registry at {} is full", path.display())]
    DiskFull {
        /// The database's place.
        path: PathBuf,
    },
    /// A stored value is one that this program never writes.
    #[error("the registry at {} holds a damaged {what} at {key}", path.display())]
    Damaged {
        /// The database's place.
        path: PathBuf,
        /// Which kind of value.
        what: &'static str,
        /// The row it is in.
        key: i64,
    },
    /// The file is not a registry, or a registry cannot be kept in this place.
    #[error("the registry at {} cannot be used: {why}", path.display())]
    Unusable {
        /// The database's place.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// The operating system refused an operation on one of the registry's files.
    #[error("the registry at {} failed while {doing}: {source}", path.display())]
    File {
        /// The file's place.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The system's own error.
        source: std::io::Error,
    },
    /// The system gives no random numbers.
    #[error("the system gives no random numbers: {0}")]
    NoRandomness(getrandom::Error),
    /// A commit could not be synced to the disk. Whether it is stored is known only when the registry is
    /// opened again, and nothing is written before that. The same request repeated then is done once.
    #[error(
        "the registry at {} failed while {doing}, and whether that is stored will be known after a restart: {source}",
        path.display()
    )]
    InDoubt {
        /// The database's place.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The database's own error.
        source: rusqlite::Error,
    },
    /// An earlier change is in doubt ([`RegistryError::InDoubt`]). What the disk holds is not known
    /// until the registry is opened again, so nothing is written before that.
    #[error(
        "the registry at {} takes no changes since the disk failed to store one: check the disk and restart",
        path.display()
    )]
    WriterStopped {
        /// The database's place.
        path: PathBuf,
    },
    /// Another program is reading the registry, which keeps deleted bytes in the log. Scrub again later.
    #[error(
        "the registry at {} could not be scrubbed: another program is reading it; deleted templates stay in its write-ahead log until it stops",
        path.display()
    )]
    ScrubBlocked {
        /// The database's place.
        path: PathBuf,
    },
    /// A newer program wrote this registry.
    #[error("the registry at {} has schema {found}, this program knows up to {known}", path.display())]
    SchemaTooNew {
        /// The database's place.
        path: PathBuf,
        /// Its schema version.
        found: i64,
        /// The newest known here.
        known: i64,
    },
    /// The gallery was made with another dimension or another key.
    #[error("the gallery was made with {expected}, but this server has {found}: {advice}")]
    WrongIdentity {
        /// What the registry says.
        expected: String,
        /// What the server has.
        found: String,
        /// What to do about it.
        advice: &'static str,
    },
}
