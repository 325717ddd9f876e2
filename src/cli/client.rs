//! How a client command reaches its server, and the pieces of messages that several commands send.
//!
//! Knows addresses, TLS files and message limits; does not know what is asked. A connection that
//! this module hands out has been made: an unreachable server is an error here, with its address.

use std::path::Path;
use std::time::Duration;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::args::ServerArgs;
use super::error::{CliError, Disconnected};
use crate::api::proto::administration_client::AdministrationClient;
use crate::api::proto::enrollment_client::EnrollmentClient;
use crate::api::proto::identification_client::IdentificationClient;
use crate::api::proto::{self, GetStatusRequest, palm_sample};
use crate::model::Hand;

/// Where a server is expected if nothing else is said.
const SERVER_DEFAULT: &str = "http://127.0.0.1:7600";
/// The environment variable that names the server.
const SERVER_VARIABLE: &str = "THENAR_SERVER";
/// The largest message of the enrolment service, in bytes (`enrollment.proto`).
pub(crate) const ENROLLMENT_BYTES_MAX: usize = 8 << 20;
/// The largest message of the other services, in bytes (`identification.proto`, `administration.proto`).
const MESSAGE_BYTES_MAX: usize = 256 << 10;

/// A dead peer is noticed after at most twice this time, even if no packet comes back.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A server that can be connected to, as often as needed.
#[derive(Debug, Clone)]
pub struct Server {
    address: String,
    endpoint: Endpoint,
}

impl Server {
    /// The server at `address`, without TLS.
    ///
    /// # Errors
    /// If that is not an address.
    pub fn plain(address: &str) -> Result<Self, CliError> {
        Self::new(&ServerArgs::plain(address))
    }

    /// Checks the options and reads the TLS files; connects to nothing.
    ///
    /// # Errors
    /// `CliError` if the address is invalid, an option is missing, or a file cannot be read.
    pub(crate) fn new(args: &ServerArgs) -> Result<Self, CliError> {
        let from_environment = || std::env::var(SERVER_VARIABLE).ok().filter(|address| !address.is_empty());
        let address = args.server.clone().or_else(from_environment).unwrap_or_else(|| SERVER_DEFAULT.to_owned());
        let bad_address = || CliError::BadAddress { address: address.clone() };
        let endpoint = Endpoint::from_shared(address.clone()).map_err(|_| bad_address())?;
        if endpoint.uri().host().is_none() {
            return Err(bad_address());
        }
        let tls_usage = |problem| CliError::TlsUsage { address: address.clone(), problem };
        let endpoint = match endpoint.uri().scheme_str() {
            Some("http") if args.ca.is_some() || args.cert.is_some() => {
                return Err(tls_usage("--ca, --cert and --key need an https:// address"));
            }
            Some("http") => endpoint,
            Some("https") => {
                let ca = args.ca.as_deref().ok_or_else(|| {
                    tls_usage("an https:// address needs --ca, the authority that signed the server's certificate")
                })?;
                let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
                if let (Some(cert), Some(key)) = (&args.cert, &args.key) {
                    tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
                }
                if let Some(name) = &args.server_name {
                    tls = tls.domain_name(name);
                }
                endpoint.tls_config(tls).map_err(|error| unreachable(&address, Disconnected::Tls(error)))?
            }
            _ => return Err(bad_address()),
        };
        let endpoint = endpoint
            .connect_timeout(args.connect_timeout)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .user_agent(concat!("thenar/", env!("CARGO_PKG_VERSION")))
            .map_err(|_| bad_address())?;
        Ok(Self { address, endpoint })
    }

    /// The address, for messages.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Makes a connection of its own.
    ///
    /// # Errors
    /// `CliError::Unreachable` with the address and the innermost cause.
    pub async fn connect(&self) -> Result<Channel, CliError> {
        let connected = self.endpoint.connect().await;
        connected.map_err(|error| unreachable(&self.address, Disconnected::Connect(error)))
    }

    /// What the server is and holds.
    ///
    /// # Errors
    /// `CliError` if it cannot be reached or refuses.
    pub async fn status(&self) -> Result<proto::Status, CliError> {
        let mut client = AdministrationClient::new(self.connect().await?)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let answer = client.get_status(GetStatusRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(|status| CliError::refused("GetStatus", status))
    }
}

fn unreachable(address: &str, source: Disconnected) -> CliError {
    CliError::Unreachable { address: address.to_owned(), source }
}

fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    std::fs::read(path).map_err(CliError::file("read", path))
}

/// The enrolment service behind `channel`, with the protocol's message limits.
#[must_use]
pub fn enrollment(channel: Channel) -> EnrollmentClient<Channel> {
    EnrollmentClient::new(channel)
        .max_decoding_message_size(ENROLLMENT_BYTES_MAX)
        .max_encoding_message_size(ENROLLMENT_BYTES_MAX)
}

/// The identification service behind `channel`, with the protocol's message limits.
#[must_use]
pub fn identification(channel: Channel) -> IdentificationClient<Channel> {
    IdentificationClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

/// One capture from an embedding. Shape of `values`: `[dim]`.
pub(crate) fn sample(values: Vec<f32>, hand: Hand) -> proto::PalmSample {
    let hand = match hand {
        Hand::Unspecified => proto::Hand::Unspecified,
        Hand::Left => proto::Hand::Left,
        Hand::Right => proto::Hand::Right,
    };
    proto::PalmSample { content: Some(palm_sample::Content::Embedding(proto::Embedding { values })), hand: hand.into() }
}

/// A name that no other request has: `prefix-` and 128 random bits.
pub(crate) fn random_request_id(prefix: &str) -> String {
    format!("{prefix}-{:032x}", rand::random::<u128>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_scheme_or_host_is_bad_usage() {
        for address in ["127.0.0.1:7600", "ftp://host:1", "http://", "not an address", "/tmp/socket"] {
            let error = Server::plain(address).unwrap_err();
            assert!(matches!(error, CliError::BadAddress { .. }), "{address}: {error}");
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(address));
        }
    }

    #[test]
    fn tls_options_and_scheme_must_agree() {
        let error = Server::plain("https://palm.example:7600").unwrap_err();
        assert!(error.to_string().contains("needs --ca"), "{error}");
        let mut args = ServerArgs::plain("http://palm.example:7600");
        args.ca = Some("ca.pem".into());
        let error = Server::new(&args).unwrap_err();
        assert!(error.to_string().contains("need an https:// address"), "{error}");
        args.server = Some("https://palm.example:7600".to_owned());
        args.ca = Some("/nowhere/ca.pem".into());
        let error = Server::new(&args).unwrap_err();
        assert!(error.to_string().contains("/nowhere/ca.pem"), "{error}");
    }

    #[tokio::test]
    async fn an_unreachable_server_is_named() {
        // A port that was free a moment ago and that nobody listens on now.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("http://127.0.0.1:{port}");
        let error = Server::plain(&address).unwrap().connect().await.unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains(&address), "{error}");
        assert!(error.to_string().to_lowercase().contains("refused"), "{error}");
        assert_eq!(error.message(), error.to_string(), "no cause is told twice");
    }
}
