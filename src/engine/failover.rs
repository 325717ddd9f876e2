//! A preferred engine, and the CPU engine that answers while the preferred one cannot.
//!
//! Losing a device is a state, not an error of a search: the batch at hand and those after it are
//! answered by the CPU engine, exactly the same, until [`Failover::mend`] has brought the
//! preferred engine back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{CandidateRequest, CandidateRows, Engine, EngineDescription, EngineError, GalleryView};
use crate::telemetry;

/// An engine that always answers.
pub struct Failover {
    preferred: Arc<dyn Engine>,
    standby: Arc<dyn Engine>,
    lost: AtomicBool,
}

impl Failover {
    /// `preferred` answers if it can, `standby` if not.
    #[must_use]
    pub fn new(preferred: Arc<dyn Engine>, standby: Arc<dyn Engine>) -> Self {
        Self { preferred, standby, lost: AtomicBool::new(false) }
    }

    /// Whether the preferred engine answers now.
    #[must_use]
    pub fn is_preferred_answering(&self) -> bool {
        !self.lost.load(Ordering::Acquire)
    }

    /// Tries to bring a lost engine back with the gallery as it is. Returns whether it is back.
    pub fn mend(&self, view: &GalleryView<'_>) -> bool {
        match self.preferred.follow(view) {
            Ok(()) => {
                if self.lost.swap(false, Ordering::AcqRel) {
                    tracing::info!(engine = %self.preferred.describe().adapter, "the engine is back");
                }
                true
            }
            Err(error) => {
                tracing::warn!(%error, "the engine is still lost; the CPU engine answers");
                false
            }
        }
    }

    fn lose(&self, doing: &'static str, error: &EngineError) {
        if !self.lost.swap(true, Ordering::AcqRel) {
            tracing::error!(%error, doing, "the engine failed; the CPU engine answers until it is back");
        }
    }
}

impl Engine for Failover {
    fn describe(&self) -> EngineDescription {
        let standby = self.standby.describe();
        let preferred = self.preferred.describe();
        let host_bytes = preferred.host_bytes + standby.host_bytes;
        let answering = if self.is_preferred_answering() { preferred.clone() } else { standby };
        EngineDescription { host_bytes, device_bytes: preferred.device_bytes, ..answering }
    }

    fn follow(&self, view: &GalleryView<'_>) -> Result<(), EngineError> {
        if self.is_preferred_answering()
            && let Err(error) = self.preferred.follow(view)
        {
            self.lose("following the gallery", &error);
        }
        self.standby.follow(view)
    }

    fn erase(&self, rows: &[u32]) -> Result<(), EngineError> {
        // A lost device has given up all its memory, and takes only live rows when it is back. It is
        // asked anyway, so that a device that came back meanwhile erases them too.
        if let Err(error) = self.preferred.erase(rows) {
            self.lose("erasing rows", &error);
        }
        self.standby.erase(rows)
    }

    fn find_candidates(
        &self,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        if self.is_preferred_answering() {
            match self.preferred.find_candidates(view, request, candidates) {
                Ok(()) => return Ok(()),
                Err(error) => self.lose("finding candidates", &error),
            }
        }
        telemetry::engine_fallback();
        self.standby.find_candidates(view, request, candidates)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    /// Answers, unless it is broken.
    struct Named {
        kind: &'static str,
        broken: AtomicBool,
        requests: AtomicUsize,
    }

    impl Named {
        fn new(kind: &'static str) -> Arc<Self> {
            Arc::new(Self { kind, broken: AtomicBool::new(false), requests: AtomicUsize::new(0) })
        }

        fn check(&self) -> Result<(), EngineError> {
            if self.broken.load(Ordering::SeqCst) {
                return Err(EngineError::DeviceLost { reason: "unplugged".into() });
            }
            Ok(())
        }
    }

    impl Engine for Named {
        fn describe(&self) -> EngineDescription {
            EngineDescription { kind: self.kind, adapter: self.kind.into(), threads: 1, host_bytes: 3, device_bytes: 5 }
        }

        fn follow(&self, _: &GalleryView<'_>) -> Result<(), EngineError> {
            self.check()
        }

        fn erase(&self, _: &[u32]) -> Result<(), EngineError> {
            self.check()
        }

        fn find_candidates(
            &self,
            _: &GalleryView<'_>,
            _: &CandidateRequest<'_>,
            _: &mut CandidateRows,
        ) -> Result<(), EngineError> {
            self.requests.fetch_add(1, Ordering::SeqCst);
            self.check()
        }
    }

    #[test]
    fn a_lost_engine_is_a_state_that_ends() {
        let (gpu, cpu) = (Named::new("gpu"), Named::new("cpu"));
        let engines = Failover::new(Arc::clone(&gpu) as _, Arc::clone(&cpu) as _);
        let view = GalleryView { dim: 32, segments: Vec::new() };
        let request =
            CandidateRequest { probes: &[], floors: &[], keep: &[], candidates_max: 1, ..CandidateRequest::default() };
        let find = || engines.find_candidates(&view, &request, &mut CandidateRows::default());
        let counts = || (gpu.requests.load(Ordering::SeqCst), cpu.requests.load(Ordering::SeqCst));

        find().unwrap();
        assert_eq!(counts(), (1, 0));
        assert_eq!(engines.describe().kind, "gpu");

        gpu.broken.store(true, Ordering::SeqCst);
        find().unwrap();
        assert_eq!(counts(), (2, 1), "the batch during which the engine was lost is answered too");
        find().unwrap();
        assert_eq!(counts(), (2, 2), "a lost engine is not asked again");
        assert_eq!(engines.describe().kind, "cpu");
        assert!(!engines.mend(&view));

        gpu.broken.store(false, Ordering::SeqCst);
        assert!(engines.mend(&view));
        find().unwrap();
        assert_eq!(counts(), (3, 2));
        assert!(engines.is_preferred_answering());
    }

    #[test]
    fn an_engine_lost_while_following_or_erasing_stops_nothing() {
        let (gpu, cpu) = (Named::new("gpu"), Named::new("cpu"));
        let engines = Failover::new(Arc::clone(&gpu) as _, cpu as _);
        let view = GalleryView { dim: 32, segments: Vec::new() };
        gpu.broken.store(true, Ordering::SeqCst);
        engines.erase(&[1]).unwrap();
        assert!(!engines.is_preferred_answering());
        engines.follow(&view).unwrap();
    }
}
