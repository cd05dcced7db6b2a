//! The watch against a misbehaving Consul, with the clock stopped: waits of minutes take no time, and each deadline
//! is exact.

use std::{collections::BTreeSet, future::Future};

use serde_json::Value;

use super::*;
use crate::{
    ClientConfig, Instances, KvOperation, KvOutcome, Token,
    fake::{FakeConsul, Fault, entry},
};

type Web = watch::Receiver<State<InstanceId, Instance>>;

/// A fake with the service `web` of instances `a` and `b`, a client and a synced watch of `web`.
async fn synced() -> (FakeConsul, Client, Watch<InstanceId, Instance>, Web) {
    let fake = FakeConsul::new();
    set_web(&fake, &["a", "b"]);
    let client = fake.client(&config());
    let watch = client.watch_health("web", &HealthQuery::default()).unwrap();
    let mut states = watch.states();
    until(&mut states, |state| state.status.is_synced()).await;
    assert_eq!(ids(&states), ["a", "b"]);
    (fake, client, watch, states)
}

fn config() -> ClientConfig {
    ClientConfig::new(vec!["10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()])
}

fn set_web(fake: &FakeConsul, ids: &[&str]) {
    fake.change(|world| world.services.insert("web".into(), web(ids)));
}

fn web(ids: &[&str]) -> Vec<Value> {
    ids.iter().enumerate().map(|(i, id)| entry("web", id, &format!("10.1.0.{}", i + 1), "passing")).collect()
}

fn ids(states: &Web) -> Vec<String> {
    let state = states.borrow();
    state.value.iter().flat_map(|value| value.keys()).map(|id| id.service_id.clone()).collect()
}

/// Waits (an hour of the stopped clock at most) for a state.
async fn until(states: &mut Web, condition: impl FnMut(&State<InstanceId, Instance>) -> bool) {
    within(3600, states.wait_for(condition)).await.unwrap();
}

async fn within<F: Future>(seconds: u64, future: F) -> F::Output {
    let limit = Duration::from_secs(seconds);
    let started = Instant::now();
    tokio::time::timeout(limit, future).await.unwrap_or_else(|_| panic!("not within {:?}", started.elapsed()))
}

fn unavailable(status: &Status) -> bool {
    matches!(status, Status::Degraded(Reason::Unavailable(_)))
}

fn unauthorized(status: &Status) -> bool {
    matches!(status, Status::Degraded(Reason::Unauthorized(_)))
}

#[tokio::test(start_paused = true)]
async fn a_change_arrives_at_once_and_equal_values_are_not_news() {
    let (fake, _client, _watch, mut states) = synced().await;
    let before = Instant::now();
    set_web(&fake, &["a", "b", "c"]);
    until(&mut states, |state| state.value.as_ref().unwrap().len() == 3).await;
    assert!(before.elapsed() < Duration::from_millis(200));
    // The same again with other check output: the query returns, nobody is told.
    states.mark_unchanged();
    let polls = fake.world().log.len();
    fake.change(|world| {
        world.services.get_mut("web").unwrap()[0]["Checks"][0]["Output"] = "Agent alive and reachable".into();
    });
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(fake.world().log.len() > polls);
    assert!(!states.has_changed().unwrap());
}

#[tokio::test(start_paused = true)]
async fn an_idle_watch_asks_about_once_a_minute() {
    let (fake, _client, _watch, _states) = synced().await;
    let before = fake.world().log.len();
    tokio::time::sleep(Duration::from_mins(10)).await;
    let world = fake.world();
    assert!((9..=12).contains(&(world.log.len() - before)), "{:#?}", world.log);
    assert!(world.log.last().unwrap().ends_with("GET /v1/health/service/web?stale&index=11&wait=55000ms"));
}

#[tokio::test(start_paused = true)]
async fn an_index_that_goes_backwards_starts_again() {
    let (fake, _client, _watch, mut states) = synced().await;
    fake.change(|world| {
        world.index = 3;
        world.services.insert("web".into(), web(&["b", "c"]));
    });
    until(&mut states, |state| state.value.as_ref().unwrap().keys().any(|id| id.service_id == "c")).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let log = fake.world().log.clone();
    // After the answer with index 3 one read without an index, then blocking on 3.
    assert_eq!(log[log.len() - 2], "10.0.0.1 GET /v1/health/service/web?stale");
    assert!(log.last().unwrap().contains("index=3&"), "{log:#?}");
}

#[tokio::test(start_paused = true)]
async fn index_zero_is_never_asked_with_and_does_not_spin() {
    let (fake, _client, _watch, mut states) = synced().await;
    fake.change(|world| world.permanent_fault = Some(Fault::IndexZero));
    let before = fake.world().log.len();
    tokio::time::sleep(Duration::from_secs(100)).await;
    let polls = fake.world().log.len() - before;
    assert!(polls <= 115, "{polls} polls in 100 s");
    assert!(fake.world().log.iter().all(|line| !line.contains("index=0")));
    set_web(&fake, &["c"]);
    within(5, states.wait_for(|state| state.value.as_ref().unwrap().len() == 1)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_blocks_is_asked_once_a_second() {
    let (fake, _client, _watch, _states) = synced().await;
    fake.change(|world| world.permanent_fault = Some(Fault::AtOnce));
    let before = fake.world().log.len();
    tokio::time::sleep(Duration::from_secs(100)).await;
    let polls = fake.world().log.len() - before;
    assert!((90..=115).contains(&polls), "{polls} polls in 100 s");
}

/// Errors of every kind: the value stays, the status says why, and the end of the fault is seen within 2 s.
#[tokio::test(start_paused = true)]
async fn faults_keep_the_last_good_and_end_quickly() {
    for fault in [
        Fault::Status(500, "No cluster leader"),
        Fault::Status(503, ""),
        Fault::Status(429, "rate limit"),
        Fault::Status(403, "Permission denied"),
        Fault::Status(301, ""),
        Fault::Truncated,
        Fault::Nonsense,
    ] {
        let (fake, _client, _watch, mut states) = synced().await;
        fake.change(|world| world.permanent_fault = Some(fault));
        until(&mut states, |state| matches!(state.status, Status::Degraded(_))).await;
        let right_reason = match (&states.borrow().status, fault) {
            (Status::Degraded(Reason::Unauthorized(_)), Fault::Status(403, _))
            | (Status::Degraded(Reason::BadAnswer(_)), Fault::Nonsense)
            | (Status::Degraded(Reason::Unavailable(_)), Fault::Truncated) => true,
            (Status::Degraded(Reason::Unavailable(text)), Fault::Status(status, _)) => {
                text.contains(&status.to_string()) && text.contains("/v1/health/service/web")
            }
            (status, _) => panic!("{fault:?}: {status:?}"),
        };
        assert!(right_reason, "{fault:?}: {:?}", states.borrow().status);
        let since = states.borrow().since;
        let polls = fake.world().log.len();
        tokio::time::sleep(Duration::from_mins(1)).await;
        assert_eq!(ids(&states), ["a", "b"], "{fault:?}");
        assert_eq!(states.borrow().since, since, "{fault:?}");
        let polls = fake.world().log.len() - polls;
        assert!(polls <= 150, "{fault:?}: {polls} polls in 60 s");
        fake.change(|world| {
            world.permanent_fault = None;
            world.services.insert("web".into(), web(&["a", "b", "c"]));
        });
        // A server that asks for less gets it: up to the back-off's 30 s.
        let limit = if fault == Fault::Status(429, "rate limit") { 31 } else { 2 };
        within(limit, states.wait_for(|state| state.status.is_synced())).await.unwrap();
        assert_eq!(ids(&states), ["a", "b", "c"], "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_never_comes_is_given_up() {
    for fault in [Fault::Stall, Fault::StallInBody] {
        let (fake, _client, _watch, mut states) = synced().await;
        fake.world().permanent_fault = Some(fault);
        fake.change(|_| ());
        let before = Instant::now();
        until(&mut states, |state| unavailable(&state.status)).await;
        let took = before.elapsed();
        assert!(took < Duration::from_secs(70), "{fault:?}: {took:?}");
        assert_eq!(ids(&states), ["a", "b"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_renewed_token_file_counts_at_the_next_poll() {
    let fake = FakeConsul::new();
    set_web(&fake, &["a"]);
    fake.world().token = "first".into();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "first\n").unwrap();
    let client = fake.client(&ClientConfig { token: Token::File(file.path().into()), ..config() });
    let watch = client.watch_health("web", &HealthQuery::default()).unwrap();
    let mut states = watch.states();
    until(&mut states, |state| state.status.is_synced()).await;

    fake.change(|world| world.token = "second".into());
    until(&mut states, |state| unauthorized(&state.status)).await;
    tokio::time::sleep(Duration::from_mins(2)).await;
    assert_eq!(ids(&states), ["a"]);
    std::fs::write(file.path(), "second\n").unwrap();
    within(2, states.wait_for(|state| state.status.is_synced())).await.unwrap();

    // A file that is away is the same kind of trouble.
    std::fs::remove_file(file.path()).unwrap();
    fake.change(|_| ());
    until(&mut states, |state| unauthorized(&state.status)).await;
    assert!(!format!("{:?} {client_debug:?}", states.borrow(), client_debug = config()).contains("second"));
    assert_eq!(ids(&states), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn what_acls_hide_is_not_gone() {
    let (fake, _client, _watch, mut states) = synced().await;
    fake.change(|world| {
        world.filtered = true;
        world.services.insert("web".into(), Vec::new());
    });
    until(&mut states, |state| state.status == Status::Degraded(Reason::Filtered)).await;
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert_eq!(ids(&states), ["a", "b"]);
    // What is visible counts, beside what is not.
    set_web(&fake, &["a", "c"]);
    until(&mut states, |state| state.value.as_ref().unwrap().len() == 3).await;
    assert_eq!(ids(&states), ["a", "b", "c"]);
    // The rights return without a change of the data: Consul wakes nobody.
    fake.world().filtered = false;
    within(2, states.wait_for(|state| state.status.is_synced())).await.unwrap();
    assert_eq!(ids(&states), ["a", "c"]);
}

#[tokio::test(start_paused = true)]
async fn a_filtered_first_answer_is_no_answer() {
    let fake = FakeConsul::new();
    fake.world().filtered = true;
    let client = fake.client(&config());
    let watch = client.watch_health("web", &HealthQuery::default()).unwrap();
    let mut states = watch.states();
    until(&mut states, |state| state.status == Status::Degraded(Reason::Filtered)).await;
    assert!(states.borrow().value.is_none());
}

#[tokio::test(start_paused = true)]
async fn sudden_emptiness_is_held_and_checked_with_the_leader() {
    let (fake, _client, _watch, mut states) = synced().await;
    let before = Instant::now();
    set_web(&fake, &[]);
    until(&mut states, |state| state.status == Status::Degraded(Reason::SuddenlyEmpty)).await;
    assert_eq!(ids(&states), ["a", "b"]);
    until(&mut states, |state| state.status.is_synced()).await;
    let took = before.elapsed();
    assert!(ids(&states).is_empty());
    assert!((10..13).contains(&took.as_secs()), "{took:?}");
    assert!(!fake.world().log.last().unwrap().contains("wait=0"));
    assert!(fake.world().log.iter().any(|line| line.contains("?index=") && !line.contains("stale")));
}

#[tokio::test(start_paused = true)]
async fn a_service_that_returns_in_the_hold_down_never_left() {
    let (fake, _client, _watch, mut states) = synced().await;
    set_web(&fake, &[]);
    until(&mut states, |state| state.status == Status::Degraded(Reason::SuddenlyEmpty)).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    set_web(&fake, &["a", "c"]);
    within(1, states.wait_for(|state| state.status.is_synced())).await.unwrap();
    assert_eq!(ids(&states), ["a", "c"]);
}

#[tokio::test(start_paused = true)]
async fn a_first_empty_answer_is_an_answer() {
    let fake = FakeConsul::new();
    let client = fake.client(&config());
    let watch = client.watch_health("web", &HealthQuery::default()).unwrap();
    let mut states = watch.states();
    within(1, states.wait_for(|state| state.status.is_synced())).await.unwrap();
    assert!(states.borrow().value.as_ref().is_some_and(|value| value.is_empty()));
}

#[tokio::test(start_paused = true)]
async fn a_server_without_a_leader_can_add_but_not_remove() {
    let (fake, _client, _watch, mut states) = synced().await;
    fake.change(|world| {
        world.leaderless = true;
        world.services.insert("web".into(), web(&["c"]));
    });
    until(&mut states, |state| state.status == Status::Degraded(Reason::NoLeader)).await;
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert_eq!(ids(&states), ["a", "b", "c"]);
    fake.world().leaderless = false;
    within(3, states.wait_for(|state| state.status.is_synced())).await.unwrap();
    assert_eq!(ids(&states), ["c"]);
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_too_stale_is_asked_of_the_leader() {
    let (fake, _client, _watch, mut states) = synced().await;
    fake.change(|world| {
        world.last_contact_ms = 60_000;
        world.stale_services = Some([("web".to_owned(), web(&["old"]))].into());
        world.services.insert("web".into(), web(&["new"]));
    });
    until(&mut states, |state| state.value.as_ref().unwrap().len() == 1).await;
    assert_eq!(ids(&states), ["new"]);
    assert!(states.borrow().status.is_synced());
}

#[tokio::test(start_paused = true)]
async fn another_agent_takes_over() {
    let (fake, client, _watch, mut states) = synced().await;
    fake.world().down.insert("10.0.0.1".into());
    // Long enough for the kept connection to be given up, too.
    tokio::time::sleep(Duration::from_mins(1)).await;
    set_web(&fake, &["a", "c"]);
    within(3, states.wait_for(|state| state.value.as_ref().unwrap().keys().any(|id| id.service_id == "c")))
        .await
        .unwrap();
    // One-shot calls move on within the call.
    assert_eq!(client.agent_self().await.unwrap().version, "1.20.6");
    let hosts: BTreeSet<String> = fake.world().log.iter().map(|line| line[..8].to_owned()).collect();
    assert_eq!(hosts.len(), 2);
    // All down: kept; one back: seen.
    fake.change(|world| world.down.insert("10.0.0.2".into()));
    tokio::time::sleep(Duration::from_mins(5)).await;
    assert_eq!(ids(&states), ["a", "c"]);
    fake.change(|world| {
        world.down.clear();
        world.services.insert("web".into(), web(&["d"]));
    });
    within(3, states.wait_for(|state| state.value.as_ref().unwrap().len() == 1)).await.unwrap();
}

/// A hundred watches through an outage: they share the pace of retries, and all of them are back soon after it.
#[tokio::test(start_paused = true)]
async fn many_watches_share_their_retries() {
    let fake = FakeConsul::new();
    let client = fake.client(&config());
    let watches: Vec<_> =
        (0..100).map(|n| client.watch_health(&format!("s{n}"), &HealthQuery::default()).unwrap()).collect();
    for watch in &watches {
        until(&mut watch.states(), |state| state.status.is_synced()).await;
    }
    fake.change(|world| world.permanent_fault = Some(Fault::Status(500, "No cluster leader")));
    tokio::time::sleep(Duration::from_mins(1)).await;
    let before = fake.world().log.len();
    tokio::time::sleep(Duration::from_mins(1)).await;
    let retries = fake.world().log.len() - before;
    assert!(retries <= 60 * 8, "{retries} retries in a minute");
    fake.world().permanent_fault = None;
    let ended = Instant::now();
    for watch in &watches {
        until(&mut watch.states(), |state| state.status.is_synced()).await;
    }
    assert!(ended.elapsed() < Duration::from_secs(3), "{:?}", ended.elapsed());
    assert_eq!(client.inner.failing.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn a_broken_blocking_query_falls_back_to_plain_reads() {
    let (fake, _client, _watch, mut states) = synced().await;
    fake.change(|world| {
        world.faults = [Fault::Status(500, "broken"); 3].into();
        world.services.insert("web".into(), web(&["c"]));
    });
    within(5, states.wait_for(|state| state.value.as_ref().unwrap().len() == 1)).await.unwrap();
    let log = fake.world().log.clone();
    assert!(log.iter().filter(|line| line.ends_with("web?stale")).count() >= 2, "{log:#?}");
}

#[tokio::test(start_paused = true)]
async fn a_dropped_watch_stops_asking() {
    let (fake, client, watch, mut states) = synced().await;
    fake.change(|world| world.permanent_fault = Some(Fault::Nonsense));
    until(&mut states, |state| matches!(state.status, Status::Degraded(_))).await;
    drop(watch);
    within(1, states.wait_for(|_| false)).await.unwrap_err();
    let before = fake.world().log.len();
    tokio::time::sleep(Duration::from_mins(5)).await;
    assert_eq!(fake.world().log.len(), before);
    assert_eq!(client.inner.failing.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn names_are_watched_at_their_own_pace() {
    let fake = FakeConsul::new();
    set_web(&fake, &["a"]);
    let client = fake.client(&config());
    let scope = Scope { datacenter: Some("dc 2".into()), ..Scope::default() };
    let watch = client.watch_services(&scope, Duration::from_secs(5));
    let mut states = watch.states();
    within(1, states.wait_for(|state| state.status.is_synced())).await.unwrap();
    let before = fake.world().log.len();
    for round in 0..50 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        fake.change(|world| world.services.insert(format!("s{round}"), Vec::new()));
    }
    assert!(fake.world().log.len() - before <= 12);
    within(6, states.wait_for(|state| state.value.as_ref().unwrap().len() == 51)).await.unwrap();
    assert!(fake.world().log[0].contains("dc=dc%202&stale"));
}

#[tokio::test(start_paused = true)]
async fn keys_are_read_written_and_watched() {
    let fake = FakeConsul::new();
    let client = fake.client(&config());
    let scope = Scope::default();
    let watch = client.watch_kv("outrigger/", &scope).unwrap();
    let mut states = watch.states();
    within(1, states.wait_for(|state| state.status.is_synced())).await.unwrap();
    assert_eq!(client.kv_get("outrigger/a", &scope).await.unwrap(), None);
    assert!(client.kv_put_cas("outrigger/a", b"{}".to_vec(), 0, &scope).await.unwrap());
    assert!(!client.kv_put_cas("outrigger/a", b"{}".to_vec(), 0, &scope).await.unwrap());
    within(1, states.wait_for(|state| state.value.as_ref().unwrap().contains_key("outrigger/a")))
        .await
        .unwrap();
    let pair = client.kv_get("outrigger/a", &scope).await.unwrap().unwrap();
    let version = pair.modify_index;
    assert_eq!(pair.value.as_slice(), b"{}");
    assert_eq!(client.kv_list("outrigger/", &scope).await.unwrap().len(), 1);
    assert_eq!(client.kv_keys("outrigger/", &scope).await.unwrap(), ["outrigger/a"]);
    assert!(client.kv_keys("nothing/", &scope).await.unwrap().is_empty());
    assert!(!client.kv_delete_cas("outrigger/a", version - 1, &scope).await.unwrap());
    assert!(client.kv_delete_cas("outrigger/a", version, &scope).await.unwrap());
    assert_eq!(client.kv_get("outrigger/a", &scope).await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn a_transaction_is_all_or_nothing_and_a_refusal_is_no_conflict() {
    let fake = FakeConsul::new();
    let client = fake.client(&config());
    let scope = Scope::default();
    let cas = |key: &str, modify_index| KvOperation::Cas {
        key: key.into(),
        value: key.as_bytes().to_vec(),
        modify_index,
    };
    let both = [cas("o/a", 0), KvOperation::Set { key: "o/b".into(), value: vec![0xff, 0, 1] }];
    let KvOutcome::Committed(index) = client.kv_txn(&both, &scope).await.unwrap() else { panic!() };
    let held = client.kv_list("o/", &scope).await.unwrap();
    assert_eq!((held["o/a"].modify_index, held["o/b"].modify_index), (index, index));
    assert_eq!(held["o/b"].value, [0xff, 0, 1]);

    let stale = [KvOperation::Delete { key: "o/b".into() }, cas("o/a", index - 1)];
    assert_eq!(client.kv_txn(&stale, &scope).await.unwrap(), KvOutcome::Conflict);
    assert_eq!(client.kv_list("o/", &scope).await.unwrap(), held, "nothing of it happened");

    let delete = [KvOperation::DeleteCas { key: "o/a".into(), modify_index: index }];
    assert!(matches!(client.kv_txn(&delete, &scope).await.unwrap(), KvOutcome::Committed(0)));
    assert_eq!(client.kv_keys("o/", &scope).await.unwrap(), ["o/b"]);

    // Consul answers a right that is missing with the same status.
    let refusal =
        r#"{"Results":null,"Errors":[{"OpIndex":0,"What":"Permission denied: token lacks key:write"}]}"#;
    fake.world().faults.push_back(Fault::Status(409, refusal));
    let error = client.kv_txn(&delete, &scope).await.unwrap_err();
    assert!(error.status() == Some(409) && error.to_string().contains("Permission denied"), "{error}");
    let climbing = [KvOperation::Delete { key: "o/../b".into() }];
    assert!(matches!(client.kv_txn(&climbing, &scope).await, Err(Error::Argument { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_write_is_not_repeated_once_sent() {
    let fake = FakeConsul::new();
    fake.world().permanent_fault = Some(Fault::Status(500, "who knows"));
    let client = fake.client(&config());
    let registration = crate::Registration { name: "web".into(), id: "a".into(), ..Default::default() };
    let error = client.agent_register(&registration).await.unwrap_err();
    assert_eq!(error.status(), Some(500));
    assert_eq!(fake.world().log.len(), 1);
    let body: Value = serde_json::from_slice(&fake.world().bodies[0]).unwrap();
    assert_eq!(body, serde_json::json!({"Name": "web", "ID": "a", "Port": 0}));
    // Nothing was sent where there is no connection: the next agent gets it.
    fake.world().permanent_fault = None;
    fake.world().down.insert("10.0.0.2".into());
    client.agent_register(&registration).await.unwrap();
}

fn answer_with_index(index: &str) -> Answer {
    let call = crate::Call { method: Method::GET, path: "/".into(), agent: "a".into() };
    let mut headers = http::HeaderMap::new();
    if let Ok(value) = index.parse() {
        headers.insert("x-consul-index", value);
    }
    Answer { call, status: 200, headers, body: Bytes::new() }
}

proptest::proptest! {
    #[test]
    fn the_next_index_is_a_restart_or_asks_properly(asked: u64, header in ".{0,20}", index: u64) {
        let valid = next_index(asked, &answer_with_index(&index.to_string()));
        for next in [valid, next_index(asked, &answer_with_index(&header))] {
            proptest::prop_assert!(next == 0 || next >= asked.max(1));
        }
        if index >= asked {
            proptest::prop_assert_eq!(valid, index.max(1));
        }
    }
}

/// Consul 1.20 answers blocking queries for health from a subscription: without the header on ACLs, and always
/// `KnownLeader: false`.
#[tokio::test(start_paused = true)]
async fn a_streaming_agent_is_believed_what_adds_and_checked_for_what_removes() {
    let (fake, _client, _watch, mut states) = synced().await;
    fake.world().streaming = true;
    let before = fake.world().log.len();
    set_web(&fake, &["a", "b", "c"]);
    within(1, states.wait_for(|state| state.value.as_ref().unwrap().len() == 3)).await.unwrap();
    assert!(states.borrow().status.is_synced());
    tokio::time::sleep(Duration::from_secs(50)).await;
    let plain = |log: &[String]| log.iter().filter(|line| !line.contains("index=")).count();
    assert_eq!(plain(&fake.world().log[before..]), 0, "{:#?}", fake.world().log);
    // A true removal costs one more read.
    set_web(&fake, &["a", "c"]);
    within(1, states.wait_for(|state| state.value.as_ref().unwrap().len() == 2)).await.unwrap();
    assert_eq!(plain(&fake.world().log[before..]), 1);
    // A revoked right looks like a removal until the plain read tells.
    fake.change(|world| {
        world.filtered = true;
        world.services.insert("web".into(), Vec::new());
    });
    until(&mut states, |state| state.status == Status::Degraded(Reason::Filtered)).await;
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert_eq!(ids(&states), ["a", "c"]);
    // Gone in truth: held, and confirmed by the leader without the subscription.
    fake.change(|world| world.filtered = false);
    until(&mut states, |state| state.status == Status::Degraded(Reason::SuddenlyEmpty)).await;
    until(&mut states, |state| state.status.is_synced()).await;
    assert!(ids(&states).is_empty());
    assert!(fake.world().log.iter().any(|line| line.ends_with("GET /v1/health/service/web")));
}

#[tokio::test(start_paused = true)]
async fn a_polled_service_holds_no_query() {
    let fake = FakeConsul::new();
    set_web(&fake, &["a"]);
    let client = fake.client(&config());
    let watch = client.poll_health("web", &HealthQuery::default(), Duration::from_secs(30)).unwrap();
    let mut states = watch.states();
    within(6, states.wait_for(|state| state.status.is_synced())).await.unwrap();
    set_web(&fake, &["a", "b"]);
    within(34, states.wait_for(|state| state.value.as_ref().unwrap().len() == 2)).await.unwrap();
    set_web(&fake, &[]);
    tokio::time::sleep(Duration::from_secs(35)).await;
    assert_eq!(ids(&states), ["a", "b"]);
    within(67, states.wait_for(|state| state.value.as_ref().unwrap().is_empty())).await.unwrap();
    fake.change(|world| world.permanent_fault = Some(Fault::Nonsense));
    tokio::time::sleep(Duration::from_secs(70)).await;
    assert!(!states.borrow().status.is_synced());
    assert!(fake.world().log.iter().all(|line| !line.contains("wait=")));
    assert!(fake.world().log.len() < 150);
}

/// Two spellings of one thing, kept together: what a watch publishes is what a call returns.
#[tokio::test(start_paused = true)]
async fn a_call_sees_what_a_watch_sees() {
    let (_fake, client, _watch, states) = synced().await;
    let called: Instances = client.health_service("web", &HealthQuery::default()).await.unwrap().instances;
    assert_eq!(Some(&called), states.borrow().value.as_deref());
}
