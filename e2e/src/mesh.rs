//! A mesh for a scenario: real Consul, the controller, and workloads with sidecars, each on its own host.
//!
//! ```text
//! let mesh = Mesh::start(Setup::default()).await?;
//! let orders = mesh.workload("orders").serves("orders", 8080).app(["--http", "8080"]).start().await?;
//! let web = mesh.workload("web").start().await?;
//! web.get("orders.service.consul", 8080, "/").await?.expect(200)?;
//! ```

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::client::{self, Reply};
use crate::consul::{self, Consul, Mode, Registration};
use crate::controller::Controller;
use crate::faults::Front;
use crate::network::{Host, Network};
use crate::process::Process;
use crate::sandbox;
use crate::tls::Authority;
use crate::wait::wait_until;

/// Ports as DESIGN section 3 has them.
pub const DISCOVERY_PORT: u16 = 15410;
/// The controller's API, on loopback.
pub const API_PORT: u16 = 15480;
/// The sidecar's listener for the mesh.
pub const INBOUND_PORT: u16 = 15406;
/// Metrics and readiness, of sidecars and controller.
pub const ADMIN_PORT: u16 = 15490;

/// What the controller's token needs where policies are kept in Consul, as its configuration says.
pub const WRITES_POLICIES: &str = r#"key_prefix "outrigger/" { policy = "write" }"#;

/// Marks the sidecar's own packets where there is only one uid.
const MARK: u32 = 0x4f52;
/// The sidecar's uid where there are several.
const SIDECAR_UID: u32 = 64_015;
/// Starting a process and becoming ready, on two busy cores.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// What a mesh is made of.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Consul's mode.
    pub consul: Mode,
    /// Life of a workload's certificate.
    pub leaf_life: &'static str,
    /// Whether a [`Front`] stands between the controller and Consul.
    pub front: bool,
    /// Whether workloads take plaintext: `Strict` or `Permissive`.
    pub mtls: &'static str,
    /// Whether the controller reads services from files too: [`Mesh::publish`].
    pub files: bool,
    /// Whether policies are kept in Consul's key-value store.
    pub policies_in_consul: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            consul: Mode::Dev,
            leaf_life: "24h",
            front: false,
            mtls: "Strict",
            files: false,
            policies_in_consul: false,
        }
    }
}

/// A running mesh.
pub struct Mesh {
    /// Its hosts' network.
    pub network: Network,
    /// Its Consul.
    pub consul: Mutex<Consul>,
    /// The controller's host.
    pub controller_host: Host,
    /// What stands before Consul, where the setup says so.
    pub front: Option<Front>,
    setup: Setup,
    more: Value,
    controller: Mutex<Option<Controller>>,
    consul_token: Option<String>,
}

impl Mesh {
    /// Starts Consul and the controller.
    pub async fn start(setup: Setup) -> anyhow::Result<Self> {
        Self::start_on(Network::new().await?, setup, json!({})).await
    }

    /// The same on a network that there is, with more fields in the controller's configuration.
    pub async fn start_on(network: Network, setup: Setup, more: Value) -> anyhow::Result<Self> {
        let consul = Consul::start(&network, setup.consul).await?;
        let rules = if setup.policies_in_consul { WRITES_POLICIES } else { "" };
        let consul_token = consul.controller_token(rules).await?;
        let controller_host = network.host("controller").await?;
        let data = data_dir();
        if data.exists() {
            // An earlier mesh of this suite.
            std::fs::remove_dir_all(&data).with_context(|| format!("removing {}", data.display()))?;
        }
        if services_dir().exists() {
            std::fs::remove_dir_all(services_dir()).context("removing the services of an earlier mesh")?;
        }
        let front = if setup.front {
            let host = network.host("front").await?;
            Some(Front::start(host, consul.host().at(consul::HTTP_PORT)).await?)
        } else {
            None
        };
        let mesh = Self {
            network,
            consul: Mutex::new(consul),
            controller_host,
            front,
            setup,
            more,
            controller: Mutex::new(None),
            consul_token,
        };
        mesh.start_controller().await?;
        Ok(mesh)
    }

    /// Starts the controller, with the data of the last one if there was one, and waits until it is ready.
    pub async fn start_controller(&self) -> anyhow::Result<()> {
        let config = self.controller_config().await?;
        let mut controller = Controller::start(&self.controller_host, data_dir(), config).await?;
        controller.wait_ready().await?;
        *self.controller.lock().await = Some(controller);
        Ok(())
    }

