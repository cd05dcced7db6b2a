//! HTTP/1.1 by hand, for what a library would tidy: the answer's body is the request's head exactly as it arrived.

use anyhow::{Context as _, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Longest head; the suites send up to 60 KiB of headers.
const HEAD_LIMIT: usize = 256 * 1024;

/// Serves requests one after the other until the peer closes. A path that starts with `/interim` gets a 103 first;
/// `/close` is answered without a length, the end of the connection being the end of the body; `/not-modified` with a
/// 304 that has a length, and no body.
pub(crate) async fn serve(mut stream: TcpStream) -> anyhow::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            if buffer.len() > HEAD_LIMIT {
                bail!("a head of more than {HEAD_LIMIT} bytes");
            }
            if stream.read_buf(&mut buffer).await.context("reading a head")? == 0 {
                return Ok(());
            }
        };
        let head: Vec<u8> = buffer.drain(..end).collect();
        let text = String::from_utf8_lossy(&head).into_owned();
        let length = content_length(&text)?;
        while buffer.len() < length {
            if stream.read_buf(&mut buffer).await.context("reading a body")? == 0 {
                bail!("the peer closed inside a body");
            }
        }
        buffer.drain(..length);
        let path = text.split(' ').nth(1).unwrap_or_default();
        if path.starts_with("/interim") {
            let hints = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n";
            stream.write_all(hints).await.context("sending an interim response")?;
        }
        if path.starts_with("/not-modified") {
            let head =
                b"HTTP/1.1 304 Not Modified\r\nETag: \"v1\"\r\nContent-Length: 1234\r\nX-Last: 1\r\n\r\n";
            stream.write_all(head).await.context("sending a 304")?;
            continue;
        }
        let until_close = path.starts_with("/close");
        let framing = if until_close {
            "Connection: close".to_owned()
        } else {
            format!("Content-Length: {}", head.len())
        };
        // Two fields of one name apart from each other, odd case, an empty value: all of it has to arrive.
        let response = format!(
            "HTTP/1.1 200 Fine By Me\r\nX-One: 1\r\nx-TWO: a\r\n{framing}\r\nX-one: 2\r\nX-Empty:\r\n\r\n"
        );
        stream.write_all(response.as_bytes()).await.context("sending a head")?;
        stream.write_all(&head).await.context("sending a body")?;
        if until_close {
            return Ok(());
        }
    }
}

fn content_length(head: &str) -> anyhow::Result<usize> {
    let value = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().to_owned())
    });
    value.map_or(Ok(0), |value| value.parse().with_context(|| format!("a content-length of {value:?}")))
}
