//! Bytes through two sidecars.

use std::time::{Duration, Instant};

use outrigger_core::model::Protocol;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::*;

/// Reads to the end, then answers, then ends.
async fn answer_after_the_end(mut stream: TcpStream) {
    let mut question = Vec::new();
    stream.read_to_end(&mut question).await.unwrap();
    stream.write_all(format!("{} bytes", question.len()).as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
}

#[tokio::test]
async fn each_direction_ends_for_itself() {
    let app = tcp_app(answer_after_the_end).await;
    for protocol in [Protocol::Tcp, Protocol::Detect] {
        let pair = pair(app, protocol);
        let mut stream = TcpStream::connect(pair.address).await.unwrap();
        stream.write_all(&vec![0; 3_000_000]).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        soon("the answer", stream.read_to_string(&mut answer)).await.unwrap();
        assert_eq!(answer, "3000000 bytes");
        let metrics = pair.client.metrics();
        assert!(metrics.contains(r#"direction="outbound",kind="mesh_tcp"} 1"#), "{metrics}");
    }
}

#[tokio::test]
async fn a_server_that_speaks_first_waits_for_no_timeout() {
    let app = tcp_app(|mut stream| async move {
        stream.write_all(b"220 ready\r\n").await.unwrap();
        let mut line = [0; 6];
        stream.read_exact(&mut line).await.unwrap();
        stream.write_all(b"250 ok\r\n").await.unwrap();
    })
    .await;
    let pair = pair(app, Protocol::Detect);
    for _ in 0..3 {
        let begun = Instant::now();
        let mut stream = TcpStream::connect(pair.address).await.unwrap();
        let mut greeting = [0; 11];
        soon("the greeting", stream.read_exact(&mut greeting)).await.unwrap();
        assert_eq!(&greeting, b"220 ready\r\n");
        // Far below every detection time-out that is in use elsewhere, far above the early connect.
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        stream.write_all(b"QUIT\r\n").await.unwrap();
        let mut rest = String::new();
        soon("the answer", stream.read_to_string(&mut rest)).await.unwrap();
        assert_eq!(rest, "250 ok\r\n");
    }
    assert!(pair.client.metrics().contains(r#"outcome="server_first"} 3"#), "{}", pair.client.metrics());
}

#[tokio::test]
async fn a_silent_client_may_still_speak_http() {
    let app = http1_app(|_| async { http::Response::new(full("hello")) }).await;
    let pair = pair(app, Protocol::Detect);
    let mut stream = TcpStream::connect(pair.address).await.unwrap();
    // Until the early connection stands.
    eventually("the early connection", || {
        pair.client
            .metrics()
            .contains(r#"outrigger_connections_total{direction="outbound",kind="mesh_tcp"} 1"#)
    })
    .await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    soon("the answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("hello"), "{answer}");
    let metrics = pair.client.metrics();
    assert!(
        metrics.contains(r#"outrigger_connections_total{direction="outbound",kind="mesh_h2"} 1"#),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_reset_is_passed_on_as_a_reset() {
    let app = tcp_app(|mut stream| async move {
        let mut byte = [0];
        stream.read_exact(&mut byte).await.unwrap();
        stream.set_zero_linger().unwrap();
    })
    .await;
    let pair = pair(app, Protocol::Tcp);
    let mut stream = TcpStream::connect(pair.address).await.unwrap();
    stream.write_all(b"x").await.unwrap();
    let error = soon("the reset", stream.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn an_application_that_takes_no_connection_is_a_reset() {
    let pair = pair(nobody(), Protocol::Tcp);
    assert!(is_reset(pair.address).await);
}

#[tokio::test]
async fn silence_ends_after_the_idle_timeout() {
    let app = tcp_app(|mut stream| async move {
        let _ = stream.read(&mut [0; 8]).await;
    })
    .await;
    let pair = pair_with(app, Protocol::Tcp, |client| client.timeouts.idle = millis(200), |_| {});
    let mut stream = TcpStream::connect(pair.address).await.unwrap();
    let read = soon("the end", stream.read(&mut [0; 8])).await;
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}
