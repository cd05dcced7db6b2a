//! What the controller counts. Every label has a fixed set of values.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::compile::Kind;

/// Which resource type.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct KindLabel {
    r#type: &'static str,
}

impl KindLabel {
    /// The label of a kind.
    pub(crate) fn new(kind: Kind) -> Self {
        Self { r#type: kind.name() }
    }
}

/// Why, out of the fixed set of the place that counts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct ReasonLabel {
    reason: &'static str,
}

impl ReasonLabel {
    /// The label of a reason.
    pub(crate) fn new(reason: &'static str) -> Self {
        Self { reason }
    }
}

/// Every metric of the controller; [`Metrics::register`] names and explains them.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) synced: Gauge,
    pub(crate) services: Gauge,
    pub(crate) connections: Gauge,
    pub(crate) handshakes_refused: Family<ReasonLabel, Counter>,
    pub(crate) streams: Gauge,
    pub(crate) pushes: Family<KindLabel, Counter>,
    pub(crate) pushed_resources: Family<KindLabel, Counter>,
    pub(crate) acks: Family<KindLabel, Counter>,
    pub(crate) nacks: Family<KindLabel, Counter>,
    pub(crate) unknown_types: Counter,
    pub(crate) ads_refused: Family<ReasonLabel, Counter>,
    pub(crate) signed: Family<ReasonLabel, Counter>,
    pub(crate) sign_refused: Family<ReasonLabel, Counter>,
    pub(crate) announcers: Gauge,
    pub(crate) claims_refused: Family<ReasonLabel, Counter>,
    pub(crate) own_leaf_expiry: Gauge,
    pub(crate) issuer_expiry: Gauge,
    pub(crate) store_writable: Gauge,
    pub(crate) policies: Gauge,
    pub(crate) policies_revision: Gauge,
    pub(crate) policy_store_synced: Gauge,
    pub(crate) policy_writes: Family<ReasonLabel, Counter>,
    pub(crate) leader: Gauge,
    pub(crate) ca_secret_current: Gauge,
}

impl Metrics {
    /// A registry that holds them all.
    pub(crate) fn register(&self) -> Registry {
        let mut registry = Registry::with_prefix("outrigger");
        registry.register("sources_synced", "1 while every source is synced", self.synced.clone());
        registry.register("services", "Services in the catalog", self.services.clone());
        registry.register("connections", "Open connections of proxies", self.connections.clone());
        registry.register(
            "handshakes_refused",
            "Connections that ended before they were authenticated, by reason",
            self.handshakes_refused.clone(),
        );
        registry.register("ads_streams", "Open discovery streams", self.streams.clone());
        registry.register("ads_pushes", "Discovery responses sent, by resource type", self.pushes.clone());
        registry.register(
            "ads_pushed_resources",
            "Resources sent or removed in discovery responses, by resource type",
            self.pushed_resources.clone(),
        );
        registry.register(
            "ads_acks",
            "Discovery responses that proxies took, by resource type",
            self.acks.clone(),
        );
        registry.register(
            "ads_nacks",
            "Discovery responses that proxies refused, by resource type",
            self.nacks.clone(),
        );
        registry.register(
            "ads_unknown_types",
            "Discovery requests for an unknown resource type",
            self.unknown_types.clone(),
        );
        registry.register(
            "ads_refused",
            "Subscriptions that were refused, by reason",
            self.ads_refused.clone(),
        );
        registry.register(
            "certificates_signed",
            "Leaves signed, by what proved the identity",
            self.signed.clone(),
        );
        registry.register(
            "certificates_refused",
            "Signing requests refused, by reason",
            self.sign_refused.clone(),
        );
        registry.register("announcers", "Open announcement streams", self.announcers.clone());
        registry.register("claims_refused", "Claims refused, by reason", self.claims_refused.clone());
        registry.register(
            "own_leaf_expiry_timestamp_seconds",
            "When the controller's own leaf ends",
            self.own_leaf_expiry.clone(),
        );
        registry.register(
            "issuer_expiry_timestamp_seconds",
            "When the issuing certificate ends",
            self.issuer_expiry.clone(),
        );
        registry.register(
            "store_writable",
            "1 while the store's disk takes changes; at 0 they live in memory only",
            self.store_writable.clone(),
        );
        registry.register("policies", "Policies in force", self.policies.clone());
        registry.register(
            "policies_revision",
            "The revision of the policies in force",
            self.policies_revision.clone(),
        );
        registry.register(
            "policy_store_synced",
            "1 while the store of policies can be read; at 0 the last good ones stay in force",
            self.policy_store_synced.clone(),
        );
        registry.register(
            "policy_writes",
            "Writes of policies, by what became of them",
            self.policy_writes.clone(),
        );
        registry.register("leader", "1 while this replica leads, in Kubernetes", self.leader.clone());
        registry.register(
            "ca_secret_current",
            "1 while the Kubernetes Secret holds the CA in use; at 0 the one in use stays",
            self.ca_secret_current.clone(),
        );
        registry
    }
}
