//! `thenar audit`: proves on a user's own gallery that answers are those of an exhaustive search.
//!
//! The command is always there. What it does needs FAISS (`comparison`), which is compiled only with
//! the cargo feature `faiss`; without it the command says how to get it.

#[cfg(feature = "faiss")]
mod comparison;
#[cfg(feature = "faiss")]
mod report;

use std::path::PathBuf;

use clap::Args;

use super::Outcome;
use super::args::{DataFolderArgs, number, score};
use super::error::CliError;
use crate::engine::certificate::Certificate;
use crate::model::CANDIDATES_MAX;

/// Prove on a data folder that answers are those of an exhaustive search: compare them with FAISS's.
///
/// Opens a data folder that no server is using, as a server would; changes nothing. Each probe is
/// answered by Thenar's own search, under each certificate, once with a threshold and once for the
/// best of all, and by FAISS's exhaustive inner product search over the same stored rows. Ranked
/// subjects and scores are compared; what f32 rounding in FAISS explains is not a difference.
///
/// Prints a line for each certificate; the exit code is 1 if any answer differs. FAISS gets the
/// rows 128 MiB at a time, so a gallery of any size can be audited. Needs a build with FAISS:
/// cargo build --release --features faiss (cmake, a C++ compiler, OpenBLAS).
#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    #[command(flatten)]
    folder: DataFolderArgs,
    /// Probes to make from stored templates, chosen at random.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    probes: u32,
    /// How far a probe is from its template, 0 to 10: the length of the noise that is added to a
    /// template of length 1. Two captures of one palm in the standard gallery have 0.85.
    #[arg(long, value_name = "LENGTH", default_value_t = 0.85, value_parser = noise)]
    noise: f32,
    /// Take the probes from this NumPy file instead: embeddings as clients send them, a float32 or
    /// float16 array of shape [N, D] in C order.
    #[arg(long, value_name = "FILE.npy", conflicts_with_all = ["probes", "noise"])]
    probes_file: Option<PathBuf>,
    /// Subjects to rank for each probe, 1 to 100.
    #[arg(long, value_name = "COUNT", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=i64::from(CANDIDATES_MAX)))]
    k: u32,
    /// Threshold of the searches with one (-1 to 1). Default: the lowest score that can matter under
    /// any policy of the configuration.
    #[arg(long, value_name = "SCORE", value_parser = score, allow_negative_numbers = true)]
    threshold: Option<f64>,
    /// Certificates to search under: deterministic, randomised (with a miss probability of 1e-12)
    /// or randomised:P. Default: deterministic and the configuration's randomised one.
    #[arg(long, value_name = "CERTIFICATE", value_delimiter = ',')]
    certificate: Vec<Certificate>,
    /// Seed of the choice of templates and of the noise.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

fn noise(text: &str) -> Result<f32, String> {
    number(text, 0.0..=10.0)
}

/// Runs `thenar audit`. [`Outcome::Failed`] if an answer differs.
///
/// # Errors
/// [`CliError`] if the folder or the probes are not usable, or FAISS fails.
#[cfg(feature = "faiss")]
pub(crate) async fn run(args: AuditArgs) -> Result<Outcome, CliError> {
    comparison::run(args).await
}

/// Says how to build a `thenar` that can.
///
/// # Errors
/// [`CliError::WithoutFaiss`].
#[cfg(not(feature = "faiss"))]
#[expect(clippy::unused_async, reason = "as the one with FAISS")]
pub(crate) async fn run(_args: AuditArgs) -> Result<Outcome, CliError> {
    Err(CliError::WithoutFaiss)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: AuditArgs,
    }

    fn parsed(args: &[&str]) -> Result<AuditArgs, clap::Error> {
        Line::try_parse_from(["audit"].iter().chain(args)).map(|line| line.args)
    }

    #[test]
    fn certificates_and_noise_are_read_and_bad_ones_are_bad_usage() {
        let args = parsed(&["--certificate", "deterministic,randomised:1e-6", "--noise", "0"]).unwrap();
        assert_eq!(args.certificate, [Certificate::Deterministic, Certificate::Randomised { miss_probability: 1e-6 }]);
        assert_eq!(args.noise.to_bits(), 0);
        for bad in [
            &["--certificate", "sure"][..],
            &["--certificate", "randomised:0.5"],
            &["--noise", "-1"],
            &["--noise", "nan"],
            &["--probes", "0"],
            &["--k", "0"],
            &["--k", "101"],
            &["--threshold", "1.5"],
            &["--probes", "3", "--probes-file", "a.npy"],
        ] {
            assert_eq!(parsed(bad).expect_err("refused").exit_code(), 2, "{bad:?}");
        }
    }

    #[cfg(not(feature = "faiss"))]
    #[tokio::test]
    async fn a_build_without_faiss_says_how_to_make_one_with_it() {
        let error = run(parsed(&["--data", "nowhere"]).unwrap()).await.unwrap_err();
        assert!(error.to_string().contains("--features faiss"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
