use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::*;
use crate::kubernetes::fake::{Cluster, Way};

const ROOTS: &str = "the roots";

fn namespace(cluster: &Cluster, name: &str, label: Option<&str>) {
    let labels = label.map_or(json!({}), |value| json!({ "outrigger.dev/inject": value }));
    cluster.put("namespaces", json!({ "metadata": { "name": name, "labels": labels } }));
}

fn pod(cluster: &Cluster, namespace: &str, name: &str) {
    let labels = json!({ "outrigger.dev/injected": "true" });
    cluster.put("pods", json!({ "metadata": { "namespace": namespace, "name": name, "labels": labels } }));
}

fn map(cluster: &Cluster, namespace: &str) -> Option<Value> {
    cluster.get("configmaps", namespace, NAME)
}

fn is_current(cluster: &Cluster, namespace: &str) -> bool {
    map(cluster, namespace)
        .is_some_and(|map| map["data"][KEY] == ROOTS && map["metadata"]["labels"][MANAGED_BY] == CONTROLLER)
}

fn start(cluster: &Cluster) -> tokio::sync::watch::Sender<Way> {
    let (client, way) = cluster.client();
    tokio::spawn(keep(client, "mesh".to_owned(), ROOTS.to_owned()));
    way
}

#[tokio::test(start_paused = true)]
async fn they_follow_labels_and_pods() {
    let cluster = Cluster::new();
    namespace(&cluster, "mesh", None);
    namespace(&cluster, "shop", Some("enabled"));
    namespace(&cluster, "plain", None);
    namespace(&cluster, "out", Some("disabled"));
    start(&cluster);
    cluster
        .until("the first two", |cluster| is_current(cluster, "mesh") && is_current(cluster, "shop"))
        .await;

    let since = Instant::now();
    namespace(&cluster, "out", Some("enabled"));
    cluster.until("a label", |cluster| is_current(cluster, "out")).await;
    assert!(since.elapsed() < Duration::from_millis(100), "{:?}", since.elapsed());
    pod(&cluster, "plain", "web-1");
    cluster.until("a pod", |cluster| is_current(cluster, "plain")).await;

    // The label goes, a pod stays: so do the roots.
    pod(&cluster, "shop", "web-1");
    namespace(&cluster, "shop", None);
    namespace(&cluster, "out", None);
    cluster.until("a label that went", |cluster| map(cluster, "out").is_none()).await;
    sleep(Duration::from_mins(30)).await;
    assert!(is_current(&cluster, "shop") && is_current(&cluster, "plain") && is_current(&cluster, "mesh"));
    cluster.remove("pods", "shop", "web-1");
    cluster.until("the last pod went", |cluster| map(cluster, "shop").is_none()).await;
}

#[tokio::test(start_paused = true)]
async fn what_somebody_changes_is_put_right_and_what_is_not_ours_is_never_removed() {
    let cluster = Cluster::new();
    let others = json!({ "metadata": { "name": NAME, "namespace": "plain" }, "data": { "other": "thing" } });
    cluster.put("configmaps", others.clone());
    for (name, label) in [("mesh", None), ("shop", Some("enabled")), ("plain", None)] {
        namespace(&cluster, name, label);
    }
    start(&cluster);
    cluster.until("the first", |cluster| is_current(cluster, "shop")).await;
    for damage in [json!({ KEY: "other roots" }), json!({}), Value::Null] {
        let mut changed = map(&cluster, "shop").unwrap();
        changed["data"] = damage;
        cluster.put("configmaps", changed);
        let since = Instant::now();
        cluster.until("the repair", |cluster| is_current(cluster, "shop")).await;
        assert!(since.elapsed() <= REST, "{:?}", since.elapsed());
    }
    cluster.remove("configmaps", "shop", NAME);
    cluster.until("it is made again", |cluster| is_current(cluster, "shop")).await;

    sleep(Duration::from_mins(10)).await;
    assert_eq!(map(&cluster, "plain").unwrap()["data"], others["data"]);
    namespace(&cluster, "plain", Some("enabled"));
    cluster.until("the name is the mesh's", |cluster| is_current(cluster, "plain")).await;
}

