//! All metrics, each declared once: name, unit, meaning and bounded labels.
//!
//! No label contains the id of a subject, a request or a device, and no value is biometric.
//! Invariant: every recorded metric is declared in [`CATALOGUE`]; a test checks it.

use std::time::Duration;

use metrics::Unit;

use crate::model::{Decision, Purpose};

/// The type of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only increases.
    Counter,
    /// Increases and decreases.
    Gauge,
    /// A distribution.
    Histogram,
}

/// The declaration of one metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// The name that is scraped.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// The unit of the value.
    pub unit: Unit,
    /// The help text.
    pub meaning: &'static str,
    /// The labels, each with its possible values.
    pub labels: &'static [(&'static str, &'static [&'static str])],
}

const PURPOSES: &[&str] = &["payment", "entry", "workplace", "loyalty"];
const OUTCOMES: &[&str] = &["match", "no_match", "inconclusive"];
const REFUSALS: &[&str] = &["invalid", "unknown_venue", "overloaded", "deadline", "draining", "failed"];
const STAGES: &[&str] = &["queue", "prefilter", "refine", "total"];
const WRITES: &[&str] = &["enrol", "update", "forget"];
const WRITE_RESULTS: &[&str] = &["done", "replayed", "refused", "failed"];
const LIMITS: &[&str] = &["total", "address"];
const ENGINES: &[&str] = &["cpu", "gpu"];

/// Every metric of the server.
pub const CATALOGUE: &[Metric] = &[
    Metric {
        name: "thenar_searches_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        meaning: "Identifications answered, by purpose and decision",
        labels: &[("purpose", PURPOSES), ("outcome", OUTCOMES)],
    },
    Metric {
        name: "thenar_searches_refused_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        meaning: "Identifications refused, by reason",
        labels: &[("reason", REFUSALS)],
    },
    Metric {
        name: "thenar_search_seconds",
        kind: Kind::Histogram,
        unit: Unit::Seconds,
        meaning: "Time of a search, by stage; total is from the arrival of the message to the answer",
        labels: &[("stage", STAGES)],
    },
    Metric {
        name: "thenar_device_seconds",
        kind: Kind::Histogram,
        unit: Unit::Seconds,
        meaning: "Time of a batch on the GPU, measured by the GPU",
        labels: &[],
    },
    Metric {
        name: "thenar_batch_probes",
        kind: Kind::Histogram,
        unit: Unit::Count,
        meaning: "Probes searched together in one batch",
        labels: &[],
    },
    Metric {
        name: "thenar_queue_searches",
        kind: Kind::Gauge,
        unit: Unit::Count,
        meaning: "Searches waiting for a batch",
        labels: &[],
    },
    Metric {
        name: "thenar_gallery_templates",
        kind: Kind::Gauge,
        unit: Unit::Count,
        meaning: "Live templates that searches see",
        labels: &[],
    },
    Metric {
        name: "thenar_gallery_tombstones",
        kind: Kind::Gauge,
        unit: Unit::Count,
        meaning: "Erased rows that are not yet reclaimed",
        labels: &[],
    },
    Metric {
        name: "thenar_gallery_left_out",
        kind: Kind::Gauge,
        unit: Unit::Count,
        meaning: "Damaged templates in the registry that cannot be opened and are not searched",
        labels: &[],
    },
    Metric {
        name: "thenar_log_lag",
        kind: Kind::Gauge,
        unit: Unit::Count,
        meaning: "Changes in the registry's log that searches do not see yet",
        labels: &[],
    },
    Metric {
        name: "thenar_writes_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        meaning: "Requested changes, by kind and result",
        labels: &[("kind", WRITES), ("result", WRITE_RESULTS)],
    },
    Metric {
        name: "thenar_write_commit_seconds",
        kind: Kind::Histogram,
        unit: Unit::Seconds,
        meaning: "Time from accepting a group of changes until they are durable and searchable",
        labels: &[],
    },
    Metric {
        name: "thenar_connections",
        kind: Kind::Gauge,
        unit: Unit::Count,
        meaning: "Open connections of gRPC and metrics",
        labels: &[],
    },
    Metric {
        name: "thenar_connections_refused_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        meaning: "Connections refused, by the limit that they exceeded",
        labels: &[("limit", LIMITS)],
    },
    Metric {
        name: "thenar_message_bytes",
        kind: Kind::Gauge,
        unit: Unit::Bytes,
        meaning: "Memory of messages that are arriving or being processed",
        labels: &[],
    },
    Metric {
        name: "thenar_engine_host_bytes",
        kind: Kind::Gauge,
        unit: Unit::Bytes,
        meaning: "Main memory that the engine holds besides the mapped index",
        labels: &[("engine", ENGINES)],
    },
    Metric {
        name: "thenar_device_memory_bytes",
        kind: Kind::Gauge,
        unit: Unit::Bytes,
        meaning: "Device memory that the engine holds",
        labels: &[],
    },
    Metric {
        name: "thenar_engine_fallbacks_total",
        kind: Kind::Counter,
        unit: Unit::Count,
        meaning: "Batches that the CPU engine answered because the preferred engine could not",
        labels: &[],
    },
];

