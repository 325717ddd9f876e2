//! Validates every WGSL kernel with naga while the package is built.
//!
//! Each kernel is checked with the bindings prelude before it, as the engine compiles it, and with
//! the one optional capability the kernels need: `unpack2x16float`. What passes here asks nothing
//! else of an adapter but the core.

use std::fs;
use std::path::Path;

use naga::valid::{Capabilities, ValidationFlags, Validator};

const FOLDER: &str = "shaders";
const PRELUDE: &str = "sift_bindings.wgsl";

/// Fails the build, with `file:line`, on the first kernel that does not parse or validate.
pub(crate) fn validate() {
    println!("cargo::rerun-if-changed={FOLDER}");
    println!("cargo::rerun-if-changed=build/shaders.rs");
    let prelude = read(PRELUDE);
    let mut names: Vec<String> = fs::read_dir(FOLDER)
        .unwrap_or_else(|e| panic!("{FOLDER}: {e}"))
        .map(|entry| entry.expect("folder entry").file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with(".wgsl") && name != PRELUDE)
        .collect();
    names.sort();
    for name in names {
        let source = format!("{prelude}{}", read(&name));
        if let Err((offset_line, message)) = check(&source) {
            let prelude_lines = prelude.lines().count();
            let (file, line) = match offset_line {
                Some(line) if line > prelude_lines => (name.as_str(), line - prelude_lines),
                Some(line) => (PRELUDE, line),
                None => (name.as_str(), 1),
            };
            println!("cargo::error={FOLDER}/{file}:{line}: {message}");
            std::process::exit(1);
        }
    }
}

fn read(name: &str) -> String {
    let path = Path::new(FOLDER).join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The line (from 1) where naga stumbled, if it knows, and what it said.
fn check(source: &str) -> Result<(), (Option<usize>, String)> {
    let module = naga::front::wgsl::parse_str(source).map_err(|e| {
        let line = e.location(source).map(|at| at.line_number as usize);
        (line, e.to_string())
    })?;
    Validator::new(ValidationFlags::all(), Capabilities::SHADER_FLOAT16_IN_FLOAT32).validate(&module).map(drop).map_err(
        |e| {
            let line = e.location(source).map(|at| at.line_number as usize);
            let mut message = e.as_inner().to_string();
            let mut cause = std::error::Error::source(e.as_inner());
            while let Some(inner) = cause {
                message = format!("{message}: {inner}");
                cause = inner.source();
            }
            (line, message)
        },
    )
}
