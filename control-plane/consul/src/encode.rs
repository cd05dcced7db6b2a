//! Percent-encoding (RFC 3986, section 2) of what goes into a request line.

use std::fmt::Write as _;

use crate::Error;

/// Appends `text`, keeping unreserved characters and what `keep` names.
fn push_encoded(out: &mut String, text: &str, keep: &[u8]) {
    for &byte in text.as_bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
}

/// `prefix` and `name` as one path segment.
///
/// Consul's server decodes and then cleans paths, so that an encoded `..` would still climb: such names are refused.
pub(crate) fn segment(prefix: &str, what: &'static str, name: &str) -> Result<String, Error> {
    check(what, name)?;
    let mut path = String::from(prefix);
    push_encoded(&mut path, name, b"");
    Ok(path)
}

/// `prefix` and `key`, in which `/` separates.
pub(crate) fn key_path(prefix: &str, key: &str) -> Result<String, Error> {
    check("key", key)?;
    let mut path = String::from(prefix);
    push_encoded(&mut path, key, b"/");
    Ok(path)
}

/// Whether `key` can be a key, also where it travels in a body.
pub(crate) fn check_key(key: &str) -> Result<(), Error> {
    check("key", key)
}

fn check(what: &'static str, name: &str) -> Result<(), Error> {
    /// Consul refuses longer keys itself; names are shorter by far. A bound on what we put into a request line.
    const MAX_BYTES: usize = 2048;
    let refuse = |why| Err(Error::Argument { what, value: name.chars().take(64).collect(), why });
    if name.is_empty() {
        return refuse("it is empty");
    }
    if name.len() > MAX_BYTES {
        return refuse("it is longer than 2048 bytes");
    }
    if name.starts_with('/') || name.split('/').any(|part| part == "." || part == "..") {
        return refuse("it would lead to another path");
    }
    if name.chars().any(char::is_control) {
        return refuse("it holds control characters");
    }
    Ok(())
}

/// A query string under construction.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query(String);

impl Query {
    pub(crate) fn add(&mut self, name: &str, value: &str) {
        self.flag(name);
        self.0.push('=');
        push_encoded(&mut self.0, value, b"");
    }

    pub(crate) fn add_some(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.add(name, value);
        }
    }

    pub(crate) fn flag(&mut self, name: &str) {
        if !self.0.is_empty() {
            self.0.push('&');
        }
        self.0.push_str(name);
    }

    /// The request target: path, and the query if there is one.
    pub(crate) fn target(&self, path: &str) -> String {
        if self.0.is_empty() { path.to_owned() } else { format!("{path}?{}", self.0) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_accepted_stays_inside_its_prefix(name in ".{0,40}") {
            if let Ok(path) = segment("/v1/health/service/", "service name", &name) {
                let rest = path.strip_prefix("/v1/health/service/").unwrap();
                prop_assert!(!rest.is_empty());
                prop_assert!(rest.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~%".contains(&b)));
                prop_assert!(rest != "." && rest != "..");
                prop_assert!(target_parses(&path));
            }
        }

        #[test]
        fn any_query_value_makes_a_valid_target(value in ".{0,60}") {
            let mut query = Query::default();
            query.flag("stale");
            query.add("filter", &value);
            let target = query.target("/v1/x");
            prop_assert!(target_parses(&target));
            prop_assert_eq!(target.matches(['&', '=', '#']).count(), 2);
        }
    }

    fn target_parses(target: &str) -> bool {
        target.parse::<http::Uri>().is_ok()
    }

    #[test]
    fn names_that_climb_are_refused() {
        for name in ["", ".", "..", "../x", "a/../b", "a/.", "/a", "a\nb"] {
            assert!(segment("/v1/health/service/", "service name", name).is_err(), "{name:?}");
            assert!(key_path("/v1/kv/", name).is_err(), "{name:?}");
        }
        assert_eq!(segment("/s/", "service name", "a/b c").unwrap(), "/s/a%2Fb%20c");
        assert_eq!(key_path("/v1/kv/", "outrigger/ü").unwrap(), "/v1/kv/outrigger/%C3%BC");
    }
}
