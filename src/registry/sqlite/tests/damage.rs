//! Every flipped byte of anything that matters is found, and every row that was tampered with.

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rusqlite::types::Value;

use super::*;

const TABLES: [&str; 9] =
    ["gallery", "counters", "subjects", "templates", "slots", "free_slots", "log", "requests", "forgotten"];

/// A registry with something in every table, closed.
fn closed() -> Home {
    let mut home = Home::new();
    home.claim_identity(&GalleryIdentity { dim: 32, key_id: keys().key_id() }).unwrap();
    let enrolments = (0..24).map(|i| enrol(&format!("e{i}"), &format!("person-{i}"), &[i, 100 + i]));
    home.commit(&enrolments.collect::<Vec<_>>()).unwrap();
    home.commit(&[forget("f1", "person-3"), forget("f2", "person-9"), update("u", "person-4", &[200], &[9])]).unwrap();
    home.commit(&[enrol("again", "person-9", &[300])]).unwrap();
    assert_eq!(problems(&home), [""; 0]);
    home.meddle(|_| {});
    home
}

fn problems(registry: &SqliteRegistry) -> Vec<String> {
    registry.verify(&|_| Ok(()), &|_, _| {}).problems
}

/// Everything that is written in a database, as any program reads it.
fn content(path: &Path) -> rusqlite::Result<Vec<Vec<Value>>> {
    let conn = Connection::open(path)?;
    let mut content = Vec::new();
    for table in TABLES {
        let mut statement = conn.prepare(&format!("SELECT * FROM {table} NOT INDEXED ORDER BY 1, 2"))?;
        let columns = statement.column_count();
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            content.push((0..columns).map(|i| row.get(i)).collect::<rusqlite::Result<_>>()?);
        }
    }
    Ok(content)
}

/// How damage to a copy of a registry shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    AtOpening,
    ByVerifying,
    Never,
}

fn seen(path: &Path) -> Seen {
    match open(path) {
        Err(_) => Seen::AtOpening,
        Ok(registry) if problems(&registry).is_empty() => Seen::Never,
        Ok(_) => Seen::ByVerifying,
    }
}

#[test]
fn a_flipped_bit_is_found_unless_it_says_nothing() {
    const THREADS: u64 = 4;
    const FLIPS: usize = 500;
    let home = closed();
    let whole = std::fs::read(home.path()).unwrap();
    let original = content(&home.path()).unwrap();
    let in_use: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] != 0).collect();
    // The row of the counters, which is looked at on every opening.
    let meta: Vec<u8> = {
        let conn = Connection::open(home.path()).unwrap();
        let parts = conn.query_row("SELECT sums, mac FROM counters", [], |row| Ok((row.get(0)?, row.get(1)?)));
        let (sums, mac): (Vec<u8>, Vec<u8>) = parts.unwrap();
        [sums, mac].concat()
    };
    let meta = whole.windows(meta.len()).position(|w| w == meta).expect("it is in the file");
    let counts = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|seed| {
                let (whole, original, in_use) = (&whole, &original, &in_use);
                scope.spawn(move || {
                    let mut rng = ChaCha8Rng::seed_from_u64(seed);
                    let folder = tempfile::tempdir().unwrap();
                    let path = folder.path().join("registry.db");
                    let mut counts = [0_usize; 3];
                    for flip in 0..FLIPS {
                        // Mostly where something is; the rest of a page is zeros.
                        let at = match flip % 8 {
                            0 => rng.random_range(0..whole.len()),
                            1 => rng.random_range(meta..meta + 96),
                            _ => in_use[rng.random_range(0..in_use.len())],
                        };
                        let bit = rng.random_range(0..8);
                        let mut damaged = whole.clone();
                        damaged[at] ^= 1 << bit;
                        std::fs::write(&path, damaged).unwrap();
                        let _ = std::fs::remove_file(scrub::log_path(&path));
                        let seen = seen(&path);
                        counts[seen as usize] += 1;
                        let context = format!("seed {seed}, bit {bit} of byte {at}: {seen:?}");
                        if flip % 8 == 1 {
                            assert_eq!(seen, Seen::AtOpening, "{context}");
                        }
                        if seen == Seen::Never {
                            let now = content(&path);
                            assert!(now.is_ok_and(|now| now == *original), "{context}, though it reads otherwise");
                        }
                    }
                    counts
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect::<Vec<_>>()
    });
    let [opening, verifying, never] = std::array::from_fn(|i| counts.iter().map(|c| c[i]).sum::<usize>());
    println!("{opening} flips seen at opening, {verifying} by verifying, {never} that say nothing");
    assert!(opening > 250 && verifying > 250, "else this shows little");
}

