//! Virtual addresses: what the proxies' DNS answers for `<service>.<namespace>.mesh`.
//!
//! Each service that was ever asked for by name has one offset, which gives it an IPv4 address in 253.0.0.0/8 (reserved
//! by RFC 1112, so that nobody has it) and an IPv6 address in `fd00:240::/32`. The offset starts from a hash of the name
//! and probes upwards: even a controller that lost its store mostly gives the same answers again. A service that is
//! gone keeps its address for 24 h, because applications hold on to DNS answers and a connection to the old address
//! must never reach another service; if it comes back in time it has its old address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::sources::ServiceKey;
use crate::store::{Change, Table};

/// The ranges, as the `Mesh` resource names them.
pub(crate) const VIRTUAL_RANGES: [&str; 2] = ["253.0.0.0/8", "fd00:240::/32"];

/// How long an address is kept from others after its service has gone.
const QUARANTINE: Duration = Duration::from_hours(24);
/// Host numbers 1 to 2^24 - 2 of 253.0.0.0/8.
const OFFSETS: u32 = (1 << 24) - 2;
/// Addresses held at once: a mesh has thousands of services, and half a million records are ~100 MiB of memory.
const MAX_ADDRESSES: usize = 500_000;

/// Every address of a controller. Pure: the owner stores the changes.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    by_service: HashMap<ServiceKey, Record>,
    by_offset: HashMap<u32, ServiceKey>,
}

/// What the store keeps for a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    offset: u32,
    /// When the service left its source, Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    released: Option<u64>,
}

impl Addresses {
    /// Takes what the store holds. Records that contradict each other are dropped.
    pub(crate) fn load(records: Vec<(String, Record)>) -> Self {
        let mut addresses = Self::default();
        for (service, record) in records {
            let Ok(service) = ServiceKey::parse(&service) else { continue };
            if (1..=OFFSETS).contains(&record.offset) && !addresses.by_offset.contains_key(&record.offset) {
                addresses.by_offset.insert(record.offset, service.clone());
                addresses.by_service.insert(service, record);
            }
        }
        addresses
    }

    /// The addresses of a service, if it has any: IPv4, then IPv6.
    pub(crate) fn of(&self, service: &ServiceKey) -> Option<[IpAddr; 2]> {
        self.by_service.get(service).map(|record| addresses(record.offset))
    }

    /// Whose address this is.
    pub(crate) fn service(&self, address: IpAddr) -> Option<&ServiceKey> {
        self.by_offset.get(&offset(address)?)
    }

    /// Gives a service its addresses, or keeps those that it has. `None` only where [`MAX_ADDRESSES`] are held.
    pub(crate) fn allocate(
        &mut self,
        service: &ServiceKey,
        now: SystemTime,
        changes: &mut Vec<Change>,
    ) -> Option<[IpAddr; 2]> {
        if let Some(record) = self.by_service.get_mut(service) {
            if record.released.take().is_some() {
                changes.push(Change::put(Table::Addresses, service.as_str(), record));
            }
            return Some(addresses(record.offset));
        }
        if self.by_service.len() >= MAX_ADDRESSES {
            self.forget_expired(now, changes);
        }
        if self.by_service.len() >= MAX_ADDRESSES {
            return None;
        }
        let start = hash(service.as_str()) % OFFSETS;
        // Ends soon: at most one offset in thirty is taken.
        let offset = (0..OFFSETS).map(|step| (start + step) % OFFSETS + 1).find(|offset| {
            match self.by_offset.get(offset) {
                None => true,
                Some(holder) => self.by_service.get(holder).is_some_and(|record| record.is_expired(now)),
            }
        })?;
        if let Some(old) = self.by_offset.remove(&offset) {
            self.by_service.remove(&old);
            changes.push(Change::delete(Table::Addresses, old.as_str()));
        }
        let record = Record { offset, released: None };
        self.by_offset.insert(offset, service.clone());
        self.by_service.insert(service.clone(), record);
        changes.push(Change::put(Table::Addresses, service.as_str(), &record));
        Some(addresses(offset))
    }

    /// The service is in a source (again), or, as a synced answer, in none. Unknown services are none of our business.
    pub(crate) fn present(
        &mut self,
        service: &ServiceKey,
        present: bool,
        now: SystemTime,
        changes: &mut Vec<Change>,
    ) {
        if let Some(record) = self.by_service.get_mut(service)
            && record.released.is_some() == present
        {
            record.released = if present { None } else { Some(seconds(now)) };
            changes.push(Change::put(Table::Addresses, service.as_str(), record));
        }
    }

