//! The contract again, in memory, in the plainest words: what the registry is compared with.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::*;
use crate::model::TEMPLATES_PER_SUBJECT_MAX;
use crate::registry::{Event, SubjectRecord, TemplateRecord};
use thenar_index::SubjectNumber;

#[derive(Clone)]
struct Person {
    number: u64,
    templates: BTreeMap<u64, (Hand, Box<[u8]>)>,
}

/// An entry of the log: kind, subject, template (0 for none).
type Entry = (char, u64, u64);

#[derive(Clone, Default)]
pub(super) struct Model {
    people: BTreeMap<String, Person>,
    forgotten: BTreeSet<String>,
    numbers: u64,
    templates: u64,
    log: Vec<Entry>,
    /// The digest, and what was answered.
    requests: HashMap<String, ([u8; 16], Outcome)>,
}

impl Model {
    pub(super) fn apply(&mut self, change: &Change) -> Outcome {
        let id = match &change.action {
            Action::Enrol { subject, .. } | Action::Update { subject, .. } | Action::Forget { subject } => {
                subject.as_str()
            }
        };
        if let Some((digest, outcome)) = self.requests.get(change.request_id.as_str()) {
            let Outcome::Done { lsn, subject, .. } = outcome else { unreachable!("only what was done is kept") };
            if *digest != change.digest {
                return Outcome::RequestIdReused;
            }
            let mut subject = subject.clone();
            let now = self.people.get(id).filter(|person| person.number == subject.number.0);
            let listed = matches!(change.action, Action::Enrol { source: Source::List { .. }, .. });
            if now.is_some() || !listed {
                subject.templates.retain(|t| now.is_some_and(|person| person.templates.contains_key(&t.id.0)));
                return Outcome::Done { lsn: *lsn, subject, replayed: true };
            }
        }
        let outcome = match &change.action {
            Action::Enrol { source, templates, .. } => self.enrol(id, *source, templates),
            Action::Update { add, remove, .. } => self.update(id, add, remove),
            Action::Forget { .. } => self.forget(id),
        };
        if matches!(outcome, Outcome::Done { .. }) {
            self.requests.insert(change.request_id.as_str().to_owned(), (change.digest, outcome.clone()));
        }
        outcome
    }

    fn enrol(&mut self, id: &str, source: Source, templates: &[SealedTemplate]) -> Outcome {
        if self.people.contains_key(id) {
            return Outcome::SubjectExists;
        }
        // All deletions of a test are of today.
        let today = SystemTime::now() - Duration::from_hours(24);
        let allowed = match source {
            Source::Person => true,
            Source::List { after_forget } => after_forget.is_some_and(|until| until > today),
        };
        if self.forgotten.contains(id) && !allowed {
            return Outcome::Forgotten { at: UNIX_EPOCH };
        }
        if templates.is_empty() || templates.len() > TEMPLATES_PER_SUBJECT_MAX {
            return Outcome::TemplateCount(templates.len());
        }
        self.forgotten.remove(id);
        self.numbers += 1;
        let mut person = Person { number: self.numbers, templates: BTreeMap::new() };
        templates.iter().for_each(|t| self.add(&mut person, t));
        self.people.insert(id.to_owned(), person.clone());
        self.done(id, &person)
    }

    fn update(&mut self, id: &str, add: &[SealedTemplate], remove: &[TemplateId]) -> Outcome {
        let Some(mut person) = self.people.get(id).cloned() else { return Outcome::NoSuchSubject };
        for gone in remove {
            if person.templates.remove(&gone.0).is_none() {
                return Outcome::NoSuchTemplate(*gone);
            }
        }
        let count = person.templates.len() + add.len();
        if count == 0 || count > TEMPLATES_PER_SUBJECT_MAX {
            return Outcome::TemplateCount(count);
        }
        add.iter().for_each(|t| self.add(&mut person, t));
        self.log.extend(remove.iter().map(|gone| ('-', person.number, gone.0)));
        self.people.insert(id.to_owned(), person.clone());
        self.done(id, &person)
    }

    fn forget(&mut self, id: &str) -> Outcome {
        let Some(person) = self.people.remove(id) else { return Outcome::NoSuchSubject };
        self.log.push(('x', person.number, 0));
        self.forgotten.insert(id.to_owned());
        self.done(id, &person)
    }

    fn add(&mut self, person: &mut Person, template: &SealedTemplate) {
        self.templates += 1;
        self.log.push(('+', person.number, self.templates));
        person.templates.insert(self.templates, (template.hand, template.sealed.clone()));
    }

    fn done(&self, id: &str, person: &Person) -> Outcome {
        Outcome::Done { lsn: Lsn(self.log.len() as u64), subject: record(id, person), replayed: false }
    }

