use serde_json::Value;
use tokio::time::Instant;

use super::*;
use crate::kubernetes::fake::{Cluster, Way};

const DAY: Duration = Duration::from_hours(24);

fn configuration(cluster: &Cluster, resource: &str, name: &str, bundle: &Value) {
    let webhook = |name: &str| {
        let client = json!({ "caBundle": bundle, "service": { "name": INJECTOR, "namespace": "mesh" } });
        json!({ "name": name, "clientConfig": client, "sideEffects": "None", "admissionReviewVersions": ["v1"],
                "aFieldOfTomorrow": 1 })
    };
    let webhooks = [webhook("namespaces.outrigger.dev"), webhook("pods.outrigger.dev")];
    cluster.put(resource, json!({ "metadata": { "name": name }, "webhooks": webhooks }));
}

/// What the webhooks of a configuration trust, PEM.
fn bundles(cluster: &Cluster, resource: &str, name: &str) -> Vec<String> {
    let found = cluster.get(resource, "", name).unwrap();
    let webhooks = found["webhooks"].as_array().unwrap();
    assert!(webhooks.iter().all(|webhook| webhook["aFieldOfTomorrow"] == 1), "{webhooks:?}");
    let bundle = |webhook: &Value| {
        serde_json::from_value::<Option<ByteString>>(webhook["clientConfig"]["caBundle"].clone()).unwrap()
    };
    webhooks.iter().map(|webhook| String::from_utf8(bundle(webhook).unwrap_or_default().0).unwrap()).collect()
}

fn held(cluster: &Cluster) -> Serving {
    let secret = cluster.get("secrets", "mesh", SECRET).expect("there is a Secret");
    serving(&serde_json::from_value(secret).unwrap()).expect("it holds a certificate")
}

fn roots(text: &str) -> Vec<String> {
    text.split_inclusive("-----END CERTIFICATE-----\n").map(str::to_owned).collect()
}

fn upkeep(cluster: &Cluster) -> (Upkeep, tokio::sync::watch::Sender<Way>) {
    let (client, way) = cluster.client();
    (Upkeep::new(client, "mesh"), way)
}

