//! The configuration: the example, the published schema, the environment, and every fault at once.

use std::time::Duration;

use outrigger_proxy::config::{Config, Mtls, load, schema};

const NONE: [(String, String); 0] = [];

fn environment(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn the_example_is_valid_and_names_every_field() {
    let text = include_str!("../../examples/sidecar.yaml");
    let config = load(text, NONE).unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!(config.upstreams[0].target(), Some(("payments.default", 80)));
    let Ok(serde_json::Value::Object(all)) = serde_json::to_value(Config::default()) else { panic!() };
    for field in all.keys() {
        assert!(text.contains(&format!("{field}:")), "{field} is missing in the example");
    }
}

#[test]
fn an_empty_file_means_the_defaults() {
    assert_eq!(load("", NONE).unwrap(), Config::default());
    assert_eq!(load("# nothing\n", NONE).unwrap(), Config::default());
    assert_eq!(load("timeouts:\n", NONE).unwrap(), Config::default());
}

#[test]
fn the_published_schema_is_the_current_one() {
    let published: serde_json::Value =
        serde_json::from_str(include_str!("../../examples/sidecar.schema.json")).unwrap();
    assert_eq!(
        published,
        schema(),
        "write it anew: cargo run -p outrigger-proxy -- --print-schema > proxy/sidecar/examples/sidecar.schema.json"
    );
}

#[test]
fn the_environment_overrides_the_file() {
    let config = load(
        "trust_domain: one.example\nthreads: 1\ntimeouts: { connect: 2s }\n",
        environment(&[
            ("OUTRIGGER_TRUST_DOMAIN", "two.example"),
            ("OUTRIGGER_THREADS", "4"),
            ("OUTRIGGER_TIMEOUTS_CONNECT", "250ms"),
            ("OUTRIGGER_CONTROLLER", "a.example:1,[2001:db8::1]:2"),
            ("OUTRIGGER_OPAQUE_PORTS", "3306, 5432"),
            ("OUTRIGGER_SERVICES", "[{service: web.shop, port: 80}]"),
            ("OUTRIGGER_MTLS", "Permissive"),
            ("OUTRIGGER_DNS_CONSUL", "127.0.0.1:8600"),
            ("OUTRIGGER_REDIRECTION", "true"),
            // Kubernetes sets these for a service named outrigger-controller.
            ("OUTRIGGER_CONTROLLER_SERVICE_HOST", "10.0.0.1"),
            ("OUTRIGGER_CONTROLLER_PORT", "tcp://10.0.0.1:15410"),
        ]),
    )
    .unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!(config.trust_domain, "two.example");
    assert_eq!(config.threads, Some(4));
    assert_eq!(config.timeouts.connect.get(), Duration::from_millis(250));
    assert_eq!(config.controller, ["a.example:1", "[2001:db8::1]:2"]);
    assert_eq!(config.opaque_ports, [3306, 5432]);
    assert_eq!(config.services[0].service, "web.shop");
    assert_eq!(config.mtls, Mtls::Permissive);
    assert_eq!(config.dns.consul.unwrap().port(), 8600);
    assert!(config.redirection);
}

#[test]
fn every_fault_is_listed() {
    let text = r#"
controler: ["x:1"]
controller: ["no-port", "2001:db8::1:15410"]
trust_domain: Upper.Case
services: [{ service: web }, { port: 1, service: a.b.c }, { service: x.y, port: 0 }]
upstreams: [{ service: "web", listen: "127.0.0.1:9001" }, { service: "web.shop:1", listen: "127.0.0.1:9001" }]
ports: { admin: 15453, dsn: 1 }
threads: 0
timeouts: { connect: 1, discovery: 5s }
limits: { header_bytes: 1 }
drain: { min: 10s, max: 5s }
outbound: Perhaps
"#;
    let faults = load(text, environment(&[("OUTRIGGER_MARK", "many")])).unwrap_err().0;
    for expected in [
        "controler: there is no such field",
        "controller[0]: \"no-port\"",
        "controller[1]:",
        "trust_domain:",
        "services[0]: missing field `port`",
        "upstreams[0].service",
        "upstreams[1].listen",
        "ports.dsn: there is no such field",
        "ports.admin: 15453 is used twice",
        "threads:",
        "timeouts.connect:",
        "timeouts.discovery: at most 1s",
        "limits.header_bytes",
        "drain.max",
        "outbound: unknown variant `Perhaps`",
        "OUTRIGGER_MARK:",
    ] {
        assert!(faults.iter().any(|fault| fault.starts_with(expected)), "{expected} is not in {faults:#?}");
    }
    // Once services as a whole fit, their content is looked at.
    let faults =
        load("services: [{ service: a.b.c, port: 1 }, { service: x.y, port: 0 }]", NONE).unwrap_err().0;
    assert_eq!(faults.len(), 2, "{faults:?}");
}

#[test]
fn text_that_is_no_mapping_is_refused() {
    for text in ["- a\n- b\n", "just text", "a: [", "a: &a [*a, *a]"] {
        assert!(load(text, NONE).is_err(), "{text}");
    }
}
