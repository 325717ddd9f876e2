//! What an enrolment leaves behind after it was forgotten: nothing, in files and memory, without knowing
//! what to look for.
//!
//! Any sixteen bytes in a row that the server's files and memory have gained by an enrolment and searches
//! for it are looked for again after it was forgotten, while its connection stays open and says no more.
//! Files and memory are full of numbers that are new without being anybody's: addresses, times, places in
//! a log. So one palm is enrolled in two servers, at different places of their logs and under different
//! names, and another palm in a third: what the palm has brought is what both have gained and the third
//! has not.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::client::{Client, enroll_request, forget_request, identify_request, verify_request};
use crate::support::disk::{copy_folder, files_under};
use crate::support::machine::skip;
use crate::support::palms::{Palm, Palms};
use crate::support::processes;
use crate::support::server::{Options, Site, TestServer};

const SEED: u64 = 17;
const DIM: usize = 256;
/// Bytes in a row that are no accident.
const WINDOW: usize = 16;
/// Different values among them, at least: a number of eight bytes among zeros, such as a time, an address or
/// a score, has fewer.
const VALUES_MIN: u32 = 12;
/// Bytes of a window that are enough to tell that it is old, and different values among them.
const PART: usize = 8;
const PART_VALUES_MIN: u32 = 6;
const PAGE: usize = 4096;

/// A run of bytes that a process has in its memory or in a file, by where it is.
type Places = HashMap<String, Vec<u8>>;

/// Writable memory of a server and everything it has mapped from its data folder. `None` if it may not
/// be read.
fn memory(server: &TestServer) -> Option<Places> {
    let (memory, mappings) = processes::memory(server.pid())?;
    let data = server.site.data();
    let ours = mappings.into_iter().filter(|m| m.is_writable || Path::new(&m.name).starts_with(&data));
    ours.map(|m| Some((format!("{} {:x}-{:x}", m.name, m.from, m.to), m.bytes(&memory)?))).collect()
}

fn files(folder: &Path) -> Places {
    // SQLite may remove a file between the listing and this.
    let read = files_under(folder).into_iter().filter_map(|file| {
        let bytes = std::fs::read(&file).ok()?;
        Some((file.file_name()?.to_string_lossy().into_owned(), bytes))
    });
    read.collect()
}

fn everywhere(server: &TestServer) -> Option<Places> {
    let mut places = memory(server)?;
    places.extend(files(&server.site.data()));
    Some(places)
}

fn number(run: &[u8]) -> u128 {
    let mut bytes = [0; WINDOW];
    bytes[..run.len()].copy_from_slice(run);
    u128::from_le_bytes(bytes)
}

/// Every run of `N` bytes with `values_min` different ones.
fn runs<const N: usize>(bytes: &[u8], values_min: u32) -> impl Iterator<Item = u128> + '_ {
    let is_no_accident = move |run: &&[u8]| {
        let mut values = [0_u64; 4];
        run.iter().for_each(|byte| values[usize::from(byte >> 6)] |= 1 << (byte & 63));
        values.iter().map(|v| v.count_ones()).sum::<u32>() >= values_min
    };
    bytes.windows(N).filter(is_no_accident).map(number)
}

/// A set of windows, sorted, with a quick test that most others fail.
struct Set {
    windows: Vec<u128>,
    likely: Vec<u64>,
}

impl Set {
    const BITS: u32 = 24;

    fn new(mut windows: Vec<u128>) -> Self {
        windows.sort_unstable();
        windows.dedup();
        let mut likely = vec![0; 1 << (Self::BITS - 6)];
        for window in &windows {
            let bit = Self::bit(*window);
            likely[bit / 64] |= 1 << (bit % 64);
        }
        Self { windows, likely }
    }

    fn bit(window: u128) -> usize {
        ((window as u64 ^ (window >> 64) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - Self::BITS)) as usize
    }

    fn has(&self, window: u128) -> bool {
        let bit = Self::bit(window);
        self.likely[bit / 64] >> (bit % 64) & 1 == 1 && self.windows.binary_search(&window).is_ok()
    }

    /// Those windows that are somewhere in `places`.
    fn in_places(&self, places: &Places) -> Vec<(String, usize, u128)> {
        self.among::<WINDOW>(places)
    }

    /// Those that are among the runs of `N` bytes of any place.
    fn among<const N: usize>(&self, places: &Places) -> Vec<(String, usize, u128)> {
        let mut found = Vec::new();
        for (name, bytes) in places {
            for (page, chunk) in bytes.chunks(PAGE).enumerate() {
                if chunk.iter().all(|byte| *byte == 0) {
                    continue;
                }
                let end = ((page + 1) * PAGE + N - 1).min(bytes.len());
                let here = bytes[page * PAGE..end].windows(N).map(number).enumerate();
                let here = here.filter(|(_, run)| self.has(*run));
                found.extend(here.map(|(at, run)| (name.clone(), page * PAGE + at, run)));
            }
        }
        found
    }

    /// Those of which no part is in `places`: what is old stays old beside new numbers.
    fn without(self, places: &Places) -> Self {
        let parts = |window: &u128| runs::<PART>(&window.to_le_bytes(), PART_VALUES_MIN).collect::<Vec<_>>();
        let all = self.windows.iter().flat_map(parts).collect();
        let old = Self::new(Self::new(all).among::<PART>(places).into_iter().map(|(.., part)| part).collect());
        let is_new = |window: &u128| parts(window).into_iter().all(|part| !old.has(part));
        Self::new(self.windows.into_iter().filter(is_new).collect())
    }

