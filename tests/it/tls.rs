//! Mutual TLS: whoever has a certificate of the right authority is served, nobody else.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::client::Client;
use crate::harness::{Options, Site, TestServer};
use crate::palms::Palms;

const SEED: u64 = 81;
pub(crate) const DIM: usize = 64;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate for that name, and its key, both PEM.
fn certified(by: &Authority, name: &str) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, by).unwrap();
    (certificate.pem(), key.serialize_pem())
}

/// A site whose server shows a certificate of `servers` and takes clients of `clients`.
fn site(listen: &str, servers: &Authority, clients: &Authority) -> Site {
    let mut site = Site::new(Options { listen: listen.into(), ..Options::dim(DIM) });
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

async fn connect(server: &TestServer, tls: ClientTlsConfig) -> Result<Channel, tonic::transport::Error> {
    let address = format!("https://127.0.0.1:{}", server.addr.port());
    Endpoint::from_shared(address).unwrap().tls_config(tls.domain_name("localhost"))?.connect().await
}

/// A server that speaks TLS, and a client that it lets in.
pub(crate) async fn served() -> (TestServer, Client) {
    let (servers, clients) = (authority(), authority());
    let server = site("127.0.0.1:0", &servers, &clients).start();
    let (certificate, key) = certified(&clients, "gate-1");
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(servers.pem()));
    let channel = connect(&server, tls.identity(Identity::from_pem(certificate, key))).await.unwrap();
    (server, Client::new(channel))
}

/// A client that shows no certificate that counts may find out at its connection or its first call.
async fn is_refused(what: &str, server: &TestServer, tls: ClientTlsConfig) {
    if let Ok(channel) = connect(server, tls).await {
        let answer = Client::new(channel).status().await;
        assert!(answer.is_err(), "{what}: was answered {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn clients_of_the_right_authority_are_served_and_no_others() {
    let (servers, clients, strangers) = (authority(), authority(), authority());
    // Beyond loopback, as TLS allows.
    let mut server = site("0.0.0.0:0", &servers, &clients).start();
    let trusting = || ClientTlsConfig::new().ca_certificate(Certificate::from_pem(servers.pem()));
    let showing = |by: &Authority| {
        let (certificate, key) = certified(by, "gate-1");
        trusting().identity(Identity::from_pem(certificate, key))
    };
    let ada = Palms::new(SEED, DIM).palm();
    let mut client = Client::new(connect(&server, showing(&clients)).await.unwrap());
    client.enroll("ada", std::slice::from_ref(&ada)).await.unwrap();

    is_refused("no certificate", &server, trusting()).await;
    is_refused("another authority", &server, showing(&strangers)).await;
    is_refused("the server's own authority", &server, showing(&servers)).await;
    let plain = Endpoint::from_shared(format!("http://127.0.0.1:{}", server.addr.port())).unwrap();
    if let Ok(channel) = plain.connect().await {
        let answer = Client::new(channel).status().await;
        assert!(answer.is_err(), "plain text: was answered {answer:?}");
    }
    let (certificate, key) = certified(&clients, "gate-1");
    let of_strangers = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(strangers.pem()))
        .identity(Identity::from_pem(certificate, key));
    assert!(connect(&server, of_strangers).await.is_err(), "a client trusts only its own authority's servers");

    assert!(server.is_running());
    assert_eq!(client.who(&ada).await.unwrap().as_deref(), Some("ada"));
    let mut second = Client::new(connect(&server, showing(&clients)).await.unwrap());
    assert_eq!(second.who(&ada).await.unwrap().as_deref(), Some("ada"));
}

/// Whoever opens a connection and says nothing does not keep it.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_handshake_that_does_not_come_to_its_end_is_cut_off() {
    use std::io::Read as _;
    let (servers, clients) = (authority(), authority());
    let mut site = site("127.0.0.1:0", &servers, &clients);
    site.options.server = site.options.server.replacen("drain_seconds", "handshake_seconds = 1\ndrain_seconds", 1);
    let server = site.start();
    let mut silent = std::net::TcpStream::connect(server.addr).unwrap();
    silent.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    assert_eq!(silent.read(&mut [0; 64]).unwrap(), 0, "closed without a word");
}

#[test]
fn tls_files_that_are_none_are_named_before_anything_listens() {
    let (servers, clients) = (authority(), authority());
    for (file, key) in [
        ("server.crt", "server.tls.certificate"),
        ("server.key", "server.tls.key"),
        ("clients.crt", "server.tls.client_ca"),
    ] {
        let site = site("127.0.0.1:0", &servers, &clients);
        let path = site.dir.path().join(file);
        std::fs::remove_file(&path).unwrap();
        let (code, said) = site.expect_no_start();
        assert_eq!(code, Some(1), "{file}: {said}");
        assert!(said.contains(key) && said.contains(path.to_str().unwrap()), "{file}: {said}");
        assert!(!said.contains("thenar listening on"), "{file}: {said}");
        assert!(!site.data().exists(), "{file}: the gallery was not touched");

        std::fs::write(&path, "not a certificate").unwrap();
        let (code, said) = site.expect_no_start();
        assert_eq!(code, Some(1), "{file} is garbage: {said}");
        assert!(!said.contains("thenar listening on") && !said.contains("panicked"), "{file} is garbage: {said}");
    }
}

#[test]
fn beyond_loopback_there_is_no_server_without_tls() {
    for listen in ["0.0.0.0:0", "[::]:0", "192.0.2.1:7600"] {
        let site = Site::new(Options { listen: listen.into(), ..Options::dim(DIM) });
        let (code, said) = site.expect_no_start();
        assert_eq!(code, Some(1), "{listen}: {said}");
        for word in ["server.listen", listen, "other machines", "[server.tls]", "client_ca"] {
            assert!(said.contains(word), "{listen}: no {word:?} in {said}");
        }
        assert!(!site.data().exists(), "{listen}: nothing was made");
    }
}
