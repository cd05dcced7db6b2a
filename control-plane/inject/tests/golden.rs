//! Each case of `tests/cases`: what is known of the namespace, a pod, and, beside it, what becomes of the pod: the outcome, the
//! warnings, and the patch. `UPDATE_CASES=1 cargo test -p outrigger-inject` writes them anew, for a reviewer to read.

#![allow(clippy::unwrap_used, reason = "what fails here fails a test")]

use std::{fs, path::PathBuf};

use outrigger_inject::{Mesh, Mode, Namespace, Outcome, Settings, decide, patch, remove};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Facts {
    namespace: String,
    inject: Option<String>,
    pod_security: Option<String>,
    mode: Mode,
}

impl Default for Facts {
    fn default() -> Self {
        Self { namespace: "shop".to_owned(), inject: None, pod_security: None, mode: Mode::Init }
    }
}

struct Case {
    name: String,
    expected: PathBuf,
    namespace: Namespace,
    mesh: Mesh,
    pod: Value,
}

fn cases() -> Vec<Case> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
    let mut cases: Vec<Case> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "yaml"))
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let documents: Vec<Value> =
                serde_saphyr::from_multiple(&fs::read_to_string(&path).unwrap()).unwrap();
            let [facts, pod] = documents.try_into().unwrap_or_else(|_| panic!("{name}: two documents"));
            let Facts { namespace, inject, pod_security, mode } = serde_json::from_value(facts).unwrap();
            Case {
                name,
                expected: path.with_extension("json"),
                namespace: Namespace { name: namespace, inject, pod_security },
                mesh: mesh(mode),
                pod,
            }
        })
        .collect();
    cases.sort_by(|one, other| one.name.cmp(&other.name));
    cases
}

fn mesh(mode: Mode) -> Mesh {
    Mesh {
        trust_domain: "outrigger.local".to_owned(),
        namespace: "outrigger-system".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        settings: Settings { image: "outrigger-proxy:1".to_owned(), mode, ..Settings::default() },
    }
}

#[test]
fn each_pod_becomes_what_stands_beside_it() {
    let mut wrong = Vec::new();
    for case in cases() {
        let review = decide(&case.pod, &case.namespace, &case.mesh);
        let patch = review.pod.as_ref().map(|pod| patch::between(&case.pod, pod));
        let found = json!({
            "outcome": review.outcome.to_string(),
            "warnings": review.warnings,
            "patch": patch.unwrap_or_default(),
        });
        if std::env::var_os("UPDATE_CASES").is_some() {
            fs::write(&case.expected, format!("{found:#}\n")).unwrap();
        }
        let expected = fs::read_to_string(&case.expected).unwrap_or_default();
        if serde_json::from_str::<Value>(&expected).ok().as_ref() != Some(&found) {
            wrong.push(format!("{}: {found:#}", case.name));
        }
    }
    assert!(wrong.is_empty(), "not as expected:\n{}", wrong.join("\n"));
}

#[test]
fn a_patch_leads_where_it_says_and_back_again() {
    for case in cases() {
        let review = decide(&case.pod, &case.namespace, &case.mesh);
        let Some(injected) = review.pod else { continue };
        let mut patched = case.pod.clone();
        let operations: json_patch::Patch =
            serde_json::from_value(patch::between(&case.pod, &injected).into()).unwrap();
        json_patch::patch(&mut patched, &operations).unwrap();
        assert_eq!(patched, injected, "{}", case.name);
        let again = decide(&injected, &case.namespace, &case.mesh);
        assert_eq!(again.pod, None, "{}: a second time changes nothing", case.name);
        if review.outcome == Outcome::Injected {
            assert_eq!(again.outcome, Outcome::Already, "{}", case.name);
            // The label alone is all that a pod can have had of ours before.
            let before = remove(&case.pod);
            assert_eq!(remove(&injected), before, "{}", case.name);
        }
    }
}
