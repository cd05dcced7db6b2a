//! What the codecs cost: the heads of a small request and of its response, as a proxy sees them thousands of times a
//! second.
//!
//! `cargo bench -p outrigger-http`

use criterion::{Criterion, criterion_group, criterion_main};
use outrigger_http::h1;
use outrigger_http::h2::{Budget, Config, Connection, Event, Heads, Role, StreamId};
use outrigger_http::head::{RequestHead, ResponseHead};
use std::hint::black_box;

const REQUEST: &[u8] = b"GET /api/v1/items/4711?fields=name,price HTTP/1.1\r\n\
    Host: shop.default.svc.cluster.local:8080\r\n\
    User-Agent: benchmark/1.0\r\n\
    Accept: application/json\r\n\
    Accept-Encoding: gzip, deflate\r\n\
    X-Request-Id: 7b1c9a52-5f0e-4f5c-9b42-2f1d7a0f3c11\r\n\
    Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n\
    \r\n";

const BODY: &[u8] = &[b'x'; 128];

fn request() -> RequestHead {
    let mut head = RequestHead::default();
    let limits = h1::Limits { head_bytes: 64 << 10, fields: 100 };
    h1::Decoder::new(limits).request(REQUEST, &mut head).expect("a good request");
    head
}

fn response() -> ResponseHead {
    let mut head = ResponseHead::default();
    head.status = 200;
    head.fields.push(b"Content-Type", b"application/json");
    head.fields.push(b"Content-Length", b"128");
    head.fields.push(b"Date", b"Tue, 24 Nov 2026 10:00:00 GMT");
    head.fields.push(b"Server", b"shop/2.1");
    head
}

fn config(role: Role) -> Config {
    Config {
        role,
        streams: 100,
        stream_window: 256 << 10,
        connection_window: 4 << 20,
        frame_bytes: 64 << 10,
        head_bytes: 64 << 10,
        fields: 100,
        extended_connect: true,
        budget: Budget { resets: 100, errors: 100, frames: 1000 },
    }
}

/// One end of an HTTP/2 connection.
struct End {
    connection: Connection,
    heads: Heads,
    out: Vec<u8>,
}

impl End {
    fn new(role: Role) -> Self {
        let mut out = Vec::new();
        let connection = Connection::new(&config(role), &mut out);
        Self { connection, heads: Heads::default(), out }
    }

    /// Receives all of `input` and answers requests.
    fn receive(&mut self, input: &[u8], response: &ResponseHead) {
        let mut at = 0;
        loop {
            let received = self.connection.receive(&input[at..], &mut self.heads, &mut self.out);
            let (used, event) = received.expect("a good peer");
            at += used;
            match event {
                Event::More => return,
                Event::Request { id, .. } => self.answer(id, response),
                Event::Data { id, data, .. } => {
                    self.connection.release(id, black_box(data).len(), &mut self.out);
                }
                _ => {}
            }
        }
    }

    fn answer(&mut self, id: StreamId, response: &ResponseHead) {
        self.connection.attach(id, u64::from(id));
        self.connection.response(id, response, false, &mut self.out);
        self.connection.data(id, BODY, true, &mut self.out);
    }
}

/// A client and a server that have greeted each other.
fn pair(response: &ResponseHead) -> (End, End) {
    let (mut client, mut server) = (End::new(Role::Client), End::new(Role::Server));
    for _ in 0..3 {
        carry(&mut client, &mut server, response);
    }
    (client, server)
}

/// One round trip of all that is to be sent.
fn carry(client: &mut End, server: &mut End, response: &ResponseHead) {
    server.receive(&client.out, response);
    client.out.clear();
    client.receive(&server.out, response);
    server.out.clear();
}

fn http1(c: &mut Criterion) {
    let limits = h1::Limits { head_bytes: 64 << 10, fields: 100 };
    let mut head = RequestHead::default();
    c.bench_function("h1: read a request", |b| {
        b.iter(|| h1::Decoder::new(limits).request(black_box(REQUEST), &mut head));
    });
    let mut out = Vec::new();
    c.bench_function("h1: write a request", |b| {
        b.iter(|| {
            out.clear();
            h1::write_request(black_box(&head), h1::Framing::Empty, &mut out);
        });
    });
    let response = response();
    c.bench_function("h1: write a response", |b| {
        b.iter(|| {
            out.clear();
            h1::write_response(black_box(&response), h1::Framing::Length(128), &mut out);
        });
    });
}

fn http2(c: &mut Criterion) {
    let (request, response) = (request(), response());
    let (mut client, mut server) = pair(&response);
    let mut exchange = |count: u64| {
        for key in 0..count {
            client.connection.request(&request, true, key, &mut client.out).expect("room");
        }
        carry(&mut client, &mut server, &response);
        // All that useful work has paid for what little is not.
        assert_eq!(client.connection.open_streams(), 0);
        client.connection.tick();
    };
    c.bench_function("h2: exchange of a request and its response", |b| b.iter(|| exchange(1)));
    c.bench_function("h2: 32 exchanges at once", |b| b.iter(|| exchange(32)));

    // Heads alone: one that was encoded by us, decoded again and again. Interim responses are the only heads that may
    // repeat on a stream.
    let (mut client, mut server) = pair(&response);
    let id = client.connection.request(&request, true, 0, &mut client.out).expect("room");
    let sent = std::mem::take(&mut client.out);
    let mut input = sent.as_slice();
    while let Ok((used, event)) = server.connection.receive(input, &mut server.heads, &mut server.out) {
        input = &input[used..];
        if event == Event::More {
            break;
        }
    }
    let mut early = response.clone();
    early.status = 103;
    server.connection.response(id, &early, false, &mut server.out);
    let sent = std::mem::take(&mut server.out);
    c.bench_function("h2: read a response's head", |b| {
        b.iter(|| {
            client.connection.tick();
            client.connection.receive(black_box(&sent), &mut client.heads, &mut client.out)
        });
    });
    c.bench_function("h2: write a response's head", |b| {
        b.iter(|| {
            server.out.clear();
            server.connection.response(id, black_box(&early), false, &mut server.out);
        });
    });
}

criterion_group!(benches, http1, http2);
criterion_main!(benches);
