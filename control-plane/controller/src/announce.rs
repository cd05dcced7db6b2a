//! `Workloads/Announce`: what a sidecar says of the workload beside it, and what becomes of each claim.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use outrigger_api::v1::workloads_server::Workloads;
use outrigger_api::v1::{Announcement, AnnouncementStatus};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::mesh::{Mesh, Viewer};
use crate::metrics::{Metrics, ReasonLabel};
use crate::server::Caller;

/// A claim that is refused for a reason that may pass (another stream holds it, a token was not used yet) is judged
/// again this often.
const REJUDGE: Duration = Duration::from_secs(5);
/// One answer waits for its reader. A sidecar that does not read its answers has its stream closed.
const ANSWERS: usize = 4;

/// The service.
#[derive(Debug)]
pub(crate) struct Announce {
    mesh: Arc<Mesh>,
    metrics: Arc<Metrics>,
    next_stream: AtomicU64,
    stop: CancellationToken,
}

impl Announce {
    /// Judges claims with `mesh`, until `stop`.
    pub(crate) fn new(mesh: Arc<Mesh>, metrics: Arc<Metrics>, stop: CancellationToken) -> Self {
        Self { mesh, metrics, next_stream: AtomicU64::new(0), stop }
    }
}

#[tonic::async_trait]
impl Workloads for Announce {
    type AnnounceStream = ReceiverStream<Result<AnnouncementStatus, Status>>;

    async fn announce(
        &self,
        request: Request<Streaming<Announcement>>,
    ) -> Result<Response<Self::AnnounceStream>, Status> {
        let (viewer, expires) = Caller::of(&request)?.workload("announcing")?;
        let (answers, receiver) = mpsc::channel(ANSWERS);
        let announcer = Announcer {
            mesh: Arc::clone(&self.mesh),
            metrics: Arc::clone(&self.metrics),
            stream: self.next_stream.fetch_add(1, Ordering::Relaxed),
            viewer,
            answers,
            audited: BTreeSet::new(),
        };
        tokio::spawn(announcer.run(request.into_inner(), expires, self.stop.clone()));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

struct Announcer {
    mesh: Arc<Mesh>,
    metrics: Arc<Metrics>,
    stream: u64,
    viewer: Viewer,
    answers: mpsc::Sender<Result<AnnouncementStatus, Status>>,
    /// Refusals that were written down: a claim judged again and again is one event.
    audited: BTreeSet<(String, String, u32, &'static str)>,
}

impl Announcer {
    async fn run(
        mut self,
        mut announcements: Streaming<Announcement>,
        expires: Instant,
        stop: CancellationToken,
    ) {
        self.metrics.announcers.inc();
        let mut last: Option<Announcement> = None;
        let mut said = AnnouncementStatus::default();
        let mut rejudge = false;
        let end = loop {
            let new = tokio::select! {
                message = announcements.message() => match message {
                    Ok(Some(announcement)) => {
                        last = Some(announcement);
                        true
                    }
                    Ok(None) | Err(_) => break None,
                },
                () = tokio::time::sleep(REJUDGE), if rejudge => false,
                () = self.answers.closed() => break None,
                () = stop.cancelled() => break Some(Status::unavailable("the controller is stopping; reconnect")),
                () = tokio::time::sleep_until(expires) => {
                    break Some(Status::unauthenticated("the leaf of this connection has expired; reconnect with its successor"));
                }
            };
            let Some(announcement) = &last else { continue };
            let (status, refused) = self.judge(&announcement.clone());
            rejudge = refused;
            if new || status != said {
                said = status.clone();
                if self.answers.try_send(Ok(status)).is_err() {
                    break None;
                }
            }
        };
        if let Some(status) = end {
            // No sidecar left to tell is fine.
            let _ = self.answers.try_send(Err(status));
        }
        self.mesh.announcer_left(self.stream, &self.viewer);
        self.metrics.announcers.dec();
    }

    fn judge(&mut self, announcement: &Announcement) -> (AnnouncementStatus, bool) {
        let outcomes = self.mesh.announce(self.stream, &self.viewer, announcement, SystemTime::now());
        let mut refused = BTreeSet::new();
        for outcome in &outcomes {
            let Err(reason) = outcome.verdict else { continue };
            let status = &outcome.status;
            let event = (status.service.clone(), status.address.clone(), status.port, reason);
            if !self.audited.contains(&event) {
                self.metrics.claims_refused.get_or_create(&ReasonLabel::new(reason)).inc();
                let short = |text: &str| text.escape_debug().take(300).collect::<String>();
                tracing::warn!(target: "audit", identity = %self.viewer.identity, peer = %self.viewer.address,
                    service = short(&status.service), address = short(&status.address), port = status.port, reason,
                    "claim refused");
            }
            refused.insert(event);
        }
        let any = !refused.is_empty();
        self.audited = refused;
        (AnnouncementStatus { claims: outcomes.into_iter().map(|outcome| outcome.status).collect() }, any)
    }
}
