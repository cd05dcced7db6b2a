//! Whether a pushed resource holds: beyond what `outrigger_core::model` checks, that it is ours.

use outrigger_api::v1;
use outrigger_certs::SpiffeId;
use outrigger_core::{
    external::ExternalHosts,
    model::Service,
    resolve::{OutboundDefault, Ranges},
};
use prost::Message;

pub(super) fn decode<M: Message + Default>(name: &str, value: &[u8]) -> Result<M, String> {
    M::decode(value).map_err(|error| format!("{name}: not a valid message of its type: {error}"))
}

/// `namespace`: our own, for which consumer routes hold.
pub(super) fn checked_service(
    name: &str,
    value: &[u8],
    trust_domain: &str,
    namespace: &str,
) -> Result<Service, String> {
    let service = Service::from_wire(decode(name, value)?, namespace).map_err(|error| error.to_string())?;
    if *service.name != *name {
        return Err(format!("{name}: holds the service {}", service.name));
    }
    for endpoint in &service.endpoints {
        let Some(identity) = &endpoint.identity else { continue };
        let id: SpiffeId = identity
            .parse()
            .map_err(|error| format!("{name}: endpoint {}: identity: {error}", endpoint.id))?;
        if id.trust_domain() != trust_domain {
            return Err(format!("{name}: endpoint {}: {identity} is of another trust domain", endpoint.id));
        }
    }
    Ok(service)
}

pub(super) fn mesh(mesh: v1::Mesh, trust_domain: &str) -> Result<(Ranges, ExternalHosts), String> {
    let ranges = ranges(&mesh, trust_domain)?;
    let hosts = ExternalHosts::from_wire(mesh.external_hosts).map_err(|error| format!("mesh: {error}"))?;
    Ok((ranges, hosts))
}

fn ranges(mesh: &v1::Mesh, trust_domain: &str) -> Result<Ranges, String> {
    if mesh.trust_domain != trust_domain {
        return Err(format!(
            "mesh: it is for the trust domain {:?}, not {trust_domain:?}",
            mesh.trust_domain
        ));
    }
    let ranges = mesh
        .cidrs
        .iter()
        .chain(&mesh.virtual_cidrs)
        .map(|text| text.parse().map_err(|_| format!("mesh: {text:?} is no range of addresses")))
        .collect::<Result<_, String>>()?;
    let outbound = match mesh.outbound() {
        v1::mesh::OutboundDefault::Unspecified | v1::mesh::OutboundDefault::Allow => OutboundDefault::Allow,
        v1::mesh::OutboundDefault::Audit => OutboundDefault::Audit,
        v1::mesh::OutboundDefault::Deny => OutboundDefault::Deny,
    };
    Ok(Ranges { mesh: Some(ranges), outbound })
}
