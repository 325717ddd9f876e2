//! Thenar as the server runs it: an index on disk, a snapshot, an engine, the planner. What is
//! timed is a search from rotated probes to ranked subjects; transports are the harness's matter.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use tempfile::TempDir;
use thenar::engine::{CandidateRows, Engine, GalleryView};
use thenar::model::Hand;
use thenar::search::{Answer, Certificate, NO_FLOOR, Probe, Search, plan};
use thenar_index::{GalleryId, Geometry, Index, KeyId, Lsn, NewRow, Origin, SubjectNumber, TemplateId};

use super::{Answered, Call, Hit, Peer, PeerKind, Stages};
use crate::gallery::{Gallery, Probes};

const ORIGIN: Origin = Origin { gallery: GalleryId(*b"thenar benchmark"), key: KeyId(*b"thenar benchmark") };
/// Rows appended at a time.
const APPENDED: usize = 4096;

/// The gallery in an index of its own, in a folder that goes with it.
pub struct Shelf {
    index: Index,
    _folder: TempDir,
}

impl Shelf {
    /// Writes the gallery, a subject a row, and syncs it, so that nothing is written while others
    /// are timed.
    ///
    /// # Errors
    /// Where the folder for temporary files has no room.
    pub fn new(gallery: &Gallery) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("thenar-bench").tempdir()?;
        let dir = folder.path().join("index");
        let mut index = Index::create(&dir, Geometry::new(gallery.dim()), ORIGIN)?;
        let labels: Vec<String> = (0..gallery.len()).map(|row| format!("subject-{row}")).collect();
        for first in (0..gallery.len()).step_by(APPENDED) {
            let rows: Vec<NewRow<'_>> = (first..gallery.len().min(first + APPENDED))
                .map(|row| NewRow {
                    template: TemplateId(row as u64 + 1),
                    subject: SubjectNumber(row as u64),
                    hand: Hand::Unspecified as u8,
                    label: &labels[row],
                    source: row as u64,
                    vector: gallery.row(row),
                })
                .collect();
            index.append(&rows)?;
        }
        drop(index.publish(Lsn(1)));
        index.checkpoint().context("the index was not synced")?;
        Ok(Self { index, _folder: folder })
    }
}

/// An engine on a shelf.
pub struct Thenar {
    name: &'static str,
    shelf: Arc<Shelf>,
    engine: Arc<dyn Engine>,
    tau: Option<f64>,
    certificate: Certificate,
    candidates: CandidateRows,
}

impl Thenar {
    /// Searches `shelf` with `engine`, which follows it from now on, for rows at or above `tau`,
    /// or for the best of all, under `certificate` or a stronger one.
    ///
    /// # Errors
    /// Where the engine cannot take the rows.
    pub fn new(
        shelf: &Arc<Shelf>,
        engine: &Arc<dyn Engine>,
        tau: Option<f64>,
        certificate: Certificate,
    ) -> anyhow::Result<Self> {
        let snapshot = shelf.index.snapshot();
        engine.follow(&GalleryView::of(&snapshot))?;
        Ok(Self {
            name: if tau.is_some() { "Thenar" } else { "Thenar, k best" },
            shelf: Arc::clone(shelf),
            engine: Arc::clone(engine),
            tau,
            certificate,
            candidates: CandidateRows::default(),
        })
    }
}

impl Peer for Thenar {
    fn name(&self) -> &str {
        self.name
    }

    fn kind(&self) -> PeerKind {
        PeerKind::Exact { tau: self.tau }
    }

    fn engine(&self) -> &'static str {
        self.engine.describe().kind
    }

    fn certificate(&self) -> &'static str {
        match self.certificate {
            Certificate::Deterministic => "deterministic",
            Certificate::Randomised { .. } => "randomised",
        }
    }

    fn turn(&mut self, probes: &Probes, calls: &[Range<usize>], k: usize) -> anyhow::Result<Vec<Call>> {
        let mut done = Vec::with_capacity(calls.len());
        for call in calls {
            let began = Instant::now();
            let searches: Vec<Search> = call
                .clone()
                .map(|probe| Search {
                    probes: vec![Probe { hand: Hand::Unspecified, vector: probes.values(probe..probe + 1).into() }],
                    floor: self.tau.unwrap_or(NO_FLOOR),
                    k,
                    certificate: self.certificate,
                    allowed: None,
                })
                .collect();
            let searches: Vec<&Search> = searches.iter().collect();
            let snapshot = self.shelf.index.snapshot();
            let (answers, timing) =
                plan::search_batch(&*self.engine, &snapshot, &searches, false, &mut self.candidates)?;
            for answer in &answers {
                let (held, wanted) = (answer.certificate.miss_probability(), self.certificate.miss_probability());
                ensure!(held <= wanted, "an answer may miss with {held:e}, {wanted:e} was asked for");
            }
            let seconds = began.elapsed().as_secs_f64();
            done.push(Call {
                seconds,
                answered: Answered { first: call.start, hits: answers.iter().map(hits).collect() },
                stages: Some(Stages { prefilter: timing.prefilter.as_secs_f64(), refine: timing.refine.as_secs_f64() }),
            });
        }
        Ok(done)
    }
}

fn hits(answer: &Answer) -> Vec<Hit> {
    // Row i is the one template of subject i.
    answer
        .found
        .iter()
        .map(|found| Hit {
            row: u32::try_from(found.subject.0).expect("rows are counted in 32 bits"),
            score: found.score,
        })
        .collect()
}
