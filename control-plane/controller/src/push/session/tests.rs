use std::collections::HashSet;

use outrigger_api::discovery::Status;
use proptest::prelude::*;

use super::*;
use crate::compile::Compiled;

fn found(version: &str) -> Answer {
    let any = prost_types::Any { type_url: Kind::Service.type_url().to_owned(), value: Vec::new() };
    Answer::Found(Arc::new(Compiled { version: version.into(), any, origins: Arc::from([]) }))
}

fn subscribe(names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        resource_names_subscribe: names.iter().map(|&name| name.to_owned()).collect(),
        ..Default::default()
    }
}

fn request(session: &mut Session, request: DeltaDiscoveryRequest) -> Effect {
    session.request(Kind::Service, request, SystemTime::now())
}

fn changed(names: &[&str]) -> Dirty {
    let key = |name: &&str| Key::Service(ServiceKey::parse(name).unwrap());
    Dirty { all: false, keys: names.iter().map(key).collect() }
}

#[test]
fn one_response_is_in_flight_and_stale_nonces_count_for_nothing() {
    let mut session = Session::new(0, 10);
    request(&mut session, subscribe(&["a.x"]));
    let first = session.next(Kind::Service, |_| found("1")).unwrap();
    session.touch(&changed(&["a.x"]));
    assert!(session.next(Kind::Service, |_| found("2")).is_none(), "the first is not answered yet");
    let stale = DeltaDiscoveryRequest { response_nonce: "77".to_owned(), ..Default::default() };
    assert_eq!(request(&mut session, stale).acked, None);
    assert!(session.next(Kind::Service, |_| found("2")).is_none());
    let ack = DeltaDiscoveryRequest { response_nonce: first.nonce, ..Default::default() };
    assert_eq!(request(&mut session, ack.clone()).acked, Some(true));
    let second = session.next(Kind::Service, |_| found("2")).unwrap();
    assert_eq!(second.resources[0].version, "2");
    assert_eq!(request(&mut session, ack).acked, None, "the old nonce again");
}

#[test]
fn what_a_client_holds_counts_in_its_first_request_only() {
    let mut session = Session::new(0, 10);
    let held = |name: &str| DeltaDiscoveryRequest {
        initial_resource_versions: [(name.to_owned(), "1".to_owned())].into(),
        ..subscribe(&[name])
    };
    request(&mut session, held("a.x"));
    assert!(session.next(Kind::Service, |_| found("1")).is_none());
    request(&mut session, held("b.x"));
    assert!(session.next(Kind::Service, |_| found("1")).is_some());
}

#[test]
fn big_subscriptions_are_answered_in_steps() {
    let mut session = Session::new(0, 10_000);
    let names: Vec<String> = (0..2000).map(|n| format!("s{n}.x")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    request(&mut session, subscribe(&names));
    let mut told = HashSet::new();
    while let Some(response) = session.next(Kind::Service, |_| found("1")) {
        assert!(response.resources.len() <= RESPONSE_RESOURCES);
        told.extend(response.resources.into_iter().map(|resource| resource.name));
        request(&mut session, DeltaDiscoveryRequest { response_nonce: response.nonce, ..Default::default() });
    }
    assert_eq!(told.len(), 2000);
}

#[test]
fn keys_are_watched_while_something_depends_on_them() {
    let mut session = Session::new(3, 10);
    let mut of = |kind, subscribe: &[&str], unsubscribe: &[&str]| {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let request = DeltaDiscoveryRequest {
            resource_names_subscribe: owned(subscribe),
            resource_names_unsubscribe: owned(unsubscribe),
            ..Default::default()
        };
        let effect = session.request(kind, request, SystemTime::now());
        (effect.added, effect.removed)
    };
    let ip = Key::Ip("10.0.0.1".parse().unwrap());
    assert_eq!(of(Kind::Destination, &["10.0.0.1:80"], &[]), (vec![ip.clone()], vec![]));
    assert_eq!(of(Kind::Destination, &["10.0.0.1:81"], &["10.0.0.1:80"]), (vec![], vec![]));
    assert_eq!(of(Kind::Destination, &[], &["10.0.0.1:81", "10.0.0.1:81"]), (vec![], vec![ip]));
    assert_eq!(of(Kind::Inbound, &["anything"], &[]), (vec![Key::Connection(3)], vec![]));
}

#[derive(Debug, Clone)]
enum Step {
    Change(u8, Option<u8>),
    Sync(bool),
    Subscribe(u8),
    Unsubscribe(u8),
    Push,
    Ack,
    Nack,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0_u8..6, proptest::option::of(0_u8..3)).prop_map(|(name, version)| Step::Change(name, version)),
        1 => any::<bool>().prop_map(Step::Sync),
        2 => (0_u8..6).prop_map(Step::Subscribe),
        1 => (0_u8..6).prop_map(Step::Unsubscribe),
        3 => Just(Step::Push),
        2 => Just(Step::Ack),
        1 => Just(Step::Nack),
    ]
}

