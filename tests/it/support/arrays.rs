//! Input files of the command line: NumPy arrays and lists of subjects, written byte
//! by byte, so that their readers are tested against the formats and not against themselves.

use std::fmt::Write as _;
use std::path::Path;

use half::f16;

/// How the values of an array are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    F16,
}

/// The bytes that `numpy.save` writes for these rows of `dim` values each, in C order.
pub(crate) fn npy(rows: &[Vec<f32>], dim: usize, dtype: Dtype) -> Vec<u8> {
    let descr = match dtype {
        Dtype::F32 => "<f4",
        Dtype::F16 => "<f2",
    };
    let mut header =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}, {dim}), }}", rows.len()).into_bytes();
    // Magic, version and length field are 10 bytes; the header ends with a line feed at a multiple of 64.
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(b' ');
    }
    header.push(b'\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend_from_slice(&u16::try_from(header.len()).expect("a short header").to_le_bytes());
    bytes.extend_from_slice(&header);
    for row in rows {
        assert_eq!(row.len(), dim, "every row is as long as the header says");
        for value in row {
            match dtype {
                Dtype::F32 => bytes.extend_from_slice(&value.to_le_bytes()),
                Dtype::F16 => bytes.extend_from_slice(&f16::from_f32(*value).to_le_bytes()),
            }
        }
    }
    bytes
}

/// Writes an array.
pub(crate) fn write_npy(path: &Path, rows: &[Vec<f32>], dtype: Dtype) {
    let dim = rows.first().map_or(64, Vec::len);
    std::fs::write(path, npy(rows, dim, dtype)).expect("the array is written");
}

/// Writes a list of subjects: subject id and hand of every row.
pub(crate) fn write_list<'a>(path: &Path, lines: impl IntoIterator<Item = (&'a str, &'a str)>) {
    let mut text = String::from("subject_id,hand\n");
    for (subject, hand) in lines {
        let _ = writeln!(text, "{subject},{hand}");
    }
    std::fs::write(path, text).expect("the list is written");
}
