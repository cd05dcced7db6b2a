//! Which controller is meant: at an address, by the file of contexts, or in a cluster, by a kubeconfig.
//!
//! What holds is found in one order, for each setting by itself: the option, its environment variable, the context, the
//! default. So a script that sets everything does not depend on what a person chose last. Names of contexts are looked up
//! in our own file first and then in the kubeconfig: a person who has only the latter needs nothing else, and one who has
//! both can say either name.

use std::{
    collections::BTreeSet,
    fmt,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::{
    client::{Server, Token},
    kubeconfig::{Cluster, Clusters},
};

/// Where a controller on the same host listens.
const DEFAULT_SERVER: &str = "127.0.0.1:15480";
/// Where a controller on the same host keeps the API's token.
const DEFAULT_TOKEN_FILE: &str = "/var/lib/outrigger/admin-token";
/// The namespace of objects that name none.
const DEFAULT_NAMESPACE: &str = "default";

/// Which controller, and what opens it.
#[derive(clap::Args, Clone, Debug, Default)]
#[command(next_help_heading = "Controller")]
pub(crate) struct Connection {
    #[command(flatten)]
    pub(crate) file: File,
    /// The context of that file or of the kubeconfig, in place of the current one
    #[arg(long, env = "OUTRIGGER_CONTEXT", value_name = "NAME")]
    context: Option<String>,
    /// The kubeconfig of the cluster whose controller is meant [default: where no context is set, KUBECONFIG, else
    /// ~/.kube/config, else the pod's own cluster]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Address of the controller's API [default: the context's, else 127.0.0.1:15480]
    #[arg(long, env = "OUTRIGGER_SERVER", value_name = "HOST:PORT")]
    server: Option<String>,
    /// File that holds the API's token; the controller writes it to `<data-dir>/admin-token` [default: the context's,
    /// else /var/lib/outrigger/admin-token]
    #[arg(long, env = "OUTRIGGER_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// The file of contexts.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct File {
    /// The file of contexts [default: ~/.config/outrigger/config.yaml]
    #[arg(long, env = "OUTRIGGER_CONFIG", value_name = "FILE", help_heading = "Controller")]
    config: Option<PathBuf>,
}

/// `-n`: the namespace of objects that name none.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Namespace {
    /// Namespace of what names none itself [default: the context's, else `default`]
    #[arg(short, long, env = "OUTRIGGER_NAMESPACE", value_name = "NAMESPACE")]
    namespace: Option<String>,
}

/// Where a controller is.
#[derive(Debug)]
pub(crate) enum Target {
    /// At an address; our own context says which, if one does.
    Address(Option<Context>),
    /// In a cluster.
    Cluster(Cluster),
}

impl Connection {
    /// The controller that these options, the environment and the files lead to.
    pub(crate) fn server(&self) -> Result<Server> {
        let context = match self.target()? {
            Target::Cluster(cluster) => return Ok(Server::of_cluster(cluster)),
            Target::Address(context) => context.unwrap_or_default(),
        };
        let server = self.address(Some(&context));
        let token = match (self.token_file.clone(), context.token, context.token_file) {
            (Some(file), _, _) | (None, None, Some(file)) => Token::File(file),
            (None, Some(Secret(token)), _) => Token::Text(token),
            (None, None, None) => Token::File(DEFAULT_TOKEN_FILE.into()),
        };
        Server::new(&server, token)
    }

    /// The cluster that is meant, or what is wrong with meaning one.
    pub(crate) fn cluster(&self) -> Result<Cluster> {
        match self.target()? {
            Target::Cluster(cluster) => Ok(cluster),
            Target::Address(_) => anyhow::bail!(
                "no cluster is chosen: there is no kubeconfig, or a context, --server or --token-file leads to a controller at an \
                 address (`outrigger context` shows which); name one with --kubeconfig"
            ),
        }
    }

    /// The namespace of what names none.
    pub(crate) fn namespace(&self, asked: &Namespace) -> Result<String> {
        if let Some(namespace) = &asked.namespace {
            return Ok(namespace.clone());
        }
        let of_context = match self.target()? {
            Target::Address(context) => context.and_then(|context| context.namespace),
            Target::Cluster(cluster) => cluster.namespace(),
        };
        Ok(of_context.unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()))
    }

    /// What is meant, and nothing is sent yet: a kubeconfig that was named; else the context that was named or is the
    /// current one of our file; else, where no address is given, the kubeconfig's current one or the pod's own cluster.
    pub(crate) fn target(&self) -> Result<Target> {
        if let Some(file) = &self.kubeconfig {
            let clusters = Clusters::read(Some(file))?.context("reading the kubeconfig")?;
            return Ok(Target::Cluster(clusters.choose(self.context.as_deref())?));
        }
        let (path, config) = self.file.load()?;
        if let Some(name) = self.context.as_ref().or(config.current_context.as_ref()) {
            if let Some(mut context) = config.contexts.into_iter().find(|context| context.name == *name) {
                // As in kubectl's file: a path is one beside the file, wherever the command is run.
                if let (Some(file), Some(folder)) = (&mut context.token_file, path.parent()) {
                    *file = folder.join(&file);
                }
                return Ok(Target::Address(Some(context)));
            }
            // An address that is given needs no context.
            if self.context.is_none() && self.server.is_some() {
                return Ok(Target::Address(None));
            }
            let of_cluster = Clusters::read(None)?.and_then(|clusters| clusters.context(name));
            return of_cluster.map(Target::Cluster).ok_or_else(|| {
                let fault = format!(
                    "there is no context `{name}`, and none in a kubeconfig; `outrigger context list` prints those that \
                     there are"
                );
                BadConfig::new(&path, vec![fault]).into()
            });
        }
        if self.server.is_some() || self.token_file.is_some() {
            return Ok(Target::Address(None));
        }
        let clusters = Clusters::read(None)?.filter(|clusters| clusters.current().is_some());
        Ok(match (clusters, Cluster::of_pod()) {
            (Some(clusters), _) => Target::Cluster(clusters.choose(None)?),
            (None, Some(pod)) => Target::Cluster(pod),
            (None, None) => Target::Address(None),
        })
    }

    /// The address that holds for a context of ours.
    pub(crate) fn address(&self, context: Option<&Context>) -> String {
        let of_context = context.and_then(|context| context.server.clone());
        self.server.clone().or(of_context).unwrap_or_else(|| DEFAULT_SERVER.to_owned())
    }

    /// Where the token for a context of ours comes from.
    pub(crate) fn token_source(&self, context: Option<&Context>) -> String {
        match (&self.token_file, context) {
            (Some(file), _) => file.display().to_string(),
            (None, Some(context)) => context.token_source(),
            (None, None) => DEFAULT_TOKEN_FILE.to_owned(),
        }
    }
}