#[tokio::test(start_paused = true)]
async fn the_first_certificate_comes_at_once_and_is_trusted_before_it_serves() {
    let cluster = Cluster::new();
    configuration(&cluster, "mutatingwebhookconfigurations", INJECTOR, &Value::Null);
    let (upkeep, _way) = upkeep(&cluster);
    let (since, now) = (Instant::now(), SystemTime::now());
    let renewal = upkeep.look(now).await.unwrap();
    assert!(since.elapsed() < Duration::from_secs(1));
    let days = renewal.duration_since(now).unwrap().as_secs_f64() / DAY.as_secs_f64();
    assert!((59.0..=60.0).contains(&days), "{days}");
    let patched = format!("PATCH mutatingwebhookconfigurations/{INJECTOR}");
    assert_eq!(cluster.writes(), [patched, format!("POST secrets/{SECRET}")]);
    let serving = held(&cluster);
    serving.renew_at(&["outrigger-injector.mesh.svc".to_owned()], now).unwrap();
    assert_eq!(bundles(&cluster, "mutatingwebhookconfigurations", INJECTOR), vec![serving.roots; 2]);
    // Nothing to do is nothing done.
    upkeep.look(now + DAY).await.unwrap();
    assert!(cluster.writes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_renewal_is_trusted_beside_the_old_before_it_serves() {
    let cluster = Cluster::new();
    configuration(&cluster, "mutatingwebhookconfigurations", INJECTOR, &Value::Null);
    configuration(&cluster, "validatingwebhookconfigurations", POLICIES, &Value::Null);
    let (upkeep, _way) = upkeep(&cluster);
    let mut now = SystemTime::now();
    upkeep.look(now).await.unwrap();
    for _ in 0..3 {
        cluster.writes();
        let old = held(&cluster);
        now += 61 * DAY;
        let since = Instant::now();
        upkeep.look(now).await.unwrap();
        assert!(since.elapsed() >= SPREAD);
        let writes = cluster.writes();
        assert_eq!(writes.last().unwrap(), &format!("PUT secrets/{SECRET}"));
        assert_eq!(writes.len(), 3, "{writes:?}");
        let new = held(&cluster);
        assert_ne!(new.certificate, old.certificate);
        let (before, after) = (roots(&old.roots), roots(&new.roots));
        assert_eq!((after.len(), &after[1]), (2, &before[0]));
        for (resource, name) in
            [("mutatingwebhookconfigurations", INJECTOR), ("validatingwebhookconfigurations", POLICIES)]
        {
            assert_eq!(bundles(&cluster, resource, name), vec![new.roots.clone(); 2]);
        }
        // An injector that has not heard of the new one yet is still believed.
        Serving { roots: new.roots, ..old }.renew_at(&upkeep.names, now).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_dies_in_a_renewal_leaves_what_works() {
    let cluster = Cluster::new();
    configuration(&cluster, "mutatingwebhookconfigurations", INJECTOR, &Value::Null);
    let (first, _way) = upkeep(&cluster);
    let now = SystemTime::now();
    first.look(now).await.unwrap();
    let old = held(&cluster);
    let later = now + 61 * DAY;
    // Between the new root and the new certificate.
    timeout(SPREAD / 2, first.look(later)).await.unwrap_err();
    let trusted = bundles(&cluster, "mutatingwebhookconfigurations", INJECTOR).remove(0);
    assert_eq!(held(&cluster).certificate, old.certificate);
    Serving { roots: trusted, ..old.clone() }.renew_at(&first.names, later).unwrap();
    let (second, _way) = upkeep(&cluster);
    second.look(later).await.unwrap();
    assert_ne!(held(&cluster).certificate, old.certificate);
    assert_eq!(roots(&held(&cluster).roots)[1], roots(&old.roots)[0]);
}

#[tokio::test(start_paused = true)]
async fn a_secret_that_is_lost_or_broken_is_made_anew_beside_what_still_serves() {
    let cluster = Cluster::new();
    configuration(&cluster, "mutatingwebhookconfigurations", INJECTOR, &Value::Null);
    let (upkeep, _way) = upkeep(&cluster);
    let now = SystemTime::now();
    upkeep.look(now).await.unwrap();
    for damage in ["gone", "empty", "broken"] {
        let old = held(&cluster);
        let mut secret = cluster.get("secrets", "mesh", SECRET).unwrap();
        match damage {
            "gone" => cluster.remove("secrets", "mesh", SECRET),
            "empty" => {
                secret["data"] = json!({});
                cluster.put("secrets", secret);
            }
            _ => {
                secret["data"]["tls.crt"] = json!(ByteString(b"nonsense".to_vec()));
                secret["data"]["ca.crt"] = json!(ByteString(b"nonsense".to_vec()));
                cluster.put("secrets", secret);
            }
        }
        upkeep.look(now).await.unwrap();
        let new = held(&cluster);
        new.renew_at(&upkeep.names, now).unwrap();
        let trusted = bundles(&cluster, "mutatingwebhookconfigurations", INJECTOR).remove(0);
        Serving { roots: trusted, ..old }
            .renew_at(&upkeep.names, now)
            .unwrap_or_else(|error| panic!("{damage}: {error}"));
    }
}

#[tokio::test(start_paused = true)]
async fn what_somebody_changes_is_put_right_within_a_second() {
    let cluster = Cluster::new();
    let (client, way) = cluster.client();
    tokio::spawn(keep(client, "mesh".to_owned()));
    // No configuration yet: the certificate is made nevertheless.
    cluster.until("the Secret", |cluster| cluster.get("secrets", "mesh", SECRET).is_some()).await;
    let right = |cluster: &Cluster| {
        bundles(cluster, "mutatingwebhookconfigurations", INJECTOR) == vec![held(cluster).roots; 2]
    };
    for wrong in [Value::Null, json!("bm9uc2Vuc2U="), json!("")] {
        configuration(&cluster, "mutatingwebhookconfigurations", INJECTOR, &wrong);
        let since = Instant::now();
        cluster.until("the repair", right).await;
        assert!(since.elapsed() <= Duration::from_secs(1), "{:?}", since.elapsed());
    }
    way.send_replace(Way::Down);
    configuration(&cluster, "mutatingwebhookconfigurations", INJECTOR, &json!(""));
    sleep(Duration::from_mins(3)).await;
    assert!(!right(&cluster));
    way.send_replace(Way::Open);
    let since = Instant::now();
    cluster.until("the repair once the API server is back", right).await;
    assert!(since.elapsed() <= Duration::from_secs(31), "{:?}", since.elapsed());
}
