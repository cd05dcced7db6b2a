//! What `-f` names: files, folders and standard input, read as one set of objects.

use std::{
    collections::BTreeMap,
    fmt,
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use outrigger_policy::{Catalog, Documents, Fault, Finding, Key, Object, Parsed, Policies, parse};

use crate::client::Refusal;

/// `-f`.
#[derive(Args)]
pub(super) struct Files {
    /// A file, a folder of which every .yaml, .yml and .json is read, or - for standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR|-", required = true)]
    pub(super) files: Vec<PathBuf>,
}

/// A text and where it comes from.
struct Source {
    name: String,
    text: String,
}

/// Faults of files, each with its place.
#[derive(Debug)]
pub(super) struct Faults(pub(super) Vec<Fault>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(f, "{count} {} in the files", if count == 1 { "fault" } else { "faults" })?;
        self.0.iter().try_for_each(|fault| write!(f, "\n{fault}"))
    }
}

impl std::error::Error for Faults {}

/// Reads the texts of all of `files`.
fn sources(files: &[PathBuf]) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for file in files {
        if file == Path::new("-") {
            sources.push(read("standard input".to_owned(), std::io::stdin())?);
        } else if file.is_dir() {
            let found = of_folder(file)?;
            if found.is_empty() {
                bail!("{} holds no .yaml, .yml or .json file", file.display());
            }
            for file in found {
                sources.push(open(&file)?);
            }
        } else {
            sources.push(open(file)?);
        }
    }
    Ok(sources)
}

/// By name, so that faults come in the same order each time.
fn of_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let tried = || format!("reading the folder {}", folder.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(tried)? {
        let path = entry.with_context(tried)?.path();
        let is_text =
            path.extension().is_some_and(|end| ["yaml", "yml", "json"].iter().any(|known| end == *known));
        if is_text && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn open(path: &Path) -> Result<Source> {
    let name = path.display().to_string();
    let file = std::fs::File::open(path).with_context(|| format!("reading {name}"))?;
    read(name, file)
}

fn read(name: String, from: impl Read) -> Result<Source> {
    let mut text = String::new();
    // One byte more than is parsed: the parser says that it is too much.
    from.take(parse::MAX_BYTES as u64 + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("reading {name}"))?;
    Ok(Source { name, text })
}

/// Reads all of `files` as objects; every fault of every file is told.
pub(super) fn objects(files: &[PathBuf], namespace: &str) -> Result<Vec<Parsed>> {
    let parse = |source: &Source| outrigger_policy::parse(&source.name, &source.text, namespace);
    let objects: Vec<Parsed> = each(files, parse)?.into_iter().flatten().collect();
    if objects.is_empty() {
        bail!("the files hold no object");
    }
    let twice = twice(&objects);
    if twice.is_empty() { Ok(objects) } else { Err(Faults(twice).into()) }
}

/// The objects of what was read, checked against what is there: warnings are told, those of [`warn`] among them, faults
/// are the error.
pub(super) fn validated(parsed: &[Parsed], policies: &Policies, catalog: &Catalog) -> Result<Vec<Object>> {
    let objects: Vec<Object> = parsed.iter().map(|parsed| parsed.object.clone()).collect();
    let findings = outrigger_policy::validate(&objects, &[], policies, catalog);
    for warning in &findings.warnings {
        eprintln!("warning: {}", place(warning, parsed));
    }
    if findings.errors.is_empty() {
        return Ok(objects);
    }
    Err(Faults(findings.errors.iter().map(|finding| place(finding, parsed)).collect()).into())
}

/// Reads all of `files` as objects and tests; every fault of every file is told.
pub(super) fn documents(files: &[PathBuf], namespace: &str) -> Result<Documents> {
    let parse = |source: &Source| outrigger_policy::parse_with_tests(&source.name, &source.text, namespace);
    let mut all = Documents::default();
    for Documents { objects, tests } in each(files, parse)? {
        all.objects.extend(objects);
        all.tests.extend(tests);
    }
    Ok(all)
}

fn each<T>(files: &[PathBuf], parse: impl Fn(&Source) -> Result<T, Vec<Fault>>) -> Result<Vec<T>> {
    let (mut all, mut faults) = (Vec::new(), Vec::new());
    for source in sources(files)? {
        match parse(&source) {
            Ok(parsed) => all.push(parsed),
            Err(found) => faults.extend(found),
        }
    }
    if faults.is_empty() { Ok(all) } else { Err(Faults(faults).into()) }
}

/// Two files that say different things of one object leave open which of them is meant.
pub(super) fn twice(objects: &[Parsed]) -> Vec<Fault> {
    let mut first: BTreeMap<Key, Fault> = BTreeMap::new();
    let mut faults = Vec::new();
    for parsed in objects {
        let key = parsed.object.key();
        let here = parsed.fault("metadata.name", "");
        match first.get(&key) {
            Some(other) => faults.push(
                parsed.fault("metadata.name", &format!("{key} is also in {}:{}", other.file, other.line)),
            ),
            None => drop(first.insert(key, here)),
        }
    }
    faults
}

/// Doubts about each object alone go to standard error: they hold nothing up.
pub(super) fn warn(parsed: &[Parsed]) {
    for warning in parsed.iter().flat_map(|parsed| &parsed.warnings) {
        eprintln!("warning: {warning}");
    }
}

/// The revision that a file says it was made from (`policy get -o yaml` writes it).
pub(super) fn revision(object: &Object) -> Option<u64> {
    object.metadata.resource_version.as_ref()?.parse().ok()
}

/// What the controller found wrong, with the places in the files: it knows objects and their fields only.
pub(super) fn locate(error: anyhow::Error, parsed: &[Parsed]) -> anyhow::Error {
    let Some(refusal) = error.downcast_ref::<Refusal>().filter(|refusal| !refusal.faults.is_empty()) else {
        return error;
    };
    let locate = |fault: &Fault| place_of(&fault.file, &fault.path, &fault.message, parsed);
    Faults(refusal.faults.iter().map(locate).collect()).into()
}

/// A warning of the controller about an object, with its place in the files: it says `FIELD: WHAT`.
pub(super) fn locate_warning(key: &Key, warning: &str, parsed: &[Parsed]) -> Fault {
    let field = warning.split_once(": ").filter(|(path, _)| {
        ["spec", "metadata"].iter().any(|top| path.split(['.', '[']).next() == Some(top))
    });
    let (path, message) = field.unwrap_or(("", warning));
    place_of(&key.to_string(), path, message, parsed)
}

/// A finding, with its place in the files.
fn place(finding: &Finding, parsed: &[Parsed]) -> Fault {
    place_of(&finding.key.to_string(), &finding.path, &finding.message, parsed)
}

fn place_of(key: &str, path: &str, message: &str, parsed: &[Parsed]) -> Fault {
    let found = parsed.iter().find(|parsed| parsed.object.key().to_string() == key);
    found.map_or_else(
        || Fault {
            file: key.to_owned(),
            path: path.to_owned(),
            message: message.to_owned(),
            ..Fault::default()
        },
        |parsed| parsed.fault(path, message),
    )
}
