use super::names::*;

#[test]
fn names_have_one_spelling() {
    for name in ["a", "a-b", "0a", &"a".repeat(63)] {
        assert!(is_label(name) && is_subdomain(name) && is_dns_name(name), "{name}");
    }
    for name in ["", "-a", "a-", "A", "a_b", "ä", "a b", &"a".repeat(254)] {
        assert!(!is_label(name) && !is_subdomain(name) && !is_dns_name(name), "{name}");
    }
    assert!(is_subdomain("a.b") && !is_label("a.b") && !is_subdomain("a..b") && !is_subdomain("a."));
    assert!(
        is_qualified("app.kubernetes.io/name")
            && is_qualified("a_B.c")
            && !is_qualified("a/b/c")
            && !is_qualified("/a")
    );
    assert!(
        is_label_value("")
            && is_label_value("V1.2_x")
            && !is_label_value("-a")
            && !is_label_value(&"a".repeat(64))
    );
}

#[test]
fn identities_and_their_beginnings() {
    let text = "spiffe://outrigger.local/ns/shop/sa/orders.v2";
    assert_eq!((identity(text), identity_pattern(text)), (Ok(()), Ok(())));
    for text in
        ["*", "spiffe://*", "spiffe://outrigger.local/ns/shop/*", "spiffe://outrigger.local/ns/shop/sa/web-*"]
    {
        assert!(identity(text).is_err(), "{text}");
        assert_eq!(identity_pattern(text), Ok(()));
    }
    for text in [
        "",
        "**",
        "a*",
        "spiffe:/*",
        "spiffe://a/ns/*/sa/b",
        "spiffe://a/ns/*/sa/*",
        "spiffe://A/*",
        "spiffe://a/ns/b/sa/c/",
    ] {
        assert!(identity_pattern(text).is_err(), "{text}");
    }
    assert_eq!(service_account("shop/web"), Ok(()));
    for text in ["web", "shop/", "/web", "shop/web/x", "Shop/web"] {
        assert!(service_account(text).is_err(), "{text}");
    }
}

#[test]
fn networks_have_no_bits_behind_the_prefix() {
    for text in ["10.0.0.0/8", "0.0.0.0/0", "::/0", "fd00::/64", "192.0.2.1/32"] {
        assert_eq!(cidr(text), Ok(()));
    }
    for (text, hint) in [
        ("10.0.0.1/8", "10.0.0.0/8"),
        ("192.0.2.1", "192.0.2.1/32"),
        ("::1", "::1/128"),
        ("10/8", "as in"),
        ("10.0.0.0/33", "as in"),
    ] {
        assert!(cidr(text).unwrap_err().contains(hint), "{text}");
    }
}

#[test]
fn paths_are_as_requests_have_them() {
    for text in ["/", "/a", "/a/", "/a%20b", "/a.b/..c", "/a;b=c"] {
        assert_eq!(path(text), Ok(()), "{text}");
    }
    for text in [
        "", "a", "//", "/a//b", "/.", "/..", "/a/../b", "/a/./b", "/a%2fb", "/a%2Fb", "/a%2", "/a%zz",
        "/a?b", "/a#b", "/a b", "/é", "/a\u{0}",
    ] {
        assert!(path(text).is_err(), "{text}");
    }
}

#[test]
fn expressions_are_what_proxies_take() {
    for text in ["/v[12]/.*", "a|b", "^/a$"] {
        assert_eq!(expression(text), Ok(()), "{text}");
    }
    for text in ["", "a(", "a)|(b", r"(?=a)", "(((((a{100}){100}){100}){100})", &"a".repeat(1025)] {
        let fault = expression(text).unwrap_err();
        assert!(!fault.contains('\n'), "{fault}");
    }
    insta::assert_snapshot!(
        ["a(", "(?=a)", "(a{100}){100}"].map(|text| expression(text).unwrap_err()).join("\n")
    );
}

#[test]
fn methods_and_headers() {
    assert_eq!(method("PURGE"), Ok(()));
    assert!(method("get").unwrap_err().ends_with("write GET"));
    assert!(method("").is_err() && method("A B").is_err());
    assert_eq!(header("X-User"), Ok(()));
    assert!(header(":path").is_err() && header("a b").is_err() && header("").is_err());
    assert_eq!(header_value("a\tb é"), Ok(()));
    assert!(header_value("a\nb").is_err() && header_value(" a").is_err() && header_value("\u{7f}").is_err());
}