impl File {
    fn path(&self) -> Result<PathBuf> {
        if let Some(path) = &self.config {
            return Ok(path.clone());
        }
        let home = std::env::home_dir().context(
            "finding ~/.config/outrigger/config.yaml: HOME is not set (name a file with --config)",
        )?;
        Ok(home.join(".config/outrigger/config.yaml"))
    }

    /// The file's path and content. A default file that does not exist is empty; one that was named must exist.
    pub(crate) fn load(&self) -> Result<(PathBuf, Config)> {
        let path = match self.path() {
            Ok(path) => path,
            // A service account of a host has no home: it names everything by options.
            Err(_) if self.config.is_none() => return Ok(Default::default()),
            Err(error) => return Err(error),
        };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && self.config.is_none() => {
                return Ok((path, Config::default()));
            }
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        let bad = |faults| BadConfig::new(&path, faults);
        let config: Config =
            serde_saphyr::from_str(&text).map_err(|error| bad(vec![error.to_string().trim().to_owned()]))?;
        let mut faults = config.faults();
        if config.contexts.iter().any(|context| context.token.is_some()) {
            let mode = std::fs::metadata(&path)
                .with_context(|| format!("reading the mode of {}", path.display()))?
                .permissions()
                .mode();
            if mode & 0o077 != 0 {
                let file = path.display();
                faults.push(format!(
                    "it holds a token, and others may read it (mode {:o}): run `chmod 600 {file}`",
                    mode & 0o777
                ));
            }
        }
        if faults.is_empty() { Ok((path, config)) } else { Err(bad(faults).into()) }
    }

    /// Reads the file, or begins one, for a change.
    pub(crate) fn load_or_new(&self) -> Result<(PathBuf, Config)> {
        let path = self.path()?;
        if path.exists() { self.load() } else { Ok((path, Config::default())) }
    }
}

/// The content of the file.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Config {
    /// The context that holds where none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) current_context: Option<String>,
    /// Each with a name of its own.
    #[serde(default)]
    pub(crate) contexts: Vec<Context>,
}

/// One controller, and how to work with it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Context {
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) server: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token: Option<Secret>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) token_file: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) namespace: Option<String>,
}

impl Context {
    /// One that says nothing yet.
    pub(crate) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// Where its token comes from, without the token.
    pub(crate) fn token_source(&self) -> String {
        match (&self.token, &self.token_file) {
            (Some(_), _) => "in this file".to_owned(),
            (None, Some(file)) => file.display().to_string(),
            (None, None) => DEFAULT_TOKEN_FILE.to_owned(),
        }
    }

    /// Takes the token from a file from now on.
    pub(crate) fn set_token_file(&mut self, file: PathBuf) {
        self.token = None;
        self.token_file = Some(file);
    }
}

/// A token that stands in the file. It is written back to the file that it came from and shown nowhere.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Config {
    fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut names = BTreeSet::new();
        for context in &self.contexts {
            let name = &context.name;
            if name.is_empty() {
                faults.push("a context has no name".to_owned());
            } else if !names.insert(name) {
                faults.push(format!("two contexts are called `{name}`"));
            }
            if context.token.is_some() && context.token_file.is_some() {
                faults.push(format!("context `{name}` has both `token` and `token-file`; keep one"));
            }
        }
        faults
    }

    /// Writes the file, for its owner only, in one step: a reader sees the old one or the new one.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let tried = || format!("writing {}", path.display());
        // Through a link to the file that it leads to, which may lie in a folder of a person's own settings.
        let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).with_context(tried)?;
        let mut file = tempfile::NamedTempFile::new_in(folder).with_context(tried)?;
        file.write_all(serde_saphyr::to_string(self)?.as_bytes()).with_context(tried)?;
        file.persist(&target).with_context(tried)?;
        Ok(())
    }
}

/// A file of contexts that cannot be used: exit code 64, with every fault.
#[derive(Debug)]
pub(crate) struct BadConfig {
    path: PathBuf,
    faults: Vec<String>,
}

impl BadConfig {
    /// The faults of a file.
    pub(crate) fn new(path: &Path, faults: Vec<String>) -> Self {
        Self { path: path.to_owned(), faults }
    }
}

impl fmt::Display for BadConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot be used: {}", self.path.display(), self.faults.join("; "))
    }
}

impl std::error::Error for BadConfig {}
