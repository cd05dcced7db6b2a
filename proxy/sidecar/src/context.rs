//! What all threads share, made once at start.

use std::collections::BTreeMap;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use outrigger_api::v1;
use outrigger_certs::{Credentials, TrustBundle};
use outrigger_core::model::Protocol;
use tokio::sync::mpsc;

use crate::{
    config::{Config, Mtls},
    control_metrics::ControlMetrics,
    discovery::directory::{Ask, Directory},
    drain::Drain,
    metrics::Metrics,
    ready::Readiness,
};

/// Everything that more than one thread reads.
#[derive(Debug)]
pub struct Context {
    /// As loaded; never changes.
    pub config: Config,
    /// Where addresses and names lead.
    pub directory: Directory,
    /// Who we are and whom we trust.
    pub credentials: Credentials,
    /// How our own workload is reached.
    pub inbound: ArcSwap<InboundPolicy>,
    /// Counters of the data path, and the registry of all.
    pub metrics: Metrics,
    /// Counters of the control thread.
    pub control: ControlMetrics,
    /// How far a shutdown has come.
    pub drain: Drain,
    /// What is missing before we are ready.
    pub ready: Readiness,
}

/// The own workload's side, as pushed; until then as configured.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InboundPolicy {
    /// Whether plaintext may come in.
    pub mode: Mtls,
    /// The workload is about to end: send GOAWAY now.
    pub terminating: bool,
    /// What the workload's ports speak, where somebody said so. Configured opaque ports are `Tcp` here.
    pub ports: BTreeMap<u16, Protocol>,
}

impl Context {
    /// The context of a configuration, with the roots of `bundle`. The receiver is for the control thread.
    pub fn new(config: Config, bundle: TrustBundle) -> (Self, mpsc::Receiver<Ask>) {
        let (directory, asks) = Directory::new(&config);
        let inbound = ArcSwap::from_pointee(InboundPolicy::from_config(&config));
        let credentials = Credentials::new(bundle);
        let (metrics, control) = (Metrics::default(), ControlMetrics::default());
        metrics.register(|registry| control.register(registry));
        let (drain, ready) = (Drain::default(), Readiness::default());
        (Self { config, directory, credentials, inbound, metrics, control, drain, ready }, asks)
    }

    /// The context of a configuration, with the roots in its `trust_bundle` file.
    ///
    /// # Errors
    /// If the file cannot be read or holds no roots.
    pub fn from_config(config: Config) -> anyhow::Result<(Self, mpsc::Receiver<Ask>)> {
        let path = &config.trust_bundle;
        let pem = std::fs::read(path).with_context(|| {
            format!(
                "cannot read the trust bundle {}: give the roots of the mesh in `trust_bundle` (the controller has \
                 them in its data directory)",
                path.display()
            )
        })?;
        let domain = config.trust_domain.parse().context("trust_domain")?;
        let bundle = TrustBundle::from_pem(domain, &pem, 0)
            .with_context(|| format!("cannot use the trust bundle {}", path.display()))?;
        Ok(Self::new(config, bundle))
    }
}

impl InboundPolicy {
    /// What holds until the controller has spoken.
    pub fn from_config(config: &Config) -> Self {
        let ports = config.opaque_ports.iter().map(|port| (*port, Protocol::Tcp)).collect();
        Self { mode: config.mtls, terminating: false, ports }
    }

    /// What the controller said; hints that the configuration gives stay above the controller's.
    pub(crate) fn from_wire(wire: &v1::Inbound, config: &Config) -> Self {
        let mut policy = Self::from_config(config);
        policy.mode = match wire.mode() {
            v1::inbound::Mode::Unspecified => config.mtls,
            v1::inbound::Mode::Strict => Mtls::Strict,
            v1::inbound::Mode::Permissive => Mtls::Permissive,
        };
        policy.terminating = wire.terminating;
        for claim in &wire.claims {
            let protocol = Protocol::from_wire(claim.protocol());
            if let Ok(port) = u16::try_from(claim.port)
                && protocol != Protocol::Detect
            {
                policy.ports.entry(port).or_insert(protocol);
            }
        }
        policy
    }

    /// What `port` of the workload speaks.
    pub fn protocol(&self, port: u16) -> Protocol {
        self.ports.get(&port).copied().unwrap_or_default()
    }
}
