//! `thenar identify`: one search for each row of a NumPy array, over one stream.
//!
//! Keeps a bounded number of searches under way and puts the answers, which may come in any
//! order, back into the order of the rows.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::connect::{self, ServerArgs};
use super::embeddings::{EmbeddingRows, EmbeddingsFile};
use super::error::{CliError, code_name};
use super::forget::listed_in;
use super::import::roster::RosterError;
use super::sample::{decision_word, hand_word, milliseconds, sample};
use super::{Outcome, table};
use crate::api::proto::{self, IdentifyRequest, IdentifyResponse, certificate, identify_stream_response};
use crate::model::{CANDIDATES_MAX, Hand, Invalid, SubjectFilter, SubjectId, VenueId};

/// Searches under way at a time; the protocol lets a stream have 64.
const IN_FLIGHT_MAX: usize = 32;
/// How often a search is sent while the server's queue is full.
const ATTEMPTS_MAX: u32 = 8;
/// Pause after a full queue where the server names none.
const PAUSE_DEFAULT: Duration = Duration::from_millis(50);

/// Search for the palms in a NumPy array, one search a row.
///
/// Prints a table; with --json one object a line and row, with all candidates. The exit code is
/// 0 where every row was answered, whatever the answers are.
#[derive(Debug, Clone, Args)]
pub struct IdentifyArgs {
    /// Probes: a NumPy file with a float32 or float16 array of shape [N, D] in C order.
    #[arg(long, value_name = "FILE.npy")]
    pub embeddings: PathBuf,
    /// What the searches are for; each purpose has its own policy.
    #[arg(long, value_enum, default_value_t = PurposeWord::Entry)]
    pub purpose: PurposeWord,
    /// The venue where the palms were shown.
    #[arg(long, value_name = "ID", default_value = "command-line")]
    pub venue: String,
    /// Candidates to list for each row, 1 to 100.
    #[arg(long, value_name = "COUNT", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=i64::from(CANDIDATES_MAX)))]
    pub max_candidates: u32,
    /// List candidates from this score on (-1 to 1), and decide by it where the policy is laxer.
    /// Without it, the policy's threshold.
    #[arg(long, value_name = "SCORE", value_parser = score, allow_negative_numbers = true)]
    pub threshold: Option<f64>,
    /// Rows to search for, from 0: such as 0..10 (without 10), 3,5 or 0..3,7. Without it, all.
    #[arg(long, value_name = "ROWS", value_parser = RowSet::parse)]
    pub rows: Option<RowSet>,
    /// Hands: a CSV file with a column hand (left, right or empty), one line a row of the array.
    #[arg(long, value_name = "FILE.csv")]
    pub hands: Option<PathBuf>,
    /// Find only these subjects, 3,000 at most: ids with commas between them, or @FILE with one a line.
    /// Ids that are not enrolled find nobody.
    #[arg(long, value_name = "ID,...|@FILE")]
    pub only: Option<String>,
    /// Print one JSON object a line: row, decision, threshold, gallery_size, candidates
    /// (rank, subject_id, score, hand, template_id, probes_compared), certificate, search_id, ms
    /// and server_ms; or row, error (code, message) and ms.
    #[arg(long)]
    pub json: bool,
    /// The server to search at.
    #[command(flatten)]
    pub server: ServerArgs,
}

/// The purposes by their words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PurposeWord {
    /// Paying at a terminal.
    Payment,
    /// Entering a venue.
    Entry,
    /// Entering a place of work.
    Workplace,
    /// Collecting loyalty points.
    Loyalty,
}

impl From<PurposeWord> for proto::Purpose {
    fn from(word: PurposeWord) -> Self {
        match word {
            PurposeWord::Payment => Self::Payment,
            PurposeWord::Entry => Self::Entry,
            PurposeWord::Workplace => Self::Workplace,
            PurposeWord::Loyalty => Self::Loyalty,
        }
    }
}

/// Rows of an array, in the order in which they were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowSet(Vec<Range<u64>>);

