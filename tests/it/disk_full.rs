//! A disk that fills up refuses enrolments in words, loses nothing, and lets people go.

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use tonic::Code;

use crate::support::client::{Client, bulk_messages, enroll_request, enrolments};
use crate::support::disk::SmallDisk;
use crate::support::palms::{Palm, Palms};
use crate::support::server::{Options, Site, TestServer};

const SEED: u64 = 101;
const DIM: usize = 64;
const DISK_MIB: u64 = 64;

/// A small disk that can be filled.
struct Disk(SmallDisk);

impl Disk {
    fn free(&self) -> u64 {
        self.0.free()
    }

    fn filler(&self) -> PathBuf {
        self.0.path().join("filler")
    }

    /// Fills it until only about `left` bytes are free.
    fn fill(&self, left: u64) {
        let file = std::fs::File::options().create(true).append(true).open(self.filler()).unwrap();
        let block = vec![0x5a_u8; 4096];
        while self.free() >= left + block.len() as u64 {
            let at = file.metadata().unwrap().len();
            if file.write_all_at(&block, at).is_err() {
                break;
            }
        }
    }

    fn make_room(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }
}

/// A server whose data is on a small disk.
fn on_a_small_disk(reserve_mib: u64) -> Option<(TestServer, Disk)> {
    let mut site = Site::new(Options { reserve_mib, ..Options::dim(DIM) });
    // Not in the site's folder, which may be dropped while this is still mounted.
    let disk = Disk(SmallDisk::mount(&std::env::temp_dir(), DISK_MIB)?);
    site.options.data = Some(disk.0.path().join("data"));
    Some((site.start(), disk))
}

/// The people who must be found, and those who must not.
async fn check(what: &str, client: &mut Client, people: &[(String, Palm)], nobody: &[Palm]) {
    for (id, palm) in people {
        assert_eq!(client.who(palm).await.unwrap().as_ref(), Some(id), "{what}, seed {SEED}");
    }
    for palm in nobody {
        assert_eq!(client.who(palm).await.unwrap(), None, "{what}, seed {SEED}");
    }
    assert_eq!(client.status().await.unwrap().subjects, people.len() as u64, "{what}");
}

