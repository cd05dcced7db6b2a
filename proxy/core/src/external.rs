//! Names outside the mesh that lead to services of it: the hosts of `ExternalService`s, as pushed to every proxy.
//!
//! A name is compared as DNS does: without regard to case, with or without its final dot. Nothing else is equal to it: a host
//! says nothing of the names below it.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use outrigger_api::v1;

use crate::model::InvalidResource;

/// Bytes of a DNS name (RFC 1035, 3.1).
const MAX_NAME: usize = 253;

/// Which service each host leads to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExternalHosts(HashMap<Box<str>, Arc<str>>);

impl ExternalHosts {
    /// Checks what was pushed.
    ///
    /// # Errors
    /// On a host that is no DNS name in lower case or comes twice, and on one without a service.
    pub fn from_wire(wire: Vec<v1::ExternalHost>) -> Result<Self, InvalidResource> {
        let mut hosts = HashMap::with_capacity(wire.len());
        for v1::ExternalHost { host, service } in wire {
            let invalid = |fault| Err(InvalidResource::new(&format!("external host {host:?}"), fault));
            if !is_plain(&host) {
                return invalid("it is no DNS name in lower case");
            }
            if service.is_empty() {
                return invalid("it leads to no service");
            }
            if hosts.insert(host.clone().into(), service.into()).is_some() {
                return invalid("it occurs twice");
            }
        }
        Ok(Self(hosts))
    }

    /// The service that a name leads to.
    pub fn service(&self, name: &str) -> Option<&Arc<str>> {
        if self.0.is_empty() {
            return None;
        }
        let name = name.strip_suffix('.').unwrap_or(name);
        let name = if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
            Cow::Owned(name.to_ascii_lowercase())
        } else {
            Cow::Borrowed(name)
        };
        self.0.get(&*name)
    }

    /// The same for the authority of a request, whose port says nothing.
    pub fn service_of_authority(&self, authority: &str) -> Option<&Arc<str>> {
        // An address in brackets is no name.
        self.service(authority.split_once(':').map_or(authority, |(host, _)| host))
    }

    /// Every host and its service, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Arc<str>)> {
        self.0.iter().map(|(host, service)| (&**host, service))
    }
}

fn is_plain(host: &str) -> bool {
    let in_label = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
    host.len() <= MAX_NAME && host.split('.').all(|label| !label.is_empty() && label.bytes().all(in_label))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host(host: &str, service: &str) -> v1::ExternalHost {
        v1::ExternalHost { host: host.to_owned(), service: service.to_owned() }
    }

    #[test]
    fn a_name_is_the_same_in_any_case_and_with_its_final_dot() {
        let hosts = vec![host("api.partner.example", "partner.shop"), host("db", "db.shop")];
        let hosts = ExternalHosts::from_wire(hosts).unwrap();
        let service = |name: &str| hosts.service(name).map(|service| &**service);
        for name in ["api.partner.example", "API.Partner.example", "api.partner.EXAMPLE."] {
            assert_eq!(service(name), Some("partner.shop"), "{name}");
        }
        assert_eq!(service("db."), Some("db.shop"));
        for name in ["partner.example", "x.api.partner.example", "api.partner.example..", ".", "", "*"] {
            assert_eq!(service(name), None, "{name}");
        }
        let of = |authority: &str| hosts.service_of_authority(authority).map(|service| &**service);
        assert_eq!(of("API.partner.example:8080"), Some("partner.shop"));
        assert_eq!(of("db"), Some("db.shop"));
        assert_eq!(of("[::1]:80"), None);
        assert_eq!(ExternalHosts::default().service("db"), None);
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for (wire, fault) in [
            (vec![host("A.example", "a.b")], "no DNS name in lower case"),
            (vec![host("a.example.", "a.b")], "no DNS name in lower case"),
            (vec![host("*.example", "a.b")], "no DNS name in lower case"),
            (vec![host("", "a.b")], "no DNS name in lower case"),
            (vec![host("a.example", "")], "leads to no service"),
            (vec![host("a.example", "a.b"), host("a.example", "c.d")], "occurs twice"),
        ] {
            let error = ExternalHosts::from_wire(wire).unwrap_err().to_string();
            assert!(error.contains(fault), "{error}");
        }
    }

    proptest! {
        #[test]
        fn a_host_is_found_however_it_is_written(name in "[a-z0-9-]{1,8}(\\.[a-z0-9-]{1,8}){0,3}", upper: u64, dot: bool) {
            let hosts = ExternalHosts::from_wire(vec![host(&name, "a.b")]).unwrap();
            let mut asked: String = name
                .chars()
                .enumerate()
                .map(|(at, c)| if upper >> (at % 64) & 1 == 1 { c.to_ascii_uppercase() } else { c })
                .collect();
            if dot {
                asked.push('.');
            }
            prop_assert!(hosts.service(&asked).is_some());
            let below = format!("x.{asked}");
            prop_assert!(hosts.service(&below).is_none());
        }
    }
}
