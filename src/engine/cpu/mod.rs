//! The CPU engine: rows are passed over by their codes where they have some, and compared in f32 or
//! coarser where they have none or codes tell too little, at the speed of memory for a few probes
//! and at the arithmetic peak for a batch.
//!
//! It reads codes and rows where the view has them, and keeps a copy of no more than the codebook codes
//! (`codebook codes.rs`). What it returns is a superset by proof, not by tuning: a row is dropped where
//! its code is below the bar of its certificate ([`crate::engine::certificate`]), or where its f32 number,
//! which is within [`sift_slack`] of the exact score, is further than that below the floor.
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
mod floors;
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
use roaring::RoaringBitmap;
use zeroize::Zeroize;

use self::codebook_copy::CodebookCopy;
use self::floors::Shortlist;
use self::kernels::{Kernels, Line};
use self::sieve::kernels::CodeKernels;
pub use self::slack::sift_slack;
use self::sweep::{Bench, Sweep, Turn};
use super::{CandidateRequest, CandidateRows, Engine, EngineDescription, EngineError, GalleryView, Seed};
use crate::simd::{self, Simd, SimdError};

/// Sets of scratch memory kept for the next sifts; one is in use in each sift under way.
const SCRATCH_KEPT: usize = 2;
/// Products under which a sift is done before another thread would be awake.
const ALONE_PRODUCTS: usize = 1 << 22;
/// A filter that lets through at most one row in so many is followed row by row.
const FEW_OF: u64 = 16;
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
        self.sift_in_turn(Turn::First, view, request, candidates);
        Ok(())
    }

    fn find_candidates_yielding(
        &self,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) -> Result<(), EngineError> {
        self.sift_in_turn(Turn::Yielding, view, request, candidates);
        Ok(())
    }
}

impl CpuEngine {
    fn sift_in_turn(
        &self,
        turn: Turn,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        candidates: &mut CandidateRows,
    ) {
        let probes = request.floors.len();
        candidates.reset(probes);
        if probes == 0 {
            return;
        }
        let sketches = self.sketches.read();
        let view = &sketches.over(view);
        let rows: usize = view.blocks.iter().map(|block| block.count(view.dim)).sum();
        let narrow = |filter: &Option<&RoaringBitmap>| filter.is_some_and(|f| f.len() <= rows as u64 / FEW_OF);
        if request.filters.iter().any(narrow) {
            self.sift_in_two(turn, view, request, narrow, candidates);
        } else {
            self.sift_all(turn, view, request, rows, candidates);
        }
    }

    /// Sifts the probes of narrow filters row by row, the others together.
    fn sift_in_two(
        &self,
        turn: Turn,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        narrow: impl Fn(&Option<&RoaringBitmap>) -> bool,
        candidates: &mut CandidateRows,
    ) {
        let dim = view.dim;
        let (few, many): (Vec<usize>, Vec<usize>) =
            (0..request.floors.len()).partition(|probe| request.filters.get(*probe).is_some_and(&narrow));
        let of = |chosen: &[usize]| Chosen {
            probes: chosen.iter().flat_map(|p| &request.probes[p * dim..(p + 1) * dim]).copied().collect(),
            floors: chosen.iter().map(|p| request.floors[*p]).collect(),
            keep: chosen.iter().map(|p| request.keep[*p]).collect(),
            filters: chosen.iter().map(|p| request.filters.get(*p).copied().flatten()).collect(),
            seeds: chosen.iter().map(|p| request.seed(*p)).collect(),
        };
        let rows = view.blocks.iter().map(|block| block.count(dim)).sum();
        let mut found = CandidateRows::default();
        found.reset(many.len());
        if !many.is_empty() {
            self.sift_all(turn, view, &of(&many).request(request), rows, &mut found);
            candidates.certificate = found.certificate;
        }
        for (probe, rows) in many.iter().zip(&mut found.rows) {
            std::mem::swap(rows, &mut candidates.rows[*probe]);
        }
        for ((probe, overflowed), floor) in many.into_iter().zip(found.overflowed).zip(found.floors) {
            candidates.overflowed[probe] = overflowed;
            candidates.floors[probe] = floor;
        }

        let chosen = of(&few);
        let request = chosen.request(request);
        let mut scratch = self.take_scratch();
        let Scratch { packed, benches } = &mut scratch;
        let sweep = Sweep::new((self.kernels, self.code_kernels), view, &request, packed, &self.paces[0]);
        let next = AtomicUsize::new(0);
        let shared = &*benches;
        self.pool.broadcast(|thread| {
            let mut bench = shared[thread.index()].lock();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(filter) = chosen.filters.get(at) else { break };
                sweep.filtered(at, filter.expect("narrow filters are filters"), &mut bench);
            }
            crate::process::zeroing_alloc::clear_stack();
        });
        for (at, probe) in few.into_iter().enumerate() {
            let lists = benches.iter_mut().filter_map(|b| b.get_mut().list(at));
            candidates.overflowed[probe] = Shortlist::merge(lists, &sweep.floors[at], &mut candidates.rows[probe]);
            candidates.floors[probe] = sweep.floors[at].held();
        }
        drop(sweep);
        self.give_scratch(scratch);
    }

    fn sift_all(
        &self,
        turn: Turn,
        view: &GalleryView<'_>,
        request: &CandidateRequest<'_>,
        rows: usize,
        candidates: &mut CandidateRows,
    ) {
        let probes = request.floors.len();
        let mut scratch = self.take_scratch();
        let Scratch { packed, benches } = &mut scratch;
        let pace = &self.paces[(probes.ilog2() as usize).min(PACES - 1)];
        let sweep = Sweep::new((self.kernels, self.code_kernels), view, request, packed, pace);
        #[cfg(test)]
        let sweep = sweep.by(self.only);
        if rows * view.dim * probes <= ALONE_PRODUCTS {
            sweep.work(benches[0].get_mut(), turn);
        } else {
            let benches = &*benches;
            self.pool.broadcast(|thread| {
                sweep.work(&mut benches[thread.index()].lock(), turn);
                crate::process::zeroing_alloc::clear_stack();
            });
        }
        for (probe, floor) in sweep.floors.iter().enumerate() {
            candidates.overflowed[probe] = Shortlist::merge(
                benches.iter_mut().filter_map(|b| b.get_mut().list(probe)),
                floor,
                &mut candidates.rows[probe],
            );
            candidates.floors[probe] = floor.held();
        }
        candidates.certificate = sweep.certificate();
        drop(sweep);
        self.give_scratch(scratch);
    }
}

/// Some of a request's probes, with what belongs to them.
struct Chosen<'a> {
    probes: Vec<f32>,
    floors: Vec<f32>,
    keep: Vec<u32>,
    filters: Vec<Option<&'a RoaringBitmap>>,
    seeds: Vec<Seed>,
}

impl Chosen<'_> {
    fn request<'s>(&'s self, whole: &CandidateRequest<'_>) -> CandidateRequest<'s> {
        CandidateRequest {
            probes: &self.probes,
            floors: &self.floors,
            keep: &self.keep,
            candidates_max: whole.candidates_max,
            certificate: whole.certificate,
            filters: &self.filters,
            seeds: &self.seeds,
        }
    }
}
