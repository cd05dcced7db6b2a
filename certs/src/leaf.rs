//! What a workload accepts as its own certificate. The CA is trusted to vouch for others, not to hand out nonsense: a
//! chain that peers would refuse, or that belongs to another key, must never replace one that still works.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::PublicKeyData as _;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer, Validity, X509Certificate};

use crate::bundle::TrustBundle;
use crate::identity::SpiffeId;
use crate::key::KeyPair;
use crate::tls::provider;
use crate::verify::{self, Refusal, Side};

/// Why a returned certificate was not taken. Keep the old one, back off and raise an alarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeafError {
    /// The chain is empty.
    #[error("the CA returned no certificate")]
    Empty,
    /// The certificate is for another key.
    #[error("the CA returned a certificate for another key")]
    OtherKey,
    /// Peers would refuse the certificate.
    #[error("the CA returned a certificate that peers would refuse: {0}")]
    Refused(Refusal),
    /// The certificate is somebody else's.
    #[error("the CA returned a certificate for another identity")]
    OtherIdentity,
}

/// A workload's certificate chain with its key: what proves its identity. Cheap to clone.
#[derive(Clone)]
pub struct Leaf(Arc<Inner>);

struct Inner {
    id: SpiffeId,
    certified: Arc<CertifiedKey>,
    not_before: SystemTime,
    not_after: SystemTime,
    obtained: SystemTime,
}

impl Leaf {
    /// Takes the chain that the CA returned for `key` (leaf first, without the root), if it is for this key, holds
    /// exactly the identity `expected`, and verifies against `bundle` at `now` for both sides of TLS. `expected` is
    /// `None` only for the first certificate of a workload that does not know its identity.
    pub fn accept(
        key: KeyPair,
        chain: Vec<CertificateDer<'static>>,
        expected: Option<&SpiffeId>,
        bundle: &TrustBundle,
        now: SystemTime,
    ) -> Result<Self, LeafError> {
        let (leaf, intermediates) = chain.split_first().ok_or(LeafError::Empty)?;
        let malformed = LeafError::Refused(Refusal::Malformed);
        let (_, certificate) = X509Certificate::from_der(leaf).map_err(|_| malformed)?;
        if certificate.public_key().raw != key.subject_public_key_info() {
            return Err(LeafError::OtherKey);
        }
        let time = unix_time(now);
        let algorithms = &provider().signature_verification_algorithms;
        let mut id = None;
        for side in [Side::Server, Side::Client] {
            id = Some(
                verify::verify(leaf, intermediates, bundle, algorithms, side, time)
                    .map_err(LeafError::Refused)?,
            );
        }
        let id = id.ok_or(malformed)?;
        if expected.is_some_and(|expected| *expected != id) {
            return Err(LeafError::OtherIdentity);
        }
        let (not_before, not_after) = validity(certificate.validity());
        let certified = Arc::new(CertifiedKey::new(chain, Arc::new(key)));
        Ok(Self(Arc::new(Inner { id, certified, not_before, not_after, obtained: now })))
    }

    /// Who this is.
    pub fn id(&self) -> &SpiffeId {
        &self.0.id
    }

    /// The certificates, leaf first, without the root; DER.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.0.certified.cert
    }

    /// From when on the leaf is valid: before it was obtained, for peers whose clock is slow.
    pub fn not_before(&self) -> SystemTime {
        self.0.not_before
    }

    /// Until when the leaf is valid.
    pub fn not_after(&self) -> SystemTime {
        self.0.not_after
    }

    /// When [`accept`](Self::accept) took it: the start of its life for [`renew_at`](crate::renew_at).
    pub fn obtained(&self) -> SystemTime {
        self.0.obtained
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        self.0.certified.clone()
    }
}

impl fmt::Debug for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaf")
            .field("id", &self.0.id)
            .field("not_after", &self.0.not_after)
            .finish_non_exhaustive()
    }
}

/// A clock before 1970 counts as 1970: everything is then "not valid yet".
pub(crate) fn unix_time(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

pub(crate) fn validity(validity: &Validity) -> (SystemTime, SystemTime) {
    let time = |seconds: i64| UNIX_EPOCH + Duration::from_secs(seconds.try_into().unwrap_or(0));
    (time(validity.not_before.timestamp()), time(validity.not_after.timestamp()))
}
