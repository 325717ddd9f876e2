//! Rows on their way into a segment's file.
//!
//! Knows how rows become records, bytes and codes, and what a row must be to be taken. Does not know
//! which rows count.
//!
//! Invariant: nothing here writes to a row that was shown.

use std::path::Path;

use bytemuck::Zeroable;

use crate::codes::BLOCK_ROWS;
use crate::coding::code_blocks;
use crate::error::Error;
use crate::format::{Layout, MetaRecord};
use crate::nouns::{LABEL_BYTES_MAX, NewRow, OwnedRow, SUBJECT_NUMBER_MAX, TemplateId};
use crate::reader_barrier::Writer;
use crate::segment::{Segment, destroy};
use crate::storage::Storage;

/// Bytes of rows written at once.
const PIECE_BYTES: usize = 1 << 18;

/// # Errors
/// [`Error::Dim`], [`Error::Label`], [`Error::SubjectRange`].
pub(crate) fn check_new(row: &NewRow<'_>, dim: usize) -> Result<(), Error> {
    if row.vector.len() != dim {
        return Err(Error::Dim { template: row.template, expected: dim, found: row.vector.len() });
    }
    if row.label.len() > LABEL_BYTES_MAX {
        return Err(Error::Label { template: row.template, found: row.label.len(), limit: LABEL_BYTES_MAX });
    }
    if row.subject.0 > SUBJECT_NUMBER_MAX {
        return Err(Error::SubjectRange { subject: row.subject, limit: SUBJECT_NUMBER_MAX });
    }
    Ok(())
}

/// Rows on their way to a file, gathered so that they are written in few calls.
pub(crate) struct Piece {
    layout: Layout,
    records: Vec<MetaRecord>,
    bytes: Vec<u8>,
}

impl Piece {
    pub(crate) fn new(layout: Layout) -> Self {
        Self { layout, records: Vec::new(), bytes: Vec::new() }
    }

    /// Rows it takes at once.
    pub(crate) fn rows_max(&self) -> usize {
        (PIECE_BYTES / self.layout.row_bytes()).max(1)
    }

    /// Writes `rows` from `offset` on, and the codes of the blocks that are full with them.
    pub(crate) fn write(
        &mut self,
        segment: &Segment,
        offset: u32,
        rows: &[NewRow<'_>],
        writer: &mut Writer,
    ) -> Result<(), Error> {
        assert!(rows.len() <= self.rows_max());
        self.records.clear();
        self.bytes.clear();
        for (offset, row) in (offset..).zip(rows) {
            self.records.push(MetaRecord::live(row, segment.identity, offset));
            self.bytes.extend_from_slice(bytemuck::cast_slice(row.vector));
        }
        segment.pages.write_fresh(offset, &self.records, &self.bytes, writer)?;
        let blocks = offset / BLOCK_ROWS as u32..(offset + rows.len() as u32) / BLOCK_ROWS as u32;
        code_blocks(&segment.pages, segment.identity, blocks, writer)
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // Templates do not linger in freed memory.
        self.records.fill(MetaRecord::zeroed());
        self.bytes.clear();
        self.bytes.resize(self.bytes.capacity(), 0);
    }
}

/// Writes and syncs the file of a segment with `rows` in it, their templates ascending and inside
/// of `range`. The name is not synced. Where the rows do not fit the file is removed again.
///
/// # Errors
/// [`Error::Order`], [`Error::TemplateRange`], [`Error::RowLimit`], [`Error::Dim`],
/// [`Error::Label`], [`Error::SubjectRange`], [`Error::Io`].
pub(crate) fn write_segment(
    storage: &dyn Storage,
    dir: &Path,
    file: u32,
    layout: Layout,
    writer: &mut Writer,
    range: (TemplateId, TemplateId),
    rows: impl Iterator<Item = OwnedRow>,
) -> Result<(Segment, u32), Error> {
    let segment = Segment::create(storage, dir, file, layout)?;
    match fill_segment(&segment, layout, writer, range, rows) {
        Ok(count) => {
            segment.pages.sync()?;
            Ok((segment, count))
        }
        Err(error) => {
            let path = segment.path.clone();
            drop(segment);
            if !matches!(error, Error::Io { .. }) {
                destroy(storage, &path)?;
            }
            Err(error)
        }
    }
}

fn fill_segment(
    segment: &Segment,
    layout: Layout,
    writer: &mut Writer,
    (first, last): (TemplateId, TemplateId),
    mut rows: impl Iterator<Item = OwnedRow>,
) -> Result<u32, Error> {
    let mut piece = Piece::new(layout);
    let (mut count, mut after) = (0u32, None);
    loop {
        let some: Vec<OwnedRow> = rows.by_ref().take(piece.rows_max()).collect();
        if some.is_empty() {
            return Ok(count);
        }
        if count as usize + some.len() > layout.capacity as usize {
            return Err(Error::RowLimit {
                found: u64::from(count) + some.len() as u64,
                limit: u64::from(layout.capacity),
            });
        }
        let news: Vec<NewRow<'_>> = some.iter().map(OwnedRow::as_new).collect();
        for row in &news {
            check_new(row, layout.dim)?;
            if row.template < first || row.template > last {
                return Err(Error::TemplateRange { template: row.template, first, last });
            }
            if let Some(after) = after.filter(|&after| after >= row.template) {
                return Err(Error::Order { template: row.template, after });
            }
            after = Some(row.template);
        }
        piece.write(segment, count, &news, writer)?;
        count += news.len() as u32;
    }
}
