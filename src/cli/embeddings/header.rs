//! The header of a NumPy array file, format versions 1 to 3.
//!
//! Magic, version, a length, and that many bytes of text: a Python dictionary with the element type,
//! the order and the shape. Reads that much Python and no more, without recursion.

use std::io::{self, Read};

/// A longer header does not belong to a plain array.
pub(super) const BYTES_MAX: u64 = 1 << 16;
/// Dimensions that a NumPy array can have.
const DIMENSIONS_MAX: usize = 64;
/// The first bytes of every NumPy array file.
const MAGIC: &[u8; 6] = b"\x93NUMPY";

/// What is wrong with the beginning of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderProblem {
    #[error("its first bytes are not \\x93NUMPY")]
    Magic,
    #[error("its format version {0}.{1} is not known")]
    Version(u8, u8),
    #[error("its header is cut short or over {BYTES_MAX} bytes")]
    Length,
    #[error("its header cannot be read: {expected} is missing at character {at}")]
    Text { expected: &'static str, at: usize },
}

/// What a header says. `descr` is NumPy's descriptor of an element, such as `<f4`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) descr: String,
    pub(super) fortran_order: bool,
    pub(super) shape: Vec<u64>,
    /// Where the first element begins.
    pub(super) data_offset: u64,
}

impl Header {
    /// Reads a header. Allocates its length at most, which is bounded.
    pub(super) fn read(file: &mut impl Read) -> io::Result<Result<Self, HeaderProblem>> {
        let fixed = up_to(file, 8)?;
        if !fixed.starts_with(MAGIC) {
            return Ok(Err(HeaderProblem::Magic));
        }
        let length_bytes = match fixed[6..] {
            [1, _] => 2,
            [2 | 3, _] => 4,
            [major, minor] => return Ok(Err(HeaderProblem::Version(major, minor))),
            _ => return Ok(Err(HeaderProblem::Length)),
        };
        let length = up_to(file, length_bytes)?;
        let number = length.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
        let text = up_to(file, number.min(BYTES_MAX))?;
        if length.len() as u64 != length_bytes || text.len() as u64 != number {
            return Ok(Err(HeaderProblem::Length));
        }
        Ok(Parser { text: &text, at: 0 }.header(8 + length_bytes + number))
    }
}

/// The next `count` bytes, or as many as there are.
fn up_to(file: &mut impl Read, count: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(count).read_to_end(&mut bytes)?;
    Ok(bytes)
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Parser<'a> {
    fn header(mut self, data_offset: u64) -> Result<Header, HeaderProblem> {
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        self.expect("{")?;
        while !self.skip("}") {
            let key = self.quoted()?;
            self.expect(":")?;
            match key {
                b"descr" if descr.is_none() => descr = Some(self.descr()?),
                b"fortran_order" if fortran_order.is_none() => fortran_order = Some(self.truth()?),
                b"shape" if shape.is_none() => shape = Some(self.shape()?),
                _ => return Err(self.missing("one of descr, fortran_order and shape, once each,")),
            }
            if !self.skip(",") {
                self.expect("}")?;
                break;
            }
        }
        self.skip_spaces();
        if self.at != self.text.len() {
            return Err(self.missing("the end"));
        }
        Ok(Header {
            descr: descr.ok_or_else(|| self.missing("'descr'"))?,
            fortran_order: fortran_order.ok_or_else(|| self.missing("'fortran_order'"))?,
            shape: shape.ok_or_else(|| self.missing("'shape'"))?,
            data_offset,
        })
    }

    /// A string, or the text of a list with the fields of a structured element.
    fn descr(&mut self) -> Result<String, HeaderProblem> {
        let descr = if self.skip("[") {
            let start = self.at - 1;
            let mut depth = 1_u32;
            while depth > 0 {
                match self.text.get(self.at).ok_or_else(|| self.missing("\"]\""))? {
                    b'[' => depth += 1,
                    b']' => depth -= 1,
                    _ => {}
                }
                self.at += 1;
            }
            &self.text[start..self.at]
        } else {
            self.quoted()?
        };
        Ok(String::from_utf8_lossy(descr).into_owned())
    }

    fn truth(&mut self) -> Result<bool, HeaderProblem> {
        match () {
            () if self.skip("True") => Ok(true),
            () if self.skip("False") => Ok(false),
            () => Err(self.missing("True or False")),
        }
    }

    fn shape(&mut self) -> Result<Vec<u64>, HeaderProblem> {
        let mut shape = Vec::new();
        self.expect("(")?;
        while !self.skip(")") {
            let digits = self.text[self.at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            let number = std::str::from_utf8(&self.text[self.at..self.at + digits]).unwrap_or_default().parse();
            if shape.len() == DIMENSIONS_MAX {
                return Err(self.missing("the end of the shape"));
            }
            shape.push(number.map_err(|_| self.missing("a length of the shape"))?);
            self.at += digits;
            // As Python 2 wrote it.
            self.skip("L");
            if !self.skip(",") {
                self.expect(")")?;
                break;
            }
        }
        Ok(shape)
    }

    fn quoted(&mut self) -> Result<&'a [u8], HeaderProblem> {
        self.skip_spaces();
        let quote = self.text.get(self.at).filter(|byte| matches!(byte, b'\'' | b'"'));
        let quote = *quote.ok_or_else(|| self.missing("a quotation mark"))?;
        let start = self.at + 1;
        let length = self.text[start..].iter().position(|byte| *byte == quote);
        let length = length.ok_or_else(|| self.missing("the second quotation mark"))?;
        self.at = start + length + 1;
        Ok(&self.text[start..start + length])
    }

    fn expect(&mut self, token: &'static str) -> Result<(), HeaderProblem> {
        if self.skip(token) { Ok(()) } else { Err(self.missing(token)) }
    }

    /// Moves past spaces and `token`, and the spaces after it, if it is next.
    fn skip(&mut self, token: &str) -> bool {
        self.skip_spaces();
        let is_next = self.text[self.at..].starts_with(token.as_bytes());
        if is_next {
            self.at += token.len();
            self.skip_spaces();
        }
        is_next
    }

    fn skip_spaces(&mut self) {
        self.at += self.text[self.at..].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
    }

    fn missing(&self, expected: &'static str) -> HeaderProblem {
        HeaderProblem::Text { expected, at: self.at }
    }
}
