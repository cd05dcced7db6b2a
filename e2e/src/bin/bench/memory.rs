//! Memory, start and size: each from a fresh stack of its own, because what a process once held it seldom gives back.

use std::{fs, thread, time::Duration};

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::{
    load::idle::{Held, Kind},
    peers::{Peer, Sides, Site, Stack},
    ports::Ports,
    process::Memory,
};

/// Idle connections: what a busy sidecar has.
const CONNECTIONS: u32 = 1000;
/// Requests on all of them at once, so many times.
const BURSTS: usize = 3;
/// From the last byte to the reading. What a process gives back with a delay shall count as given back.
const SETTLE: Duration = Duration::from_secs(3);

/// What one peer holds. Sizes in MiB, or KiB where the name says so.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Footprint {
    pub(crate) peer: &'static str,
    /// Milliseconds from the start of the client's proxy to the first answer through both.
    pub(crate) ready_ms: Vec<f64>,
    /// Of the executable.
    pub(crate) binary: f64,
    pub(crate) idle_resident: Both,
    pub(crate) idle_anonymous: Both,
    /// For each idle HTTP/1.1 connection of the client, anonymous.
    pub(crate) http1_connection_kib: Both,
    /// For each idle mutual-TLS connection that carries bytes, anonymous.
    pub(crate) bytes_connection_kib: Both,
    /// After all connections had sent at once and went idle.
    pub(crate) burst_anonymous: Both,
}

/// A figure of the client's proxy and the server's.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Both {
    pub(crate) client: f64,
    pub(crate) server: f64,
}

impl Both {
    /// The greater one.
    pub(crate) fn greatest(self) -> f64 {
        self.client.max(self.server)
    }
}

/// Measures a peer; it must have proxies.
pub(crate) fn measure(site: &Site<'_>, ports: &mut Ports, peer: Peer, settle: bool) -> Result<Footprint> {
    let settle = if settle { SETTLE } else { SETTLE / 3 };
    let mut ready_ms = Vec::new();
    let mut start = || -> Result<Stack> {
        let stack = Stack::start(site, ports, peer)?;
        ready_ms.push(stack.ready.unwrap_or_default().as_secs_f64() * 1e3);
        Ok(stack)
    };
    let read = |stack: &Stack| -> Result<Sides<Memory>> {
        thread::sleep(settle);
        stack.memory()?.context("a direct path holds nothing")
    };

    let stack = start()?;
    let idle = read(&stack)?;
    let held = Held::open(stack.entries.http1, Kind::Http1, CONNECTIONS as usize)?;
    let http1 = read(&stack)?;
    drop((held, stack));

    let stack = start()?;
    drop(Held::open(stack.entries.bytes, Kind::Bytes, 1)?);
    let before = read(&stack)?;
    let held = Held::open(stack.entries.bytes, Kind::Bytes, CONNECTIONS as usize)?;
    let bytes = read(&stack)?;
    drop((held, stack));

    let stack = start()?;
    let mut held = Held::open(stack.entries.http1, Kind::Http1, CONNECTIONS as usize)?;
    for _ in 0..BURSTS {
        held.burst()?;
    }
    let burst = read(&stack)?;
    drop((held, stack));

    let program = site.programs.of(peer)?;
    let binary = fs::metadata(&program).with_context(|| format!("reading {}", program.display()))?.len();
    Ok(Footprint {
        peer: peer.name(),
        ready_ms,
        binary: mib(binary),
        idle_resident: both(idle, |memory| mib(memory.resident)),
        idle_anonymous: both(idle, |memory| mib(memory.anonymous)),
        http1_connection_kib: each(idle, http1),
        bytes_connection_kib: each(before, bytes),
        burst_anonymous: both(burst, |memory| mib(memory.anonymous)),
    })
}

/// What a connection added, in KiB of anonymous memory.
fn each(before: Sides<Memory>, after: Sides<Memory>) -> Both {
    let added = |before: Memory, after: Memory| {
        (mib(after.anonymous) - mib(before.anonymous)) * 1024.0 / f64::from(CONNECTIONS)
    };
    Both { client: added(before.client, after.client), server: added(before.server, after.server) }
}

fn both(sides: Sides<Memory>, value: impl Fn(Memory) -> f64) -> Both {
    Both { client: value(sides.client), server: value(sides.server) }
}

fn mib(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "sizes far below 2^52")]
    let bytes = bytes as f64;
    bytes / f64::from(1 << 20)
}
