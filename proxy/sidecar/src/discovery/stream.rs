//! The stream to the controller: connect, say what is wanted and held, take pushes, come back when it breaks.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use outrigger_api::discovery::{
    DeltaDiscoveryRequest, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use tokio::{
    sync::{Notify, mpsc},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;

use super::{announce, book::Book, directory::Ask};
use crate::{
    certificates::backoff,
    context::Context,
    controller::{self, Auth},
};

/// Requests on their way to the controller. What waits longer is merged in the book.
const OUTGOING: usize = 16;
/// A controller that does not take a request, or does not open the stream, in this time is given up.
const PATIENCE: Duration = Duration::from_secs(10);
/// One push. A service with 50,000 endpoints takes about 10 MiB.
const MAX_PUSH_BYTES: usize = 16 * 1024 * 1024;

/// Before the first attempt after a controller closed the stream in good order, at most.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// Discovery, as the tasks of the control thread share it.
#[derive(Clone)]
pub struct Discovery {
    pub(super) ctx: Arc<Context>,
    book: Arc<Mutex<Book>>,
    /// The book has something to say.
    unsaid: Arc<Notify>,
}

impl Discovery {
    /// Discovery that knows nothing yet.
    pub fn new(ctx: Arc<Context>) -> Self {
        let book = Arc::new(Mutex::new(Book::new(ctx.clone())));
        Self { ctx, book, unsaid: Arc::default() }
    }

    pub(crate) fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers the workers for as long as the proxy runs, with or without a controller.
    pub async fn answer(self, mut asks: mpsc::Receiver<Ask>) {
        let mut ticks = interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                ask = asks.recv() => match ask {
                    Some(ask) => self.book().ask(ask),
                    None => return,
                },
                _ = ticks.tick() => self.book().tick(),
            }
            self.unsaid.notify_one();
        }
    }

    /// Keeps a stream to the controller for as long as the proxy runs. There must be a leaf.
    pub async fn follow(self) {
        let mut failures = 0;
        loop {
            let mut heard = false;
            let result = self.session(&mut heard).await;
            self.book().disconnected();
            failures = if heard { 1 } else { failures + 1 };
            let slowest = result.as_ref().err().map_or(FIRST_RETRY, controller::slowest_retry);
            let delay = backoff(failures, slowest);
            match result {
                Ok(()) => tracing::info!(retry_in = ?delay, "the controller closed the stream"),
                Err(error) if failures.is_power_of_two() => {
                    tracing::warn!(failures, retry_in = ?delay, "no stream to the controller: {error:#}");
                }
                Err(error) => tracing::debug!(failures, "no stream to the controller: {error:#}"),
            }
            sleep(delay).await;
        }
    }

    async fn session(&self, heard: &mut bool) -> anyhow::Result<()> {
        let own = self.ctx.credentials.leaf().context("there is no certificate")?.id().clone();
        let channel = controller::connect(&self.ctx, Auth::Leaf).await?;
        let (requests, outgoing) = mpsc::channel(OUTGOING);
        let mut client =
            AggregatedDiscoveryServiceClient::new(channel.clone()).max_decoding_message_size(MAX_PUSH_BYTES);
        for request in self.book().connected(&own) {
            requests
                .try_send(request)
                .map_err(|_| anyhow!("more resource types than places in the queue"))?;
        }
        let opening = client.delta_aggregated_resources(ReceiverStream::new(outgoing));
        let mut pushes = timeout(PATIENCE, opening)
            .await
            .map_err(|_| anyhow!("the controller did not open the stream within {PATIENCE:?}"))?
            .map_err(|status| refused(&status))?
            .into_inner();
        tracing::info!(identity = %own, "connected to the controller");
        let _announcing = AbortOnDropHandle::new(tokio::spawn(announce::run(self.clone(), channel)));
        loop {
            tokio::select! {
                push = pushes.message() => {
                    let Some(push) = push.map_err(|status| refused(&status))? else { return Ok(()) };
                    *heard = true;
                    let answer = self.book().response(push);
                    say(&requests, [answer]).await?;
                }
                () = self.unsaid.notified() => {}
            }
            let unsaid = self.book().unsaid();
            say(&requests, unsaid).await?;
        }
    }
}

fn refused(status: &tonic::Status) -> anyhow::Error {
    anyhow!("{}: {}", status.code(), status.message())
}

async fn say(
    to: &mpsc::Sender<DeltaDiscoveryRequest>,
    requests: impl IntoIterator<Item = DeltaDiscoveryRequest>,
) -> anyhow::Result<()> {
    for request in requests {
        match timeout(PATIENCE, to.send(request)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => bail!("the stream ended"),
            Err(_) => bail!("the controller does not read"),
        }
    }
    Ok(())
}
