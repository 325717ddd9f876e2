//! Slabs: the codes and factors of row slots, and how they are written, zeroed and read back.

use std::ops::Range;

use thenar_index::codes::BLOCK_ROWS;

use super::kernels::SLOT_STEP;
use super::layout::{self, DeviceCodes, FACTORS_BYTES, Level};
use super::{Device, STAGING_BYTES};
use crate::engine::EngineError;
use crate::model::DIM_MAX;

pub(super) struct Slab {
    /// 1-bit and 4-bit codes.
    codes: [wgpu::Buffer; 2],
    factors: wgpu::Buffer,
    /// For each level, its codes and the factors.
    bind_groups: [wgpu::BindGroup; 2],
    pub(super) slots: u32,
    pub(super) dim: usize,
}

impl Slab {
    pub(super) fn bytes(&self) -> u64 {
        self.codes[0].size() + self.codes[1].size() + self.factors.size()
    }

    pub(super) fn bind_group(&self, level: Level) -> &wgpu::BindGroup {
        &self.bind_groups[level.index()]
    }

    /// Where the bytes of some slots of one block lie: buffers, offsets, lengths. In a whole block they are
    /// one stretch per buffer, otherwise one per quad.
    fn stretches(&self, slots: &Range<u32>) -> Vec<(&wgpu::Buffer, u64, u64)> {
        let block = u64::from(slots.start) / BLOCK_ROWS as u64;
        let (first, count) = (u64::from(slots.start) % BLOCK_ROWS as u64, u64::from(slots.end - slots.start));
        assert!(first + count <= BLOCK_ROWS as u64, "slots of one block");
        let mut stretches = Vec::new();
        for level in Level::ALL {
            let quads = level.quads(self.dim) as u64;
            let quad_bytes = BLOCK_ROWS as u64 * 16;
            let buffer = &self.codes[level.index()];
            if count == BLOCK_ROWS as u64 {
                stretches.push((buffer, block * quads * quad_bytes, quads * quad_bytes));
            } else {
                let at = |quad| (block * quads + quad) * quad_bytes + first * 16;
                stretches.extend((0..quads).map(|quad| (buffer, at(quad), count * 16)));
            }
        }
        stretches.push((&self.factors, u64::from(slots.start) * FACTORS_BYTES as u64, count * FACTORS_BYTES as u64));
        stretches
    }
}

