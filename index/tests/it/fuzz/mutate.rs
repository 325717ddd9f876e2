//! Inputs for parsers: mutated from a corpus, the same for the same seed on every machine.

use std::fs;
use std::path::Path;

use crate::support::rows::Dice;

/// Integers at which parsers break.
const EXTREMES: [u64; 10] =
    [0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 0x7fff_ffff_ffff_ffff, u64::MAX];
/// Inputs do not get longer than this.
const LEN_MAX: usize = 1 << 17;

/// The files in `dir`, in the order of their names.
pub(super) fn corpus(dir: &Path) -> Vec<Vec<u8>> {
    let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort_unstable();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// An input with one to four changes, most of which keep its length.
pub(super) fn mutated(dice: &mut Dice, corpus: &[Vec<u8>]) -> Vec<u8> {
    let pick = |dice: &mut Dice| &corpus[dice.below(corpus.len() as u64) as usize];
    let mut bytes = pick(dice).clone();
    for _ in 0..=dice.below(4) {
        let at = dice.below(bytes.len() as u64 + 1) as usize;
        let some = (1 << dice.below(10)).min(bytes.len() - at);
        match dice.below(16) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..at + some)),
            2 => {
                let other = pick(dice);
                let from = dice.below(other.len() as u64 + 1) as usize;
                let piece = &other[from..other.len().min(from + (1 << dice.below(12)))];
                bytes.splice(at..(at + piece.len()).min(bytes.len()), piece.iter().copied());
            }
            3 => bytes[at..at + some].fill([0, 0xff][dice.below(2) as usize]),
            4 => bytes.extend((0..dice.below(64)).map(|_| dice.roll() as u8)),
            5..9 if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
            _ => {
                // An integer of 1, 2, 4 or 8 bytes, where fields are or anywhere.
                let extreme =
                    EXTREMES[dice.below(EXTREMES.len() as u64) as usize].wrapping_add(dice.below(3)).wrapping_sub(1);
                let at = if dice.below(4) == 0 { at } else { at / 4 * 4 };
                let width = (1 << dice.below(4)).min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&extreme.to_le_bytes()[..width]);
            }
        }
        bytes.truncate(LEN_MAX);
    }
    bytes
}
