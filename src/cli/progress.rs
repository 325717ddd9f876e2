//! Progress of long work on stderr: a bar on a terminal, a plain line now and then elsewhere.
//!
//! Knows counts and time only. Nothing here ever writes to stdout.

use std::fmt::Display;
use std::io::IsTerminal as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;

/// Time between two plain lines where stderr is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// The progress of one piece of work. Clones are handles to the same bar.
#[derive(Debug, Clone)]
pub struct Progress {
    bar: ProgressBar,
    /// Set where lines are written instead of a bar.
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

    /// Units done so far.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.bar.position()
    }

    /// Says something without tearing the bar.
    pub fn note(&self, text: impl Display) {
        if self.lines.is_some() {
            eprintln!("{text}");
        } else {
            self.bar.suspend(|| eprintln!("{text}"));
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    fn line(&self, lines: &Lines) -> String {
        let (position, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let rate = position as f64 / lines.started.elapsed().as_secs_f64();
        let left = if rate > 0.0 { total.saturating_sub(position) as f64 / rate } else { 0.0 };
        format!("{} {position}/{total} {}, {rate:.0} a second, {left:.0} s left", lines.label, lines.unit)
    }
}
