//! `outrigger policy test` says what the mesh does: a thousand random requests, sent and asked about.
//!
//! What the mesh did is written down as the cases of a `PolicyTest`, which the CLI then runs against the same policies.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::mesh::{Workload, identity};
use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::wait::wait_until;
use serde_json::{Value, json};

use crate::echo::{Answered, Asked, NAMESPACE, ask, service};
use crate::world::World;

const REQUESTS: usize = 1_000;
const IN_FORCE: Duration = Duration::from_secs(5);
/// Any number: a failure names it.
const SEED: u64 = 0x0711_6a5e;

/// Routes that overlap, rules that contradict each other, paths that can be written in two ways, and no default that helps.
const POLICIES: &str = r"
apiVersion: outrigger.dev/v1alpha1
kind: MeshDefaults
metadata: {name: default, namespace: outrigger-system}
spec: {inbound: Deny}
---
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {name: readers, namespace: gateway-conformance-mesh}
spec:
  targetRef: {kind: Namespace}
  rules:
  - name: web-reads
    action: Allow
    from: [{serviceAccounts: [default/web]}]
    to: [{methods: [GET, HEAD]}, {methods: [POST], paths: [{type: PathPrefix, value: /cart}]}]
  - name: batch-has-a-corner
    action: Allow
    from: [{namespaces: [other]}]
    to: [{paths: [{type: PathPrefix, value: /public}, {type: Exact, value: /cart}]}]
---
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {name: never, namespace: gateway-conformance-mesh}
spec:
  targetRef: {kind: Service, name: echo-v1}
  rules:
  - name: admin
    action: Deny
    to: [{paths: [{type: PathPrefix, value: /cart/admin}, {type: RegularExpression, value: '/public/.*[.]key'}]}]
  - {name: evil, action: Deny, to: [{headers: [{name: x-env, type: Exact, value: evil}]}]}
---
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {name: watched, namespace: gateway-conformance-mesh}
spec:
  targetRef: {kind: Service, name: echo-v2}
  mode: Audit
  rules: [{name: nobody, action: Deny}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: shop, namespace: gateway-conformance-mesh}
spec:
  parentRefs: [{group: '', kind: Service, name: echo, port: 80}]
  rules:
  - name: cart
    matches: [{path: {type: Exact, value: /cart}}]
    backendRefs: [{name: echo-v1, port: 80}]
  - name: inside-cart
    matches: [{path: {type: PathPrefix, value: /cart}}]
    backendRefs: [{name: echo-v2, port: 80}, {name: echo-v1, port: 80, weight: 2}]
  - name: canary
    matches: [{headers: [{name: x-env, value: canary}]}]
    backendRefs: [{name: echo-v2, port: 80}]
  - name: moved
    matches: [{path: {type: PathPrefix, value: /old}}]
    filters:
    - {type: RequestRedirect, requestRedirect: {statusCode: 301, path: {type: ReplacePrefixMatch, replacePrefixMatch: /public}}}
  - name: posted
    matches: [{method: POST, path: {type: PathPrefix, value: /public}}]
    backendRefs: [{name: echo-v1, port: 80}]
  - name: public
    matches: [{path: {type: PathPrefix, value: /public}}, {queryParams: [{name: q, value: '1'}]}]
    backendRefs: [{name: echo-v2, port: 80}]
";

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![case("policy test says what the mesh does: 1,000 requests", agree)]
}

