use std::net::Ipv4Addr;

use proptest::prelude::*;
use v1::{access::EscapedSlashes as Slashes, path_match, value_match};

use super::*;
use crate::{path::normalise, request::Request};

const WEB: &str = "spiffe://outrigger.local/ns/shop/sa/web";
const CART: &str = "spiffe://outrigger.local/ns/shop/sa/cart";
const SPY: &str = "spiffe://outrigger.local/ns/evil/sa/web";
const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1));
const POD: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 0, 7));

fn caller(identity: Option<&str>) -> Caller<'_> {
    Caller::new(identity, POD)
}

fn policy(name: &str, rules: Vec<v1::AccessRule>) -> v1::AccessPolicy {
    v1::AccessPolicy { name: name.into(), rules, ..Default::default() }
}

fn rule(deny: bool, from: Vec<v1::Source>, to: Vec<v1::Operation>) -> v1::AccessRule {
    v1::AccessRule { name: if deny { "deny" } else { "allow" }.into(), deny, from, to }
}

fn identities(ids: &[&str]) -> v1::Source {
    v1::Source { identities: ids.iter().map(ToString::to_string).collect(), ..Default::default() }
}

fn path_is(kind: path_match::Kind, value: &str) -> v1::Operation {
    let path = v1::PathMatch { kind: kind.into(), value: value.into() };
    v1::Operation { paths: vec![path], ..Default::default() }
}

fn header_is(kind: value_match::Kind, name: &str, value: &str) -> v1::Operation {
    let header = v1::ValueMatch { name: name.into(), kind: kind.into(), value: value.into() };
    v1::Operation { headers: vec![header], ..Default::default() }
}

fn calls(service: &str, method: &str) -> v1::Operation {
    let grpc = v1::GrpcMatch { regex: false, service: service.into(), method: method.into() };
    v1::Operation { grpc: vec![grpc], ..Default::default() }
}

fn wire(default: v1::Default, policies: Vec<v1::AccessPolicy>) -> v1::Access {
    v1::Access {
        default: default.into(),
        default_origin: "MeshDefaults m".into(),
        policies,
        ..Default::default()
    }
}

fn access(default: v1::Default, policies: Vec<v1::AccessPolicy>) -> Access {
    Access::from_wire(&wire(default, policies)).unwrap()
}

/// One rule alone, with the default that lets its effect be seen. Returns whether it took effect.
fn takes_effect(
    deny: bool,
    from: Vec<v1::Source>,
    to: Vec<v1::Operation>,
    whose: &Caller<'_>,
    request: &Request,
) -> bool {
    let default = if deny { v1::Default::Allow } else { v1::Default::Deny };
    let access = access(default, vec![policy("a/b", vec![rule(deny, from, to)])]);
    let target = normalise(&request.target, access.escaped_slashes()).unwrap().into_owned();
    let path = target.split(|byte| *byte == b'?').next().unwrap();
    access.request(whose, 80, request, path).allowed != deny
}

