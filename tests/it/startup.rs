//! A server that cannot start says why, in words, and ends with exit code 1; bad usage is 2.

use std::os::unix::fs::PermissionsExt as _;

use crate::support::palms::Palms;
use crate::support::processes::{text, thenar};
use crate::support::server::{Options, Site, TestServer};

const SEED: u64 = 51;

/// The server must give up with exit code 1 and say all of these words.
fn gives_up(what: &str, site: &Site, words: &[&str]) {
    let (code, said) = site.expect_no_start();
    assert_eq!(code, Some(1), "{what}: {said}");
    for word in words {
        assert!(said.contains(word), "{what}: no {word:?} in:\n{said}");
    }
    assert!(!said.contains("panicked"), "{what}: {said}");
    // Of desktop sessions, and nothing that a person at a terminal could do anything about.
    assert!(!said.contains("XDG_RUNTIME_DIR"), "{what}: {said}");
    assert!(!said.contains("thenar listening on"), "{what}: {said}");
}

/// A site whose gallery has one subject.
async fn stopped_gallery() -> Site {
    let server = TestServer::start(Options::default());
    let mut client = server.client().await;
    client.enroll("ada", &[Palms::new(SEED, 64).palm()]).await.unwrap();
    drop(client);
    server.terminate()
}

#[test]
fn without_a_key_or_with_one_others_can_read_there_is_no_server() {
    let site = Site::new(Options::default());
    let key = site.key();
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    gives_up("mode 0644", &site, &[key.to_str().unwrap(), "0644", "chmod 600"]);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    gives_up("mode 0640", &site, &["0640"]);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    let good = std::fs::read_to_string(&key).unwrap();
    std::fs::write(&key, &good[..good.len() / 2]).unwrap();
    gives_up("half a key", &site, &[key.to_str().unwrap()]);
    std::fs::write(&key, "").unwrap();
    gives_up("an empty key", &site, &[key.to_str().unwrap()]);
    std::fs::remove_file(&key).unwrap();
    gives_up("no key", &site, &[key.to_str().unwrap(), "thenar keys generate"]);
    assert!(!site.data().join("registry.sqlite").exists(), "nothing was made without a key");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn another_key_does_not_open_a_gallery_and_leaves_it_as_it_was() {
    let site = stopped_gallery().await;
    let (key, kept) = (site.key(), site.dir.path().join("kept.key"));
    std::fs::rename(&key, &kept).unwrap();
    assert!(thenar(&["keys", "generate", "--out", key.to_str().unwrap()]).status.success());
    gives_up("another key", &site, &["key"]);
    let (code, said) = site.verify();
    assert_eq!(code, Some(1), "{said}");
    std::fs::rename(&kept, &key).unwrap();
    let server = site.start();
    let mut client = server.client().await;
    let ada = Palms::new(SEED, 64).palm();
    assert_eq!(client.who(&ada).await.unwrap().as_deref(), Some("ada"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn another_dimension_does_not_open_a_gallery() {
    let mut site = stopped_gallery().await;
    site.options.dim = Some(128);
    gives_up("another dim", &site, &["64", "128"]);
    site.options.dim = None;
    let server = site.start();
    assert_eq!(server.client().await.status().await.unwrap().dim, 64, "without a word the gallery's own is taken");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_registry_without_people_does_not_wipe_the_index_of_another_gallery() {
    let site = stopped_gallery().await;
    let other = Site::new(Options { dim: Some(128), ..Options::default() });
    std::fs::copy(site.key(), other.key()).unwrap();
    let other = other.start().terminate();
    std::fs::copy(other.data().join("registry.sqlite"), site.data().join("registry.sqlite")).unwrap();
    let files = || {
        let files = std::fs::read_dir(site.data().join("index")).unwrap().map(|entry| entry.unwrap().path());
        files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect::<std::collections::BTreeMap<_, _>>()
    };
    let before = files();
    gives_up("another gallery's registry", &site, &["another data folder", "remove the index folder"]);
    assert!(files() == before, "the index was changed");
    let (code, said) = site.verify();
    assert_eq!(code, Some(1), "{said}");
}

#[test]
fn a_servers_memory_is_closed_and_its_keys_are_locked() {
    let mut site = Site::new(Options::default());
    site.closed = true;
    let server = site.start();
    let proc = |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", server.pid())).unwrap();
    let limits = proc("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    let status = proc("status");
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap().trim();
    // The sealing key, the digest key and the rotation; or the reason why not.
    assert!(locked != "0 kB" || server.log().contains("RLIMIT_MEMLOCK"), "{locked}\n{}", server.log());
    if !rustix::process::geteuid().is_root() {
        let denied = std::fs::File::open(format!("/proc/{}/mem", server.pid())).unwrap_err();
        assert_eq!(denied.kind(), std::io::ErrorKind::PermissionDenied);
    }
}

#[test]
fn metrics_beyond_loopback_have_to_be_meant() {
    let site = Site::new(Options { metrics: "0.0.0.0:0".into(), ..Options::default() });
    gives_up("metrics open to all", &site, &["metrics.listen", "metrics.beyond_loopback = true"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn one_folder_has_one_server() {
    let server = TestServer::start(Options::default());
    let mut second = Site::new(Options::default());
    second.options.data = Some(server.site.data());
    std::fs::copy(server.site.key(), second.key()).unwrap();
    gives_up("a second server", &second, &[server.site.data().to_str().unwrap(), "in use"]);
    let (code, said) = server.site.verify();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("in use"), "{said}");
    server.client().await.enroll("ada", &[Palms::new(SEED, 64).palm()]).await.unwrap();
}

#[test]
fn a_port_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut site = Site::new(Options { listen: address.clone(), ..Options::default() });
    gives_up("gRPC", &site, &["server.listen", &address, "in use"]);
    site.options.listen = "127.0.0.1:0".into();
    std::fs::write(site.config_file(), site.config()).unwrap();
    let config = site.config_file();
    let (code, said) = site.run_to_end(&["serve", "--config", config.to_str().unwrap(), "--metrics-listen", &address]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("metrics.listen") && said.contains(&address), "{said}");
}

#[test]
fn a_configuration_that_is_none_is_refused_with_every_problem() {
    let unknown = Site::new(Options { top: "treshold = 0.5".into(), ..Options::default() });
    gives_up("unknown key", &unknown, &["treshold", "thenar.toml"]);
    let unknown = Site::new(Options { batch: "que_max = 7".into(), ..Options::default() });
    gives_up("unknown key of a section", &unknown, &["que_max"]);

    let open = Site::new(Options { listen: "0.0.0.0:0".into(), ..Options::default() });
    gives_up("open to all without TLS", &open, &["server.listen", "[server.tls]"]);

    let bad = Site::new(Options {
        dim: Some(65),
        engine: "kind = \"fpga\"".into(),
        batch: "queue_max = 0".into(),
        level: "info",
        more: "[policy.payment]\nthreshold = 7.0".into(),
        server: "drain_seconds = 0".into(),
        ..Options::default()
    });
    let problems = ["dim", "65", "engine.kind", "fpga", "batch.queue_max", "policy.payment.threshold", "drain_seconds"];
    gives_up("several problems", &bad, &problems);

    let missing = bad.dir.path().join("no-such.toml");
    let (code, said) = bad.run_to_end(&["serve", "--config", missing.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("no-such.toml"), "{said}");
    let (code, said) = bad.run_to_end(&["serve"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("data"), "{said}");
}

#[test]
fn an_engine_that_is_not_there_is_not_replaced_by_another() {
    let engine = "kind = \"gpu\"\nadapter = \"no such adapter\"".into();
    let site = Site::new(Options { engine, ..Options::default() });
    gives_up("no such adapter", &site, &["engine", "no such adapter"]);
}

#[test]
fn bad_usage_has_exit_code_2_and_help_has_0() {
    for args in [&["frobnicate"][..], &["serve", "--no-such-flag"], &["keys"], &["keys", "generate"], &[]] {
        let output = thenar(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output));
    }
    for command in ["serve", "keys", "verify"] {
        let output = thenar(&[command, "--help"]);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output));
        assert!(text(&output).contains("Usage"), "{}", text(&output));
    }
}

#[test]
fn a_key_is_made_for_its_owner_alone_and_never_overwritten() {
    let site = Site::new(Options::default());
    let key = site.key();
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let before = std::fs::read(&key).unwrap();
    let again = thenar(&["keys", "generate", "--out", key.to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(1), "{}", text(&again));
    assert!(text(&again).contains(key.to_str().unwrap()), "{}", text(&again));
    assert_eq!(std::fs::read(&key).unwrap(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn everything_is_there_after_a_restart_and_the_files_are_the_owners_alone() {
    let crowd = Palms::new(SEED + 1, 64).people("person", 300);
    let (server, client) = TestServer::with(Options::default(), &crowd).await;
    drop(client);
    let server = server.restart();
    let mut client = server.client().await;
    for (id, palm) in &crowd {
        assert_eq!(client.who(palm).await.unwrap().as_ref(), Some(id), "seed {}", SEED + 1);
    }
    let status = client.status().await.unwrap();
    assert_eq!((status.templates, status.subjects), (300, 300));
    assert_eq!(status.registry_lsn, status.gallery_lsn);
    for file in crate::support::disk::files_under(&server.site.data()) {
        let mode = std::fs::metadata(&file).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", file.display());
    }
    let mode = std::fs::metadata(server.site.data()).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o700);
}
