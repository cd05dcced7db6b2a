//! Join tokens: how a workload on a host proves for the first time who it is.
//!
//! A token `ort1_<id>_<secret>` names one identity, the services that it may serve and the networks that it may live
//! in. The secret is 256 random bits, so that its plain SHA-256 is safe to store; the text is shown once. A record
//! stays after its token was used up or has expired, because its *grant* (services and networks) holds for the
//! workload that joined with it, whose leaf renews itself; it goes when the token is revoked, or when no leaf can be
//! alive any more.
//!
//! Where the disk does not take a change in time, its caller hears of a failure and memory holds what is safe, which the
//! disk gets when it can: a token that was to be made is gone again (nobody has seen its text), a revocation is in effect
//! from the first moment, and a use stays used, so that a one-time token is lost then and a reusable one may be tried again.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{constant_time, digest, rand};
use ipnet::IpNet;
use outrigger_certs::SpiffeId;
use serde::{Deserialize, Serialize};

use crate::sources::ServiceKey;
use crate::store::{Change, Store, StoreError, Table};

/// Tells our tokens from other attestation tokens, and in scans for leaked secrets.
pub(crate) const PREFIX: &str = "ort1_";

/// Records held at once; each is below 2 KiB with the bounds below.
const MAX_TOKENS: usize = 100_000;
/// Services or CIDRs of one token.
const MAX_GRANTED: usize = 64;
/// A year: a token that lives longer is a password.
const MAX_LIFE: Duration = Duration::from_hours(24 * 365);
/// Bytes of a token's id, and of its secret.
const ID_BYTES: usize = 6;
const SECRET_BYTES: usize = 32;

/// How often a token can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Uses {
    /// Once: for workloads whose restart brings a new token.
    #[default]
    OneTime,
    /// Until it expires: a file on a host.
    Reusable,
}

/// What somebody asks for.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewToken {
    /// The SPIFFE id that its bearer becomes.
    pub(crate) identity: String,
    /// Services that its bearer may claim to serve; a bare name is in namespace `default`.
    #[serde(default)]
    pub(crate) services: Vec<String>,
    /// Networks that its bearer's announced addresses must lie in. Empty: exactly the address that it connects from.
    #[serde(default)]
    pub(crate) cidrs: Vec<IpNet>,
    /// Seconds until it can no longer be used. 3,600 by default.
    #[serde(default = "default_life")]
    pub(crate) ttl_seconds: u64,
    /// One-time by default.
    #[serde(default)]
    pub(crate) uses: Uses,
}

fn default_life() -> u64 {
    3600
}

/// A token as it is stored.
#[derive(Clone, Serialize, Deserialize)]
struct Record {
    secret_sha256: String,
    identity: String,
    services: Vec<String>,
    cidrs: Vec<IpNet>,
    uses: Uses,
    created: u64,
    expires: u64,
    /// How many leaves were signed for it.
    used: u64,
    /// When the last leaf that stands on this grant expires, Unix seconds.
    alive_until: u64,
}

/// A token as people see it: all but its secret.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct TokenInfo {
    /// Names it in `DELETE`.
    pub(crate) id: String,
    /// The SPIFFE id that its bearer becomes.
    pub(crate) identity: String,
    /// What it may serve.
    pub(crate) services: Vec<String>,
    /// Where it may live.
    pub(crate) cidrs: Vec<IpNet>,
    /// How often it can be used.
    pub(crate) uses: Uses,
    /// Unix seconds.
    pub(crate) created: u64,
    /// Unix seconds.
    pub(crate) expires: u64,
    /// How many leaves were signed for it.
    pub(crate) used: u64,
    /// Whether it can be used now.
    pub(crate) usable: bool,
}

/// Why a token cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NewTokenError {
    /// The request is at fault; the texts say each way in which.
    #[error("{}", .0.join("; "))]
    Invalid(Vec<String>),
    /// Too many tokens.
    #[error("there are {MAX_TOKENS} tokens already; revoke some")]
    Full,
    /// The store failed.
    #[error("the token was not made: {0}")]
    Store(StoreError),
}

/// Why a token was not taken. Deliberately not more precise towards the bearer than this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenRefused {
    /// No such token, or its secret is another.
    #[error("the join token is unknown or was revoked; make a new one with `outrigger token create`")]
    Unknown,
    /// One-time, and used.
    #[error("the join token was used already; make a new one with `outrigger token create`")]
    Used,
    /// Too old.
    #[error("the join token has expired; make a new one with `outrigger token create`")]
    Expired,
}

/// A token that was checked and not yet used.
#[derive(Debug, Clone)]
pub(crate) struct Checked {
    /// Whose it is.
    pub(crate) identity: SpiffeId,
    /// Which.
    pub(crate) id: String,
}

/// Every token. Cheap to share.
#[derive(Debug)]
pub(crate) struct Tokens {
    store: Arc<Store>,
    trust_domain: String,
    controller: SpiffeId,
    leaf_life: Duration,
    records: Mutex<BTreeMap<String, Record>>,
}

