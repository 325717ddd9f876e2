//! The manifest: which segments exist, how many rows of each count, and the LSN up to which the index
//! is complete.
//!
//! It is replaced as a whole (written under another name, synced, renamed), so a reader of the folder
//! finds the old one or the new one.
//!
//! Invariant: in every version, the checksum at the end covers every byte before it.

use std::collections::BTreeMap;
use std::path::Path;

use bytemuck::{Pod, Zeroable};
use xxhash_rust::xxh3::xxh3_64;

use super::{Layout, VERSION};
use crate::bytes::u64_at;
use crate::error::Error;
use crate::types::{GalleryId, Geometry, KeyId, Lsn, Origin};

/// Longer manifests are refused. Ten million rows need less than 6 KiB, plus four bytes for each row
/// that is forgotten and not yet erased.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 1 << 28;

const MANIFEST_MAGIC: [u8; 8] = *b"THNRMANI";

#[derive(Copy, Clone, Pod, Zeroable)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    version: u32,
    dim: u32,
    segment_rows: u32,
    next_file: u32,
    lsn: u64,
    key: [u8; 16],
    gallery: [u8; 16],
    segments: u32,
    forgotten: u32,
    reserved: u64,
}

/// The manifest's entry for one segment.
#[derive(Copy, Clone, Pod, Zeroable, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct SegmentEntry {
    /// Identifies the contents. The header of the file has the same number.
    pub(crate) identity: u64,
    /// The smallest template number that belongs here.
    pub(crate) first_template: u64,
    /// The largest template number that belongs here.
    pub(crate) last_template: u64,
    /// Number in the file's name.
    pub(crate) file: u32,
    /// Number of rows that count.
    pub(crate) rows: u32,
    /// Determines its row numbers.
    pub(crate) slot: u32,
    pub(crate) reserved: u32,
}

const HEAD_BYTES: usize = size_of::<Head>();
const ENTRY_BYTES: usize = size_of::<SegmentEntry>();
const _: () = assert!(HEAD_BYTES == 80 && ENTRY_BYTES == 40);

/// The manifest of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) geometry: Geometry,
    pub(crate) origin: Origin,
    pub(crate) lsn: Lsn,
    /// Number of the next segment file.
    pub(crate) next_file: u32,
    /// Segments in the order of their templates.
    pub(crate) segments: Vec<SegmentEntry>,
    /// Rows that are forgotten and not yet erased, ascending.
    pub(crate) forgotten: Vec<u32>,
}

impl Manifest {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let head = Head {
            magic: MANIFEST_MAGIC,
            version: VERSION,
            dim: u32::try_from(self.geometry.dim).expect("dim was checked against DIM_MAX"),
            segment_rows: self.geometry.segment_rows,
            next_file: self.next_file,
            lsn: self.lsn.0,
            key: self.origin.key.0,
            gallery: self.origin.gallery.0,
            segments: u32::try_from(self.segments.len()).expect("row numbers limit the number of segments"),
            forgotten: u32::try_from(self.forgotten.len()).expect("rows are numbered in 32 bits"),
            reserved: 0,
        };
        let mut bytes = bytemuck::bytes_of(&head).to_vec();
        bytes.extend_from_slice(bytemuck::cast_slice(&self.segments));
        bytes.extend_from_slice(bytemuck::cast_slice(&self.forgotten));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let checksum = xxh3_64(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        assert!(bytes.len() as u64 <= MANIFEST_BYTES_MAX);
        bytes
    }

