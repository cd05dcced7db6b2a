//! The API server: old enough, on time, and whether its user may install.

use anyhow::{Context, Result};
use http::{Request, header};
use k8s_openapi::{
    api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
    apimachinery::pkg::version::Info,
    jiff::{Timestamp, fmt::rfc2822},
};
use kube::{Api, api::PostParams, client::Body};

use super::report::{Outcome, Report};
use crate::cluster::{Cluster, MESH_NAMESPACE};

const CATEGORY: &str = "Kubernetes API";
/// The rules of the mesh's kinds call `isIP` (<https://kubernetes.io/docs/reference/using-api/cel/>).
const OLDEST_MINOR: u32 = 31;
/// A clock that is off by more than this breaks certificates: ours begin a minute in the past.
const MOST_SKEW: i64 = 30;

/// What the chart creates in the whole cluster, and in the mesh's namespace.
const CLUSTER_WIDE: &[(&str, &str)] = &[
    ("", "namespaces"),
    ("apiextensions.k8s.io", "customresourcedefinitions"),
    ("rbac.authorization.k8s.io", "clusterroles"),
    ("rbac.authorization.k8s.io", "clusterrolebindings"),
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations"),
    ("admissionregistration.k8s.io", "validatingwebhookconfigurations"),
];
const IN_NAMESPACE: &[(&str, &str)] = &[
    ("", "serviceaccounts"),
    ("", "services"),
    ("", "configmaps"),
    // Helm keeps a release in one.
    ("", "secrets"),
    ("apps", "deployments"),
    ("rbac.authorization.k8s.io", "roles"),
    ("rbac.authorization.k8s.io", "rolebindings"),
];

/// Whether there is an API server, and which.
pub(super) async fn version(cluster: &Cluster, report: &mut Report) -> Result<()> {
    let info = cluster.patiently(cluster.client.apiserver_version()).await?;
    judge_version(&info, report);
    Ok(())
}

fn judge_version(info: &Info, report: &mut Report) {
    // Providers write things like `31+`.
    let number = |text: &str| -> u32 {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0)
    };
    if (number(&info.major), number(&info.minor)) >= (1, OLDEST_MINOR) {
        report.ok(CATEGORY, "version", &info.git_version);
    } else {
        report.add(
            CATEGORY,
            "version",
            Outcome::Failed,
            format!("{} is too old for the rules of the mesh's kinds", info.git_version),
            format!("upgrade the cluster to Kubernetes 1.{OLDEST_MINOR} or newer"),
        );
    }
}

/// Whether this machine and the API server agree on the time: tokens and certificates are judged by it.
pub(super) async fn clock(cluster: &Cluster, report: &mut Report) {
    match server_time(cluster).await {
        Ok(theirs) => judge_clock(theirs.as_second() - Timestamp::now().as_second(), report),
        Err(error) => report.unknown(CATEGORY, "clock", &error),
    }
}

/// What time it is at the API server, to the second.
pub(super) async fn server_time(cluster: &Cluster) -> Result<Timestamp> {
    let request = Request::get("/version").body(Body::empty())?;
    let response = cluster.patiently(cluster.client.send(request)).await?;
    let date = response.headers().get(header::DATE).and_then(|date| date.to_str().ok());
    let date = date.context("the API server does not say what time it is")?;
    Ok(rfc2822::parse(date).with_context(|| format!("reading the API server's time `{date}`"))?.timestamp())
}

fn judge_clock(skew: i64, report: &mut Report) {
    if skew.abs() <= MOST_SKEW {
        report.ok(CATEGORY, "clock", "this machine's and the API server's agree");
        return;
    }
    let side = if skew > 0 { "behind" } else { "ahead of" };
    report.add(
        CATEGORY,
        "clock",
        Outcome::Warning,
        format!("this machine is {} s {side} the API server", skew.abs()),
        "let both follow NTP",
    );
}

