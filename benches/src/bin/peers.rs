//! Thenar beside FAISS and others: the same gallery, the same threads, one run, turn by turn.
//!
//!     cargo run --release -p thenar-bench --bin peers
//!
//! Every answer is held against a brute force in f64. Exit code 1 if one that must be right is not.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use serde::Serialize;
use thenar::cli::output::{grouped, print, print_json, properties, table};
use thenar::engine::Engine;
use thenar::engine::certificate::Certificate;
use thenar::engine::cpu::CpuEngine;
use thenar::engine::gpu::{AdapterChoice, GpuEngine};
use thenar_bench::facts::Facts;
use thenar_bench::gallery::{Gallery, GalleryKind};
use thenar_bench::measure::{Figures, Pace, interleaved};
use thenar_bench::peer::python::{self, Skipped};
use thenar_bench::peer::thenar::{Shelf, Thenar};
use thenar_bench::peer::{Peer, PeerKind};
use thenar_bench::plot::{self, Axis, Panel, Series};
use thenar_bench::truth::{Judge, Truth, Verdict};

/// Probes of a run, at least, so that single probes are not always the same few.
const PROBES_MIN: usize = 64;
/// Rows up to which hnswlib builds its graph without being asked.
const HNSW_ROWS_MAX: usize = 100_000;

/// Compare Thenar with FAISS and others on one gallery, in one run, turn by turn.
///
/// recall_at_k is the share of the rows that belong in the answers and are there: the k best of
/// the exhaustive f64 scan, for `Thenar` those of them at or above tau. mates_missed counts probes
/// whose own palm belongs in the answer and is not there. Ratios are to the fastest FAISS Flat of
/// the run, as the median over the rounds.
#[derive(Debug, Parser)]
struct Arguments {
    /// Galleries: standard, clustered (families of 50 near-duplicates), heavy (spectrum i^-0.8).
    #[arg(long, value_enum, value_delimiter = ',', default_value = "standard")]
    gallery: Vec<GalleryKind>,
    /// Rows; several for latency against N.
    #[arg(long, value_delimiter = ',', default_value = "1000000", value_parser = positive)]
    n: Vec<usize>,
    /// Components of a row, multiples of 32.
    #[arg(long, value_delimiter = ',', default_value = "512", value_parser = thenar_bench::gallery::dimension)]
    dim: Vec<usize>,
    /// Probes of a call.
    #[arg(long, value_delimiter = ',', default_value = "1,16,256", value_parser = positive)]
    batch: Vec<usize>,
    /// Threads of every peer.
    #[arg(long, default_value_t = 2, value_parser = positive)]
    threads: usize,
    /// Threshold of Thenar's searches.
    #[arg(long, default_value_t = 0.5)]
    tau: f64,
    /// Rows wanted.
    #[arg(long, default_value_t = 10, value_parser = positive)]
    k: usize,
    /// Why Thenar's answers are complete: deterministic, randomised (with a miss probability of
    /// 1e-12), or randomised:P.
    #[arg(long, value_delimiter = ',', default_value = "randomised,deterministic")]
    certificate: Vec<Certificate>,
    /// What Thenar sifts with.
    #[arg(long, value_enum, default_value_t = EngineWord::Cpu)]
    engine: EngineWord,
    /// With --engine gpu: part of the adapter's name; software adapters are taken only by name.
    #[arg(long)]
    adapter: Option<String>,
    /// Indexes of FAISS, by the names of its index factory. Without Flat there are no ratios.
    #[arg(long, value_delimiter = ',', default_value = "Flat,SQfp16,SQ8,PQ64x4fs,RaBitQ")]
    faiss: Vec<String>,
    /// Also compare faiss-cpu, USearch and hnswlib of this Python (see benches/python).
    #[arg(long, value_name = "PYTHON", num_args = 0..=1, default_missing_value = "python3")]
    python: Option<String>,
    /// Let hnswlib build its graph also for more than 100,000 rows.
    #[arg(long)]
    hnsw: bool,
    /// Seed of the gallery.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Rounds; every peer has a turn in each. 5 unless said otherwise.
    #[arg(long, value_parser = positive)]
    rounds: Option<usize>,
    /// Least time of a turn in milliseconds. 500 unless said otherwise.
    #[arg(long)]
    turn_ms: Option<u64>,
    /// Seconds instead of minutes: 20,000 rows of 128, 2 short rounds. For tests.
    #[arg(long)]
    smoke: bool,
    /// Print a JSON object a line: one for each peer and batch, last the facts of the run.
    #[arg(long)]
    json: bool,
    /// Write benches/results/NAME.json and NAME.svg.
    #[arg(long, value_name = "NAME", num_args = 0..=1, default_missing_value = "peers")]
    save: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EngineWord {
    /// The CPU.
    Cpu,
    /// A graphics card.
    Gpu,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.replace('_', "").parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(format!("{text:?} is not a number from 1")),
    }
}

