//! Policies in a real Consul: its key-value store with ACLs, transactions and blocking queries, killed and misused.
//!
//! One mesh for all cases, with two controllers on one Consul. The second one serves no sidecar: it writes, and reads what the
//! first one wrote.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures_util::future::try_join_all;
use http::Method;
use outrigger_e2e::client::Reply;
use outrigger_e2e::consul::Mode;
use outrigger_e2e::controller::Controller;
use outrigger_e2e::load::{Load, Plan};
use outrigger_e2e::mesh::{Mesh, Setup, WRITES_POLICIES, Workload};
use outrigger_e2e::suite::{case, length, suite};
use outrigger_e2e::wait::wait_until;
use serde_json::{Value, json};
use tokio::time::sleep;

const HTTP: u16 = 8080;
const ORDERS: &str = "orders.service.consul";
const LIMIT: Duration = Duration::from_secs(20);
/// Where Consul keeps what all cases write, and the number that orders every write.
const KEY: &str = "outrigger/policies/HTTPRoute/default/orders";
const REVISION: &str = "outrigger/policies/revision";
/// A person's own key, in the midst of the store's.
const NOTE: &str = "outrigger/policies/note";
/// Requests a second through an outage.
const RATE: u32 = 100;
/// Writes of each of two controllers at once.
const WRITES: usize = 5;

fn main() -> ExitCode {
    suite(
        "stores",
        World::build,
        vec![
            case("what one controller writes is in force by every other", written),
            case("of two who write at once none overwrites the other", written_at_once),
            case("every write is remembered, and can be taken back", history),
            case("a key that somebody broke is named, and the last good stays", broken),
            case("Consul is killed and comes back", killed),
            case("a token that may not write, or read", denied),
            case("a store that was wiped is not believed", wiped),
        ],
    )
}

struct World {
    mesh: Mesh,
    /// The other controller.
    second: Controller,
    web: Workload,
    _orders: Workload,
}

impl World {
    async fn build() -> anyhow::Result<Self> {
        let setup = Setup { consul: Mode::PersistentAcl, policies_in_consul: true, ..Setup::default() };
        let mesh = Mesh::start(setup).await?;
        let mut second = mesh.another_controller("second").await?;
        let orders = mesh.workload("orders").serves("orders", HTTP).app(["--http", "8080"]).start().await?;
        let web = mesh.workload("web").start().await?;
        web.wait_for_service(ORDERS, HTTP, LIMIT).await?;
        second.wait_ready().await?;
        Ok(Self { mesh, second, web, _orders: orders })
    }

    /// The route with this mark, and nothing else, in force.
    async fn begin(&self, mark: &str) -> anyhow::Result<()> {
        self.mesh.clear_policies().await?;
        self.mesh.apply_only(&route(mark)).await?;
        self.wait_mark(mark).await
    }

    /// What the policy in force has answers say.
    async fn mark(&self) -> anyhow::Result<String> {
        let reply = self.web.get(ORDERS, HTTP, "/whoami").await?.expect(200)?;
        let mark =
            reply.headers.get("x-mark").map(|mark| String::from_utf8_lossy(mark.as_bytes()).into_owned());
        Ok(mark.unwrap_or_default())
    }

    async fn wait_mark(&self, wanted: &str) -> anyhow::Result<()> {
        wait_until(LIMIT, &format!("the mark {wanted:?}"), || async { self.expect_mark(wanted).await }).await
    }

    async fn expect_mark(&self, wanted: &str) -> anyhow::Result<()> {
        let mark = self.mark().await?;
        ensure!(mark == wanted, "the mark is {mark:?}, not {wanted:?}");
        Ok(())
    }

