//! gRPC between languages: gRPC's own interoperability cases with a program of Google's Go and of Python's (C core)
//! implementation at either end. Go with Go is in the transparency suite.

use std::process::Command;
use std::sync::Arc;

use outrigger_e2e::suite::{Case, case};

use crate::{GRPC_GO, GRPC_PYTHON, Service, World, tool};

/// Cases that both clients have and that need neither TLS nor somebody's credentials.
const CASES: [&str; 12] = [
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "custom_metadata",
    "status_code_and_message",
    "special_status_message",
    "unimplemented_method",
    "timeout_on_sleeping_server",
    "cancel_after_first_response",
];
/// One of our Python client: hundreds of calls on one channel.
const MANY: &str = "many_calls";

pub(crate) fn cases() -> Vec<Case<World>> {
    let mut cases = Vec::new();
    for what in CASES {
        cases.push(pair("grpcio to grpcio", what, |what| python(what, GRPC_PYTHON)));
        cases.push(pair("grpcio to Go", what, |what| python(what, GRPC_GO)));
        cases.push(pair("Go to grpcio", what, |what| go(what, GRPC_PYTHON)));
    }
    cases.push(pair("grpcio to grpcio", MANY, |what| python(what, GRPC_PYTHON)));
    cases.push(pair("grpcio to Go", MANY, |what| python(what, GRPC_GO)));
    cases
}

fn pair(
    who: &str,
    what: &'static str,
    client: impl FnOnce(&str) -> anyhow::Result<Command> + Send + 'static,
) -> Case<World> {
    case(format!("grpc: {who}: {what}"), move |world: Arc<World>| async move {
        world.web.host.output(client(what)?).await.map(drop)
    })
}

fn python(what: &str, server: Service) -> anyhow::Result<Command> {
    tool("grpc-python", &[what, &server.authority()])
}

fn go(what: &str, server: Service) -> anyhow::Result<Command> {
    let (host, port) = (format!("--server_host={}.service.consul", server.name), server.port);
    let (port, what) = (format!("--server_port={port}"), format!("--test_case={what}"));
    tool("grpc-interop-client", &["--use_tls=false", &host, &port, &what])
}
