//! Small disks, and folders on any disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::machine::{gpu_is_required, skip};

/// A small disk in memory, unmounted and removed when dropped.
pub(crate) struct SmallDisk(TempDir);

impl SmallDisk {
    /// In a folder of its own in `within`. `None`, with the reason printed, if this user may not mount one.
    pub(crate) fn mount(within: &Path, mib: u64) -> Option<Self> {
        let at = tempfile::Builder::new().prefix("thenar-it-disk-").tempdir_in(within).expect("a temporary folder");
        let size = format!("size={mib}m,mode=0700");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "thenar-test"]).arg(at.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at)),
            other => {
                // CI runs as root and has every tool: there a skip would hide a broken promise.
                assert!(!gpu_is_required(), "a small disk cannot be mounted: {other:?}");
                skip("a small disk cannot be mounted (it takes root)");
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Bytes that are free.
    pub(crate) fn free(&self) -> u64 {
        let fs = rustix::fs::statvfs(self.path()).expect("it is mounted");
        fs.f_bavail * fs.f_frsize
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a server that is still ending must not prevent it.
        let _ = Command::new("umount").arg("--lazy").arg(self.path()).status();
    }
}

/// Copies a folder with everything in it.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("the folder is made");
    for entry in std::fs::read_dir(from).expect("the folder is read") {
        let entry = entry.expect("the folder is read");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("a type").is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("the file is copied");
        }
    }
}

/// Every file under a folder.
pub(crate) fn files_under(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).expect("the folder is read") {
        let path = entry.expect("the folder is read").path();
        if path.is_dir() {
            files.extend(files_under(&path));
        } else {
            files.push(path);
        }
    }
    files
}
