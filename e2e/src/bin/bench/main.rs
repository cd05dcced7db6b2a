//! `make bench`: what a mesh costs, beside other proxies and a direct call, in one run.
//!
//! The path is load -> client's proxy -> mutual TLS -> server's proxy -> application, on loopback. All peers stand at once
//! and take turns of a few seconds, in an order that turns round with every round, because a shared machine changes
//! by the minute and only what was measured in the same minute can be compared. CPU time is the scheduler's
//! account of both proxies, divided by what they carried.
//!
//! The order of things: `machine` -> `peers` (with `certificates`, `ports`, `backend`) -> `cases` -> `load` ->
//! `samples` -> `memory` -> `goals` -> `report`. `BENCHMARKS.md` says how to read what comes out.
#![forbid(unsafe_code)]

mod backend;
mod cases;
mod certificates;
mod frames;
mod goals;
mod load;
mod machine;
mod memory;
mod peers;
mod poller;
mod ports;
mod process;
mod report;
mod samples;
mod tap;

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;

use backend::Backend;
use cases::Case;
use certificates::Certificates;
use peers::{Peer, Programs, Site, Stack};
use ports::Ports;
use samples::{Row, Samples};

/// Measures the mesh beside other proxies.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    /// Cases to measure, by name, a final `*` for all that begin so; default: all, and memory.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Who takes part; default: all whose programs are there.
    #[arg(long, value_delimiter = ',')]
    peers: Vec<Peer>,
    /// How often everything is measured.
    #[arg(long)]
    rounds: Option<usize>,
    /// Length of one measurement.
    #[arg(long)]
    seconds: Option<f64>,
    /// Five minutes for all: fewer and shorter rounds.
    #[arg(long)]
    quick: bool,
    /// Measure only what policies cost: ten in force beside none, in turns (a whole run does, too).
    #[arg(long, conflicts_with_all = ["only", "peers", "memory", "base"])]
    features: bool,
    /// Measure memory, start and size too (without `--only` they are).
    #[arg(long)]
    memory: bool,
    /// Folder of our binaries; default: that of this program.
    #[arg(long)]
    ours: Option<PathBuf>,
    /// Folder of an earlier build of our binaries: takes part as `base`.
    #[arg(long)]
    base: Option<PathBuf>,
    /// List the cases.
    #[arg(long)]
    list: bool,
}

/// How much is measured.
struct Plan {
    cases: Vec<&'static Case>,
    rounds: usize,
    /// Before each measurement, at least.
    warm_up: Duration,
    length: Duration,
    /// Of cases in which latency is the point: their quantiles need more samples.
    paced: Duration,
    memory: bool,
    /// Everything, so that the results may be kept.
    whole: bool,
    /// Whether this was a short run.
    quick: bool,
}

/// Rounds in which policies take turns with none: the difference is small beside what one round may be off.
const POLICY_ROUNDS: usize = 11;

/// Tries of one measurement while the host takes the processors away; a short run has no time for more than one.
const TRIES: usize = 3;
/// How long calm is waited for before the next try.
const CALM: Duration = Duration::from_secs(20);

