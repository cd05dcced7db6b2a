//! The node's network configuration: which file counts, and our entry in it.

use std::{
    fs,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::{PLUGIN, POD_ANNOTATIONS};

/// Bytes of a configuration file.
const MAX_FILE: u64 = 1024 * 1024;

/// The file that the runtime takes: the first by name of those that can be one.
///
/// # Errors
/// If there is none yet, or it describes a single plugin, after which none can be chained.
pub(super) fn in_use(folder: &Path) -> anyhow::Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let candidate = |path: &PathBuf| {
        path.extension().is_some_and(|end| end == "conflist" || end == "conf" || end == "json")
    };
    let mut files: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(candidate).collect();
    files.sort();
    let Some(first) = files.into_iter().next() else {
        bail!(
            "there is no network configuration in {} yet: the cluster's own CNI plugin makes it",
            folder.display()
        )
    };
    if first.extension().is_none_or(|end| end != "conflist") {
        bail!(
            "{} describes one plugin alone, after which none can be chained; make it a list of plugins (.conflist)",
            first.display()
        )
    }
    Ok(first)
}

/// Puts our entry last into the file, or takes it out. `false`: it is as it shall be already. What else is in the file
/// stays, and a reader sees the old file or the new one.
pub(super) fn set(file: &Path, present: bool) -> anyhow::Result<bool> {
    let (shown, text) = (file.display(), read(file)?);
    let Some(changed) = changed(&text, present).with_context(|| format!("cannot change {shown}"))? else {
        return Ok(false);
    };
    replace(file, changed.as_bytes(), fs::metadata(file)?.permissions().mode())
        .with_context(|| format!("cannot write {shown}"))?;
    Ok(true)
}

/// The plugins of a list, but ours.
pub(super) fn others(file: &Path) -> anyhow::Result<Vec<String>> {
    let list: Value =
        serde_json::from_str(&read(file)?).with_context(|| format!("{} is not JSON", file.display()))?;
    let plugins = list["plugins"].as_array().into_iter().flatten();
    let types = plugins.filter_map(|plugin| plugin["type"].as_str());
    Ok(types.filter(|kind| *kind != PLUGIN).map(str::to_owned).collect())
}

fn read(file: &Path) -> anyhow::Result<String> {
    let shown = file.display();
    let size = fs::metadata(file).with_context(|| format!("cannot read {shown}"))?.len();
    if size > MAX_FILE {
        bail!("{shown} has {size} bytes: it is no network configuration");
    }
    fs::read_to_string(file).with_context(|| format!("cannot read {shown}"))
}

/// Writes a file beside its place and moves it there.
pub(super) fn replace(file: &Path, mut bytes: impl Read, mode: u32) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    // No name that a runtime would take for a configuration or a plugin.
    let temporary = folder.join(format!(".{name}.outrigger-new"));
    let mut write = || {
        let mut new = fs::File::create(&temporary)?;
        new.set_permissions(fs::Permissions::from_mode(mode))?;
        std::io::copy(&mut bytes, &mut new)?;
        new.sync_all()?;
        fs::rename(&temporary, file)
    };
    let written = write();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// The text with our entry last, once, or without. `None`: it says so already.
fn changed(text: &str, present: bool) -> anyhow::Result<Option<String>> {
    let mut list: Value = serde_json::from_str(text).context("it is not JSON")?;
    let plugins =
        list.get_mut("plugins").and_then(Value::as_array_mut).context("it has no list `plugins`")?;
    let before = plugins.clone();
    plugins.retain(|plugin| plugin["type"] != PLUGIN);
    if present {
        if plugins.is_empty() {
            bail!("its list `plugins` is empty: there is no network to add redirection to");
        }
        plugins.push(entry());
    }
    let same = *plugins == before;
    Ok((!same).then(|| format!("{list:#}\n")))
}

fn entry() -> Value {
    json!({ "type": PLUGIN, "capabilities": { POD_ANNOTATIONS: true } })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BRIDGE: &str = r#"{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"bridge","ipam":{"type":"host-local"}},{"type":"portmap"}]}"#;

    #[test]
    fn it_is_added_last_and_once() {
        let with = changed(BRIDGE, true).unwrap().unwrap();
        let list: Value = serde_json::from_str(&with).unwrap();
        assert_eq!(list["plugins"][2], entry());
        assert_eq!(list["plugins"].as_array().unwrap().len(), 3);
        assert_eq!(changed(&with, true).unwrap(), None);
        // Somebody else has appended himself after us.
        let mut list = list;
        list["plugins"].as_array_mut().unwrap().push(json!({ "type": "tuning" }));
        let again: Value = serde_json::from_str(&changed(&list.to_string(), true).unwrap().unwrap()).unwrap();
        assert_eq!(again["plugins"][2]["type"], "tuning");
        assert_eq!(again["plugins"][3], entry());
    }

    #[test]
    fn what_is_no_list_is_left_alone_and_said() {
        for (text, why) in [
            ("{", "not JSON"),
            ("[]", "no list"),
            (r#"{"type":"bridge"}"#, "no list"),
            (r#"{"plugins":[]}"#, "is empty"),
        ] {
            let error = format!("{:#}", changed(text, true).unwrap_err());
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn the_first_list_by_name_counts() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        assert!(in_use(folder.path()).unwrap_err().to_string().contains("no network configuration"));
        write("README", "");
        write("20-late.conflist", BRIDGE);
        write("10-pods.conflist", BRIDGE);
        let file = in_use(folder.path()).unwrap();
        assert_eq!(file.file_name().unwrap(), "10-pods.conflist");
        assert!(set(&file, true).unwrap() && !set(&file, true).unwrap());
        assert_eq!(in_use(folder.path()).unwrap(), file, "what was written aside is no configuration");
        assert!(set(&file, false).unwrap() && !set(&file, false).unwrap());
        let restored: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(restored, serde_json::from_str::<Value>(BRIDGE).unwrap());
        write("00-single.conf", r#"{"type":"bridge"}"#);
        assert!(in_use(folder.path()).unwrap_err().to_string().contains("one plugin alone"));
    }

    fn plugin() -> impl Strategy<Value = Value> {
        ("[a-z]{1,8}", any::<u32>()).prop_map(|(kind, number)| json!({ "type": kind, "number": number }))
    }

    proptest! {
        #[test]
        fn removal_gives_back_what_was(plugins in prop::collection::vec(plugin(), 1..6), extra in "[a-z]{0,8}") {
            let list = json!({ "cniVersion": "1.0.0", "name": extra, "plugins": plugins, "disableCheck": true });
            let with = changed(&list.to_string(), true).unwrap().unwrap();
            let without: Value = serde_json::from_str(&changed(&with, false).unwrap().unwrap()).unwrap();
            prop_assert_eq!(without, list);
        }
    }
}
