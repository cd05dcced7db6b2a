//! Chapters of the README that are transcripts: each command is run, and must print what stands there.
//!
//! A chapter is what stands between `<!-- transcript: NAME -->` and `<!-- end of transcript -->`. In its `console` blocks, `$ `
//! begins a command for the shell, what follows is its output, and `...` in a line stands for anything in that line, alone in a
//! line for any lines. A block of another kind with a first line `# <file>` is that file.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::network::Host;
use crate::sandbox;

const END: &str = "<!-- end of transcript -->";
/// Between two tries of a command that is given time.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
enum Step {
    File { name: String, text: String },
    Command { command: String, output: Vec<String> },
}

/// What a command of a transcript runs in.
pub struct Shell {
    /// Where.
    pub host: Host,
    /// What its environment has more than ours; `PATH` begins with the project's binaries and tools.
    pub environment: Vec<(String, String)>,
    /// A reader is not faster than this: until then the command is run again if it printed something else.
    pub patience: Duration,
}

/// Replays a chapter. `shell` says of each command what it runs in.
///
/// # Errors
/// Names the first command that printed something else, and both texts.
pub async fn replay(chapter: &str, shell: impl Fn(&str) -> anyhow::Result<Shell>) -> anyhow::Result<()> {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let readme = checkout.join("README.md");
    let readme = std::fs::read_to_string(&readme).with_context(|| format!("reading {}", readme.display()))?;
    let steps = steps(&readme, chapter)?;
    ensure!(steps.iter().any(|step| matches!(step, Step::Command { .. })), "the chapter has no command");
    let folder = folder(&checkout)?;
    for step in steps {
        match step {
            Step::File { name, text } => {
                ensure!(!name.contains('/'), "{name} lies outside of the transcript's folder");
                std::fs::write(folder.join(&name), text).with_context(|| format!("writing {name}"))?;
            }
            Step::Command { command, output } => {
                let start = Instant::now();
                loop {
                    let shell = shell(&command)?;
                    let patience = shell.patience;
                    let printed = run(shell, &folder, &command).await?;
                    let same = compare(&output, &printed).with_context(|| format!("$ {command}\n{printed}"));
                    if same.is_ok() || start.elapsed() >= patience {
                        break same?;
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
    Ok(())
}

/// Commands run in a folder that looks like a checkout and may be written to.
fn folder(checkout: &Path) -> anyhow::Result<PathBuf> {
    let folder = sandbox::get().work.join("transcript");
    std::fs::create_dir_all(&folder).context("making a folder for the transcript")?;
    std::os::unix::fs::symlink(checkout.join("charts"), folder.join("charts"))
        .context("linking the charts")?;
    Ok(folder)
}

fn steps(readme: &str, chapter: &str) -> anyhow::Result<Vec<Step>> {
    let begin = format!("<!-- transcript: {chapter} -->");
    let chapter = readme.split_once(&begin).with_context(|| format!("the README has no {begin}"))?.1;
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

/// Standard output and error of a command, as a terminal shows them.
async fn run(shell: Shell, folder: &Path, command: &str) -> anyhow::Result<String> {
    let sandbox = sandbox::get();
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{}:{path}", sandbox.binaries.display(), sandbox.tools.display());
    let mut started = Command::new("sh");
    started.envs(shell.environment).env("PATH", path);
    started.current_dir(folder).arg("-c").arg(format!("({command}) 2>&1"));
    let output = shell
        .host
        .run(move || async move {
            let run = move || started.output().with_context(|| format!("running {started:?}"));
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
