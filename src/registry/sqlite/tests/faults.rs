//! Full disks, foreign files, damaged files.

use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::registry::Event;

fn open_error(path: &Path) -> RegistryError {
    match open(path) {
        Ok(_) => panic!("{} opened", path.display()),
        Err(e) => e,
    }
}

/// Many templates under one request, more than a few megabytes.
fn big(request: &str) -> Vec<Change> {
    let many = |i| {
        let subject = name(&format!("{request}-{i}"));
        Action::Enrol { subject, source: Source::Person, templates: vec![sealed(i, 50_000); 16] }
    };
    (0..10).map(|i| change(&format!("{request}-{i}"), 0, many(i))).collect()
}

/// Fills the disk, makes room, and looks for what was lost.
fn fill_up(registry: &SqliteRegistry, make_room: impl FnOnce()) {
    registry.commit(&[enrol("before", "ann", &[1])]).unwrap();
    let lsn = registry.last_lsn().unwrap();
    for attempt in 0..2 {
        let error = registry.commit(&big("big")).err().expect("there is no room");
        assert!(matches!(error, RegistryError::DiskFull { .. }), "attempt {attempt}: {error:?}");
        assert!(error.to_string().ends_with("is full"), "{error}");
        assert_eq!(registry.last_lsn().unwrap(), lsn, "nothing of it is there");
        assert!(registry.subject(&name("big-0")).unwrap().is_none());
        assert_eq!(registry.subject(&name("ann")).unwrap().unwrap().templates.len(), 1);
    }
    make_room();
    let committed = registry.commit(&big("big")).unwrap();
    assert!(committed.outcomes.iter().all(|o| matches!(o, Outcome::Done { replayed: false, .. })));
    assert_eq!(registry.last_lsn().unwrap().0, lsn.0 + 160);
}

#[test]
fn a_database_at_its_limit_is_a_full_disk_that_can_be_emptied() {
    let mut home = Home::new();
    let limit = |pages: u32| home.writer.lock().connection().pragma_update(None, "max_page_count", pages).unwrap();
    limit(100);
    fill_up(&home, || limit(1_000_000));
    home.reopen();
    check_tables(&home.path());
}

/// Unmounts on the way out of a failed test too.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_full_file_system_is_a_full_disk_that_can_be_emptied() {
    let folder = tempfile::tempdir().unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"]).arg(folder.path()).output();
    if !mount.as_ref().is_ok_and(|m| m.status.success()) {
        println!("skipped: a small file system could not be mounted here: {mount:?}");
        return;
    }
    let mounted = Mounted(folder.path().to_owned());
    let filler = folder.path().join("filler");
    std::fs::write(&filler, vec![0_u8; 20 << 20]).unwrap();
    let path = folder.path().join("registry.db");
    let registry = open(&path).unwrap();
    fill_up(&registry, || std::fs::remove_file(&filler).unwrap());
    drop(registry);
    check_tables(&path);
    drop(mounted);
}

/// What the files of an open registry would be after kill -9; `log` says which of the write-ahead log's
/// bytes reached the disk.
fn left_by_kill_9(home: &Home, log: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Home {
    let left = Home { registry: None, folder: tempfile::tempdir().unwrap() };
    std::fs::copy(home.path(), left.path()).unwrap();
    let bytes = std::fs::read(scrub::log_path(&home.path())).unwrap();
    std::fs::write(scrub::log_path(&left.path()), log(bytes)).unwrap();
    left
}

#[test]
fn a_commit_that_could_not_be_synced_is_in_doubt_and_the_last() {
    let mut home = Home::new();
    commit_one(&home, enrol("r", "ann", &[1]));
    let before = std::fs::read(scrub::log_path(&home.path())).unwrap().len();
    home.fail_syncs();
    let error = home.commit(&[enrol("s", "bob", &[1])]).err().unwrap();
    assert!(matches!(error, RegistryError::InDoubt { .. }), "{error}");
    // Nothing more is written, not even to clear away what was deleted.
    let files = || [home.path(), scrub::log_path(&home.path())].map(|path| std::fs::read(path).unwrap());
    let after = files();
    for refused in [
        home.commit(&[enrol("t", "cid", &[1])]).map(drop),
        home.commit(&[enrol("s", "bob", &[1])]).map(drop),
        home.prune_requests(Duration::ZERO, 9).map(drop),
        home.claim_identity(&GalleryIdentity { dim: 32, key_id: [0; 16] }).map(drop),
        home.scrub(),
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(error, RegistryError::WriterStopped { .. }), "{error}");
        assert!(error.to_string().ends_with("check the disk and restart"), "{error}");
    }
    assert!(files() == after);
    assert_eq!(home.counts().unwrap().subjects, 1, "reading goes on");
    // Whatever a restart finds, the request is done once when it is repeated.
    for (kept, was_there) in [(usize::MAX, true), (before, false)] {
        let mut left = left_by_kill_9(&home, |mut log| {
            log.truncate(kept);
            log
        });
        left.reopen();
        assert_eq!(left.subject(&name("bob")).unwrap().is_some(), was_there);
        let Outcome::Done { lsn, replayed, .. } = commit_one(&left, enrol("s", "bob", &[1])) else { panic!("done") };
        assert_eq!((lsn, replayed), (Lsn(2), was_there));
        assert_eq!(left.counts().unwrap().subjects, 2);
        left.registry = None;
        check_tables(&left.path());
    }
    home.reopen();
    commit_one(&home, enrol("s", "bob", &[1]));
}

