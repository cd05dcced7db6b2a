//! `outrigger policy explain`: what would become of one request, and who says so.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use outrigger_policy::{
    cases,
    catalog::split_service,
    kinds::{Case, Expect, TestFrom, TestRequest, TestTo},
    resolve,
};

use super::{Scope, api, files, overlay::overlay};
use crate::output::{self, Format, plain};

#[derive(Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    scope: Scope,
    /// Who asks: a service, as `web` or `web.shop`, a SPIFFE id, or `<namespace>/<service account>` [default: somebody without an
    /// identity]
    #[arg(long, value_name = "CALLER")]
    from: Option<String>,
    /// From this address [default: that of one of the caller's workloads]
    #[arg(long, value_name = "ADDRESS")]
    from_address: Option<IpAddr>,
    /// Whom it asks: a service, as `orders`, `orders.shop` or `orders.shop:8080`
    #[arg(long, value_name = "SERVICE[:PORT]")]
    to: String,
    /// The request's method
    #[arg(long, default_value = "GET")]
    method: String,
    /// The request's path and query
    #[arg(long, default_value = "/")]
    path: String,
    /// The request's authority [default: the service's name]
    #[arg(long)]
    authority: Option<String>,
    /// A header, `name: value`; may be repeated
    #[arg(long = "header", value_name = "NAME:VALUE")]
    headers: Vec<String>,
    /// Ask about a connection for bytes, not about a request
    #[arg(long, conflicts_with_all = ["method", "path", "authority", "headers"])]
    tcp: bool,
    /// As if these files were applied; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR|-")]
    files: Vec<PathBuf>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Form,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Form {
    /// A line for each decision
    #[default]
    Table,
    /// For programs
    Json,
    /// For programs
    Yaml,
}

impl Arguments {
    pub(super) async fn run(self) -> Result<()> {
        let namespace = self.scope.namespace()?;
        let case = self.case(&namespace)?;
        let parsed =
            if self.files.is_empty() { Vec::new() } else { files::objects(&self.files, &namespace)? };
        files::warn(&parsed);
        let (policies, catalog) = api::everything(&self.scope.server()?).await?;
        let objects = parsed.iter().map(|parsed| &parsed.object);
        let resolved = resolve(&overlay(&policies, objects), &catalog);
        // A case that expects nothing: names are found, and the question is asked, exactly as in a test.
        let result = cases::run([&case], &resolved, &catalog).pop().context("the question got no answer")?;
        let Some(explanation) = result.explanation else {
            bail!("the question cannot be asked: {}", result.failures.join("; "))
        };
        output::write(&match self.output {
            Form::Table => explanation.to_string().lines().map(|line| plain(line) + "\n").collect(),
            Form::Json => output::document(Format::Json, &explanation)?,
            Form::Yaml => output::document(Format::Yaml, &explanation)?,
        })
    }

    fn case(&self, namespace: &str) -> Result<Case> {
        let mut from = TestFrom { address: self.from_address, ..TestFrom::default() };
        match &self.from {
            Some(caller) if caller.contains('/') => from.identity = Some(caller.clone()),
            Some(caller) => from.service = Some(full_name(caller, namespace)),
            None => {}
        }
        let (service, port) = match self.to.rsplit_once(':') {
            Some((service, port)) => (
                service,
                Some(port.parse().with_context(|| format!("--to {}: `{port}` is no port", self.to))?),
            ),
            None => (self.to.as_str(), None),
        };
        let to = TestTo { service: full_name(service, namespace), port };
        let request = if self.tcp {
            None
        } else {
            Some(TestRequest {
                method: Some(self.method.clone()),
                path: self.path.clone(),
                authority: self.authority.clone(),
                headers: self.headers.iter().map(|text| header(text)).collect::<Result<BTreeMap<_, _>>>()?,
            })
        };
        Ok(Case { name: None, from, to, request, expect: Expect::default() })
    }
}

fn full_name(service: &str, namespace: &str) -> String {
    if split_service(service).is_some() { service.to_owned() } else { format!("{service}.{namespace}") }
}

fn header(text: &str) -> Result<(String, String)> {
    let (name, value) = text.split_once(':').with_context(|| format!("--header {text}: write NAME:VALUE"))?;
    Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
}
