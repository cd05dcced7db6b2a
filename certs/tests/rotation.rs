//! Credentials that change while they are used: leaves are renewed, roots come and go.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;

use common::*;
use outrigger_certs::{
    BundleError, ClientAuth, Credentials, CredentialsError, Refusal, TrustBundle, peer_identity,
};
use rustls_pki_types::CertificateDer;

fn bundle(meshes: &[&Mesh], epoch: u64) -> TrustBundle {
    TrustBundle::new(domain(), meshes.iter().map(|mesh| mesh.root.der().clone()), epoch).unwrap()
}

#[test]
fn a_root_is_replaced_without_a_refused_handshake() {
    let (old, new) = (Mesh::new(), Mesh::new());
    let (client, server) = (old.workload(&web()), old.workload(&orders()));
    let works = || {
        handshake(client_config(&client, &orders()), server_config(&server)).succeeded();
        handshake(client_config(&server, &web()), server_config(&client)).succeeded();
    };
    works();
    // Trust both, one end after the other; then issue from the new one, one end after the other; then drop the old.
    for end in [&client, &server] {
        assert_eq!(end.set_bundle(bundle(&[&old, &new], 2)), Ok(true));
        works();
    }
    for end in [&client, &server] {
        let id = end.leaf().unwrap().id().clone();
        end.set_leaf(new.ca.issue_own(&id, DAY).unwrap()).unwrap();
        works();
    }
    for end in [&client, &server] {
        assert_eq!(end.set_bundle(bundle(&[&new], 3)), Ok(true));
        works();
    }
    let left_behind = old.workload(&web());
    let outcome = handshake(client_config(&left_behind, &orders()), server_config(&server));
    assert_eq!(outcome.client_refusal(), Some(Refusal::UntrustedChain));
    let outcome = handshake(
        forged_client(&client, &orders(), old.forge(&leaf_params(web().as_str())).certified()),
        server_config(&server),
    );
    assert_eq!(outcome.server_refusal(), Some(Refusal::UntrustedChain));
}

#[test]
fn each_change_makes_an_epoch_and_a_configuration() {
    let mesh = Mesh::new();
    let credentials = Credentials::new(bundle(&[&mesh], 0));
    assert_eq!(credentials.epoch(), 0);
    assert!(credentials.leaf().is_none());
    assert_eq!(
        credentials.server_config(&[ALPN], ClientAuth::Required).unwrap_err(),
        CredentialsError::NoLeaf
    );
    assert_eq!(credentials.client_config(&orders(), &[ALPN]).unwrap_err(), CredentialsError::NoLeaf);

    credentials.set_leaf(mesh.ca.issue_own(&web(), DAY).unwrap()).unwrap();
    assert_eq!(credentials.epoch(), 1);
    let first = server_config(&credentials);
    assert!(Arc::ptr_eq(&first, &server_config(&credentials)));
    // A handle is a handle to the same thing.
    assert!(Arc::ptr_eq(&first, &server_config(&credentials.clone())));
    for (alpn, client_auth) in [
        (&[b"h2".as_slice()][..], ClientAuth::Required),
        (&[ALPN], ClientAuth::Optional),
        (&[], ClientAuth::Required),
    ] {
        let other = credentials.server_config(alpn, client_auth).unwrap();
        assert!(!Arc::ptr_eq(&first, &other));
        assert!(Arc::ptr_eq(&other, &credentials.server_config(alpn, client_auth).unwrap()));
    }

    // A bundle with the same roots changes nothing but the newest epoch seen.
    let other = Mesh::new();
    for epoch in [0, 1] {
        assert_eq!(credentials.set_bundle(bundle(&[&mesh], epoch)), Ok(false));
        assert_eq!((credentials.epoch(), credentials.trust_epoch()), (1, 0));
    }
    assert_eq!(credentials.bundle().epoch(), 1);
    assert_eq!(credentials.set_bundle(bundle(&[&mesh, &other], 2)), Ok(true));
    assert_eq!((credentials.epoch(), credentials.trust_epoch()), (2, 1));
    assert_eq!(credentials.set_bundle(bundle(&[&other, &mesh], 2)), Ok(false));
    credentials.set_leaf(mesh.ca.issue_own(&web(), DAY).unwrap()).unwrap();
    assert_eq!((credentials.epoch(), credentials.trust_epoch()), (3, 1));
    assert!(!Arc::ptr_eq(&first, &server_config(&credentials)));
}

