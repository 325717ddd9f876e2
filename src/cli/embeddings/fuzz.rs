//! Mutated array files: whatever the bytes are, reading neither panics nor allocates much, and an
//! error names the file and the problem.
//!
//! Mutates the files of `tests/corpus/npy`, seed by seed (`process::testing`).

use rand::{Rng as _, RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::process::testing::{fuzz, most_bytes};

/// Bytes that opening a file may hold at a time.
const OPEN_BYTES_MAX: usize = 256 << 10;
/// Bytes that reading a row may hold at a time: the buffer, the row and the path.
const READ_BYTES_MAX: usize = BUFFER_BYTES + (64 << 10);
/// Numbers that a mutation writes into a header.
const NUMBERS: [&str; 10] =
    ["0", "-1", "1", "32", "33", "2048", "4294967296", "9223372036854775807", "18446744073709551615", "1e9"];

fn corpus() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/npy");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Changes a file a little: a bit, its length, a piece of another file, or a number in its header.
fn mutate(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut ChaCha8Rng) {
    let at = random.random_range(0..=bytes.len().min(256));
    match random.random_range(0..5) {
        0 => bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << random.random_range(0..8)),
        1 => bytes.truncate(random.random_range(0..=bytes.len())),
        2 => {
            let other = &corpus[random.random_range(0..corpus.len())];
            let from = random.random_range(0..=other.len());
            let piece = from..(from + random.random_range(0..64)).min(other.len());
            bytes.splice(at.., other[piece].iter().copied().chain(bytes[at..].to_vec())).for_each(drop);
        }
        3 => {
            let digit = bytes.iter().skip(at).position(u8::is_ascii_digit).map_or(at, |found| at + found);
            let end = bytes.iter().skip(digit).position(|byte| !byte.is_ascii_digit()).unwrap_or(0) + digit;
            let number = NUMBERS[random.random_range(0..NUMBERS.len())];
            bytes.splice(digit.min(end)..end, number.bytes());
        }
        _ => {
            let length = random.next_u32().to_le_bytes();
            bytes.iter_mut().skip(8).zip(length).for_each(|(byte, random)| *byte = random);
        }
    }
}

/// Opens the file and reads its first and last row.
fn check(path: &Path) {
    let name = path.to_str().unwrap();
    let (opened, bytes) = most_bytes(|| EmbeddingsFile::open(path));
    assert!(bytes <= OPEN_BYTES_MAX, "opening allocated {bytes} bytes");
    let file = match opened {
        Ok(file) => file,
        Err(error) => {
            let told = error.to_string();
            assert!(told.contains(name) && told.len() > name.len() + 10, "{told}");
            assert!(told.len() < name.len() + 1000, "a message of {} characters", told.len());
            return;
        }
    };
    assert!(file.rows() * file.dim() as u64 <= std::fs::metadata(path).unwrap().len(), "rows that are not there");
    for row in [0, file.rows().saturating_sub(1)] {
        let (values, bytes) = most_bytes(|| file.rows_from(row).and_then(|mut rows| rows.read()));
        assert!(bytes <= READ_BYTES_MAX, "reading allocated {bytes} bytes");
        assert_eq!(values.is_ok(), file.rows() > 0);
        values.iter().for_each(|values| drop(problem(values)));
    }
}

#[test]
fn no_array_file_makes_reading_panic_or_allocate_much() {
    let corpus = corpus();
    assert!(corpus.len() >= 20, "the corpus is there");
    let file = tempfile::NamedTempFile::new().unwrap();
    for bytes in &corpus {
        std::fs::write(file.path(), bytes).unwrap();
        check(file.path());
    }
    fuzz(|seed| {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut bytes = corpus[random.random_range(0..corpus.len())].clone();
        (0..random.random_range(1..6)).for_each(|_| mutate(&mut bytes, &corpus, &mut random));
        std::fs::write(file.path(), &bytes).unwrap();
        check(file.path());
    });
}
