//! What makes two connections between sidecars interchangeable.

use std::{net::SocketAddr, sync::Arc};

/// The key under which a mutual-TLS connection is pooled: everything that was proved or agreed when it was made.
///
/// Compared by value, so a request can only ever share a connection whose peer has proved exactly the identity that
/// the catalog names *now*, to exactly our own identity, under the roots that count *now*. A change of any of these
/// makes another key, and the old connections starve. A plaintext connection has no such key and is never pooled
/// with these.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ConnectionKey {
    /// The endpoint's own address and port.
    pub address: SocketAddr,
    /// The SPIFFE id that the peer must prove.
    pub expected_identity: Arc<str>,
    /// The SPIFFE id that we prove.
    pub own_identity: Arc<str>,
    /// The trust bundle's epoch: it grows when a root leaves.
    pub trust_epoch: u64,
    /// What was agreed to follow.
    pub alpn: Alpn,
}

/// What follows the handshake between two sidecars.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// `outrigger-h2`: requests, as HTTP/2.
    H2,
    /// `outrigger-tcp`: bytes.
    Tcp,
}

impl Alpn {
    /// The protocol id on the wire (RFC 7301).
    pub fn wire(self) -> &'static [u8] {
        match self {
            Self::H2 => b"outrigger-h2",
            Self::Tcp => b"outrigger-tcp",
        }
    }

    /// The protocol of this id; `None` if it is not ours.
    pub fn from_wire(id: &[u8]) -> Option<Self> {
        [Self::H2, Self::Tcp].into_iter().find(|alpn| alpn.wire() == id)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn key() -> ConnectionKey {
        ConnectionKey {
            address: "10.0.0.1:80".parse().unwrap(),
            expected_identity: "spiffe://a/ns/b/sa/c".into(),
            own_identity: "spiffe://a/ns/b/sa/d".into(),
            trust_epoch: 1,
            alpn: Alpn::H2,
        }
    }

    #[test]
    fn keys_are_compared_by_value_and_every_part_counts() {
        let pool = HashSet::from([key()]);
        assert!(pool.contains(&key()), "another allocation, the same value");
        for other in [
            ConnectionKey { address: "10.0.0.1:81".parse().unwrap(), ..key() },
            ConnectionKey { expected_identity: "spiffe://a/ns/b/sa/x".into(), ..key() },
            ConnectionKey { own_identity: "spiffe://a/ns/b/sa/x".into(), ..key() },
            ConnectionKey { trust_epoch: 2, ..key() },
            ConnectionKey { alpn: Alpn::Tcp, ..key() },
        ] {
            assert!(!pool.contains(&other), "{other:?}");
        }
    }

    #[test]
    fn only_our_protocols_are_known() {
        for alpn in [Alpn::H2, Alpn::Tcp] {
            assert_eq!(Alpn::from_wire(alpn.wire()), Some(alpn));
        }
        assert_eq!(Alpn::from_wire(b"h2"), None);
    }
}
