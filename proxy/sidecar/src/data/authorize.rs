//! Who may call the own workload, and how much of it at once: authorize -> limit, before anything reaches the application.
//!
//! One place decides, for requests and for connections of bytes, by `outrigger_core`'s word and by the policy that holds now.
//! What was decided on is what goes on: where rules look at paths, the request has the normalised one from here on (reliability
//! B4). A policy that changes judges what is under way again ([`Entry::still_admits`]).

use std::{borrow::Cow, time::Instant};

use outrigger_certs::SpiffeId;
use outrigger_core::{
    access::{By, Caller},
    concurrency::Permit,
    limit::{OpenConnection, Refused, Standing},
    path,
    reason::Reason,
    request::View,
};
use outrigger_http::head::RequestHead;

use super::{
    Worker,
    inbound::Entry,
    reasons::{Refusal, asked_for},
    view::Seen,
};
use crate::{config::Mtls, context::InboundPolicy};

/// What a request was let in with, until it is over.
pub(super) struct Admission {
    /// By which policy it was judged.
    pub(super) epoch: u64,
    permit: Option<Permit>,
    /// What the caller is told of its rate.
    pub(super) standing: Option<Standing>,
    /// When the application has answered, and whether well.
    answered: Option<(Instant, bool)>,
}

impl Admission {
    /// The application has answered: what an adaptive bound learns from.
    pub(super) fn answered(&mut self, well: bool) {
        self.answered = Some((Instant::now(), well));
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if let (Some(permit), Some((at, well))) = (self.permit.take(), self.answered) {
            permit.done(at, well);
        }
    }
}

fn path_refused(fault: path::Fault) -> Refusal {
    Refusal::new(Reason::BadRequest, format!("the path is refused: {fault}"))
}

impl Entry {
    /// Judges a request, and takes it into account. Its path is the one that was judged from here on.
    /// `now`: when it came.
    pub(super) fn admit(
        &self,
        worker: &Worker,
        head: &mut RequestHead,
        now: Instant,
    ) -> Result<Admission, Refusal> {
        let policy = worker.ctx.inbound.load();
        self.knows(&policy)?;
        let is_in_form = self.normalise(&policy, head)?;
        let is_probe = self.judge(worker, &policy, Some(head), is_in_form)?;
        let mut admission = Admission { epoch: policy.epoch, permit: None, standing: None, answered: None };
        if is_probe {
            return Ok(admission);
        }
        let seen = Seen(head);
        match policy.limits.check(&self.caller(), self.port(), &seen, seen.path(), now) {
            Ok(passed) => {
                count_limits(worker, &passed.audits, "would_refuse");
                admission.standing = passed.standing;
            }
            Err(limited) => {
                count_limits(worker, std::slice::from_ref(&limited), "refused");
                let text = self.explained(|| {
                    format!(
                        "AccessPolicy {}, {} allows no more on port {} for now; ask again in {} s",
                        limited.policy,
                        limited.limit,
                        self.port(),
                        limited.retry_after_seconds()
                    )
                });
                return Err(Refusal::new(Reason::RateLimited, text).limited(limited));
            }
        }
        if let Some(bound) = policy.concurrency.iter().find(|bound| bound.is_about(self.port())) {
            let Some(permit) = bound.enter(now) else {
                let text = self.explained(|| {
                    format!(
                        "as many requests are under way on port {} as {} allows",
                        self.port(),
                        bound.origin()
                    )
                });
                return Err(Refusal::new(Reason::LimitReached, text));
            };
            admission.permit = Some(permit);
        }
        Ok(admission)
    }

    /// Judges a connection of bytes.
    pub(super) fn admit_bytes(&self, worker: &Worker) -> Result<(), Refusal> {
        let policy = worker.ctx.inbound.load();
        self.knows(&policy)?;
        self.judge(worker, &policy, None, false).map(drop)
    }

    /// Counts a connection against its caller's bounds, for as long as the permit lives.
    pub(super) fn admit_connection(&self, worker: &Worker) -> Result<OpenConnection, Refusal> {
        let policy = worker.ctx.inbound.load();
        match policy.limits.connect(&self.caller(), self.port()) {
            Ok((open, audits)) => {
                count_limits(worker, &audits, "would_refuse");
                Ok(open)
            }
            Err(limited) => {
                count_limits(worker, std::slice::from_ref(&limited), "refused");
                let text = self.explained(|| {
                    let (policy, limit) = (&limited.policy, &limited.limit);
                    format!(
                        "as many connections to port {} as AccessPolicy {policy}, {limit} allows",
                        self.port()
                    )
                });
                Err(Refusal::new(Reason::LimitReached, text))
            }
        }
    }

