//! Real Consul, in the modes that users run: development, three servers, ACLs that deny by default, TLS.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::client::{self, Reply};
use crate::network::{Host, Network};
use crate::process::Process;
use crate::sandbox;
use crate::tls::Authority;
use crate::wait::wait_until;

/// Consul's own default ports.
pub const HTTP_PORT: u16 = 8500;
/// HTTPS has no default; this is the customary one.
pub const HTTPS_PORT: u16 = 8501;
/// Consul's DNS.
pub const DNS_PORT: u16 = 8600;

/// A first leader: elections take some seconds on a busy machine.
const LEADER_LIMIT: Duration = Duration::from_secs(40);
/// The token with all rights, where ACLs are on.
const MANAGEMENT_TOKEN: &str = "11111111-2222-3333-4444-555555555555";

/// How Consul runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mode {
    /// One agent, `-dev`.
    Dev,
    /// One server that keeps its data.
    Persistent,
    /// Three servers with a leader.
    ThreeServers,
    /// One server, `default_policy = deny`.
    AclDeny,
    /// The same, and it keeps its data.
    PersistentAcl,
    /// One server, HTTPS with a CA of its own; HTTP on loopback only, for the harness.
    Tls,
}

/// A running Consul.
#[derive(Debug)]
pub struct Consul {
    /// How it runs.
    pub mode: Mode,
    servers: Vec<Server>,
    authority: Option<Authority>,
}

#[derive(Debug)]
struct Server {
    host: Host,
    number: usize,
    process: Process,
}

/// A service instance to register.
#[derive(Clone, Debug)]
pub struct Registration {
    /// Service name.
    pub name: String,
    /// Unique at the agent.
    pub id: String,
    /// Address of the instance, IPv4 or IPv6.
    pub address: String,
    /// Port of the instance.
    pub port: u16,
}

impl Consul {
    /// Starts Consul and waits until it can be used.
    pub async fn start(network: &Network, mode: Mode) -> anyhow::Result<Self> {
        let mut consul = Self { mode, servers: Vec::new(), authority: None };
        if mode == Mode::Tls {
            consul.authority = Some(Authority::new("Consul test CA")?);
        }
        let count = if mode == Mode::ThreeServers { 3 } else { 1 };
        let mut hosts = Vec::new();
        for number in 1..=count {
            hosts.push(network.host(&format!("consul{number}")).await?);
        }
        for (number, host) in hosts.iter().enumerate() {
            let home = home(host);
            if home.exists() {
                // Of an earlier case, whose network had the same addresses.
                std::fs::remove_dir_all(&home).with_context(|| format!("removing {}", home.display()))?;
            }
            let process = consul.start_server(host, number, &hosts).await?;
            consul.servers.push(Server { host: host.clone(), number, process });
        }
        consul.wait_ready().await?;
        Ok(consul)
    }

    /// The first server's address, as the mesh is told.
    pub fn host(&self) -> &Host {
        &self.servers[0].host
    }

    /// Addresses of every server's API, `scheme://host:port`.
    pub fn urls(&self) -> Vec<String> {
        let (scheme, port) = if self.mode == Mode::Tls { ("https", HTTPS_PORT) } else { ("http", HTTP_PORT) };
        self.servers.iter().map(|server| format!("{scheme}://{}:{port}", server.host.v4())).collect()
    }

    fn has_acls(&self) -> bool {
        matches!(self.mode, Mode::AclDeny | Mode::PersistentAcl)
    }

    /// The token that the controller is given, of the policy `outrigger`: to read services, and what `more` says. `None`
    /// without ACLs.
    pub async fn controller_token(&self, more: &str) -> anyhow::Result<Option<String>> {
        if !self.has_acls() {
            return Ok(None);
        }
        let policy = json!({ "Name": "outrigger", "Rules": rules(more) });
        self.call(Method::PUT, "/v1/acl/policy", Some(&policy)).await?.expect(200)?;
        let token = json!({ "Description": "outrigger", "Policies": [{ "Name": "outrigger" }] });
        let reply = self.call(Method::PUT, "/v1/acl/token", Some(&token)).await?.expect(200)?;
        let reply: Value = serde_json::from_slice(&reply.body).context("reading Consul's new token")?;
        Ok(Some(reply["SecretID"].as_str().context("Consul's token has no SecretID")?.to_owned()))
    }

    /// From now on the controller's token may read services, and what `more` says.
    pub async fn allow_controller(&self, more: &str) -> anyhow::Result<()> {
        let policy = self.call(Method::GET, "/v1/acl/policy/name/outrigger", None).await?.expect(200)?;
        let policy: Value = serde_json::from_slice(&policy.body).context("reading Consul's policy")?;
        let id = policy["ID"].as_str().context("a policy of Consul without ID")?;
        let policy = json!({ "ID": id, "Name": "outrigger", "Rules": rules(more) });
        self.call(Method::PUT, &format!("/v1/acl/policy/{id}"), Some(&policy)).await?.expect(200).map(drop)
    }

