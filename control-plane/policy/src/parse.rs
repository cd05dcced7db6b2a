//! YAML text to objects.
//!
//! Reading goes on after a fault where that can be: the field that is at fault is put aside and the document is read
//! again without it, until nothing new comes up. So a person sees all that is wrong at once, each with its place. Only text
//! that is no YAML ends the reading of a file.
//!
//! The text may be anybody's. What it can cost is bounded before anything is made of it: its size, its nesting, what its
//! aliases come to, and the faults that are reported.

use std::collections::{BTreeSet, HashMap};

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_saphyr::{DuplicateKeyPolicy, Options};

use crate::check::{self, Severity};
use crate::de::{self, nearest};
use crate::fault::Fault;
use crate::kind::{API_VERSION, Key, Kind};
use crate::kinds::{Case, PolicyTest};
use crate::object::{self, Object};
use crate::tree::{Entry, Node, Place, Step, Value, path_text, shown};

/// Bytes of one file: thousands of objects.
pub const MAX_BYTES: usize = 4 << 20;
/// Faults of one file that are told: more than anybody mends at once. Each costs one reading of its document.
pub const MAX_FAULTS: usize = 50;
/// Values in one file, after aliases.
const MAX_NODES: usize = 250_000;
/// Values that aliases may repeat.
const MAX_REPLAYED: usize = 50_000;
/// Values inside of each other; the kinds need eleven.
const MAX_DEPTH: usize = 32;

/// An object, and where its fields stand.
#[derive(Debug, Clone)]
pub struct Parsed {
    /// The object; its namespace is set.
    pub object: Object,
    /// Doubts about it, which hold nothing up.
    pub warnings: Vec<Fault>,
    file: String,
    tree: Node,
}

impl Parsed {
    /// Something about a field of it, as in `spec.rules[0].name`, with its place.
    pub fn fault(&self, path: &str, message: &str) -> Fault {
        fault(&self.file, self.tree.locate(path), path.to_owned(), message.to_owned())
    }
}

/// Questions, and where they stand.
#[derive(Debug, Clone)]
pub struct ParsedTest {
    /// The questions.
    pub test: PolicyTest,
    file: String,
    tree: Node,
}

impl ParsedTest {
    /// Something about a case, by its number from 0, with its place.
    pub fn fault(&self, case: usize, message: &str) -> Fault {
        let path = format!("cases[{case}]");
        fault(&self.file, self.tree.locate(&path), path, message.to_owned())
    }
}

/// What is in a file.
#[derive(Debug, Clone, Default)]
pub struct Documents {
    /// The objects, as they stand in the file.
    pub objects: Vec<Parsed>,
    /// The tests, as they stand in the file.
    pub tests: Vec<ParsedTest>,
}

/// Reads the objects of a file, and checks all that can be checked of each alone. `file` is for messages;
/// `default_namespace` is where objects are that name none.
///
/// An object's `status` and what else is the server's is no fault. No object in the file is none either.
pub fn parse(file: &str, text: &str, default_namespace: &str) -> Result<Vec<Parsed>, Vec<Fault>> {
    let documents = parse_with_tests(file, text, default_namespace)?;
    let refuse = |test: &ParsedTest| {
        let entry = test.tree.get("kind");
        let place = entry.map_or(test.tree.place, |entry| entry.place);
        let message = "a PolicyTest is no object that is kept: run it with `outrigger policy test`";
        fault(file, place, "kind".to_owned(), message.to_owned())
    };
    if documents.tests.is_empty() {
        Ok(documents.objects)
    } else {
        Err(documents.tests.iter().map(refuse).collect())
    }
}

/// As [`parse`], where the file may hold tests too.
pub fn parse_with_tests(file: &str, text: &str, default_namespace: &str) -> Result<Documents, Vec<Fault>> {
    let trees = read(file, text).map_err(|fault| vec![fault])?;
    let mut reader = Reader::new(file, default_namespace);
    for tree in trees {
        if reader.full() {
            break;
        }
        reader.document(tree);
    }
    reader.finish()
}

