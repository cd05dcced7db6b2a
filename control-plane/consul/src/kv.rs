//! The key-value store, as far as a policy store needs it: read, list, and writes that lose against newer ones.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;

use crate::{Client, Error, Scope, encode::key_path, transport::Answer};

/// A key's value and version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvPair {
    /// The whole key.
    pub key: String,
    /// At most 512 kB by Consul's default.
    pub value: Vec<u8>,
    /// The version, for compare-and-set.
    pub modify_index: u64,
}

impl Client {
    /// One key; `None` where it does not exist.
    pub async fn kv_get(&self, key: &str, scope: &Scope) -> Result<Option<KvPair>, Error> {
        let answer = self.get_any(key_path("/v1/kv/", key)?, self.query(scope)).await?;
        Ok(parse_pairs(answer)?.into_values().next())
    }

    /// All keys that begin with `prefix`.
    pub async fn kv_list(&self, prefix: &str, scope: &Scope) -> Result<BTreeMap<String, KvPair>, Error> {
        let mut query = self.query(scope);
        query.flag("recurse");
        parse_pairs(self.get_any(key_path("/v1/kv/", prefix)?, query).await?)
    }

    /// Writes `key` if its version is still `modify_index` (0: if it does not exist). `false`: it is not.
    pub async fn kv_put_cas(
        &self,
        key: &str,
        value: Vec<u8>,
        modify_index: u64,
        scope: &Scope,
    ) -> Result<bool, Error> {
        let mut query = self.query(scope);
        query.add("cas", &modify_index.to_string());
        self.put(key_path("/v1/kv/", key)?, query, Bytes::from(value)).await?.json()
    }

    /// Deletes `key` if its version is still `modify_index` (not 0). `false`: it is not.
    pub async fn kv_delete_cas(&self, key: &str, modify_index: u64, scope: &Scope) -> Result<bool, Error> {
        let mut query = self.query(scope);
        query.add("cas", &modify_index.to_string());
        self.delete(key_path("/v1/kv/", key)?, query).await?.json()
    }
}

pub(crate) fn parse_pairs(answer: Answer) -> Result<BTreeMap<String, KvPair>, Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Wire {
        key: String,
        #[serde(default)]
        value: Option<String>,
        modify_index: u64,
    }
    // An empty 404 is Consul's "no such key"; with a body it is something else's "no such page".
    if answer.status == 404 && answer.body.is_empty() {
        return Ok(BTreeMap::new());
    }
    let answer = answer.ok()?;
    let pairs: Vec<Wire> = answer.json()?;
    let mut out = BTreeMap::new();
    for Wire { key, value, modify_index } in pairs {
        let value = decode_base64(value.as_deref().unwrap_or_default()).ok_or_else(|| Error::Answer {
            call: answer.call.clone(),
            message: format!("the value of {key} is not base64"),
        })?;
        out.insert(key.clone(), KvPair { key, value, modify_index });
    }
    Ok(out)
}

/// Standard alphabet with padding (RFC 4648, section 4), which is what Go's JSON makes of bytes.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let text = text.as_bytes();
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let padding = text.iter().rev().take_while(|byte| **byte == b'=').count();
    if padding > 2 {
        return None;
    }
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let mut bits: u32 = 0;
    for (index, byte) in text[..text.len() - padding].iter().enumerate() {
        let six = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(six);
        // Four characters are three bytes: one is complete after the second, third and fourth.
        let extra = 6 * (index % 4 + 1) % 8;
        if index % 4 != 0 {
            out.push((bits >> extra).to_le_bytes()[0]);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::decode_base64;

    #[test]
    fn base64_of_rfc_4648() {
        for (text, want) in [
            ("", &b""[..]),
            ("Zg==", b"f"),
            ("Zm8=", b"fo"),
            ("Zm9v", b"foo"),
            ("Zm9vYg==", b"foob"),
            ("Zm9vYmE=", b"fooba"),
            ("Zm9vYmFy", b"foobar"),
            ("+/+/", &[0xfb, 0xff, 0xbf]),
        ] {
            assert_eq!(decode_base64(text).unwrap(), want, "{text}");
        }
        for text in ["Z", "Zg=", "Zg===", "====", "Z=g=", "Zm9v\n"] {
            assert!(decode_base64(text).is_none(), "{text}");
        }
    }
}
