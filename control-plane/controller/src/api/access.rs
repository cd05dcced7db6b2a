//! Who may ask the API for what.
//!
//! Every request bears a token, of one of two sorts.
//!
//! **The admin token** of a controller on a host: whoever can read the file may do everything. A controller in a pod
//! makes none: it would be a secret on the node's disk that nobody there can use.
//!
//! **A token of Kubernetes** (`kubernetes.enabled`): the API server says whose it is (`TokenReview`) and what they may do
//! (`SubjectAccessReview`), so that RBAC alone decides, as it does for `kubectl`. Policies are the resources that they are in
//! Kubernetes (`list accesspolicies.outrigger.dev -n shop`); what is no object there has two resources of its own,
//! `meshviews` and `jointokens` of `outrigger.dev`, that only RBAC knows. Writes are made with the controller's own rights,
//! and so only after that review.
//!
//! Callers come through the API server's port-forward, which carries bytes: the API server authenticates and authorises
//! the forward, but the controller never learns for whom, so the request must prove it again. It does so with the bearer
//! token that the caller has for the API server. A caller without one (a client certificate, or one who impersonates)
//! asks the API server for a short token of the service account `outrigger-cli-reader` or `outrigger-cli-writer`, which RBAC
//! also decides about. Tokens for another audience, such as a sidecar's, are refused: the review names none, so the API
//! server takes its own.
//!
//! There is no TLS inside of the forward. The API server's TLS leads to the kubelet, whose last hop is the pod's own
//! loopback; whoever could sit in between can already enter the pod. And a certificate would prove nothing more about the
//! pod: who may make pods in the mesh's namespace can mount the CA's Secret too.

use std::fmt;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use aws_lc_rs::{constant_time, digest, rand};
use axum::extract::rejection::RawPathParamsRejection;
use axum::extract::{MatchedPath, RawPathParams, Request, State};
use axum::http::{Method, Uri, header};
use axum::middleware::Next;
use axum::response::Response;
use outrigger_policy::{Key, Kind};

use super::policies::{self, Selection};
use super::{Api, Code, failed};
use crate::policies::Picture;
use crate::tokens::hex;

mod cluster;

pub(crate) use cluster::Cluster;
use cluster::Unavailable;

/// Bytes of an admin token that was made: 256 bits.
const ADMIN_TOKEN_BYTES: usize = 32;
/// Longer texts are no token: API servers take no longer header either.
const LONGEST_TOKEN: usize = 16 * 1024;
/// The group of the resources below, and of our kinds.
const GROUP: &str = "outrigger.dev";
/// What the controller sees of the mesh; the object's name is the view's.
const VIEWS: &str = "meshviews";
/// Tokens with which workloads outside the cluster join.
const JOIN_TOKENS: &str = "jointokens";

/// Whose requests are answered.
#[derive(Debug)]
pub(crate) struct Access {
    admin: Option<AdminToken>,
    cluster: Option<Cluster>,
}

impl Access {
    /// Takes the admin token, users of the cluster, or both.
    pub(crate) fn new(admin: Option<AdminToken>, cluster: Option<Cluster>) -> Self {
        Self { admin, cluster }
    }

    /// Whose token it is. `None`: nobody's.
    async fn caller(&self, token: &str) -> Result<Option<Caller>, Unavailable> {
        if token.is_empty() || token.len() > LONGEST_TOKEN {
            return Ok(None);
        }
        if self.admin.as_ref().is_some_and(|admin| admin.is(token)) {
            return Ok(Some(Caller::Admin));
        }
        match &self.cluster {
            Some(cluster) => Ok(cluster.user(token).await?.map(Caller::User)),
            None => Ok(None),
        }
    }

