use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kube::api::DynamicObject;
use outrigger_policy::{Catalog, Key, Kind, Object, Spec, resolve};
use serde_json::{Value, json};

use super::fake::FakeApi;
use super::held::Held;
use super::resource::Resource;
use super::*;
use crate::policies::Change;
use crate::replicas::Replicas;

const ACCESS: Resource = Resource::Policy(Kind::AccessPolicy);
/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

fn access(name: &str, action: &str) -> Value {
    json!({
        "apiVersion": "outrigger.dev/v1alpha1", "kind": "AccessPolicy",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"targetRef": {"kind": "Namespace"}, "rules": [{"action": action}]},
    })
}

fn route(name: &str, parents: &Value) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "parentRefs": parents,
            "rules": [{"backendRefs": [{"group": "", "kind": "Service", "name": "orders", "namespace": "other", "port": 80}]}],
        },
    })
}

fn at(mut object: Value, uid: &str, version: u64, generation: i64) -> DynamicObject {
    object["metadata"]["uid"] = json!(uid);
    object["metadata"]["resourceVersion"] = json!(version.to_string());
    object["metadata"]["generation"] = json!(generation);
    serde_json::from_value(object).unwrap()
}

fn key(text: &str) -> Key {
    text.parse().unwrap()
}

fn object(value: Value) -> Object {
    serde_json::from_value(value).unwrap()
}

/// All resources read, nothing there.
fn read() -> Held {
    let mut held = Held::default();
    for resource in Resource::ALL {
        held.relist(resource, "crd", Vec::new());
    }
    held
}

fn names(held: &Held) -> Vec<String> {
    held.picture(&Picture::default()).policies.keys().map(ToString::to_string).collect()
}

#[test]
fn nothing_is_said_before_every_kind_was_read() {
    let mut held = Held::default();
    for resource in Resource::ALL {
        assert_eq!(held.picture(&Picture::default()).sync, Sync::Never);
        held.relist(resource, "crd", Vec::new());
    }
    assert_eq!(held.picture(&Picture::default()).sync, Sync::Synced);
}

#[test]
fn the_gateway_api_may_be_missing_and_our_kinds_may_not() {
    let mut held = read();
    held.absent(Resource::Policy(Kind::HttpRoute));
    held.absent(Resource::ReferenceGrant);
    assert_eq!(held.picture(&Picture::default()).sync, Sync::Synced);

    let mut held = Held::default();
    Resource::ALL
        .into_iter()
        .filter(|resource| *resource != ACCESS)
        .for_each(|other| held.relist(other, "crd", Vec::new()));
    held.absent(ACCESS);
    let picture = held.picture(&Picture::default());
    assert_eq!(picture.sync, Sync::Never);
    assert!(
        picture.faults[0].reason.contains("accesspolicies.outrigger.dev is not installed"),
        "{picture:?}"
    );
}

#[test]
fn a_status_changes_no_picture_and_a_label_does() {
    let mut held = read();
    held.put(ACCESS, at(access("a", "Deny"), "1", 10, 1), false);
    let first = held.picture(&Picture::default());
    let mut with_status = access("a", "Deny");
    with_status["status"] = json!({"observedGeneration": 1});
    held.put(ACCESS, at(with_status.clone(), "1", 11, 1), false);
    assert_eq!(held.picture(&first), first);
    with_status["metadata"]["labels"] = json!({"team": "pay"});
    held.put(ACCESS, at(with_status, "1", 12, 1), false);
    assert_eq!(held.picture(&first).revision, first.revision + 1);
}

