//! What arrives at the workload's port without a sidecar in front of it.

use std::sync::Arc;

use outrigger_core::model::Protocol;
use outrigger_proxy::config::{Config, Mtls};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::support::*;

fn permissive(config: &mut Config) {
    config.mtls = Mtls::Permissive;
    config.timeouts.detect = millis(50);
}

/// An application with its own TLS, and a client that trusts it.
async fn tls_app() -> (std::net::SocketAddr, TlsConnector) {
    let key = rcgen::generate_simple_self_signed(["app.example".to_owned()]).unwrap();
    let certificate: CertificateDer<'static> = key.cert.der().clone();
    let private = PrivatePkcs8KeyDer::from(key.signing_key.serialize_der());
    let provider = outrigger_certs::provider();
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], private.into())
        .unwrap();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let address = tcp_app(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            let mut question = Vec::new();
            stream.read_to_end(&mut question).await.unwrap();
            stream.write_all(&question).await.unwrap();
            stream.shutdown().await.unwrap();
        }
    })
    .await;
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    (address, TlsConnector::from(Arc::new(client)))
}

async fn say_over_tls(address: std::net::SocketAddr, connector: &TlsConnector) -> std::io::Result<String> {
    let stream = TcpStream::connect(address).await?;
    let mut stream = connector.connect("app.example".try_into().unwrap(), stream).await?;
    stream.write_all(b"hello").await?;
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn the_applications_own_tls_passes_untouched_in_permissive_only() {
    let (app, connector) = tls_app().await;
    let open = pair_with(app, Protocol::Detect, |_| {}, permissive);
    assert_eq!(soon("the echo", say_over_tls(open.inbound, &connector)).await.unwrap(), "hello");
    assert!(open.server.metrics().contains(r#"source="127.0.0.1""#), "{}", open.server.metrics());
    // Through both sidecars it is bytes like any others, in either mode.
    let strict = pair(app, Protocol::Detect);
    assert_eq!(soon("the echo", say_over_tls(strict.address, &connector)).await.unwrap(), "hello");
    assert!(soon("the refusal", say_over_tls(strict.inbound, &connector)).await.is_err());
}

#[tokio::test]
async fn strict_answers_plaintext_http_with_a_reason_and_resets_the_rest() {
    let app = http1_app(|_| async { http::Response::new(full("never")) }).await;
    let pair = pair(app, Protocol::Detect);
    let answer = raw(pair.inbound, b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(answer.contains("outrigger-reason: proxy; plaintext_refused; "), "{answer}");
    let mut client = http2(pair.inbound).await;
    let response = soon("the refusal", client.send_request(get("http://a/"))).await.unwrap();
    assert_eq!(response.status(), 403);
    assert_eq!(raw(pair.inbound, b"\x00\x01\x02 no http at all").await, "");
    assert!(pair.server.metrics().contains(r#"outcome="refused"} 3"#), "{}", pair.server.metrics());
}

#[tokio::test]
async fn permissive_takes_both_and_counts_the_unmeshed() {
    let app = http1_app(|_| async { http::Response::new(full("hello")) }).await;
    let pair = pair_with(app, Protocol::Detect, |_| {}, permissive);
    let answer = raw(pair.inbound, b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("hello"), "{answer}");
    let mut client = http1(pair.address).await;
    let (head, _, _) = whole(client.send_request(get("/")).await.unwrap()).await;
    assert_eq!(head.status, 200);
    let metrics = pair.server.metrics();
    let expected = format!(
        r#"outrigger_unmeshed_inbound_total{{source="127.0.0.1",port="{}",outcome="passed"}} 1"#,
        pair.inbound.port()
    );
    assert!(metrics.contains(&expected), "{metrics}");
}

#[tokio::test]
async fn permissive_lets_a_server_speak_first_and_sidecars_come_in_all_the_same() {
    let app = tcp_app(|mut stream| async move {
        stream.write_all(b"220 ready\r\n").await.unwrap();
        let mut line = [0; 6];
        if stream.read_exact(&mut line).await.is_ok() {
            stream.write_all(b"250 ok\r\n").await.unwrap();
        }
    })
    .await;
    let pair = pair_with(app, Protocol::Detect, |_| {}, permissive);
    for _ in 0..3 {
        for address in [pair.inbound, pair.address] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let mut greeting = [0; 11];
            soon("the greeting", stream.read_exact(&mut greeting)).await.unwrap();
            assert_eq!(&greeting, b"220 ready\r\n");
            stream.write_all(b"QUIT\r\n").await.unwrap();
            let mut rest = String::new();
            soon("the answer", stream.read_to_string(&mut rest)).await.unwrap();
            assert_eq!(rest, "250 ok\r\n");
        }
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused_on_our_protocol() {
    let app = http1_app(|_| async { http::Response::new(full("never")) }).await;
    for mode in [Mtls::Strict, Mtls::Permissive] {
        let pair = pair_with(app, Protocol::Detect, |_| {}, |server| server.mtls = mode);
        let config = pair.server.context.credentials.bootstrap_config(&id("server"), &[b"outrigger-h2"]);
        let stream = TcpStream::connect(pair.inbound).await.unwrap();
        let connector = TlsConnector::from(config);
        // In TLS 1.3 the client learns of the refusal with its first read.
        if let Ok(mut stream) = connector.connect(outrigger_certs::server_name(), stream).await {
            assert!(soon("the alert", stream.read_u8()).await.is_err());
        }
        eventually("the count", || {
            pair.server.metrics().contains(
                r#"outrigger_handshake_failures_total{direction="inbound",outcome="no_certificate"} 1"#,
            )
        })
        .await;
    }
}
