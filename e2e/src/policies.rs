//! Policies, as an operator has them: by the CLI, from files; and the controller's API where the CLI would only be in
//! the way of a clock.

use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use http::Method;
use serde_json::{Value, json};

use crate::client::Reply;
use crate::controller;
use crate::mesh::{API_PORT, Mesh, data_dir};
use crate::sandbox;
use crate::wait::wait_until;

/// A push reaches proxies within 100 ms; this is for a busy machine.
const PUSH_LIMIT: Duration = Duration::from_secs(10);

impl Mesh {
    /// `outrigger policy apply` of these objects (YAML), and waits until every proxy that they concern has taken them.
    pub async fn apply(&self, yaml: &str) -> anyhow::Result<()> {
        self.apply_only(yaml).await?;
        self.wait_taken().await
    }

    /// The same without the wait: returns when the command does.
    pub async fn apply_only(&self, yaml: &str) -> anyhow::Result<()> {
        let output = self.policy_command(&["apply", "-f"], yaml).await?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "outrigger policy apply: {}\n{out}{err}\nof\n{yaml}", output.status);
        Ok(())
    }

    /// `outrigger policy <arguments> FILE`, however it ends.
    pub async fn policy_command(&self, arguments: &[&str], yaml: &str) -> anyhow::Result<Output> {
        let file = sandbox::get().work.join("policies.yaml");
        std::fs::write(&file, yaml).with_context(|| format!("writing {}", file.display()))?;
        let mut command = self.cli_command()?;
        command.arg("policy").args(arguments).arg(&file);
        self.controller_host
            .run(move || async move {
                let run = move || command.output().with_context(|| format!("running {command:?}"));
                tokio::task::spawn_blocking(run).await?
            })
            .await
    }

    /// The CLI, ready for arguments, beside the controller.
    pub fn cli_command(&self) -> anyhow::Result<Command> {
        let mut command = Command::new(sandbox::get().binary("outrigger")?);
        command.env("OUTRIGGER_SERVER", format!("127.0.0.1:{API_PORT}"));
        command.env("OUTRIGGER_TOKEN_FILE", data_dir().join("admin-token"));
        Ok(command)
    }

    /// Waits until no proxy that a policy concerns is behind, or has refused it.
    pub async fn wait_taken(&self) -> anyhow::Result<()> {
        wait_until(PUSH_LIMIT, "every proxy to take its policies", || async {
            for policy in self.policies().await? {
                let proxies = &policy["status"]["proxies"];
                let behind = proxies["on"] != proxies["accepted"];
                ensure!(!behind, "{}: {proxies}", policy["object"]["metadata"]["name"]);
            }
            Ok(())
        })
        .await
    }

    /// Every policy in force, with its status.
    pub async fn policies(&self) -> anyhow::Result<Vec<Value>> {
        let list = self.api(Method::GET, "/policies", None).await?.expect(200)?;
        let list: Value = serde_json::from_slice(&list.body).context("reading the policies")?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// One policy with its status.
    pub async fn policy(&self, kind: &str, namespace: &str, name: &str) -> anyhow::Result<Value> {
        let reply = self.api(Method::GET, &format!("/policies/{kind}/{namespace}/{name}"), None).await?;
        serde_json::from_slice(&reply.expect(200)?.body).context("reading a policy")
    }

    /// Deletes every policy.
    pub async fn clear_policies(&self) -> anyhow::Result<()> {
        for policy in self.policies().await? {
            let object = &policy["object"];
            let (kind, meta) = (&object["kind"], &object["metadata"]);
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let path =
                format!("/policies/{}/{}/{}", text(kind), text(&meta["namespace"]), text(&meta["name"]));
            let reply = self.api(Method::DELETE, &path, None).await?;
            reply.expect(200).with_context(|| format!("deleting {path}"))?;
        }
        Ok(())
    }

    /// Applies objects (JSON) by the API: what it answers.
    pub async fn apply_by_api(&self, objects: Value) -> anyhow::Result<Reply> {
        let body = json!({ "objects": objects, "dryRun": false });
        self.api(Method::POST, "/policies/apply", Some(body)).await
    }

    /// Calls the controller's API at `/api/v1<path>`.
    pub async fn api(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Reply> {
        controller::call(&self.controller_host, &data_dir(), method, path, body).await
    }
}
