use super::*;

/// Files with ages of our choice: no test waits for a time stamp.
struct Bench {
    files: tempfile::TempDir,
    directory: Directory,
    now: SystemTime,
}

impl Bench {
    fn new() -> Self {
        let files = tempfile::tempdir().unwrap();
        let directory = Directory::new(files.path().join("services"));
        std::fs::create_dir(&directory.path).unwrap();
        Self { files, directory, now: SystemTime::now() }
    }

    fn write(&self, name: &str, text: &str) {
        self.write_aged(name, text, Duration::from_secs(10));
    }

    fn write_aged(&self, name: &str, text: &str, age: Duration) {
        let path = self.directory.path.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::File::options().write(true).open(path).unwrap().set_modified(self.now - age).unwrap();
    }

    /// Looks, one minute after the last time.
    fn look(&mut self) -> Snapshot {
        self.now += Duration::from_mins(1);
        self.directory.poll(self.now);
        self.directory.snapshot()
    }
}

fn names(snapshot: &Snapshot) -> Vec<&str> {
    snapshot.services.keys().map(ServiceKey::as_str).collect()
}

#[test]
fn a_service_file_is_read_as_documented() {
    let mut bench = Bench::new();
    bench.write(
        "shop.yaml",
        "kind: Service
name: orders
namespace: shop
ports:
- {port: 80, name: http, protocol: HTTP1, targetPort: 8080}
- {port: 90, protocol: grpc}
endpoints:
- {address: 10.0.0.2, ports: {90: 9090}, weight: 3, health: Degraded, identity: 'spiffe://t/ns/shop/sa/orders', zone: b, region: r, labels: {app: orders}}
- {address: '2001:db8::1'}
---
kind: Service
name: any
endpoints: [{address: 10.0.0.1, port: 7}]
",
    );
    bench.write("ignored.txt", "kind: [");
    bench.write(".hidden.yaml", "kind: [");
    let snapshot = bench.look();
    assert_eq!((&snapshot.sync, snapshot.faults.len()), (&Sync::Synced, 0));
    assert_eq!(names(&snapshot), ["any.default", "orders.shop"]);
    let orders = &snapshot.services[&ServiceKey::parse("orders.shop").unwrap()];
    assert_eq!(orders.ports[0], ServicePort { port: 80, name: "http".into(), protocol: Protocol::Http1 });
    assert_eq!(orders.ports[1].protocol, Protocol::Grpc);
    assert_eq!(
        orders.instances[0],
        Instance {
            id: "10.0.0.2/8080,9090".into(),
            address: "10.0.0.2".parse().unwrap(),
            ports: [(80, 8080), (90, 9090)].into(),
            weight: 3,
            health: Health::Degraded,
            identity: Some("spiffe://t/ns/shop/sa/orders".into()),
            region: "r".into(),
            zone: "b".into(),
            node: Arc::default(),
            labels: Arc::new([("app".to_owned(), "orders".to_owned())].into()),
        }
    );
    assert_eq!(orders.instances[1].ports, [(80, 8080), (90, 90)].into());
    let any = &snapshot.services[&ServiceKey::parse("any").unwrap()];
    assert_eq!(any.instances[0].ports, [(0, 7)].into());
}

#[test]
fn a_bad_file_keeps_what_it_last_said_and_names_file_and_line() {
    let good = "kind: Service\nname: a\n---\nkind: Service\nname: b\n";
    for (bad, line, reason) in [
        ("kind: Service\nname: a\ncolour: red\n", ":3", "colour"),
        ("kind: Service\nname: a\nports: [\n", "", ""),
        ("kind: Other\nname: a\n", ":1", "Other"),
        ("name: a\n", ":1", "kind"),
        ("", "", "delete the file"),
        ("# all commented out\n", "", ""),
        ("kind: Service\nname: ../a\n", ":1", "cannot name a service"),
        ("kind: Service\nname: a\n---\nkind: Service\nname: a\n", ":4", "twice"),
        ("kind: Service\nname: a\nports: [{port: 80}, {port: 80}]\n", ":1", "twice"),
        ("kind: Service\nname: a\nports: [{port: 0}]\n", ":1", "1 to 65535"),
        ("kind: Service\nname: a\nports: [{port: 70000}]\n", ":3", ""),
        ("kind: Service\nname: a\nendpoints: [{address: 10.0.0.1}]\n", ":1", "needs a `port`"),
        ("kind: Service\nname: a\nendpoints: [{address: example.org, port: 1}]\n", ":3", ""),
        (
            "kind: Service\nname: a\nendpoints: [{address: 10.0.0.1, port: 1, identity: orders}]\n",
            ":1",
            "identity",
        ),
        (
            "kind: Service\nname: a\nendpoints: [{address: 10.0.0.1, port: 1}, {address: 10.0.0.1, port: 1}]\n",
            ":1",
            "twice",
        ),
        (
            "kind: Service\nname: a\nports: [{port: 1}, {port: 2}]\nendpoints: [{address: 10.0.0.1, port: 1}]\n",
            ":1",
            "several ports",
        ),
        (
            "kind: Service\nname: a\nports: [{port: 1}]\nendpoints: [{address: 10.0.0.1, ports: {3: 1}}]\n",
            ":1",
            "no port of",
        ),
        ("a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\n", "", ""),
        ("\u{0}", "", ""),
    ] {
        let mut bench = Bench::new();
        bench.write("s.yaml", good);
        let before = bench.look();
        bench.write_aged("s.yaml", bad, Duration::from_secs(5));
        let after = bench.look();
        assert_eq!(after.services, before.services, "{bad:?}");
        assert_eq!(after.sync, Sync::Synced);
        let fault = after.faults.first().unwrap_or_else(|| panic!("no fault for {bad:?}"));
        assert!(fault.subject.ends_with(&format!("s.yaml{line}")) || line.is_empty(), "{bad:?}: {fault:?}");
        assert!(fault.reason.contains(reason), "{bad:?}: {fault:?}");
        bench.write_aged("s.yaml", "kind: Service\nname: c\n", Duration::from_secs(4));
        let healed = bench.look();
        assert_eq!((names(&healed), healed.faults.len()), (vec!["c.default"], 0));
    }
}