    /// A template's owner, hand and bytes, while it exists.
    fn template(&self, id: u64) -> Option<(&str, &Person)> {
        self.people
            .iter()
            .find(|(_, person)| person.templates.contains_key(&id))
            .map(|(name, person)| (name.as_str(), person))
    }

    pub(super) fn template_ids(&self) -> Vec<u64> {
        let mut ids: Vec<u64> = self.people.values().flat_map(|person| person.templates.keys().copied()).collect();
        ids.sort_unstable();
        ids
    }

    /// Compares everything that can be read with what it should be. `context` names the failure.
    pub(super) fn check(&self, registry: &SqliteRegistry, names: &[&str], context: &str) {
        assert_eq!(registry.last_lsn().unwrap().0, self.log.len() as u64, "{context}");
        let counts = RegistryCounts { subjects: self.people.len() as u64, templates: self.template_ids().len() as u64 };
        assert_eq!(registry.counts().unwrap(), counts, "{context}");
        for id in names {
            let found = registry.subject(&name(id)).unwrap().map(timeless);
            assert_eq!(found, self.people.get(*id).map(|person| record(id, person)), "{context}, {id}");
        }
        let mut records = Vec::new();
        while let Some(chunk) =
            Some(registry.log_after(Lsn(records.len() as u64), 7).unwrap()).filter(|c| !c.is_empty())
        {
            records.extend(chunk);
        }
        assert_eq!(records.len(), self.log.len(), "{context}");
        for (at, (found, expected)) in records.iter().zip(&self.log).enumerate() {
            assert_eq!((found.lsn.0, self.entry(found, false)), (at as u64 + 1, *expected), "{context}");
        }
        let ids = self.template_ids();
        let (first, last) = (ids.first().copied().unwrap_or(0), ids.last().copied().unwrap_or(0));
        for (first, last, limit) in
            [(0, u64::MAX, 10_000), (first + 1, last, 3), (last, last, 9), (5, 4, 9), (first, last, 0)]
        {
            let found = registry.templates_between(TemplateId(first), TemplateId(last), limit).unwrap();
            let expected = ids.iter().copied().filter(|id| (first..=last).contains(id)).take(limit);
            assert!(found.iter().map(|t| t.id.0).eq(expected), "{context}, {first} to {last}");
            found.iter().for_each(|t| self.check_template(t));
        }
    }

    /// A log record as the model has it. A fresh one, straight from a commit, carries its template;
    /// one that is read does while the template exists.
    pub(super) fn entry(&self, record: &LogRecord, fresh: bool) -> Entry {
        match &record.event {
            Event::Added { id, template } => {
                let exists = self.template(id.0).is_some();
                assert!(fresh || template.is_some() == exists, "template {}", id.0);
                let subject = match template {
                    Some(template) => {
                        assert_eq!(template.id, *id);
                        if exists {
                            self.check_template(template);
                        }
                        template.subject.0
                    }
                    None => self.log.iter().find(|e| e.0 == '+' && e.2 == id.0).expect("it was added once").1,
                };
                ('+', subject, id.0)
            }
            Event::Removed { subject, id } => ('-', subject.0, id.0),
            Event::Forgotten { subject } => ('x', subject.0, 0),
        }
    }

    pub(super) fn log_from(&self, at: usize) -> &[Entry] {
        &self.log[at..]
    }

    pub(super) fn log_len(&self) -> usize {
        self.log.len()
    }

    fn check_template(&self, found: &StoredTemplate) {
        let (name, person) = self.template(found.id.0).expect("it exists");
        let (hand, bytes) = &person.templates[&found.id.0];
        assert_eq!((found.subject_id.as_str(), found.subject.0, found.hand), (name, person.number, *hand));
        assert!(found.sealed == *bytes, "the bytes of template {}", found.id.0);
    }
}

fn record(id: &str, person: &Person) -> SubjectRecord {
    let template = |(id, (hand, _)): (&u64, &(Hand, Box<[u8]>))| TemplateRecord {
        id: TemplateId(*id),
        hand: *hand,
        enrolled_at: UNIX_EPOCH,
    };
    SubjectRecord {
        number: SubjectNumber(person.number),
        id: name(id),
        enrolled_at: UNIX_EPOCH,
        templates: person.templates.iter().map(template).collect(),
    }
}

/// Without its times, which a model cannot know.
pub(super) fn timeless(mut subject: SubjectRecord) -> SubjectRecord {
    subject.enrolled_at = UNIX_EPOCH;
    subject.templates.iter_mut().for_each(|t| t.enrolled_at = UNIX_EPOCH);
    subject
}

/// [`timeless`] for an outcome.
pub(super) fn timeless_outcome(outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::Done { lsn, subject, replayed } => Outcome::Done { lsn, subject: timeless(subject), replayed },
        Outcome::Forgotten { .. } => Outcome::Forgotten { at: UNIX_EPOCH },
        other => other,
    }
}
