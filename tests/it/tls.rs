//! Mutual TLS: whoever has a certificate of the right authority is served, nobody else.

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use crate::support::client::Client;
use crate::support::palms::Palms;
use crate::support::server::{Options, Site, TestServer};
use crate::support::tls::{Authority, authority, certified, connect, site};

const SEED: u64 = 81;
const DIM: usize = 64;

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
    let mut server = site("0.0.0.0:0", &servers, &clients, DIM).start();
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
    let mut site = site("127.0.0.1:0", &servers, &clients, DIM);
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
        let site = site("127.0.0.1:0", &servers, &clients, DIM);
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
