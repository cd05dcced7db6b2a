//! Hosts: network namespaces, each joined by a veth pair to a bridge in a namespace of its own, the hub.
//!
//! Each host has one thread that lives in its namespace and runs a current-thread runtime. Sockets are opened and
//! processes started there, and both keep the thread's namespace: that is all "running on a host" means.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context as _, anyhow};
use futures_util::TryStreamExt as _;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::route::RouteType;
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;

use crate::process::Process;

/// The hub's own address, every host's default gateway. It forwards nothing: the default route only makes the mesh's
/// virtual addresses routable up to the point where redirection takes over.
const HUB: u8 = 1;
/// First host's number. 53 is skipped: the name server that every client asks must stay nobody's.
const FIRST_HOST: u8 = 60;

type Job = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// The IPv4 address with this number.
fn v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, number)
}

/// The IPv6 address with this number.
fn v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into())
}

/// A hub and the hosts around it.
#[derive(Debug)]
pub struct Network {
    hub: Host,
    next: AtomicU8,
}

/// A network namespace with an address of each family. Cheap to clone; lives as long as a clone or a process in it.
#[derive(Clone, Debug)]
pub struct Host {
    name: String,
    number: u8,
    namespace: Arc<OwnedFd>,
    jobs: mpsc::Sender<Job>,
}

impl Network {
    /// Makes the hub.
    pub async fn new() -> anyhow::Result<Self> {
        let hub = Host::start("hub", HUB).await?;
        hub.run(|| async {
            let links = links()?;
            up(&links, "lo").await?;
            links
                .link()
                .add(LinkBridge::new("br0").up().build())
                .execute()
                .await
                .context("adding a bridge")?;
            addresses(&links, "br0", HUB).await
        })
        .await
        .context("building the hub")?;
        Ok(Self { hub, next: AtomicU8::new(FIRST_HOST) })
    }

    /// The namespace in which all traffic between hosts can be seen.
    pub fn hub(&self) -> &Host {
        &self.hub
    }

    /// Adds a host.
    pub async fn host(&self, name: &str) -> anyhow::Result<Host> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let host = Host::start(name, number).await?;
        let namespace = Arc::clone(&host.namespace);
        let build = async {
            self.hub.run(move || async move { plug(number, namespace.as_raw_fd()).await }).await?;
            host.run(move || async move { unpack(number).await }).await
        };
        build.await.with_context(|| format!("joining host {name} to the hub"))?;
        Ok(host)
    }
}

