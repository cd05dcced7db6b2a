//! The README's chapter on policies.

use std::sync::Arc;
use std::time::Duration;

use outrigger_e2e::suite::{Case, case};
use outrigger_e2e::transcript::{self, Shell};

use crate::world::World;

/// What was applied reaches a proxy within half a second.
const IN_FORCE: Duration = Duration::from_secs(5);

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![case("the README's policy chapter is a transcript", replay)]
}

/// A `curl` is the client's, whose host is `web`.
async fn replay(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.without_policies().await?;
    transcript::replay("policies", |command| {
        let (host, patience) = if command.starts_with("curl ") {
            (&world.web.host, IN_FORCE)
        } else {
            (&world.mesh.controller_host, Duration::ZERO)
        };
        let cli = world.mesh.cli_command()?;
        let text = |value: &std::ffi::OsStr| value.to_string_lossy().into_owned();
        let environment =
            cli.get_envs().filter_map(|(name, value)| Some((text(name), text(value?)))).collect();
        Ok(Shell { host: host.clone(), environment, patience })
    })
    .await
}
