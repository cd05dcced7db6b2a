//! `outrigger policy diff`: what applying files would change, in the text and in effect.
//!
//! The text is what people review; the effect is what they mean. One line of a `MeshDefaults` may change every service, and
//! a page of reordered YAML nothing.

use anyhow::Result;
use clap::Args;
use outrigger_policy::{Object, effective, resolve, text};

use super::{
    Scope, api,
    files::{self, Files},
    overlay::overlay,
};
use crate::{
    Answer,
    output::{self, Colour, Paint, plain},
};

#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    scope: Scope,
    #[command(flatten)]
    files: Files,
}

impl Arguments {
    pub(super) async fn run(self) -> Result<Answer> {
        let parsed = files::objects(&self.files.files, &self.scope.namespace()?)?;
        let (policies, catalog) = api::everything(&self.scope.server()?).await?;
        let objects = files::validated(&parsed, &policies, &catalog)?;
        let paint = Paint::stdout();
        let mut text = String::new();
        for object in &objects {
            let key = object.key();
            let live = policies.get(&key).map(|stored| as_written(&stored.object)).unwrap_or_default();
            let diff = text::diff(&format!("live {key}"), &live, &format!("file {key}"), &as_written(object));
            for line in diff.lines() {
                text += &coloured(line, paint);
                text.push('\n');
            }
        }
        if text.is_empty() {
            return Ok(Answer::Yes);
        }
        let (old, new) = (resolve(&policies, &catalog), resolve(&overlay(&policies, &objects), &catalog));
        let changes = effective::changes(&old, &new, &catalog);
        text += if changes.is_empty() { "\nIn effect: nothing changes.\n" } else { "\nIn effect:\n" };
        for change in changes {
            text.extend(["  ", &plain(&change), "\n"]);
        }
        output::write(&text)?;
        Ok(Answer::No)
    }
}

/// As people write it: without what is the server's.
fn as_written(object: &Object) -> String {
    let mut object = object.clone();
    let metadata = &mut object.metadata;
    (metadata.generation, metadata.resource_version) = (None, None);
    (metadata.uid, metadata.creation_timestamp) = (None, None);
    object.to_yaml()
}

fn coloured(line: &str, paint: Paint) -> String {
    let colour = match line.as_bytes().first() {
        Some(b'+') => Colour::Green,
        Some(b'-') => Colour::Red,
        Some(b'@') => Colour::Cyan,
        _ => return line.to_owned(),
    };
    paint.paint(colour, line)
}
