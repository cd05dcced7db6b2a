//! gRPC, as its official interoperability client and server have it (grpc-go's `interop`): all four call kinds, big
//! messages and metadata, early ends, status codes.

use std::process::Command;

use outrigger_e2e::sandbox;

use crate::{GRPC, Target};

/// Cases that need neither TLS nor somebody's credentials.
pub(crate) const CASES: [&str; 13] = [
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "timeout_on_sleeping_server",
    "cancel_after_begin",
    "cancel_after_first_response",
    "status_code_and_message",
    "special_status_message",
    "custom_metadata",
    "unimplemented_method",
];

/// The client of this case ends its half and cancels at once, and fails where the answer to the former wins: a race in
/// the client, lost now and then without a mesh, too, and no fault of whoever carries the call.
const RACES_WITH_ITSELF: &str = "cancel_after_begin";

pub(crate) async fn run(target: &Target, case: &str) -> anyhow::Result<()> {
    let attempts = if case == RACES_WITH_ITSELF { 3 } else { 1 };
    let mut result = Ok(());
    for _ in 0..attempts {
        result = once(target, case).await;
        if result.is_ok() {
            break;
        }
    }
    result
}

async fn once(target: &Target, case: &str) -> anyhow::Result<()> {
    let mut client = Command::new(sandbox::get().tool("grpc-interop-client")?);
    let address = target.at(GRPC);
    client.arg(format!("--server_host={}", address.ip())).arg(format!("--server_port={}", address.port()));
    client.arg("--use_tls=false").arg(format!("--test_case={case}"));
    target.client.output(client).await.map(drop)
}
