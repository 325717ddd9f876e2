//! Where things are in the files of an index, written from index/FORMAT.md and not from the code: a
//! segment is a header page, a record of 128 bytes for each of 65,536 rows, then the rows.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::disk::files_under;
use super::server::Site;

const HEADER_BYTES: u64 = 4096;
const RECORD_BYTES: u64 = 128;
/// Where the first row of a segment begins.
pub(crate) const ROWS_AT: u64 = HEADER_BYTES + RECORD_BYTES * 65_536;

/// Where the record of a row begins.
pub(crate) fn record_at(row: u64) -> u64 {
    HEADER_BYTES + row * RECORD_BYTES
}

/// The only segment of a site's index.
pub(crate) fn only_segment(site: &Site) -> PathBuf {
    let mut segments = files_under(&site.data().join("index"));
    segments.retain(|path| std::fs::metadata(path).is_ok_and(|m| m.len() >= ROWS_AT));
    assert_eq!(segments.len(), 1, "{segments:?}");
    segments.remove(0)
}

/// The first live row of a segment from `from` on: bulk messages are prepared side by side, so which
/// person has which row is not fixed.
pub(crate) fn live_row(segment: &Path, from: u64) -> u64 {
    let file = File::open(segment).expect("the segment is there");
    let is_live = |row: &u64| {
        let mut state = [0; 4];
        file.read_exact_at(&mut state, record_at(*row) + 24).expect("the record is there");
        state == *b"LIVE"
    };
    (from..65_536).find(is_live).expect("most rows are live")
}

/// Flips the bits of `mask` in one byte of a file.
pub(crate) fn flip(path: &Path, at: u64, mask: u8) {
    let file = File::options().read(true).write(true).open(path).expect("the file is there");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("the byte is there");
    file.write_all_at(&[byte[0] ^ mask], at).expect("the byte is written");
}
