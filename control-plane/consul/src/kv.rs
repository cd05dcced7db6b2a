//! The key-value store, as far as a policy store needs it: read, list, and writes that lose against newer ones.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    Client, Error, Scope,
    encode::check_key,
    encode::key_path,
    transport::{Answer, shown},
};

/// Operations of one transaction: Consul's own limit (64 before Consul 1.13).
pub const MAX_TRANSACTION: usize = 128;
/// Bytes of a transaction's request: Consul's default `limits.txn_max_req_len`.
pub const MAX_TRANSACTION_BYTES: usize = 512 * 1024;

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

/// One step of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvOperation {
    /// Writes a key whatever its version.
    Set {
        /// The whole key.
        key: String,
        /// What it shall hold.
        value: Vec<u8>,
    },
    /// Writes a key if its version is still this one (0: if it does not exist).
    Cas {
        /// The whole key.
        key: String,
        /// What it shall hold.
        value: Vec<u8>,
        /// The version that was read.
        modify_index: u64,
    },
    /// Deletes a key if its version is still this one.
    DeleteCas {
        /// The whole key.
        key: String,
        /// The version that was read.
        modify_index: u64,
    },
    /// Deletes a key whatever its version, also one that does not exist.
    Delete {
        /// The whole key.
        key: String,
    },
}

/// What became of a transaction that Consul has judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvOutcome {
    /// All of it happened. The index is the new version of every key that was written (0 where none was).
    Committed(u64),
    /// None of it happened: a key has another version by now.
    Conflict,
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

    /// The names of all keys that begin with `prefix`, in order.
    pub async fn kv_keys(&self, prefix: &str, scope: &Scope) -> Result<Vec<String>, Error> {
        let mut query = self.query(scope);
        query.flag("keys");
        let answer = self.get_any(key_path("/v1/kv/", prefix)?, query).await?;
        if answer.status == 404 && answer.body.is_empty() {
            return Ok(Vec::new());
        }
        answer.ok()?.json()
    }

    /// All of `operations`, at most [`MAX_TRANSACTION`], or none of them.
    pub async fn kv_txn(&self, operations: &[KvOperation], scope: &Scope) -> Result<KvOutcome, Error> {
        let wire = operations.iter().map(WireOperation::of).collect::<Result<Vec<_>, _>>()?;
        let body = serde_json::to_vec(&wire)
            .map_err(|error| Error::Config(format!("a transaction of {} keys: {error}", wire.len())))?;
        let answer = self.put_any("/v1/txn".into(), self.query(scope), body.into()).await?;
        read_outcome(answer)
    }
}

#[derive(Serialize)]
struct WireOperation<'a> {
    #[serde(rename = "KV")]
    kv: WireKv<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct WireKv<'a> {
    verb: &'static str,
    key: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u64>,
}

impl<'a> WireOperation<'a> {
    fn of(operation: &'a KvOperation) -> Result<Self, Error> {
        let (verb, key, value, index) = match operation {
            KvOperation::Set { key, value } => ("set", key, Some(value), None),
            KvOperation::Cas { key, value, modify_index } => ("cas", key, Some(value), Some(*modify_index)),
            KvOperation::DeleteCas { key, modify_index } => ("delete-cas", key, None, Some(*modify_index)),
            KvOperation::Delete { key } => ("delete", key, None, None),
        };
        check_key(key)?;
        Ok(Self { kv: WireKv { verb, key, value: value.map(|value| encode_base64(value)), index } })
    }
}

/// A transaction that was rolled back is a 409 for whatever reason; only a version that moved is a conflict.
fn read_outcome(answer: Answer) -> Result<KvOutcome, Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Wire {
        #[serde(default)]
        results: Option<Vec<WireResult>>,
        #[serde(default)]
        errors: Option<Vec<WireError>>,
    }
    #[derive(Deserialize)]
    struct WireResult {
        #[serde(rename = "KV", default)]
        kv: Option<WireWritten>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct WireWritten {
        modify_index: u64,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct WireError {
        #[serde(default)]
        what: String,
    }
    if answer.status == 409 {
        let errors = answer.json::<Wire>().ok().and_then(|wire| wire.errors).unwrap_or_default();
        if !errors.is_empty() && errors.iter().all(|error| error.what.contains("index is stale")) {
            return Ok(KvOutcome::Conflict);
        }
        if let Some(WireError { what }) =
            errors.into_iter().find(|error| !error.what.contains("index is stale"))
        {
            return Err(Error::Status {
                call: answer.call,
                status: answer.status,
                message: shown(what.as_bytes()),
            });
        }
    }
    let answer = answer.ok()?;
    let results = answer.json::<Wire>()?.results.unwrap_or_default();
    let written = results.into_iter().filter_map(|result| result.kv).map(|kv| kv.modify_index).max();
    Ok(KvOutcome::Committed(written.unwrap_or(0)))
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
pub(crate) fn decode_base64(text: &str) -> Option<Vec<u8>> {
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

/// The inverse of [`decode_base64`].
pub(crate) fn encode_base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits = (0..3).fold(0_u32, |bits, at| bits << 8 | u32::from(chunk.get(at).copied().unwrap_or(0)));
        for at in 0..4 {
            let six = (bits >> (18 - 6 * at) & 63) as usize;
            out.push(if at <= chunk.len() { char::from(ALPHABET[six]) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{decode_base64, encode_base64};

    proptest! {
        #[test]
        fn base64_comes_back(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert_eq!(decode_base64(&encode_base64(&bytes)), Some(bytes));
        }
    }

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
            assert_eq!(encode_base64(want), text);
        }
        for text in ["Z", "Zg=", "Zg===", "====", "Z=g=", "Zm9v\n"] {
            assert!(decode_base64(text).is_none(), "{text}");
        }
    }
}
