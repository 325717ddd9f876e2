//! Validates every WGSL kernel with naga while the package is built.
//!
//! Each kernel is checked as the engine compiles it: its extensions, the bindings prelude, its own
//! text; once for each size of matrix where it has several. And with exactly the capabilities its
//! pipeline may use, which are none but for cooperative matrices. What passes here asks nothing
//! else of an adapter.

use std::fs;
use std::path::Path;

use naga::valid::{Capabilities, ValidationFlags, Validator};

const FOLDER: &str = "shaders";
const PRELUDE: &str = "bindings.wgsl";
/// The one kernel that needs more than the core, as `kernels.rs` has it.
const COOPERATIVE: &str = "scan_coop.wgsl";
const COOPERATIVE_EXTENSIONS: &str = "enable f16;\nenable wgpu_cooperative_matrix;\n";

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
    assert!(names.iter().any(|name| name == COOPERATIVE), "{FOLDER}/{COOPERATIVE} has another name now");
    for name in names {
        let kernel = read(&name);
        if name == COOPERATIVE {
            let capabilities = Capabilities::SHADER_FLOAT16 | Capabilities::COOPERATIVE_MATRIX;
            let smaller = kernel
                .replace("coop_mat16x16", "coop_mat8x8")
                .replace("const TILE: u32 = 16u;", "const TILE: u32 = 8u;");
            assert!(smaller != kernel, "{FOLDER}/{COOPERATIVE} has other names now");
            for kernel in [kernel, smaller] {
                check(&name, COOPERATIVE_EXTENSIONS, &prelude, &kernel, capabilities);
            }
        } else {
            check(&name, "", &prelude, &kernel, Capabilities::empty());
        }
    }
}

fn read(name: &str) -> String {
    let path = Path::new(FOLDER).join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Ends the build where the kernel is bad.
fn check(name: &str, extensions: &str, prelude: &str, kernel: &str, capabilities: Capabilities) {
    let Err((line, message)) = validated(&format!("{extensions}{prelude}{kernel}"), capabilities) else {
        return;
    };
    let before = extensions.lines().count();
    let prelude_lines = prelude.lines().count();
    let (file, line) = match line {
        Some(line) if line > before + prelude_lines => (name, line - before - prelude_lines),
        Some(line) if line > before => (PRELUDE, line - before),
        _ => (name, 1),
    };
    println!("cargo::error={FOLDER}/{file}:{line}: {message}");
    std::process::exit(1);
}

/// The line (from 1) where naga stumbled, if it knows, and what it said.
fn validated(source: &str, capabilities: Capabilities) -> Result<(), (Option<usize>, String)> {
    let module = naga::front::wgsl::parse_str(source).map_err(|e| {
        let line = e.location(source).map(|at| at.line_number as usize);
        (line, e.to_string())
    })?;
    Validator::new(ValidationFlags::all(), capabilities).validate(&module).map(drop).map_err(|e| {
        let line = e.location(source).map(|at| at.line_number as usize);
        let mut message = e.as_inner().to_string();
        let mut cause = std::error::Error::source(e.as_inner());
        while let Some(inner) = cause {
            message = format!("{message}: {inner}");
            cause = inner.source();
        }
        (line, message)
    })
}
