//! What the API server says of a token, and of what its bearer may do.
//!
//! Answers are kept for seconds: a command asks several things in a row, and a permission that was taken away must end
//! soon. Only answers are kept, never a failure: while the API server is away, nobody gets in who was not seen in these
//! seconds, and the API says 503.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::response::Response;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{Permission, sha256};
use crate::api::{Code, failed};

/// How long an answer of the API server stands.
const KEPT: Duration = Duration::from_secs(10);
/// Answers of one sort that are kept: more than people and pipelines have at once. A full cache is emptied, which costs
/// reviews and nothing else.
const MOST_KEPT: usize = 1024;
/// How long one review may take: the caller gives up after 10 s.
const PATIENCE: Duration = Duration::from_secs(4);
/// Reviews under way at once: whoever guesses tokens must not become the API server's load.
const AT_ONCE: usize = 16;

/// The cluster whose users may call.
#[derive(Debug)]
pub(crate) struct Cluster {
    tokens: Api<TokenReview>,
    access: Api<SubjectAccessReview>,
    /// By the token's hash.
    users: Kept<[u8; 32], Option<Arc<User>>>,
    /// By the token's hash and what is asked for: why not, if not.
    decisions: Kept<([u8; 32], Permission), Option<String>>,
    slots: Semaphore,
}

/// Whom a token belongs to, in the API server's words.
#[derive(Debug)]
pub(crate) struct User {
    token: [u8; 32],
    info: UserInfo,
}

impl User {
    pub(super) fn name(&self) -> &str {
        self.info.username.as_deref().unwrap_or_default()
    }
}

/// The API server did not answer.
#[derive(Debug)]
pub(super) struct Unavailable(String);

impl Unavailable {
    pub(super) fn answer(&self) -> Response {
        failed(Code::ClusterUnavailable, &self.0)
    }
}

impl Cluster {
    /// The cluster that `client` leads to.
    pub(crate) fn new(client: &Client) -> Self {
        Self {
            tokens: Api::all(client.clone()),
            access: Api::all(client.clone()),
            users: Kept::default(),
            decisions: Kept::default(),
            slots: Semaphore::new(AT_ONCE),
        }
    }

    /// Whose token it is. `None`: nobody's.
    pub(super) async fn user(&self, token: &str) -> Result<Option<Arc<User>>, Unavailable> {
        let hash = sha256(token);
        if let Some(known) = self.users.get(&hash) {
            return Ok(known);
        }
        // No audience is named: the API server's own holds, which no token for our sidecars has.
        let spec = TokenReviewSpec { token: Some(token.to_owned()), audiences: None };
        let review = TokenReview { spec, ..TokenReview::default() };
        let status = self.ask("TokenReview", &self.tokens, &review).await?.status.unwrap_or_default();
        let info = status.user.filter(|_| status.authenticated == Some(true));
        let info = info.filter(|info| info.username.as_ref().is_some_and(|name| !name.is_empty()));
        let user = info.map(|info| Arc::new(User { token: hash, info }));
        self.users.put(hash, user.clone());
        Ok(user)
    }

    /// Why the user may not. `None`: they may.
    pub(super) async fn refusal(
        &self,
        user: &User,
        permission: &Permission,
    ) -> Result<Option<String>, Unavailable> {
        let asked = (user.token, permission.clone());
        if let Some(known) = self.decisions.get(&asked) {
            return Ok(known);
        }
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let spec = SubjectAccessReviewSpec {
            user: user.info.username.clone(),
            groups: user.info.groups.clone(),
            uid: user.info.uid.clone(),
            extra: user.info.extra.clone(),
            resource_attributes: Some(ResourceAttributes {
                verb: some(permission.verb),
                group: some(permission.group),
                resource: some(permission.resource),
                namespace: some(&permission.namespace),
                name: some(&permission.name),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        };
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let status = self.ask("SubjectAccessReview", &self.access, &review).await?.status.unwrap_or_default();
        let is_allowed = status.allowed && status.denied != Some(true);
        let refused = (!is_allowed).then(|| status.reason.unwrap_or_default());
        self.decisions.put(asked, refused.clone());
        Ok(refused)
    }

    async fn ask<K>(&self, what: &str, api: &Api<K>, review: &K) -> Result<K, Unavailable>
    where
        K: Clone + std::fmt::Debug + Serialize + DeserializeOwned,
    {
        let asking = async {
            // It is never closed.
            let _slot = self.slots.acquire().await;
            api.create(&PostParams::default(), review).await
        };
        let told = |reason: String| {
            tracing::warn!(reason, "the API server did not answer a {what}; callers of the API are refused");
            Unavailable(format!(
                "the cluster's API server does not say who may do this ({what}: {reason}); try again when it answers"
            ))
        };
        match tokio::time::timeout(PATIENCE, asking).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(told(error.to_string())),
            Err(_) => Err(told(format!("no answer within {} s", PATIENCE.as_secs()))),
        }
    }
}

/// Answers with their age.
#[derive(Debug)]
struct Kept<K, V>(Mutex<HashMap<K, (Instant, V)>>);

impl<K, V> Default for Kept<K, V> {
    fn default() -> Self {
        Self(Mutex::new(HashMap::new()))
    }
}

impl<K: Eq + Hash, V: Clone> Kept<K, V> {
    fn get(&self, key: &K) -> Option<V> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(key).filter(|(at, _)| at.elapsed() < KEPT).map(|(_, value)| value.clone())
    }

    fn put(&self, key: K, value: V) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= MOST_KEPT {
            kept.retain(|_, (at, _)| at.elapsed() < KEPT);
        }
        if kept.len() >= MOST_KEPT {
            tracing::info!(
                "more than {MOST_KEPT} answers of the API server within {} s; they are asked for again",
                KEPT.as_secs()
            );
            kept.clear();
        }
        kept.insert(key, (Instant::now(), value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn answers_stand_for_seconds_and_are_bounded() {
        let kept = Kept::default();
        kept.put(1_usize, "a");
        assert_eq!(kept.get(&1), Some("a"));
        tokio::time::advance(KEPT).await;
        assert_eq!(kept.get(&1), None);
        for key in 0..3 * MOST_KEPT {
            kept.put(key, "b");
            assert!(kept.0.lock().unwrap().len() <= MOST_KEPT);
            assert_eq!(kept.get(&key), Some("b"), "the newest is there");
        }
    }
}
