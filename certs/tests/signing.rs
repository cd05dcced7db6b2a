//! What the CA signs, for which requests, and what a workload takes back.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

use common::*;
use outrigger_certs::{
    CaError, CertificateAuthority, CsrError, KeyPair, Leaf, LeafError, MAX_CSR_BYTES, Refusal, SignError,
    SignedLeaf, SpiffeId,
};
use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

fn refusal_of(mesh: &Mesh, csr: &[u8]) -> CsrError {
    match mesh.ca.sign(csr, &web(), DAY) {
        Err(SignError::Csr(error)) => error,
        other => panic!("{other:?}"),
    }
}

fn request(params: &CertificateParams, key: &rcgen::KeyPair) -> Vec<u8> {
    params.serialize_request(key).unwrap().der().to_vec()
}

fn rcgen_key(algorithm: &'static rcgen::SignatureAlgorithm) -> rcgen::KeyPair {
    rcgen::KeyPair::generate_for(algorithm).unwrap()
}

/// Every property of a leaf that the CA may sign, whatever the request said.
#[track_caller]
fn assert_plain_leaf(signed: &SignedLeaf, public_key: &[u8]) {
    let (rest, leaf) = X509Certificate::from_der(&signed.chain[0]).unwrap();
    assert!(rest.is_empty());
    assert_eq!(leaf.public_key().raw, public_key);
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    // RFC 5280, section 4.2.1.6: critical where the subject is empty
    assert!(names.critical);
    assert_eq!(names.value.general_names, [GeneralName::URI(web().as_str())]);
    assert!(!leaf.basic_constraints().unwrap().unwrap().value.ca);
    assert_eq!(leaf.key_usage().unwrap().unwrap().value.flags, 1);
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth);
    assert!(!usage.any && !usage.code_signing && usage.other.is_empty());
    let oids: HashSet<String> =
        leaf.extensions().iter().map(|extension| extension.oid.to_id_string()).collect();
    // authority and subject key identifier, key usage, names, basic constraints, extended key usage
    let known = ["2.5.29.35", "2.5.29.14", "2.5.29.15", "2.5.29.17", "2.5.29.19", "2.5.29.37"];
    assert_eq!(oids, known.map(String::from).into());
    assert_eq!(leaf.extensions().len(), known.len());
}

#[test]
fn nothing_but_the_key_of_a_request_is_signed() {
    let mesh = Mesh::new();
    let key = rcgen_key(&rcgen::PKCS_ECDSA_P256_SHA256);
    let plain = CertificateParams::default();
    let other = SanType::URI(
        "spiffe://outrigger.local/ns/outrigger-system/sa/outrigger-controller".try_into().unwrap(),
    );
    let with = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = plain.clone();
        change(&mut params);
        params
    };
    for params in [
        plain.clone(),
        with(&|params| params.distinguished_name.push(DnType::CommonName, orders().to_string())),
        with(&|params| params.subject_alt_names = vec![other.clone()]),
        with(&|params| {
            params.subject_alt_names = vec![
                other.clone(),
                SanType::DnsName("kubernetes.default".try_into().unwrap()),
                SanType::IpAddress([10, 0, 0, 1].into()),
                SanType::Rfc822Name("root@shop".try_into().unwrap()),
            ];
        }),
        with(&|params| {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        }),
        with(&|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning]),
        with(&|params| {
            let mut extension = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
            extension.set_criticality(true);
            params.custom_extensions = vec![extension];
        }),
    ] {
        let signed = mesh.ca.sign(&request(&params, &key), &web(), DAY).unwrap();
        assert_plain_leaf(&signed, &key.subject_public_key_info());
    }
}

#[test]
fn keys_of_every_supported_kind_are_signed() {
    let mesh = Mesh::new();
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
        &rcgen::PKCS_RSA_SHA256,
    ] {
        let key = rcgen_key(algorithm);
        let signed = mesh.ca.sign(&request(&CertificateParams::default(), &key), &web(), DAY).unwrap();
        assert_plain_leaf(&signed, &key.subject_public_key_info());
    }
    mesh.ca.sign(include_bytes!("fixtures/rsa-2048.csr"), &web(), DAY).unwrap();
}

