//! The one module that maps files, and the only one with unsafe code.
//!
//! A segment file is mapped read-only and written with `pwrite`, so a full disk is an error and
//! never a SIGBUS; the file has its full length before it is mapped, and never gets shorter.
//!
//! Why the slices are sound: Rust asks that bytes under a `&[u8]` do not change while it lives.
//! Every write to a mapped file goes through [`Pages`], and every slice comes from it:
//! - A reader's slice needs a `&Ticket`, and covers rows below `shown`, or the codes of blocks all
//!   of whose rows are below it, or of a record everything but the four bytes of its state word.
//! - [`Pages::write_fresh`] needs the `&mut Writer` and touches rows at or beyond `shown` only.
//! - [`Pages::write_fresh_codes`] needs the `&mut Writer` and touches codes only of blocks that
//!   have a row at or beyond `shown`.
//! - [`Pages::mark_gone`] needs the `&mut Writer` and touches state words only.
//! - [`Pages::scrub`], [`Pages::rewrite_codes`] and [`Pages::scrub_codes`] may touch every row and
//!   block, and need a `&mut Quiet`: no ticket is held then.
//! - [`Pages::wipe_block`] may touch every block, and needs the pages for itself alone: whoever has
//!   a slice borrows them.
//! - The writer's own slices borrow the `Writer`, and every write borrows it mutably.
//!
//! What remains is what no program can rule out alone: another process that writes to the files
//! or cuts them short. The folder's lock keeps honest ones away; the files have mode 0600.
//!
//! Knows bytes and places. Does not know subjects, manifests or which rows are live.

#![expect(unsafe_code, reason = "memory-mapped files are read through raw pointers here and nowhere else")]

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::slice;
use std::sync::atomic::{AtomicU32, Ordering};

use half::f16;
use memmap2::{Advice, MmapOptions, MmapRaw};

use crate::codes::{BLOCK_ROWS, Codes, OwnedCodes, one_bit_bytes};
use crate::error::Error;
use crate::format::{Layout, META_BYTES, MetaRecord, SOURCE_AT, STATE_AT, STATE_GONE, is_zero};
use crate::nouns::{RowMeta, SubjectNumber, TemplateId};
use crate::reader_barrier::{Quiet, Ticket, Writer};
use crate::storage::StoredFile;

/// A file's first bytes, mapped to read. Made by [`crate::storage::StoredFile::map`].
#[derive(Debug)]
pub struct Map(MmapRaw);

impl Map {
    /// # Errors
    /// What the system says; `UnexpectedEof` where the file is shorter than `len`.
    pub(crate) fn of(file: &File, len: usize) -> io::Result<Self> {
        // Bytes beyond the end of a file would be SIGBUS to touch.
        if file.metadata()?.len() < len as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self(MmapOptions::new().len(len).map_raw_read_only(file)?))
    }
}

/// The mapped pages of one segment file, with the file to write them through.
#[derive(Debug)]
pub(crate) struct Pages {
    file: Box<dyn StoredFile>,
    path: PathBuf,
    map: Map,
    layout: Layout,
    /// Rows below this may be under a reader's slice.
    shown: AtomicU32,
}

