//! The types that every module shares: subjects, hands, purposes, decisions, embeddings and their limits.
//!
//! Plain values: nothing here does I/O or knows a transport, a file or a GPU. Every value that
//! exists is valid: the constructors check it, and their errors name the field and the limit.

pub mod synthetic;

use std::collections::HashMap;
use std::fmt;

use half::f16;

/// The largest embedding dimension a gallery may have.
pub const DIM_MAX: usize = 2048;
/// Embedding dimensions are multiples of this, so that every kernel reads whole vectors.
pub const DIM_STEP: usize = 32;
/// The norm below which an embedding has no direction and is refused.
pub const NORM_MIN: f64 = 1e-6;
/// How far from 1 the length of a rotated embedding may be before it is rounded to a row. The rotation
/// ensures it; certificates and the engines' bounds rely on it. 2^-20.
pub const LENGTH_ERROR_MAX: f64 = 1.0 / 1_048_576.0;
/// Bytes of UTF-8 in a subject id, at most.
pub const SUBJECT_ID_BYTES_MAX: usize = thenar_index::LABEL_BYTES_MAX;
/// Bytes of UTF-8 in a request id or a venue id, at most.
pub const NAME_BYTES_MAX: usize = 128;
/// Templates one subject may have (both hands, several captures).
pub const TEMPLATES_PER_SUBJECT_MAX: usize = 16;
/// Probes one identification may carry.
pub const PROBES_MAX: usize = 4;
/// Candidates one identification may ask for.
pub const CANDIDATES_MAX: u32 = 100;
/// Subjects one identification may be restricted to. This many ids of the greatest length still fit a
/// message with the largest probes.
pub const FILTER_SUBJECTS_MAX: usize = 3000;

/// A value in a request that is refused. Never carries biometric data: only the field's name, its place
/// and the limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Invalid {
    /// Path of the field in the request, such as `probes[1].embedding.values`.
    pub field: String,
    /// What is wrong and what the limit is.
    pub problem: String,
}

impl Invalid {
    /// An invalid `field`, with `problem` naming the limit.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }

    /// The same problem one level further out: `outer.field`.
    #[must_use]
    pub fn within(mut self, outer: &str) -> Self {
        self.field = if self.field.is_empty() { outer.to_owned() } else { format!("{outer}.{}", self.field) };
        self
    }
}

/// A name chosen by a client: visible ASCII without spaces, 1 to `max` bytes.
fn checked_name(field: &str, name: &str, max: usize) -> Result<(), Invalid> {
    if name.is_empty() {
        return Err(Invalid::new(field, "is empty"));
    }
    if name.len() > max {
        return Err(Invalid::new(field, format!("has {} bytes, the limit is {max}", name.len())));
    }
    if let Some(bad) = name.chars().find(|c| !c.is_ascii_graphic()) {
        return Err(Invalid::new(
            field,
            format!("holds {bad:?}; letters, digits and punctuation of ASCII are taken, no spaces"),
        ));
    }
    Ok(())
}

macro_rules! client_name {
    ($(#[$doc:meta])* $name:ident, $field:literal, $max:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Box<str>);

        impl $name {
            /// Checks `name` against the limits.
            ///
            /// # Errors
            /// [`Invalid`] if it is empty, too long or not visible ASCII.
            pub fn new(name: &str) -> Result<Self, Invalid> {
                checked_name($field, name, $max)?;
                Ok(Self(name.into()))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

client_name!(
    /// The client's name for a person: at most [`SUBJECT_ID_BYTES_MAX`] bytes of visible ASCII.
    SubjectId, "subject_id", SUBJECT_ID_BYTES_MAX
);
client_name!(
    /// The client's name for one request; a write repeated under it happens once.
    RequestId, "request_id", NAME_BYTES_MAX
);
client_name!(
    /// A place that uses the service: a store, a stadium, an office.
    VenueId, "venue_id", NAME_BYTES_MAX
);

/// The only subjects that may be found: 1 to [`FILTER_SUBJECTS_MAX`] different ones, enrolled or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubjectFilter(Box<[SubjectId]>);

impl SubjectFilter {
    /// Checks the ids and their number.
    ///
    /// # Errors
    /// [`Invalid`] if there are none or too many, one is invalid, or one is listed twice.
    pub fn new<S: AsRef<str>>(ids: &[S]) -> Result<Self, Invalid> {
        let field = "subject_ids";
        if ids.is_empty() {
            let problem = "is empty, so that nobody could be found; leave the filter out to search for everybody";
            return Err(Invalid::new(field, problem));
        }
        if ids.len() > FILTER_SUBJECTS_MAX {
            let problem = format!("has {} subjects, the limit is {FILTER_SUBJECTS_MAX}", ids.len());
            return Err(Invalid::new(field, problem));
        }
        let mut first_at = HashMap::with_capacity(ids.len());
        let checked = ids.iter().enumerate().map(|(at, id)| {
            let id = id.as_ref();
            let place = format!("{field}[{at}]");
            if let Some(first) = first_at.insert(id, at) {
                return Err(Invalid::new(place, format!("is the same as {field}[{first}]")));
            }
            SubjectId::new(id).map_err(|invalid| Invalid::new(place, invalid.problem))
        });
        Ok(Self(checked.collect::<Result<_, _>>()?))
    }

    /// The ids, in the order given.
    #[must_use]
    pub fn ids(&self) -> &[SubjectId] {
        &self.0
    }
}

/// Which hand a palm belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[repr(u8)]
pub enum Hand {
    /// Not known; it is compared with both.
    #[default]
    Unspecified = 0,
    /// The left hand.
    Left = 1,
    /// The right hand.
    Right = 2,
}

impl Hand {
    /// The hand of a stored code, if the code is valid.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Unspecified),
            1 => Some(Self::Left),
            2 => Some(Self::Right),
            _ => None,
        }
    }

    /// Whether a probe of this hand is compared with a template of `other`: both are the same, or
    /// one of them is not known.
    #[must_use]
    pub fn comparable(self, other: Self) -> bool {
        self == other || self == Self::Unspecified || other == Self::Unspecified
    }

    /// The word for people and programs: `left`, `right` or `unspecified`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::Left => "left",
            Self::Right => "right",
        }
    }
}

impl std::str::FromStr for Hand {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text.to_ascii_lowercase().as_str() {
            "" | "unspecified" => Ok(Self::Unspecified),
            "left" | "l" => Ok(Self::Left),
            "right" | "r" => Ok(Self::Right),
            _ => Err(Invalid::new("hand", format!("{text:?} is not left, right or unspecified"))),
        }
    }
}

