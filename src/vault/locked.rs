//! Memory for keys: separate pages, which the system is asked to keep out of swap and of core dumps.
//!
//! If it refuses (a process may lock only a limited amount, `ulimit -l`), that is logged once, and the server
//! runs all the same.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Once;

use bytemuck::Pod;
use memmap2::MmapMut;
use zeroize::Zeroize as _;

/// Values on locked pages. Zeroed when dropped.
pub(super) struct Locked<T: Pod> {
    pages: MmapMut,
    values: PhantomData<T>,
}

impl<T: Pod> Locked<T> {
    /// This many zeros; at least one.
    pub(super) fn zeroed(count: usize) -> Self {
        static TOLD: Once = Once::new();
        let pages = MmapMut::map_anon(count * size_of::<T>()).expect("the system gives memory");
        #[cfg(target_os = "linux")]
        let _ = pages.advise(memmap2::Advice::DontDump);
        if let Err(error) = pages.lock() {
            TOLD.call_once(|| {
                tracing::warn!(%error, "key memory could not be locked and may be written to swap; raise RLIMIT_MEMLOCK (LimitMEMLOCK, ulimit -l)");
            });
        }
        Self { pages, values: PhantomData }
    }

    /// A copy of these values.
    pub(super) fn copied(values: &[T]) -> Self {
        let mut locked = Self::zeroed(values.len());
        locked.copy_from_slice(values);
        locked
    }
}

impl<T: Pod> Deref for Locked<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.pages)
    }
}

impl<T: Pod> DerefMut for Locked<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.pages)
    }
}

impl<T: Pod> Drop for Locked<T> {
    fn drop(&mut self) {
        self.pages.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kilobytes of this process that are locked.
    fn locked_kb() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
    }

    #[test]
    fn values_are_kept_and_their_pages_locked() {
        let values: Vec<f32> = (0..3000_u16).map(f32::from).collect();
        let locked = Locked::copied(&values);
        assert_eq!(*locked, *values);
        let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
        // If almost nothing may be locked, nothing is, and it works all the same.
        if limit.is_none_or(|limit| limit >= 1 << 20) {
            assert!(locked_kb() >= 12, "{} kB", locked_kb());
        }
    }
}
