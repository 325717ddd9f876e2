//! Changes: what a caller asks the registry to do, and how each one ended.

use std::time::SystemTime;

use thenar_index::{Lsn, TemplateId};

use super::{LogRecord, SubjectRecord};
use crate::model::{Hand, RequestId, SubjectId};

/// A template on its way into the registry, sealed under its subject's key.
#[derive(Clone)]
pub struct SealedTemplate {
    /// The palm it was made from.
    pub hand: Hand,
    /// Opaque to the registry: what `vault` sealed.
    pub sealed: Box<[u8]>,
}

/// A requested change.
pub struct Change {
    /// The client's name for the request.
    pub request_id: RequestId,
    /// A digest of the request, keyed by the vault so that it reveals nothing about the
    /// embedding. The same request id with another digest is [`Outcome::RequestIdReused`].
    pub digest: [u8; 16],
    /// What to do.
    pub action: Action,
}

/// Where an enrolment comes from. A person who is present decides anew; a list may be older than a
/// deletion, so it must say explicitly that it includes people who were forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The person is present.
    Person,
    /// A line of a list. A repeated request does not count as done if its subject was forgotten since.
    List {
        /// Subjects that were forgotten at this time or earlier may come back.
        after_forget: Option<SystemTime>,
    },
}

/// What a change does.
pub enum Action {
    /// Enrols a new subject.
    Enrol {
        /// Must be free.
        subject: SubjectId,
        /// Decides whether a subject that was forgotten may come back.
        source: Source,
        /// 1 to `TEMPLATES_PER_SUBJECT_MAX`.
        templates: Vec<SealedTemplate>,
    },
    /// Changes the templates of a subject; at least one and at most `TEMPLATES_PER_SUBJECT_MAX`
    /// remain. The log gets the additions first, then the removals, so that no reader of the log
    /// ever sees the subject without a template.
    Update {
        /// Must exist.
        subject: SubjectId,
        /// Templates to add.
        add: Vec<SealedTemplate>,
        /// Templates to delete; each must be the subject's, and be named once.
        remove: Vec<TemplateId>,
    },
    /// Deletes a subject and all its templates. The deletion is remembered, as the time and a keyed
    /// hash of the name, until the subject is enrolled again, which [`Source`] restricts.
    Forget {
        /// Must exist.
        subject: SubjectId,
    },
}

/// How one change of a commit ended. A refused change has no effect on the registry or on the other
/// changes of the commit. Its request id stays free, so the request may be tried again.
///
/// Checks are made in this order: the request id, the subject, whether it was forgotten, each template
/// to remove, the count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Done now, or done before under the same request id (`replayed`).
    Done {
        /// The last log record the change made; if it made none (an update that adds and removes
        /// nothing), the last one before it.
        lsn: Lsn,
        /// The subject as this change left it; for a deletion, as it was before.
        subject: SubjectRecord,
        /// True if the request had been done before and nothing was changed now. `subject` is then
        /// as in the first answer, as far as it still exists: templates deleted since are missing
        /// from it, all of them if the subject is gone.
        replayed: bool,
    },
    /// The subject id is taken.
    SubjectExists,
    /// The subject was forgotten, and the enrolment comes from a list that may not bring it back.
    Forgotten {
        /// When, to the millisecond.
        at: SystemTime,
    },
    /// There is no such subject.
    NoSuchSubject,
    /// This template is not the subject's.
    NoSuchTemplate(TemplateId),
    /// The subject would have this many templates: none, or too many.
    TemplateCount(usize),
    /// The request id was used for another request.
    RequestIdReused,
}

/// What a commit did.
pub struct Committed {
    /// One per change, in order.
    pub outcomes: Vec<Outcome>,
    /// The records this commit appended to the log, ascending; `Added` records include their template.
    pub records: Vec<LogRecord>,
}
