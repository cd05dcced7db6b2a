mod policies;

use std::{collections::BTreeSet, net::IpAddr};

use proptest::prelude::*;

use super::*;
use crate::{
    model::{Health, Port},
    route::Routes,
};

const PORT: u16 = 80;
const MS: Duration = Duration::from_millis(1);

fn endpoint(number: u8, weight: u32, health: Health) -> Endpoint {
    Endpoint {
        id: format!("e{number}").into(),
        address: IpAddr::from([10, 0, 0, number]),
        ports: BTreeMap::from([(PORT, 8080)]),
        weight,
        health,
        identity: None,
        zone: "".into(),
    }
}

fn service(endpoints: impl IntoIterator<Item = Endpoint>) -> Arc<Service> {
    let mut endpoints: Vec<_> = endpoints.into_iter().map(Arc::new).collect();
    endpoints.sort_by(|a, b| a.id.cmp(&b.id));
    let port = Port { name: "http".into(), protocol: crate::model::Protocol::Detect };
    Arc::new(Service {
        name: "s.default".into(),
        ports: BTreeMap::from([(PORT, port)]),
        endpoints,
        source: "file".into(),
        routes: Routes::default(),
        traffic: None,
        leads_to: Vec::new(),
    })
}

fn live() -> Arc<Live> {
    Arc::new(Live::new(Instant::now()))
}

fn balancer(service: &Arc<Service>) -> Balancer {
    let mut balancer = Balancer::new("me", MAX_ENDPOINTS, live());
    balancer.update(service);
    balancer
}

/// Sends `requests`, one at a time and 1 ms apart; `serve` answers for an endpoint. Returns who got how many.
fn drive(
    balancer: &mut Balancer,
    requests: u32,
    now: &mut Instant,
    rng: &mut fastrand::Rng,
    serve: impl Fn(&str) -> Outcome,
) -> BTreeMap<String, u32> {
    let mut taken = BTreeMap::new();
    for _ in 0..requests {
        let picked = balancer.pick(PORT, *now, rng, &[], None).endpoint().unwrap();
        let token = balancer.start(&picked);
        *now += MS;
        balancer.finish(token, serve(&picked.endpoint.id), *now);
        *taken.entry(picked.endpoint.id.to_string()).or_default() += 1;
    }
    taken
}

fn healthy(count: u8) -> impl Iterator<Item = Endpoint> {
    (1..=count).map(|number| endpoint(number, 1, Health::Healthy))
}

fn picks(balancer: &mut Balancer, now: Instant) -> BTreeSet<String> {
    let mut rng = fastrand::Rng::with_seed(7);
    (0..200)
        .filter_map(|_| balancer.pick(PORT, now, &mut rng, &[], None).endpoint())
        .map(|p| p.endpoint.id.to_string())
        .collect()
}

