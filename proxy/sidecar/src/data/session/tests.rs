//! Against rustls' buffered API in memory, and against tokio-rustls over sockets: an independent state machine each time.

use std::{
    io::{Read, Write},
    time::Duration,
};

use outrigger_certs::{CertificateAuthority, ClientAuth, Credentials, SpiffeId, TrustDomain, server_name};
use raw::{ALERT, DATA, HANDSHAKE, raw_peer};
use rustls::{AlertDescription, ClientConnection, ServerConnection};

use super::*;

mod handshakes;
mod raw;

const ALPN: &[u8] = b"outrigger-h2";

struct Mesh {
    ca: CertificateAuthority,
}

impl Mesh {
    fn new() -> Self {
        let domain: TrustDomain = "outrigger.local".parse().unwrap();
        let pem = CertificateAuthority::generate_pem(&domain).unwrap();
        Self { ca: CertificateAuthority::from_store(&pem, &domain).unwrap() }
    }

    fn credentials(&self, name: &str) -> Credentials {
        let credentials = Credentials::new(self.ca.bundle().clone());
        credentials.set_leaf(self.ca.issue_own(&id(name), Duration::from_hours(1)).unwrap()).unwrap();
        credentials
    }

    fn client(&self) -> Arc<ClientConfig> {
        self.credentials("web").client_config(&id("orders"), &[ALPN]).unwrap()
    }

    fn server(&self) -> Arc<ServerConfig> {
        self.credentials("orders").server_config(&[ALPN], ClientAuth::Required).unwrap()
    }
}

fn id(name: &str) -> SpiffeId {
    format!("spiffe://outrigger.local/ns/shop/sa/{name}").parse().unwrap()
}

fn bytes(count: usize) -> Vec<u8> {
    (0..=250).cycle().take(count).collect()
}

/// Both ends of an established connection: ours, and a buffered one of rustls.
struct Pair<P> {
    ours: Session,
    peer: P,
}

/// A handshake in memory. The session's half of it is what `complete` does, without sockets.
fn drive<S>(
    session: &mut Session,
    peer: &mut rustls::ConnectionCommon<S>,
) -> (Result<(), Error>, Result<(), Error>) {
    let (mut ours, mut theirs) = (Ok(()), Ok(()));
    let mut records = Vec::new();
    for _ in 0..4 {
        let (mut plain, mut out) = (Vec::new(), Vec::new());
        if ours.is_ok() {
            match session.advance(&mut records, &Wish::Open, &mut plain, &mut out) {
                Ok(consumed) => drop(records.drain(..consumed)),
                Err(error) => ours = Err(error),
            }
        }
        let mut out = out.as_slice();
        while theirs.is_ok() && !out.is_empty() {
            peer.read_tls(&mut out).unwrap();
            theirs = peer.process_new_packets().map(|_| ());
        }
        while peer.wants_write() {
            peer.write_tls(&mut records).unwrap();
        }
    }
    (ours, theirs)
}

fn client_pair() -> Pair<ServerConnection> {
    let mesh = Mesh::new();
    let tls = UnbufferedClientConnection::new(mesh.client(), server_name()).unwrap();
    let mut ours = Session::new(Connection::Client(Box::new(tls)));
    let mut peer = ServerConnection::new(mesh.server()).unwrap();
    assert_eq!(drive(&mut ours, &mut peer), (Ok(()), Ok(())));
    Pair { ours, peer }
}

fn server_pair() -> Pair<ClientConnection> {
    let mesh = Mesh::new();
    let tls = UnbufferedServerConnection::new(mesh.server()).unwrap();
    let mut ours = Session::new(Connection::Server(Box::new(tls)));
    let mut peer = ClientConnection::new(mesh.client(), server_name()).unwrap();
    assert_eq!(drive(&mut ours, &mut peer), (Ok(()), Ok(())));
    Pair { ours, peer }
}

/// What the peer sends for `data`.
fn sent<S>(peer: &mut rustls::ConnectionCommon<S>, data: &[u8]) -> Vec<u8> {
    let mut records = Vec::new();
    for chunk in data.chunks(16 * 1024) {
        peer.writer().write_all(chunk).unwrap();
        while peer.wants_write() {
            peer.write_tls(&mut records).unwrap();
        }
    }
    while peer.wants_write() {
        peer.write_tls(&mut records).unwrap();
    }
    records
}

