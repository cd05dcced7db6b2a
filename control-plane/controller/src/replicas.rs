//! What became of policies, over all replicas. A proxy is connected to one of them, so what that one alone could say of a
//! policy ("nobody refuses it") may be wrong of the mesh.
//!
//! Each replica asks the others, every few seconds, on the port for sidecars and with the controller's own identity at both
//! ends. What one has said is forgotten when it cannot be asked: its proxies have gone to others by then.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client};
use outrigger_api::v1::replicas_client::ReplicasClient;
use outrigger_api::v1::replicas_server;
use outrigger_api::v1::{PoliciesRequest, PoliciesResponse, PolicyCount, PolicyRefusal};
use outrigger_certs::{Credentials, SpiffeId, server_name};
use outrigger_policy::Key;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tonic::{Request, Response, Status};

use crate::kubernetes::Trouble;
use crate::policies::counts::{Counts, Refusal, counts};
use crate::push::Proxies;
use crate::server::Caller;

/// Between two rounds: a refusal at another replica is in a status within this and the status's own batch.
const ASK: Duration = Duration::from_secs(5);
/// The longest that one replica is waited for, or the API server.
const PATIENCE: Duration = Duration::from_secs(3);
/// Replicas that are asked: far more than anybody runs.
const MAX_REPLICAS: usize = 16;
/// Refusals with their reasons in one answer, over all policies: it stays far below gRPC's 4 MiB.
const MAX_REFUSALS: usize = 1000;
/// The pods of the Deployment.
const CONTROLLERS: &str = "app.kubernetes.io/name=outrigger,app.kubernetes.io/component=controller";

type ByPolicy = BTreeMap<Key, Counts>;

/// This replica's proxies, and what the others said of theirs.
#[derive(Debug)]
pub(crate) struct Replicas {
    own: Arc<Proxies>,
    others: Mutex<Vec<ByPolicy>>,
    /// Whom the others must prove to be, and prove to be asked by.
    identity: SpiffeId,
    /// Random: how we know ourselves among them.
    id: u64,
}

impl Replicas {
    pub(crate) fn new(own: Arc<Proxies>, identity: SpiffeId) -> Self {
        Self { own, others: Mutex::default(), identity, id: fastrand::u64(..) }
    }

    /// Of each policy that any proxy of the mesh has.
    pub(crate) fn counts(&self) -> ByPolicy {
        let mut all = counts(&self.own);
        for others in self.others.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            for (policy, of_others) in others {
                all.entry(policy.clone()).or_default().add(of_others);
            }
        }
        all
    }

    /// Asks the others in the mesh's namespace, for as long as it is polled.
    pub(crate) async fn follow(
        self: Arc<Self>,
        client: Client,
        namespace: String,
        port: u16,
        credentials: Credentials,
    ) {
        let pods = Api::<Pod>::namespaced(client, &namespace);
        let mut trouble = Trouble::new("ask the other replicas what their proxies have");
        loop {
            match self.round(&pods, port, &credentials).await {
                Ok(others) => {
                    trouble.over();
                    *self.others.lock().unwrap_or_else(PoisonError::into_inner) = others;
                }
                Err(error) => trouble.is(&format!("{error:#}")),
            }
            sleep(ASK).await;
        }
    }

    async fn round(
        &self,
        pods: &Api<Pod>,
        port: u16,
        credentials: &Credentials,
    ) -> anyhow::Result<Vec<ByPolicy>> {
        let of_controllers = ListParams::default().labels(CONTROLLERS).match_any();
        let listed = timeout(PATIENCE, pods.list(&of_controllers)).await;
        let listed = listed.context("the API server did not answer in time")??;
        let mut others = Vec::new();
        for address in listed.items.iter().filter_map(address).take(MAX_REPLICAS) {
            let asked = timeout(PATIENCE, self.ask(SocketAddr::new(address, port), credentials)).await;
            match asked.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer in time"))) {
                Ok(said) if said.replica == self.id => {}
                Ok(said) => others.push(read(said)),
                // One that starts or stops: its proxies are elsewhere.
                Err(error) => tracing::debug!(%address, "a replica cannot be asked: {error:#}"),
            }
        }
        Ok(others)
    }

    async fn ask(&self, address: SocketAddr, credentials: &Credentials) -> anyhow::Result<PoliciesResponse> {
        let tls = credentials.client_config(&self.identity, &[b"h2"])?;
        let stream = TcpStream::connect(address).await?;
        let stream = TlsConnector::from(tls).connect(server_name(), stream).await?;
        let endpoint = tonic::transport::Endpoint::from_static("http://outrigger.invalid");
        let channel = outrigger_api::channel(endpoint, stream).await?;
        Ok(ReplicasClient::new(channel).policies(PoliciesRequest {}).await?.into_inner())
    }
}

