//! An HTTP/2 application that answers every request with the bytes that a test gives it, and serves HTTP/1.1 well, so
//! that the well-behaved client has somewhere to go.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{frames::*, support::*};

/// What it does about a request on a stream.
#[derive(Clone)]
pub(crate) enum Act {
    /// Sends these bytes.
    Say(Vec<u8>),
    /// Sends the first once, then the second again and again, so many times at most.
    Flood(Vec<u8>, Vec<u8>, usize),
}

type Plan = Arc<dyn Fn(u32) -> Act + Send + Sync>;

pub(crate) struct Evil {
    pub(crate) address: SocketAddr,
    plan: Arc<Mutex<Plan>>,
    /// HTTP/2 connections so far.
    pub(crate) connections: Arc<AtomicUsize>,
    /// Requests so far.
    pub(crate) requests: Arc<AtomicUsize>,
    /// The error codes with which it was told to stop, or to go.
    pub(crate) told: Arc<Mutex<Vec<u32>>>,
}

impl Evil {
    /// One that behaves well until [`Evil::plans`].
    pub(crate) async fn new() -> Self {
        let plan: Arc<Mutex<Plan>> = Arc::new(Mutex::new(Arc::new(|stream| Act::Say(ok(stream)))));
        let (connections, requests) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let told = Arc::<Mutex<Vec<u32>>>::default();
        let shared = (plan.clone(), requests.clone(), told.clone());
        let count = connections.clone();
        let address = http2_server(&[], move |mut peer, _| {
            let (plan, requests, told) = shared.clone();
            count.fetch_add(1, Ordering::SeqCst);
            async move {
                for at in 0.. {
                    let Some(stream) = peer.request(at).await else { break };
                    requests.fetch_add(1, Ordering::SeqCst);
                    let act = plan.lock().unwrap().clone()(stream);
                    let sent = match act {
                        Act::Say(bytes) => peer.send(&bytes).await,
                        Act::Flood(first, again, times) => {
                            peer.send(&first).await;
                            peer.flood(times, |_| again.clone()).await
                        }
                    };
                    told.lock().unwrap().extend(peer.look(|log| log.reset(stream)));
                    // A frame of which a part is sent cannot be taken back.
                    if sent != Sent::Yes {
                        break;
                    }
                }
                told.lock().unwrap().extend(peer.look(Log::goaway));
            }
        })
        .await;
        Self { address, plan, connections, requests, told }
    }

    pub(crate) fn plans(&self, plan: impl Fn(u32) -> Act + Send + Sync + 'static) {
        *self.plan.lock().unwrap() = Arc::new(plan);
    }

    pub(crate) fn behaves(&self) {
        self.plans(|stream| Act::Say(ok(stream)));
    }
}

/// A good answer.
pub(crate) fn ok(stream: u32) -> Vec<u8> {
    [headers(stream, 0, &[(":status", "200")]), frame(DATA, END_STREAM, stream, b"ok")].concat()
}

/// Runs `serve` for each HTTP/2 connection, of which it is told the number, and serves HTTP/1.1 well.
pub(crate) async fn http2_server<F, Fut>(settings: &'static [(u16, u32)], serve: F) -> SocketAddr
where
    F: Fn(Peer, usize) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let connections = Arc::new(AtomicUsize::new(0));
    tcp_app(move |stream| {
        let (serve, connections) = (serve.clone(), connections.clone());
        async move {
            if !speaks_http2(&stream).await {
                return serve_well(stream, Arc::default()).await;
            }
            if let Some(peer) = Peer::accept(stream, settings).await {
                let number = connections.fetch_add(1, Ordering::SeqCst);
                serve(peer, number).await;
            }
        }
    })
    .await
}
