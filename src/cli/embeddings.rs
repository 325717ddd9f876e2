//! Reads embeddings from a NumPy file, row by row.
//!
//! Takes what `numpy.save` writes for a C-ordered float32 or float16 array of shape `[N, D]`,
//! `D` a multiple of 32 up to 2048. Only the rows in hand are in memory. Does not know whose
//! palms they are.
//!
//! Invariant: an [`EmbeddingsFile`] that opened has all the bytes its header promises; a file cut
//! short is found before anything is sent.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::f16;
use npyz::{DType, Endianness, NpyHeader, Order, TypeChar};

use crate::model::{self, Invalid};

/// A longer header is not one of a plain array.
const HEADER_BYTES_MAX: u64 = 1 << 20;
/// The first bytes of every NumPy array file.
const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// Why a file cannot be used as embeddings.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddingsError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not a NumPy array file, or its header is damaged.
    #[error("{} is not a NumPy array file (.npy): {problem}", path.display())]
    NotNumpy {
        /// The file.
        path: PathBuf,
        /// What is wrong with its beginning.
        problem: String,
    },
    /// Elements of another type.
    #[error("{} holds elements of dtype {found}; float32 and float16 are taken: save it with array.astype(numpy.float32)", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The dtype in NumPy's words.
        found: String,
    },
    /// Column-major order.
    #[error("{} is in Fortran order; save it with numpy.ascontiguousarray(array)", path.display())]
    FortranOrder {
        /// The file.
        path: PathBuf,
    },
    /// Not a table.
    #[error("{} has shape {shape:?}; an array [N, D] of N embeddings with D values is taken", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Rows of a length that no gallery has.
    #[error("{}: {invalid}", path.display())]
    Dimension {
        /// The file.
        path: PathBuf,
        /// The length and the limits.
        invalid: Invalid,
    },
    /// The file ends before its last row.
    #[error("{} is cut short: its header promises {expected} bytes, it has {found}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes of header and rows together.
        expected: u64,
        /// Bytes the file has.
        found: u64,
    },
}

/// How an element is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    F16,
    F32,
}

