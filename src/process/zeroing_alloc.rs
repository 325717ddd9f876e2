//! An allocator that zeroes memory before it is freed.
//!
//! An embedding passes through buffers of the transport, the decoder, the service and the engine, most of
//! them in other libraries. Freed memory keeps its bytes until it is allocated again, which may never
//! happen, so forgetting a template would leave copies of it all over the heap. Zeroing each block as it is
//! freed reaches all of them. It costs a pass over memory that is hot in the cache.
//!
//! A thread's stack is never freed while the thread runs: [`clear_stack`] overwrites what calls have left
//! on it, for threads that may wait a long time for their next work.
//!
//! Knows nothing of embeddings. Does not reach memory that C libraries allocate for themselves (SQLite's
//! pages, a graphics driver's), or registers.

use std::alloc::{GlobalAlloc, Layout, System};

/// How much of the stack is overwritten: far more than rotating, sealing and comparing use.
const STACK_BYTES: usize = 64 << 10;

/// Overwrites this thread's stack below the caller, where the functions it has called left their data.
#[inline(never)]
pub fn clear_stack() {
    std::hint::black_box(&mut [0_u8; STACK_BYTES]);
}

/// The system's allocator, with every block zeroed before it is freed.
#[derive(Debug, Clone, Copy, Default)]
pub struct ZeroingAllocator;

// SAFETY: every block comes from `System` and goes back to it with its own layout; writing zeros to a
// block before that is within the block, and nobody may read it any more. `realloc` is the trait's
// own: a new block, a copy, and `dealloc` of the old one, which zeroes it.
unsafe impl GlobalAlloc for ZeroingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are `System`'s.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller gives back a block of this layout, so all of it may be written.
        unsafe { block.write_bytes(0, layout.size()) };
        // Without this, the compiler may omit a write to memory that is freed next.
        std::hint::black_box(block);
        // SAFETY: the caller's promises are `System`'s.
        unsafe { System.dealloc(block, layout) }
    }
}
