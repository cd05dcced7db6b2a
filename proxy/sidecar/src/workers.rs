//! The worker threads: how many, their listeners, their runtimes.

use std::{
    fs,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use outrigger_intercept::sockets::bind_reuseport;
use tokio::{net::TcpListener, runtime::Builder, sync::mpsc};

use crate::{
    config::{Config, Inbound, Upstream},
    context::Context,
    data,
};

/// Connections that wait to be accepted, for each listener of each worker. The kernel caps it at
/// `net.core.somaxconn`, 4096 by default.
const BACKLOG: i32 = 4096;
/// How often a worker says that it comes round.
const BEAT: Duration = Duration::from_secs(1);

/// One worker's listeners. Every worker has its own on the same addresses (`SO_REUSEPORT`).
#[derive(Debug, Default)]
pub struct Listeners {
    /// Redirected outbound connections: the original destination says where to.
    pub outbound: Vec<TcpListener>,
    /// Redirected inbound connections: the original destination's port is the workload's.
    pub inbound: Vec<TcpListener>,
    /// Explicit upstreams.
    pub upstreams: Vec<(Upstream, TcpListener)>,
    /// Explicit inbounds.
    pub inbounds: Vec<(Inbound, TcpListener)>,
}

impl Listeners {
    /// Whether `address` is one of this proxy's own listeners: a connection to it would be a loop.
    pub fn contains(&self, address: SocketAddr) -> bool {
        let upstreams = self.upstreams.iter().map(|(_, listener)| listener);
        let inbounds = self.inbounds.iter().map(|(_, listener)| listener);
        self.outbound
            .iter()
            .chain(&self.inbound)
            .chain(upstreams)
            .chain(inbounds)
            .filter_map(|listener| listener.local_addr().ok())
            .any(|own| own == address || (own.ip().is_unspecified() && own.port() == address.port()))
    }
}

/// The same, bound but not yet part of a runtime.
#[derive(Default)]
pub(crate) struct Bound {
    outbound: Vec<std::net::TcpListener>,
    inbound: Vec<std::net::TcpListener>,
    upstreams: Vec<(Upstream, std::net::TcpListener)>,
    inbounds: Vec<(Inbound, std::net::TcpListener)>,
}

/// How many workers, and why.
pub(crate) struct Threads {
    pub(crate) count: u16,
    pub(crate) because: String,
}

/// Opens the listeners of one worker.
pub(crate) fn bind(config: &Config) -> anyhow::Result<Bound> {
    let listen = |address: SocketAddr, what: &str| {
        bind_reuseport(address, BACKLOG).with_context(|| format!("cannot listen on {address} ({what})"))
    };
    let mut bound = Bound::default();
    if config.redirection {
        bound.outbound = bind_all(&config.bind.outbound, config.ports.outbound, "ports.outbound")?;
        bound.inbound = bind_all(&config.bind.inbound, config.ports.inbound, "ports.inbound")?;
    }
    for upstream in &config.upstreams {
        bound.upstreams.push((upstream.clone(), listen(upstream.listen, "upstreams")?));
    }
    for inbound in &config.inbounds {
        bound.inbounds.push((inbound.clone(), listen(inbound.listen, "inbounds")?));
    }
    Ok(bound)
}

/// Opens a port on several addresses. Where the kernel has no IPv6, `::` means `0.0.0.0` and other IPv6 addresses
/// are left out, unless nothing would remain.
pub(crate) fn bind_all(
    addresses: &[IpAddr],
    port: u16,
    what: &str,
) -> anyhow::Result<Vec<std::net::TcpListener>> {
    let mut listeners = Vec::new();
    if port == 0 {
        return Ok(listeners);
    }
    let mut missing = None;
    for ip in addresses {
        let address = SocketAddr::new(*ip, port);
        let result = match bind_reuseport(address, BACKLOG) {
            Err(error) if lacks_ipv6(*ip, &error) && ip.is_unspecified() => {
                bind_reuseport(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port), BACKLOG)
            }
            result => result,
        };
        match result {
            Ok(listener) => listeners.push(listener),
            Err(error) if lacks_ipv6(*ip, &error) => missing = Some((address, error)),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot listen on {address} ({what})"));
            }
        }
    }
    match missing {
        Some((address, error)) if listeners.is_empty() => {
            Err(error).with_context(|| format!("cannot listen on {address} ({what})"))
        }
        _ => Ok(listeners),
    }
}

pub(crate) fn lacks_ipv6(ip: IpAddr, error: &std::io::Error) -> bool {
    const AFNOSUPPORT: i32 = 97;
    ip.is_ipv6() && (error.kind() == ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(AFNOSUPPORT))
}

/// Starts a worker. `ended` hears its number when it is gone, however it went.
pub(crate) fn spawn(
    number: usize,
    ctx: Arc<Context>,
    bound: Bound,
    ended: mpsc::Sender<usize>,
) -> anyhow::Result<()> {
    let guard = Ended { number, ended };
    std::thread::Builder::new()
        .name(format!("worker-{number}"))
        .spawn(move || {
            let _guard = guard;
            if let Err(error) = work(number, ctx, bound) {
                tracing::error!(worker = number, "a worker could not start: {error:#}");
            }
        })
        .context("cannot start a worker thread")?;
    Ok(())
}

