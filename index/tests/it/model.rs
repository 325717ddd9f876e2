//! The index against a `BTreeMap`: after any operations, both have the same rows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use half::f16;
use proptest::prelude::*;
use thenar_index::{
    Compacting, Contents, Error, Geometry, Index, Lsn, OwnedRow, Row, RowMeta, SubjectNumber, TemplateId, verify,
};

use crate::support::contents::{live_rows, staged_rows};
use crate::support::disk::Disk;
use crate::support::rows::{Dice, KEY, SMALL, borrowed, row};

/// Segments of two blocks, so that blocks fill up within a segment.
const TWO_BLOCKS: Geometry = Geometry { dim: 32, segment_rows: 128 };

/// One operation on an index.
#[derive(Debug, Clone)]
enum Step {
    Append { count: u8, subjects: u8 },
    Forget { subject: u8 },
    ForgetTemplate { back: u16 },
    Publish,
    Stage,
    Erase { some: u8 },
    Checkpoint,
    Compact { steps: u8 },
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1u8..60, 1u8..20).prop_map(|(count, subjects)| Step::Append { count, subjects }),
        4 => (0u8..20).prop_map(|subject| Step::Forget { subject }),
        3 => (0u16..200).prop_map(|back| Step::ForgetTemplate { back }),
        4 => Just(Step::Publish),
        1 => Just(Step::Stage),
        3 => any::<u8>().prop_map(|some| Step::Erase { some }),
        2 => Just(Step::Checkpoint),
        5 => (1u8..12).prop_map(|steps| Step::Compact { steps }),
        1 => Just(Step::Reopen),
    ]
}

/// The expected contents of an index.
#[derive(Debug, Clone, Default)]
struct Model {
    /// Live rows by template, including unpublished ones.
    rows: BTreeMap<u64, OwnedRow>,
    /// The unpublished ones among them.
    unpublished: BTreeSet<u64>,
    /// The rows that were live at the last publication.
    shown: BTreeMap<u64, OwnedRow>,
    lsn: u64,
    next_template: u64,
    /// Templates up to this one are published.
    published_to: u64,
}

/// A model and its index.
struct Pair {
    model: Model,
    /// The model when the manifest was last written.
    durable: Model,
    /// Whether the next step of compaction writes a manifest.
    to_be_written: bool,
    index: Index,
    /// Real files without real syncs, which would take long.
    disk: Disk,
    dir: tempfile::TempDir,
}

