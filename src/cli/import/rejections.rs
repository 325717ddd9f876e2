//! The lines that an import rejects: the first of them on stderr, all of them in the errors file.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use super::batch::Rejection;
use crate::cli::error::CliError;
use crate::cli::output::Progress;

/// Rejected lines that are told on stderr.
const TOLD_MAX: u64 = 20;

/// Where rejected lines go.
pub(super) struct Rejections {
    file: Option<(PathBuf, csv::Writer<File>)>,
    told: u64,
}

impl Rejections {
    /// Opens the errors file, if one is asked for: a new one, or one cut back to `kept_bytes`, which
    /// tell of the rows before the start.
    ///
    /// # Errors
    /// [`CliError::File`] if it cannot be written.
    pub(super) fn open(path: Option<&Path>, kept_bytes: u64) -> Result<Self, CliError> {
        let open = |path: &Path| {
            let file = OpenOptions::new().create(true).truncate(false).append(true).open(path)?;
            let kept = kept_bytes.min(file.metadata()?.len());
            file.set_len(kept)?;
            let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(file);
            if kept == 0 {
                writer.write_record(["line", "subject_id", "reason"])?;
            }
            Ok(writer)
        };
        let opened =
            path.map(|path| open(path).map(|writer| (path.to_owned(), writer)).map_err(CliError::file("write", path)));
        Ok(Self { file: opened.transpose()?, told: 0 })
    }

    /// Tells of a line.
    ///
    /// # Errors
    /// [`CliError::File`] if the errors file cannot be written.
    pub(super) fn add(&mut self, rejection: Rejection, progress: &Progress) -> Result<(), CliError> {
        self.told += 1;
        let Rejection { line, subject_id, reason } = rejection;
        if self.told <= TOLD_MAX {
            progress.note(format_args!("line {line}: {subject_id:?}: {reason}"));
        } else if self.told == TOLD_MAX + 1 {
            let rest =
                if self.file.is_some() { "the rest is in the --errors file" } else { "--errors FILE takes them all" };
            progress.note(format_args!("more lines were rejected; {rest}"));
        }
        self.write(|writer| Ok(writer.write_record([line.to_string(), subject_id, reason])?)).map(drop)
    }

    /// Writes everything out. Returns the length of the errors file, or 0 without one.
    ///
    /// # Errors
    /// [`CliError::File`] if it cannot be written.
    pub(super) fn flush(&mut self) -> Result<u64, CliError> {
        let length = self.write(|writer| {
            writer.flush()?;
            Ok(writer.get_ref().metadata()?.len())
        });
        length.map(Option::unwrap_or_default)
    }

    fn write<T>(
        &mut self,
        write: impl FnOnce(&mut csv::Writer<File>) -> std::io::Result<T>,
    ) -> Result<Option<T>, CliError> {
        let Some((path, writer)) = &mut self.file else { return Ok(None) };
        write(writer).map(Some).map_err(CliError::file("write", path))
    }
}
