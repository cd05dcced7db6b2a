//! The reference of the values, made from the comments of `values.yaml`.
//!
//! The file is read line by line, because a YAML parser drops comments. It is written so that this suffices: two spaces a
//! level, a comment above every key, and whatever is no level of its own on one line.

use std::fmt::Write as _;

use outrigger_e2e::chart;
use serde_json::Value;

use crate::golden;
use crate::objects::parse;

const BEGIN: &str = "<!-- values: OUTRIGGER_REGENERATE=1 cargo test -p outrigger-e2e --test chart -->\n";
const END: &str = "<!-- end of values -->\n";

/// A key of the values.
struct Entry {
    /// `a.b.c`.
    path: String,
    comment: String,
    /// `None`: it has keys of its own.
    default: Option<String>,
}

fn entries(values: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut path: Vec<&str> = Vec::new();
    let mut comment: Vec<&str> = Vec::new();
    for line in values.lines() {
        let text = line.trim_start();
        let level = (line.len() - text.len()) / 2;
        if text.is_empty() {
            // What stands alone is about the file.
            comment.clear();
        } else if let Some(words) = text.strip_prefix("# ") {
            comment.push(words);
        } else {
            let (key, default) =
                text.split_once(':').unwrap_or_else(|| panic!("no key and no comment: {line}"));
            path.truncate(level);
            path.push(key);
            let default = default.trim();
            entries.push(Entry {
                path: path.join("."),
                comment: std::mem::take(&mut comment).join(" "),
                default: (!default.is_empty()).then(|| default.to_owned()),
            });
        }
    }
    entries
}

/// A heading and a table for each key that has keys; before them a table of those that have none.
fn reference(entries: &[Entry]) -> String {
    const HEAD: &str = "\n| value | default | |\n|---|---|---|\n";
    let mut text = HEAD.to_owned();
    for alone in entries.iter().filter(|entry| !entry.path.contains('.') && entry.default.is_some()) {
        row(&mut text, alone);
    }
    for section in entries.iter().filter(|entry| !entry.path.contains('.') && entry.default.is_none()) {
        let _ = write!(text, "\n### `{}`\n\n{}\n{HEAD}", section.path, section.comment);
        let below = format!("{}.", section.path);
        for entry in entries.iter().filter(|entry| entry.path.starts_with(&below)) {
            row(&mut text, entry);
        }
    }
    text
}

fn row(text: &mut String, entry: &Entry) {
    let default = entry.default.as_ref().map(|default| format!("`{default}`")).unwrap_or_default();
    let _ = writeln!(text, "| `{}` | {default} | {} |", entry.path, entry.comment.replace('|', "\\|"));
}

#[test]
fn the_reference_is_current() {
    for name in ["outrigger", "outrigger-demo"] {
        let folder = chart::folder(name);
        let values = std::fs::read_to_string(folder.join("values.yaml")).unwrap();
        let file = folder.join("README.md");
        let readme = std::fs::read_to_string(&file).unwrap();
        let (before, rest) = readme.split_once(BEGIN).expect("the README has a place for the values");
        let (_, after) = rest.split_once(END).expect("the place has an end");
        golden(&file, &format!("{before}{BEGIN}{}\n{END}{after}", reference(&entries(&values))));
    }
}

#[test]
fn every_value_is_described() {
    for name in ["outrigger", "outrigger-demo"] {
        let values = std::fs::read_to_string(chart::folder(name).join("values.yaml")).unwrap();
        for entry in entries(&values) {
            assert!(!entry.comment.is_empty(), "{name}: {} has no comment above it", entry.path);
        }
    }
}

/// The schema knows every value, and no other: what it knows is what can be set.
#[test]
fn the_schema_has_the_same_values() {
    for name in ["outrigger", "outrigger-demo"] {
        let read = |file: &str| std::fs::read_to_string(chart::folder(name).join(file)).unwrap();
        let schema: Value = serde_json::from_str(&read("values.schema.json")).unwrap();
        let [values] = &parse(&read("values.yaml"))[..] else { panic!("one document") };
        same(name, &schema["properties"], values);
    }
}

fn same(at: &str, properties: &Value, values: &Value) {
    let (properties, values) = (properties.as_object().unwrap(), values.as_object().unwrap());
    for (key, value) in values {
        let property = properties.get(key).unwrap_or_else(|| panic!("{at}.{key} is not in the schema"));
        // A native map of Kubernetes has no properties of ours.
        if value.is_object() && property.get("properties").is_some() {
            same(&format!("{at}.{key}"), &property["properties"], value);
        }
    }
    // Helm's own; and limits of our own resources may be set where there is no default.
    for key in properties.keys().filter(|key| *key != "global" && *key != "cpu" && *key != "memory") {
        assert!(values.contains_key(key), "{at}.{key} has no default in values.yaml");
    }
}
