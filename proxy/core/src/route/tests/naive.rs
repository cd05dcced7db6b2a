//! Routes evaluated as the Gateway API words it: every match of every rule of every route is looked at, and of those
//! that hold the best is kept, criterion by criterion. Requests are known by their parts, before they are written
//! down, so that nothing of the parsing is shared either.

use proptest::{collection::vec, option, prelude::*, sample::select};

use super::{Path, Value, path, value};
use crate::{
    request::Request,
    route::{Found, Routes, v1},
};

const PORTS: [u16; 3] = [80, 81, 82];

/// A request by its parts.
#[derive(Debug, Clone)]
struct Parts {
    method: &'static str,
    /// Path elements, or the call.
    path: String,
    /// Decoded.
    query: Vec<(&'static str, &'static str)>,
    headers: Vec<(&'static str, &'static str)>,
    is_grpc: bool,
}

impl Parts {
    fn written(&self, spelled: u8) -> Request {
        let query: Vec<String> = self
            .query
            .iter()
            .map(|(name, text)| format!("{}={}", encode(name, spelled), encode(text, spelled)))
            .collect();
        let mark = if query.is_empty() { "" } else { "?" };
        let request = Request::new(self.method, &format!("{}{mark}{}", self.path, query.join("&")));
        let request =
            if self.is_grpc { request.with("content-type", "application/grpc+proto") } else { request };
        self.headers.iter().fold(request, |request, (name, text)| request.with(name, *text))
    }
}

fn encode(text: &str, spelled: u8) -> String {
    text.chars()
        .map(|char| match (char, spelled) {
            (' ', 0) => "+".to_owned(),
            ('a'..='z' | '=', 0 | 1) => char.to_string(),
            (char, 2) => format!("%{:02x}", u32::from(char)),
            (char, _) => format!("%{:02X}", u32::from(char)),
        })
        .collect()
}

/// The expressions that are used, and what they mean.
fn means(expression: &str, text: &str) -> bool {
    match expression {
        ".*" => true,
        "a.*" => text.starts_with('a'),
        "[ab]+" => !text.is_empty() && text.chars().all(|char| char == 'a' || char == 'b'),
        "a|b" => text == "a" || text == "b",
        "/a/.*" => text.starts_with("/a/"),
        "/(a|b)" => text == "/a" || text == "/b",
        ".*b" => text.ends_with('b'),
        "s\\..*" => text.starts_with("s."),
        "[A-M]" => text.len() == 1 && ("A"..="M").contains(&text),
        other => panic!("nobody uses {other}"),
    }
}

fn value_holds(test: &v1::ValueMatch, text: &str) -> bool {
    match test.kind() {
        Value::Exact => test.value == text,
        Value::Regex => means(&test.value, text),
        Value::Present => true,
        Value::Unspecified => panic!("not generated"),
    }
}

/// "Matches based on a URL path prefix split by `/`, element by element; a trailing `/` is ignored."
fn is_prefix(prefix: &str, path: &str) -> bool {
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    let elements: Vec<&str> = path.split('/').collect();
    prefix.is_empty() || elements.starts_with(&prefix.split('/').collect::<Vec<_>>())
}

fn distinct(tests: &[v1::ValueMatch], name: fn(&str) -> String) -> Vec<&v1::ValueMatch> {
    let mut kept: Vec<&v1::ValueMatch> = Vec::new();
    for test in tests {
        if !kept.iter().any(|other| name(&other.name) == name(&test.name)) {
            kept.push(test);
        }
    }
    kept
}

