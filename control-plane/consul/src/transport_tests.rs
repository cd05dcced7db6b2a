//! The way to an agent over real sockets: names, TLS in both directions, time-outs of a silent peer.

use std::net::SocketAddr;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::{Client, Secret, fake::FakeConsul};

/// Serves `fake` on loopback; `tls`: behind this acceptor.
async fn listen(fake: &FakeConsul, tls: Option<TlsAcceptor>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let fake = fake.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (fake, tls) = (fake.clone(), tls.clone());
            tokio::spawn(async move {
                match tls {
                    None => fake.serve("tcp".into(), stream).await,
                    Some(acceptor) => {
                        if let Ok(stream) = acceptor.accept(stream).await {
                            fake.serve("tls".into(), stream).await;
                        }
                    }
                }
            });
        }
    });
    address
}

fn config(agent: &str) -> ClientConfig {
    ClientConfig::new(vec![agent.parse().unwrap()])
}

#[tokio::test]
async fn names_go_through_the_injected_resolver() {
    let fake = FakeConsul::new();
    let port = listen(&fake, None).await.port();
    let resolve: Resolve = Arc::new(|name| {
        Box::pin(async move {
            assert_eq!(name, "consul.test");
            // The first address refuses: nobody listens on port `port` of 127.0.0.3 but the listener of 127.0.0.1.
            Ok(vec![IpAddr::from([127, 0, 0, 3]), IpAddr::from([127, 0, 0, 1])])
        })
    });
    let client =
        Client::new(&ClientConfig { resolve: Some(resolve), ..config(&format!("consul.test:{port}")) })
            .unwrap();
    assert_eq!(client.agent_self().await.unwrap().datacenter, "dc1");
    let client = Client::new(&config(&format!("localhost:{port}"))).unwrap();
    assert_eq!(client.agent_self().await.unwrap().datacenter, "dc1");
}

#[tokio::test]
async fn connections_are_kept_and_renewed() {
    let fake = FakeConsul::new();
    let address = listen(&fake, None).await;
    let client = Client::new(&config(&address.to_string())).unwrap();
    for _ in 0..20 {
        client.agent_self().await.unwrap();
    }
    let free = client.inner.transport.connections.available_permits();
    assert_eq!(free, MAX_CONNECTIONS - 1, "one connection serves calls in a row");
    // The ceiling holds, and nobody beyond it is refused.
    let calls: Vec<_> = (0..300)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.agent_self().await })
        })
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    let free = client.inner.transport.connections.available_permits();
    assert!(free >= MAX_CONNECTIONS - MAX_IDLE, "{free}");
}

#[tokio::test]
async fn nobody_listens() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let client = Client::new(&config(&address.to_string())).unwrap();
    let error = client.agent_self().await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[tokio::test]
async fn mutual_tls() {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let sign = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &ca).unwrap();
        (certificate, key)
    };
    let (server, server_key) = sign("server.dc1.consul");
    let (leaf, leaf_key) = sign("client.dc1.consul");

    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca.der().clone()).unwrap();
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
    let acceptor = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(
            vec![server.der().clone()],
            PrivateKeyDer::try_from(server_key.serialize_der()).unwrap(),
        )
        .unwrap();
    let fake = FakeConsul::new();
    fake.world().token = "secret".into();
    let address = listen(&fake, Some(TlsAcceptor::from(Arc::new(acceptor)))).await;

    let tls = Tls {
        ca_pem: ca.pem().into_bytes(),
        client_cert_pem: Some(leaf.pem().into_bytes()),
        client_key_pem: Some(Secret::new(leaf_key.serialize_pem())),
        server_name: Some("server.dc1.consul".into()),
    };
    let with = |tls: Tls| {
        let agent = format!("https://{address}");
        Client::new(&ClientConfig {
            tls: Some(tls),
            token: Token::Value(Secret::new("secret")),
            ..config(&agent)
        })
    };
    assert_eq!(with(tls.clone()).unwrap().agent_self().await.unwrap().version, "1.20.6");

    for (what, tls) in [
        ("another name", Tls { server_name: None, ..tls.clone() }),
        ("another CA", Tls { ca_pem: leaf.pem().into_bytes(), ..tls.clone() }),
        ("no client certificate", Tls { client_cert_pem: None, client_key_pem: None, ..tls.clone() }),
    ] {
        let before = fake.world().log.len();
        let error = with(tls).unwrap().agent_self().await.unwrap_err();
        assert!(error.blames_agent() && !error.to_string().contains("secret"), "{what}: {error}");
        assert_eq!(fake.world().log.len(), before, "{what}: the request was sent");
    }
    for (what, tls) in [
        ("no CA", Tls { ca_pem: Vec::new(), ..tls.clone() }),
        ("a certificate without key", Tls { client_key_pem: None, ..tls.clone() }),
        ("a key that is none", Tls { client_key_pem: Some(Secret::new("secret")), ..tls }),
    ] {
        let error = with(tls).err().unwrap().to_string();
        assert!(!error.contains("secret"), "{what}: {error}");
    }
}

/// A body without end is cut off at the limit, whatever its length header says.
#[tokio::test]
async fn an_endless_body_is_given_up() {
    let (ours, mut theirs) = tokio::io::duplex(1 << 20);
    let server = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut head = [0; 1024];
        let _ = theirs.read(&mut head).await.unwrap();
        theirs.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
        let chunk = [&b"100000\r\n"[..], &vec![b'['; 1 << 20], b"\r\n"].concat();
        let mut sent = 0_usize;
        while theirs.write_all(&chunk).await.is_ok() {
            sent += 1 << 20;
        }
        sent
    });
    let slot = Mutex::new(Some(ours));
    let dial: Dial = Arc::new(move |_| {
        let io = slot.lock().unwrap().take().ok_or_else(|| io::ErrorKind::ConnectionRefused.into());
        Box::pin(async move { io.map(|io| Box::new(io) as Box<dyn Io>) })
    });
    let config = config("127.0.0.1");
    let client = Client::with_transport(&config, Transport::with_dial(&config, dial));
    let error = client.agent_self().await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    let sent = server.await.unwrap();
    assert!(sent < BODY_LIMIT + (8 << 20), "{sent} bytes sent");
}
