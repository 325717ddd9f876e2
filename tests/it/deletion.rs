//! Forgotten means gone: not a run of a template's bytes is left in a file, in the server's memory,
//! in its log or in its metrics.
//!
//! What is looked for: any 32 bytes in a row of the embedding as it was sent, normalised or rotated
//! (f32), of the stored row (f16), and of the sealed template in the registry. Every search for bytes
//! is first seen to find them while the person is enrolled.
//! Memory is looked at while the client's connection is still open.

use std::collections::HashMap;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use thenar::model::Embedding;
use tonic::Code;

use crate::support::client::{Client, enroll_request, forget_request};
use crate::support::disk::{copy_folder, files_under};
use crate::support::machine::{gpu_is_required, llvmpipe_is_here, skip};
use crate::support::oracle::Rotated;
use crate::support::palms::{Palm, Palms};
use crate::support::processes::{Mapping, memory};
use crate::support::server::{Options, Site, TestServer};

const SEED: u64 = 91;
const DIM: usize = 64;
/// So many runs of any one form are left of about half a template.
const HALF_A_ROW: usize = (DIM - RUN) / 2;
/// Bytes in a row that are no accident.
const RUN: usize = 32;

/// Runs of bytes to look for, each with what it is of.
#[derive(Default)]
struct Traces {
    by_start: HashMap<u64, Vec<([u8; RUN], String)>>,
    /// Whether any run starts with these two bytes: most places are passed over by one look.
    starts: Vec<bool>,
}

impl Traces {
    /// Every run of `bytes` that starts at a multiple of `step`.
    fn add(&mut self, what: &str, bytes: &[u8], step: usize) {
        self.starts.resize(1 << 16, false);
        for run in bytes.windows(RUN).step_by(step) {
            let run: [u8; RUN] = run.try_into().unwrap();
            let start = u64::from_le_bytes(run[..8].try_into().unwrap());
            self.starts[usize::from(start as u16)] = true;
            self.by_start.entry(start).or_default().push((run, what.into()));
        }
    }

