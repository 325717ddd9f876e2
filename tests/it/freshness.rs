//! What was acknowledged holds for the very next call, from whichever client.

use crate::support::client::{Client, update_request};
use crate::support::palms::{Palm, Palms};
use crate::support::server::{Options, TestServer};
use thenar::model::Hand;
use tonic::Code;

const SEED: u64 = 11;

async fn pair(server: &TestServer) -> (Client, Client) {
    (server.client().await, server.client().await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_enrolment_or_deletion_holds_for_the_next_identification_of_another_client() {
    let server = TestServer::start(Options::default());
    let (mut a, mut b) = pair(&server).await;
    let mut palms = Palms::new(SEED, 64);
    // A crowd, so that a wrong answer is possible.
    for i in 0..50 {
        a.enroll(&format!("crowd-{i}"), &[palms.palm()]).await.unwrap();
    }
    for round in 0..200 {
        let what = format!("seed {SEED}, round {round}");
        let subject = format!("person-{round}");
        let palm = Palm::new(Hand::Left, palms.vector());
        let probe = Palm::new(Hand::Left, palms.near(&palm.values, 0.1));
        assert_eq!(b.who(&probe).await.unwrap(), None, "{what}: before");
        a.enroll(&subject, std::slice::from_ref(&palm)).await.unwrap();
        assert_eq!(b.who(&probe).await.unwrap(), Some(subject.clone()), "{what}: enrolled");
        let before = b.identify(std::slice::from_ref(&probe), 1, None).await.unwrap().gallery_size;
        let forgotten = a.forget(&subject).await.unwrap();
        assert_eq!(forgotten.templates_erased, 1, "{what}");
        let after = b.identify(std::slice::from_ref(&probe), 1, Some(-1.0)).await.unwrap();
        assert_ne!(after.candidates[0].subject_id, subject, "{what}: forgotten");
        assert_eq!(after.gallery_size, before - 1, "{what}");
        assert_eq!(b.get(&subject).await.unwrap_err().code(), Code::NotFound, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_template_added_or_removed_counts_for_the_next_call_of_another_client() {
    let server = TestServer::start(Options::default());
    let (mut a, mut b) = pair(&server).await;
    let mut palms = Palms::new(SEED + 1, 64);
    let first = Palm::new(Hand::Left, palms.vector());
    let enrolled = a.enroll("ada", std::slice::from_ref(&first)).await.unwrap().subject.unwrap();
    let mut last = enrolled.templates[0].template_id;
    let mut old = first;
    for round in 0..60 {
        let what = format!("seed {}, round {round}", SEED + 1);
        let new = Palm::new(Hand::Right, palms.vector());
        assert_eq!(b.who(&new).await.unwrap(), None, "{what}");
        let subject = a.update("ada", std::slice::from_ref(&new), &[]).await.unwrap();
        assert_eq!(subject.templates.len(), 2, "{what}");
        let added = subject.templates.iter().map(|t| t.template_id).max().unwrap();
        assert_eq!(b.who(&new).await.unwrap().as_deref(), Some("ada"), "{what}: added");
        let verified = b.verify("ada", std::slice::from_ref(&new)).await.unwrap();
        assert!(verified.score > 0.99, "{what}: {}", verified.score);
        a.update("ada", &[], &[last]).await.unwrap();
        assert_eq!(b.who(&old).await.unwrap(), None, "{what}: removed");
        let verified = b.verify("ada", std::slice::from_ref(&old)).await.unwrap();
        assert!(verified.score < 0.9, "{what}: {}", verified.score);
        (last, old) = (added, new);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_verification_sees_the_enrolment_before_it_and_not_the_one_deleted() {
    let server = TestServer::start(Options::default());
    let (mut a, mut b) = pair(&server).await;
    let mut palms = Palms::new(SEED + 2, 64);
    for round in 0..60 {
        let what = format!("seed {}, round {round}", SEED + 2);
        let palm = palms.palm();
        assert_eq!(b.verify("bob", std::slice::from_ref(&palm)).await.unwrap_err().code(), Code::NotFound, "{what}");
        a.enroll("bob", std::slice::from_ref(&palm)).await.unwrap();
        let verified = b.verify("bob", std::slice::from_ref(&palm)).await.unwrap();
        assert_eq!(verified.decision, i32::from(thenar::api::proto::Decision::Match), "{what}");
        assert!((verified.score - 1.0).abs() < 2e-3, "{what}: {}", verified.score);
        a.forget("bob").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn one_update_that_adds_and_removes_is_seen_whole() {
    let server = TestServer::start(Options::default());
    let (mut a, mut b) = pair(&server).await;
    let mut palms = Palms::new(SEED + 3, 64);
    let mut now: Vec<Palm> = (0..3).map(|_| palms.palm()).collect();
    let mut ids: Vec<u64> =
        a.enroll("eve", &now).await.unwrap().subject.unwrap().templates.iter().map(|t| t.template_id).collect();
    for round in 0..40 {
        let what = format!("seed {}, round {round}", SEED + 3);
        let next: Vec<Palm> = (0..3).map(|_| palms.palm()).collect();
        let request = update_request("eve", &next, &ids);
        let subject = a.enrollment.update_subject(request).await.unwrap().into_inner();
        let new_ids: Vec<u64> = subject.templates.iter().map(|t| t.template_id).collect();
        assert_eq!(new_ids.len(), 3, "{what}");
        assert!(new_ids.iter().all(|id| !ids.contains(id)), "{what}: numbers are not used twice");
        for palm in &next {
            assert_eq!(b.who(palm).await.unwrap().as_deref(), Some("eve"), "{what}: the new ones");
        }
        for palm in &now {
            assert_eq!(b.who(palm).await.unwrap(), None, "{what}: the old ones");
        }
        let listed: Vec<u64> = b.get("eve").await.unwrap().templates.iter().map(|t| t.template_id).collect();
        assert_eq!(listed, new_ids, "{what}");
        (now, ids) = (next, new_ids);
    }
}