impl Tokens {
    /// Loads the tokens of the store.
    pub(crate) fn load(
        store: Arc<Store>,
        controller: SpiffeId,
        leaf_life: Duration,
    ) -> Result<Self, StoreError> {
        let records = store.load(Table::Tokens)?.into_iter().collect();
        let trust_domain = controller.trust_domain().to_owned();
        Ok(Self { store, trust_domain, controller, leaf_life, records: Mutex::new(records) })
    }

    /// Makes a token and returns its text, the only time that it exists here.
    pub(crate) async fn create(
        &self,
        new: NewToken,
        now: SystemTime,
    ) -> Result<(TokenInfo, String), NewTokenError> {
        let services = self.check(&new)?;
        let mut id = [0; ID_BYTES];
        let mut secret = [0; SECRET_BYTES];
        for bytes in [&mut id[..], &mut secret[..]] {
            rand::fill(bytes)
                .map_err(|_| NewTokenError::Invalid(vec!["no randomness from the kernel".into()]))?;
        }
        let (id, secret) = (hex(&id), hex(&secret));
        let record = Record {
            secret_sha256: sha256(&secret),
            identity: new.identity,
            services,
            cidrs: new.cidrs,
            uses: new.uses,
            created: unix(now),
            expires: unix(now) + new.ttl_seconds,
            used: 0,
            alive_until: 0,
        };
        let info = record.info(&id, unix(now));
        let receipt = {
            let mut records = self.records();
            let mut changes = forget_dead(&mut records, unix(now).saturating_sub(self.slack()), unix(now));
            if records.len() >= MAX_TOKENS {
                return Err(NewTokenError::Full);
            }
            changes.push(Change::put(Table::Tokens, id.clone(), &record));
            records.insert(id.clone(), record);
            self.store.submit(changes)
        };
        if let Err(error) = receipt.durable().await {
            let mut records = self.records();
            records.remove(&id);
            self.store.submit(vec![Change::delete(Table::Tokens, id)]).forget();
            return Err(NewTokenError::Store(error));
        }
        tracing::info!(target: "audit", token = id, identity = info.identity, "join token created");
        Ok((info, format!("{PREFIX}{id}_{secret}")))
    }

    /// Every token, by id.
    pub(crate) fn list(&self, now: SystemTime) -> Vec<TokenInfo> {
        self.records().iter().map(|(id, record)| record.info(id, unix(now))).collect()
    }

    /// Ends a token and the grant that stands on it: nobody joins with it any more, and leaves that stand on no other
    /// token are not renewed, but run out. Claims that were accepted stay until their instances leave: meshed is
    /// sticky. `false`: there is no such token. An error says that it is not durable; in effect it is all the same.
    pub(crate) async fn revoke(&self, id: &str) -> Result<bool, StoreError> {
        let receipt = {
            let mut records = self.records();
            if records.remove(id).is_none() {
                return Ok(false);
            }
            self.store.submit(vec![Change::delete(Table::Tokens, id)])
        };
        tracing::info!(target: "audit", token = id, "join token revoked");
        receipt.durable().await?;
        Ok(true)
    }

