//! A peer that seals whatever it is told to, where rustls never would.

use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, ProtocolVersion, SupportedCipherSuite,
    Tls13CipherSuite,
    client::ClientConnectionData,
    crypto::cipher::{
        AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, MessageEncrypter, OutboundChunks,
        OutboundPlainMessage,
    },
    kernel::KernelConnection,
};

use super::{super::*, Mesh};

/// The client of an established connection, down to its keys.
pub(super) struct Raw {
    suite: &'static Tls13CipherSuite,
    connection: KernelConnection<ClientConnectionData>,
    sealer: Box<dyn MessageEncrypter>,
    sealed: u64,
    opener: Box<dyn MessageDecrypter>,
    opened: u64,
}

pub(super) const ALERT: ContentType = ContentType::Alert;
pub(super) const HANDSHAKE: ContentType = ContentType::Handshake;
pub(super) const DATA: ContentType = ContentType::ApplicationData;

/// Our server's session, and who talks to it.
pub(super) fn raw_peer() -> (Session, Raw) {
    let mesh = Mesh::new();
    let mut config = (*mesh.client()).clone();
    config.enable_secret_extraction = true;
    let client = UnbufferedClientConnection::new(Arc::new(config), outrigger_certs::server_name()).unwrap();
    let mut client = Session::new(Connection::Client(Box::new(client)));
    let server = UnbufferedServerConnection::new(mesh.server()).unwrap();
    let mut server = Session::new(Connection::Server(Box::new(server)));
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    while client.state().is_handshaking() || server.state().is_handshaking() {
        talk(&mut client, &mut to_client, &mut to_server);
        talk(&mut server, &mut to_server, &mut to_client);
    }
    let Connection::Client(client) = client.connection else { unreachable!() };
    let Some(SupportedCipherSuite::Tls13(suite)) = client.negotiated_cipher_suite() else { unreachable!() };
    let (secrets, connection) = client.dangerous_into_kernel_connection().unwrap();
    let (sealed, (key, iv)) = (secrets.tx.0, aes_128(secrets.tx.1));
    let sealer = suite.aead_alg.encrypter(key, iv);
    let (opened, (key, iv)) = (secrets.rx.0, aes_128(secrets.rx.1));
    let opener = suite.aead_alg.decrypter(key, iv);
    (server, Raw { suite, connection, sealer, sealed, opener, opened })
}

fn talk(session: &mut Session, records: &mut Vec<u8>, out: &mut Vec<u8>) {
    let consumed = session.advance(records, &Wish::Open, &mut Vec::new(), out).unwrap();
    records.drain(..consumed);
}

impl Raw {
    /// One record.
    pub(super) fn seal(&mut self, payload: &[u8], typ: ContentType) -> Vec<u8> {
        let payload = OutboundChunks::Single(payload);
        let message = OutboundPlainMessage { typ, version: ProtocolVersion::TLSv1_2, payload };
        let record = self.sealer.encrypt(message, self.sealed).unwrap();
        self.sealed += 1;
        record.encode()
    }

    /// After a key update of ours.
    pub(super) fn update(&mut self) {
        let (sealed, secrets) = self.connection.update_tx_secret().unwrap();
        let (key, iv) = aes_128(secrets);
        self.sealed = sealed;
        self.sealer = self.suite.aead_alg.encrypter(key, iv);
    }

    /// The alert that is the one record of `out`.
    pub(super) fn alert(&mut self, out: &[u8]) -> AlertDescription {
        let mut payload = out[HEADER..].to_vec();
        let message = InboundOpaqueMessage::new(DATA, ProtocolVersion::TLSv1_2, &mut payload);
        let message = self.opener.decrypt(message, self.opened).unwrap();
        self.opened += 1;
        assert_eq!(message.typ, ALERT);
        message.payload[1].into()
    }
}

fn aes_128(secrets: ConnectionTrafficSecrets) -> (AeadKey, Iv) {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (key, iv),
        _ => panic!("another suite comes first"),
    }
}
