//! Compiled kernels on disk, so that a restart need not compile them again.
//!
//! The driver makes and checks the bytes; a file that is missing, damaged or of another driver is ignored and
//! written again. Contains no template: kernels are the same for everyone. Failing to read or write it only
//! costs time, and is logged.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Largest file that is read: a few hundred times what the kernels take.
const BYTES_MAX: u64 = 64 << 20;

/// The compiled kernels of one device; none if the backend keeps them itself.
pub(super) struct KernelCache {
    pipelines: Option<wgpu::PipelineCache>,
    file: PathBuf,
    /// The contents of the file when it was opened.
    before: Vec<u8>,
}

impl KernelCache {
    /// The cache of an adapter in `folder`, read if it is there.
    pub(super) fn open(device: &wgpu::Device, adapter: &wgpu::AdapterInfo, folder: Option<&Path>) -> Self {
        let none = Self { pipelines: None, file: PathBuf::new(), before: Vec::new() };
        let Some((folder, name)) = folder.zip(wgpu::util::pipeline_cache_key(adapter)) else { return none };
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return none;
        }
        let file = folder.join(format!("kernels-{name}"));
        let before = read(&file).unwrap_or_default();
        let data = (!before.is_empty()).then_some(&*before);
        let descriptor = wgpu::PipelineCacheDescriptor { label: Some("kernels"), data, fallback: true };
        // SAFETY: `save` wrote the file, and only this user can read and write it; wgpu checks its header, length,
        // driver and hash, and falls back to an empty cache.
        let pipelines = Some(unsafe { device.create_pipeline_cache(&descriptor) });
        Self { pipelines, file, before }
    }

    /// The cache that pipelines are made with.
    pub(super) fn pipelines(&self) -> Option<&wgpu::PipelineCache> {
        self.pipelines.as_ref()
    }

    /// Writes what was compiled, unless the file has it already.
    pub(super) fn save(&self) {
        let Some(data) = self.pipelines.as_ref().and_then(wgpu::PipelineCache::get_data) else { return };
        if data == self.before {
            return;
        }
        if let Err(error) = write(&self.file, &data) {
            tracing::warn!(%error, file = %self.file.display(), "compiled kernels could not be saved");
        }
    }
}

/// The file's bytes, if it is a plain file that nobody else can have written.
fn read(file: &Path) -> Option<Vec<u8>> {
    let about = fs::symlink_metadata(file).ok()?;
    if !about.is_file() || about.len() > BYTES_MAX {
        return None;
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
        let own = rustix::process::geteuid().as_raw();
        if about.permissions().mode() & 0o077 != 0 || about.uid() != own {
            return None;
        }
    }
    fs::read(file).ok()
}

/// Replaces the file by one with mode 0600.
fn write(file: &Path, data: &[u8]) -> std::io::Result<()> {
    let new = file.with_extension("new");
    // What a crash has left there may have another mode.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        options.mode(0o600);
    }
    let mut to = options.open(&new)?;
    to.write_all(data)?;
    to.sync_all()?;
    fs::rename(&new, file)
}