    /// Every service that holds an address.
    pub(crate) fn services(&self) -> impl Iterator<Item = &ServiceKey> {
        self.by_service.keys()
    }

    fn forget_expired(&mut self, now: SystemTime, changes: &mut Vec<Change>) {
        self.by_service.retain(|service, record| {
            let keep = !record.is_expired(now);
            if !keep {
                self.by_offset.remove(&record.offset);
                changes.push(Change::delete(Table::Addresses, service.as_str()));
            }
            keep
        });
    }
}

impl Record {
    fn is_expired(self, now: SystemTime) -> bool {
        self.released.is_some_and(|at| at + QUARANTINE.as_secs() <= seconds(now))
    }
}

fn addresses(offset: u32) -> [IpAddr; 2] {
    let [_, b, c, d] = offset.to_be_bytes();
    let v6 = Ipv6Addr::new(0xfd00, 0x240, 0, 0, 0, 0, u16::from(b), u16::from_be_bytes([c, d]));
    [Ipv4Addr::new(253, b, c, d).into(), v6.into()]
}

fn offset(address: IpAddr) -> Option<u32> {
    let offset = match address {
        IpAddr::V4(v4) => {
            let [net, b, c, d] = v4.octets();
            (net == 253).then(|| u32::from_be_bytes([0, b, c, d]))?
        }
        IpAddr::V6(v6) => match v6.segments() {
            [0xfd00, 0x240, 0, 0, 0, 0, high, low] if high < 256 => u32::from(high) << 16 | u32::from(low),
            _ => return None,
        },
    };
    (1..=OFFSETS).contains(&offset).then_some(offset)
}

/// Whether an address is in one of [`VIRTUAL_RANGES`].
pub(crate) fn is_virtual(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.octets()[0] == 253,
        IpAddr::V6(v6) => v6.segments()[..2] == [0xfd00, 0x240],
    }
}

/// FNV-1a, because the start of the probe must not depend on the release of a standard library.
fn hash(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(name: &str) -> ServiceKey {
        ServiceKey::parse(name).unwrap()
    }

    fn at(hours: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_hours(500_000 + hours)
    }

    #[test]
    fn an_address_is_kept_for_a_day_and_then_free() {
        let mut changes = Vec::new();
        let mut addresses = Addresses::default();
        let first = addresses.allocate(&key("a.x"), at(0), &mut changes).unwrap();
        assert_eq!(addresses.service(first[0]), Some(&key("a.x")));
        assert_eq!(addresses.service(first[1]), Some(&key("a.x")));

        addresses.present(&key("a.x"), false, at(1), &mut changes);
        assert_eq!(
            addresses.allocate(&key("a.x"), at(2), &mut changes).unwrap(),
            first,
            "back in time: as before"
        );

        addresses.present(&key("a.x"), false, at(3), &mut changes);
        addresses.forget_expired(at(26), &mut changes);
        assert_eq!(addresses.of(&key("a.x")), Some(first), "23 h are not 24");
        addresses.forget_expired(at(27), &mut changes);
        assert_eq!(addresses.of(&key("a.x")), None);
    }

    proptest! {
        #[test]
        fn no_address_has_two_services_and_none_moves(
            steps in proptest::collection::vec((0_u8..40, any::<bool>(), 0_u64..3), 1..200),
        ) {
            let mut addresses = Addresses::default();
            let mut stored: HashMap<String, Record> = HashMap::new();
            let mut given: HashMap<u8, [IpAddr; 2]> = HashMap::new();
            let mut now = 0;
            for (service, leaves, hours) in steps {
                now += hours;
                let name = key(&format!("s{service}.x"));
                let mut changes = Vec::new();
                if leaves {
                    addresses.present(&name, false, at(now), &mut changes);
                } else {
                    let got = addresses.allocate(&name, at(now), &mut changes).unwrap();
                    let before = given.insert(service, got);
                    prop_assert!(before.is_none() || before == Some(got), "40 services never push each other out");
                }
                for change in changes {
                    let (key, value) = change.into_parts();
                    match value {
                        Some(value) => { stored.insert(key, serde_json::from_slice(&value).unwrap()); }
                        None => { stored.remove(&key); }
                    }
                }
            }
            let distinct: std::collections::HashSet<_> = given.values().collect();
            prop_assert_eq!(distinct.len(), given.len());
            let reloaded = Addresses::load(stored.into_iter().collect());
            for (service, addresses) in given {
                prop_assert_eq!(reloaded.of(&key(&format!("s{service}.x"))), Some(addresses));
            }
        }
    }
}
