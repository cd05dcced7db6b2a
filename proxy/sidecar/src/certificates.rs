//! Our own certificate: the first one by a token, each next one by the one before.
//!
//! A new key for every certificate. What the controller returns is checked as a stranger's would be (`Leaf::accept`);
//! if it does not hold, or nobody answers, the old certificate stays in use until its very end and the attempts go on
//! with growing pauses. A certificate that has ended is replaced by the token's way again.
//!
//! Time: a timer alone would sleep through a suspended host, and a wall clock alone would follow a wrong one. So the
//! wait looks at both, at least once a minute, and renews at whichever comes first.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow, bail};
use outrigger_api::v1::{self, SignRequest, certificates_client::CertificatesClient};
use outrigger_certs::{KeyPair, Leaf, SpiffeId, TrustBundle, renew_at, retry_delay};
use rustls_pki_types::CertificateDer;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

use crate::{
    context::{self, Context},
    controller::{self, Auth},
    mounted,
    ready::Blocker,
};

/// A token is a few hundred bytes; a larger file is another file.
const MAX_TOKEN_BYTES: u64 = 16 * 1024;
/// The controller signs in milliseconds; the rest is for one that is busy.
const SIGN_PATIENCE: Duration = Duration::from_secs(10);
/// How often the wall clock is looked at.
const CLOCK_CHECK: Duration = Duration::from_secs(30);

/// Gets the first certificate. Returns when there is one.
pub async fn obtain_first(ctx: &Context) {
    let mut failures = 0;
    loop {
        match by_token(ctx, None).await {
            Ok(leaf) => return install(ctx, leaf),
            Err(error) => {
                failures += 1;
                ctx.control.signed("failed");
                let delay = backoff(failures, controller::slowest_retry(&error));
                log_failure(&error, failures, delay);
                sleep(delay).await;
            }
        }
    }
}

/// Renews the certificate for as long as the proxy runs.
pub async fn keep(ctx: &Context) {
    let mut random = fastrand::Rng::new();
    while let Some(leaf) = ctx.credentials.leaf() {
        wait_for_renewal(&leaf, &mut random).await;
        let mut failures = 0;
        loop {
            match renew(ctx, &leaf).await {
                Ok(new) => {
                    install(ctx, new);
                    break;
                }
                Err(error) => {
                    failures += 1;
                    ctx.control.signed("failed");
                    let remaining = leaf.not_after().duration_since(SystemTime::now()).unwrap_or_default();
                    if remaining.is_zero() {
                        ctx.ready.block(Blocker::Certificate);
                    }
                    // Without a valid leaf nothing works: try as hard as for the first one.
                    let delay = if remaining.is_zero() {
                        backoff(failures, controller::slowest_retry(&error))
                    } else {
                        retry_delay(failures, remaining, &mut random).min(remaining)
                    };
                    log_failure(&error, failures, delay);
                    sleep(delay).await;
                }
            }
        }
    }
}

async fn wait_for_renewal(leaf: &Leaf, random: &mut fastrand::Rng) {
    let at = renew_at(leaf.obtained(), leaf.not_after(), random);
    let deadline = Instant::now() + at.duration_since(leaf.obtained()).unwrap_or_default();
    loop {
        let by_wall = at.duration_since(SystemTime::now()).unwrap_or_default();
        let by_timer = deadline.saturating_duration_since(Instant::now());
        let left = by_wall.min(by_timer);
        if left.is_zero() {
            return;
        }
        sleep(left.min(CLOCK_CHECK)).await;
    }
}

async fn renew(ctx: &Context, leaf: &Leaf) -> anyhow::Result<Leaf> {
    if leaf.not_after() <= SystemTime::now() {
        return by_token(ctx, Some(leaf.id())).await.context("the certificate has ended");
    }
    match sign(ctx, Auth::Leaf, String::new(), Some(leaf.id())).await {
        // Perhaps the controller no longer believes the leaf (its root left): a token may still convince it.
        Err(Failure::Refused(status)) if ctx.config.token_file.exists() => {
            by_token(ctx, Some(leaf.id())).await.with_context(|| {
                format!("the controller refuses a renewal by the certificate in use ({status})")
            })
        }
        other => other.map_err(Failure::into_error),
    }
}

async fn by_token(ctx: &Context, expected: Option<&SpiffeId>) -> anyhow::Result<Leaf> {
    refresh_roots(ctx);
    let token = read_token(ctx)?;
    sign(ctx, Auth::None, token, expected).await.map_err(Failure::into_error)
}

/// Until the controller has pushed roots, those in the file count, and it may have been replaced: a sidecar that waits for
/// its controller while the mesh's roots change must know it when it comes. A file that does not hold changes nothing.
fn refresh_roots(ctx: &Context) {
    if ctx.credentials.bundle().epoch() > 0 {
        return;
    }
    let put = context::roots(&ctx.config).and_then(|roots| Ok(ctx.credentials.set_bundle(roots)?));
    match put {
        Ok(true) => tracing::info!("the trust bundle's file has new roots"),
        Ok(false) => {}
        Err(error) => tracing::debug!("the roots in use stay: {error:#}"),
    }
}

