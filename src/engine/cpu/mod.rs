//! The CPU engine: rows are passed over by their codes where they have some, and compared in f32 or
//! coarser where they have none or codes tell too little, at the speed of memory for a few probes
//! and at the arithmetic peak for a batch.
//!
//! It reads codes and rows where the view has them, and keeps a copy of no more than the codebook codes
//! (`codebook codes.rs`). What it returns is a superset by proof, not by tuning: a row is dropped where
//! its code is below the bar of its certificate ([`crate::engine::certificate`]), or where its f32 number,
//! which is within [`dot_slack`] of the exact score, is further than that below the floor.
//!
//! Does not know subjects, policies, files or codes. Invariants: between two sifts nothing of a
//! gallery is kept but codebook codes and scratch memory, bounded by `SCRATCH_KEPT`; after `erase` returns,
//! no scratch memory holds a row that was read before, and no codebook code of the erased rows is left.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod codebook_copy;
mod kernels;
mod pace;
mod portable;
mod sieve;
mod slack;
mod sweep;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};
use zeroize::Zeroize;

use self::codebook_copy::CodebookCopy;
use self::kernels::{Kernels, Line};
use self::sieve::kernels::CodeKernels;
use self::sweep::{Bench, Sweep, Turn};
use super::{CandidateRequest, CandidateRows, Engine, EngineDescription, EngineError, GalleryView, narrow_filter};
use crate::simd::{self, Simd, SimdError};

/// Sets of scratch memory kept for the next sifts; one is in use in each sift under way.
const SCRATCH_KEPT: usize = 2;
/// Products under which a sift is done before another thread would be awake.
const ALONE_PRODUCTS: usize = 1 << 22;
/// Numbers of probes, by powers of two, for which the pace of exhaustive sifting is remembered.
const PACES: usize = 16;

/// Why a CPU engine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CpuEngineError {
    /// No thread, no work.
    #[error("the CPU engine needs at least one thread")]
    NoThreads,
    /// The threads could not be started.
    #[error("the {threads} threads of the CPU engine could not be started")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system said.
        source: rayon::ThreadPoolBuildError,
    },
    /// The instruction set that was asked for is unknown or missing.
    #[error(transparent)]
    Simd(#[from] SimdError),
}

/// What one sift works in, kept for the next.
#[derive(Default)]
struct Scratch {
    packed: Vec<Line>,
    benches: Vec<Mutex<Bench>>,
}

impl Scratch {
    /// Overwrites what was copied from rows and probes.
    fn wipe(&mut self) {
        bytemuck::cast_slice_mut::<Line, f32>(&mut self.packed).zeroize();
        self.benches.iter_mut().for_each(|bench| bench.get_mut().wipe());
    }

    fn bytes(&mut self) -> u64 {
        let benches: usize = self.benches.iter_mut().map(|b| b.get_mut().bytes()).sum();
        (self.packed.capacity() * size_of::<Line>() + benches) as u64
    }
}

/// Sifts on threads of its own. See the module.
pub struct CpuEngine {
    path: Simd,
    kernels: &'static Kernels,
    code_kernels: &'static CodeKernels,
    /// Pace of exhaustive sifting for 1, 2, 4, ... probes, as [`pace`] keeps it.
    paces: [AtomicU64; PACES],
    pool: rayon::ThreadPool,
    scratch: Mutex<Vec<Scratch>>,
    /// Held shared by sifts under way; alone by an erasure, which so waits for them, and by who copies.
    sketches: RwLock<CodebookCopy>,
    scratch_bytes: AtomicU64,
    /// The one level of codes to sift by, instead of the fastest.
    #[cfg(test)]
    only: Option<sieve::Level>,
}

impl CpuEngine {
    /// An engine with `threads` threads and the best instruction set of the processor, or the
    /// one the variable [`simd::SIMD_VARIABLE`] names.
    ///
    /// # Errors
    /// [`CpuEngineError`] where there is no thread or no such instruction set.
    pub fn new(threads: usize) -> Result<Self, CpuEngineError> {
        Self::with_simd(threads, simd::chosen()?)
    }

