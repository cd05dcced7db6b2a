//! Who and what a rule is about: the criteria that access rules and rate limits share.
//!
//! A request can be read in more than one way: a header comes twice, a path holds an escape that the application
//! decodes, a gRPC method is called by something that is no gRPC. Whoever opens a door must be sure of every reading;
//! whoever shuts one, of none. [`Sense`] says which it is, and every test takes it.

use std::{borrow::Cow, cell::OnceCell, net::IpAddr};

use ipnet::IpNet;
use outrigger_api::v1;

use crate::{
    access::Caller,
    matching::{Call, GrpcMatcher, PathMatcher, ValueMatcher, is_grpc},
    path::{self, EscapedSlashes},
    request::View,
};

/// What a match leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sense {
    /// Something is allowed: all readings of a request must match.
    Opens,
    /// Something is denied or counted: one reading is enough.
    Shuts,
}

/// Who calls: all of what is set must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    identities: Vec<Identity>,
    namespaces: Vec<Box<str>>,
    networks: Vec<IpNet>,
    unauthenticated: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Identity {
    Exact(Box<str>),
    Prefix(Box<str>),
}

/// The networks of a list of CIDRs.
pub(crate) fn networks(wire: &[String]) -> Result<Vec<IpNet>, String> {
    let network = |text: &String| text.parse().map_err(|_| format!("{text:?} is no CIDR"));
    wire.iter().map(network).collect()
}

/// Whether any of the networks holds the address.
pub(crate) fn hold(networks: &[IpNet], address: IpAddr) -> bool {
    // A socket for both families shows IPv4 as IPv6.
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}

impl Source {
    pub(crate) fn from_wire(wire: &v1::Source) -> Result<Self, String> {
        let identity = |text: &String| match text.strip_suffix('*') {
            Some(prefix) => Identity::Prefix(prefix.into()),
            None => Identity::Exact(text.as_str().into()),
        };
        Ok(Self {
            identities: wire.identities.iter().map(identity).collect(),
            namespaces: wire.namespaces.iter().map(|name| name.as_str().into()).collect(),
            networks: networks(&wire.cidrs)?,
            unauthenticated: wire.unauthenticated,
        })
    }

    fn matches(&self, caller: &Caller<'_>) -> bool {
        let is_one_of = |identity: &Identity| {
            caller.identity.is_some_and(|own| match identity {
                Identity::Exact(exact) => **exact == *own,
                Identity::Prefix(prefix) => own.starts_with(&**prefix),
            })
        };
        let knows = match caller.identity {
            Some(_) => !self.unauthenticated,
            None => self.unauthenticated || !self.networks.is_empty(),
        };
        knows
            && (self.identities.is_empty() || self.identities.iter().any(is_one_of))
            && (self.namespaces.is_empty()
                || caller.namespace.is_some_and(|own| self.namespaces.iter().any(|name| **name == *own)))
            && (self.networks.is_empty() || hold(&self.networks, caller.source))
    }
}

/// Whether any of `sources` is the caller; none: everybody is.
pub(crate) fn is_from(sources: &[Source], caller: &Caller<'_>) -> bool {
    sources.is_empty() || sources.iter().any(|source| source.matches(caller))
}

/// What is done: all of what is set must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Operation {
    ports: Vec<u16>,
    methods: Vec<Box<str>>,
    paths: Vec<PathMatcher>,
    headers: Vec<ValueMatcher>,
    grpc: Vec<GrpcMatcher>,
}

/// Ports as pushed.
pub(crate) fn ports(wire: &[u32]) -> Result<Vec<u16>, String> {
    let port = |port: &u32| match u16::try_from(*port) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(format!("{port} is no port")),
    };
    wire.iter().map(port).collect()
}

impl Operation {
    /// `slashes`: the paths of rules are written in the form that those of requests are brought into.
    pub(crate) fn from_wire(wire: &v1::Operation, slashes: EscapedSlashes) -> Result<Self, String> {
        Ok(Self {
            ports: ports(&wire.ports)?,
            methods: wire.methods.iter().map(|method| method.as_str().into()).collect(),
            paths: wire.paths.iter().map(|path| path_matcher(path, slashes)).collect::<Result<_, _>>()?,
            headers: wire.headers.iter().map(ValueMatcher::header).collect::<Result<_, _>>()?,
            grpc: wire.grpc.iter().map(GrpcMatcher::from_wire).collect::<Result<_, _>>()?,
        })
    }

    /// The ports that it names; empty: all.
    pub(crate) fn ports(&self) -> &[u16] {
        &self.ports
    }

    /// Whether it is about this port.
    pub(crate) fn is_about(&self, port: u16) -> bool {
        self.ports.is_empty() || self.ports.contains(&port)
    }

    pub(crate) fn looks_at_paths(&self) -> bool {
        !self.paths.is_empty() || !self.grpc.is_empty()
    }

    /// Of a connection whose bytes nobody reads: what only HTTP has is not known to hold, nor known not to.
    fn matches_connection(&self, port: u16, sense: Sense) -> bool {
        let is_of_http = self.looks_at_paths() || !self.methods.is_empty() || !self.headers.is_empty();
        self.is_about(port) && (!is_of_http || sense == Sense::Shuts)
    }

