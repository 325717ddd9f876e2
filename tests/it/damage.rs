//! A damaged index is found out, reported, rewritten from the registry, and answers right.

use std::path::Path;

use crate::support::index_files::{ROWS_AT, flip, live_row, only_segment, record_at};
use crate::support::palms::{Palm, Palms};
use crate::support::server::{Options, Site, TestServer};

const SEED: u64 = 61;
const DIM: usize = 64;
const PEOPLE: usize = 400;
const ROW_BYTES: u64 = 2 * DIM as u64;

/// A stopped server over a gallery of which every tenth person was forgotten.
async fn stopped() -> (Site, Vec<(String, Palm)>) {
    let people = Palms::new(SEED, DIM).people("person", PEOPLE);
    let (server, mut client) = TestServer::with(Options::dim(DIM), &people).await;
    for (id, _) in people.iter().step_by(10) {
        client.forget(id).await.unwrap();
    }
    drop(client);
    let site = server.terminate();
    let (code, said) = site.verify();
    assert_eq!(code, Some(0), "before the damage: {said}");
    (site, people)
}

/// Damages the index, sees that `verify` says so, starts the server, and checks that it has
/// said so too and answers for everybody; afterwards all is sound again.
async fn is_found_out_and_mended(what: &str, damage: impl FnOnce(&Site), words: &[&str]) {
    let (site, people) = stopped().await;
    damage(&site);
    let (code, said) = site.verify();
    assert_eq!(code, Some(1), "{what}: {said}");
    let server = site.start();
    let log = server.log();
    assert!(log.contains("ERROR"), "{what}: {log}");
    for word in words {
        assert!(log.contains(word), "{what}: no {word:?} in {log}");
    }
    let mut client = server.client().await;
    let status = client.status().await.unwrap();
    assert_eq!(status.templates, (PEOPLE - PEOPLE / 10) as u64, "{what}");
    for (number, (id, palm)) in people.iter().enumerate() {
        let expected = (number % 10 != 0).then_some(id);
        assert_eq!(client.who(palm).await.unwrap().as_ref(), expected, "{what}, seed {SEED}");
    }
    // Writes go on where they were.
    client.forget("person-1").await.unwrap();
    assert_eq!(client.who(&people[1].1).await.unwrap(), None, "{what}");
    client.enroll("person-0", std::slice::from_ref(&people[0].1)).await.unwrap();
    drop(client);
    let site = server.terminate();
    let (code, said) = site.verify();
    assert_eq!(code, Some(0), "{what}, afterwards: {said}");
    let server = site.start();
    let mut client = server.client().await;
    assert_eq!(client.who(&people[0].1).await.unwrap().as_deref(), Some("person-0"), "{what}");
    assert_eq!(client.who(&people[1].1).await.unwrap(), None, "{what}");
    let last_start = &server.log();
    assert!(!last_start.contains("ERROR"), "{what}: mended once and for all: {last_start}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_corrupt_manifest_makes_the_index_anew() {
    let damage = |site: &Site| flip(&site.data().join("index/MANIFEST"), 30, 0x10);
    is_found_out_and_mended("manifest", damage, &["MANIFEST", "corrupt", "the index is rebuilt"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_truncated_manifest_makes_the_index_anew() {
    let damage = |site: &Site| {
        let file = std::fs::File::options().write(true).open(site.data().join("index/MANIFEST")).unwrap();
        file.set_len(17).unwrap();
    };
    is_found_out_and_mended("short manifest", damage, &["MANIFEST", "the index is rebuilt"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_truncated_segment_is_rewritten() {
    let damage = |site: &Site| {
        let file = std::fs::File::options().write(true).open(only_segment(site)).unwrap();
        file.set_len(ROWS_AT + 100 * ROW_BYTES).unwrap();
    };
    is_found_out_and_mended("truncated segment", damage, &["damaged", "registry"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_missing_segment_is_rewritten() {
    let damage = |site: &Site| std::fs::remove_file(only_segment(site)).unwrap();
    is_found_out_and_mended("missing segment", damage, &["damaged", "registry"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_flipped_bit_in_a_row_is_found_and_the_segment_rewritten() {
    let damage = |site: &Site| {
        let segment = only_segment(site);
        flip(&segment, ROWS_AT + live_row(&segment, 123) * ROW_BYTES + 77, 0x04);
    };
    is_found_out_and_mended("row", damage, &["damaged", "registry"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_flipped_bit_in_a_record_is_found_and_the_segment_rewritten() {
    // The subject's number: it would put one person's palm to another's name.
    let damage = |site: &Site| {
        let segment = only_segment(site);
        flip(&segment, record_at(live_row(&segment, 124)) + 8, 0x01);
    };
    is_found_out_and_mended("record", damage, &["damaged", "registry"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_flipped_bit_in_a_state_word_is_found_and_the_segment_rewritten() {
    let damage = |site: &Site| {
        let segment = only_segment(site);
        flip(&segment, record_at(live_row(&segment, 125)) + 24, 0x01);
    };
    is_found_out_and_mended("state word", damage, &["damaged", "registry"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_flipped_bit_in_a_header_is_found_and_the_segment_rewritten() {
    let damage = |site: &Site| flip(&only_segment(site), 20, 0x01);
    is_found_out_and_mended("header", damage, &["damaged", "registry"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_index_that_was_deleted_is_made_anew() {
    let (site, people) = stopped().await;
    std::fs::remove_dir_all(site.data().join("index")).unwrap();
    let server = site.start();
    let mut client = server.client().await;
    for (number, (id, palm)) in people.iter().enumerate() {
        let expected = (number % 10 != 0).then_some(id);
        assert_eq!(client.who(palm).await.unwrap().as_ref(), expected, "seed {SEED}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_index_ahead_of_an_older_registry_is_made_anew() {
    let (site, people) = stopped().await;
    let older = site.dir.path().join("older.sqlite");
    std::fs::copy(site.data().join("registry.sqlite"), &older).unwrap();
    let server = site.start();
    let mut client = server.client().await;
    client.enroll("late", &[Palms::new(SEED + 1, DIM).palm()]).await.unwrap();
    client.forget("person-2").await.unwrap();
    drop(client);
    let site = server.terminate();
    // Somebody puts an older backup of the registry back.
    put_registry(&site, &older);
    let server = site.start();
    assert!(server.log().contains("older backup"), "{}", server.log());
    let mut client = server.client().await;
    assert_eq!(client.who(&people[2].1).await.unwrap().as_deref(), Some("person-2"), "seed {SEED}");
    assert_eq!(client.who(&Palms::new(SEED + 1, DIM).palm()).await.unwrap(), None, "seed {SEED}");
}

/// Puts another registry in the place of a stopped server's.
fn put_registry(site: &Site, from: &Path) {
    for beside in ["registry.sqlite-wal", "registry.sqlite-shm"] {
        let _ = std::fs::remove_file(site.data().join(beside));
    }
    std::fs::copy(from, site.data().join("registry.sqlite")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_registry_rolled_back_under_the_index_is_noticed_and_everybody_on_record_found() {
    let people = Palms::new(SEED, DIM).people("person", 100);
    let (server, client) = TestServer::with(Options::dim(DIM), &people).await;
    drop(client);
    let site = server.terminate();
    let copy = site.dir.path().join("copy.sqlite");
    std::fs::copy(site.data().join("registry.sqlite"), &copy).unwrap();
    let server = site.start();
    let mut client = server.client().await;
    for (id, _) in &people[..50] {
        client.forget(id).await.unwrap();
    }
    drop(client);
    let site = server.kill9();
    put_registry(&site, &copy);
    let server = site.start();
    // A checkpoint may have come between, and then the log tells it.
    let log = server.log();
    assert!(log.contains("50 templates on record are not in the index") || log.contains("older backup"), "{log}");
    let mut client = server.client().await;
    for (id, palm) in &people {
        assert_eq!(client.who(palm).await.unwrap().as_ref(), Some(id), "seed {SEED}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_registry_of_another_gallery_is_refused_in_words() {
    let (site, _) = stopped().await;
    // Another gallery under the same key: a data folder beside the first.
    let other = Site::new(Options::dim(DIM));
    std::fs::copy(site.key(), other.key()).unwrap();
    let server = other.start();
    let mut client = server.client().await;
    client.enroll("somebody", &[Palms::new(SEED + 2, DIM).palm()]).await.unwrap();
    drop(client);
    let other = server.terminate();
    put_registry(&site, &other.data().join("registry.sqlite"));
    let (code, said) = site.expect_no_start();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("another data folder") && !said.contains("panicked"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_index_of_another_history_of_its_registry_is_not_sound() {
    let (mut site, _) = stopped().await;
    let (registry, index) = (site.data().join("registry.sqlite"), site.data().join("index"));
    let before = site.dir.path().join("before.sqlite");
    std::fs::copy(&registry, &before).unwrap();
    // Two histories of equal length, in each of which another goes and another comes.
    let mut palms = Palms::new(SEED + 2, DIM);
    for (goes, other) in [("person-1", Some("index-1")), ("person-2", None)] {
        let server = site.start();
        let mut client = server.client().await;
        client.forget(goes).await.unwrap();
        client.enroll("new", &[palms.palm()]).await.unwrap();
        drop(client);
        site = server.terminate();
        let (code, said) = site.verify();
        assert_eq!(code, Some(0), "{said}");
        if let Some(other) = other {
            std::fs::rename(&index, site.dir.path().join(other)).unwrap();
            std::fs::copy(&before, &registry).unwrap();
        }
    }
    std::fs::remove_dir_all(&index).unwrap();
    std::fs::rename(site.dir.path().join("index-1"), &index).unwrap();
    let (code, said) = site.verify();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("does not hold the registry's templates"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_registry_that_is_none_is_refused_and_left_alone() {
    let (site, _) = stopped().await;
    let registry = site.data().join("registry.sqlite");
    std::fs::write(&registry, vec![0x5a; 8192]).unwrap();
    let (code, said) = site.expect_no_start();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("registry") && !said.contains("panicked"), "{said}");
    assert_eq!(std::fs::read(&registry).unwrap(), vec![0x5a; 8192]);
}
