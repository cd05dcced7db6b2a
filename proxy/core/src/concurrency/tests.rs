use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    thread,
};

use super::*;

fn concurrency(max_requests: u32, adaptive: bool, now: Instant) -> Arc<Concurrency> {
    let wire =
        v1::Concurrency { max_requests, adaptive, origin: "Concurrency a/b".into(), ..Default::default() };
    Arc::new(Concurrency::from_wire(&wire, now).unwrap())
}

#[test]
fn no_more_than_the_bound_is_under_way() {
    let now = Instant::now();
    let fixed = concurrency(2, false, now);
    let first = fixed.enter(now).unwrap();
    let second = fixed.enter(now).unwrap();
    assert!(fixed.enter(now).is_none());
    first.done(now, true);
    let third = fixed.enter(now).unwrap();
    assert!(fixed.enter(now).is_none());
    drop((second, third));
    assert_eq!((fixed.in_flight(), fixed.bound()), (0, 2));
    let none = concurrency(0, false, now);
    let all: Vec<_> = (0..1_000).map(|_| none.enter(now).unwrap()).collect();
    assert_eq!(none.in_flight(), 1_000);
    drop(all);
}

#[test]
fn threads_keep_to_the_bound_together() {
    let now = Instant::now();
    let fixed = concurrency(3, false, now);
    let inside = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5_000 {
                    if let Some(permit) = fixed.enter(now) {
                        assert!(inside.fetch_add(1, Relaxed) < 3);
                        inside.fetch_sub(1, Relaxed);
                        permit.done(now, true);
                    }
                }
            });
        }
    });
    assert_eq!(fixed.in_flight(), 0);
}

#[test]
fn it_is_about_its_ports_and_survives_a_push_that_changes_nothing() {
    let now = Instant::now();
    let wire = v1::Concurrency { ports: vec![80], max_requests: 1, ..Default::default() };
    let made = |wire: &v1::Concurrency| Concurrency::from_wire(wire, now).unwrap();
    let old = Arc::new(made(&wire));
    assert!(old.is_about(80) && !old.is_about(81));
    let permit = old.enter(now);
    assert!(made(&wire).adopt(&old).enter(now).is_none());
    assert!(made(&v1::Concurrency { max_requests: 2, ..wire }).adopt(&old).enter(now).is_some());
    drop(permit);
    assert!(Concurrency::from_wire(&v1::Concurrency { ports: vec![0], ..Default::default() }, now).is_err());
}

/// A workload that does `workers` requests at once, each in the order in which they came.
struct Workload {
    workers: usize,
    busy: usize,
    waiting: VecDeque<(Permit, u64)>,
    /// Ends, in microseconds, with the places of what ends.
    ends: BinaryHeap<Reverse<(u64, usize)>>,
    under_way: Vec<Option<(Permit, u64)>>,
    rng: fastrand::Rng,
}

/// How the time that one request takes is drawn.
#[derive(Debug, Clone, Copy)]
enum Time {
    Fixed,
    Exponential,
    /// One in ten takes forty times as long as the others.
    Mixed,
}

impl Workload {
    fn time(&mut self, mean: u64, time: Time) -> u64 {
        match time {
            Time::Fixed => mean,
            Time::Exponential => exponential(mean, &mut self.rng),
            Time::Mixed if self.rng.u32(..10) == 0 => mean * 400 / 49,
            Time::Mixed => mean * 10 / 49,
        }
    }

    fn begin(&mut self, permit: Permit, came: u64, now: u64, mean: u64, time: Time) {
        if self.busy == self.workers {
            self.waiting.push_back((permit, came));
            return;
        }
        self.busy += 1;
        let end = now + self.time(mean, time);
        let place = self.under_way.iter().position(Option::is_none).unwrap_or(self.under_way.len());
        if place == self.under_way.len() {
            self.under_way.push(None);
        }
        self.under_way[place] = Some((permit, came));
        self.ends.push(Reverse((end, place)));
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "microseconds"
)]
fn exponential(mean: u64, rng: &mut fastrand::Rng) -> u64 {
    (-(1.0 - rng.f64()).ln() * mean as f64) as u64
}

struct Case {
    workers: usize,
    time: Time,
    /// Of what the workload can do, in percent.
    load: u64,
    seconds: u64,
    /// The mean time of one request in microseconds, at each second.
    mean: fn(u64) -> u64,
    max: u32,
}

/// What came of it, second by second.
#[derive(Debug, Default, Clone, Copy)]
struct Second {
    offered: u64,
    good: u64,
    refused: u64,
}

/// An answer that comes later is of no use to anybody, in means of the time that a request takes.
const USEFUL: u64 = 10;

fn simulate(case: &Case) -> (Vec<Second>, Arc<Concurrency>) {
    let began = Instant::now();
    let at = |micros: u64| began + Duration::from_micros(micros);
    let concurrency = concurrency(case.max, true, began);
    let mut rng = fastrand::Rng::with_seed(7);
    let mut workload = Workload {
        workers: case.workers,
        busy: 0,
        waiting: VecDeque::new(),
        ends: BinaryHeap::new(),
        under_way: Vec::new(),
        rng: fastrand::Rng::with_seed(11),
    };
    let mut seconds = vec![Second::default(); usize::try_from(case.seconds).unwrap()];
    let mut next = 0;
    while next < case.seconds * 1_000_000 {
        let end = workload.ends.peek().map(|Reverse((end, _))| *end);
        if let Some(now) = end.filter(|end| *end <= next) {
            let Some(Reverse((_, place))) = workload.ends.pop() else { break };
            let (permit, came) = workload.under_way[place].take().unwrap();
            let second = usize::try_from(now / 1_000_000).unwrap();
            let mean = (case.mean)(now / 1_000_000);
            seconds[second].good += u64::from(now - came <= USEFUL * mean);
            permit.done(at(now), true);
            workload.busy -= 1;
            if let Some((permit, came)) = workload.waiting.pop_front() {
                workload.begin(permit, came, now, mean, case.time);
            }
            continue;
        }
        let mean = (case.mean)(next / 1_000_000);
        let second = usize::try_from(next / 1_000_000).unwrap();
        seconds[second].offered += 1;
        match concurrency.enter(at(next)) {
            Some(permit) => workload.begin(permit, next, next, mean, case.time),
            None => seconds[second].refused += 1,
        }
        let gap = mean * 100_000 / (u64::try_from(case.workers).unwrap() * case.load);
        next += exponential(gap, &mut rng) / 1_000;
        next += u64::from(rng.u64(..1_000) < gap % 1_000);
    }
    (seconds, concurrency)
}

