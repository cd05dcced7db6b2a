//! The README's chapter on policies is a transcript: each command of it is run, and must print what stands there.
//!
//! The chapter is what stands between the two marks below. In its `console` blocks, `$ ` begins a command for the shell, what
//! follows is its output, and `...` in a line stands for anything in that line, alone in a line for any lines. A block of
//! another kind with a first line `# <file>` is that file.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use outrigger_e2e::sandbox;
use outrigger_e2e::suite::{Case, case};

use crate::world::World;

const BEGIN: &str = "<!-- transcript: policies -->";
const IN_FORCE: Duration = Duration::from_secs(5);
const END: &str = "<!-- end of transcript -->";

pub(crate) fn cases() -> Vec<Case<World>> {
    vec![case("the README's policy chapter is a transcript", replay)]
}

#[derive(Debug)]
enum Step {
    File { name: String, text: String },
    Command { command: String, output: Vec<String> },
}

async fn replay(world: Arc<World>) -> anyhow::Result<()> {
    let _turn = world.without_policies().await?;
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let readme = std::fs::read_to_string(&readme).with_context(|| format!("reading {}", readme.display()))?;
    let steps = steps(&readme)?;
    ensure!(steps.iter().any(|step| matches!(step, Step::Command { .. })), "the chapter has no command");
    let folder = sandbox::get().work.join("transcript");
    std::fs::create_dir_all(&folder).context("making a folder for the transcript")?;
    for step in steps {
        match step {
            Step::File { name, text } => {
                ensure!(!name.contains('/'), "{name} lies outside of the transcript's folder");
                std::fs::write(folder.join(&name), text).with_context(|| format!("writing {name}"))?;
            }
            Step::Command { command, output } => {
                // What was applied reaches a proxy within half a second; a reader is not faster than that.
                let within = if command.starts_with("curl ") { IN_FORCE } else { Duration::ZERO };
                let start = Instant::now();
                loop {
                    let printed = run(&world, &folder, &command).await?;
                    let same = compare(&output, &printed).with_context(|| format!("$ {command}\n{printed}"));
                    if same.is_ok() || start.elapsed() >= within {
                        break same?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn steps(readme: &str) -> anyhow::Result<Vec<Step>> {
    let chapter = readme.split_once(BEGIN).with_context(|| format!("the README has no {BEGIN}"))?.1;
    let chapter = chapter.split_once(END).with_context(|| format!("the README has no {END}"))?.0;
    let mut steps = Vec::new();
    // What stands between fences is every second piece.
    for block in chapter.split("```").skip(1).step_by(2) {
        let (language, text) = block.split_once('\n').context("a block of code has no lines")?;
        if language.trim() != "console" {
            let (first, _) = text.split_once('\n').unwrap_or((text, ""));
            if let Some(name) = first.strip_prefix("# ") {
                steps.push(Step::File { name: name.trim().to_owned(), text: text.to_owned() });
            }
            continue;
        }
        for line in text.lines() {
            if let Some(command) = line.strip_prefix("$ ") {
                steps.push(Step::Command { command: command.to_owned(), output: Vec::new() });
            } else if let Some(Step::Command { output, .. }) = steps.last_mut() {
                output.push(line.to_owned());
            }
        }
    }
    Ok(steps)
}

/// Standard output and error of a command, as a terminal shows them. A `curl` is the client's, whose host is `web`.
async fn run(world: &World, folder: &Path, command: &str) -> anyhow::Result<String> {
    let mut shell = Command::new("sh");
    let cli = world.mesh.cli_command()?;
    shell.envs(cli.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let path = std::env::var("PATH").unwrap_or_default();
    shell.env("PATH", format!("{}:{path}", sandbox::get().binaries.display()));
    shell.current_dir(folder).arg("-c").arg(format!("({command}) 2>&1"));
    let host = if command.starts_with("curl ") { &world.web.host } else { &world.mesh.controller_host };
    let output = host
        .run(move || async move {
            let run = move || shell.output().with_context(|| format!("running {shell:?}"));
            tokio::task::spawn_blocking(run).await?
        })
        .await?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn compare(wanted: &[String], printed: &str) -> anyhow::Result<()> {
    let wanted: Vec<&str> =
        wanted.iter().map(|line| line.trim_end()).filter(|line| !line.is_empty()).collect();
    let printed: Vec<&str> = printed.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    ensure!(
        lines_match(&wanted, &printed),
        "it printed something else than the README says:\n{}",
        wanted.join("\n")
    );
    Ok(())
}

fn lines_match(wanted: &[&str], printed: &[&str]) -> bool {
    match wanted.split_first() {
        None => printed.is_empty(),
        Some((&"...", rest)) => (0..=printed.len()).any(|skipped| lines_match(rest, &printed[skipped..])),
        Some((line, rest)) => printed
            .split_first()
            .is_some_and(|(first, others)| line_matches(line, first) && lines_match(rest, others)),
    }
}

/// `...` stands for anything; runs of blanks are one.
fn line_matches(wanted: &str, printed: &str) -> bool {
    let join = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (wanted, printed) = (join(wanted), join(printed));
    let pieces: Vec<&str> = wanted.split("...").collect();
    let Some((first, rest)) = pieces.split_first() else { return false };
    let Some(mut left) = printed.strip_prefix(first) else { return false };
    for (at, piece) in rest.iter().enumerate() {
        if at + 1 == rest.len() {
            return left.ends_with(piece);
        }
        let Some(found) = left.find(piece) else { return false };
        left = &left[found + piece.len()..];
    }
    left.is_empty()
}
