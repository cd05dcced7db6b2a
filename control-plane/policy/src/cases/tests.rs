use super::*;
use crate::kinds::PolicyTest;
use crate::resolve::resolve;
use crate::resolve::tests::{access, catalog, policies, route, traffic};

fn results(cases: &str) -> Vec<CaseResult> {
    let text = [
        traffic("t", "shop", "kind: Namespace", "timeouts: {request: 1500ms}, retry: {attempts: 2}"),
        route(
            "HTTPRoute",
            "r",
            "shop",
            "name: orders, port: 80",
            "{backendRefs: [{name: orders, port: 80}, {name: web, port: 80}]}",
        ),
        access(
            "a",
            "shop",
            "kind: Service, name: web",
            "rules: [{name: not-bank, action: Deny, from: [{namespaces: [bank]}]}]",
        ),
    ]
    .concat();
    let test: PolicyTest = serde_saphyr::from_str(cases).unwrap();
    let catalog = catalog();
    run(&test.cases, &resolve(&policies(&text), &catalog), &catalog)
}

fn failures(case: &str) -> Vec<String> {
    let mut results = results(&format!("cases: [{case}]"));
    assert_eq!(results.len(), 1);
    results.remove(0).failures
}

#[test]
fn what_is_expected_must_hold_of_all_that_can_come() {
    for (case, expected) in [
        (
            "{from: {identity: shop/web}, to: {service: orders.shop, port: 80}, request: {path: /}, \
              expect: {decision: Allow, route: shop/r, backend: orders.shop, retries: 2, timeout: 1500ms, policy: default}}",
            vec![],
        ),
        (
            "{from: {service: web.shop}, to: {service: web.shop}, request: {path: /}, expect: {decision: Allow, policy: default}}",
            vec![],
        ),
        (
            "{from: {identity: bank/pay}, to: {service: web.shop}, expect: {decision: Deny, status: 403, policy: shop/a, rule: not-bank}}",
            vec![],
        ),
        (
            "{from: {service: pay.bank}, to: {service: orders.shop, port: 80}, request: {path: /}, expect: {decision: Allow}}",
            vec!["decision: expected Allow, got Deny"],
        ),
        (
            "{from: {service: pay.bank}, to: {service: orders.shop, port: 80}, request: {path: /}, expect: {decision: Allow, backend: orders.shop}}",
            vec![],
        ),
        (
            "{from: {identity: shop/web}, to: {service: web.shop}, request: {path: /, method: POST}, \
              expect: {status: 403, rule: x, route: shop/r, backend: pay.bank, retries: 1}}",
            vec!["backend: expected pay.bank, got web.shop"],
        ),
        (
            "{from: {identity: shop/web}, to: {service: web.shop}, request: {path: /, method: POST}, \
              expect: {status: 403, rule: x, route: shop/r, retries: 1, timeout: 1s}}",
            vec![
                "status: expected 403, got none",
                "rule: expected x, got none",
                "route: expected shop/r, got none",
                "retries: expected 1, got 0",
                "timeout: expected 1s, got 1s500ms",
            ],
        ),
        (
            "{to: {service: orders.shop}, expect: {}}",
            vec!["to.port: orders.shop has not exactly one port; name one"],
        ),
        (
            // Any port leads to it, and its workload listens on one.
            "{to: {service: pay.bank}, request: {path: /}, expect: {decision: Deny, status: 403}}",
            vec![],
        ),
        (
            "{to: {service: none.shop}, expect: {}}",
            vec!["to.port: none.shop has not exactly one port; name one"],
        ),
        (
            "{from: {service: none.shop}, to: {service: web.shop}, expect: {}}",
            vec!["from.service: none.shop has no workload in the catalog"],
        ),
        (
            "{from: {address: 1.2.3.4}, to: {service: web.shop}, expect: {decision: Deny, status: 403}}",
            vec![],
        ),
    ] {
        assert_eq!(failures(case), expected, "{case}");
    }
}

#[test]
fn the_suite_is_xml_whatever_the_names_are() {
    let results = results(
        "cases: [{name: 'a <&\"> b', from: {identity: shop/web}, to: {service: web.shop}, expect: {decision: Allow}}, \
         {from: {identity: shop/web}, to: {service: web.shop}, request: {path: /x}, expect: {decision: Deny}}]",
    );
    let xml = junit(&results);
    assert!(xml.contains("<testsuite name=\"outrigger policy\" tests=\"2\" failures=\"1\">"), "{xml}");
    assert!(xml.contains("name=\"a &lt;&amp;&quot;&gt; b\"/>"), "{xml}");
    assert!(xml.contains("name=\"shop/web -&gt; web.shop GET /x\">"), "{xml}");
    assert!(xml.contains("<failure message=\"decision: expected Deny, got Allow\">"), "{xml}");
    assert_eq!(escaped("\u{0}\u{1b}a\n"), "\u{fffd}\u{fffd}a\n");
}
