//! Handshakes over sockets, against tokio-rustls: an independent driver of the protocol.

use std::{cell::RefCell, future::Future, rc::Rc};

use outrigger_certs::{Refusal, refusal};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    runtime::{Builder, LocalOptions},
    task::spawn_local,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

/// Longer than any test takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

/// Runs a test as a worker thread of the proxy would, and never for ever.
fn run<T>(test: impl Future<Output = T>) -> T {
    let mut builder = Builder::new_current_thread();
    let runtime = builder.enable_all().build_local(LocalOptions::default()).unwrap();
    runtime.block_on(async { timeout(PATIENCE, test).await.expect("the test hangs") })
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap());
    let (dialled, accepted) = tokio::join!(dialled, listener.accept());
    (dialled.unwrap(), accepted.unwrap().0)
}

/// Two sockets with a slow line between them, which carries one byte at a time.
async fn slow_line() -> (TcpStream, TcpStream) {
    let (near, line) = sockets().await;
    let (far, other) = sockets().await;
    for socket in [&near, &line, &far, &other] {
        socket.set_nodelay(true).unwrap();
    }
    let ((from_near, to_near), (from_far, to_far)) = (line.into_split(), other.into_split());
    for (mut from, mut to) in [(from_near, to_far), (from_far, to_near)] {
        spawn_local(async move {
            while let Ok(byte) = from.read_u8().await {
                if to.write_u8(byte).await.is_err() {
                    return;
                }
            }
        });
    }
    (near, far)
}

/// Reads until `count` bytes of plaintext are there, or the peer has closed.
async fn receive(tcp: &TcpStream, established: &mut Established, count: usize) -> io::Result<Vec<u8>> {
    let mut data = std::mem::take(&mut established.plain);
    let mut out = Vec::new();
    while data.len() < count && !established.closed {
        read(tcp, &mut established.records, 64 * 1024).await?;
        let opened = established.session.open(&mut established.records, &mut data, &mut out);
        write(tcp, &out).await?;
        let opened = opened.map_err(invalid)?;
        established.records.drain(..opened.consumed);
        established.closed = opened.closed;
    }
    Ok(data)
}

async fn send(tcp: &TcpStream, established: &mut Established, data: &[u8]) {
    let mut out = Vec::new();
    for chunk in data.chunks(100_000) {
        out.clear();
        established.session.seal(chunk, &mut out).unwrap();
        write(tcp, &out).await.unwrap();
    }
}

/// Sends back what it gets, then says that it is done.
async fn echo(mut peer: impl AsyncReadExt + AsyncWriteExt + Unpin, mut count: usize) {
    let mut buffer = vec![0; 50_000];
    while count > 0 {
        let read = peer.read(&mut buffer).await.unwrap();
        peer.write_all(&buffer[..read]).await.unwrap();
        peer.flush().await.unwrap();
        count -= read;
    }
    peer.shutdown().await.unwrap();
}

/// Sends `count` bytes to an echo and takes them back, at the same time.
async fn converse(tcp: &TcpStream, mut established: Established, count: usize) {
    assert_eq!(established.session.state().alpn_protocol(), Some(ALPN));
    let data = bytes(count);
    let mut back = Vec::new();
    for chunk in data.chunks(30_000) {
        send(tcp, &mut established, chunk).await;
        back.extend(receive(tcp, &mut established, chunk.len()).await.unwrap());
    }
    back.extend(receive(tcp, &mut established, usize::MAX).await.unwrap());
    assert!(back == data && established.closed);
}

#[test]
fn a_client_and_tokio_rustls_exchange_a_mebibyte() {
    let mesh = Mesh::new();
    run(async {
        let (near, far) = sockets().await;
        let acceptor = TlsAcceptor::from(mesh.server());
        spawn_local(async move { echo(acceptor.accept(far).await.unwrap(), 1024 * 1024).await });
        let established = connect(&near, mesh.client(), server_name(), &Gate::default()).await.unwrap();
        assert_eq!(outrigger_certs::peer_identity(established.session.state()), Some(id("orders")));
        converse(&near, established, 1024 * 1024).await;
    });
}

#[test]
fn a_server_and_tokio_rustls_exchange_a_mebibyte() {
    let mesh = Mesh::new();
    run(async {
        let (near, far) = sockets().await;
        let connector = TlsConnector::from(mesh.client());
        spawn_local(async move {
            echo(connector.connect(server_name(), far).await.unwrap(), 1024 * 1024).await;
        });
        let established = accept(&near, mesh.server(), Vec::new(), &Gate::default()).await.unwrap();
        assert_eq!(outrigger_certs::peer_identity(established.session.state()), Some(id("web")));
        converse(&near, established, 1024 * 1024).await;
    });
}

