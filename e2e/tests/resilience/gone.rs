//! L8: one of three endpoints is gone, in each of the ways in which endpoints go.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::Signal;
use outrigger_e2e::figures::{Figure, hold};
use outrigger_e2e::mesh::Workload;
use outrigger_e2e::suite::{Case, case, is_soak, length};
use tokio::time::{Instant, sleep};

use crate::world::{BASELINE, NOISE, RATE, RETRIES, World, revive};

/// The fault itself, and what the first requests that it hits may do to others.
const AFTERMATH: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug)]
enum Gone {
    /// Its processes are killed: connections end by a reset, new ones are refused.
    Killed,
    /// Only the application is: the sidecar beside it says so.
    WithoutApplication,
    /// Its host answers nothing any more, not even with a refusal.
    Silent,
    /// Its application is stopped: it accepts, as the kernel does for it, and never answers.
    Hung,
}

impl Gone {
    fn name(self) -> &'static str {
        match self {
            Self::Killed => "killed",
            Self::WithoutApplication => "without application",
            Self::Silent => "black hole",
            Self::Hung => "hung",
        }
    }

    async fn begin(self, replica: &mut Workload) -> anyhow::Result<()> {
        match self {
            Self::Killed => replica.kill(),
            Self::WithoutApplication => replica.app = None,
            Self::Silent => replica.host.fall_silent().await?,
            Self::Hung => replica.app.as_ref().context("an application")?.signal(Signal::SIGSTOP)?,
        }
        Ok(())
    }

    async fn end(self, replica: &mut Workload) -> anyhow::Result<()> {
        if matches!(self, Self::Silent) {
            replica.host.speak_again().await?;
        }
        revive(replica).await
    }

    /// How soon nobody may be sent there any more: at once where there is an answer, after the connect time-out (1 s) and three
    /// tries of 250 ms where there is none.
    fn put_aside_within(self) -> f64 {
        if matches!(self, Self::Silent) { 1.75 } else { 1.0 }
    }
}

pub(crate) fn cases() -> Vec<Case<World>> {
    [Gone::Killed, Gone::WithoutApplication, Gone::Silent, Gone::Hung]
        .map(|gone| {
            case(format!("L8: one of three is gone: {}", gone.name()), move |world| one_gone(world, gone))
        })
        .into()
}

async fn one_gone(world: Arc<World>, gone: Gone) -> anyhow::Result<()> {
    let mut replicas = world.ready(RETRIES).await?;
    let load = world.load(RATE).await?;
    sleep(length(BASELINE.as_secs(), 60)).await;
    let first = world.picks(&replicas[0]).await?;
    let (begun, fault) = (load.now(), Instant::now());
    gone.begin(&mut replicas[0]).await?;
    let aside = world.put_aside(&replicas[0], fault, first).await;
    sleep((begun + length(20, 300)).saturating_sub(load.now())).await;
    let ended = load.now();
    gone.end(&mut replicas[0]).await?;
    let outcome = load.stop().await?;

    // The first second warms up.
    let before = outcome.between(Duration::from_secs(1), begun);
    let during = outcome.between(begun, ended);
    let after = outcome.between(begun + AFTERMATH, ended);
    println!("{gone:?}\n  before: {before}\n  during: {during}");
    let (aside, picked) = aside?;
    println!("  put aside after {aside:?}, chosen {picked} times meanwhile");
    let name = |what: &str| format!("L8: {}: {what}", gone.name());
    let slower = after.quantile_ms(0.999) / before.quantile_ms(0.999).max(NOISE);
    let slower_than_before = name("p99.9 after 3 s, of before");
    let slower = if is_soak() {
        Figure::at_most(&slower_than_before, "times", 1.5, slower)
    } else {
        // The slowest twenty of 17,000 beside the slowest five of 5,000 say more about the machine.
        Figure::info(&slower_than_before, "times", slower)
    };
    hold(&[
        Figure::at_least(&name("success"), "%", 99.99, (1.0 - during.failed_share()) * 100.0),
        Figure::at_most(&name("put aside after"), "s", gone.put_aside_within(), aside.as_secs_f64()),
        slower,
    ])
}
