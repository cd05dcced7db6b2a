//! What a run says: tables for people, `results.json` for programs, and the tables of `BENCHMARKS.md`.

mod table;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::{
    cases::{self, Case},
    goals::{self, Goal},
    memory::{Both, Footprint},
    peers::Peer,
    samples::{Field, Row, Samples, Spread},
};
use table::Table;

/// Between these lines `BENCHMARKS.md` is written by this program.
const BEGIN: &str = "<!-- make bench writes from here -->";
const END: &str = "<!-- to here -->";
/// Where the tables go, seen from the root of the repository.
const PAGE: &str = "BENCHMARKS.md";

/// All that a run found.
pub(crate) struct Run<'a> {
    pub(crate) samples: &'a Samples,
    /// With policies and without; `None`: not measured.
    pub(crate) features: Option<&'a Samples>,
    pub(crate) footprints: &'a [Footprint],
    /// Cipher suite and key exchange by peer.
    pub(crate) handshakes: &'a BTreeMap<&'static str, (String, String)>,
    pub(crate) cases: &'a [&'static Case],
    pub(crate) peers: &'a [Peer],
    pub(crate) rounds: usize,
    pub(crate) quick: bool,
    /// Where results are kept; `None`: they are only shown.
    pub(crate) folder: Option<PathBuf>,
}

/// Shows the run and, if it was a whole one, keeps it.
pub(crate) fn write(run: &Run<'_>) -> Result<()> {
    let exchange = |peer: Peer| run.handshakes.get(peer.name()).map(|(_, group)| group);
    let same_exchange = exchange(Peer::Ours).is_some_and(|group| exchange(Peer::Envoy) == Some(group));
    let judge = |mesh| goals::judge(mesh, run.samples, run.footprints, same_exchange);
    let goals = judge(Peer::Ours);
    let with_policies = run.peers.contains(&Peer::Policies).then(|| judge(Peer::Policies));
    let mut text = tables(run);
    if let Some(goals) = &with_policies {
        text.push_str(&goals_table("Goals, with ten policies in force", goals));
    }
    if let Some(folder) = &run.folder {
        text.push_str(&goals_table("Goals", &goals));
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let handshakes: BTreeMap<_, _> = run
            .handshakes
            .iter()
            .map(|(peer, (suite, group))| (peer, json!({"suite": suite, "group": group})))
            .collect();
        let results = json!({
            "rounds": run.rounds, "quick": run.quick, "handshakes": handshakes,
            "goals": goals.must, "aims": goals.aims,
            "goals_with_policies": with_policies.as_ref().map(|goals| &goals.must),
            "footprints": run.footprints, "rows": run.samples.rows,
            "features": run.features.map(|features| &features.rows),
        });
        let path = folder.join("results.json");
        fs::write(&path, format!("{results:#}\n")).with_context(|| format!("writing {}", path.display()))?;
        if !run.quick {
            rewrite(Path::new(PAGE), &text)?;
        }
    }
    print!("{text}");
    Ok(())
}

/// Replaces what stands between the two marks.
fn rewrite(page: &Path, text: &str) -> Result<()> {
    let old = fs::read_to_string(page).with_context(|| format!("reading {}", page.display()))?;
    let marked = || {
        let (before, rest) = old.split_once(BEGIN)?;
        let (_, after) = rest.split_once(END)?;
        Some(format!("{before}{BEGIN}\n\n{text}\n{END}{after}"))
    };
    let new = marked().with_context(|| format!("{} lacks the lines {BEGIN} and {END}", page.display()))?;
    fs::write(page, new).with_context(|| format!("writing {}", page.display()))
}

