//! `outrigger policy get` and `describe`: what is in force, and how far it has come.

use std::fmt::Write as _;

use anyhow::Result;
use clap::Args;
use outrigger_policy::{
    Object, Spec,
    kinds::{GrpcRoute, HttpRoute},
};
use serde::Serialize;

use super::{
    Scope,
    api::{self, Item, Status},
    names::{self, Wanted},
};
use crate::output::{self, Colour, Format, Paint, Row, age, date, plain};

#[derive(Args)]
pub(super) struct Get {
    #[command(flatten)]
    scope: Scope,
    /// KIND, KIND NAME..., KIND/NAME or KIND/NAMESPACE/NAME; several kinds with commas; everything where it is left out
    #[arg(value_name = "KIND [NAME]")]
    words: Vec<String>,
    /// Of all namespaces
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// How to print; yaml can be given to `apply -f -`
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Args)]
pub(super) struct Describe {
    #[command(flatten)]
    scope: Scope,
    /// KIND NAME, KIND/NAME or KIND/NAMESPACE/NAME; several may be named
    #[arg(value_name = "KIND NAME", required = true)]
    words: Vec<String>,
}

/// An object as it is given out: as people write it, with what the server knows of it.
#[derive(Serialize)]
struct Document {
    #[serde(flatten)]
    object: Object,
    status: Status,
    #[serde(skip)]
    revision: u64,
    #[serde(skip)]
    created: i64,
    #[serde(skip)]
    author: String,
}

impl From<Item> for Document {
    fn from(Item { mut object, revision, created, author, status, .. }: Item) -> Self {
        // What is read, edited and applied again then fails if somebody else was faster.
        object.metadata.resource_version.get_or_insert_with(|| revision.to_string());
        object.metadata.creation_timestamp.get_or_insert_with(|| date(created));
        Self { object, status, revision, created, author }
    }
}

impl Row for Document {
    const COLUMNS: &[&str] = &["KIND", "NAMESPACE", "NAME", "TARGET", "STATUS", "PROXIES", "AGE"];
    const WIDE: &[&str] = &["REVISION", "AUTHOR", "MESSAGE"];

    fn name(&self) -> String {
        names::name(&self.object.key())
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.object.kind().to_string(),
            self.object.metadata.namespace.clone(),
            self.object.metadata.name.clone(),
            target(&self.object),
            self.status.word(),
            format!("{}/{}", self.status.proxies.accepted, self.status.proxies.on),
            age(self.created),
        ]
    }

    fn wide(&self) -> Vec<String> {
        let bad = self.status.conditions.iter().find(|condition| condition.is_bad());
        let message = bad.map(|condition| condition.message.clone()).unwrap_or_default();
        vec![self.revision.to_string(), self.author.clone(), message]
    }

    fn is_alarming(&self) -> bool {
        self.status.conditions.iter().any(api::Condition::is_bad) || !self.status.proxies.refused.is_empty()
    }
}

impl Status {
    /// In one word: the first that is wrong, else that it is accepted.
    fn word(&self) -> String {
        let bad = self.conditions.iter().find(|condition| condition.is_bad());
        match (bad, self.conditions.is_empty()) {
            (Some(condition), _) => condition.reason.clone(),
            (None, false) => "Accepted".to_owned(),
            (None, true) => "unknown".to_owned(),
        }
    }
}

/// What an object is about, in a few words.
fn target(object: &Object) -> String {
    // Of an enumeration, the word that people write.
    fn word(kind: &impl Serialize) -> String {
        serde_json::to_value(kind).ok().and_then(|kind| Some(kind.as_str()?.to_owned())).unwrap_or_default()
    }
    let port = |port: Option<u16>| port.map(|port| format!(":{port}")).unwrap_or_default();
    let named = |kind: String, name: Option<&String>, port: String| match name {
        Some(name) => format!("{kind} {name}{port}"),
        None => format!("{kind}{port}"),
    };
    match &object.spec {
        Spec::MeshDefaults(_) => String::new(),
        Spec::TrafficPolicy(policy) => {
            let target = &policy.target_ref;
            let section = target.section_name.as_ref().map(|name| format!("#{name}")).unwrap_or_default();
            named(word(&target.kind), target.name.as_ref(), port(target.port) + &section)
        }
        Spec::AccessPolicy(policy) => {
            let target = &policy.target_ref;
            let labels: Vec<String> =
                target.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let labels = labels.join(",");
            let name = target.name.as_ref().or(Some(&labels).filter(|labels| !labels.is_empty()));
            named(word(&target.kind), name, port(target.port))
        }
        Spec::ExternalService(service) => service.hosts.join(","),
        Spec::HttpRoute(HttpRoute { parent_refs, .. }) | Spec::GrpcRoute(GrpcRoute { parent_refs, .. }) => {
            let parents: Vec<String> = parent_refs
                .iter()
                .map(|parent| named("Service".to_owned(), Some(&parent.name), port(parent.port)))
                .collect();
            parents.join(",")
        }
    }
}

