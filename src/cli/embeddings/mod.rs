//! Reads embeddings from a NumPy file, row by row.
//!
//! Takes what `numpy.save` writes for a C-ordered float32 or float16 array of shape `[N, D]`,
//! `D` a multiple of 32 up to 2048. Does not know whose palms they are.
//!
//! Invariants: an [`EmbeddingsFile`] that opened has all the bytes its header promises, so that a file
//! that is cut short is found before anything is sent. Whatever a file says of itself, opening it
//! allocates at most 256 KiB, and reading from it one buffer of 1 MiB and the row in hand.

#[cfg(test)]
mod fuzz;
mod header;
#[cfg(test)]
pub(crate) mod tests;

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use half::f16;

use self::header::{Header, HeaderProblem};
use crate::model::{self, Invalid};

/// Bytes that are read at a time.
const BUFFER_BYTES: usize = 1 << 20;
/// Characters of a descriptor that a message shows.
const DESCR_SHOWN: usize = 80;

/// Why a file cannot be used as embeddings.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddingsError {
    #[error("cannot read {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{} is not a NumPy array file (.npy): {problem}", path.display())]
    NotNumpy { path: PathBuf, problem: HeaderProblem },
    #[error("{} holds elements of dtype {found}; float32 and float16 are taken: save it with array.astype(numpy.float32)", path.display())]
    Dtype { path: PathBuf, found: String },
    #[error("{} is in Fortran order; save it with numpy.ascontiguousarray(array)", path.display())]
    FortranOrder { path: PathBuf },
    #[error("{} has shape {shape:?}; an array [N, D] of N embeddings with D values is taken", path.display())]
    Shape { path: PathBuf, shape: Vec<u64> },
    /// Rows of a length that no gallery has.
    #[error("{}: {invalid}", path.display())]
    Dimension { path: PathBuf, invalid: Invalid },
    #[error("{} is cut short: its header promises {expected} bytes, it has {found}", path.display())]
    Truncated { path: PathBuf, expected: u64, found: u64 },
}

/// How an element is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    F16Little,
    F16Big,
    F32Little,
    F32Big,
}

impl Element {
    /// The element of a descriptor, if it is one that is taken.
    fn of(descr: &str) -> Option<Self> {
        match descr {
            "<f2" => Some(Self::F16Little),
            ">f2" => Some(Self::F16Big),
            "<f4" => Some(Self::F32Little),
            ">f4" => Some(Self::F32Big),
            _ => None,
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::F16Little | Self::F16Big => 2,
            Self::F32Little | Self::F32Big => 4,
        }
    }
}

/// An array of embeddings on disk. Shape: `[rows, dim]`.
#[derive(Debug)]
pub(crate) struct EmbeddingsFile {
    path: PathBuf,
    rows: u64,
    dim: usize,
    element: Element,
    /// Where the first row begins.
    data_offset: u64,
    /// Length of the file and its time of change: they tell whether it is still the same.
    identity: (u64, u128),
}

impl EmbeddingsFile {
    /// Reads the header and compares the file's length with it.
    ///
    /// # Errors
    /// [`EmbeddingsError`], each naming the file, what was found and what is taken.
    pub(crate) fn open(path: &Path) -> Result<Self, EmbeddingsError> {
        let path = path.to_owned();
        let (header, metadata) = match read_header(&path) {
            Ok((Ok(header), metadata)) => (header, metadata),
            Ok((Err(problem), _)) => return Err(EmbeddingsError::NotNumpy { path, problem }),
            Err(source) => return Err(EmbeddingsError::Unreadable { path, source }),
        };
        let Some(element) = Element::of(&header.descr) else {
            return Err(EmbeddingsError::Dtype { path, found: dtype_name(&header.descr) });
        };
        let [rows, dim] = header.shape[..] else {
            return Err(EmbeddingsError::Shape { path, shape: header.shape });
        };
        // An array of one row, or of one column, is in both orders at once.
        if header.fortran_order && rows > 1 && dim > 1 {
            return Err(EmbeddingsError::FortranOrder { path });
        }
        let dim = match model::checked_dim(usize::try_from(dim).unwrap_or(usize::MAX)) {
            Ok(dim) => dim,
            Err(invalid) => return Err(EmbeddingsError::Dimension { path, invalid }),
        };
        let data_bytes = rows.saturating_mul((dim * element.bytes()) as u64);
        let (expected, found) = (data_bytes.saturating_add(header.data_offset), metadata.len());
        if found < expected {
            return Err(EmbeddingsError::Truncated { path, expected, found });
        }
        let changed = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let identity = (found, changed.unwrap_or_default().as_nanos());
        Ok(Self { path, rows, dim, element, data_offset: header.data_offset, identity })
    }