#[test]
fn two_of_ours_understand_each_other_byte_by_byte() {
    let mesh = Mesh::new();
    run(async {
        let (near, far) = slow_line().await;
        let gate = Gate::default();
        let (client, server) = tokio::join!(
            connect(&near, mesh.client(), server_name(), &gate),
            accept(&far, mesh.server(), Vec::new(), &gate)
        );
        let (mut client, mut server) = (client.unwrap(), server.unwrap());
        for (established, peer) in [(&client, "orders"), (&server, "web")] {
            let state = established.session.state();
            assert_eq!(outrigger_certs::peer_identity(state), Some(id(peer)));
            assert_eq!(
                state.negotiated_key_exchange_group().unwrap().name(),
                rustls::NamedGroup::X25519MLKEM768
            );
        }
        send(&near, &mut client, b"ping").await;
        assert_eq!(receive(&far, &mut server, 4).await.unwrap(), b"ping");
        send(&far, &mut server, b"pong").await;
        assert_eq!(receive(&near, &mut client, 4).await.unwrap(), b"pong");
    });
}

#[test]
fn what_was_read_before_and_what_comes_with_the_last_flight_is_not_lost() {
    let mesh = Mesh::new();
    run(async {
        let (near, far) = sockets().await;
        let tls = UnbufferedClientConnection::new(mesh.client(), server_name()).unwrap();
        let mut client = Session::new(Connection::Client(Box::new(tls)));
        let mut first = Vec::new();
        client.advance(&mut [], &Wish::Open, &mut Vec::new(), &mut first).unwrap();
        spawn_local(async move {
            let (mut records, mut out) = (Vec::new(), Vec::new());
            while client.state().is_handshaking() {
                read(&far, &mut records, READ).await.unwrap();
                let done = client.advance(&mut records, &Wish::Open, &mut Vec::new(), &mut out).unwrap();
                records.drain(..done);
            }
            // One write: the last flight, a whole record, and the beginning of another, which never ends.
            client.seal(b"early bird", &mut out).unwrap();
            let end = out.len() + HEADER + 1;
            client.seal(b"late", &mut out).unwrap();
            write(&far, &out[..end]).await.unwrap();
        });
        let mut established = accept(&near, mesh.server(), first, &Gate::default()).await.unwrap();
        let data = receive(&near, &mut established, 10).await.unwrap();
        assert_eq!(data, b"early bird");
        let error = receive(&near, &mut established, 1).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(!established.closed);
    });
}

#[test]
fn a_close_notify_behind_the_last_flight_is_reported() {
    let mesh = Mesh::new();
    run(async {
        let (near, far) = sockets().await;
        let gate = Gate::default();
        let client = async {
            let mut client = connect(&far, mesh.client(), server_name(), &gate).await.unwrap();
            let mut out = Vec::new();
            client.session.close(&mut out);
            write(&far, &out).await.unwrap();
        };
        let (mut server, ()) =
            tokio::join!(async { accept(&near, mesh.server(), Vec::new(), &gate).await.unwrap() }, client);
        // It came with the flight or behind it.
        assert!(receive(&near, &mut server, 1).await.unwrap().is_empty());
        assert!(server.closed);
    });
}

#[test]
fn a_server_of_another_identity_is_refused_with_an_alert() {
    let mesh = Mesh::new();
    run(async {
        let (near, far) = sockets().await;
        let acceptor = TlsAcceptor::from(mesh.server());
        let config = mesh.credentials("web").client_config(&id("payments"), &[ALPN]).unwrap();
        let gate = Gate::default();
        let (ours, theirs) = tokio::join!(connect(&near, config, server_name(), &gate), acceptor.accept(far));
        let error = ours.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(refusal(&error), Some(Refusal::WrongIdentity));
        let alert = theirs.err().unwrap();
        assert!(alert.to_string().contains("alert"), "{alert}");
    });
}

#[test]
fn a_client_without_a_certificate_is_refused_with_an_alert() {
    let mesh = Mesh::new();
    run(async {
        let (near, far) = sockets().await;
        let config = mesh.credentials("web").bootstrap_config(&id("orders"), &[ALPN]);
        let gate = Gate::default();
        let client = async {
            let mut client = TlsConnector::from(config).connect(server_name(), far).await.unwrap();
            // In TLS 1.3 the client learns it with its first read.
            client.read_u8().await.unwrap_err()
        };
        let (ours, alert) = tokio::join!(accept(&near, mesh.server(), Vec::new(), &gate), client);
        assert_eq!(refusal(&ours.err().unwrap()), Some(Refusal::NoCertificate));
        assert!(alert.to_string().contains("alert"), "{alert}");
    });
}

#[test]
fn our_client_reads_the_servers_refusal_out_of_open() {
    let mesh = Mesh::new();
    run(async {
        let (near, far) = sockets().await;
        let config = mesh.credentials("web").bootstrap_config(&id("orders"), &[ALPN]);
        let gate = Gate::default();
        let (ours, theirs) = tokio::join!(
            async {
                let mut client = connect(&near, config, server_name(), &gate).await.unwrap();
                receive(&near, &mut client, 1).await.unwrap_err()
            },
            accept(&far, mesh.server(), Vec::new(), &gate)
        );
        assert!(theirs.is_err());
        let error = ours.get_ref().and_then(|error| error.downcast_ref::<Error>());
        assert_eq!(error, Some(&Error::AlertReceived(AlertDescription::CertificateRequired)));
    });
}