impl Host {
    async fn start(name: &str, number: u8) -> anyhow::Result<Self> {
        Self::inside(name, number, || unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace"))
            .await
    }

    /// The network namespace of somebody else, by one of its addresses: of those that `folder` holds as files, as container
    /// runtimes keep them. Its own number, and so [`Host::v4`] and the like, mean nothing.
    pub async fn with_address(name: &str, folder: &Path, address: IpAddr) -> anyhow::Result<Self> {
        let entries = std::fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))?;
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let enter = move || {
                let file =
                    std::fs::File::open(&path).with_context(|| format!("opening {}", path.display()))?;
                setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering {}", path.display()))
            };
            // One that has just gone is not the one.
            let Ok(host) = Self::inside(name, 0, enter).await else { continue };
            let bound =
                host.run(move || async move { Ok(tokio::net::UdpSocket::bind((address, 0)).await.is_ok()) });
            if bound.await? {
                return Ok(host);
            }
        }
        anyhow::bail!("no network namespace in {} has the address {address} of {name}", folder.display())
    }

    async fn inside(
        name: &str,
        number: u8,
        enter: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (jobs, mut queue) = mpsc::channel::<Job>(64);
        let (ready, namespace) = oneshot::channel();
        let thread = move || {
            let enter = || -> anyhow::Result<_> {
                enter()?;
                let namespace = std::fs::File::open("/proc/thread-self/ns/net").context("opening it")?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                Ok((OwnedFd::from(namespace), runtime))
            };
            match enter() {
                Ok((namespace, runtime)) => {
                    let _ = ready.send(Ok(namespace));
                    LocalSet::new().block_on(&runtime, async move {
                        while let Some(job) = queue.recv().await {
                            tokio::task::spawn_local(job());
                        }
                    });
                }
                Err(error) => drop(ready.send(Err(error))),
            }
        };
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(thread)
            .context("starting a host's thread")?;
        let namespace = namespace.await.context("a host's thread died")??;
        Ok(Self { name: name.to_owned(), number, namespace: Arc::new(namespace), jobs })
    }

    /// The host's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The host's IPv4 address.
    pub fn v4(&self) -> Ipv4Addr {
        v4(self.number)
    }

    /// The host's IPv6 address.
    pub fn v6(&self) -> Ipv6Addr {
        v6(self.number)
    }

    /// A port at the host's IPv4 address.
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.v4()), port)
    }

    /// A port at the host's IPv6 address.
    pub fn at6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V6(self.v6()), port)
    }

    /// Runs a piece of the test on the host: sockets that `work` opens belong to it.
    pub async fn run<T, F, Fut>(&self, work: F) -> anyhow::Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = anyhow::Result<T>> + 'static,
    {
        let (mut answer, result) = oneshot::channel();
        let job: Job = Box::new(move || {
            Box::pin(async move {
                let result = tokio::select! {
                    result = work() => result,
                    () = answer.closed() => return,
                };
                let _ = answer.send(result);
            })
        });
        self.jobs.send(job).await.map_err(|_| anyhow!("the thread of host {} died", self.name))?;
        result.await.map_err(|_| anyhow!("work on host {} panicked", self.name))?
    }

    /// Starts a process on the host. Its output goes to the suite's log folder under `<host>-<name>`.
    pub async fn spawn(&self, name: &str, mut command: Command) -> anyhow::Result<Process> {
        let name = format!("{}-{name}", self.name);
        self.run(move || async move { Process::start(&name, &mut command) }).await
    }

    /// Runs a process on the host to its end; its standard output as text, if it succeeds.
    pub async fn output(&self, command: Command) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&self.finish(command).await?.stdout).into_owned())
    }

    /// Runs a process on the host to its end; all that it wrote, if it succeeds.
    pub async fn finish(&self, mut command: Command) -> anyhow::Result<Output> {
        let shown = format!("{command:?}");
        let output = self
            .run(move || async move {
                // A thread started here is in the host's namespace too, and so is what it starts.
                let run = move || command.output().with_context(|| format!("running {command:?}"));
                tokio::task::spawn_blocking(run).await?
            })
            .await?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        anyhow::ensure!(output.status.success(), "{shown} on {}: {}\n{out}{err}", self.name, output.status);
        Ok(output)
    }
}

/// More specific than the hosts' own network, so that they win.
const HALVES: [(Ipv4Addr, u8); 2] = [(Ipv4Addr::new(10, 77, 0, 0), 25), (Ipv4Addr::new(10, 77, 0, 128), 25)];

impl Host {
    /// From now on the host gets every packet and sends none, in IPv4: nobody hears a refusal, nothing is ever answered.
    pub async fn fall_silent(&self) -> anyhow::Result<()> {
        self.run(|| async {
            let links = links()?;
            for (network, prefix) in HALVES {
                let hole = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(network, prefix);
                let hole = hole.kind(RouteType::BlackHole).build();
                links.route().add(hole).execute().await.context("adding a black hole")?;
            }
            Ok(())
        })
        .await
    }

    /// The host has these addresses as well.
    pub async fn also_at(&self, more: Vec<Ipv4Addr>) -> anyhow::Result<()> {
        let name = format!("eth{}", self.number);
        self.run(move || async move {
            let links = links()?;
            let index = index(&links, &name).await?;
            for address in more {
                let add = links.address().add(index, IpAddr::V4(address), 24).execute().await;
                add.with_context(|| format!("adding {address} to {name}"))?;
            }
            Ok(())
        })
        .await
    }

