//! Who talks to whom, how well, and proved by what: read from the sidecars' own metrics.
//!
//! The demo shows nothing that a Prometheus server could not: an edge is the sum of what the client's sidecars say of
//! it, and rates and quantiles are of the time between two looks.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context, Result};
use comfy_table::{Table, presets};
use tokio::time::Instant;

use super::{
    app::Next,
    metrics::{Sample, parse, quantile},
    plan::Replica,
};

/// How long a sidecar's admin port may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// Client's service, server's service.
type Edge = (String, String);

/// What the sidecars of one edge have counted since they started.
#[derive(Debug, Clone, Default)]
struct Counted {
    requests: f64,
    succeeded: f64,
    /// Upper bound in seconds, as bits, so that it can be a key -> cumulative count.
    buckets: BTreeMap<u64, f64>,
    own: BTreeSet<String>,
    peer: BTreeSet<String>,
    tls: BTreeSet<String>,
}

/// Looks at the sidecars again and again.
pub(super) struct Watcher {
    last: BTreeMap<(String, Edge), Counted>,
    looked: Instant,
}

impl Watcher {
    pub(super) fn new() -> Self {
        Self { last: BTreeMap::new(), looked: Instant::now() }
    }

    /// The table of edges since the last call. A sidecar that does not answer is left out: the demo kills some.
    pub(super) async fn table(&mut self, replicas: &[Replica]) -> String {
        let mut now: BTreeMap<(String, Edge), Counted> = BTreeMap::new();
        for replica in replicas {
            let Ok(text) = fetch(replica, "/metrics").await else { continue };
            for (edge, counted) in count(replica.service, &parse(&text)) {
                now.insert((replica.name.clone(), edge), counted);
            }
        }
        let seconds = self.looked.elapsed().as_secs_f64();
        self.looked = Instant::now();
        let mut edges: BTreeMap<Edge, Counted> = BTreeMap::new();
        for (key, counted) in &now {
            let before = self.last.get(key).cloned().unwrap_or_default();
            edges.entry(key.1.clone()).or_default().add_change(&before, counted);
        }
        self.last = now;
        render(&edges, seconds)
    }
}

/// A page of a replica's sidecar.
pub(super) async fn fetch(replica: &Replica, path: &str) -> Result<String> {
    let get = async { Next::new(replica.admin.to_string()).get(path).await };
    let (status, (_, body)) = tokio::time::timeout(DEADLINE, get)
        .await
        .with_context(|| format!("the sidecar of {} does not answer {path}", replica.name))??;
    let body = String::from_utf8_lossy(&body).into_owned();
    anyhow::ensure!(
        status.is_success(),
        "the sidecar of {} answers {path} with {status}: {}",
        replica.name,
        body.trim()
    );
    Ok(body)
}

fn count(client: &str, samples: &[Sample]) -> BTreeMap<Edge, Counted> {
    let mut edges: BTreeMap<Edge, Counted> = BTreeMap::new();
    for sample in samples.iter().filter(|sample| sample.label("direction") == "outbound") {
        let server = sample.label("service").split('.').next().unwrap_or_default();
        let edge = edges.entry((client.to_owned(), server.to_owned())).or_default();
        match sample.name.as_str() {
            "outrigger_requests_total" => {
                edge.requests += sample.value;
                if sample.label("code").starts_with('2') {
                    edge.succeeded += sample.value;
                }
            }
            "outrigger_request_duration_seconds_bucket" => {
                let bound: f64 = match sample.label("le") {
                    "+Inf" => f64::INFINITY,
                    number => number.parse().unwrap_or(f64::INFINITY),
                };
                *edge.buckets.entry(bound.to_bits()).or_default() += sample.value;
            }
            "outrigger_connection_info" if sample.value > 0.0 => {
                edge.own.insert(short(sample.label("own")));
                edge.peer.insert(short(sample.label("peer")));
                edge.tls.insert(format!("{} {}", sample.label("tls_version"), sample.label("key_exchange")));
            }
            _ => {}
        }
    }
    edges.retain(|_, counted| counted.requests > 0.0);
    edges
}