#[test]
fn weak_and_strange_keys_are_refused() {
    let mesh = Mesh::new();
    for (case, csr) in [
        ("RSA-512", include_bytes!("fixtures/rsa-512.csr").as_slice()),
        ("RSA-1024", include_bytes!("fixtures/rsa-1024.csr").as_slice()),
        ("P-192", include_bytes!("fixtures/p192.csr").as_slice()),
        ("secp256k1", include_bytes!("fixtures/secp256k1.csr").as_slice()),
        ("P-521", &request(&CertificateParams::default(), &rcgen_key(&rcgen::PKCS_ECDSA_P521_SHA512))),
    ] {
        assert_eq!(refusal_of(&mesh, csr), CsrError::UnsupportedKey, "{case}");
    }
    let sha1 = include_bytes!("fixtures/rsa-2048-sha1.csr");
    assert_eq!(refusal_of(&mesh, sha1), CsrError::UnsupportedSignature);
}

#[test]
fn requests_of_another_size_or_shape_are_refused() {
    let mesh = Mesh::new();
    let good = KeyPair::generate().unwrap().csr().unwrap();
    assert_eq!(refusal_of(&mesh, &vec![0x30; 1024 * 1024]), CsrError::TooLarge);
    assert_eq!(refusal_of(&mesh, &vec![0x30; MAX_CSR_BYTES + 1]), CsrError::TooLarge);
    assert_eq!(refusal_of(&mesh, &vec![0x30; MAX_CSR_BYTES]), CsrError::Malformed);
    assert_eq!(refusal_of(&mesh, &[]), CsrError::Malformed);
    assert_eq!(refusal_of(&mesh, &[good.as_slice(), &[0]].concat()), CsrError::Malformed);
    assert_eq!(refusal_of(&mesh, &[good.as_slice(), &good].concat()), CsrError::Malformed);
    assert_eq!(refusal_of(&mesh, &good[..good.len() - 1]), CsrError::Malformed);
    let pem = "-----BEGIN CERTIFICATE REQUEST-----\n".repeat(100);
    assert_eq!(refusal_of(&mesh, pem.as_bytes()), CsrError::Malformed);
    // A certificate is not a request.
    assert_eq!(refusal_of(&mesh, mesh.issuer.der()), CsrError::Malformed);
}

#[test]
fn a_request_must_be_signed_with_its_own_key() {
    let mesh = Mesh::new();
    let (ours, theirs) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut csr = ours.csr().unwrap();
    let point = ours.der_bytes();
    let place = csr.windows(point.len()).position(|bytes| bytes == point).unwrap();
    csr[place..place + point.len()].copy_from_slice(theirs.der_bytes());
    assert_eq!(refusal_of(&mesh, &csr), CsrError::BadSignature);

    let mut csr = ours.csr().unwrap();
    *csr.last_mut().unwrap() ^= 1;
    assert_eq!(refusal_of(&mesh, &csr), CsrError::BadSignature);
}

#[test]
fn a_leaf_never_outlives_its_issuer() {
    let root = Issuer::self_signed(ca_params("root"), rcgen_key(&rcgen::PKCS_ED25519)).unwrap();
    let mut params = ca_params("short");
    params.not_before = (SystemTime::now() - MINUTE).into();
    params.not_after = (SystemTime::now() + Duration::from_hours(1)).into();
    let issuer = Issuer::signed_by(params, rcgen_key(&rcgen::PKCS_ECDSA_P384_SHA384), &root).unwrap();
    let ca = brought(&issuer, &[], &root).unwrap();
    for ttl in [DAY, Duration::MAX] {
        let leaf = ca.issue_own(&web(), ttl).unwrap();
        assert_eq!(leaf.not_after(), ca.not_after());
        // Nor does it begin before its issuer.
        assert!(leaf.not_before() >= SystemTime::now() - 2 * MINUTE);
    }
    let leaf = ca.issue_own(&web(), MINUTE).unwrap();
    assert!(leaf.not_after() <= SystemTime::now() + MINUTE && leaf.not_after() > SystemTime::now());
}

