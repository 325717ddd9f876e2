//! A server killed at any moment loses nothing it acknowledged and shows nothing by halves.
//!
//! Clients enrol, update and forget, one by one and in bulk, while the server gets SIGKILL; what each
//! was told is known, and of each at most what it had just asked for is in doubt.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use thenar::api::proto::{self, BulkEnrollProgress};
use tonic::{Code, Status};

use crate::support::client::{Client, bulk_messages, enroll_request, forget_request, update_request};
use crate::support::oracle::{Subject, answered, check_close, rank_by_cosine};
use crate::support::palms::{Palm, Palms};
use crate::support::server::{Options, TestServer};

const DIM: usize = 64;
/// Kills of one test; three tests make more than fifty.
const ROUNDS: usize = 18;
/// Clients that change one subject at a time.
const SINGLES: usize = 3;
/// The server is killed within this time.
const KILL_MS_MAX: usize = 150;
/// Palms of forgotten people that are looked for.
const GONE_MAX: usize = 150;

/// What a client may rely on. Numbers of templates enrolled in bulk are 0 until they are asked for.
#[derive(Default)]
struct Known {
    people: BTreeMap<String, Vec<(u64, Palm)>>,
    gone: Vec<Palm>,
}

/// A request whose answer never came.
#[derive(Clone)]
enum Doubt {
    Enrol(proto::EnrollRequest, Vec<Palm>),
    Update(proto::UpdateSubjectRequest, Vec<Palm>),
    Forget(proto::ForgetRequest),
}

impl Doubt {
    fn subject(&self) -> &str {
        match self {
            Self::Enrol(r, _) => &r.subject_id,
            Self::Update(r, _) => &r.subject_id,
            Self::Forget(r) => &r.subject_id,
        }
    }

    /// Asks; the subject as it is then, `None` where it was forgotten.
    async fn ask(&self, client: &mut Client) -> Result<Option<proto::Subject>, Status> {
        match self.clone() {
            Self::Enrol(r, _) => client.enrollment.enroll(r).await.map(|a| a.into_inner().subject),
            Self::Update(r, _) => client.enrollment.update_subject(r).await.map(|a| Some(a.into_inner())),
            Self::Forget(r) => client.enrollment.forget(r).await.map(|_| None),
        }
    }

    /// What is known once it is done.
    fn done(&self, known: &mut Known, subject: Option<&proto::Subject>) {
        let (id, before) = (self.subject().to_owned(), known.people.remove(self.subject()).unwrap_or_default());
        let (new, removed) = match self {
            Self::Enrol(_, palms) => (palms, &[][..]),
            Self::Update(r, palms) => (palms, &r.remove_template_ids[..]),
            Self::Forget(_) => {
                known.gone.extend(before.into_iter().map(|(_, palm)| palm));
                return;
            }
        };
        let (gone, mut templates): (Vec<_>, Vec<_>) = before.into_iter().partition(|(t, _)| removed.contains(t));
        known.gone.extend(gone.into_iter().map(|(_, palm)| palm));
        let numbers = numbers(subject.expect("somebody who is enrolled is shown"));
        assert_eq!(numbers.len(), templates.len() + new.len(), "{id}");
        templates.extend(numbers[templates.len()..].iter().copied().zip(new.iter().cloned()));
        known.people.insert(id, templates);
    }
}

fn numbers(subject: &proto::Subject) -> Vec<u64> {
    subject.templates.iter().map(|t| t.template_id).collect()
}

/// One client's life: what it knows, its random choices, the names it has given.
struct Life {
    name: String,
    known: Known,
    palms: Palms,
    given: usize,
}

impl Life {
    fn new(name: String, seed: u64) -> Self {
        Self { name, known: Known::default(), palms: Palms::new(seed, DIM), given: 0 }
    }

    fn enrolment(&mut self, palms_max: usize) -> (proto::EnrollRequest, Vec<Palm>) {
        let palms: Vec<Palm> = (0..=self.palms.below(palms_max)).map(|_| self.palms.palm()).collect();
        self.given += 1;
        (enroll_request(&format!("{}-{}", self.name, self.given), &palms), palms)
    }