const TEN_MS: fn(u64) -> u64 = |_| 10_000;

#[test]
fn under_overload_the_workload_does_nearly_all_that_it_can() {
    for time in [Time::Fixed, Time::Exponential, Time::Mixed] {
        for workers in [2, 10, 60] {
            for max in [0, 1_000] {
                let (seconds, concurrency) =
                    simulate(&Case { workers, time, load: 300, seconds: 30, mean: TEN_MS, max });
                let peak = u64::try_from(workers).unwrap() * 100;
                let good: u64 = seconds[2..].iter().map(|second| second.good).sum::<u64>() / 28;
                let case = format!("{time:?} {workers} workers, at most {max}");
                assert!(
                    good * 100 >= peak * 80,
                    "{case}: {good} of {peak} a second, bound {}",
                    concurrency.bound()
                );
            }
        }
    }
}

#[test]
fn what_the_workload_can_do_is_not_refused() {
    for time in [Time::Fixed, Time::Exponential, Time::Mixed] {
        for workers in [10, 60] {
            let (seconds, concurrency) =
                simulate(&Case { workers, time, load: 60, seconds: 30, mean: TEN_MS, max: 0 });
            let refused: u64 = seconds.iter().map(|second| second.refused).sum();
            let offered: u64 = seconds.iter().map(|second| second.offered).sum();
            assert!(
                refused * 1_000 <= offered,
                "{time:?} {workers}: {refused} of {offered}, bound {}",
                concurrency.bound()
            );
        }
    }
}

#[test]
fn a_workload_that_comes_to_be_slower_is_followed() {
    let mean: fn(u64) -> u64 = |second| if second < 20 { 10_000 } else { 40_000 };
    let (seconds, _) =
        simulate(&Case { workers: 10, time: Time::Exponential, load: 300, seconds: 60, mean, max: 0 });
    let good: u64 = seconds[40..].iter().map(|second| second.good).sum::<u64>() / 20;
    assert!(good >= 200, "{good} of 250 a second");
}

#[test]
fn a_fast_failure_says_nothing_and_a_slow_one_does() {
    let began = Instant::now();
    let ask = |concurrency: &Arc<Concurrency>, ms: u64, took: u64, success: bool| {
        let now = began + Duration::from_millis(ms);
        // The bound is in use all the time.
        let others: Vec<_> = (1..concurrency.bound()).map_while(|_| concurrency.enter(now)).collect();
        if let Some(permit) = concurrency.enter(now) {
            permit.done(now + Duration::from_millis(took), success);
        }
        drop(others);
    };
    let bound_after = |took, success| {
        let concurrency = concurrency(0, true, began);
        (0..100).for_each(|at| ask(&concurrency, at * 10, 10, true));
        let before = concurrency.bound();
        (100..300).for_each(|at| ask(&concurrency, at * 10, took, success));
        (before, concurrency.bound())
    };
    let (before, after) = bound_after(0, false);
    assert_eq!(before, after, "neither up nor down");
    let (before, after) = bound_after(200, false);
    assert!(after < before / 2, "{before} {after}");
}

#[test]
fn bounds_stay_in_their_bounds() {
    for base in [1, 1_000, u64::MAX / 2] {
        for seen in [1, 1_000, u64::MAX / 2] {
            for bound in [1_000, 50_000, u64::from(MAX_ADAPTIVE) * 1_000, u64::from(u32::MAX) * 1_000] {
                let next = next_bound(bound, base, seen, true);
                assert!(
                    next >= bound / 2 && next <= bound + (bound * 1_000).isqrt(),
                    "{base} {seen} {bound} {next}"
                );
            }
        }
    }
    let now = Instant::now();
    let small = concurrency(3, true, now);
    for at in 0..500 {
        let now = now + Duration::from_millis(at * 10);
        let all: Vec<_> = (0..4).filter_map(|_| small.enter(now)).collect();
        assert!((1..=3).contains(&all.len()));
        for permit in all {
            permit.done(now + Duration::from_millis(1), true);
        }
    }
}

#[test]
fn a_probe_that_nobody_answers_ends() {
    let began = Instant::now();
    let at = |ms: u64| began + Duration::from_millis(ms);
    let concurrency = concurrency(40, true, began);
    let mut ms = 0;
    while concurrency.bound() > PROBE_MIN {
        let all: Vec<_> = (0..60).filter_map(|_| concurrency.enter(at(ms))).collect();
        ms += 10;
        assert!(ms < 10_000, "a probe begins soon");
        for permit in all {
            permit.done(at(ms), true);
        }
    }
    let stuck: Vec<_> = (0..60).map_while(|_| concurrency.enter(at(ms))).collect();
    assert!(concurrency.enter(at(ms + 500)).is_none());
    assert!(concurrency.enter(at(ms + 2_000)).is_none());
    assert!(concurrency.enter(at(ms + 2_001)).is_some());
    drop(stuck);
}