/// What decides, each the larger the better, and the prefix that was matched; `None`: it does not hold.
fn criteria(wire: &v1::RouteMatch, is_grpc: bool, parts: &Parts) -> Option<(Vec<usize>, Option<usize>)> {
    let headers = distinct(&wire.headers, str::to_ascii_lowercase);
    for test in &headers {
        let own = |(name, _): &&(&str, &str)| name.eq_ignore_ascii_case(&test.name);
        let values: Vec<&str> = parts.headers.iter().filter(own).map(|(_, text)| *text).collect();
        if values.is_empty() || !value_holds(test, &values.join(", ")) {
            return None;
        }
    }
    if is_grpc {
        let mut elements = parts.path.split('/').skip(1);
        let (service, method) = (elements.next().unwrap_or(""), elements.next().unwrap_or(""));
        if !parts.is_grpc
            || parts.method != "POST"
            || service.is_empty()
            || method.is_empty()
            || elements.next().is_some()
        {
            return None;
        }
        let mut criteria = Vec::new();
        let any = v1::GrpcMatch::default();
        let test = wire.grpc.as_ref().unwrap_or(&any);
        for (test_, text) in [(&test.service, service), (&test.method, method)] {
            let (kind, holds) = match (test_.is_empty(), test.regex) {
                (true, _) => (0, true),
                (false, true) => (1, means(test_, text)),
                (false, false) => (2, test_ == text),
            };
            if !holds {
                return None;
            }
            criteria.extend([kind, test_.chars().count()]);
        }
        criteria.push(headers.len());
        return Some((criteria, None));
    }
    if !wire.method.is_empty() && wire.method != parts.method {
        return None;
    }
    let query = distinct(&wire.query, str::to_owned);
    for test in &query {
        let (_, text) = parts.query.iter().find(|(name, _)| *name == test.name)?;
        if !value_holds(test, text) {
            return None;
        }
    }
    let any = path(Path::Prefix, "/");
    let test = wire.path.as_ref().unwrap_or(&any);
    let ignoring_slash = test.value.strip_suffix('/').unwrap_or(&test.value).chars().count();
    let (kind, characters, holds) = match test.kind() {
        Path::Exact => (2, test.value.chars().count(), test.value == parts.path),
        Path::Regex => (1, test.value.chars().count(), means(&test.value, &parts.path)),
        Path::Prefix => (0, ignoring_slash, is_prefix(&test.value, &parts.path)),
        Path::Unspecified => panic!("not generated"),
    };
    let has_method = usize::from(!wire.method.is_empty());
    holds.then(|| {
        (
            vec![kind, characters, has_method, headers.len(), query.len()],
            (kind == 0).then_some(ignoring_slash),
        )
    })
}

/// The rule's name and the matched prefix; `Err`: no match, or no routes.
fn evaluate(
    wire: &[v1::Route],
    namespace: &str,
    port: u16,
    parts: &Parts,
) -> Result<(String, Option<usize>), &'static str> {
    let attached = |route: &&v1::Route| route.ports.is_empty() || route.ports.contains(&u32::from(port));
    let mut routes: Vec<&v1::Route> = wire.iter().filter(attached).collect();
    routes.retain(|route| route.client_namespace.is_empty() || route.client_namespace == namespace);
    if routes.iter().any(|route| !route.client_namespace.is_empty()) {
        routes.retain(|route| !route.client_namespace.is_empty());
    }
    routes.sort_by_key(|route| (route.created, route.name.clone()));
    let Some(kind) = routes.first().map(|route| route.kind.clone()) else { return Err("no routes") };
    routes.retain(|route| route.kind == kind);

    let mut best: Option<(Vec<usize>, String, Option<usize>)> = None;
    // The oldest first, and in each rules in their order: of equal ones the first stays.
    for route in routes {
        for (number, rule) in route.rules.iter().enumerate() {
            let any = [v1::RouteMatch::default()];
            for wire in if rule.matches.is_empty() { &any[..] } else { &rule.matches } {
                let Some((criteria, prefix)) = criteria(wire, kind == "GRPCRoute", parts) else { continue };
                if best.as_ref().is_none_or(|(other, ..)| criteria > *other) {
                    best = Some((criteria, format!("{kind} {}, rule {number}", route.name), prefix));
                }
            }
        }
    }
    best.map(|(_, name, prefix)| (name, prefix)).ok_or("no match")
}

fn some_path() -> impl Strategy<Value = String> {
    vec(select(vec!["a", "b", "ab", "a", ""]), 0..4).prop_map(|elements| format!("/{}", elements.join("/")))
}

fn some_call() -> impl Strategy<Value = String> {
    (select(vec!["s.A", "s.B", "s", ""]), select(vec!["M", "N", "M/M", ""]))
        .prop_map(|(service, method)| format!("/{service}/{method}"))
}

fn some_value(names: Vec<&'static str>) -> impl Strategy<Value = v1::ValueMatch> {
    let test = prop_oneof![
        3 => select(vec!["a", "b", "ab", "a b", "", "a, b"]).prop_map(|text| (Value::Exact, text)),
        1 => select(vec![".*", "a.*", "[ab]+", "a|b"]).prop_map(|text| (Value::Regex, text)),
        1 => Just((Value::Present, "")),
    ];
    (select(names), test).prop_map(|(name, (kind, text))| value(name, kind, text))
}