    /// Takes every right from a token, as an operator's mistake would.
    pub async fn revoke(&self, secret: &str) -> anyhow::Result<()> {
        let reply = self.call(Method::GET, "/v1/acl/tokens", None).await?.expect(200)?;
        let tokens: Vec<Value> = serde_json::from_slice(&reply.body).context("reading Consul's tokens")?;
        let mut found = None;
        for token in tokens {
            let accessor = token["AccessorID"].as_str().context("a token without AccessorID")?.to_owned();
            let reply = self.call(Method::GET, &format!("/v1/acl/token/{accessor}"), None).await?;
            let whole: Value = serde_json::from_slice(&reply.body).context("reading a Consul token")?;
            if whole["SecretID"] == secret {
                found = Some(accessor);
            }
        }
        let accessor = found.context("Consul does not know the token")?;
        self.call(Method::DELETE, &format!("/v1/acl/token/{accessor}"), None).await?.expect(200).map(drop)
    }

    /// The CA that signed the servers' certificates, PEM, where TLS is on.
    pub fn ca_pem(&self) -> Option<String> {
        self.authority.as_ref().map(Authority::pem)
    }

    /// Registers an instance with the first server's agent.
    pub async fn register(&self, instance: &Registration) -> anyhow::Result<()> {
        let body = json!({
            "Name": instance.name, "ID": instance.id, "Address": instance.address, "Port": instance.port,
        });
        let reply = self.call(Method::PUT, "/v1/agent/service/register", Some(&body)).await?;
        reply.expect(200).with_context(|| format!("registering {}", instance.id)).map(drop)
    }

    /// Removes an instance.
    pub async fn deregister(&self, id: &str) -> anyhow::Result<()> {
        let reply = self.call(Method::PUT, &format!("/v1/agent/service/deregister/{id}"), None).await?;
        reply.expect(200).with_context(|| format!("deregistering {id}")).map(drop)
    }

    /// Kills every server.
    pub fn kill(&mut self) {
        for server in &mut self.servers {
            server.process.kill();
        }
    }

