//! The mapped pages of a segment file. The only module with unsafe code.
//!
//! A segment file is mapped read-only and written with `pwrite`, so that a full disk is an error and not
//! a SIGBUS. The file has its full length before it is mapped, and never gets shorter.
//!
//! Why the slices are sound: Rust requires that the bytes under a `&[u8]` do not change while it lives.
//! Every write to a mapped file goes through [`Pages`], and every slice comes from it:
//! - A reader's slice needs a `&Ticket`. It covers rows below `shown`, or the codes of blocks all of whose
//!   rows are below it, or a record without the four bytes of its state.
//! - [`Pages::write_fresh`] needs the `&mut WriteToken` and writes only rows at or beyond `shown`.
//! - [`Pages::write_fresh_codes`] needs the `&mut WriteToken` and writes only codes of blocks that have a
//!   row at or beyond `shown`.
//! - [`Pages::mark_gone`] needs the `&mut WriteToken` and writes only states.
//! - [`Pages::scrub`], [`Pages::rewrite_codes`] and [`Pages::scrub_codes`] may write every row and block,
//!   and need an `&mut Exclusive`, during which no ticket is held.
//! - [`Pages::zero_block`] may write every block, and needs `&mut self`: every slice borrows the pages.
//! - The writer's own slices borrow the `WriteToken`, and every write borrows it mutably.
//!
//! What no program can prevent alone is another process that writes to the files or truncates them.
//! The folder's lock keeps honest processes away; the files have mode 0600.
//!
//! Knows bytes and offsets. Does not know subjects, manifests or which rows are live.

#![expect(unsafe_code, reason = "memory-mapped files are read through raw pointers here and nowhere else")]

use std::path::{Path, PathBuf};
use std::slice;
use std::sync::atomic::{AtomicU32, Ordering};

use half::f16;

use super::{Map, StoredFile};
use crate::bytes::{is_zero, u64_at};
use crate::codes::{BLOCK_ROWS, Codes, OwnedCodes, one_bit_bytes};
use crate::error::Error;
use crate::format::{Layout, META_BYTES, MetaRecord, SOURCE_AT, STATE_AT, STATE_GONE};
use crate::reader_barrier::{Exclusive, Ticket, WriteToken};
use crate::types::{RowMeta, SubjectNumber, TemplateId};

/// The mapped pages of one segment file, and the file through which they are written.
#[derive(Debug)]
pub(crate) struct Pages {
    file: Box<dyn StoredFile>,
    path: PathBuf,
    map: Map,
    layout: Layout,
    /// Readers may have slices of rows below this.
    shown: AtomicU32,
}

impl Pages {
    /// Maps `file`, which must have the length of `layout`.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be mapped.
    pub(crate) fn new(file: Box<dyn StoredFile>, path: &Path, layout: Layout) -> Result<Self, Error> {
        let map = file.map(layout.file_bytes()).map_err(Error::io(path, "map"))?;
        assert_eq!(map.len(), layout.file_bytes());
        // Rows start on 64-byte boundaries of the file, and so of memory, because maps start on pages.
        assert!((map.as_ptr() as usize + layout.row_at(0)).is_multiple_of(64));
        Ok(Self { file, path: path.to_owned(), map, layout, shown: AtomicU32::new(0) })
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// `count` bytes from offset `at`. Private: the callers below have the proofs.
    ///
    /// # Safety
    /// None of these bytes may be written while the slice lives.
    unsafe fn bytes(&self, at: usize, count: usize) -> &[u8] {
        assert!(at.checked_add(count).is_some_and(|end| end <= self.map.len()));
        // SAFETY: the range is inside the mapping, which lives as long as `self` and whose file is at
        // least that long; the caller guarantees that nothing writes to it.
        unsafe { slice::from_raw_parts(self.map.as_ptr().add(at), count) }
    }

    /// The first `count` rows. Shape: `[count, dim]`.
    pub(crate) fn rows<'t>(&'t self, count: u32, _ticket: &'t Ticket) -> &'t [f16] {
        assert!(count <= self.shown.load(Ordering::Acquire));
        // SAFETY: rows below `shown` are written only under an `Exclusive`, and a ticket is held.
        let bytes = unsafe { self.bytes(self.layout.row_at(0), count as usize * self.layout.row_bytes()) };
        bytemuck::cast_slice(bytes)
    }

    /// The codes of the whole blocks among the first `count` rows.
    pub(crate) fn codes<'t>(&'t self, count: u32, _ticket: &'t Ticket) -> Codes<'t> {
        assert!(count <= self.shown.load(Ordering::Acquire));
        // SAFETY: codes of blocks without a row at or beyond `shown` are written only under an
        // `Exclusive`, and a ticket is held.
        unsafe { self.code_slices(0, count / BLOCK_ROWS as u32) }
    }

    /// The codes of `count` blocks from `first`. Private: the callers have the proofs.
    ///
    /// # Safety
    /// None of these bytes may be written while the slices live.
    unsafe fn code_slices(&self, first: u32, count: u32) -> Codes<'_> {
        assert!(first + count <= self.layout.block_count());
        // SAFETY: the caller guarantees that nothing writes to any of the five.
        let slice = |at: fn(Layout, u32) -> usize| unsafe {
            let start = at(self.layout, first);
            self.bytes(start, at(self.layout, first + count) - start)
        };
        Codes {
            one_bit: slice(Layout::one_bit_at),
            two_bit: slice(Layout::two_bit_at),
            four_bit: slice(Layout::four_bit_at),
            factors: bytemuck::cast_slice(slice(Layout::factors_at)),
            codebook: slice(Layout::codebook_at),
        }
    }