/// The service that others ask.
#[derive(Debug, Clone)]
pub(crate) struct Answering(pub(crate) Arc<Replicas>);

#[tonic::async_trait]
impl replicas_server::Replicas for Answering {
    async fn policies(
        &self,
        request: Request<PoliciesRequest>,
    ) -> Result<Response<PoliciesResponse>, Status> {
        let (caller, _) = Caller::of(&request)?.workload("asking a replica")?;
        if caller.identity != self.0.identity {
            return Err(Status::permission_denied("replicas of the controller answer each other only"));
        }
        let mut room = MAX_REFUSALS;
        let policies =
            counts(&self.0.own).into_iter().map(|(policy, counts)| write(&policy, &counts, &mut room));
        Ok(Response::new(PoliciesResponse { replica: self.0.id, policies: policies.collect() }))
    }
}

fn write(policy: &Key, counts: &Counts, room: &mut usize) -> PolicyCount {
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    let refused: Vec<_> = counts
        .refused
        .iter()
        .take(*room)
        .map(|refusal| PolicyRefusal { proxy: refusal.proxy.clone(), reason: refusal.reason.clone() })
        .collect();
    *room -= refused.len();
    PolicyCount {
        policy: policy.to_string(),
        on: number(counts.on),
        accepted: number(counts.accepted),
        refusing: number(counts.refusing),
        refused,
    }
}

fn read(said: PoliciesResponse) -> ByPolicy {
    let counts = |count: PolicyCount| Counts {
        on: count.on as usize,
        accepted: count.accepted as usize,
        refused: count
            .refused
            .into_iter()
            .map(|refusal| Refusal { proxy: refusal.proxy, reason: refusal.reason })
            .collect(),
        refusing: count.refusing as usize,
    };
    // A kind that only a newer replica knows is left out.
    said.policies.into_iter().filter_map(|count| Some((count.policy.parse().ok()?, counts(count)))).collect()
}

/// Where a replica that runs can be asked.
fn address(pod: &Pod) -> Option<IpAddr> {
    pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_replicas_say_adds_up_and_is_bounded() {
        let refusals = |count: usize| -> Vec<Refusal> {
            (0..count)
                .map(|at| Refusal { proxy: format!("web-{at}"), reason: "no such thing".to_owned() })
                .collect()
        };
        let of = |refusing: usize, listed: usize| Counts {
            on: refusing + 2,
            accepted: 2,
            refused: refusals(listed),
            refusing,
        };
        let policies: Vec<Key> =
            (0..30).map(|at| format!("AccessPolicy shop/p{at}").parse().unwrap()).collect();
        let mut room = MAX_REFUSALS;
        let written: Vec<_> = policies.iter().map(|policy| write(policy, &of(100, 100), &mut room)).collect();
        assert_eq!(written.iter().map(|count| count.refused.len()).sum::<usize>(), MAX_REFUSALS);
        let mut said = read(PoliciesResponse { replica: 1, policies: written });
        assert_eq!(said.len(), policies.len());

        let first = said.get_mut(&policies[0]).unwrap();
        first.add(&of(5, 5));
        assert_eq!((first.on, first.accepted, first.refusing, first.refused.len()), (109, 4, 105, 100));

        let newer = PolicyCount { policy: "Sail shop/jib".to_owned(), on: 1, ..PolicyCount::default() };
        assert!(read(PoliciesResponse { replica: 1, policies: vec![newer] }).is_empty());
    }
}
