//! `outrigger-proxy redirect`: from flags and configuration to rules. The rules themselves are `outrigger-intercept`'s.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use clap::{Args, Parser};
use ipnet::IpNet;
use outrigger_intercept::{
    Applied, Exempt, PortRange, ProxyPorts, Rules, Select, Selector, apply, remove, render,
};

use crate::config::Config;

/// The nftables table where nobody names another.
const DEFAULT_TABLE: &str = "outrigger";
/// An address that is always redirected, because it is of the mesh's virtual range, and that nobody has: an allocation never
/// gives out the network's own address.
const NOBODY: Ipv4Addr = Ipv4Addr::new(253, 0, 0, 0);
/// How long a check waits for redirection. A pod's rules are there before its first container starts; on a host they may
/// be written a little later.
const CHECK: Duration = Duration::from_secs(5);
/// For one attempt of a check, and between two.
const ATTEMPT: Duration = Duration::from_millis(500);

/// The flags. Ports and the mark default to the configuration's, so that one file serves the proxy and its rules.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Print the rules instead of writing them.
    #[arg(long)]
    dry_run: bool,
    /// Remove the rules.
    #[arg(long, conflicts_with = "dry_run")]
    remove: bool,
    /// Change nothing and need no privilege: wait until outgoing connections are redirected, and fail where they are not. To
    /// be run before the proxy, by another user than the proxy's.
    #[arg(long, conflicts_with_all = ["dry_run", "remove"])]
    check: bool,
    /// Name of the nftables table: `outrigger`, or `outrigger-<name>` where several sidecars share a host.
    #[arg(long, default_value = DEFAULT_TABLE)]
    table: String,
    /// The proxy's user id: its traffic is exempt.
    #[arg(long)]
    proxy_uid: Option<u32>,
    /// The proxy's socket mark: its traffic is exempt. Default: `mark` of the configuration.
    #[arg(long)]
    proxy_mark: Option<u32>,
    /// More users whose traffic is exempt, as a local DNS resolver's.
    #[arg(long, value_delimiter = ',')]
    exempt_uid: Vec<u32>,
    /// Take only the traffic of these users: `1000` or `1000-1999`.
    #[arg(long, conflicts_with = "cgroup", value_parser = uid_range)]
    uid: Option<(u32, u32)>,
    /// Take only the traffic of this control group (version 2), a path below its mount.
    #[arg(long)]
    cgroup: Option<PathBuf>,
    /// The proxy's outbound port. Default: the configuration's.
    #[arg(long)]
    outbound_port: Option<u16>,
    /// The proxy's inbound port. Default: the configuration's.
    #[arg(long)]
    inbound_port: Option<u16>,
    /// The proxy's DNS port. Default: the configuration's.
    #[arg(long)]
    dns_port: Option<u16>,
    /// The proxy's admin port, never redirected. Default: the configuration's.
    #[arg(long)]
    admin_port: Option<u16>,
    /// Leave arriving connections alone.
    #[arg(long)]
    no_inbound: bool,
    /// Leave outgoing connections alone.
    #[arg(long)]
    no_outbound: bool,
    /// Leave DNS alone.
    #[arg(long)]
    no_dns: bool,
    /// Leave IPv6 alone.
    #[arg(long)]
    no_ipv6: bool,
    /// Refuse UDP other than DNS.
    #[arg(long)]
    drop_udp: bool,
    /// Take inbound connections to ports on which nothing listens here, too. For ports that are published by address
    /// translation alone, as containers' are without a userland proxy.
    #[arg(long)]
    take_closed_ports: bool,
    /// Take inbound connections to these ports only: `8080,9000-9100`.
    #[arg(long, value_delimiter = ',')]
    inbound_ports: Vec<PortRange>,
    /// Leave inbound connections to these ports alone.
    #[arg(long, value_delimiter = ',')]
    exclude_inbound_ports: Vec<PortRange>,
    /// Take inbound connections from these ranges only.
    #[arg(long, value_delimiter = ',')]
    inbound_cidrs: Vec<IpNet>,
    /// Leave inbound connections from these ranges alone.
    #[arg(long, value_delimiter = ',')]
    exclude_inbound_cidrs: Vec<IpNet>,
    /// Take outbound connections to these ports only.
    #[arg(long, value_delimiter = ',')]
    outbound_ports: Vec<PortRange>,
    /// Leave outbound connections to these ports alone.
    #[arg(long, value_delimiter = ',')]
    exclude_outbound_ports: Vec<PortRange>,
    /// Take outbound connections to these ranges only.
    #[arg(long, value_delimiter = ',')]
    outbound_cidrs: Vec<IpNet>,
    /// Leave outbound connections to these ranges alone.
    #[arg(long, value_delimiter = ',')]
    exclude_outbound_cidrs: Vec<IpNet>,
    /// Leave DNS questions to these servers alone.
    #[arg(long, value_delimiter = ',')]
    exclude_dns_cidrs: Vec<IpNet>,
}

