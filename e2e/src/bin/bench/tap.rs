//! What two proxies agreed on in their handshake, read off the wire.
//!
//! A handshake's cost depends on its key exchange more than on anything else, and every library has defaults of its own. So
//! nobody's word is taken for it: one connection goes through a relay of ours, and the `ServerHello`, which TLS 1.3
//! sends in clear (RFC 8446, 4.1.3), names cipher suite and group.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    load::idle::{Held, Kind},
    peers::Tap,
};

/// A proxy that has not dialled by then does not.
const LIMIT: Duration = Duration::from_secs(10);

/// Cipher suite and key exchange, by their names at IANA.
pub(crate) fn negotiated(tap: &Tap) -> Result<(String, String)> {
    let relay = tap.relay.try_clone().context("sharing a listener")?;
    let server = tap.server;
    let reader = thread::spawn(move || -> Result<Vec<u8>> {
        relay.set_nonblocking(true).context("making a listener non-blocking")?;
        let end = Instant::now() + LIMIT;
        let client = loop {
            match relay.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if Instant::now() > end => return Err(error).context("nobody dialled the tap"),
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        };
        client.set_nonblocking(false).context("making a socket blocking")?;
        let server = TcpStream::connect(server).context("connecting to the server's proxy")?;
        let (from, to) = (client.try_clone()?, server.try_clone()?);
        let upload = thread::spawn(move || copy(from, to));
        let seen = copy(server, client);
        // What it copied is of no interest.
        let _ = upload.join();
        Ok(seen)
    });
    let exchange = Held::open(tap.entry, Kind::Bytes, 1).map(drop);
    let seen = reader.join().map_err(|_| anyhow::anyhow!("the tap panicked"))??;
    exchange.context("an exchange through the tap")?;
    let (suite, group) = server_hello(&seen)?;
    let suite = match suite {
        0x1301 => "TLS_AES_128_GCM_SHA256".to_owned(),
        0x1302 => "TLS_AES_256_GCM_SHA384".to_owned(),
        0x1303 => "TLS_CHACHA20_POLY1305_SHA256".to_owned(),
        other => format!("{other:#06x}"),
    };
    let group = match group {
        0x0017 => "SECP256R1".to_owned(),
        0x001d => "X25519".to_owned(),
        0x11ec => "X25519MLKEM768".to_owned(),
        other => format!("{other:#06x}"),
    };
    Ok((suite, group))
}

/// Copies until either end closes; returns what came.
fn copy(mut from: TcpStream, mut to: TcpStream) -> Vec<u8> {
    let (mut seen, mut scratch) = (Vec::new(), [0; 16 * 1024]);
    while let Ok(count @ 1..) = from.read(&mut scratch) {
        seen.extend_from_slice(&scratch[..count]);
        if to.write_all(&scratch[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
    seen
}

/// Cipher suite and group of the `ServerHello` that `bytes` begin with.
fn server_hello(bytes: &[u8]) -> Result<(u16, u16)> {
    /// The extension that holds the server's share (RFC 8446, 4.2.8).
    const KEY_SHARE: u16 = 51;
    let mut rest = bytes;
    let mut take = |count: usize| -> Result<&[u8]> {
        let (taken, left) = rest.split_at_checked(count).context("the server's first record is cut short")?;
        rest = left;
        Ok(taken)
    };
    let number = |bytes: &[u8]| bytes.iter().fold(0_u16, |sum, byte| sum << 8 | u16::from(*byte));
    // Record: type, version, length. Handshake: type, length.
    ensure!(take(5)?[0] == 22 && take(4)?[0] == 2, "the server's first record is no ServerHello");
    take(2 + 32)?;
    let session = take(1)?[0];
    take(usize::from(session))?;
    let suite = number(take(2)?);
    take(1)?;
    let mut left = usize::from(number(take(2)?));
    while left >= 4 {
        let kind = number(take(2)?);
        let length = usize::from(number(take(2)?));
        let body = take(length)?;
        if kind == KEY_SHARE {
            return Ok((suite, number(body.get(..2).context("an empty key share")?)));
        }
        left = left.saturating_sub(4 + length);
    }
    bail!("the ServerHello has no key share")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suite_and_group_of_a_server_hello_are_found_past_other_extensions() {
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([2, 9, 9]); // a session id
        body.extend([0x13, 0x01, 0]);
        let extensions = [0, 43, 0, 2, 3, 4, 0, 51, 0, 5, 0x11, 0xec, 0, 1, 5];
        body.extend([0, 15]);
        body.extend(extensions);
        let mut record = vec![22, 3, 3, 0, 0, 2, 0, 0, 0];
        record.extend(body);
        assert_eq!(server_hello(&record).unwrap(), (0x1301, 0x11ec));
        assert!(server_hello(&record[..40]).is_err());
    }
}