impl Element {
    fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// An array of embeddings on disk. Shape: `[rows, dim]`.
#[derive(Debug)]
pub struct EmbeddingsFile {
    path: PathBuf,
    rows: u64,
    dim: usize,
    element: Element,
    big_endian: bool,
    /// Where the first row begins.
    data_offset: u64,
    /// Length of the file and its time of change: they tell whether it is still the same.
    identity: (u64, u128),
}

impl EmbeddingsFile {
    /// Reads the header and holds the file's length against it.
    ///
    /// # Errors
    /// [`EmbeddingsError`], each naming the file, what was found and what is taken.
    pub fn open(path: &Path) -> Result<Self, EmbeddingsError> {
        let unreadable = |source| EmbeddingsError::Unreadable { path: path.to_owned(), source };
        let not_numpy = |problem: String| EmbeddingsError::NotNumpy { path: path.to_owned(), problem };
        let file = File::open(path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        let mut beginning = Vec::new();
        (&file).take(HEADER_BYTES_MAX).read_to_end(&mut beginning).map_err(unreadable)?;
        if !beginning.starts_with(MAGIC) {
            return Err(not_numpy("its first bytes are not \\x93NUMPY".to_owned()));
        }
        let data_offset = header_bytes(&beginning)
            .ok_or_else(|| not_numpy(format!("its header is cut short or over {HEADER_BYTES_MAX} bytes")))?;
        let header = NpyHeader::from_reader(beginning.as_slice())
            .map_err(|error| not_numpy(format!("its header cannot be read: {error}")))?;

        let (element, big_endian) = element_of(&header.dtype())
            .ok_or_else(|| EmbeddingsError::Dtype { path: path.to_owned(), found: dtype_name(&header.dtype()) })?;
        let &[rows, dim] = header.shape() else {
            return Err(EmbeddingsError::Shape { path: path.to_owned(), shape: header.shape().to_vec() });
        };
        // An array of one row, or of one column, is in both orders at once.
        if header.order() == Order::Fortran && rows > 1 && dim > 1 {
            return Err(EmbeddingsError::FortranOrder { path: path.to_owned() });
        }
        let dim = model::checked_dim(usize::try_from(dim).unwrap_or(usize::MAX))
            .map_err(|invalid| EmbeddingsError::Dimension { path: path.to_owned(), invalid })?;
        let expected = rows
            .checked_mul((dim * element.bytes()) as u64)
            .and_then(|bytes| bytes.checked_add(data_offset))
            .unwrap_or(u64::MAX);
        if metadata.len() < expected {
            return Err(EmbeddingsError::Truncated { path: path.to_owned(), expected, found: metadata.len() });
        }
        let changed = metadata
            .modified()
            .ok()
            .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
            .map_or(0, |since| since.as_nanos());
        Ok(Self {
            path: path.to_owned(),
            rows,
            dim,
            element,
            big_endian,
            data_offset,
            identity: (metadata.len(), changed),
        })
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Embeddings in the file.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Values of an embedding.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Length in bytes and time of change in nanoseconds: another pair is another file.
    #[must_use]
    pub fn identity(&self) -> (u64, u128) {
        self.identity
    }

    /// The rows from `row` on.
    ///
    /// # Errors
    /// [`EmbeddingsError::Unreadable`] where the file cannot be opened again.
    pub fn rows_from(&self, row: u64) -> Result<EmbeddingRows, EmbeddingsError> {
        let row_bytes = self.dim * self.element.bytes();
        let unreadable = |source| EmbeddingsError::Unreadable { path: self.path.clone(), source };
        let mut file = File::open(&self.path).map_err(unreadable)?;
        file.seek(SeekFrom::Start(self.data_offset + row * row_bytes as u64)).map_err(unreadable)?;
        Ok(EmbeddingRows {
            path: self.path.clone(),
            reader: BufReader::with_capacity(1 << 20, file),
            element: self.element,
            big_endian: self.big_endian,
            bytes: vec![0; row_bytes],
        })
    }
}

/// A place in an [`EmbeddingsFile`] from which rows are read in order.
#[derive(Debug)]
pub struct EmbeddingRows {
    path: PathBuf,
    reader: BufReader<File>,
    element: Element,
    big_endian: bool,
    bytes: Vec<u8>,
}

impl EmbeddingRows {
    /// Reads the next row. Shape: `[dim]`, as stored, not normalised.
    ///
    /// # Errors
    /// [`EmbeddingsError::Unreadable`], also where the file ended because it was cut meanwhile.
    pub fn read(&mut self) -> Result<Vec<f32>, EmbeddingsError> {
        self.reader
            .read_exact(&mut self.bytes)
            .map_err(|source| EmbeddingsError::Unreadable { path: self.path.clone(), source })?;
        Ok(match self.element {
            Element::F32 => self.values::<4>(f32::from_le_bytes, f32::from_be_bytes),
            Element::F16 => {
                self.values::<2>(|bytes| f16::from_le_bytes(bytes).to_f32(), |bytes| f16::from_be_bytes(bytes).to_f32())
            }
        })
    }

    /// Passes over the next `rows` rows.
    ///
    /// # Errors
    /// [`EmbeddingsError::Unreadable`] where the file cannot be moved in.
    pub fn skip(&mut self, rows: u64) -> Result<(), EmbeddingsError> {
        let bytes = i64::try_from(rows * self.bytes.len() as u64).unwrap_or(i64::MAX);
        self.reader
            .seek_relative(bytes)
            .map_err(|source| EmbeddingsError::Unreadable { path: self.path.clone(), source })
    }

    fn values<const N: usize>(&self, little: impl Fn([u8; N]) -> f32, big: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        let (elements, _) = self.bytes.as_chunks::<N>();
        if self.big_endian {
            elements.iter().map(|bytes| big(*bytes)).collect()
        } else {
            elements.iter().map(|bytes| little(*bytes)).collect()
        }
    }
}

/// What makes `values` no embedding, in the words of the protocol; never the values themselves.
#[must_use]
pub fn problem(values: &[f32]) -> Option<String> {
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        return Some(format!("embedding: value {at} is not a finite number"));
    }
    let norm = values.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt();
    (norm < model::NORM_MIN).then(|| {
        format!("embedding: has norm {norm:.1e}, the least is {:.0e}: a zero vector has no direction", model::NORM_MIN)
    })
}

/// Bytes before the first row: magic, version, length field and the header's text (the NPY
/// format, versions 1 to 3). None where `beginning` does not hold all of it.
fn header_bytes(beginning: &[u8]) -> Option<u64> {
    let (fixed, text) = match beginning.get(6)? {
        1 => (10, u64::from(u16::from_le_bytes(beginning.get(8..10)?.try_into().ok()?))),
        _ => (12, u64::from(u32::from_le_bytes(beginning.get(8..12)?.try_into().ok()?))),
    };
    let length = fixed + text;
    (length <= beginning.len() as u64).then_some(length)
}

fn element_of(dtype: &DType) -> Option<(Element, bool)> {
    let DType::Plain(plain) = dtype else { return None };
    if plain.type_char() != TypeChar::Float {
        return None;
    }
    let element = match plain.size_field() {
        2 => Element::F16,
        4 => Element::F32,
        _ => return None,
    };
    Some((element, plain.endianness() == Endianness::Big))
}

/// NumPy's name of a dtype where it has a plain one, else its descriptor.
fn dtype_name(dtype: &DType) -> String {
    let descriptor = dtype.descr();
    let DType::Plain(plain) = dtype else { return descriptor };
    let word = match plain.type_char() {
        TypeChar::Float => "float",
        TypeChar::Int => "int",
        TypeChar::Uint => "uint",
        TypeChar::Complex => "complex",
        _ => return descriptor,
    };
    format!("{word}{}", plain.size_field() * 8)
}

#[cfg(test)]
pub(crate) mod tests {
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
        for (descr, name) in
            [("<f8", "float64"), ("<i4", "int32"), ("|u1", "uint8"), ("<c8", "complex64"), ("<U3", "U3")]
        {
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
        assert!(
            matches!(error, EmbeddingsError::Truncated { expected, found, .. } if expected == found + 1),
            "{error}"
        );
    }

    #[test]
    fn values_without_a_direction_are_named_without_being_told() {
        assert_eq!(problem(&[0.5, -0.5]), None);
        assert!(problem(&[0.5, f32::NAN]).unwrap().contains("value 1"));
        assert!(problem(&[f32::INFINITY, 0.0]).unwrap().contains("value 0"));
        assert!(problem(&[0.0, 0.0]).unwrap().contains("zero vector"));
    }
}
