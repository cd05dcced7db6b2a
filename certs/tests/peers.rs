//! Who is let in, and who is not: real handshakes, both ways round. The forger of these tests holds the mesh's issuing
//! key, so that each case has one fault and no other.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::*;
use outrigger_certs::{ClientAuth, Refusal, peer, peer_identity, provider, refusal, server_name};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, NamedGroup, ProtocolVersion, ServerConfig,
    ServerConnection,
};
use rustls_pki_types::{CertificateDer, UnixTime};

const WEB: &str = "spiffe://outrigger.local/ns/shop/sa/web";

/// Shows `forged` to a server of ours as a client, and to a client of ours as a server: both must refuse, for `reason`,
/// and nothing may reach an application.
#[track_caller]
fn refused_by_both(mesh: &Mesh, case: &str, forged: &Forged, reason: Refusal) {
    refused_certified(mesh, case, &forged.certified(), reason);
}

#[track_caller]
fn refused_certified(mesh: &Mesh, case: &str, certified: &Arc<CertifiedKey>, reason: Refusal) {
    let honest = mesh.workload(&orders());
    for client_auth in [ClientAuth::Required, ClientAuth::Optional] {
        let server = honest.server_config(&[ALPN], client_auth).unwrap();
        let outcome = handshake(forged_client(&honest, &orders(), certified.clone()), server);
        assert_eq!(outcome.server_refusal(), Some(reason), "{case}, as a client, {:?}", outcome.server_error);
        assert_eq!(outcome.received, b"", "{case}");
        assert_eq!(peer(&outcome.server), None, "{case}");
        let alert = outcome.client_error;
        assert!(matches!(alert, Some(rustls::Error::AlertReceived(_))), "{case}: {alert:?}");
    }
    let outcome = handshake(client_config(&honest, &web()), forged_server(certified.clone()));
    assert_eq!(outcome.client_refusal(), Some(reason), "{case}, as a server, {:?}", outcome.client_error);
    assert_eq!(outcome.received, b"", "{case}");
    assert_eq!(peer(&outcome.client), None, "{case}");
}

fn with(change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = leaf_params(WEB);
    change(&mut params);
    params
}

#[test]
fn honest_peers_know_each_other() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload(&web()), mesh.workload(&orders()));
    let outcome = handshake(client_config(&client, &orders()), server_config(&server)).succeeded();
    assert_eq!(peer_identity(&outcome.server), Some(web()));
    assert_eq!(peer_identity(&outcome.client), Some(orders()));
    assert_eq!(peer(&outcome.server).unwrap().not_after, client.leaf().unwrap().not_after());
    assert_eq!(outcome.client.alpn_protocol(), Some(ALPN));
}

/// The rest of this file says something only if the forger's unchanged leaf is accepted.
#[test]
fn the_forgers_pattern_is_a_valid_leaf() {
    let mesh = Mesh::new();
    let honest = mesh.workload(&orders());
    let certified = mesh.forge(&leaf_params(WEB)).certified();
    handshake(forged_client(&honest, &orders(), certified.clone()), server_config(&honest)).succeeded();
    handshake(client_config(&honest, &web()), forged_server(certified)).succeeded();
}

#[test]
fn chains_that_do_not_end_in_our_root() {
    let (mesh, other) = (Mesh::new(), Mesh::new());
    let leaf = leaf_params(WEB);
    let refused = |case, forged: &Forged| refused_by_both(&mesh, case, forged, Refusal::UntrustedChain);

    refused("another CA with the same names", &other.forge(&leaf));
    let stolen_intermediate = Forged::new(&leaf, &other.issuer, &[mesh.issuer.der()]);
    refused("another CA's leaf below our issuing certificate", &stolen_intermediate);
    refused("without the issuing certificate", &Forged::new(&leaf, &mesh.issuer, &[]));

    let key = KeyPair::generate().unwrap();
    let chain = vec![leaf.self_signed(&key).unwrap().der().clone()];
    refused("self-signed", &Forged { chain, key });

    let not_a_ca = Issuer::signed_by(leaf.clone(), KeyPair::generate().unwrap(), &mesh.issuer).unwrap();
    refused("issued by a leaf", &Forged::new(&leaf, &not_a_ca, &[not_a_ca.der(), mesh.issuer.der()]));
    let mut named = with(|params| params.is_ca = IsCa::NoCa);
    named.distinguished_name.push(DnType::CommonName, "a leaf with a name");
    let not_a_ca = Issuer::signed_by(named, KeyPair::generate().unwrap(), &mesh.issuer).unwrap();
    refused("issued by a named leaf", &Forged::new(&leaf, &not_a_ca, &[not_a_ca.der(), mesh.issuer.der()]));

    let mut short = ca_params("no CA below");
    short.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let short = Issuer::signed_by(short, KeyPair::generate().unwrap(), &mesh.root).unwrap();
    let below = Issuer::signed_by(ca_params("below"), KeyPair::generate().unwrap(), &short).unwrap();
    refused("a CA where none may be", &Forged::new(&leaf, &below, &[below.der(), short.der()]));

    let mut long = mesh.forge(&leaf);
    long.chain.extend(std::iter::repeat_n(mesh.root.der().clone(), 7));
    refused("a chain of nine", &long);
}

