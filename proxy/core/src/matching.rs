//! The smallest questions of routes and access rules: does this path, this one value, this call match?
//!
//! A header may come more than once. Which of its values count is for the one who asks to say (a route, an allow and a
//! deny differ), so everything here looks at one value.
//!
//! **Regular expressions** work on bytes and match the whole. A dot is any byte: a value that is no UTF-8 must not slip
//! past a deny by `.*`. They run in time linear in the text, and what one compiles to is bounded, so neither a policy
//! nor a request can make matching expensive.

use outrigger_api::v1;
use regex::bytes::{Regex, RegexBuilder};

use crate::request::View;

/// What a regular expression may compile to, in bytes: room for the 1,024 characters that the Gateway API allows, not
/// for repetitions of repetitions. At worst all of it is read for each byte of a text; that took tens of milliseconds
/// for 10 KiB of hostile text and `.*a.{60}b`, which counts, and microseconds for what does not.
const MAX_COMPILED: usize = 64 << 10;

/// What the states that one keeps while it runs may take, in bytes: per thread that uses it.
const MAX_CACHE: usize = 256 << 10;

/// A regular expression of the whole.
#[derive(Debug, Clone)]
pub struct Pattern {
    text: Box<str>,
    regex: Regex,
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Pattern {}

impl Pattern {
    /// Compiles an expression in the syntax of the `regex` crate, without Unicode classes.
    pub fn new(text: &str) -> Result<Self, String> {
        let fault = |error: regex::Error| format!("{text:?} is no regular expression that is taken: {error}");
        // Alone first: `a)|(b` is none, yet would be one inside of parentheses, and its halves without an anchor.
        compile(text).map_err(fault)?;
        let regex = compile(&format!(r"\A(?:{text})\z")).map_err(fault)?;
        Ok(Self { text: text.into(), regex })
    }

    /// Whether it matches the whole of the text.
    pub fn matches(&self, text: &[u8]) -> bool {
        self.regex.is_match(text)
    }
}

fn compile(text: &str) -> Result<Regex, regex::Error> {
    RegexBuilder::new(text)
        .unicode(false)
        .dot_matches_new_line(true)
        .size_limit(MAX_COMPILED)
        .dfa_size_limit(MAX_CACHE)
        .build()
}

/// A test of a path, which is without its query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatcher {
    /// Exactly this.
    Exact(Box<[u8]>),
    /// By elements; without the `/` at its end, so that `/` is empty here.
    Prefix(Box<[u8]>),
    /// The whole path.
    Regex(Pattern),
}

impl PathMatcher {
    /// Checks what came from the controller.
    pub fn from_wire(wire: &v1::PathMatch) -> Result<Self, String> {
        use v1::path_match::Kind;
        let value = &wire.value;
        if wire.kind() != Kind::Regex && !value.starts_with('/') {
            return Err(format!("the path {value:?} does not begin with /"));
        }
        match wire.kind() {
            Kind::Unspecified => Err(format!("the path {value:?} does not say how it is matched")),
            Kind::Exact => Ok(Self::Exact(value.as_bytes().into())),
            Kind::Prefix => Ok(Self::Prefix(value.strip_suffix('/').unwrap_or(value).as_bytes().into())),
            Kind::Regex => Pattern::new(value).map(Self::Regex),
        }
    }

    /// Whether it holds for the path.
    pub fn matches(&self, path: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => **exact == *path,
            Self::Prefix(prefix) => {
                path.strip_prefix(&**prefix).is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
            }
            Self::Regex(pattern) => pattern.matches(path),
        }
    }
}

/// A test of one value of a header or of a query parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueMatcher {
    name: Box<str>,
    test: ValueTest,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum ValueTest {
    Exact(Box<[u8]>),
    Regex(Pattern),
    Present,
}

impl ValueMatcher {
    /// Checks a test of a header; its name becomes lower case.
    pub fn header(wire: &v1::ValueMatch) -> Result<Self, String> {
        Self::named(wire.name.to_ascii_lowercase(), wire)
    }

    /// Checks a test of a query parameter.
    pub fn query(wire: &v1::ValueMatch) -> Result<Self, String> {
        Self::named(wire.name.clone(), wire)
    }