    /// Where the file is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Embeddings in the file.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    /// Values of an embedding.
    pub(crate) fn dim(&self) -> usize {
        self.dim
    }

    /// Length in bytes and time of change in nanoseconds: another pair is another file.
    pub(crate) fn identity(&self) -> (u64, u128) {
        self.identity
    }

    /// The rows from `row` on.
    ///
    /// # Errors
    /// [`EmbeddingsError::Unreadable`] if the file cannot be opened again.
    pub(crate) fn rows_from(&self, row: u64) -> Result<EmbeddingRows, EmbeddingsError> {
        let row_bytes = self.dim * self.element.bytes();
        let place = SeekFrom::Start(self.data_offset + row * row_bytes as u64);
        let opened = File::open(&self.path).and_then(|mut file| file.seek(place).map(|_| file));
        let file = opened.map_err(|source| EmbeddingsError::Unreadable { path: self.path.clone(), source })?;
        Ok(EmbeddingRows {
            path: self.path.clone(),
            reader: BufReader::with_capacity(BUFFER_BYTES, file),
            element: self.element,
            rows_left: self.rows.saturating_sub(row),
            bytes: vec![0; row_bytes],
        })
    }
}

fn read_header(path: &Path) -> io::Result<(Result<Header, HeaderProblem>, std::fs::Metadata)> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    Ok((Header::read(&mut file)?, metadata))
}

/// A place in an [`EmbeddingsFile`] from which rows are read in order.
#[derive(Debug)]
pub(crate) struct EmbeddingRows {
    path: PathBuf,
    reader: BufReader<File>,
    element: Element,
    /// A file may be longer than its header says.
    rows_left: u64,
    bytes: Vec<u8>,
}

impl EmbeddingRows {
    /// Reads the next row. Shape: `[dim]`, as stored, not normalised.
    ///
    /// # Errors
    /// [`EmbeddingsError::Unreadable`], also after the last row and if the file was cut short meanwhile.
    pub(crate) fn read(&mut self) -> Result<Vec<f32>, EmbeddingsError> {
        let read = match self.rows_left {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => self.reader.read_exact(&mut self.bytes),
        };
        self.rows_left = self.rows_left.saturating_sub(1);
        read.map_err(|source| EmbeddingsError::Unreadable { path: self.path.clone(), source })?;
        Ok(match self.element {
            Element::F16Little => self.values(|bytes| f16::from_le_bytes(bytes).to_f32()),
            Element::F16Big => self.values(|bytes| f16::from_be_bytes(bytes).to_f32()),
            Element::F32Little => self.values(f32::from_le_bytes),
            Element::F32Big => self.values(f32::from_be_bytes),
        })
    }

    /// Passes over the next `rows` rows.
    ///
    /// # Errors
    /// [`EmbeddingsError::Unreadable`] if the place in the file cannot be changed.
    pub(crate) fn skip(&mut self, rows: u64) -> Result<(), EmbeddingsError> {
        self.rows_left = self.rows_left.saturating_sub(rows);
        let bytes = i64::try_from(rows * self.bytes.len() as u64).unwrap_or(i64::MAX);
        let moved = self.reader.seek_relative(bytes);
        moved.map_err(|source| EmbeddingsError::Unreadable { path: self.path.clone(), source })
    }

    fn values<const N: usize>(&self, value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        self.bytes.as_chunks::<N>().0.iter().map(|bytes| value(*bytes)).collect()
    }
}

/// Why `values` are not an embedding, in the words of the protocol; never the values themselves.
pub(crate) fn problem(values: &[f32]) -> Option<String> {
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        return Some(format!("embedding: value {at} is not a finite number"));
    }
    let norm = values.iter().map(|value| f64::from(*value) * f64::from(*value)).sum::<f64>().sqrt();
    (norm < model::NORM_MIN).then(|| {
        format!("embedding: has norm {norm:.1e}, the least is {:.0e}: a zero vector has no direction", model::NORM_MIN)
    })
}

/// NumPy's name of a plain dtype, otherwise the beginning of its descriptor.
fn dtype_name(descr: &str) -> String {
    let plain = descr.trim_start_matches(['<', '>', '|', '=']);
    let word = match plain.chars().next() {
        Some('f') => "float",
        Some('i') => "int",
        Some('u') => "uint",
        Some('c') => "complex",
        _ => "",
    };
    match plain.get(1..).map(str::parse::<u8>) {
        Some(Ok(bytes)) if !word.is_empty() => format!("{word}{}", u32::from(bytes) * 8),
        _ => descr.chars().take(DESCR_SHOWN).collect(),
    }
}
