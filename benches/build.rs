//! Compiles the few lines of C++ that ask FAISS and its BLAS what they are.

fn main() {
    #[cfg(feature = "faiss")]
    {
        println!("cargo:rerun-if-changed=src/peer/faiss_facts.cpp");
        cc::Build::new().cpp(true).file("src/peer/faiss_facts.cpp").compile("thenar_faiss_facts");
    }
}
