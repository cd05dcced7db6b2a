//! Breakers, algorithms, zones and slow starts.

use super::*;
use crate::{
    breaker::{
        Breaker,
        circuit::{Millis, Standing},
    },
    hash::mix,
    traffic::{LoadBalancer, Traffic},
};

fn with_policy(endpoints: impl IntoIterator<Item = Endpoint>, traffic: Traffic) -> Arc<Service> {
    let service = service(endpoints);
    Arc::new(Service { traffic: Some(Arc::new(traffic)), ..(*service).clone() })
}

fn balancing(load_balancer: LoadBalancer) -> Traffic {
    Traffic { load_balancer, ..Traffic::default() }
}

fn by(algorithm: Algorithm) -> Traffic {
    balancing(LoadBalancer { algorithm, ..LoadBalancer::default() })
}

/// One request that ends at once; who took it.
fn ask(
    balancer: &mut Balancer,
    now: Instant,
    rng: &mut fastrand::Rng,
    serve: impl Fn(&str) -> Outcome,
) -> Option<String> {
    let picked = balancer.pick(PORT, now, rng, &[], None).endpoint()?;
    let token = balancer.start(&picked);
    balancer.finish(token, serve(&picked.endpoint.id), now);
    Some(picked.endpoint.id.to_string())
}

#[test]
fn what_one_thread_finds_out_all_know() {
    let (service, live) = (service(healthy(3)), live());
    let [mut one, mut other] = [(); 2].map(|()| Balancer::new("me", MAX_ENDPOINTS, Arc::clone(&live)));
    one.update(&service);
    other.update(&service);
    let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let failing = |id: &str| if id == "e1" { Outcome::Error } else { Outcome::Success { rtt: MS } };
    while live.ejected() == 0 {
        ask(&mut one, now, &mut rng, failing);
    }
    assert_eq!(picks(&mut other, now), ids(&["e2", "e3"]));
    let asked: Vec<_> =
        (0..200).filter_map(|_| ask(&mut one, now + 2 * ASIDE_MIN, &mut rng, failing)).collect();
    assert_eq!(asked.iter().filter(|id| *id == "e1").count(), 1, "one tries it");
    assert_eq!(picks(&mut other, now + 2 * ASIDE_MIN), ids(&["e2", "e3"]));
}

