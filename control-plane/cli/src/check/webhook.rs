//! The webhook, as the API server sees it: a handshake with an injector, judged by the `caBundle` that the API server uses.
//!
//! So its key need not be readable to whoever checks, and what is found is what admission finds, not what a Secret says.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow};
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use kube::Api;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{
    mesh::{ends, now},
    report::{Outcome, Report},
};
use crate::cluster::{Cluster, is_ready};

const CATEGORY: &str = "Webhook";
const CONFIGURATION: &str = "outrigger-injector";
/// As whom the API server expects the injector.
const NAME: &str = "outrigger-injector.outrigger-system.svc";
/// Where it listens in its pod.
const PORT: u16 = 15443;
/// How long the handshake may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The leader renews at two thirds of the certificate's life; what has less than this left was not renewed.
const LEAST_LEFT: i64 = 7 * 86_400;

pub(super) async fn check(cluster: &Cluster, report: &mut Report) {
    let configurations = Api::<MutatingWebhookConfiguration>::all(cluster.client.clone());
    let bundle = match cluster.patiently(configurations.get_opt(CONFIGURATION)).await {
        Ok(configuration) => judge_bundle(configuration.as_ref(), report),
        Err(error) => return report.unknown(CATEGORY, "caBundle", &error),
    };
    let Some(bundle) = bundle else { return };
    let pods = match cluster.pods("injector").await {
        Ok(pods) => pods,
        Err(error) => return report.unknown(CATEGORY, "certificate", &error),
    };
    // That none is ready is told of the control plane.
    let Some(name) = pods.iter().find(|pod| is_ready(pod)).and_then(|pod| pod.metadata.name.as_ref()) else {
        return;
    };
    match cluster.forward(name, PORT).await {
        Ok(forward) => judge_certificate(&handshake(forward.stream, &bundle).await, now(), report),
        Err(error) => report.unknown(CATEGORY, "certificate", &error),
    }
}

/// The `caBundle`, if it is one and the same everywhere.
fn judge_bundle(
    configuration: Option<&MutatingWebhookConfiguration>,
    report: &mut Report,
) -> Option<Vec<u8>> {
    let mut failed =
        |seen: String, advice: &str| report.add(CATEGORY, "caBundle", Outcome::Failed, seen, advice);
    let Some(configuration) = configuration else {
        let advice = "without it no pod is injected: `helm upgrade` brings it back";
        failed(format!("there is no MutatingWebhookConfiguration {CONFIGURATION}"), advice);
        return None;
    };
    let webhooks = configuration.webhooks.iter().flatten();
    let bundles: Vec<&[u8]> = webhooks
        .map(|webhook| webhook.client_config.ca_bundle.as_ref().map_or(&[][..], |bundle| &bundle.0))
        .collect();
    let (first, rest) = bundles.split_first()?;
    let advice = "the leading controller keeps it: its log says why it cannot";
    if first.is_empty() {
        failed("it is empty, so no pod of a labelled namespace is admitted".to_owned(), advice);
        return None;
    }
    if rest.iter().any(|other| other != first) {
        failed("its webhooks have different ones".to_owned(), advice);
        return None;
    }
    Some(first.to_vec())
}

/// When the certificate ends that the injector serves with (Unix seconds), if the bundle vouches for it.
async fn handshake(stream: impl AsyncRead + AsyncWrite + Unpin, bundle: &[u8]) -> Result<i64> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(bundle) {
        roots.add(certificate.context("reading caBundle")?).context("reading caBundle")?;
    }
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let connecting = TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(NAME)?, stream);
    let connected =
        tokio::time::timeout(PATIENCE, connecting).await.context("the injector does not answer")??;
    let (_, session) = connected.get_ref();
    let leaf = session.peer_certificates().and_then(<[_]>::first).context("it shows no certificate")?;
    let (_, leaf) =
        X509Certificate::from_der(leaf).map_err(|error| anyhow!("reading its certificate: {error}"))?;
    Ok(leaf.validity().not_after.timestamp())
}

