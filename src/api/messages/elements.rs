//! Counts the elements of a message's lists before the message is decoded.
//!
//! An empty element of a list takes two bytes of a message and a hundred bytes in memory, so a message within
//! its limit of bytes could take fifty times as much once it is decoded. A message whose lists have more
//! elements than any valid message is refused before that. Reads tags and lengths only; a malformed message
//! passes, for the decoder to refuse.

use crate::model::Invalid;

/// Elements of all lists of one message. A bulk enrolment has at most 1,024 items of 16 samples each.
pub(in crate::api) const ELEMENTS_MAX: usize = 32 << 10;

/// A field of a message that has elements, or leads to fields that have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::api) struct Field {
    pub(in crate::api) number: u32,
    pub(in crate::api) name: &'static str,
    pub(in crate::api) kind: Kind,
    pub(in crate::api) fields: &'static [Field],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::api) enum Kind {
    /// One message; it counts only for its own fields.
    Message,
    /// Messages or strings; each counts as one.
    List,
    /// Integers; packed, each byte counts as one.
    Integers,
}

const fn list(number: u32, name: &'static str, fields: &'static [Field]) -> Field {
    Field { number, name, kind: Kind::List, fields }
}

pub(in crate::api) const IDENTIFY: &[Field] = &[
    list(4, "probes", &[]),
    Field { number: 8, name: "only", kind: Kind::Message, fields: &[list(1, "subject_ids", &[])] },
];
pub(in crate::api) const VERIFY: &[Field] = &[list(5, "probes", &[])];
pub(in crate::api) const ENROLL: &[Field] = &[list(3, "samples", &[])];
pub(in crate::api) const UPDATE: &[Field] =
    &[list(3, "add_samples", &[]), Field { number: 4, name: "remove_template_ids", kind: Kind::Integers, fields: &[] }];
pub(in crate::api) const BULK: &[Field] =
    &[list(1, "items", &[Field { number: 2, name: "enrollment", kind: Kind::Message, fields: ENROLL }])];

/// How many elements there are.
///
/// # Errors
/// [`Invalid`] with the list that goes over [`ELEMENTS_MAX`].
pub(in crate::api) fn count(message: &[u8], fields: &[Field]) -> Result<usize, Invalid> {
    let mut elements = 0;
    match add(message, fields, &mut elements) {
        Err(Stop::TooMany(name)) => {
            Err(Invalid::new(name, format!("the lists of this message have more than {ELEMENTS_MAX} elements")))
        }
        Ok(()) | Err(Stop::Malformed) => Ok(elements),
    }
}

enum Stop {
    TooMany(&'static str),
    Malformed,
}

fn add(mut bytes: &[u8], fields: &[Field], elements: &mut usize) -> Result<(), Stop> {
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let field = fields.iter().find(|field| u64::from(field.number) == key >> 3);
        let payload = match key & 7 {
            0 => {
                varint(&mut bytes)?;
                None
            }
            1 => split(&mut bytes, 8).map(|_| None)?,
            2 => {
                let length = varint(&mut bytes)?;
                Some(split(&mut bytes, usize::try_from(length).unwrap_or(usize::MAX))?)
            }
            // Within a group the decoder skips every field; counting them refuses no valid message.
            3 | 4 => None,
            5 => split(&mut bytes, 4).map(|_| None)?,
            _ => return Err(Stop::Malformed),
        };
        let Some(field) = field else { continue };
        *elements += match (field.kind, payload) {
            (Kind::Message, _) => 0,
            (Kind::List, _) | (Kind::Integers, None) => 1,
            (Kind::Integers, Some(payload)) => payload.len(),
        };
        if *elements > ELEMENTS_MAX {
            return Err(Stop::TooMany(field.name));
        }
        // The bytes of a string are no fields: what they look like must not end the count.
        if let Some(payload) = payload
            && !field.fields.is_empty()
        {
            add(payload, field.fields, elements)?;
        }
    }
    Ok(())
}

fn split<'b>(bytes: &mut &'b [u8], count: usize) -> Result<&'b [u8], Stop> {
    let (taken, rest) = bytes.split_at_checked(count).ok_or(Stop::Malformed)?;
    *bytes = rest;
    Ok(taken)
}

fn varint(bytes: &mut &[u8]) -> Result<u64, Stop> {
    let mut value = 0;
    for shift in (0..70).step_by(7) {
        let [byte] = *split(bytes, 1)? else { return Err(Stop::Malformed) };
        value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(Stop::Malformed)
}