/// What the peer makes of `records`.
fn received<S>(peer: &mut rustls::ConnectionCommon<S>, mut records: &[u8]) -> Result<Vec<u8>, Error> {
    let mut data = Vec::new();
    while !records.is_empty() {
        if peer.read_tls(&mut records).unwrap() == 0 {
            break;
        }
        peer.process_new_packets()?;
        let _ = peer.reader().read_to_end(&mut data);
    }
    Ok(data)
}

fn open(session: &mut Session, records: &[u8]) -> (Result<Opened, Error>, Vec<u8>, Vec<u8>) {
    let (mut plain, mut out) = (Vec::new(), Vec::new());
    let opened = session.open(&mut records.to_vec(), &mut plain, &mut out);
    (opened, plain, out)
}

#[test]
fn a_read_of_many_records_is_opened_at_once() {
    let mut pair = client_pair();
    let data = bytes(100_000);
    let records = sent(&mut pair.peer, &data);
    let (opened, plain, out) = open(&mut pair.ours, &records);
    assert_eq!(opened.unwrap(), Opened { consumed: records.len(), closed: false });
    assert_eq!((plain, out), (data, Vec::new()));
}

#[test]
fn a_partial_record_stays_the_callers() {
    let mut pair = server_pair();
    let mut records = sent(&mut pair.peer, b"first");
    let whole = records.len();
    records.extend(sent(&mut pair.peer, b"second"));
    for end in whole..records.len() {
        assert_eq!(first_record(&records[..end]), Some(whole));
        assert_eq!(first_record(&records[whole..end]), None);
    }
    let (opened, plain, _) = open(&mut pair.ours, &records[..records.len() - 1]);
    assert_eq!(opened.unwrap().consumed, whole);
    assert_eq!(plain, b"first");
    let (opened, plain, _) = open(&mut pair.ours, &records[whole..]);
    assert_eq!(opened.unwrap().consumed, records.len() - whole);
    assert_eq!(plain, b"second");
}

#[test]
fn bytes_that_come_one_by_one_make_the_same_data() {
    let mut pair = client_pair();
    let records = sent(&mut pair.peer, b"the application's bytes");
    let (mut held, mut plain, mut out) = (Vec::new(), Vec::new(), Vec::new());
    for byte in records {
        held.push(byte);
        let opened = pair.ours.open(&mut held, &mut plain, &mut out).unwrap();
        held.drain(..opened.consumed);
    }
    assert_eq!(plain, b"the application's bytes");
    assert!(held.is_empty() && out.is_empty());
}

#[test]
fn sealed_data_is_what_the_peer_reads_in_records_of_16_kib() {
    let mut pair = server_pair();
    for len in [0, 1, 1024, 16 * 1024, 16 * 1024 + 1, 1024 * 1024] {
        let data = bytes(len);
        let mut out = b"before".to_vec();
        pair.ours.seal(&data, &mut out).unwrap();
        assert_eq!(out.len() - 6, sealed_len(len), "the room is exact");
        assert_eq!(&out[..6], b"before");
        let mut rest = &out[6..];
        while let Some(&[_, _, _, high, low]) = rest.first_chunk::<5>() {
            let record = usize::from(u16::from_be_bytes([high, low])) + HEADER;
            assert!(record <= MAX_PLAINTEXT + OVERHEAD);
            rest = &rest[record..];
        }
        assert_eq!(received(&mut pair.peer, &out[6..]).unwrap(), data);
    }
}

