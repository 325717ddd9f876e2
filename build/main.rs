//! Build steps: the protocol is compiled (without protoc) and the shaders are assembled and validated, so
//! that a bad one fails the build. With the feature `faiss`, the few lines of C++ that ask FAISS and its BLAS
//! what they are; the crate `faiss` compiles and links FAISS itself.

mod shaders;

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use prost::Message as _;

const PROTOS: [&str; 4] = [
    "thenar/v1/palm.proto",
    "thenar/v1/identification.proto",
    "thenar/v1/enrollment.proto",
    "thenar/v1/administration.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    shaders::assemble(&out)?;
    #[cfg(feature = "faiss")]
    {
        println!("cargo:rerun-if-changed=src/audit/faiss_facts.cpp");
        cc::Build::new().cpp(true).file("src/audit/faiss_facts.cpp").compile("thenar_faiss_facts");
    }
    compile_protos(&out)
}

/// Generates the gRPC code and the descriptor set that reflection serves.
fn compile_protos(out: &Path) -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    fs::write(out.join("thenar_descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_server(true)
        .build_client(true)
        // `thenar status --json` prints these as they are.
        .type_attribute("thenar.v1.EngineStatus", "#[derive(serde::Serialize)]")
        .type_attribute("thenar.v1.MemoryStatus", "#[derive(serde::Serialize)]")
        .type_attribute("thenar.v1.PolicyStatus", "#[derive(serde::Serialize)]")
        .compile_fds(descriptors)?;
    Ok(())
}
