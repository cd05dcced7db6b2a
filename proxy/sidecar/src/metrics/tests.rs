//! What is printed is what was counted, whatever threads did the counting and while they do it.

use std::{collections::BTreeMap, sync::atomic::AtomicBool, thread, time::Duration};

use proptest::prelude::*;

use super::{labels::MAX_SERIES, *};

const OK: Outcome = Outcome { protocol: "http1", code: 200, grpc_status: "", reason: "" };
const PEER: &str = "spiffe://a/ns/b/sa/c";

/// Series and values as printed.
fn printed(metrics: &Metrics) -> BTreeMap<String, String> {
    let text = metrics.encode();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            (series.to_owned(), value.to_owned())
        })
        .collect()
}

/// The series of one name, added up.
fn total(printed: &BTreeMap<String, String>, name: &str) -> u64 {
    let values = printed.iter().filter(|(series, _)| series.split('{').next() == Some(name));
    values.map(|(_, value)| value.parse::<u64>().unwrap()).sum()
}

#[test]
fn a_full_family_says_other() {
    let metrics = Metrics::default();
    for port in 0..u16::try_from(MAX_SERIES).unwrap() + 10 {
        metrics.unmeshed("192.0.2.1".parse().unwrap(), port, "plaintext");
    }
    assert!(metrics.encode().matches("outrigger_unmeshed_inbound_total{").count() <= MAX_SERIES + 1);
    assert!(metrics.encode().contains(r#"source="other",port="0",outcome="plaintext"} 10"#));
}

#[test]
fn edges_that_find_their_families_full_count_together_as_other() {
    let metrics = Metrics::default();
    for peer in 0..MAX_SERIES + 10 {
        let edge = metrics.edge(Direction::Inbound, "port:80", Some(&peer.to_string()));
        edge.request(OK, Duration::from_millis(1));
        edge.sent.inc_by(2);
    }
    let text = metrics.encode();
    let edge = r#"{direction="inbound",service="other",peer="other""#;
    let outcome = r#",protocol="http1",tls="mutual",code="200",grpc_status="",reason="""#;
    for wanted in [
        format!("outrigger_sent_bytes_total{edge}}} 20\n"),
        format!("outrigger_request_duration_seconds_count{edge}}} 10\n"),
        format!("outrigger_requests_total{edge}{outcome}}} 10\n"),
    ] {
        assert!(text.contains(&wanted), "{wanted}");
    }
}

#[test]
fn a_limit_of_connections_is_kept_and_given_back() {
    let metrics = Metrics::default();
    let first = metrics.admit(1);
    assert!(first.is_some());
    assert!(metrics.admit(1).is_none());
    drop(first);
    assert!(metrics.admit(1).is_some());
}

#[test]
fn an_edge_is_printed_as_prometheus_reads_it() {
    let metrics = Metrics::default();
    let edge = metrics.edge(Direction::Outbound, "orders.default", Some(PEER));
    edge.request(OK, Duration::from_millis(2));
    edge.sent.inc_by(7);
    let text = metrics.encode();
    let labels = r#"direction="outbound",service="orders.default",peer="spiffe://a/ns/b/sa/c""#;
    let mut wanted = vec![
        "# HELP outrigger_requests Requests answered.".to_owned(),
        "# TYPE outrigger_requests counter".to_owned(),
        format!(
            "outrigger_requests_total{{{labels},protocol=\"http1\",tls=\"mutual\",code=\"200\",\
             grpc_status=\"\",reason=\"\"}} 1"
        ),
        "# HELP outrigger_request_duration_seconds From the request's head to the response's head."
            .to_owned(),
        "# TYPE outrigger_request_duration_seconds histogram".to_owned(),
        format!("outrigger_request_duration_seconds_sum{{{labels}}} 0.002"),
        format!("outrigger_request_duration_seconds_count{{{labels}}} 1"),
    ];
    let below = ["0.0005", "0.001"].map(|le| (le, 0));
    let above = ["0.0025", "0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0"];
    let above = above.into_iter().chain(["10.0", "30.0", "+Inf"]).map(|le| (le, 1));
    wanted.extend(below.into_iter().chain(above).map(|(le, count)| {
        format!("outrigger_request_duration_seconds_bucket{{le=\"{le}\",{labels}}} {count}")
    }));
    wanted.extend([
        "# HELP outrigger_sent_bytes Bytes relayed to the peer.".to_owned(),
        "# TYPE outrigger_sent_bytes counter".to_owned(),
        format!("outrigger_sent_bytes_total{{{labels}}} 7"),
        "# HELP outrigger_received_bytes Bytes relayed from the peer.".to_owned(),
        "# TYPE outrigger_received_bytes counter".to_owned(),
        format!("outrigger_received_bytes_total{{{labels}}} 0"),
    ]);
    let got: Vec<&str> = text.lines().take(wanted.len()).collect();
    assert_eq!(got, wanted);
}

#[test]
fn outcomes_that_an_edge_no_longer_remembers_keep_their_counts() {
    let metrics = Metrics::default();
    let edge = metrics.edge(Direction::Outbound, "orders.default", None);
    for _ in 0..3 {
        for code in 100..200 {
            edge.request(Outcome { code, ..OK }, Duration::ZERO);
        }
    }
    let series = printed(&metrics);
    let requests = series.iter().filter(|(name, _)| name.starts_with("outrigger_requests_total"));
    let counts: Vec<&str> = requests.map(|(_, count)| &**count).collect();
    assert_eq!(counts, ["3"; 100]);
}

/// One thing that a thread does.
#[derive(Debug, Clone)]
enum Step {
    Request { edge: usize, outcome: usize, micros: u64 },
    Bytes { edge: usize, sent: u64, received: u64 },
    Pick { endpoint: usize },
    Forget { edge: usize },
}

const SERVICES: [&str; 3] = ["a.default", "b.default", "c.default"];

const OUTCOMES: [Outcome; 3] =
    [OK, Outcome { code: 503, reason: "no_endpoints", ..OK }, Outcome { protocol: "http2", ..OK }];

fn step() -> impl Strategy<Value = Step> {
    let edge = 0..SERVICES.len();
    prop_oneof![
        4 => (edge.clone(), 0..OUTCOMES.len(), 0..60_000_000_u64)
            .prop_map(|(edge, outcome, micros)| Step::Request { edge, outcome, micros }),
        2 => (edge.clone(), 0..1000_u64, 0..1000_u64)
            .prop_map(|(edge, sent, received)| Step::Bytes { edge, sent, received }),
        1 => (0..4_usize).prop_map(|endpoint| Step::Pick { endpoint }),
        1 => edge.prop_map(|edge| Step::Forget { edge }),
    ]
}

fn follow(metrics: &Metrics, steps: &[Step]) {
    let mut edges: [Option<Edge>; SERVICES.len()] = [None, None, None];
    let open = |at: usize| metrics.edge(Direction::Outbound, SERVICES[at], None);
    for step in steps {
        match *step {
            Step::Request { edge, outcome, micros } => edges[edge]
                .get_or_insert_with(|| open(edge))
                .request(OUTCOMES[outcome], Duration::from_micros(micros)),
            Step::Bytes { edge, sent, received } => {
                let edge = edges[edge].get_or_insert_with(|| open(edge));
                edge.sent.inc_by(sent);
                edge.received.inc_by(received);
            }
            Step::Pick { endpoint } => metrics.picks("a.default", &endpoint.to_string()).inc(),
            Step::Forget { edge } => edges[edge] = None,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn threads_that_share_series_print_what_one_thread_would(
        threads in prop::collection::vec(prop::collection::vec(step(), 0..60), 1..5)
    ) {
        let (together, alone) = (Metrics::default(), Metrics::default());
        thread::scope(|scope| {
            for steps in &threads {
                scope.spawn(|| follow(&together, steps));
            }
        });
        follow(&alone, &threads.concat());
        prop_assert_eq!(printed(&together), printed(&alone));
        // And not because both are wrong in the same way.
        let (mut requests, mut sent, mut picks) = (0, 0, 0);
        for step in threads.iter().flatten() {
            match step {
                Step::Request { .. } => requests += 1,
                Step::Bytes { sent: n, .. } => sent += n,
                Step::Pick { .. } => picks += 1,
                Step::Forget { .. } => {}
            }
        }
        let series = printed(&together);
        prop_assert_eq!(total(&series, "outrigger_requests_total"), requests);
        prop_assert_eq!(total(&series, "outrigger_request_duration_seconds_count"), requests);
        prop_assert_eq!(total(&series, "outrigger_sent_bytes_total"), sent);
        prop_assert_eq!(total(&series, "outrigger_balancer_picks_total"), picks);
    }
}

#[test]
fn scrapes_amid_the_counting_agree_with_themselves_and_never_go_back() {
    const THREADS: u32 = 3;
    const ROUNDS: u32 = 400;
    const REQUESTS: u32 = 100;
    let metrics = Metrics::default();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..ROUNDS {
                        // Dropped in each round: scrapes meet cells that are being handed over.
                        let edge = metrics.edge(Direction::Outbound, "orders.default", None);
                        for micros in 0..REQUESTS {
                            edge.request(OK, Duration::from_micros(u64::from(micros) * 20));
                            edge.sent.inc_by(1);
                        }
                    }
                })
            })
            .collect();
        let scraper = scope.spawn(|| {
            let mut before = BTreeMap::new();
            loop {
                let last = done.load(Ordering::Acquire);
                let now = printed(&metrics);
                for (series, was) in &before {
                    let [was, is] = [was, &now[series]].map(|value| value.parse::<f64>().unwrap());
                    assert!(is >= was, "{series} went back from {was} to {is}");
                }
                let of = |part: &str| {
                    let mut found = now.iter().filter(|(series, _)| series.contains(part));
                    found.next().map_or(0, |(_, value)| value.parse::<u64>().unwrap())
                };
                assert_eq!(of("duration_seconds_count"), of("le=\"+Inf\""));
                assert!(of("le=\"0.0005\"") <= of("le=\"0.001\""));
                if last {
                    return now;
                }
                before = now;
            }
        });
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, Ordering::Release);
        let end = scraper.join().unwrap();
        let counted = u64::from(THREADS * ROUNDS * REQUESTS);
        assert_eq!(total(&end, "outrigger_requests_total"), counted);
        assert_eq!(total(&end, "outrigger_request_duration_seconds_count"), counted);
        assert_eq!(total(&end, "outrigger_sent_bytes_total"), counted);
    });
}
