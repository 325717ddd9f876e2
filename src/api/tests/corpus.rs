//! The corpus: encoded messages of every request, valid and nasty. Each file is made here, so that it can be
//! read what is in it; the tests read the files.

use std::path::{Path, PathBuf};

use prost::Message;

use crate::api::proto::{self, palm_sample::Content};

/// Which request a file of the corpus is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Identify,
    Verify,
    Enroll,
    Update,
    Forget,
    Bulk,
}

impl Request {
    pub(super) const ALL: [Self; 6] =
        [Self::Identify, Self::Verify, Self::Enroll, Self::Update, Self::Forget, Self::Bulk];

    fn word(self) -> &'static str {
        match self {
            Self::Identify => "identify",
            Self::Verify => "verify",
            Self::Enroll => "enroll",
            Self::Update => "update",
            Self::Forget => "forget",
            Self::Bulk => "bulk",
        }
    }
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/proto")
}

/// Every file: which request it is, its name, its bytes.
pub(super) fn files() -> Vec<(Request, String, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder()).expect("the corpus is in the repository") {
        let path = entry.expect("the corpus is read").path();
        let name = path.file_stem().and_then(|name| name.to_str()).expect("a plain name").to_owned();
        let (word, _) = name.split_once('-').expect("the request comes first");
        let request = Request::ALL.into_iter().find(|request| request.word() == word).expect("a request");
        files.push((request, name, std::fs::read(path).expect("the corpus is read")));
    }
    files.sort_by(|a, b| a.1.cmp(&b.1));
    files
}

fn sample(hand: i32, values: Vec<f32>) -> proto::PalmSample {
    proto::PalmSample { hand, content: Some(Content::Embedding(proto::Embedding { values })) }
}

fn palm() -> proto::PalmSample {
    sample(1, (0..32_u8).map(|i| f32::from(i) - 15.5).collect())
}

fn identify() -> proto::IdentifyRequest {
    proto::IdentifyRequest {
        request_id: "request-1".into(),
        venue_id: "gate-1".into(),
        purpose: 2,
        probes: vec![palm(), sample(2, vec![0.25; 32])],
        max_candidates: 5,
        threshold: Some(0.5),
        certificate: Some(proto::Certificate { kind: 2, miss_probability: 1e-9 }),
        only: Some(proto::SubjectFilter { subject_ids: vec!["anna".into(), "bert".into()] }),
    }
}

fn verify() -> proto::VerifyRequest {
    let proto::IdentifyRequest { request_id, venue_id, purpose, probes, .. } = identify();
    proto::VerifyRequest { request_id, venue_id, purpose, subject_id: "anna".into(), probes }
}

fn enroll() -> proto::EnrollRequest {
    proto::EnrollRequest { request_id: "request-2".into(), subject_id: "anna".into(), samples: vec![palm(), palm()] }
}

fn update() -> proto::UpdateSubjectRequest {
    proto::UpdateSubjectRequest {
        request_id: "request-3".into(),
        subject_id: "anna".into(),
        add_samples: vec![palm()],
        remove_template_ids: vec![1, 300, u64::MAX],
    }
}

fn bulk() -> proto::BulkEnrollRequest {
    let item = |sequence| proto::BulkEnrollItem { sequence, enrollment: Some(enroll()) };
    let after_forget = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 5 });
    proto::BulkEnrollRequest { items: vec![item(0), item(u64::MAX)], after_forget }
}

/// `part` as a field of that number, length-delimited, so many times.
fn field(number: u8, part: &[u8], times: usize) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2];
    prost::encoding::encode_varint(part.len() as u64, &mut bytes);
    bytes.extend(part);
    bytes.repeat(times)
}