#[test]
fn what_is_older_than_an_own_write_is_not_believed() {
    let mut held = read();
    held.put(ACCESS, at(access("a", "Deny"), "1", 10, 1), false);
    held.put(ACCESS, at(access("a", "Allow"), "1", 14, 3), true);
    // The watch is behind.
    held.put(ACCESS, at(access("a", "Deny"), "1", 12, 2), false);
    let picture = held.picture(&Picture::default());
    assert_eq!(picture.policies[&key("AccessPolicy shop/a")].revision, 3);
    // So is a list that was begun before the own write of another object.
    held.put(ACCESS, at(access("b", "Deny"), "2", 15, 1), true);
    held.relist(ACCESS, "crd", vec![at(access("a", "Allow"), "1", 14, 3)]);
    assert_eq!(names(&held), ["AccessPolicy shop/a", "AccessPolicy shop/b"]);
    // Until the watch has told it.
    held.put(ACCESS, at(access("b", "Deny"), "2", 15, 1), false);
    held.relist(ACCESS, "crd", vec![at(access("a", "Allow"), "1", 14, 3)]);
    assert_eq!(names(&held), ["AccessPolicy shop/a"]);
    // What this process deleted does not come back by a watch that is behind.
    held.deleted(ACCESS, &key("AccessPolicy shop/a"), Some("1".to_owned()));
    held.put(ACCESS, at(access("a", "Allow"), "1", 14, 3), false);
    assert_eq!(names(&held), [""; 0]);
    held.remove(ACCESS, &at(access("a", "Allow"), "1", 20, 3));
    held.put(ACCESS, at(access("a", "Allow"), "3", 21, 1), false);
    assert_eq!(names(&held), ["AccessPolicy shop/a"]);
}

#[test]
fn an_object_that_cannot_be_read_keeps_what_it_said() {
    let mut held = read();
    held.put(ACCESS, at(access("a", "Deny"), "1", 10, 1), false);
    let good = held.picture(&Picture::default());
    let mut bad = access("a", "Deny");
    bad["spec"]["rules"] =
        json!([{"action": "Deny", "to": [{"paths": [{"type": "RegularExpression", "value": "a("}]}]}]);
    held.put(ACCESS, at(bad.clone(), "1", 11, 2), false);
    let picture = held.picture(&good);
    assert_eq!((&picture.policies, picture.revision), (&good.policies, good.revision));
    assert_eq!(picture.faults[0].subject, "AccessPolicy shop/a");
    assert!(picture.faults[0].reason.ends_with("what it said before stays in force"), "{picture:?}");

    // One that was never read, and that would refuse somebody, refuses everybody.
    let mut held = read();
    bad["spec"]["targetRef"] = json!({"kind": "Service", "name": "orders"});
    held.put(ACCESS, at(bad.clone(), "1", 11, 2), false);
    let picture = held.picture(&Picture::default());
    let Spec::AccessPolicy(strict) = &picture.policies[&key("AccessPolicy shop/a")].object.spec else {
        panic!()
    };
    assert_eq!((strict.target_ref.name.as_deref(), strict.rules.len()), (Some("orders"), 1));
    assert!(strict.rules[0].from.is_none() && strict.rules[0].to.is_none());
    // One that only allows is not there, which is less.
    bad["spec"]["rules"][0]["action"] = json!("Allow");
    held.put(ACCESS, at(bad, "1", 12, 3), false);
    let mut held_anew = read();
    let mut allows = access("b", "Allow");
    allows["spec"]["rules"][0]["from"] = json!([{"cidrs": ["10.0.0.1/8"]}]);
    held_anew.put(ACCESS, at(allows, "2", 11, 1), false);
    assert_eq!(names(&held_anew), [""; 0]);
}

#[test]
fn a_gateways_route_is_left_alone_and_a_grant_is_read() {
    let resource = Resource::Policy(Kind::HttpRoute);
    let mut held = read();
    held.put(resource, at(route("edge", &json!([{"name": "public"}])), "1", 10, 1), false);
    let mut newer = route("mesh", &json!([{"group": "", "kind": "Service", "name": "web"}]));
    newer["spec"]["rules"][0]["cache"] = json!({"ttl": "1s"});
    held.put(resource, at(newer, "2", 11, 1), false);
    let picture = held.picture(&Picture::default());
    assert_eq!(picture.policies.keys().map(ToString::to_string).collect::<Vec<_>>(), ["HTTPRoute shop/mesh"]);
    assert!(picture.faults.is_empty(), "{picture:?}");

    let permitted = |held: &Held| {
        let grants = held.picture(&Picture::default()).grants;
        Catalog { grants, ..Catalog::default() }.permits(&key("HTTPRoute shop/mesh"), &[], "other", "orders")
    };
    assert!(!permitted(&held));
    let grant = json!({
        "apiVersion": "gateway.networking.k8s.io/v1beta1", "kind": "ReferenceGrant",
        "metadata": {"name": "shop", "namespace": "other"},
        "spec": {
            "from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "shop"}],
            "to": [{"group": "", "kind": "Service", "name": "orders"}],
        },
    });
    held.put(Resource::ReferenceGrant, at(grant.clone(), "3", 12, 1), false);
    assert!(permitted(&held));
    held.remove(Resource::ReferenceGrant, &at(grant, "3", 13, 1));
    assert!(!permitted(&held));
}

