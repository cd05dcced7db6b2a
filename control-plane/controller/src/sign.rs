//! `Certificates/Sign`: attest, then sign.
//!
//! The identity comes from the token, or for a renewal from the caller's own still valid leaf; every name in the CSR is
//! ignored. Signing costs CPU and is reachable without a certificate, so it is bounded twice: for the controller as a
//! whole and for each identity. A request that proves nobody costs a hash and counts against nobody: otherwise
//! strangers could use up the allowance of workloads.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use outrigger_api::v1::certificates_server::Certificates;
use outrigger_api::v1::{SignRequest, SignResponse};
use outrigger_certs::{MAX_CSR_BYTES, SignError, SpiffeId};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::attest::{AttestError, Attestor};
use crate::authority::Issuer;
use crate::mesh::{Viewer, bundle_message};
use crate::metrics::{Metrics, ReasonLabel};
use crate::server::Caller;
use crate::tokens::Tokens;

/// Bytes of a token; a Kubernetes service account token is ~1.5 KiB.
const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// Identities whose rate is remembered; those at rest are forgotten first.
const MAX_BUCKETS: usize = 10_000;
/// A bucket holds what flows in this long: a rolling start of many replicas is a burst.
const BURST: Duration = Duration::from_secs(10);

/// How many leaves are signed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SignLimits {
    /// Leaves a second, in all.
    pub(crate) per_second: u32,
    /// Leaves a second for one identity, which all replicas of a workload share.
    pub(crate) per_identity_per_second: u32,
}

/// The service.
pub(crate) struct Sign {
    issuer: Issuer,
    attestors: Vec<Box<dyn Attestor>>,
    tokens: Arc<Tokens>,
    leaf_life: Duration,
    limits: SignLimits,
    buckets: Mutex<Buckets>,
    metrics: Arc<Metrics>,
    controller: SpiffeId,
}

impl Sign {
    /// Signs with `issuer` leaves that live `leaf_life`.
    pub(crate) fn new(
        issuer: Issuer,
        attestors: Vec<Box<dyn Attestor>>,
        tokens: Arc<Tokens>,
        controller: SpiffeId,
        leaf_life: Duration,
        limits: SignLimits,
        metrics: Arc<Metrics>,
    ) -> Self {
        let buckets = Mutex::new(Buckets::new(limits));
        Self { issuer, attestors, tokens, leaf_life, limits, buckets, metrics, controller }
    }

    /// Whether any attestor still stands by the identity. Only where none does is it revoked: one that cannot say it now
    /// might.
    fn may_renew(&self, viewer: &Viewer) -> Result<(), Refused> {
        let mut unavailable = None;
        for attestor in &self.attestors {
            match attestor.may_renew(&viewer.identity, viewer.address) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => unavailable = Some(error),
            }
        }
        let text =
            "the token that this workload joined with was revoked, or its pod is gone; join with a new one";
        Err(unavailable.map_or_else(|| Refused("revoked", Status::permission_denied(text)), Refused::from))
    }

    async fn sign_for(&self, caller: &Caller, request: SignRequest) -> Result<SignResponse, Refused> {
        if request.csr.len() > MAX_CSR_BYTES {
            return Err(Refused("csr", Status::invalid_argument("the CSR is larger than 16 KiB")));
        }
        if request.token.len() > MAX_TOKEN_BYTES {
            return Err(Refused("token", Status::unauthenticated("the token is larger than 16 KiB")));
        }
        let (identity, proof) = if request.token.is_empty() {
            let (viewer, _) =
                caller.workload("renewal of a certificate").map_err(|status| Refused("no_proof", status))?;
            self.may_renew(&viewer)?;
            (viewer.identity, None)
        } else {
            let attestor =
                self.attestors.iter().find(|attestor| attestor.recognises(&request.token)).ok_or_else(
                    || {
                        Refused(
                            "token",
                            Status::unauthenticated("the token is of no kind that this controller takes"),
                        )
                    },
                )?;
            let attested = attestor.attest(&request.token, caller.address.ip()).await?;
            (attested.identity.clone(), Some((attestor, attested)))
        };
        // `tokens` refuses to make such a token; this holds whatever attestors come.
        if identity == self.controller {
            return Err(Refused(
                "controller",
                Status::permission_denied("the controller's identity is not given out"),
            ));
        }
        let allowed =
            self.buckets.lock().unwrap_or_else(PoisonError::into_inner).take(&identity, Instant::now());
        if !allowed {
            return Err(Refused(
                "rate",
                Status::resource_exhausted("too many signing requests; try again in a second"),
            ));
        }
        let ca = Arc::clone(&self.issuer.borrow());
        let signed = ca.sign(&request.csr, &identity, self.leaf_life)?;
        if let Some((attestor, attested)) = &proof {
            attestor.used(attested, signed.not_after).await?;
            self.metrics.signed.get_or_create(&ReasonLabel::new("token")).inc();
            tracing::info!(target: "audit", %identity, peer = %caller.address, evidence = attested.evidence, "certificate signed");
        } else {
            self.tokens.renewed(&identity, signed.not_after);
            self.metrics.signed.get_or_create(&ReasonLabel::new("renewal")).inc();
            tracing::debug!(%identity, peer = %caller.address, "certificate renewed");
        }
        Ok(SignResponse {
            chain: signed.chain.iter().map(|certificate| certificate.to_vec()).collect(),
            bundle: Some(bundle_message(ca.bundle())),
        })
    }
}