    /// Checks a token without using it up.
    pub(crate) fn check_text(&self, text: &str, now: SystemTime) -> Result<Checked, TokenRefused> {
        let (id, secret) = text
            .trim()
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('_'))
            .ok_or(TokenRefused::Unknown)?;
        let records = self.records();
        let record = records.get(id).ok_or(TokenRefused::Unknown)?;
        let same = constant_time::verify_slices_are_equal(
            sha256(secret).as_bytes(),
            record.secret_sha256.as_bytes(),
        );
        same.map_err(|_| TokenRefused::Unknown)?;
        record.usable(unix(now))?;
        // A record of another version or trust domain names nobody.
        let identity = record.identity.parse().map_err(|_| TokenRefused::Unknown)?;
        Ok(Checked { identity, id: id.to_owned() })
    }

    /// Uses a checked token, for a leaf that expires at `alive_until`; of two bearers of a one-time token exactly one
    /// gets through. Durable when it returns; after an error it counts as used, because the disk may still learn so.
    pub(crate) async fn redeem(
        &self,
        checked: &Checked,
        alive_until: SystemTime,
        now: SystemTime,
    ) -> Result<Result<(), TokenRefused>, StoreError> {
        let receipt = {
            let mut records = self.records();
            let Some(record) = records.get_mut(&checked.id) else { return Ok(Err(TokenRefused::Unknown)) };
            if let Err(refused) = record.usable(unix(now)) {
                return Ok(Err(refused));
            }
            record.used += 1;
            record.alive_until = record.alive_until.max(unix(alive_until));
            self.store.submit(vec![Change::put(Table::Tokens, checked.id.clone(), record)])
        };
        receipt.durable().await?;
        Ok(Ok(()))
    }

    /// Whether leaves of this identity may be renewed: a token that it joined with was not revoked.
    pub(crate) fn may_renew(&self, identity: &SpiffeId) -> bool {
        self.records().values().any(|record| record.used > 0 && record.identity == identity.as_str())
    }

    /// A leaf of this identity was renewed: the grants that it stands on live as long as it.
    pub(crate) fn renewed(&self, identity: &SpiffeId, alive_until: SystemTime) {
        let slack = self.slack();
        let mut records = self.records();
        let mut changes = Vec::new();
        for (id, record) in records.iter_mut() {
            if record.used > 0
                && record.identity == identity.as_str()
                && record.alive_until + slack < unix(alive_until)
            {
                record.alive_until = unix(alive_until);
                changes.push(Change::put(Table::Tokens, id.clone(), record));
            }
        }
        if !changes.is_empty() {
            self.store.submit(changes).forget();
        }
    }

    /// Whether a workload of this identity, connected from `peer`, may say that it serves `service` at `address`:
    /// one of the tokens that it joined with must allow both. Otherwise says what failed.
    pub(crate) fn grants(
        &self,
        identity: &SpiffeId,
        service: &ServiceKey,
        address: IpAddr,
        peer: IpAddr,
    ) -> Result<(), NotGranted> {
        let records = self.records();
        let mut verdict = NotGranted::NoToken;
        for record in
            records.values().filter(|record| record.used > 0 && record.identity == identity.as_str())
        {
            let serves = record.services.iter().any(|granted| granted == service.as_str());
            let lives = if record.cidrs.is_empty() {
                address == peer
            } else {
                record.cidrs.iter().any(|cidr| cidr.contains(&address))
            };
            match (serves, lives) {
                (true, true) => return Ok(()),
                (true, false) => verdict = NotGranted::Address,
                (false, _) if verdict == NotGranted::NoToken => verdict = NotGranted::Service,
                (false, _) => {}
            }
        }
        Err(verdict)
    }

    /// How far `alive_until` may lag behind the truth, seconds: saves the write for most renewals of many replicas.
    fn slack(&self) -> u64 {
        self.leaf_life.as_secs() / 8
    }

    fn check(&self, new: &NewToken) -> Result<Vec<String>, NewTokenError> {
        let mut faults = Vec::new();
        match new.identity.parse::<SpiffeId>() {
            Err(error) => faults.push(format!("identity: {error}")),
            Ok(identity) if identity == self.controller => {
                faults.push("identity: this is the controller's own, which no token may name".to_owned());
            }
            Ok(identity) if identity.trust_domain() != self.trust_domain => faults.push(format!(
                "identity: its trust domain is not `{}`, the one of this controller",
                self.trust_domain
            )),
            Ok(_) => {}
        }
        let mut services = Vec::new();
        for service in &new.services {
            match ServiceKey::parse(service) {
                Ok(key) => services.push(key.as_str().to_owned()),
                Err(error) => faults.push(format!("services: {error}")),
            }
        }
        if new.services.len() > MAX_GRANTED || new.cidrs.len() > MAX_GRANTED {
            faults.push(format!("services, cidrs: at most {MAX_GRANTED} of each"));
        }
        if new.ttl_seconds == 0 || new.ttl_seconds > MAX_LIFE.as_secs() {
            faults.push(format!("ttl_seconds: 1 to {}, a year", MAX_LIFE.as_secs()));
        }
        if faults.is_empty() { Ok(services) } else { Err(NewTokenError::Invalid(faults)) }
    }

    fn records(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Record>> {
        // Every change of the map is one insertion or removal: a panic elsewhere leaves it whole.
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a claim is not covered by a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotGranted {
    /// No living token of this identity was ever used.
    NoToken,
    /// None names the service.
    Service,
    /// One names the service, but not for this address.
    Address,
}

impl Record {
    fn usable(&self, now: u64) -> Result<(), TokenRefused> {
        if self.expires <= now {
            Err(TokenRefused::Expired)
        } else if self.uses == Uses::OneTime && self.used > 0 {
            Err(TokenRefused::Used)
        } else {
            Ok(())
        }
    }

    fn info(&self, id: &str, now: u64) -> TokenInfo {
        TokenInfo {
            id: id.to_owned(),
            identity: self.identity.clone(),
            services: self.services.clone(),
            cidrs: self.cidrs.clone(),
            uses: self.uses,
            created: self.created,
            expires: self.expires,
            used: self.used,
            usable: self.usable(now).is_ok(),
        }
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Record").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// Drops tokens that can neither be used nor carry the grant of a leaf that was alive at `leaves_at`.
fn forget_dead(records: &mut BTreeMap<String, Record>, leaves_at: u64, now: u64) -> Vec<Change> {
    let mut changes = Vec::new();
    records.retain(|id, record| {
        let keep = record.usable(now).is_ok() || record.alive_until > leaves_at;
        if !keep {
            changes.push(Change::delete(Table::Tokens, id.as_str()));
        }
        keep
    });
    changes
}

fn sha256(text: &str) -> String {
    hex(digest::digest(&digest::SHA256, text.as_bytes()).as_ref())
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|nibble| char::from(DIGITS[usize::from(nibble)]))
        .collect()
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
