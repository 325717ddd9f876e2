//! What a run came to: judged, counted, and shown as a table, as JSON and as one HTML page.
//!
//! Latency is in HDR histograms, of right answers alone, from when a call was due. Knows records and
//! verdicts; does not know how they came about.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;
use thenar::cli::latencies::Latencies;
use thenar::cli::output::{grouped, properties, table};
use thenar_bench::facts::Facts;
use thenar_bench::plot::{self, Axis, Panel, Series};

use crate::scenario::Kind;

/// Messages of failures that are shown, of each measurement.
const FAILURES_SHOWN: usize = 10;

/// How one call was judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Right,
    /// An answer that no exhaustive search would have given, or an acknowledged write that is lost.
    Wrong(String),
    Refused,
    Expired,
    /// Any other error.
    Failed(String),
}

/// One judged call.
#[derive(Debug, Clone)]
pub(crate) struct Judged {
    pub(crate) kind: Kind,
    pub(crate) due: Instant,
    pub(crate) sent: Instant,
    pub(crate) done: Instant,
    pub(crate) verdict: Verdict,
}

/// A distribution of times, in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Times {
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
    pub(crate) max: f64,
    /// Upper end of each bucket that is not empty, in microseconds, and the calls in it.
    pub(crate) buckets_us: Vec<(u64, u64)>,
}

impl Times {
    fn of(latencies: &Latencies) -> Self {
        Self {
            p50: latencies.ms(0.5),
            p90: latencies.ms(0.9),
            p99: latencies.ms(0.99),
            p999: latencies.ms(0.999),
            max: latencies.ms(1.0),
            buckets_us: latencies.buckets_us(),
        }
    }
}

/// The calls of one kind.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) kind: Kind,
    pub(crate) calls: u64,
    pub(crate) right: u64,
    /// Right and before the deadline, a second, by when they were due.
    pub(crate) goodput: f64,
    pub(crate) wrong: u64,
    pub(crate) refused: u64,
    pub(crate) expired: u64,
    pub(crate) failed: u64,
    pub(crate) latency_ms: Times,
    /// From sending to the refusal.
    pub(crate) refusal_ms: Times,
}

/// One second of a measurement.
#[derive(Debug, Serialize)]
pub(crate) struct Second {
    /// From the start of the measurement, without the warm-up.
    pub(crate) second: u64,
    /// What the figures are of: the label of a line.
    pub(crate) of: &'static str,
    pub(crate) right: u64,
    pub(crate) refused: u64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
}

/// One measurement.
#[derive(Debug, Serialize)]
pub(crate) struct Measurement {
    /// Searches with a threshold a second, as asked for.
    pub(crate) rate: f64,
    /// Searches without a threshold a second.
    pub(crate) floorless: f64,
    pub(crate) seconds: u64,
    pub(crate) rows: Vec<Row>,
    pub(crate) over_time: Vec<Second>,
    /// How late calls were sent: where this is long, the client's machine is the limit.
    pub(crate) sent_late_ms: Times,
    /// Wrong answers and errors, warm-up included.
    pub(crate) failures: u64,
    pub(crate) first_failures: Vec<String>,
}

/// What a kind is counted with over time.
fn group(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Entry | Kind::Payment | Kind::Workplace | Kind::Loyalty => Some("searches with a threshold"),
        Kind::Floorless => Some("searches without"),
        Kind::Enrol | Kind::Forget => Some("writes"),
        Kind::Verify | Kind::Fresh | Kind::Slow => None,
    }
}

#[derive(Default)]
struct Counts {
    right: u64,
    in_time: u64,
    wrong: u64,
    refused: u64,
    expired: u64,
    failed: u64,
}

