//! The arguments that several commands share, and the parsers of single values.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::TypedValueParser;
use clap::{Args, ValueEnum};

use crate::api::proto;
use crate::server::config::{Config, ConfigError, Raw};

/// The server that a command speaks to.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct ServerArgs {
    /// Address of the server: http://HOST:PORT, or https://HOST:PORT together with --ca.
    /// Default: the environment variable THENAR_SERVER, then http://127.0.0.1:7600.
    #[arg(long, value_name = "URL")]
    pub(crate) server: Option<String>,
    /// Certificate authority that signed the server's certificate (PEM).
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
    /// This client's certificate (PEM), for servers that ask for one.
    #[arg(long, value_name = "FILE", requires = "key")]
    pub(crate) cert: Option<PathBuf>,
    /// Private key of --cert (PEM).
    #[arg(long, value_name = "FILE", requires = "cert")]
    pub(crate) key: Option<PathBuf>,
    /// Name that the server's certificate must carry, if it is not the host of the address.
    #[arg(long, value_name = "NAME", requires = "ca")]
    pub(crate) server_name: Option<String>,
    /// Seconds to wait for the connection.
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds(1..=600))]
    pub(crate) connect_timeout: Duration,
}

impl ServerArgs {
    /// A server at `address`, without TLS.
    pub(crate) fn plain(address: &str) -> Self {
        Self {
            server: Some(address.to_owned()),
            ca: None,
            cert: None,
            key: None,
            server_name: None,
            connect_timeout: Duration::from_secs(5),
        }
    }
}

/// The data folder that a command opens, as the server that it belongs to is configured.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct DataFolderArgs {
    /// Configuration file (TOML) of the server. Flags override it.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Folder of the registry and the index.
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Master key, made by `thenar keys generate`.
    #[arg(long, value_name = "FILE")]
    pub(crate) key_file: Option<PathBuf>,
    /// Dimensions of an embedding, for an empty gallery; otherwise the first enrolment decides.
    #[arg(long, value_name = "N")]
    pub(crate) dim: Option<usize>,
    /// auto, cpu or gpu.
    #[arg(long, value_name = "ENGINE")]
    pub(crate) engine: Option<String>,
    /// With --engine gpu: part of the adapter's name; software adapters are used only by name.
    #[arg(long, value_name = "NAME")]
    pub(crate) adapter: Option<String>,
    /// Threads of the CPU engine.
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
}

impl DataFolderArgs {
    /// Reads the file, if there is one, applies the flags and `more`, and checks everything.
    ///
    /// # Errors
    /// [`ConfigError`] with every problem.
    pub(crate) fn config(self, more: impl FnOnce(&mut Raw)) -> Result<Config, ConfigError> {
        let mut raw = self.config.as_deref().map(Raw::read).transpose()?.unwrap_or_default();
        raw.data = self.data.or(raw.data);
        raw.key_file = self.key_file.or(raw.key_file);
        raw.dim = self.dim.or(raw.dim);
        raw.engine.kind = self.engine.or(raw.engine.kind);
        raw.engine.adapter = self.adapter.or(raw.engine.adapter);
        raw.engine.threads = self.threads.or(raw.engine.threads);
        more(&mut raw);
        raw.validated()
    }
}

/// The purposes by their words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PurposeArg {
    /// Paying at a terminal.
    Payment,
    /// Entering a venue.
    Entry,
    /// Entering a place of work.
    Workplace,
    /// Collecting loyalty points.
    Loyalty,
}

impl From<PurposeArg> for proto::Purpose {
    fn from(purpose: PurposeArg) -> Self {
        match purpose {
            PurposeArg::Payment => Self::Payment,
            PurposeArg::Entry => Self::Entry,
            PurposeArg::Workplace => Self::Workplace,
            PurposeArg::Loyalty => Self::Loyalty,
        }
    }
}

/// Parses a whole number of seconds in `range`.
pub(crate) fn seconds(range: RangeInclusive<u64>) -> impl TypedValueParser<Value = Duration> {
    clap::value_parser!(u64).range(range).map(Duration::from_secs)
}

/// Parses a comparison score.
pub(crate) fn score(text: &str) -> Result<f64, String> {
    number(text, -1.0..=1.0)
}

/// Parses a number in `range`.
pub(crate) fn number<N: FromStr + PartialOrd + Display>(text: &str, range: RangeInclusive<N>) -> Result<N, String> {
    let number = text.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("not a number from {} to {}", range.start(), range.end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outside_their_range_are_refused() {
        assert!((score("-0.25").unwrap() + 0.25).abs() < 1e-12);
        for bad in ["1.01", "nan", "", "one"] {
            assert_eq!(score(bad).unwrap_err(), "not a number from -1 to 1", "{bad}");
        }
    }
}
