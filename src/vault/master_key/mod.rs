//! The master key: generating it, keeping it in a file, loading it at start.
//!
//! A key is one line of text: `thenar-master-key-1:`, 64 hexadecimal digits, `-`, and 8 more that
//! check the others, so that a mistyped or truncated key is refused and not used as another key.
//! Errors name places and modes, never a digit of the key.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize as _, Zeroizing};

use crate::vault::locked::Locked;

/// The beginning of the line.
const PREFIX: &str = "thenar-master-key-1:";
/// Hexadecimal digits of the key.
const KEY_DIGITS: usize = 64;
/// Hexadecimal digits of the checksum.
const CHECK_DIGITS: usize = 8;
/// Bytes read from a key's place, at most. Every key is shorter.
const READ_MAX: usize = 256;
/// The environment variable that [`KeySource::Environment`] reads.
pub const MASTER_KEY_VARIABLE: &str = "THENAR_MASTER_KEY";
/// The name of the systemd credential of [`KeySource::Credential`], unless configured otherwise.
pub const CREDENTIAL: &str = "thenar-master-key";
/// Where systemd says that its credentials are.
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";

/// Where the master key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// A file that only its owner can read.
    File(PathBuf),
    /// A systemd credential of this name (`LoadCredential=` or `LoadCredentialEncrypted=`).
    /// systemd guards the folder; the file's own mode is not checked, because the access lists that
    /// systemd uses appear as group permissions.
    Credential(String),
    /// The environment variable [`MASTER_KEY_VARIABLE`]. The weakest place: the system shows a
    /// process's environment to its owner, and child processes inherit it.
    Environment,
}

/// Why the master key could not be made, stored or loaded.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// There is no file.
    #[error("there is no master key at {}: make one with `thenar keys generate`", path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The environment lacks a variable.
    #[error("the environment variable {name} is not set: {advice}")]
    NoVariable {
        /// The variable.
        name: &'static str,
        /// What to do about it.
        advice: &'static str,
    },
    /// A credential's name would lead out of systemd's folder.
    #[error("{name:?} cannot be the name of a credential: it must be a plain file name")]
    CredentialName {
        /// The name.
        name: String,
    },
    /// Users other than the owner have rights to the file.
    #[error("the master key at {} has mode {mode:04o}, which lets other users read or change it: chmod 600 {}", path.display(), path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Its owner is neither root nor the user who runs this, and could read and replace it.
    #[error("the master key at {} belongs to user {owner}, not to root or to user {user}, who runs this: chown {user} {}", path.display(), path.display())]
    Owner {
        /// The file.
        path: PathBuf,
        /// Number of its owner.
        owner: u32,
        /// Number of the user who runs this.
        user: u32,
    },
    /// It is a folder, a device or a pipe.
    #[error("the master key at {} is not a file", path.display())]
    NotAFile {
        /// What it is.
        path: PathBuf,
    },
    /// The text is not a key.
    #[error("the master key in {place} is malformed: {why}")]
    Malformed {
        /// The file or variable.
        place: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The key has too few or too many digits.
    #[error("the master key in {place} has {found} hexadecimal digits, it must have {KEY_DIGITS}")]
    WrongLength {
        /// The file or variable.
        place: String,
        /// How many digits it has.
        found: usize,
    },
    /// The checksum is another key's.
    #[error("the master key in {place} does not match its checksum: a digit is mistyped")]
    Checksum {
        /// The file or variable.
        place: String,
    },
    /// The file exists already.
    #[error("{} exists and is not overwritten: a lost master key cannot be made again", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The system refused.
    #[error("the master key at {} failed while {doing}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// The system's own error.
        source: std::io::Error,
    },
    /// The system gives no random numbers.
    #[error("the system gives no random numbers: {source}")]
    NoRandomness {
        /// The system's own error.
        source: getrandom::Error,
    },
}

/// 32 secret bytes, from which all keys are derived. In locked memory, zeroed when dropped; never printed.
pub struct MasterKey(Locked<u8>);

impl MasterKey {
    /// A new key from the system's random numbers.
    ///
    /// # Errors
    /// [`KeyError::NoRandomness`] if the system gives none.
    pub fn generate() -> Result<Self, KeyError> {
        let mut bytes = Locked::zeroed(KEY_DIGITS / 2);
        getrandom::fill(&mut bytes).map_err(|source| KeyError::NoRandomness { source })?;
        Ok(Self(bytes))
    }

    /// The key of these bytes, for tests and tools that must be repeatable.
    #[must_use]
    pub fn from_bytes(mut bytes: [u8; 32]) -> Self {
        let key = Self(Locked::copied(&bytes));
        bytes.zeroize();
        key
    }

