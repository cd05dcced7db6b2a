//! One suite for every store, then what each can do wrong on its own.

use std::time::Duration;

use outrigger_consul::fake::FakeConsul;
use outrigger_consul::{Client, ClientConfig};
use outrigger_policy::Kind;
use serde_json::json;

use super::consul::ConsulStore;
use super::embedded::Embedded;
use super::*;
use crate::store::Store;
use crate::store::tests::Disk;

/// An `AccessPolicy` that allows `caller`.
fn policy(name: &str, caller: &str) -> Object {
    serde_json::from_value(json!({
        "apiVersion": "outrigger.dev/v1alpha1",
        "kind": "AccessPolicy",
        "metadata": { "name": name, "namespace": "shop" },
        "spec": {
            "targetRef": { "kind": "Service", "name": "orders" },
            "rules": [{ "action": "Allow", "from": [{ "serviceAccounts": [caller] }] }],
        },
    }))
    .unwrap()
}

fn key(name: &str) -> Key {
    Key::new(Kind::AccessPolicy, "shop", name)
}

fn put(name: &str, caller: &str) -> Change {
    Change::Put(policy(name, caller))
}

fn write(based_on: u64, changes: Vec<Change>) -> Write {
    let at = UNIX_EPOCH + Duration::from_secs(1_000_000 + based_on);
    Write { based_on, author: format!("writer {based_on}"), at, changes }
}

/// The picture once `condition` holds.
async fn until(store: &dyn PolicyStore, condition: impl FnMut(&Arc<Picture>) -> bool) -> Arc<Picture> {
    let mut pictures = store.pictures();
    let found = tokio::time::timeout(Duration::from_mins(1), pictures.wait_for(condition)).await;
    Arc::clone(&found.expect("within a minute").unwrap())
}

/// What every store does.
async fn conforms(store: &dyn PolicyStore) {
    let empty = until(store, |picture| picture.sync == Sync::Synced).await;
    assert_eq!((empty.revision, empty.policies.len()), (0, 0));
    assert!(store.history(&key("a")).await.unwrap().is_empty());

    // Created together, with the server's part of the metadata.
    let mut forged = policy("b", "shop/x");
    forged.metadata.uid = Some("mine".into());
    forged.metadata.generation = Some(77);
    let first = store.commit(write(0, vec![put("a", "shop/web"), Change::Put(forged)])).await.unwrap();
    assert_eq!((first.revision, first.policies.len()), (1, 2));
    assert_eq!(*first, **store.pictures().borrow(), "the picture holds it when the write returns");
    let a = &first.policies[&key("a")];
    assert_eq!((a.revision, a.created, a.updated, a.author.as_str()), (1, 1_000_000, 1_000_000, "writer 0"));
    let metadata = &a.object.metadata;
    assert_eq!((metadata.generation, metadata.resource_version.as_deref()), (Some(1), Some("1")));
    assert_eq!(metadata.creation_timestamp.as_deref(), Some("1970-01-12T13:46:40Z"));
    let forged = &first.policies[&key("b")].object.metadata;
    assert!(forged.generation == Some(1) && forged.uid != metadata.uid, "{forged:?}");
    assert_eq!(forged.uid.as_ref().unwrap().len(), 36);

    // Judged against something older: nothing of it happens.
    let late = store.commit(write(0, vec![put("c", "shop/web"), Change::Delete(key("a"))])).await;
    assert!(matches!(late, Err(WriteError::Conflict)), "{late:?}");
    let missing = store.commit(write(1, vec![put("c", "shop/web"), Change::Delete(key("z"))])).await;
    assert!(matches!(missing, Err(WriteError::Conflict)), "{missing:?}");
    assert_eq!(*first, **store.pictures().borrow());

    // Another spec is another generation; another label is not.
    let second = store.commit(write(1, vec![put("a", "shop/pay")])).await.unwrap();
    let mut labelled = policy("a", "shop/pay");
    labelled.metadata.labels.insert("team".into(), "pay".into());
    let third = store.commit(write(2, vec![Change::Put(labelled)])).await.unwrap();
    let generations =
        [&second, &third].map(|picture| picture.policies[&key("a")].object.metadata.generation.unwrap());
    assert_eq!(generations, [2, 2]);
    let a = &third.policies[&key("a")];
    assert_eq!((a.revision, a.created, a.updated), (3, 1_000_000, 1_000_002));
    assert_eq!(a.object.metadata.uid, metadata.uid);
    assert_eq!(third.policies[&key("b")].revision, 1);

    let fourth = store.commit(write(3, vec![Change::Delete(key("a"))])).await.unwrap();
    assert_eq!((fourth.revision, fourth.policies.len()), (4, 1));
    let history = store.history(&key("a")).await.unwrap();
    let seen: Vec<_> =
        history.iter().map(|past| (past.revision, past.action, past.object.is_some())).collect();
    assert_eq!(
        seen,
        [
            (4, Action::Deleted, false),
            (3, Action::Configured, true),
            (2, Action::Configured, true),
            (1, Action::Created, true)
        ]
    );
    assert_eq!((history[0].author.as_str(), history[0].time), ("writer 3", 1_000_003));

    // A new object of the old name is another one, and history goes on.
    let fifth = store.commit(write(4, vec![put("a", "shop/web")])).await.unwrap();
    assert_ne!(fifth.policies[&key("a")].object.metadata.uid, metadata.uid);
    assert_eq!(fifth.policies[&key("a")].created, 1_000_004);

    // Of two that judged the same, one wins.
    let (one, two) = tokio::join!(
        store.commit(write(5, vec![put("a", "shop/one")])),
        store.commit(write(5, vec![put("b", "shop/two")]))
    );
    assert_eq!([one.is_ok(), two.is_ok()].iter().filter(|won| **won).count(), 1, "{one:?} {two:?}");

    for round in 6..31 {
        store.commit(write(round, vec![put("b", &format!("shop/r{round}"))])).await.unwrap();
    }
    let history = store.history(&key("b")).await.unwrap();
    let revisions: Vec<u64> = history.iter().map(|past| past.revision).collect();
    assert_eq!(revisions, (12..=31).rev().collect::<Vec<_>>());
}