#[test]
fn certificates_out_of_their_time() {
    let mesh = Mesh::new();
    let now = SystemTime::now();
    let expired = mesh.forge(&with(|params| params.not_after = (now - MINUTE).into()));
    refused_by_both(&mesh, "expired", &expired, Refusal::Expired);
    let early = mesh.forge(&with(|params| params.not_before = (now + MINUTE).into()));
    refused_by_both(&mesh, "not yet valid", &early, Refusal::NotYetValid);

    let mut params = ca_params("old issuer");
    params.not_after = (now - MINUTE).into();
    let old = Issuer::signed_by(params, KeyPair::generate().unwrap(), &mesh.root).unwrap();
    let forged = Forged::new(&leaf_params(WEB), &old, &[old.der()]);
    refused_by_both(&mesh, "expired issuer", &forged, Refusal::Expired);
}

#[test]
fn certificates_for_another_use() {
    let mesh = Mesh::new();
    let ca = IsCa::Ca(BasicConstraints::Unconstrained);
    for (case, params) in [
        ("no extended key usage", with(|params| params.extended_key_usages.clear())),
        (
            "code signing only",
            with(|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
        ),
        (
            "any extended key usage",
            with(|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any]),
        ),
        ("a CA as a leaf", with(|params| params.is_ca = ca)),
        ("no key usage", with(|params| params.key_usages.clear())),
        ("key agreement only", with(|params| params.key_usages = vec![KeyUsagePurpose::KeyAgreement])),
        ("may sign certificates", with(|params| params.key_usages.push(KeyUsagePurpose::KeyCertSign))),
        ("may sign revocations", with(|params| params.key_usages.push(KeyUsagePurpose::CrlSign))),
    ] {
        refused_by_both(&mesh, case, &mesh.forge(&params), Refusal::WrongUsage);
    }
}

#[test]
fn a_leaf_for_one_side_is_refused_on_the_other() {
    let mesh = Mesh::new();
    let honest = mesh.workload(&orders());
    let only = |usage| mesh.forge(&with(|params| params.extended_key_usages = vec![usage])).certified();

    let (for_servers, for_clients) =
        (only(ExtendedKeyUsagePurpose::ServerAuth), only(ExtendedKeyUsagePurpose::ClientAuth));
    let outcome = handshake(forged_client(&honest, &orders(), for_servers.clone()), server_config(&honest));
    assert_eq!(outcome.server_refusal(), Some(Refusal::WrongUsage));
    handshake(client_config(&honest, &web()), forged_server(for_servers)).succeeded();

    let outcome = handshake(client_config(&honest, &web()), forged_server(for_clients.clone()));
    assert_eq!(outcome.client_refusal(), Some(Refusal::WrongUsage));
    handshake(forged_client(&honest, &orders(), for_clients), server_config(&honest)).succeeded();
}

