//! The CPU engine: rows are passed over by their codes if they have some, and compared in f32 or
//! coarser if they have none or codes tell too little; at the speed of memory for a few probes
//! and at the arithmetic peak for a batch.
//!
//! - `prefilter`: passes rows over by their codes. `exhaustive`: compares every row.
//! - `scan`: one request as a job that threads share. `tuner`: which strategy is the fastest now.
//! - `codebook_copy`: the engine's own copy of codebook codes, in large pages.
//!
//! It reads codes and rows from the view, and keeps a copy of the codebook codes alone. What it returns
//! is a superset by proof, not by tuning: a row is dropped if its code is below the bound of the
//! certificate ([`crate::engine::certificate`]), or if its f32 number, which is within
//! [`dot_slack`](super::dot::dot_slack) of the exact score, is further than that below the floor.
//!
//! Does not know subjects, policies or files. Invariants: between two requests nothing of a
//! gallery is kept but codebook codes and scratch memory, bounded by `SCRATCH_KEPT`; after `erase` returns,
//! no scratch memory holds a row that was read before, and no codebook code of the erased rows is left.

mod codebook_copy;
mod exhaustive;
mod prefilter;
mod scan;
#[cfg(test)]
mod tests;
mod tuner;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use zeroize::Zeroize;

use self::codebook_copy::CodebookCopy;
use self::exhaustive::kernels::Kernels;
use self::exhaustive::layout::Line;
use self::prefilter::kernels::CodeKernels;
use self::scan::{Scan, ThreadScratch};
use super::{CandidateRequest, CandidateRows, Engine, EngineDescription, EngineError, GalleryView, narrow_filter};
use crate::simd::{self, Simd, SimdError};

/// Sets of scratch memory kept for the next requests; each request under way uses one.
const SCRATCH_KEPT: usize = 2;
/// So few products that they are done before another thread would be awake.
const ALONE_PRODUCTS: usize = 1 << 22;
/// Numbers of probes, by powers of two, for which the time of exhaustive comparisons is remembered.
const PROBE_POWERS: usize = 16;

/// Why a CPU engine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CpuEngineError {
    /// No threads were asked for.
    #[error("the CPU engine needs at least one thread")]
    NoThreads,
    /// The threads could not be started.
    #[error("the {threads} threads of the CPU engine could not be started")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// The system's error.
        source: rayon::ThreadPoolBuildError,
    },
    /// The instruction set that was asked for is unknown or missing.
    #[error(transparent)]
    Simd(#[from] SimdError),
}

/// The working memory of one request, kept for the next.
#[derive(Default)]
struct Scratch {
    packed: Vec<Line>,
    threads: Vec<Mutex<ThreadScratch>>,
}

impl Scratch {
    /// Overwrites what was copied from rows and probes.
    fn wipe(&mut self) {
        bytemuck::cast_slice_mut::<Line, f32>(&mut self.packed).zeroize();
        self.threads.iter_mut().for_each(|thread| thread.get_mut().wipe());
    }

    fn bytes(&mut self) -> u64 {
        let threads: usize = self.threads.iter_mut().map(|thread| thread.get_mut().bytes()).sum();
        (self.packed.capacity() * size_of::<Line>() + threads) as u64
    }
}

/// Finds candidates on threads of its own. See the module.
pub struct CpuEngine {
    path: Simd,
    kernels: &'static Kernels,
    code_kernels: &'static CodeKernels,
    /// Time per pair of exhaustive comparisons for 1, 2, 4, ... probes, as [`tuner`] keeps it.
    exhaustive_times: [AtomicU64; PROBE_POWERS],
    pool: rayon::ThreadPool,
    scratch: Mutex<Vec<Scratch>>,
    /// Read-locked by requests under way; write-locked by copying, and by an erasure, which thereby waits for
    /// those requests.
    codebook_copy: RwLock<CodebookCopy>,
    scratch_bytes: AtomicU64,
    /// The only level of codes to use, instead of the fastest.
    #[cfg(test)]
    only: Option<prefilter::Level>,
}

impl CpuEngine {
    /// An engine with `threads` threads and the best instruction set of the processor, or the
    /// one the variable [`simd::SIMD_VARIABLE`] names.
    ///
    /// # Errors
    /// [`CpuEngineError`] if there is no thread or no such instruction set.
    pub fn new(threads: usize) -> Result<Self, CpuEngineError> {
        Self::with_simd(threads, simd::chosen()?)
    }

    /// An engine with `threads` threads that uses `path`.
    ///
    /// # Errors
    /// [`CpuEngineError`] if there is no thread or the processor lacks the path.
    pub fn with_simd(threads: usize, path: Simd) -> Result<Self, CpuEngineError> {
        let path = path.checked()?;
        if threads == 0 {
            return Err(CpuEngineError::NoThreads);
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("find-{i}"))
            .build()
            .map_err(|source| CpuEngineError::Threads { threads, source })?;
        Ok(Self {
            path,
            kernels: Kernels::of(path),
            code_kernels: CodeKernels::of(path),
            exhaustive_times: Default::default(),
            pool,
            scratch: Mutex::default(),
            codebook_copy: RwLock::default(),
            scratch_bytes: AtomicU64::new(0),
            #[cfg(test)]
            only: None,
        })
    }