    /// One row. Shape: `[dim]`.
    pub(crate) fn row<'t>(&'t self, offset: u32, _ticket: &'t Ticket) -> &'t [f16] {
        assert!(offset < self.shown.load(Ordering::Acquire));
        // SAFETY: rows below `shown` are written only under an `Exclusive`, and a ticket is held.
        let bytes = unsafe { self.bytes(self.layout.row_at(offset), self.layout.row_bytes()) };
        bytemuck::cast_slice(bytes)
    }

    /// The metadata of a row that was found live.
    pub(crate) fn meta<'t>(&'t self, offset: u32, _ticket: &'t Ticket) -> RowMeta<'t> {
        assert!(offset < self.shown.load(Ordering::Acquire));
        let at = self.layout.meta_at(offset);
        // The two slices leave out the state between them: `mark_gone` may write it at any time.
        // SAFETY: except for the state, records below `shown` are written only under an `Exclusive`,
        // and a ticket is held.
        let (ids, rest) =
            unsafe { (self.bytes(at, STATE_AT), self.bytes(at + STATE_AT + 4, META_BYTES - STATE_AT - 4)) };
        let label_len = usize::from(rest[1]);
        RowMeta {
            template: TemplateId(u64_at(ids, 0)),
            subject: SubjectNumber(u64_at(ids, 8)),
            hand: rest[0],
            label: std::str::from_utf8(&rest[4..4 + label_len])
                .expect("labels are checked before they are written and when a segment is opened"),
            source: u64_at(rest, SOURCE_AT - STATE_AT - 4),
        }
    }

    /// Every record, shown or not. For the writer.
    pub(crate) fn records<'w>(&'w self, _token: &'w WriteToken) -> &'w [MetaRecord] {
        // SAFETY: every write borrows the token mutably.
        let bytes = unsafe { self.bytes(self.layout.meta_at(0), self.layout.capacity as usize * META_BYTES) };
        bytemuck::cast_slice(bytes)
    }

    /// The bytes of one row, shown or not. For the writer.
    pub(crate) fn row_bytes<'w>(&'w self, offset: u32, _token: &'w WriteToken) -> &'w [u8] {
        assert!(offset < self.layout.capacity);
        // SAFETY: every write borrows the token mutably.
        unsafe { self.bytes(self.layout.row_at(offset), self.layout.row_bytes()) }
    }

    /// The rows of a block, shown or not. For the writer. Shape: `[64, dim]`.
    pub(crate) fn block_rows<'w>(&'w self, block: u32, _token: &'w WriteToken) -> &'w [f16] {
        assert!(block < self.layout.block_count());
        let at = self.layout.row_at(block * BLOCK_ROWS as u32);
        // SAFETY: every write borrows the token mutably.
        bytemuck::cast_slice(unsafe { self.bytes(at, BLOCK_ROWS * self.layout.row_bytes()) })
    }

    /// The codes of a block, shown or not, written or not. For the writer.
    pub(crate) fn block_codes<'w>(&'w self, block: u32, _token: &'w WriteToken) -> Codes<'w> {
        // SAFETY: every write borrows the token mutably.
        unsafe { self.code_slices(block, 1) }
    }

    /// The stored checksum of a block's codes.
    pub(crate) fn block_checksum(&self, block: u32, _token: &WriteToken) -> u64 {
        assert!(block < self.layout.block_count());
        // SAFETY: every write borrows the token mutably.
        u64_at(unsafe { self.bytes(self.layout.checksum_at(block), 8) }, 0)
    }

    /// Asks the system to read ahead, before a pass over the whole file.
    pub(crate) fn will_read(&self) {
        self.map.will_read();
    }

    /// Makes the first `count` rows visible to readers.
    pub(crate) fn show(&self, count: u32, _token: &mut WriteToken) {
        assert!(count <= self.layout.capacity && count >= self.shown.load(Ordering::Acquire));
        self.shown.store(count, Ordering::Release);
    }

    /// Writes records and rows from `offset`, none of which is shown yet.
    ///
    /// # Errors
    /// [`Error::Io`]. Part of it may be written.
    pub(crate) fn write_fresh(
        &self,
        offset: u32,
        records: &[MetaRecord],
        rows: &[u8],
        _token: &mut WriteToken,
    ) -> Result<(), Error> {
        assert!(offset >= self.shown.load(Ordering::Acquire));
        assert!(offset as usize + records.len() <= self.layout.capacity as usize);
        assert_eq!(rows.len(), records.len() * self.layout.row_bytes());
        self.write(rows, self.layout.row_at(offset))?;
        self.write(bytemuck::cast_slice(records), self.layout.meta_at(offset))
    }

