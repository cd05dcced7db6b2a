//! The address that a redirected connection was dialled to, as conntrack remembers it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;

use socket2::SockRef;

/// Where an accepted connection was meant to go before redirection, IPv4-mapped addresses as IPv4. `None` when
/// it was not redirected: then its destination is this listener itself.
///
/// # Errors
/// Those of `getsockname` and `getsockopt`, as on a socket that is no TCP connection.
pub fn original_destination(stream: &impl AsFd) -> io::Result<Option<SocketAddr>> {
    let socket = SockRef::from(stream);
    let Some(local) = socket.local_addr()?.as_socket().map(unmapped) else {
        return Ok(None);
    };
    let original = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    match original {
        Ok(address) => {
            Ok(address.as_socket().map(unmapped).filter(|address| !same_endpoint(address, &local)))
        }
        // ENOENT: conntrack does not know the connection. ENOPROTOOPT: nobody uses conntrack in this namespace.
        Err(error) if matches!(error.raw_os_error(), Some(2 | 92)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// A connection to another address of this host that came unredirected has that address as its local one, so
/// equality is enough.
fn same_endpoint(left: &SocketAddr, right: &SocketAddr) -> bool {
    left.port() == right.port() && left.ip() == right.ip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_connection_that_nobody_redirected_has_none() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        assert_eq!(original_destination(&server).unwrap(), None);
    }

    #[test]
    fn mapped_addresses_become_ipv4() {
        let mapped: SocketAddr = "[::ffff:10.1.2.3]:80".parse().unwrap();
        assert_eq!(unmapped(mapped), "10.1.2.3:80".parse().unwrap());
        assert!(unmapped("[fd00::1]:80".parse().unwrap()).is_ipv6());
    }
}
