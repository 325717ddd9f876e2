//! Support for tests with hostile input: the loop over seeds, and an allocator that counts.
//!
//! `THENAR_FUZZ_SECONDS` sets how long each such test runs (2 s unless set), `THENAR_FUZZ_SEED` the seed of
//! its first case. A failure prints the seed that repeats it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::{Duration, Instant};

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

fn count(bytes: isize) {
    // A thread that is ending counts nothing.
    let _ = NOW.try_with(|now| {
        now.set(now.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(now.get())));
    });
}

#[expect(unsafe_code, reason = "an allocator")]
// SAFETY: every block comes from `System` and goes back to it with its own layout.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promises are `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promises are `System`'s.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // Old and new block may exist at once.
        count(bytes.cast_signed());
        count(-layout.size().cast_signed());
        // SAFETY: the caller's promises are `System`'s.
        unsafe { System.realloc(block, layout, bytes) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller's promises are `System`'s.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `work` returns, and the most bytes that it had allocated at any time on this thread.
pub(crate) fn most_bytes<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = NOW.get();
    MOST.set(before);
    let result = work();
    (result, (MOST.get() - before).cast_unsigned())
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a whole number"))
}

/// Runs `case` with one seed after another until the time is over.
pub(crate) fn fuzz(mut case: impl FnMut(u64)) {
    struct Told(u64);
    impl Drop for Told {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("repeat this with THENAR_FUZZ_SEED={}", self.0);
            }
        }
    }
    let until = Instant::now() + Duration::from_secs(setting("THENAR_FUZZ_SECONDS").unwrap_or(2));
    let mut told = Told(setting("THENAR_FUZZ_SEED").unwrap_or(1));
    let first = told.0;
    // At least some, however slow the machine is.
    while told.0 < first + 200 || Instant::now() < until {
        case(told.0);
        told.0 += 1;
    }
    println!("{} cases from seed {first}", told.0 - first);
}
