use proptest::prelude::*;

use super::*;
use crate::request::Request;

const MS: Duration = Duration::from_millis(1);

fn policy() -> Retry {
    Retry {
        attempts: 2,
        statuses: vec![503],
        grpc_codes: vec![14],
        reset: true,
        per_try_timeout: true,
        ..Retry::default()
    }
}

fn tried() -> Tried {
    Tried {
        retries: 0,
        is_safe: true,
        is_repeatable: true,
        is_answered: false,
        callers_attempt: 0,
        left: None,
    }
}

fn status(status: u16) -> Failure {
    Failure::Status { status, retry_after: None }
}

fn grpc(code: u8, status: u16) -> Failure {
    Failure::Grpc { code, status, retry_after: None }
}

fn decide(retry: &Retry, failure: Failure, tried: Tried) -> Verdict {
    retry.decide(&failure, &tried, &mut fastrand::Rng::with_seed(1))
}

#[test]
fn what_stands_against_another_try() {
    let asks = |retry_after| Failure::Status { status: 503, retry_after: Some(retry_after) };
    for (failure, tried, expected) in [
        (status(503), tried(), None),
        (status(502), tried(), Some(Why::NotNamed)),
        (grpc(14, 200), tried(), None),
        (grpc(14, 503), tried(), None),
        (grpc(2, 503), tried(), None),
        (grpc(2, 500), tried(), Some(Why::NotNamed)),
        (Failure::Reset, tried(), None),
        (Failure::PerTryTimeout, tried(), None),
        (Failure::NothingHappened, tried(), None),
        (status(503), Tried { retries: 1, ..tried() }, None),
        (status(503), Tried { retries: 2, ..tried() }, Some(Why::Attempts)),
        (Failure::NothingHappened, Tried { retries: 2, ..tried() }, Some(Why::Attempts)),
        (status(503), Tried { is_safe: false, ..tried() }, Some(Why::Unsafe)),
        // To name the status was the policy's word for it.
        (grpc(14, 200), Tried { is_safe: false, ..tried() }, None),
        (grpc(14, 503), Tried { is_safe: false, ..tried() }, Some(Why::Unsafe)),
        (Failure::Reset, Tried { is_safe: false, ..tried() }, Some(Why::Unsafe)),
        (Failure::NothingHappened, Tried { is_safe: false, ..tried() }, None),
        (status(503), Tried { is_repeatable: false, ..tried() }, Some(Why::Body)),
        (Failure::NothingHappened, Tried { is_repeatable: false, ..tried() }, Some(Why::Body)),
        (status(503), Tried { is_answered: true, ..tried() }, Some(Why::Answered)),
        (status(503), Tried { callers_attempt: 1, ..tried() }, Some(Why::CallersRetry)),
        (Failure::NothingHappened, Tried { callers_attempt: 1, ..tried() }, None),
        (status(503), Tried { left: Some(10 * MS), ..tried() }, Some(Why::Deadline)),
        (status(503), Tried { left: Some(26 * MS), ..tried() }, None),
        (asks(Duration::from_secs(1)), tried(), Some(Why::RetryAfter)),
        (asks(Duration::MAX), tried(), Some(Why::RetryAfter)),
        (asks(250 * MS), tried(), None),
        (asks(200 * MS), Tried { left: Some(200 * MS), ..tried() }, Some(Why::Deadline)),
    ] {
        let why = match decide(&policy(), failure, tried) {
            Verdict::Again { .. } => None,
            Verdict::No(why) => Some(why),
        };
        assert_eq!(why, expected, "{failure:?} {tried:?}");
    }
    let unsafe_too = Retry { unsafe_methods: true, ..policy() };
    let verdict = decide(&unsafe_too, status(503), Tried { is_safe: false, ..tried() });
    assert!(matches!(verdict, Verdict::Again { .. }));
    assert_eq!(decide(&Retry::default(), status(503), tried()), Verdict::No(Why::NotNamed));
}

#[test]
fn a_pause_that_is_asked_for_is_made() {
    let asks = Failure::Status { status: 503, retry_after: Some(200 * MS) };
    assert_eq!(decide(&policy(), asks, tried()), Verdict::Again { after: 200 * MS });
}

