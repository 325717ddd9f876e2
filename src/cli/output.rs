//! What people and programs are told: tables, JSON, numbers, words, progress and logs.
//!
//! Results go to stdout. Progress of long work goes to stderr: a bar on a terminal, otherwise a plain
//! line now and then.

use std::fmt::Display;
use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;
use serde::Serialize;
use tonic::Code;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::api::proto;
use crate::server::config::LogConfig;

/// Time between two plain lines of progress if stderr is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// A table with `header`, its columns from `numbers_from` on aligned to the right.
#[must_use]
pub fn table(header: &[&str], numbers_from: usize) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(header.to_vec());
    for at in numbers_from..header.len() {
        if let Some(column) = table.column_mut(at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Names and values in two columns, without a header.
#[must_use]
pub fn properties(rows: &[(&str, String)]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (name, value) in rows {
        table.add_row(vec![(*name).to_owned(), value.clone()]);
    }
    table
}

/// Writes a line to stdout. Unlike `println!`, a reader that went away is an error, not a panic.
///
/// # Errors
/// If stdout cannot be written.
pub fn print(text: impl Display) -> std::io::Result<()> {
    writeln!(std::io::stdout().lock(), "{text}")
}

/// Writes one JSON object on a line of its own.
///
/// # Errors
/// If stdout cannot be written.
pub fn print_json(value: &impl Serialize) -> std::io::Result<()> {
    print(serde_json::to_string(value)?)
}

/// `count` with its digits in groups of three.
#[must_use]
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of bytes in MiB.
pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// A duration in its two largest units.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = Duration::from_secs_f64(seconds.max(0.0)).as_secs();
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{whole} s"),
        (0, 0, _) => format!("{minutes} min {} s", whole % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// A duration of the protocol in seconds; 0 if it is absent or negative.
pub(crate) fn seconds(duration: Option<prost_types::Duration>) -> f64 {
    duration.and_then(|duration| Duration::try_from(duration).ok()).unwrap_or_default().as_secs_f64()
}

/// The word for a value of one of the protocol's enums, such as `no_match` for `DECISION_NO_MATCH`.
fn word<E: TryFrom<i32> + Default>(value: i32, name: fn(&E) -> &'static str, prefix: &str) -> String {
    name(&E::try_from(value).unwrap_or_default()).trim_start_matches(prefix).to_lowercase()
}

/// The word for a hand of the protocol.
pub(crate) fn hand_word(hand: i32) -> String {
    word::<proto::Hand>(hand, proto::Hand::as_str_name, "HAND_")
}

/// The word for a decision of the protocol.
pub(crate) fn decision_word(decision: i32) -> String {
    word::<proto::Decision>(decision, proto::Decision::as_str_name, "DECISION_")
}

/// The word for a kind of certificate of the protocol.
pub(crate) fn certificate_word(kind: i32) -> String {
    word::<proto::certificate::Kind>(kind, proto::certificate::Kind::as_str_name, "KIND_")
}

/// The protocol's name of a status code, such as `NOT_FOUND`.
pub(crate) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// One failed row or subject, as programs read it.
#[derive(Debug, Serialize)]
pub(crate) struct Failure {
    pub(crate) code: &'static str,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(code: Code, message: &str) -> Self {
        Self { code: code_name(code), message: message.to_owned() }
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

/// Starts logging to stderr.
pub(crate) fn start_log(config: &LogConfig) {
    let lines = fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
    let lines = if config.json { lines.json().boxed() } else { lines.boxed() };
    // A second server in one process logs to the first one's subscriber.
    let _ = tracing_subscriber::registry().with(config.level.clone()).with(lines).try_init();
}

/// Starts logging warnings alone: a line about everything else would tear the progress bar.
pub(crate) fn start_log_of_warnings(config: &LogConfig) {
    start_log(&LogConfig { level: Targets::new().with_default(LevelFilter::WARN), json: config.json });
}

/// The progress of one piece of work. Clones are handles to the same bar.
#[derive(Debug, Clone)]
pub struct Progress {
    bar: ProgressBar,
    /// Set if lines are written instead of a bar.
    lines: Option<Arc<Lines>>,
}

#[derive(Debug)]
struct Lines {
    label: String,
    unit: &'static str,
    started: Instant,
    written: Mutex<Instant>,
}

impl Progress {
    /// Work of `total` units; `label` is a verb such as `enrolling`.
    #[must_use]
    pub fn new(label: &str, total: u64, unit: &'static str) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let template = format!("{label} [{{bar:32}}] {{human_pos}}/{{human_len}} {unit}, {{per_sec}}, {{eta}} left");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.progress_chars("=> "));
        }
        let now = Instant::now();
        let lines = (!terminal)
            .then(|| Arc::new(Lines { label: label.to_owned(), unit, started: now, written: Mutex::new(now) }));
        Self { bar, lines }
    }

    /// Moves to `position` units.
    pub fn set(&self, position: u64) {
        self.bar.set_position(position);
        if let Some(lines) = &self.lines {
            let mut written = lines.written.lock();
            if written.elapsed() >= LINE_INTERVAL {
                *written = Instant::now();
                eprintln!("{}", self.line(lines));
            }
        }
    }

    /// Writes a line without tearing the bar.
    pub fn note(&self, text: impl Display) {
        if self.lines.is_some() {
            eprintln!("{text}");
        } else {
            self.bar.suspend(|| eprintln!("{text}"));
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn line(&self, lines: &Lines) -> String {
        let (position, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let rate = position as f64 / lines.started.elapsed().as_secs_f64();
        let left = if rate > 0.0 { total.saturating_sub(position) as f64 / rate } else { 0.0 };
        format!("{} {position}/{total} {}, {rate:.0} per second, {left:.0} s left", lines.label, lines.unit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::client::sample;
    use crate::model::Hand;

    #[test]
    fn digits_are_grouped_from_the_right() {
        let told: Vec<String> = [0, 12, 999, 1000, 12_345, 1_000_000].into_iter().map(grouped).collect();
        assert_eq!(told, ["0", "12", "999", "1,000", "12,345", "1,000,000"]);
    }

    #[test]
    fn a_table_keeps_every_cell() {
        let mut table = table(&["row", "score"], 1);
        table.add_row(vec!["1", "0.75"]);
        let text = table.to_string();
        assert!(["row", "score", "0.75"].iter().all(|cell| text.contains(cell)), "{text}");
        assert!(properties(&[("uptime", "3 s".to_owned())]).to_string().contains("uptime"));
    }

    #[test]
    fn durations_have_two_units() {
        let told: Vec<String> = [0.4, 59.0, 61.0, 3600.0, 90_061.0].into_iter().map(duration).collect();
        assert_eq!(told, ["0 s", "59 s", "1 min 1 s", "1 h 0 min", "1 d 1 h"]);
    }

    #[test]
    fn durations_of_the_protocol_become_seconds() {
        let span = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
        assert!((seconds(span(1, 500_000)) - 1.0005).abs() < 1e-12);
        assert!(seconds(None).abs() < 1e-12 && seconds(span(-1, 0)).abs() < 1e-12);
    }

    #[test]
    fn words_and_codes_agree_with_the_types() {
        for hand in [Hand::Unspecified, Hand::Left, Hand::Right] {
            assert_eq!(hand_word(sample(vec![], hand).hand), hand.as_str());
        }
        assert_eq!(decision_word(proto::Decision::NoMatch.into()), "no_match");
        assert_eq!(certificate_word(proto::certificate::Kind::Randomised.into()), "randomised");
        for unknown in [hand_word(99), decision_word(99), certificate_word(99)] {
            assert_eq!(unknown, "unspecified");
        }
    }
}