    /// `outrigger policy apply` that must fail: what it says.
    async fn refused(&self, mark: &str) -> anyhow::Result<String> {
        let output = self.mesh.policy_command(&["apply", "-f"], &route(mark)).await?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "{}: {said}", output.status);
        Ok(said)
    }

    /// How the first controller stands to its store.
    async fn store(&self) -> anyhow::Result<Value> {
        store(self.mesh.api(Method::GET, "/sources", None).await?)
    }

    async fn wait_state(&self, wanted: &str) -> anyhow::Result<Value> {
        wait_until(LIMIT, &format!("the store to be {wanted}"), || async {
            let store = self.store().await?;
            ensure!(store["state"] == wanted, "{store}");
            Ok(store)
        })
        .await
    }

    /// Waits until nothing, or exactly these keys, are found at fault.
    async fn wait_faults(&self, wanted: &[&str]) -> anyhow::Result<String> {
        wait_until(LIMIT, &format!("faults of {wanted:?}"), || async {
            let faults = self.store().await?["faults"].clone();
            let subjects: Vec<_> =
                faults.as_array().into_iter().flatten().map(|fault| &fault["subject"]).collect();
            ensure!(subjects == wanted, "{faults}");
            Ok(faults.to_string())
        })
        .await
    }
}

fn store(sources: Reply) -> anyhow::Result<Value> {
    let sources: Value = serde_json::from_slice(&sources.expect(200)?.body).context("reading the sources")?;
    Ok(sources["policies"].clone())
}

/// A route whose answers say this.
fn route_object(name: &str, mark: &str) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": { "name": name, "namespace": "default" },
        "spec": {
            "parentRefs": [{ "group": "", "kind": "Service", "name": "orders" }],
            "rules": [{
                "filters": [{
                    "type": "ResponseHeaderModifier",
                    "responseHeaderModifier": { "set": [{ "name": "x-mark", "value": mark }] },
                }],
                "backendRefs": [{ "name": "orders", "port": HTTP }],
            }],
        },
    })
}

/// The same as a file: JSON is YAML.
fn route(mark: &str) -> String {
    route_object("orders", mark).to_string()
}

async fn written(world: Arc<World>) -> anyhow::Result<()> {
    world.begin("one").await?;
    let kept = world.mesh.consul.lock().await.key(KEY).await?.context("the policy is not in Consul")?;
    ensure!(kept.contains("one"), "Consul holds {kept}");
    let first = world.mesh.policy("HTTPRoute", "default", "orders").await?;
    wait_until(LIMIT, "the other controller to have read it", || async {
        let reply = world.second.api(Method::GET, "/policies/HTTPRoute/default/orders", None).await?;
        let second: Value = serde_json::from_slice(&reply.expect(200)?.body)?;
        ensure!(second["object"] == first["object"], "{second} is not {first}");
        Ok(())
    })
    .await?;
    let objects = json!({ "objects": [route_object("orders", "two")] });
    world.second.api(Method::POST, "/policies/apply", Some(objects)).await?.expect(200)?;
    world.wait_mark("two").await?;
    // What the first one writes now it judges by what the second one wrote.
    world.mesh.apply_only(&route("three")).await?;
    world.wait_mark("three").await
}

async fn written_at_once(world: Arc<World>) -> anyhow::Result<()> {
    world.begin("before").await?;
    let revision = world.mesh.policy("HTTPRoute", "default", "orders").await?["revision"].clone();
    let objects = |mark: &str| {
        let expect = json!({ "HTTPRoute default/orders": revision });
        Some(json!({ "objects": [route_object("orders", mark)], "expect": expect }))
    };
    // Both have seen the same. One is told that this holds no longer, and its write is not there.
    let (first, second) = tokio::try_join!(
        world.mesh.api(Method::POST, "/policies/apply", objects("first")),
        world.second.api(Method::POST, "/policies/apply", objects("second")),
    )?;
    let (winner, loser) = if first.status == 200 { ("first", second) } else { ("second", first) };
    println!("the {winner} won; the other was told: {}", loser.text());
    ensure!(loser.text().contains("was expected at revision"), "{}: {}", loser.status, loser.text());
    loser.expect(409)?;
    world.wait_mark(winner).await?;

    // Neither expects anything: each write of both takes its turn.
    let before = world.store().await?["revision"].as_u64().context("a revision")?;
    let write = |name: String| Some(json!({ "objects": [route_object(&name, "many")] }));
    let ours =
        (0..WRITES).map(|at| world.mesh.api(Method::POST, "/policies/apply", write(format!("first-{at}"))));
    let theirs = (0..WRITES)
        .map(|at| world.second.api(Method::POST, "/policies/apply", write(format!("second-{at}"))));
    let (ours, theirs) = tokio::try_join!(try_join_all(ours), try_join_all(theirs))?;
    let mut revisions = BTreeSet::new();
    for reply in ours.into_iter().chain(theirs) {
        let applied: Value = serde_json::from_slice(&reply.expect(200)?.body)?;
        revisions.extend(applied["revision"].as_u64());
    }
    let count = 2 * WRITES as u64;
    ensure!(revisions == (before + 1..=before + count).collect(), "after {before} came {revisions:?}");
    wait_until(LIMIT, "both controllers to hold all of it", || async {
        for store in [world.store().await?, store(world.second.api(Method::GET, "/sources", None).await?)?] {
            ensure!(store["policies"] == count + 1 && store["revision"] == before + count, "{store}");
        }
        Ok(())
    })
    .await
}

