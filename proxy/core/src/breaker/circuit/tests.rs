use proptest::prelude::*;

use super::*;

const OK: Signal = Signal::Success(Duration::from_millis(1));
const SECOND: Millis = 1000;

fn group(breaker: Breaker, total: usize) -> (Group, Vec<Circuit>) {
    let group = Group::new(breaker, Arc::default());
    group.resize(total);
    (group, (0..total).map(|_| Circuit::new(IpAddr::from([10, 0, 0, 1]))).collect())
}

fn fails(circuit: &Circuit, group: &Group, times: u32, now: Millis) {
    for _ in 0..times {
        circuit.record(group, Signal::Silence, false, now, 0);
    }
}

#[test]
fn failures_in_a_row_eject_and_a_trial_takes_back() {
    let (group, circuits) = group(Breaker::default(), 2);
    let [one, _] = &circuits[..] else { unreachable!() };
    fails(one, &group, 4, 0);
    one.record(&group, OK, false, 0, 0);
    fails(one, &group, 4, 0);
    assert_eq!((one.standing(0), group.ejected()), (Standing::Stands, 0), "never five in a row");
    fails(one, &group, 1, 0);
    assert_eq!((one.standing(499), group.ejected()), (Standing::Ejected, 1));
    assert_eq!(one.standing(500), Standing::MayTry);
    one.record(&group, OK, false, 500, 0);
    assert_eq!(one.standing(500), Standing::MayTry, "a request from before says nothing");
    assert!(one.begins_trial(&group, 500, false));
    assert!(!one.begins_trial(&group, 500, false), "one at a time");
    assert_eq!(one.standing(500), Standing::Ejected);
    one.record(&group, Signal::Error, true, 500, u64::MAX);
    assert_eq!(one.standing(500 + SECOND), Standing::Ejected, "for twice as long");
    assert_eq!(one.standing(500 + 2 * SECOND), Standing::MayTry);
    assert!(one.begins_trial(&group, 2500, false));
    one.gives_trial_back(&group, 2501);
    assert!(!one.begins_trial(&group, 3000, false), "not at once");
    assert!(one.begins_trial(&group, 3001, false), "the first had no result");
    one.record(&group, OK, true, 3001, 0);
    assert_eq!((one.standing(3001), group.ejected()), (Standing::Stands, 0));
    fails(one, &group, 5, 3100);
    assert_eq!(one.standing(3600), Standing::MayTry, "a new row");
    let counted = group.ejections.each_ref().map(|count| count.load(Ordering::Relaxed));
    assert_eq!(counted, [2, 0, 1]);
}

#[test]
fn ejections_double_up_to_the_longest() {
    let (group, circuits) = group(Breaker::default(), 2);
    let mut now = 0;
    fails(&circuits[0], &group, 5, now);
    for round in 0..12 {
        let whole = (1000 << round).min(30_000);
        let until = circuits[0].ejected_until().unwrap();
        assert_eq!(until - now, whole / 2, "round {round}");
        now = until;
        assert!(circuits[0].begins_trial(&group, now, false));
        circuits[0].record(&group, Signal::Silence, true, now, 0);
    }
    assert!(circuits[0].begins_trial(&group, now, true), "before its time");
    circuits[0].record(&group, Signal::Silence, true, now, u64::MAX);
    let until = circuits[0].ejected_until().unwrap() - now;
    assert!((15_000..=30_000).contains(&until));
}

#[test]
fn too_few_successes_in_the_window_eject() {
    let breaker = Breaker {
        consecutive: 0,
        success_percent: 60,
        min_requests: 10,
        slow: Some(Duration::from_millis(100)),
        ..Breaker::default()
    };
    let (group, circuits) = group(breaker, 2);
    let slow = Signal::Success(Duration::from_millis(101));
    for n in 0..9 {
        circuits[0].record(&group, if n % 2 == 0 { OK } else { slow }, false, 0, 0);
    }
    assert_eq!(circuits[0].standing(0), Standing::Stands, "too few to tell");
    circuits[0].record(&group, OK, false, 0, 0);
    circuits[0].record(&group, OK, false, 0, 0);
    assert_eq!(circuits[0].standing(0), Standing::Stands, "7 of 11");
    fails(&circuits[0], &group, 1, 0);
    assert_eq!(circuits[0].standing(0), Standing::Ejected, "7 of 12");
    assert!(circuits[0].begins_trial(&group, SECOND, false));
    circuits[0].record(&group, OK, true, SECOND, 0);
    fails(&circuits[0], &group, 3, SECOND);
    assert_eq!(circuits[0].standing(SECOND), Standing::Stands, "what was before the ejection is forgotten");
}

#[test]
fn the_cap_holds_and_says_so() {
    for (total, percent, most) in
        [(1, 50, 0), (1, 100, 0), (2, 50, 1), (3, 50, 1), (4, 50, 2), (10, 15, 1), (4, 100, 3), (4, 0, 0)]
    {
        let (group, circuits) = group(Breaker { max_ejected_percent: percent, ..Breaker::default() }, total);
        for circuit in &circuits {
            fails(circuit, &group, 5, 0);
        }
        assert_eq!(group.ejected(), most, "{percent} percent of {total}");
        assert!(group.is_panicking());
        assert!(circuits.iter().all(|circuit| circuit.is_dead(&group)));
        for circuit in &circuits {
            circuit.record(&group, OK, false, 0, 0);
        }
        assert!(!group.is_panicking(), "{percent} percent of {total}");
    }
}

