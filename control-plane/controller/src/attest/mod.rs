//! Who is asking for a certificate: the seam between ways to prove a workload.
//!
//! An attestor recognises its own tokens by their form, proves an identity, and is told when a leaf was signed for it.
//! The identity comes from the token alone.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::SystemTime;

use outrigger_certs::SpiffeId;

mod service_accounts;

pub(crate) use service_accounts::ServiceAccounts;

use crate::tokens::{self, Checked, TokenRefused, Tokens};

/// What an attestor returns: the trait is used as an object, for which plain `async fn`s do not serve yet.
pub(crate) type Attesting<'a, T> = Pin<Box<dyn Future<Output = Result<T, AttestError>> + Send + 'a>>;

/// A way to prove a workload's identity.
pub(crate) trait Attestor: Send + Sync {
    /// Whether the token is of this attestor's kind.
    fn recognises(&self, token: &str) -> bool;

    /// Proves who bears the token, and changes nothing: what follows may still fail.
    fn attest<'a>(&'a self, token: &'a str, peer: IpAddr) -> Attesting<'a, Attested>;

    /// Whether a still valid leaf of this identity, on a connection from `peer`, is proof enough for its successor.
    fn may_renew(&self, identity: &SpiffeId, peer: IpAddr) -> Result<bool, AttestError>;

    /// A leaf that ends at `not_after` was signed for this proof and is about to be handed out. An error stops that.
    fn used<'a>(&'a self, attested: &'a Attested, not_after: SystemTime) -> Attesting<'a, ()>;
}

/// A proved identity.
#[derive(Debug, Clone)]
pub(crate) struct Attested {
    /// Who it is.
    pub(crate) identity: SpiffeId,
    /// By what, for the attestor and for logs: the id of a join token. Never a secret.
    pub(crate) evidence: String,
}

/// Why nobody was proved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttestError {
    /// The token proves nothing.
    #[error("{0}")]
    Refused(String),
    /// It may, but this cannot be found out now.
    #[error("{0}")]
    Unavailable(String),
}

/// Attestation by join tokens.
#[derive(Debug)]
pub(crate) struct JoinTokens(Arc<Tokens>);

impl JoinTokens {
    /// Attests with these tokens.
    pub(crate) fn new(tokens: Arc<Tokens>) -> Self {
        Self(tokens)
    }
}

impl Attestor for JoinTokens {
    fn recognises(&self, token: &str) -> bool {
        token.trim_start().starts_with(tokens::PREFIX)
    }

    fn attest<'a>(&'a self, token: &'a str, _peer: IpAddr) -> Attesting<'a, Attested> {
        let checked = self.0.check_text(token, SystemTime::now());
        Box::pin(async move {
            let Checked { identity, id } = checked.map_err(refused)?;
            Ok(Attested { identity, evidence: id })
        })
    }

    fn may_renew(&self, identity: &SpiffeId, _peer: IpAddr) -> Result<bool, AttestError> {
        Ok(self.0.may_renew(identity))
    }

    fn used<'a>(&'a self, attested: &'a Attested, not_after: SystemTime) -> Attesting<'a, ()> {
        Box::pin(async move {
            let checked = Checked { identity: attested.identity.clone(), id: attested.evidence.clone() };
            match self.0.redeem(&checked, not_after, SystemTime::now()).await {
                Ok(verdict) => verdict.map_err(refused),
                Err(error) => Err(AttestError::Unavailable(format!(
                    "the use of the join token could not be recorded, and a one-time token counts as used now: {error}"
                ))),
            }
        })
    }
}

fn refused(reason: TokenRefused) -> AttestError {
    AttestError::Refused(reason.to_string())
}
