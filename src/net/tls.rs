//! Mutual TLS from PEM files.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

/// Files of mutual TLS, PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// The server's certificate chain.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Whose clients are let in.
    pub client_ca: PathBuf,
}

/// Why TLS could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("{key}: could not read {}: {source}", path.display())]
    Unreadable {
        /// Key of the configuration.
        key: &'static str,
        /// Its file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{key}: {}: {reason}", path.display())]
    Malformed {
        /// Key of the configuration.
        key: &'static str,
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

const CERTIFICATE: &str = "server.tls.certificate";
const KEY: &str = "server.tls.key";
const CLIENT_CA: &str = "server.tls.client_ca";

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Unreadable { key, path: path.to_owned(), source })
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let malformed = |reason: String| TlsError::Malformed { key, path: path.to_owned(), reason };
    let pem = read(key, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(malformed("holds no certificate in PEM".into())),
        Err(error) => Err(malformed(error.to_string())),
    }
}

/// Accepts clients with a certificate signed by the configured authority, and nobody else.
///
/// # Errors
/// [`TlsError`] with the configuration key of a file that is missing or malformed.
pub(crate) fn acceptor(config: &TlsConfig) -> Result<TlsAcceptor, TlsError> {
    let malformed = |key, path: &Path, reason: String| TlsError::Malformed { key, path: path.to_owned(), reason };
    let chain = certificates(CERTIFICATE, &config.certificate)?;
    let key = PrivateKeyDer::from_pem_slice(&read(KEY, &config.key)?)
        .map_err(|error| malformed(KEY, &config.key, error.to_string()))?;
    let mut roots = RootCertStore::empty();
    for root in certificates(CLIENT_CA, &config.client_ca)? {
        roots.add(root).map_err(|error| malformed(CLIENT_CA, &config.client_ca, error.to_string()))?;
    }
    let provider = Arc::new(ring::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(&provider))
        .build()
        .map_err(|error| malformed(CLIENT_CA, &config.client_ca, error.to_string()))?;
    let mut tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| malformed(CERTIFICATE, &config.certificate, error.to_string()))?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)
        .map_err(|error| malformed(KEY, &config.key, error.to_string()))?;
    tls.alpn_protocols.push(b"h2".to_vec());
    Ok(TlsAcceptor::from(Arc::new(tls)))
}
