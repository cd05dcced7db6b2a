//! The demo's story, step by step: what is done, what to see, and how many requests failed.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    app::Next,
    consul,
    edges::{Watcher, fetch},
    load::{Load, Tally},
    plan::{LEAF_LIFE, Plan, Replica, document, identity},
    processes::{Process, Site},
    screen::Screen,
};
use crate::{
    client::{Server, Token},
    token,
};

/// How long the mesh may take from nothing to ready on a busy machine.
const READY_DEADLINE: Duration = Duration::from_mins(1);
/// How long a step is watched: some seconds, so that rates mean something.
const STEP: Duration = Duration::from_secs(5);
/// Every leaf is renewed within its life; twice that is a renewal that does not happen.
const ROTATION_DEADLINE: Duration = Duration::from_mins(1);
/// How often the table changes and conditions are looked at again.
const LOOK: Duration = Duration::from_secs(1);

/// The running demo.
pub(super) struct Demo {
    site: Site,
    plan: Plan,
    screen: Screen,
    watcher: Watcher,
    controller_file: String,
    controller: Option<Process>,
    consul: Option<Process>,
    apps: BTreeMap<String, Process>,
    sidecars: BTreeMap<String, Process>,
    load: Option<Load>,
    rate: u32,
}

impl Demo {
    /// Starts everything and waits until it serves.
    pub(super) async fn start(folder: PathBuf, consul: Option<&Path>, rate: u32, once: bool) -> Result<Self> {
        let site = Site::new(folder)?;
        let plan = Plan::new()?;
        let mut screen = Screen::new(once);
        let mut demo = Self {
            controller_file: String::new(),
            controller: None,
            consul: None,
            apps: BTreeMap::new(),
            sidecars: BTreeMap::new(),
            load: None,
            rate,
            watcher: Watcher::new(),
            site,
            plan,
            screen: {
                screen.say(format!(
                    "Starting a controller, {} and a sidecar beside each replica.",
                    if consul.is_some() { "Consul, three services" } else { "three services" },
                ));
                screen
            },
        };
        demo.start_catalog(consul).await?;
        demo.start_replicas(consul.is_some()).await?;
        demo.wait_until_ready().await?;
        Ok(demo)
    }

    async fn start_catalog(&mut self, consul: Option<&Path>) -> Result<()> {
        let mut source = ("file", json!({"directory": self.site.folder.join("services")}));
        if let Some(program) = consul {
            self.consul = Some(consul::start(&self.site, &self.plan, program).await?);
            consul::register(&self.plan).await?;
            source = ("consul", json!({"addresses": [format!("http://{}", self.plan.consul[0])]}));
        } else {
            for service in Plan::services() {
                self.site.write(&format!("services/{service}.yaml"), &self.plan.service_file(service))?;
            }
        }
        let file = json!({
            "data_dir": self.site.folder.join("controller"),
            "listen": self.plan.discovery.to_string(),
            "api_listen": self.plan.api.to_string(),
            "metrics_listen": self.plan.controller_metrics.to_string(),
            "leaf_life": LEAF_LIFE,
            "allow_loopback_endpoints": true,
            (source.0): source.1,
        });
        self.controller_file = self.site.write("controller.yaml", &document(&file))?;
        self.start_controller().await
    }