#[test]
fn what_is_no_tls_is_an_error_at_once() {
    let mesh = Mesh::new();
    run(async {
        let (near, far) = sockets().await;
        let gate = Gate::default();
        write(&far, b"HTTP/1.1 400 Bad Request\r\n").await.unwrap();
        let error = connect(&near, mesh.client(), server_name(), &gate).await.err().unwrap();
        let inner = error.get_ref().and_then(|error| error.downcast_ref::<Error>());
        assert!(matches!(inner, Some(Error::InvalidMessage(_))), "{error}");
        drop((near, far));

        let (near, far) = sockets().await;
        drop(far);
        let error = accept(&near, mesh.server(), Vec::new(), &gate).await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn a_handshake_without_an_end_is_refused() {
    let mesh = Mesh::new();
    run(async {
        let (near, far) = sockets().await;
        // A hello of 60,000 bytes, in records of 100.
        let hello = [[22, 3, 1, 0, 100, 1, 0, 0xea, 0x60].as_slice(), &[0; 96]].concat();
        let more = [[22, 3, 1, 0, 100].as_slice(), &[0; 100]].concat();
        spawn_local(async move {
            let _ = write(&far, &hello).await;
            while write(&far, &more).await.is_ok() {}
        });
        let error = accept(&near, mesh.server(), Vec::new(), &Gate::default()).await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    });
}

#[test]
fn no_request_waits_for_more_than_two_turns() {
    run(async {
        let gate = Rc::new(Gate::default());
        let log = Rc::new(RefCell::new(Vec::new()));
        let handshakes: Vec<_> = (0..20)
            .map(|_| {
                let (gate, log) = (gate.clone(), log.clone());
                spawn_local(async move {
                    for _ in 0..3 {
                        let turn = gate.admit().await.unwrap();
                        log.borrow_mut().push('h');
                        drop(turn);
                    }
                })
            })
            .collect();
        let requests = spawn_local({
            let log = log.clone();
            async move {
                loop {
                    log.borrow_mut().push('r');
                    yield_now().await;
                }
            }
        });
        for handshake in handshakes {
            handshake.await.unwrap();
        }
        requests.abort();
        let log: String = log.borrow().iter().collect();
        assert_eq!(log.matches('h').count(), 60);
        // Two, because tasks that have yielded go on in any order.
        assert!(!log.contains("hhh"), "{log}");
    });
}

#[test]
fn a_storm_of_handshakes_is_served_as_far_as_the_gate_admits_it() {
    const STORM: usize = 60;
    const MOST: usize = 40;
    let mesh = Mesh::new();
    run(async {
        let (client, server) = (mesh.client(), mesh.server());
        let gate = Rc::new(Gate::new(MOST));
        let mut pairs = Vec::new();
        for _ in 0..STORM {
            pairs.push(sockets().await);
        }
        let mut tasks = Vec::new();
        for (near, far) in pairs {
            let acceptor = TlsAcceptor::from(server.clone());
            spawn_local(async move {
                let mut peer = acceptor.accept(far).await?;
                peer.write_all(b"!").await?;
                peer.shutdown().await
            });
            let (client, gate) = (client.clone(), gate.clone());
            tasks.push(spawn_local(async move {
                let mut established = connect(&near, client, server_name(), &gate).await?;
                receive(&near, &mut established, usize::MAX).await
            }));
        }
        let (mut served, mut refused) = (0, 0);
        for task in tasks {
            match task.await.unwrap() {
                Ok(data) => {
                    assert_eq!(data, b"!");
                    served += 1;
                }
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
                    refused += 1;
                }
            }
        }
        assert_eq!((served, refused), (MOST, STORM - MOST));
        assert_eq!(gate.waiting.get(), 0);
        assert_eq!(gate.turns.available_permits(), 1);
    });
}

#[test]
fn a_handshake_that_is_given_up_gives_its_place_back() {
    let mesh = Mesh::new();
    run(async {
        let (near, _far) = sockets().await;
        let gate = Gate::new(2);
        let turn = gate.turn().await;
        {
            let waiting = connect(&near, mesh.client(), server_name(), &gate);
            assert!(timeout(Duration::from_millis(1), waiting).await.is_err());
        }
        assert_eq!(gate.waiting.get(), 0);
        drop(turn);
        // Nobody else speaks: it gets its turn, and then waits for the server for ever.
        let waiting = connect(&near, mesh.client(), server_name(), &gate);
        assert!(timeout(Duration::from_millis(1), waiting).await.is_err());
        assert_eq!((gate.waiting.get(), gate.turns.available_permits()), (0, 1));
    });
}