    fn matches_request<V: View>(&self, port: u16, seen: &Seen<'_, V>, sense: Sense) -> bool {
        self.is_about(port)
            && (self.methods.is_empty() || self.methods.iter().any(|method| seen.has_method(method, sense)))
            && (self.paths.is_empty() || self.paths.iter().any(|path| seen.has_path(path, sense)))
            && (self.grpc.is_empty() || self.grpc.iter().any(|grpc| seen.has_call(grpc, sense)))
            && self.headers.iter().all(|header| seen.has_value(header, sense))
    }
}

/// Whether any of `operations` is a connection of bytes; none: everything is.
pub(crate) fn is_connection(operations: &[Operation], port: u16, sense: Sense) -> bool {
    operations.is_empty() || operations.iter().any(|operation| operation.matches_connection(port, sense))
}

/// Whether any of `operations` is this request; none: everything is.
pub(crate) fn is_request<V: View>(
    operations: &[Operation],
    port: u16,
    seen: &Seen<'_, V>,
    sense: Sense,
) -> bool {
    operations.is_empty() || operations.iter().any(|operation| operation.matches_request(port, seen, sense))
}

/// A path test whose path, where it is one, is in the form of [`path::normalise`].
fn path_matcher(wire: &v1::PathMatch, slashes: EscapedSlashes) -> Result<PathMatcher, String> {
    let matcher = PathMatcher::from_wire(wire)?;
    if matches!(matcher, PathMatcher::Regex(_)) {
        return Ok(matcher);
    }
    let value = normal_path(&wire.value, slashes)?;
    PathMatcher::from_wire(&v1::PathMatch { value, ..*wire })
}

/// A path of a policy in the form that requests are brought into.
pub(crate) fn normal_path(path: &str, slashes: EscapedSlashes) -> Result<String, String> {
    if path.contains('?') {
        return Err(format!("the path {path:?} holds a query"));
    }
    // What no request may hold may stand in a rule: it never matches.
    let slashes = if slashes == EscapedSlashes::Reject { EscapedSlashes::Keep } else { slashes };
    let normal = path::normalise(path.as_bytes(), slashes).map_err(|fault| format!("{path:?}: {fault}"))?;
    Ok(String::from_utf8_lossy(&normal).into_owned())
}

/// A request, and how an application may read its path.
pub(crate) struct Seen<'a, V> {
    view: &'a V,
    path: &'a [u8],
    /// Found when a rule asks for it.
    reading: OnceCell<Cow<'a, [u8]>>,
}

impl<'a, V: View> Seen<'a, V> {
    /// `path`: in the form of [`path::normalise`], without its query.
    pub(crate) fn new(view: &'a V, path: &'a [u8]) -> Self {
        Self { view, path, reading: OnceCell::new() }
    }

    fn reading(&self) -> &Cow<'a, [u8]> {
        self.reading.get_or_init(|| path::read(self.path))
    }

    /// The reading, where it is not the path itself: of most requests there is one to look at.
    fn other_reading(&self) -> Option<&[u8]> {
        if let Cow::Owned(reading) = self.reading() { Some(reading) } else { None }
    }

    /// Methods are case-sensitive (RFC 9110, 9.1), to most servers.
    fn has_method(&self, method: &str, sense: Sense) -> bool {
        match sense {
            Sense::Opens => method.as_bytes() == self.view.method(),
            Sense::Shuts => method.as_bytes().eq_ignore_ascii_case(self.view.method()),
        }
    }

    fn has_path(&self, test: &PathMatcher, sense: Sense) -> bool {
        match (sense, test) {
            // Of a path that was named, what follows it is nobody's secret; an expression may say what must not be
            // there.
            (Sense::Opens, PathMatcher::Regex(_)) => {
                test.matches(self.path) && self.other_reading().is_none_or(|path| test.matches(path))
            }
            (Sense::Opens, _) => test.matches(self.path),
            (Sense::Shuts, _) => self.is_read_as(|path| test.matches(path)),
        }
    }

    /// Whether any application may read the path as one of these: many take a slash at the end for nothing.
    fn is_read_as(&self, is: impl Fn(&[u8]) -> bool) -> bool {
        let without_slash = self.reading().strip_suffix(b"/").filter(|rest| !rest.is_empty());
        is(self.path) || self.other_reading().is_some_and(&is) || without_slash.is_some_and(&is)
    }

    /// Many servers answer a call of gRPC's methods by other means, too: gRPC-Web, JSON.
    fn has_call(&self, test: &GrpcMatcher, sense: Sense) -> bool {
        let is_call = |path: &[u8]| Call::of_path(path).is_some_and(|call| test.matches(call));
        match sense {
            Sense::Opens => is_call(self.path) && is_grpc(self.view),
            Sense::Shuts => self.is_read_as(is_call),
        }
    }

    /// A line may hold several values (RFC 9110, 5.3).
    fn has_value(&self, test: &ValueMatcher, sense: Sense) -> bool {
        // HTTP/2 says in `:authority` what HTTP/1.1 says in Host (RFC 9113, 8.3.1).
        let authority = self.view.authority().filter(|_| test.name() == "host");
        let mut lines = self.view.values(test.name()).chain(authority).peekable();
        match sense {
            Sense::Opens => lines.peek().is_some() && lines.all(|line| test.matches(line)),
            // Lines may also be the parts of one value.
            Sense::Shuts => {
                lines.any(|line| {
                    test.matches(line)
                        || (line.contains(&b',')
                            && line.split(|byte| *byte == b',').any(|value| test.matches(value.trim_ascii())))
                }) || self.view.value(test.name()).is_some_and(|value| test.matches(&value))
            }
        }
    }
}
