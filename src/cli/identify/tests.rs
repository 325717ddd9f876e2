//! Searches at a mock server, which mixes the order of answers and refuses on request.

use std::fs;

use tonic::Code;

use super::*;
use crate::cli::embeddings::tests::npy_f32;
use crate::cli::mock_server::MockServer;

const DIM: usize = 32;

fn vector(row: usize) -> Vec<f32> {
    (0..DIM).map(|i| if i == row % DIM { 1.0 } else { 0.001 * (row / DIM + 1) as f32 }).collect()
}

async fn asked(
    mock: &MockServer,
    rows: usize,
    change: impl FnOnce(&mut IdentifyArgs),
) -> Result<Vec<serde_json::Value>, CliError> {
    let folder = tempfile::tempdir().unwrap();
    let npy = folder.path().join("probes.npy");
    fs::write(&npy, npy_f32(&(0..rows).map(vector).collect::<Vec<_>>(), DIM)).unwrap();
    let mut args = IdentifyArgs {
        embeddings: npy,
        purpose: PurposeArg::Entry,
        venue: "gate-1".to_owned(),
        max_candidates: 3,
        threshold: None,
        rows: None,
        hands: None,
        only: None,
        json: true,
        server: mock.args(),
    };
    change(&mut args);
    if let Some(text) = args.hands.take() {
        fs::write(folder.path().join("hands.csv"), text.to_str().unwrap()).unwrap();
        args.hands = Some(folder.path().join("hands.csv"));
    }
    let mut answers = Vec::new();
    search::search(&args, |answer| {
        assert!(answer.cells().len() == 7);
        answers.push(serde_json::from_str(&serde_json::to_string(&answer)?)?);
        Ok(())
    })
    .await?;
    Ok(answers)
}

async fn gallery() -> MockServer {
    let mock = MockServer::start(DIM).await;
    for row in 0..20 {
        let hand = if row % 2 == 0 { 1 } else { 2 };
        mock.state().subjects.insert(format!("s{row}"), vec![(vector(row), hand)]);
    }
    mock
}

#[tokio::test]
async fn answers_come_in_the_order_of_the_rows_though_the_server_mixes_them() {
    let mock = gallery().await;
    mock.state().coalesce = true;
    let answers = asked(&mock, 25, |_| ()).await.unwrap();
    assert_eq!(answers.len(), 25);
    for (row, answer) in answers.iter().enumerate() {
        assert_eq!(answer["row"], row);
        assert!(answer["ms"].as_f64().unwrap() > 0.0 && answer["server_ms"].is_number());
        assert_eq!(answer["gallery_size"], 20);
        assert_eq!(answer["certificate"]["kind"], "deterministic");
        if row < 20 {
            assert_eq!(answer["decision"], "match");
            assert_eq!(answer["candidates"][0]["subject_id"], format!("s{row}"));
            assert_eq!(answer["candidates"][0]["rank"], 1);
            assert!(answer["candidates"][0]["score"].as_f64().unwrap() > 0.99);
            assert_eq!(answer["candidates"][0]["hand"], ["left", "right"][row % 2]);
        } else {
            assert_eq!(answer["decision"], "no_match");
            assert_eq!(answer["candidates"].as_array().unwrap().len(), 0);
        }
    }
}

#[tokio::test]
async fn rows_threshold_candidates_and_hands_are_passed_on() {
    let mock = gallery().await;
    let answers = asked(&mock, 20, |args| {
        args.rows = Some("7,3..5,0".parse().unwrap());
        args.threshold = Some(-1.0);
        args.max_candidates = 2;
        args.hands = Some(format!("hand\n{}", "left\n".repeat(20)).into());
    })
    .await
    .unwrap();
    let rows: Vec<u64> = answers.iter().map(|answer| answer["row"].as_u64().unwrap()).collect();
    assert_eq!(rows, [7, 3, 4, 0]);
    assert!(answers.iter().all(|answer| answer["candidates"].as_array().unwrap().len() == 2));
    assert_eq!(answers[0]["decision"], "no_match", "subject 7 has a right palm only");
    assert_eq!(answers[2]["decision"], "match");
}