proptest! {
    #[test]
    fn pauses_double_from_half_to_the_whole_and_are_bounded(retries in 0_u32..100, seed: u64) {
        let retry = Retry { attempts: u32::MAX, ..policy() };
        let verdict = retry.decide(&Failure::Reset, &Tried { retries, ..tried() }, &mut fastrand::Rng::with_seed(seed));
        let whole = retry.backoff.saturating_mul(1 << retries.min(20)).min(retry.max_backoff);
        let Verdict::Again { after } = verdict else { panic!("{verdict:?}") };
        prop_assert!(after >= whole / 2 && after <= whole, "{after:?}");
    }

    #[test]
    fn any_field_is_read_without_a_panic(is_grpc: bool, status: u16, value: Vec<u8>) {
        let _ = failure(is_grpc, status, |_| Some(&*value));
    }
}

#[test]
fn what_is_safe_to_repeat() {
    for (request, safe) in [
        (Request::new("GET", "/"), true),
        (Request::new("DELETE", "/"), true),
        (Request::new("get", "/"), false),
        (Request::new("POST", "/"), false),
        (Request::new("PATCH", "/"), false),
        (Request::new("POST", "/").with("idempotency-key", "k"), true),
        (Request::new("POST", "/a.B/C").with("content-type", "application/grpc"), false),
    ] {
        assert_eq!(is_safe_to_repeat(&request), safe, "{request:?}");
    }
}

#[test]
fn an_attempt_is_said_and_heard() {
    let mut marked = Request::new("GET", "/");
    mark_attempt(0, |name, value| marked = Request::new("GET", "/").with(name, value));
    assert_eq!(attempt_of(&marked), 0);
    mark_attempt(3, |name, value| marked = Request::new("GET", "/").with(name, value));
    assert_eq!(attempt_of(&marked), 3);
    let said = |value: &str| attempt_of(&Request::new("GET", "/").with("grpc-previous-rpc-attempts", value));
    assert_eq!((said("2"), said("x"), said("-1"), said("99999999999")), (2, 0, 0, u32::MAX));
    let twice = Request::new("GET", "/").with(ATTEMPT_HEADER, "1").with(ATTEMPT_HEADER, "4");
    assert_eq!(attempt_of(&twice), 4);
}

#[test]
fn what_a_status_says() {
    let of = |is_grpc, http, grpc_status: Option<&'static str>| {
        failure(is_grpc, http, |name| grpc_status.filter(|_| name == "grpc-status").map(str::as_bytes))
    };
    for (found, expected, is_endpoints_fault) in [
        (of(false, 200, None), None, false),
        (of(false, 302, None), None, false),
        (of(false, 404, None), Some(status(404)), false),
        (of(false, 429, None), Some(status(429)), false),
        (of(false, 500, None), Some(status(500)), true),
        (of(false, 200, Some("14")), None, false),
        (of(true, 200, None), None, false),
        (of(true, 200, Some("0")), None, false),
        (of(true, 200, Some("14")), Some(grpc(14, 200)), true),
        (of(true, 200, Some("5")), Some(grpc(5, 200)), false),
        (of(true, 200, Some("17")), Some(grpc(2, 200)), true),
        (of(true, 200, Some("999")), Some(grpc(2, 200)), true),
        (of(true, 200, Some("")), Some(grpc(2, 200)), true),
        (of(true, 503, None), Some(grpc(14, 503)), true),
        (of(true, 429, None), Some(grpc(14, 429)), false),
        (of(true, 500, None), Some(grpc(2, 500)), true),
    ] {
        assert_eq!(found, expected);
        assert_eq!(
            found.is_some_and(|failure| failure.is_the_endpoints_fault()),
            is_endpoints_fault,
            "{found:?}"
        );
    }
}

#[test]
fn a_policy_that_cannot_be_meant_is_refused() {
    let wire = v1::Retry {
        attempts: 3,
        statuses: vec![502, 503],
        grpc_codes: vec![14],
        backoff: 100,
        max_backoff: 50,
        budget_percent: 20,
        ..v1::Retry::default()
    };
    let retry = Retry::from_wire(&wire).unwrap();
    assert_eq!((&*retry.statuses, &*retry.grpc_codes), (&[502, 503][..], &[14][..]));
    assert_eq!(retry.max_backoff, 100 * MS, "never less than the first pause");
    for bad in [
        v1::Retry { attempts: 101, ..wire.clone() },
        v1::Retry { statuses: vec![200], ..wire.clone() },
        v1::Retry { statuses: vec![65_536 + 503], ..wire.clone() },
        v1::Retry { grpc_codes: vec![0], ..wire.clone() },
        v1::Retry { grpc_codes: vec![256 + 14], ..wire.clone() },
        v1::Retry { budget_percent: 101, ..wire.clone() },
        v1::Retry { max_body: u32::MAX, ..wire },
    ] {
        assert!(Retry::from_wire(&bad).is_err(), "{bad:?}");
    }
}
