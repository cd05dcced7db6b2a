//! `outrigger policy history`: who changed an object, when, and what it then was.

use anyhow::Result;
use clap::Args;

use super::{
    Scope,
    api::{self, Past},
    names,
};
use crate::output::{self, Format, Row, age, date};

#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    scope: Scope,
    /// KIND NAME, KIND/NAME or KIND/NAMESPACE/NAME
    #[arg(value_name = "KIND NAME", required = true)]
    words: Vec<String>,
    /// How to print; json and yaml hold the object as it was
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Row for Past {
    const COLUMNS: &[&str] = &["REVISION", "ACTION", "AUTHOR", "AGE"];
    const WIDE: &[&str] = &["TIME"];

    fn name(&self) -> String {
        self.revision.to_string()
    }

    fn cells(&self) -> Vec<String> {
        vec![self.revision.to_string(), self.action.clone(), self.author.clone(), age(self.time)]
    }

    fn wide(&self) -> Vec<String> {
        vec![date(self.time)]
    }
}

impl Arguments {
    pub(super) async fn run(self) -> Result<()> {
        let key = names::key(&self.words, &self.scope.namespace()?)?;
        output::print(self.output, &api::history(&self.scope.server()?, &key).await?)
    }
}
