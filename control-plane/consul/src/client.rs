//! The typed calls, and which agent gets them.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Method;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::{
    ClientConfig, Error, HealthQuery, Scope,
    encode::{Query, segment},
    health::{self, AddressRules, Normalised},
    transport::{Answer, Request, Transport},
};

/// Deadline of a call that does not block, over all agents.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// Service names of a datacenter, each with its tags, sorted.
pub type ServiceNames = BTreeMap<String, Vec<String>>;

/// A client of one Consul cluster. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) transport: Transport,
    scope: Scope,
    pub(crate) rules: AddressRules,
    /// The agent that calls go to until it fails.
    current: AtomicUsize,
    /// Watches that failed last time: their number sets the pace of their retries (`pace`).
    pub(crate) failing: AtomicUsize,
    /// Signalled when a failing watch succeeds, so that the others need not sleep on.
    pub(crate) recovered: Notify,
}

impl Client {
    /// Checks `config`. Connects to nobody yet.
    pub fn new(config: &ClientConfig) -> Result<Self, Error> {
        config.validate()?;
        Ok(Self::with_transport(config, Transport::new(config)?))
    }

    pub(crate) fn with_transport(config: &ClientConfig, transport: Transport) -> Self {
        Self {
            inner: Arc::new(Inner {
                transport,
                scope: config.scope.clone(),
                rules: AddressRules { allow_local: config.allow_local_addresses },
                current: AtomicUsize::new(0),
                failing: AtomicUsize::new(0),
                recovered: Notify::new(),
            }),
        }
    }

    /// What the agent says of itself.
    pub async fn agent_self(&self) -> Result<AgentSelf, Error> {
        #[derive(Deserialize)]
        struct Wire {
            #[serde(rename = "Config")]
            config: WireConfig,
        }
        #[derive(Deserialize, Default)]
        #[serde(rename_all = "PascalCase", default)]
        struct WireConfig {
            version: String,
            datacenter: String,
            node_name: String,
        }
        let answer = self.get("/v1/agent/self".into(), Query::default()).await?;
        let wire: Wire = answer.json()?;
        Ok(AgentSelf {
            version: wire.config.version,
            datacenter: wire.config.datacenter,
            node: wire.config.node_name,
        })
    }

    /// The datacenters that the cluster knows, nearest first.
    pub async fn catalog_datacenters(&self) -> Result<Vec<String>, Error> {
        self.get("/v1/catalog/datacenters".into(), Query::default()).await?.json()
    }

    /// The names of all services.
    pub async fn catalog_services(&self, scope: &Scope) -> Result<ServiceNames, Error> {
        let answer = self.get("/v1/catalog/services".into(), self.query(scope)).await?;
        parse_service_names(&answer)
    }

    /// The instances of a service, healthy or not.
    pub async fn health_service(&self, name: &str, query: &HealthQuery) -> Result<Normalised, Error> {
        self.health("/v1/health/service/", name, query).await
    }

    /// The instances that Consul's own mesh offers for a service: its sidecars and native ones.
    pub async fn health_connect(&self, name: &str, query: &HealthQuery) -> Result<Normalised, Error> {
        self.health("/v1/health/connect/", name, query).await
    }

    async fn health(&self, prefix: &str, name: &str, query: &HealthQuery) -> Result<Normalised, Error> {
        let path = segment(prefix, "service name", name)?;
        let answer = self.get(path, self.health_query(query)).await?;
        health::normalise(&answer, self.inner.rules)
    }

    pub(crate) fn health_query(&self, query: &HealthQuery) -> Query {
        let mut out = self.query(&query.scope);
        out.add_some("filter", query.filter.as_deref());
        out
    }

    /// Registers a service with the agent that answers; an existing one with the same id is replaced.
    pub async fn agent_register(&self, registration: &Registration) -> Result<(), Error> {
        let body = serde_json::to_vec(registration)
            .map_err(|error| Error::Config(format!("registration of {}: {error}", registration.name)))?;
        let mut query = Query::default();
        query.flag("replace-existing-checks");
        self.put("/v1/agent/service/register".into(), query, body.into()).await.map(drop)
    }

    /// Takes a service away from the agent that answers, by its id.
    pub async fn agent_deregister(&self, id: &str) -> Result<(), Error> {
        let path = segment("/v1/agent/service/deregister/", "service id", id)?;
        self.put(path, Query::default(), Bytes::new()).await.map(drop)
    }

