//! A bad policy is refused whole, says where and why, and changes nothing.

use std::sync::Arc;

use anyhow::ensure;
use outrigger_e2e::suite::{Case, case};

use crate::world::{HTTP, ORDERS, World};

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![
        case("a bad policy is refused and changes nothing", refused),
        case("each doubt about a policy is told once", doubts),
    ]
}

const GOOD: &str = "
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {name: orders, namespace: default}
spec:
  targetRef: {kind: Service, name: orders}
  rules:
  - {name: batch, action: Deny, from: [{serviceAccounts: [other/batch]}]}
";

/// What is wrong, and what the refusal must say: a line of the file where it has one, and the field or value.
const BAD: &[(&str, &[&str])] = &[
    // No YAML.
    ("apiVersion: [outrigger.dev/v1alpha1", &[".yaml:"]),
    // A field that does not exist, and next to it one that would be good: all or nothing.
    (
        "
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {name: other, namespace: default}
spec:
  targetRef: {kind: Service, name: orders}
  rules:
  - {action: Deny, form: [{serviceAccounts: [default/web]}]}
",
        &[".yaml:", "form"],
    ),
    // An empty selector would mean everybody.
    (
        "
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {name: other, namespace: default}
spec:
  targetRef: {kind: Service, name: orders}
  rules:
  - {action: Deny, from: []}
",
        &["from"],
    ),
    // An expression that is none.
    (
        "
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {name: other, namespace: default}
spec:
  targetRef: {kind: Service, name: orders}
  rules:
  - {action: Deny, to: [{paths: [{type: RegularExpression, value: '/a('}]}]}
",
        &["paths"],
    ),
    // No duration.
    (
        "
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: other, namespace: default}
spec:
  targetRef: {kind: Service, name: orders}
  timeouts: {request: soon}
",
        &["request"],
    ),
    // A kind that does not exist.
    (
        "
apiVersion: outrigger.dev/v1alpha1
kind: AccessRule
metadata: {name: other, namespace: default}
spec: {}
",
        &["AccessRule"],
    ),
    // The mesh is not a namespace's to configure.
    (
        "
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: other, namespace: default}
spec:
  targetRef: {kind: Mesh}
  timeouts: {request: 1s}
",
        &["targetRef.kind", "outrigger-system"],
    ),
    // Aliases that unfold to gigabytes.
    (
        "
a: &a [x, x, x, x, x, x, x, x, x, x]
b: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]
c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]
d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]
e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]
f: &f [*e, *e, *e, *e, *e, *e, *e, *e, *e, *e]
g: [*f, *f, *f, *f, *f, *f, *f, *f, *f, *f]
",
        &[],
    ),
];

async fn refused(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.without_policies().await?;
    world.mesh.apply(GOOD).await?;
    let before = in_force(&world).await?;
    for (bad, says) in BAD {
        // Beside one that is good, which must not be taken alone.
        let both = format!("{}\n---\n{bad}", GOOD.replace("name: orders,", "name: beside,"));
        for text in [*bad, &both] {
            let output = world.mesh.policy_command(&["apply", "-f"], text).await?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(!output.status.success(), "this was taken:\n{text}");
            for word in *says {
                ensure!(said.contains(word), "the refusal does not say {word:?}: {said}\nof\n{text}");
            }
            ensure!(in_force(&world).await? == before, "a refused policy changed something:\n{text}");
        }
    }
    let reply = world.batch.get(ORDERS, HTTP, "/whoami").await?;
    ensure!(reply.status == 403, "the policy in force lets {} through", reply.status);
    world.web.get(ORDERS, HTTP, "/whoami").await?.expect(200).map(drop)
}

/// Names and revisions of what is in force.
async fn in_force(world: &World) -> anyhow::Result<Vec<String>> {
    let policies = world.mesh.policies().await?;
    Ok(policies
        .iter()
        .map(|policy| format!("{} {}", policy["object"]["metadata"]["name"], policy["revision"]))
        .collect())
}

/// What stands nowhere else twice: a route that has no backend and leads to no service, with a policy on it.
const DOUBTFUL: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: later, namespace: default}
spec:
  parentRefs: [{group: '', kind: Service, name: later}]
  rules: [{name: all, matches: [{path: {type: PathPrefix, value: /}}]}]
---
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: later, namespace: default}
spec:
  targetRef: {kind: HTTPRoute, name: later, sectionName: all}
  timeouts: {request: 1s}
";

async fn doubts(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.without_policies().await?;
    let told = async |arguments: &[&str], yaml: &str| {
        let output = world.mesh.policy_command(arguments, yaml).await?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code().is_some_and(|code| code <= 1),
            "{arguments:?}: {}: {said}",
            output.status
        );
        let mut doubts: Vec<String> =
            said.lines().filter(|line| line.starts_with("warning: ")).map(str::to_owned).collect();
        doubts.sort();
        anyhow::Ok(doubts)
    };
    let first = told(&["validate", "--live", "-f"], DOUBTFUL).await?;
    println!("{first:#?}");
    let says = |what: &str| first.iter().filter(|doubt| doubt.contains(what)).count();
    ensure!(
        says("there is no service later.default") == 1 && says("has no `backendRefs`") == 1,
        "{first:#?}"
    );
    ensure!(first.len() == 2, "{first:#?}");
    for arguments in [&["diff", "-f"][..], &["apply", "--dry-run", "-f"], &["apply", "-f"]] {
        let doubts = told(arguments, DOUBTFUL).await?;
        ensure!(doubts == first, "{arguments:?} tells {doubts:#?}");
    }
    // The policy on it would be left behind; of both together neither is.
    let route = DOUBTFUL.split("---").next().unwrap_or_default();
    let left = told(&["delete", "--dry-run", "-f"], route).await?;
    ensure!(left.len() == 1 && left[0].contains("TrafficPolicy default/later refers to it"), "{left:#?}");
    let both = told(&["delete", "-f"], DOUBTFUL).await?;
    ensure!(both.is_empty(), "{both:#?}");
    Ok(())
}