    /// The instruction set in use.
    #[must_use]
    pub fn simd(&self) -> Simd {
        self.path
    }

    fn take_scratch(&self) -> Scratch {
        let mut scratch = self.scratch.lock().pop().unwrap_or_default();
        self.scratch_bytes.fetch_sub(scratch.bytes(), Ordering::Relaxed);
        scratch.threads.resize_with(self.pool.current_num_threads(), Mutex::default);
        scratch
    }

    fn give_scratch(&self, mut scratch: Scratch) {
        let bytes = scratch.bytes();
        let mut kept = self.scratch.lock();
        if kept.len() < SCRATCH_KEPT {
            self.scratch_bytes.fetch_add(bytes, Ordering::Relaxed);
            kept.push(scratch);
        } else {
            drop(kept);
            scratch.wipe();
        }
    }
}

impl Engine for CpuEngine {
    /// `host_bytes` counts codebook codes and the scratch kept between requests, not that of requests under way.
    fn describe(&self) -> EngineDescription {
        EngineDescription {
            kind: "cpu",
            adapter: self.path.as_str().to_owned(),
            threads: self.pool.current_num_threads(),
            host_bytes: self.scratch_bytes.load(Ordering::Relaxed) + self.codebook_copy.read().bytes() as u64,
            device_bytes: 0,
        }
    }

    /// Copies the codebook codes of new segments. Does not fail: without a copy, the map is read.
    fn follow(&self, view: &GalleryView<'_>) -> Result<(), EngineError> {
        let is_up_to = self.codebook_copy.read().is_up_to(view);
        if !is_up_to {
            self.codebook_copy.write().follow(view);
        }
        Ok(())
    }

    /// Waits for the requests under way, and overwrites the codebook codes of these rows and all scratch memory,
    /// which still holds the rows read last: some hundred kilobytes per thread.
    fn erase(&self, rows: &[u32]) -> Result<(), EngineError> {
        let mut codebook_copy = self.codebook_copy.write();
        codebook_copy.erase(rows);
        self.scratch.lock().iter_mut().for_each(Scratch::wipe);
        Ok(())
    }

    fn find_candidates(
        &self,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        candidates.reset(request.floors.len());
        if request.floors.is_empty() {
            return Ok(());
        }
        let codebook_copy = self.codebook_copy.read();
        let view = &codebook_copy.over(view);
        narrow_filter::split(
            view,
            request,
            candidates,
            |request, candidates| {
                self.find_narrow(view, request, candidates);
                Ok(())
            },
            |request, candidates| {
                self.find_wide(view, request, candidates);
                Ok(())
            },
        )
    }
}

impl CpuEngine {
    /// Compares probes with the rows that their filters allow, each probe on one thread.
    fn find_narrow(&self, view: &GalleryView<'_>, request: &CandidateRequest<'_>, candidates: &mut CandidateRows) {
        let next = AtomicUsize::new(0);
        self.scan(view, request, candidates, false, |scan, scratch| {
            loop {
                let probe = next.fetch_add(1, Ordering::Relaxed);
                if probe >= request.floors.len() {
                    break;
                }
                scan.follow_filter(probe, request.filter(probe).expect("narrow filters are filters"), scratch);
            }
        });
    }

    /// Compares all rows with all probes.
    fn find_wide(&self, view: &GalleryView<'_>, request: &CandidateRequest<'_>, candidates: &mut CandidateRows) {
        let alone = view.rows() * view.dim * request.floors.len() <= ALONE_PRODUCTS;
        self.scan(view, request, candidates, alone, |scan, scratch| scan.work(scratch, request.yields));
    }

    /// Prepares a scan, lets every thread do `work` on it, or this one `alone`, and files what they found.
    fn scan(
        &self,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
        alone: bool,
        work: impl Fn(&Scan<'_>, &mut ThreadScratch) + Sync,
    ) {
        let mut scratch = self.take_scratch();
        let Scratch { packed, threads } = &mut scratch;
        let exhaustive_time = &self.exhaustive_times[(request.floors.len().ilog2() as usize).min(PROBE_POWERS - 1)];
        let scan = Scan::new((self.kernels, self.code_kernels), view, request, packed, exhaustive_time);
        #[cfg(test)]
        let scan = scan.by(self.only);
        if alone {
            work(&scan, threads[0].get_mut());
        } else {
            let threads = &*threads;
            self.pool.broadcast(|thread| {
                work(&scan, &mut threads[thread.index()].lock());
                crate::process::zeroing_alloc::clear_stack();
            });
        }
        scan.file(threads, candidates);
        drop(scan);
        self.give_scratch(scratch);
    }
}