#[test]
fn a_file_that_goes_takes_its_services_and_a_directory_that_goes_does_not() {
    let mut bench = Bench::new();
    bench.write("a.yaml", "kind: Service\nname: a\n");
    bench.write("b.yaml", "kind: Service\nname: b\n");
    assert_eq!(names(&bench.look()), ["a.default", "b.default"]);
    std::fs::remove_file(bench.directory.path.join("a.yaml")).unwrap();
    assert_eq!(names(&bench.look()), ["b.default"]);
    let away = bench.files.path().join("away");
    std::fs::rename(&bench.directory.path, &away).unwrap();
    let lost = bench.look();
    assert_eq!(names(&lost), ["b.default"]);
    assert!(matches!(lost.sync, Sync::Degraded { .. }), "{:?}", lost.sync);
    assert_eq!(bench.look(), lost, "the same trouble is the same snapshot");
    std::fs::rename(&away, &bench.directory.path).unwrap();
    assert_eq!(bench.look().sync, Sync::Synced);
}

#[test]
fn a_file_is_read_when_it_was_left_alone_and_unchanged_services_keep_their_place_in_memory() {
    let mut bench = Bench::new();
    bench.write("s.yaml", "kind: Service\nname: a\n---\nkind: Service\nname: b\n");
    let before = bench.look();
    // Cut off at the end of a line: valid, and not what the writer means.
    bench.now += Duration::from_mins(1);
    bench.write_aged("s.yaml", "kind: Service\nname: a\n", Duration::from_millis(1));
    assert!(bench.directory.poll(bench.now), "asks to look again soon");
    assert_eq!(bench.directory.snapshot(), before);
    bench.write_aged(
        "s.yaml",
        "kind: Service\nname: a\n---\nkind: Service\nname: c\n",
        Duration::from_millis(1),
    );
    let after = bench.look();
    assert_eq!(names(&after), ["a.default", "c.default"]);
    let a = ServiceKey::parse("a").unwrap();
    assert!(Arc::ptr_eq(&before.services[&a], &after.services[&a]));
}

#[test]
fn a_file_that_was_never_read_leaves_everything_open_at_the_start_only() {
    let mut bench = Bench::new();
    bench.write("good.yaml", "kind: Service\nname: a\n");
    bench.write("bad.yaml", "kind: [");
    let snapshot = bench.look();
    assert_eq!((names(&snapshot), &snapshot.sync), (vec!["a.default"], &Sync::Never));
    bench.write_aged("bad.yaml", "kind: Service\nname: b\n", Duration::from_secs(4));
    assert_eq!(bench.look().sync, Sync::Synced);
    bench.write("new.yaml", "kind: [");
    let snapshot = bench.look();
    assert_eq!((&snapshot.sync, snapshot.faults.len()), (&Sync::Synced, 1));
}

#[test]
fn a_service_in_two_files_is_the_first_ones() {
    let mut bench = Bench::new();
    bench.write("b.yaml", "kind: Service\nname: a\nports: [{port: 2}]\n");
    bench.write("a.yaml", "kind: Service\nname: a\nports: [{port: 1}]\n");
    let snapshot = bench.look();
    assert_eq!(snapshot.services[&ServiceKey::parse("a").unwrap()].ports[0].port, 1);
    assert!(snapshot.faults[0].subject.ends_with("b.yaml"), "{:?}", snapshot.faults);
}

#[test]
fn the_example_is_a_service() {
    let mut bench = Bench::new();
    bench.write("orders.yaml", include_str!("../../../examples/services/orders.yaml"));
    let snapshot = bench.look();
    assert_eq!(snapshot.faults, []);
    let orders = &snapshot.services[&ServiceKey::parse("orders.default").unwrap()];
    assert_eq!(orders.ports[0].port, 80);
    assert_eq!(orders.instances.len(), 2);
}