/// One line of the result. The order and the names of the keys up to `mates_missed` are relied on.
#[derive(Debug, Clone, Serialize)]
struct Row {
    peer: String,
    gallery: GalleryKind,
    n: usize,
    dim: usize,
    engine: &'static str,
    certificate: &'static str,
    batch: usize,
    threads: usize,
    searches_per_second: f64,
    latency_ms_p50: f64,
    recall_at_k: f64,
    mates_missed: u64,
    k: usize,
    /// None for peers that return the k best of all.
    tau: Option<f64>,
    /// Times the searches a second of the fastest FAISS Flat in the run.
    ratio_to_faiss_flat: Option<f64>,
    pairs_per_second: f64,
    /// Median milliseconds a call in the engine and in exact scores, where known.
    prefilter_ms: Option<f64>,
    refine_ms: Option<f64>,
    probes_judged: usize,
    score_error_max: f64,
    answers_hash: String,
    wrong: Option<String>,
}

/// The whole result, as it is saved.
#[derive(Debug, Serialize)]
struct Document {
    facts: RunFacts,
    rows: Vec<Row>,
}

/// Facts of the run.
#[derive(Debug, Clone, Serialize)]
struct RunFacts {
    #[serde(flatten)]
    machine: Facts,
    seed: u64,
    thenar: String,
    faiss: String,
    notes: Vec<String>,
    skipped: Vec<String>,
    baseline: Option<String>,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.smoke {
        (arguments.n, arguments.dim, arguments.batch) = (vec![20_000], vec![128], vec![1, 16, 64]);
        arguments.rounds.get_or_insert(2);
        arguments.turn_ms.get_or_insert(20);
    }
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("peers: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let machine = Facts::gather();
    rayon::ThreadPoolBuilder::new().num_threads(arguments.threads).build_global()?;
    let engine: Arc<dyn Engine> = match arguments.engine {
        EngineWord::Cpu => Arc::new(CpuEngine::new(arguments.threads)?),
        EngineWord::Gpu => {
            let choice = arguments.adapter.clone().map_or(AdapterChoice::Any, AdapterChoice::Named);
            Arc::new(GpuEngine::new(choice)?)
        }
    };
    let described = engine.describe();
    let mut document = Document {
        facts: RunFacts {
            machine,
            seed: arguments.seed,
            thenar: format!(
                "{} engine, {}, certificates {}",
                described.kind,
                described.adapter,
                arguments.certificate.iter().map(Certificate::to_string).collect::<Vec<_>>().join(", ")
            ),
            faiss: faiss_facts(arguments.threads),
            notes: Vec::new(),
            skipped: Vec::new(),
            baseline: None,
        },
        rows: Vec::new(),
    };
    for &gallery in &arguments.gallery {
        for &dim in &arguments.dim {
            for &n in &arguments.n {
                compare(arguments, gallery, n, dim, &engine, &mut document)?;
            }
        }
    }

    if arguments.json {
        document.rows.iter().try_for_each(print_json)?;
        print_json(&serde_json::json!({ "facts": document.facts }))?;
    } else {
        print(properties(&told(&document.facts)))?;
        print(rendered(arguments, &document))?;
    }
    if let Some(name) = &arguments.save {
        save(name, &document)?;
    }
    let mut right = true;
    for row in &document.rows {
        if let Some(wrong) = &row.wrong {
            right = false;
            eprintln!("peers: WRONG ANSWER of {}, batches of {}: {wrong}", row.peer, row.batch);
        }
    }
    Ok(right)
}

/// Runs every peer on one gallery.
fn compare(
    arguments: &Arguments,
    kind: GalleryKind,
    n: usize,
    dim: usize,
    engine: &Arc<dyn Engine>,
    document: &mut Document,
) -> anyhow::Result<()> {
    let what = format!("{} gallery of {} x {dim}", kind.as_str(), grouped(n as u64));
    let gallery = timed(&format!("{what}: rows"), || Ok(Gallery::new(kind, arguments.seed, n, dim)))?;
    let batch_max = arguments.batch.iter().copied().max().unwrap_or(1);
    let probes = gallery.probes(batch_max.max(PROBES_MIN));
    let truth = timed(&format!("{what}: brute force"), || Ok(Truth::new(&gallery, &probes, arguments.k)))?;

    let shelf = timed(&format!("{what}: Thenar's index"), || Ok(Arc::new(Shelf::new(&gallery)?)))?;
    let mut peers: Vec<Box<dyn Peer>> = Vec::new();
    for tau in [Some(arguments.tau), None] {
        for certificate in &arguments.certificate {
            peers.push(Box::new(Thenar::new(&shelf, engine, tau, *certificate)?));
        }
    }
    let mut skipped = Vec::new();
    for factory in &arguments.faiss {
        match timed(&format!("{what}: FAISS {factory}"), || faiss_peer(factory, &gallery)) {
            Ok(peer) => peers.push(peer),
            Err(error) => skipped.push(Skipped { name: format!("FAISS {factory}"), reason: format!("{error:#}") }),
        }
    }
    if let Some(python) = &arguments.python {
        let hnsw = arguments.hnsw || n <= HNSW_ROWS_MAX;
        let more = timed(&format!("{what}: peers from PyPI"), || {
            python::start(python, &gallery, &probes, arguments.threads, hnsw)
        })?;
        peers.extend(more.peers);
        skipped.extend(more.skipped);
        document.facts.notes.extend(more.notes);
    }
    for Skipped { name, reason } in skipped {
        document.facts.skipped.push(format!("{name} (N={n}, D={dim}): {reason}"));
    }
    document.facts.notes.sort();
    document.facts.notes.dedup();

    let pace =
        Pace { rounds: arguments.rounds.unwrap_or(5), turn: Duration::from_millis(arguments.turn_ms.unwrap_or(500)) };
    for &batch in &arguments.batch {
        let mut judges: Vec<Judge<'_>> =
            peers.iter().map(|peer| Judge::new(&gallery, &probes, &truth, peer.kind())).collect();
        let figures = timed(&format!("{what}: batches of {batch}"), || {
            interleaved(&mut peers, &mut judges, &probes, batch, arguments.k, pace)
        })?;
        let baseline = fastest_flat(&peers, &figures);
        if let Some(at) = baseline {
            document.facts.baseline = Some(peers[at].name().to_owned());
        }
        for (at, peer) in peers.iter().enumerate() {
            let place = Place { kind, n, dim, batch, threads: arguments.threads, k: arguments.k };
            let ratio = baseline.map(|baseline| figures[at].ratio_to(&figures[baseline]));
            document.rows.push(place.row(&**peer, &figures[at], &judges[at].verdict(), ratio));
        }
    }
    Ok(())
}

/// The FAISS Flat with the most searches a second.
fn fastest_flat(peers: &[Box<dyn Peer>], figures: &[Figures]) -> Option<usize> {
    let rate = |at: &usize| figures[*at].searches_per_second();
    (0..peers.len()).filter(|at| peers[*at].kind() == PeerKind::Baseline).max_by(|a, b| rate(a).total_cmp(&rate(b)))
}

/// What was measured.
struct Place {
    kind: GalleryKind,
    n: usize,
    dim: usize,
    batch: usize,
    threads: usize,
    k: usize,
}

impl Place {
    fn row(&self, peer: &dyn Peer, figures: &Figures, verdict: &Verdict, ratio: Option<f64>) -> Row {
        let rate = figures.searches_per_second();
        Row {
            peer: peer.name().to_owned(),
            gallery: self.kind,
            n: self.n,
            dim: self.dim,
            engine: peer.engine(),
            certificate: peer.certificate(),
            batch: self.batch,
            threads: self.threads,
            searches_per_second: rate,
            latency_ms_p50: figures.latency_ms_p50(),
            recall_at_k: verdict.recall,
            mates_missed: verdict.mates_missed,
            k: self.k,
            tau: if let PeerKind::Exact { tau } = peer.kind() { tau } else { None },
            ratio_to_faiss_flat: ratio,
            pairs_per_second: rate * self.n as f64,
            prefilter_ms: figures.stages.map(|stages| stages.prefilter * 1e3),
            refine_ms: figures.stages.map(|stages| stages.refine * 1e3),
            probes_judged: verdict.judged,
            score_error_max: verdict.score_error_max,
            answers_hash: format!("{:016x}", verdict.hash),
            wrong: verdict.wrong.clone(),
        }
    }
}

#[cfg(feature = "faiss")]
fn faiss_facts(threads: usize) -> String {
    use thenar_bench::peer::faiss;
    faiss::set_threads(threads);
    let waits = std::env::var("OMP_WAIT_POLICY").unwrap_or_else(|_| "not set".to_owned());
    format!("compiled from source, {}, {}, OMP_WAIT_POLICY {waits}", faiss::simd(), faiss::blas())
}

#[cfg(not(feature = "faiss"))]
fn faiss_facts(_threads: usize) -> String {
    "left out of this build (feature `faiss`)".to_owned()
}

#[cfg(feature = "faiss")]
fn faiss_peer(factory: &str, gallery: &Gallery) -> anyhow::Result<Box<dyn Peer>> {
    Ok(Box::new(thenar_bench::peer::faiss::Faiss::new(factory, gallery)?))
}

#[cfg(not(feature = "faiss"))]
fn faiss_peer(_factory: &str, _gallery: &Gallery) -> anyhow::Result<Box<dyn Peer>> {
    anyhow::bail!("left out of this build (feature `faiss`)")
}

/// Says on stderr what takes how long.
fn timed<T>(what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let began = Instant::now();
    let result = work()?;
    eprintln!("{what}: {:.1} s", began.elapsed().as_secs_f64());
    Ok(result)
}

fn told(facts: &RunFacts) -> Vec<(&'static str, String)> {
    let mut told = facts.machine.rows();
    told.push(("Thenar", facts.thenar.clone()));
    told.push(("FAISS", facts.faiss.clone()));
    told.extend(facts.notes.iter().map(|note| ("", note.clone())));
    told.extend(facts.skipped.iter().map(|skipped| ("skipped", skipped.clone())));
    told
}

/// The table for people.
fn rendered(arguments: &Arguments, document: &Document) -> String {
    let header =
        ["peer", "gallery", "N", "D", "batch", "searches/s", "ms p50", "x FAISS Flat", "recall@k", "mates missed"];
    let mut out = table(&header, 2);
    for row in &document.rows {
        let sorry = if row.wrong.is_some() { " WRONG" } else { "" };
        out.add_row(vec![
            format!("{}{sorry}", row.peer),
            row.gallery.as_str().to_owned(),
            grouped(row.n as u64),
            row.dim.to_string(),
            row.batch.to_string(),
            format!("{:.1}", row.searches_per_second),
            format!("{:.2}", row.latency_ms_p50),
            row.ratio_to_faiss_flat.map_or("-".to_owned(), |ratio| format!("{ratio:.2}")),
            format!("{:.3}", row.recall_at_k),
            row.mates_missed.to_string(),
        ]);
    }
    let exact = document.rows.iter().filter(|row| row.certificate != "none");
    let judged: usize = exact.map(|row| row.probes_judged).sum();
    format!(
        "{out}\nk {}, tau {} (Thenar; everyone else and `k best` return the k best of all), {} threads, {} engine.\n\
         {judged} answers of Thenar were held against a brute force in f64, row by row and score by score.",
        arguments.k,
        arguments.tau,
        arguments.threads,
        document.rows.first().map_or("cpu", |row| row.engine),
    )
}

/// Writes JSON and plots.
fn save(name: &str, document: &Document) -> anyhow::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    std::fs::create_dir_all(&folder)?;
    let (json, svg) = (folder.join(format!("{name}.json")), folder.join(format!("{name}.svg")));
    std::fs::write(&json, serde_json::to_string_pretty(document)? + "\n")
        .with_context(|| format!("cannot write {}", json.display()))?;
    plot::draw(&svg, &panels(&document.rows))?;
    eprintln!("written: {} and {}", json.display(), svg.display());
    Ok(())
}

