//! HTTP/1.1 against hyper, which was written by others from the same RFC.
//!
//! Where both read a message they must read the same. Where one refuses what the other reads, it is for one of the reasons
//! listed here; ours are those of the README.

#[path = "h1_drive/generate.rs"]
mod generate;
mod h1_drive;

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;

use h1_drive::{Event, Head, Side, drive};
use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::TokioIo;
use outrigger_http::h1::{Asked, Error, Framing};
use outrigger_http::head::Version;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

/// Field lines, sorted by name in lower case; lines of one name in their order.
type Lines = Vec<(String, Vec<u8>)>;

/// A message as one of the two read it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    /// The method, the authority and the path of a request; the status of a response.
    start: [String; 3],
    version: u8,
    fields: Lines,
    /// The body and the trailers, if they came to their end.
    body: Option<(Vec<u8>, Lines)>,
}

/// What our decoder reads before it refuses, ends, or would not read on.
fn ours(side: Side, input: &[u8]) -> (Vec<Seen>, Option<Error>) {
    let mut seen: Vec<Seen> = Vec::new();
    let mut data = Vec::new();
    let mut last = None;
    for event in drive(side, input, &[]).events {
        match event {
            Event::Head(head) => {
                data.clear();
                seen.push(Seen {
                    start: start(&head),
                    version: u8::from(head.version == Version::Http11),
                    fields: sorted(head.fields.iter().map(|(name, value)| (&name[..], &value[..]))),
                    body: None,
                });
                if head.start[0].as_deref() == Some(b"CONNECT") {
                    seen.last_mut().expect("it was pushed").body = Some((Vec::new(), Vec::new()));
                    return (seen, None);
                }
                last = Some(head);
            }
            Event::Data(piece) => data.extend_from_slice(&piece),
            Event::End(trailers) => {
                let trailers = sorted(trailers.iter().map(|(name, value)| (&name[..], &value[..])));
                let (Some(message), Some(head)) = (seen.last_mut(), &last) else {
                    unreachable!("no head, no end")
                };
                message.body = Some((std::mem::take(&mut data), trailers));
                let is_final = match side {
                    Side::Requests => !head.keeps_alive,
                    Side::Responses(_) => message.start[0].as_str() >= "200",
                };
                if is_final {
                    return (seen, None);
                }
            }
            Event::Refused(error) => return (seen, Some(error)),
            Event::Over(Ok(())) if last.is_some_and(|head| head.framing == Framing::UntilClose) => {
                seen.last_mut().expect("a head was seen").body = Some((data, Vec::new()));
                return (seen, None);
            }
            Event::Over(_) => return (seen, None),
        }
    }
    unreachable!("the last event is the end")
}

fn start(head: &Head) -> [String; 3] {
    let text =
        |part: &Option<Vec<u8>>| part.as_deref().map(|text| String::from_utf8_lossy(text).into_owned());
    match &head.start[..] {
        [method, _, authority, path] => [
            text(method).unwrap_or_default(),
            text(authority).unwrap_or_default(),
            text(path).unwrap_or("/".to_owned()),
        ],
        status => [text(&status[0]).unwrap_or_default(), String::new(), String::new()],
    }
}

fn sorted<'a>(fields: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Lines {
    let mut fields: Vec<_> =
        fields.map(|(name, value)| (String::from_utf8_lossy(name).to_lowercase(), value.to_vec())).collect();
    fields.sort_by(|a, b| a.0.cmp(&b.0));
    // Equal lengths are one; hyper leaves them as they are.
    fields.retain(|(name, _)| name != "content-length");
    fields
}

fn sorted_map(map: &HeaderMap) -> Lines {
    sorted(map.iter().map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes())))
}

/// The names that our decoder drops from trailers; hyper hands all out.
fn sorted_trailers(map: &HeaderMap) -> Lines {
    let mut fields = sorted_map(map);
    fields.retain(|(name, _)| !["connection", "host", "transfer-encoding"].contains(&name.as_str()));
    fields
}

async fn collect(body: Incoming) -> Option<(Vec<u8>, Lines)> {
    let body = body.collect().await.ok()?;
    let trailers = body.trailers().map_or(Vec::new(), sorted_trailers);
    Some((body.to_bytes().to_vec(), trailers))
}

fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, future)
}