async fn history(world: Arc<World>) -> anyhow::Result<()> {
    world.begin("one").await?;
    let objects = json!({ "objects": [route_object("orders", "two")] });
    world.second.api(Method::POST, "/policies/apply", Some(objects)).await?.expect(200)?;
    world.wait_mark("two").await?;
    let policy = |arguments: &[&'static str]| {
        let arguments = [&["policy"], arguments].concat();
        let mesh = &world.mesh;
        async move { mesh.cli(&arguments).await }
    };
    policy(&["rollback", "HTTPRoute", "orders"]).await?;
    world.wait_mark("one").await?;
    policy(&["delete", "HTTPRoute", "orders"]).await?;
    world.wait_mark("").await?;
    policy(&["rollback", "HTTPRoute", "orders"]).await?;
    world.wait_mark("one").await?;
    // Of both, as either tells it: the newest first. What the cases before did stands behind.
    let ours: Vec<Value> =
        serde_json::from_str(&policy(&["history", "HTTPRoute", "orders", "-o", "json"]).await?)?;
    let actions: Vec<_> =
        ours.iter().take(5).map(|past| past["action"].as_str().unwrap_or_default()).collect();
    ensure!(actions == ["created", "deleted", "configured", "configured", "created"], "{actions:?}");
    let theirs = world.second.api(Method::GET, "/policies/HTTPRoute/default/orders/history", None).await?;
    let theirs: Value = serde_json::from_slice(&theirs.expect(200)?.body)?;
    ensure!(theirs["items"] == json!(ours), "the second says {theirs}, the first {ours:?}");
    Ok(())
}

async fn broken(world: Arc<World>) -> anyhow::Result<()> {
    world.begin("good").await?;
    let consul = &world.mesh.consul;
    let good = consul.lock().await.key(KEY).await?.context("the policy is not in Consul")?;
    // No JSON; a field that does not exist; another object.
    for (bad, says) in [
        ("{broken".to_owned(), "key must be a string"),
        (good.replace("backendRefs", "backends"), "backends"),
        (good.replace("\"orders\",\"namespace\"", "\"others\",\"namespace\""), "HTTPRoute default/others"),
    ] {
        ensure!(bad != good, "the store's form has changed: {good}");
        consul.lock().await.set_key(KEY, &bad).await?;
        wait_until(LIMIT, &format!("a fault that says {says:?}"), || async {
            let faults = world.wait_faults(&[KEY]).await?;
            ensure!(faults.contains(says), "{faults}");
            Ok(())
        })
        .await?;
        world.expect_mark("good").await?;
    }
    let log = world.mesh.controller_log().await;
    ensure!(log.contains(KEY) && log.contains("a policy in Consul cannot be used"), "the log is silent");
    consul.lock().await.set_key(NOTE, "do not touch before Friday").await?;
    world.wait_faults(&[KEY, NOTE]).await?;

    // Who knows no last good says nothing rather than half of it.
    let late = world.mesh.another_controller("late").await?;
    let said = wait_until(LIMIT, "the late controller to say what it lacks", || async {
        let body = json!({ "objects": [route_object("orders", "late")] });
        let reply = late.api(Method::POST, "/policies/apply", Some(body)).await?.expect(503)?;
        ensure!(reply.text().contains(KEY), "{}", reply.text());
        Ok(reply.text())
    })
    .await?;
    println!("a controller that starts now says: {said}");

    // The next good one is taken, over what was broken; by hand too.
    world.mesh.apply_only(&route("mended")).await?;
    world.wait_mark("mended").await?;
    world.wait_faults(&[NOTE]).await?;
    let mended = consul.lock().await.key(KEY).await?.context("the policy is not in Consul")?;
    consul.lock().await.set_key(KEY, &mended.replace("mended", "by hand")).await?;
    world.wait_mark("by hand").await?;
    consul.lock().await.delete_keys(NOTE).await?;
    world.wait_faults(&[]).await?;
    wait_until(LIMIT, "the late controller to have read everything", || async {
        let store = store(late.api(Method::GET, "/sources", None).await?)?;
        ensure!(store["state"] == "synced" && store["policies"] == 1, "{store}");
        Ok(())
    })
    .await
}

