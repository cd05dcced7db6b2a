//! L10: one of three endpoints becomes slow, and nothing else.

use std::sync::Arc;
use std::time::Duration;

use outrigger_e2e::app::Faults;
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::suite::{Case, case, length};
use tokio::time::sleep;

use crate::world::{BASELINE, NOISE, RATE, REPLICAS, World};

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![case("L10: one of three answers a second later", one_slow)]
}

async fn one_slow(world: Arc<World>) -> anyhow::Result<()> {
    // Balancing alone: no policy.
    let replicas = world.ready("").await?;
    let load = world.load(RATE).await?;
    sleep(BASELINE).await;
    let begun = load.now();
    replicas[0].suffer(Faults { latency_ms: 1000, ..Faults::default() }).await?;
    sleep(length(25, 300)).await;
    let outcome = load.stop().await?;
    let before = outcome.between(Duration::from_secs(1), begun);
    let during = outcome.between(begun, Duration::MAX);
    println!("before: {before}\n  during: {during}");
    let slower = during.quantile_ms(0.99) / before.quantile_ms(0.99).max(NOISE);
    hold(&[
        Figure::at_most("L10: share of the slow endpoint", "%", 5.0, during.share_of(REPLICAS[0]) * 100.0),
        Figure::at_most("L10: p99, of before", "times", 1.3, slower),
        Figure::at_most("L10: failed", "%", 0.0, during.failed_share() * 100.0),
    ])
}
