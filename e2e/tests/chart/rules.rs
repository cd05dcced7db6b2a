//! What holds for every render, whatever the values.

use outrigger_e2e::chart;
use serde_json::Value;

use crate::objects::{list, of_kind, parse, pod, shown, texts};
use crate::{render, template, variants};

/// Renders all variants and hands each over.
fn for_each(check: impl Fn(&str, &[Value])) {
    for (name, values) in variants() {
        check(name, &parse(&render(values.as_deref())));
    }
}

/// Reliability F8: Pod Security `restricted`, and more than it asks for.
#[test]
fn pods_are_restricted() {
    for_each(|variant, objects| {
        let mut seen = 0;
        for object in objects {
            let Some(pod) = pod(object) else { continue };
            let who = format!("{variant}: {}", shown(object));
            seen += 1;
            assert_eq!(pod["automountServiceAccountToken"], false, "{who}");
            assert_eq!(pod["enableServiceLinks"], false, "{who}");
            assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{who}");
            let containers: Vec<_> = list(&pod["containers"]).chain(list(&pod["initContainers"])).collect();
            assert!(!containers.is_empty(), "{who}");
            for container in containers {
                let context = &container["securityContext"];
                assert_eq!(context["allowPrivilegeEscalation"], false, "{who}");
                assert_eq!(context["readOnlyRootFilesystem"], true, "{who}");
                assert_eq!(context["capabilities"], serde_json::json!({"drop": ["ALL"]}), "{who}");
                assert!(container["resources"]["requests"]["memory"].is_string(), "{who}");
                assert!(container["resources"]["limits"]["memory"].is_string(), "{who}");
            }
            // The node agent writes into the node's folders, which are root's.
            let agent = object["metadata"]["name"] == "outrigger-cni";
            assert_eq!(pod["securityContext"]["runAsNonRoot"] == true, !agent, "{who}");
            assert_eq!(pod.get("hostNetwork").is_some(), agent, "{who}");
            let on_host = list(&pod["volumes"]).any(|volume| volume.get("hostPath").is_some());
            assert_eq!(on_host, agent, "{who}");
        }
        assert!(seen >= 3, "{variant}: controller, injector, and the test's pod");
    });
}

/// The CA and the webhook's certificate are the controller's: what a render holds, everybody who renders has.
#[test]
fn no_secret_and_no_certificate_is_rendered() {
    for_each(|variant, objects| {
        assert!(of_kind(objects, "Secret").is_empty(), "{variant}");
        for object in objects {
            let text = object.to_string();
            assert!(
                !text.contains("caBundle\":\"") && !text.contains("PRIVATE KEY"),
                "{variant}: {}",
                shown(object)
            );
        }
        for webhook in list(&of_kind(objects, "MutatingWebhookConfiguration")[0]["webhooks"]) {
            assert!(webhook["clientConfig"].get("caBundle").is_none(), "{variant}");
        }
    });
}

/// Reliability F8: nothing by wildcard, and no Secret that is not named.
#[test]
fn rights_are_named_one_by_one() {
    for_each(|variant, objects| {
        let roles = of_kind(objects, "Role").into_iter().chain(of_kind(objects, "ClusterRole"));
        for role in roles {
            let who = format!("{variant}: {}", shown(role));
            for rule in list(&role["rules"]) {
                for part in ["apiGroups", "resources", "verbs", "resourceNames"] {
                    assert!(!texts(&rule[part]).contains(&"*"), "{who}");
                }
                for verb in texts(&rule["verbs"]) {
                    assert!(
                        !["escalate", "bind", "impersonate", "deletecollection"].contains(&verb),
                        "{who}"
                    );
                }
                if texts(&rule["resources"]).contains(&"secrets") {
                    assert_eq!(role["kind"], "Role", "{who}: Secrets of one namespace only");
                    let named = !texts(&rule["resourceNames"]).is_empty();
                    assert!(named || texts(&rule["verbs"]) == ["create"], "{who}: {rule}");
                }
            }
        }
    });
}

#[test]
fn everything_is_in_the_meshs_namespace() {
    const OF_NO_NAMESPACE: [&str; 5] = [
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "MutatingWebhookConfiguration",
        "ValidatingWebhookConfiguration",
    ];
    for_each(|variant, objects| {
        for object in objects {
            let wanted = if OF_NO_NAMESPACE.iter().any(|kind| object["kind"] == **kind) {
                Value::Null
            } else {
                chart::NAMESPACE.into()
            };
            assert_eq!(object["metadata"]["namespace"], wanted, "{variant}: {}", shown(object));
        }
    });
}

/// Every account that pods run as is there, and every role that is bound is, too.
#[test]
fn what_is_named_is_there() {
    for_each(|variant, objects| {
        let has = |kind: &str, name: &Value| {
            of_kind(objects, kind).iter().any(|one| one["metadata"]["name"] == *name)
        };
        for object in objects {
            let who = format!("{variant}: {}", shown(object));
            if let Some(pod) = pod(object) {
                assert!(has("ServiceAccount", &pod["serviceAccountName"]), "{who}");
            }
            if let Some(role) = object.get("roleRef") {
                assert!(has(role["kind"].as_str().unwrap(), &role["name"]), "{who}");
                for subject in list(&object["subjects"]) {
                    assert!(has("ServiceAccount", &subject["name"]), "{who}");
                }
            }
        }
    });
}

