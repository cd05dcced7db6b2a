//! Filters of routes: the Gateway API's own rules, the same for both kinds of routes as far as both have a filter.

use outrigger_core::headers::{is_hop_by_hop, is_mesh_internal, misspells_framing};

use super::route::{MAX_ENTRIES, reference};
use super::{Problems, names};
use crate::fields::refusal;
use crate::kinds::{
    GrpcFilter, GrpcFilterType, HeaderModifier, HttpFilter, HttpFilterType, HttpMatch, PathMatchType,
    PathModifier, PathModifierType, RequestMirror, RequestRedirect, UrlRewrite,
};

/// Types that the Gateway API has and the mesh refuses.
const UNSUPPORTED: [&str; 3] = ["cors", "externalAuth", "extensionRef"];

/// A filter as routes of both kinds have it: what gRPC knows nothing of is not there.
pub(super) struct Filter<'a> {
    /// The field that its type asks for.
    wanted: &'static str,
    /// Each of its fields, and whether it is there.
    fields: Vec<(&'static str, bool)>,
    request_headers: Option<&'a HeaderModifier>,
    response_headers: Option<&'a HeaderModifier>,
    mirror: Option<&'a RequestMirror>,
    redirect: Option<&'a RequestRedirect>,
    rewrite: Option<&'a UrlRewrite>,
}

impl<'a> From<&'a HttpFilter> for Filter<'a> {
    fn from(filter: &'a HttpFilter) -> Self {
        Self {
            wanted: match filter.kind {
                HttpFilterType::RequestHeaderModifier => "requestHeaderModifier",
                HttpFilterType::ResponseHeaderModifier => "responseHeaderModifier",
                HttpFilterType::RequestRedirect => "requestRedirect",
                HttpFilterType::UrlRewrite => "urlRewrite",
                HttpFilterType::RequestMirror => "requestMirror",
                HttpFilterType::Cors => "cors",
                HttpFilterType::ExternalAuth => "externalAuth",
                HttpFilterType::ExtensionRef => "extensionRef",
            },
            fields: vec![
                ("requestHeaderModifier", filter.request_header_modifier.is_some()),
                ("responseHeaderModifier", filter.response_header_modifier.is_some()),
                ("requestRedirect", filter.request_redirect.is_some()),
                ("urlRewrite", filter.url_rewrite.is_some()),
                ("requestMirror", filter.request_mirror.is_some()),
                ("cors", filter.cors.is_some()),
                ("externalAuth", filter.external_auth.is_some()),
                ("extensionRef", filter.extension_ref.is_some()),
            ],
            request_headers: filter.request_header_modifier.as_ref(),
            response_headers: filter.response_header_modifier.as_ref(),
            mirror: filter.request_mirror.as_ref(),
            redirect: filter.request_redirect.as_ref(),
            rewrite: filter.url_rewrite.as_ref(),
        }
    }
}

impl<'a> From<&'a GrpcFilter> for Filter<'a> {
    fn from(filter: &'a GrpcFilter) -> Self {
        Self {
            wanted: match filter.kind {
                GrpcFilterType::RequestHeaderModifier => "requestHeaderModifier",
                GrpcFilterType::ResponseHeaderModifier => "responseHeaderModifier",
                GrpcFilterType::RequestMirror => "requestMirror",
                GrpcFilterType::ExtensionRef => "extensionRef",
            },
            fields: vec![
                ("requestHeaderModifier", filter.request_header_modifier.is_some()),
                ("responseHeaderModifier", filter.response_header_modifier.is_some()),
                ("requestMirror", filter.request_mirror.is_some()),
                ("extensionRef", filter.extension_ref.is_some()),
            ],
            request_headers: filter.request_header_modifier.as_ref(),
            response_headers: filter.response_header_modifier.as_ref(),
            mirror: filter.request_mirror.as_ref(),
            redirect: None,
            rewrite: None,
        }
    }
}

