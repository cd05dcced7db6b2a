//! `outrigger inject` and `uninject`: what comes out of manifests, and what is said of them.

use crate::fake::Fake;

const MANIFESTS: &str = "\
# The shop.
apiVersion: v1
kind: Namespace
metadata:
  name: shop
---
apiVersion: apps/v1
kind: Deployment
metadata: # of the Deployment
  name: web
  namespace: shop
spec:
  selector:
    matchLabels: {app: web}
  template:
    metadata:
      labels:
        app: web   # as above
    spec:
      # It needs a second.
      terminationGracePeriodSeconds: 10
      containers:
      - name: web
        image: \"web:1\"
---
apiVersion: batch/v1
kind: CronJob
metadata:
  name: report
  namespace: shop
spec:
  schedule: '@daily'
  jobTemplate:
    spec:
      template:
        spec:
          restartPolicy: Never
          initContainers:
          # Fetches what is to be reported.
          - name: fetch
            image: report:1
          containers:
          - name: report
            image: report:1
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: template
data: {kind: Pod}
";

#[test]
fn manifests_come_out_as_they_were_written() {
    let fake = Fake::start();
    let injected = fake.run_with(&["inject", "-f", "-", "--image", "outrigger-proxy:1"], MANIFESTS);
    assert_eq!(injected.code, 0, "{}", injected.stderr);
    assert_eq!(injected.stderr, "");
    for line in MANIFESTS.lines() {
        assert!(injected.stdout.lines().any(|other| other == line), "{line:?} is gone:\n{}", injected.stdout);
    }
    insta::assert_snapshot!("injected_manifests", injected.stdout);
    let again = fake.run_with(&["inject", "-f", "-"], &injected.stdout);
    assert_eq!(again.stdout, injected.stdout);
    let back = fake.run_with(&["uninject", "-f", "-"], &injected.stdout);
    assert_eq!(back.stdout, MANIFESTS);
}

#[test]
fn flow_style_is_written_anew_and_that_is_said() {
    let fake = Fake::start();
    let pod = "{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: []}} # one line\n";
    let injected = fake.run_with(&["inject", "-f", "-"], &format!("# head\n{pod}"));
    assert_eq!(injected.code, 0, "{}", injected.stderr);
    assert!(injected.stderr.contains("Pod p: written anew, without its comments"), "{}", injected.stderr);
    assert!(injected.stdout.contains("name: outrigger-proxy"), "{}", injected.stdout);
}

#[test]
fn explain_says_why_and_its_exit_code_says_whether() {
    let fake = Fake::start();
    let ran = fake.run_with(&["inject", "-f", "-", "--explain"], MANIFESTS);
    assert_eq!(
        (ran.code, ran.stdout.as_str()),
        (0, "Deployment shop/web: injected\nCronJob shop/report: injected\n")
    );

    let labelled = MANIFESTS.replace(
        "  name: shop\n---",
        "  name: shop\n  labels: {pod-security.kubernetes.io/enforce: baseline}\n---",
    );
    let ran = fake.run_with(&["inject", "-f", "-", "--explain"], &labelled);
    assert_eq!(ran.code, 1);
    assert!(
        ran.stdout.contains("Deployment shop/web: refused:") && ran.stdout.contains("cni.enabled"),
        "{}",
        ran.stdout
    );
    let ran = fake.run_with(&["inject", "-f", "-"], &labelled);
    assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "nothing is written by halves");
    let ran = fake.run_with(&["inject", "-f", "-", "--explain", "--mode", "cni"], &labelled);
    assert_eq!(ran.code, 0, "{}", ran.stdout);
}

#[test]
fn settings_come_from_the_controllers_configuration() {
    let fake = Fake::start();
    let settings = fake.write(
        "controller.yaml",
        "trust_domain: example.org\nkubernetes: {cluster_domain: corp}\ninjector: {image: 'registry/proxy:2', resources: {limits: {cpu: '1'}}}\n",
    );
    let ran = fake.run_with(&["inject", "-f", "-", "--settings", settings.to_str().unwrap()], MANIFESTS);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for word in ["registry/proxy:2", "example.org", "outrigger-controller.outrigger-system.svc.corp:15410"] {
        assert!(ran.stdout.contains(word), "{word}: {}", ran.stdout);
    }
    let ran = fake.run_with(&["inject", "-f", "-", "--image", ""], MANIFESTS);
    assert!(ran.code == 1 && ran.stderr.contains("image"), "{}", ran.stderr);
}
