//! The goals: what a run is judged by.
//!
//! Each is one number, read from the rows, and two limits: the one that must hold and the one that is aimed at. A
//! goal whose peer did not run is not met: it was not shown.

use serde::Serialize;

use crate::{
    memory::{Both, Footprint},
    peers::Peer::{self, Envoy, Haproxy},
    samples::{Field, Samples, Spread},
};

/// One limit and what was measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Goal {
    pub(crate) name: &'static str,
    #[serde(rename = "goal")]
    pub(crate) limit: String,
    /// `None`: not measured.
    pub(crate) measured: Option<f64>,
    pub(crate) met: bool,
}

/// Which side of a limit is the good one.
#[derive(Clone, Copy)]
enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

struct Line {
    name: &'static str,
    must: Limit,
    aim: Limit,
    measured: Option<f64>,
}

const CPU: Field = |row| row.cpu_us;
const RATE: Field = |row| row.rate;
const P50: Field = |row| row.p50_us;

/// What must hold, and what is aimed at.
pub(crate) struct Goals {
    pub(crate) must: Vec<Goal>,
    pub(crate) aims: Vec<Goal>,
}

/// Judges `mesh`, our sidecars with policies or without, by a run. `same_exchange`: whether our handshake and Envoy's used
/// the same key exchange.
pub(crate) fn judge(mesh: Peer, samples: &Samples, footprints: &[Footprint], same_exchange: bool) -> Goals {
    use Limit::{AtLeast, AtMost};
    let median = |spread: Option<Spread>| spread.map(|spread| spread.median);
    let cpu = |case: &str, of: Peer| median(samples.ratio(case, CPU, mesh, of));
    let worst = |cases: &[&str]| {
        let ratios: Option<Vec<f64>> = cases.iter().map(|case| cpu(case, Haproxy)).collect();
        ratios?.into_iter().max_by(f64::total_cmp)
    };
    let best_unary = samples.best("grpc/unary", |peer| samples.spread("grpc/unary", peer, CPU));
    let best_added = samples.best("open/1000", |peer| samples.added("open/1000", P50, peer));
    let ours = footprints.iter().find(|footprint| footprint.peer == mesh.name());
    let held = |value: fn(&Footprint) -> Both| ours.map(|footprint| value(footprint).greatest());
    let line = |name, must, aim, measured| Line { name, must, aim, measured };
    let lines = [
        line(
            "HTTP/1.1, 32 connections: CPU, of HAProxy",
            AtMost(0.85),
            AtMost(0.70),
            cpu("http1/32", Haproxy),
        ),
        line(
            "HTTP/1.1, 128 connections: CPU, of HAProxy",
            AtMost(0.80),
            AtMost(0.63),
            cpu("http1/128", Haproxy),
        ),
        line(
            "HTTP/1.1, 1,000/s open loop: CPU, of HAProxy",
            AtMost(0.70),
            AtMost(0.52),
            cpu("open/1000", Haproxy),
        ),
        line(
            "HTTP/2 in, 4 x 32 streams: CPU, of HAProxy",
            AtMost(0.85),
            AtMost(0.60),
            cpu("http2/4x32", Haproxy),
        ),
        line(
            "16 and 64 KiB bodies, the worst of four: CPU, of HAProxy",
            AtMost(0.65),
            AtMost(0.50),
            worst(&["down/16k", "down/64k", "up/16k", "up/64k"]),
        ),
        line(
            "gRPC unary: CPU, of the best peer",
            AtMost(1.0),
            AtMost(0.70),
            best_unary.and_then(|best| cpu("grpc/unary", best)),
        ),
        line(
            "HTTP/1.1, 32 connections: requests/s, of HAProxy",
            AtLeast(1.2),
            AtLeast(1.5),
            median(samples.ratio("http1/32", RATE, mesh, Haproxy)),
        ),
        line(
            "HTTP/1.1, 1,000/s open loop: added p50, of the best peer",
            AtMost(0.90),
            AtMost(0.75),
            best_added.and_then(|best| median(samples.added_ratio("open/1000", P50, mesh, best))),
        ),
        line("L4, 1 KiB: CPU, of Envoy", AtMost(0.75), AtMost(0.67), cpu("l4/32", Envoy)),
        line("L4, bulk: CPU seconds per GiB, of Envoy", AtMost(1.0), AtMost(0.85), cpu("l4/bulk", Envoy)),
        line(
            "L4, full handshake, same key exchange: CPU, of Envoy",
            AtMost(0.80),
            AtMost(0.65),
            cpu("l4/handshake", Envoy).filter(|_| same_exchange),
        ),
        line(
            "KiB for an idle HTTP connection",
            AtMost(3.0),
            AtMost(1.5),
            held(|footprint| footprint.http1_connection_kib),
        ),
        line(
            "KiB for an idle L4 mutual-TLS connection, each side",
            AtMost(8.0),
            AtMost(6.0),
            held(|footprint| footprint.bytes_connection_kib),
        ),
        line(
            "process idle: resident, MiB",
            AtMost(12.0),
            AtMost(8.0),
            held(|footprint| footprint.idle_resident),
        ),
        line(
            "process idle: anonymous, MiB",
            AtMost(2.5),
            AtMost(1.2),
            held(|footprint| footprint.idle_anonymous),
        ),
        line(
            "anonymous after 1,000 connections sent at once and went idle, MiB",
            AtMost(16.0),
            AtMost(8.0),
            held(|footprint| footprint.burst_anonymous),
        ),
    ];
    let against = |limit: fn(&Line) -> Limit| lines.iter().map(|line| line.judged(limit(line))).collect();
    Goals { must: against(|line| line.must), aims: against(|line| line.aim) }
}

impl Line {
    fn judged(&self, limit: Limit) -> Goal {
        let (limit, met) = match limit {
            Limit::AtMost(most) => {
                (format!("<= {most}"), self.measured.is_some_and(|measured| measured <= most))
            }
            Limit::AtLeast(least) => {
                (format!(">= {least}"), self.measured.is_some_and(|measured| measured >= least))
            }
        };
        Goal { name: self.name, limit, measured: self.measured, met }
    }
}
