//! Digests of requests, keyed so that nobody without the key can test a guess against one.
//!
//! An embedding follows from a palm: anybody with the same capture could confirm an unkeyed hash of it.
//! HMAC-SHA-256 (RFC 2104), truncated to 16 bytes.

use std::sync::Arc;

use hkdf::hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::locked::Locked;

/// Makes digests under the vault's key.
#[derive(Clone)]
pub struct RequestDigester(Arc<Locked<u8>>);

impl RequestDigester {
    pub(super) fn new(key: &[u8; 32]) -> Self {
        Self(Arc::new(Locked::copied(key)))
    }

    /// Begins a digest.
    #[must_use]
    pub fn begin(&self) -> RequestDigest {
        RequestDigest(Hmac::new_from_slice(&self.0).expect("HMAC takes keys of any length"))
    }

    /// The digest of these parts. Their boundaries count: `["ab"]` and `["a", "b"]` differ.
    #[must_use]
    pub fn digest(&self, parts: &[&[u8]]) -> [u8; 16] {
        let mut digest = self.begin();
        parts.iter().for_each(|part| digest.part(part));
        digest.finish()
    }
}

impl std::fmt::Debug for RequestDigester {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RequestDigester(..)")
    }
}

/// A digest in progress: takes the parts of a request one by one.
pub struct RequestDigest(Hmac<Sha256>);

impl RequestDigest {
    /// Takes the next part, after its length, so that the boundaries between parts are unambiguous.
    pub fn part(&mut self, part: &[u8]) {
        self.0.update(&(part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    /// Takes an embedding as the next part: its values' bits, little-endian.
    pub fn values(&mut self, values: &[f32]) {
        self.0.update(&(4 * values.len() as u64).to_le_bytes());
        let mut bytes = [0; 256];
        for chunk in values.chunks(bytes.len() / 4) {
            for (four, value) in bytes.chunks_exact_mut(4).zip(chunk) {
                four.copy_from_slice(&value.to_le_bytes());
            }
            self.0.update(&bytes[..4 * chunk.len()]);
        }
    }

    /// The digest of all parts.
    #[must_use]
    pub fn finish(self) -> [u8; 16] {
        let whole = self.0.finalize().into_bytes();
        std::array::from_fn(|i| whole[i])
    }
}

impl std::fmt::Debug for RequestDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RequestDigest(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_depends_on_key_parts_and_their_division() {
        let one = RequestDigester::new(&[1; 32]);
        let two = RequestDigester::new(&[2; 32]);
        let all: [&[&[u8]]; 6] = [&[], &[b""], &[b"ab"], &[b"a", b"b"], &[b"b", b"a"], &[b"ab", b""]];
        let mut seen = std::collections::HashSet::new();
        for parts in all {
            assert!(seen.insert(one.digest(parts)), "{parts:?}");
            assert!(seen.insert(two.digest(parts)), "{parts:?}");
            assert_eq!(one.digest(parts), one.digest(parts));
        }
    }

    #[test]
    fn values_are_a_part_of_their_bytes() {
        let digester = RequestDigester::new(&[3; 32]);
        for count in [0, 1, 63, 64, 65, 512] {
            let values: Vec<f32> = (0..count).map(|i| i as f32 * 0.25 - 3.0).collect();
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let mut digest = digester.begin();
            digest.part(b"enrol");
            digest.values(&values);
            assert_eq!(digest.finish(), digester.digest(&[b"enrol", &bytes]), "{count} values");
        }
    }

    #[test]
    fn a_digest_is_a_cut_hmac_sha_256() {
        let mut mac = Hmac::<Sha256>::new_from_slice(&[4; 32]).unwrap();
        mac.update(b"\x03\0\0\0\0\0\0\0abc");
        assert_eq!(RequestDigester::new(&[4; 32]).digest(&[b"abc"]), mac.finalize().into_bytes()[..16]);
    }
}
