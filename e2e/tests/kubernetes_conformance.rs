//! Gateway API's own conformance suite, on a node with the mesh: both profiles of meshes with every extended feature that there
//! is, nothing skipped. Its report is published as it is, but for the day.
#![allow(clippy::doc_markdown, reason = "Kubernetes' words")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use outrigger_e2e::figures::{Figure, record};
use outrigger_e2e::kubernetes::images::Image;
use outrigger_e2e::kubernetes::node::Node;
use outrigger_e2e::network::Network;
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{case, suite};
use serde_json::Value;

/// Core, the extended features of meshes that version 1.6 of the Gateway API knows, and what else their tests ask for: without
/// the last five the suite skips seven tests of meshes, and counts a consumer route as supported that it has never tried.
const FEATURES: [&str; 17] = [
    "Mesh",
    "HTTPRoute",
    "GRPCRoute",
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteParentRefPort",
    "HTTPRouteResponseHeaderModification",
];
/// What the suite's manifests run; here it is made of the same sources.
const ECHO: &str = "registry.k8s.io/gateway-api/echo-advanced:v1.5.1";
/// The suite waits for pods, statuses and data paths, one test after the other: about a minute.
const LIMIT: Duration = Duration::from_mins(15);

fn main() -> ExitCode {
    let conformance = case("profiles MESH-HTTP and MESH-GRPC, core and all extended features", conformance);
    suite("kubernetes_conformance", build, vec![conformance.within(LIMIT)])
}

async fn build() -> anyhow::Result<(Node, Network)> {
    let (node, network) = Node::with_mesh().await?;
    node.add(&echo()?).await?;
    node.add_gateway_api().await?;
    node.install().await?;
    Ok((node, network))
}

fn echo() -> anyhow::Result<Image> {
    let own = rcgen::generate_simple_self_signed(["echo".to_owned()]).context("making a certificate")?;
    Image::new(ECHO)?
        .program(&sandbox::get().tool("echo-server")?, "/bin/server")?
        .program(&sandbox::get().tool("echo-client")?, "/bin/client")?
        .file("/cert.crt", &own.cert.pem())?
        .file("/cert.key", &own.signing_key.serialize_pem())
        .map(|image| image.entrypoint(["/bin/server"]))
}

async fn conformance(world: Arc<(Node, Network)>) -> anyhow::Result<()> {
    let (node, _) = &*world;
    let report = sandbox::get().work.join("report.yaml");
    let mut command = Command::new(sandbox::get().tool("gateway-conformance")?);
    command.env("KUBECONFIG", node.cluster().kubeconfig());
    command.args(["-test.run", "^TestConformance$", "-test.v", "-test.timeout", "14m"]);
    command.args([
        "-conformance-profiles",
        "MESH-HTTP,MESH-GRPC",
        "-supported-features",
        &FEATURES.join(","),
    ]);
    command.args(["-namespace-labels", "outrigger.dev/inject=enabled", "-mesh-name", "outrigger"]);
    command.args(["-organization", "outrigger", "-project", "outrigger", "-url", "https://outrigger.dev"]);
    command.args(["-version", env!("CARGO_PKG_VERSION"), "-contact", "https://outrigger.dev/contact"]);
    // One test, for who looks into a failure.
    let one = std::env::var("OUTRIGGER_CONFORMANCE").ok();
    if let Some(one) = &one {
        command.args(["-run-test", one]);
    }
    command.arg("-report-output").arg(&report);
    let start = Instant::now();
    let log = sandbox::get().logs.join("conformance");
    let outcome = node.host().finish(command).await;
    let said = match &outcome {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(error) => format!("{error:#}"),
    };
    fs::write(&log, &said).with_context(|| format!("writing {}", log.display()))?;
    let failed: Vec<_> = said.lines().filter(|line| line.trim_start().starts_with("--- FAIL")).collect();
    ensure!(outcome.is_ok(), "the suite failed; {} has all of it:\n{}", log.display(), failed.join("\n"));
    let skipped: Vec<_> =
        said.lines().filter(|line| line.contains("--- SKIP: TestConformance/Mesh")).collect();
    ensure!(skipped.is_empty() || one.is_some(), "tests of meshes were skipped:\n{}", skipped.join("\n"));
    let took = start.elapsed().as_secs_f64();
    record(&[Figure::info("Gateway API conformance, both profiles of meshes", "s", took)])?;
    if one.is_some() { Ok(()) } else { published(&report) }
}

/// The report under `docs/` is this one, but for the day on which it was made and the order of its profiles: the suite takes
/// them from a map of Go's.
fn published(report: &Path) -> anyhow::Result<()> {
    let comparable = |path: &Path| -> anyhow::Result<Value> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let mut report: Value =
            serde_saphyr::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
        report.as_object_mut().context("a report is a map")?.remove("date");
        let profiles = report["profiles"].as_array_mut().context("a report lists its profiles")?;
        profiles.sort_by_key(|profile| profile["name"].to_string());
        Ok(report)
    };
    let docs: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/gateway-api-conformance.yaml");
    if std::env::var_os("OUTRIGGER_REGENERATE").is_some() {
        fs::copy(report, &docs).with_context(|| format!("writing {}", docs.display()))?;
    }
    let (now, then) = (comparable(report)?, comparable(&docs)?);
    ensure!(now == then, "the report says other things than {}:\n{now:#}", docs.display());
    Ok(())
}
