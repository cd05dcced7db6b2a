//! People with nothing but a kubeconfig, and what the mesh's own accounts may do.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule, Role};
use kube::api::Api;
use outrigger_e2e::kubernetes::node::LIMIT;
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::wait::wait_until;

use crate::world::{MESH, SHOP, World};

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![case("the command line needs a kubeconfig only: it looks, checks, writes and deletes", command_line)]
}

/// One object of each kind, each with something that can change.
fn policies((path, mtls, attempts, port): (&str, &str, u32, u16)) -> String {
    format!(
        r"
apiVersion: outrigger.dev/v1alpha1
kind: MeshDefaults
metadata: {{ name: default, namespace: people }}
spec: {{ inbound: Allow, mtls: {mtls} }}
---
apiVersion: outrigger.dev/v1alpha1
kind: AccessPolicy
metadata: {{ name: people, namespace: people }}
spec:
  targetRef: {{ kind: Service, name: people }}
  rules: [{{ name: one, action: Deny, to: [{{ paths: [{{ type: PathPrefix, value: {path} }}] }}] }}]
---
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {{ name: people, namespace: people }}
spec:
  targetRef: {{ kind: Service, name: people }}
  retry: {{ attempts: {attempts}, on: [gateway-error] }}
---
apiVersion: outrigger.dev/v1alpha1
kind: ExternalService
metadata: {{ name: partner, namespace: people }}
spec:
  hosts: [partner.example]
  ports: [{{ name: http, port: {port}, protocol: HTTP }}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{ name: people, namespace: people }}
spec:
  parentRefs: [{{ group: '', kind: Service, name: people, port: 80 }}]
  rules: [{{ matches: [{{ path: {{ type: PathPrefix, value: {path} }} }}], backendRefs: [{{ name: people, port: 80 }}] }}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {{ name: people, namespace: people }}
spec:
  parentRefs: [{{ group: '', kind: Service, name: people, port: 80 }}]
  rules: [{{ matches: [{{ method: {{ service: 'people{attempts}' }} }}], backendRefs: [{{ name: people, port: 80 }}] }}]
"
    )
}

async fn command_line(world: Arc<World>) -> anyhow::Result<()> {
    let folder = sandbox::get().work.join("people");
    std::fs::create_dir_all(&folder).context("making a folder")?;
    let file = folder.join("policies.yaml");
    let outrigger = async |arguments: &[&str]| {
        let mut command = Command::new(sandbox::get().binary("outrigger")?);
        command.args(arguments).env("KUBECONFIG", world.node.cluster().kubeconfig()).env("HOME", &folder);
        world.node.host().output(command).await
    };
    let checked = outrigger(&["check"]).await?;
    println!("{checked}");
    let services = outrigger(&["services"]).await?;
    ensure!(services.contains("orders") && services.contains("kubernetes"), "{services}");
    let proxies = outrigger(&["proxies"]).await?;
    ensure!(proxies.contains("ns/shop/sa/web"), "{proxies}");
    let explained =
        outrigger(&["policy", "explain", "-n", SHOP, "--from", "web", "--to", "orders:80"]).await?;
    ensure!(explained.contains("orders.shop"), "{explained}");

    world.node.kubectl(&["create", "namespace", "people"]).await?;
    let path = file.display().to_string();
    for step in [("/a", "Permissive", 1, 80), ("/b", "Strict", 2, 81)] {
        std::fs::write(&file, policies(step)).context("writing policies")?;
        let applied = outrigger(&["policy", "apply", "-f", &path]).await?;
        ensure!(applied.contains("AccessPolicy"), "{applied}");
        let shown =
            world.node.kubectl(&["get", "accesspolicy", "people", "-n", "people", "-o", "yaml"]).await?;
        ensure!(shown.contains(step.0), "{shown}");
        // Each kind's status is written, too: the leader may do so.
        for kind in [
            "meshdefaults/default",
            "accesspolicy/people",
            "trafficpolicy/people",
            "externalservice/partner",
            "httproute/people",
            "grpcroute/people",
        ] {
            wait_until(LIMIT, kind, || async {
                let shown = world.node.kubectl(&["get", kind, "-n", "people", "-o", "yaml"]).await?;
                ensure!(shown.contains("conditions:"), "no status: {shown}");
                Ok(())
            })
            .await?;
        }
    }
    outrigger(&["policy", "delete", "-f", &path]).await?;
    let left = world.node.kubectl(&["get", "outrigger", "-n", "people", "-o", "name"]).await?;
    ensure!(left.is_empty(), "{left}");
    world.node.kubectl(&["delete", "namespace", "people"]).await.map(drop)
}

/// Granted, and not to be seen in the audit log of a suite: account, group, resource, verb.
const UNSEEN: &[(&str, &str, &str, &str)] = &[
    // The certificate is renewed after sixty days.
    ("outrigger-controller", "", "secrets", "update"),
    // A server-side apply that makes its object needs it, and is a `patch` in the log.
    ("outrigger-controller", "", "configmaps", "create"),
];

/// The audit log is written in batches.
const WRITTEN: Duration = Duration::from_secs(10);

/// Compares what the chart grants the mesh's own accounts with what the API server saw of them so far: nothing is granted that
/// is not used, nothing was denied.
pub(crate) async fn rights(world: Arc<World>) -> anyhow::Result<()> {
    wait_until(WRITTEN, "the audit log to hold everything", || compare(&world)).await
}

async fn compare(world: &World) -> anyhow::Result<()> {
    let audit = world.node.cluster().audit()?;
    let mut faults = BTreeSet::new();
    for account in ["outrigger-controller", "outrigger-injector"] {
        let user = format!("system:serviceaccount:{MESH}:{account}");
        let seen: Vec<_> = audit.iter().filter(|request| request.user == user).collect();
        ensure!(!seen.is_empty(), "the audit log has nothing of {account}");
        for denied in seen.iter().filter(|request| request.code == 403) {
            faults.insert(format!("{account} was denied: {} {}", denied.verb, denied.uri));
        }
        let of_cluster = Api::<ClusterRole>::all(world.node.client()).get(account).await?.rules;
        let of_namespace = Api::<Role>::namespaced(world.node.client(), MESH).get(account).await?.rules;
        for (group, resource, names, verb) in
            of_cluster.iter().chain(&of_namespace).flatten().flat_map(grants)
        {
            let used = seen.iter().any(|request| {
                request.group == group
                    && request.resource == resource
                    && request.verb == verb
                    && (names.is_empty() || names.contains(&request.name))
            });
            let unseen = UNSEEN.iter().any(|unseen| *unseen == (account, &*group, &*resource, &*verb));
            if !used && !unseen {
                faults.insert(format!("{account} never used: {verb} {resource} of {group:?} {names:?}"));
            }
        }
    }
    ensure!(faults.is_empty(), "{}", faults.into_iter().collect::<Vec<_>>().join("\n"));
    Ok(())
}

/// A rule, one resource and verb at a time.
fn grants(rule: &PolicyRule) -> Vec<(String, String, Vec<String>, String)> {
    let names = rule.resource_names.clone().unwrap_or_default();
    let mut all = Vec::new();
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            for verb in &rule.verbs {
                all.push((group.clone(), resource.clone(), names.clone(), verb.clone()));
            }
        }
    }
    all
}
