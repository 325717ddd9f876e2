//! `thenar verify-index`: check every byte of an index, and that it is the registry's.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::OnceLock;

use anyhow::Context as _;
use clap::Args;
use thenar_index::{KeyId, Origin};

use super::progress::Progress;
use super::serve::Overrides;
use super::{Outcome, table};
use crate::data::DataFolder;
use crate::registry::Registry as _;
use crate::registry::sqlite::SqliteRegistry;
use crate::server::key_source;
use crate::vault::{MasterKey, Vault};

/// Check the index of a data folder that no server is using: every checksum, every erased row,
/// and that it holds what the registry says. Changes nothing.
///
/// Exit code 1 if anything is damaged or still waits to be erased; `thenar serve` rewrites damaged
/// segments from the registry, and erases the rest.
#[derive(Debug, Args)]
pub struct VerifyIndexArgs {
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
/// Where the folder, the key or the index cannot be read at all.
pub fn run(args: VerifyIndexArgs) -> anyhow::Result<Outcome> {
    let config = args.over.config(args.config.as_deref(), |_| {})?;
    let vault = Vault::new(MasterKey::load(&key_source(config.key_file.as_deref()))?);
    let folder = DataFolder::take_existing(&config.data)?;
    let registry = SqliteRegistry::open(&folder.registry(), vault.registry_keys())?;
    let bar = OnceLock::new();
    let progress = |done: u64, total: u64| {
        bar.get_or_init(|| Progress::new("checking", total, "rows")).set(done);
        ControlFlow::Continue(())
    };
    let (_, gallery) = registry.identity()?.context("the registry has no gallery yet")?;
    let origin = Origin { gallery, key: KeyId(vault.key_id()) };
    let report = thenar_index::verify(&folder.index(), origin, &progress)?;
    if let Some(bar) = bar.get() {
        bar.finish();
    }

    let last = registry.last_lsn()?;
    let counts = registry.counts()?;
    let behind = last.0.checked_sub(report.lsn.0);
    let mut problems: Vec<String> = report.damage.iter().chain(&report.codes_damage).map(ToString::to_string).collect();
    match behind {
        None => problems.push(format!("the index is at change {}, past the registry's last, {}", report.lsn.0, last.0)),
        // What is damaged is not counted, so that the numbers then say nothing more.
        // Rows that are forgotten and not erased yet are still live on disk.
        Some(0) if report.damage.is_empty() && report.live - report.forgotten != counts.templates => {
            let live = report.live - report.forgotten;
            problems.push(format!("the index has {live} live templates, the registry {}", counts.templates));
        }
        Some(_) => {}
    }
    let sound = problems.is_empty() && report.is_sound();
    let to_erase = report.erasures_unfinished + report.forgotten + report.stale;
    if args.json {
        table::say_json(&serde_json::json!({
            "sound": sound, "segments": report.segments, "rows": report.rows, "live": report.live,
            "erased": report.erased, "to_erase": to_erase, "codes_unfinished": report.codes_unfinished, "bytes": report.bytes, "lsn": report.lsn.0,
            "registry_lsn": last.0, "registry_templates": counts.templates, "problems": problems,
        }))?;
    } else {
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
            "The index is sound."
        } else if problems.is_empty() {
            "The index is not damaged, but something waits to be erased or finished; `thenar serve` does it."
        } else {
            "The index is damaged; `thenar serve` rewrites it from the registry."
        })?;
    }
    Ok(Outcome::done_if(sound))
}