/// Whether the user may create what the chart creates.
pub(super) async fn permissions(cluster: &Cluster, report: &mut Report) {
    let wanted = CLUSTER_WIDE.iter().map(|kind| (kind, None));
    let wanted = wanted.chain(IN_NAMESPACE.iter().map(|kind| (kind, Some(MESH_NAMESPACE))));
    let mut missing = Vec::new();
    for ((group, resource), namespace) in wanted {
        match may_create(cluster, group, resource, namespace).await {
            Ok(true) => {}
            Ok(false) => missing.push(name(group, resource, namespace)),
            Err(error) => return report.unknown(CATEGORY, "permissions", &error),
        }
    }
    judge_permissions(&missing, report);
}

fn name(group: &str, resource: &str, namespace: Option<&str>) -> String {
    let group = if group.is_empty() { String::new() } else { format!(".{group}") };
    let namespace = namespace.map(|namespace| format!(" -n {namespace}")).unwrap_or_default();
    format!("{resource}{group}{namespace}")
}

async fn may_create(cluster: &Cluster, group: &str, resource: &str, namespace: Option<&str>) -> Result<bool> {
    let attributes = ResourceAttributes {
        verb: Some("create".to_owned()),
        group: Some(group.to_owned()),
        resource: Some(resource.to_owned()),
        namespace: namespace.map(str::to_owned),
        ..ResourceAttributes::default()
    };
    let spec = SelfSubjectAccessReviewSpec {
        resource_attributes: Some(attributes),
        ..SelfSubjectAccessReviewSpec::default()
    };
    let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
    let reviews = Api::<SelfSubjectAccessReview>::all(cluster.client.clone());
    let parameters = PostParams::default();
    let answer = cluster.patiently(reviews.create(&parameters, &review)).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

fn judge_permissions(missing: &[String], report: &mut Report) {
    let count = CLUSTER_WIDE.len() + IN_NAMESPACE.len();
    if missing.is_empty() {
        report.ok(
            CATEGORY,
            "permissions",
            format!("you may create the {count} kinds that the chart creates"),
        );
    } else {
        report.add(
            CATEGORY,
            "permissions",
            Outcome::Failed,
            format!("you may not create {}", missing.join(", ")),
            "install as a cluster administrator, or have these granted",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(judge: impl FnOnce(&mut Report)) -> (Outcome, String) {
        let mut report = Report::default();
        judge(&mut report);
        let finding = report.0.pop().unwrap();
        (finding.result, finding.seen)
    }

    #[test]
    fn the_mesh_needs_a_version() {
        let judged = |major: &str, minor: &str| {
            let info = Info {
                major: major.to_owned(),
                minor: minor.to_owned(),
                git_version: format!("v{major}.{minor}"),
                ..Info::default()
            };
            of(|report| judge_version(&info, report)).0
        };
        assert_eq!(judged("1", "31+"), Outcome::Ok);
        assert_eq!(judged("1", "34"), Outcome::Ok);
        assert_eq!(judged("1", "30"), Outcome::Failed);
        assert_eq!(judged("", ""), Outcome::Failed);
    }

    #[test]
    fn a_clock_may_be_a_little_off_in_both_directions() {
        assert_eq!(of(|report| judge_clock(-30, report)).0, Outcome::Ok);
        let behind = (Outcome::Warning, "this machine is 31 s behind the API server".to_owned());
        assert_eq!(of(|report| judge_clock(31, report)), behind);
        assert!(of(|report| judge_clock(-31, report)).1.contains("ahead of"));
    }

    #[test]
    fn each_missing_permission_is_named() {
        let missing = [name("apps", "deployments", Some("outrigger-system")), name("", "namespaces", None)];
        let (result, seen) = of(|report| judge_permissions(&missing, report));
        assert_eq!(result, Outcome::Failed);
        assert_eq!(seen, "you may not create deployments.apps -n outrigger-system, namespaces");
    }
}