/// Does what the flags say.
///
/// # Errors
/// If the rules contradict themselves or the kernel refuses them.
pub fn run(arguments: &Arguments, config: &Config) -> anyhow::Result<()> {
    if arguments.remove {
        remove(&arguments.table)?;
        tracing::info!(table = arguments.table, "redirection removed");
        return Ok(());
    }
    if arguments.check {
        return check(arguments.outbound_port.unwrap_or(config.ports.outbound));
    }
    let rules = rules(arguments, config)?;
    if arguments.dry_run {
        print!("{}", render(&rules)?);
        return Ok(());
    }
    if apply(&rules).context("redirection is as it was")? == Applied::ClosedPortsTaken {
        tracing::warn!(
            "this kernel cannot tell whether something listens on a port (CONFIG_NFT_SOCKET): the proxy takes connections to \
             closed ports too, so a probe that only connects always succeeds; probe by HTTP or gRPC here"
        );
    }
    tracing::info!(table = rules.table, exempt = ?rules.exempt, "redirection in place");
    Ok(())
}

/// The flags that a pod asks for by its annotation. They say what is redirected in its own network namespace, and nothing
/// else.
///
/// # Errors
/// If they are no flags, or such as are for people on a host.
pub(crate) fn of_pod(flags: &str) -> anyhow::Result<Arguments> {
    #[derive(Parser)]
    #[command(no_binary_name = true, disable_help_flag = true)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }
    let arguments = match Line::try_parse_from(flags.split_ascii_whitespace()) {
        Ok(line) => line.arguments,
        Err(error) => bail!("{}", error.to_string().lines().next().unwrap_or_default()),
    };
    let of_hosts = arguments.dry_run
        || arguments.remove
        || arguments.check
        || arguments.table != DEFAULT_TABLE
        || arguments.uid.is_some()
        || arguments.cgroup.is_some();
    if of_hosts {
        bail!("--dry-run, --remove, --check, --table, --uid and --cgroup are for hosts");
    }
    if arguments.proxy_uid.is_none() && arguments.proxy_mark.is_none() {
        bail!("it does not name the proxy: --proxy-uid is missing");
    }
    Ok(arguments)
}

/// Stands where the proxy will, and looks whether a connection to somewhere else arrives.
fn check(port: u16) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).with_context(|| {
        format!("cannot check redirection: port {port} is taken; the check runs before the proxy")
    })?;
    listener.set_nonblocking(true)?;
    let end = Instant::now() + CHECK;
    loop {
        if arrives(&listener) {
            tracing::info!("outgoing connections are redirected");
            return Ok(());
        }
        if Instant::now() > end {
            bail!(
                "outgoing connections are not redirected: this pod was started when {} was not in place on its node; \
                 delete the pod, so that another one takes its place",
                crate::cni::PLUGIN
            );
        }
        thread::sleep(ATTEMPT);
    }
}

fn arrives(listener: &TcpListener) -> bool {
    let Ok(stream) = TcpStream::connect_timeout(&SocketAddr::from((NOBODY, 1)), ATTEMPT) else {
        return false;
    };
    let Ok(here) = stream.local_addr() else { return false };
    // A connection that is established is in the listener's queue. Others may be there, too.
    while let Ok((_, from)) = listener.accept() {
        if from.port() == here.port() {
            return true;
        }
    }
    false
}