fn random(rng: &mut fastrand::Rng) -> Asked {
    const HEADS: &[&str] =
        &["", "/cart", "/public", "/old", "/cartoon", "/other", "//cart", "/public/../cart", "/./cart"];
    const TAILS: &[&str] = &[
        "",
        "/",
        "/a",
        "/admin",
        "/admin/x",
        "/b.key",
        "/%61",
        "/%2e%2e/cart",
        "/%2Fadmin",
        "/%41dmin",
        "/a;b",
    ];
    const QUERIES: &[&str] = &["", "", "", "?q=1", "?q=2", "?p=3&q=1", "?q=%31", "?q"];
    const METHODS: &[&str] = &["GET", "GET", "GET", "POST", "PUT", "DELETE"];
    const ENVIRONMENTS: &[&str] = &["", "", "", "canary", "evil", "Canary"];
    let mut one = |of: &[&'static str]| of[rng.usize(..of.len())];
    let target = format!("{}{}", one(HEADS), one(TAILS));
    let target = format!("{}{}", if target.is_empty() { "/" } else { &target }, one(QUERIES));
    let (method, environment) = (one(METHODS).to_owned(), one(ENVIRONMENTS));
    let headers =
        if environment.is_empty() { Vec::new() } else { vec![("x-env".to_owned(), environment.to_owned())] };
    Asked { method, target, host: "echo".to_owned(), headers }
}

/// What the mesh did, in the words of a `PolicyTest`.
fn expectation(answered: &Answered) -> anyhow::Result<Value> {
    let (status, reason) = (answered.reply.status.as_u16(), answered.reply.reason());
    if let Some(app) = &answered.app {
        return Ok(json!({ "decision": "Allow", "backend": format!("{app}.{NAMESPACE}") }));
    }
    let code = reason.as_deref().and_then(|reason| reason.split("; ").nth(1)).unwrap_or_default();
    Ok(match (status, code) {
        // Only one of two backends has this policy.
        (403, "access_denied") if reason.as_deref().is_some_and(|reason| reason.contains("never")) => {
            json!({ "decision": "Deny", "status": 403, "backend": format!("echo-v1.{NAMESPACE}") })
        }
        (403, "access_denied") => json!({ "decision": "Deny", "status": 403 }),
        (404, "no_route") => json!({ "decision": "NoRoute", "status": 404 }),
        (301, _) => json!({ "decision": "Redirect", "status": 301 }),
        (400, "bad_request") => json!({ "decision": "Deny", "status": 400 }),
        _ => anyhow::bail!("an answer that no policy explains: {status}, {reason:?}"),
    })
}

async fn agree(world: Arc<World>) -> anyhow::Result<()> {
    world.echo().await?;
    let _turn = world.without_policies().await?;
    world.mesh.apply(POLICIES).await?;
    let plain = |target: &str| Asked {
        method: "GET".to_owned(),
        target: target.to_owned(),
        host: "echo".to_owned(),
        headers: Vec::new(),
    };
    wait_until(IN_FORCE, "the policies to be in force", || async {
        let allowed = ask(&world.web, &service("echo"), 80, &plain("/public/a")).await?;
        let denied = ask(&world.batch, &service("echo"), 80, &plain("/cart/a")).await?;
        let missing = ask(&world.web, &service("echo"), 80, &plain("/other")).await?;
        // What is allowed is so without policies, too: the other backend is known by what it denies.
        let closed = Asked { method: "PUT".to_owned(), ..plain("/./cart/a;b?q=%31") };
        let closed = ask(&world.web, &service("echo"), 80, &closed).await?;
        ensure!(allowed.app.is_some(), "{:?}", allowed.reply.reason());
        ensure!(closed.reply.status == 403, "{:?}", closed.reply.reason());
        ensure!(denied.reply.status == 403 && missing.reply.status == 404, "{:?}", denied.reply.reason());
        Ok(())
    })
    .await?;

    let mut rng = fastrand::Rng::with_seed(SEED);
    let (mut cases, mut decisions) = (Vec::new(), BTreeMap::<String, u32>::new());
    for number in 0..REQUESTS {
        let (account, from): (_, &Workload) =
            if rng.bool() { ("web", &world.web) } else { ("other/batch", &world.batch) };
        let asked = random(&mut rng);
        let answered = ask(from, &service("echo"), 80, &asked).await?;
        let expect = expectation(&answered)
            .with_context(|| format!("request {number} of seed {SEED}: {account} {asked:?}"))?;
        *decisions.entry(expect["decision"].as_str().unwrap_or_default().to_owned()).or_default() += 1;
        let headers: BTreeMap<_, _> = asked.headers.iter().cloned().collect();
        cases.push(json!({
            "name": format!("{number}: {account} {} {} {headers:?}", asked.method, asked.target),
            "from": { "identity": identity(account), "address": from.host.v4() },
            "to": { "service": format!("echo.{NAMESPACE}"), "port": 80 },
            "request": {
                "method": asked.method, "path": asked.target, "authority": asked.host, "headers": headers,
            },
            "expect": expect,
        }));
    }
    println!("the mesh decided {decisions:?}");
    for (decision, count) in &decisions {
        ensure!(*count >= 10, "only {count} requests met {decision}: the comparison says little");
    }
    ensure!(decisions.len() >= 4, "the mesh decided only {decisions:?}");

    let file = json!({
        "apiVersion": "outrigger.dev/v1alpha1", "kind": "PolicyTest", "metadata": { "name": "agree" }, "cases": cases,
    });
    let output = world.mesh.policy_command(&["test", "--live", "-f"], &file.to_string()).await?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let lines: Vec<_> = out.lines().chain(err.lines()).collect();
    let shown = lines.iter().filter(|line| !line.to_lowercase().contains("ok")).take(40);
    let shown: Vec<_> = shown.copied().collect();
    ensure!(output.status.success(), "outrigger policy test disagrees, seed {SEED}:\n{}", shown.join("\n"));
    hold(&[Figure::at_least(
        "policy test agrees with the live mesh",
        "requests",
        1000.0,
        f64::from(u32::try_from(REQUESTS)?),
    )])
}
