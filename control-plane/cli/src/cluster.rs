//! The controller of a cluster, reached with nothing but a kubeconfig.
//!
//! Requests go through the API server's port-forward to the loopback of a controller's pod: no Service, no Ingress, no
//! tunnel of one's own, and what may be reached is decided by RBAC. The controller then wants to know who asks, because
//! the forward carries bytes and no user. It is told as the API server is:
//!
//! - A user with a bearer token (a static one, a file, OIDC, or what a plugin like EKS's or GKE's returns) sends that token;
//!   the controller has the API server review it.
//! - A user without one (client certificate, password, or impersonation, which a token would silently undo) asks the API
//!   server for a token of ten minutes of the service account `outrigger-cli-reader`, for writes `outrigger-cli-writer`. RBAC
//!   decides who may (`create serviceaccounts/token`), and what these accounts may.
//!
//! A token is worth stealing, so it goes to nothing but a ready pod that the API server names in the mesh's namespace
//! and that runs as the controller's service account. Whoever can make such a pod can also mount the CA's key.
//! `control-plane/controller/src/api/access.rs` argues why there is no TLS inside of the forward.

use std::{fmt, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderValue, Method, Request, Response, header};
use http_body_util::Empty;
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::{Pod, ServiceAccount},
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
    client::{ConfigExt, middleware::AuthLayer},
};
use tokio::{io::DuplexStream, sync::OnceCell};
use tower::{BoxError, Layer, ServiceExt, service_fn};

use crate::kubeconfig::{self, causes};

/// Where the mesh lives in a cluster.
pub(crate) const MESH_NAMESPACE: &str = "outrigger-system";
/// The service account that the controller runs as.
const CONTROLLER_ACCOUNT: &str = "outrigger-controller";
/// Where the API listens in the controller's pod.
const API_PORT: u16 = 15480;
/// How long a token of our service accounts lives: the shortest that API servers make.
const TOKEN_SECONDS: i64 = 600;
/// How long the API server may take for one answer: it is far away, and a busy one takes seconds.
const PATIENCE: Duration = Duration::from_secs(15);

/// A cluster that is talked to.
pub(crate) struct Cluster {
    chosen: kubeconfig::Cluster,
    pub(crate) client: Client,
    /// Puts the user's own token on a request; none where the user has none.
    own: Option<AuthLayer>,
    controller: OnceCell<String>,
    reader: OnceCell<HeaderValue>,
    writer: OnceCell<HeaderValue>,
}

/// A stream to a port of a pod, and why it ended if the other side said so.
pub(crate) struct Forward {
    pub(crate) stream: DuplexStream,
    pub(crate) fault: BoxFuture<'static, Option<String>>,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.chosen, f)
    }
}

impl Cluster {
    /// A client for the cluster. A plugin of the kubeconfig may ask its user something here.
    pub(crate) async fn connect(chosen: kubeconfig::Cluster) -> Result<Self> {
        let config = chosen.config().await?;
        let who = &config.auth_info;
        let impersonates = who.impersonate.is_some() || who.impersonate_groups.is_some();
        let made = || -> kube::Result<_> {
            let own = if impersonates { None } else { config.auth_layer()? };
            Ok((own, Client::try_from(config.clone())?))
        };
        let (own, client) = made().map_err(|error| anyhow!("{chosen}: {}", causes(&error)))?;
        Ok(Self {
            chosen,
            client,
            own,
            controller: OnceCell::new(),
            reader: OnceCell::new(),
            writer: OnceCell::new(),
        })
    }

    /// A stream to the API of a controller: a certain one, or whichever was found ready first.
    pub(crate) async fn controller(&self, pod: Option<&str>) -> Result<Forward> {
        let pod = match pod {
            Some(pod) => pod,
            None => self.controller.get_or_try_init(|| self.first_controller()).await?,
        };
        self.forward(pod, API_PORT).await
    }

    /// A stream to a port of a pod of the mesh's namespace.
    pub(crate) async fn forward(&self, pod: &str, port: u16) -> Result<Forward> {
        let pods = Api::<Pod>::namespaced(self.client.clone(), MESH_NAMESPACE);
        let ports = [port];
        let forwarding = self.patiently(pods.portforward(pod, &ports)).await;
        let mut forwarder = forwarding.map_err(|error| {
            let is_forbidden = error.downcast_ref::<Refused>().is_some_and(|refused| refused.code == 403);
            let tried = format!("forwarding to port {port} of pod {pod}");
            let needed = "; it takes `get` and `create` of pods/portforward there, which the ClusterRole `outrigger-cli` has";
            error.context(if is_forbidden { tried + needed } else { tried })
        })?;
        let fault = forwarder.take_error(port).context("the forward has no channel for errors")?;
        let stream = forwarder.take_stream(port).context("the forward has no stream")?;
        Ok(Forward { stream, fault: Box::pin(fault) })
    }

    async fn first_controller(&self) -> Result<String> {
        // There is one, or it is an error.
        self.controllers().await?.into_iter().next().context("no controller is ready")
    }

