//! What holds for every pod, whatever its annotations say.

use outrigger_inject::{
    BUNDLE_VOLUME, CHECKER, Mesh, Mode, Namespace, Outcome, PROXY, REDIRECTOR, Settings, TOKEN_VOLUME,
    decide, patch, remove,
};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const SETTINGS: [&str; 13] = [
    "skip-inbound-ports",
    "skip-outbound-ports",
    "skip-outbound-cidrs",
    "opaque-ports",
    "upstreams",
    "proxy-cpu-request",
    "proxy-cpu-limit",
    "proxy-memory-request",
    "proxy-memory-limit",
    "proxy-log-level",
    "proxy-concurrency",
    "proxy-image",
    "a/b~c",
];

fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        "[0-9]{1,6}",
        "[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}){0,3}",
        "[0-9]{1,4}(m|Mi|Gi|k)?",
        "(info|debug)(,[a-z_:]{1,8}=(info|trace))?",
        "[a-z]{1,5}\\.[a-z]{1,5}:[0-9]{1,5}=[0-9]{1,5}",
        "10\\.0\\.[0-9]{1,3}\\.0/[0-9]{1,2}",
        "\\PC{0,60}",
        Just("\"}],\"securityContext\":{\"privileged\":true},\"x\":[{\"".to_owned()),
        Just("$(HOME) --no-inbound".to_owned()),
        Just("9".repeat(5000)),
    ]
}

fn container() -> impl Strategy<Value = Value> {
    ("[a-z]{1,8}", 1_u16.., 0_u32..20_000, any::<bool>()).prop_map(|(name, port, user, secure)| {
        let mut container = json!({ "name": name, "image": "app:1", "ports": [{ "containerPort": port }] });
        if secure {
            container["securityContext"] =
                json!({ "runAsUser": user, "capabilities": { "add": ["SYS_ADMIN"] } });
        }
        container
    })
}

fn pod() -> impl Strategy<Value = Value> {
    (
        prop::collection::vec(container(), 1..4),
        prop::collection::vec(container(), 0..3),
        prop::collection::vec("[a-z]{1,8}", 0..3),
        prop::collection::btree_map(prop::sample::select(SETTINGS.as_slice()), value(), 0..5),
        any::<[bool; 3]>(),
        prop::option::of(0_u64..100_000),
    )
        .prop_map(|(containers, init, volumes, annotations, [labels, host, cluster], grace)| {
            let mut pod = json!({ "metadata": { "name": "p" }, "spec": { "containers": containers } });
            if !init.is_empty() {
                pod["spec"]["initContainers"] = init.into();
            }
            if !volumes.is_empty() {
                pod["spec"]["volumes"] =
                    volumes.iter().map(|name| json!({ "name": name, "hostPath": { "path": "/" } })).collect();
            }
            if labels {
                pod["metadata"]["labels"] = json!({ "app": "p" });
            }
            if !annotations.is_empty() {
                let named = annotations
                    .into_iter()
                    .map(|(name, value)| (format!("outrigger.dev/{name}"), value.into()));
                pod["metadata"]["annotations"] = Value::Object(named.collect::<Map<_, _>>());
            }
            if host && cluster {
                pod["spec"]["hostNetwork"] = true.into();
            }
            if let Some(grace) = grace {
                pod["spec"]["terminationGracePeriodSeconds"] = grace.into();
            }
            pod
        })
}

fn mesh(mode: Mode) -> Mesh {
    Mesh {
        trust_domain: "outrigger.local".to_owned(),
        namespace: "outrigger-system".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        settings: Settings { mode, ..Settings::default() },
    }
}