#[tokio::test]
async fn the_embedded_store_conforms_and_remembers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let before = {
        let store = Embedded::load(Arc::new(Store::open(&path).unwrap())).unwrap();
        conforms(&store).await;
        Arc::clone(&store.pictures().borrow())
    };
    let store = Embedded::load(Arc::new(Store::open(&path).unwrap())).unwrap();
    assert_eq!(*before, **store.pictures().borrow());
    assert_eq!(store.history(&key("b")).await.unwrap().len(), HISTORY);
    assert_eq!(store.commit(write(31, vec![put("c", "shop/x")])).await.unwrap().revision, 32);
}

#[tokio::test]
async fn a_disk_that_fails_refuses_writes_and_forgets_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::new(directory.path(), Duration::from_millis(50));
    let store = Embedded::load(disk.open()).unwrap();
    let good = store.commit(write(0, vec![put("a", "shop/web")])).await.unwrap();
    disk.breaks(true);
    for _ in 0..2 {
        let refused = store.commit(write(1, vec![Change::Delete(key("a")), put("b", "shop/x")])).await;
        assert!(matches!(refused, Err(WriteError::Unavailable(_))), "{refused:?}");
        assert_eq!(*good, **store.pictures().borrow(), "what is in force stays");
    }
    assert_eq!(store.history(&key("a")).await.unwrap().len(), 1);
    disk.breaks(false);
    // What was refused waits for the disk no more: what comes after the repair is all there is.
    let written = loop {
        match store.commit(write(1, vec![put("c", "shop/y")])).await {
            Ok(written) => break written,
            Err(WriteError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(10)).await,
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(written.policies.keys().map(|key| key.name.as_str()).collect::<Vec<_>>(), ["a", "c"]);
    drop(store);
    let store = Embedded::load(disk.open()).unwrap();
    assert_eq!(*written, **store.pictures().borrow());
    assert!(store.history(&key("b")).await.unwrap().is_empty());
}

fn client(fake: &FakeConsul) -> Client {
    fake.client(&ClientConfig::new(vec!["10.0.0.1".parse().unwrap()]))
}

fn on(fake: &FakeConsul) -> ConsulStore {
    ConsulStore::start(client(fake)).unwrap()
}

#[tokio::test(start_paused = true)]
async fn consul_conforms_and_its_history_is_cut() {
    let fake = FakeConsul::new();
    let store = on(&fake);
    conforms(&store).await;
    let before = Arc::clone(&store.pictures().borrow());
    let kept = || {
        fake.world()
            .keys
            .keys()
            .filter(|key| key.starts_with("outrigger/history/AccessPolicy/shop/b/"))
            .count()
    };
    tokio::time::timeout(Duration::from_mins(1), async {
        while kept() > HISTORY {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await
    .expect("the history is cut");
    assert_eq!(kept(), HISTORY);
    drop(store);
    let again = on(&fake);
    let picture = until(&again, |picture| picture.sync == Sync::Synced).await;
    assert_eq!(*before, *picture);
}

#[tokio::test(start_paused = true)]
async fn two_controllers_on_one_consul_see_each_other() {
    let fake = FakeConsul::new();
    let (one, two) = (on(&fake), on(&fake));
    for store in [&one, &two] {
        until(store, |picture| picture.sync == Sync::Synced).await;
    }
    let written = one.commit(write(0, vec![put("a", "shop/web")])).await.unwrap();
    let seen = until(&two, |picture| picture.revision == 1).await;
    assert_eq!(*seen, *written);
    // The other one judges by what is old, loses, and has read the newest when it hears so.
    one.commit(write(1, vec![put("a", "shop/pay")])).await.unwrap();
    let late = two.commit(write(1, vec![put("b", "shop/x")])).await;
    assert!(matches!(late, Err(WriteError::Conflict)), "{late:?}");
    assert_eq!(two.pictures().borrow().revision, 2);
    two.commit(write(2, vec![put("b", "shop/x")])).await.unwrap();
    until(&one, |picture| picture.revision == 3 && picture.policies.len() == 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_consul_that_is_away_or_wiped_takes_nothing_away() {
    let fake = FakeConsul::new();
    let store = on(&fake);
    until(&store, |picture| picture.sync == Sync::Synced).await;
    let good = store.commit(write(0, vec![put("a", "shop/web")])).await.unwrap();

    fake.change(|world| world.permanent_fault = Some(outrigger_consul::fake::Fault::Status(500, "no")));
    let away = until(&store, |picture| matches!(picture.sync, Sync::Degraded { .. })).await;
    assert_eq!(away.policies, good.policies);
    let refused = store.commit(write(1, vec![Change::Delete(key("a"))])).await;
    assert!(matches!(refused, Err(WriteError::Unavailable(_))), "{refused:?}");
    assert!(store.history(&key("a")).await.is_err());
    fake.change(|world| world.permanent_fault = None);
    until(&store, |picture| picture.sync == Sync::Synced).await;

    let kept = fake.world().keys.clone();
    fake.change(|world| world.keys.clear());
    // Longer than any hold-down.
    tokio::time::sleep(Duration::from_mins(2)).await;
    let wiped = Arc::clone(&store.pictures().borrow());
    assert_eq!((wiped.revision, &wiped.policies), (1, &good.policies));
    assert!(matches!(&wiped.sync, Sync::Degraded { reason, .. } if reason.contains("wiped")), "{wiped:?}");
    fake.change(|world| world.keys = kept);
    let back = until(&store, |picture| picture.sync == Sync::Synced).await;
    assert_eq!(back.policies, good.policies);
}

#[tokio::test(start_paused = true)]
async fn a_consul_that_breaks_before_it_tells_of_a_write_does_not_take_it_back() {
    let fake = FakeConsul::new();
    let store = on(&fake);
    until(&store, |picture| picture.sync == Sync::Synced).await;
    store.commit(write(0, vec![put("a", "shop/web")])).await.unwrap();
    let old = fake.world().keys.clone();
    let written = store.commit(write(1, vec![put("a", "shop/pay")])).await.unwrap();
    let new = std::mem::replace(&mut fake.world().keys, old);
    // What the watch last reads is from before the write.
    fake.change(|_| ());
    tokio::time::sleep(Duration::from_secs(1)).await;
    fake.change(|world| world.permanent_fault = Some(outrigger_consul::fake::Fault::Status(500, "no")));
    let away = until(&store, |picture| matches!(picture.sync, Sync::Degraded { .. })).await;
    assert_eq!((away.revision, &away.policies), (2, &written.policies));
    // Longer than a server may be behind.
    tokio::time::sleep(Duration::from_mins(2)).await;
    assert_eq!(store.pictures().borrow().policies, written.policies);

    // It returns, at first from before the write.
    fake.change(|world| world.permanent_fault = None);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(store.pictures().borrow().policies, written.policies);
    fake.change(|world| world.keys = new);
    let back = until(&store, |picture| picture.sync == Sync::Synced).await;
    assert_eq!((back.revision, &back.policies), (2, &written.policies));
}

#[tokio::test(start_paused = true)]
async fn what_people_write_into_consul_counts_where_it_can_be_read() {
    let fake = FakeConsul::new();
    let store = on(&fake);
    until(&store, |picture| picture.sync == Sync::Synced).await;
    let good = store.commit(write(0, vec![put("a", "shop/web"), put("b", "shop/web")])).await.unwrap();
    let path = |name: &str| format!("outrigger/policies/AccessPolicy/shop/{name}");
    let text = String::from_utf8(fake.world().keys[&path("b")].0.to_vec()).unwrap();

    fake.change(|world| {
        world.put_key(&path("a"), "{ nonsense");
        world.put_key(&path("b"), text.replace("shop/web", "shop/hand"));
        world.put_key("outrigger/policies/what", "1");
        // A record under another one's name.
        world.put_key(&path("c"), text.clone());
        // Readable, and yet no policy: an empty selector would be everybody.
        let everybody = text
            .replace(r#"[{"serviceAccounts":["shop/web"]}]"#, "[]")
            .replace(r#""name":"b""#, r#""name":"d""#);
        world.put_key(&path("d"), everybody);
    });
    let picture = until(&store, |picture| picture.faults.len() == 4).await;
    assert_eq!(picture.policies[&key("a")], good.policies[&key("a")], "the last good stays");
    assert_ne!(picture.policies[&key("b")].object.spec, good.policies[&key("b")].object.spec);
    assert_eq!(picture.policies.len(), 2);
    assert_eq!(picture.sync, Sync::Synced);

    // A controller that starts now does not know what the unreadable ones say: it says nothing.
    let new = on(&fake);
    until(&new, |picture| picture.faults.len() == 4).await;
    assert_eq!(new.pictures().borrow().sync, Sync::Never);
    fake.change(|world| {
        for name in ["c", "d"] {
            world.keys.remove(&path(name));
        }
        world.put_key(&path("a"), text.replace(r#""name":"b""#, r#""name":"a""#));
    });
    until(&new, |picture| picture.sync == Sync::Synced && picture.policies.len() == 2).await;
}

#[tokio::test(start_paused = true)]
async fn what_does_not_fit_into_a_transaction_is_refused_whole() {
    let fake = FakeConsul::new();
    let store = on(&fake);
    until(&store, |picture| picture.sync == Sync::Synced).await;
    let many = (0..64).map(|at| put(&format!("p{at}"), "shop/web")).collect();
    let refused = store.commit(write(0, many)).await;
    assert!(matches!(refused, Err(WriteError::TooLarge(_))), "{refused:?}");
    let mut large = policy("a", "shop/web");
    large.metadata.annotations.insert("note".into(), "x".repeat(300_000));
    let refused = store.commit(write(0, vec![Change::Put(large)])).await;
    assert!(matches!(refused, Err(WriteError::TooLarge(_))), "{refused:?}");
    assert!(fake.world().keys.is_empty());
    let fits = (0..63).map(|at| put(&format!("p{at}"), "shop/web")).collect();
    assert_eq!(store.commit(write(0, fits)).await.unwrap().policies.len(), 63);
}
