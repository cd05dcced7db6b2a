//! Active health checks: endpoints are asked whether they are well, where a policy says so.
//!
//! One thread of the proxy asks, and only the endpoints that the proxy uses; what it finds out all threads know
//! ([`outrigger_core::live::Live`]). An endpoint that fails its checks is one that its source calls unhealthy: it is asked when nothing
//! else is left. What calls say of it (breakers) is another matter, and neither is told of the other.

use std::{
    collections::HashMap,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use outrigger_core::{model::Service, traffic::HealthCheck};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use super::{Worker, balance::Route, outbound};
use crate::discovery::directory::{ServiceHandle, Target};

/// How often it is looked whose check is due: the least interval that makes sense.
const TICK: Duration = Duration::from_millis(100);

/// What is known of one endpoint.
#[derive(Debug, Clone, Copy)]
struct Checked {
    due: Instant,
    is_well: bool,
    /// Checks in a row that say the opposite.
    against: u32,
    is_under_way: bool,
}

/// By service and endpoint.
type Book = HashMap<(Arc<str>, Arc<str>), Checked>;

impl Worker {
    /// Asks, for ever; on one thread of the proxy only.
    pub(super) async fn health_checks(self: Rc<Self>) {
        if self.ctx.checks_health.swap(true, Ordering::Relaxed) {
            return std::future::pending().await;
        }
        let book = Rc::new(std::cell::RefCell::new(Book::new()));
        loop {
            sleep(TICK).await;
            let services = self.ctx.directory.services();
            let checked = services.iter().filter_map(|handle| {
                let service = handle.load();
                let check = service.traffic.as_ref()?.health_check.clone()?;
                Some((handle, service, check))
            });
            let mut current = Vec::new();
            for (handle, service, check) in checked {
                self.check_service(&book, handle, &service, &check, &mut current);
            }
            // Whoever left comes back unchecked.
            book.borrow_mut().retain(|key, _| current.contains(key));
        }
    }

    fn check_service(
        self: &Rc<Self>,
        book: &Rc<std::cell::RefCell<Book>>,
        handle: &ServiceHandle,
        service: &Arc<Service>,
        check: &HealthCheck,
        current: &mut Vec<(Arc<str>, Arc<str>)>,
    ) {
        let port = service.ports.keys().copied().next().unwrap_or(0);
        let now = Instant::now();
        for endpoint in self.service(handle.name()).used(service, port) {
            let key = (service.name.clone(), endpoint);
            current.push(key.clone());
            let mut all = book.borrow_mut();
            let known = all.entry(key.clone()).or_insert_with(|| Checked {
                // The first ones are spread over the interval.
                due: now + check.interval.mul_f64(self.rng.borrow_mut().f64()),
                is_well: true,
                against: 0,
                is_under_way: false,
            });
            if known.is_under_way || now < known.due {
                continue;
            }
            known.is_under_way = true;
            known.due = now + check.interval.mul_f64(0.9 + self.rng.borrow_mut().f64() / 5.0);
            let target = Target { service: handle.clone(), port, endpoint: Some(key.1.clone()) };
            let route = Rc::new(Route::new(self.clone(), target, None));
            let (worker, book, check) = (self.clone(), book.clone(), check.clone());
            self.spawn(async move {
                let answer =
                    timeout(check.timeout, ask(&worker, &route, &check)).await.unwrap_or(Some(false));
                if let Some(known) = book.borrow_mut().get_mut(&key) {
                    known.is_under_way = false;
                    if let Some(answer) = answer {
                        known.learn(answer, &check);
                        worker.ctx.lives.of(&key.0).checked(&key.1, known.is_well);
                    }
                }
            });
        }
    }
}

impl Checked {
    fn learn(&mut self, answer: bool, check: &HealthCheck) {
        if answer == self.is_well {
            self.against = 0;
            return;
        }
        self.against += 1;
        if self.against >= if answer { check.healthy } else { check.unhealthy } {
            (self.is_well, self.against) = (answer, 0);
        }
    }
}

/// `None`: there was no way to ask, as where a bulkhead has no place left; then who calls finds out what is to be known.
async fn ask(worker: &Rc<Worker>, route: &Rc<Route>, check: &HealthCheck) -> Option<bool> {
    let Some(path) = &check.path else { return outbound::reaches(route).await };
    let (answer, answered) = oneshot::channel();
    let key = worker.begin(|exchange, worker, key| exchange.check(worker, key, route, path, answer));
    // Dropped before there was an answer, it ends.
    let _ends = worker.ends_with(key);
    answered.await.unwrap_or(Some(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_changes_its_side_after_so_many_checks_in_a_row() {
        let check = HealthCheck {
            path: None,
            interval: TICK,
            timeout: TICK,
            healthy: 2,
            unhealthy: 3,
            origin: "".into(),
        };
        let mut known = Checked { due: Instant::now(), is_well: true, against: 0, is_under_way: false };
        let sides: Vec<bool> = [false, false, true, false, false, false, true, false, true, true]
            .into_iter()
            .map(|answer| {
                known.learn(answer, &check);
                known.is_well
            })
            .collect();
        assert_eq!(sides, [true, true, true, true, true, false, false, false, false, true]);
    }
}
