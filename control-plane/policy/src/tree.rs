//! A YAML document as a tree that knows where each of its parts stands.
//!
//! Types are read from the tree and not from the text, for two reasons: a fault in one field does not hide those in the
//! others (the field is [hidden](Node::hide) and the reading begins again), and what is found later, by checks that know the whole, still has a line.

use std::fmt;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_saphyr::Spanned;

/// Where something stands, from 1; 0: not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) line: u64,
    pub(crate) column: u64,
}

/// One value.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) value: Value,
    /// Reported, and not looked at again.
    pub(crate) hidden: bool,
}

#[derive(Debug, Clone)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) place: Place,
    pub(crate) node: Node,
}

/// A step from a value to one of its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    Field(String),
    Item(usize),
}

/// Writes a path as people do: `spec.rules[0].name`; keys with other characters as `labels["app.kubernetes.io/name"]`.
pub(crate) fn path_text(steps: &[Step]) -> String {
    let mut text = String::new();
    for step in steps {
        text.push_str(&step_text(step));
    }
    text.strip_prefix('.').map(str::to_owned).unwrap_or(text)
}

fn step_text(step: &Step) -> String {
    match step {
        Step::Item(index) => format!("[{index}]"),
        Step::Field(key) => field_text(key),
    }
}

/// One step of a path to a key of a map.
pub(crate) fn field_text(key: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '<';
    if !key.is_empty() && key.len() <= 64 && key.chars().all(plain) {
        format!(".{key}")
    } else {
        let shown: String = key.chars().take(64).collect();
        format!("[\"{}\"]", shown.escape_debug())
    }
}

impl Node {
    /// The value of a key, also a hidden one.
    pub(crate) fn get(&self, key: &str) -> Option<&Entry> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|entry| entry.key == key),
            _ => None,
        }
    }

    /// The text of a key.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        match &self.get(key)?.node.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Puts another text there: to read on as if it had been right.
    pub(crate) fn set_text(&mut self, key: &str, text: &str) {
        if let Value::Map(entries) = &mut self.value
            && let Some(entry) = entries.iter_mut().find(|entry| entry.key == key)
        {
            entry.node.value = Value::Text(text.to_owned());
        }
    }

    /// Whether nothing stands here.
    pub(crate) fn is_null(&self) -> bool {
        matches!(self.value, Value::Null)
    }

    /// Takes the value at the path out of what is read. Without a path: the whole.
    pub(crate) fn hide(&mut self, path: &[Step]) {
        let part = match (path.split_first(), &mut self.value) {
            (Some((Step::Field(key), rest)), Value::Map(entries)) => entries
                .iter_mut()
                .find(|entry| entry.key == *key && !entry.node.hidden)
                .map(|entry| (&mut entry.node, rest)),
            (Some((Step::Item(index), rest)), Value::List(items)) => {
                items.get_mut(*index).map(|item| (item, rest))
            }
            (None | Some(_), _) => None,
        };
        match part {
            Some((node, rest)) => node.hide(rest),
            None => self.hidden = true,
        }
    }

    /// Whether the value of a key has been taken out.
    pub(crate) fn hides(&self, path: &[Step]) -> bool {
        let Some((step, rest)) = path.split_first() else { return self.hidden };
        let parts: Vec<&Node> = match (step, &self.value) {
            (Step::Field(key), Value::Map(entries)) => {
                entries.iter().filter(|entry| entry.key == *key).map(|entry| &entry.node).collect()
            }
            (Step::Item(index), Value::List(items)) => items.get(*index).into_iter().collect(),
            _ => Vec::new(),
        };
        self.hidden || parts.iter().any(|part| part.hides(rest))
    }

    /// Whether something was taken out at the path, as [`path_text`] writes it, or inside of what is there.
    pub(crate) fn lacks(&self, path: &str) -> bool {
        self.walk(path, false).node.any_hidden()
    }

    /// The path in the text of what has this path in what was read, where items of lists were taken out.
    pub(crate) fn path_in_text(&self, path: &str) -> String {
        let walked = self.walk(path, true);
        walked.path + walked.rest
    }

    fn any_hidden(&self) -> bool {
        self.hidden
            || match &self.value {
                Value::List(items) => items.iter().any(Self::any_hidden),
                Value::Map(entries) => entries.iter().any(|entry| entry.node.any_hidden()),
                _ => false,
            }
    }

    /// Where the path, as [`path_text`] writes it, stands: the place of the last part of it that is there.
    pub(crate) fn locate(&self, path: &str) -> Place {
        self.walk(path, false).place
    }

    /// Follows a path as far as it goes. `as_read`: its numbers count only items that were not taken out.
    fn walk<'a>(&'a self, path: &'a str, as_read: bool) -> Walked<'a> {
        let mut walked = Walked { node: self, place: self.place, path: String::new(), rest: path };
        while let Some(next) = walked.step(as_read) {
            walked = next;
        }
        walked
    }

    /// What it is, for messages.
    pub(crate) fn what(&self) -> String {
        match &self.value {
            Value::Null => "nothing".to_owned(),
            Value::Bool(value) => format!("`{value}`"),
            Value::Unsigned(value) => format!("the number {value}"),
            Value::Signed(value) => format!("the number {value}"),
            Value::Float(value) => format!("the number {value}"),
            Value::Text(text) => format!("the text `{}`", shown(text)),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a mapping".to_owned(),
        }
    }
}

