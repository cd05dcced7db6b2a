//! Gateway API's own routes for meshes (`conformance/tests/mesh` of the pinned release, fetched by `make tools`) are applied
//! unchanged and do what its conformance tests ask for.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use outrigger_e2e::load::{Call, Load, Plan};
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::wait::wait_until;

use crate::echo::{Asked, Echo, NAMESPACE, ask, service};
use crate::world::World;

const IN_FORCE: Duration = Duration::from_secs(5);

/// Who asks.
#[derive(Clone, Copy, Debug)]
enum From {
    /// A workload of the routes' namespace.
    Own,
    /// One of another.
    Consumer,
}

/// What must come back.
#[derive(Clone, Copy, Debug)]
enum Wanted {
    /// An answer of this backend.
    Backend(&'static str),
    /// The same, to this target, with these header fields seen and those not.
    Seen(&'static str, &'static str, &'static [(&'static str, &'static str)], &'static [&'static str]),
    /// An answer of this backend with, or without, `x-header-set` in its head.
    Marked(&'static str, Option<&'static str>),
    /// This status, from the mesh.
    Status(u16),
    /// This status, there: scheme, host, port where it is not the scheme's own, path.
    Redirect(u16, &'static str),
}

struct Check {
    from: From,
    service: &'static str,
    port: u16,
    target: &'static str,
    headers: &'static [(&'static str, &'static str)],
    wanted: Wanted,
}

const fn get(target: &'static str, wanted: Wanted) -> Check {
    Check { from: From::Own, service: "echo", port: 80, target, headers: &[], wanted }
}

const fn with(
    target: &'static str,
    headers: &'static [(&'static str, &'static str)],
    wanted: Wanted,
) -> Check {
    Check { from: From::Own, service: "echo", port: 80, target, headers, wanted }
}

const fn to(service: &'static str, port: u16, wanted: Wanted) -> Check {
    Check { from: From::Own, service, port, target: "/", headers: &[], wanted }
}

const V1: Wanted = Wanted::Backend("echo-v1");
const V2: Wanted = Wanted::Backend("echo-v2");

const fn seen(
    target: &'static str,
    headers: &'static [(&'static str, &'static str)],
    absent: &'static [&'static str],
) -> Wanted {
    Wanted::Seen("echo-v1", target, headers, absent)
}

const fn redirect(status: u16, location: &'static str) -> Wanted {
    Wanted::Redirect(status, location)
}

const MODIFIED: &[Check] = &[
    with(
        "/set",
        &[("some-other-header", "val")],
        seen("/set", &[("some-other-header", "val"), ("x-header-set", "set-overwrites-values")], &[]),
    ),
    with(
        "/set",
        &[("x-header-set", "some-other-value")],
        seen("/set", &[("x-header-set", "set-overwrites-values")], &[]),
    ),
    get("/add", seen("/add", &[("x-header-add", "add-appends-values")], &[])),
    with(
        "/add",
        &[("x-header-add", "some-other-value")],
        seen("/add", &[("x-header-add", "some-other-value,add-appends-values")], &[]),
    ),
    with("/remove", &[("x-header-remove", "val")], seen("/remove", &[], &["x-header-remove"])),
    with(
        "/multiple",
        &[
            ("x-header-set-2", "set-val-2"),
            ("x-header-add-2", "add-val-2"),
            ("x-header-remove-2", "remove-val-2"),
            ("another-header", "another-header-val"),
        ],
        seen(
            "/multiple",
            &[
                ("x-header-set-1", "header-set-1"),
                ("x-header-set-2", "header-set-2"),
                ("x-header-add-1", "header-add-1"),
                ("x-header-add-2", "add-val-2,header-add-2"),
                ("x-header-add-3", "header-add-3"),
                ("another-header", "another-header-val"),
            ],
            &["x-header-remove-1", "x-header-remove-2"],
        ),
    ),
    with(
        "/case-insensitivity",
        &[
            ("x-header-set", "original-val-set"),
            ("x-header-add", "original-val-add"),
            ("x-header-remove", "original-val-remove"),
        ],
        seen(
            "/case-insensitivity",
            &[("x-header-set", "header-set"), ("x-header-add", "original-val-add,header-add")],
            &["x-header-remove"],
        ),
    ),
];

const REWRITE_ASKED: &[(&str, &str)] = &[
    ("x-header-remove", "remove-val"),
    ("x-header-add-append", "append-val-1"),
    ("x-header-set", "set-val"),
];
const REWRITE_SEEN: &[(&str, &str)] = &[
    ("x-header-add", "header-val-1"),
    ("x-header-add-append", "append-val-1,header-val-2"),
    ("x-header-set", "set-overwrites-values"),
];

/// By file: what its conformance test asks, and is to get.
const ROUTES: &[(&str, &[Check])] = &[
    ("httproute-simple-same-namespace", &[get("/", V1)]),
    (
        "httproute-matching",
        &[
            get("/", V1),
            get("/example", V1),
            with("/", &[("version", "one")], V1),
            get("/v2", V2),
            get("/v2/example", V2),
            with("/", &[("version", "two")], V2),
            get("/v2/", V2),
            get("/v2example", V1),
            get("/foo/v2/example", V1),
        ],
    ),
    ("httproute-named-rule", &[get("/named", V1), get("/unnamed", V2)]),
    (
        "httproute-query-param-matching",
        &[
            get("/?animal=whale", V1),
            get("/?animal=dolphin", V2),
            get("/?animal=whale&otherparam=irrelevant", V1),
            get("/?animal=dolphin&color=yellow", V2),
            get("/?color=blue", Wanted::Status(404)),
            get("/?animal=dog", Wanted::Status(404)),
            get("/?animal=whaledolphin", Wanted::Status(404)),
            get("/", Wanted::Status(404)),
            get("/path1?animal=whale", V1),
            with("/?animal=whale", &[("version", "one")], V2),
            get("/path3?animal=shark", V1),
            with("/path4?animal=kraken", &[("version", "three")], V1),
            get("/?animal=shark", Wanted::Status(404)),
            get("/path4?animal=kraken", Wanted::Status(404)),
            get("/path5?animal=hydra", V1),
        ],
    ),
    ("httproute-303-redirect", &[get("/redirect", redirect(303, "http://echo/redirect"))]),
    ("httproute-307-redirect", &[get("/temporary", redirect(307, "http://echo/temporary"))]),
    ("httproute-308-redirect", &[get("/permanent", redirect(308, "http://echo/permanent"))]),
    (
        "httproute-redirect-host-and-status",
        &[
            get("/hostname-redirect", redirect(302, "http://example.org/hostname-redirect")),
            get("/host-and-status", redirect(301, "http://example.org/host-and-status")),
        ],
    ),
    (
        "httproute-redirect-path",
        &[
            get("/original-prefix/lemon", redirect(302, "http://echo/replacement-prefix/lemon")),
            get("/full/path/original", redirect(302, "http://echo/full-path-replacement")),
            get("/path-and-host", redirect(302, "http://example.org/replacement-prefix")),
            get("/path-and-status", redirect(301, "http://echo/replacement-prefix")),
            get("/full-path-and-host", redirect(302, "http://example.org/replacement-full")),
            get("/full-path-and-status", redirect(301, "http://echo/replacement-full")),
        ],
    ),
    (
        "httproute-redirect-port",
        &[
            get("/port", redirect(302, "http://echo:8083/port")),
            get("/port-and-host", redirect(302, "http://example.org:8083/port-and-host")),
            get("/port-and-status", redirect(301, "http://echo:8083/port-and-status")),
            get(
                "/port-and-host-and-status",
                redirect(302, "http://example.org:8083/port-and-host-and-status"),
            ),
        ],
    ),
    (
        "httproute-redirect-scheme",
        &[
            get("/scheme", redirect(302, "https://echo/scheme")),
            get("/scheme-and-host", redirect(302, "https://example.org/scheme-and-host")),
            get("/scheme-and-status", redirect(301, "https://echo/scheme-and-status")),
            get(
                "/scheme-and-host-and-status",
                redirect(302, "https://example.org/scheme-and-host-and-status"),
            ),
        ],
    ),
    ("httproute-request-header-modifier", MODIFIED),
    ("httproute-request-header-modifier-backend", MODIFIED),
    (
        "httproute-rewrite-path",
        &[
            get("/prefix/one/two", seen("/one/two", &[], &[])),
            get("/strip-prefix/three", seen("/three", &[], &[])),
            get("/strip-prefix", seen("/", &[], &[])),
            get("/full/one/two", seen("/one", &[], &[])),
            with(
                "/full/rewrite-path-and-modify-headers/test",
                REWRITE_ASKED,
                seen("/test", REWRITE_SEEN, &["x-header-remove"]),
            ),
            with(
                "/prefix/rewrite-path-and-modify-headers/one",
                REWRITE_ASKED,
                seen("/prefix/one", REWRITE_SEEN, &["x-header-remove"]),
            ),
        ],
    ),
    ("mesh-split", &[get("/v1", V1), get("/v2", V2), get("/v3", Wanted::Status(404))]),
    (
        "mesh-ports",
        &[
            to("echo-v1", 80, Wanted::Marked("echo-v1", Some("v1"))),
            to("echo-v1", 8080, Wanted::Marked("echo-v1", None)),
            to("echo-v2", 80, Wanted::Marked("echo-v2", Some("v2"))),
            to("echo-v2", 8080, Wanted::Marked("echo-v2", Some("v2"))),
        ],
    ),
    (
        "mesh-frontend",
        &[
            to("echo-v2", 80, Wanted::Marked("echo-v2", Some("set"))),
            to("echo-v1", 80, Wanted::Marked("echo-v1", None)),
        ],
    ),
    (
        "mesh-consumer-route",
        &[
            Check {
                from: From::Consumer,
                service: "echo-v1",
                port: 80,
                target: "/",
                headers: &[],
                wanted: Wanted::Marked("echo-v1", Some("set")),
            },
            to("echo-v1", 80, Wanted::Marked("echo-v1", None)),
        ],
    ),
];

pub(crate) fn cases() -> Vec<Case<World>> {
    let mut cases: Vec<_> = ROUTES
        .iter()
        .map(|(file, checks)| case(format!("Gateway API: {file}"), move |world| route(world, file, checks)))
        .collect();
    cases.push(case("Gateway API: mesh-frontend, the endpoint's own address", own_address));
    cases.push(case("Gateway API: httproute-weight", |world| {
        weight(world, "httproute-weight", Call::Http1, 80)
    }));
    cases.push(case("Gateway API: grpcroute-weight", |world| {
        weight(world, "grpcroute-weight", Call::Grpc, 7070)
    }));
    cases
}

/// A route as it was published.
async fn apply(world: &World, file: &str) -> anyhow::Result<()> {
    let path = sandbox::get().tools.join("gateway-api").join(format!("{file}.yaml"));
    let text = std::fs::read_to_string(&path);
    let text = text.with_context(|| format!("reading {}: `make tools` puts it there", path.display()))?;
    world.mesh.apply(&text).await
}

async fn route(world: Arc<World>, file: &str, checks: &'static [Check]) -> anyhow::Result<()> {
    let echo = world.echo().await?;
    let _turn = world.without_policies().await?;
    apply(&world, file).await?;
    wait_until(IN_FORCE, "the route to do what it says", || async {
        for check in checks {
            verify(echo, check).await.with_context(|| {
                format!("GET {} of {}:{} with {:?}", check.target, check.service, check.port, check.headers)
            })?;
        }
        Ok(())
    })
    .await?;
    for policy in world.mesh.policies().await? {
        accepted(&policy)?;
    }
    Ok(())
}

/// Each parent says `Accepted`.
fn accepted(policy: &serde_json::Value) -> anyhow::Result<()> {
    let conditions = policy["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let accepted = conditions.iter().filter(|condition| condition["type"] == "Accepted");
    let mut any = false;
    for condition in accepted {
        ensure!(condition["status"] == "True" || condition["status"] == true, "{condition}");
        any = true;
    }
    ensure!(any, "no parent has accepted it: {}", policy["status"]);
    Ok(())
}

async fn verify(echo: &Echo, check: &Check) -> anyhow::Result<()> {
    let from = match check.from {
        From::Own => &echo.v1,
        From::Consumer => &echo.consumer,
    };
    let host =
        if check.port == 80 { check.service.to_owned() } else { format!("{}:{}", check.service, check.port) };
    let asked = Asked {
        method: "GET".to_owned(),
        target: check.target.to_owned(),
        host,
        headers: check
            .headers
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
    };
    let answered = ask(from, &service(check.service), check.port, &asked).await?;
    let (status, reason) = (answered.reply.status.as_u16(), answered.reply.reason());
    let by = |backend: &str| {
        let app = answered.app.as_deref();
        ensure!(
            status == 200 && app == Some(backend),
            "{status} of {app:?} instead of {backend}: {reason:?}"
        );
        Ok(())
    };
    let header = |name: &str| {
        let value = answered.reply.headers.get(name)?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    match check.wanted {
        Wanted::Backend(backend) => by(backend),
        Wanted::Seen(backend, target, headers, absent) => {
            by(backend)?;
            ensure!(answered.target == target, "the application saw {}", answered.target);
            for (name, value) in headers {
                let seen = answered.headers.get(*name).map(|seen| seen.replace(", ", ","));
                ensure!(seen.as_deref() == Some(*value), "the application saw {name}: {seen:?}");
            }
            for name in absent {
                ensure!(!answered.headers.contains_key(*name), "the application saw {name}");
            }
            Ok(())
        }
        Wanted::Marked(backend, mark) => {
            by(backend)?;
            let seen = header("x-header-set");
            ensure!(seen.as_deref() == mark, "x-header-set: {seen:?} instead of {mark:?}");
            Ok(())
        }
        Wanted::Status(wanted) => {
            ensure!(status == wanted && answered.app.is_none(), "{status} of {:?}", answered.app);
            Ok(())
        }
        Wanted::Redirect(wanted, location) => {
            let seen = header("location").unwrap_or_default();
            ensure!(
                status == wanted && seen == location,
                "{status} to {seen:?} instead of {wanted} to {location}"
            );
            Ok(())
        }
    }
}

/// A dialled instance means that instance: no route holds.
async fn own_address(world: Arc<World>) -> anyhow::Result<()> {
    let echo = world.echo().await?;
    let _turn = world.without_policies().await?;
    apply(&world, "mesh-frontend").await?;
    let routed = to("echo-v2", 80, Wanted::Marked("echo-v2", Some("set")));
    wait_until(IN_FORCE, "the route to be in force", || verify(echo, &routed)).await?;
    let address = echo.v2.host.v4().to_string();
    let asked = Asked {
        method: "GET".to_owned(),
        target: "/".to_owned(),
        host: address.clone(),
        headers: Vec::new(),
    };
    let answered = ask(&echo.v1, &address, 8080, &asked).await?;
    ensure!(answered.app.as_deref() == Some("echo-v2"), "{:?} answered", answered.app);
    ensure!(!answered.reply.headers.contains_key("x-header-set"), "a route holds for an instance");
    Ok(())
}

async fn weight(world: Arc<World>, file: &str, call: Call, port: u16) -> anyhow::Result<()> {
    let echo = world.echo().await?;
    let _turn = world.without_policies().await?;
    apply(&world, file).await?;
    wait_until(IN_FORCE, "the route to be in force", || async {
        let some = if call == Call::Grpc {
            grpc_share(echo, port, 100).await?
        } else {
            http_share(echo, port, 50).await?
        };
        ensure!((some - 0.7_f64).abs() < 0.2, "a share of {some}");
        Ok(())
    })
    .await?;
    // The shares of 70 and 30 are wrong by less than 5 in all but one of 10^5 runs of so many calls (binomial, 4.4 sigma).
    let share = if call == Call::Grpc {
        grpc_share(echo, port, 1600).await?
    } else {
        http_share(echo, port, 1600).await?
    };
    println!("{NAMESPACE}: {file}: {:.1} % to echo-v1", share * 100.0);
    ensure!((share - 0.7).abs() < 0.05, "echo-v1 got {:.1} %", share * 100.0);
    Ok(())
}

/// The share of `echo-v1` in so many calls, by what answers say of themselves.
async fn http_share(echo: &Echo, port: u16, calls: u32) -> anyhow::Result<f64> {
    let asked = Asked {
        method: "GET".to_owned(),
        target: "/".to_owned(),
        host: "echo".to_owned(),
        headers: Vec::new(),
    };
    let mut count = 0;
    for _ in 0..calls {
        let answered = ask(&echo.v1, &service("echo"), port, &asked).await?;
        count += u32::from(answered.app.as_deref() == Some("echo-v1"));
    }
    Ok(f64::from(count) / f64::from(calls))
}

/// The same of gRPC calls, whose answer is the replica's name.
async fn grpc_share(echo: &Echo, port: u16, calls: u32) -> anyhow::Result<f64> {
    let target = echo.v1.look_up(&service("echo"), port).await?;
    let plan = Plan::new(400, target, format!("echo:{port}"), "/proto.EchoTestService/Echo").call(Call::Grpc);
    let outcome = Load::for_duration(&echo.v1.host, plan, Duration::from_secs(1) * calls / 400).await?;
    ensure!(outcome.failed() == 0, "{outcome}");
    Ok(outcome.share_of("echo-v1"))
}
