//! A proxy's own side where its source knows the workload by itself: a pod.
//!
//! It need not claim anything. Its connection's identity and peer address say which pod it is, and the catalog says which
//! services lead there; that is as good as a claim for each of their ports. Where a pod and an identity do not belong
//! together (a sidecar behind another address, a join token) nothing is implied.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use outrigger_api::v1;
use outrigger_certs::SpiffeId;
use outrigger_policy::catalog as policy;

use super::in_force::Claimed;
use super::{Mesh, State, Viewer};
use crate::catalog::Key;
use crate::compile;
use crate::sources::Workload;

/// What is known of the workload behind a connection.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Own {
    /// What it claimed, and what its source implies.
    pub(super) claimed: Claimed,
    /// The pod that it is.
    pub(super) workload: Option<Arc<Workload>>,
}

impl State {
    /// What is known of the workload behind a connection.
    pub(super) fn own(&self, viewer: &Viewer) -> Own {
        let workload = self.workload_of(viewer).cloned();
        let mut claimed = self.claimed(viewer.connection);
        let implied = workload.iter().flat_map(|workload| self.implied(workload));
        claimed.extend(implied.filter_map(|status| {
            let at = SocketAddr::new(status.address.parse().ok()?, u16::try_from(status.port).ok()?);
            Some((crate::sources::ServiceKey::parse(&status.service).ok()?, at))
        }));
        Own { claimed, workload }
    }

    /// Adds what the source says of the viewer's pod.
    pub(super) fn tell_own(&self, viewer: &Viewer, inbound: &mut v1::Inbound) {
        let Some(workload) = self.workload_of(viewer) else { return };
        let implied = self.implied(workload);
        inbound.claims.extend(implied);
        inbound.terminating = workload.terminating;
        inbound.locality = compile::locality(&workload.region, &workload.zone);
    }

    /// The connections of workloads at addresses of which something changed; their own side is worked out anew.
    pub(super) fn viewers_at(&mut self, changed: &HashSet<Key>) -> Vec<Key> {
        let concerned = |viewer: &&Viewer| {
            let of_pod =
                self.catalog.workload_at(viewer.address).into_iter().flat_map(|pod| pod.addresses.iter());
            of_pod.chain([&viewer.address]).any(|address| changed.contains(&Key::Ip(*address)))
        };
        let connections: Vec<u64> =
            self.in_force.viewers().filter(concerned).map(|viewer| viewer.connection).collect();
        for connection in &connections {
            self.in_force.forget_inbound(*connection);
        }
        connections.into_iter().map(Key::Connection).collect()
    }

    fn workload_of(&self, viewer: &Viewer) -> Option<&Arc<Workload>> {
        let workload = self.catalog.workload_at(viewer.address)?;
        (workload.identity.as_deref() == Some(viewer.identity.as_str())).then_some(workload)
    }

    /// The claims that the workload would have to make, accepted: one for each of its own ports that a service leads to.
    fn implied(&self, workload: &Workload) -> Vec<v1::ClaimStatus> {
        let mut seen = BTreeSet::new();
        let mut implied = Vec::new();
        for (service, instance) in self.catalog.leading_to(workload) {
            for port in &service.spec.ports {
                let Some(target) = instance.target(port.port) else { continue };
                if seen.insert((&service.spec.key, instance.address, target)) {
                    implied.push(v1::ClaimStatus {
                        service: service.spec.key.to_string(),
                        address: instance.address.to_string(),
                        port: target.into(),
                        accepted: true,
                        message: String::new(),
                        protocol: port.protocol.into(),
                    });
                }
            }
        }
        implied
    }
}

impl Mesh {
    /// Whether a source knows a workload of this identity at this address. `None`: that was never read.
    pub(crate) fn vouches(&self, identity: &SpiffeId, address: IpAddr) -> Option<bool> {
        let state = self.state();
        state.catalog.ranges()?;
        let here = state.catalog.workload_at(address);
        Some(here.is_some_and(|workload| workload.identity.as_deref() == Some(identity.as_str())))
    }

    /// The workloads of the mesh that no service leads to, for policies about labels and namespaces.
    pub(super) fn workloads_without_services(&self) -> Vec<policy::Workload> {
        let all: Vec<Arc<Workload>> = self
            .state()
            .catalog
            .workloads()
            .filter(|workload| workload.identity.is_some())
            .cloned()
            .collect();
        // The lock is taken for each alone: proxies do not wait until all is copied.
        let alone = |workload: &&Arc<Workload>| self.state().catalog.leading_to(workload).next().is_none();
        all.iter().filter(alone).map(|workload| as_policies_see(workload)).collect()
    }
}

/// A workload without its services.
pub(crate) fn as_policies_see(workload: &Workload) -> policy::Workload {
    policy::Workload {
        identity: workload.identity.clone(),
        // A workload has one at least.
        address: workload.addresses.first().copied().unwrap_or(IpAddr::from([0, 0, 0, 0])),
        namespace: workload.key.namespace().to_owned(),
        services: BTreeMap::new(),
        ports: BTreeSet::new(),
        labels: BTreeMap::clone(&workload.labels),
        probes: workload.probes.clone(),
        zone: workload.zone.clone(),
    }
}