impl Pair {
    fn new(shape: Geometry) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::default();
        let index = Index::create_on(Arc::new(disk.clone()), dir.path(), shape, KEY).unwrap();
        let model = Model { next_template: 1, ..Model::default() };
        Self { durable: model.clone(), to_be_written: false, model, index, disk, dir }
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Append { count, subjects } => {
                let mut dice = Dice(self.model.next_template);
                let rows: Vec<OwnedRow> = (0..u64::from(count))
                    .map(|_| {
                        self.model.next_template += 1 + dice.below(3);
                        row(self.model.next_template, dice.below(u64::from(subjects)), SMALL.dim)
                    })
                    .collect();
                self.index.append(&borrowed(&rows)).unwrap();
                for row in rows {
                    self.model.unpublished.insert(row.template.0);
                    self.model.rows.insert(row.template.0, row);
                }
            }
            Step::Forget { subject } => {
                let rows = self.index.forget(SubjectNumber(u64::from(subject)));
                let before = self.model.rows.len();
                self.model.rows.retain(|_, row| row.subject.0 != u64::from(subject));
                // A row that is being compacted has a copy.
                let gone = before - self.model.rows.len();
                assert!((gone..=2 * gone).contains(&rows.len()));
                assert!(rows.is_sorted());
            }
            Step::ForgetTemplate { back } => {
                let template = self.model.next_template.saturating_sub(u64::from(back));
                let rows = self.index.forget_template(TemplateId(template));
                assert_eq!(!rows.is_empty(), self.model.rows.remove(&template).is_some());
                assert!(rows.len() <= 2);
            }
            Step::Publish => {
                self.model.lsn += 1;
                self.model.unpublished.clear();
                self.model.published_to = self.model.next_template;
                self.model.shown = self.model.rows.clone();
                let shown = self.index.publish(Lsn(self.model.lsn));
                assert_eq!(shown.live(), self.model.rows.len() as u64);
            }
            Step::Stage => {
                let staged = self.index.stage(Lsn(self.model.lsn));
                assert_eq!(staged_rows(&staged), self.model.rows);
            }
            Step::Erase { some } => {
                let mut dice = Dice(u64::from(some));
                let rows: Vec<Row> = {
                    let shown = self.index.snapshot();
                    let gone = self.index.forgotten().into_iter().filter(|row| !shown.is_live(*row));
                    gone.filter(|_| dice.below(3) > 0).collect()
                };
                self.index.erase(&rows).unwrap();
                assert!(rows.iter().all(|row| !self.index.forgotten().contains(row)));
                let snapshot = self.index.snapshot();
                for segment in snapshot.segments() {
                    let end = segment.first_row + (segment.rows.len() / snapshot.dim()) as u32;
                    for row in rows.iter().filter(|row| (segment.first_row..end).contains(&row.0)) {
                        assert!(snapshot.row(*row).iter().all(|x| *x == f16::from_bits(0)));
                    }
                }
            }
            Step::Checkpoint => {
                self.index.checkpoint().unwrap();
                self.settle_durable();
            }
            Step::Compact { steps } => self.compact(usize::from(steps)),
            Step::Reopen => self.reopen(),
        }
        self.compare();
    }

    /// What a restart would restore now: what is live and published. What was forgotten since the last
    /// publication stays forgotten.
    fn settle_durable(&mut self) {
        self.durable = self.model.clone();
        let unpublished = std::mem::take(&mut self.durable.unpublished);
        self.durable.rows.retain(|template, _| !unpublished.contains(template));
        self.durable.next_template = self.model.published_to;
    }

    fn compact(&mut self, steps: usize) {
        for _ in 0..steps {
            let identities = |index: &Index| -> Vec<u64> { index.segments().iter().map(|s| s.identity).collect() };
            let before = identities(&self.index);
            match self.index.compact(u64::MAX) {
                Ok(Compacting::Nothing) => return,
                Ok(Compacting::More) => {}
                Ok(Compacting::Staged) => {
                    let staged = self.index.stage(Lsn(self.model.lsn));
                    assert_eq!(staged_rows(&staged), self.model.rows);
                }
                Err(Error::Unpublished) => {
                    let appended = self.model.published_to != self.model.next_template;
                    assert!(appended || self.model.shown != self.model.rows);
                    return;
                }
                Err(other) => panic!("{other}"),
            }
            // One step publishes it, the next one writes a manifest that names it.
            if std::mem::replace(&mut self.to_be_written, identities(&self.index) != before) {
                self.settle_durable();
            }
        }
    }

    /// After enough compaction, only files that count are left, with few dead rows.
    fn compact_all(&mut self) {
        self.take(&Step::Publish);
        self.take(&Step::Compact { steps: u8::MAX });
        assert_eq!(self.index.compact(u64::MAX).unwrap(), Compacting::Nothing);
        let segments = self.index.segments();
        assert_eq!(segment_files(self.dir.path()), segments.len());
        for (place, segment) in segments.iter().enumerate() {
            let dead = u64::from(segment.rows) - segment.live;
            let little = u64::from(self.index.geometry().segment_rows) / 64;
            assert!(dead < segment.live.max(little), "{dead} dead rows, {} live ones", segment.live);
            assert!(segment.live > 0 || place + 1 == segments.len());
        }
    }

    fn reopen(&mut self) {
        self.to_be_written = false;
        let spare = tempfile::tempdir().unwrap();
        let other = Index::create_on(Arc::new(Disk::default()), spare.path(), SMALL, KEY).unwrap();
        drop(std::mem::replace(&mut self.index, other));
        let unrepaired = Index::open_on(Arc::new(self.disk.clone()), self.dir.path(), KEY).unwrap();
        assert_eq!(unrepaired.damage(), []);
        assert!(unrepaired.lsn().0 >= self.durable.lsn);
        self.index = unrepaired.finish().unwrap();
        // Rows whose erasure has begun since the checkpoint stay erased. Rows that were only forgotten since
        // come back until the log forgets them again.
        let shown = live_rows(&self.index.snapshot());
        for (template, row) in &shown {
            assert_eq!(self.durable.rows.get(template), Some(row));
        }
        for template in self.durable.rows.keys().filter(|template| self.model.rows.contains_key(template)) {
            assert!(shown.contains_key(template), "live row {template} was lost");
        }
        self.durable.rows = shown.clone();
        self.durable.shown = shown;
        self.model = self.durable.clone();
        self.model.published_to = self.model.next_template;
        assert_eq!(verify_clean(self.dir.path()), Err(()));
        assert_eq!(segment_files(self.dir.path()), self.index.segments().len());
    }

    fn compare(&self) {
        let snapshot = self.index.snapshot();
        let expected = &self.model.shown;
        assert_eq!(live_rows(&snapshot), *expected);
        assert_eq!(snapshot.lsn(), Lsn(self.model.lsn));
        let mut by_subject: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for row in expected.values() {
            by_subject.entry(row.subject.0).or_default().push(row.template.0);
        }
        for subject in 0..20 {
            let rows = snapshot.rows_of(SubjectNumber(subject));
            let templates: Vec<u64> = rows.iter().map(|row| snapshot.meta(*row).unwrap().template.0).collect();
            assert_eq!(templates, by_subject.remove(&subject).unwrap_or_default());
        }
        let last = self.index.last_template().map_or(0, |last| last.0);
        assert!(self.model.rows.keys().next_back().is_none_or(|largest| *largest <= last));
        assert_eq!(self.index.contents(), contents(self.model.rows.values().rev()));
    }
}