impl Pages {
    /// Maps `file`, which must have the length of `layout`.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be mapped.
    pub(crate) fn new(file: Box<dyn StoredFile>, path: &Path, layout: Layout) -> Result<Self, Error> {
        let map = file.map(layout.file_bytes()).map_err(Error::io(path, "map"))?;
        assert_eq!(map.0.len(), layout.file_bytes());
        // Rows start on 64-byte boundaries of the file, and so of the memory: maps start on pages.
        assert!((map.0.as_ptr() as usize + layout.row_at(0)).is_multiple_of(64));
        Ok(Self { file, path: path.to_owned(), map, layout, shown: AtomicU32::new(0) })
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// `count` bytes from byte `at` on. Private: the callers below hold the proofs.
    ///
    /// # Safety
    /// No byte of them may be written while the slice lives.
    unsafe fn bytes(&self, at: usize, count: usize) -> &[u8] {
        assert!(at.checked_add(count).is_some_and(|end| end <= self.map.0.len()));
        // SAFETY: the range is inside of the mapping, which lives as long as `self` and backs a
        // file that is at least that long; the caller keeps writers away.
        unsafe { slice::from_raw_parts(self.map.0.as_ptr().add(at), count) }
    }

    /// The first `count` rows. Shape: `[count, dim]`.
    pub(crate) fn rows<'t>(&'t self, count: u32, _reader: &'t Ticket) -> &'t [f16] {
        assert!(count <= self.shown.load(Ordering::Acquire));
        // SAFETY: rows below `shown` are written under a `Quiet` only, and a ticket is held.
        let bytes = unsafe { self.bytes(self.layout.row_at(0), count as usize * self.layout.row_bytes()) };
        bytemuck::cast_slice(bytes)
    }

    /// The codes of the whole blocks among the first `count` rows.
    pub(crate) fn codes<'t>(&'t self, count: u32, _reader: &'t Ticket) -> Codes<'t> {
        assert!(count <= self.shown.load(Ordering::Acquire));
        // SAFETY: codes of blocks with no row at or beyond `shown` are written under a `Quiet`
        // only, and a ticket is held.
        unsafe { self.code_slices(0, count / BLOCK_ROWS as u32) }
    }

    /// The codes of `count` blocks from `first` on. Private: the callers hold the proofs.
    ///
    /// # Safety
    /// No byte of them may be written while the slices live.
    unsafe fn code_slices(&self, first: u32, count: u32) -> Codes<'_> {
        assert!(first + count <= self.layout.blocks());
        // SAFETY: the caller keeps writers away from all five.
        let slice = |at: fn(Layout, u32) -> usize| unsafe {
            let start = at(self.layout, first);
            self.bytes(start, at(self.layout, first + count) - start)
        };
        Codes {
            one_bit: slice(Layout::one_bit_at),
            two_bit: slice(Layout::two_bit_at),
            four_bit: slice(Layout::four_bit_at),
            factors: bytemuck::cast_slice(slice(Layout::terms_at)),
            codebook: slice(Layout::codebook_at),
        }
    }

    /// One row. Shape: `[dim]`.
    pub(crate) fn row<'t>(&'t self, offset: u32, _reader: &'t Ticket) -> &'t [f16] {
        assert!(offset < self.shown.load(Ordering::Acquire));
        // SAFETY: rows below `shown` are written under a `Quiet` only, and a ticket is held.
        let bytes = unsafe { self.bytes(self.layout.row_at(offset), self.layout.row_bytes()) };
        bytemuck::cast_slice(bytes)
    }

    /// What a row that was found live says of itself.
    pub(crate) fn meta<'t>(&'t self, offset: u32, _reader: &'t Ticket) -> RowMeta<'t> {
        assert!(offset < self.shown.load(Ordering::Acquire));
        let at = self.layout.meta_at(offset);
        // The two slices leave out the state word between them: `mark_gone` may write it now.
        // SAFETY: but for that word, records below `shown` are written under a `Quiet` only, and
        // a ticket is held.
        let (ids, rest) =
            unsafe { (self.bytes(at, STATE_AT), self.bytes(at + STATE_AT + 4, META_BYTES - STATE_AT - 4)) };
        let label_len = usize::from(rest[1]);
        RowMeta {
            template: TemplateId(crate::format::u64_at(ids, 0)),
            subject: SubjectNumber(crate::format::u64_at(ids, 8)),
            hand: rest[0],
            label: std::str::from_utf8(&rest[4..4 + label_len])
                .expect("labels were checked when written and when opened"),
            source: crate::format::u64_at(rest, SOURCE_AT - STATE_AT - 4),
        }
    }