#[test]
fn a_key_update_is_answered_before_the_next_data() {
    let mut pair = client_pair();
    for round in 0..3 {
        pair.peer.refresh_traffic_keys().unwrap();
        let records = sent(&mut pair.peer, b"under new keys");
        let (opened, plain, mut out) = open(&mut pair.ours, &records);
        assert_eq!(opened.unwrap(), Opened { consumed: records.len(), closed: false });
        assert_eq!(plain, b"under new keys");
        pair.ours.seal(b"answer", &mut out).unwrap();
        // type, three bytes of length, one of content
        assert_eq!(out.len(), sealed_len(5) + sealed_len(6), "round {round}");
        assert_eq!(received(&mut pair.peer, &out).unwrap(), b"answer");
        out.clear();
        pair.ours.seal(b"and once only", &mut out).unwrap();
        assert_eq!(out.len(), sealed_len(13));
        assert_eq!(received(&mut pair.peer, &out).unwrap(), b"and once only");
    }
}

#[test]
fn tickets_of_a_foreign_server_are_taken_without_harm() {
    let mesh = Mesh::new();
    let mut config = (*mesh.server()).clone();
    config.send_tls13_tickets = 2;
    config.session_storage = rustls::server::ServerSessionMemoryCache::new(8);
    let tls = UnbufferedClientConnection::new(mesh.client(), server_name()).unwrap();
    let mut ours = Session::new(Connection::Client(Box::new(tls)));
    let mut peer = ServerConnection::new(Arc::new(config)).unwrap();
    assert_eq!(drive(&mut ours, &mut peer), (Ok(()), Ok(())));
    let records = sent(&mut peer, b"behind the tickets");
    assert_eq!(open(&mut ours, &records).1, b"behind the tickets");
}

#[test]
fn close_notify_ends_the_stream_and_what_follows_is_ignored() {
    let mut pair = client_pair();
    let mut records = sent(&mut pair.peer, b"last");
    pair.peer.send_close_notify();
    records.extend(sent(&mut pair.peer, b""));
    records.extend(b"rubbish");
    let (opened, plain, _) = open(&mut pair.ours, &records);
    assert_eq!(opened.unwrap(), Opened { consumed: records.len(), closed: true });
    assert_eq!(plain, b"last");
    // It is remembered, and our side of the stream is open still.
    assert_eq!(open(&mut pair.ours, b"").0.unwrap(), Opened { consumed: 0, closed: true });
    let mut out = Vec::new();
    pair.ours.seal(b"farewell", &mut out).unwrap();
    pair.ours.close(&mut out);
    let whole = out.len();
    pair.ours.close(&mut out);
    assert_eq!(out.len(), whole, "said once");
    assert_eq!(received(&mut pair.peer, &out).unwrap(), b"farewell");
    assert!(pair.peer.process_new_packets().unwrap().peer_has_closed());
    assert!(pair.ours.seal(b"too late", &mut out).is_err());
}

#[test]
fn a_stream_that_ends_without_close_notify_is_told_apart() {
    let mut pair = server_pair();
    let records = sent(&mut pair.peer, b"and then nothing");
    assert!(!open(&mut pair.ours, &records).0.unwrap().closed);
}

#[test]
fn after_our_close_notify_the_peers_data_still_opens() {
    let mut pair = server_pair();
    let mut out = Vec::new();
    pair.ours.close(&mut out);
    assert_eq!(received(&mut pair.peer, &out).unwrap(), b"");
    let records = sent(&mut pair.peer, b"still talking");
    assert_eq!(open(&mut pair.ours, &records).1, b"still talking");
}

#[test]
fn an_empty_record_is_nothing_and_a_stream_of_them_an_error() {
    let (mut ours, mut raw) = raw_peer();
    let mut records = raw.seal(b"a", DATA);
    records.extend(raw.seal(b"", DATA));
    records.extend(raw.seal(b"b", DATA));
    let (opened, plain, _) = open(&mut ours, &records);
    assert_eq!(opened.unwrap().consumed, records.len());
    assert_eq!(plain, b"ab");
    let many: Vec<u8> = (0..100).flat_map(|_| raw.seal(b"", DATA)).collect();
    assert!(open(&mut ours, &many).0.is_err());
}

