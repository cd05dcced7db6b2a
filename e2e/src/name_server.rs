//! A name server as the suites' world has it: at the address that every `resolv.conf` names, answering what it is told.
//!
//! Workloads never reach it for names of the mesh, because their sidecars answer those; a controller asks it for the hosts
//! of external services.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use hickory_proto::op::{Message, OpCode, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record, RecordType};
use tokio::net::UdpSocket;
use tokio::task::AbortHandle;

use crate::network::{Host, Network};
use crate::sandbox::NAMESERVER;

/// So short that whoever asks again gets what holds by then.
const TTL_SECONDS: u32 = 1;
/// The largest question that is read; without EDNS none is larger.
const MAX_BYTES: usize = 1500;

type Names = Arc<Mutex<BTreeMap<String, Vec<Ipv4Addr>>>>;

/// A name server. It runs until it is stopped or dropped.
#[derive(Debug)]
pub struct NameServer {
    host: Host,
    names: Names,
    serving: Option<AbortHandle>,
}

impl NameServer {
    /// Starts one, which knows no name yet.
    pub async fn start(network: &Network) -> anyhow::Result<Self> {
        let host = network.host("names").await?;
        host.also_at(vec![NAMESERVER.parse().context("the name server's address")?]).await?;
        let mut server = Self { host, names: Names::default(), serving: None };
        server.start_again().await?;
        Ok(server)
    }

    /// From now on `name`, without its final dot, has these addresses.
    pub fn set(&self, name: &str, addresses: &[Ipv4Addr]) {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.insert(name.to_owned(), addresses.to_vec());
    }

    /// From now on nobody answers.
    pub fn stop(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
        }
    }

    /// Ends [`NameServer::stop`].
    pub async fn start_again(&mut self) -> anyhow::Result<()> {
        let names = Arc::clone(&self.names);
        let serve = move || async move {
            let socket = UdpSocket::bind((NAMESERVER, 53)).await.context("listening for questions")?;
            Ok(tokio::task::spawn_local(serve(socket, names)).abort_handle())
        };
        self.serving = Some(self.host.run(serve).await?);
        Ok(())
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn serve(socket: UdpSocket, names: Names) {
    let mut bytes = [0; MAX_BYTES];
    // An error is about an asker that went away.
    loop {
        let Ok((count, asker)) = socket.recv_from(&mut bytes).await else { continue };
        if let Some(answer) = answer(&bytes[..count], &names) {
            let _ = socket.send_to(&answer, asker).await;
        }
    }
}

/// The answer to one question; none to what is no question.
fn answer(question: &[u8], names: &Names) -> Option<Vec<u8>> {
    let question = Message::from_vec(question).ok()?;
    let query = question.queries.first()?.clone();
    let mut answer = Message::response(question.metadata.id, OpCode::Query);
    answer.metadata.recursion_desired = question.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    let name = query.name().to_ascii().to_ascii_lowercase();
    let known = names.lock().unwrap_or_else(PoisonError::into_inner).get(name.trim_end_matches('.')).cloned();
    match known {
        // It has no address of another family.
        Some(addresses) if query.query_type() == RecordType::A => {
            for address in addresses {
                answer.add_answer(Record::from_rdata(
                    query.name().clone(),
                    TTL_SECONDS,
                    RData::A(A(address)),
                ));
            }
        }
        Some(_) => {}
        None => answer.metadata.response_code = ResponseCode::NXDomain,
    }
    answer.add_query(query);
    answer.to_vec().ok()
}