#[test]
fn objects_that_went_with_their_crd_stay_until_they_are_back() {
    let mut held = read();
    held.relist(
        ACCESS,
        "crd",
        vec![at(access("a", "Deny"), "1", 10, 1), at(access("b", "Deny"), "2", 10, 1)],
    );
    held.absent(ACCESS);
    let picture = held.picture(&Picture::default());
    assert_eq!(picture.policies.len(), 2);
    assert!(
        matches!(&picture.sync, Sync::Degraded { reason, .. } if reason.contains("stay in force")),
        "{picture:?}"
    );
    held.relist(ACCESS, "another", vec![at(access("a", "Deny"), "3", 20, 1)]);
    let picture = held.picture(&picture);
    assert_eq!(picture.policies.len(), 2);
    assert!(
        matches!(&picture.sync, Sync::Degraded { reason, .. } if reason.contains("shop/b")),
        "{picture:?}"
    );
    held.put(ACCESS, at(access("b", "Deny"), "4", 21, 1), false);
    assert_eq!(held.picture(&picture).sync, Sync::Synced);
    // From then on they are anybody's to delete.
    held.remove(ACCESS, &at(access("b", "Deny"), "4", 22, 1));
    assert_eq!(names(&held), ["AccessPolicy shop/a"]);
}

async fn picture_where(store: &KubernetesStore, is_it: impl Fn(&Picture) -> bool) -> Arc<Picture> {
    let mut pictures = store.pictures();
    let found = tokio::time::timeout(DEADLINE, pictures.wait_for(|picture| is_it(picture))).await;
    let Ok(found) = found else { panic!("it never came: {:#?}", store.pictures().borrow()) };
    Arc::clone(&found.unwrap())
}

fn has(picture: &Picture, name: &str) -> bool {
    picture.policies.contains_key(&key(name))
}

#[tokio::test]
async fn watches_outlive_what_an_api_server_does() {
    let api = FakeApi::with_crds().await;
    api.apply(access("a", "Deny"));
    let store = KubernetesStore::start(api.client.clone());
    picture_where(&store, |picture| picture.sync == Sync::Synced && has(picture, "AccessPolicy shop/a"))
        .await;
    api.apply(access("b", "Deny"));
    picture_where(&store, |picture| has(picture, "AccessPolicy shop/b")).await;
    // 410: listed anew, and what went meanwhile is gone.
    api.compact();
    api.delete("accesspolicies", "shop", "b");
    api.apply(access("c", "Deny"));
    let picture = picture_where(&store, |picture| {
        has(picture, "AccessPolicy shop/c") && !has(picture, "AccessPolicy shop/b")
    })
    .await;
    // Away: everything stays, and nothing is written.
    api.set_down(true);
    let away = picture_where(&store, |picture| matches!(picture.sync, Sync::Degraded { .. })).await;
    assert_eq!(away.policies, picture.policies);
    api.set_down(false);
    api.delete("accesspolicies", "shop", "c");
    let back =
        picture_where(&store, |picture| picture.sync == Sync::Synced && picture.policies.len() == 1).await;
    assert!(has(&back, "AccessPolicy shop/a"));
}

