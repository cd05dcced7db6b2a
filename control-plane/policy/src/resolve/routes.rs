//! Which routes hold for a service, at which ports, for whom: the Gateway API's rules for meshes (GEP-1294).
//!
//! - A route of the service's own namespace is a producer's and holds for everybody. One of another namespace is a consumer's: it holds
//!   for clients of its own namespace, and at its ports replaces the producer's for them.
//! - Several routes of one kind are merged; where they match alike, the oldest wins, then the first by `<namespace>/<name>`.
//! - At one port there is one kind, that of the oldest route there, as the API has it for a listener (`GRPCRoute.hostnames`), and as
//!   sidecars decide. GEP-1294 would always prefer gRPC for a mesh; then a new route would silence routes that work. A route that
//!   loses all its ports is not accepted, one that keeps some says which it lost.
//! - A port with a `TrafficPolicy` of its own has copies of the routes, and where it has none a rule that leads to itself: the wire says
//!   how a service is called for the service and for rules, not for ports.

use std::collections::{BTreeMap, BTreeSet};

use outrigger_api::v1;
use outrigger_core::route::{Routes, Weight};

use super::condition::{Condition, ConditionReason, Conditions};
use super::layers::Layer;
use super::rules::{Reader, Rule};
use super::services::{Ports, Services};
use super::targets::{Target, Targets};
use super::{ByAge, ServicePolicy};
use crate::kind::{Key, Kind};
use crate::kinds::ParentReference;
use crate::object::{Spec, Stored};

/// Ports of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
enum PortSet {
    All,
    These(BTreeSet<u16>),
}

impl PortSet {
    fn is_empty(&self) -> bool {
        matches!(self, Self::These(ports) if ports.is_empty())
    }

    fn has(&self, port: u16) -> bool {
        match self {
            Self::All => true,
            Self::These(ports) => ports.contains(&port),
        }
    }

    fn join(&mut self, other: Self) {
        match (&mut *self, other) {
            (Self::All, _) => {}
            (_, Self::All) => *self = Self::All,
            (Self::These(ports), Self::These(others)) => ports.extend(others),
        }
    }

    /// Without others. All but some of a service whose ports cannot be listed stays all.
    fn without(&self, others: &BTreeSet<u16>, service: &Ports) -> Self {
        let ports: BTreeSet<u16> = match (self, service.all()) {
            (Self::These(ports), _) => ports.clone(),
            (Self::All, Some(all)) if !others.is_empty() => all.into_iter().collect(),
            (Self::All, _) => return Self::All,
        };
        Self::These(ports.difference(others).copied().collect())
    }

    fn to_wire(&self) -> Vec<u32> {
        match self {
            Self::All => Vec::new(),
            Self::These(ports) => ports.iter().map(|port| (*port).into()).collect(),
        }
    }
}

/// Whose routes: of a service, the producer's (no namespace) or those of one consumer namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Side {
    service: String,
    client_namespace: Option<String>,
}

/// Which kind of route each port of a side has.
#[derive(Default)]
struct Kinds {
    listed: BTreeMap<u16, Kind>,
    others: Option<Kind>,
}

impl Kinds {
    /// Routes are added the oldest first.
    fn add(&mut self, kind: Kind, ports: &PortSet) {
        match ports {
            PortSet::All => _ = self.others.get_or_insert(kind),
            PortSet::These(ports) => {
                for port in ports {
                    self.listed.entry(*port).or_insert(self.others.unwrap_or(kind));
                }
            }
        }
    }

    /// The ports that a route of the kind has of those that it asked for, and those that it has lost.
    fn share(&self, kind: Kind, asked: &PortSet, service: &Ports) -> (PortSet, BTreeSet<u16>) {
        let with = |is_own: bool| {
            let ports =
                self.listed.iter().filter(|(port, own)| asked.has(**port) && (**own == kind) == is_own);
            ports.map(|(port, _)| *port).collect::<BTreeSet<u16>>()
        };
        let lost = with(false);
        match asked {
            PortSet::All if self.others == Some(kind) => (asked.without(&lost, service), lost),
            _ => (PortSet::These(with(true)), lost),
        }
    }
}