    async fn start_controller(&mut self) -> Result<()> {
        let process =
            self.site.start("controller", "outrigger-controller", &["--config", &self.controller_file])?;
        let process = self.controller.insert(process);
        let ready = Next::new(self.plan.controller_metrics.to_string());
        let deadline = Instant::now() + READY_DEADLINE;
        loop {
            process.check()?;
            if let Ok((status, _)) = ready.get("/ready").await
                && status.is_success()
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the controller is not ready after {} s", READY_DEADLINE.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn start_replicas(&mut self, claims: bool) -> Result<()> {
        let data = self.site.folder.join("controller");
        let server = Server::new(&self.plan.api.to_string(), Token::File(data.join("admin-token")))?;
        let root = data.join("root.pem").display().to_string();
        for replica in self.plan.replicas.clone() {
            let grant = token::Grant {
                identity: identity(replica.service),
                services: replica.inbound.map(|_| replica.service.to_owned()).into_iter().collect(),
                cidrs: Vec::new(),
                ttl_seconds: 3600,
                uses: token::Uses::Reusable,
            };
            let created = token::create(&server, &grant).await?;
            let token = self.site.write(&format!("{}.token", replica.name), &created.token)?;
            let file = self.plan.sidecar_file(&replica, &token, &root, claims);
            self.site.write(&format!("{}.yaml", replica.name), &file)?;
            self.start_replica(&replica)?;
        }
        Ok(())
    }

    fn start_replica(&mut self, replica: &Replica) -> Result<()> {
        let config = self.site.folder.join(format!("{}.yaml", replica.name)).display().to_string();
        let sidecar = self.site.start(
            &format!("{}-sidecar", replica.name),
            "outrigger-proxy",
            &["--config", &config],
        )?;
        self.sidecars.insert(replica.name.clone(), sidecar);
        if let Some(listen) = replica.app {
            let (listen, next) = (listen.to_string(), replica.upstream.map(|next| next.1.to_string()));
            let mut arguments = vec!["demo-app", "--name", &replica.name, "--listen", &listen];
            if let Some(next) = &next {
                arguments.extend(["--next", next]);
            }
            let app = self.site.start(&replica.name, "outrigger", &arguments)?;
            self.apps.insert(replica.name.clone(), app);
        }
        Ok(())
    }

    /// Waits until every sidecar is ready and a request goes all the way.
    async fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + READY_DEADLINE;
        let mut missing = String::new();
        for replica in self.plan.replicas.clone() {
            while let Err(error) = fetch(&replica, "/ready").await {
                self.check()?;
                if Instant::now() > deadline {
                    return Err(error.context(format!("not ready after {} s", READY_DEADLINE.as_secs())));
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        let entry = Next::new(self.entry()?.to_string());
        while Instant::now() < deadline {
            self.check()?;
            match entry.get("/").await {
                Ok((status, _)) if status.is_success() => return Ok(()),
                Ok((status, (_, body))) => missing = format!("{status}: {}", String::from_utf8_lossy(&body)),
                Err(error) => missing = format!("{error:#}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        bail!("no request reached the last service within {} s: {missing}", READY_DEADLINE.as_secs())
    }

    fn check(&mut self) -> Result<()> {
        let processes = self.controller.iter_mut().chain(&mut self.consul);
        for process in processes.chain(self.sidecars.values_mut()).chain(self.apps.values_mut()) {
            process.check()?;
        }
        Ok(())
    }

    fn entry(&self) -> Result<std::net::SocketAddr> {
        let load = self.replica("load")?;
        Ok(load.upstream.context("the load generator has no upstream")?.1)
    }

    fn replica(&self, name: &str) -> Result<&Replica> {
        self.plan
            .replicas
            .iter()
            .find(|replica| replica.name == name)
            .with_context(|| format!("no replica {name}"))
    }

    /// Walks through the steps; returns how many requests failed that should not have.
    pub(super) async fn scenario(&mut self) -> Result<u64> {
        self.load = Some(Load::start(self.entry()?.to_string(), self.rate));
        let mut unexpected = 0;
        unexpected += self.quiet().await?;
        unexpected += self.killed_replica().await?;
        unexpected += self.failing_replica().await?;
        unexpected += self.controller_away().await?;
        unexpected += self.rotation().await?;
        self.screen.say(if unexpected == 0 {
            "\nDone: no request failed that should not have.".to_owned()
        } else {
            format!("\nDone: {unexpected} requests failed that should not have.")
        });
        Ok(unexpected)
    }

    async fn quiet(&mut self) -> Result<u64> {
        self.screen.say("\n1. Everything runs. See: every edge at 100 %, both identities, TLS 1.3 with a post-quantum key exchange.");
        self.spend(STEP).await?;
        self.step_ended(|_| false).await
    }

    async fn killed_replica(&mut self) -> Result<u64> {
        self.screen.say("\n2. orders-2 is killed, application and sidecar at once. See: the others take over, nothing fails.");
        for map in [&mut self.sidecars, &mut self.apps] {
            if let Some(process) = map.remove("orders-2") {
                process.kill().await?;
            }
        }
        self.spend(STEP).await?;
        let failed = self.step_ended(|_| false).await?;
        self.screen.say("   orders-2 comes back.");
        let replica = self.replica("orders-2")?.clone();
        self.start_replica(&replica)?;
        self.until("orders-2 is ready again", READY_DEADLINE, async |demo: &Self| {
            Ok(fetch(demo.replica("orders-2")?, "/ready").await.is_ok())
        })
        .await?;
        Ok(failed)
    }

    async fn failing_replica(&mut self) -> Result<u64> {
        self.screen.say("\n3. orders-3 answers 500 to everything. See: its share shrinks at once; what it answers is passed on unchanged.");
        self.tell("orders-3", "/fail").await?;
        self.spend(STEP).await?;
        self.tell("orders-3", "/heal").await?;
        self.step_ended(|kind| kind.contains("orders-3 is failing")).await
    }

    async fn controller_away(&mut self) -> Result<u64> {
        self.screen.say("\n4. The controller is stopped for some seconds and started again. See: nothing; last good wins.");
        let controller = self.controller.take().context("the controller is not running")?;
        controller.terminate().await?;
        self.spend(STEP).await?;
        self.start_controller().await?;
        self.spend(STEP).await?;
        self.step_ended(|_| false).await
    }

    async fn rotation(&mut self) -> Result<u64> {
        self.screen.say(format!(
            "\n5. Certificates rotate: they live {LEAF_LIFE} here, a new key each. See: every leaf is replaced, nothing fails."
        ));
        let mut before = BTreeMap::new();
        for replica in &self.plan.replicas {
            before.insert(replica.name.clone(), leaf_end(replica).await?);
        }
        self.until("every certificate was renewed", ROTATION_DEADLINE, async |demo: &Self| {
            for replica in &demo.plan.replicas {
                if leaf_end(replica).await? == before[&replica.name] {
                    return Ok(false);
                }
            }
            Ok(true)
        })
        .await?;
        self.step_ended(|_| false).await
    }

    /// Calls an application past the mesh.
    async fn tell(&self, name: &str, path: &str) -> Result<()> {
        let address = self.replica(name)?.app.with_context(|| format!("{name} is no application"))?;
        let (status, _) = Next::new(address.to_string()).post(path).await?;
        anyhow::ensure!(status.is_success(), "{name} answered {path} with {status}");
        Ok(())
    }

    /// Lets time pass, with the table alive.
    async fn spend(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            tokio::time::sleep(LOOK.min(end - Instant::now())).await;
            self.check()?;
            if self.screen.is_live() {
                let table = self.watcher.table(&self.plan.replicas).await;
                self.screen.show(table, false);
            }
        }
        Ok(())
    }

    async fn until(
        &mut self,
        what: &str,
        deadline: Duration,
        condition: impl AsyncFn(&Self) -> Result<bool>,
    ) -> Result<()> {
        let end = Instant::now() + deadline;
        while !condition(self).await? {
            if Instant::now() > end {
                bail!("not within {} s: {what}", deadline.as_secs());
            }
            self.spend(Duration::from_millis(500)).await?;
        }
        Ok(())
    }

    /// Says what a step cost; returns the failures of kinds that were not to be expected.
    async fn step_ended(&mut self, expected: impl Fn(&str) -> bool) -> Result<u64> {
        let table = self.watcher.table(&self.plan.replicas).await;
        self.screen.show(table, true);
        let tally = self.load.as_ref().context("the load is not running")?.take();
        self.screen.say(format!("   {} requests, {} failed", tally.sent, tally.failed));
        let Tally { kinds, .. } = tally;
        let mut unexpected = 0;
        for (kind, count) in &kinds {
            let foreseen = expected(kind);
            self.screen.say(format!("   {count} x {kind}{}", if foreseen { " (as it should)" } else { "" }));
            unexpected += if foreseen { 0 } else { *count };
        }
        Ok(unexpected)
    }

    /// Shows the table until the demo is interrupted.
    pub(super) async fn watch(&mut self) -> Result<()> {
        loop {
            self.spend(STEP).await?;
        }
    }
}

/// When a replica's certificate ends, as its sidecar says.
async fn leaf_end(replica: &Replica) -> Result<String> {
    let config: Value = serde_json::from_str(&fetch(replica, "/config").await?)
        .with_context(|| format!("reading /config of {}", replica.name))?;
    let end = &config["certificate"]["not_after"];
    anyhow::ensure!(!end.is_null(), "/config of {} does not say when its certificate ends", replica.name);
    Ok(end.to_string())
}
