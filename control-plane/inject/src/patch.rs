//! What is different between two JSON values, as a JSON Patch (RFC 6902).
//!
//! For lists the difference is one run of removed and added elements between what both begin and end with: that is
//! what injection does to one. A general diff compares lists place by place, and so would rewrite every application's
//! init container when two of ours are put before it.

use serde_json::{Value, json};

/// The operations that make `to` of `from`; none where they are equal.
pub fn between(from: &Value, to: &Value) -> Vec<Value> {
    let mut operations = Vec::new();
    compare(from, to, &mut String::new(), &mut operations);
    operations
}

fn compare(from: &Value, to: &Value, path: &mut String, operations: &mut Vec<Value>) {
    match (from, to) {
        _ if from == to => {}
        (Value::Object(old), Value::Object(new)) => {
            for name in old.keys().filter(|name| !new.contains_key(*name)) {
                operations.push(json!({ "op": "remove", "path": format!("{path}/{}", escaped(name)) }));
            }
            for (name, value) in new {
                let length = path.len();
                path.push('/');
                path.push_str(&escaped(name));
                match old.get(name) {
                    Some(before) => compare(before, value, path, operations),
                    None => operations.push(json!({ "op": "add", "path": path, "value": value })),
                }
                path.truncate(length);
            }
        }
        (Value::Array(old), Value::Array(new)) => {
            let same = |(one, other): &(&Value, &Value)| one == other;
            let start = old.iter().zip(new).take_while(same).count();
            let end = old[start..].iter().rev().zip(new[start..].iter().rev()).take_while(same).count();
            // From the last: each removal leaves the places before it as they are.
            for index in (start..old.len() - end).rev() {
                operations.push(json!({ "op": "remove", "path": format!("{path}/{index}") }));
            }
            for (index, value) in new.iter().enumerate().take(new.len() - end).skip(start) {
                operations.push(json!({ "op": "add", "path": format!("{path}/{index}"), "value": value }));
            }
        }
        _ => operations.push(json!({ "op": "replace", "path": path, "value": to })),
    }
}

/// A name in a JSON pointer (RFC 6901).
fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}
