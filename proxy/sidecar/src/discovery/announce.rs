//! Saying what the workload beside us serves, and that it is leaving.

use std::{sync::Arc, time::Duration};

use outrigger_api::v1::{
    Announcement, AnnouncementStatus, Claim, ClaimStatus, workloads_client::WorkloadsClient,
};
use tokio::{sync::mpsc, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::Discovery;
use crate::{certificates::backoff, context::Context, drain::Phase};

const SLOWEST_RETRY: Duration = Duration::from_secs(15);

/// Keeps the announcement standing on `channel`. The caller ends it with the connection.
pub(super) async fn run(discovery: Discovery, channel: Channel) {
    let ctx = discovery.ctx.clone();
    if ctx.config.services.is_empty() {
        return;
    }
    let mut failures = 0;
    loop {
        let status = stream(&discovery, &ctx, channel.clone()).await;
        failures += 1;
        if failures == 1 {
            tracing::warn!("the announcement of our services ended: {}: {}", status.code(), status.message());
        }
        sleep(backoff(failures, SLOWEST_RETRY)).await;
    }
}

async fn stream(discovery: &Discovery, ctx: &Arc<Context>, channel: Channel) -> tonic::Status {
    // Two announcements at most: that we are here, and that we leave.
    let (announcements, outgoing) = mpsc::channel(2);
    let draining = ctx.drain.phase() > Phase::Serving;
    let _ = announcements.send(announcement(ctx, draining)).await;
    let mut client = WorkloadsClient::new(channel);
    let mut statuses = match client.announce(ReceiverStream::new(outgoing)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status,
    };
    let leaving = ctx.drain.reached(Phase::Inbound);
    tokio::pin!(leaving);
    let mut said = draining;
    loop {
        tokio::select! {
            status = statuses.message() => match status {
                Ok(Some(status)) => record(discovery, ctx, status),
                Ok(None) => return tonic::Status::unavailable("the controller ended it"),
                Err(status) => return status,
            },
            () = &mut leaving, if !said => {
                said = true;
                let _ = announcements.send(announcement(ctx, true)).await;
                tracing::info!("told the controller that this workload is leaving");
            }
        }
    }
}

fn announcement(ctx: &Context, draining: bool) -> Announcement {
    let claims = ctx
        .config
        .services
        .iter()
        .map(|claim| Claim {
            service: claim.service.clone(),
            address: claim.address.map(|address| address.to_string()).unwrap_or_default(),
            port: claim.port.into(),
        })
        .collect();
    Announcement { claims, draining }
}

fn record(discovery: &Discovery, ctx: &Context, status: AnnouncementStatus) {
    // As many answers as claims were made; a controller that says more is not believed.
    let mut claims = status.claims;
    claims.truncate(ctx.config.services.len());
    let mut book = discovery.book();
    for claim in &claims {
        if !book.claims.contains(claim) {
            log(claim);
        }
    }
    ctx.control.set_claims_refused(claims.iter().filter(|claim| !claim.accepted).count());
    book.claims = claims;
}

fn log(claim: &ClaimStatus) {
    let ClaimStatus { service, address, port, message, .. } = claim;
    if claim.accepted {
        tracing::info!(service, address, port, "the controller accepts our claim");
    } else {
        tracing::error!(
            service,
            address,
            port,
            "the controller refuses our claim, so this workload gets no traffic for it: {message}"
        );
    }
}
