//! The levels of codes that a first pass may read.

use thenar_index::codebook;

/// Which bits of a row's codes the first pass reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine::cpu) enum Level {
    /// Codewords: six bits for eight components. Passes nothing over under the deterministic certificate.
    Codebook,
    /// Signs and two magnitudes: two bits per component.
    TwoBit,
}

impl Level {
    pub(in crate::engine::cpu) const ALL: [Self; 2] = [Self::Codebook, Self::TwoBit];

    /// Whether codes of one dimension differ in length.
    pub(in crate::engine::cpu) fn has_lengths(self) -> bool {
        self == Self::TwoBit
    }

    /// Whether entries that are added in bytes may exceed a byte. Saturating addition
    /// costs up to a tenth of a scan, and cuts less off than smaller entries would: with many groups, and
    /// few of them together, that is worth it.
    pub(in crate::engine::cpu) fn saturates(self) -> bool {
        self == Self::TwoBit
    }

    /// The cosine of a usual row with its code.
    pub(in crate::engine::cpu) fn usual_cosine(self) -> f32 {
        match self {
            // What codewords keep of normal variables.
            Self::Codebook => 0.747,
            // What four levels keep of normal variables.
            Self::TwoBit => 0.939,
        }
    }

    /// Length of every code of `dim` components, or of the shortest if they differ.
    pub(in crate::engine::cpu) fn least_norm(self, dim: usize) -> f32 {
        match self {
            Self::Codebook => (codebook::square(dim) as f32).sqrt(),
            Self::TwoBit => (dim as f32).sqrt(),
        }
    }
}