/// The parts of a SPIFFE id that differ inside one mesh: namespace and service account.
fn short(identity: &str) -> String {
    let parts =
        identity.strip_prefix("spiffe://outrigger.local/ns/").and_then(|rest| rest.split_once("/sa/"));
    parts.map_or_else(|| identity.to_owned(), |(namespace, account)| format!("{namespace}/{account}"))
}

impl Counted {
    fn add_change(&mut self, before: &Self, after: &Self) {
        // A sidecar that was restarted counts from zero again.
        let change = |before: f64, after: f64| if after >= before { after - before } else { after };
        self.requests += change(before.requests, after.requests);
        self.succeeded += change(before.succeeded, after.succeeded);
        for (bound, value) in &after.buckets {
            let earlier = before.buckets.get(bound).copied().unwrap_or_default();
            *self.buckets.entry(*bound).or_default() += change(earlier, *value);
        }
        self.own.extend(after.own.iter().cloned());
        self.peer.extend(after.peer.iter().cloned());
        self.tls.extend(after.tls.iter().cloned());
    }
}

fn render(edges: &BTreeMap<Edge, Counted>, seconds: f64) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(["FROM", "TO", "RATE", "SUCCESS", "P50", "P99", "CLIENT", "SERVER", "TLS"]);
    let join = |set: &BTreeSet<String>| set.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    for ((client, server), counted) in edges {
        let buckets: Vec<(f64, f64)> =
            counted.buckets.iter().map(|(bound, value)| (f64::from_bits(*bound), *value)).collect();
        let latency =
            |q| quantile(q, &buckets).map_or_else(|| "-".to_owned(), |s| format!("{:.1} ms", s * 1e3));
        let success = if counted.requests > 0.0 {
            format!("{:.2} %", 100.0 * counted.succeeded / counted.requests)
        } else {
            "-".to_owned()
        };
        table.add_row([
            client.clone(),
            server.clone(),
            format!("{:.0}/s", counted.requests / seconds),
            success,
            latency(0.5),
            latency(0.99),
            join(&counted.own),
            join(&counted.peer),
            join(&counted.tls),
        ]);
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &str = r#"
outrigger_requests_total{direction="outbound",service="orders.default",peer="p",code="200"} 90
outrigger_requests_total{direction="outbound",service="orders.default",peer="p",code="503"} 10
outrigger_requests_total{direction="inbound",service="port:80",peer="p",code="200"} 7
outrigger_request_duration_seconds_bucket{direction="outbound",service="orders.default",peer="p",le="0.001"} 50
outrigger_request_duration_seconds_bucket{direction="outbound",service="orders.default",peer="p",le="+Inf"} 100
outrigger_connection_info{direction="outbound",service="orders.default",own="spiffe://outrigger.local/ns/default/sa/web",peer="spiffe://outrigger.local/ns/default/sa/orders",tls_version="1.3",key_exchange="X25519MLKEM768"} 2
"#;

    #[test]
    fn an_edge_is_what_its_client_counted() {
        let edges = count("web", &parse(METRICS));
        let mut change = Counted::default();
        change.add_change(&Counted::default(), &edges[&("web".to_owned(), "orders".to_owned())]);
        let shown = render(&BTreeMap::from([(("web".to_owned(), "orders".to_owned()), change)]), 2.0);
        insta::assert_snapshot!(shown.lines().map(str::trim_end).collect::<Vec<_>>().join("\n"), @r"
         FROM  TO      RATE  SUCCESS  P50     P99     CLIENT       SERVER          TLS
         web   orders  50/s  90.00 %  1.0 ms  1.0 ms  default/web  default/orders  1.3 X25519MLKEM768
        ");
        assert_eq!(edges.len(), 1);
    }

    #[test]
    fn a_restarted_sidecar_counts_from_zero() {
        let before = Counted { requests: 100.0, ..Counted::default() };
        let after = Counted { requests: 4.0, ..Counted::default() };
        let mut change = Counted::default();
        change.add_change(&before, &after);
        assert!((change.requests - 4.0).abs() < 1e-9);
    }
}