    /// # Errors
    /// [`Error::ManifestCorrupt`] if a byte is wrong, [`Error::Version`] if the manifest is whole and of
    /// another version.
    pub(crate) fn decode(bytes: &[u8], path: &Path) -> Result<Self, Error> {
        let corrupt = |offset: usize, expected: u64, found: u64| Error::ManifestCorrupt {
            path: path.to_owned(),
            offset: offset as u64,
            expected,
            found,
        };
        let len = bytes.len();
        if len < HEAD_BYTES + 8 {
            return Err(corrupt(len, (HEAD_BYTES + 8) as u64, len as u64));
        }
        let checksum_at = len - 8;
        let (expected, found) = (xxh3_64(&bytes[..checksum_at]), u64_at(bytes, checksum_at));
        if expected != found {
            return Err(corrupt(checksum_at, expected, found));
        }
        let head: Head = bytemuck::pod_read_unaligned(&bytes[..HEAD_BYTES]);
        if head.magic != MANIFEST_MAGIC {
            return Err(corrupt(0, u64::from_le_bytes(MANIFEST_MAGIC), u64::from_le_bytes(head.magic)));
        }
        if head.version != VERSION {
            return Err(Error::Version { path: path.to_owned(), found: head.version, supported: VERSION });
        }
        // The checksum is correct, so only a faulty writer can have caused what is refused from here on.
        let forgotten_at = HEAD_BYTES + head.segments as usize * ENTRY_BYTES;
        let whole = (forgotten_at + head.forgotten as usize * 4).next_multiple_of(8) + 8;
        if whole != len {
            return Err(corrupt(len, whole as u64, len as u64));
        }
        let geometry = Geometry { dim: head.dim as usize, segment_rows: head.segment_rows };
        if !geometry.is_valid() {
            return Err(corrupt(12, 32, u64::from(head.dim)));
        }
        let segments: Vec<SegmentEntry> =
            bytes[HEAD_BYTES..forgotten_at].chunks_exact(ENTRY_BYTES).map(bytemuck::pod_read_unaligned).collect();
        let forgotten: Vec<u32> = bytes[forgotten_at..forgotten_at + head.forgotten as usize * 4]
            .chunks_exact(4)
            .map(bytemuck::pod_read_unaligned)
            .collect();
        let mut rows_by_slot: BTreeMap<u32, u32> = BTreeMap::new();
        for (place, entry) in segments.iter().enumerate() {
            let at = HEAD_BYTES + place * ENTRY_BYTES;
            let slots = geometry.slot_count();
            if entry.slot >= slots || rows_by_slot.insert(entry.slot, entry.rows).is_some() {
                return Err(corrupt(at + 32, u64::from(slots), u64::from(entry.slot)));
            }
            if entry.reserved != 0 {
                return Err(corrupt(at + 36, 0, u64::from(entry.reserved)));
            }
            if entry.rows > geometry.segment_rows {
                return Err(corrupt(at + 28, u64::from(geometry.segment_rows), u64::from(entry.rows)));
            }
            if entry.file >= head.next_file {
                return Err(corrupt(at + 24, u64::from(head.next_file), u64::from(entry.file)));
            }
            if segments[..place].last().is_some_and(|before| before.last_template >= entry.first_template) {
                let least = segments[place - 1].last_template.saturating_add(1);
                return Err(corrupt(at + 8, least, entry.first_template));
            }
            if entry.last_template < entry.first_template {
                return Err(corrupt(at + 16, entry.first_template, entry.last_template));
            }
        }
        let counted = |row: u32| {
            rows_by_slot.get(&(row / geometry.segment_rows)).is_some_and(|&rows| row % geometry.segment_rows < rows)
        };
        if let Some(place) = forgotten.iter().position(|&row| !counted(row)) {
            return Err(corrupt(forgotten_at + place * 4, 0, u64::from(forgotten[place])));
        }
        if let Some(place) = forgotten.windows(2).position(|pair| pair[0] >= pair[1]) {
            let (before, found) = (forgotten[place], forgotten[place + 1]);
            return Err(corrupt(forgotten_at + (place + 1) * 4, u64::from(before) + 1, u64::from(found)));
        }
        let origin = Origin { gallery: GalleryId(head.gallery), key: KeyId(head.key) };
        Ok(Self { geometry, origin, lsn: Lsn(head.lsn), next_file: head.next_file, segments, forgotten })
    }

