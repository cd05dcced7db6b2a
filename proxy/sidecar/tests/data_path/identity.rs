//! Who is who: what the application is told, and which peers are refused.

use http::{HeaderMap, HeaderName, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use outrigger_core::model::Protocol;
use outrigger_proxy::config::Mtls;

use crate::support::*;

/// Every spelling of a claim that we know of (reliability B1).
const CLAIMS: [&str; 10] = [
    "outrigger-client-id",
    "Outrigger-Client-Id",
    "outrigger_client_id",
    "OUTRIGGER_client-ID",
    "l5d-client-id",
    "L5D_CLIENT_ID",
    "x-forwarded-client-cert",
    "X_Forwarded_Client_Cert",
    "x-envoy-peer-metadata",
    "X-Envoy_Internal",
];

/// Says which claims it saw, in headers and trailers.
async fn witness(request: Request<hyper::body::Incoming>) -> Answer {
    let headers = claims(request.headers());
    let trailers = request.into_body().collect().await.unwrap().trailers().map(claims).unwrap_or_default();
    Response::new(full(format!("headers {headers:?} trailers {trailers:?}")))
}

fn claims(headers: &HeaderMap) -> Vec<String> {
    let is_claim = |name: &str| {
        let name = name.to_ascii_lowercase().replace('_', "-");
        name.starts_with("outrigger-") || name.starts_with("x-envoy-") || name.contains("client-")
    };
    headers
        .iter()
        .filter(|(name, _)| is_claim(name.as_str()))
        .map(|(n, v)| format!("{n}={}", v.to_str().unwrap()))
        .collect()
}

fn forged(
    request: http::request::Builder,
) -> Request<http_body_util::combinators::BoxBody<bytes::Bytes, std::convert::Infallible>> {
    let mut trailers = HeaderMap::new();
    for claim in CLAIMS {
        trailers.append(claim.parse::<HeaderName>().unwrap(), "spiffe://evil/ns/a/sa/b".parse().unwrap());
    }
    let frames = [
        Ok::<_, std::convert::Infallible>(Frame::data(bytes::Bytes::from_static(b"x"))),
        Ok(Frame::trailers(trailers)),
    ];
    let mut request = request.body(StreamBody::new(tokio_stream::iter(frames)).boxed()).unwrap();
    for claim in CLAIMS {
        for _ in 0..2 {
            request
                .headers_mut()
                .append(claim.parse::<HeaderName>().unwrap(), "spiffe://evil/ns/a/sa/b".parse().unwrap());
        }
    }
    request
}

fn forged_http1() -> Request<http_body_util::combinators::BoxBody<bytes::Bytes, std::convert::Infallible>> {
    forged(
        Request::post("/").header("host", "a").header("te", "trailers").header("trailer", CLAIMS.join(", ")),
    )
}

fn forged_http2() -> Request<http_body_util::combinators::BoxBody<bytes::Bytes, std::convert::Infallible>> {
    forged(Request::post("http://a/").version(http::Version::HTTP_2))
}

#[tokio::test]
async fn the_application_sees_the_verified_peer_and_nothing_else() {
    let expected = format!("headers [\"outrigger-client-id={}\"] trailers []", id("client"));
    let pair1 = pair(http1_app(witness).await, Protocol::Detect);
    let mut client = http1(pair1.address).await;
    let (_, body, _) = whole(soon("http1", client.send_request(forged_http1())).await.unwrap()).await;
    assert_eq!(body, expected);
    let pair2 = pair(http2_app(witness).await, Protocol::Detect);
    let mut client = http2(pair2.address).await;
    let (_, body, _) = whole(soon("http2", client.send_request(forged_http2())).await.unwrap()).await;
    assert_eq!(body, expected);
}

#[tokio::test]
async fn without_mutual_tls_there_is_no_identity() {
    let permissive = |server: &mut outrigger_proxy::config::Config| server.mtls = Mtls::Permissive;
    let expected = "headers [] trailers []";
    let pair1 = pair_with(http1_app(witness).await, Protocol::Detect, |_| {}, permissive);
    let mut client = http1(pair1.inbound).await;
    let (_, body, _) = whole(soon("http1", client.send_request(forged_http1())).await.unwrap()).await;
    assert_eq!(body, expected);
    let pair2 = pair_with(http2_app(witness).await, Protocol::Detect, |_| {}, permissive);
    let mut client = http2(pair2.inbound).await;
    let (_, body, _) = whole(soon("http2", client.send_request(forged_http2())).await.unwrap()).await;
    assert_eq!(body, expected);
}

#[tokio::test]
async fn an_endpoint_that_is_somebody_else_gets_no_byte() {
    let app = http1_app(witness).await;
    let ca = Ca::new();
    // The catalog names "server"; the sidecar there is "impostor".
    let (server, inbound) = Sidecar::server(ca.context("impostor", config()), app);
    let endpoints = vec![endpoint("one", inbound, Some(&id("server")))];
    let (_client, address, _) =
        Sidecar::client(ca.context("client", config()), service(Protocol::Http1, endpoints));
    let mut client = http1(address).await;
    let (head, _, _) = whole(soon("the refusal", client.send_request(get("/"))).await.unwrap()).await;
    assert_eq!(head.status, 503);
    let reason = head.headers["outrigger-reason"].to_str().unwrap();
    assert!(reason.starts_with("proxy; identity_mismatch; "), "{reason}");
    assert!(!server.metrics().contains(r#"requests_total{direction="inbound""#));
}

#[tokio::test]
async fn an_endpoint_of_another_authority_gets_no_byte() {
    let app = http1_app(witness).await;
    let (ca, other) = (Ca::new(), Ca::new());
    let (server, inbound) = Sidecar::server(other.context("server", config()), app);
    let endpoints = vec![endpoint("one", inbound, Some(&id("server")))];
    let (_client, address, _) =
        Sidecar::client(ca.context("client", config()), service(Protocol::Http1, endpoints));
    let mut client = http1(address).await;
    let (head, _, _) = whole(soon("the refusal", client.send_request(get("/"))).await.unwrap()).await;
    assert!(head.headers["outrigger-reason"].to_str().unwrap().starts_with("proxy; identity_mismatch; "));
    assert!(!server.metrics().contains(r#"requests_total{direction="inbound""#));
}

#[tokio::test]
async fn a_meshed_endpoint_that_answers_in_clear_gets_no_request() {
    // An application where a sidecar should be.
    let app = http1_app(witness).await;
    let ca = Ca::new();
    let endpoints = vec![endpoint("one", app, Some(&id("server")))];
    let (_client, address, _) =
        Sidecar::client(ca.context("client", config()), service(Protocol::Http1, endpoints));
    let mut client = http1(address).await;
    let (head, _, _) = whole(soon("the refusal", client.send_request(get("/"))).await.unwrap()).await;
    assert_eq!(head.status, 503);
    assert!(
        head.headers["outrigger-reason"].to_str().unwrap().starts_with("proxy; identity_mismatch; "),
        "{head:?}"
    );
}

#[tokio::test]
async fn connections_move_when_the_trust_bundle_changes() {
    let app = http1_app(witness).await;
    let pair = pair(app, Protocol::Detect);
    let mut client = http1(pair.address).await;
    whole(client.send_request(get("/")).await.unwrap()).await;
    let connections =
        |n: usize| format!(r#"outrigger_connections_total{{direction="outbound",kind="mesh_h2"}} {n}"#);
    assert!(pair.client.metrics().contains(&connections(1)));
    // The same roots and one more, under a new epoch, at one side and then at the other.
    for (n, side) in [&pair.client, &pair.server].into_iter().enumerate() {
        let held = side.context.credentials.bundle();
        let roots = held.roots().iter().chain(Ca::new().bundle().roots()).cloned().collect::<Vec<_>>();
        let bundle = outrigger_certs::TrustBundle::new(domain(), roots, held.epoch() + 1).unwrap();
        assert!(side.context.credentials.set_bundle(bundle).unwrap());
        let closed = r#"outrigger_open_connections{direction="inbound",kind="mesh_h2"} 0"#;
        eventually("the old connection's end", || pair.server.metrics().contains(closed)).await;
        let (head, _, _) = whole(client.send_request(get("/")).await.unwrap()).await;
        assert_eq!(head.status, 200);
        assert!(pair.client.metrics().contains(&connections(n + 2)), "{}", pair.client.metrics());
    }
}
