//! HTTP/1.1 connections in clear: to the own application, and to endpoints without a sidecar.
//!
//! The classic race of such pools is an application that closes an idle connection just when a request goes out on
//! it. Two things bear on it: connections are kept for less time than applications keep them, and a request that died
//! on a *reused* connection before any byte of an answer is sent once more on a new one, if that is safe.

use std::{
    cell::RefCell,
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use outrigger_core::bulkhead::Place;

use super::{
    Worker,
    exchanges::Key,
    h1::{H1, Side},
    line::Line,
    pool::PoolKey,
    tls::{self, Whom},
    wire::Wire,
};
use crate::metrics::Direction;

/// Idle connections are kept this long: less than the 5 s that Node.js, the shortest of the common servers, keeps
/// them.
const IDLE: Duration = Duration::from_secs(3);

/// Idle connections to one address: a busy service has so many requests at once, and whoever closes what the next burst needs
/// dials for it again.
const MAX_IDLE: usize = 1024;

/// Idle connections of one thread.
#[derive(Default)]
pub(crate) struct Apps(RefCell<HashMap<SocketAddr, Vec<Rc<H1>>>>);

impl Apps {
    /// A connection that has served before.
    pub(super) fn take(&self, address: SocketAddr) -> Option<Rc<H1>> {
        let mut idle = self.0.borrow_mut();
        let connections = idle.get_mut(&address)?;
        // The youngest first: the others may then grow old enough to be closed.
        while let Some(connection) = connections.pop() {
            if connection.is_usable() {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps a connection for the next request.
    pub(super) fn give(&self, address: SocketAddr, connection: Rc<H1>) {
        let mut idle = self.0.borrow_mut();
        let connections = idle.entry(address).or_default();
        if connections.len() < MAX_IDLE {
            connections.push(connection);
        } else {
            connection.drop_now();
        }
    }

    /// Makes a connection for an exchange, which is told. `place`: that it takes among its service's connections, for which others
    /// may wait in the line.
    pub(super) fn connect(
        worker: &Rc<Worker>,
        address: SocketAddr,
        direction: Direction,
        place: Option<(Place, Rc<Line>)>,
        key: Key,
    ) {
        let worker_of_task = worker.clone();
        worker.spawn(async move {
            let worker = worker_of_task;
            let whom = match direction {
                Direction::Inbound => Whom::Application,
                Direction::Outbound => Whom::Outside,
            };
            let connection = match Box::pin(tls::dial(&worker.ctx, address, whom)).await {
                Ok(tcp) => {
                    let line = place.as_ref().filter(|(place, _)| place.is_bounded());
                    let line = line.map(|(_, line)| line.clone());
                    let place = place.map(|(place, _)| place);
                    let open = worker.ctx.metrics.connection(direction, "plain_h1").holding(place);
                    let side = Side::Application { address, line, _open: open };
                    H1::new(&worker, Wire::plain(tcp, Vec::new()), side)
                }
                Err(error) => {
                    let target = PoolKey::Plain(address);
                    return worker.with(key, |exchange, worker| {
                        exchange.connected(worker, key, &target, Err(&error));
                    });
                }
            };
            let made = connection.clone();
            worker.spawn(connection.run(worker.clone()));
            let mut wanted = false;
            worker.with(key, |exchange, worker| {
                wanted = exchange.connected_h1(worker, key, address, &made);
            });
            if wanted {
                return;
            }
            if made.is_wanted_elsewhere() {
                made.drop_now();
            } else {
                worker.apps.give(address, made);
            }
        });
    }

    /// Closes one of a service's idle connections, if there is one: its place is wanted.
    pub(super) fn let_one_go(&self, line: &Rc<Line>) {
        for connections in self.0.borrow_mut().values_mut() {
            if let Some(at) = connections.iter().position(|connection| connection.is_of(line)) {
                connections.swap_remove(at).drop_now();
                return;
            }
        }
    }

    /// Closes what is too old, and what holds a place that others wait for. Called about once a second.
    pub(super) fn sweep(&self, now: Instant) {
        self.0.borrow_mut().retain(|_, connections| {
            connections.retain(|connection| {
                let young = now.saturating_duration_since(connection.idle_since()) < IDLE;
                let stays = young && !connection.is_wanted();
                if !stays {
                    connection.drop_now();
                }
                stays && connection.is_usable()
            });
            !connections.is_empty()
        });
    }
}