fn read_token(ctx: &Context) -> anyhow::Result<String> {
    let path = ctx.config.token_file.display();
    let token = mounted::read(&ctx.config.token_file, MAX_TOKEN_BYTES).with_context(|| {
        format!(
            "cannot read the join token {path}: make one with `outrigger token create` and name its file in `token_file`"
        )
    })?;
    let token = String::from_utf8(token).map_err(|_| anyhow!("the join token file {path} is not text"))?;
    let token = token.trim();
    if token.is_empty() {
        bail!("the join token file {path} is empty");
    }
    Ok(token.to_owned())
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The controller does not believe us.
    #[error("the controller refuses to sign ({0}); if the token was used up or has expired, give a new one")]
    Refused(String),
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

impl Failure {
    // Not `?`, which would hide the cause from `slowest_retry` behind this type.
    fn into_error(self) -> anyhow::Error {
        match self {
            Self::Other(error) => error,
            refused @ Self::Refused(_) => anyhow!(refused),
        }
    }
}

async fn sign(
    ctx: &Context,
    auth: Auth,
    token: String,
    expected: Option<&SpiffeId>,
) -> Result<Leaf, Failure> {
    let channel = controller::connect(ctx, auth).await.context("cannot get a certificate")?;
    let key = KeyPair::generate().context("cannot make a key")?;
    let csr = key.csr().context("cannot make a signing request")?;
    let mut client = CertificatesClient::new(channel);
    let response = timeout(SIGN_PATIENCE, client.sign(SignRequest { csr, token }))
        .await
        .map_err(|_| anyhow!("the controller did not sign within {SIGN_PATIENCE:?}"))?;
    let response = match response {
        Ok(response) => response.into_inner(),
        Err(status) if matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied) => {
            return Err(Failure::Refused(status.message().to_owned()));
        }
        Err(status) => {
            return Err(Failure::Other(anyhow!(
                "the controller cannot sign now: {}: {}",
                status.code(),
                status.message()
            )));
        }
    };
    if let Some(bundle) = response.bundle {
        // One that does not follow the one in use is old news; the chain is checked against the newest.
        if let Err(error) = set_bundle(ctx, bundle) {
            tracing::debug!(%error, "the bundle beside a new certificate is not used");
        }
    }
    let chain = response.chain.into_iter().map(CertificateDer::from).collect();
    Leaf::accept(key, chain, expected, &ctx.credentials.bundle(), SystemTime::now())
        .map_err(|error| Failure::Other(anyhow!(error)))
}

/// Puts the controller's roots in use.
pub(crate) fn set_bundle(ctx: &Context, wire: v1::TrustBundle) -> Result<bool, String> {
    if wire.trust_domain != ctx.config.trust_domain {
        return Err(format!(
            "it is for the trust domain {:?}, this proxy belongs to {:?}",
            wire.trust_domain, ctx.config.trust_domain
        ));
    }
    let domain = wire.trust_domain.parse().map_err(|error| format!("{error}"))?;
    let roots = wire.roots.into_iter().map(CertificateDer::from);
    let bundle = TrustBundle::new(domain, roots, wire.epoch).map_err(|error| error.to_string())?;
    let (epoch, roots) = (bundle.epoch(), bundle.roots().len());
    let changed = ctx.credentials.set_bundle(bundle).map_err(|error| error.to_string())?;
    if changed {
        tracing::info!(epoch, roots, "new trust bundle in use");
    }
    Ok(changed)
}

fn install(ctx: &Context, leaf: Leaf) {
    let (identity, not_after) = (leaf.id().clone(), leaf.not_after());
    if let Err(error) = ctx.credentials.set_leaf(leaf) {
        // `Leaf::accept` has checked the chain against a bundle of our own trust domain.
        tracing::error!(%error, "a checked certificate cannot be put in use");
        return;
    }
    ctx.control.signed("ok");
    ctx.control.set_leaf_not_after(not_after);
    ctx.ready.clear(Blocker::Certificate);
    let life = not_after.duration_since(SystemTime::now()).unwrap_or_default();
    tracing::info!(%identity, life_seconds = life.as_secs(), "new certificate in use");
}

fn log_failure(error: &anyhow::Error, failures: u32, delay: Duration) {
    // The first line is for people, the rest would repeat it.
    if failures.is_power_of_two() {
        tracing::warn!(failures, retry_in = ?delay, "no new certificate: {error:#}");
    } else {
        tracing::debug!(failures, retry_in = ?delay, "no new certificate: {error:#}");
    }
}

/// Full jitter between 10 ms and `slowest`, doubling with each failure in a row.
pub(crate) fn backoff(failures: u32, slowest: Duration) -> Duration {
    const FASTEST: Duration = Duration::from_millis(10);
    let ceiling = FASTEST.saturating_mul(1 << failures.min(20)).min(slowest);
    FASTEST + ceiling.mul_f64(fastrand::f64())
}