    /// Every record, shown or not, for the writer.
    pub(crate) fn records<'w>(&'w self, _writer: &'w Writer) -> &'w [MetaRecord] {
        // SAFETY: every write borrows the writer mutably.
        let bytes = unsafe { self.bytes(self.layout.meta_at(0), self.layout.capacity as usize * META_BYTES) };
        bytemuck::cast_slice(bytes)
    }

    /// The bytes of one row, shown or not, for the writer.
    pub(crate) fn row_bytes<'w>(&'w self, offset: u32, _writer: &'w Writer) -> &'w [u8] {
        assert!(offset < self.layout.capacity);
        // SAFETY: every write borrows the writer mutably.
        unsafe { self.bytes(self.layout.row_at(offset), self.layout.row_bytes()) }
    }

    /// The rows of a block, shown or not, for the writer. Shape: `[64, dim]`.
    pub(crate) fn block_rows<'w>(&'w self, block: u32, _writer: &'w Writer) -> &'w [f16] {
        assert!(block < self.layout.blocks());
        let at = self.layout.row_at(block * BLOCK_ROWS as u32);
        // SAFETY: every write borrows the writer mutably.
        bytemuck::cast_slice(unsafe { self.bytes(at, BLOCK_ROWS * self.layout.row_bytes()) })
    }

    /// The codes of a block, shown or not, written or not, for the writer.
    pub(crate) fn block_codes<'w>(&'w self, block: u32, _writer: &'w Writer) -> Codes<'w> {
        // SAFETY: every write borrows the writer mutably.
        unsafe { self.code_slices(block, 1) }
    }

    /// The checksum kept of a block's codes.
    pub(crate) fn block_sum(&self, block: u32, _writer: &Writer) -> u64 {
        assert!(block < self.layout.blocks());
        // SAFETY: every write borrows the writer mutably.
        crate::format::u64_at(unsafe { self.bytes(self.layout.sum_at(block), 8) }, 0)
    }

    /// Asks the system to read ahead, for a pass over the whole file.
    pub(crate) fn will_read(&self) {
        // Advice: where it is not taken, the pass is slower and no less right.
        let _ = self.map.0.advise(Advice::WillNeed);
    }

    /// Lets readers see the first `count` rows.
    pub(crate) fn show(&self, count: u32, _writer: &mut Writer) {
        assert!(count <= self.layout.capacity && count >= self.shown.load(Ordering::Acquire));
        self.shown.store(count, Ordering::Release);
    }

    /// Writes records and rows from `offset` on, none of them shown yet.
    ///
    /// # Errors
    /// [`Error::Io`]; part of it may be written then.
    pub(crate) fn write_fresh(
        &self,
        offset: u32,
        records: &[MetaRecord],
        rows: &[u8],
        _writer: &mut Writer,
    ) -> Result<(), Error> {
        assert!(offset >= self.shown.load(Ordering::Acquire));
        assert!(offset as usize + records.len() <= self.layout.capacity as usize);
        assert_eq!(rows.len(), records.len() * self.layout.row_bytes());
        self.write(rows, self.layout.row_at(offset))?;
        self.write(bytemuck::cast_slice(records), self.layout.meta_at(offset))
    }

    /// Writes the codes of a block, whose rows are not all shown yet, and their checksum.
    ///
    /// # Errors
    /// [`Error::Io`]; part of it may be written then.
    pub(crate) fn write_fresh_codes(
        &self,
        block: u32,
        codes: &OwnedCodes,
        sum: u64,
        _writer: &mut Writer,
    ) -> Result<(), Error> {
        assert!((block + 1) * BLOCK_ROWS as u32 > self.shown.load(Ordering::Acquire));
        self.write_codes(block, codes, sum)
    }