    /// What of all that is in `bytes`, and how often.
    fn found_in(&self, bytes: &[u8], found: &mut HashMap<String, usize>) {
        for (at, start) in bytes.windows(8).enumerate() {
            let start = u64::from_le_bytes(start.try_into().unwrap());
            if !self.starts[usize::from(start as u16)] {
                continue;
            }
            for (run, what) in self.by_start.get(&start).into_iter().flatten() {
                if bytes[at..].starts_with(run) {
                    *found.entry(what.clone()).or_default() += 1;
                }
            }
        }
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The forms of one person's palms.
fn forms(who: &str, palms: &[Palm], keys: &Rotated, sealed: &[Vec<u8>]) -> Traces {
    let mut traces = Traces::default();
    for palm in palms {
        let embedding = Embedding::new(palm.values.clone(), DIM).unwrap();
        traces.add(&format!("{who}: as sent"), &bytes_of(&palm.values), 4);
        traces.add(&format!("{who}: normalised"), &bytes_of(embedding.values()), 4);
        traces.add(&format!("{who}: rotated"), &bytes_of(&keys.probe(&palm.values)), 4);
        let row: Vec<u8> = keys.row(&palm.values).iter().flat_map(|v| v.to_bits().to_le_bytes()).collect();
        traces.add(&format!("{who}: stored row"), &row, 2);
        let plain: Vec<u8> = palm.values.iter().flat_map(|v| half::f16::from_f32(*v).to_bits().to_le_bytes()).collect();
        traces.add(&format!("{who}: as sent, in f16"), &plain, 2);
    }
    for sealed in sealed {
        traces.add(&format!("{who}: sealed"), sealed, 1);
    }
    traces
}

/// The sealed templates of a subject, as any program reads them from the registry.
fn sealed(site: &Site, subject: &str) -> Vec<(u64, Vec<u8>)> {
    let registry = rusqlite::Connection::open(site.data().join("registry.sqlite")).unwrap();
    let mut query = registry
        .prepare(
            "SELECT templates.id, slots.content FROM slots JOIN templates USING (slot)
             JOIN subjects ON subjects.number = templates.subject JOIN slots AS names ON names.slot = subjects.slot
             WHERE names.content = ?1 ORDER BY templates.id",
        )
        .unwrap();
    let mut name = subject.as_bytes().to_vec();
    name.resize(64, 0);
    let rows = query.query_map([name], |row| Ok((row.get::<_, i64>(0)? as u64, row.get(1)?))).unwrap();
    rows.map(Result::unwrap).collect()
}

fn in_files(folder: &Path, traces: &Traces) -> HashMap<String, usize> {
    let mut found = HashMap::new();
    for file in files_under(folder) {
        // SQLite may remove a file between the listing and this.
        let Ok(bytes) = std::fs::read(&file) else { continue };
        let mut here = HashMap::new();
        traces.found_in(&bytes, &mut here);
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        found.extend(here.into_iter().map(|(what, count)| (format!("{what} in {name}"), count)));
    }
    found
}

/// What is in the memory of a process, by the kind of mapping. `None` where it may not be read.
fn in_memory(pid: u32, traces: &Traces) -> Option<HashMap<String, usize>> {
    const STEP: usize = 1 << 20;
    let (memory, mappings) = memory(pid)?;
    let mut found = HashMap::new();
    let mut buffer = vec![0; STEP + RUN];
    for Mapping { from, to, name, .. } in mappings {
        let mut at = from;
        let mut here = HashMap::new();
        while at < to {
            // A little over the step, so that a run across two is seen; the rest of a page may be gone.
            let want = usize::try_from(to - at).unwrap().min(STEP + RUN);
            if let Ok(read) = memory.read_at(&mut buffer[..want], at) {
                traces.found_in(&buffer[..read], &mut here);
            }
            at += STEP as u64;
        }
        for (what, count) in here {
            *found.entry(format!("{what} in {name}")).or_default() += count;
        }
    }
    Some(found)
}

/// Everything of these people but what is said of them in the keys: no file, no log, no metric.
fn assert_gone(what: &str, server: &TestServer, traces: &Traces) {
    assert_eq!(in_files(&server.site.data(), traces), HashMap::new(), "{what}: files, seed {SEED}");
    for (place, text) in [("log", server.log()), ("metrics", server.metrics_text())] {
        let mut found = HashMap::new();
        traces.found_in(text.as_bytes(), &mut found);
        assert_eq!(found, HashMap::new(), "{what}: {place}, seed {SEED}");
    }
}

/// A server with a crowd, and three palms of somebody who will go.
async fn with_somebody(options: Options) -> (TestServer, Client, Vec<Palm>, Traces) {
    let server = TestServer::start(options);
    let mut client = server.client().await;
    let (theirs, traces) = with_somebody_on(&server, &mut client).await;
    (server, client, theirs, traces)
}

async fn with_somebody_on(server: &TestServer, client: &mut Client) -> (Vec<Palm>, Traces) {
    let mut palms = Palms::new(SEED, DIM);
    let mut crowd: Vec<_> = (0..300).map(|i| enroll_request(&format!("crowd-{i}"), &[palms.palm()])).collect();
    let theirs: Vec<Palm> = (0..3).map(|_| palms.palm()).collect();
    crowd.insert(150, enroll_request("ada", &theirs));
    client.bulk(crowd).await;
    for palm in &theirs {
        assert_eq!(client.who(palm).await.unwrap().as_deref(), Some("ada"));
    }
    client.verify("ada", &theirs[..1]).await.unwrap();
    let keys = Rotated::new(&server.site.key(), DIM);
    let stored: Vec<Vec<u8>> = sealed(&server.site, "ada").into_iter().map(|(_, sealed)| sealed).collect();
    assert_eq!(stored.len(), 3);
    let traces = forms("ada", &theirs, &keys, &stored);
    let found = in_files(&server.site.data(), &traces);
    assert!(found.keys().any(|k| k.contains("stored row in")), "the index has the row: {found:?}");
    assert!(found.keys().any(|k| k.contains("sealed in registry.sqlite")), "the registry has it sealed: {found:?}");
    let unsealed = |k: &&String| !k.contains("stored row") && !k.contains("sealed");
    assert_eq!(found.keys().find(unsealed), None, "no file ever has an embedding as it was sent");
    (theirs, traces)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_forgotten_template_is_in_no_file_log_or_metric_even_after_kill_9() {
    let options = Options { level: "debug", ..Options::dim(DIM) };
    let (server, mut client, theirs, traces) = with_somebody(options).await;
    assert_eq!(client.forget("ada").await.unwrap().templates_erased, 3);
    assert_gone("acknowledged", &server, &traces);
    // Others come and go; what is gone stays gone.
    let mut palms = Palms::new(SEED + 1, DIM);
    for i in 0..5 {
        client.enroll(&format!("late-{i}"), &[palms.palm()]).await.unwrap();
    }
    client.enroll("eve", &[palms.palm()]).await.unwrap();
    let eve = sealed(&server.site, "eve").remove(0).1;
    let mut of_eve = Traces::default();
    of_eve.add("eve: sealed", &eve, 1);
    client.forget("eve").await.unwrap();
    let site = server.kill9();
    assert_eq!(in_files(&site.data(), &traces), HashMap::new(), "killed, seed {SEED}");
    assert_eq!(in_files(&site.data(), &of_eve), HashMap::new(), "killed at once, seed {SEED}");
    let server = site.start();
    assert_gone("restarted", &server, &traces);
    let mut client = server.client().await;
    for palm in &theirs {
        assert_eq!(client.who(palm).await.unwrap(), None);
    }
    let site = server.terminate();
    assert_eq!(in_files(&site.data(), &traces), HashMap::new(), "stopped, seed {SEED}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_template_that_an_update_removes_is_in_no_file_and_the_others_stay() {
    let (server, mut client, theirs, _) = with_somebody(Options::dim(DIM)).await;
    let keys = Rotated::new(&server.site.key(), DIM);
    let stored = sealed(&server.site, "ada");
    let new = Palms::new(SEED + 2, DIM).palm();
    client.update("ada", std::slice::from_ref(&new), &[stored[0].0, stored[2].0]).await.unwrap();
    for at in [0, 2] {
        let traces = forms("removed", &theirs[at..=at], &keys, &[stored[at].1.clone()]);
        assert_gone("removed", &server, &traces);
    }
    let kept = in_files(&server.site.data(), &forms("kept", &theirs[1..2], &keys, &[stored[1].1.clone()]));
    assert!(kept.keys().any(|k| k.contains("sealed")) && kept.keys().any(|k| k.contains("stored row")), "{kept:?}");
    assert_eq!(client.who(&theirs[1]).await.unwrap().as_deref(), Some("ada"));
    assert_eq!(client.who(&new).await.unwrap().as_deref(), Some("ada"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_forgotten_name_and_the_ids_of_requests_are_in_no_file() {
    let server = TestServer::start(Options::dim(DIM));
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED + 4, DIM);
    let crowd = (0..2000).map(|i| enroll_request(&format!("somebody-in-the-crowd-{i}"), &[palms.palm()]));
    let mut crowd: Vec<_> = crowd.collect();
    crowd.insert(1000, enroll_request("ada-lovelace-1815-12-10", &[palms.palm()]));
    for (i, enrolment) in crowd.iter_mut().enumerate() {
        enrolment.request_id = format!("order-of-the-day-{i}");
    }
    client.bulk(crowd).await;
    let traces = |names: &[&str]| {
        let mut found = Vec::new();
        for file in files_under(&server.site.data()) {
            let bytes = std::fs::read(&file).unwrap();
            for name in names.iter().filter(|name| bytes.windows(name.len()).any(|w| w == name.as_bytes())) {
                found.push(format!("{name} in {}", file.display()));
            }
        }
        found
    };
    assert!(!traces(&["ada-lovelace-1815"]).is_empty(), "she is found while she is enrolled");
    assert_eq!(traces(&["order-of-the-day"]), [""; 0], "enrolled");
    client.forget("ada-lovelace-1815-12-10").await.unwrap();
    for i in (0..2000).step_by(7) {
        client.forget(&format!("somebody-in-the-crowd-{i}")).await.unwrap();
    }
    assert_eq!(traces(&["lovelace-1815", "order-of-the-day"]), [""; 0], "forgotten");
    assert!(!traces(&["somebody-in-the-crowd"]).is_empty());
}

/// A program that reads the registry holds its write-ahead log in place, so the deletion cannot end.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_deletion_that_was_held_up_is_finished_without_being_asked_again() {
    let (server, mut client, theirs, traces) = with_somebody(Options::dim(DIM)).await;
    let hold = |site: &Site| {
        let reader = rusqlite::Connection::open(site.data().join("registry.sqlite")).unwrap();
        reader.execute_batch("BEGIN; SELECT count(*) FROM slots").unwrap();
        reader
    };
    let reader = hold(&server.site);
    let held_up = client.forget("ada").await.unwrap_err();
    assert_eq!(held_up.code(), Code::Unavailable, "{held_up:?}");
    assert!(held_up.message().contains("send the same request again"), "{held_up:?}");
    assert_ne!(in_files(&server.site.data(), &traces), HashMap::new(), "this holds a deletion up");
    assert_eq!(client.who(&theirs[0]).await.unwrap(), None, "searches do not see her all the same");
    drop(reader);
    // The running server finishes it by itself.
    let until = Instant::now() + Duration::from_secs(30);
    while !in_files(&server.site.data(), &traces).is_empty() {
        assert!(Instant::now() < until, "the deletion is never finished: {:?}", in_files(&server.site.data(), &traces));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // And so does the next one, where this one is killed before.
    let bob = Palms::new(SEED + 3, DIM).palm();
    client.enroll("bob", std::slice::from_ref(&bob)).await.unwrap();
    let stored = sealed(&server.site, "bob").remove(0).1;
    let keys = Rotated::new(&server.site.key(), DIM);
    let traces = forms("bob", std::slice::from_ref(&bob), &keys, &[stored]);
    let reader = hold(&server.site);
    client.enrollment.forget(forget_request("bob")).await.unwrap_err();
    let mut site = server.kill9();
    // A copy, as the reader itself would tidy up when it goes.
    let copy = site.dir.path().join("copy");
    copy_folder(&site.data(), &copy);
    drop(reader);
    site.options.data = Some(copy);
    assert_ne!(in_files(&site.data(), &traces), HashMap::new(), "it was held up");
    let server = site.start();
    assert_gone("restarted", &server, &traces);
    assert_eq!(server.client().await.get("bob").await.unwrap_err().code(), Code::NotFound);
}

async fn is_gone_from_memory(server: TestServer, mut client: Client) {
    let (_, traces) = with_somebody_on(&server, &mut client).await;
    let Some(found) = in_memory(server.pid(), &traces) else {
        return skip("this system does not let a process read another's memory");
    };
    assert!(found.keys().any(|k| k.contains("stored row in /")), "the mapped index has the row: {found:?}");
    client.forget("ada").await.unwrap();
    // The connection stays open meanwhile. Threads may still be at their last steps.
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let mut found = in_memory(server.pid(), &traces).expect("it was readable before");
        // SQLite's own heap may keep pages it has read; what is in them is sealed under the master key.
        // And a graphics driver's threads may keep a few words they worked on last, not half a row.
        found.retain(|what, count| !what.contains(": sealed in") && *count >= HALF_A_ROW);
        if found.is_empty() {
            break;
        }
        assert!(Instant::now() < until, "memory, seed {SEED}: {found:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    drop(client);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_forgotten_template_is_not_in_the_servers_memory() {
    let server = TestServer::start(Options::dim(DIM));
    let client = server.client().await;
    is_gone_from_memory(server, client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_forgotten_template_is_not_in_the_memory_of_a_server_that_speaks_tls() {
    let (server, client) = crate::support::tls::served(DIM).await;
    is_gone_from_memory(server, client).await;
}

/// The memory of the software adapter is the server's own, so a GPU's buffers can be looked into.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_forgotten_template_is_not_in_the_gpus_memory() {
    if !llvmpipe_is_here() {
        assert!(!gpu_is_required(), "llvmpipe is missing");
        return skip("there is no llvmpipe here");
    }
    let engine = "kind = \"gpu\"\nadapter = \"llvmpipe\"\nthreads = 2".into();
    let server = TestServer::start(Options { engine, ..Options::dim(DIM) });
    let client = server.client().await;
    is_gone_from_memory(server, client).await;
}
