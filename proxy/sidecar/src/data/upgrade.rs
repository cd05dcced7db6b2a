//! After a switch of protocols: two hyper upgrades, and bytes between them.
//!
//! Both sides become available only once their answers are on the way, so the tunnel is a task of its own.

use std::{any::Any, rc::Rc};

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

use super::{
    Worker,
    relay::{Ended, relay},
};
use crate::{
    drain::Side,
    metrics::{Direction, Edge},
};

/// Joins the two sides of a tunnel. `held` is kept as long as it lives.
pub(crate) fn tunnel(
    worker: &Rc<Worker>,
    direction: Direction,
    downstream: OnUpgrade,
    upstream: OnUpgrade,
    edge: Rc<Edge>,
    held: impl Any,
) {
    let side = match direction {
        Direction::Inbound => Side::Inbound,
        Direction::Outbound => Side::Outbound,
    };
    let work = worker.ctx.drain.work(side);
    let open = worker.ctx.metrics.connection(direction, "tunnel");
    let idle = worker.ctx.config.timeouts.idle.enabled();
    worker.spawn(async move {
        let _held = (held, work, open);
        let (downstream, upstream) = match tokio::try_join!(downstream, upstream) {
            Ok(sides) => sides,
            Err(error) => {
                tracing::debug!(%error, "a switch of protocols was not completed");
                return;
            }
        };
        let (mut downstream, mut upstream) = (TokioIo::new(downstream), TokioIo::new(upstream));
        let (ended, relayed) = relay(&mut downstream, &mut upstream, idle).await;
        edge.sent.inc_by(relayed.forth);
        edge.received.inc_by(relayed.back);
        if ended != Ended::Closed {
            tracing::debug!(?ended, "a tunnel broke");
        }
    });
}