/// What hyper's server reads.
fn hyper_server(input: &[u8]) -> Vec<Seen> {
    run(async {
        let (near, far) = tokio::io::duplex(1 << 20);
        let seen = Rc::new(RefCell::new(Vec::new()));
        let service = hyper::service::service_fn(|request: Request<Incoming>| {
            let seen = seen.clone();
            async move {
                let (head, body) = request.into_parts();
                let path = match head.uri.path_and_query().map_or("/", |path| path.as_str()) {
                    query if query.starts_with('?') => format!("/{query}"),
                    path => path.to_owned(),
                };
                let authority = head.uri.authority().map_or(String::new(), ToString::to_string);
                let at = seen.borrow().len();
                seen.borrow_mut().push(Seen {
                    start: [head.method.to_string(), authority, path],
                    version: u8::from(head.version == hyper::Version::HTTP_11),
                    fields: sorted_map(&head.headers),
                    body: None,
                });
                let body = collect(body).await;
                seen.borrow_mut()[at].body = body;
                Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .half_close(true)
            .serve_connection(TokioIo::new(far), service);
        let _ = tokio::join!(connection, feed(near, input));
        seen.take()
    })
}

/// Sends all, then reads until the other side closes.
async fn feed(mut stream: DuplexStream, input: &[u8]) {
    let _ = stream.write_all(input).await;
    let _ = stream.shutdown().await;
    let _ = stream.read_to_end(&mut Vec::new()).await;
}

/// What hyper's client reads as the answer to one request.
fn hyper_client(method: &str, input: &[u8]) -> Option<Seen> {
    run(async {
        let (mut near, far) = tokio::io::duplex(1 << 20);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(far)).await.ok()?;
        let connection = tokio::task::spawn_local(connection);
        let request = Request::builder().method(method).uri("/").body(Empty::<Bytes>::new()).ok()?;
        let answer = async {
            let (head, body) = sender.send_request(request).await.ok()?.into_parts();
            Some(Seen {
                start: [head.status.as_str().to_owned(), String::new(), String::new()],
                version: u8::from(head.version == hyper::Version::HTTP_11),
                fields: sorted_map(&head.headers),
                body: collect(body).await,
            })
        };
        let server = async {
            // The request must be out before the answer comes, else hyper takes the answer for an unasked one.
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(near.read_u8().await.expect("a request comes"));
            }
            feed(near, input).await;
        };
        let answered = tokio::select! {
            answer = answer => answer,
            () = async { server.await; std::future::pending().await } => None,
        };
        connection.abort();
        answered
    })
}

/// What we refuse though hyper reads it. The README says why.
const STRICTER: [&str; 11] = [
    "a line ends without a carriage return",
    "the target is neither a path nor an http or https URI",
    "the authority of the target is empty or names a user",
    "the target of a CONNECT is not a host and a port",
    "a CONNECT has a body",
    "there is both a content length and a transfer coding",
    "the transfer coding is not chunked, once",
    "a transfer coding in HTTP/1.0",
    "the size of a chunk is malformed",
    "the size of a chunk is too long",
    "the protocol is switched though nobody asked",
];

/// What hyper reads in a response as if it were not there: the RFC (RFC 9112, 6.3) has us refuse it as well.
const REFUSED_BY_THE_RFC: [&str; 2] = ["the content length is malformed", "there are two content lengths"];

/// hyper's URI type does not know all bytes that people send in a target, and it reads no list of equal lengths.
fn hyper_is_stricter(message: &Seen, input: &[u8]) -> bool {
    let [_, authority, path] = &message.start;
    let is_not_ascii =
        authority.contains(char::REPLACEMENT_CHARACTER) || path.contains(char::REPLACEMENT_CHARACTER);
    let is_no_authority = !authority.is_empty() && authority.parse::<hyper::http::uri::Authority>().is_err();
    let has_list = input
        .split(|&byte| byte == b'\n')
        .any(|line| line.to_ascii_lowercase().starts_with(b"content-length") && line.contains(&b','));
    has_list || is_not_ascii || is_no_authority || path.parse::<hyper::Uri>().is_err()
}

fn assert_documented(error: Option<Error>, input: &[u8]) {
    let reason = error.map(|error| error.to_string());
    let listed = reason
        .as_deref()
        .is_some_and(|reason| STRICTER.contains(&reason) || REFUSED_BY_THE_RFC.contains(&reason));
    assert!(listed, "refused ({reason:?}) but hyper reads {}", input.escape_ascii());
}

fn compare(ours: &[Seen], refused: Option<Error>, theirs: &[Seen], input: &[u8]) {
    for at in 0..ours.len().max(theirs.len()) {
        match (ours.get(at), theirs.get(at)) {
            (Some(ours), Some(theirs)) => {
                let mut same = ours.clone();
                // hyper's URI type drops a fragment, which no target may have and some do.
                same.start[2].truncate(same.start[2].find('#').unwrap_or(same.start[2].len()));
                if ours.body.is_none() && theirs.body.is_some() {
                    assert_documented(refused, input);
                    same.body.clone_from(&theirs.body);
                }
                assert_eq!(&same, theirs, "{}", input.escape_ascii());
            }
            (Some(ours), None) => {
                assert!(hyper_is_stricter(ours, input), "hyper refuses {ours:?} in {}", input.escape_ascii());
                return;
            }
            (None, _) => return assert_documented(refused, input),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn requests_are_read_as_hyper_reads_them(input in generate::requests()) {
        let (seen, refused) = ours(Side::Requests, &input);
        compare(&seen, refused, &hyper_server(&input), &input);
    }

    #[test]
    fn a_response_is_read_as_hyper_reads_it(input in generate::responses(), head in any::<bool>()) {
        let (mut seen, refused) = ours(Side::Responses(Asked { head, ..Asked::default() }), &input);
        seen.retain(|message| message.start[0].as_str() >= "200");
        seen.truncate(1);
        let theirs = hyper_client(if head { "HEAD" } else { "GET" }, &input);
        compare(&seen, refused, theirs.as_slice(), &input);
    }
}

#[test]
fn the_readme_lists_what_we_refuse_and_hyper_does_not() {
    let readme = include_str!("../README.md");
    for reason in STRICTER {
        assert!(readme.contains(reason), "{reason}");
    }
}