    /// Whether what was let in under another policy may go on. `head`: of the request; `None`: a connection of bytes.
    pub(super) fn still_admits(&self, worker: &Worker, head: Option<&RequestHead>) -> Result<u64, Refusal> {
        let policy = worker.ctx.inbound.load();
        self.judge(worker, &policy, head, false).map(|_| policy.epoch)
    }

    /// Whether a caller without mutual TLS has a chance where the mode is `Strict`: only probes do.
    pub(super) fn may_be_probe(&self, worker: &Worker) -> bool {
        let policy = worker.ctx.inbound.load();
        policy.access.as_ref().is_some_and(|access| access.has_probes(self.port()))
    }

    fn knows(&self, policy: &InboundPolicy) -> Result<(), Refusal> {
        if policy.is_told {
            return Ok(());
        }
        let text = self.explained(|| "the controller has not said yet who may call".to_owned());
        Err(Refusal::new(Reason::DiscoveryUnavailable, text))
    }

    /// `is_in_form`: the head's path is known to be. Returns whether it is a probe.
    fn judge(
        &self,
        worker: &Worker,
        policy: &InboundPolicy,
        head: Option<&RequestHead>,
        is_in_form: bool,
    ) -> Result<bool, Refusal> {
        let strict = policy.mode == Mtls::Strict && self.peer().is_none();
        let Some(access) = &policy.access else {
            return if strict { Err(self.plaintext_refused()) } else { Ok(false) };
        };
        let caller = self.caller();
        let verdict = match head {
            Some(head) => {
                let seen = Seen(head);
                let judged = if is_in_form {
                    Cow::Borrowed(seen.path())
                } else {
                    let limits_decide = policy.limits.decides_on_paths(self.port());
                    access.judged(self.port(), seen.path(), limits_decide).map_err(path_refused)?
                };
                access.request(&caller, self.port(), &seen, &judged)
            }
            None => access.connection(&caller, self.port()),
        };
        let is_probe = matches!(verdict.by, By::Probe);
        if strict && !is_probe {
            return Err(self.plaintext_refused());
        }
        worker.decisions.borrow_mut().count(&worker.ctx.metrics, policy.epoch, access, &verdict);
        if verdict.allowed {
            return Ok(is_probe);
        }
        let text = self.explained(|| format!("{}, by {}", self.what(head), verdict.by));
        Err(Refusal::new(Reason::AccessDenied, text))
    }

    /// Brings the path into its one form where rules in force look at it. Returns whether it was.
    fn normalise(&self, policy: &InboundPolicy, head: &mut RequestHead) -> Result<bool, Refusal> {
        let Some(access) = &policy.access else { return Ok(false) };
        if !access.decides_on_paths(self.port()) && !policy.limits.decides_on_paths(self.port()) {
            return Ok(false);
        }
        let Some(target) = head.path() else { return Ok(true) };
        let changed = match path::normalise(target, access.escaped_slashes()) {
            Ok(Cow::Borrowed(_)) => return Ok(true),
            Ok(Cow::Owned(changed)) => changed,
            Err(fault) => return Err(path_refused(fault)),
        };
        head.set_path(Some(&changed));
        Ok(true)
    }

    pub(super) fn plaintext_refused(&self) -> Refusal {
        let text =
            format!("port {} takes mutual TLS only; {} sent none", self.port(), self.source().to_canonical());
        Refusal::new(Reason::PlaintextRefused, text)
    }

    fn caller(&self) -> Caller<'_> {
        let peer = self.peer();
        Caller {
            identity: peer.map(SpiffeId::as_str),
            namespace: peer.map(SpiffeId::namespace),
            source: self.source(),
        }
    }

    /// What is said of a refusal: callers without an identity learn its code only.
    fn explained(&self, text: impl FnOnce() -> String) -> String {
        if self.peer().is_some() { text() } else { String::new() }
    }

    fn what(&self, head: Option<&RequestHead>) -> String {
        let who = self.peer().map_or("somebody", SpiffeId::as_str);
        match head {
            Some(head) => format!("{who} may not {} on port {}", asked_for(head), self.port()),
            None => format!("{who} may not connect to port {}", self.port()),
        }
    }
}

fn count_limits(worker: &Worker, refused: &[Refused], outcome: &'static str) {
    for limited in refused {
        worker.ctx.metrics.limited(&limited.policy, &limited.limit, outcome);
    }
}
