//! Which code of a row is scanned, and which component lies where in it on the card.

/// A code that is scanned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Level {
    /// Signs, 64 bytes a row of 512: under a randomised certificate only.
    OneBit,
    /// Four bits a component, four times as many bytes.
    FourBit,
}

/// Words of a quad.
pub(super) const QUAD: usize = 4;

impl Level {
    /// Both, in the order of [`Level::index`].
    pub(super) const ALL: [Self; 2] = [Self::OneBit, Self::FourBit];

    /// Its place in [`Level::ALL`].
    pub(super) fn index(self) -> usize {
        match self {
            Self::OneBit => 0,
            Self::FourBit => 1,
        }
    }

    /// Quads of a row's code. Signs are padded to whole ones with components that no probe has.
    pub(super) fn quads(self, dim: usize) -> usize {
        match self {
            Self::OneBit => dim.div_ceil(128),
            Self::FourBit => dim / 32,
        }
    }

    /// Bytes of a row's code.
    pub(super) fn row_bytes(self, dim: usize) -> usize {
        self.quads(dim) * QUAD * 4
    }

    /// How often a quad is spread into bytes.
    pub(super) fn spreads(self) -> usize {
        match self {
            Self::OneBit => 8,
            Self::FourBit => 2,
        }
    }

    /// c = factor * n + a constant, for the unsigned integer n that the code keeps.
    pub(super) fn factor(self) -> i32 {
        match self {
            Self::OneBit => -2,
            Self::FourBit => 2,
        }
    }

    /// The component in byte `byte` of word `word` of quad `quad` after the `nth` spread; `dim` or
    /// more where there is none.
    pub(super) fn component(self, dim: usize, quad: usize, nth: usize, word: usize, byte: usize) -> usize {
        match self {
            Self::OneBit => 128 * quad + 32 * word + 8 * byte + nth,
            Self::FourBit => nth * (dim / 2) + 16 * quad + 4 * word + byte,
        }
    }

    /// The component at `place` of the `chunk`-th 32 components, in the order in which `scan_coop`
    /// unpacks them.
    pub(super) fn unpacked(self, dim: usize, chunk: usize, place: usize) -> usize {
        match self {
            Self::OneBit => 32 * chunk + place,
            Self::FourBit => self.component(dim, chunk, place % 2, place / 8, place % 8 / 2),
        }
    }
}