fn shop() -> Namespace {
    Namespace { name: "shop".to_owned(), inject: Some("enabled".to_owned()), pod_security: None }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn once_is_as_good_as_twice_and_can_be_undone(pod in pod(), cni: bool) {
        let mesh = mesh(if cni { Mode::Cni } else { Mode::Init });
        let review = decide(&pod, &shop(), &mesh);
        let Some(injected) = review.pod else {
            prop_assert!(matches!(review.outcome, Outcome::Refused(_)), "{:?}", review.outcome);
            return Ok(());
        };
        prop_assert_eq!(&decide(&injected, &shop(), &mesh).pod, &None);
        prop_assert_eq!(remove(&injected), pod);
    }

    #[test]
    fn a_patch_touches_no_container_of_the_application(pod in pod(), cni: bool) {
        let mesh = mesh(if cni { Mode::Cni } else { Mode::Init });
        let Some(injected) = decide(&pod, &shop(), &mesh).pod else { return Ok(()) };
        let operations = patch::between(&pod, &injected);
        for operation in &operations {
            prop_assert_eq!(&operation["op"], "add", "{}", operation);
            let path = operation["path"].as_str().unwrap_or_default();
            let ours = ["/metadata/labels", "/metadata/annotations", "/spec/initContainers", "/spec/volumes"];
            prop_assert!(ours.iter().any(|prefix| path.starts_with(prefix)), "{}", operation);
        }
        let mut patched = pod.clone();
        let operations: json_patch::Patch = serde_json::from_value(operations.into()).unwrap();
        json_patch::patch(&mut patched, &operations).unwrap();
        prop_assert_eq!(&patched, &injected);
        let theirs = |pod: &Value| -> Vec<Value> {
            let containers = pod["spec"]["initContainers"].as_array().cloned().unwrap_or_default();
            containers.into_iter().filter(|one| !is_ours(one)).collect()
        };
        prop_assert_eq!(theirs(&injected), theirs(&pod));
    }

    /// What we add does not hang on what an annotation says, but for values of flags, variables and quantities.
    #[test]
    fn an_annotation_adds_no_privilege(pod in pod(), cni: bool) {
        let mode = if cni { Mode::Cni } else { Mode::Init };
        let Some(injected) = decide(&pod, &shop(), &mesh(mode)).pod else { return Ok(()) };
        if pod["spec"]["hostNetwork"] == true {
            return Ok(());
        }
        let plain = json!({ "metadata": {}, "spec": { "containers": [] } });
        let plain = decide(&plain, &shop(), &mesh(mode)).pod.unwrap();
        let bare = |pod: &Value| -> Vec<Value> {
            let mut ours: Vec<Value> = pod["spec"]["initContainers"].as_array().unwrap().iter().filter(|one| is_ours(one)).cloned().collect();
            for container in &mut ours {
                let container = container.as_object_mut().unwrap();
                container.retain(|name, _| !["env", "resources"].contains(&name.as_str()));
                if let Some(arguments) = container.get_mut("args").and_then(Value::as_array_mut) {
                    for argument in &*arguments {
                        let text = argument.as_str().unwrap();
                        assert!(text == "redirect" || text == "--check" || text == "--proxy-uid=15400" || text.starts_with("--exclude-"), "{text}");
                        assert!(!text.contains(char::is_whitespace), "{text}");
                    }
                    arguments.truncate(2);
                }
            }
            ours
        };
        prop_assert_eq!(bare(&injected), bare(&plain));
        let volumes = |pod: &Value| -> Vec<Value> {
            let volumes = pod["spec"]["volumes"].as_array().unwrap();
            volumes.iter().filter(|volume| [TOKEN_VOLUME, BUNDLE_VOLUME].contains(&volume["name"].as_str().unwrap())).cloned().collect()
        };
        prop_assert_eq!(volumes(&injected), volumes(&plain));
    }

    #[test]
    fn no_json_makes_a_panic(pod in arbitrary()) {
        let review = decide(&pod, &shop(), &mesh(Mode::Init));
        remove(&pod);
        if let Some(injected) = review.pod {
            patch::between(&pod, &injected);
        }
    }
}

fn is_ours(container: &Value) -> bool {
    [PROXY, REDIRECTOR, CHECKER].contains(&container["name"].as_str().unwrap_or_default())
}

/// JSON of which each field may be anything.
fn arbitrary() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
        Just(json!("outrigger-proxy")),
    ];
    let name = prop::sample::select(
        [
            "metadata",
            "spec",
            "labels",
            "annotations",
            "containers",
            "initContainers",
            "volumes",
            "name",
            "ports",
            "containerPort",
            "securityContext",
            "runAsUser",
            "resources",
            "limits",
            "hostNetwork",
            "os",
        ]
        .as_slice(),
    );
    leaf.prop_recursive(6, 64, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(name.clone(), inner, 0..6).prop_map(|fields| fields
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect()),
        ]
    })
}
