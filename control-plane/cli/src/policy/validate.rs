//! `outrigger policy validate`: what is wrong with files, before anybody applies them.

use anyhow::Result;
use clap::Args;

use super::{
    Scope, api,
    files::{self, Files},
};
use crate::output;

#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    scope: Scope,
    #[command(flatten)]
    files: Files,
    /// Also check what the files refer to, against what the controller knows
    #[arg(long)]
    live: bool,
}

impl Arguments {
    pub(super) async fn run(self) -> Result<()> {
        let parsed = files::objects(&self.files.files, &self.scope.namespace()?)?;
        let checked = if self.live {
            let (policies, catalog) = api::everything(&self.scope.server()?).await?;
            files::validated(&parsed, &policies, &catalog)?;
            "references were checked"
        } else {
            files::warn(&parsed);
            "references were not checked (--live does)"
        };
        let objects = if parsed.len() == 1 { "object is" } else { "objects are" };
        output::write(&format!("{} {objects} valid; {checked}\n", parsed.len()))
    }
}
