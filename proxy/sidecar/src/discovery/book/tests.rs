use std::net::SocketAddr;

use outrigger_api::discovery::Resource;
use outrigger_certs::{CertificateAuthority, TrustDomain};
use prost::Message;
use prost_types::Any;
use tokio::time::advance;

use super::*;
use crate::config::Config;

const ADDRESS: &str = "10.1.1.1:80";

fn book() -> (Book, Arc<Context>) {
    let config = Config::default();
    let domain: TrustDomain = config.trust_domain.parse().unwrap();
    let store = CertificateAuthority::generate_pem(&domain).unwrap();
    let bundle = CertificateAuthority::from_store(&store, &domain).unwrap().bundle().clone();
    let (ctx, _asks) = Context::new(config, bundle);
    let ctx = Arc::new(ctx);
    let mut book = Book::new(ctx.clone());
    book.connected(&"spiffe://outrigger.local/ns/shop/sa/web".parse().unwrap());
    (book, ctx)
}

fn ask(book: &mut Book, address: &str) -> oneshot::Receiver<Arc<Entry>> {
    let (reply, answer) = oneshot::channel();
    book.ask(Ask { key: Key::Address(address.parse().unwrap()), reply });
    answer
}

fn push(book: &mut Book, type_url: &str, name: &str, message: &impl Message) -> DeltaDiscoveryRequest {
    let value = message.encode_to_vec();
    let resource = Some(Any { type_url: type_url.to_owned(), value });
    book.response(DeltaDiscoveryResponse {
        type_url: type_url.to_owned(),
        nonce: "n".to_owned(),
        resources: vec![Resource { name: name.to_owned(), version: "1".to_owned(), resource }],
        ..Default::default()
    })
}

fn found(book: &mut Book) {
    let mut answer = ask(book, ADDRESS);
    let destination = v1::Destination { service: "orders.shop".into(), port: 80, ..Default::default() };
    push(book, type_url::DESTINATION, ADDRESS, &destination);
    assert!(answer.try_recv().is_err(), "answered before the service was there");
    let service = v1::Service { name: "orders".into(), namespace: "shop".into(), ..Default::default() };
    push(book, type_url::SERVICE, "orders.shop", &service);
    assert!(answer.try_recv().is_ok());
    book.unsaid();
}

fn subscribed(book: &Book) -> (bool, bool) {
    (
        book.held[&Kind::Destination].contains_key(ADDRESS),
        book.held[&Kind::Service].contains_key("orders.shop"),
    )
}

#[tokio::test(start_paused = true)]
async fn what_nobody_dials_leaves_after_ten_minutes() {
    let (mut book, ctx) = book();
    found(&mut book);
    let address: SocketAddr = ADDRESS.parse().unwrap();
    for _ in 0..30 {
        advance(Duration::from_mins(1)).await;
        drop(ctx.directory.resolve(address).await);
        book.tick();
        assert_eq!(subscribed(&book), (true, true));
    }
    advance(IDLE + Duration::from_secs(2)).await;
    book.tick();
    assert_eq!(subscribed(&book), (false, false));
    let left: Vec<_> = book.unsaid().into_iter().flat_map(|r| r.resource_names_unsubscribe).collect();
    assert_eq!(left, [ADDRESS, "orders.shop"]);
}

#[tokio::test(start_paused = true)]
async fn a_service_stays_while_a_connection_holds_it() {
    let (mut book, ctx) = book();
    found(&mut book);
    let outrigger_core::resolve::Knowledge::Found(target) =
        ctx.directory.resolve(ADDRESS.parse().unwrap()).await
    else {
        panic!()
    };
    advance(IDLE * 2).await;
    book.tick();
    advance(IDLE * 2).await;
    book.tick();
    assert_eq!(subscribed(&book), (false, true));
    drop(target);
    book.tick();
    assert_eq!(subscribed(&book), (false, false));
}

#[tokio::test(start_paused = true)]
async fn nothing_leaves_while_the_stream_is_down() {
    let (mut book, _ctx) = book();
    found(&mut book);
    book.disconnected();
    advance(IDLE * 10).await;
    book.tick();
    assert_eq!(subscribed(&book), (true, true));
}

#[tokio::test(start_paused = true)]
async fn not_found_is_a_word_of_the_stream_that_said_it() {
    let (mut book, ctx) = book();
    let mut answer = ask(&mut book, ADDRESS);
    book.response(DeltaDiscoveryResponse {
        type_url: type_url::DESTINATION.to_owned(),
        removed_resources: vec![ADDRESS.to_owned()],
        ..Default::default()
    });
    assert!(matches!(answer.try_recv().unwrap().answer, Answer::NotFound(_)));
    book.disconnected();
    book.connected(&"spiffe://outrigger.local/ns/shop/sa/web".parse().unwrap());
    // Believed for five seconds, then open again: this controller may not be synced.
    advance(NOT_FOUND).await;
    let mut again = ask(&mut book, ADDRESS);
    assert!(again.try_recv().is_err());
    assert!(!ctx.directory.known().is_empty());
}

#[tokio::test(start_paused = true)]
async fn with_the_stream_down_for_long_silence_comes_at_once() {
    let (mut book, _ctx) = book();
    book.disconnected();
    let mut early = ask(&mut book, ADDRESS);
    assert_eq!(early.try_recv().unwrap_err(), oneshot::error::TryRecvError::Empty);
    advance(GRACE * 2).await;
    let mut late = ask(&mut book, ADDRESS);
    assert_eq!(late.try_recv().unwrap_err(), oneshot::error::TryRecvError::Closed);
}
