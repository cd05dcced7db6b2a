//! All matches that hold at one port, in the order of their precedence, found without looking at all of them.

use std::{borrow::Cow, cmp::Reverse, collections::BTreeMap, sync::Arc};

use outrigger_api::v1;

use super::{Matched, Rule, parse::Route};
use crate::{
    matching::{Call, GrpcMatcher, PathMatcher, Pattern, ValueMatcher, is_grpc},
    request::View,
};

/// Entries in the order of their precedence.
type Entries = Vec<Arc<Entry>>;

/// The matches of one kind of route. What is in `exact` comes before `others`, and that before `prefixes`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    is_grpc: bool,
    /// By the whole path, or by the name of a call's service.
    exact: BTreeMap<Box<[u8]>, Entries>,
    /// What no map finds.
    others: Entries,
    /// By the prefix of a path, without a `/` at its end.
    prefixes: BTreeMap<Box<[u8]>, Entries>,
    /// Of what is in `prefixes`, the longest first, each once.
    lengths: Vec<usize>,
}

/// One match and the rule that it leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    place: Place,
    /// Compared from the left, the larger one wins. A path's: kind, characters, whether there is a method, headers,
    /// query parameters. A call's: kind and characters of the service, kind and characters of the method, headers.
    rank: [usize; 5],
    method: Option<Box<[u8]>>,
    headers: Vec<ValueMatcher>,
    query: Vec<ValueMatcher>,
    rule: Arc<Rule>,
}

/// Where in the table it stands, and what is left to be tested of the path there.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Exact(Box<[u8]>),
    Prefix(Box<[u8]>),
    Path(Pattern),
    /// A call's service by name, and its method.
    Service(Box<[u8]>, GrpcMatcher),
    Call(GrpcMatcher),
}

impl Entry {
    /// `wire` is what `path` was made from.
    pub(super) fn path(
        wire: &v1::PathMatch,
        path: PathMatcher,
        method: Option<Box<[u8]>>,
        headers: Vec<ValueMatcher>,
        query: Vec<ValueMatcher>,
        rule: Arc<Rule>,
    ) -> Self {
        let (kind, characters, place) = match path {
            PathMatcher::Exact(path) => (2, path.len(), Place::Exact(path)),
            PathMatcher::Regex(pattern) => (1, wire.value.len(), Place::Path(pattern)),
            PathMatcher::Prefix(prefix) => (0, prefix.len(), Place::Prefix(prefix)),
        };
        let rank = [kind, characters, usize::from(method.is_some()), headers.len(), query.len()];
        Self { place, rank, method, headers, query, rule }
    }

    /// `wire` is what `call` was made from.
    pub(super) fn call(
        wire: &v1::GrpcMatch,
        call: GrpcMatcher,
        headers: Vec<ValueMatcher>,
        rule: Arc<Rule>,
    ) -> Self {
        let kind = |text: &str| match (text.is_empty(), wire.regex) {
            (true, _) => 0,
            (false, true) => 1,
            (false, false) => 2,
        };
        let (service, method) = (&wire.service, &wire.method);
        let rank = [kind(service), service.len(), kind(method), method.len(), headers.len()];
        let place = if kind(service) == 2 {
            Place::Service(service.as_bytes().into(), call)
        } else {
            Place::Call(call)
        };
        Self { place, rank, method: None, headers, query: Vec::new(), rule }
    }

    /// The length of the prefix that it matches by.
    pub(super) fn prefix(&self) -> Option<usize> {
        match &self.place {
            Place::Prefix(prefix) => Some(prefix.len()),
            _ => None,
        }
    }

    fn holds<V: View>(&self, view: &V, call: Option<Call<'_>>) -> bool {
        let subject = match &self.place {
            Place::Exact(_) | Place::Prefix(_) => true,
            Place::Path(pattern) => pattern.matches(view.path()),
            Place::Service(_, test) | Place::Call(test) => call.is_some_and(|call| test.matches(call)),
        };
        subject
            && self.method.as_deref().is_none_or(|method| method == view.method())
            && self.headers.iter().all(|test| header_holds(test, view))
            && self.query.iter().all(|test| parameter_holds(test, view.query()))
    }
}

