//! What holds of any set of objects.

use proptest::prelude::*;

use super::*;

/// A `TrafficPolicy`: which target (by rank), which fields it sets, and when it was written.
#[derive(Debug, Clone)]
struct Written {
    rank: usize,
    retry: bool,
    request: bool,
    hedge: bool,
    created: i64,
}

/// From the least to the most specific.
const TARGETS: [(&str, &str); 6] = [
    ("outrigger-system", "kind: Mesh"),
    ("shop", "kind: Namespace"),
    ("shop", "kind: Service, name: orders"),
    ("shop", "kind: Service, name: orders, port: 80"),
    ("shop", "kind: HTTPRoute, name: orders"),
    ("shop", "kind: HTTPRoute, name: orders, sectionName: rule-0"),
];

fn written() -> impl Strategy<Value = Vec<Written>> {
    let one = (0..TARGETS.len(), any::<[bool; 3]>(), 0..4i64).prop_map(
        |(rank, [retry, request, hedge], created)| Written { rank, retry, request, hedge, created },
    );
    prop::collection::vec(one, 0..10)
}

/// Each as an object whose number can be read from every field.
fn objects(written: &[Written]) -> Vec<(Key, Arc<Stored>)> {
    let orders = route("HTTPRoute", "orders", "shop", "name: orders, port: 80", EVERYTHING_TO_ORDERS);
    let mut objects = vec![stored(orders.trim_end_matches("---\n"), 0)];
    for (number, policy) in written.iter().enumerate() {
        let mut fields = Vec::new();
        for (set, field) in [
            (policy.retry, format!("retry: {{attempts: {number}}}")),
            (policy.request, format!("timeouts: {{request: {number}ms}}")),
            (policy.hedge, format!("hedge: {{after: {number}ms}}")),
        ] {
            fields.extend(set.then_some(field));
        }
        let (namespace, target) = TARGETS[policy.rank];
        let text = traffic(&format!("p{number}"), namespace, target, &fields.join(", "));
        objects.push(stored(text.trim_end_matches("---\n"), policy.created));
    }
    objects
}

/// The number that a field must have: of the most specific target's policies that say it, each target's oldest.
fn expected(written: &[Written], says: impl Fn(&Written) -> bool) -> Option<u32> {
    (0..TARGETS.len()).rev().find_map(|rank| {
        let of_target = written.iter().enumerate().filter(|(_, policy)| policy.rank == rank);
        let (number, holder) =
            of_target.min_by_key(|(number, policy)| (policy.created, format!("p{number}")))?;
        says(holder).then(|| u32::try_from(number).unwrap())
    })
}

fn at_80(resolved: &Resolved) -> v1::Traffic {
    let routes = resolved.service("orders.shop").routes;
    routes[0].rules[0].traffic.clone().unwrap_or_default()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_more_specific_wins_field_by_field(written in written()) {
        let traffic = at_80(&resolve(&objects(&written).into_iter().collect(), &catalog()));
        prop_assert_eq!(traffic.retry.map(|retry| retry.attempts), expected(&written, |p| p.retry));
        prop_assert_eq!(traffic.timeouts.and_then(|t| t.request), expected(&written, |p| p.request));
        prop_assert_eq!(traffic.hedge.map(|hedge| hedge.after), expected(&written, |p| p.hedge));
    }

    #[test]
    fn the_order_of_writing_does_not_matter(written in written(), seed in any::<u64>()) {
        let mut shuffled = objects(&written);
        let ordered = resolve(&shuffled.iter().cloned().collect(), &catalog());
        let mut random = seed | 1;
        for at in (1..shuffled.len()).rev() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            shuffled.swap(at, usize::try_from(random >> 33).unwrap() % (at + 1));
        }
        let mut catalog = catalog();
        catalog.services.reverse();
        prop_assert_eq!(resolve(&shuffled.into_iter().collect(), &catalog), ordered);
    }

    #[test]
    fn the_winner_of_a_conflict_stays(written in written(), rank in 0..TARGETS.len()) {
        let before = resolve(&objects(&written).into_iter().collect(), &catalog());
        // Younger than all.
        let younger = Written { rank, retry: true, request: true, hedge: true, created: 9 };
        let has_holder = written.iter().any(|policy| policy.rank == rank);
        let with_younger: Vec<Written> = written.iter().cloned().chain([younger]).collect();
        let after = resolve(&objects(&with_younger).into_iter().collect(), &catalog());
        let key = Key::new(Kind::TrafficPolicy, TARGETS[rank].0, format!("p{}", written.len()));
        let refused = after.conditions(&key)[0].reason == ConditionReason::Conflicted;
        prop_assert_eq!(refused, has_holder);
        if has_holder {
            prop_assert_eq!(before.service("orders.shop"), after.service("orders.shop"));
        }
        // Nor does a change of those that hold, or of when they were last written, give it to others.
        let touched = objects(&with_younger).into_iter().map(|(key, stored)| {
            (key, Arc::new(Stored { revision: 99, updated: 99, ..(*stored).clone() }))
        });
        prop_assert_eq!(resolve(&touched.collect(), &catalog()), after);
    }

    #[test]
    fn an_access_policy_of_a_service_is_never_about_all_ports(port in prop::option::of(prop::sample::select(vec![80u16, 9090])), mapped in prop::collection::btree_map(prop::sample::select(vec![0u16, 80, 9090]), 1..100u16, 0..3)) {
        let port = port.map(|port| format!(", port: {port}")).unwrap_or_default();
        let text = access("a", "shop", &format!("kind: Service, name: orders{port}"), "rules: [{action: Deny}]");
        let mut catalog = catalog();
        catalog.services[1].endpoints[0].ports.clone_from(&mapped);
        let workloads = catalog.workloads_behind("orders.shop");
        let resolved = resolve(&policies(&text), &catalog);
        let access = resolved.inbound("spiffe://outrigger.local/ns/shop/sa/orders", &workloads).access;
        for policy in access.iter().flat_map(|access| &access.policies) {
            prop_assert!(!policy.ports.is_empty());
            prop_assert!(policy.ports.iter().all(|port| mapped.values().any(|own| u32::from(*own) == *port)));
        }
    }
}