#[tokio::test]
async fn only_the_subjects_named_are_found() {
    let mock = gallery().await;
    let found = async |only: &str| {
        let answers = asked(&mock, 20, |args| args.only = Some(only.to_owned())).await.unwrap();
        let found = answers.iter().filter(|answer| answer["decision"] == "match");
        found.map(|answer| answer["candidates"][0]["subject_id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(found("s3, s7,nobody").await, ["s3", "s7"]);
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("holders.txt");
    fs::write(&list, "s4\n\n  s5 \n").unwrap();
    assert_eq!(found(&format!("@{}", list.display())).await, ["s4", "s5"]);

    fs::write(&list, "s4\ntwo words\n").unwrap();
    let many = (0..3001).map(|number| format!("s{number}")).collect::<Vec<_>>().join(",");
    for (only, words) in [
        ("", "empty"),
        ("s1,,s2", "empty"),
        ("s1,s2,s1", "is the same as subject_ids[0]"),
        (many.as_str(), "the limit is 3000"),
        (&format!("@{}", list.display()), "line 2"),
    ] {
        let error = asked(&mock, 1, |args| args.only = Some(only.to_owned())).await.unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.exit_code(), 2, "{error}");
    }
    let error = asked(&mock, 1, |args| args.only = Some("@/nowhere/list".to_owned())).await.unwrap_err();
    assert!(matches!(error, CliError::File { .. }), "{error}");
}

#[tokio::test]
async fn a_full_queue_is_tried_again_and_another_error_is_the_answer_of_its_row() {
    let mock = gallery().await;
    mock.state().refuse_searches = (3, Some(Code::ResourceExhausted));
    let answers = asked(&mock, 2, |_| ()).await.unwrap();
    assert!(answers.iter().all(|answer| answer["decision"] == "match"), "{answers:?}");
    mock.state().refuse_searches = (1, Some(Code::InvalidArgument));
    let answers = asked(&mock, 2, |_| ()).await.unwrap();
    assert_eq!(answers[0]["error"]["code"], "INVALID_ARGUMENT");
    assert_eq!(answers[1]["decision"], "match");
}

#[tokio::test]
async fn the_exit_code_tells_whether_every_row_was_answered() {
    let mock = gallery().await;
    let folder = tempfile::tempdir().unwrap();
    let npy = folder.path().join("probes.npy");
    fs::write(&npy, npy_f32(&[vector(0), vector(99)], DIM)).unwrap();
    let args = |json| IdentifyArgs {
        embeddings: npy.clone(),
        purpose: PurposeArg::Payment,
        venue: "gate-1".to_owned(),
        max_candidates: 3,
        threshold: None,
        rows: None,
        hands: None,
        only: None,
        json,
        server: mock.args(),
    };
    assert_eq!(run(args(false)).await.unwrap(), Outcome::Done);
    mock.state().refuse_searches = (1, Some(Code::NotFound));
    assert_eq!(run(args(true)).await.unwrap(), Outcome::Failed);
}

#[tokio::test]
async fn rows_and_venues_that_are_not_there_are_bad_usage() {
    let mock = gallery().await;
    let error = asked(&mock, 5, |args| args.rows = Some("2..6".parse().unwrap())).await.unwrap_err();
    assert!(error.to_string().contains("rows 0 to 4"), "{error}");
    assert_eq!(error.exit_code(), 2);
    let error = asked(&mock, 5, |args| args.venue = "two words".to_owned()).await.unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let error = asked(&mock, 5, |args| args.hands = Some("hand\nleft\n".into())).await.unwrap_err();
    assert!(matches!(error, CliError::OutOfStep { rows: 5, lines: 1, .. }), "{error}");
    assert!(asked(&mock, 0, |_| ()).await.unwrap().is_empty());
}

#[test]
fn row_sets_are_ranges_and_numbers() {
    assert_eq!("0..10,20..30".parse::<RowSet>().unwrap().0, [0..10, 20..30]);
    assert_eq!("3, 5,7..9".parse::<RowSet>().unwrap().0, [3..4, 5..6, 7..9]);
    for bad in ["", "a", "1..", "5..5", "9..2", "-1", "1,,2"] {
        assert!(bad.parse::<RowSet>().is_err(), "{bad}");
    }
}