    fn next(&mut self) -> Doubt {
        let choice = self.palms.below(10);
        let count = self.known.people.len();
        if count < 3 || (choice < 4 && count < 12) {
            let (request, palms) = self.enrolment(3);
            return Doubt::Enrol(request, palms);
        }
        let at = self.palms.below(count);
        let (id, templates) = self.known.people.iter().nth(at).expect("it is in range");
        let (id, templates) = (id.clone(), templates.clone());
        if choice < 7 && templates.len() < 6 {
            let add: Vec<Palm> = (0..=self.palms.below(2)).map(|_| self.palms.palm()).collect();
            let remove: Vec<u64> = templates.iter().take(self.palms.below(templates.len() + 1)).map(|t| t.0).collect();
            return Doubt::Update(update_request(&id, &add, &remove), add);
        }
        Doubt::Forget(forget_request(&id))
    }

    /// Changes one subject after the other until the server is gone.
    async fn single(mut self, mut client: Client, killed: Arc<AtomicBool>) -> (Self, Vec<Doubt>) {
        loop {
            let next = self.next();
            match next.ask(&mut client).await {
                Ok(subject) => next.done(&mut self.known, subject.as_ref()),
                Err(status) => {
                    assert!(killed.load(Ordering::SeqCst), "refused by a living server: {status:?}");
                    return (self, vec![next]);
                }
            }
        }
    }

    /// Enrols in one bulk stream until the server is gone, or everybody is in.
    async fn bulk(mut self, mut client: Client, killed: Arc<AtomicBool>) -> (Self, Vec<Doubt>) {
        let everybody: Vec<_> = (0..60).map(|_| self.enrolment(1)).collect();
        let size = 1 + self.palms.below(12);
        let messages = bulk_messages(everybody.iter().map(|(r, _)| r.clone()).collect(), size);
        let pause = Duration::from_millis(self.palms.below(20) as u64);
        let messages = futures::stream::iter(messages).then(move |m| async move {
            tokio::time::sleep(pause).await;
            m
        });
        let mut last = BulkEnrollProgress::default();
        let ended: Result<(), Status> = async {
            let mut stream = client.enrollment.bulk_enroll(messages).await?.into_inner();
            while let Some(progress) = stream.message().await? {
                last = progress;
            }
            Ok(())
        }
        .await;
        if let Err(status) = ended {
            assert!(killed.load(Ordering::SeqCst), "refused by a living server: {status:?}");
        }
        assert_eq!((last.rejected, last.unchanged), (0, 0));
        // Progress comes in the order of the messages.
        let mut doubts = Vec::new();
        for (at, (request, palms)) in everybody.into_iter().enumerate() {
            if (at as u64) < last.received {
                self.known.people.insert(request.subject_id, palms.into_iter().map(|p| (0, p)).collect());
            } else {
                doubts.push(Doubt::Enrol(request, palms));
            }
        }
        (self, doubts)
    }
}

async fn lsn(client: &mut Client) -> u64 {
    client.status().await.unwrap().registry_lsn
}

/// Whether what is in doubt has happened. Panics where it has happened by halves.
async fn happened(what: &str, client: &mut Client, known: &Known, doubt: &Doubt) -> bool {
    let id = doubt.subject();
    let now = match client.get(id).await {
        Ok(subject) => Some(numbers(&subject)),
        Err(status) => {
            assert_eq!(status.code(), Code::NotFound, "{what}: {id}: {status:?}");
            None
        }
    };
    let before: Option<Vec<u64>> = known.people.get(id).map(|t| t.iter().map(|(number, _)| *number).collect());
    let done = now != before;
    let old: Vec<Palm> = known.people.get(id).into_iter().flatten().map(|(_, palm)| palm.clone()).collect();
    let (added, removed): (&[Palm], Vec<Palm>) = match doubt {
        Doubt::Enrol(_, palms) => {
            assert!(!done || now.as_ref().is_some_and(|n| n.len() == palms.len()), "{what}: {id} is torn: {now:?}");
            (palms, Vec::new())
        }
        Doubt::Forget(_) => {
            assert!(!done || now.is_none(), "{what}: {id} is torn: {now:?}");
            (&[], old.clone())
        }
        Doubt::Update(r, palms) => {
            let gone = |number: &u64| r.remove_template_ids.contains(number);
            let kept: Vec<u64> = before.iter().flatten().copied().filter(|n| !gone(n)).collect();
            let now = now.as_deref().unwrap_or_default();
            let whole = now.starts_with(&kept) && now.len() == kept.len() + palms.len();
            assert!(!done || whole, "{what}: {id} is torn: {before:?} {now:?}");
            let templates = known.people[id].iter();
            (palms, templates.filter(|(number, _)| gone(number)).map(|(_, palm)| palm.clone()).collect())
        }
    };
    // Searches see the same as the registry.
    for palm in added {
        assert_eq!(client.who(palm).await.unwrap().as_deref(), done.then_some(id), "{what}: a new palm of {id}");
    }
    for palm in &removed {
        assert_eq!(client.who(palm).await.unwrap().as_deref(), (!done).then_some(id), "{what}: an old palm of {id}");
    }
    done
}