    /// From now on packets to these ranges go by way of another host.
    pub async fn route(&self, ranges: Vec<(IpAddr, u8)>, by: &Self) -> anyhow::Result<()> {
        let (by4, by6) = (by.v4(), by.v6());
        self.run(move || async move {
            let links = links()?;
            for (range, prefix) in ranges {
                let add = match range {
                    IpAddr::V4(range) => {
                        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(range, prefix);
                        links.route().add(route.gateway(by4).build())
                    }
                    IpAddr::V6(range) => {
                        let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(range, prefix);
                        links.route().add(route.gateway(by6).build())
                    }
                };
                add.execute().await.with_context(|| format!("adding a route to {range}/{prefix}"))?;
            }
            Ok(())
        })
        .await
    }

    /// Ends [`Host::fall_silent`].
    pub async fn speak_again(&self) -> anyhow::Result<()> {
        self.run(|| async {
            let links = links()?;
            for (network, prefix) in HALVES {
                let hole = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(network, prefix);
                let hole = hole.kind(RouteType::BlackHole).build();
                links.route().del(hole).execute().await.context("removing a black hole")?;
            }
            Ok(())
        })
        .await
    }
}

/// A netlink connection in the namespace of this thread.
fn links() -> anyhow::Result<Handle> {
    let (connection, handle, _) = rtnetlink::new_connection().context("opening a netlink socket")?;
    tokio::task::spawn_local(connection);
    Ok(handle)
}

async fn index(links: &Handle, name: &str) -> anyhow::Result<u32> {
    let link = links.link().get().match_name(name.to_owned()).execute().try_next().await;
    let link = link.with_context(|| format!("looking for link {name}"))?;
    Ok(link.with_context(|| format!("there is no link {name}"))?.header.index)
}

async fn up(links: &Handle, name: &str) -> anyhow::Result<()> {
    let index = index(links, name).await?;
    let message = LinkUnspec::new_with_index(index).up().build();
    links.link().set(message).execute().await.with_context(|| format!("setting link {name} up"))
}

async fn addresses(links: &Handle, link: &str, number: u8) -> anyhow::Result<()> {
    let index = index(links, link).await?;
    for (address, prefix) in [(IpAddr::V4(v4(number)), 24), (IpAddr::V6(v6(number)), 64)] {
        let mut add = links.address().add(index, address, prefix);
        if address.is_ipv6() {
            // Duplicate address detection would keep the address unusable for a second or more.
            let message = add.message_mut();
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Permanent));
        }
        add.execute().await.with_context(|| format!("adding {address} to {link}"))?;
    }
    Ok(())
}

/// In the hub: a veth pair, one end in the bridge, the other handed over.
async fn plug(number: u8, namespace: std::os::fd::RawFd) -> anyhow::Result<()> {
    let links = links()?;
    let (ours, theirs) = (format!("host{number}"), format!("eth{number}"));
    links.link().add(LinkVeth::new(&ours, &theirs).build()).execute().await.context("adding a veth pair")?;
    let bridge = index(&links, "br0").await?;
    let ours = LinkUnspec::new_with_index(index(&links, &ours).await?).controller(bridge).up().build();
    links.link().set(ours).execute().await.context("joining a veth to the bridge")?;
    let theirs = LinkUnspec::new_with_index(index(&links, &theirs).await?).setns_by_fd(namespace).build();
    links.link().set(theirs).execute().await.context("moving a veth to its host")
}

/// In the host: addresses and routes on the end that was handed over.
async fn unpack(number: u8) -> anyhow::Result<()> {
    let links = links()?;
    up(&links, "lo").await?;
    let name = format!("eth{number}");
    addresses(&links, &name, number).await?;
    up(&links, &name).await?;
    let default4 = RouteMessageBuilder::<Ipv4Addr>::new().gateway(v4(HUB)).build();
    links.route().add(default4).execute().await.context("adding the IPv4 default route")?;
    let default6 = RouteMessageBuilder::<Ipv6Addr>::new().gateway(v6(HUB)).build();
    links.route().add(default6).execute().await.context("adding the IPv6 default route")
}
