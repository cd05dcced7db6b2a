//! What a watch has told of the objects of one kind.

use std::collections::BTreeMap;

use kube::ResourceExt;
use kube::runtime::watcher::Event;

/// Objects by namespace and name; for a namespace both are its name. While a list is read again the last one stands.
pub(super) struct Known<V> {
    pub(super) objects: BTreeMap<(String, String), V>,
    listing: BTreeMap<(String, String), V>,
    /// Everything was read once.
    pub(super) is_synced: bool,
}

impl<V> Default for Known<V> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), listing: BTreeMap::new(), is_synced: false }
    }
}

impl<V> Known<V> {
    /// Takes an event; an object of which `value` makes nothing is not there.
    pub(super) fn see<K: ResourceExt>(
        &mut self,
        event: Event<K>,
        value: impl Fn(&K) -> Option<V>,
    ) -> Changed {
        let key = |object: &K| (object.namespace().unwrap_or_else(|| object.name_any()), object.name_any());
        match event {
            Event::Init => self.listing.clear(),
            Event::InitApply(object) => {
                if let Some(value) = value(&object) {
                    self.listing.insert(key(&object), value);
                }
            }
            Event::InitDone => {
                self.objects = std::mem::take(&mut self.listing);
                self.is_synced = true;
                return Changed::All;
            }
            Event::Apply(object) => {
                let key = key(&object);
                let namespace = key.0.clone();
                match value(&object) {
                    Some(value) => _ = self.objects.insert(key, value),
                    None => _ = self.objects.remove(&key),
                }
                return Changed::One(namespace);
            }
            Event::Delete(object) => {
                let key = key(&object);
                self.objects.remove(&key);
                return Changed::One(key.0);
            }
        }
        Changed::Nothing
    }

    /// Those of a namespace.
    pub(super) fn of(&self, namespace: &str) -> impl Iterator<Item = &V> {
        let from = (namespace.to_owned(), String::new());
        self.objects.range(from..).take_while(move |((of, _), _)| of == namespace).map(|(_, value)| value)
    }
}

/// What an event was about.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Changed {
    Nothing,
    One(String),
    All,
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    use super::*;

    #[test]
    fn what_went_while_nobody_watched_is_forgotten_with_the_next_list() {
        let pod = |name: &str| -> Pod {
            serde_json::from_value(json!({ "metadata": { "namespace": "shop", "name": name } })).unwrap()
        };
        let mut known = Known::default();
        let mut see = |event| known.see(event, |_: &Pod| Some(()));
        for event in [Event::Init, Event::InitApply(pod("a")), Event::InitApply(pod("b")), Event::InitDone] {
            see(event);
        }
        for event in [Event::Init, Event::InitApply(pod("b"))] {
            assert_eq!(see(event), Changed::Nothing);
        }
        assert_eq!(see(Event::InitDone), Changed::All);
        assert_eq!(known.objects.keys().map(|(_, name)| &**name).collect::<Vec<_>>(), ["b"]);
    }
}