    /// Starts one more controller on a host of its own, of the same configuration and with its own data. It is not waited for.
    pub async fn another_controller(&self, name: &str) -> anyhow::Result<Controller> {
        let host = self.network.host(name).await?;
        let data_dir = sandbox::get().work.join(name);
        if data_dir.exists() {
            std::fs::remove_dir_all(&data_dir).with_context(|| format!("removing {}", data_dir.display()))?;
        }
        Controller::start(&host, data_dir, self.controller_config().await?).await
    }

    /// What every controller of this mesh is told.
    async fn controller_config(&self) -> anyhow::Result<Value> {
        let work = &sandbox::get().work;
        let addresses = match &self.front {
            Some(front) => vec![front.url()],
            None => self.consul.lock().await.urls(),
        };
        let mut source = json!({ "addresses": addresses });
        if let Some(token) = &self.consul_token {
            let file = work.join("consul.token");
            std::fs::write(&file, token).context("writing Consul's token")?;
            source["token_file"] = json!(file);
        }
        if let Some(ca) = self.consul.lock().await.ca_pem() {
            let file = work.join("consul-ca.pem");
            std::fs::write(&file, ca).context("writing Consul's CA")?;
            source["ca_file"] = json!(file);
        }
        let mut config = json!({
            "leaf_life": self.setup.leaf_life,
            "mtls": self.setup.mtls,
            "mesh_cidrs": ["10.77.0.0/24", "fd77::/64"],
            "consul": source,
        });
        if self.setup.policies_in_consul {
            config["policies"] = json!({ "store": "consul" });
        }
        if self.setup.files {
            std::fs::create_dir_all(services_dir()).context("making the folder of services")?;
            config["file"] = json!({ "directory": services_dir(), "poll_interval": "100ms" });
        }
        for (field, value) in self.more.as_object().into_iter().flatten() {
            // Sections are merged, so that one can be added to.
            match (config[field].as_object_mut(), value.as_object()) {
                (Some(known), Some(added)) => known.extend(added.clone()),
                _ => config[field] = value.clone(),
            }
        }
        Ok(config)
    }

    /// Kills the controller as a crash would.
    pub async fn kill_controller(&self) {
        // Dropping the handle kills.
        drop(self.controller.lock().await.take());
    }

    /// The token with which the controller reads Consul, where ACLs are on.
    pub fn consul_token(&self) -> Option<&str> {
        self.consul_token.as_deref()
    }

    /// The authority that signs this mesh's workloads, from the controller's own store: for peers that speak as a
    /// sidecar does and are none.
    pub fn authority(&self) -> anyhow::Result<Authority> {
        let store = data_dir().join("ca").join("ca.pem");
        let text = std::fs::read_to_string(&store).with_context(|| format!("reading {}", store.display()))?;
        Authority::below_root(&text)
    }

    /// What the controller has logged so far.
    pub async fn controller_log(&self) -> String {
        self.controller.lock().await.as_ref().map(Controller::log).unwrap_or_default()
    }

    /// The controller's memory, as the kernel counts it.
    pub async fn controller_memory(&self) -> anyhow::Result<u64> {
        self.controller.lock().await.as_ref().context("the controller is not running")?.resident_bytes()
    }

    /// Runs the CLI beside the controller.
    pub async fn cli(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = self.cli_command()?;
        command.args(arguments);
        self.controller_host.output(command).await
    }

    /// Describes a service in a file of its own, as the file source has it (`controller/examples/services`), in the place of what
    /// the file said before.
    pub fn publish(&self, file: &str, service: &Value) -> anyhow::Result<()> {
        // Moved there whole: half of a document may be one.
        let (new, place) =
            (services_dir().join(format!(".{file}")), services_dir().join(format!("{file}.yaml")));
        std::fs::write(&new, service.to_string()).with_context(|| format!("writing {}", new.display()))?;
        std::fs::rename(&new, &place).with_context(|| format!("moving {}", place.display()))
    }

    /// Creates a join token as an operator does.
    pub async fn token(
        &self,
        service_account: &str,
        services: &[&str],
        more: &[&str],
    ) -> anyhow::Result<String> {
        let identity = identity(service_account);
        let mut arguments = vec!["token", "create", "--identity", &identity];
        for service in services {
            arguments.extend(["--service", service]);
        }
        arguments.extend(more);
        Ok(self.cli(&arguments).await?.trim().to_owned())
    }

    /// Describes a workload on a new host.
    pub fn workload(&self, name: &str) -> Plan<'_> {
        Plan {
            mesh: self,
            host: None,
            name: name.to_owned(),
            account: name.to_owned(),
            services: Vec::new(),
            claims: None,
            token: None,
            register: true,
            ipv6: false,
            app: Vec::new(),
            sidecar: true,
            consul_dns: false,
            config: json!({}),
        }
    }
}