/// Throughput against recall for each gallery, size and batch; latency against N where there are several.
fn panels(rows: &[Row]) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    for row in rows {
        let title = format!(
            "{} gallery, {} x {}, batches of {}, {} threads",
            row.gallery.as_str(),
            grouped(row.n as u64),
            row.dim,
            row.batch,
            row.threads
        );
        if panels.last().is_none_or(|panel| panel.title != title) {
            let (across, up) = ("recall@k", "searches a second");
            panels.push(Panel { title, across, up, axis: Axis::Share, series: Vec::new() });
        }
        let point = (row.recall_at_k, row.searches_per_second);
        let panel = panels.last_mut().expect("one was pushed");
        panel.series.push(Series { name: row.peer.clone(), points: vec![point] });
    }
    let latency = |of: &Row| {
        format!("{} gallery, D = {}, batches of {}, {} threads", of.gallery.as_str(), of.dim, of.batch, of.threads)
    };
    let mut titles: Vec<String> = rows.iter().map(latency).collect();
    titles.sort();
    titles.dedup();
    for title in titles {
        let mut series: Vec<Series> = Vec::new();
        for row in rows.iter().filter(|row| latency(row) == title) {
            let point = (row.n as f64, row.latency_ms_p50);
            match series.iter_mut().find(|series| series.name == row.peer) {
                Some(series) => series.points.push(point),
                None => series.push(Series { name: row.peer.clone(), points: vec![point] }),
            }
        }
        if series.iter().any(|series| series.points.len() > 1) {
            panels.push(Panel { title, across: "N", up: "ms a call (median)", axis: Axis::Logarithmic, series });
        }
    }
    panels
}
