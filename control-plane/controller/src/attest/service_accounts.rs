//! Attestation by Kubernetes service account tokens that are bound to a pod.
//!
//! Three answers make an identity. The API server says whose the token is (a TokenReview that must name our audience: a token
//! for another service proves nothing here). The token says which pod it is bound to. And the pod, read
//! anew, must exist with that uid, run, and have the address that the connection comes from: a token that was stolen
//! out of a pod works from that pod only.
//!
//! The pod is asked of the API and not of the watch, which may be behind for a pod that has just started; a token costs two
//! small requests, as rarely as a workload starts or renews.
//!
//! What cannot be found out is "unavailable", which the sidecar tries again. Nothing is ever accepted for lack of an answer,
//! and no answer is kept: the next one may differ.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use kube::api::PostParams;
use kube::{Api, Client};
use outrigger_certs::{SpiffeId, TrustDomain};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{AttestError, Attested, Attesting, Attestor};
use crate::mesh::Mesh;
use crate::sources::kubernetes::{self, Pod};

/// The audience of tokens that are meant for us; the injector asks for it.
const AUDIENCE: &str = "outrigger";
/// For each question to the API. A sidecar waits for the answer, and tries again later.
const LIMIT: Duration = Duration::from_secs(5);
/// Reviews under way at once: whoever sends made-up tokens must not become the API server's load, nor take from what the Lease needs.
const AT_ONCE: usize = 16;
/// Which pod a token is bound to (KEP-1205).
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// See the module.
pub(crate) struct ServiceAccounts {
    client: Client,
    trust_domain: TrustDomain,
    mesh: Arc<Mesh>,
    slots: Semaphore,
}

/// Whom a token is bound to.
#[derive(Debug, PartialEq, Eq)]
struct Bearer {
    namespace: String,
    service_account: String,
    pod: String,
    uid: String,
}

impl ServiceAccounts {
    /// Attests pods of the cluster behind `client`, which `mesh` knows as well.
    pub(crate) fn new(client: Client, trust_domain: TrustDomain, mesh: Arc<Mesh>) -> Self {
        Self { client, trust_domain, mesh, slots: Semaphore::new(AT_ONCE) }
    }

    async fn review(&self, token: &str) -> Result<Bearer, AttestError> {
        let spec =
            TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(vec![AUDIENCE.to_owned()]) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let what = "the API server cannot be asked about the service account token";
        let slot = timeout(LIMIT, self.slots.acquire()).await;
        let _slot = slot.map_err(|_| unavailable(what, "too many others are being asked about"))?;
        let answer = timeout(LIMIT, api.create(&PostParams::default(), &review))
            .await
            .map_err(|_| unavailable(what, "no answer in time"))?
            .map_err(|error| unavailable(what, error))?;
        let status = answer.status.unwrap_or_default();
        if status.authenticated != Some(true) {
            // The reason is the API server's and names no secret.
            let why: String = status.error.unwrap_or_default().chars().take(300).collect();
            return Err(refused(format!("the API server does not accept the service account token: {why}")));
        }
        if !status.audiences.unwrap_or_default().iter().any(|audience| audience == AUDIENCE) {
            return Err(refused(format!("the service account token is not for the audience `{AUDIENCE}`")));
        }
        bearer(&status.user.unwrap_or_default())
    }

    async fn pod(&self, bearer: &Bearer) -> Result<Option<Pod>, AttestError> {
        let what = "the API server cannot be asked about the pod of the service account token";
        timeout(LIMIT, kubernetes::pod(&self.client, &bearer.namespace, &bearer.pod))
            .await
            .map_err(|_| unavailable(what, "no answer in time"))?
            .map_err(|error| unavailable(what, error))
    }
}

impl Attestor for ServiceAccounts {
    /// A JWT: three parts in base64url, the first of which is an object.
    fn recognises(&self, token: &str) -> bool {
        is_jwt(token.trim())
    }

