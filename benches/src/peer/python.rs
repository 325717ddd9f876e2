//! Peers from PyPI (faiss-cpu, USearch, hnswlib), run by `benches/python/peers.py` on the same
//! rows and probes. The script times its own calls; lines of JSON go back and forth.

use std::cell::RefCell;
use std::io::{BufRead as _, BufReader, Write as _};
use std::ops::Range;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::rc::Rc;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::{Answered, Call, Hit, Peer, PeerKind};
use crate::gallery::{Gallery, Probes};

/// The script, beside this crate.
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/python/peers.py");

/// What the script is told first.
#[derive(Serialize)]
struct Setup<'a> {
    rows: &'a Path,
    probes: &'a Path,
    dim: usize,
    threads: usize,
    hnsw: bool,
}

/// What the script says when everything is built.
#[derive(Deserialize)]
struct Ready {
    peers: Vec<ReadyPeer>,
    skipped: Vec<Skipped>,
    notes: Vec<String>,
}

#[derive(Deserialize)]
struct ReadyPeer {
    name: String,
    kind: String,
}

/// A peer that could not be had.
#[derive(Debug, Clone, Deserialize)]
pub struct Skipped {
    /// Which.
    pub name: String,
    /// Why.
    pub reason: String,
}

#[derive(Serialize)]
struct Turn<'a> {
    peer: &'a str,
    calls: Vec<(usize, usize)>,
    k: usize,
}

#[derive(Deserialize)]
struct Answer {
    seconds: Vec<f64>,
    /// For each call, each probe, rows; fewer than k end with -1.
    rows: Vec<Vec<Vec<i64>>>,
    scores: Vec<Vec<Vec<f64>>>,
}

struct Script {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    _files: TempDir,
}

impl Script {
    fn ask<Question: Serialize, Reply: for<'a> Deserialize<'a>>(
        &mut self,
        question: &Question,
    ) -> anyhow::Result<Reply> {
        let requests = self.requests.as_mut().context("the Python peers were told to end")?;
        writeln!(requests, "{}", serde_json::to_string(question)?)?;
        requests.flush()?;
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the Python peers ended: {}", self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("the Python peers said {line:?}"))
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        // Its input ends, so it does.
        self.requests = None;
        if let Err(error) = self.child.wait() {
            eprintln!("the Python peers did not end: {error}");
        }
    }
}

/// One peer of the script.
struct FromPython {
    name: String,
    kind: PeerKind,
    script: Rc<RefCell<Script>>,
}

/// What could be had from PyPI.
pub struct PythonPeers {
    /// The peers.
    pub peers: Vec<Box<dyn Peer>>,
    /// Those that could not be had.
    pub skipped: Vec<Skipped>,
    /// Versions, instruction sets and BLAS of the others.
    pub notes: Vec<String>,
}

/// Starts `python` on the script, which builds its indexes.
///
/// # Errors
/// Where it does not start or fails. A package that is missing is skipped, not an error.
pub fn start(
    python: &str,
    gallery: &Gallery,
    probes: &Probes,
    threads: usize,
    hnsw: bool,
) -> anyhow::Result<PythonPeers> {
    let files = tempfile::Builder::new().prefix("thenar-bench").tempdir()?;
    let (rows_file, probes_file) = (files.path().join("rows.f16"), files.path().join("probes.f32"));
    std::fs::write(&rows_file, bytemuck::cast_slice(gallery.rows()))?;
    std::fs::write(&probes_file, bytemuck::cast_slice(probes.values(0..probes.len())))?;
    let count = threads.to_string();
    let mut child = Command::new(python)
        .arg(SCRIPT)
        .env("OMP_WAIT_POLICY", "passive") // as for FAISS in this process, see .cargo/config.toml
        .envs(["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"].map(|name| (name, &count)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{python} does not start"))?;
    let requests = child.stdin.take();
    let answers = BufReader::new(child.stdout.take().context("a pipe was asked for")?);
    let mut script = Script { child, requests, answers, _files: files };
    let setup = Setup { rows: &rows_file, probes: &probes_file, dim: gallery.dim(), threads, hnsw };
    let ready: Ready = script.ask(&setup)?;
    let script = Rc::new(RefCell::new(script));
    let peers = ready.peers.into_iter().map(|peer| {
        let kind = match peer.kind.as_str() {
            "baseline" => PeerKind::Baseline,
            _ => PeerKind::Approximate,
        };
        Box::new(FromPython { name: peer.name, kind, script: Rc::clone(&script) }) as Box<dyn Peer>
    });
    Ok(PythonPeers { peers: peers.collect(), skipped: ready.skipped, notes: ready.notes })
}

impl Peer for FromPython {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> PeerKind {
        self.kind
    }

    fn turn(&mut self, _probes: &Probes, calls: &[Range<usize>], k: usize) -> anyhow::Result<Vec<Call>> {
        let turn = Turn { peer: &self.name, calls: calls.iter().map(|call| (call.start, call.end)).collect(), k };
        let answer: Answer = self.script.borrow_mut().ask(&turn)?;
        ensure!(
            answer.seconds.len() == calls.len()
                && answer.rows.len() == calls.len()
                && answer.scores.len() == calls.len(),
            "{} answered {} of {} calls",
            self.name,
            answer.rows.len(),
            calls.len()
        );
        let answers = answer.rows.into_iter().zip(answer.scores);
        let calls = calls.iter().zip(answer.seconds).zip(answers).map(|((call, seconds), (rows, scores))| {
            let hits = rows.into_iter().zip(scores).map(|(rows, scores)| {
                let hits = rows.into_iter().zip(scores);
                hits.filter_map(|(row, score)| Some(Hit { row: u32::try_from(row).ok()?, score })).collect()
            });
            Call { seconds, answered: Answered { first: call.start, hits: hits.collect() }, stages: None }
        });
        Ok(calls.collect())
    }
}