fn some_http_match() -> impl Strategy<Value = v1::RouteMatch> {
    let test = prop_oneof![
        2 => some_path().prop_map(|text| path(Path::Exact, &text)),
        4 => some_path().prop_map(|text| path(Path::Prefix, &text)),
        1 => select(vec!["/a/.*", "/(a|b)", ".*b", ".*"]).prop_map(|text| path(Path::Regex, text)),
    ];
    (
        option::weighted(0.8, test),
        vec(some_value(vec!["x", "X", "y"]), 0..3),
        vec(some_value(vec!["q", "Q", "r"]), 0..3),
        select(vec!["", "", "GET", "POST"]),
    )
        .prop_map(|(path, headers, query, method)| v1::RouteMatch {
            path,
            headers,
            query,
            method: method.into(),
            grpc: None,
        })
}

fn some_grpc_match() -> impl Strategy<Value = v1::RouteMatch> {
    let call = prop_oneof![
        3 => (Just(false), select(vec!["s.A", "s.B", "s", ""]), select(vec!["M", "N", ""])),
        1 => (Just(true), select(vec!["s\\..*", ".*", ""]), select(vec!["[A-M]", ".*", ""])),
    ]
    .prop_map(|(regex, service, method)| v1::GrpcMatch {
        regex,
        service: service.into(),
        method: method.into(),
    });
    (option::weighted(0.9, call), vec(some_value(vec!["x", "X", "y"]), 0..2))
        .prop_map(|(grpc, headers)| v1::RouteMatch { grpc, headers, ..v1::RouteMatch::default() })
}

fn some_route() -> impl Strategy<Value = v1::Route> {
    let rules = |matches: BoxedStrategy<v1::RouteMatch>| {
        let rule =
            vec(matches, 0..4).prop_map(|matches| v1::RouteRule { matches, ..v1::RouteRule::default() });
        vec(rule, 0..4)
    };
    let kind = prop_oneof![
        4 => rules(some_http_match().boxed()).prop_map(|rules| ("HTTPRoute", rules)),
        1 => rules(some_grpc_match().boxed()).prop_map(|rules| ("GRPCRoute", rules)),
    ];
    (
        kind,
        select(vec!["", "", "", "c", "d"]),
        prop_oneof![2 => Just(Vec::new()), 1 => vec(select(vec![80, 81]), 1..3)],
        0_i64..3,
    )
        .prop_map(|((kind, rules), client, ports, created)| v1::Route {
            kind: kind.into(),
            client_namespace: client.into(),
            ports,
            created,
            rules,
            ..v1::Route::default()
        })
}

/// Names are distinct, and not in the order of the list.
fn some_routes() -> impl Strategy<Value = Vec<v1::Route>> {
    let names = Just(["n/d", "m/b", "n/a", "m/c", "k/e"].to_vec()).prop_shuffle();
    (vec(some_route(), 0..6), names).prop_map(|(mut routes, names)| {
        for (route, name) in routes.iter_mut().zip(names) {
            route.name = name.into();
        }
        routes
    })
}

fn some_request() -> impl Strategy<Value = Parts> {
    let subject = prop_oneof![
        3 => (some_path(), select(vec!["GET", "POST", "PUT"]), Just(false)),
        2 => (some_call(), select(vec!["POST", "POST", "POST", "GET"]), prop::bool::weighted(0.9)),
    ];
    let texts = select(vec!["a", "b", "ab", "a b", "", "a&b", "a=b", "a%b"]);
    (
        subject,
        vec((select(vec!["q", "Q", "r"]), texts), 0..4),
        vec((select(vec!["x", "Y", "z"]), select(vec!["a", "b", "ab", ""])), 0..4),
    )
        .prop_map(|((path, method, is_grpc), query, headers)| Parts {
            method,
            path,
            query,
            headers,
            is_grpc,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn the_rule_is_the_one_that_the_gateway_api_names(
        wire in some_routes(),
        requests in vec((some_request(), 0..4_u8), 1..12),
    ) {
        for namespace in ["c", "e"] {
            let routes = Routes::from_wire(&wire, namespace).unwrap();
            for (parts, spelled) in &requests {
                for port in PORTS {
                    let found = match routes.find(port, &parts.written(*spelled)) {
                        Found::NoRoutes => Err("no routes"),
                        Found::NoMatch => Err("no match"),
                        Found::Rule(rule, matched) => Ok((rule.name.to_string(), matched.prefix)),
                    };
                    prop_assert_eq!(found, evaluate(&wire, namespace, port, parts), "{:?} at {}", parts, port);
                }
            }
        }
    }

    #[test]
    fn any_request_is_looked_up_without_a_panic(
        wire in some_routes(),
        target in vec(select(b"/ab?&=%+*\xff".to_vec()), 0..16),
        authority in vec(any::<u8>(), 0..8),
    ) {
        let routes = Routes::from_wire(&wire, "c").unwrap();
        let request = Request { target, authority: Some(authority), ..Request::new("GET", "") };
        routes.find(80, &request);
    }
}
