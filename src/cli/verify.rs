//! `thenar verify`: check every byte of an index and every row of a registry, and that they agree.

use std::ops::ControlFlow;
use std::sync::OnceLock;

use clap::Args;
use thenar_index::{KeyId, Origin};

use super::Outcome;
use super::args::DataFolderArgs;
use super::error::CliError;
use super::output::{Progress, mib, print, print_json};
use crate::gallery::GalleryError;
use crate::registry::sqlite::SqliteRegistry;
use crate::registry::{Registry as _, StoredTemplate};
use crate::server::data_folder::DataFolder;
use crate::server::key_source;
use crate::vault::{MasterKey, Vault};

/// Check a data folder that no server is using. Of the registry: its database's pages, every sealed
/// template, every row under its keyed hash. Of the index: every checksum, every erased row, and
/// that it holds what the registry says. Changes nothing.
///
/// Exit code 1 if anything is damaged or still waits to be erased. `thenar serve` rewrites damaged
/// segments of the index from the registry, and erases the rest; a damaged registry is replaced from
/// a backup.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    folder: DataFolderArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Checks. [`Outcome::Failed`] if something is damaged, or not erased yet.
///
/// # Errors
/// [`CliError`] if the folder, the key, the registry or the index cannot be read at all.
pub(crate) fn run(args: VerifyArgs) -> Result<Outcome, CliError> {
    let config = args.folder.config(|_| {})?;
    let vault = Vault::new(MasterKey::load(&key_source(config.key_file.as_deref()))?);
    let folder = DataFolder::take_existing(&config.data)?;
    let registry = SqliteRegistry::open(&folder.registry(), vault.registry_keys())?;
    let (identity, gallery) = registry.identity()?.ok_or(CliError::NoGallery { path: config.data })?;
    let sealer = vault.sealer(identity.dim);
    let checked = with_progress("checking the registry", "templates", |progress| {
        let open = |t: &StoredTemplate| sealer.open(t.subject_id.as_str(), t.hand, &t.sealed).map(drop);
        registry.verify(&open, progress)
    });
    let origin = Origin { gallery, key: KeyId(vault.key_id()) };
    let report = with_progress("checking the index", "rows", |progress| {
        let progress = |done, total| {
            progress(done, total);
            ControlFlow::Continue(())
        };
        thenar_index::verify(&folder.index(), origin, &progress)
    })
    .map_err(GalleryError::from)?;

    let (last, contents) = registry.contents()?;
    let counts = registry.counts()?;
    let behind = last.0.checked_sub(report.lsn.0);
    let of_the_index = report.damage.iter().chain(&report.codes_damage).map(ToString::to_string);
    let mut problems: Vec<String> = checked.problems.iter().cloned().chain(of_the_index).collect();
    match behind {
        None => problems.push(format!("the index is at change {}, past the registry's last, {}", report.lsn.0, last.0)),
        // Damaged rows are not counted, so the numbers mean nothing if there are any.
        // Rows that are forgotten and not erased yet are still live on disk.
        Some(0) if report.damage.is_empty() && report.live - report.forgotten != counts.templates => {
            let live = report.live - report.forgotten;
            problems.push(format!("the index has {live} live templates, the registry {}", counts.templates));
        }
        // As many templates, but others: a registry from a backup or of a copy.
        Some(0) if report.damage.is_empty() && report.forgotten == 0 && report.contents != contents => {
            problems.push("the index does not hold the registry's templates".to_owned());
        }
        Some(_) => {}
    }
    let sound = problems.is_empty() && report.is_sound();
    let to_erase = report.erasures_unfinished + report.forgotten + report.stale;
    if args.json {
        print_json(&serde_json::json!({
            "sound": sound, "segments": report.segments, "rows": report.rows, "live": report.live,
            "erased": report.erased, "to_erase": to_erase, "codes_unfinished": report.codes_unfinished, "bytes": report.bytes, "lsn": report.lsn.0,
            "registry_lsn": last.0, "registry_templates": counts.templates, "registry_subjects": counts.subjects,
            "registry_requests": checked.requests, "registry_deletions": checked.deletions, "problems": problems,
        }))?;
    } else {
        let (subjects, templates) = (checked.subjects, checked.templates);
        print(format_args!("registry   {templates} templates of {subjects} subjects, sealed"))?;
        let (requests, deletions) = (checked.requests, checked.deletions);
        print(format_args!("           {requests} requests and {deletions} deletions are remembered"))?;
        print(format_args!("segments   {}", report.segments))?;
        let counted = if report.damage.is_empty() { "" } else { " in the segments without damage" };
        let (rows, live, erased) = (report.rows, report.live, report.erased);
        print(format_args!("rows       {rows} ({live} live, {erased} erased{counted})"))?;
        if to_erase > 0 {
            print(format_args!("to erase   {to_erase} (cut short by a kill or a power cut; opening does it)"))?;
        }
        if report.codes_unfinished > 0 {
            let blocks = report.codes_unfinished;
            print(format_args!("codes      {blocks} blocks of codes were cut short too; opening makes them again"))?;
        }
        print(format_args!("size       {}", mib(report.bytes)))?;
        print(format_args!("change     {} of {} ({} to replay)", report.lsn.0, last.0, behind.unwrap_or(0)))?;
        for problem in &problems {
            print(format_args!("damaged    {problem}"))?;
        }
        print(if sound {
            "The folder is sound."
        } else if problems.is_empty() {
            "The folder is not damaged, but something waits to be erased or finished; `thenar serve` does it."
        } else if !checked.problems.is_empty() {
            "The registry is damaged; put back a backup of it, and `thenar serve` makes the index anew."
        } else {
            "The index is damaged; `thenar serve` rewrites it from the registry."
        })?;
    }
    Ok(Outcome::done_if(sound))
}

/// What `work` returns; its progress is shown under the words `doing`.
fn with_progress<T>(doing: &'static str, unit: &'static str, work: impl FnOnce(&(dyn Fn(u64, u64) + Sync)) -> T) -> T {
    let bar = OnceLock::new();
    let result = work(&|done, total| bar.get_or_init(|| Progress::new(doing, total, unit)).set(done));
    if let Some(bar) = bar.get() {
        bar.finish();
    }
    result
}
