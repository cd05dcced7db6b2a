//! The life of a sidecar: from its configuration to its last connection.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use outrigger_intercept::PortLock;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::timeout,
};

use crate::{
    admin, certificates,
    config::Config,
    context::Context,
    discovery::{Discovery, directory::Ask},
    dns,
    drain::Phase,
    ready::Blocker,
    workers,
};

/// After the last stream a worker needs microseconds to end.
const WORKERS_END: Duration = Duration::from_millis(150);

/// Runs a sidecar until it was told to end and has drained.
///
/// # Errors
/// If it cannot start, or a worker dies.
pub fn run(config: Config) -> anyhow::Result<()> {
    let _locks = lock_ports(&config)?;
    limits();
    let (ctx, asks) = Context::from_config(config)?;
    let ctx = Arc::new(ctx);
    let threads = workers::threads(ctx.config.threads, Path::new("/"));
    let bound = (0..threads.count).map(|_| workers::bind(&ctx.config)).collect::<Result<Vec<_>, _>>()?;
    let admin = workers::bind_all(&ctx.config.bind.admin, ctx.config.ports.admin, "ports.admin")?;

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot make the control thread's runtime")?;
    let result = runtime.block_on(async {
        let dns = dns::Sockets::bind(&ctx.config).await?;
        let signals = Signals::new()?;
        let (ended, workers_ended) = mpsc::channel(bound.len());
        let count = bound.len();
        for (number, listeners) in bound.into_iter().enumerate() {
            workers::spawn(number, ctx.clone(), listeners, ended.clone())?;
        }
        ctx.ready.clear(Blocker::Listeners);
        let config = &ctx.config;
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            threads = threads.count,
            because = threads.because,
            controller = ?config.controller,
            trust_domain = config.trust_domain,
            redirection = config.redirection,
            ports = ?config.ports,
            upstreams = ?config.upstreams.iter().map(|u| (&*u.service, u.listen)).collect::<Vec<_>>(),
            inbounds = ?config.inbounds.iter().map(|i| (i.listen, i.forward)).collect::<Vec<_>>(),
            "outrigger-proxy has started"
        );
        control(ctx.clone(), asks, dns, admin, signals, workers_ended, count).await
    });
    // Tasks that are still there have nothing left to do.
    runtime.shutdown_background();
    result
}

/// One proxy per port of the network namespace.
fn lock_ports(config: &Config) -> Result<Vec<PortLock>, outrigger_intercept::Error> {
    let ports = &config.ports;
    let mut wanted = vec![ports.dns, ports.admin];
    if config.redirection {
        wanted.extend([ports.outbound, ports.inbound]);
    }
    wanted.extend(config.upstreams.iter().map(|upstream| upstream.listen.port()));
    wanted.extend(config.inbounds.iter().map(|inbound| inbound.listen.port()));
    wanted.sort_unstable();
    wanted.dedup();
    wanted.into_iter().filter(|port| *port != 0).map(PortLock::acquire).collect()
}

fn limits() {
    // Each connection needs a file descriptor, and many a distribution's soft limit is 1024.
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((soft, hard)) if soft < hard => {
            if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
                tracing::warn!("cannot raise the limit of open files from {soft} to {hard}: {error}");
            }
        }
        _ => {}
    }
    // A core file would hold the workload's key.
    if let Err(error) = setrlimit(Resource::RLIMIT_CORE, 0, 0) {
        tracing::warn!("cannot forbid core files, which would hold this workload's key: {error}");
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen to signals");
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Starts what talks to the controller: the certificate first, then discovery, which answers workers from the start.
pub fn start(ctx: &Arc<Context>, asks: mpsc::Receiver<Ask>) -> Discovery {
    let discovery = Discovery::new(ctx.clone());
    tokio::spawn(discovery.clone().answer(asks));
    tokio::spawn({
        let (ctx, discovery) = (ctx.clone(), discovery.clone());
        async move {
            certificates::obtain_first(&ctx).await;
            tokio::join!(certificates::keep(&ctx), discovery.follow());
        }
    });
    discovery
}

async fn control(
    ctx: Arc<Context>,
    asks: mpsc::Receiver<Ask>,
    dns: dns::Sockets,
    admin: Vec<std::net::TcpListener>,
    mut signals: Signals,
    mut workers_ended: mpsc::Receiver<usize>,
    workers: usize,
) -> anyhow::Result<()> {
    let discovery = start(&ctx, asks);
    let (stop, mut stopped) = mpsc::channel(1);
    admin::serve(ctx.clone(), discovery, stop, admin)?;
    dns.serve(&ctx);

    tokio::select! {
        () = signals.next() => tracing::info!("asked to end: draining"),
        _ = stopped.recv() => tracing::info!("asked to end by the admin port: draining"),
        number = workers_ended.recv() => {
            bail!("worker {} has ended by itself; this is a bug", number.unwrap_or_default());
        }
    }
    tokio::select! {
        () = ctx.drain.run(&ctx.config.drain) => {}
        () = signals.next() => tracing::warn!("asked to end a second time: cutting what is left"),
    }
    ctx.drain.advance(Phase::Now);
    let all = async {
        for _ in 0..workers {
            workers_ended.recv().await;
        }
    };
    if timeout(WORKERS_END, all).await.is_err() {
        tracing::warn!("workers did not end in time");
    }
    tracing::info!("ended");
    Ok(())
}