fn tables(run: &Run<'_>) -> String {
    let mut text = String::new();
    let mut section = |title: &str, table: &Table| {
        if !table.is_empty() {
            let _ = writeln!(text, "### {title}\n\n{table}");
        }
    };
    section("CPU time of both proxies, and ours beside each", &cpu(run));
    section("Operations per second", &rates(run));
    section("Open loop: latency of a direct call, and what each adds to it", &latencies(run));
    section("What ten policies cost", &features(run));
    section("Memory, start and size", &footprints(run));
    section("Handshakes, as read off the wire", &handshakes(run));
    let spread = |field: Field| Spread::of(run.samples.rows.iter().map(field).collect());
    if let (Some(stolen), Some(busy), Some(spin)) =
        (spread(|row| row.stolen), spread(|row| row.busy), spread(|row| row.spin_ms))
    {
        let discarded: usize = run.samples.rows.iter().map(|row| row.discarded).sum();
        let _ = writeln!(
            text,
            "{} rounds. The host took {:.1} % of the processors in the median and {:.1} % at most; {discarded} \
             measurements were thrown away for it. The processors were busy for {:.0} % of the time in the median. \
             A fixed piece of work took {:.1} ms [{:.1}-{:.1}].\n",
            run.rounds,
            stolen.median * 100.0,
            stolen.greatest * 100.0,
            busy.median * 100.0,
            spin.median,
            spin.least,
            spin.greatest,
        );
    }
    text
}

/// Everybody with proxies.
fn proxied<'a>(run: &'a Run<'_>) -> impl Iterator<Item = Peer> + 'a {
    run.peers.iter().copied().filter(|peer| *peer != Peer::Direct)
}

/// Everybody whom ours is compared with.
fn others<'a>(run: &'a Run<'_>) -> impl Iterator<Item = Peer> + 'a {
    let ours = run.peers.contains(&Peer::Ours);
    proxied(run).filter(move |peer| *peer != Peer::Ours && ours)
}

fn cpu(run: &Run<'_>) -> Table {
    let mut heads = vec!["case".to_owned(), "unit".to_owned()];
    heads.extend(proxied(run).map(|peer| peer.name().to_owned()));
    heads.extend(others(run).map(|peer| format!("ours / {}", peer.name())));
    let mut table = Table::new(heads);
    let field: Field = |row| row.cpu_us;
    for case in run.cases {
        let mut cells = vec![case.title.to_owned(), unit(case).to_owned()];
        // Seconds for a GiB, microseconds for the rest.
        let scale = if case.unit() == "GiB" { 1e-6 } else { 1.0 };
        for peer in proxied(run) {
            cells
                .push(number(run.samples.spread(case.name, peer, field).map(|spread| spread.median * scale)));
        }
        for peer in others(run) {
            cells.push(ratio(run.samples.ratio(case.name, field, Peer::Ours, peer)));
        }
        table.push(cells);
    }
    table
}

fn unit(case: &Case) -> &'static str {
    match case.unit() {
        "GiB" => "s/GiB",
        "connection" => "us/connection",
        "message" => "us/message",
        _ => "us/request",
    }
}

fn rates(run: &Run<'_>) -> Table {
    let mut heads = vec!["case".to_owned()];
    heads.extend(run.peers.iter().map(|peer| peer.name().to_owned()));
    heads.extend(others(run).map(|peer| format!("ours / {}", peer.name())));
    let mut table = Table::new(heads);
    let field: Field = |row| row.rate;
    for case in run.cases.iter().filter(|case| !case.is_paced()) {
        let mut cells = vec![case.title.to_owned()];
        for peer in run.peers {
            cells.push(number(run.samples.spread(case.name, *peer, field).map(|spread| spread.median)));
        }
        for peer in others(run) {
            cells.push(ratio(run.samples.ratio(case.name, field, Peer::Ours, peer)));
        }
        table.push(cells);
    }
    table
}

fn latencies(run: &Run<'_>) -> Table {
    let mut heads = vec!["case".to_owned(), "us".to_owned()];
    heads.extend(run.peers.iter().map(|peer| peer.name().to_owned()));
    let mut table = Table::new(heads);
    let fields: [(&str, Field); 2] = [("p50", |row: &Row| row.p50_us), ("p99", |row: &Row| row.p99_us)];
    for case in run.cases.iter().filter(|case| case.is_paced()) {
        for (quantile, field) in fields {
            let mut cells = vec![case.title.to_owned(), quantile.to_owned()];
            for peer in run.peers {
                cells.push(if *peer == Peer::Direct {
                    number(run.samples.spread(case.name, *peer, field).map(|spread| spread.median))
                } else {
                    run.samples.added(case.name, field, *peer).map_or_else(
                        || "-".to_owned(),
                        |added| format!("{:+.0} [{:.0}..{:.0}]", added.median, added.least, added.greatest),
                    )
                });
            }
            table.push(cells);
        }
    }
    table
}

