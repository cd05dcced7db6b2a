//! `outrigger inject` and `uninject`: sidecars without a cluster, by the webhook's own code.
//!
//! What people wrote should come out as they wrote it. So a change is made in their text where that can be done
//! (`inject/text`), and what came of it is read again and compared; else the document is written anew, without its
//! comments, and that is said.

mod text;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use outrigger_inject::{INJECT, Mesh, Mode, Namespace, Outcome, POD_SECURITY, Settings, manifest};
use serde_json::Value;

use crate::{Answer, output};

/// Bytes; more is no manifest.
const MAX_BYTES: u64 = 16 * 1024 * 1024;

/// The command line of `inject`.
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    input: Input,
    /// Say of each pod what becomes of it and why, instead of writing manifests
    #[arg(long)]
    explain: bool,
    /// The controller's configuration (the key controller.yaml of the ConfigMap that the chart installs)
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// The sidecar's image
    #[arg(long)]
    image: Option<String>,
    /// Who redirects the traffic of pods
    #[arg(long, value_enum)]
    mode: Option<ModeName>,
    /// Where sidecars find the controller, HOST:PORT
    #[arg(long, value_name = "HOST:PORT", value_delimiter = ',')]
    controller: Vec<String>,
    /// The mesh's trust domain
    #[arg(long)]
    trust_domain: Option<String>,
    /// The level of Pod Security that the namespaces enforce, where the files do not say it
    #[arg(long, value_name = "LEVEL")]
    pod_security: Option<String>,
}

/// The command line of `uninject`.
#[derive(Args)]
pub(crate) struct UninjectArguments {
    #[command(flatten)]
    input: Input,
}

