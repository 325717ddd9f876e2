//! Rows for tests: cheap, different for every template, and recognisable.

use half::f16;
use thenar_index::{GalleryId, Geometry, KeyId, NewRow, Origin, OwnedRow, SubjectNumber, TemplateId};

/// The gallery and the key of the tests' indexes.
pub(crate) const KEY: Origin = Origin { gallery: GalleryId(*b"name of a galler"), key: KeyId(*b"fingerprint of k") };
/// Small segments, so that tests reach their ends.
pub(crate) const SMALL: Geometry = Geometry { dim: 32, segment_rows: 64 };

/// SplitMix64 (Steele, Lea, Flood, 2014): a seed in, a stream of numbers out.
#[derive(Debug, Clone)]
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to `end - 1`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.roll() % end
    }
}

/// The vector of a template: no component is zero, and no 16 bytes of it are another template's.
pub(crate) fn vector(template: u64, dim: usize) -> Vec<f16> {
    let mut dice = Dice(template ^ 0x7e5a);
    (0..dim).map(|_| f16::from_bits((dice.roll() as u16 & 0xbbff) | 1)).collect()
}

/// The row of a template.
pub(crate) fn row(template: u64, subject: u64, dim: usize) -> OwnedRow {
    OwnedRow {
        template: TemplateId(template),
        subject: SubjectNumber(subject),
        hand: (template % 3) as u8,
        label: format!("subject-{subject}-{}", "x".repeat((subject % 40) as usize)),
        source: template ^ 0x5000,
        vector: vector(template, dim),
    }
}

/// The rows in the form that `append` takes.
pub(crate) fn borrowed(rows: &[OwnedRow]) -> Vec<NewRow<'_>> {
    rows.iter().map(OwnedRow::as_new).collect()
}