    /// The pods of the controllers that are ready: at least one.
    pub(crate) async fn controllers(&self) -> Result<Vec<String>> {
        let pods = self.pods("controller").await?;
        let name = |pod: &Pod| pod.metadata.name.clone().unwrap_or_default();
        let is_controller = |pod: &&Pod| is_ready(pod) && account(pod) == Some(CONTROLLER_ACCOUNT);
        let ready: Vec<String> = pods.iter().filter(is_controller).map(name).collect();
        match pods.first() {
            _ if !ready.is_empty() => Ok(ready),
            None => bail!(
                "{}: no controller runs in namespace {MESH_NAMESPACE} (install the chart; `outrigger check --pre` says whether \
                 the cluster takes it)",
                self.chosen
            ),
            Some(any) => bail!(
                "{}: no controller is ready; `kubectl describe pod {} -n {MESH_NAMESPACE}` says what it waits for",
                self.chosen,
                name(any)
            ),
        }
    }

    /// The pods of a component of the control plane.
    pub(crate) async fn pods(&self, component: &str) -> Result<Vec<Pod>> {
        let selector = format!("app.kubernetes.io/name=outrigger,app.kubernetes.io/component={component}");
        let pods = Api::<Pod>::namespaced(self.client.clone(), MESH_NAMESPACE);
        let listed = self.patiently(pods.list(&ListParams::default().labels(&selector))).await;
        Ok(listed
            .with_context(|| format!("looking for the {component} in namespace {MESH_NAMESPACE}"))?
            .items)
    }

    /// What proves to the controller who asks, for a request of this method.
    pub(crate) async fn authorization(&self, method: &Method) -> Result<HeaderValue> {
        if let Some(own) = self.own_token().await? {
            return Ok(own);
        }
        let (kept, account) = if *method == Method::GET {
            (&self.reader, "outrigger-cli-reader")
        } else {
            (&self.writer, "outrigger-cli-writer")
        };
        Ok(kept.get_or_try_init(|| self.token_of(account)).await?.clone())
    }

    /// The token that kube's client would send to the API server, fresh.
    async fn own_token(&self) -> Result<Option<HeaderValue>> {
        let Some(own) = &self.own else { return Ok(None) };
        let echo = service_fn(|request: Request<Empty<Bytes>>| async move {
            let mut response = Response::new(());
            *response.headers_mut() = request.into_parts().0.headers;
            Ok::<_, BoxError>(response)
        });
        let echoed = own.layer(echo).oneshot(Request::new(Empty::new())).await;
        let echoed = echoed.map_err(|error| anyhow!("{}: getting your token: {error}", self.chosen))?;
        let token = echoed.headers().get(header::AUTHORIZATION);
        // What is no bearer token, such as a password, nobody but the API server can check.
        Ok(token.filter(|value| value.as_bytes().starts_with(b"Bearer ")).cloned())
    }

    async fn token_of(&self, account: &str) -> Result<HeaderValue> {
        let accounts = Api::<ServiceAccount>::namespaced(self.client.clone(), MESH_NAMESPACE);
        let spec =
            TokenRequestSpec { expiration_seconds: Some(TOKEN_SECONDS), ..TokenRequestSpec::default() };
        let request = TokenRequest { spec, ..TokenRequest::default() };
        let parameters = PostParams::default();
        let made = self.patiently(accounts.create_token_request(account, &parameters, &request)).await;
        let made = made.with_context(|| {
            format!("your credentials are no token, so one of service account {account} is needed to ask the controller")
        })?;
        let token = made.status.map(|status| status.token).unwrap_or_default();
        let mut value = HeaderValue::try_from(format!("Bearer {token}"))?;
        value.set_sensitive(true);
        Ok(value)
    }

    /// Asks the API server, and says what its failures mean.
    pub(crate) async fn patiently<T>(&self, asking: impl Future<Output = kube::Result<T>>) -> Result<T> {
        let answer = tokio::time::timeout(PATIENCE, asking).await;
        let answer = answer.with_context(|| {
            format!("{}: no answer from the API server within {} s", self.chosen, PATIENCE.as_secs())
        })?;
        answer.map_err(|error| match &error {
            kube::Error::Api(status) if status.code == 401 => {
                anyhow!("{}: the API server does not accept your credentials", self.chosen)
            }
            // The API server names the permission that is missing.
            kube::Error::Api(status) => {
                anyhow::Error::new(Refused { code: status.code, message: status.message.clone() })
            }
            kube::Error::HyperError(_) | kube::Error::Service(_) => {
                let server = self.chosen.server().unwrap_or("its address");
                anyhow!("{}: the API server does not answer at {server}: {}", self.chosen, causes(&error))
            }
            _ => anyhow::Error::new(error),
        })
    }
}

/// The API server's own words, without the client's.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) code: u16,
    message: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refused {}

/// Whether a pod is ready and stays.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let is_ready = conditions.into_iter().flatten().any(|one| one.type_ == "Ready" && one.status == "True");
    is_ready && pod.metadata.deletion_timestamp.is_none()
}

fn account(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.service_account_name.as_deref()
}
