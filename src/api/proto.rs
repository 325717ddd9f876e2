//! The generated types and stubs of `proto/thenar/v1`. Limits are documented in the proto files.
//!
//! Only `api` (the server's side) and `cli` (the client's side) may use these types.

#![expect(missing_docs, reason = "generated; the proto files carry the documentation")]
#![expect(clippy::all, reason = "generated")]
#![expect(clippy::allow_attributes_without_reason, reason = "generated")]

tonic::include_proto!("thenar.v1");

/// The serialised `FileDescriptorSet` of the whole package, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/thenar_descriptors.bin"));