/// The world, and what the client of a session believes.
#[derive(Debug, Default)]
struct Model {
    world: HashMap<String, String>,
    synced: bool,
    subscribed: HashSet<String>,
    /// The last that was sent of each name, taken or refused. `None`: removed.
    told: HashMap<String, Option<String>>,
    in_flight: Option<String>,
}

impl Model {
    fn answer(&self, name: &str) -> Answer {
        match self.world.get(name) {
            Some(version) => found(version),
            None if self.synced => Answer::Absent,
            None => Answer::Silent,
        }
    }

    fn push(&mut self, session: &mut Session) -> Result<bool, TestCaseError> {
        let Some(response) = session.next(Kind::Service, |name| self.answer(name)) else { return Ok(false) };
        prop_assert!(self.in_flight.is_none(), "two in flight");
        self.in_flight = Some(response.nonce);
        let resources =
            response.resources.into_iter().map(|resource| (resource.name, Some(resource.version)));
        let removed = response.removed_resources.into_iter().map(|name| (name, None));
        for (name, said) in resources.chain(removed) {
            prop_assert!(self.subscribed.contains(&name), "{name} was not asked for");
            let before = self.told.insert(name.clone(), said.clone());
            prop_assert_ne!(before, Some(said), "{} was said twice", name);
        }
        Ok(true)
    }

    fn answer_in_flight(&mut self, session: &mut Session, refuse: bool) {
        if let Some(nonce) = self.in_flight.take() {
            let error_detail = refuse.then(|| Status { code: 3, message: "no".to_owned() });
            request(
                session,
                DeltaDiscoveryRequest { response_nonce: nonce, error_detail, ..Default::default() },
            );
        }
    }
}

proptest! {
    #[test]
    fn a_client_ends_with_the_world_whatever_happens_on_the_way(steps in proptest::collection::vec(step(), 0..120)) {
        let mut session = Session::new(0, 100);
        let mut model = Model::default();
        let name = |n: u8| format!("s{n}.x");
        for step in steps {
            match step {
                Step::Change(n, version) => {
                    match version {
                        Some(version) => model.world.insert(name(n), version.to_string()),
                        // Last good: things leave only while the source is synced.
                        None if model.synced => model.world.remove(&name(n)),
                        None => None,
                    };
                    session.touch(&changed(&[&name(n)]));
                }
                Step::Sync(synced) => {
                    let became = synced && !model.synced;
                    model.synced = synced;
                    if became {
                        session.touch(&Dirty { all: true, keys: HashSet::new() });
                    }
                }
                Step::Subscribe(n) => {
                    model.told.remove(&name(n));
                    model.subscribed.insert(name(n));
                    request(&mut session, subscribe(&[&name(n)]));
                }
                Step::Unsubscribe(n) => {
                    model.told.remove(&name(n));
                    model.subscribed.remove(&name(n));
                    let unsubscribe = DeltaDiscoveryRequest { resource_names_unsubscribe: vec![name(n)], ..Default::default() };
                    request(&mut session, unsubscribe);
                }
                Step::Push => { model.push(&mut session)?; }
                Step::Ack => model.answer_in_flight(&mut session, false),
                Step::Nack => model.answer_in_flight(&mut session, true),
            }
            prop_assert_eq!(session.subscriptions(), model.subscribed.len());
        }
        model.answer_in_flight(&mut session, false);
        while model.push(&mut session)? {
            model.answer_in_flight(&mut session, true);
        }
        for name in &model.subscribed {
            match (model.world.get(name), model.told.get(name)) {
                (Some(version), told) => prop_assert_eq!(told, Some(&Some(version.clone()))),
                (None, None) => prop_assert!(!model.synced, "{} was left open", name),
                // What left just before the source was lost is told when it is back.
                (None, Some(told)) => prop_assert!(!model.synced || told.is_none(), "{} is gone", name),
            }
        }
    }
}
