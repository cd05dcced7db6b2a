//! Figures: what a suite measured, for `make figures`.

use anyhow::Context as _;
use serde::Serialize;

use crate::sandbox;

/// One measured value beside its goal.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What was measured; starts with the figure's number where it has one ("L4: ...").
    pub name: String,
    /// Unit of `goal` and `measured`.
    pub unit: &'static str,
    /// What was aimed at, as text ("0", "<= 2").
    pub goal: String,
    /// What came out.
    pub measured: f64,
    /// Whether the goal was reached.
    pub met: bool,
}

impl Figure {
    /// A value that may be at most `goal`.
    pub fn at_most(name: &str, unit: &'static str, goal: f64, measured: f64) -> Self {
        Self { name: name.to_owned(), unit, goal: format!("<= {goal}"), measured, met: measured <= goal }
    }

    /// A value that must be at least `goal`.
    pub fn at_least(name: &str, unit: &'static str, goal: f64, measured: f64) -> Self {
        Self { name: name.to_owned(), unit, goal: format!(">= {goal}"), measured, met: measured >= goal }
    }

    /// A value that is reported and has no goal yet.
    pub fn info(name: &str, unit: &'static str, measured: f64) -> Self {
        Self { name: name.to_owned(), unit, goal: "-".to_owned(), measured, met: true }
    }
}

/// Adds figures to `target/figures/<suite>.json`, replacing those of the same name.
pub fn record(new: &[Figure]) -> anyhow::Result<()> {
    let sandbox = sandbox::get();
    let path = sandbox.figures.join(format!("{}.json", sandbox.suite));
    let mut all: Vec<serde_json::Value> = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("reading {}", path.display()))?,
        Err(_) => Vec::new(),
    };
    for figure in new {
        println!("figure: {} = {} {} (goal {})", figure.name, figure.measured, figure.unit, figure.goal);
        let value = serde_json::to_value(figure).context("a figure is plain data")?;
        all.retain(|old| old["name"] != value["name"]);
        all.push(value);
    }
    let text = serde_json::to_vec_pretty(&all).context("figures are plain data")?;
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

/// Records figures, and fails if one of them is not met.
pub fn hold(figures: &[Figure]) -> anyhow::Result<()> {
    record(figures)?;
    let missed = figures.iter().filter(|figure| !figure.met);
    let missed: Vec<_> = missed
        .map(|figure| format!("{}: {} {} (goal {})", figure.name, figure.measured, figure.unit, figure.goal))
        .collect();
    anyhow::ensure!(missed.is_empty(), "figures that were missed: {}", missed.join("; "));
    Ok(())
}
