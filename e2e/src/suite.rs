//! The frame of a suite: enters the sandbox, runs the cases one after the other, shows logs when one fails.
//!
//! Cases run one at a time: they share two cores with everything that they start, and what they measure is time.

use std::pin::Pin;
use std::process::ExitCode;
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::sync::OnceCell;

use crate::process::tail;
use crate::sandbox;
use crate::wait::within;

/// No case may take longer, whatever hangs, unless it says so.
const CASE_LIMIT: Duration = Duration::from_secs(150);
/// The same at full length.
const SOAK_CASE_LIMIT: Duration = Duration::from_mins(20);
/// Lines of each log that are shown after a suite's first failure; everything is in the log folder.
const SHOWN_LINES: usize = 25;

/// Cases that take longer say so.
const REMARKABLE: Duration = Duration::from_secs(3);

/// Whether cases run at full length (`make soak`).
pub fn is_soak() -> bool {
    std::env::var_os("OUTRIGGER_SOAK").is_some()
}

/// How long something is measured: `short` seconds in `make test`, `full` in `make soak`.
pub fn length(short: u64, full: u64) -> Duration {
    Duration::from_secs(if is_soak() { full } else { short })
}

static SHOW_LOGS: Once = Once::new();

type Run<W> = Box<dyn FnOnce(Arc<W>) -> Pin<Box<dyn Future<Output = anyhow::Result<()>>>> + Send>;

/// A named test over a world `W` that the suite's cases share (`()` where each builds its own).
pub struct Case<W> {
    name: String,
    limit: Duration,
    run: Run<W>,
}

impl<W> Case<W> {
    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The same, with another bound on how long it may take.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }
}

/// Makes a case from an async function.
pub fn case<W, F, Fut>(name: impl Into<String>, run: F) -> Case<W>
where
    F: FnOnce(Arc<W>) -> Fut + Send + 'static,
    Fut: Future<Output = anyhow::Result<()>> + 'static,
{
    let limit = if is_soak() { SOAK_CASE_LIMIT } else { CASE_LIMIT };
    Case { name: name.into(), limit, run: Box::new(move |world| Box::pin(run(world))) }
}

/// A suite's `main`: `build` makes the shared world before the first case that runs.
pub fn suite<W, B, Fut>(name: &str, build: B, cases: Vec<Case<W>>) -> ExitCode
where
    W: Send + Sync + 'static,
    B: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = anyhow::Result<W>>,
{
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    // Listing needs no namespaces, and tools that list do it often.
    if !arguments.list {
        match sandbox::enter(name) {
            Ok(None) => {}
            Ok(Some(code)) => return code,
            Err(error) => {
                eprintln!("suite {name}: {error:#}");
                return ExitCode::FAILURE;
            }
        }
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => Arc::new(runtime),
        Err(error) => {
            eprintln!("suite {name}: starting a runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let shared = Arc::new((build, OnceCell::<Result<Arc<W>, String>>::new()));
    let trials = cases.into_iter().map(|case| {
        let (runtime, shared) = (Arc::clone(&runtime), Arc::clone(&shared));
        Trial::test(case.name, move || {
            let start = Instant::now();
            let outcome = runtime.block_on(within(case.limit, "the case", async {
                let (build, cell) = &*shared;
                let world = cell
                    .get_or_init(|| async {
                        build().await.map(Arc::new).map_err(|error| format!("building the world: {error:#}"))
                    })
                    .await;
                let world = world.clone().map_err(anyhow::Error::msg)?;
                (case.run)(world).await
            }));
            if start.elapsed() >= REMARKABLE {
                print!("({:.0} s) ", start.elapsed().as_secs_f64());
            }
            outcome.map_err(|error| {
                SHOW_LOGS.call_once(show_logs);
                Failed::from(format!("{error:#}"))
            })
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    // Processes die before their hosts; the pid namespace would see to it anyway.
    drop(shared);
    conclusion.exit_code()
}

fn show_logs() {
    let folder = &sandbox::get().logs;
    eprintln!("\nlogs in {}:", folder.display());
    let show = || -> anyhow::Result<()> {
        let mut files: Vec<_> = std::fs::read_dir(folder)?.collect::<Result<_, _>>()?;
        files.sort_by_key(std::fs::DirEntry::file_name);
        for file in files {
            let text = String::from_utf8_lossy(&std::fs::read(file.path())?).into_owned();
            if !text.is_empty() {
                eprintln!("--- {}\n{}", file.file_name().display(), tail(&text, SHOWN_LINES));
            }
        }
        Ok(())
    };
    if let Err(error) = show().context("reading the logs") {
        eprintln!("{error:#}");
    }
}
