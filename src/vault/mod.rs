//! Keys and their uses: the rotation of embeddings, the sealing of templates, the digests of requests,
//! the hashes by which names are looked up.
//!
//! One master key ([`MasterKey`]) is the only secret to keep. HKDF-SHA-256 (RFC 5869) derives the
//! others from it, each under its own label, so that none reveals anything about another. Knows no files
//! except the key's own, and no subjects, galleries or transports.
//!
//! Invariants: no secret is printed by `Debug` or by an error; the same master key gives the same
//! rotation to the bit on every machine; nothing sealed opens under another subject, hand,
//! dimension or key. Keys that are kept, and the rotation, are in locked memory and zeroed when
//! dropped; what the cryptographic crates expand from them for one use (AES round keys, hash states)
//! is not.

mod kernel;
mod locked;
mod master_key;
mod registry_keys;
mod request_digest;
mod rotation;
mod sealer;

pub use master_key::{CREDENTIAL, KeyError, KeySource, MASTER_KEY_VARIABLE, MasterKey};
pub use registry_keys::{FILED_BYTES, Filed, RegistryKeys};
pub use request_digest::{RequestDigest, RequestDigester};
pub use rotation::{Rotation, to_row};
pub use sealer::{SEAL_BYTES, SealError, Sealer};

use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

/// The HKDF salt: keeps these keys apart from any other use of the same master key.
const SALT: &[u8] = b"thenar vault 1";

/// What a derived key is for. Distinct labels, none a prefix of another followed by its context.
#[derive(Clone, Copy)]
enum Purpose {
    KeyId,
    RotationSeed,
    TemplateSealing,
    RequestDigest,
    Registry,
}

impl Purpose {
    fn label(self) -> &'static [u8] {
        match self {
            Self::KeyId => b"thenar key id",
            Self::RotationSeed => b"thenar rotation seed",
            Self::TemplateSealing => b"thenar template sealing",
            Self::RequestDigest => b"thenar request digest",
            Self::Registry => b"thenar registry",
        }
    }
}

/// The keys derived from one master key.
pub struct Vault {
    master: MasterKey,
    key_id: [u8; 16],
}

impl Vault {
    /// Takes ownership of the master key.
    #[must_use]
    pub fn new(master: MasterKey) -> Self {
        let mut vault = Self { master, key_id: [0; 16] };
        let derived = vault.derive(Purpose::KeyId, &[]);
        vault.key_id.copy_from_slice(&derived[..16]);
        vault
    }

    /// The fingerprint of the master key. It is not secret and reveals nothing about the key.
    #[must_use]
    pub fn key_id(&self) -> [u8; 16] {
        self.key_id
    }

    /// Seals and opens templates of `dim` components.
    #[must_use]
    pub fn sealer(&self, dim: usize) -> Sealer {
        Sealer::new(&self.derive(Purpose::TemplateSealing, &[]), dim)
    }

    /// Makes the digests by which a repeated request is recognised.
    #[must_use]
    pub fn request_digester(&self) -> RequestDigester {
        RequestDigester::new(&self.derive(Purpose::RequestDigest, &[]))
    }

    /// Hashes names and rows of the registry.
    #[must_use]
    pub fn registry_keys(&self) -> RegistryKeys {
        RegistryKeys::new(&self.derive(Purpose::Registry, &[]), self.key_id)
    }

    /// A key for `purpose`, bound to `context`.
    fn derive(&self, purpose: Purpose, context: &[u8]) -> Zeroizing<[u8; 32]> {
        let mut key = Zeroizing::new([0; 32]);
        Hkdf::<Sha256>::new(Some(SALT), self.master.bytes())
            .expand_multi_info(&[purpose.label(), context], key.as_mut_slice())
            .expect("32 bytes are within HKDF's 255 blocks");
        key
    }
}

impl std::fmt::Debug for Vault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vault").finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What `work` returns, and the seconds of processor time it took on this thread, so that a
    /// busy machine does not change a figure. Wall time if the system does not report it.
    pub(crate) fn processor_time<T>(work: impl FnOnce() -> T) -> (T, f64) {
        let spent = || -> Option<f64> {
            let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
            Some(text.split(' ').next()?.parse::<f64>().ok()? / 1e9)
        };
        let (wall, before) = (std::time::Instant::now(), spent());
        let result = work();
        let time = spent().zip(before).map_or_else(|| wall.elapsed().as_secs_f64(), |(after, before)| after - before);
        (result, time)
    }

    #[test]
    fn derived_keys_differ_by_purpose_context_and_master_key() {
        let vault = Vault::new(MasterKey::from_bytes([7; 32]));
        let other = Vault::new(MasterKey::from_bytes([8; 32]));
        let purposes = [
            Purpose::KeyId,
            Purpose::RotationSeed,
            Purpose::TemplateSealing,
            Purpose::RequestDigest,
            Purpose::Registry,
        ];
        let mut seen = std::collections::HashSet::new();
        for vault in [&vault, &other] {
            for purpose in purposes {
                for context in [&b""[..], &[0, 2, 0, 0], &[0, 4, 0, 0]] {
                    assert!(seen.insert(*vault.derive(purpose, context)));
                }
            }
        }
        assert_ne!(vault.key_id(), other.key_id());
        assert_eq!(vault.key_id(), Vault::new(MasterKey::from_bytes([7; 32])).key_id());
    }

    #[test]
    fn a_key_is_what_rfc_5869_makes_of_the_master_key() {
        // HKDF by hand, from HMAC alone.
        use hkdf::hmac::{Hmac, KeyInit as _, Mac as _};
        let hmac = |key: &[u8], parts: &[&[u8]]| {
            let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap();
            parts.iter().for_each(|part| mac.update(part));
            mac.finalize().into_bytes()
        };
        let prk = hmac(SALT, &[&[7; 32]]);
        let expected = hmac(&prk, &[b"thenar rotation seed", &[0, 2, 0, 0], &[1]]);
        let vault = Vault::new(MasterKey::from_bytes([7; 32]));
        assert_eq!(vault.derive(Purpose::RotationSeed, &[0, 2, 0, 0]).as_slice(), expected.as_slice());
    }

    #[test]
    fn debug_shows_no_secret() {
        let vault = Vault::new(MasterKey::from_bytes([0xab; 32]));
        assert_eq!(format!("{vault:?}"), "Vault { .. }");
    }
}