#[test]
fn names_other_than_one_identity() {
    let mesh = Mesh::new();
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let dns = |text: &str| SanType::DnsName(text.try_into().unwrap());
    let mail = |text: &str| SanType::Rfc822Name(text.try_into().unwrap());
    let other = SanType::OtherName((
        vec![1, 3, 6, 1, 4, 1, 311, 20, 2, 3],
        rcgen::OtherNameValue::Utf8String(WEB.into()),
    ));
    let long = format!("spiffe://outrigger.local/ns/shop/sa/{}", "a".repeat(3 * 1024));
    for (case, names) in [
        ("no name", vec![]),
        ("two identities", vec![uri(WEB), uri("spiffe://outrigger.local/ns/shop/sa/orders")]),
        ("the same identity twice", vec![uri(WEB), uri(WEB)]),
        ("an identity and a URL", vec![uri(WEB), uri("https://web.shop")]),
        ("a URL and an identity", vec![uri("https://web.shop"), uri(WEB)]),
        ("an identity as a DNS name", vec![dns(WEB)]),
        ("an identity and a DNS name", vec![uri(WEB), dns("web.shop")]),
        ("an identity as a mail address", vec![mail(WEB)]),
        ("an identity and a mail address", vec![mail("web@shop"), uri(WEB)]),
        ("an identity and an address", vec![uri(WEB), SanType::IpAddress([127, 0, 0, 1].into())]),
        ("an identity as another name", vec![other.clone()]),
        ("an identity and another name", vec![uri(WEB), other]),
        ("only a URL", vec![uri("https://outrigger.local/ns/shop/sa/web")]),
        ("percent encoding", vec![uri("spiffe://outrigger.local/ns/shop/sa/web%2forders")]),
        ("percent-encoded separators", vec![uri("spiffe://outrigger.local/ns/shop%2fsa%2fweb/sa/x")]),
        ("trailing slash", vec![uri("spiffe://outrigger.local/ns/shop/sa/web/")]),
        ("upper-case trust domain", vec![uri("spiffe://OUTRIGGER.local/ns/shop/sa/web")]),
        ("upper-case scheme", vec![uri("SPIFFE://outrigger.local/ns/shop/sa/web")]),
        ("no path", vec![uri("spiffe://outrigger.local")]),
        ("another path", vec![uri("spiffe://outrigger.local/shop/web")]),
        ("a query", vec![uri("spiffe://outrigger.local/ns/shop/sa/web?x")]),
        ("a path of 3 KiB", vec![uri(&long)]),
    ] {
        let forged = mesh.forge(&with(|params| {
            params.subject_alt_names = names;
            params.distinguished_name.push(DnType::CommonName, WEB);
        }));
        refused_by_both(&mesh, case, &forged, Refusal::BadSan);
    }
}

#[test]
fn another_trust_domain_below_our_root() {
    let mesh = Mesh::new();
    for name in [
        "spiffe://other.local/ns/shop/sa/web",
        "spiffe://outrigger.local.evil/ns/shop/sa/web",
        "spiffe://outrigger.loca/ns/shop/sa/web",
        "spiffe://sub.outrigger.local/ns/shop/sa/web",
    ] {
        refused_by_both(&mesh, name, &mesh.forge(&leaf_params(name)), Refusal::WrongTrustDomain);
    }
}

#[test]
fn a_client_accepts_only_the_identity_that_it_dialled() {
    let mesh = Mesh::new();
    let client = mesh.workload(&web());
    for other in [
        "spiffe://outrigger.local/ns/shop/sa/payments",
        "spiffe://outrigger.local/ns/other/sa/orders",
        "spiffe://outrigger.local/ns/shop/sa/orders.v2",
    ] {
        let server = mesh.workload(&id(other));
        let outcome = handshake(client_config(&client, &orders()), server_config(&server));
        assert_eq!(outcome.client_refusal(), Some(Refusal::WrongIdentity), "{other}");
        let outcome = handshake(client.bootstrap_config(&orders(), &[ALPN]), server_config(&server));
        assert_eq!(outcome.client_refusal(), Some(Refusal::WrongIdentity), "{other}");
        assert_eq!(outcome.received, b"");
    }
}

#[test]
fn a_client_without_a_certificate() {
    let mesh = Mesh::new();
    let server = mesh.workload(&orders());
    let nobody = outrigger_certs::Credentials::new(mesh.ca.bundle().clone());
    let client = nobody.bootstrap_config(&orders(), &[ALPN]);

    let outcome = handshake(client.clone(), server_config(&server));
    assert_eq!(outcome.server_refusal(), Some(Refusal::NoCertificate));
    assert_eq!(outcome.received, b"");

    let optional = server.server_config(&[ALPN], ClientAuth::Optional).unwrap();
    let outcome = handshake(client, optional.clone()).succeeded();
    assert_eq!(peer_identity(&outcome.server), None);
    // Optional means that it may be missing, not that it goes unread.
    let outcome = handshake(client_config(&mesh.workload(&web()), &orders()), optional).succeeded();
    assert_eq!(peer_identity(&outcome.server), Some(web()));
}