    fn named(name: String, wire: &v1::ValueMatch) -> Result<Self, String> {
        use v1::value_match::Kind;
        if name.is_empty() {
            return Err("a test of a value has no name".to_owned());
        }
        let test = match wire.kind() {
            Kind::Unspecified => return Err(format!("the test of {name:?} does not say how it is matched")),
            Kind::Exact => ValueTest::Exact(wire.value.as_bytes().into()),
            Kind::Regex => ValueTest::Regex(Pattern::new(&wire.value)?),
            Kind::Present => ValueTest::Present,
        };
        Ok(Self { name: name.into(), test })
    }

    /// Whose value it is about.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it holds for this value.
    pub fn matches(&self, value: &[u8]) -> bool {
        match &self.test {
            ValueTest::Exact(exact) => **exact == *value,
            ValueTest::Regex(pattern) => pattern.matches(value),
            ValueTest::Present => true,
        }
    }
}

/// A test of the service and the method of a gRPC call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GrpcMatcher {
    service: Option<Text>,
    method: Option<Text>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Text {
    Exact(Box<[u8]>),
    Regex(Pattern),
}

impl Text {
    fn from_wire(value: &str, is_regex: bool) -> Result<Option<Self>, String> {
        match (value.is_empty(), is_regex) {
            (true, _) => Ok(None),
            (false, false) => Ok(Some(Self::Exact(value.as_bytes().into()))),
            (false, true) => Pattern::new(value).map(|pattern| Some(Self::Regex(pattern))),
        }
    }

    fn matches(&self, text: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => **exact == *text,
            Self::Regex(pattern) => pattern.matches(text),
        }
    }
}

impl GrpcMatcher {
    /// Checks what came from the controller.
    pub fn from_wire(wire: &v1::GrpcMatch) -> Result<Self, String> {
        Ok(Self {
            service: Text::from_wire(&wire.service, wire.regex)?,
            method: Text::from_wire(&wire.method, wire.regex)?,
        })
    }

    /// Whether it holds for this call.
    pub fn matches(&self, call: Call<'_>) -> bool {
        let holds = |test: &Option<Text>, text| test.as_ref().is_none_or(|test| test.matches(text));
        holds(&self.service, call.service) && holds(&self.method, call.method)
    }
}

/// What a gRPC request calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call<'a> {
    /// `package.Service`.
    pub service: &'a [u8],
    /// The method's name alone.
    pub method: &'a [u8],
}

impl<'a> Call<'a> {
    /// Reads `/package.Service/Method`; `None`: the path is not of this form.
    pub fn of_path(path: &'a [u8]) -> Option<Self> {
        let mut parts = path.strip_prefix(b"/")?.split(|byte| *byte == b'/');
        let (service, method) = (parts.next()?, parts.next()?);
        let is_call = parts.next().is_none() && !service.is_empty() && !method.is_empty();
        is_call.then_some(Self { service, method })
    }
}

/// Whether a request speaks gRPC: a POST whose content type is `application/grpc`, alone or with a `+` or parameters
/// (grpc/doc/PROTOCOL-HTTP2.md). gRPC-Web is another protocol.
pub fn is_grpc<V: View>(view: &V) -> bool {
    const TYPE: &[u8] = b"application/grpc";
    view.method() == b"POST"
        && view.values("content-type").next().is_some_and(|value| {
            value.split_at_checked(TYPE.len()).is_some_and(|(kind, rest)| {
                kind.eq_ignore_ascii_case(TYPE) && matches!(rest.first(), None | Some(b'+' | b';' | b' '))
            })
        })
}

#[cfg(test)]
mod tests {
    use v1::{path_match, value_match};

    use super::*;
    use crate::request::Request;

    fn path(kind: path_match::Kind, value: &str) -> Result<PathMatcher, String> {
        PathMatcher::from_wire(&v1::PathMatch { kind: kind.into(), value: value.into() })
    }

    #[test]
    fn prefixes_go_by_elements() {
        for (prefix, path_, expected) in [
            ("/abc", "/abc", true),
            ("/abc", "/abc/", true),
            ("/abc", "/abc/d", true),
            ("/abc", "/abcd", false),
            ("/abc", "/ab", false),
            ("/abc/", "/abc", true),
            ("/abc/", "/abcd", false),
            ("/", "/", true),
            ("/", "/x", true),
            ("/", "*", false),
        ] {
            let matcher = path(path_match::Kind::Prefix, prefix).unwrap();
            assert_eq!(matcher.matches(path_.as_bytes()), expected, "{prefix} {path_}");
        }
    }

