//! Where an interrupted import continues: a small file beside the array.
//!
//! Written while an import runs, by replacing it whole, and removed when the import ends well. It
//! holds no embedding and no subject id. It is a hint that is never trusted to be right: it is used
//! only for the very files and the server or folder that it was written for, the last acknowledged
//! batch is sent again, and request ids make sending twice harmless.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cli::error::CliError;

/// The place an import has reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ImportState {
    /// Names the array, the list and where they go; see [`inputs`].
    pub(super) inputs: String,
    /// First row of the last acknowledged batch: everything before it is done.
    pub(super) row: u64,
    /// Row after the last acknowledged one.
    pub(super) end_row: u64,
    /// Subjects before `row` that were rejected.
    pub(super) rejected: u64,
    /// Length of the errors file that tells of them.
    pub(super) errors_bytes: u64,
}

impl ImportState {
    /// The first row.
    pub(super) fn start(inputs: &str) -> Self {
        Self { inputs: inputs.to_owned(), row: 0, end_row: 0, rejected: 0, errors_bytes: 0 }
    }
}

/// A name for what is imported where: the array's length and time of change, a digest of the
/// list's bytes, and the target.
pub(super) fn inputs(embeddings: (u64, u128), roster_digest: u64, target: &str) -> String {
    format!("v1 {} bytes of {} ns, list {roster_digest:016x}, to {target}", embeddings.0, embeddings.1)
}

/// The state file of one import.
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
}

impl StateFile {
    /// The state file at `path`, or beside the array at `embeddings`.
    pub(super) fn new(path: Option<&Path>, embeddings: &Path) -> Self {
        Self { path: path.map_or_else(|| with_ending(embeddings, ".thenar-import"), Path::to_owned) }
    }

    /// The state left by an earlier import of the same `inputs`, if there is a complete one.
    ///
    /// # Errors
    /// [`CliError::File`] if the file is there and cannot be read.
    pub(super) fn load(&self, inputs: &str) -> Result<Option<ImportState>, CliError> {
        match fs::read(&self.path) {
            Ok(bytes) => Ok(serde_json::from_slice::<ImportState>(&bytes).ok().filter(|state| state.inputs == inputs)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(CliError::file("read", &self.path)(error)),
        }
    }

    /// Replaces the file. Not synced: what a power cut takes back is only sent again.
    ///
    /// # Errors
    /// [`CliError::File`] if the folder cannot be written.
    pub(super) fn save(&self, state: &ImportState) -> Result<(), CliError> {
        let beside = with_ending(&self.path, ".new");
        let written = serde_json::to_vec(state)
            .map_err(io::Error::from)
            .and_then(|bytes| fs::write(&beside, bytes))
            .and_then(|()| fs::rename(&beside, &self.path));
        written.map_err(CliError::file("write", &self.path))
    }

    /// Removes the file, if it is there.
    ///
    /// # Errors
    /// [`CliError::File`] if it cannot be removed.
    pub(super) fn remove(&self) -> Result<(), CliError> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(CliError::file("remove", &self.path)(error)),
            _ => Ok(()),
        }
    }
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(row: u64) -> ImportState {
        ImportState {
            inputs: inputs((10, 20), 30, "http://here"),
            row,
            end_row: row + 512,
            rejected: 1,
            errors_bytes: 64,
        }
    }

    #[test]
    fn a_saved_state_comes_back_for_the_same_inputs_only() {
        let folder = tempfile::tempdir().unwrap();
        let file = StateFile::new(None, &folder.path().join("gallery.npy"));
        assert!(file.path.ends_with("gallery.npy.thenar-import"));
        assert_eq!(file.load(&state(0).inputs).unwrap(), None);
        file.save(&state(512)).unwrap();
        file.save(&state(1024)).unwrap();
        assert_eq!(file.load(&state(0).inputs).unwrap(), Some(state(1024)));
        for other in [
            inputs((11, 20), 30, "http://here"),
            inputs((10, 21), 30, "http://here"),
            inputs((10, 20), 31, "http://here"),
            inputs((10, 20), 30, "http://there"),
        ] {
            assert_eq!(file.load(&other).unwrap(), None);
        }
        file.remove().unwrap();
        file.remove().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left beside the array");
    }

    #[test]
    fn an_incomplete_state_file_is_ignored() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let file = StateFile::new(Some(&path), Path::new("gallery.npy"));
        file.save(&state(512)).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(file.load(&state(0).inputs).unwrap(), None, "{length} bytes of {}", whole.len());
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let file = StateFile::new(Some(Path::new("/nowhere/state")), Path::new("gallery.npy"));
        let error = file.save(&state(0)).unwrap_err();
        assert!(error.to_string().contains("/nowhere/state"), "{error}");
    }
}
