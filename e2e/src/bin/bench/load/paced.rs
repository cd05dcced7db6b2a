//! Open loop: requests are due at random times (a Poisson process), whether or not earlier ones came back, and latency
//! counts from when a request was *due*. A stall thus shows as many slow requests (no coordinated omission).

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};

use super::{Load, Stretch, http1, nanoseconds};
use crate::{cases::Exchange, poller::Poller};

/// Connections that due requests are spread over: enough that none waits for another at the rates in use.
const CONNECTIONS: usize = 32;
/// Requests that may wait for a connection. More is a path that cannot carry the rate.
const WAITING: usize = 20_000;
/// How long answers are waited for when the last request is out.
const DRAIN: Duration = Duration::from_secs(5);
/// Any; the same for all, so that every peer meets the same arrivals.
const SEED: u64 = 88_172_645_463_325_252;

pub(super) struct Paced {
    poller: Poller,
    clients: Vec<http1::Client>,
    idle: Vec<usize>,
    timer: TimerFd,
    request: Vec<u8>,
    interval: f64,
    random: u64,
    scratch: Vec<u8>,
}

impl Paced {
    pub(super) fn open(address: SocketAddr, per_second: u32) -> Result<Self> {
        let mut poller = Poller::new()?;
        let request = http1::request(Exchange::Small);
        let mut scratch = vec![0; 64 * 1024];
        let mut clients = Vec::new();
        // Each connection is used once at once: what is measured is requests, not what a proxy does about a client
        // that says nothing at first.
        for key in 0..CONNECTIONS {
            let mut client = http1::Client::connect(&poller, address, key)?;
            client.send(&poller, &request)?;
            let limit = Instant::now() + DRAIN;
            while poller.wait_until(limit)?.context("no answer on a new connection")? == 0
                || !client.turn(&poller, &mut scratch)?
            {}
            clients.push(client);
        }
        let timer =
            TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)
                .context("making a timer")?;
        poller.add(&timer, CONNECTIONS)?;
        Ok(Self {
            poller,
            clients,
            idle: (0..CONNECTIONS).collect(),
            timer,
            request,
            interval: 1.0 / f64::from(per_second),
            random: SEED,
            scratch,
        })
    }

    /// Time to the next arrival: exponentially distributed.
    fn gap(&mut self) -> Duration {
        // Marsaglia's xorshift: good enough for arrivals, and the same everywhere.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        #[expect(clippy::cast_precision_loss, reason = "53 bits")]
        let uniform = (self.random >> 11) as f64 / (1_u64 << 53) as f64;
        Duration::from_secs_f64(-(1.0 - uniform).ln() * self.interval)
    }

    fn arm(&self, due: Instant) -> Result<()> {
        // A time of zero would disarm it.
        let wait = due.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let once = Expiration::OneShot(TimeSpec::from_duration(wait));
        self.timer.set(once, TimerSetTimeFlags::empty()).context("setting a timer")
    }
}

impl Load for Paced {
    fn run(&mut self, end: Instant) -> Result<Stretch> {
        let begun = Instant::now();
        let mut latencies = Vec::new();
        let mut waiting: VecDeque<Instant> = VecDeque::new();
        let mut due = begun + self.gap();
        self.arm(due)?;
        loop {
            let now = Instant::now();
            let before = due;
            while due <= now && due < end {
                waiting.push_back(due);
                due += self.gap();
            }
            ensure!(waiting.len() < WAITING, "the path cannot carry the rate: {WAITING} requests wait");
            while let Some(at) = waiting.front().copied() {
                let Some(client) = self.idle.pop() else { break };
                waiting.pop_front();
                self.clients[client].begun = at;
                self.clients[client].send(&self.poller, &self.request)?;
            }
            if due >= end {
                if waiting.is_empty() && self.idle.len() == CONNECTIONS {
                    break;
                }
                ensure!(now < end + DRAIN, "answers are missing {DRAIN:?} after the last request");
            } else if due != before {
                self.arm(due)?;
            }
            let ready = self.poller.wait(Duration::from_millis(100))?;
            for at in 0..ready {
                let key = self.poller.key(at);
                if key == CONNECTIONS {
                    // Reads the timer, which is what takes it off the poller's list.
                    let _ = self.timer.wait();
                    if due < end && due > Instant::now() {
                        self.arm(due)?;
                    }
                    continue;
                }
                let client = &mut self.clients[key];
                if client.turn(&self.poller, &mut self.scratch)? {
                    latencies.push(nanoseconds(client.begun.elapsed()));
                    self.idle.push(key);
                }
            }
        }
        Ok(Stretch::of(begun, latencies))
    }
}
