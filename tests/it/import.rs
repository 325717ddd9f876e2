//! `thenar import` as a person runs it: into a running server and straight into a data folder, with
//! bad rows, interrupted, killed, and with a server that goes away in the middle.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use thenar::model::Hand;
use tonic::Code;

use crate::support::arrays::{Dtype, npy, write_list, write_npy};
use crate::support::machine::skip;
use crate::support::palms::{Palm, Palms};
use crate::support::processes::{Running, command};
use crate::support::server::{Options, Site, TestServer};

const SEED: u64 = 71;
const DIM: usize = 64;
/// Enough, one subject a message, to be in the middle for seconds.
const MANY: usize = 20_000;
/// Generous: tests share two cores.
const PATIENCE: Duration = Duration::from_secs(60);

/// An array and a list of subjects in a folder of their own.
struct Files {
    dir: TempDir,
}

impl Files {
    fn new(rows: &[Vec<f32>], lines: &[(String, String)], dtype: Dtype) -> Self {
        let files = Self { dir: tempfile::Builder::new().prefix("thenar-it-").tempdir().unwrap() };
        write_npy(&files.array(), rows, dtype);
        write_list(&files.list(), lines.iter().map(|(subject, hand)| (subject.as_str(), hand.as_str())));
        files
    }

    /// One subject a row.
    fn of(people: &[(String, Palm)], dtype: Dtype) -> Self {
        let rows: Vec<_> = people.iter().map(|(_, palm)| palm.values.clone()).collect();
        let lines: Vec<_> =
            people.iter().map(|(subject, palm)| (subject.clone(), word(palm.hand).to_owned())).collect();
        Self::new(&rows, &lines, dtype)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn array(&self) -> PathBuf {
        self.path("gallery.npy")
    }

    fn list(&self) -> PathBuf {
        self.path("subjects.csv")
    }

    fn errors(&self) -> PathBuf {
        self.path("errors.csv")
    }

    /// Where an interrupted import remembers how far it is, if nobody says otherwise.
    fn state(&self) -> PathBuf {
        self.path("gallery.npy.thenar-import")
    }

    /// `import --json` of these files to `target`, with `more` arguments.
    fn args(&self, target: &[String], more: &[&str]) -> Vec<String> {
        let fixed = ["import", "--json", "--embeddings", &shown(&self.array()), "--subjects", &shown(&self.list())]
            .map(str::to_owned);
        fixed.into_iter().chain(target.iter().cloned()).chain(more.iter().map(|&arg| arg.to_owned())).collect()
    }

    fn import(&self, target: &[String], more: &[&str]) -> Imported {
        Imported::of(command(&refs(&self.args(target, more))).output().unwrap())
    }

    fn spawn(&self, target: &[String], more: &[&str]) -> Import {
        Import(Running::start(command(&refs(&self.args(target, more)))))
    }
}

/// An import under way.
struct Import(Running);

impl Import {
    /// Waits until it has written down how far it is, which it does after the first acknowledgements.
    fn wait_until_in_the_middle(&mut self, files: &Files) {
        let until = Instant::now() + PATIENCE;
        while !files.state().exists() {
            assert!(Instant::now() < until, "the import did not get anywhere");
            assert!(self.0.is_running(), "the import ended before it could be disturbed");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn signal(&mut self, signal: Signal) {
        self.0.signal(signal);
    }

    fn end(self) -> Imported {
        Imported::of(self.0.end(PATIENCE))
    }
}

/// How an import ended and what it said.
#[derive(Debug)]
struct Imported {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Imported {
    fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The one JSON object on standard output.
    fn summary(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    fn count(&self, name: &str) -> u64 {
        self.summary()[name].as_u64().unwrap_or_else(|| panic!("no {name} in {self:?}"))
    }

    /// Enrolled, unchanged and rejected.
    fn counts(&self) -> (u64, u64, u64) {
        (self.count("enrolled"), self.count("unchanged"), self.count("rejected"))
    }
}

fn word(hand: Hand) -> &'static str {
    match hand {
        Hand::Unspecified => "",
        Hand::Left => "left",
        Hand::Right => "right",
    }
}

fn shown(path: &Path) -> String {
    path.to_str().expect("a plain path").to_owned()
}

fn refs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn to_server(server: &TestServer) -> Vec<String> {
    vec!["--server".to_owned(), format!("http://{}", server.addr)]
}

fn to_folder(site: &Site) -> Vec<String> {
    ["--data", &shown(&site.data()), "--key-file", &shown(&site.key())].map(str::to_owned).to_vec()
}

/// Where an import goes.
enum Target {
    Server(TestServer),
    Folder(Site),
}

impl Target {
    fn both() -> [Self; 2] {
        let options = Options::dim(DIM);
        [Self::Server(TestServer::start(options.clone())), Self::Folder(Site::new(options))]
    }

    fn args(&self) -> Vec<String> {
        match self {
            Self::Server(server) => to_server(server),
            Self::Folder(site) => to_folder(site),
        }
    }

    /// A server over what was imported.
    fn served(self) -> TestServer {
        match self {
            Self::Server(server) => server,
            Self::Folder(site) => site.start(),
        }
    }
}

/// Everybody is there with one template, nobody else is, and (of every `step`-th) a search finds them.
async fn holds_exactly(server: &TestServer, people: &[(String, Palm)], step: usize) {
    let mut client = server.client().await;
    let status = client.status().await.unwrap();
    let count = people.len() as u64;
    assert_eq!((status.subjects, status.templates), (count, count), "each is in exactly once");
    for (subject, palm) in people.iter().step_by(step) {
        let found = client.identify(std::slice::from_ref(palm), 1, Some(0.99)).await.unwrap();
        let found: Vec<_> = found.candidates.iter().map(|candidate| candidate.subject_id.as_str()).collect();
        assert_eq!(found, [subject], "seed {SEED}");
    }
}

fn is_sound(site: &Site) {
    let args = ["verify", "--data", &shown(&site.data()), "--key-file", &shown(&site.key())];
    let (code, said) = site.run_to_end(&args);
    assert_eq!(code, Some(0), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn everybody_goes_in_once_from_either_dtype_into_a_server_or_a_folder() {
    for dtype in [Dtype::F32, Dtype::F16] {
        for target in Target::both() {
            let people = Palms::new(SEED, DIM).people("person", 700);
            let files = Files::of(&people, dtype);
            let first = files.import(&target.args(), &[]);
            assert_eq!(first.code, Some(0), "{first:?}");
            assert_eq!(first.counts(), (700, 0, 0), "{first:?}");
            assert_eq!((first.count("rows"), first.count("done_rows"), first.count("templates")), (700, 700, 700));
            assert!(first.summary()["templates_per_second"].as_f64().unwrap() > 0.0);
            assert!(!files.state().exists(), "an import that ended well leaves nothing to go on from");

            let again = files.import(&target.args(), &[]);
            assert_eq!((again.code, again.counts()), (Some(0), (0, 700, 0)), "{again:?}");
            let server = target.served();
            holds_exactly(&server, &people, 7).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_folder_and_the_server_over_it_know_the_same_requests() {
    let site = Site::new(Options::dim(DIM));
    let people = Palms::new(SEED, DIM).people("person", 300);
    let some = Files::of(&people[..200], Dtype::F32).import(&to_folder(&site), &[]);
    assert_eq!((some.code, some.counts()), (Some(0), (200, 0, 0)), "{some:?}");
    let server = site.start();
    let all = Files::of(&people, Dtype::F32);
    let rest = all.import(&to_server(&server), &[]);
    assert_eq!((rest.code, rest.counts()), (Some(0), (100, 200, 0)), "{rest:?}");
    holds_exactly(&server, &people, 10).await;
    let site = server.terminate();
    // The configuration of the server says where folder and key are.
    let target = ["--config", &shown(&site.config_file())].map(str::to_owned).to_vec();
    let back = all.import(&target, &[]);
    assert_eq!((back.code, back.counts()), (Some(0), (0, 300, 0)), "{back:?}");
    is_sound(&site);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn bad_rows_are_told_with_line_and_reason_and_the_rest_goes_in() {
    for dtype in [Dtype::F32, Dtype::F16] {
        for target in Target::both() {
            bad_rows(target, dtype).await;
        }
    }
}

async fn bad_rows(target: Target, dtype: Dtype) {
    let mut palms = Palms::new(SEED + 1, DIM);
    let taken = palms.people("taken", 1);
    assert_eq!(Files::of(&taken, dtype).import(&target.args(), &[]).code, Some(0));

    let good = palms.people("good", 60);
    let mut rows: Vec<Vec<f32>> = Vec::new();
    let mut lines: Vec<(String, String)> = Vec::new();
    // Line and subject of what is rejected, with words of the reason.
    let mut expected: Vec<(usize, String, &str)> = Vec::new();
    let long = "x".repeat(65);
    for (number, (subject, palm)) in good.iter().enumerate() {
        let mut bad = |subject: &str, hand: &str, values: Vec<f32>, reason: Option<&'static str>| {
            rows.push(values);
            lines.push((subject.to_owned(), hand.to_owned()));
            if let Some(reason) = reason {
                expected.push((lines.len() + 1, subject.to_owned(), reason));
            }
        };
        let spoilt = |value: f32| {
            let mut values = palm.values.clone();
            values[number % DIM] = value;
            values
        };
        match number {
            3 => bad("nan", "left", spoilt(f32::NAN), Some("not a finite number")),
            5 => bad("infinite", "left", spoilt(f32::NEG_INFINITY), Some("not a finite number")),
            7 => bad("zero", "", vec![0.0; DIM], Some("zero vector")),
            11 => bad("thumb", "thumb", palm.values.clone(), Some("hand")),
            13 => bad("with space", "left", palm.values.clone(), Some("subject_id")),
            17 => bad(&long, "left", palm.values.clone(), Some("subject_id")),
            19 => bad("taken-0", "left", palm.values.clone(), Some("ALREADY_EXISTS")),
            // A subject with one bad template of two is left out whole.
            23 => {
                bad("half", "left", palm.values.clone(), None);
                bad("half", "right", spoilt(f32::NAN), Some("not a finite number"));
            }
            29 => {
                for at in 0..17 {
                    bad("many", "left", palm.values.clone(), (at == 0).then_some("at most 16"));
                }
            }
            // The id of somebody before, whose lines have ended.
            31 => bad("good-2", "left", palm.values.clone(), Some("comes again")),
            _ => {}
        }
        rows.push(palm.values.clone());
        lines.push((subject.clone(), word(palm.hand).to_owned()));
    }
    let rejected = expected.len() as u64;
    let files = Files::new(&rows, &lines, dtype);
    let errors = shown(&files.errors());
    // Small messages, so that some hold nothing but bad rows.
    let more = ["--batch", "3", "--errors", &errors];
    let first = files.import(&target.args(), &more);
    assert_eq!(first.code, Some(1), "rejected rows are a failure: {first:?}");
    assert_eq!(first.counts(), (60, 0, rejected), "{first:?}");
    let again = files.import(&target.args(), &more);
    assert_eq!((again.code, again.counts()), (Some(1), (0, 60, rejected)), "{again:?}");

    for ended in [&first, &again] {
        for (line, subject, reason) in &expected {
            let told = ended.stderr.lines().find(|told| told.starts_with(&format!("line {line}: ")));
            let told = told.unwrap_or_else(|| panic!("nothing about line {line}: {}", ended.stderr));
            assert!(told.contains(subject) && told.contains(reason), "line {line}, {subject}, {reason}: {told}");
        }
    }
    let written = std::fs::read_to_string(files.errors()).unwrap();
    let mut written: Vec<&str> = written.lines().collect();
    assert_eq!(written.remove(0), "line,subject_id,reason");
    assert_eq!(written.len(), expected.len(), "told once each, also after the second run: {written:?}");
    for (line, subject, reason) in &expected {
        let told = written.iter().find(|told| told.starts_with(&format!("{line},{subject},")));
        assert!(told.is_some_and(|told| told.contains(reason)), "{line},{subject},{reason}: {written:?}");
    }

    let server = target.served();
    let mut client = server.client().await;
    for bad in ["nan", "infinite", "zero", "thumb", "half", "many"] {
        assert_eq!(client.get(bad).await.unwrap_err().code(), Code::NotFound, "{bad}");
    }
    drop(client);
    let mut there = good;
    there.extend(taken);
    holds_exactly(&server, &there, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_import_leaves_out_the_forgotten_unless_it_is_told_otherwise() {
    for into_folder in [false, true] {
        let mut people = Palms::new(SEED + 2, DIM).people("person", 40);
        let files = Files::of(&people, Dtype::F32);
        let server = TestServer::start(Options::dim(DIM));
        let first = files.import(&to_server(&server), &[]);
        assert_eq!((first.code, first.counts()), (Some(0), (40, 0, 0)), "{first:?}");
        let mut client = server.client().await;
        for gone in [3, 17] {
            client.forget(&people[gone].0).await.unwrap();
        }
        // One of them comes back, with another palm.
        people[17].1 = Palms::new(SEED + 3, DIM).palm();
        client.enroll("person-17", std::slice::from_ref(&people[17].1)).await.unwrap();
        drop(client);
        let target = if into_folder { Target::Folder(server.terminate()) } else { Target::Server(server) };
        let errors = shown(&files.errors());
        for _ in 0..2 {
            let again = files.import(&target.args(), &["--errors", &errors]);
            assert_eq!((again.code, again.counts()), (Some(1), (0, 38, 2)), "{again:?}");
            let told = again.stderr.lines().find(|told| told.starts_with("line 5: ")).expect("it is told");
            for words in ["person-3", "was forgotten at 20", "--after-forget"] {
                assert!(told.contains(words), "{words}: {told}");
            }
            let written = std::fs::read_to_string(files.errors()).unwrap();
            assert!(written.lines().any(|told| told.starts_with("5,person-3,")), "{written}");
            assert!(written.lines().any(|told| told.contains("19,person-17,ALREADY_EXISTS")), "{written}");
        }
        let told = files.import(&target.args(), &["--after-forget"]);
        assert_eq!((told.code, told.counts()), (Some(1), (1, 38, 1)), "{told:?}");
        let again = files.import(&target.args(), &[]);
        assert_eq!(again.counts(), (0, 39, 1), "they are in, and no longer forgotten: {again:?}");
        holds_exactly(&target.served(), &people, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn people_get_a_summary_and_no_json() {
    let site = Site::new(Options::dim(DIM));
    let people = Palms::new(SEED, DIM).people("person", 30);
    let files = Files::of(&people, Dtype::F32);
    let args: Vec<String> = files.args(&to_folder(&site), &[]).into_iter().filter(|arg| arg != "--json").collect();
    let ended = Imported::of(command(&refs(&args)).output().unwrap());
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.stdout.lines().count(), 1, "{ended:?}");
    assert!(ended.stdout.starts_with("30 enrolled, 0 unchanged, 0 rejected; 30 templates in "), "{ended:?}");
    assert!(ended.stderr.contains("a new gallery of 64 dimensions"), "{ended:?}");
}

/// Ctrl-C finishes what is under way and exits 1; the same command goes on from there.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_interrupted_import_is_taken_up_again_where_it_stood() {
    for target in Target::both() {
        let people = Palms::new(SEED + 2, DIM).people("person", MANY);
        let files = Files::of(&people, Dtype::F16);
        let mut running = files.spawn(&target.args(), &["--batch", "1"]);
        running.wait_until_in_the_middle(&files);
        running.signal(Signal::INT);
        let first = running.end();
        assert_eq!(first.code, Some(1), "{first:?}");
        assert_eq!(first.summary()["interrupted"], true, "{first:?}");
        let done = first.count("done_rows");
        assert!(0 < done && done < MANY as u64, "{first:?}");
        assert_eq!(first.counts(), (done, 0, 0), "what was under way was finished and counted: {first:?}");
        assert!(first.stderr.contains(&format!("stopped at row {done} of {MANY}")), "{first:?}");
        assert!(files.state().exists());

        let second = files.import(&target.args(), &[]);
        assert_eq!(second.code, Some(0), "{second:?}");
        assert!(second.stderr.contains("continuing at row"), "{second:?}");
        assert!(second.count("skipped_rows") > 0, "{second:?}");
        assert_eq!(second.counts(), (MANY as u64 - done, 1, 0), "one batch is sent again, nothing else: {second:?}");
        assert!(!files.state().exists());
        holds_exactly(&target.served(), &people, MANY / 50).await;
    }
}

/// Nothing acknowledged is lost, nothing comes twice, however often the import is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_import_killed_in_the_middle_is_taken_up_again() {
    for target in Target::both() {
        let people = Palms::new(SEED + 3, DIM).people("person", MANY);
        let files = Files::of(&people, Dtype::F32);
        let mut running = files.spawn(&target.args(), &["--batch", "1"]);
        running.wait_until_in_the_middle(&files);
        running.signal(Signal::KILL);
        let killed = running.end();
        assert_eq!((killed.code, killed.stdout.as_str()), (None, ""), "killed, not ended: {killed:?}");

        // And a second time, before or after it has taken anything in.
        let mut running = files.spawn(&target.args(), &["--batch", "1"]);
        std::thread::sleep(Duration::from_millis(300));
        running.signal(Signal::KILL);
        let killed = running.end();
        assert_eq!(killed.code, None, "{killed:?}");

        let last = files.import(&target.args(), &[]);
        assert_eq!(last.code, Some(0), "{last:?}");
        let (enrolled, unchanged, rejected) = last.counts();
        assert_eq!(rejected, 0, "{last:?}");
        assert!(unchanged > 0, "the last batch that was written down is sent again: {last:?}");
        let skipped = last.count("skipped_rows");
        assert!(skipped > 0, "{last:?}");
        assert_eq!(skipped + enrolled + unchanged, MANY as u64, "{last:?}");
        if let Target::Folder(site) = &target {
            is_sound(site);
        }
        holds_exactly(&target.served(), &people, MANY / 50).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_that_stops_and_comes_back_is_waited_for() {
    restarted(|server| server.terminate()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_that_is_killed_and_comes_back_is_waited_for() {
    restarted(|server| server.kill9()).await;
}

async fn restarted(stop: impl FnOnce(TestServer) -> Site) {
    let people = Palms::new(SEED + 4, DIM).people("person", MANY);
    let files = Files::of(&people, Dtype::F32);
    let server = TestServer::start(Options::dim(DIM));
    let address = server.addr;
    let mut running = files.spawn(&to_server(&server), &["--batch", "2"]);
    running.wait_until_in_the_middle(&files);
    let mut site = stop(server);
    site.options.listen = address.to_string();
    // Away for long enough to be missed.
    std::thread::sleep(Duration::from_millis(300));
    let server = site.start();
    assert_eq!(server.addr, address);
    let ended = running.end();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let (enrolled, unchanged, rejected) = ended.counts();
    assert_eq!((enrolled + unchanged, rejected), (MANY as u64, 0), "{ended:?}");
    assert!(ended.stderr.contains("connection lost"), "it was in the middle: {ended:?}");
    holds_exactly(&server, &people, MANY / 50).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_server_that_stays_away_ends_the_import_and_the_same_command_goes_on() {
    let people = Palms::new(SEED + 5, DIM).people("person", MANY);
    let files = Files::of(&people, Dtype::F32);
    let server = TestServer::start(Options::dim(DIM));
    let address = server.addr;
    let target = to_server(&server);
    let mut running = files.spawn(&target, &["--batch", "1", "--retry-seconds", "1"]);
    running.wait_until_in_the_middle(&files);
    let mut site = server.kill9();
    let ended = running.end();
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{ended:?}");
    assert!(ended.stderr.contains("cannot reach the server at"), "{ended:?}");
    assert!(ended.stderr.contains("the same command continues from there"), "{ended:?}");
    site.options.listen = address.to_string();
    let server = site.start();
    let ended = files.import(&target, &[]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let (enrolled, unchanged, rejected) = ended.counts();
    let skipped = ended.count("skipped_rows");
    assert!(skipped > 0, "what was written down had been acknowledged, so it was there: {ended:?}");
    assert_eq!((skipped + enrolled + unchanged, rejected), (MANY as u64, 0), "{ended:?}");
    holds_exactly(&server, &people, MANY / 50).await;
}

/// What was written down counts for one place only, and only as long as it is true.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn where_an_import_stood_counts_for_that_folder_and_what_is_in_it() {
    let people = Palms::new(SEED + 6, DIM).people("person", MANY);
    let files = Files::of(&people, Dtype::F32);
    let (here, there) = (Site::new(Options::dim(DIM)), Site::new(Options::dim(DIM)));
    let state = files.path("state");
    let with_state = ["--batch", "1", "--state", &shown(&state)];
    let interrupted = |site: &Site| {
        let mut running = files.spawn(&to_folder(site), &with_state);
        let until = Instant::now() + PATIENCE;
        while !state.exists() {
            assert!(Instant::now() < until, "the import did not get anywhere");
            std::thread::sleep(Duration::from_millis(1));
        }
        running.signal(Signal::INT);
        let ended = running.end();
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(!files.state().exists(), "--state says where, and it is nowhere else");
    };
    interrupted(&here);
    let elsewhere = files.import(&to_folder(&there), &["--state", &shown(&state)]);
    assert_eq!((elsewhere.code, elsewhere.counts()), (Some(0), (MANY as u64, 0, 0)), "{elsewhere:?}");
    assert!(!state.exists());

    // The same folder, but emptied meanwhile.
    interrupted(&here);
    std::fs::remove_dir_all(here.data()).unwrap();
    let anew = files.import(&to_folder(&here), &["--state", &shown(&state)]);
    assert_eq!(anew.code, Some(0), "{anew:?}");
    assert!(anew.stderr.contains("starting from the first row"), "{anew:?}");
    holds_exactly(&here.start(), &people, MANY / 50).await;
}

/// Files that do not do are found before the folder or the server is touched.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn files_that_do_not_do_are_refused_before_anything_changes() {
    let some = Palms::new(SEED, DIM).people("person", 5);
    let array = |bytes: Vec<u8>| {
        let files = Files::of(&some, Dtype::F32);
        std::fs::write(files.array(), bytes).unwrap();
        files
    };
    let list = |text: &str| {
        let files = Files::of(&some, Dtype::F32);
        std::fs::write(files.list(), text).unwrap();
        files
    };
    let rows: Vec<_> = some.iter().map(|(_, palm)| palm.values.clone()).collect();
    let whole = npy(&rows, DIM, Dtype::F32);
    let replaced = |from: &str, to: &str| {
        let at = whole.windows(from.len()).position(|window| window == from.as_bytes()).expect("it is in the header");
        let mut bytes = whole.clone();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    let lines = "subject_id\na\nb\nc\nd\ne\n";
    let cases: Vec<(&str, Files, &[&str])> = vec![
        ("no array", array(Vec::new()), &["gallery.npy", "is not a NumPy array"]),
        ("cut short", array(whole[..whole.len() - 1].to_vec()), &["gallery.npy", "cut short"]),
        ("doubles", array(replaced("<f4", "<f8")), &["gallery.npy", "float64", "float32"]),
        ("columns first", array(replaced("False", "True ")), &["gallery.npy", "Fortran order"]),
        ("odd dimension", array(npy(&vec![vec![1.0; 48]; 5], 48, Dtype::F32)), &["gallery.npy", "48", "32"]),
        ("too few lines", list(&lines[..lines.len() - 2]), &["5 rows", "4 lines"]),
        ("too many lines", list(&format!("{lines}f\n")), &["5 rows", "6 lines"]),
        ("no subject column", list(&lines.replace("subject_id", "name")), &["subjects.csv", "no column subject_id"]),
        ("an empty list", list(""), &["subjects.csv", "subject_id"]),
    ];
    for target in Target::both() {
        for (what, files, words) in &cases {
            let ended = files.import(&target.args(), &[]);
            assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{what}: {ended:?}");
            for word in *words {
                assert!(ended.stderr.contains(word), "{what}: no {word:?} in {ended:?}");
            }
            assert!(!files.state().exists(), "{what}");
        }
        for missing in ["gallery.npy", "subjects.csv"] {
            let files = Files::of(&some, Dtype::F32);
            std::fs::remove_file(files.path(missing)).unwrap();
            let ended = files.import(&target.args(), &[]);
            assert_eq!(ended.code, Some(1), "{ended:?}");
            assert!(ended.stderr.contains(&shown(&files.path(missing))), "{ended:?}");
        }
        match target {
            Target::Server(server) => holds_exactly(&server, &[], 1).await,
            Target::Folder(site) => assert!(!site.data().exists(), "no folder was made"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn another_dimension_is_refused_and_a_new_gallery_takes_that_of_the_array() {
    let narrow = Palms::new(SEED, 32).people("narrow", 5);
    let narrow = Files::of(&narrow, Dtype::F32);
    let wide = Palms::new(SEED, DIM).people("wide", 5);
    for target in Target::both() {
        assert_eq!(Files::of(&wide, Dtype::F32).import(&target.args(), &[]).code, Some(0));
        let ended = narrow.import(&target.args(), &[]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(ended.stderr.contains("32 values") && ended.stderr.contains("64 dimensions"), "{ended:?}");
        holds_exactly(&target.served(), &wide, 1).await;
    }

    // A configuration that names a dimension means it, also for a gallery that is not there yet.
    let mut site = Site::new(Options::dim(DIM));
    std::fs::write(site.config_file(), site.config()).unwrap();
    let target = ["--config", &shown(&site.config_file())].map(str::to_owned).to_vec();
    let ended = narrow.import(&target, &[]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("64 dimensions") && !site.data().exists(), "{ended:?}");

    // Without one, the array decides.
    let ended = narrow.import(&to_folder(&site), &[]);
    assert_eq!((ended.code, ended.counts()), (Some(0), (5, 0, 0)), "{ended:?}");
    site.options.dim = None;
    let server = site.start();
    assert_eq!(server.client().await.status().await.unwrap().dim, 32);

    // So it does where a server serves the empty gallery, and then for good.
    let server = TestServer::start(Options { dim: None, ..Options::default() });
    let mut client = server.client().await;
    assert_eq!(client.status().await.unwrap().dim, 0);
    let ended = narrow.import(&to_server(&server), &[]);
    assert_eq!((ended.code, ended.counts()), (Some(0), (5, 0, 0)), "{ended:?}");
    let ended = Files::of(&wide, Dtype::F32).import(&to_server(&server), &[]);
    assert!(ended.code == Some(1) && ended.stderr.contains("32 dimensions"), "{ended:?}");
    drop(client);
    let server = server.restart();
    let page = server.client().await.status().await.unwrap();
    assert_eq!((page.dim, page.templates), (32, 5));

    // What was configured for a gallery that stayed empty binds nobody.
    let site = TestServer::start(Options::dim(DIM)).terminate();
    let ended = narrow.import(&to_folder(&site), &[]);
    assert_eq!((ended.code, ended.counts()), (Some(0), (5, 0, 0)), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_folder_that_cannot_be_had_is_refused_in_words() {
    let people = Palms::new(SEED, DIM).people("person", 5);
    let files = Files::of(&people, Dtype::F32);
    let refused = |what: &str, target: &[String], words: &[&str]| {
        let ended = files.import(target, &[]);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{what}: {ended:?}");
        for word in words {
            assert!(ended.stderr.contains(word), "{what}: no {word:?} in {ended:?}");
        }
        assert!(!ended.stderr.contains("panicked"), "{what}: {ended:?}");
    };
    let server = TestServer::start(Options::dim(DIM));
    assert_eq!(files.import(&to_server(&server), &[]).code, Some(0));
    refused("in use", &to_folder(&server.site), &[&shown(&server.site.data()), "in use", "--server"]);
    holds_exactly(&server, &people, 1).await;

    let site = server.terminate();
    let other = Site::new(Options::dim(DIM));
    let with_key = |key: &Path| ["--data", &shown(&site.data()), "--key-file", &shown(key)].map(str::to_owned).to_vec();
    refused("another key", &with_key(&other.key()), &["master key the gallery was made with"]);
    refused("no key", &with_key(&site.dir.path().join("none")), &["none", "thenar keys generate"]);
    let key_nowhere = ["--data", &shown(&site.data())].map(str::to_owned).to_vec();
    refused("a key nobody named", &key_nowhere, &["THENAR_MASTER_KEY"]);
    let config = ["--config", &shown(&site.dir.path().join("none.toml"))].map(str::to_owned).to_vec();
    refused("no configuration", &config, &["none.toml"]);
    let file_not_folder = ["--data", &shown(&files.array()), "--key-file", &shown(&site.key())].map(str::to_owned);
    refused("a file", &file_not_folder, &["gallery.npy"]);
    std::fs::write(site.config_file(), "key_file = \"key\"\nsurprise = 1\n").unwrap();
    let config = ["--config", &shown(&site.config_file())].map(str::to_owned).to_vec();
    refused("an unknown key", &config, &["surprise"]);

    // While an import has the folder, no server and no other import does.
    let many = Files::of(&self::Palms::new(SEED + 7, DIM).people("more", MANY), Dtype::F32);
    let mut running = many.spawn(&to_folder(&site), &["--batch", "1"]);
    running.wait_until_in_the_middle(&many);
    refused("two imports", &to_folder(&site), &["in use"]);
    let (code, said) = site.expect_no_start();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("in use"), "{said}");
    running.signal(Signal::TERM);
    assert_eq!(running.end().code, Some(1), "SIGTERM is as good as Ctrl-C");
    is_sound(&site);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_array_cut_short_in_the_middle_ends_the_import_with_what_was_read_finished() {
    for target in Target::both() {
        let people = Palms::new(SEED + 8, DIM).people("person", MANY);
        let files = Files::of(&people, Dtype::F32);
        let mut running = files.spawn(&target.args(), &["--batch", "1"]);
        running.wait_until_in_the_middle(&files);
        let whole = std::fs::read(files.array()).unwrap();
        std::fs::File::options().write(true).open(files.array()).unwrap().set_len(200).unwrap();
        let ended = running.end();
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{ended:?}");
        assert!(ended.stderr.contains(&format!("cannot read {}", shown(&files.array()))), "{ended:?}");
        let (_, stopped) = ended.stderr.split_once("stopped at row ").unwrap_or_else(|| panic!("{ended:?}"));
        let done: u64 = stopped.split(' ').next().and_then(|row| row.parse().ok()).unwrap();
        assert!(done > 0, "{ended:?}");

        // The array is whole again, but has changed since: everything is looked at anew.
        std::fs::write(files.array(), whole).unwrap();
        let again = files.import(&target.args(), &[]);
        assert_eq!((again.code, again.count("skipped_rows")), (Some(0), 0), "{again:?}");
        assert_eq!(again.counts(), (MANY as u64 - done, done, 0), "{again:?}");
        holds_exactly(&target.served(), &people, MANY / 50).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_disk_without_room_ends_an_import_into_a_folder_and_the_same_command_goes_on() {
    let people = Palms::new(SEED, DIM).people("person", 100);
    let files = Files::of(&people, Dtype::F32);
    let site = Site::new(Options::dim(DIM));
    let with_reserve = |mib: u64| {
        let text = format!(
            "data = {:?}\nkey_file = {:?}\n[storage]\nreserve_mib = {mib}\n",
            shown(&site.data()),
            shown(&site.key())
        );
        std::fs::write(site.config_file(), text).unwrap();
        files.import(&["--config", &shown(&site.config_file())].map(str::to_owned), &[])
    };
    let disk = rustix::fs::statvfs(site.dir.path()).unwrap();
    if disk.f_bavail * disk.f_frsize >= 1 << 40 {
        return skip("more than 1 TiB is free, and no reserve can be larger");
    }
    let full = with_reserve(1 << 20);
    assert_eq!((full.code, full.stdout.as_str()), (Some(1), ""), "{full:?}");
    assert!(full.stderr.contains("RESOURCE_EXHAUSTED") && full.stderr.contains("kept free"), "{full:?}");
    let room = with_reserve(16);
    assert_eq!((room.code, room.counts()), (Some(0), (100, 0, 0)), "{room:?}");
    is_sound(&site);
}
