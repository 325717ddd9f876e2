//! `thenar identify`: one search for each row of a NumPy array, over one stream.

mod answer;
mod search;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;

use super::Outcome;
use super::args::{PurposeArg, ServerArgs, score};
use super::error::CliError;
use super::lists;
use super::output::{print, print_json, table};
use crate::api::proto;
use crate::model::{CANDIDATES_MAX, SubjectFilter, SubjectId};

/// Search for the palms in a NumPy array, one search per row.
///
/// Prints a table; with --json one object per line and row, with all candidates. The exit code is
/// 0 if every row was answered, whatever the answers are.
#[derive(Debug, Clone, Args)]
pub(crate) struct IdentifyArgs {
    /// Probes: a NumPy file with a float32 or float16 array of shape [N, D] in C order.
    #[arg(long, value_name = "FILE.npy")]
    embeddings: PathBuf,
    /// What the searches are for; each purpose has its own policy.
    #[arg(long, value_enum, default_value_t = PurposeArg::Entry)]
    purpose: PurposeArg,
    /// The venue where the palms were shown.
    #[arg(long, value_name = "ID", default_value = "command-line")]
    venue: String,
    /// Candidates to list for each row, 1 to 100.
    #[arg(long, value_name = "COUNT", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=i64::from(CANDIDATES_MAX)))]
    max_candidates: u32,
    /// List candidates from this score on (-1 to 1), and decide by it if the policy is laxer.
    /// Default: the policy's threshold.
    #[arg(long, value_name = "SCORE", value_parser = score, allow_negative_numbers = true)]
    threshold: Option<f64>,
    /// Rows to search for, from 0: such as 0..10 (without 10), 3,5 or 0..3,7. Default: all.
    #[arg(long, value_name = "ROWS")]
    rows: Option<RowSet>,
    /// Hands: a CSV file with a column hand (left, right or empty), one line per row of the array.
    #[arg(long, value_name = "FILE.csv")]
    hands: Option<PathBuf>,
    /// Find only these subjects, 3,000 at most: ids separated by commas, or @FILE with one per line.
    /// Ids that are not enrolled find nobody.
    #[arg(long, value_name = "ID,...|@FILE")]
    only: Option<String>,
    /// Print one JSON object per line: row, decision, threshold, gallery_size, candidates
    /// (rank, subject_id, score, hand, template_id, probes_compared), certificate, search_id, ms
    /// and server_ms; or row, error (code, message) and ms.
    #[arg(long)]
    json: bool,
    /// The server to search at.
    #[command(flatten)]
    server: ServerArgs,
}

/// Rows of an array, in the order in which they were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RowSet(Vec<Range<u64>>);

impl FromStr for RowSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number =
            |text: &str| text.trim().parse::<u64>().map_err(|_| format!("{:?} is not a row number", text.trim()));
        let ranges = text
            .split(',')
            .map(|part| match part.split_once("..") {
                Some((start, end)) => Ok(number(start)?..number(end)?),
                None => number(part).map(|row| row..row.saturating_add(1)),
            })
            .collect::<Result<Vec<_>, String>>()?;
        match ranges.iter().find(|range| range.is_empty()) {
            Some(range) => Err(format!("{}..{} holds no row", range.start, range.end)),
            None => Ok(Self(ranges)),
        }
    }
}

/// Runs `thenar identify`.
///
/// # Errors
/// [`CliError`] if a file is not usable, the server cannot be reached, or the stream breaks.
pub(crate) async fn run(args: IdentifyArgs) -> Result<Outcome, CliError> {
    let mut rows = table(&["row", "decision", "rank 1", "score", "runner-up", "score", "ms"], 0);
    let mut failed = false;
    search::search(&args, |answer| {
        failed |= answer.is_failure();
        if args.json {
            return print_json(&answer);
        }
        rows.add_row(answer.cells());
        Ok(())
    })
    .await?;
    if !args.json {
        print(rows)?;
    }
    Ok(Outcome::done_if(!failed))
}

/// The subjects that `--only` names, checked here so that an invalid one is bad usage.
fn only(text: &str) -> Result<proto::SubjectFilter, CliError> {
    let named = match text.strip_prefix('@') {
        Some(path) => lists::subject_ids(Path::new(path))?,
        None => text.split(',').map(|id| ("--only".to_owned(), id.trim().to_owned())).collect(),
    };
    for (origin, id) in &named {
        SubjectId::new(id).map_err(CliError::value(origin))?;
    }
    let subject_ids: Vec<String> = named.into_iter().map(|(_, id)| id).collect();
    SubjectFilter::new(&subject_ids).map_err(CliError::value("--only"))?;
    Ok(proto::SubjectFilter { subject_ids })
}