#[tokio::test]
async fn a_deleted_crd_opens_nothing() {
    let api = FakeApi::with_crds().await;
    api.apply(access("a", "Deny"));
    let store = KubernetesStore::start(api.client.clone());
    picture_where(&store, |picture| picture.sync == Sync::Synced && has(picture, "AccessPolicy shop/a"))
        .await;
    api.uninstall(ACCESS);
    let gone = picture_where(&store, |picture| matches!(picture.sync, Sync::Degraded { .. })).await;
    assert!(has(&gone, "AccessPolicy shop/a"));
    api.install(ACCESS);
    let anew = picture_where(
        &store,
        |picture| matches!(&picture.sync, Sync::Degraded { reason, .. } if reason.contains("made again")),
    )
    .await;
    assert!(has(&anew, "AccessPolicy shop/a"));
    api.apply(access("a", "Deny"));
    picture_where(&store, |picture| picture.sync == Sync::Synced).await;
}

#[tokio::test]
async fn the_gateway_api_can_come_later() {
    let api = FakeApi::start().await;
    Resource::ALL
        .into_iter()
        .filter(|resource| resource.is_ours())
        .for_each(|resource| api.install(resource));
    let store = KubernetesStore::start(api.client.clone());
    picture_where(&store, |picture| picture.sync == Sync::Synced).await;
    api.install(Resource::Policy(Kind::HttpRoute));
    api.apply(route("mesh", &json!([{"group": "", "kind": "Service", "name": "web"}])));
    picture_where(&store, |picture| has(picture, "HTTPRoute shop/mesh")).await;
}

fn write(based_on: u64, changes: Vec<Change>) -> Write {
    Write { based_on, author: "ada".to_owned(), at: std::time::SystemTime::now(), changes }
}

#[tokio::test]
async fn writes_are_judged_and_say_what_they_did() {
    let api = FakeApi::with_crds().await;
    let store = KubernetesStore::start(api.client.clone());
    let first = picture_where(&store, |picture| picture.sync == Sync::Synced).await;
    let put = |name: &str, action: &str| Change::Put(object(access(name, action)));
    let picture =
        store.commit(write(first.revision, vec![put("a", "Deny"), put("b", "Deny")])).await.unwrap();
    assert!(has(&picture, "AccessPolicy shop/a") && has(&picture, "AccessPolicy shop/b"));
    assert_eq!(store.history(&key("AccessPolicy shop/a")).await.unwrap().len(), 1);

    // Judged against an older picture.
    let late = store.commit(write(first.revision, vec![put("a", "Allow")])).await;
    assert!(matches!(late, Err(WriteError::Conflict)), "{late:?}");
    // Somebody else has written, and the watch has not told yet or has: judged again, with the new one.
    api.apply(access("a", "Allow"));
    let raced = store.commit(write(picture.revision, vec![put("a", "Deny")])).await;
    assert!(matches!(raced, Err(WriteError::Conflict)), "{raced:?}");
    let newest =
        picture_where(&store, |picture| picture.policies[&key("AccessPolicy shop/a")].revision == 2).await;

    // Of several, one of which is refused, nothing is written.
    let before = api.writes("POST") + api.writes("PUT");
    let refused = store.commit(write(newest.revision, vec![put("a", "Deny"), put("refused", "Deny")])).await;
    assert!(
        matches!(&refused, Err(WriteError::Unavailable(reason)) if reason.contains("AccessPolicy shop/refused")),
        "{refused:?}"
    );
    assert_eq!(api.writes("POST") + api.writes("PUT"), before);

    let delete = Change::Delete(key("AccessPolicy shop/b"));
    let last = store.commit(write(newest.revision, vec![delete])).await.unwrap();
    assert!(!has(&last, "AccessPolicy shop/b"));
    assert!(api.get("accesspolicies", "shop", "b").is_none());
}

fn resolution(picture: &Picture, catalog: Catalog) -> crate::policies::resolver::Resolution {
    crate::policies::resolver::Resolution::new(picture, catalog)
}