#[test]
fn leaves_are_backdated_and_their_serials_differ() {
    let mesh = Mesh::new();
    let mut serials = HashSet::new();
    for _ in 0..50 {
        let leaf = mesh.ca.issue_own(&web(), DAY).unwrap();
        assert!(leaf.not_before() <= SystemTime::now() - 5 * MINUTE);
        let (_, parsed) = X509Certificate::from_der(&leaf.chain()[0]).unwrap();
        assert!(parsed.raw_serial().len() <= 20);
        assert!(serials.insert(parsed.raw_serial().to_vec()));
    }
}

#[test]
fn other_trust_domains_are_not_signed() {
    let mesh = Mesh::new();
    let csr = KeyPair::generate().unwrap().csr().unwrap();
    let signed = mesh.ca.sign(&csr, &id("spiffe://other.local/ns/shop/sa/web"), DAY);
    assert!(matches!(signed, Err(SignError::OtherTrustDomain)));
}

#[test]
fn a_workload_refuses_what_it_cannot_use() {
    let (mesh, other) = (Mesh::new(), Mesh::new());
    let bundle = mesh.ca.bundle();
    let now = SystemTime::now();
    let key = KeyPair::generate().unwrap();
    let sign =
        |ca: &CertificateAuthority, id: &SpiffeId, ttl| ca.sign(&key.csr().unwrap(), id, ttl).unwrap().chain;
    let accept =
        |chain, now| Leaf::accept(key.clone(), chain, Some(&web()), bundle, now).map(|_| ()).unwrap_err();

    let chain = sign(&mesh.ca, &web(), DAY);
    assert!(Leaf::accept(key.clone(), chain.clone(), Some(&web()), bundle, now).is_ok());
    assert_eq!(Leaf::accept(key.clone(), chain.clone(), None, bundle, now).unwrap().id(), &web());

    let another = KeyPair::generate().unwrap();
    let mismatch = Leaf::accept(another, chain.clone(), Some(&web()), bundle, now).map(|_| ());
    assert_eq!(mismatch, Err(LeafError::OtherKey));
    assert_eq!(accept(vec![], now), LeafError::Empty);
    assert_eq!(accept(sign(&mesh.ca, &orders(), DAY), now), LeafError::OtherIdentity);
    assert_eq!(accept(chain.clone(), now + 2 * DAY), LeafError::Refused(Refusal::Expired));
    assert_eq!(accept(chain.clone(), now - DAY / 2), LeafError::Refused(Refusal::NotYetValid));
    assert_eq!(accept(chain[..1].to_vec(), now), LeafError::Refused(Refusal::UntrustedChain));
    assert_eq!(accept(sign(&other.ca, &web(), DAY), now), LeafError::Refused(Refusal::UntrustedChain));
    assert_eq!(accept(vec![vec![0u8; 10].into()], now), LeafError::Refused(Refusal::Malformed));

    let mut params = leaf_params(web().as_str());
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let one_sided = params.signed_by(&key, &mesh.issuer).unwrap().der().clone();
    let chain = vec![one_sided, mesh.issuer.der().clone()];
    assert_eq!(accept(chain, now), LeafError::Refused(Refusal::WrongUsage));
}

