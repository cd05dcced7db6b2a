//! Policies: what people write, what proxies are told of it, and what they say to that.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use outrigger_api::v1::{Destination, ExternalHost, Inbound, Mesh, Service, inbound, mesh};
use outrigger_consul::fake::{FakeConsul, Fault};
use outrigger_controller::config::PolicyStore;
use serde_json::{Value, json};

use crate::harness::{Announcing, Bench, DEADLINE, Discovery, identity, soon};

const ORDERS: &str = "kind: Service\nname: orders\nnamespace: shop\nports: [{port: 80, protocol: HTTP1}]\nendpoints:\n- {address: 127.0.0.1, port: 9001, identity: 'spiffe://outrigger.local/ns/shop/sa/orders'}\n";
const OTHER: &str = "kind: Service\nname: other\nnamespace: shop\nports: [{port: 80, protocol: HTTP1}]\nendpoints:\n- {address: 127.0.0.2, port: 9002, identity: 'spiffe://outrigger.local/ns/shop/sa/other'}\n";

#[expect(clippy::needless_pass_by_value, reason = "written where it is called")]
fn object(kind: &str, namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "outrigger.dev/v1alpha1", "kind": kind,
        "metadata": { "name": name, "namespace": namespace }, "spec": spec,
    })
}

fn timeout(name: &str, service: &str, timeout: &str) -> Value {
    let spec =
        json!({ "targetRef": { "kind": "Service", "name": service }, "timeouts": { "request": timeout } });
    object("TrafficPolicy", "shop", name, spec)
}

fn allow(name: &str, service: &str, caller: &str) -> Value {
    let rule = json!({ "action": "Allow", "from": [{ "serviceAccounts": [caller] }] });
    let spec = json!({ "targetRef": { "kind": "Service", "name": service }, "rules": [rule] });
    object("AccessPolicy", "shop", name, spec)
}

async fn apply(bench: &Bench, objects: &[Value]) -> Value {
    let (status, answer) =
        bench.api("POST", "/api/v1/policies/apply", Some(json!({ "objects": objects }))).await;
    assert_eq!(status, 200, "{answer:#}");
    answer
}

async fn get(bench: &Bench, path: &str) -> Value {
    let (status, answer) = bench.api("GET", path, None).await;
    assert_eq!(status, 200, "{path}: {answer:#}");
    answer
}

/// The object once its status is as wanted.
async fn until(bench: &Bench, path: &str, condition: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let found = get(bench, path).await;
        if condition(&found) {
            return found;
        }
        assert!(Instant::now() < deadline, "{path}: {found:#}");
        tokio::task::yield_now().await;
    }
}