#[derive(Args)]
struct Input {
    /// A file of manifests, or - for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE|-", required = true)]
    files: Vec<PathBuf>,
    /// The namespace of objects that name none
    #[arg(short = 'n', long, default_value = "default")]
    namespace: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum ModeName {
    /// An init container with the capability `NET_ADMIN`
    Init,
    /// The node's CNI plugin
    Cni,
}

/// Runs `inject`. With `--explain` the answer is no where a pod would be refused.
pub(crate) fn run(arguments: &Arguments) -> Result<Answer> {
    let mesh = mesh(arguments)?;
    let mut documents = arguments.input.read()?;
    let namespaces = namespaces(&documents);
    let facts = |name: &str| {
        // Who runs this command has opted in. The level of Pod Security is the namespace's own.
        let pod_security = namespaces.get(name).cloned().unwrap_or_else(|| arguments.pod_security.clone());
        Namespace { name: name.to_owned(), inject: Some("enabled".to_owned()), pod_security }
    };
    let (mut explained, mut refused) = (String::new(), Vec::new());
    for document in &mut documents {
        let mut value = document.value.clone();
        for (place, review) in manifest::inject(&mut value, &arguments.input.namespace, facts, &mesh) {
            let _ = writeln!(explained, "{}: {}", place.subject, review.outcome);
            for warning in &review.warnings {
                let _ = writeln!(explained, "  warning: {warning}");
                if !arguments.explain {
                    eprintln!("warning: {}: {warning}", place.subject);
                }
            }
            if let Outcome::Refused(_) = &review.outcome {
                refused.push(format!("{}: {}", place.subject, review.outcome));
            }
        }
        document.become_value(value);
    }
    if arguments.explain {
        if explained.is_empty() {
            bail!("the files hold no pod and nothing that makes pods");
        }
        output::write(&explained)?;
        return Ok(if refused.is_empty() { Answer::Yes } else { Answer::No });
    }
    if !refused.is_empty() {
        bail!("nothing was written:\n{}", refused.join("\n"));
    }
    write(&documents)?;
    Ok(Answer::Yes)
}

/// Runs `uninject`.
pub(crate) fn run_uninject(arguments: &UninjectArguments) -> Result<()> {
    let mut documents = arguments.input.read()?;
    for document in &mut documents {
        let mut value = document.value.clone();
        manifest::uninject(&mut value, &arguments.input.namespace);
        document.become_value(value);
    }
    write(&documents)
}

fn mesh(arguments: &Arguments) -> Result<Mesh> {
    let mut mesh = match &arguments.settings {
        Some(path) => settings(path)?,
        None => Mesh {
            trust_domain: "outrigger.local".to_owned(),
            namespace: "outrigger-system".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            settings: Settings::default(),
        },
    };
    if let Some(image) = &arguments.image {
        mesh.settings.image.clone_from(image);
    }
    if let Some(mode) = arguments.mode {
        mesh.settings.mode = match mode {
            ModeName::Init => Mode::Init,
            ModeName::Cni => Mode::Cni,
        };
    }
    if !arguments.controller.is_empty() {
        mesh.settings.controller.clone_from(&arguments.controller);
    }
    if let Some(domain) = &arguments.trust_domain {
        mesh.trust_domain.clone_from(domain);
    }
    let faults = mesh.settings.faults();
    if faults.is_empty() {
        Ok(mesh)
    } else {
        bail!("the settings have faults:\n  - {}", faults.join("\n  - "))
    }
}

/// What concerns the injector in a configuration of the controller.
fn settings(path: &Path) -> Result<Mesh> {
    let shown = path.display();
    let file = std::fs::File::open(path).with_context(|| format!("reading {shown}"))?;
    let text = bounded(file).with_context(|| format!("reading {shown}"))?;
    let config: Value = serde_saphyr::from_str(&text).map_err(|error| {
        anyhow::anyhow!("{shown} is no configuration of the controller: {}", error.without_snippet())
    })?;
    let word = |path: &str, default: &str| {
        config.pointer(path).and_then(Value::as_str).unwrap_or(default).to_owned()
    };
    let section = config.get("injector").filter(|section| !section.is_null()).cloned();
    let settings = section.map_or_else(|| Ok(Settings::default()), serde_json::from_value);
    Ok(Mesh {
        trust_domain: word("/trust_domain", "outrigger.local"),
        namespace: word("/mesh_namespace", "outrigger-system"),
        cluster_domain: word("/kubernetes/cluster_domain", "cluster.local"),
        settings: settings.with_context(|| format!("{shown}: the section injector cannot be used"))?,
    })
}

/// The level of Pod Security of each namespace that the files make.
fn namespaces(documents: &[Document]) -> BTreeMap<String, Option<String>> {
    let object = |value: &Value| {
        if value["apiVersion"] != "v1" || value["kind"] != "Namespace" {
            return None;
        }
        let label = value["metadata"]["labels"].get(POD_SECURITY).and_then(Value::as_str);
        Some((value["metadata"]["name"].as_str()?.to_owned(), label.map(str::to_owned)))
    };
    documents.iter().filter_map(|document| object(&document.value)).collect()
}

/// One document of a file.
struct Document {
    text: String,
    value: Value,
}

impl Document {
    /// Makes the text say `value`, by as small a change as can be.
    fn become_value(&mut self, value: Value) {
        if value == self.value {
            return;
        }
        let edited = text::edit(&self.text, &self.value, &value);
        self.text = edited.unwrap_or_else(|| {
            if self.text.contains('#') {
                eprintln!(
                    "warning: {} {}: written anew, without its comments and in another order of fields: it is not in \
                     block style throughout",
                    self.value["kind"].as_str().unwrap_or("?"),
                    self.value["metadata"]["name"].as_str().unwrap_or("?")
                );
            }
            serde_saphyr::to_string(&value).unwrap_or_default()
        });
        self.value = value;
    }
}

impl Input {
    fn read(&self) -> Result<Vec<Document>> {
        let mut documents = Vec::new();
        for file in &self.files {
            let (name, text) = if file == Path::new("-") {
                ("standard input".to_owned(), bounded(std::io::stdin()))
            } else {
                let name = file.display().to_string();
                let opened = std::fs::File::open(file).with_context(|| format!("reading {name}"))?;
                (name, bounded(opened))
            };
            let text = text.with_context(|| format!("reading {name}"))?;
            for text in text::documents(&text) {
                let value: Value = serde_saphyr::from_str(text)
                    .map_err(|error| anyhow::anyhow!("{name}: {}", error.without_snippet()))?;
                documents.push(Document { text: text.to_owned(), value });
            }
        }
        if documents.iter().all(|document| document.value.is_null()) {
            bail!("the files hold no object (label a namespace {INJECT}=enabled to inject in a cluster)");
        }
        Ok(documents)
    }
}

fn bounded(from: impl Read) -> Result<String> {
    let mut text = String::new();
    from.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        bail!("it is larger than {} MiB", MAX_BYTES / 1024 / 1024);
    }
    Ok(text)
}

fn write(documents: &[Document]) -> Result<()> {
    let mut all = String::new();
    for (index, document) in documents.iter().enumerate() {
        if index > 0 {
            all += "---\n";
        }
        all += &document.text;
        if !all.ends_with('\n') {
            all.push('\n');
        }
    }
    output::write(&all)
}