/// Upper bounds of the latency buckets, in seconds: 100 microseconds to 10 seconds.
pub const LATENCY_BUCKETS_S: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Upper bounds of the batch-size buckets, in probes.
pub const BATCH_BUCKETS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// Why a search was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is its own word in the metric's label")]
pub enum Refusal {
    Invalid,
    UnknownVenue,
    Overloaded,
    Deadline,
    Draining,
    Failed,
}

impl Refusal {
    fn label(self) -> &'static str {
        REFUSALS[self as usize]
    }
}

/// What a write was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is its own word in the metric's label")]
pub enum Write {
    Enrol,
    Update,
    Forget,
}

/// How a write ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is its own word in the metric's label")]
pub enum WriteResult {
    Done,
    Replayed,
    Refused,
    Failed,
}

/// How long the stages of one search took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// Waiting for a batch.
    pub queue: Duration,
    /// In the engine.
    pub prefilter: Duration,
    /// In exact scores and ranking.
    pub refine: Duration,
    /// From arrival to answer.
    pub total: Duration,
}

/// Describes each metric to the installed recorder.
pub fn describe() {
    for metric in CATALOGUE {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.unit, metric.meaning),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.unit, metric.meaning),
            Kind::Histogram => metrics::describe_histogram!(metric.name, metric.unit, metric.meaning),
        }
    }
}

/// One search was answered.
pub fn search_answered(purpose: Purpose, decision: Decision, times: StageTimes) {
    metrics::counter!("thenar_searches_total", "purpose" => purpose.as_str(), "outcome" => decision.as_str())
        .increment(1);
    for (stage, time) in STAGES.iter().zip([times.queue, times.prefilter, times.refine, times.total]) {
        metrics::histogram!("thenar_search_seconds", "stage" => *stage).record(time);
    }
}

/// One search was refused.
pub fn search_refused(why: Refusal) {
    metrics::counter!("thenar_searches_refused_total", "reason" => why.label()).increment(1);
}

/// One batch went through the engine.
pub fn batch_searched(probes: usize, device: Option<Duration>) {
    #[expect(clippy::cast_precision_loss, reason = "a batch has far fewer than 2^52 probes")]
    metrics::histogram!("thenar_batch_probes").record(probes as f64);
    if let Some(device) = device {
        metrics::histogram!("thenar_device_seconds").record(device);
    }
}

/// The current length of the batcher's queue.
pub fn queue_length(searches: usize) {
    #[expect(clippy::cast_precision_loss, reason = "the queue is bounded far below 2^52")]
    metrics::gauge!("thenar_queue_searches").set(searches as f64);
}

/// The gallery as searches see it now.
#[expect(clippy::cast_precision_loss, reason = "counts of rows are below 2^32")]
pub fn gallery(live: u64, tombstones: u64, log_lag: u64) {
    metrics::gauge!("thenar_gallery_templates").set(live as f64);
    metrics::gauge!("thenar_gallery_tombstones").set(tombstones as f64);
    metrics::gauge!("thenar_log_lag").set(log_lag as f64);
}

