//! What really went over the wire: a raw packet socket in the hub sees every frame between hosts.
//!
//! Each frame is seen several times on its way through the bridge. TCP streams are put together by sequence number,
//! so repetition does no harm.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::oneshot;

use crate::network::{Host, Network};

/// `ETH_P_ALL` (`linux/if_ether.h`): every protocol.
const EVERY_PROTOCOL: u16 = 0x0003;
/// Segmentation offload gives frames far beyond the MTU; 64 KiB is the protocol's own bound.
const FRAME_LIMIT: usize = 70_000;
/// Kernel buffer: bursts must not be lost, or a payload could slip by unseen.
const KERNEL_BUFFER: usize = 32 << 20;
/// The capture holds frames in memory; suites that capture send little.
const TOTAL_LIMIT: usize = 256 << 20;
/// How long the capture waits for a frame before it looks whether it shall stop.
const POLL_MS: u8 = 20;

/// A running capture.
pub struct Capture {
    stop: Arc<AtomicBool>,
    frames: oneshot::Receiver<anyhow::Result<Vec<Vec<u8>>>>,
}

/// A finished capture.
pub struct Captured {
    frames: Vec<Vec<u8>>,
}

/// One direction of a TCP connection.
#[derive(Clone, Debug)]
pub struct Flow {
    /// Sender.
    pub from: SocketAddr,
    /// Receiver.
    pub to: SocketAddr,
    /// What was sent, in order, up to the first byte that was not captured.
    pub bytes: Vec<u8>,
}

impl Capture {
    /// Starts to capture in the hub of `network`.
    pub async fn start(network: &Network) -> anyhow::Result<Self> {
        Self::on(network.hub()).await
    }

    /// Starts to capture on every interface of a host.
    pub async fn on(host: &Host) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (send, frames) = oneshot::channel();
        let stopped = Arc::clone(&stop);
        let open = || async move {
            let protocol = Protocol::from(i32::from(EVERY_PROTOCOL.to_be()));
            let socket =
                Socket::new(Domain::PACKET, Type::RAW, Some(protocol)).context("opening a packet socket")?;
            socket.set_recv_buffer_size(KERNEL_BUFFER).context("enlarging the packet socket's buffer")?;
            socket.set_nonblocking(true).context("making the packet socket non-blocking")?;
            // The socket stays in the hub's namespace wherever it is read.
            std::thread::spawn(move || drop(send.send(collect(socket, &stopped))));
            Ok(())
        };
        host.run(open).await?;
        Ok(Self { stop, frames })
    }

    /// Ends the capture.
    pub async fn stop(self) -> anyhow::Result<Captured> {
        self.stop.store(true, Ordering::Relaxed);
        let frames = self.frames.await.map_err(|_| anyhow!("the capture's thread died"))??;
        Ok(Captured { frames })
    }
}

fn collect(mut socket: Socket, stop: &AtomicBool) -> anyhow::Result<Vec<Vec<u8>>> {
    let (mut frames, mut total, mut buffer) = (Vec::new(), 0, vec![0; FRAME_LIMIT]);
    loop {
        match socket.read(&mut buffer) {
            Ok(length) => {
                total += length;
                anyhow::ensure!(total <= TOTAL_LIMIT, "captured more than {TOTAL_LIMIT} bytes");
                frames.push(buffer[..length].to_vec());
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                // Nothing is waiting: everything sent before `stop` has been read.
                if stop.load(Ordering::Relaxed) {
                    return Ok(frames);
                }
                let mut wait = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                poll(&mut wait, PollTimeout::from(POLL_MS)).context("waiting for frames")?;
            }
            Err(error) => return Err(error).context("reading a frame"),
        }
    }
}

impl Captured {
    /// Number of frames.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether nothing was captured.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Whether any frame holds these bytes.
    pub fn contains(&self, needle: &[u8]) -> bool {
        self.frames.iter().any(|frame| frame.windows(needle.len()).any(|window| window == needle))
            || self.flows().iter().any(|flow| flow.bytes.windows(needle.len()).any(|window| window == needle))
    }

    /// Every TCP stream of which the beginning was captured.
    pub fn flows(&self) -> Vec<Flow> {
        let mut streams: BTreeMap<(SocketAddr, SocketAddr, u32), BTreeMap<u32, &[u8]>> = BTreeMap::new();
        // (from, to) -> initial sequence number of the latest connection.
        let mut starts: BTreeMap<(SocketAddr, SocketAddr), u32> = BTreeMap::new();
        for frame in &self.frames {
            let Some(segment) = Segment::parse(frame) else { continue };
            let pair = (segment.from, segment.to);
            if segment.syn {
                starts.insert(pair, segment.sequence);
            }
            let Some(&start) = starts.get(&pair) else { continue };
            let stream = streams.entry((pair.0, pair.1, start)).or_default();
            // The SYN takes one number.
            let offset = segment.sequence.wrapping_sub(start).wrapping_sub(1);
            if !segment.payload.is_empty() {
                let known = stream.entry(offset).or_insert(segment.payload);
                if segment.payload.len() > known.len() {
                    *known = segment.payload;
                }
            }
        }
        streams
            .into_iter()
            .map(|((from, to, _), pieces)| Flow { from, to, bytes: assemble(&pieces) })
            .collect()
    }
}

