//! The searches: a bounded number in flight on one stream, whose answers may come in any order and
//! are put back into the order of the rows.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::answer::{Answer, Outcome};
use super::{IdentifyArgs, only};
use crate::api::proto::{self, IdentifyRequest, identify_stream_response};
use crate::cli::client::{self, Server, sample};
use crate::cli::embeddings::{EmbeddingRows, EmbeddingsFile};
use crate::cli::error::CliError;
use crate::cli::lists;
use crate::cli::output::Failure;
use crate::model::{Hand, VenueId};

const CALL: &str = "IdentifyStream";
/// Searches in flight at a time; the protocol lets a stream have 64.
const IN_FLIGHT_MAX: usize = 32;
/// How often a search is sent while the server's queue is full.
const ATTEMPTS_MAX: u32 = 8;
/// Pause after a full queue if the server names none.
const PAUSE_DEFAULT: Duration = Duration::from_millis(50);

/// A search in flight.
struct InFlight {
    /// Its place among the rows asked for.
    place: u64,
    row: u64,
    sent: Instant,
    attempts: u32,
    request: IdentifyRequest,
}

/// Searches for every row asked for; `emit` gets the answers in that order.
pub(super) async fn search(
    args: &IdentifyArgs,
    mut emit: impl FnMut(Answer) -> std::io::Result<()>,
) -> Result<(), CliError> {
    let server = Server::new(&args.server)?;
    let venue = VenueId::new(&args.venue).map_err(CliError::value("--venue"))?;
    let only = args.only.as_deref().map(only).transpose()?;
    let embeddings = EmbeddingsFile::open(&args.embeddings)?;
    let hands = hands(args, &embeddings)?;
    let ranges = args.rows.clone().map_or_else(|| std::iter::once(0..embeddings.rows()).collect(), |rows| rows.0);
    if let Some(beyond) = ranges.iter().find(|range| range.end > embeddings.rows()) {
        let asked = beyond.start.max(embeddings.rows());
        return Err(CliError::NoSuchRow { path: args.embeddings.clone(), asked, rows: embeddings.rows() });
    }
    let mut wanted = ranges.into_iter().flatten();
    let mut probes = Probes { embeddings: &embeddings, reader: embeddings.rows_from(0)?, next: 0 };

    let (requests, queue) = mpsc::channel(IN_FLIGHT_MAX);
    let broken = |status: Status| CliError::refused(CALL, status);
    let stream_ended = || broken(Status::unavailable("the server ended the stream"));
    let mut client = client::identification(server.connect().await?);
    let mut answers = client.identify_stream(ReceiverStream::new(queue)).await.map_err(broken)?.into_inner();
    let mut in_flight: HashMap<String, InFlight> = HashMap::new();
    let mut done: BTreeMap<u64, Answer> = BTreeMap::new();
    let (mut asked, mut emitted) = (0_u64, 0_u64);
    loop {
        // What waits for an earlier row counts, so that one slow row cannot fill the memory.
        while in_flight.len() + done.len() < IN_FLIGHT_MAX {
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
            let search = InFlight { place: asked, row, sent: Instant::now(), attempts: 1, request: request.clone() };
            in_flight.insert(request.request_id.clone(), search);
            asked += 1;
            requests.send(request).await.map_err(|_| stream_ended())?;
        }
        if in_flight.is_empty() {
            return Ok(());
        }
        let answer = answers.message().await.map_err(broken)?.ok_or_else(stream_ended)?;
        let Some(mut search) = in_flight.remove(&answer.request_id) else {
            let problem = format!("an answer to {:?}, which was not asked", answer.request_id);
            return Err(CliError::Protocol { call: CALL, problem });
        };
        let ms = search.sent.elapsed().as_secs_f64() * 1e3;
        let outcome = match answer.outcome {
            Some(identify_stream_response::Outcome::Response(response)) => Outcome::Found(response.into()),
            Some(identify_stream_response::Outcome::Error(error)) => {
                let code = Code::from_i32(error.code);
                if code == Code::ResourceExhausted && search.attempts < ATTEMPTS_MAX {
                    let pause = error.retry_after.and_then(|pause| Duration::try_from(pause).ok());
                    tokio::time::sleep(pause.unwrap_or(PAUSE_DEFAULT)).await;
                    search.attempts += 1;
                    search.sent = Instant::now();
                    requests.send(search.request.clone()).await.map_err(|_| stream_ended())?;
                    in_flight.insert(answer.request_id, search);
                    continue;
                }
                Outcome::Failed { error: Failure::new(code, &error.message) }
            }
            None => return Err(CliError::Protocol { call: CALL, problem: "an answer without outcome".to_owned() }),
        };
        done.insert(search.place, Answer { row: search.row, outcome, ms });
        while let Some(answer) = done.remove(&emitted) {
            emitted += 1;
            emit(answer)?;
        }
    }
}

/// The hand of each row, if there is a file of hands. Shape: `[rows]`.
fn hands(args: &IdentifyArgs, embeddings: &EmbeddingsFile) -> Result<Option<Vec<Hand>>, CliError> {
    let Some(path) = &args.hands else { return Ok(None) };
    let hands = lists::hands(path)?;
    let (rows, lines) = (embeddings.rows(), hands.len() as u64);
    if rows != lines {
        return Err(CliError::OutOfStep { embeddings: args.embeddings.clone(), rows, list: path.clone(), lines });
    }
    Ok(Some(hands))
}

/// Rows of an array in any order, cheap if they ascend.
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