fn judge_certificate(found: &Result<i64>, now: i64, report: &mut Report) {
    let advice = "the leading controller renews it, and the injector follows: their logs say why not";
    match found {
        Err(error) => {
            let seen = format!("caBundle does not vouch for the injector: {error:#}");
            report.add(CATEGORY, "certificate", Outcome::Failed, seen, advice);
        }
        Ok(end) if end - now < LEAST_LEFT => {
            report.add(CATEGORY, "certificate", Outcome::Warning, ends(*end, now), advice);
        }
        Ok(end) => {
            report.ok(CATEGORY, "certificate", format!("caBundle vouches for it; it {}", ends(*end, now)));
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rustls::{ServerConfig, pki_types::PrivateKeyDer};
    use serde_json::json;
    use tokio_rustls::TlsAcceptor;

    use super::*;

    /// A CA's certificate, and an injector that serves for `name` with a certificate of it.
    fn injector(name: &str) -> (String, TlsAcceptor) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = ServerConfig::builder().with_no_client_auth();
        let config = config.with_single_cert(vec![leaf.der().clone()], key).unwrap();
        (ca, TlsAcceptor::from(Arc::new(config)))
    }

    async fn judged(bundle: &str, acceptor: TlsAcceptor) -> (Outcome, String) {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        tokio::spawn(async move { acceptor.accept(theirs).await.map(drop) });
        let mut report = Report::default();
        judge_certificate(&handshake(ours, bundle.as_bytes()).await, now(), &mut report);
        let finding = report.0.pop().unwrap();
        (finding.result, finding.seen)
    }

    #[tokio::test]
    async fn the_bundle_must_vouch_for_what_the_injector_serves() {
        let (ca, acceptor) = injector(NAME);
        assert_eq!(judged(&ca, acceptor.clone()).await.0, Outcome::Ok);
        let (other, _) = injector(NAME);
        let (result, seen) = judged(&other, acceptor.clone()).await;
        assert!(result == Outcome::Failed && seen.contains("does not vouch"), "{seen}");
        assert_eq!(
            judged(&format!("{other}{ca}"), acceptor).await.0,
            Outcome::Ok,
            "an old CA beside the new one"
        );
        let (ca, acceptor) = injector("elsewhere.svc");
        assert_eq!(judged(&ca, acceptor).await.0, Outcome::Failed);
        assert_eq!(judged("nonsense", injector(NAME).1).await.0, Outcome::Failed);
    }

    #[test]
    fn a_certificate_that_was_not_renewed_is_told_before_it_ends() {
        let mut report = Report::default();
        judge_certificate(&Ok(LEAST_LEFT), 1, &mut report);
        judge_certificate(&Ok(LEAST_LEFT), 0, &mut report);
        assert_eq!([report.0[0].result, report.0[1].result], [Outcome::Warning, Outcome::Ok]);
    }

    #[test]
    fn a_bundle_is_there_and_the_same_for_every_webhook() {
        let configuration = |bundles: &[&str]| -> MutatingWebhookConfiguration {
            let webhooks: Vec<_> = bundles
                .iter()
                .map(|bundle| {
                    json!({ "name": "a.b.c", "admissionReviewVersions": ["v1"], "sideEffects": "None",
                        "clientConfig": { "caBundle": bundle } })
                })
                .collect();
            serde_json::from_value(json!({ "metadata": {}, "webhooks": webhooks })).unwrap()
        };
        let judged = |configuration: Option<MutatingWebhookConfiguration>| {
            let mut report = Report::default();
            let bundle = judge_bundle(configuration.as_ref(), &mut report);
            (bundle, report.0.pop().map(|finding| finding.seen))
        };
        assert_eq!(judged(Some(configuration(&["YQ==", "YQ=="]))), (Some(b"a".to_vec()), None));
        for (found, seen) in [
            (None, "there is no MutatingWebhookConfiguration"),
            (Some(configuration(&["", ""])), "it is empty"),
            (Some(configuration(&["YQ==", "Yg=="])), "different ones"),
        ] {
            let (bundle, told) = judged(found);
            assert!(bundle.is_none() && told.as_ref().unwrap().contains(seen), "{told:?}");
        }
    }
}
