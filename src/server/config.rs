//! From a TOML file and flags to a validated tree.
//!
//! Raw text becomes [`Raw`], flags lie over it, and [`Raw::validated`] gives a [`Config`] that every
//! part can use without checking again, or every reason why not, not only the first. Unknown keys
//! are refused. Does no I/O but reading the file.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::api::CallLimits;
use crate::engine::certificate::{self, Certificate};
use crate::model::{self, PROBES_MAX, Purpose, VenueId};
use crate::net;
use crate::policy::{Policies, Policy};
use crate::search::batch::BatchConfig;

/// What the file says, before it is checked. Every key is optional here.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the keys are documented in deploy/thenar.toml, word for word")]
pub struct Raw {
    pub data: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    pub dim: Option<usize>,
    pub venues: Option<Vec<String>>,
    #[serde(default)]
    pub server: RawServer,
    #[serde(default)]
    pub metrics: RawMetrics,
    #[serde(default)]
    pub engine: RawEngine,
    #[serde(default)]
    pub batch: RawBatch,
    #[serde(default)]
    pub search: RawSearch,
    #[serde(default)]
    pub storage: RawStorage,
    #[serde(default)]
    pub policy: RawPolicies,
    #[serde(default)]
    pub log: RawLog,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the keys are documented in deploy/thenar.toml, word for word")]
pub struct RawSearch {
    pub certificate: Option<String>,
    pub miss_probability: Option<f64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the keys are documented in deploy/thenar.toml, word for word")]
pub struct RawServer {
    pub listen: Option<String>,
    pub drain_seconds: Option<u64>,
    pub connections_max: Option<usize>,
    pub connections_per_address_max: Option<usize>,
    pub handshake_seconds: Option<u64>,
    pub first_request_seconds: Option<u64>,
    pub idle_seconds: Option<u64>,
    pub age_seconds: Option<u64>,
    pub call_seconds: Option<u64>,
    pub message_seconds: Option<u64>,
    pub messages_mib: Option<usize>,
    pub tls: Option<RawTls>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the keys are documented in deploy/thenar.toml, word for word")]
pub struct RawTls {
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub client_ca: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the keys are documented in deploy/thenar.toml, word for word")]
pub struct RawMetrics {
    pub listen: Option<String>,
    pub beyond_loopback: Option<bool>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the keys are documented in deploy/thenar.toml, word for word")]
pub struct RawEngine {
    pub kind: Option<String>,
    pub adapter: Option<String>,
    pub matrices: Option<bool>,
    pub threads: Option<usize>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the keys are documented in deploy/thenar.toml, word for word")]
pub struct RawBatch {
    pub queue_max: Option<usize>,
    pub probes_max: Option<usize>,
    pub wait_ms_max: Option<usize>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the keys are documented in deploy/thenar.toml, word for word")]
pub struct RawStorage {
    pub reserve_mib: Option<u64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the keys are documented in deploy/thenar.toml, word for word")]
pub struct RawPolicies {
    pub payment: Option<RawPolicy>,
    pub entry: Option<RawPolicy>,
    pub workplace: Option<RawPolicy>,
    pub loyalty: Option<RawPolicy>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the keys are documented in deploy/thenar.toml, word for word")]
pub struct RawPolicy {
    pub threshold: Option<f64>,
    pub margin: Option<f64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the keys are documented in deploy/thenar.toml, word for word")]
pub struct RawLog {
    pub format: Option<String>,
    pub level: Option<String>,
}

/// A configuration every part of which is good.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The data folder.
    pub data: PathBuf,
    /// The master key's file; `None`: a systemd credential or the environment.
    pub key_file: Option<PathBuf>,
    /// Components of an embedding; `None`: as the gallery was made, or as the first enrolment has it.
    pub dim: Option<usize>,
    /// Venues that may ask; empty means any.
    pub venues: BTreeSet<VenueId>,
    /// Where gRPC is served.
    pub server: ServerConfig,
    /// Where metrics are served; `None`: nowhere.
    pub metrics: Option<SocketAddr>,
    /// What sifts.
    pub engine: EngineConfig,
    /// Limits of admission.
    pub batch: BatchConfig,
    /// Under which certificate searches are answered that ask for none.
    pub certificate: Certificate,
    /// Room on the disk that enrolments leave free for deletions.
    pub reserve_bytes: u64,
    /// A policy for each purpose.
    pub policies: Policies,
    /// How to log.
    pub log: LogConfig,
}

/// Where and how gRPC is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// Address and port; port 0 picks a free one.
    pub listen: SocketAddr,
    /// How long in-flight requests may take once the server stops.
    pub drain_seconds: u64,
    /// Limits of connections.
    pub connections: net::Limits,
    /// Limits of calls.
    pub calls: CallLimits,
    /// Mutual TLS. Never `None` beyond loopback.
    pub tls: Option<TlsConfig>,
}

/// Files of mutual TLS, PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// The server's certificate chain.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Whose clients are let in.
    pub client_ca: PathBuf,
}

/// Which engine sifts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// The choice.
    pub kind: EngineKind,
    /// Whether a GPU's cooperative matrices may be used.
    pub matrices: bool,
    /// Threads of the CPU engine.
    pub threads: usize,
}

/// The choice of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineKind {
    /// A real GPU where there is one, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU: the named adapter (a software one too), or the first real one.
    Gpu {
        /// Part of the adapter's name.
        adapter: Option<String>,
    },
}

/// How to log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// One JSON object a line, for programs.
    pub json: bool,
    /// A `tracing` filter, such as `info` or `thenar=debug`.
    pub level: String,
}

/// Why there is no configuration: every reason.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("could not read the configuration {}: {source}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file is not TOML, or has a key that is not one.
    #[error("{}: {message}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// Where and what.
        message: String,
    },
    /// Values are out of range.
    #[error("the configuration has {} {}:\n  {}", problems.len(), if problems.len() == 1 { "problem" } else { "problems" }, problems.join("\n  "))]
    Invalid {
        /// Each, by key.
        problems: Vec<String>,
    },
}

impl Raw {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`] where it cannot be read or is malformed.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
        toml::from_str(&text)
            .map_err(|e| ConfigError::Malformed { path: path.to_owned(), message: e.to_string().trim_end().to_owned() })
    }

    /// Checks everything.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with every problem.
    pub fn validated(self) -> Result<Config, ConfigError> {
        let mut problems = Vec::new();
        let data = self.data.unwrap_or_else(|| {
            problems.push("data: is missing; name the data folder here or with --data".into());
            PathBuf::new()
        });
        let dim = self.dim.and_then(|dim| keep(&mut problems, model::checked_dim(dim)));
        let venues = self.venues.unwrap_or_default();
        let venues = venues
            .iter()
            .filter_map(|v| keep(&mut problems, VenueId::new(v).map_err(|e| e.within("venues"))))
            .collect();
        let server = self.server.validated(&mut problems);
        let metrics = match self.metrics.listen.as_deref() {
            Some("off") => None,
            listen => address(&mut problems, "metrics.listen", listen.unwrap_or("127.0.0.1:7601")),
        };
        if let Some(listen) = metrics.filter(|m| !m.ip().is_loopback())
            && self.metrics.beyond_loopback != Some(true)
        {
            problems.push(format!(
                "metrics.listen: {listen} can be reached from other machines, and metrics are served to whoever asks, without TLS; set metrics.beyond_loopback = true if that is meant, or listen on 127.0.0.1"
            ));
        }
        if metrics.is_some_and(|m| m.port() != 0 && m == server.listen) {
            problems.push("metrics.listen: is the same as server.listen".into());
        }
        let engine = self.engine.validated(&mut problems);
        let batch = self.batch.validated(&mut problems);
        let certificate = self.search.validated(&mut problems);
        let reserve_mib = self.storage.reserve_mib.unwrap_or(64);
        if reserve_mib > 1 << 20 {
            problems.push(format!("storage.reserve_mib: {reserve_mib} is over the limit of {}", 1 << 20));
        }
        let policies = self.policy.validated(&mut problems);
        let log = self.log.validated(&mut problems);
        if !problems.is_empty() {
            return Err(ConfigError::Invalid { problems });
        }
        Ok(Config {
            data,
            key_file: self.key_file,
            dim,
            venues,
            server,
            metrics,
            engine,
            batch,
            certificate,
            reserve_bytes: reserve_mib.min(1 << 20) << 20,
            policies,
            log,
        })
    }
}

fn keep<T>(problems: &mut Vec<String>, result: Result<T, model::Invalid>) -> Option<T> {
    result.map_err(|e| problems.push(e.to_string())).ok()
}

fn address(problems: &mut Vec<String>, key: &str, text: &str) -> Option<SocketAddr> {
    text.parse()
        .map_err(|_| problems.push(format!("{key}: {text:?} is not an address and port, such as 127.0.0.1:7600")))
        .ok()
}

fn ranged(problems: &mut Vec<String>, key: &str, value: usize, range: std::ops::RangeInclusive<usize>) -> usize {
    if !range.contains(&value) {
        problems.push(format!("{key}: {value} is not from {} to {}", range.start(), range.end()));
    }
    value
}

impl RawServer {
    fn validated(self, problems: &mut Vec<String>) -> ServerConfig {
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let listen =
            address(problems, "server.listen", self.listen.as_deref().unwrap_or("127.0.0.1:7600")).unwrap_or(nowhere);
        let mut seconds = |key: &str, value: Option<u64>, default: u64, max: u64| {
            let value = value.unwrap_or(default);
            if !(1..=max).contains(&value) {
                problems.push(format!("server.{key}: {value} is not from 1 to {max}"));
            }
            Duration::from_secs(value.min(max))
        };
        let drain_seconds = seconds("drain_seconds", self.drain_seconds, 20, 600).as_secs();
        let handshake = seconds("handshake_seconds", self.handshake_seconds, 10, 600);
        let first_request = seconds("first_request_seconds", self.first_request_seconds, 10, 600);
        let idle = seconds("idle_seconds", self.idle_seconds, 300, 86_400);
        let age = seconds("age_seconds", self.age_seconds, 3600, 7 * 86_400);
        let call = seconds("call_seconds", self.call_seconds, 60, 600);
        let message = seconds("message_seconds", self.message_seconds, 60, 600);
        let count = self.connections_max.unwrap_or(1024);
        let connections_max = ranged(problems, "server.connections_max", count, 1..=65_536);
        let here = self.connections_per_address_max.unwrap_or(256.min(connections_max));
        let connections_per_address_max =
            ranged(problems, "server.connections_per_address_max", here, 1..=connections_max.clamp(1, 65_536));
        let messages_mib = ranged(problems, "server.messages_mib", self.messages_mib.unwrap_or(256), 128..=65_536);
        let connections =
            net::Limits { connections_max, connections_per_address_max, handshake, first_request, idle, age };
        let calls = CallLimits { call, message, message_bytes_max: messages_mib.min(65_536) << 20 };
        let tls = self.tls.map(|tls| {
            let mut file = |key: &str, file: Option<PathBuf>| {
                file.unwrap_or_else(|| {
                    problems
                        .push(format!("server.tls.{key}: is missing; mutual TLS needs certificate, key and client_ca"));
                    PathBuf::new()
                })
            };
            TlsConfig {
                certificate: file("certificate", tls.certificate),
                key: file("key", tls.key),
                client_ca: file("client_ca", tls.client_ca),
            }
        });
        if tls.is_none() && !listen.ip().is_loopback() {
            problems.push(format!(
                "server.listen: {listen} can be reached from other machines, so [server.tls] with certificate, key and client_ca is needed; without it, listen on 127.0.0.1"
            ));
        }
        ServerConfig { listen, drain_seconds, connections, calls, tls }
    }
}

impl RawEngine {
    fn validated(self, problems: &mut Vec<String>) -> EngineConfig {
        let kind = match (self.kind.as_deref().unwrap_or("auto"), self.adapter) {
            ("auto", None) => EngineKind::Auto,
            ("cpu", None) => EngineKind::Cpu,
            ("gpu", adapter) => EngineKind::Gpu { adapter },
            ("auto" | "cpu", Some(_)) => {
                problems.push("engine.adapter: is for kind = \"gpu\" alone".into());
                EngineKind::Auto
            }
            (other, _) => {
                problems.push(format!("engine.kind: {other:?} is not auto, cpu or gpu"));
                EngineKind::Auto
            }
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = ranged(problems, "engine.threads", self.threads.unwrap_or(cores), 1..=1024);
        EngineConfig { kind, matrices: self.matrices.unwrap_or(true), threads }
    }
}

impl RawBatch {
    fn validated(self, problems: &mut Vec<String>) -> BatchConfig {
        let wait_ms_max = ranged(problems, "batch.wait_ms_max", self.wait_ms_max.unwrap_or(500), 1..=60_000);
        BatchConfig {
            queue_max: ranged(problems, "batch.queue_max", self.queue_max.unwrap_or(1024), 1..=65_536),
            probes_max: ranged(problems, "batch.probes_max", self.probes_max.unwrap_or(256), PROBES_MAX..=4096),
            wait_max: Duration::from_millis(wait_ms_max as u64),
        }
    }
}

impl RawSearch {
    fn validated(self, problems: &mut Vec<String>) -> Certificate {
        match (self.certificate.as_deref().unwrap_or("randomised"), self.miss_probability) {
            ("deterministic", None) => Certificate::Deterministic,
            ("deterministic", Some(_)) => {
                problems.push("search.miss_probability: is for certificate = \"randomised\" alone".into());
                Certificate::Deterministic
            }
            ("randomised", asked) => {
                let asked = asked.unwrap_or(certificate::MISS_PROBABILITY_DEFAULT);
                keep(problems, Certificate::randomised(asked).map_err(|e| e.within("search"))).unwrap_or_default()
            }
            (other, _) => {
                problems.push(format!("search.certificate: {other:?} is not deterministic or randomised"));
                Certificate::Deterministic
            }
        }
    }
}

impl RawPolicies {
    fn validated(self, problems: &mut Vec<String>) -> Policies {
        let mut raw =
            [self.payment, self.entry, self.workplace, self.loyalty].map(Option::unwrap_or_default).into_iter();
        Policies::from_fn(|purpose| {
            let raw = raw.next().unwrap_or_default();
            // Money wants more certainty than a turnstile; see README for what these mean.
            let (threshold, margin) = match purpose {
                Purpose::Payment => (0.62, 0.05),
                Purpose::Entry | Purpose::Workplace | Purpose::Loyalty => (0.58, 0.03),
            };
            let fallback = Policy { threshold, margin };
            let policy = Policy::new(raw.threshold.unwrap_or(threshold), raw.margin.unwrap_or(margin));
            keep(problems, policy.map_err(|e| e.within(&format!("policy.{}", purpose.as_str())))).unwrap_or(fallback)
        })
    }
}

impl RawLog {
    fn validated(self, problems: &mut Vec<String>) -> LogConfig {
        let json = match self.format.as_deref() {
            None | Some("text") => false,
            Some("json") => true,
            Some(other) => {
                problems.push(format!("log.format: {other:?} is not text or json"));
                false
            }
        };
        let level = self.level.unwrap_or_else(|| "info".into());
        if let Err(e) = level.parse::<tracing_subscriber::EnvFilter>() {
            problems.push(format!("log.level: {level:?} is not a filter: {e}"));
        }
        LogConfig { json, level }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Config, ConfigError> {
        let raw: Raw =
            toml::from_str(text).map_err(|e| ConfigError::Malformed { path: "test".into(), message: e.to_string() })?;
        raw.validated()
    }

    fn problems(text: &str) -> Vec<String> {
        match parsed(text) {
            Err(ConfigError::Invalid { problems }) => problems,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_data_folder_is_all_that_is_needed() {
        let config = parsed("data = \"/var/lib/thenar\"").unwrap();
        assert_eq!(config.server.listen.to_string(), "127.0.0.1:7600");
        assert!(config.server.tls.is_none());
        assert_eq!(config.engine.kind, EngineKind::Auto);
        assert!(config.engine.matrices);
        assert!(!parsed("data = \"d\"\n[engine]\nmatrices = false").unwrap().engine.matrices);
        assert_eq!(config.policies.of(Purpose::Payment).threshold, 0.62);
    }

    #[test]
    fn the_commented_default_file_says_what_the_defaults_are() {
        let shipped: Raw = toml::from_str(include_str!("../../deploy/thenar.toml")).unwrap();
        let shipped = shipped.validated().unwrap();
        let data = shipped.data.clone();
        let mut bare = Raw { data: Some(data), ..Raw::default() }.validated().unwrap();
        bare.key_file.clone_from(&shipped.key_file);
        assert_eq!(shipped, bare);
    }

    #[test]
    fn beyond_loopback_there_is_no_server_without_mutual_tls() {
        let all = problems("data = \"d\"\n[server]\nlisten = \"0.0.0.0:7600\"");
        assert!(all[0].contains("[server.tls]"), "{all:?}");
        let all = problems(
            "data = \"d\"\n[server]\nlisten = \"0.0.0.0:7600\"\n[server.tls]\ncertificate = \"c\"\nkey = \"k\"",
        );
        assert!(all[0].starts_with("server.tls.client_ca"), "{all:?}");
        let good = "data = \"d\"\n[server]\nlisten = \"[::]:7600\"\n[server.tls]\ncertificate = \"c\"\nkey = \"k\"\nclient_ca = \"a\"";
        assert!(parsed(good).unwrap().server.tls.is_some());
    }

    #[test]
    fn beyond_loopback_there_are_no_metrics_unless_the_file_says_so_in_words() {
        for listen in ["0.0.0.0:7601", "[::]:7601", "192.0.2.7:7601"] {
            let section = format!("data = \"d\"\n[metrics]\nlisten = \"{listen}\"\n");
            for word in ["", "beyond_loopback = false"] {
                let all = problems(&format!("{section}{word}"));
                assert_eq!(all.len(), 1, "{all:?}");
                assert!(all[0].starts_with("metrics.listen:") && all[0].contains("metrics.beyond_loopback"), "{all:?}");
            }
            let config = parsed(&format!("{section}beyond_loopback = true")).unwrap();
            assert_eq!(config.metrics, Some(listen.parse().unwrap()));
        }
        assert!(parsed("data = \"d\"\n[metrics]\nlisten = \"[::1]:7601\"").is_ok());
        assert!(parsed("data = \"d\"\n[metrics]\nlisten = \"off\"").is_ok());
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let all = problems(
            "dim = 500\nvenues = [\"a b\"]\n[server]\nlisten = \"here\"\ndrain_seconds = 0\n[engine]\nkind = \"fpga\"\nthreads = 0\n[batch]\nqueue_max = 0\n[policy.entry]\nthreshold = 2.0\n[log]\nformat = \"xml\"",
        );
        for key in [
            "data",
            "dim",
            "venues.venue_id",
            "server.listen",
            "server.drain_seconds",
            "engine.kind",
            "engine.threads",
            "batch.queue_max",
            "policy.entry.threshold",
            "log.format",
        ] {
            assert!(all.iter().any(|p| p.starts_with(&format!("{key}:"))), "{key} in {all:?}");
        }
        assert_eq!(all.len(), 10, "{all:?}");
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = parsed("data = \"d\"\ntreshold = 1").unwrap_err().to_string();
        assert!(error.contains("treshold"), "{error}");
    }

    #[test]
    fn a_certificate_is_randomised_unless_the_file_says_otherwise() {
        let of = |search: &str| {
            let text = format!("data = \"d\"\n{search}");
            toml::from_str::<Raw>(&text).unwrap().validated().map(|config| config.certificate)
        };
        let randomised = |miss_probability| Certificate::Randomised { miss_probability };
        assert_eq!(of("").unwrap(), randomised(1e-12));
        assert_eq!(of("[search]\nmiss_probability = 1e-9").unwrap(), randomised(1e-9));
        assert_eq!(of("[search]\ncertificate = \"deterministic\"").unwrap(), Certificate::Deterministic);
        for (bad, word) in [
            ("miss_probability = 1e-3", "search.miss_probability: 1e-3"),
            ("certificate = \"none\"", "search.certificate: \"none\""),
            ("certificate = \"deterministic\"\nmiss_probability = 1e-9", "search.miss_probability"),
        ] {
            let error = of(&format!("[search]\n{bad}")).unwrap_err().to_string();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }
}
