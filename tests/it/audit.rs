//! `thenar audit`: agrees with FAISS on a gallery with everything in it, is not fooled by one whose
//! codes lie, and is only there for who asked for FAISS.

use std::process::Command;

/// The packages that `cargo tree` finds under the server, built or needed to build it.
fn packages_of_the_server(features: &[&str]) -> String {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["tree", "--locked", "--offline", "-p", "thenar", "--edges", "normal,build", "--prefix", "none"]);
    let output = cargo.args(features).current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("names are text")
}

#[test]
fn only_the_feature_brings_faiss_and_cmake() {
    let brings = |features: &[&str]| {
        let packages = packages_of_the_server(features);
        let has = |name: &str| packages.lines().any(|line| line.starts_with(&format!("{name} v")));
        assert!(has("thenar") && has("rusqlite"), "{packages}");
        (has("faiss"), has("faiss-sys"), has("cmake"))
    };
    assert_eq!(brings(&[]), (false, false, false));
    assert_eq!(brings(&["--features", "faiss"]), (true, true, true));
}

#[cfg(not(feature = "faiss"))]
#[test]
fn a_build_without_faiss_says_how_to_get_it() {
    let output = crate::support::processes::thenar(&["audit", "--data", "nowhere"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(crate::support::processes::text(&output).contains("cargo build --release --features faiss"));
}

#[cfg(feature = "faiss")]
mod with_faiss {
    use std::collections::BTreeMap;
    use std::fs::File;
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::fs::FileExt as _;
    use std::path::PathBuf;
    use std::process::Stdio;

    use rustix::process::{Pid, Signal, kill_process};
    use serde_json::Value;
    use xxhash_rust::xxh3::xxh3_64;

    use crate::support::arrays::{Dtype, write_npy};
    use crate::support::client::enroll_request;
    use crate::support::disk::files_under;
    use crate::support::machine::{gpu_is_required, llvmpipe_is_here, skip};
    use crate::support::palms::{Palm, Palms};
    use crate::support::processes::{command, text};
    use crate::support::server::{Options, Site, TestServer};

    const SEED: u64 = 71;
    const DIM: usize = 64;
    const SUBJECTS: usize = 2500;

    /// A stopped server's folder: people with one to four templates of either hand, every ninth
    /// deleted, some with a template deleted and another added. Returns the live templates too.
    async fn stopped() -> (Site, u64) {
        let server = TestServer::start(Options::dim(DIM));
        let mut client = server.client().await;
        let mut palms = Palms::new(SEED, DIM);
        let mut people = Vec::new();
        for number in 0..SUBJECTS {
            let count = if number % 5 == 0 { 2 + number / 5 % 3 } else { 1 };
            let captures: Vec<Palm> = (0..count).map(|_| palms.palm()).collect();
            people.push((format!("person-{number}"), captures));
        }
        client.bulk(people.iter().map(|(id, palms)| enroll_request(id, palms)).collect()).await;
        for (id, _) in people.iter().step_by(9) {
            client.forget(id).await.unwrap();
        }
        for (id, _) in people.iter().skip(10).step_by(45) {
            let first = client.get(id).await.unwrap().templates[0].template_id;
            client.update(id, &[palms.palm()], &[first]).await.unwrap();
        }
        let live = client.status().await.unwrap().templates;
        drop(client);
        (server.terminate(), live)
    }

    /// Runs an audit of the folder: exit code and what it said.
    fn audit(site: &Site, more: &[&str]) -> (Option<i32>, String) {
        let config = site.config_file();
        let mut args = vec!["audit", "--config", config.to_str().expect("a plain path")];
        args.extend(more);
        site.run_to_end(&args)
    }

    fn object(said: &str) -> Value {
        let line = said.lines().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("no object in {said}"));
        serde_json::from_str(line).expect("an object")
    }

    /// Every file of the folder with a digest of its bytes, except SQLite's shared memory, which says
    /// who has it open.
    fn digests(site: &Site) -> BTreeMap<PathBuf, u64> {
        let mut files = files_under(&site.data());
        files.retain(|path| !path.to_string_lossy().ends_with("-shm"));
        files.into_iter().map(|path| (path.clone(), xxh3_64(&std::fs::read(path).unwrap()))).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn every_answer_agrees_and_nothing_is_changed() {
        let (site, live) = stopped().await;
        let (code, said) = audit(&site, &["--probes", "40"]);
        assert_eq!(code, Some(0), "{said}");
        let before = digests(&site);
        // More probes than a pass takes at k = 100, so that there are several passes.
        let (code, said) = audit(&site, &["--probes", "200", "--k", "100", "--json", "--seed", "5"]);
        assert_eq!(code, Some(0), "{said}");
        let told = object(&said);
        assert_eq!(told["agrees"], true);
        assert_eq!(told["templates"], live);
        assert_eq!(told["probes"], 200);
        assert!(told["faiss"].as_str().unwrap().contains("OMP_WAIT_POLICY passive"), "{said}");
        let lines = told["searches"].as_array().unwrap();
        let kinds: Vec<_> =
            lines.iter().map(|l| (l["certificate"].as_str().unwrap(), !l["threshold"].is_null())).collect();
        assert_eq!(
            kinds,
            [
                ("deterministic", true),
                ("deterministic", false),
                ("randomised:1e-12", true),
                ("randomised:1e-12", false)
            ]
        );
        for line in lines {
            assert_eq!((line["searches"].as_u64(), line["disagreements"].as_u64()), (Some(200), Some(0)), "{line}");
            let off = line["score_difference_max"].as_f64().unwrap();
            assert!(off > 0.0 && off <= told["tolerance"].as_f64().unwrap(), "{line}");
            let compared = line["candidates_compared"].as_u64().unwrap();
            if line["threshold"].is_null() {
                assert_eq!(compared, 200 * 100, "{line}");
                // Under a randomised certificate the engine may find it faster to compare every row.
                let held = line["held_deterministic"].as_u64().unwrap();
                assert!(held == 200 || line["certificate"] != "deterministic", "{line}");
            } else {
                assert!(compared >= 150, "most probes find their own template: {line}");
            }
        }
        assert_eq!(digests(&site), before, "an audit writes nothing");
        assert!(audit(&site, &["--certificate", "sure"]).0 == Some(2));

        // Probes from a file; the folder is taken while it is open.
        let mut palms = Palms::new(SEED + 1, DIM);
        let file = site.dir.path().join("probes.npy");
        write_npy(&file, &(0..30).map(|_| palms.vector()).collect::<Vec<_>>(), Dtype::F16);
        let from_file = ["--probes-file", file.to_str().unwrap(), "--threshold", "0.1", "--json"];
        let (code, said) = audit(&site, &from_file);
        assert_eq!(code, Some(0), "{said}");
        assert_eq!(object(&said)["probes"], 30);
        assert_eq!(object(&said)["searches"][0]["threshold"], 0.1);
        write_npy(&file, &[], Dtype::F32);
        let (code, said) = audit(&site, &from_file);
        assert!(code == Some(1) && said.contains("there are no probes"), "{said}");
        let server = site.start();
        let (code, said) = audit(&server.site, &from_file);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("in use by another Thenar process"), "{said}");
        let site = server.terminate();

        if llvmpipe_is_here() || gpu_is_required() {
            let gpu = ["--probes", "16", "--engine", "gpu", "--adapter", "llvmpipe", "--json"];
            let (code, said) = audit(&site, &gpu);
            assert_eq!(code, Some(0), "{said}");
            assert_eq!(object(&said)["engine"], "gpu");
        } else {
            skip("the audit of the GPU engine: there is no adapter named llvmpipe");
        }
    }

    #[test]
    fn a_folder_without_a_gallery_is_refused_and_not_made() {
        let site = Site::new(Options::dim(DIM));
        std::fs::write(site.config_file(), site.config()).unwrap();
        let (code, said) = audit(&site, &[]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("holds no Thenar data"), "{said}");
        assert!(!site.data().exists());
    }

    /// A gallery whose codes point away from their rows, under right checksums: what a fault in the
    /// making of codes would leave. Opening cannot see it, and searches miss whom they should find.
    #[tokio::test(flavor = "multi_thread")]
    async fn codes_that_lie_are_found_out() {
        let (site, _) = stopped().await;
        let blocks = forge_codes(&site);
        assert!(blocks > 20, "{blocks} blocks");
        let (code, said) = audit(&site, &["--probes", "64", "--json"]);
        assert_eq!(code, Some(1), "{said}");
        let told = object(&said);
        assert_eq!((told["agrees"].as_bool(), told["probes"].as_u64()), (Some(false), Some(64)));
        let differences = told["differences"].as_array().unwrap();
        assert!(differences.iter().any(|d| d["difference"].as_str().unwrap().contains("is missing")), "{said}");
        let (code, said) = audit(&site, &["--probes", "64"]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("NOT those of FAISS's exhaustive search"), "{said}");
        let (code, said) = site.verify();
        assert_eq!(code, Some(1), "codes are also held against their rows: {said}");
    }

    /// Turns every sign around, takes other words for every codebook code, and makes the checksums right, by
    /// the offsets of index/FORMAT.md. Returns how many blocks had codes.
    fn forge_codes(site: &Site) -> u64 {
        const META_BYTES: u64 = 128;
        const BLOCK: u64 = 64;
        let mut segments = files_under(&site.data().join("index"));
        segments.retain(|path| path.extension().is_some_and(|e| e == "idx"));
        let mut forged = 0;
        for segment in segments {
            let file = File::options().read(true).write(true).open(segment).unwrap();
            let read = |at: u64, bytes: u64| {
                let mut buffer = vec![0; bytes as usize];
                file.read_exact_at(&mut buffer, at).unwrap();
                buffer
            };
            let number = |at: u64| u64::from(u32::from_le_bytes(read(at, 4).try_into().unwrap()));
            let (dim, capacity) = (number(12), number(16));
            let identity = read(24, 8);
            let blocks = capacity / BLOCK;
            let mut at = 4096 + (META_BYTES + 2 * dim) * capacity;
            let words = 6 * dim;
            let areas = [8 * dim, 8 * dim, 32 * dim, 768, words + BLOCK, 8].map(|bytes| {
                let start = at.next_multiple_of(4096);
                at = start + bytes * blocks;
                (start, bytes)
            });
            assert_eq!(at.next_multiple_of(4096), file.metadata().unwrap().len(), "the offsets are those of the file");
            for block in 0..blocks {
                let mut parts: Vec<Vec<u8>> =
                    areas.iter().map(|(start, bytes)| read(start + block * bytes, *bytes)).collect();
                let checksum = |parts: &[Vec<u8>]| {
                    let mut words: Vec<u8> = parts.iter().flat_map(|part| xxh3_64(part).to_le_bytes()).collect();
                    words.extend_from_slice(&identity);
                    words.extend_from_slice(&block.to_le_bytes());
                    xxh3_64(&words).to_le_bytes()
                };
                if parts[5] == [0; 8] {
                    continue;
                }
                assert_eq!(parts[5], checksum(&parts[..5]), "the checksum is as FORMAT.md says");
                // The codes of erased rows are zero and stay so.
                for row in 0..BLOCK as usize {
                    if parts[0].iter().skip(row).step_by(BLOCK as usize).any(|byte| *byte != 0) {
                        let turn = |bytes: &mut [u8]| {
                            bytes.iter_mut().skip(row).step_by(BLOCK as usize).for_each(|byte| *byte ^= 0xff);
                        };
                        turn(&mut parts[0]);
                        turn(&mut parts[4][..words as usize]);
                    }
                }
                for forged in [0, 4] {
                    file.write_all_at(&parts[forged], areas[forged].0 + block * areas[forged].1).unwrap();
                }
                file.write_all_at(&checksum(&parts[..5]), areas[5].0 + block * 8).unwrap();
                forged += 1;
            }
        }
        forged
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_interrupted_audit_says_so_and_lets_go_of_the_folder() {
        let (site, _) = stopped().await;
        let config = site.config_file();
        let args = ["audit", "--config", config.to_str().unwrap(), "--probes", "2000000"];
        let child = command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.expect("the program runs");
        // What it is about to do is told once it has the folder.
        let mut said = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        assert!(said.by_ref().map_while(Result::ok).any(|line| line.contains("FAISS has")));
        kill_process(Pid::from_child(&child), Signal::INT).expect("it runs");
        said.for_each(drop);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert!(text(&output).contains("interrupted after"), "{}", text(&output));
        let (code, said) = audit(&site, &["--probes", "10"]);
        assert_eq!(code, Some(0), "{said}");
    }
}
