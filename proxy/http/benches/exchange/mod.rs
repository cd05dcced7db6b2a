//! A small request and its response, and the two ends of a connection that exchange them: what the codecs' benchmarks
//! measure.

use std::hint::black_box;

use outrigger_http::h1;
use outrigger_http::h2::{Budget, Config, Connection, Event, Heads, Role, StreamId};
use outrigger_http::head::{RequestHead, ResponseHead};

pub(crate) const REQUEST: &[u8] = b"GET /api/v1/items/4711?fields=name,price HTTP/1.1\r\n\
    Host: shop.default.svc.cluster.local:8080\r\n\
    User-Agent: benchmark/1.0\r\n\
    Accept: application/json\r\n\
    Accept-Encoding: gzip, deflate\r\n\
    X-Request-Id: 7b1c9a52-5f0e-4f5c-9b42-2f1d7a0f3c11\r\n\
    Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n\
    \r\n";

pub(crate) const BODY: &[u8] = &[b'x'; 128];

pub(crate) fn request() -> RequestHead {
    let mut head = RequestHead::default();
    let limits = h1::Limits { head_bytes: 64 << 10, fields: 100 };
    h1::Decoder::new(limits).request(REQUEST, &mut head).expect("a good request");
    head
}

pub(crate) fn response() -> ResponseHead {
    let mut head = ResponseHead::default();
    head.status = 200;
    head.fields.push(b"Content-Type", b"application/json");
    head.fields.push(b"Content-Length", b"128");
    head.fields.push(b"Date", b"Tue, 24 Nov 2026 10:00:00 GMT");
    head.fields.push(b"Server", b"shop/2.1");
    head
}

pub(crate) fn config(role: Role) -> Config {
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
pub(crate) struct End {
    pub(crate) connection: Connection,
    pub(crate) heads: Heads,
    pub(crate) out: Vec<u8>,
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
pub(crate) fn pair(response: &ResponseHead) -> (End, End) {
    let (mut client, mut server) = (End::new(Role::Client), End::new(Role::Server));
    for _ in 0..3 {
        carry(&mut client, &mut server, response);
    }
    (client, server)
}

/// One round trip of all that is to be sent.
pub(crate) fn carry(client: &mut End, server: &mut End, response: &ResponseHead) {
    server.receive(&client.out, response);
    client.out.clear();
    client.receive(&server.out, response);
    server.out.clear();
}
