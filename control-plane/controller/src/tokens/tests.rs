use super::*;
use crate::store::tests::{Disk, until};

const HOUR: Duration = Duration::from_hours(1);

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_hours(500_000)
}

fn tokens(store: &Arc<Store>) -> Tokens {
    let controller = "spiffe://t.local/ns/outrigger-system/sa/outrigger-controller".parse().unwrap();
    Tokens::load(Arc::clone(store), controller, 24 * HOUR).unwrap()
}

fn new(services: &[&str], cidrs: &[&str], uses: Uses) -> NewToken {
    NewToken {
        identity: "spiffe://t.local/ns/shop/sa/orders".to_owned(),
        services: services.iter().map(|&s| s.to_owned()).collect(),
        cidrs: cidrs.iter().map(|c| c.parse().unwrap()).collect(),
        ttl_seconds: 3600,
        uses,
    }
}

#[tokio::test]
async fn a_one_time_token_is_used_once_and_its_grant_outlives_it_and_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let store = Arc::new(Store::open(&path).unwrap());
    let tokens = self::tokens(&store);
    let (info, text) = tokens.create(new(&["orders.shop"], &[], Uses::OneTime), now()).await.unwrap();
    assert!(!format!("{tokens:?} {info:?}").contains(&text[PREFIX.len() + 13..]), "no secret in Debug");

    let (orders, other) = (ServiceKey::parse("orders.shop").unwrap(), ServiceKey::parse("web.shop").unwrap());
    let peer: IpAddr = "10.0.0.5".parse().unwrap();
    let first = tokens.check_text(&text, now()).unwrap();
    let second = tokens.check_text(&text, now()).unwrap();
    assert_eq!(
        tokens.grants(&first.identity, &orders, peer, peer),
        Err(NotGranted::NoToken),
        "not joined yet"
    );
    tokens.redeem(&first, now() + 24 * HOUR, now()).await.unwrap().unwrap();
    assert_eq!(tokens.redeem(&second, now() + 24 * HOUR, now()).await.unwrap(), Err(TokenRefused::Used));
    assert_eq!(tokens.check_text(&text, now()).unwrap_err(), TokenRefused::Used);

    drop(tokens);
    drop(store);
    let store = Arc::new(Store::open(&path).unwrap());
    let tokens = self::tokens(&store);
    assert_eq!(tokens.check_text(&text, now()).unwrap_err(), TokenRefused::Used);
    assert_eq!(tokens.grants(&first.identity, &orders, peer, peer), Ok(()));
    assert_eq!(tokens.grants(&first.identity, &other, peer, peer), Err(NotGranted::Service));
    let elsewhere = "10.0.0.6".parse().unwrap();
    assert_eq!(tokens.grants(&first.identity, &orders, elsewhere, peer), Err(NotGranted::Address));

    // The token has expired long ago; renewals keep the grant.
    tokens.renewed(&first.identity, now() + 48 * HOUR);
    tokens.create(new(&[], &[], Uses::Reusable), now() + 30 * HOUR).await.unwrap();
    assert_eq!(tokens.grants(&first.identity, &orders, peer, peer), Ok(()));
    tokens.create(new(&[], &[], Uses::Reusable), now() + 52 * HOUR).await.unwrap();
    assert_eq!(
        tokens.grants(&first.identity, &orders, peer, peer),
        Err(NotGranted::NoToken),
        "no leaf is alive"
    );
}

#[tokio::test]
async fn wrong_expired_and_revoked_tokens_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(&directory.path().join("store")).unwrap());
    let tokens = self::tokens(&store);
    let (info, text) = tokens.create(new(&[], &["10.0.0.0/8"], Uses::Reusable), now()).await.unwrap();
    for wrong in
        ["", "ort1_", "ort1__", "x", &text[..text.len() - 1], &format!("{text}0"), &text.to_uppercase()]
    {
        assert_eq!(tokens.check_text(wrong, now()).unwrap_err(), TokenRefused::Unknown, "{wrong}");
    }
    assert_eq!(tokens.check_text(&text, now() + HOUR).unwrap_err(), TokenRefused::Expired);
    for _ in 0..2 {
        let checked = tokens.check_text(&format!(" {text}\n"), now()).unwrap();
        tokens.redeem(&checked, now() + HOUR, now()).await.unwrap().unwrap();
    }
    assert!(tokens.revoke(&info.id).await.unwrap());
    assert!(!tokens.revoke(&info.id).await.unwrap());
    assert_eq!(tokens.check_text(&text, now()).unwrap_err(), TokenRefused::Unknown);
}

