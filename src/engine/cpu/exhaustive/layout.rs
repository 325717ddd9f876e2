//! How rows, probes and results lie in memory for the exhaustive kernels, and what all kernels share.
//!
//! In components: a panel is `[dim][panel_rows]`, a packed group of p probes `[dim][p]`. In bf16 two
//! consecutive components share a 32-bit word: `[dim / 2][p]` words.

#[cfg(target_arch = "x86_64")]
use half::f16;

/// Probes of the widest tile of any path.
pub(super) const TILE_PROBES_MAX: usize = 12;
/// Rows of the widest panel of any path; a mask of rows is a `u32`.
pub(super) const PANEL_ROWS_MAX: usize = 32;
/// Rows that one call of a dots kernel compares.
pub(super) const DOTS_ROWS: usize = 4;
/// How many rows ahead a dots kernel prefetches. Kernels jump between rows, which the
/// processor's own prefetcher does not follow: asking for the lines in the order they lie in
/// memory, into the second-level cache, more than doubled the bytes read per second.
pub(super) const DOTS_ROWS_AHEAD: usize = 8;
/// Probes that one call of a dots kernel takes, at most.
pub(super) const DOTS_PROBES_MAX: usize = 6;

/// Runs `$body` for `$p` = 0, 1, ... below `$P` (at most [`TILE_PROBES_MAX`]), written out: sums in
/// registers stay there only if no loop over them is left, and compilers stop unrolling at a
/// size of their own.
#[cfg(target_arch = "x86_64")]
macro_rules! each_probe {
    ($p:ident in $P:ident $body:block) => {
        each_probe!(@ $p $P $body 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@ $p:ident $P:ident $body:block $($i:literal)*) => {
        $(if $i < $P {
            let $p: usize = $i;
            $body
        })*
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use each_probe;

/// The array of `$value` for `$i` = 0 to 15, written out for the same reason.
#[cfg(target_arch = "x86_64")]
macro_rules! sixteen {
    ($i:ident => $value:expr) => {
        sixteen!(@ $i $value; 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $i:ident $value:expr; $($n:literal)*) => {
        [$({
            let $i: usize = $n;
            $value
        }),*]
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use sixteen;

/// Where sixteen rows from `first` on start; the last row stands in for those beyond it.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn row_starts(rows: &[f16], dim: usize, first: usize) -> [*const f16; 16] {
    let last = rows.len() / dim - 1;
    std::array::from_fn(|r| rows[(first + r).min(last) * dim..].as_ptr())
}

/// Memory of panels and packed probes, in whole cache lines.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(in crate::engine::cpu) struct Line(pub(super) [f32; 16]);

/// What a tile kernel found: for each probe of the block a mask of the rows that reached its threshold,
/// and their numbers, which are only written if some mask is not empty.
#[repr(C, align(64))]
pub(super) struct TileHits {
    pub(super) masks: [u32; TILE_PROBES_MAX],
    pub(super) numbers: [[f32; PANEL_ROWS_MAX]; TILE_PROBES_MAX],
}

impl TileHits {
    pub(super) const EMPTY: Self =
        Self { masks: [0; TILE_PROBES_MAX], numbers: [[0.0; PANEL_ROWS_MAX]; TILE_PROBES_MAX] };
}

/// The numbers of a dots call: for each probe, those of the rows.
pub(super) type DotsNumbers = [[f32; DOTS_ROWS]; DOTS_PROBES_MAX];