#[test]
fn a_brought_ca_is_checked() {
    let mesh = Mesh::new();
    let root_key = mesh.root.key().serialize_pem();
    let from_pem = |certificates: &str, key: &str, roots: &str| {
        CertificateAuthority::from_pem(certificates, key, roots, &domain())
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    let (issuer, key, root) = (mesh.issuer.pem(), mesh.issuer.key().serialize_pem(), mesh.root.pem());
    assert_eq!(from_pem(&issuer, &key, &root), Ok(()));
    // Keys as OpenSSL writes them without PKCS#8.
    for ca in [include_str!("fixtures/ca-sec1.pem"), include_str!("fixtures/ca-pkcs1.pem")] {
        assert_eq!(from_pem(ca, ca, ca), Ok(()));
    }
    // A root that issues by itself.
    assert_eq!(from_pem(&root, &root_key, &root), Ok(()));

    let leaf = mesh.forge(&leaf_params(web().as_str()));
    let leaf_pem = pem::encode(&pem::Pem::new("CERTIFICATE", leaf.chain[0].to_vec()));
    let mut old = ca_params("old");
    old.not_after = (SystemTime::now() - MINUTE).into();
    let old = Issuer::signed_by(old, rcgen_key(&rcgen::PKCS_ED25519), &mesh.root).unwrap();
    // /DC=com/DC=example/O=Corp/CN=ca-ec, with its key, made by `openssl req -x509`
    let twice = include_str!("fixtures/dc-twice.pem");
    let mut foreign = ca_params("foreign");
    foreign.subject_alt_names = vec![SanType::URI("spiffe://other.local".try_into().unwrap())];
    let foreign = Issuer::signed_by(foreign, rcgen_key(&rcgen::PKCS_ED25519), &mesh.root).unwrap();
    for (certificates, key, roots, reason) in [
        (issuer.as_str(), root_key.as_str(), root.as_str(), "not this certificate's"),
        (&leaf_pem, &leaf.key.serialize_pem(), &root, "not a CA certificate"),
        (&issuer, &key, &Mesh::new().root.pem(), "not accepted under the roots"),
        (&old.pem(), &old.key().serialize_pem(), &root, "not valid now"),
        (&foreign.pem(), &foreign.key().serialize_pem(), &root, "spiffe://other.local"),
        (twice, twice, twice, "attribute type twice"),
        ("", &key, &root, "there is none"),
        (&issuer, "", &root, "key"),
        (&issuer, &key, "", "no certificate"),
        (&issuer, &key, &leaf_pem, "not a CA certificate"),
        (&issuer, &key, &"#".repeat(300 * 1024), "256 KiB"),
    ] {
        let error = from_pem(certificates, key, roots).unwrap_err();
        assert!(error.contains(reason), "{reason}: {error}");
        assert!(!error.contains("PRIVATE KEY"), "{error}");
    }
}

#[test]
fn an_intermediate_between_issuer_and_root_is_sent_along() {
    let root = Issuer::self_signed(ca_params("root"), rcgen_key(&rcgen::PKCS_ED25519)).unwrap();
    let middle = Issuer::signed_by(ca_params("middle"), rcgen_key(&rcgen::PKCS_ED25519), &root).unwrap();
    let issuer = Issuer::signed_by(ca_params("issuer"), rcgen_key(&rcgen::PKCS_ED25519), &middle).unwrap();
    // The root in the file is left out of what is sent.
    let leaf = brought(&issuer, &[&middle, &root], &root).unwrap().issue_own(&web(), DAY).unwrap();
    assert_eq!(leaf.chain()[1..], [issuer.der().clone(), middle.der().clone()]);
    assert!(brought(&issuer, &[], &root).is_err());

    let mut params = ca_params("a short one");
    params.not_after = (SystemTime::now() + Duration::from_hours(1)).into();
    let middle = Issuer::signed_by(params, rcgen_key(&rcgen::PKCS_ED25519), &root).unwrap();
    let issuer = Issuer::signed_by(ca_params("issuer"), rcgen_key(&rcgen::PKCS_ED25519), &middle).unwrap();
    let leaf = brought(&issuer, &[&middle], &root).unwrap().issue_own(&web(), DAY).unwrap();
    assert!(leaf.not_after() <= SystemTime::now() + Duration::from_hours(1));
}

#[test]
fn the_store_is_made_once_and_private() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("data/ca");
    let first = CertificateAuthority::open_or_create(&dir, &domain()).unwrap();
    let again = CertificateAuthority::open_or_create(&dir, &domain()).unwrap();
    assert_eq!(first.bundle().to_pem(), again.bundle().to_pem());
    // What one signed, the other's peers accept.
    let key = KeyPair::generate().unwrap();
    let signed = first.sign(&key.csr().unwrap(), &web(), DAY).unwrap();
    assert_eq!(signed.chain.len(), 2);
    Leaf::accept(key, signed.chain, Some(&web()), again.bundle(), SystemTime::now()).unwrap();

    let files: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap()).collect();
    assert_eq!(files.iter().map(fs::DirEntry::file_name).collect::<Vec<_>>(), ["ca.pem"]);
    assert_eq!(files[0].metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);

    let own = first.not_after().duration_since(SystemTime::now()).unwrap();
    assert!(own > 3649 * DAY && own <= 3650 * DAY);
}