impl Get {
    pub(super) async fn run(self) -> Result<()> {
        let (server, namespace) = (self.scope.server()?, self.scope.namespace()?);
        let mut items = Vec::new();
        let mut is_one = false;
        match names::wanted(&self.words, &namespace)? {
            Wanted::Keys(keys) => {
                is_one = keys.len() == 1;
                for key in &keys {
                    items.push(api::get(&server, key).await?);
                }
            }
            Wanted::Kinds(kinds) => {
                let namespace = (!self.all_namespaces).then_some(namespace.as_str());
                // One call, so that the list is of one moment.
                let kind = if let [kind] = *kinds.as_slice() { Some(kind) } else { None };
                items = api::list(&server, kind, namespace).await?;
                items.retain(|item| kinds.contains(&item.object.kind()));
            }
        }
        let documents: Vec<Document> = items.into_iter().map(Document::from).collect();
        match (self.output, documents.as_slice()) {
            // Kubernetes' forms: documents one after the other, and an object of kind List.
            (Format::Yaml, documents) => {
                let documents: Result<Vec<_>> =
                    documents.iter().map(|document| output::document(Format::Yaml, document)).collect();
                output::write(&documents?.join("---\n"))
            }
            (Format::Json, [document]) if is_one => output::write(&output::document(Format::Json, document)?),
            (Format::Json, documents) => {
                let list = serde_json::json!({ "apiVersion": "v1", "kind": "List", "items": documents });
                output::write(&output::document(Format::Json, &list)?)
            }
            (format, documents) => output::print(format, documents),
        }
    }
}

impl Describe {
    pub(super) async fn run(self) -> Result<()> {
        let (server, namespace) = (self.scope.server()?, self.scope.namespace()?);
        let mut texts = Vec::new();
        for key in names::keys(&self.words, &namespace)? {
            texts.push(describe(&api::get(&server, &key).await?, Paint::stdout())?);
        }
        output::write(&texts.join("\n"))
    }
}

/// All about one object, for people.
fn describe(item: &Item, paint: Paint) -> Result<String> {
    let metadata = &item.object.metadata;
    let mut text = String::new();
    let mut line = |name: &str, value: &str| writeln!(text, "{:<13}{}", format!("{name}:"), plain(value));
    let pairs = |pairs: &std::collections::BTreeMap<String, String>| {
        pairs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(", ")
    };
    line("Kind", &item.object.kind().to_string())?;
    line("Namespace", &metadata.namespace)?;
    line("Name", &metadata.name)?;
    if !metadata.labels.is_empty() {
        line("Labels", &pairs(&metadata.labels))?;
    }
    if !metadata.annotations.is_empty() {
        line("Annotations", &pairs(&metadata.annotations))?;
    }
    line("Created", &format!("{} ({} ago)", date(item.created), age(item.created)))?;
    line("Updated", &format!("{} ({} ago)", date(item.updated), age(item.updated)))?;
    line("Revision", &format!("{}, by {}", item.revision, item.author))?;
    writeln!(text, "Status:")?;
    if item.status.conditions.is_empty() {
        writeln!(text, "  not known: the controller has said nothing of it")?;
    }
    for condition in &item.status.conditions {
        let parent = condition.parent.as_ref().and_then(|parent| parent.get("name")?.as_str());
        let parent = parent.map(|parent| format!(" for {parent}")).unwrap_or_default();
        let line = format!("{}={}{parent}: {}", condition.kind, condition.status, condition.reason);
        let colour = if condition.is_bad() { Colour::Red } else { Colour::Green };
        writeln!(text, "  {}", paint.paint(colour, &plain(&line)))?;
        if !condition.message.is_empty() {
            writeln!(text, "    {}", plain(&condition.message))?;
        }
    }
    let reach = &item.status.proxies;
    writeln!(
        text,
        "Proxies:     on {}, accepted by {}, refused by {}",
        reach.on,
        reach.accepted,
        reach.refused.len()
    )?;
    for refused in &reach.refused {
        let line = plain(&format!("{}: {}", refused.proxy, refused.reason));
        writeln!(text, "  {}", paint.paint(Colour::Red, &line))?;
    }
    writeln!(text, "Spec:")?;
    for line in serde_saphyr::to_string(&item.object.spec)?.lines() {
        writeln!(text, "  {line}")?;
    }
    Ok(text)
}
