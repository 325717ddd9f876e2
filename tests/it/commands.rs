//! The commands of the program as a shell sees them: what they print for people and for programs,
//! what they say on standard error, and what they exit with.

use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;

use serde_json::Value;
use thenar::model::Hand;
use tonic::Code;

use crate::support::arrays::{Dtype, write_list, write_npy};
use crate::support::index_files::{ROWS_AT, live_row, only_segment};
use crate::support::palms::{Palm, Palms};
use crate::support::processes::{command, text, thenar};
use crate::support::server::{Options, Site, TestServer};

const SEED: u64 = 81;
const DIM: usize = 64;

/// Every command, with the flags that its help must explain.
const COMMANDS: &[(&[&str], &[&str])] = &[
    (
        &["import"],
        &[
            "--embeddings",
            "--subjects",
            "--batch",
            "--state",
            "--errors",
            "--after-forget",
            "--retry-seconds",
            "--json",
            "--server",
            "--ca",
            "--cert",
            "--key",
            "--server-name",
            "--connect-timeout",
            "--data",
            "--config",
            "--key-file",
        ],
    ),
    (
        &["identify"],
        &[
            "--embeddings",
            "--purpose",
            "--venue",
            "--max-candidates",
            "--threshold",
            "--rows",
            "--hands",
            "--only",
            "--json",
            "--server",
            "--ca",
            "--cert",
            "--key",
            "--server-name",
            "--connect-timeout",
        ],
    ),
    (
        &["forget"],
        &[
            "SUBJECT_ID",
            "--from-file",
            "--yes",
            "--request-id",
            "--json",
            "--server",
            "--ca",
            "--cert",
            "--key",
            "--server-name",
            "--connect-timeout",
        ],
    ),
    (&["status"], &["--json", "--server", "--ca", "--cert", "--key", "--server-name", "--connect-timeout"]),
    (&["demo"], &["--palms", "--dim", "--seed", "--seconds", "--gates", "--terminals", "--engine", "--keep", "--json"]),
    (
        &["serve"],
        &[
            "--config",
            "--data",
            "--key-file",
            "--dim",
            "--engine",
            "--adapter",
            "--threads",
            "--listen",
            "--metrics-listen",
        ],
    ),
    (&["keys"], &["generate", "show"]),
    (&["keys", "generate"], &["--out", "--json"]),
    (&["keys", "show"], &["--key-file", "--json"]),
    (
        &["audit"],
        &[
            "--config",
            "--data",
            "--key-file",
            "--dim",
            "--engine",
            "--adapter",
            "--threads",
            "--probes",
            "--noise",
            "--probes-file",
            "--k",
            "--threshold",
            "--certificate",
            "--seed",
            "--json",
        ],
    ),
    (&["verify"], &["--config", "--data", "--key-file", "--dim", "--engine", "--adapter", "--threads", "--json"]),
];

fn shown(path: &Path) -> String {
    path.to_str().expect("a plain path").to_owned()
}