    /// An engine with `threads` threads that uses `path`.
    ///
    /// # Errors
    /// [`CpuEngineError`] where there is no thread or the processor lacks the path.
    pub fn with_simd(threads: usize, path: Simd) -> Result<Self, CpuEngineError> {
        let path = path.checked()?;
        if threads == 0 {
            return Err(CpuEngineError::NoThreads);
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("sift-{i}"))
            .build()
            .map_err(|source| CpuEngineError::Threads { threads, source })?;
        Ok(Self {
            path,
            kernels: Kernels::of(path),
            code_kernels: CodeKernels::of(path),
            paces: Default::default(),
            pool,
            scratch: Mutex::default(),
            sketches: RwLock::default(),
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
        scratch.benches.resize_with(self.pool.current_num_threads(), Mutex::default);
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
    /// `host_bytes` counts codebook codes and the scratch kept between sifts, not that of sifts under way.
    fn describe(&self) -> EngineDescription {
        EngineDescription {
            kind: "cpu",
            adapter: self.path.as_str().to_owned(),
            threads: self.pool.current_num_threads(),
            host_bytes: self.scratch_bytes.load(Ordering::Relaxed) + self.sketches.read().bytes() as u64,
            device_bytes: 0,
        }
    }

    /// Copies the codebook codes of segments that are new. Does not fail: without a copy the map is read.
    fn follow(&self, view: &GalleryView<'_>) -> Result<(), EngineError> {
        let is_up_to = self.sketches.read().is_up_to(view);
        if !is_up_to {
            self.sketches.write().follow(view);
        }
        Ok(())
    }

    /// Waits for the sifts under way, and overwrites the codebook codes of these rows and all scratch memory,
    /// which still holds the rows read last: some hundred kilobytes a thread.
    fn erase(&self, rows: &[u32]) -> Result<(), EngineError> {
        let mut sketches = self.sketches.write();
        sketches.erase(rows);
        self.scratch.lock().iter_mut().for_each(Scratch::wipe);
        Ok(())
    }

    fn find_candidates(
        &self,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        self.find(Turn::First, view, request, candidates)
    }

    fn find_candidates_yielding(
        &self,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        self.find(Turn::Yielding, view, request, candidates)
    }
}

impl CpuEngine {
    fn find(
        &self,
        turn: Turn,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        candidates.reset(request.floors.len());
        if request.floors.is_empty() {
            return Ok(());
        }
        let sketches = self.sketches.read();
        let view = &sketches.over(view);
        narrow_filter::split(
            view,
            request,
            candidates,
            |request, candidates| {
                self.follow_filters(view, request, candidates);
                Ok(())
            },
            |request, candidates| {
                self.sift_all(turn, view, request, candidates);
                Ok(())
            },
        )
    }

    /// Compares probes with the rows that their filters allow, each probe on one thread.
    fn follow_filters(&self, view: &GalleryView<'_>, request: &CandidateRequest<'_>, candidates: &mut CandidateRows) {
        let mut scratch = self.take_scratch();
        let Scratch { packed, benches } = &mut scratch;
        let sweep = Sweep::new((self.kernels, self.code_kernels), view, request, packed, &self.paces[0]);
        let next = AtomicUsize::new(0);
        let shared = &*benches;
        self.pool.broadcast(|thread| {
            let mut bench = shared[thread.index()].lock();
            loop {
                let probe = next.fetch_add(1, Ordering::Relaxed);
                if probe >= request.floors.len() {
                    break;
                }
                sweep.filtered(probe, request.filter(probe).expect("narrow filters are filters"), &mut bench);
            }
            crate::process::zeroing_alloc::clear_stack();
        });
        sweep.file(benches, candidates);
        drop(sweep);
        self.give_scratch(scratch);
    }

    fn sift_all(
        &self,
        turn: Turn,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) {
        let probes = request.floors.len();
        let mut scratch = self.take_scratch();
        let Scratch { packed, benches } = &mut scratch;
        let pace = &self.paces[(probes.ilog2() as usize).min(PACES - 1)];
        let sweep = Sweep::new((self.kernels, self.code_kernels), view, request, packed, pace);
        #[cfg(test)]
        let sweep = sweep.by(self.only);
        if view.rows() * view.dim * probes <= ALONE_PRODUCTS {
            sweep.work(benches[0].get_mut(), turn);
        } else {
            let benches = &*benches;
            self.pool.broadcast(|thread| {
                sweep.work(&mut benches[thread.index()].lock(), turn);
                crate::process::zeroing_alloc::clear_stack();
            });
        }
        sweep.file(benches, candidates);
        drop(sweep);
        self.give_scratch(scratch);
    }
}