/// What an identification is for. Each purpose has a policy of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Purpose {
    /// Paying at a terminal.
    Payment,
    /// Entering a venue.
    Entry,
    /// Entering a place of work.
    Workplace,
    /// Collecting loyalty points.
    Loyalty,
}

impl Purpose {
    /// Every purpose, in the order of the protocol's enum.
    pub const ALL: [Self; 4] = [Self::Payment, Self::Entry, Self::Workplace, Self::Loyalty];

    /// The word used in configuration, metrics and output.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Payment => "payment",
            Self::Entry => "entry",
            Self::Workplace => "workplace",
            Self::Loyalty => "loyalty",
        }
    }
}

/// What an identification decides about the person at the turnstile or terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    /// It is the first candidate.
    Match,
    /// Nobody reaches the threshold.
    NoMatch,
    /// Somebody does, but another subject comes too close.
    Inconclusive,
}

impl Decision {
    /// Every decision.
    pub const ALL: [Self; 3] = [Self::Match, Self::NoMatch, Self::Inconclusive];

    /// The word used in metrics and output.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Match => "match",
            Self::NoMatch => "no_match",
            Self::Inconclusive => "inconclusive",
        }
    }
}

/// A client's embedding as a unit vector, not yet rotated. Shape: `[dim]`, f32.
///
/// `Debug` does not show its values: no biometric data in any log.
#[derive(Clone, PartialEq)]
pub struct Embedding(Vec<f32>);

impl Embedding {
    /// Normalises `values` to unit length.
    ///
    /// # Errors
    /// [`Invalid`] if the count is not `dim`, a value is NaN or infinite, or the norm is below
    /// [`NORM_MIN`].
    pub fn new(mut values: Vec<f32>, dim: usize) -> Result<Self, Invalid> {
        if values.len() != dim {
            return Err(Invalid::new("", format!("has {} values, this gallery has {dim} dimensions", values.len())));
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(Invalid::new("", format!("value {at} is not a finite number")));
        }
        // In f64 the largest f32 squared, 2048 times over, is far from overflow.
        let norm = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
        if norm < NORM_MIN {
            return Err(Invalid::new(
                "",
                format!("has norm {norm:.1e}, the least is {NORM_MIN:.0e}: a zero vector has no direction"),
            ));
        }
        for v in &mut values {
            #[expect(clippy::cast_possible_truncation, reason = "a component of a unit vector rounds to f32")]
            {
                *v = (f64::from(*v) / norm) as f32;
            }
        }
        Ok(Self(values))
    }

    /// The components. Their norm is 1.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.0
    }
}

impl fmt::Debug for Embedding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Embedding[{}]", self.0.len())
    }
}

/// A rotated template rounded to f16, as the index stores it. Shape: `[dim]`.
#[derive(Clone, PartialEq)]
pub struct TemplateRow(pub Box<[f16]>);

impl fmt::Debug for TemplateRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TemplateRow[{}]", self.0.len())
    }
}

/// Whether `dim` can be the dimension of a gallery.
///
/// # Errors
/// [`Invalid`] unless it is a multiple of [`DIM_STEP`] from [`DIM_STEP`] to [`DIM_MAX`].
pub fn checked_dim(dim: usize) -> Result<usize, Invalid> {
    if dim == 0 || dim > DIM_MAX || !dim.is_multiple_of(DIM_STEP) {
        return Err(Invalid::new("dim", format!("{dim} is not a multiple of {DIM_STEP} from {DIM_STEP} to {DIM_MAX}")));
    }
    Ok(dim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_has_one_to_three_thousand_different_ids() {
        let ids: Vec<String> = (0..=FILTER_SUBJECTS_MAX).map(|number| format!("s{number}")).collect();
        let filter = SubjectFilter::new(&ids[1..]).unwrap();
        assert_eq!(filter.ids().len(), FILTER_SUBJECTS_MAX);
        assert_eq!(filter.ids()[0].as_str(), "s1");
        let problem = |ids: &[&str]| SubjectFilter::new(ids).unwrap_err().to_string();
        assert!(problem(&[]).starts_with("subject_ids: is empty"));
        assert!(SubjectFilter::new(&ids).unwrap_err().to_string().contains("3001 subjects, the limit is 3000"));
        assert_eq!(problem(&["a", "b", "c", "b"]), "subject_ids[3]: is the same as subject_ids[1]");
        assert_eq!(problem(&["a", ""]), "subject_ids[1]: is empty");
        assert!(problem(&["a", "two words"]).starts_with("subject_ids[1]: holds ' '"));
        assert!(problem(&[&"x".repeat(65)]).starts_with("subject_ids[0]: has 65 bytes, the limit is 64"));
    }
}
