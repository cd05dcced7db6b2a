//! How people name objects: `KIND`, `KIND NAME...`, `KIND/NAME`, and `KIND/NAMESPACE/NAME`, which `-o name` prints.

use anyhow::{Result, bail};
use outrigger_policy::{Key, Kind};

/// What a command is about.
#[derive(Debug, PartialEq)]
pub(super) enum Wanted {
    /// All objects of these kinds.
    Kinds(Vec<Kind>),
    /// These objects.
    Keys(Vec<Key>),
}

/// Reads the words of a command line. No words: all kinds.
pub(super) fn wanted(words: &[String], namespace: &str) -> Result<Wanted> {
    let Some((first, names)) = words.split_first() else { return Ok(Wanted::Kinds(Kind::ALL.to_vec())) };
    if words.iter().any(|word| word.contains('/')) {
        return Ok(Wanted::Keys(words.iter().map(|word| whole(word, namespace)).collect::<Result<_>>()?));
    }
    let kinds = if first == "all" { Kind::ALL.to_vec() } else { kinds(first)? };
    match kinds.as_slice() {
        _ if names.is_empty() => Ok(Wanted::Kinds(kinds)),
        [kind] => Ok(Wanted::Keys(names.iter().map(|name| Key::new(*kind, namespace, name)).collect())),
        _ => bail!("a name needs one kind: write KIND NAME or KIND/NAME"),
    }
}

/// Reads words that must name objects.
pub(super) fn keys(words: &[String], namespace: &str) -> Result<Vec<Key>> {
    match wanted(words, namespace)? {
        Wanted::Keys(keys) => Ok(keys),
        Wanted::Kinds(_) => {
            bail!("name an object: KIND NAME or KIND/NAME (`outrigger policy get` lists them)")
        }
    }
}

/// Reads words that must name one object.
pub(super) fn key(words: &[String], namespace: &str) -> Result<Key> {
    let mut keys = keys(words, namespace)?;
    match (keys.pop(), keys.is_empty()) {
        (Some(key), true) => Ok(key),
        _ => bail!("name one object: KIND NAME or KIND/NAME"),
    }
}

/// The form that names an object from anywhere.
pub(super) fn name(key: &Key) -> String {
    format!("{}/{}/{}", key.kind, key.namespace, key.name)
}

fn kinds(text: &str) -> Result<Vec<Kind>> {
    Ok(text.split(',').map(str::parse).collect::<Result<_, _>>()?)
}

fn whole(word: &str, namespace: &str) -> Result<Key> {
    let parts: Vec<&str> = word.split('/').collect();
    match *parts.as_slice() {
        [kind, name] if !name.is_empty() => Ok(Key::new(kind.parse()?, namespace, name)),
        [kind, namespace, name] if !namespace.is_empty() && !name.is_empty() => {
            Ok(Key::new(kind.parse()?, namespace, name))
        }
        _ => bail!("`{word}` is neither KIND/NAME nor KIND/NAMESPACE/NAME"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &str) -> Result<Wanted> {
        wanted(&words.split_whitespace().map(str::to_owned).collect::<Vec<_>>(), "shop")
    }

    #[test]
    fn objects_are_named_as_in_kubectl() {
        let access = |namespace: &str, name: &str| Key::new(Kind::AccessPolicy, namespace, name);
        let (a, b) = (access("shop", "a"), access("shop", "b"));
        assert_eq!(read("").unwrap(), Wanted::Kinds(Kind::ALL.to_vec()));
        assert_eq!(read("all").unwrap(), Wanted::Kinds(Kind::ALL.to_vec()));
        assert_eq!(read("ap,httproutes").unwrap(), Wanted::Kinds(vec![Kind::AccessPolicy, Kind::HttpRoute]));
        assert_eq!(read("accesspolicy a b").unwrap(), Wanted::Keys(vec![a.clone(), b.clone()]));
        assert_eq!(read("ap/a ap/b").unwrap(), Wanted::Keys(vec![a, b]));
        assert_eq!(read("ap/other/a").unwrap(), Wanted::Keys(vec![access("other", "a")]));
        for bad in ["pod", "ap/", "ap/a/b/c", "/a", "ap,tp a", "ap/a b", "ap//a"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_o_name_prints_names_the_same_object() {
        let key = Key::new(Kind::HttpRoute, "a", "b.c");
        assert_eq!(read(&name(&key)).unwrap(), Wanted::Keys(vec![key]));
    }
}
