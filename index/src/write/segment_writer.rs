//! Writes rows into a segment's file.
//!
//! Knows how rows become records, bytes and codes, and which rows are valid. Does not know which rows
//! count.
//!
//! Invariant: writes only rows that are not shown.

use std::path::Path;

use bytemuck::Zeroable;

use super::encode::encode_blocks;
use crate::codes::BLOCK_ROWS;
use crate::error::Error;
use crate::format::{Layout, MetaRecord};
use crate::reader_barrier::WriteToken;
use crate::storage::{Segment, Storage, destroy};
use crate::types::{LABEL_BYTES_MAX, NewRow, OwnedRow, SUBJECT_NUMBER_MAX, TemplateId};

/// Bytes of rows written at once.
const BATCH_BYTES: usize = 1 << 18;

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

/// Buffers for rows, so that they are written in few calls.
pub(crate) struct RowBatch {
    layout: Layout,
    records: Vec<MetaRecord>,
    bytes: Vec<u8>,
}

impl RowBatch {
    pub(crate) fn new(layout: Layout) -> Self {
        Self { layout, records: Vec::new(), bytes: Vec::new() }
    }

    /// How many rows one call of [`RowBatch::write`] takes.
    pub(crate) fn rows_max(&self) -> usize {
        (BATCH_BYTES / self.layout.row_bytes()).max(1)
    }

    /// Writes `rows` from `offset`, and the codes of the blocks that they fill up.
    pub(crate) fn write(
        &mut self,
        segment: &Segment,
        offset: u32,
        rows: &[NewRow<'_>],
        token: &mut WriteToken,
    ) -> Result<(), Error> {
        assert!(rows.len() <= self.rows_max());
        self.records.clear();
        self.bytes.clear();
        for (offset, row) in (offset..).zip(rows) {
            self.records.push(MetaRecord::live(row, segment.identity, offset));
            self.bytes.extend_from_slice(bytemuck::cast_slice(row.vector));
        }
        segment.pages.write_fresh(offset, &self.records, &self.bytes, token)?;
        let blocks = offset / BLOCK_ROWS as u32..(offset + rows.len() as u32) / BLOCK_ROWS as u32;
        encode_blocks(&segment.pages, segment.identity, blocks, token)
    }
}

impl Drop for RowBatch {
    fn drop(&mut self) {
        // No templates stay in freed memory.
        self.records.fill(MetaRecord::zeroed());
        self.bytes.clear();
        self.bytes.resize(self.bytes.capacity(), 0);
    }
}

/// Creates, writes and syncs the file of a segment with `rows`, whose templates ascend and are in `range`.
/// The file's name is not synced. If a row is invalid, the file is removed again.
///
/// # Errors
/// [`Error::Order`], [`Error::TemplateRange`], [`Error::RowLimit`], [`Error::Dim`],
/// [`Error::Label`], [`Error::SubjectRange`], [`Error::Io`].
pub(crate) fn write_segment(
    storage: &dyn Storage,
    dir: &Path,
    file: u32,
    layout: Layout,
    token: &mut WriteToken,
    range: (TemplateId, TemplateId),
    rows: impl Iterator<Item = OwnedRow>,
) -> Result<(Segment, u32), Error> {
    let segment = Segment::create(storage, dir, file, layout)?;
    match write_rows(&segment, layout, token, range, rows) {
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

fn write_rows(
    segment: &Segment,
    layout: Layout,
    token: &mut WriteToken,
    (first, last): (TemplateId, TemplateId),
    mut rows: impl Iterator<Item = OwnedRow>,
) -> Result<u32, Error> {
    let mut batch = RowBatch::new(layout);
    let (mut count, mut after) = (0u32, None);
    loop {
        let some: Vec<OwnedRow> = rows.by_ref().take(batch.rows_max()).collect();
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
        batch.write(segment, count, &news, token)?;
        count += news.len() as u32;
    }
}
