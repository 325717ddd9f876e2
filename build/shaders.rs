//! Assembles every WGSL kernel and validates it with naga while the package is built.
//!
//! A kernel's text is its `enable` lines, then the bindings, then the rest of its file; the engine includes
//! what is written here. Each is checked with exactly the capabilities that its `enable` lines ask for. What
//! passes asks nothing else of an adapter.

use std::fs;
use std::path::Path;

use naga::valid::{Capabilities, ValidationFlags, Validator};

const FOLDER: &str = "shaders";
const BINDINGS: &str = "bindings.wgsl";
/// What kernels may enable, and the capability that it takes.
const ENABLES: [(&str, Capabilities); 2] = [
    ("enable f16;", Capabilities::SHADER_FLOAT16),
    ("enable wgpu_cooperative_matrix;", Capabilities::COOPERATIVE_MATRIX),
];

/// Writes the kernels to the folder `shaders` in `out`. Fails the build, with `file:line`, on the first kernel
/// that does not parse or validate.
pub(crate) fn assemble(out: &Path) -> std::io::Result<()> {
    println!("cargo::rerun-if-changed={FOLDER}");
    println!("cargo::rerun-if-changed=build/shaders.rs");
    let out = out.join("shaders");
    fs::create_dir_all(&out)?;
    let bindings = fs::read_to_string(Path::new(FOLDER).join(BINDINGS))?;
    for entry in fs::read_dir(FOLDER)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.ends_with(".wgsl") || name == BINDINGS {
            continue;
        }
        let kernel = fs::read_to_string(&path)?;
        let enabled = ENABLES.iter().filter(|(line, _)| kernel.lines().any(|l| l == *line));
        let capabilities = enabled.clone().fold(Capabilities::empty(), |all, (_, one)| all | *one);
        // On one line, so that all others keep their numbers.
        let enables: String = enabled.map(|(line, _)| *line).collect();
        let rest: Vec<&str> = kernel.lines().map(|line| if line.starts_with("enable ") { "" } else { line }).collect();
        let source = format!("{enables}\n{bindings}{}\n", rest.join("\n"));
        if let Err((line, message)) = validated(&source, capabilities) {
            let line = line.map_or(1, |line| line.saturating_sub(1));
            let bindings_lines = bindings.lines().count();
            let (file, line) = if line > bindings_lines { (&*name, line - bindings_lines) } else { (BINDINGS, line) };
            println!("cargo::error={FOLDER}/{file}:{line}: {message}");
            std::process::exit(1);
        }
        fs::write(out.join(name), source)?;
    }
    Ok(())
}

/// The line (from 1) at which naga stopped, if it knows, and its message.
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