/// What the routes of a service have by now of what it may have. A client has those of the producers and of its own namespace.
#[derive(Default)]
struct Room {
    producers: Weight,
    consumers: BTreeMap<String, Weight>,
}

impl Room {
    /// Makes room for a route at a side, or says what is too much.
    fn take(&mut self, side: &Side, weight: Weight) -> Result<(), String> {
        match &side.client_namespace {
            None => {
                let producers = self.producers.with(weight);
                producers.fits()?;
                self.consumers.values().try_for_each(|consumer| producers.with(*consumer).fits())?;
                self.producers = producers;
            }
            Some(namespace) => {
                let consumer = self.consumers.entry(namespace.clone()).or_default();
                let with_it = consumer.with(weight);
                self.producers.with(with_it).fits()?;
                *consumer = with_it;
            }
        }
        Ok(())
    }
}

/// A route at a service.
struct Attached<'a> {
    key: &'a Key,
    created: i64,
    ports: PortSet,
    rules: &'a [Rule],
}

/// A parent of a route, as far as it is there.
struct Parent<'a> {
    reference: &'a ParentReference,
    found: Result<(Side, PortSet), String>,
}

/// A route with what it refers to.
struct Read<'a> {
    key: &'a Key,
    created: i64,
    rules: Vec<Rule>,
    references: Condition,
    /// Why sidecars would refuse it, and with it all of the service.
    refusal: Option<String>,
    parents: Vec<Parent<'a>>,
}

/// What holds for each service that a route or a `TrafficPolicy` names.
pub(crate) fn services(
    by_age: &ByAge<'_>,
    services: &Services,
    targets: &Targets,
    conditions: &mut Conditions,
) -> BTreeMap<String, ServicePolicy> {
    let read: Vec<Read<'_>> =
        by_age.iter().filter_map(|(key, stored)| self::read(key, stored, services)).collect();
    let attached = attach(&read, services, targets, conditions);
    let mut names: BTreeSet<&str> = targets.services().collect();
    names.extend(attached.keys().map(|side| &*side.service));
    names.into_iter().map(|name| (name.to_owned(), service(name, &attached, services, targets))).collect()
}

fn read<'a>(key: &'a Key, stored: &'a Stored, services: &Services) -> Option<Read<'a>> {
    let origin = key.to_string();
    let parents = stored.object.spec.parents()?;
    let mut reader = Reader { services, route: key, parents, origin: &origin, faults: Vec::new() };
    let rules = match &stored.object.spec {
        Spec::HttpRoute(route) => reader.http(&route.rules),
        Spec::GrpcRoute(route) => reader.grpc(&route.rules),
        _ => return None,
    };
    let references = Condition::references(&reader.faults);
    let parents = parents
        .iter()
        .filter(|parent| parent.is_service())
        .map(|reference| Parent { reference, found: parent(key, reference, services) })
        .collect();
    let refusal = refusal(key, &rules);
    Some(Read { key, created: stored.created, rules, references, refusal, parents })
}

fn refusal(key: &Key, rules: &[Rule]) -> Option<String> {
    let rules = rules.iter().map(|rule| v1::RouteRule { traffic: rule.layer.to_wire(), ..rule.wire.clone() });
    let wire = v1::Route { kind: key.kind.name().to_owned(), rules: rules.collect(), ..v1::Route::default() };
    Routes::from_wire(&[wire], "").err()
}

