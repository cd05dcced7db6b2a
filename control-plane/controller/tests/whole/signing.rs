//! Tokens in, certificates out.

use outrigger_certs::KeyPair;
use tonic::Code;

use crate::harness::{Bench, identity};

#[tokio::test(flavor = "multi_thread")]
async fn a_token_gives_its_identity_and_a_one_time_token_only_once() {
    let bench = Bench::start().await;
    let token = bench.new_token("orders", &["orders.shop"], &[], "one-time").await;
    let workload = bench.join(&token).await.unwrap();
    assert_eq!(workload.credentials.leaf().unwrap().id(), &identity("orders"));

    let again = bench.join(&token).await.err().unwrap();
    assert_eq!(again.code(), Code::Unauthenticated);
    assert!(again.message().contains("used already"), "{again}");
    for wrong in ["ort1_abc_def", "nonsense", &token.replace("ort1_", "ort1_0")] {
        assert_eq!(bench.join(wrong).await.err().unwrap().code(), Code::Unauthenticated, "{wrong}");
    }
    let (_, listed) = bench.api("GET", "/api/v1/tokens", None).await;
    assert_eq!(listed["tokens"][0]["used"], 1);
    assert_eq!(listed["tokens"][0]["usable"], false);
    assert!(!listed.to_string().contains(token.rsplit('_').next().unwrap()), "the secret is shown once");
    let metrics = bench.monitoring("/metrics").await;
    assert!(metrics.contains("outrigger_certificates_signed_total{reason=\"token\"} 1"), "{metrics}");
    assert!(metrics.contains("outrigger_certificates_refused_total{reason=\"token\"} 4"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_bearers_of_a_one_time_token_at_once_get_one_leaf() {
    let bench = Bench::start().await;
    let token = bench.new_token("orders", &[], &[], "one-time").await;
    let results = futures_util::future::join_all((0..8).map(|_| bench.join(&token))).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_name_in_a_csr_is_ignored() {
    let bench = Bench::start().await;
    let token = bench.token("orders", &[], &[]).await;
    let mut params = rcgen::CertificateParams::new(vec!["controller".to_owned()]).unwrap();
    let other = "spiffe://outrigger.local/ns/outrigger-system/sa/outrigger-controller".try_into().unwrap();
    params.subject_alt_names.push(rcgen::SanType::URI(other));
    params.distinguished_name.push(rcgen::DnType::CommonName, "spiffe://outrigger.local/ns/shop/sa/payments");
    let key = rcgen::KeyPair::generate().unwrap();
    let csr = params.serialize_request(&key).unwrap();
    let signed = bench.sign(bench.stranger().await, csr.der().to_vec(), &token).await.unwrap();
    let (_, leaf) = x509_parser::parse_x509_certificate(&signed.chain[0]).unwrap();
    let names = &leaf.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert_eq!(names.len(), 1);
    assert!(format!("{names:?}").contains(identity("orders").as_str()), "{names:?}");
    assert!(!leaf.subject().to_string().contains("payments") && !leaf.is_ca());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaf_renews_itself_over_mutual_tls_for_the_same_identity() {
    let mut bench = Bench::start().await;
    let workload = bench.workload("orders", &[]).await;
    // The CA is the same after a restart.
    bench.down().await;
    bench.up().await;
    let key = KeyPair::generate().unwrap();
    let channel = workload.channel(&bench).await;
    let signed = bench.sign(channel, key.csr().unwrap(), "").await.unwrap();
    bench.leaf(key, &signed, Some(&identity("orders")));
    assert_eq!(
        signed.bundle.unwrap().roots,
        bench.bundle().roots().iter().map(|r| r.to_vec()).collect::<Vec<_>>()
    );

    let key = KeyPair::generate().unwrap();
    let nobody = bench.sign(bench.stranger().await, key.csr().unwrap(), "").await.unwrap_err();
    assert_eq!(nobody.code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn csrs_are_bounded_and_must_be_ones() {
    let bench = Bench::start().await;
    let token = bench.token("orders", &[], &[]).await;
    let good = KeyPair::generate().unwrap().csr().unwrap();
    let mut broken = good.clone();
    *broken.last_mut().unwrap() ^= 1;
    for csr in [vec![], vec![0; 20 * 1024], b"not a CSR".to_vec(), [good, vec![0]].concat(), broken] {
        let status = bench.sign(bench.stranger().await, csr, &token).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
    // A megabyte is refused before it is read.
    let status = bench.sign(bench.stranger().await, vec![0; 1024 * 1024], &token).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn signing_is_limited_for_each_identity() {
    let bench = Bench::start_with(&[], |config| config.sign_per_identity_per_second = 1).await;
    let token = bench.token("orders", &[], &[]).await;
    let other = bench.token("web", &[], &[]).await;
    let channel = bench.stranger().await;
    let csr = KeyPair::generate().unwrap().csr().unwrap();
    let mut limited = false;
    for _ in 0..60 {
        if let Err(status) = bench.sign(channel.clone(), csr.clone(), &token).await {
            assert_eq!(status.code(), Code::ResourceExhausted);
            limited = true;
            break;
        }
    }
    assert!(limited);
    bench.sign(channel, csr, &other).await.expect("another identity is not concerned");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_wants_its_token_and_gives_out_no_controller() {
    let bench = Bench::start().await;
    for wrong in ["", "x", "0000000000000000000000000000000000000000000000000000000000000000"] {
        for path in ["/api/v1/tokens", "/api/v1/services", "/api/v1/proxies", "/api/v1/sources", "/"] {
            assert_eq!(bench.api_as(wrong, "GET", path, None).await.0, 401, "{path}");
        }
        assert_eq!(bench.api_as(wrong, "POST", "/api/v1/tokens", Some(serde_json::json!({}))).await.0, 401);
    }
    for request in [
        serde_json::json!({ "identity": bench.config.identity().unwrap().as_str() }),
        serde_json::json!({ "identity": "spiffe://elsewhere/ns/a/sa/b" }),
        serde_json::json!({ "identity": identity("a").as_str(), "colour": "red" }),
        serde_json::json!({}),
    ] {
        let (status, answer) = bench.api("POST", "/api/v1/tokens", Some(request)).await;
        assert!((400..500).contains(&status), "{status} {answer}");
        assert!(answer["error"]["message"].is_string(), "{answer}");
    }
    let token = bench.token("orders", &[], &[]).await;
    let id = token.split('_').nth(1).unwrap();
    let workload = bench.join(&token).await.unwrap();
    let csr = KeyPair::generate().unwrap().csr().unwrap();
    bench.sign(workload.channel(&bench).await, csr.clone(), "").await.unwrap();
    assert_eq!(bench.api("DELETE", &format!("/api/v1/tokens/{id}"), None).await.0, 204);
    assert_eq!(bench.api("DELETE", &format!("/api/v1/tokens/{id}"), None).await.0, 404);
    assert_eq!(bench.join(&token).await.err().unwrap().code(), Code::Unauthenticated);
    let refused = bench.sign(workload.channel(&bench).await, csr, "").await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "leaves run out after the revocation: {refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_stream_outlives_its_leaf_and_the_controller_renews_its_own() {
    let bench = Bench::start_with(&[], |config| config.leaf_life = "2s".parse().unwrap()).await;
    let token = bench.token("web", &[], &[]).await;
    let mut stream = bench.join(&token).await.unwrap().discover(&bench).await;
    let status = stream.end().await.expect("a reason");
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("expired"), "{status}");
    // The leaf that the controller started with has expired by now as well.
    bench.join(&token).await.unwrap().discover(&bench).await;
}
