//! How a service is called, put together from what several objects say.
//!
//! Each object's word is a [`Layer`]; the more specific one is laid over the others and wins field by field, never within a field:
//! what holds is then always what one person has written, and its author can be named. The members of `timeouts` are fields of
//! their own, for they are about different things.

use outrigger_api::v1;

/// A time-out in milliseconds, and who said so.
type Timeout = Option<(u32, String)>;

/// What one object says, or several of them together.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Layer {
    pub(crate) request: Timeout,
    pub(crate) per_try: Timeout,
    pub(crate) idle: Timeout,
    pub(crate) retry: Option<v1::Retry>,
    pub(crate) hedge: Option<v1::Hedge>,
    pub(crate) fault: Option<v1::Fault>,
    pub(crate) load_balancer: Option<v1::LoadBalancer>,
    pub(crate) breaker: Option<v1::Breaker>,
    pub(crate) bulkhead: Option<v1::Bulkhead>,
    pub(crate) health_check: Option<v1::HealthCheck>,
    /// Kept at the server; `ports` is empty here.
    pub(crate) concurrency: Option<v1::Concurrency>,
}

fn lay<T: Clone>(under: &mut Option<T>, over: Option<&T>) {
    if let Some(over) = over {
        *under = Some(over.clone());
    }
}

impl Layer {
    /// Lays a more specific one over it.
    pub(crate) fn cover(&mut self, over: &Self) {
        lay(&mut self.request, over.request.as_ref());
        lay(&mut self.per_try, over.per_try.as_ref());
        lay(&mut self.idle, over.idle.as_ref());
        lay(&mut self.retry, over.retry.as_ref());
        lay(&mut self.hedge, over.hedge.as_ref());
        lay(&mut self.fault, over.fault.as_ref());
        lay(&mut self.load_balancer, over.load_balancer.as_ref());
        lay(&mut self.breaker, over.breaker.as_ref());
        lay(&mut self.bulkhead, over.bulkhead.as_ref());
        lay(&mut self.health_check, over.health_check.as_ref());
        lay(&mut self.concurrency, over.concurrency.as_ref());
    }

    /// All of them in one, the least specific first.
    pub(crate) fn merged<'a>(layers: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut merged = Self::default();
        for layer in layers {
            merged.cover(layer);
        }
        merged
    }

    /// Takes out what only a whole service can have, and names it: an endpoint that is put aside, a bound or a probe does not know
    /// which route a request took. What is hashed is a request's own, and stays: the table that it leads into is the service's.
    pub(crate) fn take_whole_service_fields(&mut self) -> Vec<&'static str> {
        let hashes = self.load_balancer.as_ref().is_some_and(|balancer| !balancer.hash.is_empty());
        let taken = [
            ("loadBalancer", !hashes && self.load_balancer.take().is_some()),
            ("circuitBreaker", self.breaker.take().is_some()),
            ("bulkhead", self.bulkhead.take().is_some()),
            ("healthCheck", self.health_check.take().is_some()),
        ];
        taken.into_iter().filter(|(_, was_set)| *was_set).map(|(name, _)| name).collect()
    }

    /// As the wire has it; `None`: nothing is said to clients.
    pub(crate) fn to_wire(&self) -> Option<v1::Traffic> {
        let traffic = v1::Traffic {
            timeouts: self.timeouts(),
            retry: self.retry.clone(),
            hedge: self.hedge.clone(),
            fault: self.fault.clone(),
            load_balancer: self.load_balancer.clone(),
            breaker: self.breaker.clone(),
            bulkhead: self.bulkhead.clone(),
            health_check: self.health_check.clone(),
        };
        (traffic != v1::Traffic::default()).then_some(traffic)
    }

    fn timeouts(&self) -> Option<v1::Timeouts> {
        let mut origins: Vec<&str> = Vec::new();
        for (_, origin) in [&self.request, &self.per_try, &self.idle].into_iter().flatten() {
            if !origins.contains(&&**origin) {
                origins.push(origin);
            }
        }
        let value = |timeout: &Timeout| timeout.as_ref().map(|(value, _)| *value);
        (!origins.is_empty()).then(|| v1::Timeouts {
            request: value(&self.request),
            per_try: value(&self.per_try),
            idle: value(&self.idle),
            origin: origins.join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeout(value: u32, origin: &str) -> (u32, String) {
        (value, origin.to_owned())
    }

    #[test]
    fn the_more_specific_wins_field_by_field_and_each_is_named() {
        let mesh = Layer {
            request: Some(timeout(1000, "mesh")),
            idle: Some(timeout(9, "mesh")),
            retry: Some(v1::Retry {
                attempts: 3,
                reset: true,
                origin: "mesh".to_owned(),
                ..Default::default()
            }),
            ..Layer::default()
        };
        let service = Layer {
            request: Some(timeout(50, "service")),
            retry: Some(v1::Retry { attempts: 1, origin: "service".to_owned(), ..Default::default() }),
            ..Layer::default()
        };
        let traffic = Layer::merged([&mesh, &service]).to_wire().unwrap();
        let timeouts = traffic.timeouts.unwrap();
        assert_eq!((timeouts.request, timeouts.per_try, timeouts.idle), (Some(50), None, Some(9)));
        assert_eq!(timeouts.origin, "service, mesh");
        let retry = traffic.retry.unwrap();
        assert_eq!(
            (retry.attempts, retry.reset, &*retry.origin),
            (1, false, "service"),
            "never within a field"
        );
    }

    #[test]
    fn nothing_said_is_nothing_on_the_wire() {
        let concurrency = Some(v1::Concurrency { max_requests: 1, ..Default::default() });
        assert_eq!(Layer { concurrency, ..Layer::default() }.to_wire(), None);
    }

    #[test]
    fn what_only_a_whole_service_has_is_taken_out_and_named() {
        let mut layer = Layer {
            hedge: Some(v1::Hedge::default()),
            bulkhead: Some(v1::Bulkhead::default()),
            load_balancer: Some(v1::LoadBalancer::default()),
            ..Layer::default()
        };
        assert_eq!(layer.take_whole_service_fields(), ["loadBalancer", "bulkhead"]);
        assert_eq!(layer, Layer { hedge: Some(v1::Hedge::default()), ..Layer::default() });
        let key = v1::hash_key::Key::Header("x-user".to_owned());
        let hash = vec![v1::HashKey { key: Some(key) }];
        let load_balancer = Some(v1::LoadBalancer { hash, ..Default::default() });
        let mut layer = Layer { load_balancer, ..Layer::default() };
        assert!(layer.take_whole_service_fields().is_empty() && layer.load_balancer.is_some());
    }
}