    fn attest<'a>(&'a self, token: &'a str, peer: IpAddr) -> Attesting<'a, Attested> {
        Box::pin(async move {
            let bearer = self.review(token.trim()).await?;
            let pod = self.pod(&bearer).await?;
            judge(&bearer, pod.as_ref(), peer.to_canonical())?;
            let Bearer { namespace, service_account, pod, uid } = &bearer;
            let identity = SpiffeId::new(&self.trust_domain, namespace, service_account)
                .map_err(|error| refused(format!("the service account cannot be an identity: {error}")))?;
            Ok(Attested { identity, evidence: format!("pod {namespace}/{pod} ({uid})") })
        })
    }

    fn may_renew(&self, identity: &SpiffeId, peer: IpAddr) -> Result<bool, AttestError> {
        self.mesh.vouches(identity, peer.to_canonical()).ok_or_else(|| {
            AttestError::Unavailable("the cluster was not read yet; try again, or with a token".to_owned())
        })
    }

    fn used<'a>(&'a self, _: &'a Attested, _: SystemTime) -> Attesting<'a, ()> {
        // A token is good for as long as its pod: nothing is used up.
        Box::pin(async { Ok(()) })
    }
}

fn is_jwt(token: &str) -> bool {
    let part = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    // `eyJ` is `{"`.
    token.starts_with("eyJ") && token.split('.').count() == 3 && token.split('.').all(part)
}

/// Whom the API server says that the token is.
fn bearer(user: &UserInfo) -> Result<Bearer, AttestError> {
    let account = user.username.as_deref().and_then(|name| name.strip_prefix("system:serviceaccount:"));
    let Some((namespace, service_account)) = account.and_then(|account| account.split_once(':')) else {
        return Err(refused("the token is not that of a service account".to_owned()));
    };
    let bound = |key: &str| match user.extra.as_ref().and_then(|extra| extra.get(key)).map(Vec::as_slice) {
        Some([one]) if !one.is_empty() => Ok(one.clone()),
        _ => Err(refused("the service account token is bound to no pod; mount a projected one".to_owned())),
    };
    Ok(Bearer {
        namespace: namespace.to_owned(),
        service_account: service_account.to_owned(),
        pod: bound(POD_NAME)?,
        uid: bound(POD_UID)?,
    })
}

/// Whether the bearer is the pod that is seen at `peer`.
fn judge(bearer: &Bearer, pod: Option<&Pod>, peer: IpAddr) -> Result<(), AttestError> {
    let name = format!("{}/{}", bearer.namespace, bearer.pod);
    let Some(pod) = pod.filter(|pod| pod.uid == bearer.uid) else {
        return Err(refused(format!("pod {name} of the service account token is gone")));
    };
    if pod.is_finished {
        return Err(refused(format!("pod {name} of the service account token has ended")));
    }
    if pod.service_account != bearer.service_account {
        return Err(refused(format!("pod {name} runs as another service account than that of the token")));
    }
    if pod.host_network {
        return Err(refused(format!("pod {name} shares its node's network, so its address proves nothing")));
    }
    if pod.addresses.is_empty() {
        // The kubelet tells the API of it in a moment.
        return Err(AttestError::Unavailable(format!("pod {name} has no address yet")));
    }
    if !pod.addresses.contains(&peer) {
        return Err(refused(format!(
            "the connection comes from {peer}, which is not an address of pod {name}"
        )));
    }
    Ok(())
}

fn refused(reason: String) -> AttestError {
    AttestError::Refused(reason)
}