#[test]
fn a_certificate_without_its_key_is_worthless() {
    let mesh = Mesh::new();
    let honest = mesh.workload(&orders());
    let mut stolen = mesh.forge(&leaf_params(WEB));
    stolen.key = KeyPair::generate().unwrap();
    let outcome = handshake(forged_client(&honest, &orders(), stolen.certified()), server_config(&honest));
    assert!(outcome.server_error.is_some() && outcome.received.is_empty());
    let outcome = handshake(client_config(&honest, &web()), forged_server(stolen.certified()));
    assert!(outcome.client_error.is_some() && outcome.received.is_empty());
}

#[test]
fn certificates_that_are_none() {
    let mesh = Mesh::new();
    let good = mesh.forge(&leaf_params(WEB));
    let mut trailing = good.chain[0].to_vec();
    trailing.push(0);
    let truncated = good.chain[0][..good.chain[0].len() - 1].to_vec();
    let key = good.certified().key.clone();
    for bytes in
        [vec![0], b"-----BEGIN CERTIFICATE-----".to_vec(), vec![0x30, 0x80, 0, 0], trailing, truncated]
    {
        let certified = CertifiedKey::new(vec![CertificateDer::from(bytes)], key.clone());
        refused_certified(&mesh, "not a certificate", &Arc::new(certified), Refusal::Malformed);
    }
}

#[test]
fn four_mebibytes_of_chain_end_the_handshake_early() {
    let mesh = Mesh::new();
    let honest = mesh.workload(&orders());
    let mut forged = mesh.forge(&leaf_params(WEB));
    let large =
        mesh.forge(&with(|params| params.distinguished_name.push(DnType::CommonName, "x".repeat(15_000))));
    forged.chain.extend(std::iter::repeat_n(large.chain[0].clone(), 4 * 1024 / 15));
    let outcome = handshake(forged_client(&honest, &orders(), forged.certified()), server_config(&honest));
    assert!(
        matches!(outcome.server_error, Some(rustls::Error::InvalidMessage(_))),
        "{:?}",
        outcome.server_error
    );
    let outcome = handshake(client_config(&honest, &web()), forged_server(forged.certified()));
    assert!(
        matches!(outcome.client_error, Some(rustls::Error::InvalidMessage(_))),
        "{:?}",
        outcome.client_error
    );
}

#[test]
fn every_handshake_is_tls_1_3_post_quantum_and_whole() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload(&web()), mesh.workload(&orders()));
    let (client, server) = (client_config(&client, &orders()), server_config(&server));
    // The second time would resume, if anything did.
    for _ in 0..2 {
        let outcome = handshake(client.clone(), server.clone()).succeeded();
        assert_eq!(outcome.server.protocol_version(), Some(ProtocolVersion::TLSv1_3));
        let group = outcome.server.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(group, NamedGroup::X25519MLKEM768);
        assert_eq!(outcome.server.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(outcome.client.tls13_tickets_received(), 0);
    }
    assert!(!client.enable_early_data && !client.enable_sni);
    assert_eq!((server.max_early_data_size, server.send_tls13_tickets), (0, 0));
    assert!(!server.session_storage.can_cache() && !server.ticketer.enabled());
}

#[test]
fn no_name_is_sent_in_clear() {
    let mesh = Mesh::new();
    let config = client_config(&mesh.workload(&web()), &orders());
    let mut client = ClientConnection::new(config, server_name()).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    let mut acceptor = rustls::server::Acceptor::default();
    acceptor.read_tls(&mut hello.as_slice()).unwrap();
    let accepted = acceptor.accept().unwrap().unwrap();
    assert_eq!(accepted.client_hello().server_name(), None);
    assert_eq!(accepted.client_hello().alpn().unwrap().collect::<Vec<_>>(), [ALPN]);
}

#[test]
fn alpn_unknown_is_refused_and_none_is_seen() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload(&web()), mesh.workload(&orders()));
    let outcome = handshake(client.client_config(&orders(), &[b"h2"]).unwrap(), server_config(&server));
    assert!(matches!(outcome.server_error, Some(rustls::Error::NoApplicationProtocol)));
    assert!(refusal(&outcome.server_error.unwrap()).is_none());
    let outcome =
        handshake(client.client_config(&orders(), &[]).unwrap(), server_config(&server)).succeeded();
    assert_eq!(outcome.server.alpn_protocol(), None);
}

