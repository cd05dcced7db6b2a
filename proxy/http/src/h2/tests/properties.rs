//! What holds for any input: the cut of the bytes does not matter, nothing panics, output is bounded by input, and
//! bodies arrive whole.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Frames as peers send them, mostly right: streams follow each other, so that most of the rules come into play.
fn frames() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let id = || (0_u32..8).prop_map(|stream| 2 * stream + 1);
    let bytes = |most| prop::collection::vec(any::<u8>(), 0..most);
    let one = prop_oneof![
        8 => (id(), any::<bool>()).prop_map(|(id, end)| if end { get(id) } else { post(id) }),
        2 => (id(), any::<bool>()).prop_map(|(id, end)| headers(id, end, &[("a", "b")])),
        1 => (id(), any::<bool>()).prop_map(|(id, end)| headers(id, end, &[(":status", "200")])),
        6 => (id(), any::<bool>(), bytes(2000)).prop_map(|(id, end, bytes)| data(id, end, &bytes)),
        2 => (id(), bytes(300)).prop_map(|(id, bytes)| frame(kind::DATA, flag::PADDED, id, &bytes)),
        2 => (0_u32..9, 0_u32..100_000).prop_map(|(id, size)| number(kind::WINDOW_UPDATE, id, size)),
        1 => (id(), 0_u32..16).prop_map(|(id, code)| number(kind::RST_STREAM, id, code)),
        1 => (0_u16..9, 0_u32..100_000).prop_map(|(parameter, value)| setting(parameter, value)),
        1 => bytes(9).prop_map(|bytes| frame(kind::PING, 0, 0, &bytes)),
        1 => (id(), any::<u8>(), bytes(60)).prop_map(|(id, flags, bytes)| frame(kind::HEADERS, flags, id, &bytes)),
        1 => (id(), any::<u8>()).prop_map(|(id, flags)| frame(kind::CONTINUATION, flags, id, &block(GET))),
        1 => (id(), any::<u8>(), any::<u8>(), bytes(20))
            .prop_map(|(id, kind, flags, bytes)| frame(kind, flags, id, &bytes)),
    ];
    prop::collection::vec(one, 0..60)
}

/// What an end tells of `bytes` that come in pieces of the sizes in `cuts`, in turns.
fn told(mut end: End, bytes: &[u8], cuts: &[usize]) -> (Vec<Told>, Option<Fatal>, Vec<u8>) {
    let mut told = Vec::new();
    let mut rest = bytes;
    for &cut in cuts.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, after) = rest.split_at(cut.min(rest.len()));
        rest = after;
        match end.feed(piece) {
            Err(fatal) => return (told, Some(fatal), end.out),
            Ok(events) => {
                for event in events {
                    // Data is told in pieces as it comes.
                    if let Told::Data { id, data: more, end: ends, .. } = &event
                        && let Some(Told::Data { id: last, data, end, .. }) = told.last_mut()
                        && last == id
                    {
                        data.extend_from_slice(more);
                        *end = *ends;
                    } else {
                        told.push(event);
                    }
                }
            }
        }
    }
    (told, None, end.out)
}

/// An end that does not release: WINDOW_UPDATE would depend on the pieces.
fn holds(mut end: End) -> End {
    end.releases = false;
    end
}

proptest! {
    #[test]
    fn cuts_of_the_input_do_not_matter(frames in frames(), cuts in prop::collection::vec(1_usize..200, 1..20)) {
        let bytes = frames.concat();
        let (whole, whole_fatal, whole_out) = told(holds(server()), &bytes, &[usize::MAX]);
        let (pieces, fatal, out) = told(holds(server()), &bytes, &cuts);
        // Where it is fatal, what was told before may differ by the events of the last piece, which `feed` does not
        // return.
        if fatal.is_none() {
            prop_assert_eq!(&whole, &pieces);
        }
        prop_assert_eq!((whole_fatal, whole_out), (fatal, out));
    }

    #[test]
    fn output_is_bounded_by_input(frames in frames(), as_client in any::<bool>()) {
        let end = if as_client {
            let mut client = client();
            for key in 0..4 {
                client.connection.request(&request_head("POST", "/"), false, key, &mut client.out).unwrap();
            }
            client.out.clear();
            client
        } else {
            server()
        };
        let bytes = frames.concat();
        let (_, _, out) = told(end, &bytes, &[usize::MAX]);
        prop_assert!(out.len() <= 2 * bytes.len() + 100, "{} for {}", out.len(), bytes.len());
    }

    #[test]
    fn arbitrary_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..500), cut in 1_usize..500) {
        told(server(), &bytes, &[cut]);
        told(client(), &bytes, &[cut]);
        told(End::new(&config(Role::Server)), &[PREFACE, &bytes].concat(), &[cut]);
    }

    #[test]
    fn bodies_arrive_whole_and_in_order(
        windows in (prop_oneof![1_u32..100, 1_u32..70_000], prop_oneof![1_u32..100, 1_u32..70_000]),
        bodies in prop::collection::vec(0_usize..60_000, 1..12),
        moves in prop::collection::vec((1_usize..30_000, 1_usize..30_000, 1_usize..20_000), 1..60),
    ) {
        // So that a window of one byte does not take for ever.
        let most = 100 * windows.0.min(windows.1) as usize;
        transfer(windows, &bodies.iter().map(|&len| len.min(most)).collect::<Vec<_>>(), &moves);
    }
}