impl Measurement {
    /// Adds the calls up that were due in the `seconds` after `start`; failures of all.
    pub(crate) fn new(
        (rate, floorless): (f64, f64),
        calls: &[Judged],
        start: Instant,
        seconds: u64,
        deadline: Duration,
        allowed: &[String],
    ) -> Self {
        let mut kinds: BTreeMap<Kind, (Counts, Latencies, Latencies)> = BTreeMap::new();
        let mut over_time: BTreeMap<(&'static str, u64), (Latencies, u64)> = BTreeMap::new();
        let mut late = Latencies::default();
        let (mut failures, mut first_failures) = (0, Vec::new());
        for call in calls {
            let allowed = |word: &str| allowed.iter().any(|allowed| allowed == word);
            let problem = match &call.verdict {
                Verdict::Right => None,
                Verdict::Wrong(why) => Some(format!("wrong: {why}")),
                Verdict::Refused => (!allowed("refused")).then(|| "refused".to_owned()),
                Verdict::Expired => (!allowed("expired")).then(|| "the deadline passed".to_owned()),
                Verdict::Failed(why) => Some(why.clone()),
            };
            if let Some(problem) = problem {
                failures += 1;
                if first_failures.len() < FAILURES_SHOWN {
                    first_failures.push(format!("{}: {problem}", call.kind.word()));
                }
            }
            let Some(second) = call.due.checked_duration_since(start).map(|since| since.as_secs()) else { continue };
            if second >= seconds {
                continue;
            }
            // A write that was refused is sent again.
            if group(call.kind) != Some("writes") {
                late.add(call.sent.saturating_duration_since(call.due));
            }
            let took = call.done.saturating_duration_since(call.due);
            let (counts, latency, refusal) = kinds.entry(call.kind).or_default();
            let mut line = group(call.kind).map(|of| over_time.entry((of, second)).or_default());
            match call.verdict {
                Verdict::Right => {
                    counts.right += 1;
                    counts.in_time += u64::from(took <= deadline);
                    latency.add(took);
                    if let Some((latency, _)) = &mut line {
                        latency.add(took);
                    }
                }
                Verdict::Wrong(_) => counts.wrong += 1,
                Verdict::Refused => {
                    counts.refused += 1;
                    refusal.add(call.done.saturating_duration_since(call.sent));
                    if let Some((_, refused)) = &mut line {
                        *refused += 1;
                    }
                }
                Verdict::Expired => counts.expired += 1,
                Verdict::Failed(_) => counts.failed += 1,
            }
        }
        let rows = kinds.into_iter().map(|(kind, (counts, latency, refusal))| Row {
            kind,
            calls: counts.right + counts.wrong + counts.refused + counts.expired + counts.failed,
            right: counts.right,
            goodput: counts.in_time as f64 / seconds as f64,
            wrong: counts.wrong,
            refused: counts.refused,
            expired: counts.expired,
            failed: counts.failed,
            latency_ms: Times::of(&latency),
            refusal_ms: Times::of(&refusal),
        });
        let over_time = over_time.into_iter().map(|((of, second), (latency, refused))| Second {
            second,
            of,
            right: latency.calls(),
            refused,
            p50_ms: latency.ms(0.5),
            p99_ms: latency.ms(0.99),
            max_ms: latency.ms(1.0),
        });
        Self {
            rate,
            floorless,
            seconds,
            rows: rows.collect(),
            over_time: over_time.collect(),
            sent_late_ms: Times::of(&late),
            failures,
            first_failures,
        }
    }

    fn title(&self) -> String {
        format!(
            "{} searches/s with a threshold, {} without, for {} s; goodput {:.1}/s; sent late by p99 {:.1} ms",
            self.rate,
            self.floorless,
            self.seconds,
            self.rows
                .iter()
                .filter(|row| group(row.kind).is_some_and(|g| g != "writes"))
                .map(|r| r.goodput)
                .sum::<f64>(),
            self.sent_late_ms.p99,
        )
    }

    fn cells(row: &Row) -> [String; 14] {
        let ms = |value: f64| if value == 0.0 { String::new() } else { format!("{value:.1}") };
        let count = |value: u64| if value == 0 { String::new() } else { value.to_string() };
        let latency = &row.latency_ms;
        [
            row.kind.word().to_owned(),
            row.calls.to_string(),
            row.right.to_string(),
            format!("{:.1}", row.goodput),
            ms(latency.p50),
            ms(latency.p90),
            ms(latency.p99),
            ms(latency.p999),
            ms(latency.max),
            count(row.wrong),
            count(row.refused),
            ms(row.refusal_ms.p99),
            count(row.expired),
            count(row.failed),
        ]
    }

    fn panels(&self) -> Vec<Panel> {
        let mut lines: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
        for second in &self.over_time {
            let of = second.of;
            for (name, value) in [("p50", second.p50_ms), ("p99", second.p99_ms), ("max", second.max_ms)] {
                if value > 0.0 && (of == "searches with a threshold" || name == "p99") {
                    lines.entry(format!("{of}, {name}")).or_default().push((second.second as f64, value));
                }
            }
        }
        let series = |lines: BTreeMap<String, Vec<(f64, f64)>>| {
            lines.into_iter().map(|(name, points)| Series { name, points }).collect()
        };
        let mut rates: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
        for second in &self.over_time {
            for (name, count) in [("right", second.right), ("refused", second.refused)] {
                if count > 0 {
                    let points = rates.entry(format!("{}, {name}", second.of)).or_default();
                    points.push((second.second as f64, count as f64));
                }
            }
        }
        let by_percentile = self
            .rows
            .iter()
            .filter(|row| row.right > 0)
            .map(|row| Series { name: row.kind.word().to_owned(), points: slower_than(&row.latency_ms.buckets_us) });
        let panel = |title: &str, across, up, axis, series| Panel { title: title.to_owned(), across, up, axis, series };
        vec![
            panel("latency over time", "s", "ms", Axis::Linear, series(lines)),
            panel("answers over time", "s", "a second", Axis::Linear, series(rates)),
            panel(
                "latency, by how many are slower",
                "one in so many is slower",
                "ms",
                Axis::Logarithmic,
                by_percentile.collect(),
            ),
        ]
    }
}

/// For each bucket's value in milliseconds, one in how many calls is slower.
fn slower_than(buckets_us: &[(u64, u64)]) -> Vec<(f64, f64)> {
    let all: u64 = buckets_us.iter().map(|(_, count)| count).sum();
    let mut left = all;
    buckets_us
        .iter()
        .map(|(us, count)| {
            let point = (all as f64 / left as f64, *us as f64 / 1e3);
            left -= count;
            point
        })
        .collect()
}

/// Everything a run tells.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) facts: Facts,
    pub(crate) server: Vec<(&'static str, String)>,
    pub(crate) measurements: Vec<Measurement>,
    /// What is wrong with the gallery at the end: writes that were acknowledged and are not in force.
    pub(crate) lost_writes: Vec<String>,
}

const HEADER: [&str; 14] = [
    "calls",
    "made",
    "right",
    "in time/s",
    "ms p50",
    "p90",
    "p99",
    "p99.9",
    "max",
    "wrong",
    "refused",
    "in ms p99",
    "expired",
    "failed",
];

impl Report {
    /// Whether every answer was right, every write kept, and every error allowed.
    pub(crate) fn is_good(&self) -> bool {
        self.lost_writes.is_empty()
            && !self.measurements.is_empty()
            // What was asked for and never once answered was not checked.
            && self.measurements.iter().all(|m| m.failures == 0 && m.rows.iter().all(|row| row.right > 0))
    }

