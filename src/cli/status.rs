//! `thenar status`: what a running server is and holds, on one page.

use clap::Args;
use serde::Serialize;

use super::Outcome;
use super::args::ServerArgs;
use super::client::Server;
use super::error::CliError;
use super::output::{duration, grouped, mib, print, print_json, properties, seconds};
use crate::api::proto::{self, EngineStatus, MemoryStatus, PolicyStatus};

/// Show what a running server is and holds.
#[derive(Debug, Clone, Args)]
pub(crate) struct StatusArgs {
    /// Print one JSON object, its numbers in bytes and seconds.
    #[arg(long)]
    json: bool,
    /// The server to ask.
    #[command(flatten)]
    server: ServerArgs,
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
    engine: EngineStatus,
    memory: MemoryStatus,
    registry_lsn: u64,
    gallery_lsn: u64,
    log_lag: u64,
    policies: Vec<PolicyStatus>,
}

/// Runs `thenar status`.
///
/// # Errors
/// [`CliError`] if the server cannot be reached or refuses.
pub(crate) async fn run(args: StatusArgs) -> Result<Outcome, CliError> {
    let server = Server::new(&args.server)?;
    let page = Page::new(server.address(), server.status().await?);
    if args.json {
        print_json(&page)?;
    } else {
        print(render(&page))?;
    }
    Ok(Outcome::Done)
}

impl Page {
    fn new(address: &str, status: proto::Status) -> Self {
        Self {
            address: address.to_owned(),
            version: status.version,
            uptime_seconds: seconds(status.uptime),
            opened_in_seconds: seconds(status.opened_in),
            dim: status.dim,
            templates: status.templates,
            subjects: status.subjects,
            tombstones: status.tombstones,
            searches: status.searches,
            engine: status.engine.unwrap_or_default(),
            memory: status.memory.unwrap_or_default(),
            registry_lsn: status.registry_lsn,
            gallery_lsn: status.gallery_lsn,
            log_lag: status.registry_lsn.saturating_sub(status.gallery_lsn),
            policies: status.policies,
        }
    }
}

fn render(page: &Page) -> String {
    let standing_in = if page.engine.preferred { "" } else { " (standing in while the device is rebuilt)" };
    let threads =
        if page.engine.threads == 1 { "1 thread".to_owned() } else { format!("{} threads", page.engine.threads) };
    let lag = match page.log_lag {
        0 => format!("{}, searches see all of it", grouped(page.registry_lsn)),
        lag => format!("{}, searches are {} changes behind", grouped(page.registry_lsn), grouped(lag)),
    };
    let mut rows = vec![
        ("server", format!("{} (thenar {})", page.address, page.version)),
        ("uptime", format!("{}; opened in {:.2} s", duration(page.uptime_seconds), page.opened_in_seconds)),
        (
            "gallery",
            match page.dim {
                0 => "empty; the first enrolment decides the dimension".to_owned(),
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
    properties(&rows).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::mock_server::MockServer;

    #[tokio::test]
    async fn the_page_tells_what_the_server_told() {
        let mock = MockServer::start(64).await;
        mock.state().subjects.insert("ann".to_owned(), vec![(vec![1.0; 64], 0); 2]);
        let server = Server::new(&mock.args()).unwrap();
        let page = Page::new(server.address(), server.status().await.unwrap());
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
        let args = |json| StatusArgs { json, server: mock.args() };
        assert_eq!(run(args(true)).await.unwrap(), Outcome::Done);
        assert_eq!(run(args(false)).await.unwrap(), Outcome::Done);
    }
}