#[tokio::test(start_paused = true)]
async fn a_fight_costs_one_write_a_second() {
    let cluster = Cluster::new();
    namespace(&cluster, "mesh", None);
    start(&cluster);
    cluster.until("the first", |cluster| is_current(cluster, "mesh")).await;
    cluster.writes();
    for _ in 0..600 {
        let mut changed = map(&cluster, "mesh").unwrap();
        changed["data"][KEY] = json!("other roots");
        cluster.put("configmaps", changed);
        sleep(Duration::from_millis(100)).await;
    }
    let writes = cluster.writes().len();
    assert!((50..=62).contains(&writes), "{writes}");
}

#[tokio::test(start_paused = true)]
async fn many_namespaces_at_once_and_an_api_server_that_goes_away() {
    let cluster = Cluster::new();
    namespace(&cluster, "mesh", None);
    let way = start(&cluster);
    cluster.until("the first", |cluster| is_current(cluster, "mesh")).await;
    way.send_replace(Way::Down);
    let names: Vec<String> = (0..1000).map(|index| format!("shop-{index}")).collect();
    for name in &names {
        namespace(&cluster, name, Some("enabled"));
    }
    sleep(Duration::from_mins(5)).await;
    assert!(is_current(&cluster, "mesh") && !is_current(&cluster, "shop-1"));
    way.send_replace(Way::Open);
    let since = Instant::now();
    cluster.until("all of them", |cluster| names.iter().all(|name| is_current(cluster, name))).await;
    assert!(since.elapsed() <= SLOWEST, "{:?}", since.elapsed());
    // Each is written once.
    sleep(COMPARE * 3).await;
    assert_eq!(cluster.writes().iter().filter(|write| write.starts_with("PATCH")).count(), 1 + 1000);
}

fn event<K: serde::de::DeserializeOwned>(name: &str, namespace: Option<&str>, labels: &Value) -> K {
    serde_json::from_value(json!({ "metadata": { "name": name, "namespace": namespace, "labels": labels, "resourceVersion": "7" } }))
        .unwrap()
}

proptest! {
    /// Whatever was heard, in whatever order: nothing is removed beside an injected pod, under a label, in the mesh's
    /// namespace or before everything was read; and what is needed and possible is written.
    #[test]
    fn nothing_needed_is_removed(
        steps in prop::collection::vec((0..3usize, 0..5usize, 0..3usize, any::<bool>()), 0..60),
    ) {
        let mut view = View::new("mesh".to_owned(), ROOTS.to_owned());
        for (kind, action, which, flag) in steps {
            let name = ["mesh", "shop", "plain"][which];
            match kind {
                0 => {
                    let labels = if flag { json!({ INJECT.0: INJECT.1 }) } else { json!({}) };
                    view.see(Seen::Namespace(happen(action, event(name, None, &labels))));
                }
                1 => _ = view.see(Seen::Pod(happen(action, event("web", Some(name), &json!({}))))),
                _ => {
                    let labels = if flag { json!({ MANAGED_BY: CONTROLLER }) } else { json!({}) };
                    view.see(Seen::Map(happen(action, event(NAME, Some(name), &labels))));
                }
            }
            let synced = view.namespaces.is_synced && view.pods.is_synced && view.maps.is_synced;
            for name in ["mesh", "shop", "plain"] {
                let (labelled, found) = (view.namespaces.of(name).next(), view.maps.of(name).next());
                let needed = labelled == Some(&true) || view.pods.of(name).next().is_some() || name == "mesh";
                match view.decide(name) {
                    Action::Remove { .. } => prop_assert!(synced && !needed && found.is_some_and(|found| found.ours)),
                    Action::Apply { foreign } => {
                        prop_assert!(synced && needed && labelled.is_some());
                        prop_assert_eq!(foreign, found.is_some_and(|found| !found.ours));
                    }
                    Action::Nothing => {
                        let possible = synced && labelled.is_some();
                        prop_assert!(!possible || !needed || found.is_some_and(|found| found.current));
                    }
                }
            }
        }
    }
}

fn happen<K>(action: usize, object: K) -> Event<K> {
    match action {
        0 => Event::Init,
        1 => Event::InitApply(object),
        2 => Event::InitDone,
        3 => Event::Apply(object),
        _ => Event::Delete(object),
    }
}