fn rules(arguments: &Arguments, config: &Config) -> anyhow::Result<Rules> {
    let mut exempt = Vec::new();
    exempt.extend(arguments.proxy_uid.map(Exempt::Uid));
    exempt.extend(arguments.proxy_mark.or(config.mark).map(Exempt::Mark));
    if exempt.is_empty() {
        bail!(
            "name the proxy, or its own connections would be redirected to itself: --proxy-uid, or --proxy-mark (and \
             `mark` in its configuration)"
        );
    }
    exempt.extend(arguments.exempt_uid.iter().copied().map(Exempt::Uid));
    let inbound = Selector {
        include_ports: arguments.inbound_ports.clone(),
        exclude_ports: arguments.exclude_inbound_ports.clone(),
        include_cidrs: arguments.inbound_cidrs.clone(),
        exclude_cidrs: arguments.exclude_inbound_cidrs.clone(),
    };
    let outbound = Selector {
        include_ports: arguments.outbound_ports.clone(),
        exclude_ports: arguments.exclude_outbound_ports.clone(),
        include_cidrs: arguments.outbound_cidrs.clone(),
        exclude_cidrs: arguments.exclude_outbound_cidrs.clone(),
    };
    let dns = Selector { exclude_cidrs: arguments.exclude_dns_cidrs.clone(), ..Selector::default() };
    let ports = ProxyPorts {
        outbound: arguments.outbound_port.unwrap_or(config.ports.outbound),
        inbound: arguments.inbound_port.unwrap_or(config.ports.inbound),
        dns: arguments.dns_port.unwrap_or(config.ports.dns),
        admin: arguments.admin_port.unwrap_or(config.ports.admin),
    };
    let select = match (arguments.uid, &arguments.cgroup) {
        (Some((first, last)), _) => Some(Select::Uid { first, last }),
        (None, Some(path)) => Some(Select::Cgroup(path.clone())),
        (None, None) => None,
    };
    Ok(Rules {
        table: arguments.table.clone(),
        inbound: (!arguments.no_inbound && ports.inbound != 0).then_some(inbound),
        outbound: (!arguments.no_outbound && ports.outbound != 0).then_some(outbound),
        dns: (!arguments.no_dns && ports.dns != 0).then_some(dns),
        ports,
        exempt,
        refuse_closed: !arguments.take_closed_ports,
        ipv6: !arguments.no_ipv6,
        select,
        drop_udp: arguments.drop_udp,
        ..Rules::default()
    })
}

fn uid_range(text: &str) -> Result<(u32, u32), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if first <= last => Ok((first, last)),
        _ => Err("write a user id, or a range as in 1000-1999".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(line: &[&str], config: &Config) -> anyhow::Result<Rules> {
        rules(&Line::try_parse_from([&["redirect"], line].concat())?.arguments, config)
    }

    #[test]
    fn flags_become_rules() {
        let rules = parse(
            &["--proxy-uid=2102", "--exclude-outbound-ports=22,9000-9100", "--no-dns", "--uid=1000-1999"],
            &Config::default(),
        )
        .unwrap();
        assert_eq!(rules.exempt, [Exempt::Uid(2102)]);
        assert_eq!(
            rules.outbound.unwrap().exclude_ports,
            [PortRange::from(22), PortRange { first: 9000, last: 9100 }]
        );
        assert!(rules.dns.is_none() && rules.inbound.is_some());
        assert_eq!(rules.select, Some(Select::Uid { first: 1000, last: 1999 }));
    }

    #[test]
    fn the_configuration_gives_ports_and_mark() {
        let mut config = Config { mark: Some(240), ..Config::default() };
        config.ports.outbound = 25401;
        let rules = parse(&[], &config).unwrap();
        assert_eq!(rules.exempt, [Exempt::Mark(240)]);
        assert_eq!((rules.ports.outbound, rules.ports.inbound), (25401, 15406));
    }

    #[test]
    fn a_proxy_that_nobody_names_would_redirect_itself() {
        let error = parse(&[], &Config::default()).unwrap_err();
        assert!(error.to_string().contains("--proxy-uid"));
    }
}
