//! What is measured under load: the names that `--only` takes, and what each does.

/// One exchange of HTTP/1.1.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Exchange {
    /// No request body, 1 KiB back.
    Small,
    /// No request body, so many bytes back.
    Download(usize),
    /// So many bytes there, 2 back.
    Upload(usize),
}

/// One exchange of HTTP/2.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Call {
    /// No request body, 1 KiB back.
    Get,
    /// A gRPC message of 1 KiB each way, and trailers.
    Unary,
    /// The same on one stream that never ends.
    Streaming,
}

/// A load.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    /// HTTP/1.1, closed loop.
    Http1 { connections: usize, exchange: Exchange },
    /// HTTP/1.1, open loop.
    Paced { per_second: u32 },
    /// HTTP/2, closed loop; `streams` at once on each connection.
    Http2 { connections: usize, streams: usize, call: Call },
    /// 1 KiB there and back over TCP, closed loop.
    Bytes { connections: usize },
    /// One TCP download without end.
    Flood,
    /// 1 KiB there and back on a TCP connection of its own, so many at once.
    Handshakes { connections: usize },
}

/// A load with its name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// For people.
    pub(crate) title: &'static str,
    pub(crate) work: Work,
}

impl Case {
    /// Whether latency is the point: longer stretches, and quantiles in the table.
    pub(crate) fn is_paced(&self) -> bool {
        matches!(self.work, Work::Paced { .. })
    }

    /// Operations that are under way at once.
    pub(crate) fn at_once(&self) -> f64 {
        let count = match self.work {
            Work::Http1 { connections, .. }
            | Work::Bytes { connections }
            | Work::Handshakes { connections } => connections,
            Work::Http2 { connections, streams, .. } => connections * streams,
            // Few and far between; or a part of one.
            Work::Paced { .. } | Work::Flood => return 0.01,
        };
        #[expect(clippy::cast_precision_loss, reason = "thousands at most")]
        let count = count as f64;
        count
    }

    /// What one operation is.
    pub(crate) fn unit(&self) -> &'static str {
        match self.work {
            Work::Flood => "GiB",
            Work::Handshakes { .. } => "connection",
            Work::Http2 { call: Call::Streaming, .. } => "message",
            _ => "request",
        }
    }
}

const KIB: usize = 1024;

const fn small(connections: usize) -> Work {
    Work::Http1 { connections, exchange: Exchange::Small }
}

const fn body(exchange: Exchange) -> Work {
    Work::Http1 { connections: 32, exchange }
}

/// All of them, in the order of the table.
pub(crate) const CASES: &[Case] = &[
    case("http1/1", "HTTP/1.1, 1 KiB, 1 connection", small(1)),
    case("http1/4", "HTTP/1.1, 1 KiB, 4 connections", small(4)),
    case("http1/32", "HTTP/1.1, 1 KiB, 32 connections", small(32)),
    case("http1/128", "HTTP/1.1, 1 KiB, 128 connections", small(128)),
    case("http1/1000", "HTTP/1.1, 1 KiB, 1,000 connections", small(1000)),
    case("open/1000", "HTTP/1.1, 1 KiB, open loop, 1,000/s", Work::Paced { per_second: 1000 }),
    case("open/5000", "HTTP/1.1, 1 KiB, open loop, 5,000/s", Work::Paced { per_second: 5000 }),
    case("http2/4x32", "HTTP/2, 1 KiB, 4 connections x 32 streams", http2(32, Call::Get)),
    case("grpc/unary", "gRPC, unary, 1 KiB each way, 4 x 8", http2(8, Call::Unary)),
    case("grpc/stream", "gRPC, streaming, 1 KiB each way, 4 x 8", http2(8, Call::Streaming)),
    case("down/16k", "HTTP/1.1, 16 KiB down, 32 connections", body(Exchange::Download(16 * KIB))),
    case("down/64k", "HTTP/1.1, 64 KiB down, 32 connections", body(Exchange::Download(64 * KIB))),
    case("down/1m", "HTTP/1.1, 1 MiB down, 32 connections", body(Exchange::Download(KIB * KIB))),
    case("up/16k", "HTTP/1.1, 16 KiB up, 32 connections", body(Exchange::Upload(16 * KIB))),
    case("up/64k", "HTTP/1.1, 64 KiB up, 32 connections", body(Exchange::Upload(64 * KIB))),
    case("up/1m", "HTTP/1.1, 1 MiB up, 32 connections", body(Exchange::Upload(KIB * KIB))),
    case("l4/32", "TCP, 1 KiB each way, 32 connections", Work::Bytes { connections: 32 }),
    case("l4/bulk", "TCP, one download", Work::Flood),
    case(
        "l4/handshake",
        "TCP, a connection for each 1 KiB, 16 at once",
        Work::Handshakes { connections: 16 },
    ),
];

const fn case(name: &'static str, title: &'static str, work: Work) -> Case {
    Case { name, title, work }
}

const fn http2(streams: usize, call: Call) -> Work {
    Work::Http2 { connections: 4, streams, call }
}

/// The cases that one of `patterns` names: whole, or up to a final `*`. No pattern: all.
pub(crate) fn chosen(patterns: &[String]) -> Vec<&'static Case> {
    let matches = |name: &str, pattern: &str| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern,
    };
    let wanted =
        |case: &&Case| patterns.is_empty() || patterns.iter().any(|pattern| matches(case.name, pattern));
    CASES.iter().filter(wanted).collect()
}

/// In which of them what policies cost is measured.
pub(crate) const WITH_POLICIES: [&str; 4] = ["http1/32", "open/1000", "http2/4x32", "grpc/unary"];