    /// Writes the codes of a block and their checksum. Not all rows of the block may be shown.
    ///
    /// # Errors
    /// [`Error::Io`]. Part of it may be written.
    pub(crate) fn write_fresh_codes(
        &self,
        block: u32,
        codes: &OwnedCodes,
        sum: u64,
        _token: &mut WriteToken,
    ) -> Result<(), Error> {
        assert!((block + 1) * BLOCK_ROWS as u32 > self.shown.load(Ordering::Acquire));
        self.write_codes(block, codes, sum)
    }

    /// Overwrites the codes of a block and their checksum, shown or not.
    ///
    /// # Errors
    /// [`Error::Io`]. Part of it may be written.
    pub(crate) fn rewrite_codes(
        &self,
        block: u32,
        codes: &OwnedCodes,
        sum: u64,
        _exclusive: &mut Exclusive<'_>,
    ) -> Result<(), Error> {
        self.write_codes(block, codes, sum)
    }

    /// Overwrites the codes of a block and their checksum with zeros. What is already zero is not
    /// written, so that holes stay holes and this works on a full disk.
    ///
    /// # Errors
    /// [`Error::Io`]. Part of it may be written.
    pub(crate) fn scrub_codes(&self, block: u32, _exclusive: &mut Exclusive<'_>) -> Result<(), Error> {
        self.zero_codes(block)
    }

    /// Overwrites the rows of a block, their records and codes with zeros, in a segment that nothing else
    /// refers to. What is already zero is not written.
    ///
    /// # Errors
    /// [`Error::Io`]. Part of it may be written.
    pub(crate) fn zero_block(&mut self, block: u32) -> Result<(), Error> {
        let (first, end) = (block * BLOCK_ROWS as u32, (block + 1) * BLOCK_ROWS as u32);
        self.zero(self.layout.row_at(first), self.layout.row_at(end))?;
        self.zero(self.layout.meta_at(first), self.layout.meta_at(end))?;
        self.zero_codes(block)
    }

    fn zero_codes(&self, block: u32) -> Result<(), Error> {
        assert!(block < self.layout.block_count());
        let areas = [
            Layout::one_bit_at,
            Layout::two_bit_at,
            Layout::four_bit_at,
            Layout::factors_at,
            Layout::codebook_at,
            Layout::checksum_at,
        ];
        areas.into_iter().try_for_each(|at| self.zero(at(self.layout, block), at(self.layout, block + 1)))
    }

    /// Overwrites the bytes from `start` to `end` with zeros, unless they are zero. Private: the callers
    /// above have the proofs that there is no other slice of them.
    fn zero(&self, start: usize, end: usize) -> Result<(), Error> {
        // SAFETY: the slice ends before anything is written, and the callers exclude all other writes.
        if is_zero(unsafe { self.bytes(start, end - start) }) {
            return Ok(());
        }
        self.write(&vec![0; end - start], start)
    }

    fn write_codes(&self, block: u32, codes: &OwnedCodes, sum: u64) -> Result<(), Error> {
        assert!(block < self.layout.block_count());
        assert_eq!((codes.factors.len(), codes.one_bit.len()), (BLOCK_ROWS, one_bit_bytes(self.layout.dim)));
        self.write(&codes.one_bit, self.layout.one_bit_at(block))?;
        self.write(&codes.two_bit, self.layout.two_bit_at(block))?;
        self.write(&codes.four_bit, self.layout.four_bit_at(block))?;
        self.write(bytemuck::cast_slice(&codes.factors), self.layout.factors_at(block))?;
        self.write(&codes.codebook, self.layout.codebook_at(block))?;
        self.write(&sum.to_le_bytes(), self.layout.checksum_at(block))
    }

    /// Records on disk that the row's erasure has begun. Changes no byte that a reader looks at.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn mark_gone(&self, offset: u32, _token: &mut WriteToken) -> Result<(), Error> {
        assert!(offset < self.layout.capacity);
        self.write(&STATE_GONE.to_le_bytes(), self.layout.meta_at(offset) + STATE_AT)
    }

    /// Overwrites a row with zeros, and its record with `record`.
    ///
    /// # Errors
    /// [`Error::Io`]. Part of it may be written.
    pub(crate) fn scrub(&self, offset: u32, record: &MetaRecord, _exclusive: &mut Exclusive<'_>) -> Result<(), Error> {
        assert!(offset < self.layout.capacity);
        self.write(bytemuck::bytes_of(record), self.layout.meta_at(offset))?;
        self.write(&vec![0; self.layout.row_bytes()], self.layout.row_at(offset))
    }

    /// Returns once everything written before will survive a power cut.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn sync(&self) -> Result<(), Error> {
        self.file.sync().map_err(Error::io(&self.path, "sync"))
    }

    fn write(&self, bytes: &[u8], at: usize) -> Result<(), Error> {
        assert!(at + bytes.len() <= self.layout.file_bytes());
        self.file.write_at(bytes, at as u64).map_err(Error::io(&self.path, "write"))
    }
}
