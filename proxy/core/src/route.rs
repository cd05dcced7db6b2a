//! Which rule of a service's routes takes a request, and where the rule sends it.
//!
//! **Precedence** is the Gateway API's, over all rules of all routes together, match by match. `HTTPRoute`: an exact
//! path, then a regular expression, then the longest prefix; then a method; then most headers; then most query
//! parameters. `GRPCRoute`: most characters of the service, then of the method, then most headers. Ties: the older
//! route, the first in the order of `namespace/name`, the first rule. The API leaves open where regular expressions
//! stand. Whoever writes one wants to cut something out of a prefix, so they come before prefixes, and of two the
//! longer one first; of a call's service and method an expression stands between a name and nothing. A `/` at a
//! prefix's end does not count as a character, since it does not count for the match.
//!
//! **One kind** of route holds for a port: that of the oldest route, as the API says where both meet at a listener
//! (`GRPCRoute`, `hostnames`). The controller tells the author of the other. (GEP-1294 always prefers gRPC for a
//! mesh; then a new route would silence routes that work.) A consumer's routes replace the producer's at the ports
//! that they are attached to; the two are not merged.
//!
//! **Headers** are compared as one value: several lines of one name are joined by `, ` as RFC 9110, 5.3 reads them
//! (the crumbs of a cookie by `; `, RFC 9113, 8.2.3), so what is tested is all that the server sees. `host` is the
//! request's authority, whichever version of HTTP it came by. **Query parameters** are read as forms are: split at
//! `&`, `+` is a blank, `%` escapes are undone, the first of several values counts. **Paths** are compared as they
//! were sent: a route is a way, not a permission.
//!
//! **Lookups**: exact paths, a call's service and prefixes stand in sorted maps; a prefix is looked up once for each
//! length that occurs. Gone through one by one are regular expressions, calls of any service, and what shares a path
//! and differs in headers.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use outrigger_api::v1;

use crate::{request::View, traffic::Traffic};

mod filters;
mod parse;
mod table;
#[cfg(test)]
mod tests;

pub use filters::{Field, Filters, HeaderChange, Mirror, Redirect, Rewrite};
pub use parse::{MAX_EXPRESSIONS, MAX_MATCHES, Weight};

use parse::Route;
use table::Table;

/// The routes of a service, as one client has to see them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Routes {
    /// The ports that a route names.
    listed: BTreeMap<u16, Table>,
    /// What holds at every other port.
    others: Option<Table>,
}

/// What [`Routes::find`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found<'a> {
    /// No route is attached to this port: the request goes to the service itself.
    NoRoutes,
    /// There are routes, and none of their rules takes it.
    NoMatch,
    /// This rule takes it.
    Rule(&'a Arc<Rule>, Matched),
}

/// What of a path was matched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matched {
    /// Bytes of the prefix, without a `/` at its end; `None`: it was not matched by prefix.
    prefix: Option<usize>,
}

/// What becomes of requests that match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// `HTTPRoute <namespace>/<name>, <rule>`.
    pub name: Arc<str>,
    /// What is changed, whichever backend is asked.
    pub filters: Filters,
    /// Who may be asked; none: nobody, and the answer is an error unless there is a redirect.
    pub backends: Vec<Backend>,
    /// How they are called; `None`: nobody has a policy.
    pub traffic: Option<Arc<Traffic>>,
}

/// A service that a rule leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// `<name>.<namespace>`.
    pub service: Arc<str>,
    /// The service port.
    pub port: u16,
    /// Its share, of the sum of the rule's weights.
    pub weight: u32,
    /// What is changed for this backend alone, after what the rule changes.
    pub filters: Option<Box<Filters>>,
    /// Why it cannot be asked; its share of the requests is refused.
    pub invalid: Option<Arc<str>>,
}

impl Routes {
    /// Checks pushed routes and keeps those that hold for clients of `client_namespace`.
    ///
    /// # Errors
    /// On a match, filter or backend that is malformed or not one of its route's kind, and on more matches or regular
    /// expressions than [`MAX_MATCHES`] and [`MAX_EXPRESSIONS`].
    pub fn from_wire(wire: &[v1::Route], client_namespace: &str) -> Result<Self, String> {
        let mut weight = Weight::default();
        let mut routes = Vec::new();
        for route in wire {
            if route.client_namespace.is_empty() || route.client_namespace == client_namespace {
                let in_route = |fault| format!("{} {}: {fault}", route.kind, route.name);
                routes.push(Route::from_wire(route, &mut weight).map_err(in_route)?);
            }
        }
        routes.sort_by(|a, b| a.seniority().cmp(&b.seniority()));
        let named: BTreeSet<u16> = routes.iter().flat_map(|route| route.ports.iter().copied()).collect();
        let listed = named
            .into_iter()
            .filter_map(|port| Some((port, table(routes.iter().filter(|route| route.holds_at(port)))?)))
            .collect();
        Ok(Self { listed, others: table(routes.iter().filter(|route| route.ports.is_empty())) })
    }

    /// What the routes at `port` say of a request.
    pub fn find<V: View>(&self, port: u16, view: &V) -> Found<'_> {
        let Some(table) = self.listed.get(&port).or(self.others.as_ref()) else { return Found::NoRoutes };
        table.find(view).map_or(Found::NoMatch, |(rule, matched)| Found::Rule(rule, matched))
    }

    /// The routes that are attached to `port`, as `HTTPRoute <namespace>/<name>`.
    pub fn attached(&self, port: u16) -> BTreeSet<&str> {
        let table = self.listed.get(&port).or(self.others.as_ref());
        let rules = table.into_iter().flat_map(Table::rules);
        rules.map(|rule| rule.name.split_once(", ").map_or(&*rule.name, |(route, _)| route)).collect()
    }

    /// The services that backends and mirrors name, but for those that must not be asked.
    pub(crate) fn leads_to(&self) -> BTreeSet<Arc<str>> {
        let rules = self.listed.values().chain(&self.others).flat_map(Table::rules);
        rules
            .flat_map(Rule::asked)
            .filter(|backend| backend.invalid.is_none())
            .map(|b| b.service.clone())
            .collect()
    }
}

/// What holds where all of these routes, the eldest first, are attached; `None`: there are none.
fn table<'a>(attached: impl Iterator<Item = &'a Route> + Clone) -> Option<Table> {
    let is_consumers = attached.clone().any(|route| route.is_consumers);
    let of_one_role = attached.filter(move |route| route.is_consumers == is_consumers);
    let is_grpc = of_one_role.clone().next()?.is_grpc;
    Some(Table::new(is_grpc, of_one_role.filter(|route| route.is_grpc == is_grpc)))
}

impl Rule {
    /// Draws the place of a backend by weight. `None`: no backend takes anything.
    pub fn pick(&self, rng: &mut fastrand::Rng) -> Option<usize> {
        let total: u64 = self.backends.iter().map(|backend| u64::from(backend.weight)).sum();
        if total == 0 {
            return None;
        }
        let mut drawn = rng.u64(..total);
        self.backends.iter().position(|backend| {
            let takes = drawn < u64::from(backend.weight);
            drawn = drawn.saturating_sub(u64::from(backend.weight));
            takes
        })
    }

    /// Whom a request that it takes may be sent to, with copies.
    fn asked(&self) -> impl Iterator<Item = &Backend> {
        let of_backends = self.backends.iter().filter_map(|backend| backend.filters.as_deref());
        let mirrors = [&self.filters].into_iter().chain(of_backends).flat_map(|filters| &filters.mirrors);
        self.backends.iter().chain(mirrors.map(|mirror| &mirror.backend))
    }
}