#[test]
fn of_two_that_start_at_once_both_use_the_winners_store() {
    let dir = tempfile::tempdir().unwrap();
    let roots: HashSet<String> = std::thread::scope(|scope| {
        let start = || CertificateAuthority::open_or_create(dir.path(), &domain()).unwrap().bundle().to_pem();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(roots.len(), 1);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_broken_store_is_an_error_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    CertificateAuthority::open_or_create(dir.path(), &domain()).unwrap();
    let file = dir.path().join("ca.pem");
    let good = fs::read_to_string(&file).unwrap();
    let blocks: Vec<&str> = good.split_inclusive("-----END CERTIFICATE-----\n").collect();
    let other = CertificateAuthority::generate_pem(&domain()).unwrap();
    let (_, other_tail) = other.split_once("-----END CERTIFICATE-----").unwrap();
    for text in [
        String::new(),
        "garbage".into(),
        good[..good.len() / 2].into(),
        good[..good.len() - 40].into(),
        good.replacen("-----END CERTIFICATE-----", "-----END CERTIFICATE----", 1),
        blocks[0].into(),
        [good.as_str(), &good].concat(),
        // Our issuing certificate with another store's keys and root.
        format!("{}{other_tail}", blocks[0].trim_end()),
        "#".repeat(300 * 1024),
    ] {
        fs::write(&file, &text).unwrap();
        let error = CertificateAuthority::open_or_create(dir.path(), &domain()).unwrap_err();
        assert!(matches!(error, CaError::Broken { .. } | CaError::Store(_)), "{error}");
        assert!(!error.to_string().contains("PRIVATE"), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), text);
    }

    fs::write(&file, &good).unwrap();
    let error =
        CertificateAuthority::open_or_create(dir.path(), &"other.local".parse().unwrap()).unwrap_err();
    assert!(error.to_string().contains("spiffe://outrigger.local"), "{error}");

    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let error = CertificateAuthority::open_or_create(dir.path(), &domain()).unwrap_err();
    assert!(error.to_string().contains("chmod 600"), "{error}");

    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    CertificateAuthority::open_or_create(dir.path(), &domain()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A request with a few bytes changed is refused, or it was the same request; it never panics.
    #[test]
    fn a_damaged_request_buys_nothing(changes in proptest::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..4)) {
        let mesh = Mesh::new();
        let key = KeyPair::generate().unwrap();
        let mut csr = key.csr().unwrap();
        for (place, change) in changes {
            let place = place.index(csr.len());
            csr[place] ^= change;
        }
        if let Ok(signed) = mesh.ca.sign(&csr, &web(), DAY) {
            assert_plain_leaf(&signed, &key.subject_public_key_info());
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let mesh = Mesh::new();
        prop_assert!(mesh.ca.sign(&bytes, &web(), DAY).is_err());
        prop_assert!(outrigger_certs::TrustBundle::from_pem(domain(), &bytes, 0).is_err());
        prop_assert!(outrigger_certs::TrustBundle::new(domain(), [bytes.into()], 0).is_err());
    }
}
