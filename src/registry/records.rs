//! What the registry holds: subjects, templates, the change log.

use std::time::SystemTime;

use thenar_index::{Lsn, RowMeta, SubjectNumber, TemplateId, source_of};

use crate::model::{Hand, SubjectId};

/// A subject as the registry knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubjectRecord {
    /// The registry's number, never used twice.
    pub number: SubjectNumber,
    /// The client's name.
    pub id: SubjectId,
    /// To the millisecond.
    pub enrolled_at: SystemTime,
    /// By ascending id. Without the sealed bytes.
    pub templates: Vec<TemplateRecord>,
}

/// A template as the registry knows it, without its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateRecord {
    /// The registry's number, never used twice.
    pub id: TemplateId,
    /// The palm it was made from.
    pub hand: Hand,
    /// To the millisecond.
    pub enrolled_at: SystemTime,
}

/// One record of the change log, with what the index needs to follow it.
#[derive(Clone)]
pub struct LogRecord {
    /// The record's place. Consecutive records have consecutive numbers.
    pub lsn: Lsn,
    /// What changed.
    pub event: Event,
}

/// What a log record says.
#[derive(Clone)]
pub enum Event {
    /// A template was added. `template` is `None` if it has been deleted since: a later record says so.
    Added {
        /// Its id.
        id: TemplateId,
        /// The template, while it exists.
        template: Option<StoredTemplate>,
    },
    /// One template of a subject was deleted.
    Removed {
        /// The subject.
        subject: SubjectNumber,
        /// Its id.
        id: TemplateId,
    },
    /// A subject was deleted, with all its templates.
    Forgotten {
        /// The subject.
        subject: SubjectNumber,
    },
}

/// A template with its sealed bytes. If it is damaged (its hand or its subject's name cannot be read, or
/// its bytes are missing), then `sealed` is empty, and `hand` and `subject_id` have no meaning.
#[derive(Clone)]
pub struct StoredTemplate {
    /// Its id.
    pub id: TemplateId,
    /// The subject it belongs to.
    pub subject: SubjectNumber,
    /// The client's name of that subject.
    pub subject_id: SubjectId,
    /// The palm it was made from.
    pub hand: Hand,
    /// What `vault` sealed.
    pub sealed: Box<[u8]>,
}

impl StoredTemplate {
    /// The metadata of this template's row in the index.
    #[must_use]
    pub fn meta(&self) -> RowMeta<'_> {
        RowMeta {
            template: self.id,
            subject: self.subject,
            hand: self.hand as u8,
            label: self.subject_id.as_str(),
            source: source_of(&self.sealed),
        }
    }
}

/// How many subjects and templates are in the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RegistryCounts {
    /// Subjects enrolled now.
    pub subjects: u64,
    /// Templates enrolled now.
    pub templates: u64,
}

/// What is fixed when a gallery is made. Every server that opens it must have the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GalleryIdentity {
    /// Components of an embedding.
    pub dim: usize,
    /// Fingerprint of the key under which the templates are sealed and rotated.
    pub key_id: [u8; 16],
}