impl Device {
    /// Adds a slab of `slots` zeroed slots. `slots`: a multiple of [`SLOT_STEP`], so few that no buffer takes
    /// more than the device's `buffer_bytes_max`.
    ///
    /// # Errors
    /// [`EngineError::OutOfDeviceMemory`] if it does not fit; the device stays usable.
    pub(crate) fn add_slab(&mut self, slots: u32, dim: usize) -> Result<(), EngineError> {
        use wgpu::BufferUsages as Usage;
        let slots_bytes = |row_bytes: usize| u64::from(slots) * row_bytes as u64;
        let connection = &self.connection;
        assert!(slots > 0 && slots.is_multiple_of(SLOT_STEP) && dim.is_multiple_of(32) && dim <= DIM_MAX);
        assert!(
            slots_bytes(Level::FourBit.row_bytes(dim)) <= connection.device.limits().max_storage_buffer_binding_size
        );
        let buffer = |label: &str, row_bytes: usize| {
            connection.buffer(label, slots_bytes(row_bytes), Usage::STORAGE | Usage::COPY_DST | Usage::COPY_SRC)
        };
        let (codes, factors) = connection.allocate(slots_bytes(layout::row_bytes(dim)), || {
            (Level::ALL.map(|level| buffer("codes", level.row_bytes(dim))), buffer("factors", FACTORS_BYTES))
        })?;
        let bind_groups = Level::ALL.map(|level| {
            connection.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("slab"),
                layout: &self.slab_layout,
                entries: &[
                    wgpu::BindGroupEntry { binding: 0, resource: codes[level.index()].as_entire_binding() },
                    wgpu::BindGroupEntry { binding: 1, resource: factors.as_entire_binding() },
                ],
            })
        });
        self.slabs.push(Slab { codes, factors, bind_groups, slots, dim });
        self.connection.check()
    }

    /// Zeroes and frees every slab.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(crate) fn clear(&mut self) -> Result<(), EngineError> {
        let whole: Vec<_> = self.slabs.iter().enumerate().map(|(index, slab)| (index, 0..slab.slots)).collect();
        if !whole.is_empty() {
            self.zero_rows(&whole)?;
        }
        self.slabs.clear();
        Ok(())
    }

    /// Writes codes of whole blocks from slot `slot` of a slab on, and returns once the device has them. At
    /// most [`STAGING_BYTES`].
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(crate) fn write_codes(&mut self, slab: usize, slot: u32, codes: &DeviceCodes) -> Result<(), EngineError> {
        let place = &self.slabs[slab];
        let count = codes.factors.len();
        assert!(count.is_multiple_of(BLOCK_ROWS) && slot.is_multiple_of(BLOCK_ROWS as u32));
        assert!(count <= (place.slots - slot) as usize && count * layout::row_bytes(place.dim) <= STAGING_BYTES);
        let pieces: [&[u8]; 3] = [
            bytemuck::cast_slice(&codes.one_bit),
            bytemuck::cast_slice(&codes.four_bit),
            bytemuck::cast_slice(&codes.factors),
        ];
        let connection = &self.connection;
        let staged_bytes = connection.stage(&self.staging, &pieces)?;
        let mut encoder = connection.encoder();
        let mut from = 0;
        for (piece, to) in pieces.iter().zip([&place.codes[0], &place.codes[1], &place.factors]) {
            let (size, each) = (piece.len() as u64, piece.len() as u64 / count.max(1) as u64);
            encoder.copy_buffer_to_buffer(&self.staging, from, to, u64::from(slot) * each, size);
            from += size;
        }
        connection.wait(connection.submit(encoder, &[(&self.staging, wgpu::MapMode::Write, self.staging.size())]))?;
        connection.unstage(&self.staging, staged_bytes)
    }

    /// Zeroes codes and factors of runs of slots and returns once that is done.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(crate) fn zero_rows(&mut self, runs: &[(usize, Range<u32>)]) -> Result<(), EngineError> {
        const BLOCK: u32 = BLOCK_ROWS as u32;
        let mut encoder = self.connection.encoder();
        for (slab, slots) in runs {
            let slab = &self.slabs[*slab];
            if *slots == (0..slab.slots) {
                for buffer in slab.codes.iter().chain([&slab.factors]) {
                    encoder.clear_buffer(buffer, 0, None);
                }
                continue;
            }
            let mut first = slots.start;
            while first < slots.end {
                let end = slots.end.min((first / BLOCK + 1) * BLOCK);
                for (buffer, at, size) in slab.stretches(&(first..end)) {
                    encoder.clear_buffer(buffer, at, Some(size));
                }
                first = end;
            }
        }
        self.connection.wait(self.connection.submit(encoder, &[]))
    }

    /// The codes and factors of the row at a slot, as they lie on the device. For checks: slow.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub(crate) fn read_row(&mut self, slab: usize, slot: u32) -> Result<Vec<u8>, EngineError> {
        let connection = &self.connection;
        let mut encoder = connection.encoder();
        let mut size = 0;
        for (buffer, at, length) in self.slabs[slab].stretches(&(slot..slot + 1)) {
            encoder.copy_buffer_to_buffer(buffer, at, &self.readback, size, length);
            size += length;
        }
        connection.wait(connection.submit(encoder, &[(&self.readback, wgpu::MapMode::Read, size)]))?;
        connection.read(&self.readback, size, <[u8]>::to_vec)
    }
}