    fn wanted(&self) -> &'static str {
        match (&self.admin, &self.cluster) {
            (_, None) => {
                "every request needs `Authorization: Bearer <token>`, with the token of <data_dir>/admin-token"
            }
            (None, Some(_)) => {
                "every request needs `Authorization: Bearer <token>`, with a token that the cluster's API server takes"
            }
            (Some(_), Some(_)) => {
                "every request needs `Authorization: Bearer <token>`, with a token that the cluster's API server takes, or the \
                 one of <data_dir>/admin-token"
            }
        }
    }

    /// `Ok` if the caller has every one of these permissions, else the answer that says which is missing.
    pub(super) async fn require(&self, caller: &Caller, needed: &[Permission]) -> Result<(), Response> {
        let (user, cluster) = match (caller, &self.cluster) {
            (Caller::Admin, _) => return Ok(()),
            (Caller::User(user), Some(cluster)) => (user, cluster),
            // It was this cluster that proved who it is.
            (Caller::User(_), None) => return Err(failed(Code::Forbidden, "no cluster decides about users")),
        };
        for permission in needed {
            let refused = cluster.refusal(user, permission).await.map_err(|error| error.answer())?;
            if let Some(reason) = refused {
                let reason = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
                let text = format!("{} may not {permission}{reason}", user.name());
                return Err(failed(Code::Forbidden, &text));
            }
        }
        Ok(())
    }
}

/// Who asks; proved.
#[derive(Debug, Clone)]
pub(super) enum Caller {
    /// Who holds the admin token.
    Admin,
    /// A user or service account of the cluster.
    User(Arc<cluster::User>),
}

impl Caller {
    /// The name that was proved; the holder of the admin token has none.
    pub(super) fn name(&self) -> Option<&str> {
        match self {
            Self::Admin => None,
            Self::User(user) => Some(user.name()),
        }
    }
}

/// Something that RBAC can grant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Permission {
    verb: &'static str,
    group: &'static str,
    resource: &'static str,
    /// Empty: in all namespaces.
    namespace: String,
    /// Empty: of all names.
    name: String,
}

impl Permission {
    fn view(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::of("get", GROUP, VIEWS) }
    }

    /// To do `verb` with a policy.
    pub(super) fn policy(verb: &'static str, key: &Key) -> Self {
        Self { name: key.name.clone(), ..Self::policies(verb, key.kind, &key.namespace) }
    }

    fn policies(verb: &'static str, kind: Kind, namespace: &str) -> Self {
        let group = kind.api_version().split('/').next().unwrap_or(GROUP);
        Self { namespace: namespace.to_owned(), ..Self::of(verb, group, kind.plural()) }
    }

    /// To write a policy: a creation and a change are two things for RBAC.
    pub(super) fn write(picture: &Picture, key: &Key) -> Self {
        let verb = if picture.policies.contains_key(key) { "update" } else { "create" };
        Self::policy(verb, key)
    }

    const fn of(verb: &'static str, group: &'static str, resource: &'static str) -> Self {
        Self { verb, group, resource, namespace: String::new(), name: String::new() }
    }
}

impl fmt::Display for Permission {
    /// As `kubectl auth can-i` takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}.{}", self.verb, self.resource, self.group)?;
        if !self.name.is_empty() {
            write!(f, "/{}", self.name)?;
        }
        if !self.namespace.is_empty() {
            write!(f, " -n {}", self.namespace)?;
        } else if !matches!(self.resource, VIEWS | JOIN_TOKENS) {
            f.write_str(" in all namespaces")?;
        }
        Ok(())
    }
}

/// The permissions that a request needs, by what the router made of its path, so that what is judged is what is done.
/// `None`: nobody thought of it, so nobody of the cluster may. `apply` judges the objects of its body itself.
fn needed(
    method: &Method,
    route: &str,
    params: Option<&RawPathParams>,
    uri: &Uri,
    held: &Picture,
) -> Option<Vec<Permission>> {
    let path = route.strip_prefix("/api/v1/")?;
    if let Some(rest) = path.strip_prefix("policies/{kind}/{namespace}/{name}") {
        let of = |wanted: &str| {
            params?.iter().find(|(name, _)| *name == wanted).map(|(_, value)| value.to_owned())
        };
        // What no object can be called is not there, which is no secret.
        let Some(key) = policies::key((of("kind")?, of("namespace")?, of("name")?)) else {
            return Some(Vec::new());
        };
        return Some(vec![match (method.as_str(), rest) {
            ("GET", "" | "/history") => Permission::policy("get", &key),
            ("DELETE", "") => Permission::policy("delete", &key),
            ("POST", "/rollback") => Permission::write(held, &key),
            _ => return None,
        }]);
    }
    match (method.as_str(), path) {
        ("GET", "services" | "endpoints" | "proxies" | "sources" | "catalog" | "controller") => {
            Some(vec![Permission::view(path)])
        }
        ("GET", "tokens") => Some(vec![Permission::of("list", GROUP, JOIN_TOKENS)]),
        ("POST", "tokens") => Some(vec![Permission::of("create", GROUP, JOIN_TOKENS)]),
        ("DELETE", "tokens/{id}") => Some(vec![Permission::of("delete", GROUP, JOIN_TOKENS)]),
        ("GET", "policies") => {
            // A query that cannot be read is refused for that.
            let Ok(Selection { kind, namespace }) = Selection::read(uri) else { return Some(Vec::new()) };
            let namespace = namespace.unwrap_or_default();
            let kinds = Kind::ALL.into_iter().filter(|one| kind.is_none_or(|kind| kind == *one));
            Some(kinds.map(|kind| Permission::policies("list", kind, &namespace)).collect())
        }
        ("POST", "policies/apply") | ("GET", "schemas") => Some(Vec::new()),
        _ => None,
    }
}