#[tonic::async_trait]
impl Certificates for Sign {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let caller = Caller::of(&request)?;
        match self.sign_for(&caller, request.into_inner()).await {
            Ok(response) => Ok(Response::new(response)),
            Err(Refused(reason, status)) => {
                self.metrics.sign_refused.get_or_create(&ReasonLabel::new(reason)).inc();
                tracing::warn!(target: "audit", peer = %caller.address, reason, message = status.message(), "certificate refused");
                Err(status)
            }
        }
    }
}

impl std::fmt::Debug for Sign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sign").field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// A metric's label, and what the caller is told.
struct Refused(&'static str, Status);

impl From<AttestError> for Refused {
    fn from(error: AttestError) -> Self {
        match error {
            AttestError::Refused(text) => Self("token", Status::unauthenticated(text)),
            AttestError::Unavailable(text) => Self("unavailable", Status::unavailable(text)),
        }
    }
}

impl From<SignError> for Refused {
    fn from(error: SignError) -> Self {
        match error {
            SignError::Csr(_) => Self("csr", Status::invalid_argument(error.to_string())),
            _ => Self("unavailable", Status::unavailable(error.to_string())),
        }
    }
}

/// Token buckets: one for all, one for each identity.
#[derive(Debug)]
struct Buckets {
    limits: SignLimits,
    all: Option<Bucket>,
    of: HashMap<SpiffeId, Bucket>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    level: f64,
    at: Instant,
}

impl Buckets {
    fn new(limits: SignLimits) -> Self {
        Self { limits, all: None, of: HashMap::new() }
    }

    /// Whether one more leaf may be signed.
    fn take(&mut self, identity: &SpiffeId, now: Instant) -> bool {
        let (rate, total) = (self.limits.per_identity_per_second, self.limits.per_second);
        if self.of.len() >= MAX_BUCKETS && !self.of.contains_key(identity) {
            // A full bucket is as good as none.
            self.of.retain(|_, bucket| bucket.filled(rate, now).level < capacity(rate));
            if self.of.len() >= MAX_BUCKETS {
                return false;
            }
        }
        let full = |rate| Bucket { level: capacity(rate), at: now };
        let own = self.of.entry(identity.clone()).or_insert_with(|| full(rate));
        *own = own.filled(rate, now);
        let all = self.all.get_or_insert_with(|| full(total));
        *all = all.filled(total, now);
        if own.level < 1.0 || all.level < 1.0 {
            return false;
        }
        own.level -= 1.0;
        all.level -= 1.0;
        true
    }
}

impl Bucket {
    fn filled(self, rate: u32, now: Instant) -> Self {
        let flowed = now.saturating_duration_since(self.at).as_secs_f64() * f64::from(rate);
        Self { level: (self.level + flowed).min(capacity(rate)), at: now }
    }
}

fn capacity(rate: u32) -> f64 {
    f64::from(rate) * BURST.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_identity_cannot_use_up_the_allowance_of_all() {
        let mut buckets = Buckets::new(SignLimits { per_second: 10, per_identity_per_second: 2 });
        let a: SpiffeId = "spiffe://t/ns/shop/sa/a".parse().unwrap();
        let b: SpiffeId = "spiffe://t/ns/shop/sa/b".parse().unwrap();
        let start = Instant::now();
        let mut taken = |id: &SpiffeId, seconds| {
            let now = start + Duration::from_secs(seconds);
            (0..1000).filter(|_| buckets.take(id, now)).count()
        };
        assert_eq!(taken(&a, 0), 20);
        assert_eq!(taken(&b, 0), 20);
        assert_eq!(taken(&a, 3), 6);
        for other in 0..20 {
            taken(&format!("spiffe://t/ns/shop/sa/x{other}").parse().unwrap(), 3);
        }
        assert_eq!(taken(&b, 3), 0, "nothing is left of the whole");
        assert_eq!(taken(&b, 4), 8);
    }
}