#[tokio::test]
async fn statuses_are_written_once_and_leave_others_alone() {
    let api = FakeApi::with_crds().await;
    api.apply(access("a", "Deny"));
    let parents = json!([{"group": "", "kind": "Service", "name": "web"}]);
    let mut both = route("mesh", &parents);
    let theirs =
        json!({"parentRef": {"name": "public"}, "controllerName": "example.org/gateway", "conditions": []});
    both["status"] = json!({"parents": [theirs]});
    api.apply(both);
    let store = Arc::new(KubernetesStore::start(api.client.clone()));
    let picture =
        picture_where(&store, |picture| picture.sync == Sync::Synced && picture.policies.len() == 2).await;
    let (resolutions, resolved) = watch::channel(Some(Arc::new(resolution(&picture, Catalog::default()))));
    let (leads, leading) = watch::channel(false);
    let identity = "spiffe://outrigger.local/ns/outrigger-system/sa/outrigger-controller".parse().unwrap();
    let replicas = Arc::new(Replicas::new(Arc::default(), resolved.clone(), identity));
    let writing = tokio::spawn(status::run(Arc::clone(&store), resolved, replicas, leading));

    let written = async |is_it: &dyn Fn(&Value, &Value) -> bool| {
        let look = async {
            loop {
                let access = api.get("accesspolicies", "shop", "a").unwrap()["status"].clone();
                let route = api.get("httproutes", "shop", "mesh").unwrap()["status"].clone();
                if is_it(&access, &route) {
                    return (access, route);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(DEADLINE, look).await.expect("statuses were not written")
    };
    // Nobody but the leader.
    resolutions.send_modify(|_| {});
    tokio::task::yield_now().await;
    assert_eq!(api.writes("PATCH"), 0);
    leads.send_replace(true);
    let (access_status, route_status) = written(&|access, route| {
        access.get("conditions").is_some() && route["parents"].as_array().is_some_and(|all| all.len() == 2)
    })
    .await;
    assert_eq!(access_status["observedGeneration"], 1);
    assert_eq!(access_status["conditions"][0]["reason"], "Accepted");
    assert_eq!(access_status["proxies"]["on"], 0);
    assert_eq!(route_status["parents"][0], theirs);
    let own = &route_status["parents"][1];
    assert_eq!((&own["controllerName"], &own["parentRef"]), (&json!(status::CONTROLLER), &parents[0]));
    let by_type: BTreeMap<&str, &str> = own["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["type"].as_str().unwrap(), one["reason"].as_str().unwrap()))
        .collect();
    let expected = [("Accepted", "NoMatchingParent"), ("ResolvedRefs", "RefNotPermitted")];
    assert_eq!(by_type, expected.into());

    // A second round has nothing to write; one with a fault says so of the new generation, and what it said stays.
    let before = api.writes("PATCH");
    let mut bad = access("a", "Deny");
    bad["status"] = access_status;
    bad["spec"]["rules"][0]["from"] = json!([]);
    api.apply(bad);
    let (faulty, _) = written(&|access, _| access["observedGeneration"] == 2).await;
    assert_eq!(faulty["conditions"][0]["reason"], "Invalid");
    assert!(faulty["conditions"][0]["message"].as_str().unwrap().contains("spec.rules[0].from"), "{faulty}");
    assert_eq!(api.writes("PATCH"), before + 1);
    writing.abort();
}

#[test]
fn what_is_refused_names_the_grant_that_is_missing() {
    let asks_for_a_grant = |parents: &Value| {
        let mut held = read();
        held.put(Resource::Policy(Kind::HttpRoute), at(route("mesh", parents), "1", 10, 1), false);
        let picture = held.picture(&Picture::default());
        let catalog = Catalog { grants: picture.grants.clone(), ..Catalog::default() };
        let resolved = resolve(&picture.policies, &catalog);
        let mut messages = resolved.conditions(&key("HTTPRoute shop/mesh")).iter().map(|one| &one.message);
        messages.any(|text| text.contains("no ReferenceGrant in namespace other"))
    };
    assert!(asks_for_a_grant(&json!([{"group": "", "kind": "Service", "name": "web"}])));
    // A consumer's route: its requests go to that Service without it, too.
    let parent = |name| json!([{"group": "", "kind": "Service", "name": name, "namespace": "other"}]);
    assert!(!asks_for_a_grant(&parent("orders")));
    assert!(asks_for_a_grant(&parent("payments")));
}
