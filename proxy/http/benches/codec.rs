//! What the codecs cost: the heads of a small request and of its response, as a proxy sees them thousands of times a
//! second.
//!
//! `cargo bench -p outrigger-http`

mod exchange;

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use exchange::{REQUEST, carry, pair, request, response};
use outrigger_http::h1;
use outrigger_http::h2::Event;
use outrigger_http::head::RequestHead;

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