    /// The layout of the segments.
    pub(crate) fn layout(&self) -> Layout {
        Layout::of(self.geometry)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn manifest() -> Manifest {
        let entry = |file, rows| SegmentEntry {
            identity: 77 + u64::from(file),
            first_template: u64::from(file) * 1000 + 1,
            last_template: u64::from(file) * 1000 + 900,
            file,
            rows,
            slot: 10 - file,
            reserved: 0,
        };
        Manifest {
            geometry: Geometry { dim: 64, segment_rows: 128 },
            origin: Origin { gallery: GalleryId([4; 16]), key: KeyId([3; 16]) },
            lsn: Lsn(5),
            next_file: 9,
            // In the slots 8 and 2.
            segments: vec![entry(2, 128), entry(8, 100)],
            forgotten: vec![2 * 128, 2 * 128 + 99, 8 * 128 + 127],
        }
    }

    #[test]
    fn a_manifest_reads_as_it_was_written() {
        assert_eq!(Manifest::decode(&manifest().encode(), Path::new("m")).unwrap(), manifest());
    }

    #[test]
    fn a_manifest_of_another_version_is_refused_as_such() {
        for version in [0, VERSION - 1, VERSION + 1] {
            let mut other = manifest().encode();
            other[8..12].copy_from_slice(&version.to_le_bytes());
            let checksum_at = other.len() - 8;
            let sum = xxh3_64(&other[..checksum_at]);
            other[checksum_at..].copy_from_slice(&sum.to_le_bytes());
            assert!(
                matches!(Manifest::decode(&other, Path::new("m")), Err(Error::Version { found, .. }) if found == version)
            );
        }
    }

    /// The offset at which the decoder refuses a manifest of a faulty writer, whose checksum is correct.
    fn refused(change: impl FnOnce(&mut Manifest)) -> u64 {
        let mut faulty = manifest();
        change(&mut faulty);
        match Manifest::decode(&faulty.encode(), Path::new("m")) {
            Err(Error::ManifestCorrupt { offset, .. }) => offset,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_impossible_manifest_with_a_correct_checksum_is_refused() {
        assert_eq!(refused(|m| m.segments[1].rows = 129), 80 + 40 + 28);
        assert_eq!(refused(|m| m.segments[1].file = 9), 80 + 40 + 24);
        assert_eq!(refused(|m| m.segments[1].slot = 8), 80 + 40 + 32);
        assert_eq!(refused(|m| m.segments[1].slot = u32::MAX / 128), 80 + 40 + 32);
        assert_eq!(refused(|m| m.segments[1].reserved = 1), 80 + 40 + 36);
        assert_eq!(refused(|m| m.forgotten[1] = 2 * 128 + 100), 80 + 2 * 40 + 4);
        assert_eq!(refused(|m| m.forgotten[2] = 9 * 128), 80 + 2 * 40 + 8);
        assert_eq!(refused(|m| m.forgotten[0] = 0), 80 + 2 * 40);
        assert_eq!(refused(|m| m.forgotten[1] = 2 * 128), 80 + 2 * 40 + 4);
        assert_eq!(refused(|m| m.forgotten.swap(0, 1)), 80 + 2 * 40 + 4);
        assert_eq!(refused(|m| m.segments[1].first_template = 2900), 80 + 40 + 8);
        assert_eq!(refused(|m| m.segments[1].last_template = 8000), 80 + 40 + 16);
        assert_eq!(refused(|m| m.geometry.dim = 65), 12);
        assert_eq!(refused(|m| m.geometry.segment_rows = 0), 12);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..400), magic: bool, sum: bool) {
            if magic && bytes.len() >= HEAD_BYTES + 8 {
                bytes[..HEAD_BYTES].copy_from_slice(&manifest().encode()[..HEAD_BYTES]);
                bytes[64] %= 12;
            }
            if sum && bytes.len() >= 8 {
                let end = bytes.len() - 8;
                let checksum = xxh3_64(&bytes[..end]);
                bytes[end..].copy_from_slice(&checksum.to_le_bytes());
            }
            if let Ok(decoded) = Manifest::decode(&bytes, Path::new("m")) {
                prop_assert!(decoded.segments.len() * ENTRY_BYTES + HEAD_BYTES < bytes.len());
            }
        }
    }
}
