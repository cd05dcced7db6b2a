//! One proxy per port. With `SO_REUSEPORT` a second proxy would share the first one's port without an error and
//! get half of its connections; an abstract Unix socket named after the port says so instead. Such a name lives
//! in the network namespace, exactly as the port does, and is gone with its process, however that ends.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use crate::Error;

/// The right to serve a port in this network namespace, held until dropped.
#[derive(Debug)]
pub struct PortLock {
    _socket: UnixDatagram,
}

impl PortLock {
    /// Takes the lock of a port.
    ///
    /// # Errors
    /// [`Error::PortHeld`] if another proxy has it, [`Error::PortLock`] for anything else.
    pub fn acquire(port: u16) -> Result<Self, Error> {
        let bound = SocketAddr::from_abstract_name(format!("outrigger-proxy/port/{port}"))
            .and_then(|name| UnixDatagram::bind_addr(&name));
        match bound {
            Ok(socket) => Ok(Self { _socket: socket }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(Error::PortHeld { port }),
            Err(source) => Err(Error::PortLock { port, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_proxy_is_told_until_the_first_ends() {
        // No proxy of this project uses a port this low.
        let first = PortLock::acquire(7).unwrap();
        assert!(matches!(PortLock::acquire(7), Err(Error::PortHeld { port: 7 })));
        PortLock::acquire(8).unwrap();
        drop(first);
        PortLock::acquire(7).unwrap();
    }
}
