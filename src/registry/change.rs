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

/// A change somebody asked for.
pub struct Change {
    /// The client's name for the request.
    pub request_id: RequestId,
    /// A digest of what was asked, keyed by the vault so that it says nothing about the
    /// embedding. The same request id with another digest is [`Outcome::RequestIdReused`].
    pub digest: [u8; 16],
    /// What to do.
    pub action: Action,
}

/// Where an enrolment comes from. A person who stands before a terminal decides anew; a list may be
/// older than a deletion, so it must say that it means those who were forgotten too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The person is there.
    Person,
    /// A line of a list. The request is not answered as done if its subject was forgotten since.
    List {
        /// Those may come back who were forgotten at this time or before.
        after_forget: Option<SystemTime>,
    },
}

/// What a change does.
pub enum Action {
    /// Enrols a new subject.
    Enrol {
        /// Must be free.
        subject: SubjectId,
        /// Decides whether somebody who was forgotten may come back.
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
    /// Deletes a subject and all templates. The deletion is remembered for ever, as the time and a keyed
    /// hash of the name, until the subject is enrolled again; [`Source`] says by whom.
    Forget {
        /// Must exist.
        subject: SubjectId,
    },
}

/// How one change of a commit ended. A change that was refused left no trace; the others of the
/// same commit stand. Its request id stays free, so the request may be tried again.
///
/// Checks are made in this order: the request id, the subject, whether it was forgotten, each template
/// to remove, the count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Done now, or done before under the same request id (`replayed`).
    Done {
        /// The last log record the change made; the last one before it where it made none (an
        /// update that adds and removes nothing).
        lsn: Lsn,
        /// The subject as this change left it; for a deletion, as it was before.
        subject: SubjectRecord,
        /// True where the request had been done before and nothing was changed now. `subject`
        /// then is as it was answered the first time, as far as it still exists: templates
        /// deleted since are missing from it, all of them where the subject is gone.
        replayed: bool,
    },
    /// The subject id is taken.
    SubjectExists,
    /// The subject was forgotten, and the enrolment is of a list that does not bring it back.
    Forgotten {
        /// When, to the millisecond.
        at: SystemTime,
    },
    /// There is no such subject.
    NoSuchSubject,
    /// This template is not the subject's.
    NoSuchTemplate(TemplateId),
    /// The subject would have this many templates, which is none or too many.
    TemplateCount(usize),
    /// The request id was used for another request.
    RequestIdReused,
}

/// What a commit did.
pub struct Committed {
    /// One a change, in order.
    pub outcomes: Vec<Outcome>,
    /// The records this commit appended to the log, ascending; `Added` ones carry their template.
    pub records: Vec<LogRecord>,
}