/// What was built before a change goes on working until its owner drops it.
#[test]
fn a_configuration_outlives_its_epoch() {
    let mesh = Mesh::new();
    let (client, server) = (mesh.workload(&web()), mesh.workload(&orders()));
    let (dial, accept) = (client_config(&client, &orders()), server_config(&server));
    server.set_leaf(mesh.ca.issue_own(&orders(), DAY).unwrap()).unwrap();
    client.set_leaf(mesh.ca.issue_own(&web(), DAY).unwrap()).unwrap();
    let outcome = handshake(dial, accept).succeeded();
    assert_eq!(peer_identity(&outcome.server), Some(web()));
}

#[test]
fn an_old_bundle_does_not_come_back() {
    let (old, new) = (Mesh::new(), Mesh::new());
    let credentials = Credentials::new(bundle(&[&old, &new], 5));
    for (offered, roots) in [(4, vec![&old, &new]), (4, vec![&old]), (0, vec![&new])] {
        let refused = credentials.set_bundle(bundle(&roots, offered));
        assert_eq!(refused, Err(CredentialsError::StaleBundle { held: 5, offered }));
    }
    assert_eq!((credentials.epoch(), credentials.bundle().roots().len()), (0, 2));
    // A controller that counts anew after its roots were replaced must not end all trust.
    assert_eq!(credentials.set_bundle(bundle(&[&new], 5)), Ok(true));
    assert_eq!(credentials.bundle().roots(), [new.root.der().clone()]);
}

#[test]
fn another_trust_domain_is_not_taken() {
    let mesh = Mesh::new();
    let credentials = mesh.workload(&web());
    let other = TrustBundle::new("other.local".parse().unwrap(), [mesh.root.der().clone()], 9).unwrap();
    assert_eq!(credentials.set_bundle(other.clone()), Err(CredentialsError::OtherTrustDomain));
    let leaf = credentials.leaf().unwrap();
    assert_eq!(Credentials::new(other).set_leaf(leaf), Err(CredentialsError::OtherTrustDomain));
}

#[test]
fn a_bundle_reads_back_from_its_pem() {
    let (one, two) = (Mesh::new(), Mesh::new());
    let both = bundle(&[&one, &two, &one], 7);
    assert_eq!(both.roots().len(), 2);
    let again = TrustBundle::from_pem(domain(), both.to_pem().as_bytes(), 0).unwrap();
    assert_eq!(again.roots(), both.roots());
    assert_eq!((again.epoch(), again.trust_domain()), (0, &domain()));
}

#[test]
fn bundles_are_bounded_and_hold_cas_only() {
    let mesh = Mesh::new();
    let new = |roots: Vec<CertificateDer<'static>>| TrustBundle::new(domain(), roots, 1).map(|_| ());
    assert!(matches!(new(vec![]), Err(BundleError::Empty)));
    assert!(matches!(new(vec![mesh.root.der().clone(); 17]), Err(BundleError::TooLarge(_))));
    assert!(matches!(new(vec![vec![0; 9 * 1024].into()]), Err(BundleError::TooLarge(_))));
    let leaf = mesh.forge(&leaf_params(web().as_str())).chain[0].clone();
    assert!(matches!(new(vec![mesh.root.der().clone(), leaf]), Err(BundleError::Root { index: 1, .. })));
    let trailing = [mesh.root.der().as_ref(), &[0]].concat();
    assert!(matches!(new(vec![trailing.into()]), Err(BundleError::Root { index: 0, .. })));
    let pem = |text: &[u8]| TrustBundle::from_pem(domain(), text, 1).map(|_| ());
    assert!(matches!(pem(b""), Err(BundleError::Empty)));
    assert!(matches!(
        pem(b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"),
        Err(BundleError::Pem(_))
    ));
    assert!(matches!(pem(&vec![b'#'; 300 * 1024]), Err(BundleError::TooLarge(_))));
}