#[test]
fn a_handshake_in_single_bytes() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload(&web()), mesh.workload(&orders()));
    handshake_in_pieces(client_config(&client, &orders()), server_config(&server), 1).succeeded();
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).unwrap();
    let mut record = vec![22, 3, 1];
    record.extend((length + 4).to_be_bytes());
    record.extend([kind, 0]);
    record.extend(length.to_be_bytes());
    record.extend(body);
    record
}

/// A hello as TLS 1.0 to 1.2 send it: no `supported_versions`, ECDHE with AES-GCM.
#[test]
fn a_client_of_an_older_tls_gets_an_alert() {
    let mesh = Mesh::new();
    let server = server_config(&mesh.workload(&orders()));
    for version in [3u8, 2, 1] {
        let mut body = vec![3, version];
        body.extend([7; 32]);
        body.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x2f, 1, 0, 0, 18]);
        body.extend([0, 10, 0, 4, 0, 2, 0, 23]); // supported_groups: secp256r1
        body.extend([0, 13, 0, 6, 0, 4, 4, 3, 8, 4]); // signature_algorithms
        let mut connection = ServerConnection::new(server.clone()).unwrap();
        connection.read_tls(&mut message(1, &body).as_slice()).unwrap();
        let error = connection.process_new_packets().unwrap_err();
        assert!(matches!(error, rustls::Error::PeerIncompatible(_)), "3.{version}: {error:?}");
        let mut reply = Vec::new();
        connection.write_tls(&mut reply).unwrap();
        // record type alert, level fatal, protocol_version (70)
        assert_eq!((reply[0], &reply[5..]), (21, [2, 70].as_slice()), "3.{version}");
    }
}

#[test]
fn a_server_of_an_older_tls_is_refused() {
    let mesh = Mesh::new();
    let config = client_config(&mesh.workload(&web()), &orders());
    let mut client = ClientConnection::new(config, server_name()).unwrap();
    client.writer().write_all(PAYLOAD).unwrap();
    client.write_tls(&mut Vec::new()).unwrap();
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0xc0, 0x2b, 0]);
    client.read_tls(&mut message(2, &body).as_slice()).unwrap();
    let error = client.process_new_packets().unwrap_err();
    assert!(matches!(error, rustls::Error::PeerIncompatible(_)), "{error:?}");
}

#[derive(Debug)]
struct At(SystemTime);

impl TimeProvider for At {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(self.0.duration_since(UNIX_EPOCH).unwrap()))
    }
}

fn at(
    time: SystemTime,
    client: &ClientConfig,
    server: &ServerConfig,
) -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let (mut client, mut server) = (client.clone(), server.clone());
    client.time_provider = Arc::new(At(time));
    server.time_provider = Arc::new(At(time));
    (Arc::new(client), Arc::new(server))
}

#[test]
fn clocks_may_differ_by_five_minutes() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload(&web()), mesh.workload(&orders()));
    let (client, server) = (client_config(&client, &orders()), server_config(&server));
    let now = SystemTime::now();
    for time in [now - 5 * MINUTE, now, now + 5 * MINUTE, now + Duration::from_hours(23)] {
        let (client, server) = at(time, &client, &server);
        handshake(client, server).succeeded();
    }
    for (time, reason) in [
        (now - Duration::from_hours(1), Refusal::NotYetValid),
        (now + Duration::from_hours(25), Refusal::Expired),
    ] {
        let (client, server) = at(time, &client, &server);
        assert_eq!(handshake(client, server).client_refusal(), Some(reason));
    }
}

#[test]
fn a_refusal_is_found_in_an_io_error_too() {
    let error: rustls::Error = rustls::CertificateError::Expired.into();
    let error = std::io::Error::new(std::io::ErrorKind::InvalidData, error);
    assert_eq!(refusal(&error), Some(Refusal::Expired));
    assert_eq!(refusal(&std::io::Error::other("reset")), None);
    assert_eq!(Refusal::Expired.as_str(), "expired");
}

#[test]
fn the_provider_knows_no_suite_below_tls_1_3() {
    let provider = provider();
    assert!(provider.cipher_suites.iter().all(|suite| suite.tls13().is_some()));
    assert_eq!(provider.kx_groups[0].name(), NamedGroup::X25519MLKEM768);
}
