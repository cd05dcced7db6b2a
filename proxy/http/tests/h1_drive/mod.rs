//! Drives HTTP/1.1 decoders as the proxy does, in pieces, and says what came out: for property tests and for fuzzers.
#![allow(dead_code, missing_docs)]

use outrigger_http::fields::Fields;
use outrigger_http::h1::{
    Asked, Decoder, Error, Framing, Limits, Piece, write_chunk, write_last_chunk, write_request,
    write_response,
};
use outrigger_http::head::{RequestHead, ResponseHead, Version};

/// Small, so that short inputs reach them.
pub(crate) const LIMITS: Limits = Limits { head_bytes: 1024, fields: 40 };

#[derive(Debug, Clone, Copy)]
pub(crate) enum Side {
    Requests,
    /// Responses, each to a request of this kind.
    Responses(Asked),
}

/// The parts of a head, to be compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) version: Version,
    /// Method, scheme, authority and path of a request; status and reason of a response.
    pub(crate) start: Vec<Option<Vec<u8>>>,
    pub(crate) fields: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) framing: Framing,
    pub(crate) keeps_alive: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Head(Head),
    /// Pieces that follow each other are one.
    Data(Vec<u8>),
    End(Vec<(Vec<u8>, Vec<u8>)>),
    Refused(Error),
    /// The input is used up.
    Over(Result<(), Error>),
}

#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) events: Vec<Event>,
    /// What came out, written again.
    pub(crate) wire: Vec<u8>,
}

/// Hands `input` in, in pieces that end at `cuts`, and asserts what holds for every call.
pub(crate) fn drive(side: Side, input: &[u8], cuts: &[usize]) -> Outcome {
    drive_within(LIMITS, side, input, cuts)
}

fn drive_within(limits: Limits, side: Side, input: &[u8], cuts: &[usize]) -> Outcome {
    let mut driver = Driver::new(limits, side);
    let mut cuts: Vec<_> = cuts.iter().map(|cut| cut % (input.len() + 1)).collect();
    cuts.sort_unstable();
    cuts.push(input.len());
    for cut in cuts {
        if driver.read(&input[..cut]).is_err() {
            return driver.outcome;
        }
    }
    let end = driver.decoder.end();
    driver.outcome.events.push(Event::Over(end));
    driver.outcome
}

struct Driver {
    limits: Limits,
    side: Side,
    decoder: Decoder,
    request: RequestHead,
    response: ResponseHead,
    trailers: Fields,
    outcome: Outcome,
    in_body: bool,
    /// Bytes consumed.
    at: usize,
    calls: usize,
}

/// Nothing more comes of this input.
struct Over;

impl Driver {
    fn new(limits: Limits, side: Side) -> Self {
        Self {
            limits,
            side,
            decoder: Decoder::new(limits),
            request: RequestHead::default(),
            response: ResponseHead::default(),
            trailers: Fields::default(),
            outcome: Outcome::default(),
            in_body: false,
            at: 0,
            calls: 0,
        }
    }

    /// Reads as much of `input` as it gives.
    fn read(&mut self, input: &[u8]) -> Result<(), Over> {
        loop {
            self.calls += 1;
            assert!(self.calls <= 4 * input.len() + 1024, "calls without progress");
            let goes_on = if self.in_body { self.read_body(input) } else { self.read_head(input) };
            match goes_on {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => {
                    self.outcome.events.push(Event::Refused(error));
                    return Err(Over);
                }
            }
        }
    }

    fn read_head(&mut self, input: &[u8]) -> Result<bool, Error> {
        let rest = &input[self.at..];
        let consumed = match self.side {
            Side::Requests => self.decoder.request(rest, &mut self.request)?,
            Side::Responses(asked) => self.decoder.response(rest, asked, &mut self.response)?,
        };
        let Some(consumed) = consumed else {
            assert!(rest.len() < self.limits.head_bytes, "a head beyond its limit is waited for");
            return Ok(false);
        };
        assert!((1..=rest.len()).contains(&consumed));
        assert!(!self.decoder.has_begun());
        self.at += consumed;
        self.in_body = true;
        let head = match self.side {
            Side::Requests => {
                let head = &self.request;
                write_request(head, self.decoder.framing(), &mut self.outcome.wire);
                if head.method() == b"CONNECT" {
                    self.decoder.switch();
                }
                let start = [Some(head.method()), head.scheme(), head.authority(), head.path()];
                self.head(head.version, &start, &head.fields)
            }
            Side::Responses(_) => {
                let head = &self.response;
                write_response(head, self.decoder.framing(), &mut self.outcome.wire);
                assert!((100..1000).contains(&head.status));
                self.head(
                    head.version,
                    &[Some(head.status.to_string().as_bytes()), head.reason()],
                    &head.fields,
                )
            }
        };
        self.outcome.events.push(Event::Head(head));
        Ok(true)
    }

