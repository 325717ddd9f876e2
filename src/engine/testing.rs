//! An engine for tests: the CPU engine with hooks around its calls.
//!
//! Knows nothing about the tests; what is watched, counted or broken is in their [`Hooks`].

use std::ops::Deref;

use super::cpu::CpuEngine;
use super::{CandidateRequest, CandidateRows, Engine, EngineDescription, EngineError, GalleryView};

/// What a test does around the calls of an engine. By default nothing.
pub(crate) trait Hooks: Send + Sync {
    /// Before the engine follows `view`. An error is the engine's answer, and it does not follow.
    fn before_follow(&self, _view: &GalleryView<'_>) -> Result<(), EngineError> {
        Ok(())
    }

    /// Before the engine erases rows.
    fn before_erase(&self, _rows: &[u32]) {}

    /// Before the engine looks for candidates. An error is the engine's answer, and it does not look.
    fn before_find(&self, _view: &GalleryView<'_>) -> Result<(), EngineError> {
        Ok(())
    }

    /// After the engine has found candidates, which may be changed.
    fn after_find(
        &self,
        _view: &GalleryView<'_>,
        _request: &CandidateRequest<'_>,
        _candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        Ok(())
    }
}

/// The CPU engine with hooks around its calls.
pub(crate) struct Hooked<H> {
    engine: CpuEngine,
    hooks: H,
}

impl<H: Hooks> Hooked<H> {
    /// With an engine of so many threads.
    pub(crate) fn new(threads: usize, hooks: H) -> Self {
        Self { engine: CpuEngine::new(threads).expect("the test gets its threads"), hooks }
    }
}

impl<H> Deref for Hooked<H> {
    type Target = H;

    fn deref(&self) -> &H {
        &self.hooks
    }
}

impl<H: Hooks> Engine for Hooked<H> {
    fn describe(&self) -> EngineDescription {
        self.engine.describe()
    }

    fn follow(&self, view: &GalleryView<'_>) -> Result<(), EngineError> {
        self.hooks.before_follow(view)?;
        self.engine.follow(view)
    }

    fn erase(&self, rows: &[u32]) -> Result<(), EngineError> {
        self.hooks.before_erase(rows);
        self.engine.erase(rows)
    }

    fn find_candidates(
        &self,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        self.hooks.before_find(view)?;
        self.engine.find_candidates(view, request, candidates)?;
        self.hooks.after_find(view, request, candidates)
    }
}