    fn failures(&self) -> impl Iterator<Item = &String> {
        self.measurements.iter().flat_map(|m| &m.first_failures).chain(&self.lost_writes)
    }

    fn told(&self) -> Vec<(&'static str, String)> {
        let mut told = self.facts.rows();
        told.extend(self.server.clone());
        if let (Some(peak), Some(last)) = (self.peak(), self.measurements.last())
            && self.measurements.len() > 1
        {
            let at_last: f64 = last.rows.iter().map(|row| row.goodput).sum();
            let share = if peak > 0.0 { 100.0 * at_last / peak } else { 0.0 };
            told.push(("goodput", format!("{share:.0} % of the peak in the last measurement")));
        }
        told
    }

    fn peak(&self) -> Option<f64> {
        let goodput = |m: &Measurement| m.rows.iter().map(|row| row.goodput).sum::<f64>();
        self.measurements.iter().map(goodput).max_by(f64::total_cmp)
    }

    /// For a terminal.
    pub(crate) fn text(&self) -> String {
        let mut text = properties(&self.told()).to_string();
        for measurement in &self.measurements {
            let mut rows = table(&HEADER, 1);
            for row in &measurement.rows {
                rows.add_row(Measurement::cells(row).to_vec());
            }
            let _ = write!(text, "\n\n{}\n{rows}", measurement.title());
        }
        for failure in self.failures() {
            let _ = write!(text, "\nharness: {failure}");
        }
        text
    }

