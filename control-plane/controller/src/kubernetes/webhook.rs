//! The injector's certificate, and that the API server trusts it: Secret `outrigger-injector-tls`, and `caBundle` of the
//! webhook configurations.
//!
//! Neither stands in the chart, because a chart's random value is another one at each render. The certificate has a CA of
//! its own, new with each renewal (`outrigger_certs::Serving` says why). So the order matters: the API server is told to trust
//! the new root beside the old, then has [`SPREAD`] to take notice, and only then the injector gets the new certificate.
//! A leader that is killed in between loses a certificate that nobody has seen, and its successor makes another.
//!
//! From then on `caBundle` follows the Secret: whatever else stands there is put right within a second. A Secret that cannot
//! be used or has gone is made anew; the configurations may well be absent.

use std::pin::pin;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use futures_util::StreamExt;
use futures_util::stream::select;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PartialObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource, ResourceExt};
use outrigger_certs::{Serving, retry_delay};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use zeroize::Zeroizing;

use super::{CONTROLLER, MANAGED_BY, Trouble, watch_one};

/// The Secret.
const SECRET: &str = "outrigger-injector-tls";
/// The injector's Service, and the name of its MutatingWebhookConfiguration.
const INJECTOR: &str = "outrigger-injector";
/// The ValidatingWebhookConfiguration of policies; the injector's Service answers for it too.
const POLICIES: &str = "outrigger-policies";

/// Renewed at two thirds of it: a month before the end, with nobody at hand.
const LIFE: Duration = Duration::from_hours(90 * 24);
/// How long every API server has to take notice of a new root. They watch the configurations: it takes milliseconds, or
/// seconds under load.
const SPREAD: Duration = Duration::from_secs(10);
/// How often everything is compared, whatever the watches say. It also bounds the sleep before a renewal, so that a clock
/// that jumps is noticed.
const COMPARE: Duration = Duration::from_mins(1);
/// Between two looks: somebody who always writes something else costs us one write in this time.
const REST: Duration = Duration::from_millis(500);
/// The longest pause after a failure.
const SLOWEST: Duration = Duration::from_secs(15);
/// The longest that one look takes, without [`SPREAD`].
const PATIENCE: Duration = Duration::from_secs(20);

/// Keeps certificate and bundles, for as long as it is polled.
pub(crate) async fn keep(client: Client, namespace: String) {
    let secrets: Api<PartialObjectMeta<Secret>> = Api::namespaced(client.clone(), &namespace);
    let mutating: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let validating: Api<ValidatingWebhookConfiguration> = Api::all(client.clone());
    let secrets = watch_one(secrets, SECRET, "watch the webhook's Secret").map(drop);
    let mutating = watch_one(mutating, INJECTOR, "watch the injector's webhook configuration").map(drop);
    let validating = watch_one(validating, POLICIES, "watch the policies' webhook configuration").map(drop);
    let mut changes = pin!(select(secrets, select(mutating, validating)));

    let upkeep = Upkeep::new(client, &namespace);
    let mut trouble = Trouble::new("keep the webhook's certificate");
    let mut failures = 0;
    loop {
        let kept = timeout(PATIENCE + SPREAD, upkeep.look(SystemTime::now())).await;
        let kept = kept.unwrap_or_else(|_| Err(anyhow::anyhow!("the API server did not answer in time")));
        let pause = match kept {
            Ok(renewal) => {
                trouble.over();
                failures = 0;
                renewal.duration_since(SystemTime::now()).unwrap_or_default().min(COMPARE)
            }
            Err(error) => {
                trouble.is(&format!("{error:#}"));
                failures += 1;
                retry_delay(failures, SLOWEST * 4, &mut fastrand::Rng::new())
            }
        };
        sleep(REST).await;
        tokio::select! {
            () = sleep(pause) => {}
            _ = changes.next() => {}
        }
    }
}

struct Upkeep {
    secrets: Api<Secret>,
    mutating: Api<MutatingWebhookConfiguration>,
    validating: Api<ValidatingWebhookConfiguration>,
    /// The names that the API server calls the webhook by.
    names: Vec<String>,
}

