//! `make figures`: everything that the suites measured, as one table.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use serde_json::Value;

fn main() -> anyhow::Result<ExitCode> {
    let me = std::env::current_exe().context("finding this executable")?;
    let target = me.parent().and_then(Path::parent).context("this executable lies in target/<profile>")?;
    let folder = target.join("figures");
    let mut files: Vec<_> = match std::fs::read_dir(&folder) {
        Ok(entries) => entries.collect::<Result<_, _>>().context("reading target/figures")?,
        Err(_) => Vec::new(),
    };
    files.sort_by_key(std::fs::DirEntry::file_name);
    if files.is_empty() {
        eprintln!("{} holds no figures: run `make test` first", folder.display());
        return Ok(ExitCode::FAILURE);
    }
    let mut missed = false;
    println!("{:<14} {:<58} {:>10} {:>12} {:<9} met", "suite", "figure", "goal", "measured", "unit");
    for file in files {
        let path = file.path();
        let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let figures: Vec<Value> = serde_json::from_slice(&text)
            .with_context(|| format!("{} is no list of figures", path.display()))?;
        let suite = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        for figure in figures {
            let text = |field: &str| figure[field].as_str().unwrap_or("-").to_owned();
            let measured = figure["measured"].as_f64().unwrap_or(f64::NAN);
            let met = figure["met"] == true;
            missed |= !met;
            println!(
                "{suite:<14} {:<58} {:>10} {measured:>12.3} {:<9} {}",
                text("name"),
                text("goal"),
                text("unit"),
                if met { "yes" } else { "NO" }
            );
        }
    }
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
