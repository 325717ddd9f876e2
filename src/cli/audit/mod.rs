//! `thenar audit`: prove on one's own gallery that answers are those of an exhaustive search.
//!
//! The command is always there. What it does needs FAISS (`checked`), which is compiled only where
//! the cargo feature `faiss` asks for it; without it the command says how to get it.

#[cfg(feature = "faiss")]
mod checked;

use std::path::PathBuf;

use clap::Args;

use super::serve::Overrides;
use super::{CliError, Outcome};
use crate::engine::certificate::Certificate;
use crate::model::CANDIDATES_MAX;

/// Prove on a data folder that answers are those of an exhaustive search: hold them against FAISS.
///
/// Opens a data folder that no server is using, as a server would; changes nothing. Each probe is
/// answered by Thenar's own search, under each certificate, once with a threshold and once for the
/// best of all, and by FAISS's exhaustive inner product search over the same stored rows. Ranked
/// subjects and scores are compared; only what f32 rounding in FAISS explains is no difference.
///
/// Prints a line for each certificate; the exit code is 1 if any answer differs. FAISS gets the
/// rows 128 MiB at a time, so a gallery of any size can be audited. Needs a build with FAISS:
/// cargo build --release --features faiss (cmake, a C++ compiler, OpenBLAS).
#[derive(Debug, Args)]
pub struct AuditArgs {
    /// Configuration file (TOML) of the server that the folder belongs to. Flags lie over it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "the flags carry their own")]
    pub over: Overrides,
    /// Probes to make of stored templates, chosen at random.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub probes: u32,
    /// How far a probe is from its template, 0 to 10: the length of the noise that is added, where
    /// that of the template is 1. 0.85 is as two captures of one palm in the standard gallery.
    #[arg(long, value_name = "LENGTH", default_value_t = 0.85, value_parser = noise)]
    pub noise: f32,
    /// Take the probes from this NumPy file instead: embeddings as clients send them, a float32 or
    /// float16 array of shape [N, D] in C order.
    #[arg(long, value_name = "FILE.npy", conflicts_with_all = ["probes", "noise"])]
    pub probes_file: Option<PathBuf>,
    /// Subjects to rank for each probe, 1 to 100.
    #[arg(long, value_name = "COUNT", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=i64::from(CANDIDATES_MAX)))]
    pub k: u32,
    /// Score from which the searches with a threshold look (-1 to 1). Without it, the lowest that
    /// can matter under any policy of the configuration.
    #[arg(long, value_name = "SCORE", value_parser = super::identify::score, allow_negative_numbers = true)]
    pub threshold: Option<f64>,
    /// Certificates to search under: deterministic, randomised (with a miss probability of 1e-12)
    /// or randomised:P. Without it, deterministic and the configuration's randomised one.
    #[arg(long, value_name = "CERTIFICATE", value_delimiter = ',')]
    pub certificate: Vec<Certificate>,
    /// Seed of the choice of templates and of the noise.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
}

fn noise(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(length) if (0.0..=10.0).contains(&length) => Ok(length),
        _ => Err("the length of the noise is a number from 0 to 10".to_owned()),
    }
}

/// Runs `thenar audit`. [`Outcome::Failed`] where an answer differs.
///
/// # Errors
/// [`CliError`] where the folder, the probes or FAISS cannot be had.
#[cfg(feature = "faiss")]
pub async fn run(args: AuditArgs) -> Result<Outcome, CliError> {
    checked::run(args).await
}

/// Says how to build a `thenar` that can.
///
/// # Errors
/// [`CliError::WithoutFaiss`].
#[cfg(not(feature = "faiss"))]
#[expect(clippy::unused_async, reason = "as the one with FAISS")]
pub async fn run(_args: AuditArgs) -> Result<Outcome, CliError> {
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
