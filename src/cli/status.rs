//! `thenar status`: what a running server is and holds, on one page.

use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::Outcome;
use super::connect::{self, ServerArgs};
use super::error::CliError;
use super::sample::milliseconds;
use super::table::{self, grouped};
use crate::api::proto::{self, GetStatusRequest};

/// Show what a running server is and holds.
#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    /// Print one JSON object, its numbers in bytes and seconds.
    #[arg(long)]
    pub json: bool,
    /// The server to ask.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// A status as programs read it.
#[derive(Debug, Serialize)]
struct Page {
    address: String,
    version: String,
    uptime_seconds: f64,
    opened_in_seconds: f64,
    dim: u32,
    templates: u64,
    subjects: u64,
    tombstones: u64,
    searches: u64,
    engine: EnginePart,
    memory: MemoryPart,
    registry_lsn: u64,
    gallery_lsn: u64,
    log_lag: u64,
    policies: Vec<PolicyPart>,
}

#[derive(Debug, Serialize)]
struct EnginePart {
    kind: String,
    adapter: String,
    threads: u32,
    preferred: bool,
}

#[derive(Debug, Serialize)]
struct MemoryPart {
    mapped_bytes: u64,
    index_bytes: u64,
    engine_bytes: u64,
    device_bytes: u64,
    resident_anonymous_bytes: u64,
}

#[derive(Debug, Serialize)]
struct PolicyPart {
    purpose: String,
    threshold: f64,
    margin: f64,
}

/// Runs `thenar status`.
///
/// # Errors
/// [`CliError`] where the server cannot be reached or refuses.
pub async fn run(args: StatusArgs) -> Result<Outcome, CliError> {
    let page = ask(&args.server).await?;
    if args.json {
        table::say_json(&page)?;
    } else {
        table::say(render(&page))?;
    }
    Ok(Outcome::Done)
}

async fn ask(server: &ServerArgs) -> Result<Page, CliError> {
    let server = server.resolve()?;
    let status = connect::administration(server.connect().await?)
        .get_status(GetStatusRequest {})
        .await
        .map_err(|status| CliError::refused("GetStatus", status))?
        .into_inner();
    Ok(Page::new(server.address(), status))
}

impl Page {
    fn new(address: &str, status: proto::Status) -> Self {
        let engine = status.engine.unwrap_or_default();
        let memory = status.memory.unwrap_or_default();
        Self {
            address: address.to_owned(),
            version: status.version,
            uptime_seconds: milliseconds(status.uptime) / 1e3,
            opened_in_seconds: milliseconds(status.opened_in) / 1e3,
            dim: status.dim,
            templates: status.templates,
            subjects: status.subjects,
            tombstones: status.tombstones,
            searches: status.searches,
            engine: EnginePart {
                kind: engine.kind,
                adapter: engine.adapter,
                threads: engine.threads,
                preferred: engine.preferred,
            },
            memory: MemoryPart {
                mapped_bytes: memory.mapped_bytes,
                index_bytes: memory.index_bytes,
                engine_bytes: memory.engine_bytes,
                device_bytes: memory.device_bytes,
                resident_anonymous_bytes: memory.resident_anonymous_bytes,
            },
            registry_lsn: status.registry_lsn,
            gallery_lsn: status.gallery_lsn,
            log_lag: status.registry_lsn.saturating_sub(status.gallery_lsn),
            policies: status
                .policies
                .into_iter()
                .map(|policy| PolicyPart {
                    purpose: policy.purpose,
                    threshold: policy.threshold,
                    margin: policy.margin,
                })
                .collect(),
        }
    }
}

fn render(page: &Page) -> String {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let standing_in = if page.engine.preferred { "" } else { " (standing in while the device is rebuilt)" };
    let threads =
        if page.engine.threads == 1 { "1 thread".to_owned() } else { format!("{} threads", page.engine.threads) };
    let lag = match page.log_lag {
        0 => format!("{}, searches see all of it", grouped(page.registry_lsn)),
        lag => format!("{}, searches are {} changes behind", grouped(page.registry_lsn), grouped(lag)),
    };
    let mut rows = vec![
        ("server", format!("{} (thenar {})", page.address, page.version)),
        ("uptime", format!("{}; opened in {:.2} s", span(page.uptime_seconds), page.opened_in_seconds)),
        (
            "gallery",
            match page.dim {
                0 => "empty; the first enrolment decides on the dimension".to_owned(),
                dim => format!(
                    "{} templates of {} subjects, {dim} dimensions",
                    grouped(page.templates),
                    grouped(page.subjects)
                ),
            },
        ),
        ("erased", format!("{} rows not yet reclaimed", grouped(page.tombstones))),
        ("searches", grouped(page.searches)),
        ("engine", format!("{}: {}, {threads}{standing_in}", page.engine.kind, page.engine.adapter)),
        (
            "memory",
            format!(
                "{} mapped, {} index, {} engine, {} device, {} resident",
                mib(page.memory.mapped_bytes),
                mib(page.memory.index_bytes),
                mib(page.memory.engine_bytes),
                mib(page.memory.device_bytes),
                mib(page.memory.resident_anonymous_bytes)
            ),
        ),
        ("log", lag),
    ];
    for policy in &page.policies {
        rows.push(("policy", format!("{}: threshold {}, margin {}", policy.purpose, policy.threshold, policy.margin)));
    }
    table::facts(&rows).to_string()
}

/// A span in the two largest units that say something.
fn span(seconds: f64) -> String {
    let whole = Duration::from_secs_f64(seconds.max(0.0)).as_secs();
    let (days, hours, minutes) = (whole / 86_400, whole / 3600 % 24, whole / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{whole} s"),
        (0, 0, _) => format!("{minutes} min {} s", whole % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::mock_server::Fake;

    #[tokio::test]
    async fn the_page_tells_what_the_server_told() {
        let fake = Fake::start(64).await;
        fake.held.lock().subjects.insert("ann".to_owned(), vec![(vec![1.0; 64], 0); 2]);
        let page = ask(&fake.args()).await.unwrap();
        let json: serde_json::Value = serde_json::from_str(&serde_json::to_string(&page).unwrap()).unwrap();
        assert_eq!(json["dim"], 64);
        assert_eq!(json["templates"], 2);
        assert_eq!(json["subjects"], 1);
        assert_eq!(json["log_lag"], 2);
        assert_eq!(json["memory"]["mapped_bytes"], 3 << 20);
        assert_eq!(json["engine"]["kind"], "cpu");
        assert_eq!(json["policies"][0]["purpose"], "payment");
        let text = render(&page);
        for told in [
            "2 templates of 1 subjects",
            "64 dimensions",
            "1 d 2 h",
            "3.0 MiB mapped",
            "2 changes behind",
            "one by one",
            "payment",
        ] {
            assert!(text.contains(told), "{told:?} is missing in\n{text}");
        }
        let args = |json| StatusArgs { json, server: fake.args() };
        assert_eq!(run(args(true)).await.unwrap(), Outcome::Done);
        assert_eq!(run(args(false)).await.unwrap(), Outcome::Done);
    }

    #[test]
    fn spans_have_two_units() {
        let told: Vec<String> = [0.4, 59.0, 61.0, 3600.0, 90_061.0].into_iter().map(span).collect();
        assert_eq!(told, ["0 s", "59 s", "1 min 1 s", "1 h 0 min", "1 d 1 h"]);
    }
}
