//! The CPU engine: an exhaustive comparison of every stored row, in f32 or coarser, at the speed
//! of memory for a few probes and at the arithmetic peak for a batch.
//!
//! It keeps no copy of the gallery: it reads the rows where the view has them. What it returns
//! is a superset by proof, not by tuning: a kernel's number is within [`sift_slack`] of the exact
//! score, and a row is only dropped where its number is further than that below the floor.
//!
//! Does not know subjects, policies, files or codes. Invariants: between two sifts nothing of a
//! gallery is kept but scratch memory, bounded by `SCRATCH_KEPT`; after `erase` returns, no
//! scratch memory holds a row that was read before.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod floors;
mod kernels;
mod portable;
mod slack;
mod sweep;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use zeroize::Zeroize;

use self::floors::Shortlist;
use self::kernels::{Kernels, Line};
pub use self::slack::sift_slack;
use self::sweep::{Bench, Sweep};
use super::{Engine, EngineDescription, EngineError, GalleryView, SiftRequest, Survivors};
use crate::simd::{self, Simd, SimdError};

/// Sets of scratch memory kept for the next sifts; one is in use in each sift under way.
const SCRATCH_KEPT: usize = 2;
/// Products under which a sift is done before another thread would be awake.
const ALONE_PRODUCTS: usize = 1 << 22;

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
    pool: rayon::ThreadPool,
    scratch: Mutex<Vec<Scratch>>,
    /// Held shared by sifts under way, alone by an erasure, which so waits for them.
    sifting: RwLock<()>,
    scratch_bytes: AtomicU64,
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
            pool,
            scratch: Mutex::default(),
            sifting: RwLock::new(()),
            scratch_bytes: AtomicU64::new(0),
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
    /// `host_bytes` counts the scratch kept between sifts, not that of sifts under way.
    fn describe(&self) -> EngineDescription {
        EngineDescription {
            kind: "cpu",
            adapter: self.path.as_str().to_owned(),
            threads: self.pool.current_num_threads(),
            host_bytes: self.scratch_bytes.load(Ordering::Relaxed),
            device_bytes: 0,
        }
    }

    /// Nothing to follow: there is no copy.
    fn follow(&self, _view: &GalleryView<'_>) -> Result<(), EngineError> {
        Ok(())
    }

    /// There is no copy of the gallery, but scratch memory still holds the rows read last. Waits
    /// for the sifts under way and overwrites all of it: some hundred kilobytes a thread.
    fn erase(&self, _rows: &[u32]) -> Result<(), EngineError> {
        let _alone = self.sifting.write();
        self.scratch.lock().iter_mut().for_each(Scratch::wipe);
        Ok(())
    }

    fn sift(
        &self,
        view: &GalleryView<'_>,
        request: &SiftRequest<'_>,
        survivors: &mut Survivors,
    ) -> Result<(), EngineError> {
        let probes = request.floors.len();
        survivors.reset(probes);
        if probes == 0 {
            return Ok(());
        }
        let _shared = self.sifting.read();
        let rows: usize = view.blocks.iter().map(|block| block.count(view.dim)).sum();
        let mut scratch = self.take_scratch();
        let Scratch { packed, benches } = &mut scratch;
        let sweep = Sweep::new(self.kernels, view, request, packed);
        if rows * view.dim * probes <= ALONE_PRODUCTS {
            sweep.work(benches[0].get_mut());
        } else {
            let benches = &*benches;
            self.pool.broadcast(|thread| sweep.work(&mut benches[thread.index()].lock()));
        }
        for (probe, floor) in sweep.floors.iter().enumerate() {
            survivors.overflowed[probe] = Shortlist::merge(
                benches.iter_mut().filter_map(|b| b.get_mut().list(probe)),
                floor,
                &mut survivors.rows[probe],
            );
        }
        drop(sweep);
        self.give_scratch(scratch);
        Ok(())
    }
}