fn contents<'a>(rows: impl Iterator<Item = &'a OwnedRow>) -> Contents {
    let mut contents = Contents::default();
    for OwnedRow { template, subject, hand, label, source, .. } in rows {
        contents.add(&RowMeta { template: *template, subject: *subject, hand: *hand, label, source: *source });
    }
    contents
}

#[test]
fn contents_of_sets_that_differ_in_anything_differ() {
    let rows: Vec<OwnedRow> = (1..50).map(|n| row(n, n / 2, SMALL.dim)).collect();
    let whole = contents(rows.iter());
    assert_eq!(whole, contents(rows.iter().rev()), "in any order");
    assert_ne!(whole, contents(rows[1..].iter()));
    let changes: [fn(&mut OwnedRow); 5] = [
        |row| row.template.0 += 100,
        |row| row.subject.0 += 100,
        |row| row.hand ^= 1,
        |row| row.label.push('y'),
        |row| row.source ^= 1,
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut other = rows.clone();
        change(&mut other[7]);
        assert_ne!(whole, contents(other.iter()), "change {number}");
    }
    // Two subjects exchanged.
    let mut other = rows;
    (other[3].subject, other[9].subject) = (other[9].subject, other[3].subject);
    assert_ne!(whole, contents(other.iter()));
}

fn segment_files(dir: &Path) -> usize {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_str().unwrap().starts_with("seg-")).count()
}

/// Verifying is refused while a writer has the folder.
fn verify_clean(dir: &Path) -> Result<(), ()> {
    match verify(dir, KEY, &|_, _| std::ops::ControlFlow::Continue(())) {
        Err(Error::Locked { .. }) => Err(()),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn an_index_holds_what_a_map_holds(steps in prop::collection::vec(step(), 1..60), wide: bool) {
        let mut pair = Pair::new(if wide { TWO_BLOCKS } else { SMALL });
        pair.index.set_reader_wait(Duration::from_millis(200));
        for step in &steps {
            pair.take(step);
        }
        pair.take(&Step::Reopen);
        pair.compact_all();
        pair.take(&Step::Reopen);
    }
}
