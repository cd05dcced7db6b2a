//! The proxy's DNS as a resolver sees it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::support::{Fake, eventually};
use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{RData, Record, RecordType, rdata::A},
};
use hickory_resolver::{
    Resolver, TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts},
    net::runtime::TokioRuntimeProvider,
};
use outrigger_api::{MESH_NAME, type_url, v1};
use outrigger_proxy::{config::Config, context::Context, dns, run};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UdpSocket},
};

struct Server {
    ctx: Arc<Context>,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

async fn serve(fake: &Fake, change: impl FnOnce(&mut Config)) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let mut config = fake.config(folder.path());
    change(&mut config);
    // A port that is free for UDP may be taken for TCP.
    let (sockets, address) = loop {
        let address = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        config.ports.dns = address.port();
        config.bind.dns = vec![address.ip()];
        if let Ok(sockets) = dns::Sockets::bind(&config).await {
            break (sockets, address);
        }
    };
    let (ctx, asks) = Context::from_config(config).unwrap();
    let ctx = Arc::new(ctx);
    run::start(&ctx, asks);
    sockets.serve(&ctx);
    Server { ctx, address, _folder: folder }
}

fn resolver(address: SocketAddr, tcp: bool) -> TokioResolver {
    let mut connection = if tcp { ConnectionConfig::tcp() } else { ConnectionConfig::udp() };
    connection.port = address.port();
    let mut server = NameServerConfig::udp(address.ip());
    server.connections = vec![connection];
    let config = ResolverConfig::from_name_servers(vec![server]);
    let mut options = ResolverOpts::default();
    options.attempts = 0;
    options.cache_size = 0;
    Resolver::builder_with_config(config, TokioRuntimeProvider::default())
        .with_options(options)
        .build()
        .unwrap()
}

/// A name server that answers every question with `address`, over UDP and TCP on one port.
async fn name_server(address: [u8; 4]) -> SocketAddr {
    let answer = move |query: &[u8]| {
        let mut message = Message::from_vec(query).unwrap();
        let name = message.queries[0].name().clone();
        message.add_answer(Record::from_rdata(name, 60, RData::A(A(address.into()))));
        message.into_response().to_vec().unwrap()
    };
    let (tcp, udp) = loop {
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
            break (tcp, udp);
        }
    };
    let own = tcp.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = udp.recv_from(&mut buffer).await {
            udp.send_to(&answer(&buffer[..length]), from).await.unwrap();
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            let length = stream.read_u16().await.unwrap();
            let mut query = vec![0; length.into()];
            stream.read_exact(&mut query).await.unwrap();
            let reply = answer(&query);
            stream.write_u16(reply.len().try_into().unwrap()).await.unwrap();
            stream.write_all(&reply).await.unwrap();
        }
    });
    own
}

async fn ips(resolver: &TokioResolver, name: &str, kind: RecordType) -> Vec<IpAddr> {
    let lookup = resolver.lookup(name, kind).await.unwrap_or_else(|error| panic!("{name}: {error}"));
    lookup.answers().iter().filter_map(|record| record.data.ip_addr()).collect()
}

async fn code(resolver: &TokioResolver, name: &str) -> String {
    resolver.lookup(name, RecordType::A).await.unwrap_err().to_string()
}

#[tokio::test]
async fn names_of_the_mesh_have_virtual_addresses() {
    let fake = Fake::new().await;
    fake.start().await;
    fake.add_service("orders.shop.mesh", "orders.shop", "1", "10.2.2.2");
    fake.add_service("orders.service.consul", "orders.shop", "1", "10.2.2.2");
    fake.state().absent.insert("nobody.shop.mesh".to_owned());
    let server = serve(&fake, |config| config.dns.ipv6 = Some(true)).await;
    eventually("the mesh is known", || server.ctx.ready.missing() == ["listeners"]).await;
    for tcp in [false, true] {
        let resolver = resolver(server.address, tcp);
        let virtual_v4: IpAddr = "253.0.0.9".parse().unwrap();
        let virtual_v6: IpAddr = "fd00:240::9".parse().unwrap();
        assert_eq!(ips(&resolver, "orders.shop.mesh.", RecordType::A).await, [virtual_v4]);
        assert_eq!(ips(&resolver, "ORDERS.shop.Mesh.", RecordType::AAAA).await, [virtual_v6]);
        assert_eq!(ips(&resolver, "orders.service.consul.", RecordType::A).await, [virtual_v4]);
        let nobody = resolver.lookup("nobody.shop.mesh.", RecordType::A).await.unwrap_err();
        assert!(nobody.is_nx_domain(), "{nobody}");
        // No synced source has said a word of it.
        let silent = resolver.lookup("unheard.shop.mesh.", RecordType::A).await.unwrap_err();
        assert!(!silent.is_nx_domain() && !silent.is_no_records_found(), "{silent}");
    }
}

