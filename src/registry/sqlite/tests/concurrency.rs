//! Readers beside the writer: each call sees one snapshot, and nobody waits for ever.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::registry::Event;

const COMMITS: u64 = 150;

#[test]
fn readers_see_whole_commits_while_the_writer_commits_and_scrubs() {
    let home = Home::new();
    let registry: &SqliteRegistry = &home;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // More readers than connections.
        let readers: Vec<_> = (0..6)
            .map(|reader| {
                let done = &done;
                scope.spawn(move || {
                    let (mut after, mut seen) = (Lsn(0), 0_u64);
                    loop {
                        let last_round = done.load(Ordering::Acquire);
                        let counts = registry.counts().unwrap();
                        assert_eq!(counts.templates, 2 * counts.subjects, "reader {reader}");
                        let records = registry.log_after(after, 64).unwrap();
                        for record in &records {
                            assert_eq!(record.lsn.0, after.0 + 1, "reader {reader}");
                            after = record.lsn;
                            match &record.event {
                                Event::Added { template: Some(t), .. } => {
                                    assert!(t.sealed == sealed(t.subject.0, 100).sealed, "reader {reader}");
                                }
                                Event::Added { template: None, .. } | Event::Forgotten { .. } => {}
                                Event::Removed { .. } => panic!("nothing is removed"),
                            }
                        }
                        seen += records.len() as u64;
                        let somebody = name(&format!("s{}", seen % COMMITS));
                        if let Some(subject) = registry.subject(&somebody).unwrap() {
                            assert_eq!(subject.templates.len(), 2, "reader {reader}");
                        }
                        if last_round && records.is_empty() {
                            return seen;
                        }
                    }
                })
            })
            .collect();
        for commit in 0..COMMITS {
            // Subject numbers count from 1, so the seeds can be told from them.
            let seed = commit + 1;
            let mut changes = vec![enrol(&format!("e{commit}"), &format!("s{commit}"), &[seed, seed])];
            if commit % 3 == 2 {
                changes.push(forget(&format!("f{commit}"), &format!("s{}", commit - 2)));
            }
            registry.commit(&changes).unwrap();
            if commit % 25 == 24 {
                registry.scrub().unwrap();
            }
        }
        done.store(true, Ordering::Release);
        for reader in readers {
            assert_eq!(reader.join().unwrap(), 2 * COMMITS + COMMITS / 3);
        }
    });
    check_tables(&home.path());
}