/// Repeats what is in doubt under its request id: it ends done, and done once.
async fn settle(what: &str, client: &mut Client, known: &mut Known, doubts: Vec<Doubt>) {
    for doubt in doubts {
        let done = happened(what, client, known, &doubt).await;
        let before = lsn(client).await;
        let first = doubt.ask(client).await.unwrap_or_else(|e| panic!("{what}: {} repeated: {e:?}", doubt.subject()));
        let after = lsn(client).await;
        assert_eq!(done, before == after, "{what}: {} is done once", doubt.subject());
        let again = doubt.ask(client).await.unwrap();
        assert_eq!(lsn(client).await, after, "{what}: {} repeated again", doubt.subject());
        assert_eq!(again, first, "{what}: {} has one answer", doubt.subject());
        doubt.done(known, first.as_ref());
    }
}

/// The same of enrolments of a bulk stream, again in bulk.
async fn settle_in_bulk(what: &str, client: &mut Client, known: &mut Known, doubts: Vec<Doubt>) {
    let mut all = Vec::new();
    let mut done = 0;
    for doubt in doubts {
        done += u64::from(happened(what, client, known, &doubt).await);
        let Doubt::Enrol(request, palms) = doubt else { panic!("{what}: a bulk stream enrols") };
        all.push((request, palms));
    }
    repeat_in_bulk(what, client, &all, done).await;
    known.people.extend(all.into_iter().map(|(r, palms)| (r.subject_id, palms.into_iter().map(|p| (0, p)).collect())));
}

async fn repeat_in_bulk(what: &str, client: &mut Client, all: &[(proto::EnrollRequest, Vec<Palm>)], mut done: u64) {
    for _ in 0..2 {
        let requests: Vec<_> = all.iter().map(|(r, _)| r.clone()).collect();
        let count = requests.len() as u64;
        let messages = tokio_stream::iter(bulk_messages(requests, 16));
        let mut stream = client.enrollment.bulk_enroll(messages).await.unwrap().into_inner();
        let mut last = BulkEnrollProgress::default();
        while let Some(progress) = stream.message().await.unwrap() {
            assert_eq!(progress.errors, [], "{what}");
            last = progress;
        }
        assert_eq!((last.received, last.unchanged, last.enrolled), (count, done, count - done), "{what}: repeated");
        done = count;
    }
}

