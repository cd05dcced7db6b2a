//! How a service is called, as policies say: time-outs, retries, faults, balancing, and when an endpoint is put aside.
//!
//! The controller has merged what holds for a service or for a rule; here a push is checked once and becomes what decisions read.
//! What cannot be meant (200 percent, a status that is no failure) is refused, so that the last good value stays; what is merely
//! absent gets a default.

use std::{net::IpAddr, sync::Arc, time::Duration};

use outrigger_api::v1;

use crate::{
    breaker::Breaker, bulkhead::Bulkhead, fault::Fault, hash::hash, headers::is_token, request::View,
    retry::Retry,
};

/// Everything that is said of calls to a service.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Traffic {
    /// How long things may take.
    pub timeouts: Timeouts,
    /// What is tried again; `None`: only what is certain to have done nothing.
    pub retry: Option<Retry>,
    /// A second try beside a slow one.
    pub hedge: Option<Hedge>,
    /// Failures that are injected.
    pub fault: Option<Fault>,
    /// Who is asked.
    pub load_balancer: LoadBalancer,
    /// When an endpoint is put aside; `None`: [`Breaker::default`].
    pub breaker: Option<Breaker>,
    /// How much is asked at once.
    pub bulkhead: Option<Bulkhead>,
    /// How endpoints are probed.
    pub health_check: Option<HealthCheck>,
}

/// How long things may take.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Timeouts {
    /// All tries together, until the response has ended. `Some(None)`: no bound; `None`: the proxy's configuration.
    pub request: Option<Option<Duration>>,
    /// One try, until the response's head.
    pub per_try: Option<Duration>,
    /// Without a byte in either direction. `Some(None)`: no bound; `None`: the proxy's configuration.
    pub idle: Option<Option<Duration>>,
    /// Who said so.
    pub origin: Arc<str>,
}

/// Another try beside one that is slow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hedge {
    /// How long the first one has.
    pub after: Duration,
    /// Who said so.
    pub origin: Arc<str>,
}

/// How an endpoint is chosen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadBalancer {
    /// Among those that may be chosen.
    pub algorithm: Algorithm,
    /// What [`Algorithm::RingHash`] and [`Algorithm::Maglev`] go by: the first of these that a request has.
    pub keys: Vec<HashKey>,
    /// A new endpoint's share grows over this time; zero: at once.
    pub slow_start: Duration,
    /// The own zone takes all while this percentage of its weight stands; 0: zones do not count.
    pub zone_percent: u32,
    /// Who said so.
    pub origin: Arc<str>,
}

/// Who is chosen of several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Algorithm {
    /// The less loaded of two, by response time and what is pending.
    #[default]
    PeakEwma,
    /// The less loaded of two, by what is pending.
    LeastRequest,
    /// One after the other.
    RoundRobin,
    /// By chance.
    Random,
    /// By the request's key, on a ring.
    RingHash,
    /// By the request's key, in a table.
    Maglev,
}

/// What of a request is hashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashKey {
    /// A header's first value; the name is lower case.
    Header(Arc<str>),
    /// A cookie's value.
    Cookie(Arc<str>),
    /// A query parameter's first value, as it is written.
    Query(Arc<str>),
    /// The caller's address.
    Source,
}

/// How endpoints are probed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// `None`: a TCP connection is enough.
    pub path: Option<Arc<str>>,
    /// From one probe to the next.
    pub interval: Duration,
    /// How long a probe may take.
    pub timeout: Duration,
    /// Probes in a row that make an endpoint healthy; 1 or more.
    pub healthy: u32,
    /// Failed probes in a row that make it unhealthy; 1 or more.
    pub unhealthy: u32,
    /// Who said so.
    pub origin: Arc<str>,
}

impl Traffic {
    /// Checks what was pushed.
    ///
    /// # Errors
    /// On a value that its field cannot have; the text names the field.
    pub fn from_wire(wire: &v1::Traffic) -> Result<Self, String> {
        let in_field = |field: &'static str| move |fault: String| format!("{field}: {fault}");
        Ok(Self {
            timeouts: wire.timeouts.as_ref().map(Timeouts::from_wire).unwrap_or_default(),
            retry: wire.retry.as_ref().map(Retry::from_wire).transpose().map_err(in_field("retry"))?,
            hedge: wire.hedge.as_ref().map(Hedge::from_wire),
            fault: wire.fault.as_ref().map(Fault::from_wire).transpose().map_err(in_field("fault"))?,
            load_balancer: (wire.load_balancer.as_ref().map(LoadBalancer::from_wire).transpose())
                .map_err(in_field("load balancer"))?
                .unwrap_or_default(),
            breaker: wire
                .breaker
                .as_ref()
                .map(Breaker::from_wire)
                .transpose()
                .map_err(in_field("breaker"))?,
            bulkhead: wire.bulkhead.as_ref().map(Bulkhead::from_wire),
            health_check: (wire.health_check.as_ref().map(HealthCheck::from_wire).transpose())
                .map_err(in_field("health check"))?,
        })
    }
}