    /// Starts every server again, with nothing of what it knew: indexes begin anew. (Where servers keep their data,
    /// `Persistent`, `PersistentAcl` and `ThreeServers`, they find it again.)
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        let hosts: Vec<Host> = self.servers.iter().map(|server| server.host.clone()).collect();
        for at in 0..self.servers.len() {
            let number = self.servers[at].number;
            self.servers[at].process = self.start_server(&hosts[at], number, &hosts).await?;
        }
        self.wait_ready().await
    }

    /// Kills the server that leads at the moment and waits until another one does. Returns the new leader.
    pub async fn kill_leader(&mut self) -> anyhow::Result<String> {
        ensure!(self.servers.len() > 1, "one server has no successor");
        let old = self.leader(0).await?;
        let at = self.servers.iter().position(|server| old.starts_with(&server.host.v4().to_string()));
        let at = at.with_context(|| format!("no server has the leader's address {old}"))?;
        self.servers[at].process.kill();
        let witness = usize::from(at == 0);
        wait_until(LEADER_LIMIT, "another leader", || async {
            let new = self.leader(witness).await?;
            ensure!(new != old, "the leader is still {new}");
            Ok(new)
        })
        .await
    }

    async fn leader(&self, server: usize) -> anyhow::Result<String> {
        let reply = self.call_server(server, Method::GET, "/v1/status/leader", None).await?.expect(200)?;
        let leader: String = serde_json::from_slice(&reply.body).context("reading the leader")?;
        ensure!(!leader.is_empty(), "there is no leader");
        Ok(leader)
    }

    async fn wait_ready(&mut self) -> anyhow::Result<()> {
        for server in 0..self.servers.len() {
            wait_until(LEADER_LIMIT, "Consul to have a leader", || async { self.leader(server).await })
                .await?;
        }
        let peers = self.servers.len();
        wait_until(LEADER_LIMIT, "Consul's servers to find each other", || async {
            let reply = self.call(Method::GET, "/v1/status/peers", None).await?.expect(200)?;
            let found: Vec<String> = serde_json::from_slice(&reply.body).context("reading the peers")?;
            ensure!(found.len() == peers, "{} of {peers}", found.len());
            // The agent's own node is in the catalog: registrations and reads work.
            let reply = self.call(Method::GET, "/v1/catalog/nodes", None).await?.expect(200)?;
            let nodes: Vec<Value> = serde_json::from_slice(&reply.body).context("reading the nodes")?;
            ensure!(nodes.len() == peers, "{} of {peers} nodes are in the catalog", nodes.len());
            Ok(())
        })
        .await
    }

    /// What a key holds; `None`: it does not exist.
    pub async fn key(&self, key: &str) -> anyhow::Result<Option<String>> {
        let reply = self.call(Method::GET, &format!("/v1/kv/{key}?raw"), None).await?;
        if reply.status == 404 { Ok(None) } else { Ok(Some(reply.expect(200)?.text())) }
    }

    /// Writes a key, as a person does.
    pub async fn set_key(&self, key: &str, value: &str) -> anyhow::Result<()> {
        self.send(0, Method::PUT, &format!("/v1/kv/{key}"), value.to_owned()).await?.expect(200).map(drop)
    }

    /// Deletes all keys that begin so.
    pub async fn delete_keys(&self, prefix: &str) -> anyhow::Result<()> {
        let path = format!("/v1/kv/{prefix}?recurse");
        self.call(Method::DELETE, &path, None).await?.expect(200).map(drop)
    }

    /// Calls the first server's API with every right.
    pub async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> anyhow::Result<Reply> {
        self.call_server(0, method, path, body).await
    }

    async fn call_server(
        &self,
        server: usize,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Reply> {
        let body = body.map(Value::to_string).unwrap_or_default();
        self.send(server, method, path, body).await
    }

    async fn send(&self, server: usize, method: Method, path: &str, body: String) -> anyhow::Result<Reply> {
        let mut request = Request::builder().method(method).uri(path).header(http::header::HOST, "consul");
        if self.has_acls() {
            request = request.header("X-Consul-Token", MANAGEMENT_TOKEN);
        }
        let request = request.body(Full::new(Bytes::from(body)))?;
        let address = ([127, 0, 0, 1], HTTP_PORT).into();
        self.servers[server].host.run(move || client::request(address, request)).await
    }

    async fn start_server(&self, host: &Host, number: usize, all: &[Host]) -> anyhow::Result<Process> {
        let home = home(host);
        std::fs::create_dir_all(&home).with_context(|| format!("creating {}", home.display()))?;
        let mut config = json!({
            "node_name": format!("consul{}", number + 1),
            "bind_addr": host.v4().to_string(),
            "log_level": "error",
            "ui_config": { "enabled": false },
            "disable_update_check": true,
            "disable_host_node_id": true,
            "performance": { "raft_multiplier": 1 },
            "client_addr": "0.0.0.0",
        });
        let mut command = Command::new(sandbox::get().tool("consul")?);
        command.arg("agent").arg("-config-file").arg(home.join("config.json"));
        match self.mode {
            Mode::Dev | Mode::AclDeny => {
                command.arg("-dev");
            }
            Mode::ThreeServers | Mode::Persistent | Mode::PersistentAcl => {
                config["server"] = json!(true);
                config["bootstrap_expect"] = json!(all.len());
                config["retry_join"] = all.iter().map(|host| host.v4().to_string()).collect();
                config["retry_interval"] = json!("1s");
                config["data_dir"] = json!(home.join("data"));
            }
            Mode::Tls => {
                command.arg("-dev");
                let Some(authority) = &self.authority else { bail!("TLS needs an authority") };
                let leaf = authority.server(host, "server.dc1.consul")?;
                for (file, text) in
                    [("ca.pem", authority.pem()), ("cert.pem", leaf.chain), ("key.pem", leaf.key)]
                {
                    std::fs::write(home.join(file), text).with_context(|| format!("writing {file}"))?;
                }
                config["addresses"] = json!({ "http": "127.0.0.1", "https": "0.0.0.0" });
                config["ports"] = json!({ "https": HTTPS_PORT, "grpc": -1, "grpc_tls": 8503 });
                config["tls"] = json!({ "defaults": {
                    "ca_file": home.join("ca.pem"),
                    "cert_file": home.join("cert.pem"),
                    "key_file": home.join("key.pem"),
                    "verify_outgoing": true,
                } });
            }
        }
        if self.has_acls() {
            let tokens = json!({ "initial_management": MANAGEMENT_TOKEN, "agent": MANAGEMENT_TOKEN });
            config["acl"] = json!({ "enabled": true, "default_policy": "deny", "tokens": tokens });
        }
        std::fs::write(home.join("config.json"), config.to_string())
            .context("writing Consul's configuration")?;
        host.spawn("consul", command).await
    }
}

/// What the controller may: to read services, and `more`.
fn rules(more: &str) -> String {
    format!(r#"service_prefix "" {{ policy = "read" }} node_prefix "" {{ policy = "read" }} {more}"#)
}

/// Configuration, keys and data of the server on `host`.
fn home(host: &Host) -> PathBuf {
    sandbox::get().work.join(format!("consul-{}", host.v4()))
}
