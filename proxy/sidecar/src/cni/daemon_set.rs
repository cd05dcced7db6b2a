//! Whether the agent's own DaemonSet stays: what tells an upgrade, a drained node or a crash, after which the plugin must
//! stay in place, from the end of the mesh on this cluster, at which the node becomes what it was.
//!
//! One request by hand: the sidecar's program links no Kubernetes client.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

/// For connection and answer: an agent that is told to stop has thirty seconds.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a DaemonSet.
const MAX_ANSWER: usize = 1024 * 1024;

/// The API server, as a pod is told of it.
#[derive(Debug, Clone)]
pub(super) struct ApiServer {
    /// Host name or address.
    pub(super) host: String,
    /// TCP.
    pub(super) port: u16,
}

/// Where a service account's token and the API server's CA lie.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Whether the DaemonSet `<namespace>/<name>` is there and not being deleted.
///
/// # Errors
/// If that cannot be found out.
pub(super) async fn stays(api: &ApiServer, namespace: &str, name: &str) -> anyhow::Result<bool> {
    let answer = timeout(PATIENCE, ask(api, Path::new(ACCOUNT), namespace, name))
        .await
        .context("the API server gave no answer in time")??;
    Ok(answer)
}

async fn ask(api: &ApiServer, account: &Path, namespace: &str, name: &str) -> anyhow::Result<bool> {
    let read = |file: &str| {
        let path = account.join(file);
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let token = String::from_utf8(read("token")?).context("the service account's token is no text")?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&read("ca.crt")?) {
        roots.add(certificate.context("the API server's CA cannot be read")?)?;
    }
    let tls = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let ApiServer { host, port } = api;
    let stream = TcpStream::connect((host.as_str(), *port))
        .await
        .with_context(|| format!("cannot connect to the API server {host}:{port}"))?;
    let server = ServerName::try_from(host.clone()).context("the API server's host is no name")?;
    let stream = TlsConnector::from(Arc::new(tls)).connect(server, stream).await?;
    let (mut requests, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get(format!("/apis/apps/v1/namespaces/{namespace}/daemonsets/{name}"))
        .header(header::HOST, host)
        .header(header::AUTHORIZATION, format!("Bearer {}", token.trim()))
        .body(Empty::<Bytes>::new())?;
    let (head, body) = requests.send_request(request).await?.into_parts();
    match head.status {
        StatusCode::OK => {
            let body = Limited::new(body, MAX_ANSWER).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!("the answer was cut off: {error}"))?.to_bytes();
            let object: serde_json::Value =
                serde_json::from_slice(&body).context("the answer is not JSON")?;
            Ok(object["metadata"]["deletionTimestamp"].is_null())
        }
        // An uninstall takes the agent's account and rights away with it, in any order.
        StatusCode::NOT_FOUND | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Ok(false),
        status => bail!("the API server answered {status}"),
    }
}
