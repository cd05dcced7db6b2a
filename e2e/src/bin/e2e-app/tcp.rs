//! Servers that speak no HTTP.

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// What [`banner`] says before the client said anything.
const BANNER: &[u8] = b"220 ready when you are\r\n";

/// Echoes until the peer closes its side, then closes ours.
pub(crate) async fn echo(mut stream: TcpStream) -> anyhow::Result<()> {
    let (mut from, mut to) = stream.split();
    tokio::io::copy(&mut from, &mut to).await.context("echoing")?;
    to.shutdown().await.context("closing our side")
}

/// Speaks first, then echoes.
pub(crate) async fn banner(mut stream: TcpStream) -> anyhow::Result<()> {
    stream.write_all(BANNER).await.context("saying hello")?;
    echo(stream).await
}

/// Answers the first bytes, closes its side, and goes on reading: the peer's half stays open. Prints how much
/// it still read.
pub(crate) async fn close_first(mut stream: TcpStream) -> anyhow::Result<()> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await.context("reading the first bytes")?;
    stream.write_all(b"bye\n").await.context("answering")?;
    stream.shutdown().await.context("closing our side")?;
    let mut rest = Vec::new();
    stream.take(16 << 20).read_to_end(&mut rest).await.context("reading the peer's half")?;
    println!("close-first: read {} bytes after closing", rest.len());
    Ok(())
}

/// Reads one byte and resets the connection.
pub(crate) async fn reset(mut stream: TcpStream) -> anyhow::Result<()> {
    stream.read_u8().await.context("reading the first byte")?;
    stream.set_zero_linger().context("asking for a reset")?;
    Ok(())
}
