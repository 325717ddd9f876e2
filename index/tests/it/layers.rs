//! The modules of `index/src` import only from modules to their left in the order that `lib.rs` prints.

use std::fs;
use std::path::{Path, PathBuf};

/// The order in the documentation of `lib.rs`: the names in its quoted lines.
fn order() -> Vec<String> {
    let lib = include_str!("../../src/lib.rs");
    let quoted = lib.lines().filter_map(|line| line.strip_prefix("//! > "));
    let names = quoted.flat_map(|line| line.split('`').skip(1).step_by(2));
    names.map(str::to_owned).collect()
}

fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files_below(&path, found);
        } else {
            found.push(path);
        }
    }
}

/// The modules that a file names as `crate::module` outside of comments and tests. Unit tests are at the
/// end of their file.
fn imports(source: &str) -> Vec<String> {
    let code = source.split("#[cfg(test)]").next().unwrap();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let paths = lines.flat_map(|line| line.split("crate::").skip(1));
    let name = |path: &str| path.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    paths.map(name).collect()
}

#[test]
fn modules_import_only_from_modules_to_their_left() {
    let (order, src) = (order(), Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let place = |module: &str| order.iter().position(|name| name == module);
    let mut files = Vec::new();
    files_below(&src, &mut files);
    let mut seen = vec![false; order.len()];
    for file in files {
        let path = file.strip_prefix(&src).unwrap().to_str().unwrap();
        if path == "lib.rs" || path.ends_with("tests.rs") {
            continue;
        }
        let module = path.split('/').next().unwrap().trim_end_matches(".rs");
        let at = place(module).unwrap_or_else(|| panic!("{path}: the order in lib.rs has no `{module}`"));
        seen[at] = true;
        for import in imports(&fs::read_to_string(&file).unwrap()) {
            let from = place(&import).unwrap_or_else(|| panic!("{path}: the order in lib.rs has no `{import}`"));
            assert!(from <= at, "{path} imports `{import}`, which is to the right of `{module}` in lib.rs");
        }
    }
    let unused = order.iter().zip(seen).find(|(_, seen)| !seen);
    assert_eq!(unused, None, "the order in lib.rs names a module that does not exist");
}
