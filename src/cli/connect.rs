//! How a client command reaches its server.
//!
//! Knows addresses, TLS files and message limits; does not know what is asked. A connection that
//! this module hands out has been made: an unreachable server is an error here, with its address.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::error::{CliError, innermost};
use crate::api::proto::administration_client::AdministrationClient;
use crate::api::proto::enrollment_client::EnrollmentClient;
use crate::api::proto::identification_client::IdentificationClient;

/// Where a server is expected if nothing else is said.
pub const SERVER_DEFAULT: &str = "http://127.0.0.1:7600";
/// The environment variable that names the server.
pub const SERVER_VARIABLE: &str = "THENAR_SERVER";
/// The largest message of the enrolment service, in bytes (`enrollment.proto`).
pub const ENROLLMENT_BYTES_MAX: usize = 8 << 20;
/// The largest message of the other services, in bytes (`identification.proto`, `administration.proto`).
pub const MESSAGE_BYTES_MAX: usize = 256 << 10;

/// A dead peer is noticed after at most twice this time, also where no packet comes back.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// The server a command speaks to.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// Address of the server: http://HOST:PORT, or https://HOST:PORT together with --ca.
    /// Without it, the environment variable THENAR_SERVER, then http://127.0.0.1:7600.
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// Certificate authority that signed the server's certificate (PEM).
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// This client's certificate (PEM), for servers that ask for one.
    #[arg(long, value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// Private key of --cert (PEM).
    #[arg(long, value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// Name the server's certificate must carry, where it is not the host of the address.
    #[arg(long, value_name = "NAME", requires = "ca")]
    pub server_name: Option<String>,
    /// Seconds to wait for the connection.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub connect_timeout: u64,
}

impl ServerArgs {
    /// A server at `address`, without TLS.
    #[must_use]
    pub fn plain(address: &str) -> Self {
        Self {
            server: Some(address.to_owned()),
            ca: None,
            cert: None,
            key: None,
            server_name: None,
            connect_timeout: 5,
        }
    }

    /// The address in effect: the argument, the environment variable or the default.
    #[must_use]
    pub fn address(&self) -> String {
        self.server
            .clone()
            .or_else(|| std::env::var(SERVER_VARIABLE).ok().filter(|address| !address.is_empty()))
            .unwrap_or_else(|| SERVER_DEFAULT.to_owned())
    }

    /// Checks the options and reads the TLS files; connects to nothing.
    ///
    /// # Errors
    /// [`CliError`] where the address is none, an option is missing, or a file cannot be read.
    pub fn resolve(&self) -> Result<Server, CliError> {
        let address = self.address();
        let bad_address = || CliError::BadAddress { address: address.clone() };
        let endpoint = Endpoint::from_shared(address.clone()).map_err(|_| bad_address())?;
        if endpoint.uri().host().is_none() {
            return Err(bad_address());
        }
        let tls_usage = |problem| CliError::TlsUsage { address: address.clone(), problem };
        let endpoint = match endpoint.uri().scheme_str() {
            Some("http") if self.ca.is_some() || self.cert.is_some() => {
                return Err(tls_usage("--ca, --cert and --key need an https:// address"));
            }
            Some("http") => endpoint,
            Some("https") => {
                let ca = self.ca.as_deref().ok_or_else(|| {
                    tls_usage("an https:// address needs --ca, the authority that signed the server's certificate")
                })?;
                let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
                if let (Some(cert), Some(key)) = (&self.cert, &self.key) {
                    tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
                }
                if let Some(name) = &self.server_name {
                    tls = tls.domain_name(name);
                }
                endpoint.tls_config(tls).map_err(|error| CliError::Unreachable {
                    address: address.clone(),
                    reason: format!("the TLS files cannot be used: {}", innermost(&error)),
                })?
            }
            _ => return Err(bad_address()),
        };
        let endpoint = endpoint
            .connect_timeout(Duration::from_secs(self.connect_timeout))
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .user_agent(concat!("thenar/", env!("CARGO_PKG_VERSION")))
            .map_err(|_| bad_address())?;
        Ok(Server { address, endpoint })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    std::fs::read(path).map_err(|source| CliError::File { action: "read", path: path.to_owned(), source })
}

/// A server that can be connected to, as often as needed.
#[derive(Debug, Clone)]
pub struct Server {
    address: String,
    endpoint: Endpoint,
}

impl Server {
    /// The address, for messages.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Makes a connection of its own.
    ///
    /// # Errors
    /// [`CliError::Unreachable`] with the address and the innermost cause.
    pub async fn connect(&self) -> Result<Channel, CliError> {
        self.endpoint
            .connect()
            .await
            .map_err(|error| CliError::Unreachable { address: self.address.clone(), reason: innermost(&error) })
    }
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

/// The administration service behind `channel`, with the protocol's message limits.
#[must_use]
pub fn administration(channel: Channel) -> AdministrationClient<Channel> {
    AdministrationClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_scheme_or_host_is_bad_usage() {
        for address in ["127.0.0.1:7600", "ftp://host:1", "http://", "not an address", "/tmp/socket"] {
            let error = ServerArgs::plain(address).resolve().unwrap_err();
            assert!(matches!(error, CliError::BadAddress { .. }), "{address}: {error}");
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(address));
        }
    }

    #[test]
    fn tls_options_and_scheme_must_agree() {
        let error = ServerArgs::plain("https://palm.example:7600").resolve().unwrap_err();
        assert!(error.to_string().contains("needs --ca"), "{error}");
        let mut arguments = ServerArgs::plain("http://palm.example:7600");
        arguments.ca = Some("ca.pem".into());
        let error = arguments.resolve().unwrap_err();
        assert!(error.to_string().contains("need an https:// address"), "{error}");
        arguments.server = Some("https://palm.example:7600".to_owned());
        arguments.ca = Some("/nowhere/ca.pem".into());
        let error = arguments.resolve().unwrap_err();
        assert!(error.to_string().contains("/nowhere/ca.pem"), "{error}");
    }

    #[tokio::test]
    async fn an_unreachable_server_is_named() {
        // A port that was free a moment ago and that nobody listens on now.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("http://127.0.0.1:{port}");
        let error = ServerArgs::plain(&address).resolve().unwrap().connect().await.unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains(&address), "{error}");
        assert!(error.to_string().to_lowercase().contains("refused"), "{error}");
    }
}