#[tokio::test]
async fn a_token_with_networks_holds_for_these_alone() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(&directory.path().join("store")).unwrap());
    let tokens = self::tokens(&store);
    let (_, text) = tokens.create(new(&["a", "b"], &["10.0.0.0/8"], Uses::Reusable), now()).await.unwrap();
    let (_, other) = tokens.create(new(&["c"], &["192.168.0.0/16"], Uses::Reusable), now()).await.unwrap();
    for text in [text, other] {
        let checked = tokens.check_text(&text, now()).unwrap();
        tokens.redeem(&checked, now() + HOUR, now()).await.unwrap().unwrap();
    }
    let identity = "spiffe://t.local/ns/shop/sa/orders".parse().unwrap();
    let grants = |service: &str, address: &str| {
        let address = address.parse().unwrap();
        tokens.grants(&identity, &ServiceKey::parse(service).unwrap(), address, "172.16.0.1".parse().unwrap())
    };
    assert_eq!(grants("a", "10.1.2.3"), Ok(()));
    assert_eq!(grants("c", "192.168.0.1"), Ok(()));
    assert_eq!(grants("a", "192.168.0.1"), Err(NotGranted::Address), "grants do not mix");
    assert_eq!(grants("a", "172.16.0.1"), Err(NotGranted::Address), "not even the peer's own address");
    assert_eq!(grants("d", "10.1.2.3"), Err(NotGranted::Service));
}

#[tokio::test]
async fn all_faults_of_a_request_are_listed() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Store::open(&directory.path().join("store")).unwrap());
    let tokens = self::tokens(&store);
    for identity in [
        "spiffe://t.local/ns/outrigger-system/sa/outrigger-controller",
        "spiffe://other/ns/shop/sa/orders",
        "orders",
    ] {
        let request = NewToken {
            identity: identity.to_owned(),
            ttl_seconds: 0,
            ..new(&["../etc"], &[], Uses::OneTime)
        };
        match tokens.create(request, now()).await {
            Err(NewTokenError::Invalid(faults)) => assert_eq!(faults.len(), 3, "{faults:?}"),
            other => panic!("{identity}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn while_the_disk_fails_memory_is_on_the_safe_side_and_the_disk_follows() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Disk::new(directory.path(), Duration::from_millis(200));
    let store = disk.open();
    let tokens = self::tokens(&store);
    // A busy disk may be slower than the patience of this test.
    let make = |uses| {
        let (tokens, store) = (&tokens, &store);
        async move {
            loop {
                if let Ok(made) = tokens.create(new(&[], &[], uses), now()).await {
                    return made;
                }
                until("the disk", || store.waiting() == 0);
            }
        }
    };
    let (revoked, revoked_text) = make(Uses::Reusable).await;
    let (once, once_text) = make(Uses::OneTime).await;
    until("the disk", || store.waiting() == 0);

    disk.breaks(true);
    let failed = tokens.create(new(&[], &[], Uses::Reusable), now()).await.unwrap_err();
    assert!(failed.to_string().contains("was not made"), "{failed}");
    tokens.revoke(&revoked.id).await.unwrap_err();
    assert_eq!(tokens.check_text(&revoked_text, now()).unwrap_err(), TokenRefused::Unknown);
    let checked = tokens.check_text(&once_text, now()).unwrap();
    tokens.redeem(&checked, now() + HOUR, now()).await.unwrap_err();
    assert_eq!(tokens.check_text(&once_text, now()).unwrap_err(), TokenRefused::Used);
    let listed =
        |tokens: &Tokens| tokens.list(now()).into_iter().map(|info| (info.id, info.used)).collect::<Vec<_>>();
    let in_memory = listed(&tokens);
    assert_eq!(in_memory, [(once.id, 1)]);

    disk.breaks(false);
    until("the recovery", || store.waiting() == 0 && store.failing().is_none());
    drop(tokens);
    drop(store);
    assert_eq!(listed(&self::tokens(&disk.open())), in_memory, "the disk has what memory had");
}