struct Ended {
    number: usize,
    ended: mpsc::Sender<usize>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        // The queue has a place for every worker; nobody listens any more once the process ends.
        let _ = self.ended.try_send(self.number);
    }
}

fn work(number: usize, ctx: Arc<Context>, bound: Bound) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())
        .context("cannot make a runtime")?;
    runtime.block_on(async {
        let listeners = bound.into_listeners()?;
        ctx.ready.beat(number);
        let beating = ctx.clone();
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(BEAT).await;
                beating.ready.beat(number);
            }
        });
        data::run(ctx, listeners).await;
        Ok(())
    })
}

impl Bound {
    fn into_listeners(self) -> std::io::Result<Listeners> {
        let all = |listeners: Vec<std::net::TcpListener>| -> std::io::Result<Vec<TcpListener>> {
            listeners.into_iter().map(TcpListener::from_std).collect()
        };
        let mut listeners =
            Listeners { outbound: all(self.outbound)?, inbound: all(self.inbound)?, ..Listeners::default() };
        for (upstream, listener) in self.upstreams {
            listeners.upstreams.push((upstream, TcpListener::from_std(listener)?));
        }
        for (inbound, listener) in self.inbounds {
            listeners.inbounds.push((inbound, TcpListener::from_std(listener)?));
        }
        Ok(listeners)
    }
}

/// As configured, else by the CPU limit of the control group. Without a limit one worker has to do: a sidecar that
/// takes every core of a large host takes them from the workloads.
pub(crate) fn threads(configured: Option<u16>, root: &Path) -> Threads {
    if let Some(count) = configured {
        return Threads { count, because: "configured".to_owned() };
    }
    match cpu_limit(root) {
        Some(limit) => {
            let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
            // Limits beyond the cores of the host are common and mean nothing.
            let count = limit.div_ceil(1000).clamp(1, cores as u64);
            let count = u16::try_from(count).unwrap_or(u16::MAX);
            let because = format!("CPU limit {}.{:03}", limit / 1000, limit % 1000);
            Threads { count, because }
        }
        None => Threads { count: 1, because: "no CPU limit".to_owned() },
    }
}

/// The CPU limit of the own control group in thousandths of a core: the smallest on the way up (cgroups(7)).
/// `root` is `/`, but in tests.
fn cpu_limit(root: &Path) -> Option<u64> {
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let mut limit = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (mount, read): (&str, fn(&Path) -> Option<u64>) = match controllers {
            "" => ("sys/fs/cgroup", quota_v2),
            v1 if v1.split(',').any(|name| name == "cpu") => ("sys/fs/cgroup/cpu", quota_v1),
            _ => continue,
        };
        let mount = root.join(mount);
        let mut folder: PathBuf = mount.join(path.trim_start_matches('/'));
        loop {
            limit = [limit, read(&folder)].into_iter().flatten().min();
            if folder == mount || !folder.pop() {
                break;
            }
        }
    }
    limit
}

fn quota_v2(folder: &Path) -> Option<u64> {
    let text = fs::read_to_string(folder.join("cpu.max")).ok()?;
    let (quota, period) = text.trim().split_once(' ')?;
    quota_per_period(quota, period)
}

fn quota_v1(folder: &Path) -> Option<u64> {
    let quota = fs::read_to_string(folder.join("cpu.cfs_quota_us")).ok()?;
    let period = fs::read_to_string(folder.join("cpu.cfs_period_us")).ok()?;
    quota_per_period(&quota, &period)
}

/// `max` and -1, which do not parse, mean "no limit".
fn quota_per_period(quota: &str, period: &str) -> Option<u64> {
    let quota: u64 = quota.trim().parse().ok()?;
    let period: u64 = period.trim().parse().ok().filter(|period| *period > 0)?;
    Some((quota.saturating_mul(1000) / period).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_smallest_limit_on_the_way_up_counts() {
        let root = host(&[
            ("proc/self/cgroup", "0::/pods/one\n"),
            ("sys/fs/cgroup/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/pods/cpu.max", "150000 100000\n"),
            ("sys/fs/cgroup/pods/one/cpu.max", "400000 100000\n"),
        ]);
        assert_eq!(cpu_limit(root.path()), Some(1500));
    }

    #[test]
    fn version_one_is_read_too() {
        let root = host(&[
            ("proc/self/cgroup", "4:memory:/a\n3:cpu,cpuacct:/a\n"),
            ("sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "50000\n"),
            ("sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
        ]);
        assert_eq!(cpu_limit(root.path()), Some(500));
        assert_eq!(threads(None, root.path()).count, 1);
    }

    #[test]
    fn no_limit_means_one_thread_and_configuration_rules() {
        let root = host(&[("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/cpu.max", "max 100000\n")]);
        assert_eq!(threads(None, root.path()).count, 1);
        assert_eq!(threads(Some(3), root.path()).count, 3);
    }
}
