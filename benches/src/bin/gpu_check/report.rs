//! What a call found: a table for people, written line by line, and the same as JSON.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use thenar_bench::facts::Facts;

use crate::Common;

/// Collects, prints and saves.
pub(crate) struct Report {
    started: Instant,
    limit: Duration,
    file: Option<PathBuf>,
    document: Map<String, Value>,
    wrong: Vec<String>,
}

impl Report {
    pub(crate) fn new(call: &str, common: &Common) -> Self {
        let facts = Facts::gather();
        for (name, value) in facts.rows() {
            println!("{name:28} {value}");
        }
        let mut document = Map::new();
        document.insert("call".into(), call.into());
        document.insert("facts".into(), serde_json::to_value(facts).unwrap_or_default());
        document.insert("dim".into(), common.dim.into());
        document.insert("seed".into(), common.seed.into());
        // Until the call says otherwise at its end.
        document.insert("finished".into(), false.into());
        let limit = Duration::from_secs_f64(common.limit_seconds);
        Self { started: Instant::now(), limit, file: common.json.clone(), document, wrong: Vec::new() }
    }

    /// Words.
    pub(crate) fn note(&mut self, name: &str, words: impl Into<String>) {
        let words = words.into();
        println!("{name:28} {words}");
        self.set(name, words.into());
    }

    /// A number with its unit, which becomes the end of its name.
    pub(crate) fn figure(&mut self, name: &str, value: f64, unit: &str) {
        println!("{name:28} {value:14.3} {unit}");
        self.set(&format!("{name} {unit}"), json!(value));
    }

    /// A line of a table under `name`, printed by the caller.
    pub(crate) fn row(&mut self, name: &str, row: Value) {
        let rows = self.document.entry(key(name)).or_insert_with(|| Value::Array(Vec::new()));
        if let Value::Array(rows) = rows {
            rows.push(row);
        }
        self.save();
    }

    /// Something is not as it must be.
    pub(crate) fn wrong(&mut self, what: impl Into<String>) {
        let what = what.into();
        println!("WRONG: {what}");
        self.wrong.push(what);
        self.set("wrong", json!(self.wrong));
    }

    /// Time that is left of the call's limit.
    pub(crate) fn left(&self) -> Duration {
        self.limit.saturating_sub(self.started.elapsed())
    }

    /// Says whether all was right.
    pub(crate) fn conclude(mut self) -> ExitCode {
        self.figure("whole call", self.started.elapsed().as_secs_f64(), "s");
        self.set("finished", true.into());
        println!("{}", if self.wrong.is_empty() { "everything was right" } else { "NOT RIGHT, see above" });
        if self.wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    fn set(&mut self, name: &str, value: Value) {
        self.document.insert(key(name), value);
        self.save();
    }

    fn save(&self) {
        let Some(file) = &self.file else { return };
        let text = serde_json::to_string_pretty(&self.document).unwrap_or_default();
        if let Err(error) = std::fs::write(file, text + "\n") {
            eprintln!("{} could not be written: {error}", file.display());
        }
    }
}

fn key(name: &str) -> String {
    name.to_lowercase().replace(|c: char| !c.is_alphanumeric(), "_")
}
