use std::io::Write as _;

use super::*;

/// Bytes of an array file as NumPy writes it (format version 1.0).
pub(crate) fn npy(descr: &str, fortran: bool, shape: &str, data: &[u8]) -> Vec<u8> {
    let order = if fortran { "True" } else { "False" };
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}");
    while !(10 + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// An array file of float32 rows.
pub(crate) fn npy_f32(rows: &[Vec<f32>], dim: usize) -> Vec<u8> {
    let data: Vec<u8> = rows.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    npy("<f4", false, &format!("({}, {dim})", rows.len()), &data)
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn refusal(bytes: &[u8]) -> EmbeddingsError {
    let file = file(bytes);
    let error = EmbeddingsFile::open(file.path()).unwrap_err();
    assert!(error.to_string().contains(file.path().to_str().unwrap()), "names its file: {error}");
    error
}

#[test]
fn rows_come_back_as_stored_in_both_widths_and_both_byte_orders() {
    let rows: Vec<Vec<f32>> =
        (0..5_u8).map(|row| (0..32_u8).map(|i| f32::from(row) - f32::from(i) * 0.25).collect()).collect();
    let flat: Vec<f32> = rows.iter().flatten().copied().collect();
    let stored: [(&str, Vec<u8>); 4] = [
        ("<f4", flat.iter().flat_map(|v| v.to_le_bytes()).collect()),
        (">f4", flat.iter().flat_map(|v| v.to_be_bytes()).collect()),
        ("<f2", flat.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()),
        (">f2", flat.iter().flat_map(|v| f16::from_f32(*v).to_be_bytes()).collect()),
    ];
    for (descr, data) in stored {
        let file = file(&npy(descr, false, "(5, 32)", &data));
        let embeddings = EmbeddingsFile::open(file.path()).unwrap();
        assert_eq!((embeddings.rows(), embeddings.dim()), (5, 32));
        let mut reader = embeddings.rows_from(1).unwrap();
        assert_eq!(reader.read().unwrap(), rows[1], "{descr}");
        reader.skip(2).unwrap();
        assert_eq!(reader.read().unwrap(), rows[4], "{descr}");
        assert!(reader.read().is_err(), "{descr}: there is no sixth row");
    }
}

#[test]
fn what_is_no_array_file_is_refused() {
    for bytes in
        [&b""[..], b"PK\x03\x04 an npz archive", b"\x93NUMPY\x01", b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{'descr'"]
    {
        assert!(matches!(refusal(bytes), EmbeddingsError::NotNumpy { .. }), "{bytes:?}");
    }
    let error = EmbeddingsFile::open(Path::new("/nowhere/palms.npy")).unwrap_err();
    assert!(error.to_string().contains("/nowhere/palms.npy"));
}

#[test]
fn another_dtype_is_named_together_with_those_taken() {
    for (descr, name) in [("<f8", "float64"), ("<i4", "int32"), ("|u1", "uint8"), ("<c8", "complex64"), ("<U3", "U3")] {
        let message = refusal(&npy(descr, false, "(1, 32)", &[0; 256])).to_string();
        assert!(message.contains(name) && message.contains("float32 and float16"), "{message}");
    }
}

#[test]
fn order_shape_dimension_and_length_are_checked() {
    assert!(matches!(refusal(&npy("<f4", true, "(2, 32)", &[0; 256])), EmbeddingsError::FortranOrder { .. }));
    assert!(matches!(refusal(&npy("<f4", false, "(64,)", &[0; 256])), EmbeddingsError::Shape { .. }));
    assert!(matches!(refusal(&npy("<f4", false, "(1, 2, 32)", &[0; 256])), EmbeddingsError::Shape { .. }));
    assert!(matches!(refusal(&npy("<f4", false, "(2, 33)", &[0; 264])), EmbeddingsError::Dimension { .. }));
    let whole = npy("<f4", false, "(2, 32)", &[0; 256]);
    let error = refusal(&whole[..whole.len() - 1]);
    assert!(matches!(error, EmbeddingsError::Truncated { expected, found, .. } if expected == found + 1), "{error}");
}

#[test]
fn values_without_a_direction_are_named_without_being_told() {
    assert_eq!(problem(&[0.5, -0.5]), None);
    assert!(problem(&[0.5, f32::NAN]).unwrap().contains("value 1"));
    assert!(problem(&[f32::INFINITY, 0.0]).unwrap().contains("value 0"));
    assert!(problem(&[0.0, 0.0]).unwrap().contains("zero vector"));
}