    #[test]
    fn exact_paths_are_exact() {
        let matcher = path(path_match::Kind::Exact, "/abc/").unwrap();
        assert!(matcher.matches(b"/abc/"));
        assert!(!matcher.matches(b"/abc"));
    }

    #[test]
    fn expressions_match_the_whole_and_any_byte() {
        let matcher = path(path_match::Kind::Regex, "/a|/b+").unwrap();
        assert!(matcher.matches(b"/a") && matcher.matches(b"/bb"));
        assert!(!matcher.matches(b"/ab") && !matcher.matches(b"x/b") && !matcher.matches(b"/a\n"));
        assert!(Pattern::new("/x/.*").unwrap().matches(b"/x/\xff\xfe\n"), "what is no UTF-8 is seen");
    }

    #[test]
    fn expressions_that_kill_backtrackers_are_harmless() {
        let text = vec![b'a'; 10 << 10];
        for expression in ["(a*)*b", "(a+)+b", "(a|a)*b", "(.*a){20}b"] {
            assert!(!Pattern::new(expression).unwrap().matches(&text), "{expression}");
        }
    }

    #[test]
    fn what_is_no_test_is_refused() {
        for text in ["a)|(b", "(", "(a{1000}){1000}", "(?x)a # b"] {
            assert!(Pattern::new(text).is_err(), "{text}");
        }
        assert!(path(path_match::Kind::Unspecified, "/a").is_err());
        assert!(path(path_match::Kind::Prefix, "a").is_err());
        assert!(path(path_match::Kind::Exact, "").is_err());
        let unnamed = v1::ValueMatch {
            name: String::new(),
            kind: value_match::Kind::Present.into(),
            value: String::new(),
        };
        assert!(ValueMatcher::header(&unnamed).is_err());
        assert!(ValueMatcher::header(&v1::ValueMatch { name: "a".into(), ..Default::default() }).is_err());
    }

    #[test]
    fn a_value_is_tested_alone() {
        for (kind, test, value, expected) in [
            (value_match::Kind::Exact, "a", "a", true),
            (value_match::Kind::Exact, "a", "A", false),
            (value_match::Kind::Regex, "a+", "aaa", true),
            (value_match::Kind::Regex, "a+", "aab", false),
            (value_match::Kind::Present, "", "", true),
        ] {
            let wire = v1::ValueMatch { name: "X-A".into(), kind: kind.into(), value: test.into() };
            let matcher = ValueMatcher::header(&wire).unwrap();
            assert_eq!(matcher.name(), "x-a");
            assert_eq!(matcher.matches(value.as_bytes()), expected, "{test} {value}");
            assert_eq!(ValueMatcher::query(&wire).unwrap().name(), "X-A");
        }
    }

    #[test]
    fn calls_are_read_from_paths() {
        assert_eq!(Call::of_path(b"/a.B/C"), Some(Call { service: b"a.B", method: b"C" }));
        for no_call in ["", "/", "/a.B", "/a.B/", "//C", "/a.B/C/", "a.B/C"] {
            assert_eq!(Call::of_path(no_call.as_bytes()), None, "{no_call}");
        }
        for (regex, service, method, expected) in [
            (false, "", "", true),
            (false, "a.B", "", true),
            (false, "a.B", "C", true),
            (false, "a.B", "D", false),
            (false, "", "C", true),
            (false, "a", "", false),
            (true, r"a\..*", "C|D", true),
            (true, "a", "", false),
        ] {
            let wire = v1::GrpcMatch { regex, service: service.into(), method: method.into() };
            let call = Call { service: b"a.B", method: b"C" };
            assert_eq!(GrpcMatcher::from_wire(&wire).unwrap().matches(call), expected, "{wire:?}");
        }
    }

    #[test]
    fn only_grpc_is_grpc() {
        for (method, kind, expected) in [
            ("POST", "application/grpc", true),
            ("POST", "Application/gRPC+proto", true),
            ("POST", "application/grpc; charset=utf-8", true),
            ("POST", "application/grpc-web", false),
            ("POST", "application/json", false),
            ("GET", "application/grpc", false),
        ] {
            let request = Request::new(method, "/a/b").with("content-type", kind);
            assert_eq!(is_grpc(&request), expected, "{method} {kind}");
        }
        assert!(!is_grpc(&Request::new("POST", "/a/b")));
    }
}