fn parent(route: &Key, reference: &ParentReference, services: &Services) -> Result<(Side, PortSet), String> {
    let namespace = reference.namespace.as_ref().unwrap_or(&route.namespace);
    let service = format!("{}.{namespace}", reference.name);
    let ports = services.check(&service, reference.port)?;
    let named = match &reference.section_name {
        None => None,
        Some(name) => match ports.named(name) {
            Some(port) if reference.port.is_none_or(|other| other == port) => Some(port),
            Some(port) => return Err(format!("port {name} of service {service} is {port}")),
            None => return Err(format!("service {service} has no port named {name}")),
        },
    };
    let ports = reference.port.or(named).map_or(PortSet::All, |port| PortSet::These([port].into()));
    let client_namespace = (*namespace != route.namespace).then(|| route.namespace.clone());
    Ok((Side { service, client_namespace }, ports))
}

/// Says for each parent whether it takes the route, and collects what holds where, the oldest first.
fn attach<'a>(
    read: &'a [Read<'a>],
    services: &Services,
    targets: &Targets,
    conditions: &mut Conditions,
) -> BTreeMap<Side, Vec<Attached<'a>>> {
    let mut kinds: BTreeMap<&Side, Kinds> = BTreeMap::new();
    for route in read.iter().filter(|route| route.refusal.is_none()) {
        for (side, ports) in route.parents.iter().filter_map(|parent| parent.found.as_ref().ok()) {
            kinds.entry(side).or_default().add(route.key.kind, ports);
        }
    }
    let mut attached: BTreeMap<Side, Vec<Attached<'a>>> = BTreeMap::new();
    let mut rooms: BTreeMap<&str, Room> = BTreeMap::new();
    for route in read {
        for parent in &route.parents {
            let condition = match (&parent.found, &route.refusal) {
                (_, Some(refusal)) => Condition::refused(ConditionReason::Invalid, refusal.clone()),
                (Err(fault), _) => Condition::refused(ConditionReason::NoMatchingParent, fault.clone()),
                (Ok((side, ports)), None) => {
                    let (Some(kinds), Some(service)) = (kinds.get(side), services.get(&side.service)) else {
                        continue;
                    };
                    let (left, lost) = kinds.share(route.key.kind, ports, service);
                    let condition = accepted(side, &left, &lost);
                    // Ports with a policy of their own have a copy each.
                    let copies = 1 + targets.ports_of(&side.service).count();
                    let room = rooms.entry(&side.service).or_default();
                    match add(&mut attached, side, route, left, |weight| {
                        room.take(side, weight.times(copies))
                    }) {
                        Ok(()) => condition,
                        // With it clients would refuse the service and all its endpoints.
                        Err(fault) => Condition::refused(ConditionReason::LimitReached, fault),
                    }
                }
            };
            conditions.add(route.key, condition.of_parent(parent.reference));
            conditions.add(route.key, route.references.clone().of_parent(parent.reference));
        }
        if route.parents.is_empty() {
            let message = "no parent is a Service: it is nothing to the mesh";
            conditions.add(route.key, Condition::refused(ConditionReason::NoMatchingParent, message));
        }
    }
    attached
}

/// Attaches a route, or more ports of one that is attached already. `room` is asked once for each route.
fn add<'a>(
    attached: &mut BTreeMap<Side, Vec<Attached<'a>>>,
    side: &Side,
    route: &'a Read<'a>,
    ports: PortSet,
    room: impl FnOnce(Weight) -> Result<(), String>,
) -> Result<(), String> {
    if ports.is_empty() {
        return Ok(());
    }
    let of_side = attached.entry(side.clone()).or_default();
    if let Some(same) = of_side.iter_mut().find(|other| other.key == route.key) {
        same.ports.join(ports);
        return Ok(());
    }
    room(Weight::of(route.rules.iter().map(|rule| &rule.wire)))?;
    of_side.push(Attached { key: route.key, created: route.created, ports, rules: &route.rules });
    Ok(())
}

fn accepted(side: &Side, left: &PortSet, lost: &BTreeSet<u16>) -> Condition {
    if left.is_empty() {
        let message = format!("older routes of another kind have these ports of service {}", side.service);
        return Condition::refused(ConditionReason::Conflicted, message);
    }
    let whom = match &side.client_namespace {
        None => "everybody".to_owned(),
        Some(namespace) => format!("clients of namespace {namespace}"),
    };
    if lost.is_empty() {
        return Condition::accepted(format!("it holds for {whom}"));
    }
    let lost: Vec<String> = lost.iter().map(u16::to_string).collect();
    let ports = lost.join(", ");
    Condition::accepted(format!(
        "it holds for {whom}, but not at port {ports}: older routes of another kind have it"
    ))
}

