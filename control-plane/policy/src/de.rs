//! Reads types from a [`Node`]. An error knows its path and place, and says what to write instead.

use std::fmt::{self, Display};

use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeSeed, Expected, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor,
};
use serde::{Deserializer, forward_to_deserialize_any};

use crate::tree::{Entry, Node, Place, Step, Value, shown};

/// Why a node is not what it should be.
#[derive(Debug)]
pub(crate) struct Error {
    /// From the value itself outwards.
    steps: Vec<Step>,
    place: Option<Place>,
    pub(crate) message: String,
    /// A field is not there: not the fault of the value that is.
    pub(crate) missing: bool,
}

impl Error {
    fn new(message: String) -> Self {
        Self { steps: Vec::new(), place: None, message, missing: false }
    }

    /// Of a part of a value: adds the way to it.
    fn within(mut self, step: Step, place: Place) -> Self {
        self.steps.push(step);
        self.place = self.place.or(Some(place));
        self
    }

    /// From the document to the value.
    pub(crate) fn path(&self) -> Vec<Step> {
        self.steps.iter().rev().cloned().collect()
    }

    /// Where it is; the document's own place where nothing nearer is known.
    pub(crate) fn place(&self, document: &Node) -> Place {
        self.place.unwrap_or(document.place)
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: Display>(message: T) -> Self {
        Self::new(message.to_string())
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(format!("expected {expected}, found {}", unexpected_text(unexpected)))
    }

    fn invalid_value(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(format!("{} is not {expected}", unexpected_text(unexpected)))
    }

    fn unknown_field(field: &str, known: &'static [&'static str]) -> Self {
        let nearest =
            nearest(field, known).map(|name| format!("did you mean `{name}`? ")).unwrap_or_default();
        Self::new(format!("is not known here: {nearest}there are {}", list(known)))
    }

    fn unknown_variant(variant: &str, known: &'static [&'static str]) -> Self {
        let nearest =
            nearest(variant, known).map(|name| format!("did you mean `{name}`? ")).unwrap_or_default();
        Self::new(format!("`{}` is not known here: {nearest}there are {}", shown(variant), list(known)))
    }

    fn missing_field(field: &'static str) -> Self {
        let mut error = Self::new("is missing".to_owned());
        error.steps.push(Step::Field(field.to_owned()));
        error.missing = true;
        error
    }
}

fn unexpected_text(unexpected: Unexpected<'_>) -> String {
    match unexpected {
        Unexpected::Bool(value) => format!("`{value}`"),
        Unexpected::Unsigned(value) => format!("the number {value}"),
        Unexpected::Signed(value) => format!("the number {value}"),
        Unexpected::Float(value) => format!("the number {value}"),
        Unexpected::Str(text) => format!("the text `{}`", shown(text)),
        Unexpected::Unit | Unexpected::Option => "nothing".to_owned(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a mapping".to_owned(),
        other => other.to_string(),
    }
}

fn list(known: &[&str]) -> String {
    let quoted: Vec<String> = known.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}

/// What was meant: the same but for case and punctuation, or within two changes.
pub(crate) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let plain = |text: &str| -> String {
        text.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
    };
    if word.len() > 64 {
        return None;
    }
    let wanted = plain(word);
    let distance = |name: &str| distance(wanted.as_bytes(), plain(name).as_bytes());
    let allowed = if wanted.len() > 4 { 2 } else { 1 };
    known
        .iter()
        .map(|name| (distance(name), *name))
        .filter(|(d, _)| *d <= allowed)
        .min()
        .map(|(_, name)| name)
}

/// Levenshtein's.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut before = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = before + usize::from(x != y);
            before = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(before + 1);
        }
    }
    row[b.len()]
}

impl Node {
    fn expected(&self, what: &str) -> Error {
        Error::new(format!("expected {what}, found {}", self.what()))
    }

    fn text_or(&self, what: &str) -> Result<&str, Error> {
        match &self.value {
            Value::Text(text) => Ok(text),
            _ => Err(self.expected(what)),
        }
    }

    fn unsigned(&self, max: u64) -> Result<u64, Error> {
        match self.value {
            Value::Unsigned(value) if value <= max => Ok(value),
            _ => Err(self.expected(&format!("a whole number from 0 to {max}"))),
        }
    }
}

macro_rules! unsigned {
    ($($method:ident $type:ty)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.visit_u64(self.unsigned(<$type>::MAX.into())?)
        }
    )*};
}

impl<'de> Deserializer<'de> for &'de Node {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Unsigned(value) => visitor.visit_u64(*value),
            Value::Signed(value) => visitor.visit_i64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(text) => visitor.visit_borrowed_str(text),
            Value::List(_) => self.deserialize_seq(visitor),
            Value::Map(_) => self.deserialize_map(visitor),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::Bool(value) => visitor.visit_bool(value),
            _ => Err(self.expected("true or false")),
        }
    }

    unsigned! {deserialize_u8 u8 deserialize_u16 u16 deserialize_u32 u32 deserialize_u64 u64}

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::Unsigned(value) => visitor.visit_u64(value),
            Value::Signed(value) => visitor.visit_i64(value),
            _ => Err(self.expected("a whole number")),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        /// What the visitor calls what it takes.
        struct Expecting<'a>(&'a dyn Expected);
        impl Display for Expecting<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        let what = Expecting(&visitor).to_string();
        visitor.visit_borrowed_str(self.text_or(&what)?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match &self.value {
            Value::Bool(_) | Value::Unsigned(_) | Value::Signed(_) | Value::Float(_) => {
                Err(Error::new(format!("expected a text, found {}: put it in quotes", self.what())))
            }
            _ => visitor.visit_borrowed_str(self.text_or("a text")?),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let Value::List(items) = &self.value else { return Err(self.expected("a list")) };
        visitor.visit_seq(Items { items, next: 0 })
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let Value::Map(entries) = &self.value else { return Err(self.expected("a mapping")) };
        visitor.visit_map(Entries { entries, current: None })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let text = self.text_or(&format!("one of {}", list(known)))?;
        let variant: StrDeserializer<'_, Error> = text.into_deserializer();
        visitor.visit_enum(variant)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i128 u128 f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct identifier
    }
}

struct Items<'de> {
    items: &'de [Node],
    next: usize,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        while let Some(item) = self.items.get(self.next) {
            let index = self.next;
            self.next += 1;
            if !item.hidden {
                return seed
                    .deserialize(item)
                    .map(Some)
                    .map_err(|error| error.within(Step::Item(index), item.place));
            }
        }
        Ok(None)
    }
}

struct Entries<'de> {
    entries: &'de [Entry],
    current: Option<&'de Entry>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        while let Some((entry, rest)) = self.entries.split_first() {
            self.entries = rest;
            if !entry.node.hidden {
                self.current = Some(entry);
                let key: StrDeserializer<'_, Error> = entry.key.as_str().into_deserializer();
                let within = |error: Error| error.within(Step::Field(entry.key.clone()), entry.place);
                return seed.deserialize(key).map(Some).map_err(within);
            }
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        // serde asks for a value after a key only.
        let entry = self.current.take().ok_or_else(|| Error::new("has no value".to_owned()))?;
        seed.deserialize(&entry.node)
            .map_err(|error| error.within(Step::Field(entry.key.clone()), entry.place))
    }
}