impl Timeouts {
    fn from_wire(wire: &v1::Timeouts) -> Self {
        Self {
            request: wire.request.map(unless_zero),
            per_try: wire.per_try.and_then(unless_zero),
            idle: wire.idle.map(unless_zero),
            origin: (&*wire.origin).into(),
        }
    }
}

impl Hedge {
    fn from_wire(wire: &v1::Hedge) -> Self {
        Self { after: ms(wire.after), origin: (&*wire.origin).into() }
    }
}

impl LoadBalancer {
    fn from_wire(wire: &v1::LoadBalancer) -> Result<Self, String> {
        let algorithm = match wire.algorithm() {
            v1::load_balancer::Algorithm::Unspecified | v1::load_balancer::Algorithm::PeakEwma => {
                Algorithm::PeakEwma
            }
            v1::load_balancer::Algorithm::LeastRequest => Algorithm::LeastRequest,
            v1::load_balancer::Algorithm::RoundRobin => Algorithm::RoundRobin,
            v1::load_balancer::Algorithm::Random => Algorithm::Random,
            v1::load_balancer::Algorithm::RingHash => Algorithm::RingHash,
            v1::load_balancer::Algorithm::Maglev => Algorithm::Maglev,
        };
        Ok(Self {
            algorithm,
            keys: wire.hash.iter().map(HashKey::from_wire).collect::<Result<_, _>>()?,
            slow_start: ms(wire.slow_start),
            zone_percent: percent("the zone's percentage", wire.zone_percent)?,
            origin: (&*wire.origin).into(),
        })
    }

    /// What a balancer that hashes goes by. `source`: the caller's address. `None`: it does not hash, or the request has none of
    /// the keys.
    pub fn hash<V: View>(&self, view: &V, source: Option<IpAddr>) -> Option<u64> {
        if !self.algorithm.hashes() {
            return None;
        }
        self.keys.iter().find_map(|key| match key {
            HashKey::Header(name) => view.values(name).next().map(|value| hash(0, value)),
            HashKey::Cookie(name) => cookie(view, name.as_bytes()).map(|value| hash(0, value)),
            HashKey::Query(name) => parameter(view.query(), name.as_bytes()).map(|value| hash(0, value)),
            HashKey::Source => source.map(|source| match source.to_canonical() {
                IpAddr::V4(address) => hash(0, &address.octets()),
                IpAddr::V6(address) => hash(0, &address.octets()),
            }),
        })
    }
}

impl Algorithm {
    /// Whether it goes by a request's key.
    pub fn hashes(self) -> bool {
        matches!(self, Self::RingHash | Self::Maglev)
    }
}

impl HashKey {
    fn from_wire(wire: &v1::HashKey) -> Result<Self, String> {
        let token = |what: &str, name: &str| {
            let is_name = is_token(name.as_bytes());
            is_name.then(|| name.into()).ok_or_else(|| format!("{name:?} is no name of a {what}"))
        };
        match &wire.key {
            Some(v1::hash_key::Key::Header(name)) => {
                token("header", &name.to_ascii_lowercase()).map(Self::Header)
            }
            Some(v1::hash_key::Key::Cookie(name)) => token("cookie", name).map(Self::Cookie),
            Some(v1::hash_key::Key::Query(name)) if !name.is_empty() => Ok(Self::Query((&**name).into())),
            Some(v1::hash_key::Key::Source(true)) => Ok(Self::Source),
            _ => Err("a hash key names nothing to hash".to_owned()),
        }
    }
}

impl HealthCheck {
    fn from_wire(wire: &v1::HealthCheck) -> Result<Self, String> {
        if !wire.path.is_empty() && !wire.path.starts_with('/') {
            return Err(format!("the path {:?} does not begin with /", wire.path));
        }
        let or = |value: u32, default: u32| if value == 0 { default } else { value };
        Ok(Self {
            path: (!wire.path.is_empty()).then(|| (&*wire.path).into()),
            interval: ms(or(wire.interval, 10_000)),
            timeout: ms(or(wire.timeout, 1000)),
            healthy: or(wire.healthy, 1),
            unhealthy: or(wire.unhealthy, 3),
            origin: (&*wire.origin).into(),
        })
    }
}

/// The first value of a cookie (RFC 6265, 4.2.1).
fn cookie<'a, V: View>(view: &'a V, name: &[u8]) -> Option<&'a [u8]> {
    view.values("cookie").flat_map(|line| line.split(|byte| *byte == b';')).find_map(|pair| {
        let pair = pair.trim_ascii();
        let at = pair.iter().position(|byte| *byte == b'=')?;
        (pair[..at] == *name).then(|| &pair[at + 1..])
    })
}

