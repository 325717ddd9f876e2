//! The structs that host and kernels share; `shaders/bindings.wgsl` has the same.
//!
//! A test reflects the shaders with naga and compares sizes, offsets and bindings.

use bytemuck::{Pod, Zeroable};

/// Most probes in one batch; `PROBES_MAX` in the kernels.
pub(crate) const PROBES_MAX: usize = 256;
/// A cosine of 1 in the parts that factors have.
pub(crate) const COSINE_PARTS: f32 = 65_536.0;

/// One run of slots of one slab; `Slice` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub(crate) struct Slice {
    /// `vec4<u32>` of a row's code at the level that is scanned.
    pub(crate) quads: u32,
    /// First slot in the slab.
    pub(crate) slot_first: u32,
    /// One past the last slot in the slab.
    pub(crate) slot_end: u32,
    /// Number of the slab's slot 0 among all slots.
    pub(crate) slot_base: u32,
    /// Places in the lists of entries.
    pub(crate) entries_max: u32,
    /// Parts that the scan takes off a row's cosine.
    pub(crate) loss_parts: u32,
    /// `vec4<u32>` of the probes before those of the refinement.
    pub(crate) refine_at: u32,
    /// `vec4<u32>` of a row's 4-bit code.
    pub(crate) four_bit_quads: u32,
    /// Length of every 1-bit code.
    pub(crate) one_bit_norm: f32,
    /// Zero.
    pub(crate) reserved: [u32; 3],
}

/// What a row must reach for one probe; `Bound` in the kernels, which have the formula.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub(crate) struct DeviceBound {
    /// Factor of the integer sum.
    pub(crate) scale: f32,
    /// Factor of the cosine.
    pub(crate) along: f32,
    /// Factor of the sine.
    pub(crate) across: f32,
    /// What errors and roundings take off the bound.
    pub(crate) slack: f32,
    /// The integer sum is this and the factor of the level times the dot product.
    pub(crate) base: i32,
    /// Entries that the probe may store; more are only counted.
    pub(crate) quota: u32,
}

/// More than any product of a unit probe, and still far from infinity when it is multiplied.
pub(crate) const EVERYTHING: f32 = 1e30;

impl DeviceBound {
    /// The bound of a padding probe: nothing reaches it, nothing is stored.
    pub(crate) const CLOSED: Self = Self { scale: 0.0, along: 0.0, across: 0.0, slack: -EVERYTHING, base: 0, quota: 0 };

    /// The bound that every row reaches.
    pub(crate) fn open(quota: u32) -> Self {
        Self { slack: EVERYTHING, quota, ..Self::CLOSED }
    }
}

/// A (probe, slot) pair that reached its bound; `Entry` in the kernels.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub(crate) struct Entry {
    /// Number of the probe in the batch.
    pub(crate) probe: u32,
    /// Number of the slot among the slots of all slabs.
    pub(crate) slot: u32,
}
