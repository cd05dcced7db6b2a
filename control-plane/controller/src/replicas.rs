//! What became of policies, over all replicas. A proxy is connected to one of them, so what that one alone could say of a
//! policy ("nobody refuses it") may be wrong of the mesh.
//!
//! Each replica asks the others, every few seconds, on the port for sidecars and with the controller's own identity at both
//! ends. What one has said holds until it says something else or its pod has gone, and for [`KEPT`] where it cannot be asked:
//! a slow replica has its proxies still. Of a policy that another replica knows in another version only the proxies are
//! counted: what they took or refused is not what is asked about.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use futures_util::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client};
use outrigger_api::v1::replicas_client::ReplicasClient;
use outrigger_api::v1::replicas_server;
use outrigger_api::v1::{PoliciesRequest, PoliciesResponse, PolicyCount, PolicyRefusal};
use outrigger_certs::{Credentials, SpiffeId, server_name};
use outrigger_policy::Key;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tonic::{Request, Response, Status};

use crate::kubernetes::Trouble;
use crate::policies::counts::{Counts, Refusal, counts};
use crate::policies::resolver::Resolution;
use crate::push::Proxies;
use crate::server::Caller;

/// Between two rounds: a refusal at another replica is in a status within this and the status's own batch.
const ASK: Duration = Duration::from_secs(5);
/// The longest that one replica is waited for, or the API server.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long the word of a replica holds that cannot be asked. By then its proxies have found another one, or it answers again.
const KEPT: Duration = Duration::from_mins(1);
/// Replicas that are asked: far more than anybody runs.
const MAX_REPLICAS: usize = 16;
/// Refusals with their reasons in one answer: of a policy, and over all.
const MAX_REFUSALS_OF_ONE: usize = 10;
const MAX_REFUSALS: usize = 500;
/// Characters of a proxy's name and of its reason: they are its own words.
const MAX_WORDS: usize = 500;
/// Bytes of an answer: ten thousand policies with long names, and [`MAX_REFUSALS`] of long reasons.
const MAX_ANSWER: usize = 16 * 1024 * 1024;
/// How long an answer is good for all who ask: to count is work that grows with the proxies.
const COUNTED: Duration = Duration::from_secs(2);
/// The pods of the Deployment.
const CONTROLLERS: &str = "app.kubernetes.io/name=outrigger,app.kubernetes.io/component=controller";

/// This replica's proxies, and what the others said of theirs.
#[derive(Debug)]
pub(crate) struct Replicas {
    own: Arc<Proxies>,
    resolution: watch::Receiver<Option<Arc<Resolution>>>,
    others: Mutex<Others>,
    /// What others were told last, and when.
    told: tokio::sync::Mutex<Option<(Instant, PoliciesResponse)>>,
    /// Whom the others must prove to be, and prove to be asked by.
    identity: SpiffeId,
    /// Random: how we know ourselves among them.
    id: u64,
}

/// By address.
type Others = BTreeMap<IpAddr, Said>;

/// What a replica has said.
#[derive(Debug)]
struct Said {
    replica: u64,
    at: Instant,
    policies: Vec<(Key, OfOther)>,
}

/// What a replica says of a policy.
#[derive(Debug, Clone, PartialEq)]
struct OfOther {
    revision: u64,
    counts: Counts,
}

impl Replicas {
    pub(crate) fn new(
        own: Arc<Proxies>,
        resolution: watch::Receiver<Option<Arc<Resolution>>>,
        identity: SpiffeId,
    ) -> Self {
        let id = fastrand::u64(..);
        Self { own, resolution, others: Mutex::default(), told: tokio::sync::Mutex::default(), identity, id }
    }

    /// Of each policy that any proxy of the mesh has.
    pub(crate) fn counts(&self) -> BTreeMap<Key, Counts> {
        let mut all = counts(&self.own);
        for said in self.others().values() {
            for (policy, of_other) in &said.policies {
                let counts = all.entry(policy.clone()).or_default();
                if of_other.revision == self.revision(policy) {
                    counts.add(&of_other.counts);
                } else {
                    counts.on += of_other.counts.on;
                }
            }
        }
        all
    }

