//! Sealed templates open as what they were sealed as, and as nothing else.

use super::*;
use crate::vault::tests::processor_time;
use crate::vault::{MasterKey, Vault};

fn vault(key: u8) -> Vault {
    Vault::new(MasterKey::from_bytes([key; 32]))
}

fn row(dim: usize, seed: u16) -> TemplateRow {
    TemplateRow((0..dim).map(|i| f16::from_bits((i as u16).wrapping_mul(40503) ^ seed)).collect())
}

fn bits(row: &TemplateRow) -> Vec<u16> {
    row.0.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn what_is_sealed_opens() {
    for dim in [32, 512, 2048] {
        let sealer = vault(1).sealer(dim);
        for hand in [Hand::Unspecified, Hand::Left, Hand::Right] {
            let row = row(dim, 77);
            let sealed = sealer.seal("alice", hand, &row);
            assert_eq!(sealed.len(), 2 * dim + SEAL_BYTES);
            assert_eq!(bits(&sealer.open("alice", hand, &sealed).unwrap()), bits(&row));
        }
    }
}

#[test]
fn sealing_twice_gives_other_bytes() {
    let sealer = vault(1).sealer(32);
    let row = row(32, 1);
    assert_ne!(sealer.seal("alice", Hand::Left, &row), sealer.seal("alice", Hand::Left, &row));
}

#[test]
fn any_changed_bit_is_refused() {
    let sealer = vault(1).sealer(32);
    let sealed = sealer.seal("alice", Hand::Left, &row(32, 1));
    for bit in 0..8 * sealed.len() {
        let mut changed = sealed.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        let error = sealer.open("alice", Hand::Left, &changed).unwrap_err();
        if bit < 8 {
            assert_eq!(error, SealError::UnknownVersion { found: 1 ^ 1 << bit });
        } else {
            assert_eq!(error, SealError::Refused, "bit {bit}");
        }
    }
}

#[test]
fn another_subject_hand_or_key_does_not_open() {
    let sealer = vault(1).sealer(64);
    let sealed = sealer.seal("alice", Hand::Left, &row(64, 1));
    let long = "a".repeat(SUBJECT_ID_BYTES_MAX + 1);
    for subject in ["alicf", "alic", "alice2", "", &long] {
        assert_eq!(sealer.open(subject, Hand::Left, &sealed).unwrap_err(), SealError::Refused, "{subject}");
    }
    for hand in [Hand::Unspecified, Hand::Right] {
        assert_eq!(sealer.open("alice", hand, &sealed).unwrap_err(), SealError::Refused);
    }
    let error = vault(2).sealer(64).open("alice", Hand::Left, &sealed).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the sealed template does not open: it was changed, or sealed under another key, subject or hand"
    );
    assert!(vault(1).sealer(64).open("alice", Hand::Left, &sealed).is_ok(), "the same key made anew opens it");
}

#[test]
fn a_cut_or_foreign_template_tells_its_length_or_version() {
    let sealer = vault(1).sealer(32);
    let sealed = sealer.seal("alice", Hand::Left, &row(32, 1));
    for len in 0..sealed.len() {
        let error = sealer.open("alice", Hand::Left, &sealed[..len]).unwrap_err();
        assert_eq!(error.to_string(), format!("the sealed template has {len} bytes, those of this gallery have 93"));
    }
    let error = sealer.open("alice", Hand::Left, &[2; 93]).unwrap_err();
    assert_eq!(error.to_string(), "the sealed template has version 2, this program knows 1");
}

#[test]
fn the_bytes_are_aes_256_gcm_siv_over_the_documented_context() {
    use aes_gcm_siv::aead::{Aead as _, Payload};
    let key = *vault(3).derive(crate::vault::Purpose::TemplateSealing, &[]);
    let row = row(32, 5);
    let sealed = vault(3).sealer(32).seal("bob", Hand::Right, &row);
    let nonce = Nonce::try_from(&sealed[1..13]).unwrap();
    let payload = Payload { msg: &sealed[13..], aad: b"\x01\x02\x20\0\0\0bob" };
    let plain = Aes256GcmSiv::new(&key.into()).decrypt(&nonce, payload).unwrap();
    assert_eq!(plain, row.0.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect::<Vec<u8>>());
}

#[test]
#[should_panic(expected = "a sealer seals rows of its own dimension")]
fn a_row_of_another_dimension_is_a_bug() {
    let _ = vault(1).sealer(64).seal("alice", Hand::Left, &row(32, 1));
}

#[test]
fn debug_shows_no_key() {
    assert_eq!(format!("{:?}", vault(1).sealer(64)), "Sealer { dim: 64, .. }");
}

/// Prints the figures: run with `--nocapture`. Asserts a small part of what they should be.
#[test]
fn speed_of_sealing() {
    let sealer = vault(1).sealer(512);
    let row = row(512, 9);
    let count = 20_000;
    let ((), time) = processor_time(|| {
        for _ in 0..count {
            std::hint::black_box(sealer.seal("subject-000001", Hand::Left, &row));
        }
    });
    let seals = f64::from(count) / time;
    let sealed = sealer.seal("subject-000001", Hand::Left, &row);
    let ((), time) = processor_time(|| {
        for _ in 0..count {
            std::hint::black_box(sealer.open("subject-000001", Hand::Left, &sealed).unwrap());
        }
    });
    let opens = f64::from(count) / time;
    let ((), time) = processor_time(|| {
        for _ in 0..count {
            let mut nonce = [0; NONCE_BYTES];
            getrandom::fill(std::hint::black_box(&mut nonce)).unwrap();
        }
    });
    let nonces = f64::from(count) / time;
    println!("1 KiB templates on one thread: {seals:.0} seals/s, {opens:.0} opens/s; {nonces:.0} nonces/s");
    assert!(seals > 2000.0 && opens > 2000.0);
}