fn unavailable(what: &str, why: impl std::fmt::Display) -> AttestError {
    AttestError::Unavailable(format!("{what}: {why}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn user(name: &str, extra: &[(&str, &[&str])]) -> UserInfo {
        let extra: BTreeMap<String, Vec<String>> = extra
            .iter()
            .map(|(key, values)| ((*key).to_owned(), values.iter().map(ToString::to_string).collect()))
            .collect();
        UserInfo { username: Some(name.to_owned()), extra: Some(extra), ..UserInfo::default() }
    }

    fn pod(change: impl FnOnce(&mut Pod)) -> Pod {
        let mut pod = Pod {
            name: "web-0".into(),
            namespace: "shop".into(),
            uid: "u1".into(),
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            service_account: "web".into(),
            node: Arc::default(),
            node_addresses: Vec::new(),
            labels: Arc::default(),
            is_meshed: true,
            host_network: false,
            is_finished: false,
            terminating: false,
            probes: Vec::new(),
        };
        change(&mut pod);
        pod
    }

    #[test]
    fn a_token_is_that_of_a_service_account_and_bound_to_one_pod() {
        let bound: &[(&str, &[&str])] = &[(POD_NAME, &["web-0"]), (POD_UID, &["u1"])];
        let found = bearer(&user("system:serviceaccount:shop:web", bound)).unwrap();
        assert_eq!((found.namespace.as_str(), found.service_account.as_str()), ("shop", "web"));
        assert_eq!((found.pod.as_str(), found.uid.as_str()), ("web-0", "u1"));
        for (name, extra) in [
            ("admin", bound),
            ("system:node:web", bound),
            ("system:serviceaccount:shop", bound),
            ("system:serviceaccount:shop:web", &bound[..1]),
            ("system:serviceaccount:shop:web", &[(POD_NAME, &["web-0", "x"] as &[_]), (POD_UID, &["u1"])]),
        ] {
            assert!(matches!(bearer(&user(name, extra)), Err(AttestError::Refused(_))), "{name} {extra:?}");
        }
    }

    #[test]
    fn the_pod_must_be_the_one_and_be_here() {
        let bearer = Bearer {
            namespace: "shop".into(),
            service_account: "web".into(),
            pod: "web-0".into(),
            uid: "u1".into(),
        };
        let here: IpAddr = "10.0.0.1".parse().unwrap();
        let judged = |pod: Option<&Pod>, peer: IpAddr| judge(&bearer, pod, peer);
        assert!(judged(Some(&pod(|_| {})), here).is_ok());
        assert!(judged(Some(&pod(|_| {})), "fd00::1".parse().unwrap()).is_ok(), "any of its addresses");
        assert!(judged(Some(&pod(|pod| pod.terminating = true)), here).is_ok(), "it runs until it has ended");
        let refused = |pod: Option<&Pod>, peer: IpAddr| match judged(pod, peer) {
            Err(AttestError::Refused(text)) => text,
            other => panic!("{other:?}"),
        };
        assert!(refused(None, here).contains("is gone"));
        assert!(
            refused(Some(&pod(|pod| pod.uid = "u2".into())), here).contains("is gone"),
            "another pod of this name"
        );
        assert!(refused(Some(&pod(|pod| pod.is_finished = true)), here).contains("has ended"));
        assert!(
            refused(Some(&pod(|pod| pod.service_account = "db".into())), here)
                .contains("another service account")
        );
        assert!(refused(Some(&pod(|pod| pod.host_network = true)), here).contains("node"));
        assert!(refused(Some(&pod(|_| {})), "10.0.0.2".parse().unwrap()).contains("comes from 10.0.0.2"));
        let early = judged(Some(&pod(|pod| pod.addresses.clear())), here);
        assert!(matches!(early, Err(AttestError::Unavailable(_))), "{early:?}");
    }

    #[test]
    fn a_jwt_is_known_by_its_form() {
        assert!(is_jwt("eyJhbGciOiJSUzI1NiJ9.eyJhdWQiOiJ4In0.c2ln_-"));
        for other in ["", "eyJ", "eyJh.b", "eyJh..c", "eyJh.b.c.d", "ort_abc.def.ghi", "eyJh.b.c d"] {
            assert!(!is_jwt(other), "{other}");
        }
    }
}
