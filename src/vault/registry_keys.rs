//! The keyed hashes of the registry: of names, by which it looks things up, so that its indexes reveal
//! nothing without the key; and of rows, by which it detects that one was changed.

use super::RequestDigester;

/// Bytes of a hash: its group's, then its own.
pub const FILED_BYTES: usize = GROUP_BYTES + 16;
/// Bytes of a group's hash. Two groups with the same hash merely share a place in the index.
const GROUP_BYTES: usize = 4;
/// Digits at the end of a name that count as its number; 18 always fit 64 bits.
const DIGITS_MAX: usize = 18;
/// Names that differ only in this many last bits of the number at their end are of one group.
const GROUP_BITS: u32 = 10;

/// The hash by which the registry looks a name up.
pub type Filed = [u8; FILED_BYTES];

/// Hashes for the registry.
#[derive(Clone, Debug)]
pub struct RegistryKeys {
    digester: RequestDigester,
    key_id: [u8; 16],
}

impl RegistryKeys {
    pub(super) fn new(key: &[u8; 32], key_id: [u8; 16]) -> Self {
        Self { digester: RequestDigester::new(key), key_id }
    }

    /// The fingerprint of the master key.
    #[must_use]
    pub fn key_id(&self) -> [u8; 16] {
        self.key_id
    }

    /// The hash of a row of `table`: its numbers, and its bytes column by column.
    #[must_use]
    pub fn row(&self, table: &str, numbers: &[i64], bytes: &[&[u8]]) -> [u8; 16] {
        let mut digest = self.digester.begin();
        digest.part(b"row");
        digest.part(table.as_bytes());
        digest.part(&numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>());
        bytes.iter().for_each(|bytes| digest.part(bytes));
        digest.finish()
    }

    /// The hash of a subject's name.
    #[must_use]
    pub fn subject(&self, name: &str) -> Filed {
        self.filed(b"subject", name)
    }

    /// The hash of a request's id.
    #[must_use]
    pub fn request(&self, id: &str) -> Filed {
        self.filed(b"request", id)
    }

    /// HMAC-SHA-256 of the name, truncated to 16 bytes, after that of its group. So names that are numbered
    /// consecutively, as those of an import often are, share a few neighbouring pages of an index; if they
    /// were scattered over all of it, commits of 2,000 enrolments would be slower by a factor of 3 and more
    /// at 1.5 million. It reveals which entries are of one group.
    fn filed(&self, kind: &[u8], name: &str) -> Filed {
        let digits = name.bytes().rev().take(DIGITS_MAX).take_while(u8::is_ascii_digit).count();
        let (words, number) = name.split_at(name.len() - digits);
        let group = number.parse::<u64>().unwrap_or_default() >> GROUP_BITS;
        let group = self.digester.digest(&[kind, b"group", words.as_bytes(), &group.to_le_bytes()]);
        let own = self.digester.digest(&[kind, name.as_bytes()]);
        std::array::from_fn(|i| if i < GROUP_BYTES { group[i] } else { own[i - GROUP_BYTES] })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn hashes_tell_names_kinds_and_keys_apart() {
        let names = ["a", "b", "a1", "a01", "a001", "a10", "1", "01", "a1a", "a1b", "1a1", "99999999999999999999"];
        let mut seen = HashSet::new();
        for keys in [RegistryKeys::new(&[1; 32], [0; 16]), RegistryKeys::new(&[2; 32], [0; 16])] {
            for name in names {
                assert!(seen.insert(keys.subject(name)), "{name}");
                assert!(seen.insert(keys.request(name)), "{name}");
                assert_eq!(keys.subject(name), keys.subject(name));
            }
        }
        let own: HashSet<_> = seen.iter().map(|filed| filed[GROUP_BYTES..].to_vec()).collect();
        assert_eq!(own.len(), seen.len(), "names differ without the group, too");
    }

    #[test]
    fn rows_are_told_apart_by_table_numbers_and_bytes() {
        let keys = RegistryKeys::new(&[1; 32], [0; 16]);
        let hashes = HashSet::from([
            keys.row("a", &[1, 2], &[b"xy"]),
            keys.row("b", &[1, 2], &[b"xy"]),
            keys.row("a", &[2, 1], &[b"xy"]),
            keys.row("a", &[1], &[b"xy"]),
            keys.row("a", &[1, 2], &[b"x", b"y"]),
            keys.row("a", &[1, 2], &[b"xyz"]),
            keys.row("a", &[1, 2], &[]),
        ]);
        assert_eq!(hashes.len(), 7);
    }

    #[test]
    fn names_with_consecutive_numbers_are_of_one_group() {
        let keys = RegistryKeys::new(&[1; 32], [0; 16]);
        let group = |name: &str| keys.subject(name)[..GROUP_BYTES].to_vec();
        assert_eq!(group("person-001024"), group("person-002047"));
        assert_ne!(group("person-001023"), group("person-001024"));
        assert_ne!(group("person-1"), group("human-1"));
    }
}