    /// Writes the key to a new file of mode 0600, and returns when it and its folder are synced.
    ///
    /// # Errors
    /// [`KeyError::Exists`] if the file exists already; it is left alone.
    pub fn write_new(&self, path: &Path) -> Result<(), KeyError> {
        let failed = |doing| move |source| KeyError::File { path: path.to_owned(), doing, source };
        let mut file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::AlreadyExists => return Err(KeyError::Exists { path: path.to_owned() }),
            Err(e) => return Err(failed("creating it")(e)),
        };
        let written = file.write_all(self.to_text().as_bytes()).and_then(|()| file.sync_all());
        if let Err(e) = written {
            // Half a key is useless, and the file would make the next attempt fail.
            let _ = std::fs::remove_file(path);
            return Err(failed("writing it")(e));
        }
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("syncing its folder"))
    }

    /// Loads the key from its source.
    ///
    /// # Errors
    /// [`KeyError`], naming the place and what to do.
    pub fn load(source: &KeySource) -> Result<Self, KeyError> {
        Self::load_in(source, |name| std::env::var_os(name))
    }

    /// [`Self::load`] in an environment that the caller gives.
    fn load_in(source: &KeySource, variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, KeyError> {
        match source {
            KeySource::File(path) => Self::read(path, true),
            KeySource::Credential(name) => {
                if name.is_empty() || name == "." || name == ".." || name.contains('/') {
                    return Err(KeyError::CredentialName { name: name.clone() });
                }
                let folder = variable(CREDENTIALS_VARIABLE).ok_or(KeyError::NoVariable {
                    name: CREDENTIALS_VARIABLE,
                    advice: "run under a systemd unit with LoadCredential=, or keep the key in a file",
                })?;
                Self::read(&Path::new(&folder).join(name), false)
            }
            KeySource::Environment => {
                let text = variable(MASTER_KEY_VARIABLE).ok_or(KeyError::NoVariable {
                    name: MASTER_KEY_VARIABLE,
                    advice: "set it, or keep the key in a file made with `thenar keys generate`",
                })?;
                let text = Zeroizing::new(text.into_encoded_bytes());
                Self::parse(&text, &format!("the environment variable {MASTER_KEY_VARIABLE}"))
            }
        }
    }

    /// Reads a file. The checks are made on the open file, so it does not matter which links led to
    /// it or what replaces it meanwhile.
    fn read(path: &Path, private: bool) -> Result<Self, KeyError> {
        let failed = |doing| move |source| KeyError::File { path: path.to_owned(), doing, source };
        // O_NONBLOCK: opening a pipe would otherwise wait for a writer.
        let nonblock = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let file = match OpenOptions::new().read(true).custom_flags(nonblock).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Err(KeyError::Missing { path: path.to_owned() }),
            Err(e) => return Err(failed("opening it")(e)),
        };
        let metadata = file.metadata().map_err(failed("looking at it"))?;
        if !metadata.is_file() {
            return Err(KeyError::NotAFile { path: path.to_owned() });
        }
        let mode = metadata.mode() & 0o7777;
        let user = rustix::process::geteuid().as_raw();
        if private && !may_own(metadata.uid(), user) {
            return Err(KeyError::Owner { path: path.to_owned(), owner: metadata.uid(), user });
        }
        if private && mode & 0o077 != 0 {
            return Err(KeyError::Exposed { path: path.to_owned(), mode });
        }
        // Allocated for the whole text at once: growing would leave copies behind.
        let mut text = Zeroizing::new(Vec::with_capacity(READ_MAX + 64));
        file.take(READ_MAX as u64 + 1).read_to_end(&mut text).map_err(failed("reading it"))?;
        Self::parse(&text, &path.display().to_string())
    }

    /// The key as its line of text, with the newline.
    fn to_text(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(PREFIX.len() + KEY_DIGITS + 1 + CHECK_DIGITS + 1));
        text.push_str(PREFIX);
        push_hex(&mut text, &self.0);
        text.push('-');
        push_hex(&mut text, &checksum(&self.0));
        text.push('\n');
        text
    }

    /// The key in a line of text; white space around it is ignored.
    fn parse(text: &[u8], place: &str) -> Result<Self, KeyError> {
        let malformed = |why| KeyError::Malformed { place: place.to_owned(), why };
        if text.len() > READ_MAX {
            return Err(malformed("it is longer than a key can be"));
        }
        let text = text.trim_ascii();
        if text.is_empty() {
            return Err(malformed("it is empty"));
        }
        let rest =
            text.strip_prefix(PREFIX.as_bytes()).ok_or(malformed("it does not begin with thenar-master-key-1:"))?;
        let (digits, check) = match rest.iter().position(|b| *b == b'-') {
            Some(at) => (&rest[..at], Some(&rest[at + 1..])),
            None => (rest, None),
        };
        if !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(malformed("its key is not in hexadecimal digits"));
        }
        if digits.len() != KEY_DIGITS {
            return Err(KeyError::WrongLength { place: place.to_owned(), found: digits.len() });
        }
        let check = check.ok_or(malformed("its checksum is missing: the line ends with - and 8 hexadecimal digits"))?;
        let mut key = Locked::zeroed(KEY_DIGITS / 2);
        let mut expected = [0; CHECK_DIGITS / 2];
        if !(read_hex(check, &mut expected) && read_hex(digits, &mut key)) {
            return Err(malformed("its checksum is not 8 hexadecimal digits"));
        }
        if checksum(&key) != expected {
            return Err(KeyError::Checksum { place: place.to_owned() });
        }
        Ok(Self(key))
    }

    /// The secret.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MasterKey(..)")
    }
}

/// Whether a file of `owner` may hold the key of a process of `user`: root can read it anyway.
fn may_own(owner: u32, user: u32) -> bool {
    owner == user || owner == 0
}

/// Detects typing errors only; it stands beside the key, so it need not hide it.
fn checksum(key: &[u8]) -> [u8; CHECK_DIGITS / 2] {
    let digest = Sha256::new().chain_update(PREFIX).chain_update(key).finalize();
    std::array::from_fn(|i| digest[i])
}

fn push_hex(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(digit), 16).expect("a nibble is a digit"));
        }
    }
}

/// Fills `bytes` from twice as many hexadecimal digits; false if they are anything else.
fn read_hex(digits: &[u8], bytes: &mut [u8]) -> bool {
    let value = |digit: u8| char::from(digit).to_digit(16);
    digits.len() == 2 * bytes.len()
        && digits.chunks_exact(2).zip(bytes).all(|(pair, byte)| match (value(pair[0]), value(pair[1])) {
            (Some(high), Some(low)) => {
                *byte = u8::try_from(high << 4 | low).expect("two digits are a byte");
                true
            }
            _ => false,
        })
}

#[cfg(test)]
mod tests;