#[test]
fn rows_that_were_swapped_changed_lost_or_brought_back_are_found() {
    let swap = |table: &str, key: &str, column: &str, a: i64, b: i64| {
        format!(
            "UPDATE {table} SET {column} = (SELECT {column} FROM {table} o WHERE o.{key} = {a} + {b} - {table}.{key})
             WHERE {key} IN ({a}, {b})"
        )
    };
    let of = |number: i64| format!("(SELECT slot FROM subjects WHERE number = {number})");
    let tampering = [
        swap("templates", "id", "slot", 1, 2),
        swap("templates", "id", "subject", 1, 3),
        "UPDATE templates SET enrolled_at = enrolled_at + 1 WHERE id = 1".into(),
        swap("slots", "slot", "content", 2, 3),
        swap("subjects", "number", "slot", 1, 2),
        format!("UPDATE slots SET content = (SELECT content FROM slots WHERE slot = {}) WHERE slot = {}", of(1), of(2)),
        "UPDATE templates SET hand = 1 - hand WHERE id = 1".into(),
        "UPDATE subjects SET enrolled_at = enrolled_at + 1 WHERE number = 5".into(),
        "UPDATE subjects SET key = zeroblob(20) WHERE number = 5".into(),
        "DELETE FROM templates WHERE id = 1".into(),
        "UPDATE templates SET slot = (SELECT slot FROM templates WHERE id = 2) WHERE id = 1".into(),
        "UPDATE log SET subject = 7 WHERE lsn = 2".into(),
        "UPDATE log SET template = 0 WHERE template IS NULL".into(),
        "DELETE FROM log WHERE lsn = 5".into(),
        "DELETE FROM requests WHERE seq = 3".into(),
        "UPDATE requests SET digest = randomblob(16) WHERE seq = 3".into(),
        "UPDATE requests SET seq = 900 WHERE seq = 3".into(),
        "DELETE FROM forgotten".into(),
        "UPDATE forgotten SET forgotten_at = forgotten_at - 1".into(),
        "INSERT INTO forgotten VALUES (zeroblob(20), 1)".into(),
        "INSERT INTO slots VALUES (900, x'00')".into(),
        "DELETE FROM free_slots".into(),
        "UPDATE slots SET content = x'01' WHERE slot = (SELECT slot FROM free_slots)".into(),
        "UPDATE gallery SET dim = 64".into(),
        "DELETE FROM gallery".into(),
        "CREATE TRIGGER t AFTER INSERT ON log BEGIN DELETE FROM forgotten; END".into(),
        "DROP INDEX templates_by_subject".into(),
    ];
    let mut home = closed();
    let whole = std::fs::read(home.path()).unwrap();
    for sql in tampering {
        std::fs::write(home.path(), &whole).unwrap();
        let before = content(&home.path()).unwrap();
        home.meddle(|conn| conn.execute_batch(&format!("PRAGMA foreign_keys = OFF; {sql}")).unwrap());
        assert!(
            sql.contains(" INDEX ") || sql.contains(" TRIGGER ") || content(&home.path()).unwrap() != before,
            "{sql}"
        );
        assert_ne!(seen(&home.path()), Seen::Never, "{sql}");
    }
    // Rows of an older copy.
    std::fs::write(home.path(), &whole).unwrap();
    let older = home.folder.path().join("older.db");
    std::fs::write(&older, &whole).unwrap();
    home.reopen();
    commit_one(&home, forget("late", "person-5"));
    home.meddle(|conn| {
        conn.pragma_update(None, "foreign_keys", 0).unwrap();
        conn.execute("ATTACH ?1 AS old", [older.to_str().unwrap()]).unwrap();
        conn.execute_batch("INSERT INTO templates SELECT * FROM old.templates WHERE subject = 6").unwrap();
    });
    assert_eq!(seen(&home.path()), Seen::ByVerifying);
    home.meddle(|conn| conn.execute_batch("DELETE FROM templates WHERE subject = 6").unwrap());
    assert_eq!(seen(&home.path()), Seen::Never, "and undone again it is sound");
}
