//! Certificates, and servers that take only clients with one.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::client::Client;
use super::server::{Options, Site, TestServer};

/// Who signs certificates.
pub(crate) type Authority = CertifiedIssuer<'static, KeyPair>;

/// A new authority.
pub(crate) fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate for that name, and its key, both PEM.
pub(crate) fn certified(by: &Authority, name: &str) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, by).unwrap();
    (certificate.pem(), key.serialize_pem())
}

/// A site whose server shows a certificate of `servers` and takes clients of `clients`.
pub(crate) fn site(listen: &str, servers: &Authority, clients: &Authority, dim: usize) -> Site {
    let mut site = Site::new(Options { listen: listen.into(), ..Options::dim(dim) });
    let dir = site.dir.path();
    let (certificate, key) = certified(servers, "localhost");
    std::fs::write(dir.join("server.crt"), certificate).unwrap();
    std::fs::write(dir.join("server.key"), key).unwrap();
    std::fs::write(dir.join("clients.crt"), clients.pem()).unwrap();
    let tls = format!(
        "\n[server.tls]\ncertificate = {:?}\nkey = {:?}\nclient_ca = {:?}",
        dir.join("server.crt"),
        dir.join("server.key"),
        dir.join("clients.crt")
    );
    site.options.server.push_str(&tls);
    site
}

/// A connection to the server, which shows a certificate for `localhost`.
pub(crate) async fn connect(server: &TestServer, tls: ClientTlsConfig) -> Result<Channel, tonic::transport::Error> {
    let address = format!("https://127.0.0.1:{}", server.addr.port());
    Endpoint::from_shared(address).unwrap().tls_config(tls.domain_name("localhost"))?.connect().await
}

/// A server that speaks TLS, and a client that it lets in.
pub(crate) async fn served(dim: usize) -> (TestServer, Client) {
    let (servers, clients) = (authority(), authority());
    let server = site("127.0.0.1:0", &servers, &clients, dim).start();
    let (certificate, key) = certified(&clients, "gate-1");
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(servers.pem()));
    let channel = connect(&server, tls.identity(Identity::from_pem(certificate, key))).await.unwrap();
    (server, Client::new(channel))
}
