//! How many instructions an exchange costs, counted by valgrind: a figure without noise, in which a regression of a hundredth
//! shows. What the kernel does is not in it.
//!
//! `make instructions` prints each case beside the figure that is kept in `instructions.tsv`, and fails where one is larger by
//! more than a twentieth; `make instructions UPDATE=1` keeps the new ones.
//!
//! Each case runs twice under valgrind, for few exchanges and for more, and what the difference costs is divided by their
//! number. The cases of the proxy run a client and an application of a few lines with it, whose own part is measured in the
//! case "direct" and taken away. Policies are those of `make bench`; what all of them in force add to a request is bounded, too.

#![allow(clippy::unwrap_used, missing_docs)]
#![expect(clippy::print_stdout, reason = "its result is for people")]

#[path = "../../http/benches/exchange/mod.rs"]
#[allow(dead_code, reason = "shared with the codecs' benchmark, which uses the rest")]
mod exchange;
#[path = "../tests/data_path/support.rs"]
#[allow(dead_code, reason = "shared with the suite that owns it, which uses the rest")]
mod support;

use std::{
    collections::BTreeMap,
    fs,
    hint::black_box,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    sync::Arc,
};

use outrigger_api::v1;
use outrigger_core::model::Protocol;
use outrigger_http::{
    h1::{self, Asked},
    head::{RequestHead, ResponseHead},
};
use outrigger_policy::{
    Catalog, Object, Policies, Stored,
    catalog::{CatalogEndpoint, CatalogHealth, CatalogPort, CatalogProtocol, CatalogService},
    parse, resolve,
};
use support::{Ca, Pair, SERVICE, Sidecar, config, endpoint, id, told};

/// Exchanges of the two runs: behind the first, everything is warm; between them lie so many that what the start takes by chance (the
/// entropy of keys: a million instructions more or less) is nothing beside them.
const EXCHANGES: [u32; 2] = [200, 3_000];
/// A figure may be larger than the kept one by this factor: other processors have other code paths in libraries.
const TOLERANCE: f64 = 1.05;

/// What policies may add, as a factor. The aim is 1.1; 1.11 was measured, give or take 0.01 for how many requests a turn has.
const WITH_POLICIES: f64 = 1.13;

/// Ten of them, of every kind, about a service `backend` with HTTP on ports 1 and 2 and gRPC on port 5.
const POLICIES: &str = include_str!("../../../e2e/src/bin/bench/peers/policies.yaml");

const DIRECT: &str = "direct";
const AT_ONCE: &str = "proxy: HTTP/1.1, 1 KiB, 16 requests at once";
const AT_ONCE_WITH_POLICIES: &str = "proxy: HTTP/1.1, 1 KiB, 16 requests at once, ten policies";

/// A name, and what runs a number of exchanges.
type Case = (&'static str, fn(u32));

/// What is counted.
const CASES: [Case; 6] = [
    ("codec: HTTP/1.1, both heads read and written", codec_h1),
    ("codec: HTTP/2, request and response at both ends", codec_h2),
    (DIRECT, direct),
    ("proxy: HTTP/1.1, 1 KiB, one request at a time", one_by_one),
    (AT_ONCE, at_once),
    (AT_ONCE_WITH_POLICIES, at_once_with_policies),
];

fn main() {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next(), arguments.next()) {
        (Some("run"), Some(case), Some(count)) => {
            let (_, run) = CASES.iter().find(|(name, _)| *name == case).expect("a case");
            run(count.parse().unwrap());
        }
        _ => report(),
    }
}

fn report() {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/instructions.tsv");
    let old: BTreeMap<String, f64> = fs::read_to_string(&kept)
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .map(|(name, figure)| (name.to_owned(), figure.parse().unwrap()))
        .collect();
    let mut direct = 0.0;
    let (mut lines, mut grown) = (Vec::new(), Vec::new());
    let mut without = None;
    for (name, _) in CASES {
        let [few, more] = EXCHANGES.map(|count| collected(name, count));
        let mut each = (more - few) / f64::from(EXCHANGES[1] - EXCHANGES[0]);
        if name == DIRECT {
            direct = each;
            continue;
        }
        if name.starts_with("proxy") {
            each -= direct;
        }
        let ratio = old.get(name).map_or(1.0, |old| each / old);
        println!("{name:52} {each:>9.0} instructions, {ratio:.3} of what is kept");
        lines.push(format!("{name}\t{each:.0}\n"));
        if ratio > TOLERANCE {
            grown.push(name);
        }
        match (name, without) {
            (AT_ONCE, _) => without = Some(each),
            (AT_ONCE_WITH_POLICIES, Some(without)) => {
                let cost = each / without;
                println!("{:52} {cost:>9.3} of a request without, at most {WITH_POLICIES}", "ten policies");
                assert!(cost <= WITH_POLICIES, "policies cost more than they may");
            }
            _ => {}
        }
    }
    if std::env::var_os("UPDATE").is_some_and(|update| !update.is_empty()) {
        fs::write(kept, lines.concat()).unwrap();
    } else {
        assert!(grown.is_empty(), "more instructions than before: {grown:?}; UPDATE=1 keeps the new figures");
    }
}

/// All instructions of a run.
fn collected(case: &str, count: u32) -> f64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().unwrap())
        .args(["run", case, &count.to_string()])
        .output()
        .expect("valgrind is needed: apt-get install valgrind");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{case}: {said}");
    let collected = said.lines().find_map(|line| line.split_once("Collected : "));
    let (_, figure) = collected.unwrap_or_else(|| panic!("valgrind failed: {said}"));
    figure.trim().parse().unwrap()
}