async fn killed(world: Arc<World>) -> anyhow::Result<()> {
    world.begin("before").await?;
    let target = world.web.look_up(ORDERS, HTTP).await?;
    let load = Load::start(&world.web.host, Plan::new(RATE, target, format!("{ORDERS}:{HTTP}"), "/whoami"));
    world.mesh.consul.lock().await.kill();
    let said = world.refused("during").await?;
    println!("without Consul apply says: {said}");
    ensure!(said.contains("Consul"), "apply does not say what is missing: {said}");
    sleep(length(3, 60)).await;
    world.expect_mark("before").await?;
    world.mesh.consul.lock().await.restart().await?;
    world.wait_state("synced").await?;
    world.expect_mark("before").await?;
    world.mesh.apply_only(&route("after")).await?;
    world.wait_mark("after").await?;
    let objects = json!({ "objects": [route_object("orders", "second")] });
    wait_until(LIMIT, "the other controller to write again", || async {
        world.second.api(Method::POST, "/policies/apply", Some(objects.clone())).await?.expect(200)
    })
    .await?;
    world.wait_mark("second").await?;
    let outcome = load.stop().await?;
    println!("Consul killed and back: {outcome}");
    ensure!(outcome.failed() == 0 && outcome.total() >= 200, "{outcome}");
    Ok(())
}

async fn denied(world: Arc<World>) -> anyhow::Result<()> {
    world.begin("before").await?;
    let consul = &world.mesh.consul;
    let reads = WRITES_POLICIES.replace("write", "read");
    consul.lock().await.allow_controller(&reads).await?;
    let said = world.refused("denied").await?;
    println!("with a token that may only read apply says: {said}");
    ensure!(said.contains("Permission denied") && said.contains(WRITES_POLICIES), "{said}");
    ensure!(!said.contains("may have taken effect"), "{said}");
    world.expect_mark("before").await?;

    consul.lock().await.allow_controller("").await?;
    // A query that is under way is judged anew when something changes.
    consul.lock().await.set_key(NOTE, "").await?;
    let store = world.wait_state("degraded").await?;
    println!("with a token that may nothing the store says: {store}");
    ensure!(store["reason"].to_string().contains("key_prefix"), "{store}");
    world.refused("denied").await?;
    world.expect_mark("before").await?;

    consul.lock().await.allow_controller(WRITES_POLICIES).await?;
    consul.lock().await.delete_keys(NOTE).await?;
    world.wait_state("synced").await?;
    world.mesh.apply_only(&route("after")).await?;
    world.wait_mark("after").await
}

async fn wiped(world: Arc<World>) -> anyhow::Result<()> {
    world.begin("kept").await?;
    let consul = &world.mesh.consul;
    let mut backup = Vec::new();
    for key in [KEY, REVISION] {
        backup.push((key, consul.lock().await.key(key).await?.with_context(|| format!("no {key}"))?));
    }
    consul.lock().await.delete_keys("outrigger/policies/").await?;
    let store = world.wait_state("degraded").await?;
    println!("of a store that was wiped it is said: {store}");
    world.expect_mark("kept").await?;
    world.refused("lost").await?;
    for (key, value) in &backup {
        consul.lock().await.set_key(key, value).await?;
    }
    world.wait_state("synced").await?;
    world.expect_mark("kept").await?;
    world.mesh.apply_only(&route("after")).await?;
    world.wait_mark("after").await
}