fn is_sound(what: &str, site: &Site) {
    let (code, said) = site.verify();
    assert_eq!(code, Some(0), "{what}: {said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn within_the_reserve_enrolments_are_refused_and_deletions_work() {
    let Some((server, disk)) = on_a_small_disk(16) else { return };
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED, DIM);
    let mut people = palms.people("person", 40);
    client.bulk(enrolments(&people)).await;
    disk.fill(8 << 20);

    let late: Vec<Palm> = (0..3).map(|_| palms.palm()).collect();
    let full = client.enroll("late-0", &late[..1]).await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted, "{full:?}");
    for word in ["disk", "nothing was changed", &(16 << 20).to_string()] {
        assert!(full.message().contains(word), "no {word:?} in {full:?}");
    }
    let full = client.update("person-1", &late[..1], &[]).await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted, "{full:?}");
    let messages = bulk_messages(late.iter().map(|p| enroll_request("late-1", std::slice::from_ref(p))).collect(), 1);
    let mut stream = client.enrollment.bulk_enroll(tokio_stream::iter(messages)).await.unwrap().into_inner();
    let full = stream.message().await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted, "{full:?}");
    check("full", &mut client, &people, &late).await;

    for _ in 0..20 {
        let (id, palm) = people.pop().unwrap();
        assert_eq!(client.forget(&id).await.unwrap().templates_erased, 1);
        assert_eq!(client.who(&palm).await.unwrap(), None);
    }
    check("after deletions", &mut client, &people, &late).await;
    let server = server.kill9_and_restart();
    let mut client = server.client().await;
    check("restarted while full", &mut client, &people, &late).await;
    client.forget(&people.pop().unwrap().0).await.unwrap();
    client.enroll("late-0", &late[..1]).await.unwrap_err();

    disk.make_room();
    client.enroll("late-0", &late[..1]).await.unwrap();
    people.push(("late-0".into(), late[0].clone()));
    check("with room again", &mut client, &people, &late[1..]).await;
    drop(client);
    let site = server.terminate();
    is_sound("stopped", &site);
    let server = site.start();
    check("restarted", &mut server.client().await, &people, &late[1..]).await;
    drop(server);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_disk_that_is_really_full_loses_nothing_that_was_acknowledged() {
    let Some((server, disk)) = on_a_small_disk(0) else { return };
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED + 1, DIM);
    let mut people: Vec<(String, Palm)> = Vec::new();
    for i in 0..20 {
        people.push((format!("person-{i}"), palms.palm()));
        client.enroll(&people[i].0, std::slice::from_ref(&people[i].1)).await.unwrap();
    }
    // Room for some more, one by one and in bulk, until there is none.
    disk.fill(300 << 10);
    let mut in_doubt = Vec::new();
    for i in 20..3000 {
        let (id, palm) = (format!("person-{i}"), palms.palm());
        let request = enroll_request(&id, std::slice::from_ref(&palm));
        match client.enrollment.enroll(request.clone()).await {
            Ok(_) => people.push((id, palm)),
            Err(status) => {
                let words = ["disk", "full", "room", "left"];
                assert!(matches!(status.code(), Code::ResourceExhausted | Code::Unavailable), "{status:?}");
                assert!(words.iter().any(|w| status.message().contains(w)), "{status:?}");
                in_doubt.push((request, palm));
                break;
            }
        }
    }
    assert!(!in_doubt.is_empty(), "the disk never filled up: {} bytes are free", disk.free());
    let bulk: Vec<Palm> = (0..512).map(|_| palms.palm()).collect();
    let requests: Vec<_> =
        bulk.iter().enumerate().map(|(i, p)| enroll_request(&format!("bulk-{i}"), std::slice::from_ref(p))).collect();
    let messages = tokio_stream::iter(bulk_messages(requests.clone(), 512));
    let mut stream = client.enrollment.bulk_enroll(messages).await.unwrap().into_inner();
    let status = stream.message().await.expect_err("there is no room for 512");
    assert!(matches!(status.code(), Code::ResourceExhausted | Code::Unavailable | Code::Internal), "{status:?}");
    // The server lives and answers for everybody it has acknowledged.
    for (id, palm) in &people {
        assert_eq!(client.who(palm).await.unwrap().as_ref(), Some(id), "full, seed {}", SEED + 1);
    }
    drop(client);
    let site = server.kill9();
    disk.make_room();
    let server = site.start();
    let mut client = server.client().await;
    for (request, palm) in in_doubt {
        let id = request.subject_id.clone();
        client.enrollment.enroll(request).await.unwrap();
        people.push((id, palm));
    }
    client.bulk_again(requests).await;
    people.extend(bulk.into_iter().enumerate().map(|(i, palm)| (format!("bulk-{i}"), palm)));
    check("with room again", &mut client, &people, &[]).await;
    drop(client);
    let site = server.terminate();
    is_sound("stopped", &site);
    drop(site);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_running_server_goes_on_when_a_full_disk_has_room_again() {
    let Some((server, disk)) = on_a_small_disk(0) else { return };
    let mut client = server.client().await;
    let mut palms = Palms::new(SEED + 2, DIM);
    let ada = ("ada".to_owned(), palms.palm());
    client.enroll(&ada.0, std::slice::from_ref(&ada.1)).await.unwrap();
    disk.fill(0);
    let bulk: Vec<_> = (0..256).map(|_| palms.palm()).collect();
    let requests: Vec<_> =
        bulk.iter().enumerate().map(|(i, p)| enroll_request(&format!("bulk-{i}"), std::slice::from_ref(p))).collect();
    let messages = tokio_stream::iter(bulk_messages(requests.clone(), 256));
    let mut stream = client.enrollment.bulk_enroll(messages).await.unwrap().into_inner();
    stream.message().await.expect_err("there is no room");
    assert_eq!(client.who(&ada.1).await.unwrap().as_deref(), Some("ada"));
    disk.make_room();
    client.bulk_again(requests).await;
    let mut people: Vec<_> = bulk.into_iter().enumerate().map(|(i, palm)| (format!("bulk-{i}"), palm)).collect();
    people.push(ada);
    check("with room again", &mut client, &people, &[]).await;
    client.forget("ada").await.unwrap();
    let (_, palm) = people.pop().unwrap();
    check("and without ada", &mut client, &people, &[palm]).await;
    drop(server);
}