#[test]
fn what_is_not_a_registry_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("registry.db");
    let unusable = |why: &str| format!("the registry at {} cannot be used: {why}", path.display());
    for content in [&b"no database ".repeat(50)[..], &[0xff; 5000]] {
        std::fs::write(&path, content).unwrap();
        assert_eq!(open_error(&path).to_string(), unusable("it is not an SQLite database, or its header is damaged"));
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }
    std::fs::write(&path, "too short for a database").unwrap();
    assert_eq!(open_error(&path).to_string(), unusable("it is cut off"));
    std::fs::remove_file(&path).unwrap();
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE cats(name TEXT)").unwrap();
    assert_eq!(open_error(&path).to_string(), unusable("it is a database of another program"));
    Connection::open(&path).unwrap().execute_batch("PRAGMA application_id = 7; PRAGMA user_version = 1").unwrap();
    assert_eq!(open_error(&path).to_string(), unusable("it is a database of another program"));
    let error = open_error(folder.path()).to_string();
    assert_eq!(error, format!("the registry at {} cannot be used: it is not a file", folder.path().display()));
    let nowhere = folder.path().join("none/registry.db");
    let error = open_error(&nowhere);
    assert!(matches!(error, RegistryError::File { doing: "creating it", .. }), "{error}");
}

#[test]
fn an_empty_file_becomes_a_registry_and_keeps_its_mode() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file:registry.db?mode=memory");
    std::fs::write(&path, b"").unwrap();
    let mode = std::fs::metadata(&path).unwrap().mode();
    drop(open(&path).unwrap());
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!(metadata.mode(), mode);
    assert!(metadata.len() > 0, "the name is a name, not a URI");
}

#[test]
fn a_newer_schema_is_refused() {
    let mut home = Home::new();
    home.meddle(|conn| conn.pragma_update(None, "user_version", schema::VERSION + 1).unwrap());
    let error = open_error(&home.path()).to_string();
    assert_eq!(error, format!("the registry at {} has schema 2, this program knows up to 1", home.path().display()));
}

#[test]
fn counters_that_contradict_the_rows_are_damage() {
    for (sql, what) in [
        ("DELETE FROM log WHERE lsn = 2", "counter of log records"),
        ("INSERT INTO log VALUES (3, 1, 1, 3)", "counter of log records"),
        ("INSERT INTO subjects VALUES (2, x'00', 1, 1)", "counter of subjects"),
        ("INSERT INTO templates VALUES (3, 1, 1, 1, 1)", "counter of templates"),
        ("UPDATE counters SET last_lsn = 1", "row of counters"),
        ("UPDATE counters SET templates = 3", "row of counters"),
        ("UPDATE counters SET sums = zeroblob(80)", "row of counters"),
        ("UPDATE counters SET mac = zeroblob(16)", "row of counters"),
        ("UPDATE counters SET subjects = -1", "counter"),
        ("PRAGMA user_version = 0", "schema version"),
    ] {
        let mut home = Home::new();
        commit_one(&home, enrol("r", "ann", &[1, 2]));
        home.meddle(|conn| conn.execute_batch(sql).unwrap());
        let error = open_error(&home.path());
        assert!(matches!(&error, RegistryError::Damaged { what: found, .. } if *found == what), "{sql}: {error}");
    }
}