fn ids(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn equal_loads_follow_the_weights() {
    let mut balancer = balancer(&service(
        [1, 3, 6].map(|weight| endpoint(u8::try_from(weight).unwrap(), weight, Health::Healthy)),
    ));
    let (mut now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let taken = drive(&mut balancer, 10_000, &mut now, &mut rng, |_| Outcome::Success { rtt: 5 * MS });
    for (id, share) in [("e1", 1000), ("e3", 3000), ("e6", 6000)] {
        assert!(taken[id].abs_diff(share) < 200, "{taken:?}");
    }
}

#[test]
fn noise_does_not_undo_the_weights() {
    let canary = [endpoint(1, 99, Health::Healthy), endpoint(2, 1, Health::Healthy)];
    let mut balancer = balancer(&service(canary));
    let (mut now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let noise = std::cell::RefCell::new(fastrand::Rng::with_seed(2));
    let taken = drive(&mut balancer, 10_000, &mut now, &mut rng, |_| Outcome::Success {
        rtt: Duration::from_micros(noise.borrow_mut().u64(15_000..25_000)),
    });
    assert!((50..600).contains(&taken["e2"]), "{taken:?}");
}

#[test]
fn a_degraded_endpoint_takes_a_quarter() {
    let mut balancer =
        balancer(&service([endpoint(1, 1, Health::Healthy), endpoint(2, 1, Health::Degraded)]));
    let (mut now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let taken = drive(&mut balancer, 10_000, &mut now, &mut rng, |_| Outcome::Success { rtt: MS });
    assert!(taken["e2"].abs_diff(2000) < 200, "{taken:?}");
}

#[test]
fn a_slow_endpoint_gets_little_and_is_forgiven() {
    let mut balancer = balancer(&service(healthy(4)));
    let (mut now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let slow = |id: &str| Outcome::Success { rtt: if id == "e1" { 500 * MS } else { 5 * MS } };
    let taken = drive(&mut balancer, 10_000, &mut now, &mut rng, slow);
    assert!(taken["e1"] < 250, "{taken:?}");
    now += Duration::from_mins(1);
    let taken = drive(&mut balancer, 10_000, &mut now, &mut rng, |_| Outcome::Success { rtt: 5 * MS });
    assert!(taken["e1"].abs_diff(2500) < 400, "{taken:?}");
}

#[test]
fn fast_failures_attract_nothing() {
    let mut balancer = balancer(&service(healthy(4)));
    let (mut now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let failing = |id: &str| if id == "e1" { Outcome::Failure } else { Outcome::Success { rtt: 20 * MS } };
    let taken = drive(&mut balancer, 10_000, &mut now, &mut rng, failing);
    assert!(taken["e1"] < 100, "{taken:?}");
}

#[test]
fn a_new_endpoint_is_neither_flooded_nor_starved() {
    let mut balancer = balancer(&service(healthy(4)));
    let (mut now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let serve = |_: &str| Outcome::Success { rtt: 50 * MS };
    drive(&mut balancer, 1000, &mut now, &mut rng, serve);
    balancer.update(&service(healthy(5)));
    let taken = drive(&mut balancer, 1000, &mut now, &mut rng, serve);
    assert!(taken["e5"].abs_diff(200) < 60, "{taken:?}");
}

/// How often each endpoint is picked while nothing changes.
fn shares(balancer: &mut Balancer, now: Instant) -> BTreeMap<String, u32> {
    let mut rng = fastrand::Rng::with_seed(3);
    let mut taken = BTreeMap::new();
    for _ in 0..10_000 {
        let picked = balancer.pick(PORT, now, &mut rng, &[], None).endpoint().unwrap();
        *taken.entry(picked.endpoint.id.to_string()).or_default() += 1;
    }
    taken
}

#[test]
fn a_busy_endpoint_is_spared_in_proportion_to_its_weight() {
    let mut balancer = balancer(&service([endpoint(1, 3, Health::Healthy), endpoint(2, 1, Health::Healthy)]));
    let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let mut tokens = Vec::new();
    while balancer.slots[0].pending < 9 {
        let picked = balancer.pick(PORT, now, &mut rng, &["e2".into()], None).endpoint().unwrap();
        tokens.push(balancer.start(&picked));
    }
    // Load 9 / 1.5 + 1 = 7 against 1: the busy one keeps a seventh of its three quarters.
    let taken = shares(&mut balancer, now);
    assert!(taken["e1"].abs_diff(7500 / 7) < 150, "{taken:?}");
    for token in tokens {
        balancer.finish(token, Outcome::Abandoned { waited: Duration::ZERO }, now);
    }
    let taken = shares(&mut balancer, now);
    assert!(taken["e1"].abs_diff(7500) < 200, "{taken:?}");
}

#[test]
fn what_is_not_known_is_presumed_typical() {
    let mut balancer = balancer(&service(healthy(4)));
    let (mut now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let one_slow = |id: &str| Outcome::Success { rtt: if id == "e1" { 1000 * MS } else { 50 * MS } };
    drive(&mut balancer, 2000, &mut now, &mut rng, one_slow);
    balancer.update(&service(healthy(5)));
    let taken = shares(&mut balancer, now);
    assert!(taken["e1"] < 400 && (1500..4000).contains(&taken["e5"]), "new: {taken:?}");
    let taken = shares(&mut balancer, now + Duration::from_mins(1));
    assert!(taken.values().all(|taken| taken.abs_diff(2000) < 200), "long ago: {taken:?}");
}

#[test]
fn failures_in_a_row_weigh_more_and_success_ends_the_row() {
    let mut balancer = balancer(&service(healthy(1)));
    let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let mut estimates = Vec::new();
    for outcome in [Outcome::Failure, Outcome::Failure, Outcome::Failure, Outcome::Success { rtt: MS }] {
        let picked = balancer.pick(PORT, now, &mut rng, &[], None).endpoint().unwrap();
        let token = balancer.start(&picked);
        balancer.finish(token, outcome, now);
        estimates.push(balancer.slots[0].estimate(FLOOR, now));
    }
    assert_eq!(estimates, [1.0, 2.0, 4.0, 4.0]);
    assert_eq!(balancer.slots[0].failures, 0);
}

#[test]
fn an_endpoint_that_moves_is_another() {
    let mut balancer = balancer(&service(healthy(2)));
    let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    balancer.connect_failed("e1", now, &mut rng);
    let moved = Endpoint { address: IpAddr::from([10, 0, 1, 1]), ..endpoint(1, 1, Health::Healthy) };
    balancer.update(&service([endpoint(1, 5, Health::Draining), endpoint(2, 1, Health::Healthy)]));
    assert_eq!(balancer.slots[0].connect_failures, 1, "weight and health are no move");
    balancer.update(&service([moved, endpoint(2, 1, Health::Healthy)]));
    assert_eq!(picks(&mut balancer, now), ids(&["e1", "e2"]));
}

#[test]
fn the_subset_prefers_what_works() {
    let health = |number| if number % 10 == 0 { Health::Healthy } else { Health::Unhealthy };
    let many = service((1..=250).map(|number| endpoint(number, 1, health(number))));
    let mut balancer = balancer(&many);
    let key = balancer.on_port(PORT);
    let members = &balancer.on_ports[&key].subset;
    let working = members.iter().filter(|at| balancer.slots[**at].endpoint.health == Health::Healthy);
    assert_eq!((members.len(), working.count()), (MAX_ENDPOINTS, 25));
}

#[test]
fn a_caller_that_gave_up_on_a_slow_endpoint_counts() {
    let mut balancer = balancer(&service(healthy(4)));
    let (mut now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let hanging = |id: &str| match id {
        "e1" => Outcome::Abandoned { waited: Duration::from_secs(2) },
        _ => Outcome::Success { rtt: 5 * MS },
    };
    let taken = drive(&mut balancer, 10_000, &mut now, &mut rng, hanging);
    assert!(taken["e1"] < 100, "{taken:?}");
}

#[test]
fn a_failed_connect_puts_aside_longer_every_time_and_one_request_tries() {
    let mut balancer = balancer(&service(healthy(4)));
    let (mut now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let mut last = Duration::ZERO;
    for round in 0..8 {
        balancer.connect_failed("e1", now, &mut rng);
        assert_eq!(picks(&mut balancer, now), ids(&["e2", "e3", "e4"]));
        let aside = balancer.slots[0].aside_until.unwrap() - now;
        let most = ASIDE_MIN.saturating_mul(1 << round).min(ASIDE_MAX);
        assert!(aside >= most / 2 && aside <= most, "round {round}: {aside:?}");
        // Together with the first, no failure of its own.
        balancer.connect_failed("e1", now, &mut rng);
        assert_eq!(balancer.slots[0].connect_failures, round + 1);
        now += aside;
        last = aside;
        let mut tries = 0;
        for _ in 0..200 {
            let picked = balancer.pick(PORT, now, &mut rng, &[], None).endpoint().unwrap();
            tries += u32::from(&*picked.endpoint.id == "e1");
        }
        assert_eq!(tries, 1);
    }
    assert!(last >= ASIDE_MAX / 2);
    balancer.connected("e1");
    assert_eq!(picks(&mut balancer, now).len(), 4);
}

#[test]
fn never_more_than_half_are_put_aside() {
    for (count, left) in [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)] {
        let mut balancer = balancer(&service(healthy(count)));
        let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
        for number in 1..=count {
            balancer.connect_failed(&format!("e{number}"), now, &mut rng);
        }
        assert!(balancer.pick(PORT, now, &mut rng, &[], None).endpoint().is_some());
        let mut found = Vec::new();
        let port = balancer.on_port(PORT);
        balancer.gather(port, now, &[], &mut found);
        assert_eq!(found.len(), left, "of {count}");
    }
}

#[test]
fn worse_tiers_are_the_last_resort() {
    let now = Instant::now();
    let all = |healths: [Health; 3]| {
        balancer(&service((1..).zip(healths).map(|(n, health)| endpoint(n, 1, health))))
    };
    let mut balancer = all([Health::Degraded, Health::Draining, Health::Unhealthy]);
    assert_eq!(picks(&mut balancer, now), ids(&["e1"]));
    let mut balancer = all([Health::Draining, Health::Draining, Health::Unhealthy]);
    assert_eq!(picks(&mut balancer, now), ids(&["e1", "e2"]));
    let mut balancer = all([Health::Unhealthy; 3]);
    assert_eq!(picks(&mut balancer, now), ids(&["e1", "e2", "e3"]));
    let mut balancer = all([Health::Unready, Health::Unhealthy, Health::Unready]);
    assert_eq!(picks(&mut balancer, now), ids(&["e2"]));
    let mut balancer = all([Health::Unready; 3]);
    assert_eq!(picks(&mut balancer, now), ids(&[]), "not even as the last resort");
}

#[test]
fn a_draining_sidecar_is_avoided_while_there_are_others() {
    let mut balancer = balancer(&service(healthy(3)));
    let now = Instant::now();
    balancer.drained("e1", now);
    assert_eq!(picks(&mut balancer, now), ids(&["e2", "e3"]));
    assert_eq!(picks(&mut balancer, now + DRAINED_FOR).len(), 3);
    balancer.update(&service(healthy(1)));
    assert_eq!(picks(&mut balancer, now), ids(&["e1"]));
}

#[test]
fn a_token_outlives_its_endpoint_in_peace() {
    let mut balancer = balancer(&service(healthy(1)));
    let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let picked = balancer.pick(PORT, now, &mut rng, &[], None).endpoint().unwrap();
    let (left, returned) = (balancer.start(&picked), balancer.start(&picked));
    balancer.update(&service([]));
    balancer.finish(left, Outcome::Failure, now);
    assert!(balancer.pick(PORT, now, &mut rng, &[], None).endpoint().is_none());
    balancer.update(&service(healthy(1)));
    balancer.finish(returned, Outcome::Failure, now);
    assert_eq!(
        (balancer.slots[0].pending, balancer.slots[0].failures),
        (0, 0),
        "the new one is another endpoint"
    );
}

#[test]
fn an_endpoint_at_another_port_is_not_picked() {
    let mut other = endpoint(1, 1, Health::Healthy);
    other.ports = BTreeMap::from([(81, 8081)]);
    let mut any = endpoint(2, 1, Health::Unhealthy);
    any.ports = BTreeMap::from([(0, 9000)]);
    let mut balancer = balancer(&service([other, any]));
    let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let mut address = |port| {
        balancer.pick(port, now, &mut rng, &[], None).endpoint().map(|picked| picked.address.to_string())
    };
    assert_eq!(address(80).as_deref(), Some("10.0.0.2:9000"));
    assert_eq!(address(81).as_deref(), Some("10.0.0.1:8081"));
    assert_eq!(address(0).as_deref(), Some("10.0.0.2:9000"));
    assert_eq!(balancer.on_ports.len(), 2);
}

fn is_dead(balancer: &Balancer, id: &str) -> bool {
    let on_port = &balancer.on_ports[&PORT];
    let circuit = on_port.circuits[balancer.index(id).unwrap()].as_ref();
    circuit.is_some_and(|circuit| circuit.is_dead(&on_port.group))
}

fn any_health() -> impl Strategy<Value = Health> {
    prop::sample::select(vec![Health::Healthy, Health::Degraded, Health::Draining, Health::Unhealthy])
}

fn any_endpoints() -> impl Strategy<Value = Vec<Endpoint>> {
    prop::collection::btree_map(1_u8..80, (0_u32..100, any_health(), 0..4), 0..60).prop_map(|endpoints| {
        let make = |(number, (weight, health, port))| {
            let port = if port == 0 { 81 } else { PORT };
            Endpoint { ports: BTreeMap::from([(port, 8080)]), ..endpoint(number, weight, health) }
        };
        endpoints.into_iter().map(make).collect()
    })
}

#[derive(Debug, Clone)]
enum Step {
    Update(Vec<Endpoint>),
    Pick { exclude: BTreeSet<u8>, outcome: u8 },
    ConnectFailed(u8),
    Drained(u8),
    Finish,
    Wait(u16),
}

fn any_step() -> impl Strategy<Value = Step> {
    let exclude = prop_oneof![
        3 => prop::collection::btree_set(1_u8..80, 0..5),
        1 => prop::collection::btree_set(1_u8..80, 30..79),
    ];
    prop_oneof![
        1 => any_endpoints().prop_map(Step::Update),
        8 => (exclude, 0_u8..3).prop_map(|(exclude, outcome)| Step::Pick { exclude, outcome }),
        3 => (1_u8..80).prop_map(Step::ConnectFailed),
        1 => (1_u8..80).prop_map(Step::Drained),
        4 => Just(Step::Finish),
        1 => (0_u16..5000).prop_map(Step::Wait),
    ]
}

proptest! {
    #[test]
    fn a_pick_is_allowed_present_and_found_if_there_is_one(
        steps in prop::collection::vec(any_step(), 1..60), seed: u64, max_endpoints in 1_usize..40,
    ) {
        let mut now = Instant::now();
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut balancer = Balancer::new("me", max_endpoints, live());
        let mut current = Vec::new();
        let mut open = std::collections::VecDeque::new();
        for step in steps {
            match step {
                Step::Update(endpoints) => {
                    balancer.update(&service(endpoints.clone()));
                    current = endpoints;
                }
                Step::ConnectFailed(number) => balancer.connect_failed(&format!("e{number}"), now, &mut rng),
                Step::Drained(number) => balancer.drained(&format!("e{number}"), now),
                Step::Wait(ms) => now += Duration::from_millis(ms.into()),
                Step::Finish => {
                    if let Some((token, outcome)) = open.pop_front() {
                        balancer.finish(token, outcome, now);
                    }
                }
                Step::Pick { exclude, outcome } => {
                    let exclude: Vec<Arc<str>> = exclude.iter().map(|n| format!("e{n}").into()).collect();
                    let allowed: Vec<&Endpoint> = current
                        .iter()
                        .filter(|e| e.socket_address(PORT).is_some() && !exclude.contains(&e.id))
                        .collect();
                    let picked = match balancer.pick(PORT, now, &mut rng, &exclude, None) {
                        Pick::Endpoint(picked) => picked,
                        Pick::NoEndpoints => {
                            prop_assert!(allowed.is_empty());
                            continue;
                        }
                        Pick::AllFailing => {
                            let mut serving = current.iter().filter(|e| e.socket_address(PORT).is_some());
                            prop_assert!(serving.all(|e| is_dead(&balancer, &e.id)) || allowed.is_empty());
                            continue;
                        }
                    };
                    prop_assert!(allowed.iter().any(|e| **e == *picked.endpoint));
                    prop_assert_eq!(Some(picked.address), picked.endpoint.socket_address(PORT));
                    let outcome = match outcome {
                        0 => Outcome::Failure,
                        1 => Outcome::Abandoned { waited: 3 * MS },
                        _ => Outcome::Success { rtt: 2 * MS },
                    };
                    open.push_back((balancer.start(&picked), outcome));
                }
            }
            let pending: usize = balancer.slots.iter().map(|slot| slot.pending as usize).sum();
            prop_assert!(pending <= open.len());
            for slot in &balancer.slots {
                prop_assert!(slot.load(balancer.typical(), 1.0, now).is_normal());
            }
        }
        for (token, outcome) in open {
            balancer.finish(token, outcome, now);
        }
        prop_assert!(balancer.slots.iter().all(|slot| slot.pending == 0));
    }

    #[test]
    fn the_subset_is_bounded_and_stable(endpoints in any_endpoints(), remove: prop::sample::Index, own in "[a-z]{1,8}") {
        prop_assume!(!endpoints.is_empty());
        let members = |endpoints: &[Endpoint]| -> BTreeSet<Arc<str>> {
            let mut balancer = Balancer::new(&own, MAX_ENDPOINTS, live());
            balancer.update(&service(endpoints.to_vec()));
            let key = balancer.on_port(PORT);
            balancer.on_ports[&key].subset.iter().map(|at| Arc::clone(&balancer.slots[*at].endpoint.id)).collect()
        };
        let before = members(&endpoints);
        let mut fewer = endpoints.clone();
        let removed = fewer.remove(remove.index(endpoints.len()));
        let after = members(&fewer);
        prop_assert!(before.len() <= MAX_ENDPOINTS);
        prop_assert_eq!(&before, &members(&endpoints), "deterministic");
        prop_assert!(before.difference(&after).all(|id| *id == removed.id));
        prop_assert!(after.difference(&before).count() <= 1);
    }
}

#[test]
fn proxies_together_cover_all_endpoints() {
    let many = service((1..=250).map(|number| endpoint(number, 1, Health::Healthy)));
    let mut used: BTreeMap<usize, u32> = BTreeMap::new();
    for proxy in 0..100 {
        let mut balancer =
            Balancer::new(&format!("spiffe://a/ns/b/sa/c@10.1.0.{proxy}"), MAX_ENDPOINTS, live());
        balancer.update(&many);
        let key = balancer.on_port(PORT);
        for at in &balancer.on_ports[&key].subset {
            *used.entry(*at).or_default() += 1;
        }
    }
    // 100 * 32 / 250 = 12.8 each on average.
    assert_eq!(used.len(), 250);
    assert!(used.values().all(|proxies| *proxies <= 32), "{used:?}");
}