/// Where a walk along a path has come to.
struct Walked<'a> {
    node: &'a Node,
    place: Place,
    path: String,
    /// What is still to go.
    rest: &'a str,
}

impl Walked<'_> {
    fn step(&self, as_read: bool) -> Option<Self> {
        match &self.node.value {
            Value::Map(entries) => entries.iter().find_map(|entry| {
                let mut text = field_text(&entry.key);
                if self.path.is_empty() && text.starts_with('.') {
                    text.remove(0);
                }
                let rest = self.rest.strip_prefix(&text)?;
                let whole = rest.is_empty() || rest.starts_with(['.', '[']);
                let path = format!("{}{text}", self.path);
                whole.then_some(Self { node: &entry.node, place: entry.place, path, rest })
            }),
            Value::List(items) => {
                let (index, rest) = self.rest.strip_prefix('[')?.split_once(']')?;
                let index: usize = index.parse().ok()?;
                let index = if as_read {
                    let read = items.iter().enumerate().filter(|(_, item)| !item.hidden);
                    read.map(|(index, _)| index).nth(index)?
                } else {
                    index
                };
                let node = items.get(index)?;
                Some(Self { node, place: node.place, path: format!("{}[{index}]", self.path), rest })
            }
            _ => None,
        }
    }
}

/// A text of a file, for messages: short and on one line.
pub(crate) fn shown(text: &str) -> String {
    let mut short: String = text.chars().take(64).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short.escape_debug().to_string()
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self { place: place(&spanned), value: spanned.value, hidden: false })
    }
}

fn place<T>(spanned: &Spanned<T>) -> Place {
    let location = spanned.defined;
    Place { line: location.line(), column: location.column() }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_none<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(Value::Bool(value))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(Value::Unsigned(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(u64::try_from(value).map_or(Value::Signed(value), Value::Unsigned))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
                Ok(Value::Float(value))
            }

            fn visit_str<E>(self, text: &str) -> Result<Value, E> {
                Ok(Value::Text(text.to_owned()))
            }

            fn visit_string<E>(self, text: String) -> Result<Value, E> {
                Ok(Value::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = list.next_element()? {
                    items.push(item);
                }
                Ok(Value::List(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<Spanned<String>>()? {
                    let place = place(&key);
                    entries.push(Entry { key: key.value, place, node: map.next_value()? });
                }
                Ok(Value::Map(entries))
            }
        }
        deserializer.deserialize_any(Any)
    }
}
