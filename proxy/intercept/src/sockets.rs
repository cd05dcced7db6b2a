//! Socket options of the proxy's listeners and connections.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

/// A dial with this priority may be redirected to the inbound listener of its own host. Needs no privilege, and
/// the default queueing disciplines treat it as they treat 0 (`prio2band` of tc-pfifo(8)).
pub(crate) const HAIRPIN_PRIORITY: u32 = 4;

/// Listens with `SO_REUSEPORT`, non-blocking, so that each thread can have a listener of its own and the kernel
/// spreads connections over them. `[::]` takes IPv4 as well.
///
/// Any process of the same user may join the port in silence: take a [`crate::PortLock`] first.
///
/// # Errors
/// Those of `socket`, `bind` and `listen`.
pub fn bind_reuseport(address: SocketAddr, backlog: i32) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.bind(&address.into())?;
    socket.listen(backlog)?;
    Ok(socket.into())
}

/// Listens on all addresses of both families; on those of IPv4 alone where the host has no IPv6.
///
/// # Errors
/// As [`bind_reuseport`].
pub fn bind_wildcard(port: u16, backlog: i32) -> io::Result<TcpListener> {
    match bind_reuseport((Ipv6Addr::UNSPECIFIED, port).into(), backlog) {
        Err(error) if lacks_ipv6(&error) => bind_reuseport((Ipv4Addr::UNSPECIFIED, port).into(), backlog),
        result => result,
    }
}

/// Listens on `127.0.0.1` and, where the host has it, on `::1`.
///
/// # Errors
/// As [`bind_reuseport`].
pub fn bind_loopback(port: u16, backlog: i32) -> io::Result<Vec<TcpListener>> {
    let mut listeners = vec![bind_reuseport((Ipv4Addr::LOCALHOST, port).into(), backlog)?];
    match bind_reuseport((Ipv6Addr::LOCALHOST, port).into(), backlog) {
        Err(error) if lacks_ipv6(&error) => {}
        result => listeners.push(result?),
    }
    Ok(listeners)
}

fn lacks_ipv6(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(AFNOSUPPORT)
}

/// `EAFNOSUPPORT`, for which std has no name.
const AFNOSUPPORT: i32 = 97;

/// Lets a connection, before it is dialled, be redirected to the inbound listener if it turns out to lead to
/// this very host: for dials to endpoints of the mesh, never for those to the own workload.
///
/// # Errors
/// Those of `setsockopt`.
pub fn allow_hairpin(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_priority(HAIRPIN_PRIORITY)
}

/// Marks a socket as the proxy's, for [`crate::Exempt::Mark`]. Before dialling.
///
/// # Errors
/// Permission denied without `CAP_NET_ADMIN` (or, from Linux 5.17 on, `CAP_NET_RAW`).
pub fn set_mark(socket: &impl AsFd, mark: u32) -> io::Result<()> {
    SockRef::from(socket).set_mark(mark)
}

/// Gives a connection up when sent data stays unacknowledged this long.
///
/// # Errors
/// Those of `setsockopt`.
pub fn set_user_timeout(socket: &impl AsFd, timeout: Duration) -> io::Result<()> {
    SockRef::from(socket).set_tcp_user_timeout(Some(timeout))
}

/// Probes a silent peer after `idle`, then every `interval`, and gives it up after `probes` without an answer.
///
/// # Errors
/// Those of `setsockopt`; the kernel wants whole seconds between 1 and 32767.
pub fn set_keepalive(socket: &impl AsFd, idle: Duration, interval: Duration, probes: u32) -> io::Result<()> {
    let keepalive = TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(probes);
    SockRef::from(socket).set_tcp_keepalive(&keepalive)
}

/// Sends small writes at once.
///
/// # Errors
/// Those of `setsockopt`.
pub fn set_nodelay(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_tcp_nodelay(true)
}

/// Makes closing send a reset, which tells the peer that this was no orderly end.
///
/// # Errors
/// Those of `setsockopt`.
pub fn reset_on_close(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::net::TcpStream;

    fn any_port() -> SocketAddr {
        (Ipv4Addr::LOCALHOST, 0).into()
    }

    #[test]
    fn listeners_share_a_port_and_never_block() {
        let first = bind_reuseport(any_port(), 16).unwrap();
        let second = bind_reuseport(first.local_addr().unwrap(), 16).unwrap();
        for listener in [&first, &second] {
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn the_wildcard_takes_both_families() {
        let listener = bind_wildcard(0, 16).unwrap();
        let port = listener.local_addr().unwrap().port();
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        TcpStream::connect((Ipv6Addr::LOCALHOST, port)).unwrap();
    }

    #[test]
    fn a_reset_is_told_from_an_orderly_end() {
        let listener = TcpListener::bind(any_port()).unwrap();
        for reset in [false, true] {
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (server, _) = listener.accept().unwrap();
            if reset {
                reset_on_close(&server).unwrap();
            }
            drop(server);
            let end = client.read(&mut [0]).map_err(|error| error.kind());
            assert_eq!(end, if reset { Err(io::ErrorKind::ConnectionReset) } else { Ok(0) });
        }
    }

    #[test]
    fn options_reach_the_kernel() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        set_nodelay(&socket).unwrap();
        set_user_timeout(&socket, Duration::from_secs(30)).unwrap();
        set_keepalive(&socket, Duration::from_secs(20), Duration::from_secs(5), 3).unwrap();
        allow_hairpin(&socket).unwrap();
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(30)));
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(20));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(5));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
        assert_eq!(socket.priority().unwrap(), HAIRPIN_PRIORITY);
    }
}