#[test]
fn each_cell_of_identity_protocol_port_mode_and_default() {
    let of_http = || path_is(path_match::Kind::Exact, "/a");
    for default in [v1::Default::Allow, v1::Default::Audit, v1::Default::Deny] {
        for (deny, audit) in [(false, false), (false, true), (true, false), (true, true)] {
            for (named, is_about) in [(vec![], true), (vec![80], true), (vec![81], false)] {
                for l7 in [false, true] {
                    let mut about = policy(
                        "a/b",
                        vec![rule(deny, vec![identities(&[WEB])], if l7 { vec![of_http()] } else { vec![] })],
                    );
                    (about.audit, about.ports) = (audit, named.clone());
                    let access = access(default, vec![about]);
                    for identity in [None, Some(WEB), Some(CART)] {
                        for is_http in [false, true] {
                            let is_caller = identity == Some(WEB);
                            let is_it = is_http || !l7 || deny;
                            let holds = is_caller && is_it && is_about;
                            let verdict = if is_http {
                                access.request(&caller(identity), 80, &Request::new("GET", "/a"), b"/a")
                            } else {
                                access.connection(&caller(identity), 80)
                            };
                            let cell = format!(
                                "{default:?} deny {deny} audit {audit} ports {named:?} l7 {l7} {identity:?} http {is_http}"
                            );
                            let decides = holds && !audit;
                            let expected = if decides { !deny } else { default != v1::Default::Deny };
                            assert_eq!(verdict.allowed, expected, "{cell}");
                            assert_eq!(matches!(verdict.by, By::Rule { .. }), decides, "{cell}");
                            assert_eq!(verdict.audited, default == v1::Default::Audit && !decides, "{cell}");
                            let told: Vec<bool> =
                                verdict.audits.iter().map(|audit| audit.would_allow).collect();
                            assert_eq!(told, if holds && audit { vec![!deny] } else { vec![] }, "{cell}");
                            assert_eq!(access.decides_on_paths(80), l7 && is_about && !audit, "{cell}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_deny_wins_then_an_allow_then_the_default_and_each_says_who_it_was() {
    let deny = policy("a/deny", vec![rule(true, vec![identities(&[SPY])], vec![])]);
    let allow = policy("a/allow", vec![rule(false, vec![], vec![])]);
    for policies in [vec![deny.clone(), allow.clone()], vec![allow, deny]] {
        let access = access(v1::Default::Deny, policies);
        let by = |identity| match access.connection(&caller(identity), 80) {
            Verdict { allowed, by: By::Rule { policy, rule }, .. } => {
                (allowed, policy.to_string(), rule.to_string())
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(by(Some(SPY)), (false, "a/deny".into(), "deny".into()));
        assert_eq!(by(Some(WEB)), (true, "a/allow".into(), "allow".into()));
    }
    let alone = access(v1::Default::Deny, vec![]);
    let verdict = alone.connection(&caller(Some(WEB)), 80);
    assert_eq!((verdict.allowed, verdict.by), (false, By::Default { origin: &"MeshDefaults m".into() }));
}

#[test]
fn sources_are_who_they_say() {
    let source = |identities: &[&str], namespaces: &[&str], cidrs: &[&str], unauthenticated| v1::Source {
        identities: identities.iter().map(ToString::to_string).collect(),
        namespaces: namespaces.iter().map(ToString::to_string).collect(),
        cidrs: cidrs.iter().map(ToString::to_string).collect(),
        unauthenticated,
    };
    let pod = ["10.1.0.0/16"];
    for (source, [unknown, web, spy]) in [
        (source(&[], &[], &[], false), [false, true, true]),
        (source(&[WEB], &[], &[], false), [false, true, false]),
        (source(&["*"], &[], &[], false), [false, true, true]),
        (source(&["spiffe://outrigger.local/ns/shop/*"], &[], &[], false), [false, true, false]),
        (source(&["spiffe://outrigger.local/ns/sh*"], &["evil"], &[], false), [false, false, false]),
        (source(&[], &["shop", "x"], &[], false), [false, true, false]),
        (source(&[], &["sho"], &[], false), [false, false, false]),
        (source(&[], &[], &pod, false), [true, true, true]),
        (source(&[], &[], &["10.2.0.0/16", "::/0"], false), [false, false, false]),
        (source(&[WEB], &[], &pod, false), [false, true, false]),
        (source(&[], &[], &[], true), [true, false, false]),
        (source(&[], &[], &pod, true), [true, false, false]),
        (source(&[], &[], &["10.2.0.0/16"], true), [false, false, false]),
        (source(&[WEB], &[], &[], true), [false, false, false]),
    ] {
        for (identity, expected) in [(None, unknown), (Some(WEB), web), (Some(SPY), spy)] {
            for deny in [false, true] {
                let request = Request::new("GET", "/");
                let effect = takes_effect(deny, vec![source.clone()], vec![], &caller(identity), &request);
                assert_eq!(effect, expected, "{source:?} {identity:?} {deny}");
            }
        }
    }
    let mapped = Caller::new(None, "::ffff:10.1.0.7".parse().unwrap());
    assert!(takes_effect(
        true,
        vec![source(&[], &[], &pod, false)],
        vec![],
        &mapped,
        &Request::new("GET", "/")
    ));
}

#[test]
fn namespaces_are_read_from_identities_of_our_form_alone() {
    for (identity, namespace) in [
        (WEB, Some("shop")),
        ("spiffe://a/ns/shop/sa/b/c", None),
        ("spiffe://a/sa/shop/ns/b", None),
        ("https://a/ns/shop/sa/b", None),
        ("spiffe://a/ns/shop", None),
    ] {
        assert_eq!(caller(Some(identity)).namespace, namespace, "{identity}");
    }
}

#[test]
fn every_value_of_a_header_counts() {
    let exact = || vec![header_is(value_match::Kind::Exact, "Role", "admin")];
    let pattern = || vec![header_is(value_match::Kind::Regex, "role", "ad.*")];
    let present = || vec![header_is(value_match::Kind::Present, "role", "")];
    for (values, opens, shuts) in [
        (&[][..], false, false),
        (&[&b"admin"[..]], true, true),
        (&[b"user"], false, false),
        (&[b"user", b"admin"], false, true),
        (&[b"admin", b"user"], false, true),
        (&[b"admin", b"admin"], true, true),
        (&[b"user, admin"], false, true),
        (&[b"user ,\tadmin,x"], false, true),
    ] {
        let request =
            values.iter().fold(Request::new("GET", "/"), |request, value| request.with("role", *value));
        assert_eq!(takes_effect(false, vec![], exact(), &caller(None), &request), opens, "{values:?}");
        assert_eq!(takes_effect(true, vec![], exact(), &caller(None), &request), shuts, "{values:?}");
        assert_eq!(takes_effect(true, vec![], pattern(), &caller(None), &request), shuts, "{values:?}");
        assert_eq!(
            takes_effect(false, vec![], present(), &caller(None), &request),
            !values.is_empty(),
            "{values:?}"
        );
    }
    for (name, whole, parts) in [("cookie", "a=1; b=2", ["a=1", "b=2"]), ("role", "x, y", ["x", "y"])] {
        let request = parts.iter().fold(Request::new("GET", "/"), |request, part| request.with(name, *part));
        let whole = vec![header_is(value_match::Kind::Exact, name, whole)];
        assert!(takes_effect(true, vec![], whole, &caller(None), &request), "{name}");
    }
    let host = || vec![header_is(value_match::Kind::Exact, "Host", "a.b")];
    let h2 = Request { authority: Some("a.b".into()), ..Request::new("GET", "/") };
    let disagrees = h2.clone().with("host", "c.d");
    for (request, opens) in [(h2, true), (disagrees, false)] {
        assert_eq!(takes_effect(false, vec![], host(), &caller(None), &request), opens);
        assert!(takes_effect(true, vec![], host(), &caller(None), &request));
    }
    let bytes = Request::new("GET", "/").with("role", b"ad\xff\xfe".to_vec());
    assert!(takes_effect(true, vec![], pattern(), &caller(None), &bytes), "what is no text is matched, too");
}

#[test]
fn paths_are_seen_as_applications_may_see_them() {
    use path_match::Kind::{Exact, Prefix, Regex};
    for (kind, test, target, opens, shuts) in [
        (Exact, "/admin", "/admin", true, true),
        (Exact, "/admin", "//x/..//%61dmin?a=b", true, true),
        (Exact, "/%61dmin", "/admin", true, true),
        (Exact, "/admin", "/admin/", false, true),
        (Exact, "/admin", "/admin;x=y", false, true),
        (Exact, "/admin", "/a;x/../admin", true, true),
        (Exact, "/admin", "/;x/admin", false, true),
        (Exact, "/api/admin", "/api/%3Bx/;/admin", false, true),
        (Prefix, "/admin", "/;/admin/x", false, true),
        (Exact, "/admin", "/ADMIN", false, false),
        (Exact, "/admin", "/administrator", false, false),
        (Exact, "/users:purge", "/users%3Apurge", false, true),
        (Exact, "/a;v=1", "/a;v=1", true, true),
        (Exact, "/a;v=1", "/a;v=2", false, false),
        (Exact, "/é", "/%c3%a9", true, true),
        (Exact, "/", "/", true, true),
        (Prefix, "/admin", "/admin/x", true, true),
        (Prefix, "/admin", "/admin;x/y", false, true),
        (Prefix, "/", "/x;y/%20", true, true),
        (Regex, "/[^:]*", "/a%3Ab", false, true),
        (Regex, "/a/[0-9]+", "/a/7", true, true),
        (Regex, "/a/[0-9]+", "/a/7;b", false, true),
    ] {
        let request = Request::new("GET", target);
        let case = format!("{kind:?} {test} {target}");
        let to = || vec![path_is(kind, test)];
        assert_eq!(takes_effect(false, vec![], to(), &caller(None), &request), opens, "{case}");
        assert_eq!(takes_effect(true, vec![], to(), &caller(None), &request), shuts, "{case}");
    }
}

#[test]
fn under_audit_a_path_is_judged_and_nobody_is_refused_for_its_form() {
    let to = || vec![path_is(path_match::Kind::Exact, "/admin")];
    let of = |audit| {
        let denies = policy("a/deny", vec![rule(true, vec![], to())]);
        access(v1::Default::Allow, vec![v1::AccessPolicy { audit, ..denies }])
    };
    let (audited, in_force) = (of(true), of(false));
    for access in [&audited, &in_force] {
        assert_eq!(access.judged(80, b"//admin?a", false).as_deref(), Ok(&b"/admin?a"[..]));
    }
    assert_eq!(audited.judged(80, b"/a%2Fb", false).as_deref(), Ok(&b"/a%2Fb"[..]));
    assert!(audited.judged(80, b"/a%2Fb", true).is_err(), "a limit in force looks at paths");
    assert!(in_force.judged(80, b"/a%2Fb", false).is_err());
    assert!(!audited.decides_on_paths(80) && in_force.decides_on_paths(80));
}

#[test]
fn calls_are_allowed_over_grpc_and_denied_over_anything() {
    let call = |method, target, kind: &str| Request::new(method, target).with("content-type", kind);
    for (to, request, opens, shuts) in [
        (calls("a.B", "C"), call("POST", "/a.B/C", "application/grpc+proto"), true, true),
        (calls("a.B", ""), call("POST", "/a.B/C", "application/grpc"), true, true),
        (calls("", "C"), call("POST", "/a.B/C", "application/grpc"), true, true),
        (calls("a.B", "D"), call("POST", "/a.B/C", "application/grpc"), false, false),
        (calls("a.B", "C"), call("POST", "/a.B/C", "application/grpc-web"), false, true),
        (calls("a.B", "C"), call("POST", "/a.B/C/", "application/grpc"), false, true),
        (calls("a.B", "C"), call("POST", "/;x/a.B/C", "application/grpc"), false, true),
        (calls("a.B", "C"), call("GET", "//a.B/./C?x", "application/json"), false, true),
        (calls("", ""), call("POST", "/a/b/c", "application/grpc"), false, false),
    ] {
        for (deny, expected) in [(false, opens), (true, shuts)] {
            let effect = takes_effect(deny, vec![], vec![to.clone()], &caller(None), &request);
            assert_eq!(effect, expected, "{to:?} {request:?}");
        }
    }
}

#[test]
fn methods_are_denied_in_any_case() {
    let to = || vec![v1::Operation { methods: vec!["DELETE".into()], ..Default::default() }];
    for (method, opens, shuts) in [("DELETE", true, true), ("delete", false, true), ("GET", false, false)] {
        let request = Request::new(method, "/");
        assert_eq!(takes_effect(false, vec![], to(), &caller(None), &request), opens, "{method}");
        assert_eq!(takes_effect(true, vec![], to(), &caller(None), &request), shuts, "{method}");
    }
}

#[test]
fn probes_pass_where_all_is_as_declared() {
    let deny_all = policy("a/b", vec![rule(true, vec![], vec![])]);
    let mut wire = wire(v1::Default::Deny, vec![deny_all]);
    let probe = |method: &str, path: &str, nodes: &[&str]| v1::Probe {
        port: 80,
        method: method.into(),
        path: path.into(),
        nodes: nodes.iter().map(ToString::to_string).collect(),
    };
    wire.probes = vec![probe("GET", "/ready", &[]), probe("", "", &["10.9.0.1/32"])];
    let access = Access::from_wire(&wire).unwrap();
    let ask = |port, method, path: &str, identity| {
        access.request(&caller(identity), port, &Request::new(method, path), path.as_bytes())
    };
    assert_eq!(ask(80, "GET", "/ready", None).by, By::Probe);
    for (port, method, path) in
        [(81, "GET", "/ready"), (80, "POST", "/ready"), (80, "GET", "/ready/"), (80, "GET", "/")]
    {
        assert!(!ask(port, method, path, Some(WEB)).allowed, "{port} {method} {path}");
    }
    let connect = |port, source| access.connection(&Caller::new(None, source), port).allowed;
    assert!(connect(80, NODE));
    assert!(!connect(80, POD) && !connect(81, NODE));
    let request = Request::new("GET", "/");
    assert!(!access.request(&Caller::new(None, NODE), 80, &request, b"/").allowed);
}

#[test]
fn what_would_have_to_be_doubted_is_refused() {
    let faulty = |to: v1::Operation, from: v1::Source| {
        wire(v1::Default::Deny, vec![policy("a/b", vec![rule(true, vec![from], vec![to])])])
    };
    let to = v1::Operation::default;
    for wire in [
        wire(v1::Default::Unspecified, vec![]),
        faulty(v1::Operation { ports: vec![0], ..to() }, identities(&[])),
        faulty(v1::Operation { ports: vec![65_536], ..to() }, identities(&[])),
        faulty(path_is(path_match::Kind::Unspecified, "/"), identities(&[])),
        faulty(path_is(path_match::Kind::Exact, "/a/../.."), identities(&[])),
        faulty(path_is(path_match::Kind::Exact, "/a?b"), identities(&[])),
        faulty(path_is(path_match::Kind::Regex, "("), identities(&[])),
        faulty(header_is(value_match::Kind::Exact, "", "a"), identities(&[])),
        faulty(to(), v1::Source { cidrs: vec!["10.0.0.0".into()], ..Default::default() }),
        v1::Access {
            policies: vec![v1::AccessPolicy { ports: vec![70_000], ..Default::default() }],
            ..wire(v1::Default::Deny, vec![])
        },
        v1::Access { probes: vec![v1::Probe::default()], ..wire(v1::Default::Deny, vec![]) },
        v1::Access {
            probes: vec![v1::Probe { port: 80, path: "/a".into(), ..Default::default() }],
            ..wire(v1::Default::Deny, vec![])
        },
        wire(v1::Default::Deny, vec![policy("a/b", vec![rule(true, vec![], vec![]); MAX_RULES + 1])]),
    ] {
        let fault = Access::from_wire(&wire).unwrap_err();
        assert!(!fault.is_empty());
    }
    let fault =
        Access::from_wire(&faulty(path_is(path_match::Kind::Regex, "("), identities(&[]))).unwrap_err();
    assert!(fault.starts_with("AccessPolicy a/b, deny: "), "{fault}");
}

#[test]
fn audits_are_bounded_and_one_for_each_policy() {
    let audited = |name: &str, denies: &[bool]| v1::AccessPolicy {
        audit: true,
        ..policy(name, denies.iter().map(|deny| rule(*deny, vec![], vec![])).collect())
    };
    let alone = access(v1::Default::Allow, vec![audited("a/b", &[false, true, false])]);
    let verdict = alone.connection(&caller(None), 80);
    let told: Vec<_> = verdict.audits.iter().map(|audit| (&**audit.policy, audit.would_allow)).collect();
    assert_eq!(told, [("a/b", false)]);
    let many = access(v1::Default::Allow, (0..40).map(|at| audited(&format!("a/{at}"), &[true])).collect());
    assert_eq!(many.connection(&caller(None), 80).audits.len(), MAX_AUDITS);
}

/// What the wire's comments say, word by word, for what the strategies below make.
mod naive {
    use super::*;

    pub(super) struct Ask<'a> {
        pub(super) identity: Option<&'a str>,
        pub(super) port: u32,
        /// `None`: bytes.
        pub(super) request: Option<&'a Request>,
    }

    fn source(source: &v1::Source, ask: &Ask<'_>) -> bool {
        let Some(identity) = ask.identity else {
            return source.unauthenticated && source.identities.is_empty() && source.namespaces.is_empty();
        };
        if source.unauthenticated {
            return false;
        }
        let mut holds = true;
        if !source.identities.is_empty() {
            let mut any = false;
            for text in &source.identities {
                any |= text == identity
                    || (text.ends_with('*') && identity.starts_with(&text[..text.len() - 1]));
            }
            holds &= any;
        }
        if !source.namespaces.is_empty() {
            holds &= source.namespaces.iter().any(|name| identity.split('/').nth(4) == Some(name));
        }
        holds
    }

    fn operation(to: &v1::Operation, ask: &Ask<'_>, deny: bool) -> bool {
        if !to.ports.is_empty() && !to.ports.contains(&ask.port) {
            return false;
        }
        let Some(request) = ask.request else {
            let of_bytes = to.methods.is_empty() && to.paths.is_empty() && to.headers.is_empty();
            return of_bytes || deny;
        };
        let path = std::str::from_utf8(&request.target).unwrap();
        let path_holds = |test: &v1::PathMatch| {
            let slashed = format!("{}/", test.value);
            match test.kind() {
                path_match::Kind::Exact => path == test.value || (deny && path == slashed),
                _ => path == test.value || path.starts_with(&slashed),
            }
        };
        let header_holds = |test: &v1::ValueMatch| {
            let values: Vec<bool> = request
                .headers
                .iter()
                .filter(|(name, _)| *name == test.name)
                .map(|(_, value)| value == test.value.as_bytes())
                .collect();
            if deny { values.contains(&true) } else { !values.is_empty() && !values.contains(&false) }
        };
        (to.methods.is_empty() || to.methods.iter().any(|method| method.as_bytes() == request.method))
            && (to.paths.is_empty() || to.paths.iter().any(path_holds))
            && to.headers.iter().all(header_holds)
    }

    /// Whether it is allowed, and by which policy.
    pub(super) fn decide(access: &v1::Access, ask: &Ask<'_>) -> (bool, Option<String>) {
        for deny in [true, false] {
            for policy in &access.policies {
                if policy.audit || !(policy.ports.is_empty() || policy.ports.contains(&ask.port)) {
                    continue;
                }
                for rule in policy.rules.iter().filter(|rule| rule.deny == deny) {
                    let from = rule.from.is_empty() || rule.from.iter().any(|of| source(of, ask));
                    if from && (rule.to.is_empty() || rule.to.iter().any(|to| operation(to, ask, deny))) {
                        return (!deny, Some(policy.name.clone()));
                    }
                }
            }
        }
        (access.default() != v1::Default::Deny, None)
    }
}

fn some<T: Clone + std::fmt::Debug + 'static>(of: Vec<T>) -> impl Strategy<Value = Vec<T>> {
    prop_oneof![2 => Just(vec![]), 3 => prop::sample::subsequence(of, 1..=2)]
}

fn any_source() -> impl Strategy<Value = v1::Source> {
    let identity = ["spiffe://outrigger.local/ns/shop/*", WEB, SPY].map(str::to_owned).to_vec();
    (some(identity), some(vec!["shop".to_owned(), "evil".to_owned()]), prop::bool::weighted(0.2)).prop_map(
        |(identities, namespaces, unauthenticated)| v1::Source {
            identities,
            namespaces,
            cidrs: vec![],
            unauthenticated,
        },
    )
}

fn any_operation() -> impl Strategy<Value = v1::Operation> {
    let path = |kind: path_match::Kind, value: &str| v1::PathMatch { kind: kind.into(), value: value.into() };
    let paths = vec![
        path(path_match::Kind::Exact, "/a"),
        path(path_match::Kind::Exact, "/a/b"),
        path(path_match::Kind::Prefix, "/a"),
        path(path_match::Kind::Prefix, "/b"),
    ];
    let header = |value: &str| v1::ValueMatch {
        name: "role".into(),
        kind: value_match::Kind::Exact.into(),
        value: value.into(),
    };
    (
        some(vec![80, 81]),
        some(vec!["GET".to_owned(), "PUT".to_owned()]),
        some(paths),
        some(vec![header("x"), header("y")]),
    )
        .prop_map(|(ports, methods, paths, headers)| v1::Operation {
            ports,
            methods,
            paths,
            headers,
            grpc: vec![],
        })
}

fn any_access() -> impl Strategy<Value = v1::Access> {
    let rule = (
        any::<bool>(),
        prop::collection::vec(any_source(), 0..3),
        prop::collection::vec(any_operation(), 0..3),
    )
        .prop_map(|(deny, from, to)| super::tests::rule(deny, from, to));
    let policy = (prop::bool::weighted(0.2), some(vec![80, 81]), prop::collection::vec(rule, 0..4), 0..99_u8)
        .prop_map(|(audit, ports, rules, name)| v1::AccessPolicy {
            audit,
            ports,
            ..super::tests::policy(&name.to_string(), rules)
        });
    let default = prop::sample::select(vec![v1::Default::Allow, v1::Default::Audit, v1::Default::Deny]);
    (default, prop::collection::vec(policy, 0..4)).prop_map(|(default, policies)| v1::Access {
        escaped_slashes: Slashes::Keep.into(),
        ..wire(default, policies)
    })
}

proptest! {
    #[test]
    fn it_decides_as_the_words_say(
        wire in any_access(),
        identity in prop::sample::select(vec![None, Some(WEB), Some(CART), Some(SPY)]),
        port in 80..83_u16,
        method in prop::sample::select(vec!["GET", "PUT", "POST"]),
        target in prop::sample::select(vec!["/", "/a", "/a/", "/a/b", "/ab", "/b/c"]),
        roles in prop::collection::vec(prop::sample::select(vec!["x", "y", "z"]), 0..3),
        is_http in any::<bool>(),
    ) {
        let access = Access::from_wire(&wire).unwrap();
        let request = roles.iter().fold(Request::new(method, target), |request, role| request.with("role", *role));
        let ask = naive::Ask { identity, port: port.into(), request: is_http.then_some(&request) };
        let (allowed, policy) = naive::decide(&wire, &ask);
        let verdict = if is_http {
            access.request(&caller(identity), port, &request, target.as_bytes())
        } else {
            access.connection(&caller(identity), port)
        };
        prop_assert_eq!(verdict.allowed, allowed);
        let by = match verdict.by {
            By::Rule { policy, .. } => Some(policy.to_string()),
            _ => None,
        };
        prop_assert_eq!(by, policy);
    }
}