/// The identity of a service account: `name` in the namespace `default`, or `namespace/name`.
pub fn identity(service_account: &str) -> String {
    let (namespace, name) = service_account.split_once('/').unwrap_or(("default", service_account));
    format!("spiffe://outrigger.local/ns/{namespace}/sa/{name}")
}

/// What the file source reads.
fn services_dir() -> PathBuf {
    sandbox::get().work.join("services")
}

/// The controller's data.
pub(crate) fn data_dir() -> PathBuf {
    sandbox::get().work.join("controller")
}

/// A workload before it starts.
#[must_use = "a plan does nothing before it is started"]
pub struct Plan<'a> {
    mesh: &'a Mesh,
    host: Option<Host>,
    name: String,
    account: String,
    services: Vec<(String, u16)>,
    claims: Option<Vec<(String, u16)>>,
    token: Option<String>,
    register: bool,
    ipv6: bool,
    app: Vec<String>,
    sidecar: bool,
    consul_dns: bool,
    config: Value,
}

impl Plan<'_> {
    /// The service account in its identity; the workload's name if nothing is said.
    pub fn account(mut self, account: &str) -> Self {
        account.clone_into(&mut self.account);
        self
    }

    /// It serves a service at a port: registered in Consul, allowed by its token and claimed by its sidecar.
    pub fn serves(mut self, service: &str, port: u16) -> Self {
        self.services.push((service.to_owned(), port));
        self
    }

    /// It runs on a host that there is.
    pub fn on(mut self, host: &Host) -> Self {
        self.host = Some(host.clone());
        self
    }

    /// What the sidecar claims instead of what the workload serves.
    pub fn claims(mut self, claims: &[(&str, u16)]) -> Self {
        self.claims = Some(claims.iter().map(|(service, port)| ((*service).to_owned(), *port)).collect());
        self
    }

    /// The sidecar's join token, instead of one made for what it serves.
    pub fn token(mut self, token: &str) -> Self {
        self.token = Some(token.to_owned());
        self
    }

    /// It is not registered in Consul.
    pub fn unregistered(mut self) -> Self {
        self.register = false;
        self
    }

    /// It is registered under its IPv6 address.
    pub fn at_ipv6(mut self) -> Self {
        self.ipv6 = true;
        self
    }

    /// The application beside the sidecar: `e2e-app` with these arguments.
    pub fn app<const N: usize>(mut self, arguments: [&str; N]) -> Self {
        self.app = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        self
    }

    /// Its sidecar forwards `.consul` to Consul's DNS instead of answering it.
    pub fn asks_consul_dns(mut self) -> Self {
        self.consul_dns = true;
        self
    }

    /// It has no sidecar.
    pub fn bare(mut self) -> Self {
        self.sidecar = false;
        self
    }

    /// A further field of the sidecar's configuration.
    pub fn set(mut self, field: &str, value: Value) -> Self {
        self.config[field] = value;
        self
    }

    /// Starts it and waits until the sidecar is ready and its claims are accepted.
    pub async fn start(self) -> anyhow::Result<Workload> {
        let workload = self.start_unready().await?;
        if workload.sidecar.is_some() {
            workload.wait_ready().await?;
            workload.wait_claims().await?;
        }
        Ok(workload)
    }

    /// Starts it without waiting for the sidecar.
    pub async fn start_unready(self) -> anyhow::Result<Workload> {
        let host = match &self.host {
            Some(host) => host.clone(),
            None => self.mesh.network.host(&self.name).await?,
        };
        let mut workload = Workload { host, app: None, sidecar: None, folder: PathBuf::new() };
        if !self.app.is_empty() {
            workload.start_app(&self.app).await?;
        }
        if self.register {
            let address =
                if self.ipv6 { workload.host.v6().to_string() } else { workload.host.v4().to_string() };
            let consul = self.mesh.consul.lock().await;
            for (service, port) in &self.services {
                let id = format!("{service}-{}", self.name);
                // Consul's names have no namespace of the mesh.
                let name = service.split('.').next().unwrap_or_default().to_owned();
                let instance = Registration { name, id, address: address.clone(), port: *port };
                consul.register(&instance).await?;
            }
        }
        if self.sidecar {
            workload.folder = self.furnish(&workload.host).await?;
            workload.redirect().await?;
            workload.start_sidecar().await?;
        }
        Ok(workload)
    }

    /// The sidecar's files: configuration, token, the controller's root.
    async fn furnish(&self, host: &Host) -> anyhow::Result<PathBuf> {
        let sandbox = sandbox::get();
        let folder = sandbox.work.join(format!("sidecar-{}", host.v4()));
        std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let token = if let Some(token) = &self.token {
            token.clone()
        } else {
            let services: Vec<_> = self.services.iter().map(|(service, _)| service.as_str()).collect();
            let (cidr4, cidr6) = (format!("{}/32", host.v4()), format!("{}/128", host.v6()));
            let more = ["--uses", "reusable", "--cidr", &cidr4, "--cidr", &cidr6];
            self.mesh.token(&self.account, &services, &more).await.context("creating a join token")?
        };
        std::fs::write(folder.join("token"), token).context("writing the token")?;
        let root = data_dir().join("root.pem");
        std::fs::copy(&root, folder.join("root.pem"))
            .with_context(|| format!("copying {}", root.display()))?;
        let address = if self.ipv6 { Some(host.v6().to_string()) } else { None };
        let claims = self.claims.as_ref().unwrap_or(&self.services);
        let claims: Vec<Value> = claims
            .iter()
            .map(|(service, port)| match &address {
                Some(address) => json!({ "service": service, "port": port, "address": address }),
                None => json!({ "service": service, "port": port }),
            })
            .collect();
        let mut config = json!({
            "controller": [format!("{}:{DISCOVERY_PORT}", self.mesh.controller_host.v4())],
            "token_file": folder.join("token"),
            "trust_bundle": folder.join("root.pem"),
            "services": claims,
            "redirection": true,
            "threads": 1,
            "log": { "level": std::env::var("OUTRIGGER_E2E_LOG").unwrap_or_else(|_| "info".to_owned()) },
            "drain": { "min": "2s", "max": "10s" },
        });
        if !sandbox.real_root {
            config["mark"] = json!(MARK);
        }
        if self.consul_dns {
            let consul = self.mesh.consul.lock().await.host().at(consul::DNS_PORT);
            config["dns"] = json!({ "consul": consul.to_string() });
        }
        for (field, value) in self.config.as_object().into_iter().flatten() {
            config[field] = value.clone();
        }
        std::fs::write(folder.join("proxy.yaml"), config.to_string()).context("writing the configuration")?;
        if sandbox.real_root {
            for file in ["token", "root.pem", "proxy.yaml"] {
                let path = folder.join(file);
                std::os::unix::fs::chown(&path, Some(SIDECAR_UID), Some(SIDECAR_UID))
                    .with_context(|| format!("giving {} to the sidecar's user", path.display()))?;
            }
        }
        Ok(folder)
    }
}