    /// Writes `PATH.json` and `PATH.html`.
    ///
    /// # Errors
    /// Where they cannot be written.
    pub(crate) fn save(&self, path: &Path) -> anyhow::Result<()> {
        let write = |ending: &str, text: String| {
            let path = path.with_extension(ending);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("json", serde_json::to_string(self)? + "\n")?;
        write("html", self.page()?)
    }

    /// One page that needs no other file.
    fn page(&self) -> anyhow::Result<String> {
        let mut page = String::from(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width\"><title>Thenar under load</title>\
             <style>body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;\
             color:#222;background:#fff}table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;\
             text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}\
             .bad{color:#b00}svg{max-width:100%;height:auto}</style><h1>Thenar under load</h1><table>",
        );
        for (name, value) in self.told() {
            let _ = write!(page, "<tr><td>{}<td>{}", escaped(name), escaped(&value));
        }
        page.push_str("</table>");
        for failure in self.failures() {
            let _ = write!(page, "<p class=\"bad\">{}", escaped(failure));
        }
        for measurement in &self.measurements {
            let _ = write!(page, "<h2>{}</h2><table><tr>", escaped(&measurement.title()));
            HEADER.iter().for_each(|name| page.extend(["<th>", name]));
            for row in &measurement.rows {
                page.push_str("<tr>");
                Measurement::cells(row).iter().for_each(|cell| page.extend(["<td>", cell]));
            }
            let _ = write!(page, "</table>{}", plot::svg(&measurement.panels())?);
        }
        page.push_str("</html>\n");
        Ok(page)
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// What the server is, for the report.
pub(crate) fn server_rows(
    status: &thenar::api::proto::Status,
    templates_per_second: f64,
) -> Vec<(&'static str, String)> {
    let engine = status.engine.clone().unwrap_or_default();
    vec![
        (
            "gallery",
            format!(
                "{} templates x {}, {} engine, {}, {} threads",
                grouped(status.templates),
                status.dim,
                engine.kind,
                engine.adapter,
                engine.threads
            ),
        ),
        ("BulkEnroll", format!("{} templates a second, durable and searchable", grouped(templates_per_second as u64))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(start: Instant, due_ms: u64, took_ms: u64, kind: Kind, verdict: Verdict) -> Judged {
        let due = start + Duration::from_millis(due_ms);
        Judged { kind, due, sent: due, done: due + Duration::from_millis(took_ms), verdict }
    }

    fn report(calls: &[Judged], start: Instant, allowed: &[String]) -> Report {
        let measured = Measurement::new((10.0, 0.0), calls, start, 2, Duration::from_millis(100), allowed);
        Report { facts: Facts::gather(), server: Vec::new(), measurements: vec![measured], lost_writes: Vec::new() }
    }

    #[test]
    fn latency_counts_from_when_a_call_was_due_and_goodput_until_its_deadline() {
        let start = Instant::now();
        let mut calls = vec![
            call(start, 0, 10, Kind::Entry, Verdict::Right),
            call(start, 1500, 200, Kind::Entry, Verdict::Right),
            call(start, 1999, 1, Kind::Entry, Verdict::Refused),
            // After the measurement.
            call(start, 2000, 10, Kind::Entry, Verdict::Right),
        ];
        calls[0].sent = start + Duration::from_millis(9);
        let report = report(&calls, start, &["refused".to_owned()]);
        let row = &report.measurements[0].rows[0];
        assert_eq!((row.calls, row.right, row.refused), (3, 2, 1));
        assert!((row.goodput - 0.5).abs() < 1e-9, "one in time in two seconds: {}", row.goodput);
        assert!((9.9..10.1).contains(&row.latency_ms.p50), "{}", row.latency_ms.p50);
        assert!((199.0..201.0).contains(&row.latency_ms.max), "{}", row.latency_ms.max);
        assert!(report.measurements[0].sent_late_ms.max > 8.9);
        assert!(report.is_good());
    }

    #[test]
    fn a_wrong_answer_an_error_that_is_not_allowed_and_a_lost_write_fail_the_run() {
        let start = Instant::now();
        let right = call(start, 0, 1, Kind::Entry, Verdict::Right);
        let with = |verdict: Verdict, allowed: &[&str]| {
            let allowed: Vec<String> = allowed.iter().map(|word| (*word).to_owned()).collect();
            let other = call(start, 1, 1, Kind::Entry, verdict);
            report(&[right.clone(), other], start, &allowed)
        };
        assert!(with(Verdict::Right, &[]).is_good());
        assert!(!with(Verdict::Wrong("somebody else".to_owned()), &["refused", "expired"]).is_good());
        assert!(!with(Verdict::Failed("Internal".to_owned()), &["refused", "expired"]).is_good());
        assert!(!with(Verdict::Refused, &["expired"]).is_good());
        assert!(with(Verdict::Refused, &["refused"]).is_good());
        assert!(!with(Verdict::Expired, &[]).is_good());
        assert!(with(Verdict::Expired, &["expired"]).is_good());
        let mut lost = with(Verdict::Right, &[]);
        lost.lost_writes.push("palm-7".to_owned());
        assert!(!lost.is_good() && lost.text().contains("palm-7"));
        // Before the measurement began, too.
        let early = Judged { verdict: Verdict::Wrong("early".to_owned()), ..right.clone() };
        let late_start = start + Duration::from_secs(1);
        let later = call(late_start, 0, 1, Kind::Entry, Verdict::Right);
        assert!(!report(&[early, later], late_start, &[]).is_good());
        // A kind that was never answered was not checked.
        let silent = call(start, 0, 1, Kind::Floorless, Verdict::Refused);
        assert!(!report(&[right, silent], start, &["refused".to_owned()]).is_good());
    }

    #[test]
    fn the_page_shows_latency_over_time_and_needs_no_other_file() {
        let start = Instant::now();
        let calls: Vec<Judged> =
            (0..200).map(|i| call(start, 10 * i, 1 + i % 7, Kind::Entry, Verdict::Right)).collect();
        let mut report = report(&calls, start, &[]);
        report.lost_writes.push("<script>".to_owned());
        let page = report.page().unwrap();
        for part in ["<svg", "latency over time", "searches with a threshold, p99", "&lt;script&gt;", "in time/s"] {
            assert!(page.contains(part), "{part}");
        }
        for part in ["src=", "href=", "<script", "@import"] {
            assert!(!page.contains(part), "{part}");
        }
    }

    #[test]
    fn one_in_so_many_is_slower() {
        assert_eq!(slower_than(&[(1000, 90), (2000, 9), (5000, 1)]), [(1.0, 1.0), (10.0, 2.0), (100.0, 5.0)]);
    }
}