/// Files made from their sources.
fn made() -> Vec<(&'static str, Vec<u8>)> {
    let with = |change: &dyn Fn(&mut proto::IdentifyRequest)| {
        let mut request = identify();
        change(&mut request);
        request.encode_to_vec()
    };
    let timestamp = |seconds, nanos| field(2, &prost_types::Timestamp { seconds, nanos }.encode_to_vec(), 1);
    let nested = (0..200).fold(Vec::new(), |inner, _| field(1, &inner, 1));
    let whole = bulk().encode_to_vec();
    vec![
        ("identify-valid", identify().encode_to_vec()),
        ("identify-plain", with(&|r| (r.threshold, r.certificate, r.only) = (None, None, None))),
        ("identify-empty", Vec::new()),
        ("identify-nan", with(&|r| r.probes = vec![sample(1, vec![f32::NAN; 32])])),
        ("identify-infinite", with(&|r| r.probes = vec![sample(1, vec![f32::INFINITY, f32::NEG_INFINITY])])),
        ("identify-threshold-nan", with(&|r| r.threshold = Some(f64::NAN))),
        ("identify-miss-probability", with(&|r| r.certificate.as_mut().unwrap().miss_probability = -0.0)),
        ("identify-unknown-enums", with(&|r| (r.purpose, r.probes[0].hand) = (i32::MIN, i32::MAX))),
        ("identify-no-content", with(&|r| r.probes[1].content = None)),
        ("identify-picture", with(&|r| r.probes[0].content = Some(Content::Picture(vec![0xff; 9])))),
        ("identify-same-subject-twice", with(&|r| r.only.as_mut().unwrap().subject_ids = vec!["a".into(); 2])),
        ("identify-long-names", with(&|r| r.request_id = "x".repeat(4000))),
        ("identify-empty-probes", field(4, &[], 30_000)),
        ("identify-empty-names", field(8, &field(1, &[], 30_000), 1)),
        ("identify-nested", field(4, &nested, 1)),
        ("identify-groups", [0x0b].repeat(5000)),
        ("verify-valid", verify().encode_to_vec()),
        ("verify-invalid-utf8", field(4, &[0xc3, 0x28, 0xff, 0xfe], 1)),
        ("enroll-valid", enroll().encode_to_vec()),
        ("enroll-length-beyond-end", vec![0x1a, 0xff, 0xff, 0xff, 0xff, 0x0f, 1]),
        ("enroll-embedding-twice", field(3, &field(1, &field(1, &[0; 8], 1), 2), 1)),
        ("update-valid", update().encode_to_vec()),
        ("update-many-ids", field(4, &[1; 30_000], 1)),
        ("forget-valid", proto::ForgetRequest { request_id: "r".into(), subject_id: "anna".into() }.encode_to_vec()),
        ("forget-truncated-varint", vec![0x0a, 0x80, 0x80]),
        ("bulk-valid", whole.clone()),
        ("bulk-truncated", whole[..whole.len() / 2].to_vec()),
        ("bulk-empty-items", field(1, &[], 30_000)),
        ("bulk-empty-samples", field(1, &field(2, &field(3, &[], 30_000), 1), 1)),
        ("bulk-merged-samples", field(1, &field(2, &field(3, &[], 16), 600), 1)),
        ("bulk-after-forget-extreme", [field(1, &[], 1), timestamp(i64::MAX, i32::MAX)].concat()),
        ("bulk-after-forget-past", [field(1, &[], 1), timestamp(i64::MIN, i32::MIN)].concat()),
    ]
}

/// With `THENAR_WRITE_CORPUS=1` this writes the files that are missing or different.
#[test]
fn every_file_is_what_its_source_makes() {
    let write = std::env::var("THENAR_WRITE_CORPUS").is_ok_and(|value| value == "1");
    for (name, bytes) in made() {
        let path = folder().join(format!("{name}.bin"));
        if write {
            std::fs::create_dir_all(folder()).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        assert!(std::fs::read(&path).is_ok_and(|found| found == bytes), "{}", path.display());
    }
    assert_eq!(files().len(), made().len(), "no file is without a source");
}
