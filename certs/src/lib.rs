//! Identities of the mesh: who a workload is, how it gets the certificate that proves it, and how a peer checks it.
//!
//! The data takes these steps, one module each: `identity` (what a name may look like) -> `key` (a workload's key and
//! its signing request) -> `csr` (what the CA believes of a request: its public key, nothing else) -> `ca` and `store`
//! (who signs, and the one file that holds a key) -> `leaf` (what a workload accepts as its own certificate) ->
//! `bundle` (whom to trust) -> `verify` (whether a peer's certificate holds) -> `tls` (rustls configurations made of
//! all that, replaced live) -> `renewal` (when to start again). Apart from them: `serving` (the certificate of a webhook,
//! for Kubernetes' API server).
//!
//! Three rules hold throughout. An identity is never read from bytes that have not been verified first. A workload's
//! private key exists only inside the cryptographic library: no type here can print, clone out or write it. And time
//! is an argument, so that expiry and clock skew are tested without waiting.
//!
//! No network, and no file but the CA's own.
#![forbid(unsafe_code)]

mod bundle;
mod ca;
mod csr;
mod identity;
mod key;
mod leaf;
mod pem_text;
mod renewal;
mod serving;
mod store;
mod tls;
mod verify;

pub use bundle::{BundleError, TrustBundle};
pub use ca::{CaError, CertificateAuthority, Material, SignError, SignedLeaf};
pub use csr::{CsrError, MAX_CSR_BYTES};
pub use identity::{IdentityError, SpiffeId, TrustDomain};
pub use key::{KeyError, KeyPair};
pub use leaf::{Leaf, LeafError};
pub use renewal::{renew_at, retry_delay};
pub use serving::{Serving, ServingError};
pub use tls::{ClientAuth, Credentials, CredentialsError, Peer, peer, peer_identity, provider, server_name};
pub use verify::{Refusal, refusal};
