//! The charts as real Helm renders them: what is in them, what they refuse, and what must never be in them.
//!
//! `OUTRIGGER_REGENERATE=1` writes the golden files and the reference anew.
#![allow(clippy::unwrap_used)] // everything here is a test

mod objects;
mod reference;
mod rules;

use std::path::{Path, PathBuf};

use outrigger_e2e::chart::{self, NAMESPACE, PROFILES};

/// Beside the profiles: every option at once, so that each template is rendered somewhere.
const EVERYTHING: &str = "tests/chart/everything.yaml";

/// What Helm prints, or what it says is wrong.
fn helm(arguments: &[&str]) -> Result<String, String> {
    // The suite lies in target/<profile>/deps.
    let suite = std::env::current_exe().unwrap();
    let binary = suite.ancestors().nth(3).unwrap().join("tools/helm");
    let home = tempfile::tempdir().unwrap();
    let output = chart::helm(&binary, home.path()).args(arguments).output();
    let output =
        output.unwrap_or_else(|error| panic!("{}: {error}: run `make tools` first", binary.display()));
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// Renders a chart with more arguments.
fn template(name: &str, namespace: &str, more: &[&str]) -> Result<String, String> {
    let folder = chart::folder(name);
    let mut arguments = vec!["template", name, folder.to_str().unwrap(), "--namespace", namespace];
    // The API that a golden file is for; Helm's own idea of it changes with its version.
    arguments.extend(["--kube-version", "1.34.0"]);
    arguments.extend(more);
    helm(&arguments)
}

/// Every set of values that is rendered here, by its name.
fn variants() -> Vec<(&'static str, Option<PathBuf>)> {
    let everything = Path::new(env!("CARGO_MANIFEST_DIR")).join(EVERYTHING);
    let profiles = PROFILES.map(|name| (name, Some(chart::profile(name))));
    [("default", None)].into_iter().chain(profiles).chain([("everything", Some(everything))]).collect()
}

fn render(values: Option<&Path>) -> String {
    let mut more = Vec::new();
    if let Some(values) = values {
        more.extend(["--values", values.to_str().unwrap()]);
    }
    template("outrigger", NAMESPACE, &more).unwrap()
}

/// Compares with a file of the repository, or writes it.
fn golden(file: &Path, text: &str) {
    if std::env::var_os("OUTRIGGER_REGENERATE").is_some() {
        std::fs::write(file, text).unwrap();
    }
    let held = std::fs::read_to_string(file).unwrap_or_default();
    if held != text {
        let at = held.lines().zip(text.lines()).position(|(a, b)| a != b).unwrap_or_default();
        let line = |text: &str| text.lines().nth(at).unwrap_or_default().to_owned();
        panic!(
            "{} differs at line {}: it has `{}`, now there is `{}`. If that is right, run with OUTRIGGER_REGENERATE=1",
            file.display(),
            at + 1,
            line(&held),
            line(text)
        );
    }
}

#[test]
fn every_profile_renders_as_it_did() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/chart/golden");
    for (name, values) in variants() {
        let text = render(values.as_deref());
        // The CRDs are the files that they are made of, which another test sees to.
        let documents = text.split("\n---\n").filter(|text| !text.contains("kind: CustomResourceDefinition"));
        golden(&folder.join(format!("{name}.yaml")), &documents.collect::<Vec<_>>().join("\n---\n"));
    }
    golden(&folder.join("demo.yaml"), &template("outrigger-demo", "shop", &[]).unwrap());
}

#[test]
fn a_render_is_the_same_twice() {
    for (name, values) in variants() {
        assert_eq!(render(values.as_deref()), render(values.as_deref()), "{name}");
    }
}

#[test]
fn lint_finds_nothing() {
    for (_, values) in variants() {
        let folder = chart::folder("outrigger");
        let mut arguments = vec!["lint", "--strict", "--namespace", NAMESPACE, folder.to_str().unwrap()];
        if let Some(values) = &values {
            arguments.extend(["--values", values.to_str().unwrap()]);
        }
        helm(&arguments).unwrap();
    }
    helm(&["lint", "--strict", chart::folder("outrigger-demo").to_str().unwrap()]).unwrap();
}

#[test]
fn another_namespace_is_refused() {
    let refused = template("outrigger", "default", &[]).unwrap_err();
    assert!(refused.contains("lives in the namespace outrigger-system, not in default"), "{refused}");
}

/// What is wrong, and how Helm names the place.
#[test]
fn a_wrong_value_is_refused_with_its_path() {
    for (setting, path) in [
        ("controler.replicas=3", "additional properties 'controler' not allowed"),
        ("controller.replica=3", "at '/controller': additional properties 'replica' not allowed"),
        ("controller.replicas=three", "at '/controller/replicas': got string, want integer"),
        ("mesh.mtls=off", "at '/mesh/mtls'"),
        ("mesh.leafLife=24", "at '/mesh/leafLife'"),
        ("mesh.cidrs={10.0.0.0}", "at '/mesh/cidrs/0'"),
        ("image.pullPolicy=Sometimes", "at '/image/pullPolicy'"),
        ("image.digests.proxy=abc", "at '/image/digests/proxy'"),
        ("proxy.resources.requests.gpu=1", "at '/proxy/resources/requests'"),
        ("proxy.resources.limits.memory=lots", "at '/proxy/resources/limits/memory'"),
        ("proxy.opaquePorts={70000}", "at '/proxy/opaquePorts/0'"),
        ("injector.timeoutSeconds=60", "at '/injector/timeoutSeconds'"),
        ("consul.addresses={localhost:8500}", "at '/consul/addresses/0'"),
        ("cni.binDir=opt", "at '/cni/binDir'"),
        ("log.format=xml", "at '/log/format'"),
        ("ca.certManager.enabled=true", "ca.certManager.issuerRef.name: name the Issuer"),
    ] {
        let refused = template("outrigger", NAMESPACE, &["--set", setting]).unwrap_err();
        assert!(refused.contains(path), "--set {setting}: {refused}");
    }
    for (setting, path) in [("replicas=-1", "at '/replicas'"), ("client.rps=1", "at '/client'")] {
        let refused = template("outrigger-demo", "shop", &["--set", setting]).unwrap_err();
        assert!(refused.contains(path), "--set {setting}: {refused}");
    }
}

/// A chart may be part of another one, which hands it `global`.
#[test]
fn another_chart_may_depend_on_it() {
    template("outrigger", NAMESPACE, &["--set", "global.imageRegistry=registry.example"]).unwrap();
}

#[test]
fn an_amount_may_be_a_number() {
    let text = template("outrigger", NAMESPACE, &["--set", "proxy.resources.limits.cpu=2"]).unwrap();
    assert!(text.contains("cpu: \"2\""), "the injector takes texts");
}

#[test]
fn versions_are_the_workspaces() {
    for name in ["outrigger", "outrigger-demo"] {
        let text = std::fs::read_to_string(chart::folder(name).join("Chart.yaml")).unwrap();
        for field in ["version", "appVersion"] {
            let line = format!("\n{field}: {}\n", env!("CARGO_PKG_VERSION"));
            assert!(text.contains(&line), "{name}/Chart.yaml lacks{line}");
        }
    }
}