#[test]
fn a_record_that_is_too_long_is_refused_with_an_alert() {
    let (mut ours, mut raw) = raw_peer();
    let (opened, plain, out) = open(&mut ours, &raw.seal(&bytes(MAX_PLAINTEXT), DATA));
    assert!(opened.is_ok() && plain.len() == MAX_PLAINTEXT && out.is_empty());
    let (opened, plain, out) = open(&mut ours, &raw.seal(&bytes(MAX_PLAINTEXT + 1), DATA));
    assert_eq!(opened, Err(Error::PeerSentOversizedRecord));
    assert!(plain.is_empty());
    assert_eq!(raw.alert(&out), AlertDescription::RecordOverflow);
    // One that only claims so much is refused by its header alone.
    let mut pair = client_pair();
    let (opened, _, out) = open(&mut pair.ours, &[23, 3, 3, 0xff, 0xff]);
    assert!(matches!(opened, Err(Error::InvalidMessage(_))));
    assert_eq!(received(&mut pair.peer, &out), Err(Error::AlertReceived(AlertDescription::DecodeError)));
}

#[test]
fn a_record_that_was_tampered_with_ends_the_session() {
    let mut pair = client_pair();
    let mut records = sent(&mut pair.peer, b"true");
    let whole = records.len();
    records.extend(sent(&mut pair.peer, b"false"));
    records[whole + HEADER] ^= 1;
    let (opened, plain, mut out) = open(&mut pair.ours, &records);
    assert_eq!(opened, Err(Error::DecryptError));
    assert_eq!(plain, b"true", "what came before is good");
    assert_eq!(received(&mut pair.peer, &out), Err(Error::AlertReceived(AlertDescription::BadRecordMac)));
    // Dead, and harmless.
    out.clear();
    assert!(open(&mut pair.ours, &records).0.is_err());
    assert!(pair.ours.seal(b"x", &mut out).is_err());
    pair.ours.close(&mut out);
    assert!(out.is_empty());
}

#[test]
fn an_alert_of_the_peer_is_an_error() {
    let (mut ours, mut raw) = raw_peer();
    let (opened, _, out) = open(&mut ours, &raw.seal(&[2, 80], ALERT));
    assert_eq!(opened, Err(Error::AlertReceived(AlertDescription::InternalError)));
    assert!(out.is_empty());
}

#[test]
fn a_handshake_message_in_two_records_is_refused_and_nothing_panics() {
    // A key update that asks for one: type 24, one byte, 1.
    for (first, second) in [(&[24, 0, 0, 1][..], &[1][..]), (&[24], &[0, 0, 1, 1])] {
        let (mut ours, mut raw) = raw_peer();
        let records = raw.seal(first, HANDSHAKE);
        let mut out = Vec::new();
        let (opened, _, _) = open(&mut ours, &records);
        assert!(matches!(opened, Err(Error::General(_))), "{opened:?}");
        assert!(ours.seal(b"x", &mut out).is_err());
        ours.close(&mut out);
        assert!(open(&mut ours, &raw.seal(second, HANDSHAKE)).0.is_err());

        // In one read too.
        let (mut ours, mut raw) = raw_peer();
        let mut records = raw.seal(first, HANDSHAKE);
        records.extend(raw.seal(second, HANDSHAKE));
        let (opened, _, _) = open(&mut ours, &records);
        assert!(matches!(opened, Err(Error::General(_))), "{opened:?}");
        assert!(ours.seal(b"x", &mut out).is_err());
    }
}

#[test]
fn errors_in_the_middle_of_a_record_leave_no_trap() {
    // A client's hello after the handshake, with another message behind it in the same record.
    let (mut ours, mut raw) = raw_peer();
    let (opened, _, mut out) = open(&mut ours, &raw.seal(&[20, 0, 0, 1, 0, 24, 0, 0, 1, 1], HANDSHAKE));
    assert!(opened.is_err());
    assert_eq!(raw.alert(&out), AlertDescription::UnexpectedMessage);
    ours.close(&mut out);
    assert!(ours.seal(b"x", &mut out).is_err());
}

#[test]
fn a_flood_of_key_updates_ends_the_session() {
    let (mut ours, mut raw) = raw_peer();
    let mut ended = false;
    for _ in 0..100 {
        let (opened, _, _) = open(&mut ours, &raw.seal(&[24, 0, 0, 1, 0], HANDSHAKE));
        raw.update();
        if opened.is_err() {
            ended = true;
            break;
        }
    }
    assert!(ended);
}
