//! Sealing templates for the registry: AES-256-GCM-SIV (RFC 8452).
//!
//! ```text
//! offset  size       what
//! 0       1          version, 1: all templates under one key of the vault
//! 1       12         nonce, random
//! 13      2 * dim    the row in f16, little-endian, encrypted
//! ..      16         tag
//! ```
//!
//! The tag also covers version, hand, dimension and the subject's id, so a sealed template opens
//! only as the template it was sealed as. A repeated nonce would reveal only whether two templates are
//! equal: that is what SIV is for. The version byte allows for a later format with a key per subject.

use aes_gcm_siv::aead::inout::InOutBuf;
use aes_gcm_siv::{AeadInOut as _, Aes256GcmSiv, KeyInit as _, Nonce, Tag};
use half::f16;
use zeroize::Zeroize as _;

use crate::model::{Hand, SUBJECT_ID_BYTES_MAX, TemplateRow};
use crate::vault::locked::Locked;

/// The version written: one sealing key for all templates.
const VERSION: u8 = 1;
const NONCE_BYTES: usize = 12;
const TAG_BYTES: usize = 16;
const HEADER_BYTES: usize = 1 + NONCE_BYTES;
/// Bytes of a sealed template besides those of its row.
pub const SEAL_BYTES: usize = HEADER_BYTES + TAG_BYTES;

/// Why a sealed template could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// It is of another version of this program.
    #[error("the sealed template has version {found}, this program knows {VERSION}")]
    UnknownVersion {
        /// The first byte.
        found: u8,
    },
    /// It is truncated, or of another dimension.
    #[error("the sealed template has {found} bytes, those of this gallery have {expected}")]
    WrongLength {
        /// Bytes a sealed template of this dimension has.
        expected: usize,
        /// Bytes it has.
        found: usize,
    },
    /// The tag does not match.
    #[error("the sealed template does not open: it was changed, or sealed under another key, subject or hand")]
    Refused,
}

/// Seals and opens rows of one dimension.
pub struct Sealer {
    /// Expanded for each template, which costs little beside the keys that SIV derives for each anyway; so
    /// the key itself stays in locked memory.
    key: Locked<u8>,
    dim: usize,
}

impl Sealer {
    pub(super) fn new(key: &[u8; 32], dim: usize) -> Self {
        Self { key: Locked::copied(key), dim }
    }

    fn cipher(&self) -> Aes256GcmSiv {
        Aes256GcmSiv::new_from_slice(&self.key).expect("the key has its length")
    }

    /// Bytes of a sealed template.
    #[must_use]
    pub fn sealed_bytes(&self) -> usize {
        SEAL_BYTES + 2 * self.dim
    }

    /// Seals `row` as a template of that hand of that subject.
    ///
    /// # Panics
    /// If `row` has another dimension, and if the system gives no random numbers.
    #[must_use]
    pub fn seal(&self, subject_id: &str, hand: Hand, row: &TemplateRow) -> Box<[u8]> {
        assert_eq!(row.0.len(), self.dim, "a sealer seals rows of its own dimension");
        let mut sealed = vec![0; self.sealed_bytes()].into_boxed_slice();
        let (header, rest) = sealed.split_at_mut(HEADER_BYTES);
        let (body, tag) = rest.split_at_mut(2 * self.dim);
        header[0] = VERSION;
        getrandom::fill(&mut header[1..]).expect("the system gives random numbers");
        for (two, value) in body.chunks_exact_mut(2).zip(&row.0) {
            two.copy_from_slice(&value.to_le_bytes());
        }
        let nonce = Nonce::try_from(&header[1..]).expect("a nonce has its length");
        let made = self.with_context(VERSION, subject_id, hand, |context| {
            self.cipher().encrypt_inout_detached(&nonce, context, InOutBuf::from(&mut *body))
        });
        tag.copy_from_slice(&made.expect("a row is far from AES-GCM-SIV's 64 GiB"));
        sealed
    }

    /// Opens a template that was sealed as one of that hand of that subject.
    ///
    /// # Errors
    /// [`SealError`] if any bit of it was changed, or it was sealed as something else.
    pub fn open(&self, subject_id: &str, hand: Hand, sealed: &[u8]) -> Result<TemplateRow, SealError> {
        if let Some(found) = sealed.first().copied().filter(|version| *version != VERSION) {
            return Err(SealError::UnknownVersion { found });
        }
        if sealed.len() != self.sealed_bytes() {
            return Err(SealError::WrongLength { expected: self.sealed_bytes(), found: sealed.len() });
        }
        let (header, rest) = sealed.split_at(HEADER_BYTES);
        let (body, tag) = rest.split_at(2 * self.dim);
        let nonce = Nonce::try_from(&header[1..]).expect("a nonce has its length");
        let tag = Tag::try_from(tag).expect("a tag has its length");
        let mut plain = body.to_vec();
        let opened = self.with_context(header[0], subject_id, hand, |context| {
            self.cipher().decrypt_inout_detached(&nonce, context, InOutBuf::from(plain.as_mut_slice()), &tag)
        });
        let row = match opened {
            Ok(()) => Ok(TemplateRow(plain.chunks_exact(2).map(|two| f16::from_le_bytes([two[0], two[1]])).collect())),
            Err(_) => Err(SealError::Refused),
        };
        plain.zeroize();
        row
    }

    /// Calls `then` with the bytes that the tag covers besides the row. The id comes last, so the
    /// boundaries are unambiguous.
    fn with_context<T>(&self, version: u8, subject_id: &str, hand: Hand, then: impl FnOnce(&[u8]) -> T) -> T {
        let mut context = [0; 6 + SUBJECT_ID_BYTES_MAX];
        let id = subject_id.as_bytes();
        context[0] = version;
        context[1] = hand as u8;
        context[2..6].copy_from_slice(&u32::try_from(self.dim).expect("dimensions are small").to_le_bytes());
        let Some(place) = context.get_mut(6..6 + id.len()) else {
            // Longer than a subject id can be: it opens nothing, but must not be truncated either.
            let mut long = context[..6].to_vec();
            long.extend_from_slice(id);
            return then(&long);
        };
        place.copy_from_slice(id);
        then(&context[..6 + id.len()])
    }
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").field("dim", &self.dim).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
