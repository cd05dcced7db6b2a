//! Reading pods. Absent and `null` are the same to Kubernetes, and so they are here.

use serde_json::{Map, Value};

/// The field of an object; `null` counts as absent.
pub(crate) fn field<'v>(value: &'v Value, name: &str) -> Option<&'v Value> {
    value.get(name).filter(|found| !found.is_null())
}

/// The value at the end of `path`.
pub(crate) fn at<'v>(value: &'v Value, path: &[&str]) -> Option<&'v Value> {
    path.iter().try_fold(value, |value, name| field(value, name))
}

/// The text at the end of `path`.
pub(crate) fn text<'v>(value: &'v Value, path: &[&str]) -> Option<&'v str> {
    at(value, path)?.as_str()
}

/// The elements of a list; of anything else, none.
pub(crate) fn list<'v>(value: &'v Value, name: &str) -> &'v [Value] {
    value.get(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The name of a container or volume.
pub(crate) fn name(value: &Value) -> &str {
    text(value, &["name"]).unwrap_or_default()
}

/// The object in `name`, made if there is none.
pub(crate) fn object_mut<'v>(
    value: &'v mut Map<String, Value>,
    name: &str,
) -> Option<&'v mut Map<String, Value>> {
    let entry = value.entry(name).or_insert(Value::Null);
    if entry.is_null() {
        *entry = Value::Object(Map::new());
    }
    entry.as_object_mut()
}

/// The list in `name`, made if there is none.
pub(crate) fn list_mut<'v>(value: &'v mut Map<String, Value>, name: &str) -> Option<&'v mut Vec<Value>> {
    let entry = value.entry(name).or_insert(Value::Null);
    if entry.is_null() {
        *entry = Value::Array(Vec::new());
    }
    entry.as_array_mut()
}
