//! Certificates for what is not ours: Consul's TLS mode, peers that the mesh must refuse, and peers that speak as a
//! sidecar does and are none.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::client;
use crate::network::Host;

/// A `ClientHello` that offers TLS 1.2 and nothing else: one suite, one group, no `supported_versions` (RFC 5246).
pub const CLIENT_HELLO_12: &[u8] = b"\x16\x03\x01\x00\x47\x01\x00\x00\x43\x03\x03\
    0123456789abcdef0123456789abcdef\x00\x00\x02\xc0\x2b\x01\x00\x00\x18\
    \x00\x0a\x00\x04\x00\x02\x00\x17\x00\x0b\x00\x02\x01\x00\x00\x0d\x00\x06\x00\x04\x04\x03\x08\x04";

/// Ends a certificate in PEM (RFC 7468, section 5).
const END: &str = "-----END CERTIFICATE-----";

/// A certificate authority of a test.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    // Whether `pem` is trusted as it is; otherwise a leaf has to bring it along.
    is_root: bool,
}

/// A leaf and its key, PEM.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// The certificate, and what stands between it and a root.
    pub chain: String,
    /// Its key.
    pub key: String,
}

impl Leaf {
    fn parse(&self) -> anyhow::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let chain = CertificateDer::pem_slice_iter(self.chain.as_bytes()).collect::<Result<_, _>>();
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).context("reading its key")?;
        Ok((chain.context("reading a leaf")?, key))
    }
}

/// How a stranger introduces itself. It trusts every server: what is tested is whether the server trusts it.
#[derive(Clone, Debug)]
pub struct Handshake {
    /// Its certificate, if it has one.
    pub leaf: Option<Leaf>,
    /// What it wants to speak.
    pub alpn: &'static str,
}

impl Default for Handshake {
    fn default() -> Self {
        Self { leaf: None, alpn: "outrigger-tcp" }
    }
}

impl Authority {
    /// Makes a self-signed root.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate().context("making a CA key")?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).context("signing a root")?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem, is_root: true })
    }

    /// An authority that exists, below a root: its certificate is the first in `text`, and its key the first key.
    pub fn below_root(text: &str) -> anyhow::Result<Self> {
        let end = text.find(END).context("there is no certificate")? + END.len();
        let pem = format!("{}\n", &text[..end]);
        let key = PrivateKeyDer::from_pem_slice(text.as_bytes()).context("reading a CA's key")?;
        let key = KeyPair::try_from(&key).context("using a CA's key")?;
        let issuer = Issuer::from_ca_cert_pem(&pem, key).context("reading a CA's certificate")?;
        Ok(Self { issuer, pem, is_root: false })
    }

    /// Its certificate, PEM.
    pub fn pem(&self) -> String {
        self.pem.clone()
    }

    /// A certificate for a server on `host`, with its addresses and one name.
    pub fn server(&self, host: &Host, name: &str) -> anyhow::Result<Leaf> {
        let names = vec![
            SanType::DnsName(name.try_into().context("a DNS name")?),
            SanType::DnsName("localhost".try_into().context("a DNS name")?),
            SanType::IpAddress(host.v4().into()),
            SanType::IpAddress(host.v6().into()),
        ];
        self.sign(names)
    }

    /// A certificate for a workload: one URI, as the mesh's own leaves have.
    pub fn workload(&self, uri: &str) -> anyhow::Result<Leaf> {
        self.sign(vec![SanType::URI(uri.try_into().context("a URI")?)])
    }

    fn sign(&self, names: Vec<SanType>) -> anyhow::Result<Leaf> {
        let key = KeyPair::generate().context("making a key")?;
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params.signed_by(&key, &self.issuer).context("signing a leaf")?;
        let above = if self.is_root { "" } else { &self.pem };
        Ok(Leaf { chain: leaf.pem() + above, key: key.serialize_pem() })
    }
}