impl Upkeep {
    fn new(client: Client, namespace: &str) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), namespace),
            mutating: Api::all(client.clone()),
            validating: Api::all(client),
            names: vec![format!("{INJECTOR}.{namespace}.svc")],
        }
    }

    /// Puts right what is not, as of `now`; returns when the certificate is due for renewal.
    async fn look(&self, now: SystemTime) -> anyhow::Result<SystemTime> {
        let held =
            self.secrets.get_opt(SECRET).await.with_context(|| format!("cannot read the Secret {SECRET}"))?;
        let serving = held.as_ref().and_then(serving);
        let previous = match serving.as_ref().map(|serving| (serving, serving.renew_at(&self.names, now))) {
            Some((serving, Ok(renewal))) if renewal > now => {
                self.publish(&serving.roots).await?;
                return Ok(renewal);
            }
            Some((serving, Ok(_))) => {
                tracing::info!("the webhook's certificate is renewed: two thirds of its life are over");
                serving.roots.clone().into_bytes()
            }
            // The injector may still serve with what it held before.
            Some((_, Err(error))) => {
                tracing::warn!(%error, "the webhook's certificate is replaced");
                self.bundle_in_use().await?
            }
            None => {
                tracing::info!("the webhook's certificate is made: the Secret {SECRET} holds none");
                self.bundle_in_use().await?
            }
        };
        let new = Serving::issue(&self.names, LIFE, now)?.beside(&previous);
        self.publish(&new.roots).await?;
        if !previous.is_empty() {
            sleep(SPREAD).await;
            self.publish(&new.roots).await?;
        }
        let renewal = new.renew_at(&self.names, now)?;
        self.write(held, new).await.with_context(|| format!("cannot write the Secret {SECRET}"))?;
        Ok(renewal)
    }

    async fn publish(&self, roots: &str) -> anyhow::Result<()> {
        trust(&self.mutating, INJECTOR, roots).await?;
        trust(&self.validating, POLICIES, roots).await
    }

    /// What the API server trusts now; empty if nothing.
    async fn bundle_in_use(&self) -> anyhow::Result<Vec<u8>> {
        let configuration = self.mutating.get_opt(INJECTOR).await.with_context(|| unreadable(INJECTOR))?;
        let mut webhooks = configuration.and_then(|found| found.webhooks).into_iter().flatten();
        Ok(webhooks.find_map(|webhook| webhook.client_config.ca_bundle).unwrap_or_default().0)
    }

    async fn write(&self, held: Option<Secret>, new: Serving) -> kube::Result<()> {
        let Serving { certificate, key, roots } = new;
        let data = [("tls.crt", certificate), ("tls.key", key.to_string()), ("ca.crt", roots)];
        let write = PostParams { field_manager: Some(CONTROLLER.to_owned()), ..PostParams::default() };
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(SECRET.to_owned()),
                // A conflict where somebody else wrote meanwhile.
                resource_version: held.as_ref().and_then(ResourceExt::resource_version),
                labels: Some([(MANAGED_BY.to_owned(), CONTROLLER.to_owned())].into()),
                ..ObjectMeta::default()
            },
            type_: held
                .as_ref()
                .map_or_else(|| Some("kubernetes.io/tls".to_owned()), |held| held.type_.clone()),
            data: Some(data.map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes()))).into()),
            ..Secret::default()
        };
        match held {
            None => self.secrets.create(&write, &secret).await.map(drop),
            Some(_) => self.secrets.replace(SECRET, &write, &secret).await.map(drop),
        }
    }
}

/// The certificate in the Secret, whether it can be used or not.
fn serving(secret: &Secret) -> Option<Serving> {
    let data = secret.data.as_ref()?;
    let text = |key| std::str::from_utf8(&data.get(key)?.0).ok().map(str::to_owned);
    Some(Serving {
        certificate: text("tls.crt")?,
        key: Zeroizing::new(text("tls.key")?),
        roots: text("ca.crt")?,
    })
}

fn unreadable(name: &str) -> String {
    format!("cannot read the webhook configuration {name}")
}

/// Makes every webhook of a configuration trust `roots` and nothing else; where there is no configuration there is nothing
/// to do. A patch of that field alone: what a newer API has beside it is not ours to drop.
async fn trust<K>(configurations: &Api<K>, name: &str, roots: &str) -> anyhow::Result<()>
where
    K: Resource + Clone + std::fmt::Debug + Serialize + DeserializeOwned,
{
    let found = configurations.get_opt(name).await.with_context(|| unreadable(name))?;
    let Some(found) = found else { return Ok(()) };
    let Some(patch) = patch(&serde_json::to_value(&found)?, roots) else { return Ok(()) };
    let params = PatchParams { field_manager: Some(CONTROLLER.to_owned()), ..PatchParams::default() };
    let patched = configurations.patch(name, &params, &Patch::Strategic(&patch)).await;
    patched.with_context(|| format!("cannot write caBundle of the webhook configuration {name}"))?;
    tracing::info!(configuration = name, "caBundle follows the webhook's certificate");
    Ok(())
}

/// The strategic merge patch (a list of webhooks is merged by their names) that makes `configuration` trust `roots`. With
/// the version that was read: a webhook that was removed meanwhile must not come back.
fn patch(configuration: &Value, roots: &str) -> Option<Value> {
    let bundle = json!(ByteString(roots.as_bytes().to_vec()));
    let webhooks: Vec<Value> = configuration["webhooks"]
        .as_array()?
        .iter()
        .filter(|webhook| webhook["clientConfig"]["caBundle"] != bundle)
        .map(|webhook| json!({ "name": webhook["name"], "clientConfig": { "caBundle": bundle } }))
        .collect();
    let version = &configuration["metadata"]["resourceVersion"];
    (!webhooks.is_empty())
        .then(|| json!({ "metadata": { "resourceVersion": version }, "webhooks": webhooks }))
}

#[cfg(test)]
mod tests;