/// Byte `at` of the body of a stream.
fn letter(id: StreamId, at: usize) -> u8 {
    (at * 31 + at / 251 + id as usize) as u8
}

/// The client sends a body on each stream, and the server echoes it. Each round of `moves` says how much each end
/// receives, up and down, and how much is handed to a stream at once.
fn transfer(windows: (u32, u32), bodies: &[usize], moves: &[(usize, usize, usize)]) {
    let (mut there, mut here) = (config(Role::Client), config(Role::Server));
    (there.stream_window, here.stream_window) = windows;
    let (mut client, mut server) = pair(&there, &here);
    let mut uploads: Vec<Body> = Vec::new();
    for (index, &len) in bodies.iter().enumerate() {
        let head = request_head("POST", "/");
        let id = client.connection.request(&head, false, 0, &mut client.out).unwrap();
        assert_eq!(id, 2 * index as u32 + 1);
        uploads.push(Body { id, bytes: (0..len).map(|at| letter(id, at)).collect(), whole: true, sent: 0 });
    }
    let expected: BTreeMap<_, _> = uploads.iter().map(|body| (body.id, body.bytes.clone())).collect();
    let mut echoes: Vec<Body> = Vec::new();
    let mut arrived: BTreeMap<StreamId, Vec<u8>> = BTreeMap::new();
    let (mut to_server, mut to_client) = (Vec::new(), Vec::new());
    let mut ended = 0;
    let mut rounds = moves.iter().cycle();
    for _ in 0..1_000_000 {
        if ended == bodies.len() {
            break;
        }
        let &(up, down, chunk) = rounds.next().unwrap();
        uploads.retain_mut(|body| !body.send(chunk, &mut client));
        echoes.retain_mut(|body| !body.send(chunk, &mut server));
        to_server.append(&mut client.out);
        to_client.append(&mut server.out);
        let bytes: Vec<u8> = to_server.drain(..up.min(to_server.len())).collect();
        for told in server.feed(&bytes).unwrap() {
            match told {
                Told::Request { id, .. } => {
                    server.connection.response(id, &response_head(200), false, &mut server.out);
                    echoes.push(Body { id, bytes: Vec::new(), whole: false, sent: 0 });
                }
                Told::Data { id, data, end, .. } => {
                    let body = echoes.iter_mut().find(|body| body.id == id).unwrap();
                    body.bytes.extend_from_slice(&data);
                    body.whole = end;
                }
                Told::Writable { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        let bytes: Vec<u8> = to_client.drain(..down.min(to_client.len())).collect();
        for told in client.feed(&bytes).unwrap() {
            match told {
                Told::Response { .. } | Told::Writable { .. } => {}
                Told::Data { id, data, end, .. } => {
                    arrived.entry(id).or_default().extend_from_slice(&data);
                    ended += usize::from(end);
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(arrived == expected, "{ended} of {} bodies arrived", bodies.len());
    assert_eq!((client.connection.open_streams(), server.connection.open_streams()), (0, 0));
}

/// A body on its way out, as far as it is known.
struct Body {
    id: StreamId,
    bytes: Vec<u8>,
    whole: bool,
    sent: usize,
}

impl Body {
    /// Hands over up to `chunk` bytes; true when all of it is sent.
    fn send(&mut self, chunk: usize, end: &mut End) -> bool {
        let piece = &self.bytes[self.sent..(self.sent + chunk).min(self.bytes.len())];
        let last = self.whole && self.sent + piece.len() == self.bytes.len();
        let taken = end.connection.data(self.id, piece, last, &mut end.out);
        self.sent += taken;
        last && taken == piece.len()
    }
}