impl RowSet {
    fn parse(text: &str) -> Result<Self, String> {
        let number =
            |text: &str| text.trim().parse::<u64>().map_err(|_| format!("{:?} is not a row number", text.trim()));
        let ranges = text
            .split(',')
            .map(|part| match part.split_once("..") {
                Some((start, end)) => Ok(number(start)?..number(end)?),
                None => number(part).map(|row| row..row.saturating_add(1)),
            })
            .collect::<Result<Vec<_>, String>>()?;
        match ranges.iter().find(|range| range.is_empty()) {
            Some(range) => Err(format!("{}..{} holds no row", range.start, range.end)),
            None => Ok(Self(ranges)),
        }
    }
}

pub(super) fn score(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(score) if (-1.0..=1.0).contains(&score) => Ok(score),
        _ => Err("a score is a number from -1 to 1".to_owned()),
    }
}

/// One row's answer.
#[derive(Debug, Serialize)]
struct Answer {
    row: u64,
    #[serde(flatten)]
    outcome: AnswerOutcome,
    /// From sending to the answer, as this client saw it.
    ms: f64,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum AnswerOutcome {
    Found(Found),
    Failed { error: Failure },
}

#[derive(Debug, Serialize)]
struct Found {
    decision: &'static str,
    threshold: f64,
    gallery_size: u64,
    candidates: Vec<CandidateLine>,
    certificate: CertificateLine,
    search_id: String,
    server_ms: f64,
}

#[derive(Debug, Serialize)]
struct CandidateLine {
    rank: u32,
    subject_id: String,
    score: f64,
    hand: &'static str,
    template_id: u64,
    probes_compared: u32,
}

#[derive(Debug, Serialize)]
struct CertificateLine {
    kind: &'static str,
    miss_probability: f64,
}

#[derive(Debug, Serialize)]
struct Failure {
    code: &'static str,
    message: String,
}

impl From<IdentifyResponse> for Found {
    fn from(response: IdentifyResponse) -> Self {
        let certificate = response.certificate.unwrap_or_default();
        Self {
            decision: decision_word(response.decision),
            threshold: response.threshold,
            gallery_size: response.gallery_size,
            candidates: response
                .candidates
                .into_iter()
                .map(|candidate| CandidateLine {
                    rank: candidate.rank,
                    subject_id: candidate.subject_id,
                    score: candidate.score,
                    hand: hand_word(candidate.hand),
                    template_id: candidate.template_id,
                    probes_compared: candidate.probes_compared,
                })
                .collect(),
            certificate: CertificateLine {
                kind: match certificate.kind() {
                    certificate::Kind::Deterministic => "deterministic",
                    certificate::Kind::Randomised => "randomised",
                    certificate::Kind::Unspecified => "unspecified",
                },
                miss_probability: certificate.miss_probability,
            },
            search_id: response.search_id,
            server_ms: milliseconds(response.timing.and_then(|timing| timing.total)),
        }
    }
}

/// Runs `thenar identify`.
///
/// # Errors
/// [`CliError`] where files do not do, the server cannot be reached, or the stream breaks.
pub async fn run(args: IdentifyArgs) -> Result<Outcome, CliError> {
    let mut rows = table::table(&["row", "decision", "rank 1", "score", "runner-up", "score", "ms"], 0);
    let mut failed = 0_u64;
    search(&args, |answer| {
        failed += u64::from(matches!(answer.outcome, AnswerOutcome::Failed { .. }));
        if args.json {
            return table::say_json(&answer);
        }
        rows.add_row(cells(&answer));
        Ok(())
    })
    .await?;
    if !args.json {
        table::say(rows)?;
    }
    Ok(Outcome::done_if(failed == 0))
}

fn cells(answer: &Answer) -> Vec<String> {
    let (decision, candidates) = match &answer.outcome {
        AnswerOutcome::Found(found) => (found.decision.to_owned(), found.candidates.as_slice()),
        AnswerOutcome::Failed { error } => (format!("{}: {}", error.code, error.message), &[][..]),
    };
    let mut cells = vec![answer.row.to_string(), decision];
    for at in 0..2 {
        match candidates.get(at) {
            Some(candidate) => cells.extend([candidate.subject_id.clone(), format!("{:.4}", candidate.score)]),
            None => cells.extend(["-".to_owned(), "-".to_owned()]),
        }
    }
    cells.push(format!("{:.1}", answer.ms));
    cells
}

/// A search under way.
struct UnderWay {
    /// Its place among the rows asked for.
    place: u64,
    row: u64,
    sent: Instant,
    attempts: u32,
    request: IdentifyRequest,
}

/// Searches for every row asked for; `emit` gets the answers in that order.
async fn search(args: &IdentifyArgs, mut emit: impl FnMut(Answer) -> std::io::Result<()>) -> Result<(), CliError> {
    let server = args.server.resolve()?;
    let venue =
        VenueId::new(&args.venue).map_err(|invalid| CliError::Value { origin: "--venue".to_owned(), invalid })?;
    let only = args.only.as_deref().map(only).transpose()?;
    let embeddings = EmbeddingsFile::open(&args.embeddings)?;
    let hands = args.hands.as_deref().map(|path| read_hands(path, &embeddings)).transpose()?;
    let ranges = args.rows.clone().map_or_else(|| std::iter::once(0..embeddings.rows()).collect(), |rows| rows.0);
    if let Some(beyond) = ranges.iter().find(|range| range.end > embeddings.rows()) {
        let asked = beyond.start.max(embeddings.rows());
        return Err(CliError::NoSuchRow { path: args.embeddings.clone(), asked, rows: embeddings.rows() });
    }
    let mut wanted = ranges.into_iter().flatten();
    let mut probes = Probes { embeddings: &embeddings, reader: embeddings.rows_from(0)?, next: 0 };

    let (requests, queue) = mpsc::channel(IN_FLIGHT_MAX);
    let broken = |status: Status| CliError::refused("IdentifyStream", status);
    let stream_ended = || broken(Status::unavailable("the server ended the stream"));
    let mut client = connect::identification(server.connect().await?);
    let mut answers = client.identify_stream(ReceiverStream::new(queue)).await.map_err(broken)?.into_inner();
    let mut under_way: HashMap<String, UnderWay> = HashMap::new();
    let mut done: BTreeMap<u64, Answer> = BTreeMap::new();
    let (mut asked, mut emitted) = (0_u64, 0_u64);
    loop {
        // What waits for an earlier row counts, so that one slow row cannot fill the memory.
        while under_way.len() + done.len() < IN_FLIGHT_MAX {
            let Some(row) = wanted.next() else { break };
            let hand = hands.as_ref().map_or(Hand::Unspecified, |hands| hands[usize::try_from(row).unwrap_or(0)]);
            let request = IdentifyRequest {
                request_id: format!("row-{row}-{asked}"),
                venue_id: venue.as_str().to_owned(),
                purpose: proto::Purpose::from(args.purpose).into(),
                probes: vec![sample(probes.read(row)?, hand)],
                max_candidates: args.max_candidates,
                threshold: args.threshold,
                certificate: None,
                only: only.clone(),
            };
            let search = UnderWay { place: asked, row, sent: Instant::now(), attempts: 1, request: request.clone() };
            under_way.insert(request.request_id.clone(), search);
            asked += 1;
            requests.send(request).await.map_err(|_| stream_ended())?;
        }
        if under_way.is_empty() {
            return Ok(());
        }
        let answer = answers.message().await.map_err(broken)?.ok_or_else(stream_ended)?;
        let Some(mut search) = under_way.remove(&answer.request_id) else {
            return Err(CliError::Protocol {
                call: "IdentifyStream",
                problem: format!("an answer to {:?}, which was not asked", answer.request_id),
            });
        };
        let ms = search.sent.elapsed().as_secs_f64() * 1e3;
        let outcome = match answer.outcome {
            Some(identify_stream_response::Outcome::Response(response)) => AnswerOutcome::Found(response.into()),
            Some(identify_stream_response::Outcome::Error(error)) => {
                let code = Code::from_i32(error.code);
                if code == Code::ResourceExhausted && search.attempts < ATTEMPTS_MAX {
                    let pause = error.retry_after.and_then(|span| Duration::try_from(span).ok());
                    tokio::time::sleep(pause.unwrap_or(PAUSE_DEFAULT)).await;
                    search.attempts += 1;
                    search.sent = Instant::now();
                    requests.send(search.request.clone()).await.map_err(|_| stream_ended())?;
                    under_way.insert(answer.request_id, search);
                    continue;
                }
                AnswerOutcome::Failed { error: Failure { code: code_name(code), message: error.message } }
            }
            None => {
                return Err(CliError::Protocol {
                    call: "IdentifyStream",
                    problem: "an answer without outcome".to_owned(),
                });
            }
        };
        done.insert(search.place, Answer { row: search.row, outcome, ms });
        while let Some(answer) = done.remove(&emitted) {
            emitted += 1;
            emit(answer)?;
        }
    }
}

/// The subjects that `--only` names, checked here so that a bad one is bad usage.
fn only(text: &str) -> Result<proto::SubjectFilter, CliError> {
    let named = match text.strip_prefix('@') {
        Some(path) => listed_in(Path::new(path))?,
        None => text.split(',').map(|id| ("--only".to_owned(), id.trim().to_owned())).collect(),
    };
    for (origin, id) in &named {
        SubjectId::new(id).map_err(|invalid| CliError::Value { origin: origin.clone(), invalid })?;
    }
    let subject_ids: Vec<String> = named.into_iter().map(|(_, id)| id).collect();
    SubjectFilter::new(&subject_ids).map_err(|invalid| CliError::Value { origin: "--only".to_owned(), invalid })?;
    Ok(proto::SubjectFilter { subject_ids })
}

/// Rows of an array in any order, cheap where they ascend.
struct Probes<'a> {
    embeddings: &'a EmbeddingsFile,
    reader: EmbeddingRows,
    next: u64,
}