/// Lets pass whose token is good and who may do what the request asks for.
pub(super) async fn authorize(
    State(api): State<Arc<Api>>,
    route: Option<MatchedPath>,
    params: Result<RawPathParams, RawPathParamsRejection>,
    mut request: Request,
    next: Next,
) -> Response {
    let bearer = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "));
    let caller = match api.access.caller(bearer.unwrap_or_default().trim()).await {
        Ok(Some(caller)) => caller,
        Ok(None) => return failed(Code::Unauthorized, api.access.wanted()),
        Err(error) => return error.answer(),
    };
    // Where there is no route there is nothing to do either.
    if let (Caller::User(_), Some(route)) = (&caller, &route) {
        let held = api.writer.picture();
        let Some(needed) =
            needed(request.method(), route.as_str(), params.as_ref().ok(), request.uri(), &held)
        else {
            return failed(Code::Forbidden, "only the holder of the admin token may do this");
        };
        if let Err(refused) = api.access.require(&caller, &needed).await {
            return refused;
        }
    }
    request.extensions_mut().insert(caller);
    next.run(request).await
}

/// The hash of the token of a controller on a host.
#[derive(Clone)]
pub(crate) struct AdminToken([u8; 32]);

impl AdminToken {
    /// Reads the token of the file, or makes it, for its owner only.
    pub(crate) fn open_or_create(path: &Path) -> anyhow::Result<Self> {
        let made = || -> anyhow::Result<()> {
            let mut bytes = [0; ADMIN_TOKEN_BYTES];
            rand::fill(&mut bytes).map_err(|_| anyhow::anyhow!("no randomness from the kernel"))?;
            let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            file.write_all(format!("{}\n", hex(&bytes)).as_bytes())?;
            Ok(file.sync_all()?)
        };
        if !path.exists() {
            made().with_context(|| format!("cannot make the admin token {}", path.display()))?;
        }
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the admin token {}", path.display()))?;
        let text = text.trim();
        anyhow::ensure!(
            text.len() >= ADMIN_TOKEN_BYTES,
            "the admin token in {} is shorter than 32 characters; remove the file to have one made",
            path.display()
        );
        Ok(Self(sha256(text)))
    }

    fn is(&self, text: &str) -> bool {
        constant_time::verify_slices_are_equal(&self.0, &sha256(text)).is_ok()
    }
}

impl fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdminToken(..)")
    }
}

fn sha256(text: &str) -> [u8; 32] {
    let digest = digest::digest(&digest::SHA256, text.as_bytes());
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permission_reads_as_kubectl_takes_it() {
        let key = Key::new(Kind::HttpRoute, "shop", "orders");
        let shown = |permission: Permission| permission.to_string();
        assert_eq!(
            shown(Permission::policy("update", &key)),
            "update httproutes.gateway.networking.k8s.io/orders -n shop"
        );
        assert_eq!(
            shown(Permission::policies("list", Kind::AccessPolicy, "")),
            "list accesspolicies.outrigger.dev in all namespaces"
        );
        assert_eq!(shown(Permission::view("proxies")), "get meshviews.outrigger.dev/proxies");
        assert_eq!(shown(Permission::of("list", GROUP, JOIN_TOKENS)), "list jointokens.outrigger.dev");
    }
}