#[test]
fn one_of_three_that_always_fails_costs_next_to_nothing() {
    let mut balancer = balancer(&service(healthy(3)));
    let (mut now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let failing = |id: &str| if id == "e1" { Outcome::Error } else { Outcome::Success { rtt: MS } };
    let taken = drive(&mut balancer, 60_000, &mut now, &mut rng, failing);
    assert!(taken["e1"] <= 12, "five, and trials that come ever later in a minute: {taken:?}");
    let taken = drive(&mut balancer, 60_000, &mut now, &mut rng, |_| Outcome::Success { rtt: MS });
    // Half a minute at most until the next trial.
    assert!(taken["e1"] > 3000, "{taken:?}");
}

#[test]
fn each_endpoint_of_a_dead_service_is_asked_twice_a_second() {
    let mut balancer = balancer(&service(healthy(3)));
    let (begun, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let now = begun + Duration::from_secs(1);
    let mut before = 0;
    while ask(&mut balancer, now, &mut rng, |_| Outcome::Failure).is_some() {
        before += 1;
    }
    assert!((15..40).contains(&before), "{before}");
    assert!(matches!(balancer.pick(PORT, now, &mut rng, &[], None), Pick::AllFailing));
    let mut asked: BTreeMap<String, u32> = BTreeMap::new();
    for ms in 0..10_000 {
        if let Some(id) = ask(&mut balancer, now + ms * MS, &mut rng, |_| Outcome::Failure) {
            *asked.entry(id).or_default() += 1;
        }
    }
    assert!(asked.len() == 3 && asked.values().all(|asked| (19..=21).contains(asked)), "{asked:?}");
    let back = now + Duration::from_secs(11);
    assert!(ask(&mut balancer, back, &mut rng, |_| Outcome::Success { rtt: MS }).is_some());
    assert!(ask(&mut balancer, back, &mut rng, |_| Outcome::Success { rtt: MS }).is_some(), "and is back");
}

#[test]
fn a_service_that_answers_with_failures_is_asked_on() {
    let mut balancer = balancer(&service(healthy(2)));
    let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    for _ in 0..200 {
        assert!(ask(&mut balancer, now, &mut rng, |_| Outcome::Error).is_some());
    }
    assert!(balancer.live.panicking());
}

#[test]
fn who_is_ejected_is_the_last_resort_of_a_request_that_tried_all_others() {
    let mut balancer = balancer(&service(healthy(2)));
    let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let failing = |id: &str| if id == "e1" { Outcome::Error } else { Outcome::Success { rtt: MS } };
    while balancer.live.ejected() == 0 {
        ask(&mut balancer, now, &mut rng, failing);
    }
    let picked = balancer.pick(PORT, now, &mut rng, &["e2".into()], None).endpoint().unwrap();
    let token = balancer.start(&picked);
    balancer.finish(token, Outcome::Success { rtt: MS }, now);
    assert_eq!((&*picked.endpoint.id, balancer.live.ejected()), ("e1", 0));
}

#[test]
fn a_trial_that_is_abandoned_is_made_again_soon_and_not_before_others_are_asked() {
    let mut balancer = balancer(&service(healthy(2)));
    let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let failing = |id: &str| if id == "e1" { Outcome::Failure } else { Outcome::Success { rtt: MS } };
    while balancer.live.ejected() == 0 {
        ask(&mut balancer, now, &mut rng, failing);
    }
    let mut later = now + ASIDE_MIN;
    let abandoned = |_: &str| Outcome::Abandoned { waited: Duration::ZERO };
    for _ in 0..3 {
        assert_eq!(ask(&mut balancer, later, &mut rng, abandoned).as_deref(), Some("e1"));
        for _ in 0..10 {
            assert_eq!(ask(&mut balancer, later, &mut rng, failing).as_deref(), Some("e2"));
        }
        later += MS * 500;
    }
    assert_eq!(balancer.live.ejected(), 1);
    ask(&mut balancer, later, &mut rng, |_| Outcome::Success { rtt: MS });
    assert_eq!(balancer.live.ejected(), 0);
}

#[test]
fn an_ejected_endpoint_is_back_when_it_begins_to_answer_and_a_stream_that_began_well_ends_a_row() {
    let mut balancer = balancer(&service(healthy(2)));
    let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let failing = |id: &str| if id == "e1" { Outcome::Failure } else { Outcome::Success { rtt: MS } };
    while balancer.live.ejected() == 0 {
        ask(&mut balancer, now, &mut rng, failing);
    }
    let later = now + ASIDE_MIN;
    let picked = balancer.pick(PORT, later, &mut rng, &[], None).endpoint().unwrap();
    let mut stream = balancer.start(&picked);
    assert!(stream.is_trial());
    balancer.answers(&mut stream, MS, later);
    assert_eq!(balancer.live.ejected(), 0);
    let only_e1 = ["e2".into()];
    for round in 0..8 {
        let failed = balancer.pick(PORT, later, &mut rng, &only_e1, None).endpoint().unwrap();
        let failed = balancer.start(&failed);
        balancer.finish(failed, Outcome::Failure, later);
        if round % 4 == 3 {
            let well = balancer.pick(PORT, later, &mut rng, &only_e1, None).endpoint().unwrap();
            let mut well = balancer.start(&well);
            balancer.answers(&mut well, MS, later);
            balancer.finish(well, Outcome::Success { rtt: MS }, later);
        }
    }
    assert_eq!(balancer.live.ejected(), 0, "never five in a row");
    balancer.finish(stream, Outcome::Failure, later);
    assert_eq!(balancer.live.ejected(), 0, "one failure");
}

#[test]
fn weights_hold_in_every_algorithm() {
    for algorithm in [
        Algorithm::PeakEwma,
        Algorithm::LeastRequest,
        Algorithm::RoundRobin,
        Algorithm::Random,
        Algorithm::RingHash,
        Algorithm::Maglev,
    ] {
        let endpoints = [1, 3, 6].map(|n| endpoint(n, u32::from(n), Health::Healthy));
        let mut balancer = balancer(&with_policy(endpoints, by(algorithm)));
        let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
        let mut taken: BTreeMap<String, u32> = BTreeMap::new();
        for n in 0..10_000 {
            let picked = balancer.pick(PORT, now, &mut rng, &[], Some(mix(n))).endpoint().unwrap();
            *taken.entry(picked.endpoint.id.to_string()).or_default() += 1;
        }
        let slack = match algorithm {
            Algorithm::RoundRobin => 0,
            Algorithm::RingHash => 1500,
            _ => 200,
        };
        for (id, share) in [("e1", 1000), ("e3", 3000), ("e6", 6000)] {
            assert!(taken[id].abs_diff(share) <= slack, "{algorithm:?}: {taken:?}");
        }
    }
}

#[test]
fn round_robin_takes_turns() {
    let mut balancer = balancer(&with_policy(healthy(3), by(Algorithm::RoundRobin)));
    let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let order: Vec<_> =
        (0..6).filter_map(|_| ask(&mut balancer, now, &mut rng, |_| Outcome::Error)).collect();
    assert_eq!(order, ["e1", "e2", "e3", "e1", "e2", "e3"]);
}

#[test]
fn the_least_request_is_not_the_fastest() {
    let mut balancer = balancer(&with_policy(healthy(2), by(Algorithm::LeastRequest)));
    let (mut now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
    let slow = |id: &str| Outcome::Success { rtt: if id == "e1" { 500 * MS } else { 5 * MS } };
    let taken = drive(&mut balancer, 4000, &mut now, &mut rng, slow);
    assert!(taken["e1"].abs_diff(2000) < 200, "{taken:?}");
    let picked = balancer.pick(PORT, now, &mut rng, &["e2".into()], None).endpoint().unwrap();
    let tokens: Vec<_> = (0..9).map(|_| balancer.start(&picked)).collect();
    // A queue of ten against one.
    let taken = shares(&mut balancer, now);
    assert!(taken["e1"].abs_diff(500) < 150, "{taken:?}");
    for token in tokens {
        balancer.finish(token, Outcome::Error, now);
    }
}

#[test]
fn a_key_means_the_same_endpoint_to_all_proxies_and_comes_back() {
    for algorithm in [Algorithm::RingHash, Algorithm::Maglev] {
        let many = with_policy(healthy(60), by(algorithm));
        let [mut one, mut other] = ["one", "other"].map(|own| Balancer::new(own, 8, live()));
        one.update(&many);
        other.update(&many);
        let (now, mut rng) = (Instant::now(), fastrand::Rng::with_seed(1));
        let mut owner = |balancer: &mut Balancer, key, exclude: &[Arc<str>]| {
            let picked = balancer.pick(PORT, now, &mut rng, exclude, Some(mix(key))).endpoint().unwrap();
            picked.endpoint.id.clone()
        };
        let mut owners = BTreeSet::new();
        for key in 0..500 {
            let own = owner(&mut one, key, &[]);
            assert_eq!(owner(&mut other, key, &[]), own, "{algorithm:?}");
            assert_ne!(owner(&mut one, key, std::slice::from_ref(&own)), own);
            assert_eq!(owner(&mut one, key, &[]), own);
            owners.insert(own);
        }
        assert!(owners.len() > 50);
        // Another's health moves nobody's keys but its own.
        let before: Vec<_> = (0..500).map(|key| owner(&mut one, key, &[])).collect();
        let health = |n| if n == 7 { Health::Unhealthy } else { Health::Healthy };
        one.update(&with_policy((1..=60).map(|n| endpoint(n, 1, health(n))), by(algorithm)));
        for (key, own) in (0..).zip(before) {
            let now_owned = owner(&mut one, key, &[]);
            assert!(if *own == *"e7" { now_owned != own } else { now_owned == own }, "{algorithm:?}");
        }
    }
}

#[test]
fn a_new_endpoint_starts_slowly() {
    let slow_start = Duration::from_secs(100);
    let policy = || balancing(LoadBalancer { slow_start, ..LoadBalancer::default() });
    let mut balancer = balancer(&with_policy(healthy(1), policy()));
    let now = Instant::now();
    assert_eq!(balancer.slots[0].weight(now, slow_start), 400, "it was there before");
    balancer.update(&with_policy(healthy(2), policy()));
    for (after, of_11_000) in [(0, 1000), (10, 1000), (50, 3667), (100, 5500), (900, 5500)] {
        let now = now + Duration::from_secs(after);
        let mut rng = fastrand::Rng::with_seed(3);
        let new = (0..11_000).filter_map(|_| balancer.pick(PORT, now, &mut rng, &[], None).endpoint());
        let new = new.filter(|picked| &*picked.endpoint.id == "e2").count();
        assert!(new.abs_diff(of_11_000) < 250, "after {after} s: {new}");
    }
}

fn in_zones(zones: impl IntoIterator<Item = &'static str>) -> Vec<Endpoint> {
    let place =
        |(number, zone): (u8, &str)| Endpoint { zone: zone.into(), ..endpoint(number, 1, Health::Healthy) };
    (1..).zip(zones).map(place).collect()
}

fn zonal() -> Traffic {
    let load_balancer = LoadBalancer { zone_percent: 75, ..LoadBalancer::default() };
    balancing(load_balancer)
}

#[test]
fn the_own_zone_takes_all_until_too_little_of_it_stands() {
    let zones = ["a", "a", "a", "a", "b", "b"];
    let share = |unhealthy: usize, own: &str| {
        let mut endpoints = in_zones(zones);
        endpoints[..unhealthy].iter_mut().for_each(|endpoint| endpoint.health = Health::Unhealthy);
        let mut balancer = Balancer::new("me", MAX_ENDPOINTS, live()).in_zone(own.into());
        balancer.update(&with_policy(endpoints, zonal()));
        let taken = shares(&mut balancer, Instant::now());
        taken.iter().filter(|(id, _)| ["e1", "e2", "e3", "e4"].contains(&&***id)).map(|(_, n)| n).sum::<u32>()
    };
    assert_eq!(share(0, "a"), 10_000);
    assert_eq!(share(1, "a"), 10_000, "three quarters stand");
    assert!(share(2, "a").abs_diff(6667) < 200, "two of the three that it takes");
    assert!(share(3, "a").abs_diff(3333) < 200);
    assert_eq!(share(4, "a"), 0);
    assert_eq!(share(0, "b"), 0);
    assert!(share(0, "c").abs_diff(6667) < 200, "nobody's zone");
    assert!(share(0, "").abs_diff(6667) < 200, "not known");
}

#[test]
fn a_subset_is_of_the_own_zone_but_for_a_quarter() {
    let endpoints = in_zones((0..80).map(|n| if n % 2 == 0 { "a" } else { "b" }));
    let mut balancer = Balancer::new("me", 8, live()).in_zone("a".into());
    balancer.update(&with_policy(endpoints, zonal()));
    let key = balancer.on_port(PORT);
    let subset = &balancer.on_ports[&key].subset;
    let own = subset.iter().filter(|at| balancer.is_in_own_zone(**at)).count();
    assert_eq!((subset.len(), own), (8, 6));
}

/// Who stands, who may be tried, who is ejected.
fn standing(balancer: &Balancer, now: Millis) -> BTreeMap<String, Standing> {
    let on_port = &balancer.on_ports[&PORT];
    let of = |at: &usize| {
        let circuit = on_port.circuits[*at].as_ref().unwrap();
        (balancer.slots[*at].endpoint.id.to_string(), circuit.standing(now))
    };
    on_port.serving.iter().map(of).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn nobody_ejected_is_picked_while_another_one_stands(
        steps in prop::collection::vec((0_u8..2, 0_u8..8, 0_u64..700, 0_u8..4), 1..400),
        count in 1_u8..12, max_endpoints in 1_usize..12, percent in 0_u32..=100, seed: u64,
        algorithm in prop::sample::select(vec![
            Algorithm::PeakEwma, Algorithm::LeastRequest, Algorithm::RoundRobin, Algorithm::Random, Algorithm::Maglev,
        ]),
    ) {
        let breaker = Breaker { consecutive: 2, max_ejected_percent: percent, ..Breaker::default() };
        let policy = Traffic { breaker: Some(breaker), ..by(algorithm) };
        let (service, live) = (with_policy(healthy(count), policy), live());
        let mut now = Instant::now();
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut threads = [(); 2].map(|()| Balancer::new("me", max_endpoints, Arc::clone(&live)));
        for (thread, outcome, wait, tried) in steps {
            now += Duration::from_millis(wait.saturating_sub(600) * 10);
            let balancer = &mut threads[usize::from(thread)];
            balancer.update(&service);
            balancer.on_port(PORT);
            let exclude: Vec<Arc<str>> = (1..tried).map(|n| format!("e{n}").into()).collect();
            let before = standing(balancer, live.millis(now));
            let dead = healthy(count).all(|endpoint| is_dead(balancer, &endpoint.id));
            let picked = match balancer.pick(PORT, now, &mut rng, &exclude, Some(u64::from(outcome) << 60)) {
                Pick::Endpoint(picked) => picked,
                Pick::AllFailing => {
                    prop_assert!(dead);
                    continue;
                }
                Pick::NoEndpoints => {
                    prop_assert!(exclude.len() >= before.len());
                    continue;
                }
            };
            let may = |id: &str, standing: Standing| {
                standing == Standing::Stands && !exclude.iter().any(|tried| **tried == *id)
            };
            if before[&*picked.endpoint.id] == Standing::Ejected && !dead {
                prop_assert!(!before.iter().any(|(id, standing)| may(id, *standing)), "{before:?}");
            }
            let token = balancer.start(&picked);
            let outcome = match (outcome + u8::from(&*picked.endpoint.id == "e1")) % 5 {
                0 | 1 => Outcome::Success { rtt: MS },
                2 => Outcome::Error,
                3 => Outcome::Abandoned { waited: MS },
                _ => Outcome::Failure,
            };
            balancer.finish(token, outcome, now);
            let ejected = standing(balancer, 0).values().filter(|standing| **standing != Standing::Stands).count();
            prop_assert_eq!(ejected as u64, live.ejected());
            prop_assert!(ejected * 100 <= usize::from(count) * percent as usize && ejected < usize::from(count));
        }
    }
}