/// A peer that has not answered everybody by then is measured as it is.
const SETTLE_LIMIT: Duration = Duration::from_secs(15);

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if arguments.list {
        for case in cases::CASES {
            println!("{:<14} {}", case.name, case.title);
        }
        return Ok(());
    }
    let plan = plan(&arguments)?;
    let _priority = machine::prepare()?;
    let target = target()?;
    let folder = target.join("bench/run");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let programs = Programs {
        ours: match arguments.ours {
            Some(folder) => folder,
            None => this_folder()?,
        },
        base: arguments.base,
        tools: target.join("tools"),
    };
    let peers = if arguments.features { Vec::new() } else { present(&programs, &arguments.peers)? };
    let mut ports = Ports::new();
    let certificates = Certificates::write(&folder.join("certificates"))?;
    let backend = Backend::start(ports.several()?)?;
    let site = Site { programs: &programs, certificates: &certificates, backend: &backend, folder: &folder };

    let mut stacks = Vec::new();
    for peer in peers {
        stacks.push(Stack::start(&site, &mut ports, peer)?);
    }
    let mut handshakes = BTreeMap::new();
    for stack in &stacks {
        // With policies the tap's port is one that no rule allows, and the handshake is that of ours.
        if let Some(tap) = stack.tap.as_ref().filter(|_| stack.peer != Peer::Policies) {
            let agreed = tap::negotiated(tap)
                .with_context(|| format!("reading the handshake of {}", stack.peer.name()))?;
            handshakes.insert(stack.peer.name(), agreed);
        }
    }
    let samples = measure(&plan, &mut stacks)?;
    let peers: Vec<Peer> = stacks.iter().map(|stack| stack.peer).collect();
    drop(stacks);
    let mut footprints = Vec::new();
    if plan.memory {
        for peer in peers.iter().filter(|peer| **peer != Peer::Direct) {
            eprintln!("memory of {}", peer.name());
            footprints.push(
                memory::measure(&site, &mut ports, *peer, !plan.quick)
                    .with_context(|| format!("measuring the memory of {}", peer.name()))?,
            );
        }
    }
    let features = if arguments.features || plan.whole {
        Some(measure_features(&plan, &site, &mut ports)?)
    } else {
        None
    };
    report::write(&report::Run {
        samples: &samples,
        features: features.as_ref(),
        footprints: &footprints,
        handshakes: &handshakes,
        cases: &plan.cases,
        peers: &peers,
        rounds: plan.rounds,
        quick: plan.quick,
        folder: plan.whole.then(|| target.join("bench")),
    })
}

fn plan(arguments: &Arguments) -> Result<Plan> {
    let quick = arguments.quick;
    let whole = arguments.only.is_empty() && !arguments.features;
    let only_memory = arguments.only.iter().any(|only| only == "memory") && arguments.only.len() == 1;
    let cases = if arguments.features || only_memory { Vec::new() } else { cases::chosen(&arguments.only) };
    let memory = whole || arguments.memory || arguments.only.iter().any(|only| only == "memory");
    ensure!(arguments.features || memory || !cases.is_empty(), "no case has such a name: see --list");
    let seconds = arguments.seconds.unwrap_or(if quick { 0.5 } else { 2.0 });
    ensure!((0.1..=600.0).contains(&seconds), "--seconds: from 0.1 to 600");
    let length = Duration::from_secs_f64(seconds);
    Ok(Plan {
        cases,
        rounds: arguments.rounds.unwrap_or(if quick { 3 } else { 7 }).max(1),
        warm_up: (length / 8).max(Duration::from_millis(100)),
        length,
        paced: length * 2,
        memory,
        whole: whole && arguments.peers.is_empty(),
        quick,
    })
}

/// The folder of this program, where `make bench` leaves all of them.
fn this_folder() -> Result<PathBuf> {
    let this = std::env::current_exe().context("finding this program")?;
    Ok(this.parent().context("this program has no folder")?.to_owned())
}

/// Cargo's target folder, which this program lies in.
fn target() -> Result<PathBuf> {
    let folder = this_folder()?;
    let target = folder.ancestors().find(|folder| folder.join(".rustc_info.json").exists());
    Ok(target.context("this program does not lie in a target folder")?.to_owned())
}

/// Who takes part. Of those that were not asked for by name, who is missing is said and left out.
fn present(programs: &Programs, wanted: &[Peer]) -> Result<Vec<Peer>> {
    if !wanted.is_empty() {
        wanted.iter().try_for_each(|peer| programs.of(*peer).map(drop))?;
        return Ok(wanted.to_vec());
    }
    let mut peers = vec![Peer::Direct, Peer::Ours, Peer::Policies];
    programs.of(Peer::Ours)?;
    if programs.base.is_some() {
        programs.of(Peer::Base)?;
        peers.push(Peer::Base);
    }
    for peer in [Peer::Haproxy, Peer::Envoy, Peer::Nginx] {
        match programs.of(peer) {
            Ok(_) => peers.push(peer),
            Err(missing) => eprintln!("bench: without {}: {missing}", peer.name()),
        }
    }
    Ok(peers)
}

