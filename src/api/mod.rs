//! gRPC: messages in, commands to the service, answers out.
//!
//! The only home of tonic's types on the server's side. Checks what only the wire can break
//! (missing messages, enum numbers, sizes) and leaves every other check to the service.
//! `bulk_enroll` takes the messages of a bulk enrolment without a socket too, for the local import.

mod administration;
mod convert;
mod enrollment;
mod identification;
mod linger;
mod status;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt as _;
use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};

use crate::config::TlsConfig;
use crate::service::Service;
use crate::wire;
use crate::wire::administration_server::AdministrationServer;
use crate::wire::enrollment_server::EnrollmentServer;
use crate::wire::identification_server::IdentificationServer;

pub(crate) use enrollment::bulk_enroll;

/// Bytes of one message to `Identification` or `Administration`.
pub const SEARCH_MESSAGE_BYTES_MAX: usize = 256 << 10;
/// Bytes of one message to `Enrollment`.
pub const ENROLL_MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Calls open at once on one connection.
const CALLS_PER_CONNECTION_MAX: u32 = 256;
/// How often a silent connection is asked whether it lives, and how long it may take to say so.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Why gRPC could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A file of the TLS configuration could not be read.
    #[error("{key}: could not read {}: {source}", path.display())]
    TlsFile {
        /// Key of the configuration.
        key: &'static str,
        /// Its file.
        path: std::path::PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The transport failed, or its TLS configuration is not one.
    #[error("gRPC could not be served: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The descriptors for reflection are broken.
    #[error("reflection could not be served: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

fn read(key: &'static str, path: &std::path::Path) -> Result<Vec<u8>, ServeError> {
    std::fs::read(path).map_err(|source| ServeError::TlsFile { key, path: path.to_owned(), source })
}

fn mutual_tls(config: &TlsConfig) -> Result<ServerTlsConfig, ServeError> {
    let certificate = read("server.tls.certificate", &config.certificate)?;
    let key = read("server.tls.key", &config.key)?;
    let client_ca = read("server.tls.client_ca", &config.client_ca)?;
    Ok(ServerTlsConfig::new()
        .identity(Identity::from_pem(certificate, key))
        .client_ca_root(Certificate::from_pem(client_ca))
        .client_auth_optional(false))
}

/// The transport with its limits and its TLS, before anything is served.
///
/// # Errors
/// [`ServeError`] where a file of the TLS configuration is missing or is not what it should be.
pub fn transport(tls: Option<&TlsConfig>) -> Result<Server, ServeError> {
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(Some(CALLS_PER_CONNECTION_MAX));
    Ok(match tls {
        Some(tls) => server.tls_config(mutual_tls(tls)?)?,
        None => server,
    })
}

/// Serves until the service drains: then no new call is taken, those in flight are answered, and
/// this returns.
///
/// # Errors
/// [`ServeError`] where the transport fails.
pub async fn serve(service: Arc<Service>, listener: TcpListener, mut server: Server) -> Result<(), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<IdentificationServer<identification::Api>>().await;
    health.set_serving::<EnrollmentServer<enrollment::Api>>().await;
    health.set_serving::<AdministrationServer<administration::Api>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(wire::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let draining = service.draining().clone();
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true)).map_ok(linger::Lingering::new);

    server
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(
            IdentificationServer::new(identification::Api::new(Arc::clone(&service)))
                .max_decoding_message_size(SEARCH_MESSAGE_BYTES_MAX),
        )
        .add_service(
            EnrollmentServer::new(enrollment::Api::new(Arc::clone(&service)))
                .max_decoding_message_size(ENROLL_MESSAGE_BYTES_MAX),
        )
        .add_service(
            AdministrationServer::new(administration::Api::new(service))
                .max_decoding_message_size(SEARCH_MESSAGE_BYTES_MAX),
        )
        .serve_with_incoming_shutdown(incoming, async move {
            draining.cancelled().await;
            health.set_not_serving::<IdentificationServer<identification::Api>>().await;
            health.set_not_serving::<EnrollmentServer<enrollment::Api>>().await;
            health.set_not_serving::<AdministrationServer<administration::Api>>().await;
        })
        .await?;
    Ok(())
}