    /// Writes over the codes of a block and their checksum, shown or not.
    ///
    /// # Errors
    /// [`Error::Io`]; part of it may be done then.
    pub(crate) fn rewrite_codes(
        &self,
        block: u32,
        codes: &OwnedCodes,
        sum: u64,
        _quiet: &mut Quiet<'_>,
    ) -> Result<(), Error> {
        self.write_codes(block, codes, sum)
    }

    /// Overwrites with zeros the codes of a block and their checksum. What is zero already is not
    /// written, so that holes stay holes and this works on a full disk.
    ///
    /// # Errors
    /// [`Error::Io`]; part of it may be done then.
    pub(crate) fn scrub_codes(&self, block: u32, _quiet: &mut Quiet<'_>) -> Result<(), Error> {
        self.zero_codes(block)
    }

    /// Overwrites with zeros the rows of a block, their records and codes: of a segment that nobody
    /// else has. What is zero already is not written.
    ///
    /// # Errors
    /// [`Error::Io`]; part of it may be done then.
    pub(crate) fn wipe_block(&mut self, block: u32) -> Result<(), Error> {
        let (first, end) = (block * BLOCK_ROWS as u32, (block + 1) * BLOCK_ROWS as u32);
        self.zero(self.layout.row_at(first), self.layout.row_at(end))?;
        self.zero(self.layout.meta_at(first), self.layout.meta_at(end))?;
        self.zero_codes(block)
    }

    fn zero_codes(&self, block: u32) -> Result<(), Error> {
        assert!(block < self.layout.blocks());
        let areas = [
            Layout::one_bit_at,
            Layout::two_bit_at,
            Layout::four_bit_at,
            Layout::terms_at,
            Layout::codebook_at,
            Layout::sum_at,
        ];
        areas.into_iter().try_for_each(|at| self.zero(at(self.layout, block), at(self.layout, block + 1)))
    }

    /// Overwrites with zeros the bytes from `start` to `end`, unless they are. Private: the callers
    /// above hold the proofs that nobody has a slice of them.
    fn zero(&self, start: usize, end: usize) -> Result<(), Error> {
        // SAFETY: nothing is written before the slice is gone, since the caller is alone with it.
        if is_zero(unsafe { self.bytes(start, end - start) }) {
            return Ok(());
        }
        self.write(&vec![0; end - start], start)
    }

    fn write_codes(&self, block: u32, codes: &OwnedCodes, sum: u64) -> Result<(), Error> {
        assert!(block < self.layout.blocks());
        assert_eq!((codes.factors.len(), codes.one_bit.len()), (BLOCK_ROWS, one_bit_bytes(self.layout.dim)));
        self.write(&codes.one_bit, self.layout.one_bit_at(block))?;
        self.write(&codes.two_bit, self.layout.two_bit_at(block))?;
        self.write(&codes.four_bit, self.layout.four_bit_at(block))?;
        self.write(bytemuck::cast_slice(&codes.factors), self.layout.terms_at(block))?;
        self.write(&codes.codebook, self.layout.codebook_at(block))?;
        self.write(&sum.to_le_bytes(), self.layout.sum_at(block))
    }

    /// Says on disk that the row's erasure has begun. Changes nothing a reader looks at.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn mark_gone(&self, offset: u32, _writer: &mut Writer) -> Result<(), Error> {
        assert!(offset < self.layout.capacity);
        self.write(&STATE_GONE.to_le_bytes(), self.layout.meta_at(offset) + STATE_AT)
    }

    /// Overwrites a row and its record: `record` is all that is left.
    ///
    /// # Errors
    /// [`Error::Io`]; part of it may be done then.
    pub(crate) fn scrub(&self, offset: u32, record: &MetaRecord, _quiet: &mut Quiet<'_>) -> Result<(), Error> {
        assert!(offset < self.layout.capacity);
        self.write(bytemuck::bytes_of(record), self.layout.meta_at(offset))?;
        self.write(&vec![0; self.layout.row_bytes()], self.layout.row_at(offset))
    }

    /// Returns once what was written will survive a power cut.
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