/// Everything known holds, over the registry and over searches.
async fn check(what: &str, client: &mut Client, lives: &mut [Life]) {
    let status = client.status().await.unwrap();
    let people = lives.iter().map(|l| l.known.people.len()).sum::<usize>();
    let templates = lives.iter().flat_map(|l| l.known.people.values()).map(Vec::len).sum::<usize>();
    assert_eq!((status.subjects, status.templates), (people as u64, templates as u64), "{what}");
    assert_eq!(status.registry_lsn, status.gallery_lsn, "{what}");
    let mut expected: Vec<(Palm, Option<String>)> = Vec::new();
    for life in lives.iter_mut() {
        for (id, templates) in &mut life.known.people {
            let found = client.get(id).await.unwrap_or_else(|e| panic!("{what}: {id} is lost: {e:?}"));
            for ((number, _), now) in templates.iter_mut().zip(numbers(&found)) {
                assert!(*number == 0 || *number == now, "{what}: {id} has other templates");
                *number = now;
            }
            assert_eq!(templates.len(), found.templates.len(), "{what}: {id}");
            expected.extend(templates.iter().map(|(_, palm)| (palm.clone(), Some(id.clone()))));
        }
        let surplus = life.known.gone.len().saturating_sub(GONE_MAX);
        life.known.gone.drain(..surplus);
        expected.extend(life.known.gone.iter().map(|palm| (palm.clone(), None)));
    }
    let asked = futures::stream::iter(expected).map(|(palm, expected)| {
        let mut client = client.clone();
        async move { (client.who(&palm).await, expected) }
    });
    let answers: Vec<_> = asked.buffer_unordered(32).collect().await;
    for (found, expected) in answers {
        assert_eq!(found.unwrap(), expected, "{what}");
    }
    // Any probe, all of the ranking.
    let gallery: Vec<_> = lives
        .iter()
        .flat_map(|l| &l.known.people)
        .map(|(id, templates)| Subject {
            id: id.clone(),
            templates: templates.iter().map(|(number, palm)| (*number, palm.hand, palm.values.clone())).collect(),
        })
        .collect();
    for _ in 0..3 {
        let probe = [lives[0].palms.palm()];
        let answer = client.identify(&probe, 20, Some(-1.0)).await.unwrap();
        check_close(what, &answered(&answer), &rank_by_cosine(&gallery, &probe), -1.0, 20);
    }
}

async fn survives(seed: u64) {
    let mut chance = Palms::new(seed, DIM);
    let mut lives: Vec<Life> = (0..=SINGLES).map(|i| Life::new(format!("life-{i}"), seed * 1000 + i as u64)).collect();
    let mut server = TestServer::start(Options::dim(DIM));
    for round in 0..ROUNDS {
        let what = format!("seed {seed}, round {round}");
        let killed = Arc::new(AtomicBool::new(false));
        let mut running = Vec::new();
        for (number, life) in std::mem::take(&mut lives).into_iter().enumerate() {
            let (client, killed) = (server.client().await, Arc::clone(&killed));
            running.push(if number < SINGLES {
                tokio::spawn(life.single(client, killed))
            } else {
                tokio::spawn(life.bulk(client, killed))
            });
        }
        tokio::time::sleep(Duration::from_millis(chance.below(KILL_MS_MAX) as u64)).await;
        killed.store(true, Ordering::SeqCst);
        let site = server.kill9();
        let mut doubts = Vec::new();
        for life in running {
            let (life, doubt) = life.await.unwrap_or_else(|e| panic!("{what}: {e}"));
            lives.push(life);
            doubts.push(doubt);
        }
        if round % 4 == 1 {
            site.start_and_kill9(Duration::from_millis(chance.below(KILL_MS_MAX) as u64));
        }
        if round % 6 == 2 {
            // Rows since the last checkpoint, and erasures cut short, are no damage but remain to be done.
            let (code, said) = site.verify();
            assert!(!said.contains("damaged  "), "{what}, killed: {said}");
            let ends = if code == Some(0) { "is sound" } else { "not damaged, but" };
            assert!(said.contains(ends), "{what}, killed: {code:?}, {said}");
        }
        server = site.start();
        let mut client = server.client().await;
        for (number, (life, doubts)) in lives.iter_mut().zip(doubts).enumerate() {
            if number < SINGLES {
                settle(&what, &mut client, &mut life.known, doubts).await;
            } else {
                settle_in_bulk(&what, &mut client, &mut life.known, doubts).await;
            }
        }
        check(&what, &mut client, &mut lives).await;
        if round % 6 == 5 {
            drop(client);
            let site = server.terminate();
            let (code, said) = site.verify();
            assert_eq!(code, Some(0), "{what}, stopped: {said}");
            server = site.start();
            check(&what, &mut server.client().await, &mut lives).await;
        }
        assert!(!server.log().contains("ERROR"), "{what}: a kill damages nothing");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_at_random_moments_loses_and_tears_nothing() {
    survives(71).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_at_other_random_moments_loses_and_tears_nothing() {
    survives(72).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_at_yet_other_random_moments_loses_and_tears_nothing() {
    survives(73).await;
}