/// The first value of a query parameter, as it is written.
fn parameter<'a>(query: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    query.split(|byte| *byte == b'&').find_map(|pair| {
        let end = pair.iter().position(|byte| *byte == b'=');
        let (own, value) = end.map_or((pair, &[][..]), |at| (&pair[..at], &pair[at + 1..]));
        (own == name).then_some(value)
    })
}

/// Milliseconds of the wire.
pub(crate) fn ms(value: u32) -> Duration {
    Duration::from_millis(value.into())
}

/// Milliseconds of the wire, where 0 says that there is none.
pub(crate) fn unless_zero(value: u32) -> Option<Duration> {
    (value != 0).then(|| ms(value))
}

/// A percentage of the wire.
pub(crate) fn percent(what: &str, value: u32) -> Result<u32, String> {
    if value <= 100 { Ok(value) } else { Err(format!("{what} is {value}, more than 100")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Request;

    fn balancer(keys: Vec<v1::hash_key::Key>) -> Result<LoadBalancer, String> {
        LoadBalancer::from_wire(&v1::LoadBalancer {
            algorithm: v1::load_balancer::Algorithm::Maglev.into(),
            hash: keys.into_iter().map(|key| v1::HashKey { key: Some(key) }).collect(),
            ..v1::LoadBalancer::default()
        })
    }

    #[test]
    fn nothing_said_is_the_default() {
        assert_eq!(Traffic::from_wire(&v1::Traffic::default()), Ok(Traffic::default()));
    }

    #[test]
    fn zero_is_no_bound_and_unset_is_the_proxys() {
        let wire = v1::Timeouts { request: Some(0), per_try: Some(0), idle: None, origin: "x".to_owned() };
        let timeouts = Timeouts::from_wire(&wire);
        assert_eq!((timeouts.request, timeouts.per_try, timeouts.idle), (Some(None), None, None));
        let wire = v1::Timeouts { request: Some(5), per_try: Some(7), idle: Some(9), ..wire };
        let timeouts = Timeouts::from_wire(&wire);
        assert_eq!(timeouts.request, Some(Some(Duration::from_millis(5))));
        assert_eq!(timeouts.per_try, Some(Duration::from_millis(7)));
        assert_eq!(timeouts.idle, Some(Some(Duration::from_millis(9))));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_and_named() {
        for (wire, text) in [
            (
                v1::Traffic {
                    load_balancer: Some(v1::LoadBalancer {
                        zone_percent: 101,
                        ..v1::LoadBalancer::default()
                    }),
                    ..v1::Traffic::default()
                },
                "load balancer: the zone's percentage is 101, more than 100",
            ),
            (
                v1::Traffic {
                    health_check: Some(v1::HealthCheck {
                        path: "live".to_owned(),
                        ..v1::HealthCheck::default()
                    }),
                    ..v1::Traffic::default()
                },
                "health check: the path \"live\" does not begin with /",
            ),
            (
                v1::Traffic {
                    load_balancer: Some(v1::LoadBalancer {
                        hash: vec![v1::HashKey { key: None }],
                        ..v1::LoadBalancer::default()
                    }),
                    ..v1::Traffic::default()
                },
                "load balancer: a hash key names nothing to hash",
            ),
        ] {
            assert_eq!(Traffic::from_wire(&wire).unwrap_err(), text);
        }
        assert!(balancer(vec![v1::hash_key::Key::Header("a b".to_owned())]).is_err());
    }

    #[test]
    fn the_first_key_that_a_request_has_is_hashed() {
        use v1::hash_key::Key;
        let balancer = balancer(vec![
            Key::Header("X-User".to_owned()),
            Key::Cookie("sid".to_owned()),
            Key::Query("q".to_owned()),
            Key::Source(true),
        ])
        .unwrap();
        let plain = Request::new("GET", "/a?p=1&q=b&q=c");
        let of = |request: &Request| balancer.hash(request, Some(IpAddr::from([10, 0, 0, 1])));
        assert_eq!(of(&plain), Some(hash(0, b"b")));
        assert_eq!(of(&plain.clone().with("cookie", "a=1; sid=x; sid=y")), Some(hash(0, b"x")));
        assert_eq!(of(&plain.with("cookie", "sid=x").with("x-user", "u")), Some(hash(0, b"u")));
        assert_eq!(of(&Request::new("GET", "/a?qq=1")), Some(hash(0, &[10, 0, 0, 1])));
        assert_eq!(balancer.hash(&Request::new("GET", "/a"), None), None);
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(balancer.hash(&Request::new("GET", "/"), Some(mapped)), Some(hash(0, &[10, 0, 0, 1])));
        let unhashed = LoadBalancer { algorithm: Algorithm::Random, ..balancer.clone() };
        assert_eq!(unhashed.hash(&Request::new("GET", "/?q=1"), None), None);
    }
}