fn measure(plan: &Plan, stacks: &mut [Stack]) -> Result<Samples> {
    let mut samples = Samples::default();
    let begun = Instant::now();
    for round in 0..plan.rounds {
        for case in &plan.cases {
            if round % 2 == 1 {
                stacks.reverse();
            }
            for stack in &mut *stacks {
                let row = sample(plan, case, stack, round);
                stack
                    .check()
                    .with_context(|| format!("after {} through {}", case.name, stack.peer.name()))?;
                match row {
                    Ok(row) => samples.rows.extend(row),
                    Err(error) => {
                        eprintln!(
                            "bench: no sample of {} through {}: {error:#}",
                            case.name,
                            stack.peer.name()
                        );
                    }
                }
            }
            if round % 2 == 1 {
                stacks.reverse();
            }
        }
        eprintln!("round {} of {}, {:.0} s", round + 1, plan.rounds, begun.elapsed().as_secs_f64());
    }
    Ok(samples)
}

/// Our sidecars with policies and without, in turns.
fn measure_features(plan: &Plan, site: &Site<'_>, ports: &mut Ports) -> Result<Samples> {
    let names = cases::WITH_POLICIES.map(str::to_owned);
    let plan =
        Plan { cases: cases::chosen(&names), rounds: plan.rounds.max(POLICY_ROUNDS), memory: false, ..*plan };
    let mut stacks = Vec::new();
    for peer in [Peer::Ours, Peer::Policies] {
        stacks.push(Stack::start(site, ports, peer)?);
    }
    measure(&plan, &mut stacks)
}

/// One measurement; the calmest of a few tries. `None`: the peer has no such path.
fn sample(plan: &Plan, case: &'static Case, stack: &Stack, round: usize) -> Result<Option<Row>> {
    let mut best: Option<Row> = None;
    for discarded in 0..if plan.quick { 1 } else { TRIES } {
        let Some(row) = attempt(plan, case, stack, round, discarded)? else { return Ok(None) };
        let calm = row.stolen <= machine::MAX_STEAL;
        if best.as_ref().is_none_or(|best| row.stolen < best.stolen) {
            best = Some(row);
        }
        if calm || plan.quick {
            break;
        }
        machine::wait_for_calm(CALM)?;
    }
    Ok(best)
}

fn attempt(
    plan: &Plan,
    case: &'static Case,
    stack: &Stack,
    round: usize,
    discarded: usize,
) -> Result<Option<Row>> {
    let spin_ms = machine::spin();
    let Some(mut load) = load::open(case.work, stack.entries)? else { return Ok(None) };
    let length = if case.is_paced() { plan.paced } else { plan.length };
    // Until every connection has had its handshake and a few answers, however slow the peer is.
    let settled = Instant::now() + SETTLE_LIMIT;
    let mut answers = 0.0;
    while answers < case.at_once() * 3.0 && Instant::now() < settled {
        answers += load.run(Instant::now() + plan.warm_up)?.operations;
    }
    let usage = machine::Usage::now()?;
    let before = stack.cpu()?;
    let mut stretch = load.run(Instant::now() + length)?;
    let after = stack.cpu()?;
    let shares = usage.since()?;
    ensure!(stretch.operations > 0.0, "nothing came back in {length:?}");
    stretch.latencies.sort_unstable();
    let each = |before: Duration, after: Duration| {
        after.saturating_sub(before).as_secs_f64() * 1e6 / stretch.operations
    };
    let client = each(before.client, after.client);
    let server = each(before.server, after.server);
    Ok(Some(Row {
        case: case.name,
        peer: stack.peer,
        round,
        operations: stretch.operations,
        rate: stretch.operations / stretch.elapsed.as_secs_f64(),
        cpu_us: client + server,
        client_cpu_us: client,
        server_cpu_us: server,
        p50_us: samples::quantile_us(&stretch.latencies, 0.5),
        p99_us: samples::quantile_us(&stretch.latencies, 0.99),
        stolen: shares.stolen,
        busy: shares.busy,
        spin_ms,
        discarded,
    }))
}