#[tokio::test]
async fn other_names_go_to_their_name_servers() {
    let fake = Fake::new().await;
    let upstream = name_server([192, 0, 2, 1]).await;
    let consul = name_server([192, 0, 2, 2]).await;
    let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let server = serve(&fake, |config| {
        config.dns.upstreams = vec![dead, upstream];
        config.dns.consul = Some(consul);
    })
    .await;
    for tcp in [false, true] {
        let resolver = resolver(server.address, tcp);
        let plain: IpAddr = "192.0.2.1".parse().unwrap();
        let of_consul: IpAddr = "192.0.2.2".parse().unwrap();
        // Without a controller: these names need none.
        assert_eq!(ips(&resolver, "example.com.", RecordType::A).await, [plain]);
        assert_eq!(ips(&resolver, "orders.service.consul.", RecordType::A).await, [of_consul]);
    }
}

#[tokio::test]
async fn a_name_server_that_is_gone_is_a_failure_not_an_answer() {
    let fake = Fake::new().await;
    let dead = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let server = serve(&fake, |config| config.dns.upstreams = vec![dead]).await;
    let text = code(&resolver(server.address, false), "example.com.").await;
    assert!(
        text.contains(&ResponseCode::ServFail.to_string()) || text.to_lowercase().contains("server failure"),
        "{text}"
    );
}

#[tokio::test]
async fn hosts_of_external_services_lead_to_the_mesh_while_they_are_in_the_list() {
    const HOST: &str = "api.partner.example";
    let fake = Fake::new().await;
    let upstream = name_server([192, 0, 2, 1]).await;
    let tell = |version: &str, hosts: &[(&str, &str)]| {
        let host = |(host, service): &(&str, &str)| v1::ExternalHost {
            host: (*host).to_owned(),
            service: (*service).to_owned(),
        };
        let mesh = v1::Mesh { external_hosts: hosts.iter().map(host).collect(), ..fake.mesh() };
        fake.set(type_url::MESH, MESH_NAME, version, &mesh);
    };
    tell("2", &[(HOST, "partner.shop"), ("unheard.example", "unheard.shop"), ("late.example", "late.shop")]);
    fake.add_service(HOST, "partner.shop", "1", "198.51.100.7");
    fake.state().absent.insert("late.example".to_owned());
    fake.start().await;
    let server = serve(&fake, |config| {
        config.dns.upstreams = vec![upstream];
        config.dns.ipv6 = Some(true);
    })
    .await;
    eventually("the mesh is known", || server.ctx.ready.missing() == ["listeners"]).await;
    let (real, ours): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "253.0.0.9".parse().unwrap());
    let ours_v6: IpAddr = "fd00:240::9".parse().unwrap();
    for tcp in [false, true] {
        let resolver = resolver(server.address, tcp);
        assert_eq!(ips(&resolver, "api.partner.example.", RecordType::A).await, [ours]);
        assert_eq!(ips(&resolver, "API.Partner.example.", RecordType::AAAA).await, [ours_v6]);
        let https = resolver.lookup("api.partner.example.", RecordType::HTTPS).await.unwrap_err();
        assert!(https.is_no_records_found() && !https.is_nx_domain(), "{https}");
        assert_eq!(ips(&resolver, "x.api.partner.example.", RecordType::A).await, [real]);
        // Told of the host before the service is there.
        assert_eq!(ips(&resolver, "late.example.", RecordType::A).await, [real]);
        let silent = resolver.lookup("unheard.example.", RecordType::A).await.unwrap_err();
        assert!(!silent.is_nx_domain() && !silent.is_no_records_found(), "{silent}");
    }

    // Nothing is forgotten without a controller, and nothing is taken up that does not check out.
    let resolver = resolver(server.address, false);
    fake.stop().await;
    eventually("the stream is down", || {
        server.ctx.metrics.encode().contains("outrigger_controller_connected 0")
    })
    .await;
    assert_eq!(ips(&resolver, "api.partner.example.", RecordType::A).await, [ours]);
    tell("3", &[("Not.Lower.example", "partner.shop")]);
    fake.start().await;
    eventually("the fault is said", || {
        let state = fake.state();
        let mut faults = state.requests.iter().filter_map(|request| request.error_detail.as_ref());
        faults.any(|fault| fault.message.contains("no DNS name"))
    })
    .await;
    assert_eq!(ips(&resolver, "api.partner.example.", RecordType::A).await, [ours]);

    // The object is deleted: either word comes first.
    fake.remove(type_url::DESTINATION, HOST);
    tell("4", &[]);
    loop {
        let found = ips(&resolver, "api.partner.example.", RecordType::A).await;
        if found == [real] {
            break;
        }
        assert_eq!(found, [ours]);
        tokio::task::yield_now().await;
    }
}