/// Ten policies in force beside none, in turns.
fn features(run: &Run<'_>) -> Table {
    let heads = ["case", "CPU without, us", "CPU with, us", "with / without", "p50 with / without"];
    let mut table = Table::new(heads.map(str::to_owned).to_vec());
    let Some(samples) = run.features else { return table };
    let (cpu, p50): (Field, Field) = (|row| row.cpu_us, |row| row.p50_us);
    for case in cases::chosen(&cases::WITH_POLICIES.map(str::to_owned)) {
        let of = |peer| number(samples.spread(case.name, peer, cpu).map(|spread| spread.median));
        table.push(vec![
            case.title.to_owned(),
            of(Peer::Ours),
            of(Peer::Policies),
            ratio(samples.ratio(case.name, cpu, Peer::Policies, Peer::Ours)),
            ratio(samples.ratio(case.name, p50, Peer::Policies, Peer::Ours)),
        ]);
    }
    table
}

fn footprints(run: &Run<'_>) -> Table {
    let mut heads = vec!["client's side / server's side".to_owned()];
    heads.extend(run.footprints.iter().map(|footprint| footprint.peer.to_owned()));
    let mut table = Table::new(heads);
    if run.footprints.is_empty() {
        return table;
    }
    let mut line = |title: &str, cell: &dyn Fn(&Footprint) -> String| {
        let mut cells = vec![title.to_owned()];
        cells.extend(run.footprints.iter().map(cell));
        table.push(cells);
    };
    let both = |both: Both| format!("{:.1} / {:.1}", both.client, both.server);
    line("idle: resident, MiB", &|footprint| both(footprint.idle_resident));
    line("idle: anonymous, MiB", &|footprint| both(footprint.idle_anonymous));
    line("an idle HTTP connection, KiB", &|footprint| both(footprint.http1_connection_kib));
    line("an idle L4 mutual-TLS connection, KiB", &|footprint| both(footprint.bytes_connection_kib));
    line("anonymous after 1,000 connections sent at once, MiB", &|footprint| both(footprint.burst_anonymous));
    line("start of the client's proxy to the first answer, ms", &|footprint| {
        number(Spread::of(footprint.ready_ms.clone()).map(|spread| spread.median))
    });
    line("executable, MiB", &|footprint| format!("{:.1}", footprint.binary));
    table
}

fn handshakes(run: &Run<'_>) -> Table {
    let heads = ["peer", "cipher suite", "key exchange"].map(str::to_owned).to_vec();
    let mut table = Table::new(heads);
    for (peer, (suite, group)) in run.handshakes {
        table.push(vec![(*peer).to_owned(), suite.clone(), group.clone()]);
    }
    table
}

fn goals_table(title: &str, goals: &goals::Goals) -> String {
    let heads = ["measure", "must", "aim", "measured", "met"].map(str::to_owned).to_vec();
    let mut table = Table::new(heads);
    for (must, aim) in goals.must.iter().zip(&goals.aims) {
        let met = match (must.met, aim.met) {
            (_, true) => "aim",
            (true, false) => "must",
            (false, false) => "NO",
        };
        let Goal { name, limit, measured, .. } = must;
        table.push(vec![
            (*name).to_owned(),
            limit.clone(),
            aim.limit.clone(),
            measured.map_or_else(|| "not measured".to_owned(), |measured| format!("{measured:.2}")),
            met.to_owned(),
        ]);
    }
    format!("### {title}\n\n{table}\n")
}

/// A number with as many digits as it deserves.
fn number(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

fn ratio(spread: Option<Spread>) -> String {
    spread.map_or_else(
        || "-".to_owned(),
        |spread| format!("{:.2} [{:.2}-{:.2}]", spread.median, spread.least, spread.greatest),
    )
}