    /// Of a policy in force here; 0: it is not.
    fn revision(&self, policy: &Key) -> u64 {
        let resolution = self.resolution.borrow();
        let stored = resolution.as_ref().and_then(|resolution| resolution.policies.get(policy));
        stored.map_or(0, |stored| stored.revision)
    }

    fn others(&self) -> MutexGuard<'_, Others> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
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
                Ok(()) => trouble.over(),
                Err(error) => trouble.is(&format!("{error:#}")),
            }
            sleep(ASK).await;
        }
    }

    async fn round(&self, pods: &Api<Pod>, port: u16, credentials: &Credentials) -> anyhow::Result<()> {
        let of_controllers = ListParams::default().labels(CONTROLLERS).match_any();
        let listed = timeout(PATIENCE, pods.list(&of_controllers)).await;
        let listed = listed.context("the API server did not answer in time")??;
        let mut addresses: Vec<IpAddr> = listed.items.iter().filter_map(address).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses.truncate(MAX_REPLICAS);
        let asked = join_all(addresses.iter().map(async |address| {
            let asked = timeout(PATIENCE, self.ask(SocketAddr::new(*address, port), credentials)).await;
            asked.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer in time")))
        }));
        let asked = asked.await;
        let now = Instant::now();
        let mut others = self.others();
        others.retain(|address, _| addresses.contains(address));
        let mut missing = Ok(());
        for (address, asked) in addresses.iter().zip(asked) {
            match asked {
                Ok(answer) => drop(others.insert(*address, Said::read(answer, now))),
                // One that has just started, or stops, is no trouble.
                Err(error) if others.get(address).is_some_and(|said| now - said.at > KEPT) => {
                    others.remove(address);
                    missing = Err(error.context(format!("{address}:{port}")));
                }
                Err(error) => tracing::debug!(%address, "a replica cannot be asked: {error:#}"),
            }
        }
        // Ourselves, and whoever answers at two addresses.
        let mut seen = vec![self.id];
        others.retain(|_, said| {
            let is_new = !seen.contains(&said.replica);
            seen.push(said.replica);
            is_new
        });
        missing
    }

    async fn ask(&self, address: SocketAddr, credentials: &Credentials) -> anyhow::Result<PoliciesResponse> {
        let tls = credentials.client_config(&self.identity, &[b"h2"])?;
        let stream = TcpStream::connect(address).await?;
        let stream = TlsConnector::from(tls).connect(server_name(), stream).await?;
        let endpoint = tonic::transport::Endpoint::from_static("http://outrigger.invalid");
        let channel = outrigger_api::channel(endpoint, stream).await?;
        let mut client = ReplicasClient::new(channel).max_decoding_message_size(MAX_ANSWER);
        Ok(client.policies(PoliciesRequest {}).await?.into_inner())
    }

    async fn answer(&self) -> PoliciesResponse {
        let mut told = self.told.lock().await;
        if let Some((at, answer)) = &*told
            && at.elapsed() < COUNTED
        {
            return answer.clone();
        }
        let own = Arc::clone(&self.own);
        // Many proxies with many policies are a second's work, which no connection shall wait for.
        let counted = tokio::task::spawn_blocking(move || counts(&own)).await.unwrap_or_default();
        let mut room = MAX_REFUSALS;
        let policies = counted.into_iter().map(|(policy, counts)| {
            OfOther { revision: self.revision(&policy), counts }.write(&policy, &mut room)
        });
        let answer = PoliciesResponse { replica: self.id, policies: policies.collect() };
        *told = Some((Instant::now(), answer.clone()));
        answer
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
        Ok(Response::new(self.0.answer().await))
    }
}

impl OfOther {
    fn write(&self, policy: &Key, room: &mut usize) -> PolicyCount {
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let short = |text: &str| text.chars().take(MAX_WORDS).collect();
        let refused: Vec<_> = self
            .counts
            .refused
            .iter()
            .take(MAX_REFUSALS_OF_ONE.min(*room))
            .map(|refusal| PolicyRefusal { proxy: short(&refusal.proxy), reason: short(&refusal.reason) })
            .collect();
        *room -= refused.len();
        PolicyCount {
            policy: policy.to_string(),
            revision: self.revision,
            on: number(self.counts.on),
            accepted: number(self.counts.accepted),
            refusing: number(self.counts.refusing),
            refused,
        }
    }