/// Whether labels match a list of expressions, as the API server decides it.
fn matches(expressions: &Value, labels: &[(&str, &str)]) -> bool {
    list(expressions).all(|expression| {
        let value = labels.iter().find(|(key, _)| expression["key"] == **key).map(|(_, value)| *value);
        let among = value.is_some_and(|value| texts(&expression["values"]).contains(&value));
        match expression["operator"].as_str() {
            Some("In") => among,
            Some("NotIn") => !among,
            other => panic!("{other:?}"),
        }
    })
}

/// A pod that did not opt in never reaches the injector, which is what makes `failurePolicy: Fail` safe.
#[test]
fn only_who_opts_in_is_asked_about() {
    let objects = parse(&render(None));
    let configuration = of_kind(&objects, "MutatingWebhookConfiguration")[0];
    let asked = |namespace: &str, of_namespace: Option<&str>, of_pod: Option<&str>| {
        let labels = |value: Option<&'static str>| value.map(|value| ("outrigger.dev/inject", value));
        let stays = |value: Option<&str>| match value {
            Some("enabled") => Some("enabled"),
            Some("disabled") => Some("disabled"),
            Some(_) => Some("something"),
            None => None,
        };
        let mut around = vec![("kubernetes.io/metadata.name", namespace)];
        around.extend(labels(stays(of_namespace)));
        let own: Vec<_> = labels(stays(of_pod)).into_iter().collect();
        list(&configuration["webhooks"])
            .filter(|webhook| {
                matches(&webhook["namespaceSelector"]["matchExpressions"], &around)
                    && matches(&webhook["objectSelector"]["matchExpressions"], &own)
            })
            .count()
    };
    for (of_namespace, of_pod, wanted) in [
        (None, None, 0),
        (None, Some("enabled"), 1),
        (None, Some("disabled"), 0),
        (None, Some("yes"), 0),
        (Some("enabled"), None, 1),
        (Some("enabled"), Some("enabled"), 1),
        (Some("enabled"), Some("disabled"), 0),
        (Some("enabled"), Some("yes"), 1),
        (Some("disabled"), None, 0),
        (Some("disabled"), Some("enabled"), 1),
        (Some("disabled"), Some("disabled"), 0),
    ] {
        assert_eq!(asked("shop", of_namespace, of_pod), wanted, "{of_namespace:?} {of_pod:?}");
        for own in ["kube-system", "outrigger-system"] {
            assert_eq!(asked(own, of_namespace, of_pod), 0, "{own} {of_namespace:?} {of_pod:?}");
        }
    }
    for webhook in list(&configuration["webhooks"]) {
        assert_eq!(webhook["failurePolicy"], "Fail");
        let rules = serde_json::json!([{
            "apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"], "scope": "Namespaced",
        }]);
        assert_eq!(webhook["rules"], rules);
    }
}

/// Helm never upgrades a folder `crds`, and with a CRD all of its objects go.
#[test]
fn crds_are_the_files_and_stay() {
    let folder = chart::folder("outrigger");
    assert!(!folder.join("crds").exists());
    let objects = parse(&render(None));
    let rendered = of_kind(&objects, "CustomResourceDefinition");
    let files: Vec<_> =
        std::fs::read_dir(folder.join("files/crds")).unwrap().map(|file| file.unwrap().path()).collect();
    assert_eq!(rendered.len(), files.len());
    for file in files {
        let [wanted] = &parse(&std::fs::read_to_string(&file).unwrap())[..] else {
            panic!("{}", file.display())
        };
        let found = rendered.iter().find(|crd| crd["metadata"]["name"] == wanted["metadata"]["name"]);
        let found = found.unwrap_or_else(|| panic!("{}", file.display()));
        assert_eq!(found["spec"], wanted["spec"], "{}", file.display());
        assert_eq!(found["metadata"]["annotations"]["helm.sh/resource-policy"], "keep", "{}", file.display());
    }
}

/// Other words in the configuration are other pods, because it is read once.
#[test]
fn a_new_configuration_restarts_pods() {
    let sums = |text: &str| -> Vec<Value> {
        let objects = parse(text);
        let sum = "/spec/template/metadata/annotations/checksum~1config";
        of_kind(&objects, "Deployment").iter().map(|object| object.pointer(sum).unwrap().clone()).collect()
    };
    let before = sums(&render(None));
    assert_eq!(before.len(), 2);
    let after = sums(&template("outrigger", chart::NAMESPACE, &["--set", "mesh.mtls=Strict"]).unwrap());
    for (before, after) in before.iter().zip(&after) {
        assert_ne!(before, after);
    }
    let same = sums(&template("outrigger", chart::NAMESPACE, &["--set", "controller.replicas=2"]).unwrap());
    assert_eq!(before, same);
}

/// The controller takes every configuration that the chart can write.
#[test]
fn the_controller_takes_its_configuration() {
    let suite = std::env::current_exe().unwrap();
    let controller = suite.ancestors().nth(2).unwrap().join("outrigger-controller");
    for_each(|variant, objects| {
        let [map] = of_kind(objects, "ConfigMap")[..] else { panic!("{variant}") };
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), map["data"]["controller.yaml"].as_str().unwrap()).unwrap();
        let checked = std::process::Command::new(&controller)
            .arg("--config")
            .arg(file.path())
            .arg("--check-config")
            .output()
            .unwrap_or_else(|error| panic!("{}: {error}: run `make build` first", controller.display()));
        assert!(checked.status.success(), "{variant}: {}", String::from_utf8_lossy(&checked.stderr));
    });
}