fn request_timeout(service: &Service) -> Option<u32> {
    service.traffic.as_ref()?.timeouts.as_ref()?.request
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_reaches_proxies_and_its_status_says_so() {
    let mut bench = Bench::of(&[("orders.yaml", ORDERS), ("other.yaml", OTHER)]).await;
    let web = bench.workload("web", &[]).await;
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Service", &["orders.shop"]).await;
    let (before, _): (Service, _) = proxy.one("Service").await;
    assert!(before.routes.is_empty() && before.traffic.is_none());

    let path = "/api/v1/policies/TrafficPolicy/shop/slow";
    let answer = apply(&bench, &[timeout("slow", "orders", "2s")]).await;
    let applied = Instant::now();
    assert_eq!(
        (&answer["revision"], &answer["results"][0]["action"]),
        (&json!(1), &json!("created")),
        "{answer}"
    );
    assert_eq!(answer["results"][0]["key"], "TrafficPolicy shop/slow");
    let response = proxy.next().await;
    assert!(applied.elapsed() < Duration::from_secs(1), "pushes follow at once");
    let sent = until(&bench, path, |item| item["status"]["proxies"]["on"] == 1).await;
    assert_eq!(sent["status"]["proxies"]["accepted"], 0);
    proxy.ack(&response).await;
    let item = until(&bench, path, |item| item["status"]["proxies"]["accepted"] == 1).await;
    assert_eq!((&item["revision"], &item["author"]), (&json!(1), &json!("admin")));
    assert_eq!(item["status"]["conditions"][0]["type"], "Accepted", "{item:#}");
    assert_eq!(item["status"]["conditions"][0]["status"], "True", "{item:#}");
    assert_eq!(item["object"]["metadata"]["generation"], 1);

    // The same again changes nothing; a dry run neither.
    let answer = apply(&bench, &[timeout("slow", "orders", "2s")]).await;
    assert_eq!((&answer["revision"], &answer["results"][0]["action"]), (&json!(1), &json!("unchanged")));
    let dry = json!({ "objects": [timeout("slow", "orders", "3s")], "dryRun": true });
    let (status, answer) = bench.api("POST", "/api/v1/policies/apply", Some(dry)).await;
    assert_eq!((status, &answer["results"][0]["action"]), (200, &json!("configured")), "{answer}");
    assert_eq!(get(&bench, path).await["revision"], 1);
    proxy.assert_silent().await;

    // A policy for a service that this proxy does not use is not its business.
    apply(&bench, &[timeout("other", "other", "9s")]).await;
    proxy.assert_silent().await;

    apply(&bench, &[timeout("slow", "orders", "3s")]).await;
    let (service, _): (Service, _) = proxy.one("Service").await;
    assert_eq!(request_timeout(&service), Some(3000));
    let history = get(&bench, &format!("{path}/history")).await;
    let items: Vec<_> = history["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| (&item["revision"], &item["action"]))
        .collect();
    assert_eq!(items, [(&json!(3), &json!("configured")), (&json!(1), &json!("created"))]);

    let rollback = format!("{path}/rollback");
    let (status, answer) = bench.api("POST", &rollback, Some(json!({ "revision": 1 }))).await;
    assert_eq!((status, &answer["revision"]), (200, &json!(4)), "{answer}");
    let (service, version): (Service, _) = proxy.one("Service").await;
    assert_eq!(request_timeout(&service), Some(2000));
    let (status, answer) = bench.api("POST", &rollback, Some(json!({ "revision": 2 }))).await;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("not_found")), "{answer}");

    let all = get(&bench, "/api/v1/policies").await;
    assert_eq!((all["items"].as_array().unwrap().len(), &all["revision"]), (2, &json!(4)));
    let none = get(&bench, "/api/v1/policies?kind=accesspolicies&namespace=shop").await;
    assert!(none["items"].as_array().unwrap().is_empty());
    let proxies = get(&bench, "/api/v1/proxies").await;
    assert_eq!(
        proxies["proxies"][0]["policies"],
        json!([{ "key": "TrafficPolicy shop/slow", "state": "accepted" }])
    );

    // Policies outlive the controller, and what proxies hold is not sent again.
    drop(proxy);
    bench.down().await;
    bench.up().await;
    let mut proxy = web.discover(&bench).await;
    proxy.resume("Service", &["orders.shop"], &[("orders.shop", &version)]).await;
    proxy.assert_silent().await;
    until(&bench, path, |item| item["status"]["proxies"]["accepted"] == 1).await;

    let (status, answer) = bench.api("DELETE", &format!("{path}?revision=3"), None).await;
    assert_eq!((status, &answer["error"]["code"]), (409, &json!("conflict")), "{answer}");
    let (status, answer) = bench.api("DELETE", &format!("{path}?revision=4"), None).await;
    assert_eq!((status, &answer["revision"]), (200, &json!(5)), "{answer}");
    let (service, _): (Service, _) = proxy.one("Service").await;
    assert_eq!(service, before);
    assert_eq!(bench.api("GET", path, None).await.0, 404);
    assert_eq!(bench.api("DELETE", path, None).await.0, 404);
    assert_eq!(get(&bench, &format!("{path}/history")).await["items"][0]["action"], "deleted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_seen_at_the_policies_that_are_in_what_was_refused_and_at_no_others() {
    let bench = Bench::of(&[("orders.yaml", ORDERS), ("other.yaml", OTHER)]).await;
    apply(&bench, &[timeout("good", "other", "1s"), timeout("bad", "orders", "2s")]).await;
    let web = bench.workload("web", &[]).await;
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Service", &["orders.shop", "other.shop"]).await;
    let response = proxy.next().await;
    assert_eq!(response.resources.len(), 2);
    proxy.nack(&response, "orders.shop: a regular expression is too large").await;
    let path = "/api/v1/policies/TrafficPolicy/shop/bad";
    let bad = until(&bench, path, |item| item["status"]["proxies"]["refused"][0].is_object()).await;
    let refusal = &bad["status"]["proxies"]["refused"][0];
    assert_eq!(refusal["reason"], "orders.shop: a regular expression is too large");
    assert!(refusal["proxy"].as_str().unwrap().contains(identity("web").as_str()), "{refusal}");
    let good = get(&bench, "/api/v1/policies/TrafficPolicy/shop/good").await;
    assert_eq!(good["status"]["proxies"], json!({ "on": 1, "accepted": 1, "refused": [] }));

    // Repaired, it is refused no more.
    apply(&bench, &[timeout("bad", "orders", "3s")]).await;
    let (service, _): (Service, _) = proxy.one("Service").await;
    assert_eq!(request_timeout(&service), Some(3000));
    let all_well = json!({ "on": 1, "accepted": 1, "refused": [] });
    until(&bench, path, |item| item["status"]["proxies"] == all_well).await;

    // What a proxy refuses without naming a resource it may refuse for any.
    apply(&bench, &[timeout("bad", "orders", "4s")]).await;
    let response = proxy.next().await;
    proxy.nack(&response, "no").await;
    until(&bench, path, |item| item["status"]["proxies"]["refused"][0]["reason"] == "no").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_and_what_goes_is_one_write() {
    let bench = Bench::of(&[("orders.yaml", ORDERS)]).await;
    apply(&bench, &[timeout("old", "orders", "2s"), allow("web", "orders", "shop/web")]).await;
    let change = |dry_run: bool| {
        json!({
            "objects": [timeout("new", "orders", "3s"), allow("web", "orders", "shop/web")], "dryRun": dry_run,
            "deletions": ["TrafficPolicy shop/old"], "expect": { "TrafficPolicy shop/old": 1 },
        })
    };
    for dry_run in [true, false] {
        let (status, answer) = bench.api("POST", "/api/v1/policies/apply", Some(change(dry_run))).await;
        assert_eq!(status, 200, "{answer:#}");
        let results = answer["results"].as_array().unwrap().iter();
        let actions: Vec<_> = results.map(|result| [&result["key"], &result["action"]]).collect();
        assert_eq!(
            json!(actions),
            json!([
                ["TrafficPolicy shop/new", "created"],
                ["AccessPolicy shop/web", "unchanged"],
                ["TrafficPolicy shop/old", "deleted"],
            ])
        );
        assert_eq!(answer["revision"], if dry_run { 1 } else { 2 });
    }
    let all = get(&bench, "/api/v1/policies").await;
    let names: Vec<_> =
        all["items"].as_array().unwrap().iter().map(|item| &item["object"]["metadata"]["name"]).collect();
    assert_eq!(json!(names), json!(["new", "web"]));
    let history = get(&bench, "/api/v1/policies/TrafficPolicy/shop/old/history").await;
    assert_eq!(
        (&history["items"][0]["action"], &history["items"][0]["revision"]),
        (&json!("deleted"), &json!(2))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_refused_whole_with_every_fault() {
    let bench = Bench::of(&[("orders.yaml", ORDERS)]).await;
    apply(&bench, &[timeout("slow", "orders", "2s")]).await;
    let web = bench.workload("web", &[]).await;
    let mut proxy = web.discover(&bench).await;
    proxy.subscribe("Service", &["orders.shop"]).await;
    proxy.one::<Service>("Service").await;

    let mut colourful = timeout("b", "orders", "1s");
    colourful["spec"]["colour"] = json!("red");
    let everybody = object(
        "AccessPolicy",
        "shop",
        "c",
        json!({
            "targetRef": { "kind": "Service", "name": "orders" }, "rules": [{ "action": "Allow", "from": [] }],
        }),
    );
    let objects = json!({ "objects": [timeout("a", "orders", "1s"), colourful, everybody, 7] });
    let (status, answer) = bench.api("POST", "/api/v1/policies/apply", Some(objects)).await;
    assert_eq!((status, &answer["error"]["code"]), (422, &json!("invalid")), "{answer:#}");
    let faults: Vec<&str> = answer["error"]["faults"]
        .as_array()
        .unwrap()
        .iter()
        .map(|fault| fault["file"].as_str().unwrap())
        .collect();
    for file in ["objects[1]", "objects[2]", "objects[3]"] {
        assert!(faults.contains(&file), "{file}: {answer:#}");
    }
    assert!(!faults.contains(&"objects[0]"), "{answer:#}");

    for (body, want) in [
        (json!({ "objects": [timeout("a", "orders", "1s"), timeout("a", "orders", "2s")] }), 422),
        (
            json!({ "objects": [timeout("slow", "orders", "1s")], "expect": { "TrafficPolicy shop/slow": 7 } }),
            409,
        ),
        (
            json!({ "objects": [timeout("slow", "orders", "1s")], "expect": { "TrafficPolicy shop/slow": 0 } }),
            409,
        ),
        (
            json!({ "objects": [timeout("new", "orders", "1s")], "expect": { "TrafficPolicy shop/new": 1 } }),
            409,
        ),
        (json!({ "objects": [], "expect": { "nonsense": 1 } }), 422),
        (json!({ "objects": [], "deletions": ["nonsense"] }), 422),
        (
            json!({ "objects": [timeout("slow", "orders", "9s")], "deletions": ["TrafficPolicy shop/slow"] }),
            422,
        ),
        (
            json!({ "objects": [timeout("slow", "orders", "9s")], "deletions": ["TrafficPolicy shop/no"] }),
            404,
        ),
        (
            json!({ "objects": [timeout("new", "orders", "9s")], "deletions": ["TrafficPolicy shop/slow"],
                    "expect": { "TrafficPolicy shop/slow": 7 } }),
            409,
        ),
        (json!({ "objects": [], "dryrun": true }), 400),
        (json!({ "objects": vec![json!(1); 1001] }), 413),
    ] {
        let (status, answer) = bench.api("POST", "/api/v1/policies/apply", Some(body.clone())).await;
        assert_eq!(status, want, "{answer:#}");
        assert!(answer["error"]["message"].is_string(), "{answer:#}");
    }
    let all = get(&bench, "/api/v1/policies").await;
    assert_eq!(
        (&all["revision"], all["items"].as_array().unwrap().len()),
        (&json!(1), 1),
        "nothing has changed"
    );
    proxy.assert_silent().await;
    let right =
        json!({ "objects": [timeout("slow", "orders", "1s")], "expect": { "TrafficPolicy shop/slow": 1 } });
    assert_eq!(bench.api("POST", "/api/v1/policies/apply", Some(right)).await.0, 200);
    for (method, path) in [
        ("GET", "/api/v1/policies?kind=Deployment"),
        ("GET", "/api/v1/policies?colour=red"),
        ("GET", "/api/v1/endpoints?service=no%20name"),
        ("DELETE", "/api/v1/policies/TrafficPolicy/shop/slow?revision=x"),
    ] {
        assert_eq!(bench.api(method, path, None).await.0, 400, "{path}");
    }
    assert_eq!(bench.api("GET", "/api/v1/policies/TrafficPolicy/shop/..%2Fx/history", None).await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_doubt_is_told_once_also_of_what_a_deletion_leaves_behind() {
    let bench = Bench::of(&[("orders.yaml", ORDERS)]).await;
    let answer = apply(&bench, &[object("MeshDefaults", "shop", "default", json!({}))]).await;
    assert_eq!(answer["results"][0]["warnings"], json!(["spec: says nothing"]), "{answer:#}");

    let partner = json!({ "hosts": ["a.example.com"], "ports": [{ "port": 80, "protocol": "HTTP" }] });
    apply(&bench, &[object("ExternalService", "shop", "partner", partner), timeout("slow", "partner", "1s")])
        .await;
    let path = "/api/v1/policies/ExternalService/shop/partner";
    let left =
        json!(["TrafficPolicy shop/slow refers to it: spec.targetRef: there is no service partner.shop yet"]);
    for query in ["?dryRun=true", ""] {
        let (status, answer) = bench.api("DELETE", &format!("{path}{query}"), None).await;
        assert_eq!((status, &answer["warnings"]), (200, &left), "{answer:#}");
    }
    let (status, answer) = bench.api("DELETE", "/api/v1/policies/TrafficPolicy/shop/slow", None).await;
    assert_eq!((status, &answer["warnings"]), (200, &json!([])), "{answer:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_own_side_follows_identity_claims_and_defaults() {
    let late = "kind: Service\nname: late\nnamespace: shop\nports: [{port: 80}]\nendpoints: [{address: 127.0.0.1, port: 9003}]\n";
    let bench = Bench::of(&[("orders.yaml", ORDERS), ("late.yaml", late)]).await;
    let orders = bench.workload("orders", &["late.shop"]).await;
    // One connection, as a sidecar has.
    let channel = orders.channel(&bench).await;
    let mut proxy = Discovery::open(channel.clone()).await.unwrap();
    proxy.subscribe("Inbound", &[identity("orders").as_str()]).await;
    let (own, _): (Inbound, _) = proxy.one("Inbound").await;
    assert_eq!((own.mode(), own.access.is_none()), (inbound::Mode::Strict, true));

    apply(&bench, &[allow("pay", "orders", "shop/web"), allow("not-mine", "other", "shop/web")]).await;
    let (own, _): (Inbound, _) = proxy.one("Inbound").await;
    let names = |own: &Inbound| {
        own.access.iter().flat_map(|a| &a.policies).map(|p| p.name.clone()).collect::<BTreeSet<_>>()
    };
    assert_eq!(names(&own), ["shop/pay".to_owned()].into());

    // A claim makes it serve another service, whose policy then holds.
    apply(&bench, &[allow("late", "late", "shop/web")]).await;
    proxy.assert_silent().await;
    let mut announcing = Announcing::open(channel).await.unwrap();
    assert!(announcing.say(&[("late.shop", "127.0.0.1", 9003)], false).await[0].0);
    let (own, _): (Inbound, _) = proxy.one("Inbound").await;
    assert_eq!((names(&own), own.claims.len()), (["shop/late", "shop/pay"].map(str::to_owned).into(), 1));

    // The mesh's defaults, then a namespace's over them.
    apply(
        &bench,
        &[object(
            "MeshDefaults",
            "outrigger-system",
            "default",
            json!({ "mtls": "Permissive", "outbound": "Deny" }),
        )],
    )
    .await;
    let (own, _): (Inbound, _) = proxy.one("Inbound").await;
    assert_eq!(own.mode(), inbound::Mode::Permissive);
    proxy.subscribe("Mesh", &["mesh"]).await;
    let (mesh, _): (Mesh, _) = proxy.one("Mesh").await;
    assert_eq!(mesh.outbound(), mesh::OutboundDefault::Deny);
    apply(&bench, &[object("MeshDefaults", "shop", "default", json!({ "outbound": "Audit" }))]).await;
    let (mesh, _): (Mesh, _) = proxy.one("Mesh").await;
    assert_eq!(mesh.outbound(), mesh::OutboundDefault::Audit);
    until(&bench, "/api/v1/policies/md/shop/default", |item| item["status"]["proxies"]["on"] == 1).await;
    apply(&bench, &[object("MeshDefaults", "elsewhere", "default", json!({ "outbound": "Allow" }))]).await;
    proxy.assert_silent().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_outside_the_mesh_is_found_by_its_host() {
    let bench = Bench::start().await;
    let web = bench.workload("web", &[]).await;
    let mut proxy = web.discover(&bench).await;
    let mut other = web.discover(&bench).await;
    other.subscribe("Mesh", &["mesh"]).await;
    let (mesh, _): (Mesh, _) = other.one("Mesh").await;
    assert!(mesh.external_hosts.is_empty());
    proxy.subscribe("Destination", &["db.example.com"]).await;
    assert_eq!(proxy.take("Destination").await.removed_resources, ["db.example.com"]);
    let spec = json!({
        "hosts": ["db.example.com"], "ports": [{ "port": 5432, "protocol": "TCP" }],
        "endpoints": [{ "address": "192.0.2.9" }],
    });
    apply(&bench, &[object("ExternalService", "shop", "db", spec), timeout("slow", "db", "2s")]).await;
    // Every proxy is told which names lead to the mesh, whether it has asked for one or not.
    let (mesh, _): (Mesh, _) = other.one("Mesh").await;
    let host = ExternalHost { host: "db.example.com".to_owned(), service: "db.shop".to_owned() };
    assert_eq!(mesh.external_hosts, [host]);
    let (found, _): (Destination, _) = proxy.one("Destination").await;
    assert_eq!(found.service, "db.shop");
    assert!(!found.virtual_addresses.is_empty());
    proxy.subscribe("Service", &["db.shop"]).await;
    let (service, _): (Service, _) = proxy.one("Service").await;
    assert_eq!((service.endpoints.len(), service.source.as_str()), (1, "policy"));
    assert_eq!((service.endpoints[0].address.as_str(), request_timeout(&service)), ("192.0.2.9", Some(2000)));
    until(&bench, "/api/v1/policies/ExternalService/shop/db", |item| {
        item["status"]["proxies"]["accepted"] == 1
    })
    .await;
    let endpoints = get(&bench, "/api/v1/endpoints?service=db.shop").await;
    assert_eq!(
        (&endpoints["items"][0]["service"], &endpoints["items"][0]["ports"]["5432"]),
        (&json!("db.shop"), &json!(5432))
    );
    let catalog = get(&bench, "/api/v1/catalog").await;
    assert_eq!(catalog["services"], json!([]), "it is a policy, not what policies are about");

    other.assert_silent().await;
    let (status, answer) = bench.api("DELETE", "/api/v1/policies/ExternalService/shop/db", None).await;
    assert_eq!(status, 200, "{answer:#}");
    let (mesh, _): (Mesh, _) = other.one("Mesh").await;
    assert!(mesh.external_hosts.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_in_consul_stay_while_it_is_away_and_nothing_is_told_before_they_were_read() {
    let consul = FakeConsul::new();
    let address = consul.listen().await;
    let mut bench = Bench::start_with(&[("orders.yaml", ORDERS)], |config| {
        config.consul.addresses = vec![format!("http://{address}")];
        config.policies.store = PolicyStore::Consul;
    })
    .await;
    let orders = bench.workload("orders", &[]).await;
    let mut proxy = orders.discover(&bench).await;
    proxy.subscribe("Service", &["orders.shop"]).await;
    proxy.one::<Service>("Service").await;
    apply(&bench, &[timeout("slow", "orders", "2s")]).await;
    let (service, _): (Service, _) = proxy.one("Service").await;
    assert_eq!(request_timeout(&service), Some(2000));
    assert!(consul.world().keys.contains_key("outrigger/policies/TrafficPolicy/shop/slow"));

    // Another controller's write, or a person's, arrives by the watch.
    consul.change(|world| {
        let key = "outrigger/policies/TrafficPolicy/shop/slow";
        let text = String::from_utf8(world.keys[key].0.to_vec()).unwrap();
        world.put_key(key, text.replace("2s", "4s"));
    });
    let (service, _): (Service, _) = proxy.one("Service").await;
    assert_eq!(request_timeout(&service), Some(4000));

    consul.change(|world| world.permanent_fault = Some(Fault::Status(500, "No cluster leader")));
    until(&bench, "/api/v1/sources", |sources| sources["policies"]["state"] == "degraded").await;
    let item = get(&bench, "/api/v1/policies/TrafficPolicy/shop/slow").await;
    assert_eq!(item["object"]["spec"]["timeouts"]["request"], "4s", "reads go on");
    let body = json!({ "objects": [timeout("slow", "orders", "5s")] });
    let (status, answer) = bench.api("POST", "/api/v1/policies/apply", Some(body)).await;
    assert_eq!((status, &answer["error"]["code"]), (503, &json!("store_unavailable")), "{answer}");
    let (status, _) = bench.api("DELETE", "/api/v1/policies/TrafficPolicy/shop/slow", None).await;
    assert_eq!(status, 503);
    proxy.assert_silent().await;
    let mut second = orders.discover(&bench).await;
    second.subscribe("Service", &["orders.shop"]).await;
    let (service, _): (Service, _) = second.one("Service").await;
    assert_eq!(request_timeout(&service), Some(4000), "last good");

    // A controller that starts now knows no policies, and lets nobody start without them.
    bench.down().await;
    bench.up().await;
    let mut proxy = orders.discover(&bench).await;
    proxy.subscribe("Inbound", &[identity("orders").as_str()]).await;
    proxy.subscribe("Service", &["orders.shop"]).await;
    proxy.subscribe("Mesh", &["mesh"]).await;
    proxy.assert_silent().await;
    consul.change(|world| world.permanent_fault = None);
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let response = proxy.next().await;
        proxy.ack(&response).await;
        seen.push(response.type_url.rsplit('.').next().unwrap().to_owned());
    }
    seen.sort();
    assert_eq!(seen, ["Inbound", "Mesh", "Service"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_describes_itself() {
    let bench = Bench::start().await;
    let (status, description) = bench.api_as("none", "GET", "/api/v1/openapi.json", None).await;
    assert_eq!((status, &description["openapi"]), (200, &json!("3.1.0")));
    let paths = description["paths"].as_object().unwrap();
    assert!(paths.len() >= 12, "{paths:#?}");
    for (path, operations) in paths {
        let concrete = path.replace("{kind}", "TrafficPolicy").replace("{namespace}", "shop");
        let concrete = concrete.replace("{name}", "none").replace("{id}", "none");
        for (method, operation) in operations.as_object().unwrap() {
            let method = method.to_uppercase();
            let (status, answer) = bench.api(&method, &concrete, None).await;
            // A path or a method without a route has no error of ours.
            let known = status < 300 || answer["error"]["code"].is_string();
            assert!(known, "{method} {concrete}: {status} {answer}");
            assert!(
                operation["responses"][status.to_string()].is_object(),
                "{method} {path}: {status} is not described"
            );
            let open = path.ends_with("/openapi.json");
            let (status, _) = bench.api_as("none", &method, &concrete, None).await;
            assert_eq!(status == 401, !open, "{method} {path}");
        }
    }
    let schemas = get(&bench, "/api/v1/schemas").await;
    assert!(schemas["AccessPolicy"].is_object() && schemas["HTTPRoute"].is_object());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_write_at_once_lose_nothing() {
    let bench = Bench::of(&[("orders.yaml", ORDERS)]).await;
    let writes = (0..8).map(|at| {
        let bench = &bench;
        async move { apply(bench, &[allow(&format!("p{at}"), "orders", "shop/web")]).await }
    });
    let answers = soon("eight writes", futures_util::future::join_all(writes)).await;
    let mut revisions: Vec<u64> = answers.iter().map(|answer| answer["revision"].as_u64().unwrap()).collect();
    revisions.sort_unstable();
    assert_eq!(revisions, (1..=8).collect::<Vec<_>>());
    assert_eq!(get(&bench, "/api/v1/policies").await["items"].as_array().unwrap().len(), 8);
}