#[test]
fn who_answers_is_not_dead() {
    let (group, circuits) = group(Breaker::default(), 1);
    fails(&circuits[0], &group, 5, 0);
    assert!(circuits[0].is_dead(&group));
    circuits[0].record(&group, Signal::Error, false, 0, 0);
    assert!(!circuits[0].is_dead(&group));
}

#[test]
fn all_that_fail_take_turns() {
    let (group, _) = group(Breaker::default(), 3);
    let tried: Vec<_> = (0..1000).filter_map(|now| group.takes_turn(3, now)).collect();
    assert_eq!(tried, [0, 1, 2, 0, 1, 2, 0], "each twice a second");
    let most = (2000..3000).filter_map(|now| group.takes_turn(10_000, now)).count();
    assert_eq!(most, 50, "of any number");
}

#[test]
fn who_leaves_takes_its_place_along() {
    let (group, circuits) = group(Breaker::default(), 4);
    for circuit in &circuits[..3] {
        fails(circuit, &group, 5, 0);
    }
    assert_eq!((group.ejected(), group.is_panicking()), (2, true));
    circuits[2].leave(&group);
    assert!(!group.is_panicking());
    circuits[0].leave(&group);
    assert_eq!((group.ejected(), group.resize(2)), (1, 0));
    fails(&circuits[0], &group, 9, 0);
    assert_eq!(group.ejected(), 1, "it is gone");
    assert_eq!(group.resize(1), 1);
    circuits[1].reinstate(&group);
    assert_eq!((group.ejected(), circuits[1].standing(0)), (0, Standing::Stands));
}

#[test]
fn threads_together_keep_the_cap() {
    for threads in [1, 2, 4_u64] {
        let breaker = Breaker { consecutive: 2, max_ejected_percent: 30, ..Breaker::default() };
        let (group, circuits) = group(breaker, 10);
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (group, circuits) = (&group, &circuits);
                scope.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(thread);
                    for now in 0..20_000 {
                        let circuit = &circuits[rng.usize(0..10)];
                        let is_trial = circuit.begins_trial(group, now, false);
                        let signal = if rng.u8(0..3) == 0 { OK } else { Signal::Silence };
                        circuit.record(group, signal, is_trial, now, rng.u64(..));
                        assert!(group.ejected() <= 3);
                    }
                });
            }
        });
        let ejected = circuits.iter().filter(|circuit| circuit.ejected_until().is_some()).count();
        assert_eq!(ejected as u64, group.ejected());
        let withheld = circuits.iter().filter(|circuit| circuit.state().withheld).count();
        assert_eq!(withheld, group.withheld.load(Ordering::Relaxed) as usize);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Record(usize, u8),
    Try(usize),
    Leave(usize),
    Wait(u16),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0_usize..12, 0_u8..4).prop_map(|(at, signal)| Step::Record(at, signal)),
        3 => (0_usize..12).prop_map(Step::Try),
        1 => (0_usize..12).prop_map(Step::Leave),
        1 => (0_u16..3000).prop_map(Step::Wait),
    ]
}

proptest! {
    #[test]
    fn counts_are_right_and_never_above_the_cap(
        steps in prop::collection::vec(any_step(), 1..300), total in 1_usize..12, percent in 0_u32..=100, success in 0_u32..=100,
    ) {
        let breaker = Breaker {
            consecutive: 2,
            success_percent: success,
            min_requests: 4,
            max_ejected_percent: percent,
            ..Breaker::default()
        };
        let (group, mut circuits) = group(breaker, total);
        let mut now = 0;
        for step in steps {
            let place = |at: usize| at % circuits.len();
            match step {
                Step::Record(at, signal) => {
                    let signal = [OK, OK, Signal::Error, Signal::Silence][usize::from(signal)];
                    circuits[place(at)].record(&group, signal, false, now, u64::from(signal == OK) * 77);
                }
                Step::Try(at) => {
                    let circuit = &circuits[place(at)];
                    if circuit.begins_trial(&group, now, false) {
                        circuit.record(&group, if at % 2 == 0 { OK } else { Signal::Error }, true, now, 5);
                    }
                }
                Step::Leave(at) if circuits.len() > 1 => {
                    circuits.swap_remove(place(at)).leave(&group);
                    for _ in 0..group.resize(circuits.len()) {
                        let first = circuits.iter().filter(|circuit| circuit.ejected_until().is_some());
                        first.min_by_key(|circuit| circuit.ejected_until()).unwrap().reinstate(&group);
                    }
                }
                Step::Leave(_) => {}
                Step::Wait(wait) => now += u64::from(wait),
            }
            let ejected = circuits.iter().filter(|circuit| circuit.ejected_until().is_some()).count();
            prop_assert_eq!(ejected as u64, group.ejected());
            prop_assert!(ejected < circuits.len() && ejected * 100 <= circuits.len() * percent as usize);
            let withheld = circuits.iter().any(|circuit| circuit.state().withheld);
            prop_assert_eq!(withheld, group.is_panicking());
        }
    }

    #[test]
    fn a_state_is_what_was_packed(
        kind in 0_u64..4, silent: bool, withheld: bool, row in 0..=MAX_ROW, consecutive in 0..=MAX_CONSECUTIVE, until in 0_u64..1 << 43,
    ) {
        let state = State { kind: State::unpack(kind).kind, silent, withheld, row, consecutive, until };
        prop_assert_eq!(State::unpack(state.pack()), state);
    }
}
