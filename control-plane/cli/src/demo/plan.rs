//! What the demo runs: which replicas there are, where each listens, and the files that say so to the mesh.
//!
//! Everything lies on 127.0.0.1 with ports chosen at the start. Without redirection an application dials its sidecar's
//! explicit listener for the next service, and the catalog holds the address of the explicit listener in front of it.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::processes::free_addresses;

/// Service, replicas, the service that it calls.
const SERVICES: [(&str, usize, Option<&str>); 3] =
    [("web", 2, Some("orders")), ("orders", 3, Some("payments")), ("payments", 2, None)];

/// The port under which each service is known in the mesh.
const SERVICE_PORT: u16 = 80;

/// Life of a leaf: short, so that a rotation can be watched. A sidecar renews from a third of it.
pub(super) const LEAF_LIFE: &str = "45s";

/// One replica of a service, or the load generator, with its sidecar.
#[derive(Debug, Clone)]
pub(super) struct Replica {
    /// `orders-2`
    pub(super) name: String,
    /// `orders`
    pub(super) service: &'static str,
    /// Where the application listens; the load generator does not.
    pub(super) app: Option<SocketAddr>,
    /// Where its sidecar takes mutual TLS for it: the address in the catalog.
    pub(super) inbound: Option<SocketAddr>,
    /// Where its sidecar takes requests to the next service.
    pub(super) upstream: Option<(&'static str, SocketAddr)>,
    /// The sidecar's admin port.
    pub(super) admin: SocketAddr,
}

/// The whole layout.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) replicas: Vec<Replica>,
    pub(super) discovery: SocketAddr,
    pub(super) api: SocketAddr,
    pub(super) controller_metrics: SocketAddr,
    /// HTTP, server RPC, serf LAN, serf WAN, gRPC, DNS.
    pub(super) consul: [SocketAddr; 6],
}

impl Plan {
    /// Chooses the ports.
    pub(super) fn new() -> Result<Self> {
        let replicas: usize = SERVICES.iter().map(|service| service.1).sum::<usize>() + 1;
        let mut ports = free_addresses(replicas * 4 + 3 + 6)?.into_iter();
        let mut port = || ports.next().context("too few ports were asked for");
        let mut list = vec![Replica {
            name: "load".to_owned(),
            service: "load",
            app: None,
            inbound: None,
            upstream: Some(("web", port()?)),
            admin: port()?,
        }];
        for (service, count, next) in SERVICES {
            for number in 1..=count {
                list.push(Replica {
                    name: format!("{service}-{number}"),
                    service,
                    app: Some(port()?),
                    inbound: Some(port()?),
                    upstream: next.map(|next| Ok::<_, anyhow::Error>((next, port()?))).transpose()?,
                    admin: port()?,
                });
            }
        }
        Ok(Self {
            replicas: list,
            discovery: port()?,
            api: port()?,
            controller_metrics: port()?,
            consul: [port()?, port()?, port()?, port()?, port()?, port()?],
        })
    }

    /// The replicas of one service.
    pub(super) fn of(&self, service: &str) -> impl Iterator<Item = &Replica> {
        self.replicas.iter().filter(move |replica| replica.service == service)
    }

    /// The names of the services that have endpoints.
    pub(super) fn services() -> impl Iterator<Item = &'static str> {
        SERVICES.into_iter().map(|service| service.0)
    }

    /// The service file for the file source. The identities stand in it, so no claim is needed.
    pub(super) fn service_file(&self, service: &str) -> String {
        let endpoints: Vec<Value> = self
            .of(service)
            .filter_map(|replica| replica.inbound)
            .map(|address| {
                json!({
                    "address": address.ip().to_string(),
                    "port": address.port(),
                    "identity": identity(service),
                })
            })
            .collect();
        document(&json!({
            "kind": "Service",
            "name": service,
            "namespace": "default",
            "ports": [{"port": SERVICE_PORT, "name": "http", "protocol": "http1"}],
            "endpoints": endpoints,
        }))
    }

    /// The sidecar's configuration. Where the catalog comes from Consul, the sidecar claims its instance.
    pub(super) fn sidecar_file(&self, replica: &Replica, token: &str, root: &str, claims: bool) -> String {
        let inbounds: Vec<Value> = replica
            .inbound
            .zip(replica.app)
            .map(|(listen, forward)| json!({"listen": listen.to_string(), "forward": forward.to_string()}))
            .into_iter()
            .collect();
        let upstreams: Vec<Value> = replica
            .upstream
            .map(|(next, listen)| {
                json!({"service": format!("{next}.default:{SERVICE_PORT}"), "listen": listen.to_string()})
            })
            .into_iter()
            .collect();
        let services: Vec<Value> = replica
            .inbound
            .filter(|_| claims)
            .map(|address| json!({"service": replica.service, "port": address.port()}))
            .into_iter()
            .collect();
        document(&json!({
            "controller": [self.discovery.to_string()],
            "token_file": token,
            "trust_bundle": root,
            "services": services,
            "inbounds": inbounds,
            "upstreams": upstreams,
            "ports": {"outbound": 0, "inbound": 0, "dns": 0, "admin": replica.admin.port()},
            "bind": {"admin": ["127.0.0.1"]},
            "threads": 1,
            "drain": {"min": "1s", "max": "10s"},
        }))
    }
}

/// The identity of every replica of a service.
pub(super) fn identity(service: &str) -> String {
    format!("spiffe://outrigger.local/ns/default/sa/{service}")
}

/// JSON is YAML, and needs no second serialiser to be correct.
pub(super) fn document(value: &Value) -> String {
    format!("{value:#}\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_port_is_given_twice() {
        let plan = Plan::new().unwrap();
        let mut ports: Vec<SocketAddr> = plan.consul.to_vec();
        ports.extend([plan.discovery, plan.api, plan.controller_metrics]);
        for replica in &plan.replicas {
            ports.push(replica.admin);
            ports.extend(replica.app);
            ports.extend(replica.inbound);
            ports.extend(replica.upstream.map(|upstream| upstream.1));
        }
        let distinct: BTreeSet<_> = ports.iter().collect();
        assert_eq!(distinct.len(), ports.len());
    }
}