/// Checks the filters of a rule or a backend. `matches`: the rule's, which say what of a path can be replaced.
pub(super) fn check<'a, F>(out: &mut Problems, at: &str, filters: &'a [F], matches: &[HttpMatch])
where
    Filter<'a>: From<&'a F>,
{
    out.at_most(at, filters, MAX_ENTRIES);
    let filters: Vec<Filter<'_>> = filters.iter().map(Filter::from).collect();
    let first = |wanted| filters.iter().position(|filter| filter.wanted == wanted);
    for (index, filter) in filters.iter().enumerate() {
        let at = format!("{at}[{index}]");
        if filter.wanted != "requestMirror" && first(filter.wanted) != Some(index) {
            out.error(&at, "is of a type that is there already: join them");
        }
        if UNSUPPORTED.contains(&filter.wanted) {
            let message = format!("{} is not supported: {}", filter.wanted, refusal(filter.wanted));
            out.error(format!("{at}.type"), message);
            continue;
        }
        one_field(out, &at, filter.wanted, &filter.fields);
        if let Some(change) = filter.request_headers {
            modifier(out, &format!("{at}.requestHeaderModifier"), change);
        }
        if let Some(change) = filter.response_headers {
            modifier(out, &format!("{at}.responseHeaderModifier"), change);
        }
        if let Some(mirror) = filter.mirror {
            check_mirror(out, &format!("{at}.requestMirror"), mirror);
        }
        if let Some(redirect) = filter.redirect {
            check_redirect(out, &format!("{at}.requestRedirect"), redirect, matches);
        }
        if let Some(rewrite) = filter.rewrite {
            check_rewrite(out, &format!("{at}.urlRewrite"), rewrite, matches);
        }
    }
    if let (Some(_), Some(index)) = (first("requestRedirect"), first("urlRewrite")) {
        out.error(
            format!("{at}[{index}]"),
            "goes to a backend, and the redirect does not: one of them must go",
        );
    }
}

/// A filter's `type` says which of its fields is set, and no other is.
fn one_field(out: &mut Problems, at: &str, wanted: &str, fields: &[(&str, bool)]) {
    for (field, set) in fields {
        match (*field == wanted, set) {
            (true, false) => out.error(format!("{at}.{field}"), "is missing: `type` asks for it"),
            (false, true) => {
                out.error(
                    format!("{at}.{field}"),
                    format!("does not go with `type`, which asks for `{wanted}`"),
                );
            }
            _ => {}
        }
    }
}

fn check_rewrite(out: &mut Problems, at: &str, rewrite: &UrlRewrite, matches: &[HttpMatch]) {
    if rewrite.hostname.is_none() && rewrite.path.is_none() {
        out.error(at, "has neither `hostname` nor `path`");
    }
    if let Some(hostname) = &rewrite.hostname {
        out.take(format!("{at}.hostname"), names::host(hostname));
    }
    path_modifier(out, &format!("{at}.path"), rewrite.path.as_ref(), matches);
}

fn modifier(out: &mut Problems, at: &str, change: &HeaderModifier) {
    if *change == HeaderModifier::default() {
        out.error(at, "has none of `set`, `add` and `remove`");
    }
    for (field, headers) in [("set", &change.set), ("add", &change.add)] {
        let at = format!("{at}.{field}");
        out.at_most(&at, headers, MAX_ENTRIES);
        for (index, header) in headers.iter().enumerate() {
            out.take(format!("{at}[{index}].name"), changeable(&header.name));
            out.take(format!("{at}[{index}].value"), names::header_value(&header.value));
        }
        let keys = headers.iter().enumerate();
        out.unique(
            keys.map(|(index, header)| (format!("{at}[{index}].name"), header.name.to_ascii_lowercase())),
        );
    }
    let at = format!("{at}.remove");
    out.at_most(&at, &change.remove, MAX_ENTRIES);
    for (index, name) in change.remove.iter().enumerate() {
        out.take(format!("{at}[{index}]"), changeable(name));
    }
}