    /// `None`: a kind that only a newer replica knows.
    fn read(count: PolicyCount) -> Option<(Key, Self)> {
        let refused = count.refused.into_iter();
        let counts = Counts {
            on: count.on as usize,
            accepted: count.accepted as usize,
            refused: refused.map(|one| Refusal { proxy: one.proxy, reason: one.reason }).collect(),
            refusing: count.refusing as usize,
        };
        Some((count.policy.parse().ok()?, Self { revision: count.revision, counts }))
    }
}

impl Said {
    fn read(answer: PoliciesResponse, at: Instant) -> Self {
        let policies = answer.policies.into_iter().filter_map(OfOther::read).collect();
        Self { replica: answer.replica, at, policies }
    }
}

/// Where a replica that runs can be asked.
fn address(pod: &Pod) -> Option<IpAddr> {
    let status = pod.status.as_ref()?;
    let runs = status.phase.as_deref() == Some("Running") && pod.metadata.deletion_timestamp.is_none();
    status.pod_ip.as_ref().filter(|_| runs)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: &str = "spiffe://outrigger.local/ns/outrigger-system/sa/outrigger-controller";

    fn of(revision: u64, refusing: usize) -> OfOther {
        let refusals = (0..refusing.min(100))
            .map(|at| Refusal { proxy: format!("web-{at}"), reason: "no such thing".to_owned() });
        let counts = Counts { on: refusing + 2, accepted: 2, refused: refusals.collect(), refusing };
        OfOther { revision, counts }
    }

    fn keys(count: usize) -> Vec<Key> {
        (0..count).map(|at| format!("AccessPolicy shop/p{at}").parse().unwrap()).collect()
    }

    fn said(of_other: OfOther) -> Said {
        Said { replica: 1, at: Instant::now(), policies: vec![(keys(1).remove(0), of_other)] }
    }

    #[test]
    fn what_replicas_say_is_bounded_and_reads_as_it_was_written() {
        let mut room = MAX_REFUSALS;
        let written: Vec<_> = keys(80).iter().map(|policy| of(3, 100).write(policy, &mut room)).collect();
        assert_eq!(written.iter().map(|count| count.refused.len()).max(), Some(MAX_REFUSALS_OF_ONE));
        assert_eq!(written.iter().map(|count| count.refused.len()).sum::<usize>(), MAX_REFUSALS);
        let (policy, read) = OfOther::read(written[0].clone()).unwrap();
        assert_eq!((policy, read.counts.on, read.counts.refusing), (keys(1).remove(0), 102, 100));

        let newer = PolicyCount { policy: "Sail shop/jib".to_owned(), on: 1, ..PolicyCount::default() };
        assert_eq!(OfOther::read(newer), None);
    }

    #[test]
    fn what_proxies_elsewhere_took_counts_only_for_the_version_that_they_took() {
        // Nothing is in force here.
        let (_sender, resolution) = watch::channel(None);
        let replicas = Replicas::new(Arc::default(), resolution, IDENTITY.parse().unwrap());
        replicas.others().insert([10, 0, 0, 1].into(), said(of(0, 3)));
        replicas.others().insert([10, 0, 0, 2].into(), said(of(2, 5)));
        let counts = replicas.counts().remove(&keys(1)[0]).unwrap();
        assert_eq!((counts.on, counts.accepted, counts.refusing, counts.refused.len()), (12, 2, 3, 3));
    }

    #[test]
    fn only_what_runs_is_asked() {
        let pod = |phase: &str| -> Pod {
            serde_json::from_value(
                serde_json::json!({ "metadata": {}, "status": { "phase": phase, "podIP": "10.0.0.1" } }),
            )
            .unwrap()
        };
        assert_eq!(address(&pod("Running")), Some([10, 0, 0, 1].into()));
        assert_eq!(address(&pod("Failed")), None);
    }
}