fn assemble(pieces: &BTreeMap<u32, &[u8]>) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    for (&offset, piece) in pieces {
        let offset = offset as usize;
        if offset > bytes.len() {
            break;
        }
        let overlap = (bytes.len() - offset).min(piece.len());
        bytes.extend_from_slice(&piece[overlap..]);
    }
    bytes
}

struct Segment<'a> {
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    syn: bool,
    payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Ethernet, IPv4 (RFC 791) or IPv6 (RFC 8200) without extension headers, TCP (RFC 9293).
    fn parse(frame: &'a [u8]) -> Option<Self> {
        let kind = u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?);
        let packet = frame.get(14..)?;
        let (from, to, tcp): (IpAddr, IpAddr, &[u8]) = match kind {
            0x0800 => {
                let header = usize::from(packet.first()? & 0x0f) * 4;
                let total = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
                (*packet.get(9)? == 6).then_some(())?;
                let address =
                    |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
                // Total length 0: a segment of more than 64 KiB (BIG TCP).
                let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
                (address(12)?.into(), address(16)?.into(), packet.get(header..end)?)
            }
            0x86dd => {
                (*packet.get(6)? == 6).then_some(())?;
                let length = usize::from(u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?));
                let address =
                    |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
                let end = if length == 0 { packet.len() } else { (40 + length).min(packet.len()) };
                (address(8)?.into(), address(24)?.into(), packet.get(40..end)?)
            }
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Self {
            from: SocketAddr::new(from, port(0)?),
            to: SocketAddr::new(to, port(2)?),
            sequence: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
            syn: tcp.get(13)? & 0x02 != 0,
            payload: tcp.get(header..)?,
        })
    }
}

/// What a `ServerHello` agreed on (RFC 8446, section 4.1.3).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServerHello {
    /// `supported_versions`, or the legacy version where there is none: 0x0304 is TLS 1.3.
    pub version: u16,
    /// `key_share`: the named group, 0x11ec is X25519MLKEM768.
    pub group: Option<u16>,
    /// Cipher suite.
    pub suite: u16,
}

impl Flow {
    /// The TLS records of the flow by type (RFC 8446, section 5.1), or why it is not TLS.
    pub fn tls_records(&self) -> anyhow::Result<Vec<u8>> {
        let mut rest = self.bytes.as_slice();
        let mut types = Vec::new();
        while rest.len() >= 5 {
            let (kind, major) = (rest[0], rest[1]);
            anyhow::ensure!(
                (20..=23).contains(&kind) && major == 3,
                "{} -> {}: not a TLS record: {:02x?}",
                self.from,
                self.to,
                &rest[..rest.len().min(16)]
            );
            types.push(kind);
            let length = usize::from(u16::from_be_bytes([rest[3], rest[4]]));
            rest = rest.get(5 + length..).unwrap_or_default();
        }
        Ok(types)
    }

    /// The first `ServerHello` of the flow.
    pub fn server_hello(&self) -> Option<ServerHello> {
        let body = self.handshake(2)?;
        // Legacy version, random, session id, suite, compression, extensions.
        let session = usize::from(*body.get(34)?);
        let suite = u16_at(body, 35 + session)?;
        let mut version = u16_at(body, 0)?;
        let mut group = None;
        for (kind, data) in extensions(body.get(35 + session + 3..)?) {
            match kind {
                43 => version = u16_at(data, 0)?,
                51 => group = u16_at(data, 0),
                _ => {}
            }
        }
        Some(ServerHello { version, group, suite })
    }

    /// Versions that the `ClientHello` offers.
    pub fn offered_versions(&self) -> Option<Vec<u16>> {
        let body = self.handshake(1)?;
        let session = 34 + 1 + usize::from(*body.get(34)?);
        let suites = session + 2 + usize::from(u16_at(body, session)?);
        let compressions = suites + 1 + usize::from(*body.get(suites)?);
        let versions = extensions(body.get(compressions..)?).into_iter().find(|(kind, _)| *kind == 43)?.1;
        Some(versions.get(1..)?.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect())
    }

    /// The body of the first handshake message, if it is of this type.
    fn handshake(&self, kind: u8) -> Option<&[u8]> {
        // One record is enough here: hellos with a hybrid share are below 2 KiB and records hold 16.
        (*self.bytes.first()? == 22).then_some(())?;
        let record = self.bytes.get(5..)?;
        (*record.first()? == kind).then_some(())?;
        let length = u32::from_be_bytes([0, *record.get(1)?, *record.get(2)?, *record.get(3)?]) as usize;
        record.get(4..4 + length)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn extensions(block: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    let mut rest = block.get(2..).unwrap_or_default();
    while let (Some(kind), Some(length)) = (u16_at(rest, 0), u16_at(rest, 2)) {
        let Some(data) = rest.get(4..4 + usize::from(length)) else { break };
        found.push((kind, data));
        rest = &rest[4 + data.len()..];
    }
    found
}