/// The documents of the text, without those that are empty.
fn read(file: &str, text: &str) -> Result<Vec<Node>, Fault> {
    if text.len() > MAX_BYTES {
        let message = format!("holds {} bytes: more than {MAX_BYTES} are not read; split it", text.len());
        return Err(fault(file, Place::default(), String::new(), message));
    }
    let documents: Vec<Node> =
        serde_saphyr::from_multiple_with_options(text, options()).map_err(|error| {
            let location = error.location();
            let place =
                location.map_or(Place::default(), |at| Place { line: at.line(), column: at.column() });
            let reason = error.without_snippet().to_string();
            fault(file, place, String::new(), format!("is not read as YAML: {reason}"))
        })?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: MAX_NODES,
            max_events: 4 * MAX_NODES,
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_recorded_anchor_events: MAX_REPLAYED,
            max_documents: 10_000,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_REPLAYED,
        },
        // Found in the tree, all of them.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        // `on:` and `no` are texts, as in YAML 1.2.
        strict_booleans: true,
        with_snippet: false,
    }
}

fn fault(file: &str, place: Place, path: String, message: String) -> Fault {
    Fault { file: file.to_owned(), line: place.line, column: place.column, path, message }
}

/// Goes through the documents of one file.
struct Reader<'a> {
    file: &'a str,
    default_namespace: &'a str,
    documents: Documents,
    keys: BTreeSet<Key>,
    faults: Vec<Fault>,
    /// There was more than is told.
    cut: bool,
}

impl<'a> Reader<'a> {
    fn new(file: &'a str, default_namespace: &'a str) -> Self {
        let (documents, keys) = (Documents::default(), BTreeSet::new());
        Self { file, default_namespace, documents, keys, faults: Vec::new(), cut: false }
    }

    fn full(&mut self) -> bool {
        self.cut |= self.faults.len() >= MAX_FAULTS;
        self.cut
    }

    fn report(&mut self, place: Place, path: String, message: String) {
        if !self.full() {
            self.faults.push(fault(self.file, place, path, message));
        }
    }

    fn finish(mut self) -> Result<Documents, Vec<Fault>> {
        if self.cut {
            let message = format!("has more than {MAX_FAULTS} faults: the others are not told");
            self.faults.push(fault(self.file, Place::default(), String::new(), message));
        }
        if self.faults.is_empty() { Ok(self.documents) } else { Err(self.faults) }
    }

    fn document(&mut self, mut tree: Node) {
        self.duplicates(&mut tree, &mut Vec::new());
        if !matches!(tree.value, Value::Map(_)) {
            let message =
                format!("expected an object with apiVersion, kind, metadata and spec, found {}", tree.what());
            return self.report(tree.place, String::new(), message);
        }
        let Some(kind) = tree.get("kind") else {
            let kinds = kind_names().join(", ");
            return self.report(tree.place, "kind".to_owned(), format!("is missing: one of {kinds}"));
        };
        let place = kind.place;
        match tree.text("kind") {
            Some("PolicyTest") => self.test(tree),
            Some(name) => match Kind::ALL.into_iter().find(|kind| kind.name() == name) {
                Some(kind) => self.object(kind, tree),
                None => self.report(place, "kind".to_owned(), unknown_kind(name)),
            },
            None => {
                let message = format!("expected the name of a kind, found {}", kind.node.what());
                self.report(place, "kind".to_owned(), message);
            }
        }
    }

