//! `thenar keys`: make and look at the master key.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Outcome;
use super::error::CliError;
use super::output::{print, print_json};
use crate::server::key_source;
use crate::vault::{MasterKey, Vault};

/// Make the master key, or show its fingerprint.
#[derive(Debug, Args)]
pub(crate) struct KeysArgs {
    #[command(subcommand)]
    command: KeysCommand,
}

#[derive(Debug, Subcommand)]
enum KeysCommand {
    /// Make a new master key, readable by its owner alone. Never overwrites one.
    ///
    /// Keep a copy apart from the data: without the key a gallery is noise, and nobody can make it again.
    Generate {
        /// Where to write it.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Print the fingerprint of a key, as galleries made with it remember it.
    Show {
        /// The key. Default: the systemd credential or THENAR_MASTER_KEY.
        #[arg(long, value_name = "FILE")]
        key_file: Option<PathBuf>,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

/// Makes or shows a key.
///
/// # Errors
/// [`CliError`] if the key cannot be made or read.
pub(crate) fn run(args: KeysArgs) -> Result<Outcome, CliError> {
    let (path, json, vault) = match args.command {
        KeysCommand::Generate { out, json } => {
            let key = MasterKey::generate()?;
            key.write_new(&out)?;
            (Some(out), json, Vault::new(key))
        }
        KeysCommand::Show { key_file, json } => {
            let vault = Vault::new(MasterKey::load(&key_source(key_file.as_deref()))?);
            (key_file, json, vault)
        }
    };
    let fingerprint: String = vault.key_id().iter().map(|b| format!("{b:02x}")).collect();
    if json {
        print_json(&serde_json::json!({ "fingerprint": fingerprint, "file": path }))?;
    } else {
        if let Some(path) = path {
            print(format_args!("key file     {}", path.display()))?;
        }
        print(format_args!("fingerprint  {fingerprint}"))?;
    }
    Ok(Outcome::Done)
}