/// Connects, shakes hands, sends a byte, and returns what came back before the server closed. In TLS 1.3 a server's
/// refusal of the client arrives only after the client's side of the handshake is complete.
pub async fn shake_hands(address: SocketAddr, handshake: Handshake) -> anyhow::Result<String> {
    let connector = connector(&handshake)?;
    let name = ServerName::IpAddress(address.ip().into());
    let stream = client::connect(address).await?;
    let exchange = async {
        let mut tls = connector.connect(name, stream).await.context("shaking hands")?;
        tls.write_all(b"\x01").await.context("sending a byte")?;
        let mut answer = [0; 64];
        let count = tls.read(&mut answer).await.context("reading an answer")?;
        anyhow::ensure!(count > 0, "the server closed");
        Ok(String::from_utf8_lossy(&answer[..count]).into_owned())
    };
    tokio::time::timeout(client::CLIENT_LIMIT, exchange).await.context("neither answered nor refused")?
}

/// Listens on `host`'s loopback and carries every connection to `target` over TLS with this introduction: it makes a
/// client that speaks clear text look like a peer's sidecar. Works as long as the host lives; returns where it listens.
pub async fn relay(host: &Host, target: SocketAddr, handshake: Handshake) -> anyhow::Result<SocketAddr> {
    host.run(move || async move {
        let connector = connector(&handshake)?;
        let name = ServerName::IpAddress(target.ip().into());
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("listening for the relay")?;
        let address = listener.local_addr().context("asking for the relay's address")?;
        tokio::task::spawn_local(async move {
            while let Ok((mut clear, _)) = listener.accept().await {
                let (connector, name) = (connector.clone(), name.clone());
                tokio::task::spawn_local(async move {
                    let mut tls = connector.connect(name, client::connect(target).await?).await?;
                    // An end or an error of one side becomes the end of the other: that is all a client sees of it.
                    tokio::io::copy_bidirectional(&mut clear, &mut tls).await?;
                    anyhow::Ok(())
                });
            }
        });
        Ok(address)
    })
    .await
}

/// Listens at a port of `host`'s address for TLS with this certificate, and carries every connection to `target` in clear text:
/// the reverse of [`relay`]. Works as long as the host lives; returns where it listens.
pub async fn terminate(
    host: &Host,
    port: u16,
    leaf: &Leaf,
    alpn: &str,
    target: SocketAddr,
) -> anyhow::Result<SocketAddr> {
    let (chain, key) = leaf.parse()?;
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .context("choosing TLS 1.3")?
        .with_no_client_auth();
    let mut config = config.with_single_cert(chain, key).context("using a leaf")?;
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    let (acceptor, address) = (TlsAcceptor::from(Arc::new(config)), host.at(port));
    host.run(move || async move {
        let listener = TcpListener::bind(address).await.context("listening for TLS")?;
        tokio::task::spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::task::spawn_local(async move {
                    let mut tls = acceptor.accept(stream).await?;
                    let mut clear = client::connect(target).await?;
                    tokio::io::copy_bidirectional(&mut tls, &mut clear).await?;
                    anyhow::Ok(())
                });
            }
        });
        Ok(address)
    })
    .await
}

fn connector(handshake: &Handshake) -> anyhow::Result<TlsConnector> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let trusting = Arc::new(TrustEverybody(Arc::clone(&provider)));
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .context("choosing TLS 1.3")?
        .dangerous()
        .with_custom_certificate_verifier(trusting);
    let mut config = match &handshake.leaf {
        None => config.with_no_client_auth(),
        Some(leaf) => {
            let (chain, key) = leaf.parse()?;
            config.with_client_auth_cert(chain, key).context("using a leaf")?
        }
    };
    config.alpn_protocols = vec![handshake.alpn.as_bytes().to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

#[derive(Debug)]
struct TrustEverybody(Arc<CryptoProvider>);

impl ServerCertVerifier for TrustEverybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
