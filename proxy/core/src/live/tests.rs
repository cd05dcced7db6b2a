use std::{net::IpAddr, time::Duration};

use super::*;
use crate::{
    breaker::circuit::{Signal, Standing},
    model::Health,
    route::Routes,
    traffic::Traffic,
};

fn endpoint(number: u8, ports: &[u16]) -> Arc<Endpoint> {
    Arc::new(Endpoint {
        id: format!("e{number}").into(),
        address: IpAddr::from([10, 0, 0, number]),
        ports: ports.iter().map(|port| (*port, 8080)).collect(),
        weight: 1,
        health: Health::Healthy,
        identity: None,
        zone: "".into(),
    })
}

fn service(endpoints: Vec<Arc<Endpoint>>, breaker: Option<Breaker>) -> Arc<Service> {
    Arc::new(Service {
        name: "s.default".into(),
        ports: BTreeMap::new(),
        endpoints,
        source: "file".into(),
        routes: Routes::default(),
        traffic: breaker.map(|breaker| Arc::new(Traffic { breaker: Some(breaker), ..Traffic::default() })),
        leads_to: Vec::new(),
    })
}

fn fail(live: &Live, port: u16, service: &Service, at: usize) {
    let (group, circuits) = live.on_port(port, &service.endpoints);
    for _ in 0..5 {
        circuits[at].as_ref().unwrap().record(&group, Signal::Silence, false, 0, 0);
    }
}

fn standing(live: &Live, port: u16, service: &Service, at: usize) -> Option<Standing> {
    live.on_port(port, &service.endpoints).1[at].as_ref().map(|circuit| circuit.standing(0))
}

#[test]
fn ports_are_counted_apart() {
    let live = Live::new(Instant::now());
    let service = service(vec![endpoint(1, &[80, 81]), endpoint(2, &[80]), endpoint(3, &[81])], None);
    live.adopt(&service);
    fail(&live, 80, &service, 0);
    assert_eq!(standing(&live, 80, &service, 0), Some(Standing::Ejected));
    assert_eq!(standing(&live, 81, &service, 0), Some(Standing::Stands));
    assert_eq!(standing(&live, 81, &service, 1), None, "it is not on that port");
    assert_eq!((live.ejected(), live.panicking()), (1, false));
    fail(&live, 80, &service, 1);
    assert_eq!((live.ejected(), live.panicking()), (1, true));
    assert_eq!(live.ejections().map(|(_, count)| count).collect::<Vec<_>>(), [1, 0, 0]);
}

#[test]
fn what_is_known_outlives_a_push_but_not_its_endpoint() {
    let live = Live::new(Instant::now());
    let before = service(vec![endpoint(1, &[80]), endpoint(2, &[80]), endpoint(3, &[80])], None);
    live.adopt(&before);
    fail(&live, 80, &before, 0);
    let more = service((1..=5).map(|number| endpoint(number, &[80])).collect(), None);
    live.adopt(&more);
    assert_eq!(standing(&live, 80, &more, 0), Some(Standing::Ejected));
    fail(&live, 80, &more, 1);
    assert_eq!(live.ejected(), 2);
    let fewer = service(vec![endpoint(1, &[80]), endpoint(2, &[80])], None);
    live.adopt(&fewer);
    assert_eq!(live.ejected(), 1, "half of two");
    let moved = Arc::new(Endpoint { address: IpAddr::from([10, 0, 1, 1]), ..(*endpoint(1, &[80])).clone() });
    let moved = service(vec![moved, endpoint(2, &[80])], None);
    live.adopt(&moved);
    assert_eq!(standing(&live, 80, &moved, 0), Some(Standing::Stands));
    assert_eq!(standing(&live, 80, &before, 2), None, "it has left");
    live.adopt(&service(Vec::new(), None));
    assert_eq!((live.ejected(), live.panicking(), live.known().ports.len()), (0, false, 1));
}

#[test]
fn another_policy_begins_anew() {
    let live = Live::new(Instant::now());
    let endpoints = || vec![endpoint(1, &[80]), endpoint(2, &[80])];
    let before = service(endpoints(), None);
    live.adopt(&before);
    fail(&live, 80, &before, 0);
    let same = service(endpoints(), Some(Breaker::default()));
    live.adopt(&same);
    assert_eq!(live.ejected(), 1, "the same, said aloud");
    let other = Breaker { base_ejection: Duration::from_secs(2), ..Breaker::default() };
    let other = service(endpoints(), Some(other));
    live.adopt(&other);
    assert_eq!((live.ejected(), standing(&live, 80, &other, 0)), (0, Some(Standing::Stands)));
}
