//! `ExternalService`.

use super::{Problems, names};
use crate::bounds::{MAX_ENDPOINTS, MAX_HOSTS, MAX_ZONE};
use crate::kinds::ExternalService;
use crate::tree::shown;

pub(super) fn check(out: &mut Problems, name: &str, spec: &ExternalService) {
    if !names::is_label(name) {
        // It is dialled as `<name>.<namespace>.mesh`.
        out.error("metadata.name", names::not_a(name, "service's name", names::LABEL));
    }
    if spec.hosts.is_empty() {
        out.error("spec.hosts", "is empty: write the names that workloads dial");
    }
    out.at_most("spec.hosts", &spec.hosts, MAX_HOSTS);
    for (number, host) in spec.hosts.iter().enumerate() {
        let at = format!("spec.hosts[{number}]");
        if host.starts_with("*.") {
            out.error(at, format!("`{}` stands for many hosts: write each", shown(host)));
        } else if host.parse::<std::net::IpAddr>().is_ok() {
            out.error(at, format!("`{host}` is an address: it belongs into `endpoints`"));
        } else if [".mesh", ".consul", ".cluster.local"].iter().any(|suffix| host.ends_with(suffix)) {
            out.error(at, format!("`{}` is a name inside of the mesh", shown(host)));
        } else {
            out.take(at, names::host(host));
        }
    }
    let hosts = spec.hosts.iter().enumerate();
    out.unique(hosts.map(|(number, host)| (format!("spec.hosts[{number}]"), host)));
    ports(out, spec);
    if let Some(endpoints) = &spec.endpoints {
        if endpoints.is_empty() {
            out.error("spec.endpoints", "is empty: leave it out to resolve the hosts by DNS");
        }
        out.at_most("spec.endpoints", endpoints, MAX_ENDPOINTS);
        for (number, endpoint) in endpoints.iter().enumerate() {
            let at = format!("spec.endpoints[{number}]");
            let address = endpoint.address;
            if address.is_unspecified() || address.is_multicast() || address.is_loopback() {
                out.error(format!("{at}.address"), format!("{address} is no address of another host"));
            }
            if let Some(zone) = endpoint.zone.as_ref().filter(|zone| zone.len() > MAX_ZONE) {
                let message = format!("has {} bytes: at most {MAX_ZONE} are taken", zone.len());
                out.error(format!("{at}.zone"), message);
            }
        }
        let addresses = endpoints.iter().enumerate();
        out.unique(addresses.map(|(number, one)| (format!("spec.endpoints[{number}].address"), one.address)));
    }
    if let Some(identity) = &spec.identity {
        out.take("spec.identity", names::identity(identity));
    }
}

fn ports(out: &mut Problems, spec: &ExternalService) {
    if spec.ports.is_empty() {
        out.error("spec.ports", "is empty: write the ports that workloads dial");
    }
    out.at_most("spec.ports", &spec.ports, MAX_HOSTS);
    for (number, port) in spec.ports.iter().enumerate() {
        let at = format!("spec.ports[{number}]");
        if port.port == 0 {
            out.error(format!("{at}.port"), "0 is not 1 to 65535");
        }
        if let Some(name) = &port.name
            && !names::is_label(name)
        {
            out.error(format!("{at}.name"), names::not_a(name, "port's name", names::LABEL));
        }
    }
    let ports = spec.ports.iter().enumerate();
    out.unique(ports.map(|(number, port)| (format!("spec.ports[{number}].port"), port.port)));
    let named = spec.ports.iter().enumerate();
    let named = named
        .filter_map(|(number, port)| Some((format!("spec.ports[{number}].name"), port.name.as_deref()?)));
    out.unique(named);
}