    fn head(&self, version: Version, start: &[Option<&[u8]>], fields: &Fields) -> Head {
        assert!(fields.len() <= self.limits.fields);
        Head {
            version,
            start: start.iter().map(|part| part.map(<[u8]>::to_vec)).collect(),
            fields: lines(fields),
            framing: self.decoder.framing(),
            keeps_alive: self.decoder.keeps_alive(),
        }
    }

    fn read_body(&mut self, input: &[u8]) -> Result<bool, Error> {
        let rest = &input[self.at..];
        let (consumed, piece) = self.decoder.body(rest, &mut self.trailers)?;
        assert!(consumed <= rest.len());
        self.at += consumed;
        let chunked = self.decoder.framing() == Framing::Chunked;
        match piece {
            Piece::More => {
                assert!(rest.len() - consumed < self.limits.head_bytes, "bytes of a body are waited for");
                return Ok(false);
            }
            Piece::Data(data) => {
                assert!(!data.is_empty() && consumed >= data.len());
                match self.outcome.events.last_mut() {
                    Some(Event::Data(all)) => all.extend_from_slice(data),
                    _ => self.outcome.events.push(Event::Data(data.to_vec())),
                }
                if chunked {
                    write_chunk(data, &mut self.outcome.wire);
                } else {
                    self.outcome.wire.extend_from_slice(data);
                }
            }
            Piece::End => {
                if chunked {
                    write_last_chunk(&self.trailers, &mut self.outcome.wire);
                }
                assert!(self.trailers.len() <= self.limits.fields);
                self.outcome.events.push(Event::End(lines(&self.trailers)));
                self.trailers.clear();
                self.in_body = false;
            }
        }
        Ok(true)
    }
}

fn lines(fields: &Fields) -> Vec<(Vec<u8>, Vec<u8>)> {
    for (name, value) in fields.iter() {
        assert!(!name.is_empty() && name.iter().all(|byte| byte.is_ascii_graphic() && *byte != b':'));
        assert!(value.iter().all(|byte| *byte == b'\t' || !byte.is_ascii_control()));
        assert!(!matches!(value, [b' ' | b'\t', ..] | [.., b' ' | b'\t']));
    }
    fields.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
}

/// What must hold for any input: it reads alike however it is cut, and what is written again reads as the same once more.
pub(crate) fn check(side: Side, input: &[u8], cuts: &[usize]) {
    let whole = drive(side, input, &[]);
    let cut = drive(side, input, cuts);
    assert_eq!(whole.events, cut.events);
    let single: Vec<_> = (0..input.len()).collect();
    assert_eq!(whole.events, drive(side, input, &single).events);

    // A head may grow, by the space behind a colon.
    let limits = Limits { head_bytes: 2 * LIMITS.head_bytes, ..LIMITS };
    let again = drive_within(limits, side, &whole.wire, &[]);
    assert_eq!(whole.wire.escape_ascii().to_string(), again.wire.escape_ascii().to_string());
    let messages = |events: &[Event]| events.iter().filter(|event| matches!(event, Event::Head(_))).count();
    assert_eq!(messages(&whole.events), messages(&again.events));
    assert!(!matches!(again.events.last(), Some(Event::Refused(_))), "{:?}", again.events);
}

/// The side and the cuts that the first bytes of a fuzzer's input name, and the rest of it.
pub(crate) fn plan(bytes: &[u8]) -> Option<(Asked, [usize; 3], &[u8])> {
    let ([kind, a, b, c], rest) = bytes.split_first_chunk()?;
    let asked = Asked { head: kind & 1 != 0, connect: kind & 2 != 0, upgrade: kind & 4 != 0 };
    // Spread over the input: a cut is taken modulo its length.
    Some((asked, [*a, *b, *c].map(|cut| usize::from(cut) * 7), rest))
}