    /// Reports keys that come again, and takes them out.
    fn duplicates(&mut self, node: &mut Node, steps: &mut Vec<Step>) {
        match &mut node.value {
            Value::List(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    steps.push(Step::Item(index));
                    self.duplicates(item, steps);
                    steps.pop();
                }
            }
            Value::Map(entries) => {
                let mut seen: HashMap<String, u64> = HashMap::new();
                for Entry { key, place, node } in entries {
                    steps.push(Step::Field(key.clone()));
                    if let Some(line) = seen.get(key) {
                        let message = format!("is written twice, first in line {line}: one must go");
                        self.report(*place, path_text(steps), message);
                        node.hidden = true;
                    } else {
                        seen.insert(key.clone(), place.line);
                        self.duplicates(node, steps);
                    }
                    steps.pop();
                }
            }
            _ => {}
        }
    }

    /// Reads the tree until it can be read. `None`: what is left of it is nothing.
    fn read<T>(&mut self, tree: &mut Node, read: impl Fn(&Node) -> Result<T, de::Error>) -> Option<T> {
        loop {
            let error = match read(tree) {
                Ok(value) => return Some(value),
                Err(error) => error,
            };
            let mut path = error.path();
            // What was taken out is missing, which is no news.
            if !(error.missing && tree.hides(&path)) {
                self.report(error.place(tree), path_text(&path), error.message);
                if self.full() {
                    return None;
                }
            }
            if error.missing {
                path.pop();
            }
            if path.is_empty() {
                return None;
            }
            tree.hide(&path);
        }
    }

    fn object(&mut self, kind: Kind, mut tree: Node) {
        let before = self.faults.len();
        if let Some(version) = tree.text("apiVersion")
            && version != kind.api_version()
        {
            let message =
                format!("`{}` is not known for {kind}: write `{}`", shown(version), kind.api_version());
            self.report(tree.locate("apiVersion"), "apiVersion".to_owned(), message);
            tree.set_text("apiVersion", kind.api_version());
        }
        let read = self.read(&mut tree, |tree| object::deserialize_as(kind, tree));
        let Some(mut object) = read else { return };
        if object.metadata.namespace.is_empty() {
            self.default_namespace.clone_into(&mut object.metadata.namespace);
        }
        let problems = check::object(&object);
        let complete = self.faults.len() == before;
        let mut warnings = Vec::new();
        for mut problem in problems {
            problem.path = tree.path_in_text(&problem.path);
            let place = tree.locate(&problem.path);
            match problem.severity {
                // What was taken out may be all that is wrong with what was around it.
                Severity::Error if complete || !tree.lacks(&problem.path) => {
                    self.report(place, problem.path, problem.message);
                }
                Severity::Error => {}
                Severity::Warning => warnings.push(fault(self.file, place, problem.path, problem.message)),
            }
        }
        let key = object.key();
        if !self.keys.insert(key.clone()) {
            let place = tree.locate("metadata.name");
            self.report(
                place,
                "metadata.name".to_owned(),
                format!("{key} is in this file twice: one must go"),
            );
        }
        self.documents.objects.push(Parsed { object, warnings, file: self.file.to_owned(), tree });
    }

    fn test(&mut self, mut tree: Node) {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Document {
            #[serde(default, rename = "apiVersion")]
            api_version: Option<String>,
            #[serde(rename = "kind")]
            _kind: IgnoredAny,
            #[serde(default, rename = "metadata")]
            _metadata: IgnoredAny,
            cases: Vec<Case>,
        }
        let Some(document) = self.read(&mut tree, |tree| Document::deserialize(tree)) else { return };
        if document.api_version.as_deref().is_some_and(|version| version != API_VERSION) {
            let message = format!("is not known for PolicyTest: write `{API_VERSION}`, or leave it out");
            self.report(tree.locate("apiVersion"), "apiVersion".to_owned(), message);
        }
        let test = PolicyTest { cases: document.cases };
        for problem in check::test(&test) {
            self.report(tree.locate(&problem.path), problem.path, problem.message);
        }
        self.documents.tests.push(ParsedTest { test, file: self.file.to_owned(), tree });
    }
}

fn kind_names() -> Vec<&'static str> {
    Kind::ALL.into_iter().map(Kind::name).chain(["PolicyTest"]).collect()
}

fn unknown_kind(name: &str) -> String {
    let kinds = kind_names();
    let nearest = nearest(name, &kinds).map(|name| format!("did you mean {name}? ")).unwrap_or_default();
    format!("`{}` is not known: {nearest}there are {}", shown(name), kinds.join(", "))
}

#[cfg(test)]
mod tests;