impl Table {
    /// `routes` in the order that decides between equal matches.
    pub(super) fn new<'a>(is_grpc: bool, routes: impl Iterator<Item = &'a Route>) -> Self {
        let mut entries: Entries = routes.flat_map(|route| route.entries.iter().cloned()).collect();
        // The sort is stable: ties stay in the order of the routes and of their rules.
        entries.sort_by_key(|entry| Reverse(entry.rank));
        let mut table = Self {
            is_grpc,
            exact: BTreeMap::new(),
            others: Vec::new(),
            prefixes: BTreeMap::new(),
            lengths: Vec::new(),
        };
        for entry in entries {
            let place = match &entry.place {
                Place::Exact(key) | Place::Service(key, _) => table.exact.entry(key.clone()).or_default(),
                Place::Prefix(key) => table.prefixes.entry(key.clone()).or_default(),
                Place::Path(_) | Place::Call(_) => &mut table.others,
            };
            place.push(entry);
        }
        table.lengths = table.prefixes.keys().map(|prefix| prefix.len()).collect();
        table.lengths.sort_unstable_by_key(|length| Reverse(*length));
        table.lengths.dedup();
        table
    }

    /// The rule that takes a request.
    pub(super) fn find<V: View>(&self, view: &V) -> Option<(&Arc<Rule>, Matched)> {
        let path = view.path();
        let call = if self.is_grpc { Some(Call::of_path(path).filter(|_| is_grpc(view))?) } else { None };
        let key = call.map_or(path, |call| call.service);
        let exact = self.exact.get(key).into_iter().flatten();
        let prefixed =
            self.lengths.iter().filter_map(|length| self.prefixes.get(prefix(path, *length)?)).flatten();
        let entry = exact.chain(&self.others).chain(prefixed).find(|entry| entry.holds(view, call))?;
        Some((&entry.rule, Matched { prefix: entry.prefix() }))
    }

    pub(super) fn rules(&self) -> impl Iterator<Item = &Rule> {
        let mapped = self.exact.values().chain(self.prefixes.values()).flatten();
        mapped.chain(&self.others).map(|entry| &*entry.rule)
    }
}

/// The first `length` bytes of a path, if an element ends there. Nothing is a prefix even of what is no path, because
/// the prefix `/` matches every request.
fn prefix(path: &[u8], length: usize) -> Option<&[u8]> {
    let (prefix, rest) = path.split_at_checked(length)?;
    (length == 0 || matches!(rest.first(), None | Some(b'/'))).then_some(prefix)
}

fn header_holds<V: View>(test: &ValueMatcher, view: &V) -> bool {
    let name = test.name();
    if name == "host"
        && let Some(authority) = view.authority()
    {
        return test.matches(authority);
    }
    view.value(name).is_some_and(|value| test.matches(&value))
}

fn parameter_holds(test: &ValueMatcher, query: &[u8]) -> bool {
    query
        .split(|byte| *byte == b'&')
        .filter(|parameter| !parameter.is_empty())
        .map(|parameter| {
            let equals = parameter.iter().position(|byte| *byte == b'=');
            equals.map_or((parameter, &[][..]), |at| (&parameter[..at], &parameter[at + 1..]))
        })
        .find(|(name, _)| *decode(name) == *test.name().as_bytes())
        .is_some_and(|(_, value)| test.matches(&decode(value)))
}

/// As forms are decoded (WHATWG URL, 5.1); what is no escape stays.
fn decode(text: &[u8]) -> Cow<'_, [u8]> {
    if !text.iter().any(|byte| matches!(byte, b'%' | b'+')) {
        return text.into();
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, after @ ..] = rest {
        rest = after;
        decoded.push(match (first, after) {
            (b'+', _) => b' ',
            (b'%', [high, low, after @ ..]) => match (digit(*high), digit(*low)) {
                (Some(high), Some(low)) => {
                    rest = after;
                    high << 4 | low
                }
                _ => b'%',
            },
            (byte, _) => *byte,
        });
    }
    decoded.into()
}

fn digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}