impl Probes<'_> {
    fn read(&mut self, row: u64) -> Result<Vec<f32>, CliError> {
        if row < self.next {
            self.reader = self.embeddings.rows_from(row)?;
        } else {
            self.reader.skip(row - self.next)?;
        }
        self.next = row + 1;
        Ok(self.reader.read()?)
    }
}

/// Reads the column `hand`, one line a row. Shape: `[rows]`.
fn read_hands(path: &Path, embeddings: &EmbeddingsFile) -> Result<Vec<Hand>, CliError> {
    let unreadable = |source| RosterError::Unreadable { path: path.to_owned(), source };
    let mut reader = csv::ReaderBuilder::new().flexible(true).from_path(path).map_err(unreadable)?;
    let header = reader.headers().map_err(unreadable)?;
    let column = header.iter().position(|name| name.trim_start_matches('\u{feff}').trim() == "hand");
    let Some(column) = column else {
        let invalid = Invalid::new("hand", format!("there is no such column; the header is {:?}", header.as_slice()));
        return Err(CliError::Value { origin: path.display().to_string(), invalid });
    };
    let mut hands = Vec::new();
    for record in reader.records() {
        let record = record.map_err(unreadable)?;
        let hand = record.get(column).unwrap_or_default().trim().parse().map_err(|invalid| CliError::Value {
            origin: format!("{} line {}", path.display(), record.position().map_or(0, csv::Position::line)),
            invalid,
        })?;
        hands.push(hand);
    }
    if hands.len() as u64 != embeddings.rows() {
        return Err(CliError::OutOfStep {
            embeddings: embeddings.path().to_owned(),
            rows: embeddings.rows(),
            subjects: path.to_owned(),
            lines: hands.len() as u64,
        });
    }
    Ok(hands)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::cli::embeddings::tests::npy_f32;
    use crate::cli::mock_server::Fake;

    const DIM: usize = 32;

    fn vector(row: usize) -> Vec<f32> {
        (0..DIM).map(|i| if i == row % DIM { 1.0 } else { 0.001 * (row / DIM + 1) as f32 }).collect()
    }

    async fn asked(
        fake: &Fake,
        rows: usize,
        change: impl FnOnce(&mut IdentifyArgs),
    ) -> Result<Vec<serde_json::Value>, CliError> {
        let folder = tempfile::tempdir().unwrap();
        let npy = folder.path().join("probes.npy");
        fs::write(&npy, npy_f32(&(0..rows).map(vector).collect::<Vec<_>>(), DIM)).unwrap();
        let mut args = IdentifyArgs {
            embeddings: npy,
            purpose: PurposeWord::Entry,
            venue: "gate-1".to_owned(),
            max_candidates: 3,
            threshold: None,
            rows: None,
            hands: None,
            only: None,
            json: true,
            server: fake.args(),
        };
        change(&mut args);
        if let Some(text) = args.hands.take() {
            fs::write(folder.path().join("hands.csv"), text.to_str().unwrap()).unwrap();
            args.hands = Some(folder.path().join("hands.csv"));
        }
        let mut answers = Vec::new();
        search(&args, |answer| {
            assert!(cells(&answer).len() == 7);
            answers.push(serde_json::from_str(&serde_json::to_string(&answer)?)?);
            Ok(())
        })
        .await?;
        Ok(answers)
    }

    async fn gallery() -> Fake {
        let fake = Fake::start(DIM).await;
        for row in 0..20 {
            let hand = if row % 2 == 0 { 1 } else { 2 };
            fake.held.lock().subjects.insert(format!("s{row}"), vec![(vector(row), hand)]);
        }
        fake
    }

    #[tokio::test]
    async fn answers_come_in_the_order_of_the_rows_though_the_server_mixes_them() {
        let fake = gallery().await;
        fake.held.lock().coalesce = true;
        let answers = asked(&fake, 25, |_| ()).await.unwrap();
        assert_eq!(answers.len(), 25);
        for (row, answer) in answers.iter().enumerate() {
            assert_eq!(answer["row"], row);
            assert!(answer["ms"].as_f64().unwrap() > 0.0 && answer["server_ms"].is_number());
            assert_eq!(answer["gallery_size"], 20);
            assert_eq!(answer["certificate"]["kind"], "deterministic");
            if row < 20 {
                assert_eq!(answer["decision"], "match");
                assert_eq!(answer["candidates"][0]["subject_id"], format!("s{row}"));
                assert_eq!(answer["candidates"][0]["rank"], 1);
                assert!(answer["candidates"][0]["score"].as_f64().unwrap() > 0.99);
                assert_eq!(answer["candidates"][0]["hand"], ["left", "right"][row % 2]);
            } else {
                assert_eq!(answer["decision"], "no_match");
                assert_eq!(answer["candidates"].as_array().unwrap().len(), 0);
            }
        }
    }

    #[tokio::test]
    async fn rows_threshold_candidates_and_hands_are_passed_on() {
        let fake = gallery().await;
        let answers = asked(&fake, 20, |args| {
            args.rows = Some(RowSet::parse("7,3..5,0").unwrap());
            args.threshold = Some(-1.0);
            args.max_candidates = 2;
            args.hands = Some(format!("hand\n{}", "left\n".repeat(20)).into());
        })
        .await
        .unwrap();
        let rows: Vec<u64> = answers.iter().map(|answer| answer["row"].as_u64().unwrap()).collect();
        assert_eq!(rows, [7, 3, 4, 0]);
        assert!(answers.iter().all(|answer| answer["candidates"].as_array().unwrap().len() == 2));
        assert_eq!(answers[0]["decision"], "no_match", "subject 7 has a right palm only");
        assert_eq!(answers[2]["decision"], "match");
    }

    #[tokio::test]
    async fn only_the_subjects_named_are_found() {
        let fake = gallery().await;
        let found = async |only: &str| {
            let answers = asked(&fake, 20, |args| args.only = Some(only.to_owned())).await.unwrap();
            let found = answers.iter().filter(|answer| answer["decision"] == "match");
            found.map(|answer| answer["candidates"][0]["subject_id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(found("s3, s7,nobody").await, ["s3", "s7"]);
        let folder = tempfile::tempdir().unwrap();
        let list = folder.path().join("holders.txt");
        fs::write(&list, "s4\n\n  s5 \n").unwrap();
        assert_eq!(found(&format!("@{}", list.display())).await, ["s4", "s5"]);

        fs::write(&list, "s4\ntwo words\n").unwrap();
        let many = (0..3001).map(|number| format!("s{number}")).collect::<Vec<_>>().join(",");
        for (only, words) in [
            ("", "empty"),
            ("s1,,s2", "empty"),
            ("s1,s2,s1", "is the same as subject_ids[0]"),
            (many.as_str(), "the limit is 3000"),
            (&format!("@{}", list.display()), "line 2"),
        ] {
            let error = asked(&fake, 1, |args| args.only = Some(only.to_owned())).await.unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(error.exit_code(), 2, "{error}");
        }
        let error = asked(&fake, 1, |args| args.only = Some("@/nowhere/list".to_owned())).await.unwrap_err();
        assert!(matches!(error, CliError::File { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_full_queue_is_tried_again_and_another_error_is_the_answer_of_its_row() {
        let fake = gallery().await;
        fake.held.lock().refuse_searches = (3, Some(Code::ResourceExhausted));
        let answers = asked(&fake, 2, |_| ()).await.unwrap();
        assert!(answers.iter().all(|answer| answer["decision"] == "match"), "{answers:?}");
        fake.held.lock().refuse_searches = (1, Some(Code::InvalidArgument));
        let answers = asked(&fake, 2, |_| ()).await.unwrap();
        assert_eq!(answers[0]["error"]["code"], "INVALID_ARGUMENT");
        assert_eq!(answers[1]["decision"], "match");
    }

    #[tokio::test]
    async fn the_exit_code_tells_whether_every_row_was_answered() {
        let fake = gallery().await;
        let folder = tempfile::tempdir().unwrap();
        let npy = folder.path().join("probes.npy");
        fs::write(&npy, npy_f32(&[vector(0), vector(99)], DIM)).unwrap();
        let args = |json| IdentifyArgs {
            embeddings: npy.clone(),
            purpose: PurposeWord::Payment,
            venue: "gate-1".to_owned(),
            max_candidates: 3,
            threshold: None,
            rows: None,
            hands: None,
            only: None,
            json,
            server: fake.args(),
        };
        assert_eq!(run(args(false)).await.unwrap(), Outcome::Done);
        fake.held.lock().refuse_searches = (1, Some(Code::NotFound));
        assert_eq!(run(args(true)).await.unwrap(), Outcome::Failed);
    }

    #[tokio::test]
    async fn rows_and_venues_that_are_not_there_are_bad_usage() {
        let fake = gallery().await;
        let error = asked(&fake, 5, |args| args.rows = Some(RowSet::parse("2..6").unwrap())).await.unwrap_err();
        assert!(error.to_string().contains("rows 0 to 4"), "{error}");
        assert_eq!(error.exit_code(), 2);
        let error = asked(&fake, 5, |args| args.venue = "two words".to_owned()).await.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let error = asked(&fake, 5, |args| args.hands = Some("hand\nleft\n".into())).await.unwrap_err();
        assert!(matches!(error, CliError::OutOfStep { rows: 5, lines: 1, .. }), "{error}");
        assert!(asked(&fake, 0, |_| ()).await.unwrap().is_empty());
    }

    #[test]
    fn row_sets_are_ranges_and_numbers() {
        assert_eq!(RowSet::parse("0..10,20..30").unwrap().0, [0..10, 20..30]);
        assert_eq!(RowSet::parse("3, 5,7..9").unwrap().0, [3..4, 5..6, 7..9]);
        for bad in ["", "a", "1..", "5..5", "9..2", "-1", "1,,2"] {
            assert!(RowSet::parse(bad).is_err(), "{bad}");
        }
        assert!(score("1.01").is_err() && score("nan").is_err());
        assert!((score("-0.25").unwrap() + 0.25).abs() < 1e-12);
    }
}