    fn and(self, other: &Self) -> Self {
        Self::new(self.windows.into_iter().filter(|window| other.has(*window)).collect())
    }
}

/// What `after` has that `before` had not.
fn gained(before: &Places, after: &Places) -> Set {
    let nothing = Vec::new();
    let mut new = Vec::new();
    for (name, bytes) in after {
        let old = before.get(name).unwrap_or(&nothing);
        for (page, chunk) in bytes.chunks(PAGE).enumerate() {
            let at = page * PAGE;
            if old.get(at..at + chunk.len()) != Some(chunk) {
                let around = at.saturating_sub(WINDOW - 1)..(at + PAGE + WINDOW - 1).min(bytes.len());
                new.extend(runs::<WINDOW>(&bytes[around], VALUES_MIN));
            }
        }
    }
    Set::new(new).without(before)
}

/// One person's part: the palm that is enrolled, and others of the same hand that are shown later.
struct Person {
    name: &'static str,
    palms: Vec<Palm>,
}

impl Person {
    fn new(name: &'static str, seed: u64) -> Self {
        let mut palms = Palms::new(seed, DIM);
        let first = palms.palm();
        let others = (0..3).map(|_| Palm::new(first.hand, palms.near(&first.values, 0.3))).collect::<Vec<_>>();
        Self { name, palms: [vec![first], others].concat() }
    }

    /// Enrols and is found, with the same bytes whenever it is called.
    async fn come(&self, client: &mut Client) {
        let id = |what: &str| format!("{what}-of-{}", self.name);
        let mut request = enroll_request(self.name, &self.palms[..1]);
        request.request_id = id("enrolment");
        client.enrollment.enroll(request).await.unwrap();
        let mut request = identify_request(&self.palms[1..3], 3, Some(0.6));
        request.request_id = id("search");
        let answer = client.identification.identify(request).await.unwrap().into_inner();
        assert_eq!(answer.candidates[0].subject_id, self.name);
        let mut request = verify_request(self.name, &self.palms[3..]);
        request.request_id = id("verification");
        client.identification.verify(request).await.unwrap();
    }

    async fn go(&self, client: &mut Client) {
        let mut request = forget_request(self.name);
        request.request_id = format!("deletion-of-{}", self.name);
        assert_eq!(client.enrollment.forget(request).await.unwrap().into_inner().templates_erased, 1);
    }
}

/// A server in which somebody was enrolled and found, over a connection that is still open.
struct Stay {
    server: TestServer,
    client: Client,
    who: Person,
    /// What the files and the memory have gained.
    gained: Set,
}

impl Stay {
    /// `place`: how many more are enrolled before. `None` where memory may not be read.
    async fn begin(site: Site, place: usize, who: Person) -> Option<Self> {
        let server = site.start();
        let mut client = server.client().await;
        for i in 0..place {
            client.enroll(&format!("only-here-{i}"), &[Palms::new(SEED + 50 + i as u64, DIM).palm()]).await.unwrap();
        }
        // What any enrolment brings is known before.
        Person::new("bob", SEED + 2).come(&mut client).await;
        let with_bob = everywhere(&server)?;
        Person::new("bob", SEED + 2).go(&mut client).await;
        Person::new("eve", SEED + 3).come(&mut client).await;
        let before = everywhere(&server)?;
        who.come(&mut client).await;
        let gained = gained(&before, &everywhere(&server)?).without(&with_bob);
        Some(Self { server, client, who, gained })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_a_palm_brings_to_files_and_memory_is_gone_once_it_is_forgotten() {
    const PATIENCE: Duration = Duration::from_secs(20);
    let first = TestServer::start(Options::dim(DIM));
    let mut crowd = Palms::new(SEED, DIM);
    let requests = (0..200).map(|i| enroll_request(&format!("crowd-{i}"), &[crowd.palm()])).collect();
    first.client().await.bulk(requests).await;
    let site = first.terminate();
    let copy = || {
        let copy = Site::new(Options::dim(DIM));
        std::fs::copy(site.key(), copy.key()).unwrap();
        copy_folder(&site.data(), &copy.data());
        copy
    };
    let palm = SEED + 1;
    let Some(other) = Stay::begin(copy(), 0, Person::new("ada-lovelace", palm + 100)).await else {
        return skip("this system does not let a process read another's memory");
    };
    let of_other = everywhere(&other.server).unwrap();
    let mut one = Stay::begin(copy(), 0, Person::new("ada-lovelace", palm)).await.unwrap();
    let mut two = Stay::begin(copy(), 3, Person::new("grace-hopper", palm)).await.unwrap();
    let gained = std::mem::replace(&mut one.gained, Set::new(Vec::new())).and(&two.gained).without(&of_other);
    // Its row in the index at the least, two bytes a component.
    assert!(gained.windows.len() >= DIM, "{} windows are of the palm", gained.windows.len());
    println!("{} windows are of the palm", gained.windows.len());
    for stay in [&mut one, &mut two] {
        assert!(!gained.in_places(&everywhere(&stay.server).unwrap()).is_empty(), "they are where they were found");
        stay.who.go(&mut stay.client).await;
        let until = Instant::now() + PATIENCE;
        loop {
            let left = gained.in_places(&everywhere(&stay.server).unwrap());
            if left.is_empty() {
                break;
            }
            if Instant::now() > until {
                let show = |(place, at, window): &(String, usize, u128)| {
                    format!("{place}, {at:#x}: {:02x?}", window.to_le_bytes())
                };
                panic!("{} left, seed {SEED}:\n{}", left.len(), left.iter().map(show).collect::<Vec<_>>().join("\n"));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
