//! Build steps: the protocol is compiled (without protoc) and the shaders are validated, so that a
//! bad one fails the build. With the feature `faiss`, the few lines of C++ that ask FAISS and its BLAS
//! what they are; the crate `faiss` compiles and links FAISS itself.

#[path = "build/shaders.rs"]
mod shaders;

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const PROTOS: [&str; 4] = [
    "thenar/v1/palm.proto",
    "thenar/v1/identification.proto",
    "thenar/v1/enrollment.proto",
    "thenar/v1/administration.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    shaders::validate();
    #[cfg(feature = "faiss")]
    {
        println!("cargo:rerun-if-changed=src/audit/faiss_facts.cpp");
        cc::Build::new().cpp(true).file("src/audit/faiss_facts.cpp").compile("thenar_faiss_facts");
    }
    compile_protos()
}

/// Makes the gRPC code and the descriptor set that reflection serves.
fn compile_protos() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
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
