//! `thenar verify`: check every byte of an index and every row of a registry, and that they agree.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::Context as _;
use clap::Args;
use thenar_index::{KeyId, Origin};

use super::progress::Progress;
use super::serve::Overrides;
use super::{Outcome, table};
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
pub struct VerifyArgs {
    /// Configuration file (TOML). Flags lie over it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "the flags carry their own")]
    pub over: Overrides,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

/// Checks. [`Outcome::Failed`] if something is damaged, or not erased yet.
///
/// # Errors
/// Where the folder, the key, the registry or the index cannot be read at all.
pub fn run(args: VerifyArgs) -> anyhow::Result<Outcome> {
    let config = args.over.config(args.config.as_deref(), |_| {})?;
    let vault = Vault::new(MasterKey::load(&key_source(config.key_file.as_deref()))?);
    let folder = DataFolder::take_existing(&config.data)?;
    let registry = SqliteRegistry::open(&folder.registry(), vault.registry_keys())?;
    let (identity, gallery) = registry.identity()?.context("the registry has no gallery yet")?;
    let sealer = vault.sealer(identity.dim);
    let checked = watched("checking the registry", "templates", |progress| {
        let open = |t: &StoredTemplate| sealer.open(t.subject_id.as_str(), t.hand, &t.sealed).map(drop);
        registry.verify(&open, progress)
    });
    let origin = Origin { gallery, key: KeyId(vault.key_id()) };
    let report = watched("checking the index", "rows", |progress| {
        let progress = |done, total| {
            progress(done, total);
            ControlFlow::Continue(())
        };
        thenar_index::verify(&folder.index(), origin, &progress)
    })?;

    let (last, contents) = registry.contents()?;
    let counts = registry.counts()?;
    let behind = last.0.checked_sub(report.lsn.0);
    let of_the_index = report.damage.iter().chain(&report.codes_damage).map(ToString::to_string);
    let mut problems: Vec<String> = checked.problems.iter().cloned().chain(of_the_index).collect();
    match behind {
        None => problems.push(format!("the index is at change {}, past the registry's last, {}", report.lsn.0, last.0)),
        // What is damaged is not counted, so that the numbers then say nothing more.
        // Rows that are forgotten and not erased yet are still live on disk.
        Some(0) if report.damage.is_empty() && report.live - report.forgotten != counts.templates => {
            let live = report.live - report.forgotten;
            problems.push(format!("the index has {live} live templates, the registry {}", counts.templates));
        }
        // The same number of other people: a registry that was put back, or taken from a copy.
        Some(0) if report.damage.is_empty() && report.forgotten == 0 && report.contents != contents => {
            problems.push("the index does not hold the registry's templates".to_owned());
        }
        Some(_) => {}
    }
    let sound = problems.is_empty() && report.is_sound();
    let to_erase = report.erasures_unfinished + report.forgotten + report.stale;
    if args.json {
        table::say_json(&serde_json::json!({
            "sound": sound, "segments": report.segments, "rows": report.rows, "live": report.live,
            "erased": report.erased, "to_erase": to_erase, "codes_unfinished": report.codes_unfinished, "bytes": report.bytes, "lsn": report.lsn.0,
            "registry_lsn": last.0, "registry_templates": counts.templates, "registry_subjects": counts.subjects,
            "registry_requests": checked.requests, "registry_deletions": checked.deletions, "problems": problems,
        }))?;
    } else {
        let (subjects, templates) = (checked.subjects, checked.templates);
        table::say(format_args!("registry   {templates} templates of {subjects} subjects, sealed"))?;
        let (requests, deletions) = (checked.requests, checked.deletions);
        table::say(format_args!("           {requests} requests and {deletions} deletions are remembered"))?;
        table::say(format_args!("segments   {}", report.segments))?;
        let counted = if report.damage.is_empty() { "" } else { " in the segments without damage" };
        let (rows, live, erased) = (report.rows, report.live, report.erased);
        table::say(format_args!("rows       {rows} ({live} live, {erased} erased{counted})"))?;
        if to_erase > 0 {
            table::say(format_args!("to erase   {to_erase} (cut short by a kill or a power cut; opening does it)"))?;
        }
        if report.codes_unfinished > 0 {
            let blocks = report.codes_unfinished;
            table::say(format_args!(
                "codes      {blocks} blocks of codes cut short likewise; opening makes them anew"
            ))?;
        }
        table::say(format_args!("size       {:.1} MiB", report.bytes as f64 / f64::from(1 << 20)))?;
        table::say(format_args!("change     {} of {} ({} to replay)", report.lsn.0, last.0, behind.unwrap_or(0)))?;
        for problem in &problems {
            table::say(format_args!("damaged    {problem}"))?;
        }
        table::say(if sound {
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

/// What `work` returns; what it tells of its progress is shown under the words `doing`.
fn watched<T>(doing: &'static str, unit: &'static str, work: impl FnOnce(&(dyn Fn(u64, u64) + Sync)) -> T) -> T {
    let bar = OnceLock::new();
    let result = work(&|done, total| bar.get_or_init(|| Progress::new(doing, total, unit)).set(done));
    if let Some(bar) = bar.get() {
        bar.finish();
    }
    result
}
