//! What the file says, and how it becomes a [`Config`].
//!
//! Each section checks itself and adds every problem it finds to one list, by its key.

#![expect(missing_docs, reason = "the keys are documented in deploy/thenar.toml, word for word")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use tracing_subscriber::filter::Targets;

use super::{Config, ConfigError, LogConfig, ServerConfig};
use crate::api::CallLimits;
use crate::engine::certificate::{self, Certificate};
use crate::model::{self, PROBES_MAX, Purpose, VenueId};
use crate::net::{self, TlsConfig};
use crate::policy::{Policies, Policy};
use crate::search::batch::BatchConfig;
use crate::server::engines::{EngineConfig, EngineKind};

/// The contents of the file before they are checked. Every key is optional here.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
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
pub struct RawSearch {
    pub certificate: Option<String>,
    pub miss_probability: Option<f64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
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
pub struct RawTls {
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub client_ca: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawMetrics {
    pub listen: Option<String>,
    pub beyond_loopback: Option<bool>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawEngine {
    pub kind: Option<String>,
    pub adapter: Option<String>,
    pub matrices: Option<bool>,
    pub threads: Option<usize>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawBatch {
    pub queue_max: Option<usize>,
    pub probes_max: Option<usize>,
    pub wait_ms_max: Option<usize>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawStorage {
    pub reserve_mib: Option<u64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPolicies {
    pub payment: Option<RawPolicy>,
    pub entry: Option<RawPolicy>,
    pub workplace: Option<RawPolicy>,
    pub loyalty: Option<RawPolicy>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPolicy {
    pub threshold: Option<f64>,
    pub margin: Option<f64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawLog {
    pub format: Option<String>,
    pub level: Option<String>,
}

impl Raw {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError`] if it cannot be read or is malformed.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|e| ConfigError::Malformed { path: path.to_owned(), source: Box::new(e) })
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
            // A payment needs more certainty than a turnstile; README explains these values.
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
        let level = level.parse().unwrap_or_else(|e| {
            problems.push(format!("log.level: {level:?} is not a filter: {e}"));
            Targets::default()
        });
        LogConfig { json, level }
    }
}
