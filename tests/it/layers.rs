//! Imports point down: no room of src/ names one that stands above it in ARCHITECTURE.md's table, and some
//! libraries have homes.

use std::fs;
use std::path::{Path, PathBuf};

/// What only some files may name: tonic but for the client commands, and who makes a `tonic::Status`.
const HOMES: [(&str, &[&str]); 4] = [
    ("tonic", &["src/api/", "src/cli/"]),
    ("axum", &["src/api/", "src/web/", "src/net/"]),
    ("wgpu", &["src/engine/gpu/"]),
    ("Status::", &["src/api/status.rs", "src/api/messages", "src/api/calls.rs", "src/cli/"]),
];
/// What the index does not depend on.
const NOT_IN_INDEX: [&str; 4] = ["tokio", "tonic", "wgpu", "metrics"];

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() { sources(&entry.path(), found) } else { found.push(entry.path()) }
    }
}

/// Whether a file is for tests alone. Inline tests stand at the end of the others.
fn is_test(path: &str) -> bool {
    path.split('/').any(|part| matches!(part, "tests" | "tests.rs" | "testing.rs") || part.ends_with("_tests.rs"))
}

fn without_tests_and_comments(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    code.lines().map(|line| line.split("//").next().unwrap().to_owned() + "\n").collect()
}

fn is_of_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn word(text: &str) -> &str {
    text.split(|c| !is_of_word(c)).next().unwrap()
}

/// Where `code` names `what`, or something that begins with it.
fn named<'a>(code: &'a str, what: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(what).map(|(at, _)| at).filter(|at| !code[..*at].ends_with(is_of_word))
}

/// The rooms that `code` names from the crate's root: `crate::a`, and of `crate::{a, b::{c, d}}` a and b.
fn rooms(code: &str) -> Vec<(usize, &str)> {
    let mut rooms = Vec::new();
    for at in named(code, "crate::").map(|at| at + "crate::".len()) {
        let (mut depth, mut is_new) = (0, true);
        for (i, c) in code[at..].char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => is_new = true,
                c if is_new && is_of_word(c) => {
                    rooms.push((at + i, word(&code[at + i..])));
                    is_new = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    rooms
}

/// The table's rows, from the top; each has one or more files and folders.
fn table() -> Vec<Vec<String>> {
    let text = read("ARCHITECTURE.md");
    let section = text.split("\n## ").find(|section| section.starts_with("Which room is which?")).unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    let is_path = |name: &&str| name.ends_with('/') || name.ends_with(".rs");
    rows.map(|row| row.split('`').filter(is_path).map(str::to_owned).collect()).collect()
}

#[test]
fn imports_point_down_the_table_of_rooms() {
    let (table, root) = (table(), Path::new(env!("CARGO_MANIFEST_DIR")));
    let is_of = |name: &str, room: &str| name.trim_end_matches('/').trim_end_matches(".rs") == room;
    let place = |room: &str| table.iter().position(|row| row.iter().any(|name| is_of(name, room)));
    let mut wrong: Vec<String> = table
        .iter()
        .flatten()
        .filter(|name| !root.join("src").join(name).exists() && !root.join(name).exists())
        .map(|name| format!("ARCHITECTURE.md: there is no {name}"))
        .collect();
    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    for file in files.iter().map(|file| file.strip_prefix(root).unwrap().to_str().unwrap()) {
        let room = file.split('/').nth(1).unwrap().trim_end_matches(".rs");
        let Some(own) = place(room) else {
            wrong.push(format!("{file}: {room} is not in ARCHITECTURE.md's table"));
            continue;
        };
        let code = if is_test(file) { String::new() } else { without_tests_and_comments(&read(file)) };
        let line = |at: usize| code[..at].lines().count().max(1);
        for (at, other) in rooms(&code).into_iter().filter(|(_, other)| place(other).is_some_and(|it| it < own)) {
            wrong.push(format!("{file}:{}: {room} names {other}, which stands above it", line(at)));
        }
        for (what, homes) in HOMES.iter().filter(|(_, homes)| !homes.iter().any(|home| file.starts_with(home))) {
            wrong.extend(named(&code, what).map(|at| format!("{file}:{}: {what} is for {homes:?}", line(at))));
        }
    }
    let index = read("index/Cargo.toml");
    let depends = |library: &&str| index.lines().any(|line| line.starts_with(library));
    wrong.extend(NOT_IN_INDEX.iter().filter(|l| depends(l)).map(|l| format!("index/Cargo.toml: depends on {l}")));
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_tree_names_every_file_of_its_folders() {
    let (text, root) = (read("ARCHITECTURE.md"), Path::new(env!("CARGO_MANIFEST_DIR")));
    let section = text.split("\n## ").find(|section| section.starts_with("Where in the rooms?")).unwrap();
    let mut wrong = Vec::new();
    let lines: Vec<_> =
        section.split("```").nth(1).unwrap().lines().filter_map(|line| line.split_once("/  ")).collect();
    assert!(lines.len() > 10, "{} folders", lines.len());
    for (folder, names) in lines {
        for entry in fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path()) {
            let stem = entry.file_stem().unwrap().to_str().unwrap();
            let is_named = names.split(|c| !is_of_word(c)).any(|name| name == stem);
            if !is_named && !matches!(stem, "mod" | "tests" | "testing") {
                wrong.push(format!("{folder}: {stem} is not named"));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
