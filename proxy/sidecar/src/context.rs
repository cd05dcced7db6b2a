//! What all threads share, made once at start.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::AtomicBool},
    time::Instant,
};

use anyhow::Context as _;
use arc_swap::{ArcSwap, Guard};
use outrigger_api::v1;
use outrigger_certs::{Credentials, TrustBundle};
use outrigger_core::{
    access::Access, concurrency::Concurrency, limit::Limits, model::Protocol, path::EscapedSlashes,
};
use tokio::sync::{mpsc, watch};

use crate::{
    config::{Config, Mtls},
    control_metrics::ControlMetrics,
    discovery::directory::{Ask, Directory},
    drain::Drain,
    lives::Lives,
    metrics::Metrics,
    mounted,
    ready::Readiness,
};

/// Bytes of the roots' file: what a trust bundle takes.
const MAX_BUNDLE_BYTES: u64 = 256 * 1024;

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
    pub inbound: Inbound,
    /// Counters of the data path, and the registry of all.
    pub metrics: Metrics,
    /// Counters of the control thread.
    pub control: ControlMetrics,
    /// What threads know together of the services in use.
    pub lives: Lives,
    /// Whether a thread has taken on the active health checks.
    pub checks_health: AtomicBool,
    /// How far a shutdown has come.
    pub drain: Drain,
    /// What is missing before we are ready.
    pub ready: Readiness,
}

/// How the own workload is reached, and a sign when that changes.
#[derive(Debug)]
pub struct Inbound {
    policy: ArcSwap<InboundPolicy>,
    changed: watch::Sender<u64>,
}

impl Inbound {
    fn new(policy: InboundPolicy) -> Self {
        Self { policy: ArcSwap::from_pointee(policy), changed: watch::Sender::new(0) }
    }

    /// What holds now.
    pub fn load(&self) -> Guard<Arc<InboundPolicy>> {
        self.policy.load()
    }

    /// Takes a new policy, and says so to everybody who has judged by the one before.
    pub fn store(&self, policy: InboundPolicy) {
        let epoch = *self.changed.borrow() + 1;
        self.policy.store(Arc::new(InboundPolicy { epoch, ..policy }));
        self.changed.send_replace(epoch);
    }

    /// Is told of every change from now on.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

/// The own workload's side, as pushed; until then as configured.
#[derive(Debug, Default)]
pub struct InboundPolicy {
    /// Whether plaintext may come in.
    pub mode: Mtls,
    /// The workload is about to end: send GOAWAY now.
    pub terminating: bool,
    /// What the workload's ports speak, where somebody said so. Configured opaque ports are `Tcp` here.
    pub ports: BTreeMap<u16, Protocol>,
    /// Who may call; `None`: nobody has said anything, all that `mode` lets in may.
    pub access: Option<Access>,
    /// How often.
    pub limits: Limits,
    /// How much at once.
    pub concurrency: Vec<Arc<Concurrency>>,
    /// The zone that the workload is in: as configured, else as the controller knows it. Empty: unknown.
    pub zone: String,
    /// Whether the controller has spoken. Until then nobody may call: there may be a policy that refuses them.
    pub is_told: bool,
    /// Tells this policy from the one before.
    pub epoch: u64,
    /// What it was made of.
    wire: v1::Inbound,
}

impl Context {
    /// The context of a configuration, with the roots of `bundle`. The receiver is for the control thread.
    pub fn new(config: Config, bundle: TrustBundle) -> (Self, mpsc::Receiver<Ask>) {
        let (directory, asks) = Directory::new(&config);
        let inbound = Inbound::new(InboundPolicy::from_config(&config));
        let credentials = Credentials::new(bundle);
        let (metrics, control) = (Metrics::default(), ControlMetrics::default());
        let lives = Lives::default();
        metrics.register(|registry| control.register(registry));
        metrics.register(|registry| registry.register_collector(Box::new(lives.clone())));
        let (drain, ready) = (Drain::default(), Readiness::default());
        (
            Self {
                config,
                directory,
                credentials,
                inbound,
                metrics,
                control,
                lives,
                checks_health: AtomicBool::new(false),
                drain,
                ready,
            },
            asks,
        )
    }

    /// The context of a configuration, with the roots in its `trust_bundle` file.
    ///
    /// # Errors
    /// If the file cannot be read or holds no roots.
    pub fn from_config(config: Config) -> anyhow::Result<(Self, mpsc::Receiver<Ask>)> {
        let bundle = roots(&config)?;
        Ok(Self::new(config, bundle))
    }
}

/// The roots in the `trust_bundle` file.
pub(crate) fn roots(config: &Config) -> anyhow::Result<TrustBundle> {
    let path = config.trust_bundle.display();
    let pem = mounted::read(&config.trust_bundle, MAX_BUNDLE_BYTES).with_context(|| {
        format!(
            "cannot read the trust bundle {path}: give the roots of the mesh in `trust_bundle` (the controller has them in \
             its data directory)"
        )
    })?;
    let domain = config.trust_domain.parse().context("trust_domain")?;
    TrustBundle::from_pem(domain, &pem, 0).with_context(|| format!("cannot use the trust bundle {path}"))
}

impl InboundPolicy {
    /// What holds until the controller has spoken.
    pub fn from_config(config: &Config) -> Self {
        let ports = config.opaque_ports.iter().map(|port| (*port, Protocol::Tcp)).collect();
        Self { mode: config.mtls, ports, zone: config.zone.clone(), ..Self::default() }
    }

    /// What the controller said; hints that the configuration gives stay above the controller's. `old` holds now: limits that are
    /// the same in both go on counting. `Ok(None)`: nothing has changed.
    ///
    /// # Errors
    /// On what cannot be enforced as it stands; the text says what it is.
    pub fn from_wire(wire: v1::Inbound, config: &Config, old: &Self) -> Result<Option<Self>, String> {
        if old.is_told && old.wire == wire {
            return Ok(None);
        }
        let mut policy = Self::from_config(config);
        policy.mode = match wire.mode() {
            v1::inbound::Mode::Unspecified => config.mtls,
            v1::inbound::Mode::Strict => Mtls::Strict,
            v1::inbound::Mode::Permissive => Mtls::Permissive,
        };
        policy.terminating = wire.terminating;
        if policy.zone.is_empty() {
            policy.zone = wire.locality.as_ref().map(|locality| locality.zone.clone()).unwrap_or_default();
        }
        for claim in &wire.claims {
            let protocol = Protocol::from_wire(claim.protocol());
            if let Ok(port) = u16::try_from(claim.port)
                && protocol != Protocol::Detect
            {
                policy.ports.entry(port).or_insert(protocol);
            }
        }
        if let Some(access) = &wire.access {
            policy.access = Some(Access::from_wire(access)?);
            let slashes = EscapedSlashes::from_wire(access.escaped_slashes());
            policy.limits = Limits::from_wire(&access.policies, slashes, Instant::now())?.adopt(&old.limits);
        }
        for bound in &wire.concurrency {
            let known = old.wire.concurrency.iter().position(|other| other.ports == bound.ports);
            let bound = Concurrency::from_wire(bound, Instant::now())?;
            policy.concurrency.push(match known.and_then(|at| old.concurrency.get(at)) {
                Some(known) => bound.adopt(known),
                None => Arc::new(bound),
            });
        }
        policy.is_told = true;
        policy.wire = wire;
        Ok(Some(policy))
    }

    /// What `port` of the workload speaks.
    pub fn protocol(&self, port: u16) -> Protocol {
        self.ports.get(&port).copied().unwrap_or_default()
    }
}