/// A host with an application, a sidecar, or both.
pub struct Workload {
    /// Where it runs.
    pub host: Host,
    /// The application.
    pub app: Option<Process>,
    /// The sidecar.
    pub sidecar: Option<Process>,
    /// The sidecar's files: `proxy.yaml`, `token`, `root.pem`.
    pub folder: PathBuf,
}

impl Workload {
    /// Starts `e2e-app` with these arguments.
    pub async fn start_app(&mut self, arguments: &[String]) -> anyhow::Result<()> {
        let mut command = Command::new(sandbox::get().binary("e2e-app")?);
        command.args(arguments);
        if !arguments.iter().any(|argument| argument == "--name") {
            command.arg("--name").arg(self.host.name());
        }
        self.app = Some(self.host.spawn("app", command).await?);
        let pairs =
            arguments.chunks_exact(2).filter(|pair| !["--name", "--linger-ms"].contains(&pair[0].as_str()));
        let ports: Vec<u16> = pairs.filter_map(|pair| pair[1].parse().ok()).collect();
        for port in ports {
            wait_until(READY_LIMIT, "the application to listen", || async {
                let address = SocketAddr::from(([127, 0, 0, 1], port));
                self.host.run(move || client::connect(address)).await.map(drop)
            })
            .await?;
        }
        Ok(())
    }

    /// Writes the redirection rules, as a host unit would before the sidecar starts.
    pub async fn redirect(&self) -> anyhow::Result<()> {
        let mut command = Command::new(sandbox::get().binary("outrigger-proxy")?);
        command.arg("redirect").arg("--config").arg(self.folder.join("proxy.yaml"));
        // Otherwise the mark of the configuration exempts the sidecar.
        if sandbox::get().real_root {
            command.arg("--proxy-uid").arg(SIDECAR_UID.to_string());
        }
        self.host.output(command).await.context("writing redirection rules").map(drop)
    }