fn codec_h1(count: u32) {
    let limits = h1::Limits { head_bytes: 64 << 10, fields: 100 };
    let mut answer = Vec::new();
    h1::write_response(&exchange::response(), h1::Framing::Length(128), &mut answer);
    let (mut request, mut response, mut out) = (RequestHead::default(), ResponseHead::default(), Vec::new());
    for _ in 0..count {
        out.clear();
        h1::Decoder::new(limits).request(black_box(exchange::REQUEST), &mut request).unwrap().unwrap();
        h1::write_request(&request, h1::Framing::Empty, &mut out);
        let mut decoder = h1::Decoder::new(limits);
        decoder.response(black_box(&answer), Asked::default(), &mut response).unwrap().unwrap();
        h1::write_response(&response, h1::Framing::Length(128), &mut out);
    }
}

fn codec_h2(count: u32) {
    let (request, response) = (exchange::request(), exchange::response());
    let (mut client, mut server) = exchange::pair(&response);
    for key in 0..u64::from(count) {
        client.connection.request(&request, true, key, &mut client.out).unwrap();
        exchange::carry(&mut client, &mut server, &response);
        client.connection.tick();
    }
}

/// An application that answers each request on each connection with 1 KiB.
fn application() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answer = [b"HTTP/1.1 200 OK\r\ncontent-length: 1024\r\n\r\n".as_slice(), &[b'x'; 1024]].concat();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, answer) = (stream.unwrap(), answer.clone());
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while matches!(stream.read(&mut buffer), Ok(1..)) {
                    let _ = stream.write_all(&answer);
                }
            });
        }
    });
    address
}

/// Sends `count` requests, `at_once` of them at the same time.
fn ask(address: SocketAddr, count: u32, at_once: u32) {
    let mut streams: Vec<_> = (0..at_once).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut buffer = [0; 4096];
    let mut answer = Vec::with_capacity(4096);
    for _ in 0..count / at_once {
        for stream in &mut streams {
            stream.write_all(exchange::REQUEST).unwrap();
        }
        for stream in &mut streams {
            answer.clear();
            while !answer.ends_with(&[b'x'; 1024]) {
                let read = stream.read(&mut buffer).unwrap();
                assert!(read > 0 && (!answer.is_empty() || buffer.starts_with(b"HTTP/1.1 200 OK\r\n")));
                answer.extend_from_slice(&buffer[..read]);
            }
        }
    }
}

fn direct(count: u32) {
    ask(application(), count, 1);
}

fn one_by_one(count: u32) {
    let pair = support::pair(application(), Protocol::Http1);
    ask(pair.address, count, 1);
}

fn at_once(count: u32) {
    let pair = support::pair(application(), Protocol::Http1);
    ask(pair.address, count, 16);
}

fn pair_with_policies(application: SocketAddr) -> Pair {
    let ca = Ca::new();
    let (server, inbound) = Sidecar::server(ca.context("server", config()), application);
    let (of_service, of_server) = resolved(inbound);
    told(&server.context, of_server);
    let mut service = support::policies(of_service);
    let bare = support::service(Protocol::Http1, vec![endpoint("one", inbound, Some(&id("server")))]);
    (service.ports, service.endpoints) = (bare.ports, bare.endpoints);
    let (client, address, _) = Sidecar::client(ca.context("client", config()), service);
    Pair { client, server, address, inbound }
}

/// What the policies come to for `SERVICE` and its one server at `inbound`.
fn resolved(inbound: SocketAddr) -> (v1::Service, v1::Inbound) {
    let name = SERVICE.split_once('.').unwrap().0;
    let text = POLICIES
        .replace("name: backend,", &format!("name: {name},"))
        .replace("name: backend}", &format!("name: {name}}}"))
        .replace("port: 1}", "port: 80}")
        .replace("port: 1,", "port: 80,");
    let stored = |object: Object| {
        (
            object.key(),
            Arc::new(Stored { revision: 1, created: 0, updated: 0, author: String::new(), object }),
        )
    };
    let objects = parse("policies.yaml", &text, "default").unwrap();
    let policies: Policies = objects.into_iter().map(|parsed| stored(parsed.object)).collect();
    assert_eq!(policies.len(), 10);
    let port = |port, protocol| CatalogPort { port, name: String::new(), protocol };
    let server = CatalogEndpoint {
        id: "one".to_owned(),
        address: inbound.ip(),
        ports: [(80, inbound.port())].into(),
        identity: Some(id("server").as_str().to_owned()),
        zone: String::new(),
        health: CatalogHealth::Healthy,
        labels: BTreeMap::new(),
        probes: Vec::new(),
    };
    let service = CatalogService {
        name: name.to_owned(),
        namespace: "default".to_owned(),
        ports: vec![
            port(80, CatalogProtocol::Http1),
            port(2, CatalogProtocol::Http2),
            port(5, CatalogProtocol::Grpc),
        ],
        endpoints: vec![server],
    };
    let catalog = Catalog { services: vec![service], ..Catalog::default() };
    let resolved = resolve(&policies, &catalog);
    let (of_service, of_server) =
        (resolved.service(SERVICE), resolved.inbound(id("server").as_str(), &catalog.workloads()));
    assert!(!of_service.routes.is_empty() && of_server.access.is_some() && !of_server.concurrency.is_empty());
    (
        v1::Service { routes: of_service.routes, traffic: of_service.traffic, ..v1::Service::default() },
        v1::Inbound {
            mode: of_server.mtls.into(),
            access: of_server.access,
            concurrency: of_server.concurrency,
            ..v1::Inbound::default()
        },
    )
}

fn at_once_with_policies(count: u32) {
    let pair = pair_with_policies(application());
    ask(pair.address, count, 16);
}