    /// The parameters of `scope`, and of the configuration where it says nothing.
    pub(crate) fn query(&self, scope: &Scope) -> Query {
        let scope = scope.or(&self.inner.scope);
        let mut query = Query::default();
        query.add_some("dc", scope.datacenter.as_deref());
        query.add_some("ns", scope.namespace.as_deref());
        query.add_some("partition", scope.partition.as_deref());
        query
    }

    pub(crate) async fn get(&self, path: String, query: Query) -> Result<Answer, Error> {
        self.get_any(path, query).await?.ok()
    }

    /// Like `get`, but a 404 is an answer too: that is how Consul says "no such key".
    pub(crate) async fn get_any(&self, path: String, query: Query) -> Result<Answer, Error> {
        self.call(Request { method: Method::GET, path, query, body: Bytes::new(), deadline: CALL_LIMIT })
            .await
    }

    pub(crate) async fn put(&self, path: String, query: Query, body: Bytes) -> Result<Answer, Error> {
        self.put_any(path, query, body).await?.ok()
    }

    /// Like `put`, but a 409 is an answer too: that is how Consul says that a transaction was rolled back.
    pub(crate) async fn put_any(&self, path: String, query: Query, body: Bytes) -> Result<Answer, Error> {
        self.call(Request { method: Method::PUT, path, query, body, deadline: CALL_LIMIT }).await
    }

    pub(crate) async fn delete(&self, path: String, query: Query) -> Result<Answer, Error> {
        let method = Method::DELETE;
        self.call(Request { method, path, query, body: Bytes::new(), deadline: CALL_LIMIT }).await?.ok()
    }

    /// Tries the agents one after the other; a write goes on only where nothing was sent.
    async fn call(&self, request: Request) -> Result<Answer, Error> {
        let agents = self.inner.transport.agents();
        let start = tokio::time::Instant::now();
        let mut tried = 1;
        loop {
            let left = CALL_LIMIT.saturating_sub(start.elapsed());
            let error = match self.once(&Request { deadline: left, ..request.clone() }).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let may_repeat = request.method == Method::GET || matches!(error, Error::Connect { .. });
            if tried == agents || !error.blames_agent() || !may_repeat || left.is_zero() {
                return Err(error);
            }
            tried += 1;
        }
    }

    /// One exchange with the current agent, which loses that role where it is to blame. 200, 404 and 409 are answers.
    pub(crate) async fn once(&self, request: &Request) -> Result<Answer, Error> {
        let Inner { transport, current, .. } = &*self.inner;
        let agent = current.load(Ordering::Relaxed);
        let result = match transport.exchange(agent, request).await {
            Ok(answer) if matches!(answer.status, 404 | 409) => Ok(answer),
            Ok(answer) => answer.ok(),
            Err(error) => Err(error),
        };
        if result.as_ref().is_err_and(Error::blames_agent) {
            // Whoever fails first moves all calls on; the others find the role moved already.
            let next = (agent + 1) % transport.agents();
            let _ = current.compare_exchange(agent, next, Ordering::Relaxed, Ordering::Relaxed);
        }
        result
    }
}

pub(crate) fn parse_service_names(answer: &Answer) -> Result<ServiceNames, Error> {
    let mut names: ServiceNames = answer.json()?;
    for tags in names.values_mut() {
        tags.sort_unstable();
    }
    Ok(names)
}

/// An agent's identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentSelf {
    /// Consul's version, e.g. `1.20.6`.
    pub version: String,
    /// The agent's datacenter.
    pub datacenter: String,
    /// The agent's node name.
    pub node: String,
}

/// A service to register with an agent. Empty fields are not sent.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Registration {
    /// Service name.
    pub name: String,
    /// Unique at its agent.
    #[serde(rename = "ID")]
    pub id: String,
    /// Empty: the node's address.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub address: String,
    /// Port.
    pub port: u16,
    /// Tags.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Meta; `outrigger-protocol` is the protocol hint, `zone` the zone.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub meta: BTreeMap<String, String>,
    /// Health checks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<Check>,
}

/// A health check that the agent runs. Set one of `tcp` and `http`, with `interval`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Check {
    /// `host:port` to connect to.
    #[serde(rename = "TCP", skip_serializing_if = "Option::is_none")]
    pub tcp: Option<String>,
    /// URL to get: 2xx passes, 429 warns.
    #[serde(rename = "HTTP", skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// Consul's notation, e.g. `1s`.
    #[serde(rename = "Interval")]
    pub interval: String,
    /// What holds until the first run: `passing`, `warning` or `critical` (Consul's default).
    #[serde(rename = "Status", skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
}