    /// Removes the redirection rules.
    pub async fn remove_redirection(&self) -> anyhow::Result<()> {
        let mut command = Command::new(sandbox::get().binary("outrigger-proxy")?);
        command.args(["redirect", "--remove"]);
        self.host.output(command).await.context("removing redirection rules").map(drop)
    }

    /// Starts the sidecar with the files that it has.
    pub async fn start_sidecar(&mut self) -> anyhow::Result<()> {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new(sandbox::get().binary("outrigger-proxy")?);
        command.arg("--config").arg(self.folder.join("proxy.yaml")).env("RUST_BACKTRACE", "1");
        if sandbox::get().real_root {
            command.uid(SIDECAR_UID).gid(SIDECAR_UID);
        }
        self.sidecar = Some(self.host.spawn("sidecar", command).await?);
        Ok(())
    }

    /// Waits until the sidecar says that it is ready.
    pub async fn wait_ready(&self) -> anyhow::Result<()> {
        wait_until(READY_LIMIT, &format!("the sidecar on {} to be ready", self.host.name()), || async {
            self.admin("/ready").await?.expect(200)
        })
        .await
        .map(drop)
    }

    /// Waits until the controller has accepted everything that the sidecar claims.
    pub async fn wait_claims(&self) -> anyhow::Result<()> {
        wait_until(READY_LIMIT, &format!("the claims of {} to be accepted", self.host.name()), || async {
            let knowledge = self.knowledge().await?;
            let wanted = knowledge["configuration"]["services"].as_array().map_or(0, Vec::len);
            let claims = knowledge["discovery"]["claims"].as_array().cloned().unwrap_or_default();
            let accepted = claims.iter().filter(|claim| claim["accepted"] == true).count();
            ensure!(accepted == wanted, "{accepted} of {wanted}: {claims:?}");
            Ok(())
        })
        .await
    }

    /// Asks the sidecar's admin port.
    pub async fn admin(&self, path: &str) -> anyhow::Result<Reply> {
        let (admin, path) = (SocketAddr::from(([127, 0, 0, 1], ADMIN_PORT)), path.to_owned());
        self.host.run(move || async move { client::get(admin, "localhost", &path).await }).await
    }

    /// What the sidecar knows: `/config`.
    pub async fn knowledge(&self) -> anyhow::Result<Value> {
        let reply = self.admin("/config").await?.expect(200)?;
        serde_json::from_slice(&reply.body).context("reading the sidecar's /config")
    }

    /// The endpoints of a service (`orders.default`) that the sidecar holds, as `/config` shows them. None where it
    /// holds none or does not know the service.
    pub async fn endpoints(&self, service: &str) -> anyhow::Result<Vec<Value>> {
        let knowledge = self.knowledge().await?;
        let services = knowledge["discovery"]["services"].as_array().cloned().unwrap_or_default();
        let entry = services.into_iter().find(|entry| entry["name"] == service);
        Ok(entry.and_then(|entry| entry["endpoints"].as_array().cloned()).unwrap_or_default())
    }

    /// Looks up a name on this host and returns an address with `port`.
    pub async fn look_up(&self, name: &str, port: u16) -> anyhow::Result<SocketAddr> {
        let owned = name.to_owned();
        let found = self.host.run(move || async move { client::look_up(&owned, port).await }).await?;
        found.into_iter().next().with_context(|| format!("no address for {name}"))
    }

    /// `GET http://name:port/path` from this host, the name looked up as programs do.
    pub async fn get(&self, name: &str, port: u16, path: &str) -> anyhow::Result<Reply> {
        let address = self.look_up(name, port).await?;
        let (host, path) = (format!("{name}:{port}"), path.to_owned());
        self.host.run(move || async move { client::get(address, &host, &path).await }).await
    }

    /// Waits until a service answers this host with 200.
    pub async fn wait_for_service(&self, name: &str, port: u16, limit: Duration) -> anyhow::Result<()> {
        wait_until(limit, &format!("{name}:{port} to answer {}", self.host.name()), || async {
            let reply = self.get(name, port, "/whoami").await?;
            ensure!(reply.status == 200, "{}: {:?}", reply.status, reply.reason());
            Ok(())
        })
        .await
    }

    /// Runs curl, unchanged, on this host; its standard output.
    pub async fn curl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--max-time", "30"]).args(arguments);
        self.host.output(command).await
    }

    /// Kills application and sidecar at once, as a power cut would.
    pub fn kill(&mut self) {
        self.app = None;
        self.sidecar = None;
    }
}
