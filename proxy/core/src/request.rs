//! A request as decisions see it: whichever codec read it, whoever asks.

use std::borrow::Cow;

/// A request's head, without a codec's types.
pub trait View {
    /// As sent; methods are case-sensitive (RFC 9110, 9.1).
    fn method(&self) -> &[u8];

    /// Host and port as sent, of the target or of Host; `None` where the request has none.
    fn authority(&self) -> Option<&[u8]>;

    /// Path and query as sent, from the first `/` on.
    fn target(&self) -> &[u8];

    /// Every value of a header, in order; `name` is lower case.
    fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]>;

    /// All values of a header as one (RFC 9110, 5.3; of cookies RFC 9113, 8.2.3); `name` is lower case.
    fn value<'a>(&'a self, name: &'a str) -> Option<Cow<'a, [u8]>> {
        let mut values = self.values(name);
        let first = values.next()?;
        let Some(second) = values.next() else { return Some(Cow::Borrowed(first)) };
        let separator: &[u8] = if name == "cookie" { b"; " } else { b", " };
        let mut joined = [first, second].join(separator);
        for value in values {
            joined.extend_from_slice(separator);
            joined.extend_from_slice(value);
        }
        Some(Cow::Owned(joined))
    }

    /// Path without the query.
    fn path(&self) -> &[u8] {
        let target = self.target();
        &target[..target.iter().position(|byte| *byte == b'?').unwrap_or(target.len())]
    }

    /// What follows the first `?`; empty where there is none.
    fn query(&self) -> &[u8] {
        let target = self.target();
        target.iter().position(|byte| *byte == b'?').map_or(&[], |at| &target[at + 1..])
    }
}

/// A request that somebody wrote down: of a test, or of `outrigger policy test`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// See [`View::method`].
    pub method: Vec<u8>,
    /// See [`View::authority`].
    pub authority: Option<Vec<u8>>,
    /// See [`View::target`].
    pub target: Vec<u8>,
    /// Names in lower case.
    pub headers: Vec<(String, Vec<u8>)>,
}

impl Request {
    /// A request without headers.
    pub fn new(method: &str, target: &str) -> Self {
        Self { method: method.into(), target: target.into(), ..Self::default() }
    }

    /// The same with one header more.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name.to_ascii_lowercase(), value.into()));
        self
    }
}

impl View for Request {
    fn method(&self) -> &[u8] {
        &self.method
    }

    fn authority(&self) -> Option<&[u8]> {
        self.authority.as_deref()
    }

    fn target(&self) -> &[u8] {
        &self.target
    }

    fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.headers.iter().filter(move |(own, _)| own == name).map(|(_, value)| &**value)
    }
}
