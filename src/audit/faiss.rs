//! FAISS, compiled from source by its crate: one exhaustive inner product index, and how FAISS was
//! built. The benchmarks use this module too.
//!
//! Knows FAISS's C interface; does not know what the vectors are. The unsafe code of `audit` is
//! here: calls into `faiss_facts.cpp`.

use std::ffi::{CStr, c_char, c_int};

use faiss::Index as _;
use faiss::index::flat::FlatIndex;

/// FAISS refused or ran out of memory.
#[derive(Debug, thiserror::Error)]
#[error("FAISS failed while {doing}: {source}")]
pub struct FaissError {
    /// What was being done.
    doing: &'static str,
    /// FAISS's own words.
    source: faiss::error::Error,
}

unsafe extern "C" {
    fn thenar_faiss_compile_options() -> *const c_char;
    fn thenar_faiss_blas() -> *const c_char;
    fn thenar_faiss_blas_core() -> *const c_char;
    fn thenar_faiss_threads(threads: c_int);
}

/// What FAISS was compiled for.
#[must_use]
pub fn simd() -> String {
    // SAFETY: returns a C string that lives as long as the program.
    text(unsafe { thenar_faiss_compile_options() }).unwrap_or_default()
}

/// The BLAS it multiplies matrices with.
#[must_use]
pub fn blas() -> String {
    // SAFETY: return null or a C string that lives as long as the program.
    let (config, core) = unsafe { (text(thenar_faiss_blas()), text(thenar_faiss_blas_core())) };
    match (config, core) {
        (Some(config), Some(core)) => format!("{config}, kernels for {core}"),
        (Some(config), None) => config,
        (None, _) => "not OpenBLAS: likely slower than FAISS can be".to_owned(),
    }
}

/// Gives FAISS and its BLAS `threads` threads.
pub fn set_threads(threads: usize) {
    let threads = c_int::try_from(threads).unwrap_or(c_int::MAX);
    // SAFETY: sets numbers; nothing of FAISS runs meanwhile, since this process calls it from one thread.
    unsafe { thenar_faiss_threads(threads) };
}

fn text(text: *const c_char) -> Option<String> {
    // SAFETY: null or a C string that lives as long as the program, as the callers got it.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned())
}

/// Vectors that FAISS compares exhaustively, by inner product (`IndexFlatIP`).
pub(super) struct Flat {
    index: FlatIndex,
}

impl Flat {
    /// An empty one for vectors of `dim` components.
    pub(super) fn new(dim: usize) -> Result<Self, FaissError> {
        let dim = u32::try_from(dim).expect("dimensions are small");
        let index = FlatIndex::new_ip(dim).map_err(|source| FaissError { doing: "making an index", source })?;
        Ok(Self { index })
    }

    /// Adds vectors. Shape: `[count, dim]`.
    pub(super) fn add(&mut self, vectors: &[f32]) -> Result<(), FaissError> {
        self.index.add(vectors).map_err(|source| FaissError { doing: "adding rows", source })
    }

    /// The `k` best vectors of each probe as (place, score), best first; all if there are fewer.
    /// Shape of `probes`: `[count, dim]`.
    pub(super) fn best(&mut self, probes: &[f32], k: usize) -> Result<Vec<Vec<(usize, f32)>>, FaissError> {
        let k = k.min(usize::try_from(self.index.ntotal()).unwrap_or(usize::MAX));
        if probes.is_empty() || k == 0 {
            return Ok(vec![Vec::new(); probes.len() / self.index.d() as usize]);
        }
        let found = self.index.search(probes, k).map_err(|source| FaissError { doing: "searching", source })?;
        let best = found.labels.chunks_exact(k).zip(found.distances.chunks_exact(k)).map(|(labels, scores)| {
            let hits = labels.iter().zip(scores);
            hits.filter_map(|(label, score)| Some((usize::try_from(label.get()?).ok()?, *score))).collect()
        });
        Ok(best.collect())
    }

    /// Removes every vector. FAISS keeps the memory for the next ones.
    pub(super) fn clear(&mut self) -> Result<(), FaissError> {
        self.index.reset().map_err(|source| FaissError { doing: "removing rows", source })
    }
}