fn service(
    name: &str,
    attached: &BTreeMap<Side, Vec<Attached<'_>>>,
    services: &Services,
    targets: &Targets,
) -> ServicePolicy {
    let namespace = crate::catalog::split_service(name).map_or("", |(_, namespace)| namespace);
    let whole = targets.of_service(name, namespace);
    let special: BTreeSet<u16> = targets.ports_of(name).collect();
    let sides = attached
        .range(Side { service: name.to_owned(), client_namespace: None }..)
        .take_while(|(side, _)| side.service == name);
    let mut routes = Vec::new();
    let mut produced = PortSet::These(BTreeSet::new());
    for (side, of_side) in sides {
        for route in of_side {
            if side.client_namespace.is_none() {
                produced.join(route.ports.clone());
            }
            for &port in special.iter().filter(|port| route.ports.has(**port)) {
                let layers = with_port(&whole, name, port, targets);
                routes.push(wire_route(side, route, &PortSet::These([port].into()), &layers, targets));
            }
            // Where the ports cannot be listed, the copies above come first and win by that.
            let rest = services.get(name).map_or(PortSet::All, |ports| route.ports.without(&special, ports));
            if !rest.is_empty() {
                routes.push(wire_route(side, route, &rest, &whole, targets));
            }
        }
    }
    let bare = special.iter().filter(|port| !produced.has(**port));
    routes.extend(
        bare.filter_map(|port| route_to_itself(name, *port, &with_port(&whole, name, *port, targets))),
    );
    ServicePolicy { routes, traffic: Layer::merged(whole).to_wire() }
}

fn with_port<'a>(whole: &[&'a Layer], service: &str, port: u16, targets: &'a Targets) -> Vec<&'a Layer> {
    let own = targets.get(&Target::Port(service.to_owned(), port));
    whole.iter().copied().chain(own).collect()
}

fn wire_route(
    side: &Side,
    route: &Attached<'_>,
    ports: &PortSet,
    layers: &[&Layer],
    targets: &Targets,
) -> v1::Route {
    let of_route = targets.get(&Target::Route(route.key.clone()));
    let rules = route.rules.iter().enumerate().map(|(at, rule)| {
        let of_rule = targets.get(&Target::Rule(route.key.clone(), at));
        let layers = layers.iter().copied().chain(of_route).chain(of_rule).chain([&rule.layer]);
        v1::RouteRule { traffic: Layer::merged(layers).to_wire(), ..rule.wire.clone() }
    });
    v1::Route {
        kind: route.key.kind.name().to_owned(),
        name: format!("{}/{}", route.key.namespace, route.key.name),
        client_namespace: side.client_namespace.clone().unwrap_or_default(),
        ports: ports.to_wire(),
        created: route.created,
        rules: rules.collect(),
    }
}

/// What a port's own policy comes to where no route is attached to it.
fn route_to_itself(service: &str, port: u16, layers: &[&Layer]) -> Option<v1::Route> {
    let traffic = Layer::merged(layers.iter().copied()).to_wire()?;
    let (name, namespace) = crate::catalog::split_service(service)?;
    let backend =
        v1::Backend { service: service.to_owned(), port: port.into(), weight: 1, ..v1::Backend::default() };
    let rule = v1::RouteRule {
        name: format!("port {port}"),
        backends: vec![backend],
        traffic: Some(traffic),
        ..v1::RouteRule::default()
    };
    Some(v1::Route {
        kind: Kind::HttpRoute.name().to_owned(),
        name: format!("{namespace}/{name}"),
        ports: vec![port.into()],
        rules: vec![rule],
        ..v1::Route::default()
    })
}