/// Runs the program: exit code, standard output, standard error.
fn run(args: &[&str]) -> (Option<i32>, String, String) {
    let output = thenar(args);
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// One JSON object a line.
fn objects(stdout: &str) -> Vec<Value> {
    stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

fn object(stdout: &str) -> Value {
    let mut objects = objects(stdout);
    assert_eq!(objects.len(), 1, "{stdout}");
    objects.remove(0)
}

fn people(seed: u64, count: usize) -> Vec<(String, Palm)> {
    Palms::new(seed, DIM).people("person", count)
}

/// A server that knows these people.
async fn server_with(people: &[(String, Palm)]) -> TestServer {
    TestServer::with(Options::dim(DIM), people).await.0
}

fn address(server: &TestServer) -> String {
    format!("http://{}", server.addr)
}

#[test]
fn every_command_explains_itself_and_its_flags() {
    let (code, overview, _) = run(&["--help"]);
    assert_eq!(code, Some(0));
    for (path, flags) in COMMANDS {
        assert!(overview.contains(path[0]), "{path:?} is missing in {overview}");
        for ask in [&[*path, &["--help"]].concat(), &[&["help"], *path].concat()] {
            let (code, help, stderr) = run(ask);
            assert_eq!((code, stderr.as_str()), (Some(0), ""), "{ask:?}");
            for flag in *flags {
                // As a word: --key is not explained by --key-file.
                let told = help.split(|c: char| !(c.is_ascii_alphanumeric() || "-_".contains(c))).any(|w| w == *flag);
                assert!(told, "{ask:?} says nothing about {flag}:\n{help}");
            }
        }
    }
    let (code, version, _) = run(&["--version"]);
    assert_eq!((code, version.trim()), (Some(0), concat!("thenar ", env!("CARGO_PKG_VERSION"))));
}

/// A command or flag without a line in [`COMMANDS`] would go untested.
#[test]
fn the_list_of_commands_and_flags_is_whole() {
    use clap::CommandFactory as _;
    fn collect<'a>(command: &'a clap::Command, path: &mut Vec<&'a str>, found: &mut Vec<(String, Vec<String>)>) {
        for subcommand in command.get_subcommands().filter(|c| c.get_name() != "help") {
            path.push(subcommand.get_name());
            let flags = subcommand.get_arguments().filter_map(|arg| arg.get_long()).map(|long| format!("--{long}"));
            found.push((path.join(" "), flags.filter(|flag| flag != "--help").collect()));
            collect(subcommand, path, found);
            path.pop();
        }
    }
    let (cli, mut found) = (thenar::cli::Cli::command(), Vec::new());
    collect(&cli, &mut Vec::new(), &mut found);
    for (path, flags) in &found {
        let listed = COMMANDS.iter().find(|(listed, _)| listed.join(" ") == *path);
        let (_, listed) = listed.unwrap_or_else(|| panic!("{path} is not listed"));
        for flag in flags {
            assert!(listed.contains(&flag.as_str()), "{path} {flag} is not listed");
        }
    }
    assert_eq!(found.len(), COMMANDS.len());
}

#[test]
fn bad_usage_is_exit_code_2_and_nothing_is_tried() {
    let dir = tempfile::tempdir().unwrap();
    let array = shown(&dir.path().join("array.npy"));
    write_npy(Path::new(&array), &vec![vec![1.0; DIM]; 3], Dtype::F32);
    let list = shown(&dir.path().join("list.csv"));
    write_list(Path::new(&list), [("a", ""), ("b", ""), ("c", "")]);
    let (data, key) = (shown(&dir.path().join("data")), shown(&dir.path().join("key")));
    let import = |more: &[&str]| -> Vec<String> {
        let fixed = ["import", "--embeddings", &array, "--subjects", &list];
        fixed.iter().chain(more).map(|&arg| arg.to_owned()).collect()
    };
    let owned = |args: &[&str]| args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>();
    let cases: Vec<(Vec<String>, &str)> = vec![
        (owned(&[]), "Usage"),
        (owned(&["fly"]), "fly"),
        (owned(&["import"]), "--embeddings"),
        (owned(&["import", "--embeddings", &array]), "--subjects"),
        (import(&["--batch", "0"]), "--batch"),
        (import(&["--batch", "1025"]), "--batch"),
        (import(&["--surprise"]), "--surprise"),
        (import(&["--server", "somewhere"]), "http://HOST:PORT"),
        (import(&["--server", "https://127.0.0.1:1"]), "--ca"),
        (import(&["--data", &data, "--server", "http://127.0.0.1:1"]), "--server"),
        (import(&["--data", &data, "--ca", "ca.pem"]), "--ca"),
        (import(&["--data", &data, "--retry-seconds", "3"]), "--retry-seconds"),
        (import(&["--config", "thenar.toml", "--server", "http://127.0.0.1:1"]), "--server"),
        (import(&["--key-file", &key]), "--data"),
        (owned(&["identify"]), "--embeddings"),
        (owned(&["identify", "--embeddings", &array, "--purpose", "theft"]), "theft"),
        (owned(&["identify", "--embeddings", &array, "--max-candidates", "0"]), "--max-candidates"),
        (owned(&["identify", "--embeddings", &array, "--max-candidates", "101"]), "--max-candidates"),
        (owned(&["identify", "--embeddings", &array, "--threshold", "1.5"]), "--threshold"),
        (owned(&["identify", "--embeddings", &array, "--rows", "2..1"]), "--rows"),
        (owned(&["identify", "--embeddings", &array, "--rows", "1,3"]), "row 3"),
        (owned(&["identify", "--embeddings", &array, "--venue", "two words"]), "--venue"),
        (owned(&["identify", "--embeddings", &array, "--only", "ann,two words"]), "--only"),
        (owned(&["identify", "--embeddings", &array, "--only", "ann,bob,ann"]), "subject_ids[2]"),
        (owned(&["audit", "--data", &data, "--noise", "11"]), "--noise"),
        (owned(&["audit", "--data", &data, "--certificate", "sure"]), "sure"),
        (owned(&["forget"]), "SUBJECT_ID"),
        (owned(&["forget", "--yes", "two words"]), "SUBJECT_ID"),
        (owned(&["forget", "ann"]), "--yes"),
        (owned(&["status", "now"]), "now"),
        (owned(&["status", "--cert", "c.pem"]), "--key"),
        (owned(&["status", "--connect-timeout", "0"]), "--connect-timeout"),
        (owned(&["keys"]), "generate"),
        (owned(&["keys", "generate"]), "--out"),
        (owned(&["verify", "--quickly"]), "--quickly"),
        (owned(&["serve", "--port", "1"]), "--port"),
        (owned(&["demo", "--palms", "many"]), "--palms"),
    ];
    for (args, word) in cases {
        let (code, stdout, stderr) = run(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{args:?}: {stderr}");
        assert!(stderr.contains(word), "{args:?}: no {word:?} in {stderr}");
    }
    assert!(!Path::new(&data).exists(), "nothing was made");
}

#[test]
fn a_key_is_made_once_for_its_owner_alone_and_shows_one_fingerprint() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("master.key");
    let file = shown(&path);
    let (code, made, stderr) = run(&["keys", "generate", "--out", &file, "--json"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let made = object(&made);
    assert_eq!(made["file"], file.as_str());
    let fingerprint = made["fingerprint"].as_str().unwrap();
    assert!(fingerprint.len() >= 16 && fingerprint.bytes().all(|b| b.is_ascii_hexdigit()), "{fingerprint}");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let key = std::fs::read_to_string(&path).unwrap();
    assert!(!key.contains(fingerprint), "the fingerprint is no part of the key");

    let (code, again, stderr) = run(&["keys", "generate", "--out", &file]);
    assert_eq!((code, again.as_str()), (Some(1), ""));
    assert!(stderr.contains(&file), "{stderr}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), key, "a key is never overwritten");

    let (code, shows, _) = run(&["keys", "show", "--key-file", &file, "--json"]);
    assert_eq!(code, Some(0));
    assert_eq!(object(&shows), made);
    let (code, shows, _) = run(&["keys", "show", "--key-file", &file]);
    assert_eq!(code, Some(0));
    assert!(shows.contains(fingerprint) && shows.contains(&file) && !shows.contains(key.trim()), "{shows}");
    let from_environment = command(&["keys", "show", "--json"]).env("THENAR_MASTER_KEY", key.trim()).output().unwrap();
    assert_eq!(object(&String::from_utf8(from_environment.stdout).unwrap())["fingerprint"], fingerprint);

    let other = shown(&dir.path().join("other.key"));
    let (code, made, _) = run(&["keys", "generate", "--out", &other]);
    assert_eq!(code, Some(0));
    assert!(made.contains(&other) && !made.contains(fingerprint), "another key every time: {made}");

    let failing = [
        (vec!["keys", "show"], "THENAR_MASTER_KEY"),
        (vec!["keys", "show", "--key-file", "/nowhere/key"], "/nowhere/key"),
        (vec!["keys", "generate", "--out", "/nowhere/key"], "/nowhere/key"),
    ];
    for (args, word) in failing {
        let (code, stdout, stderr) = run(&args);
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{args:?}");
        assert!(stderr.contains(word), "{args:?}: {stderr}");
    }
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o604)).unwrap();
    let (code, _, stderr) = run(&["keys", "show", "--key-file", &file]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("chmod 600") && !stderr.contains(key.trim()), "{stderr}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn status_tells_people_and_programs_the_same() {
    let people = people(SEED, 20);
    let server = server_with(&people).await;
    server.client().await.forget("person-3").await.unwrap();
    server.client().await.who(&people[0].1).await.unwrap();
    let (code, page, stderr) = run(&["status", "--server", &address(&server)]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    for words in ["19 templates of 19 subjects, 64 dimensions", &address(&server), "cpu", "payment", "entry"] {
        assert!(page.contains(words), "no {words:?} in\n{page}");
    }
    let (code, json, stderr) = run(&["status", "--json", "--server", &address(&server)]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let status = object(&json);
    assert_eq!((&status["dim"], &status["templates"], &status["subjects"]), (&64.into(), &19.into(), &19.into()));
    assert_eq!((&status["searches"], &status["log_lag"]), (&1.into(), &0.into()));
    assert_eq!(status["engine"]["kind"], "cpu");
    assert_eq!(status["policies"].as_array().map(Vec::len), Some(4));
    assert!(status["memory"]["mapped_bytes"].as_u64().unwrap() >= 20 * 2 * DIM as u64);

    // The environment may say which server; the flag has the last word.
    let asked = |variable: &str, more: &[&str]| {
        let args = [&["status", "--json"], more].concat();
        command(&args).env("THENAR_SERVER", variable).output().unwrap().status.code()
    };
    assert_eq!(asked(&address(&server), &[]), Some(0));
    assert_eq!(asked("http://127.0.0.1:1", &[]), Some(1));
    assert_eq!(asked("http://127.0.0.1:1", &["--server", &address(&server)]), Some(0));

    let gone = address(&server);
    drop(server);
    for args in [&["status", "--server", &gone][..], &["status", "--json", "--server", &gone]] {
        let (code, stdout, stderr) = run(args);
        assert_eq!((code, stdout.as_str()), (Some(1), ""));
        assert!(stderr.contains("cannot reach the server") && stderr.contains(&gone), "{stderr}");
    }
}

/// Probes on disk: near the first `mates` people, then strangers.
struct Probes {
    _dir: tempfile::TempDir,
    array: String,
    hands: String,
    rows: Vec<Vec<f32>>,
}

fn probes(people: &[(String, Palm)], mates: usize, strangers: usize) -> Probes {
    let dir = tempfile::tempdir().unwrap();
    let mut palms = Palms::new(SEED + 1, DIM);
    let mut rows: Vec<_> = people[..mates].iter().map(|(_, palm)| palms.near(&palm.values, 0.3)).collect();
    rows.extend((0..strangers).map(|_| palms.vector()));
    let (array, hands) = (dir.path().join("probes.npy"), dir.path().join("hands.csv"));
    write_npy(&array, &rows, Dtype::F32);
    let hand = |row: usize| match people.get(row).map_or(Hand::Unspecified, |(_, palm)| palm.hand) {
        Hand::Unspecified => "",
        Hand::Left => "left",
        Hand::Right => "right",
    };
    let lines: Vec<_> = (0..rows.len()).map(|row| ("x", hand(row))).collect();
    write_list(&hands, lines);
    Probes { array: shown(&array), hands: shown(&hands), _dir: dir, rows }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn identify_finds_mates_and_no_strangers_for_people_and_programs() {
    let people = people(SEED, 60);
    let server = server_with(&people).await;
    // More rows than a stream may have under way.
    let probes = probes(&people, 50, 30);
    let at = address(&server);
    let ask = ["identify", "--embeddings", &probes.array, "--server", &at];

    let (code, stdout, stderr) = run(&[&ask[..], &["--json", "--hands", &probes.hands]].concat());
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let answers = objects(&stdout);
    assert_eq!(answers.len(), 80);
    for (row, answer) in answers.iter().enumerate() {
        assert_eq!(answer["row"], row, "answers come in the order of the rows");
        let candidates = answer["candidates"].as_array().unwrap();
        assert_eq!(answer["gallery_size"], 60);
        assert_eq!(answer["certificate"]["kind"], "deterministic");
        if row < 50 {
            assert_eq!(answer["decision"], "match", "{answer}");
            assert_eq!(candidates[0]["subject_id"], people[row].0.as_str(), "seed {SEED}");
            let score = candidates[0]["score"].as_f64().unwrap();
            let expected = cosine(&probes.rows[row], &people[row].1.values);
            assert!((score - expected).abs() < 1e-3, "row {row}: {score}, {expected} was expected");
        } else {
            assert_eq!((&answer["decision"], candidates.len()), (&"no_match".into(), 0), "{answer}");
        }
    }

    let (code, table, stderr) = run(&[&ask[..], &["--rows", "0..2,79"]].concat());
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    let line = |row: &str| lines.iter().find(|words| words.first() == Some(&row)).unwrap_or_else(|| panic!("{table}"));
    assert_eq!(line("0")[1..3], ["match", "person-0"]);
    assert_eq!(line("1")[1..3], ["match", "person-1"]);
    assert_eq!(line("79")[1..3], ["no_match", "-"]);
    assert!(table.contains("decision") && !table.contains("person-2"), "{table}");

    let strict = [&ask[..], &["--json", "--rows", "7", "--threshold", "0.999", "--purpose", "payment"]].concat();
    let answer = object(&run(&strict).1);
    assert_eq!((&answer["row"], &answer["decision"]), (&7.into(), &"no_match".into()), "{answer}");
    assert!((answer["threshold"].as_f64().unwrap() - 0.999).abs() < 1e-12, "{answer}");
    let wide = [&ask[..], &["--json", "--rows", "7", "--threshold", "-1", "--max-candidates", "25"]].concat();
    let answer = object(&run(&wide).1);
    let scores: Vec<f64> =
        answer["candidates"].as_array().unwrap().iter().map(|c| c["score"].as_f64().unwrap()).collect();
    assert_eq!(scores.len(), 25);
    assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_probe_that_is_none_is_told_and_the_others_are_answered() {
    let people = people(SEED, 10);
    let server = server_with(&people).await;
    let mut probes = probes(&people, 3, 0);
    probes.rows[1][5] = f32::NAN;
    write_npy(Path::new(&probes.array), &probes.rows, Dtype::F32);
    let at = address(&server);
    let ask = ["identify", "--embeddings", &probes.array, "--server", &at];
    let (code, stdout, _) = run(&[&ask[..], &["--json"]].concat());
    assert_eq!(code, Some(1), "a row without an answer is a failure");
    let answers = objects(&stdout);
    assert_eq!(answers.len(), 3);
    assert_eq!(answers[1]["error"]["code"], "INVALID_ARGUMENT");
    assert!(answers[1]["error"]["message"].as_str().unwrap().contains("finite"), "{}", answers[1]);
    for row in [0, 2] {
        assert_eq!(answers[row]["candidates"][0]["subject_id"], people[row].0.as_str());
    }
    let (code, table, _) = run(&ask);
    assert_eq!(code, Some(1));
    assert!(table.contains("INVALID_ARGUMENT") && table.contains("person-0"), "{table}");

    // Another dimension, another length of the list of hands, and files that are not there.
    write_npy(Path::new(&probes.array), &vec![vec![1.0; 32]; 3], Dtype::F16);
    let (code, stdout, _) = run(&[&ask[..], &["--json"]].concat());
    assert_eq!(code, Some(1));
    for answer in objects(&stdout) {
        assert_eq!(answer["error"]["code"], "INVALID_ARGUMENT", "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains("64"), "{answer}");
    }
    write_list(Path::new(&probes.hands), [("x", "left"), ("x", "right")]);
    let (code, _, stderr) = run(&[&ask[..], &["--hands", &probes.hands]].concat());
    assert_eq!(code, Some(1));
    assert!(stderr.contains("3 rows") && stderr.contains("2 lines"), "{stderr}");
    std::fs::remove_file(&probes.array).unwrap();
    let (code, stdout, stderr) = run(&ask);
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(stderr.contains(&probes.array), "{stderr}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn forget_needs_a_yes_and_then_nobody_finds_them() {
    let people = people(SEED, 12);
    let server = server_with(&people).await;
    let at = address(&server);
    let mut client = server.client().await;

    let (code, stdout, stderr) = run(&["forget", "person-1", "--server", &at]);
    assert_eq!((code, stdout.as_str()), (Some(2), ""), "nobody is there to ask: {stderr}");
    assert!(stderr.contains("--yes"), "{stderr}");
    assert!(client.get("person-1").await.is_ok(), "without a yes nothing is done");
    let (code, _, stderr) = run(&["forget", "--yes", "person-1", "two words", "--server", &at]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(client.get("person-1").await.is_ok(), "every name is checked before the first goes");

    let (code, stdout, stderr) = run(&["forget", "--yes", "person-1", "--server", &at]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert_eq!(stdout.trim(), "person-1: forgotten, 1 template erased");
    assert_eq!(client.get("person-1").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(client.who(&people[1].1).await.unwrap(), None);

    let (code, stdout, stderr) = run(&["forget", "--yes", "person-2", "nobody", "person-3", "--server", &at]);
    assert_eq!(code, Some(1), "an unknown subject is a failure");
    assert!(stderr.contains("nobody: NOT_FOUND"), "{stderr}");
    assert_eq!(stdout.lines().count(), 2, "the others are done: {stdout}");

    let list = server.site.dir.path().join("leaving.txt");
    std::fs::write(&list, "person-4\n\n  nobody  \nperson-5\n").unwrap();
    let from_file = ["forget", "--yes", "--json", "--server", &at, "--from-file", &shown(&list)];
    let named = [&from_file[..], &["--request-id", "leaving", "person-6"]].concat();
    let (code, stdout, _) = run(&named);
    assert_eq!(code, Some(1));
    let reports = objects(&stdout);
    let subjects: Vec<_> = reports.iter().map(|report| report["subject_id"].as_str().unwrap()).collect();
    assert_eq!(subjects, ["person-6", "person-4", "nobody", "person-5"]);
    for report in &reports {
        let known = report["subject_id"] != "nobody";
        assert_eq!(report["forgotten"], known, "{report}");
        if known {
            assert_eq!(report["templates_erased"], 1, "{report}");
            assert!(report["lsn"].as_u64().unwrap() > 0 && report.get("error").is_none(), "{report}");
        } else {
            assert_eq!(report["error"]["code"], "NOT_FOUND", "{report}");
        }
    }
    // Under the same name the deletion has happened, and is reported as it was.
    let (code, again, _) = run(&named);
    assert_eq!((code, objects(&again).len()), (Some(1), 4));
    let lsn_of = |stdout: &str| objects(stdout).iter().map(|report| report["lsn"].clone()).collect::<Vec<_>>();
    assert_eq!(lsn_of(&again), lsn_of(&stdout));
    // Under another it cannot.
    let (code, again, _) = run(&from_file);
    assert_eq!(code, Some(1));
    assert!(objects(&again).iter().all(|report| report["error"]["code"] == "NOT_FOUND"), "{again}");

    for (number, (subject, palm)) in people.iter().enumerate() {
        let expected = (!(1..=6).contains(&number)).then(|| subject.clone());
        assert_eq!(client.who(palm).await.unwrap(), expected, "seed {SEED}");
    }
    assert_eq!(client.status().await.unwrap().subjects, 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn verify_tells_a_sound_folder_from_a_damaged_one() {
    let people = people(SEED, 40);
    let server = server_with(&people).await;
    server.client().await.forget("person-39").await.unwrap();
    let (folder, key) = (shown(&server.site.data()), shown(&server.site.key()));
    let ask = ["verify", "--data", &folder, "--key-file", &key];
    let (code, stdout, stderr) = run(&ask);
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "a server has the folder");
    assert!(stderr.contains("in use"), "{stderr}");

    let site = server.terminate();
    let (code, page, _) = run(&ask);
    assert_eq!(code, Some(0), "{page}");
    assert!(page.contains("39 live, 1 erased") && page.contains("The folder is sound."), "{page}");
    let (code, stdout, _) = run(&[&ask[..], &["--json"]].concat());
    let report = object(&stdout);
    assert_eq!((code, &report["sound"]), (Some(0), &true.into()), "{report}");
    assert_eq!((&report["rows"], &report["live"], &report["erased"]), (&40.into(), &39.into(), &1.into()));
    assert_eq!((&report["registry_templates"], &report["problems"]), (&39.into(), &Value::Array(Vec::new())));
    assert_eq!(report["lsn"], report["registry_lsn"]);

    let segment = only_segment(&site);
    let row = ROWS_AT + live_row(&segment, 0) * 2 * DIM as u64;
    let file = std::fs::File::options().read(true).write(true).open(&segment).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, row).unwrap();
    file.write_all_at(&[byte[0] ^ 1], row).unwrap();
    let (code, page, _) = run(&ask);
    assert_eq!(code, Some(1), "{page}");
    assert!(page.contains("damaged") && page.contains("thenar serve"), "{page}");
    assert!(page.contains("(0 live, 0 erased in the segments without damage)"), "the only one is damaged: {page}");
    let (code, stdout, _) = run(&[&ask[..], &["--json"]].concat());
    let report = object(&stdout);
    assert_eq!((code, &report["sound"]), (Some(1), &false.into()), "{report}");
    let problems = report["problems"].as_array().unwrap();
    assert_eq!(problems.len(), 1, "one flipped bit is one problem: {report}");
    assert!(problems[0].as_str().unwrap().contains(segment.file_name().unwrap().to_str().unwrap()), "{report}");
    file.write_all_at(&byte, row).unwrap();
    assert_eq!(run(&ask).0, Some(0), "looking changed nothing");

    // Bytes beyond the rows that count, as an append leaves them that a kill cut short: it may be
    // somebody who was forgotten since.
    let beyond = row + 50 * 2 * DIM as u64;
    file.write_all_at(&[1], beyond).unwrap();
    let (code, page, _) = run(&ask);
    assert_eq!(code, Some(1), "{page}");
    assert!(page.contains("to erase   1") && !page.contains("is sound") && !page.contains("is damaged"), "{page}");
    let (code, stdout, _) = run(&[&ask[..], &["--json"]].concat());
    let report = object(&stdout);
    assert_eq!((code, &report["sound"], &report["to_erase"]), (Some(1), &false.into(), &1.into()), "{report}");
    file.write_all_at(&[0], beyond).unwrap();
    assert_eq!(run(&ask).0, Some(0));

    // The registry: a flipped bit of a sealed template, and a deletion that is taken out of its ledger.
    let path = site.data().join("registry.sqlite");
    let whole = std::fs::read(&path).unwrap();
    let sealed: Vec<u8> = {
        let registry = rusqlite::Connection::open(&path).unwrap();
        let sql = "SELECT content FROM slots JOIN templates USING (slot) WHERE id = 7";
        registry.query_row(sql, [], |row| row.get(0)).unwrap()
    };
    let mut damaged = whole.clone();
    damaged[whole.windows(sealed.len()).position(|w| w == sealed).unwrap() + 40] ^= 4;
    std::fs::write(&path, damaged).unwrap();
    let (code, page, _) = run(&ask);
    assert_eq!(code, Some(1), "{page}");
    for words in ["template 7 of the registry does not open", "table templates", "The registry is damaged"] {
        assert!(page.contains(words), "{words}: {page}");
    }
    std::fs::write(&path, &whole).unwrap();
    rusqlite::Connection::open(&path).unwrap().execute("DELETE FROM forgotten", []).unwrap();
    let (code, stdout, _) = run(&[&ask[..], &["--json"]].concat());
    let report = object(&stdout);
    assert_eq!((code, &report["sound"], &report["registry_deletions"]), (Some(1), &false.into(), &0.into()));
    assert!(report["problems"].as_array().unwrap()[0].as_str().unwrap().contains("forgotten"), "{report}");
    std::fs::write(&path, &whole).unwrap();
    assert_eq!(run(&ask).0, Some(0));

    // Nothing to look at, and the wrong key.
    let empty = tempfile::tempdir().unwrap();
    let (code, _, stderr) = run(&["verify", "--data", &shown(empty.path()), "--key-file", &key]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("holds no Thenar data"), "{stderr}");
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0, "and nothing was made there");
    let other = Site::new(Options::dim(DIM));
    let (code, _, stderr) = run(&["verify", "--data", &folder, "--key-file", &shown(&other.key())]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("key"), "{stderr}");
}

/// `thenar ... | head` must not look like a crash.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_reader_that_went_away_is_a_failure_and_no_panic() {
    let people = people(SEED, 5);
    let server = server_with(&people).await;
    let probes = probes(&people, 3, 0);
    let at = address(&server);
    let unread = |args: &[&str]| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command(args).stdout(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", text(&output));
        let said = text(&output);
        assert!(!said.contains("panicked") && said.to_lowercase().contains("broken pipe"), "{args:?}: {said}");
    };
    for json in [&[][..], &["--json"]] {
        unread(&[&["status", "--server", &at], json].concat());
        unread(&[&["identify", "--embeddings", &probes.array, "--server", &at], json].concat());
        unread(&[&["keys", "show", "--key-file", &shown(&server.site.key())], json].concat());
    }
    let site = server.terminate();
    for json in [&[][..], &["--json"]] {
        let (data, key) = (shown(&site.data()), shown(&site.key()));
        unread(&[&["verify", "--data", &data, "--key-file", &key], json].concat());
    }
}

/// What `make bench` does first, on a machine that has a shell and nothing else.
#[test]
fn what_a_benchmark_needs_is_named_before_anything_is_compiled() {
    let bare = tempfile::tempdir().unwrap();
    let path = std::env::var_os("PATH").unwrap();
    for tool in ["bash", "dirname"] {
        let found = std::env::split_paths(&path).map(|folder| folder.join(tool)).find(|tool| tool.exists());
        std::os::unix::fs::symlink(found.expect(tool), bare.path().join(tool)).unwrap();
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/setup.sh");
    let output = std::process::Command::new(script).arg("--check-bench").env("PATH", bare.path()).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for missing in ["cmake (FAISS", "a C++ compiler (FAISS", "OpenBLAS (FAISS", "apt-get install", "libopenblas-dev"] {
        assert!(said.contains(missing), "no {missing:?} in:\n{said}");
    }
    assert!(!said.contains("Vulkan") && !said.contains("Python"), "only what benchmarks need: {said}");
    let makefile = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Makefile")).unwrap();
    let bench = makefile.split("\nbench:\n").nth(1).unwrap();
    assert!(bench.trim_start().starts_with("deploy/setup.sh --check-bench"), "{bench}");
}
