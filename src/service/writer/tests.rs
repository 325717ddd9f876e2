//! The writer's upkeep, over a registry that counts it and fails on demand.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use half::f16;
use thenar_index::storage::Files;
use thenar_index::{Contents, GalleryId, Lsn, SubjectNumber, TemplateId};

use super::*;
use crate::engine::cpu::CpuEngine;
use crate::gallery::testing;
use crate::model::{SubjectId, TemplateRow};
use crate::registry::sqlite::SqliteRegistry;
use crate::registry::{Committed, GalleryIdentity, RegistryCounts, StoredTemplate, SubjectRecord};
use crate::vault::Sealer;

const DIM: usize = 32;

/// A registry that counts its upkeep.
struct Watched {
    registry: SqliteRegistry,
    scrub_fails: AtomicBool,
    scrubs: AtomicUsize,
    prunes: AtomicUsize,
}

impl Registry for Watched {
    fn claim_identity(&self, identity: &GalleryIdentity) -> Result<GalleryId, RegistryError> {
        self.registry.claim_identity(identity)
    }

    fn identity(&self) -> Result<Option<(GalleryIdentity, GalleryId)>, RegistryError> {
        self.registry.identity()
    }

    fn commit(&self, changes: &[Change]) -> Result<Committed, RegistryError> {
        self.registry.commit(changes)
    }

    fn log_after(&self, after: Lsn, limit: usize) -> Result<Vec<LogRecord>, RegistryError> {
        self.registry.log_after(after, limit)
    }

    fn last_lsn(&self) -> Result<Lsn, RegistryError> {
        self.registry.last_lsn()
    }

    fn contents(&self) -> Result<(Lsn, Contents), RegistryError> {
        self.registry.contents()
    }

    fn templates_between(
        &self,
        first: TemplateId,
        last: TemplateId,
        limit: usize,
    ) -> Result<Vec<StoredTemplate>, RegistryError> {
        self.registry.templates_between(first, last, limit)
    }

    fn subject(&self, id: &SubjectId) -> Result<Option<SubjectRecord>, RegistryError> {
        self.registry.subject(id)
    }

    fn subject_numbers(&self, ids: &[SubjectId]) -> Result<Vec<SubjectNumber>, RegistryError> {
        self.registry.subject_numbers(ids)
    }

    fn counts(&self) -> Result<RegistryCounts, RegistryError> {
        self.registry.counts()
    }

    fn scrub(&self) -> Result<(), RegistryError> {
        if self.scrub_fails.load(Ordering::SeqCst) {
            return Err(RegistryError::ScrubBlocked { path: "registry".into() });
        }
        self.registry.scrub()?;
        self.scrubs.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn prune_requests(&self, kept: Duration, limit: usize) -> Result<u64, RegistryError> {
        assert!(kept >= REQUESTS_KEPT);
        self.prunes.fetch_add(1, Ordering::SeqCst);
        self.registry.prune_requests(kept, limit)
    }
}

/// A writer at work.
struct Home {
    registry: Arc<Watched>,
    sealer: Arc<Sealer>,
    writer: Writer,
    thread: WriterThread,
    changes: u32,
    _folder: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let registry = testing::registry(folder.path());
        let (scrub_fails, scrubs, prunes) = Default::default();
        let registry = Arc::new(Watched { registry, scrub_fails, scrubs, prunes });
        let setup = testing::setup(folder.path(), DIM, Arc::new(Files), Arc::clone(&registry) as _).unwrap();
        let sealer = Arc::clone(&setup.sealer);
        let gallery = Arc::new(Gallery::open(setup, Arc::new(CpuEngine::new(1).unwrap()), None).unwrap());
        let config = WriterConfig { data: folder.path().to_owned(), reserve_bytes: 0 };
        let (writer, thread) =
            Writer::start(config, Arc::clone(&registry) as _, gallery, &Supervisor::default()).unwrap();
        Self { registry, sealer, writer, thread, changes: 0, _folder: folder }
    }

    async fn change(&mut self, action: Action) -> Result<Outcome, ServiceError> {
        self.changes += 1;
        let change = testing::change(&format!("r{}", self.changes), action);
        let outcomes = self.writer.write(vec![change]).await;
        outcomes.map(|mut outcomes| outcomes.pop().unwrap())
    }

    async fn enrol(&mut self, id: &str) -> Outcome {
        let row = TemplateRow((0..DIM).map(|i| f16::from_f32(if i == 0 { 1.0 } else { 0.0 })).collect());
        self.change(testing::enrol(&self.sealer, id, &row)).await.unwrap()
    }

    async fn forget(&mut self, id: &str) -> Result<Outcome, ServiceError> {
        self.change(testing::forget(id)).await
    }

    fn scrubs(&self) -> usize {
        self.registry.scrubs.load(Ordering::SeqCst)
    }

    fn end(self) {
        self.writer.close();
        self.thread.join();
    }
}

#[tokio::test]
async fn a_forget_that_is_refused_or_repeated_does_not_scrub() {
    let mut home = Home::new();
    let at_start = home.scrubs();
    home.enrol("ada").await;
    assert_eq!(home.forget("nobody").await.unwrap(), Outcome::NoSuchSubject);
    assert_eq!(home.scrubs(), at_start);
    home.forget("ada").await.unwrap();
    assert_eq!(home.scrubs(), at_start + 1);
    home.changes -= 1;
    assert!(matches!(home.forget("ada").await.unwrap(), Outcome::Done { replayed: true, .. }));
    assert_eq!(home.scrubs(), at_start + 1);
    home.end();
}

#[tokio::test]
async fn upkeep_is_done_while_changes_come_without_a_pause() {
    let mut home = Home::new();
    home.enrol("ada").await;
    home.registry.scrub_fails.store(true, Ordering::SeqCst);
    assert!(matches!(home.forget("ada").await, Err(ServiceError::NotYetInForce(_))));
    // Enrolments are not refused for it.
    home.enrol("bob").await;
    let (scrubs, mut changes) = (home.scrubs(), 0);
    home.registry.scrub_fails.store(false, Ordering::SeqCst);
    while home.scrubs() == scrubs || home.registry.prunes.load(Ordering::SeqCst) == 0 {
        changes += 1;
        assert!(changes < 1000, "{} scrubs, {:?} prunes", home.scrubs() - scrubs, home.registry.prunes);
        home.enrol(&format!("somebody-{changes}")).await;
    }
    // It is done once.
    home.enrol("cid").await;
    assert_eq!(home.scrubs(), scrubs + 1);
    home.end();
}
