//! Container images without a container builder: programs of this machine and what they are linked to, in one layer.
//!
//! The result is what `docker save` writes: a tar with a layer, a configuration and `manifest.json`, which
//! [`Node::import`](super::node::Node::import) takes, as it takes an archive of `buildah push`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use serde_json::json;
use tempfile::TempDir;

/// An image in the making.
#[derive(Debug)]
pub struct Image {
    name: String,
    root: TempDir,
    entrypoint: Vec<String>,
    user: String,
}

impl Image {
    /// An empty image. Its name has a registry and a tag (`e2e.outrigger.dev/app:1`), else it is looked for elsewhere. Its program
    /// runs as nobody unless a pod says otherwise.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let root = TempDir::new().context("making a folder for an image")?;
        let image =
            Self { name: name.to_owned(), root, entrypoint: Vec::new(), user: "65532:65532".to_owned() };
        let tmp = image.path("/tmp")?;
        fs::create_dir(&tmp).context("making /tmp")?;
        fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777)).context("opening /tmp to all")?;
        Ok(image)
    }

    /// Its name, as pods say it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a program at `to`, and the shared libraries that it names.
    pub fn program(self, from: &Path, to: &str) -> anyhow::Result<Self> {
        self.copy(from, to)?;
        let listed = Command::new("ldd").arg(from).output().context("running ldd")?;
        // A static program has none, which ldd counts as a failure.
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        for library in
            listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        {
            self.copy(Path::new(library), library)?;
        }
        Ok(self)
    }

    /// Adds a file.
    pub fn file(self, to: &str, content: &str) -> anyhow::Result<Self> {
        let path = self.path(to)?;
        fs::write(&path, content).with_context(|| format!("writing {to}"))?;
        Ok(self)
    }

    /// What it runs.
    #[must_use]
    pub fn entrypoint<'a>(mut self, words: impl IntoIterator<Item = &'a str>) -> Self {
        self.entrypoint = words.into_iter().map(str::to_owned).collect();
        self
    }

    /// As whom: `uid:gid`.
    #[must_use]
    pub fn user(mut self, user: &str) -> Self {
        user.clone_into(&mut self.user);
        self
    }

    /// Writes the archive into `folder`.
    pub fn save(&self, folder: &Path) -> anyhow::Result<PathBuf> {
        let parts = TempDir::new().context("making a folder for an image's parts")?;
        let layer = parts.path().join("layer.tar");
        tar(&layer, self.root.path(), &["."])?;
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {
                "User": self.user,
                "Env": ["PATH=/bin"],
                "Entrypoint": self.entrypoint,
                "WorkingDir": "/",
            },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", sha256(&layer)?)] },
        });
        let config_file = parts.path().join("config.json");
        fs::write(&config_file, config.to_string()).context("writing an image's configuration")?;
        let manifest = json!([{ "Config": "config.json", "RepoTags": [self.name], "Layers": ["layer.tar"] }]);
        fs::write(parts.path().join("manifest.json"), manifest.to_string())
            .context("writing an image's manifest")?;
        let archive = folder.join(format!("{}.tar", self.name.replace(['/', ':'], "-")));
        tar(&archive, parts.path(), &["manifest.json", "config.json", "layer.tar"])?;
        Ok(archive)
    }

    fn copy(&self, from: &Path, to: &str) -> anyhow::Result<()> {
        let path = self.path(to)?;
        fs::copy(from, &path).with_context(|| format!("copying {} into an image", from.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("making {to} executable"))
    }

    /// Where a path of the image lies here; its folder exists then.
    fn path(&self, inside: &str) -> anyhow::Result<PathBuf> {
        let relative = inside.strip_prefix('/').with_context(|| format!("{inside} is no absolute path"))?;
        let path = self.root.path().join(relative);
        let folder = path.parent().with_context(|| format!("{inside} is in no folder"))?;
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        Ok(path)
    }
}

/// Whose the files are here says nothing of whose they are in a container.
fn tar(archive: &Path, folder: &Path, what: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("tar");
    command.args(["--create", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0"]);
    command.arg("--file").arg(archive).arg("--directory").arg(folder).args(what);
    let status = command.status().context("running tar")?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

fn sha256(file: &Path) -> anyhow::Result<String> {
    let output = Command::new("sha256sum").arg(file).output().context("running sha256sum")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let sum = text.split_whitespace().next().filter(|sum| sum.len() == 64);
    sum.map(str::to_owned).with_context(|| format!("sha256sum of {} says {text:?}", file.display()))
}
