//! What the cases share.

use std::time::Duration;

use anyhow::ensure;
use outrigger_e2e::app::{CONTROL_PORT, Faults};
use outrigger_e2e::load::{Load, Plan};
use outrigger_e2e::mesh::{Mesh, Setup, Workload};
use outrigger_e2e::wait::wait_until;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::Instant;

pub(crate) const HTTP: u16 = 8080;
pub(crate) const ORDERS: &str = "orders.service.consul";
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
/// Requests a second: below half of what five debug sidecars and applications carry on two cores.
pub(crate) const RATE: u32 = 1_000;
/// What an endpoint's latency and share are compared with is measured for so long.
pub(crate) const BASELINE: Duration = Duration::from_secs(5);
/// Milliseconds below which latencies are not told apart: what scheduling makes of them where callers, sidecars and applications
/// share two cores.
pub(crate) const NOISE: f64 = 2.0;
/// The replicas, by name.
pub(crate) const REPLICAS: [&str; 3] = ["orders-1", "orders-2", "orders-3"];

/// Others that were chosen in a row, so that one of three was put aside and not merely passed over: by chance that happens once in
/// 10^17 times. At [`RATE`] they take a tenth of a second, and the shortest ejection is half of one.
const IN_A_ROW: u64 = 100;

pub(crate) struct World {
    pub(crate) mesh: Mesh,
    pub(crate) web: Workload,
    replicas: Mutex<Vec<Workload>>,
}

/// The arguments of a replica's application.
fn app() -> [String; 4] {
    ["--http".to_owned(), HTTP.to_string(), "--control".to_owned(), CONTROL_PORT.to_string()]
}

impl World {
    pub(crate) async fn build() -> anyhow::Result<Self> {
        let mesh = Mesh::start(Setup::default()).await?;
        let mut replicas = Vec::new();
        for name in REPLICAS {
            let arguments = app();
            let plan = mesh.workload(name).account("orders").serves("orders", HTTP);
            replicas.push(plan.app(arguments.each_ref().map(String::as_str)).start().await?);
        }
        let web = mesh.workload("web").start().await?;
        web.wait_for_service(ORDERS, HTTP, LIMIT).await?;
        Ok(Self { mesh, web, replicas: Mutex::new(replicas) })
    }

    /// The replicas, all of them well and in use, under these policies alone.
    pub(crate) async fn ready(&self, policies: &str) -> anyhow::Result<MutexGuard<'_, Vec<Workload>>> {
        let mut replicas = self.replicas.lock().await;
        self.mesh.clear_policies().await?;
        for replica in &mut *replicas {
            revive(replica).await?;
            replica.suffer(Faults::default()).await?;
        }
        if !policies.is_empty() {
            self.mesh.apply(policies).await?;
        }
        self.wait_even().await?;
        Ok(replicas)
    }

    /// Waits until each replica takes its share: one that had failed in an earlier case comes back in its own time.
    async fn wait_even(&self) -> anyhow::Result<()> {
        wait_until(Duration::from_mins(1), "every replica to take its share", || async {
            let outcome =
                Load::for_duration(&self.web.host, self.plan(300).await?, Duration::from_secs(1)).await?;
            let even = REPLICAS.iter().all(|name| outcome.share_of(name) > 0.15);
            ensure!(even && outcome.failed() == 0, "{outcome}");
            Ok(())
        })
        .await
    }

    /// What `web` sends to `orders`.
    pub(crate) async fn plan(&self, rate: u32) -> anyhow::Result<Plan> {
        let target = self.web.look_up(ORDERS, HTTP).await?;
        Ok(Plan::new(rate, target, format!("{ORDERS}:{HTTP}"), "/work"))
    }

    /// Starts it.
    pub(crate) async fn load(&self, rate: u32) -> anyhow::Result<Load> {
        Ok(Load::start(&self.web.host, self.plan(rate).await?))
    }

    /// How often `web`'s sidecar has chosen `replica`, and the others of `orders`, by its own count.
    pub(crate) async fn picks(&self, replica: &Workload) -> anyhow::Result<Picks> {
        let metrics = self.web.admin("/metrics").await?.expect(200)?.text();
        // Consul's id of the instance, after datacenter and node.
        let id = format!("/orders-{}\"", replica.host.name());
        let mut picks = Picks { of_it: 0, of_others: 0 };
        for line in metrics.lines().filter(|line| line.starts_with("outrigger_balancer_picks_total{")) {
            let count =
                line.rsplit(' ').next().and_then(|count| count.parse::<u64>().ok()).unwrap_or_default();
            if line.contains(&id) {
                picks.of_it += count;
            } else if line.contains("/orders-") {
                picks.of_others += count;
            }
        }
        Ok(picks)
    }

    /// How many endpoints of `orders` are put aside, by the count of `web`'s sidecar.
    pub(crate) async fn ejected(&self) -> anyhow::Result<u64> {
        let metrics = self.web.admin("/metrics").await?.expect(200)?.text();
        let gauge = "outrigger_ejected_endpoints{service=\"orders.default\"} ";
        let count = metrics.lines().find_map(|line| line.strip_prefix(gauge));
        Ok(count.and_then(|count| count.parse().ok()).unwrap_or_default())
    }

    /// How long after `begun`, when its picks were `first`, `web`'s sidecar chose `replica` for the last time before it was put
    /// aside; and how often it did from then on.
    pub(crate) async fn put_aside(
        &self,
        replica: &Workload,
        begun: Instant,
        first: Picks,
    ) -> anyhow::Result<(Duration, u64)> {
        let (mut last, mut changed) = (first, begun);
        loop {
            let now = self.picks(replica).await?;
            if now.of_it != last.of_it {
                (last, changed) = (now, Instant::now());
            } else if now.of_others - last.of_others >= IN_A_ROW {
                return Ok((changed - begun, last.of_it - first.of_it));
            }
            ensure!(begun.elapsed() < LIMIT, "{} is still chosen after {LIMIT:?}", replica.host.name());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// How often endpoints were chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Picks {
    of_it: u64,
    of_others: u64,
}

/// Starts what has ended, wakes what was stopped.
pub(crate) async fn revive(replica: &mut Workload) -> anyhow::Result<()> {
    if let Some(app) = &mut replica.app
        && app.exited()?.is_none()
    {
        app.signal(nix::sys::signal::Signal::SIGCONT)?;
    } else {
        replica.start_app(&app()).await?;
    }
    let sidecar_runs = match &mut replica.sidecar {
        Some(sidecar) => sidecar.exited()?.is_none(),
        None => false,
    };
    if !sidecar_runs {
        replica.start_sidecar().await?;
        replica.wait_ready().await?;
        replica.wait_claims().await?;
    }
    Ok(())
}

/// Retries, and bounds on each try: what a service has that must not show its replicas' faults.
pub(crate) const RETRIES: &str = "
apiVersion: outrigger.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: orders, namespace: default}
spec:
  targetRef: {kind: Service, name: orders}
  timeouts: {request: 5s, perTry: 250ms}
  retry: {attempts: 3, on: [5xx, reset, connect-failure, per-try-timeout]}
";
