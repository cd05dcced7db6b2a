//! The pods in what people write: a Pod, the template of what makes pods, a List of them.

use serde_json::Value;

use crate::decide::{Namespace, Review, decide, remove};
use crate::json::{list, text};
use crate::settings::Mesh;

/// A pod, or the template of one, in a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// `Deployment shop/web`.
    pub subject: String,
    /// The namespace that it will live in.
    pub namespace: String,
    /// Where it is (RFC 6901).
    pub pointer: String,
}

/// Every pod of `document`. `namespace` is that of objects that name none.
pub fn pods(document: &Value, namespace: &str) -> Vec<Place> {
    let kind = |object: &Value| {
        Some((text(object, &["apiVersion"])?.to_owned(), text(object, &["kind"])?.to_owned()))
    };
    // Kubernetes knows no List in a List.
    match kind(document) {
        Some((version, kind)) if (version.as_str(), kind.as_str()) == ("v1", "List") => {
            let places = list(document, "items").iter().enumerate();
            places.filter_map(|(index, item)| place(item, &format!("/items/{index}"), namespace)).collect()
        }
        _ => place(document, "", namespace).into_iter().collect(),
    }
}

fn place(object: &Value, at: &str, namespace: &str) -> Option<Place> {
    let (version, kind) = (text(object, &["apiVersion"])?, text(object, &["kind"])?);
    let within = match (version, kind) {
        ("v1", "Pod") => "",
        ("apps/v1", "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet")
        | ("v1", "ReplicationController")
        | ("batch/v1", "Job") => "/spec/template",
        ("batch/v1", "CronJob") => "/spec/jobTemplate/spec/template",
        _ => return None,
    };
    object.pointer(within)?;
    let name = ["name", "generateName"].iter().find_map(|field| text(object, &["metadata", field]));
    let namespace = text(object, &["metadata", "namespace"]).unwrap_or(namespace);
    Some(Place {
        subject: format!("{kind} {namespace}/{}", name.unwrap_or("?")),
        namespace: namespace.to_owned(),
        pointer: format!("{at}{within}"),
    })
}

/// Decides about every pod of `document`, in place, as the webhook would about a pod that opted in.
pub fn inject(
    document: &mut Value,
    namespace: &str,
    facts: impl Fn(&str) -> Namespace,
    mesh: &Mesh,
) -> Vec<(Place, Review)> {
    let mut reviews = Vec::new();
    for place in pods(document, namespace) {
        let Some(pod) = document.pointer_mut(&place.pointer) else { continue };
        let review = decide(pod, &facts(&place.namespace), mesh);
        if let Some(injected) = &review.pod {
            pod.clone_from(injected);
        }
        reviews.push((place, review));
    }
    reviews
}

/// Takes out of every pod of `document` what was put into it. Returns those that changed.
pub fn uninject(document: &mut Value, namespace: &str) -> Vec<Place> {
    let mut changed = pods(document, namespace);
    changed.retain(|place| {
        document.pointer_mut(&place.pointer).is_some_and(|pod| {
            let without = remove(pod);
            let differs = without != *pod;
            *pod = without;
            differs
        })
    });
    changed
}