/// A header that a policy may change: none that frames a message, says where it goes, or is the mesh's own.
fn changeable(name: &str) -> Result<(), String> {
    names::header(name)?;
    let lower = name.to_ascii_lowercase();
    let bytes = lower.as_bytes();
    if lower == "host" {
        Err("`host` is changed by a URLRewrite's `hostname`".to_owned())
    } else if is_hop_by_hop(bytes, &[])
        || misspells_framing(bytes)
        || lower == "content-length"
        || lower == "trailer"
    {
        Err(format!("`{lower}` frames the message: no policy changes it"))
    } else if is_mesh_internal(bytes) {
        Err(format!("`{lower}` is the mesh's own: no policy changes it"))
    } else {
        Ok(())
    }
}

fn check_mirror(out: &mut Problems, at: &str, mirror: &RequestMirror) {
    reference(out, &format!("{at}.backendRef"), &mirror.backend_ref);
    if mirror.percent.is_some() && mirror.fraction.is_some() {
        out.error(at, "has both `percent` and `fraction`: write one");
    }
    out.range(format!("{at}.percent"), mirror.percent, 0, 100);
    if let Some(fraction) = &mirror.fraction {
        let denominator = fraction.denominator.unwrap_or(100);
        if denominator == 0 {
            out.error(format!("{at}.fraction.denominator"), "is 0: it is at least 1");
        } else if fraction.numerator > denominator {
            out.error(
                format!("{at}.fraction.numerator"),
                format!("is more than the denominator, {denominator}"),
            );
        }
    }
}

fn check_redirect(out: &mut Problems, at: &str, redirect: &RequestRedirect, matches: &[HttpMatch]) {
    if let Some(scheme) = &redirect.scheme
        && !matches!(&**scheme, "http" | "https")
    {
        out.error(format!("{at}.scheme"), names::not_a(scheme, "scheme", "http or https"));
    }
    if let Some(hostname) = &redirect.hostname {
        out.take(format!("{at}.hostname"), names::host(hostname));
    }
    if redirect.port == Some(0) {
        out.error(format!("{at}.port"), "0 is not 1 to 65535");
    }
    if let Some(status) = redirect.status_code
        && !matches!(status, 301 | 302 | 303 | 307 | 308)
    {
        out.error(format!("{at}.statusCode"), format!("{status} is not 301, 302, 303, 307 or 308"));
    }
    path_modifier(out, &format!("{at}.path"), redirect.path.as_ref(), matches);
}

fn path_modifier(out: &mut Problems, at: &str, modifier: Option<&PathModifier>, matches: &[HttpMatch]) {
    let Some(modifier) = modifier else { return };
    let wanted = match modifier.kind {
        PathModifierType::ReplaceFullPath => "replaceFullPath",
        PathModifierType::ReplacePrefixMatch => "replacePrefixMatch",
    };
    let fields = [
        ("replaceFullPath", &modifier.replace_full_path),
        ("replacePrefixMatch", &modifier.replace_prefix_match),
    ];
    one_field(out, at, wanted, &fields.map(|(field, value)| (field, value.is_some())));
    for (field, value) in fields {
        let Some(value) = value else { continue };
        if !value.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#'))
            || value.len() > 1024
        {
            let rule = "at most 1024 visible ASCII characters without `?` and `#`";
            out.error(format!("{at}.{field}"), names::not_a(value, "path", rule));
        }
    }
    let is_prefix = |one: &HttpMatch| {
        one.path.as_ref().is_none_or(|path| path.kind.unwrap_or_default() == PathMatchType::PathPrefix)
    };
    if modifier.kind == PathModifierType::ReplacePrefixMatch
        && !(matches.len() == 1 && is_prefix(&matches[0]))
    {
        let message = "is for a rule with exactly one match, of a path of type PathPrefix";
        out.error(format!("{at}.replacePrefixMatch"), message);
    }
}