/// This many damaged templates are left out of the gallery.
#[expect(clippy::cast_precision_loss, reason = "counts of templates are below 2^52")]
pub fn left_out(templates: u64) {
    metrics::gauge!("thenar_gallery_left_out").set(templates as f64);
}

/// This many changes of one kind had this result.
pub fn writes(kind: Write, result: WriteResult, count: u64) {
    metrics::counter!(
        "thenar_writes_total", "kind" => WRITES[kind as usize], "result" => WRITE_RESULTS[result as usize]
    )
    .increment(count);
}

/// A group of changes became durable and searchable.
pub fn group_committed(took: Duration) {
    metrics::histogram!("thenar_write_commit_seconds").record(took);
}

/// The limit of connections that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is its own word in the metric's label")]
pub enum ConnectionRefusal {
    Total,
    Address,
}

/// This many more connections, or fewer.
pub fn connections(more: f64) {
    metrics::gauge!("thenar_connections").increment(more);
}

/// A connection was refused.
pub fn connection_refused(limit: ConnectionRefusal) {
    metrics::counter!("thenar_connections_refused_total", "limit" => LIMITS[limit as usize]).increment(1);
}

/// Messages take this much more memory, or less.
#[expect(clippy::cast_precision_loss, reason = "bytes of memory are below 2^52")]
pub fn message_bytes(bytes: usize, taken: bool) {
    let gauge = metrics::gauge!("thenar_message_bytes");
    if taken { gauge.increment(bytes as f64) } else { gauge.decrement(bytes as f64) }
}

/// The memory that an engine holds now.
#[expect(clippy::cast_precision_loss, reason = "bytes of memory are below 2^52")]
pub fn engine_memory(kind: &'static str, host_bytes: u64, device_bytes: u64) {
    metrics::gauge!("thenar_engine_host_bytes", "engine" => kind).set(host_bytes as f64);
    metrics::gauge!("thenar_device_memory_bytes").set(device_bytes as f64);
}

/// The CPU engine answered instead of the preferred one.
pub fn engine_fallback() {
    metrics::counter!("thenar_engine_fallbacks_total").increment(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_carry_their_unit() {
        let names: BTreeSet<_> = CATALOGUE.iter().map(|m| m.name).collect();
        assert_eq!(names.len(), CATALOGUE.len());
        for metric in CATALOGUE {
            assert!(metric.name.starts_with("thenar_"));
            match metric.unit {
                Unit::Seconds => assert!(metric.name.ends_with("_seconds"), "{}", metric.name),
                Unit::Bytes => assert!(metric.name.ends_with("_bytes"), "{}", metric.name),
                _ => {}
            }
            assert_eq!(metric.kind == Kind::Counter, metric.name.ends_with("_total"), "{}", metric.name);
        }
    }

    #[test]
    fn every_metric_recorded_in_this_file_is_declared() {
        let source = include_str!("telemetry.rs");
        let recorded: BTreeSet<&str> = source
            .split("counter!(")
            .chain(source.split("gauge!("))
            .chain(source.split("histogram!("))
            .skip(1)
            .filter_map(|rest| rest.trim_start().strip_prefix("\"thenar_").and_then(|r| r.split('"').next()))
            .collect();
        let declared: BTreeSet<&str> = CATALOGUE.iter().map(|m| m.name.trim_start_matches("thenar_")).collect();
        assert_eq!(recorded, declared);
    }

    #[test]
    fn labels_are_the_words_of_their_types() {
        assert_eq!(PURPOSES, Purpose::ALL.map(Purpose::as_str));
        assert_eq!(OUTCOMES, Decision::ALL.map(Decision::as_str));
        assert_eq!(Refusal::Failed.label(), "failed");
        assert_eq!(REFUSALS.len(), Refusal::Failed as usize + 1);
    }
}