#[test]
fn rows_no_program_of_ours_writes_are_damage_and_name_their_key() {
    let all = |home: &Home| {
        home.log_after(Lsn(0), 99)
            .err()
            .or(home.templates_between(TemplateId(0), TemplateId(99), 99).err())
            .or(home.subject(&name("ann")).err())
    };
    for (sql, message) in [
        ("UPDATE templates SET hand = 3 WHERE id = 2", "holds a damaged hand of a template at 2"),
        ("UPDATE log SET kind = 9 WHERE lsn = 1", "holds a damaged log record at 1"),
        ("UPDATE log SET template = NULL WHERE lsn = 1", "holds a damaged log record at 1"),
        ("UPDATE log SET subject = -4 WHERE lsn = 2", "holds a damaged log record at 2"),
        ("DELETE FROM templates", "holds a damaged subject without templates at 1"),
        ("UPDATE subjects SET enrolled_at = -1", "holds a damaged enrolment time of a subject at 1"),
        ("UPDATE templates SET enrolled_at = -1 WHERE id = 1", "holds a damaged enrolment time of a template at 1"),
    ] {
        let mut home = Home::new();
        commit_one(&home, enrol("r", "ann", &[1, 2]));
        home.meddle(|conn| conn.execute_batch(&format!("PRAGMA foreign_keys = OFF; {sql}")).unwrap());
        home.reopen();
        let error = all(&home).map(|e| e.to_string()).unwrap_or_default();
        assert!(error.ends_with(message), "{sql}: {error}");
    }
}

#[test]
fn a_damaged_template_comes_without_its_bytes_and_does_not_hold_up_the_others() {
    for (sql, damaged) in [
        ("UPDATE templates SET hand = 3 WHERE id = 2", &[2][..]),
        ("UPDATE templates SET slot = 99 WHERE id = 2", &[2]),
        ("UPDATE slots SET content = zeroblob(64) WHERE slot = (SELECT slot FROM subjects)", &[1, 2]),
    ] {
        let mut home = Home::new();
        commit_one(&home, enrol("r", "ann", &[1, 2]));
        commit_one(&home, enrol("s", "bob", &[3]));
        home.meddle(|conn| conn.execute_batch(&format!("PRAGMA foreign_keys = OFF; {sql}")).unwrap());
        home.reopen();
        let empty = |template: &StoredTemplate| template.sealed.is_empty().then_some(template.id.0);
        let templates = home.templates_between(TemplateId(0), TemplateId(99), 99).unwrap();
        assert_eq!(templates.len(), 3, "{sql}");
        assert_eq!(templates.iter().filter_map(empty).collect::<Vec<_>>(), damaged, "{sql}");
        let added = home.log_after(Lsn(0), 99).unwrap().into_iter().filter_map(|record| match record.event {
            Event::Added { template, .. } => template,
            _ => None,
        });
        assert_eq!(added.filter_map(|template| empty(&template)).collect::<Vec<_>>(), damaged, "{sql}");
    }
}

#[test]
fn a_registry_cut_short_is_an_error_and_no_panic() {
    let mut home = Home::new();
    let changes: Vec<Change> = (0..60).map(|i| enrol(&format!("r{i}"), &format!("s{i}"), &[i; 4])).collect();
    home.commit(&changes).unwrap();
    home.meddle(|_| {});
    let whole = std::fs::read(home.path()).unwrap();
    // Whole pages, and more than a page: the last bytes of a page need not matter to anybody.
    for length in [1, 50, 100, 512, 8192, whole.len() / 2, whole.len() - 8192] {
        std::fs::write(home.path(), &whole[..length]).unwrap();
        let read = open(&home.path()).and_then(|r| r.log_after(Lsn(0), 1000));
        assert!(read.is_err(), "{length} of {} bytes", whole.len());
    }
}

#[test]
fn flipped_bits_give_errors_or_answers_but_no_panic() {
    let mut home = Home::new();
    let changes: Vec<Change> = (0..60).map(|i| enrol(&format!("r{i}"), &format!("s{i}"), &[i, i + 1])).collect();
    home.commit(&changes).unwrap();
    home.commit(&[forget("f", "s7"), update("u", "s8", &[1], &[17])]).unwrap();
    home.meddle(|_| {});
    let whole = std::fs::read(home.path()).unwrap();
    let mut errors = 0;
    for seed in 0..150 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut damaged = whole.clone();
        for _ in 0..rng.random_range(1..40) {
            damaged[rng.random_range(0..whole.len())] ^= 1 << rng.random_range(0..8);
        }
        std::fs::write(home.path(), &damaged).unwrap();
        let _ = std::fs::remove_file(scrub::log_path(&home.path()));
        let attempt = || -> Result<(), RegistryError> {
            let registry = open(&home.path())?;
            let results = [
                registry.log_after(Lsn(0), 1000).map(drop),
                registry.templates_between(TemplateId(0), TemplateId(u64::MAX), 1000).map(drop),
                registry.subject(&name("s8")).map(drop),
                registry.commit(&[forget("g", "s9"), enrol("h", "s7", &[5]), enrol("r0", "s0", &[0, 1])]).map(drop),
                registry.prune_requests(Duration::ZERO, 4096).map(drop),
                registry.scrub(),
            ];
            results.into_iter().collect()
        };
        errors += usize::from(attempt().is_err());
    }
    assert!(errors > 20, "only {errors} of 150 showed");
}
