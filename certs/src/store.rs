//! The CA's own file: the one place of the mesh where a private key is on a disk.
//!
//! One file holds root and issuing certificate with their keys, so that it is there wholly or not at all: it is
//! written under another name, synced, and then linked to its own, which fails if it exists. A second controller that
//! starts in the same moment reads the winner's. Nothing here replaces or repairs a file: a broken store is an error
//! for a person, since a new root in its place would cut off every workload at once.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::pem_text::MAX_PEM_BYTES;

const FILE: &str = "ca.pem";

/// The store could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the CA's store {path}: {source}")]
pub(crate) struct StoreError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The text of the store in `dir`; where there is none yet, it is written with the text that `make` returns.
pub(crate) fn read_or_create<E: From<StoreError>>(
    dir: &Path,
    make: impl FnOnce() -> Result<Zeroizing<String>, E>,
) -> Result<Zeroizing<String>, E> {
    let path = dir.join(FILE);
    let failed = |action| {
        let path = path.clone();
        move |source| StoreError { action, path, source }
    };
    if let Some(text) = read(&path).map_err(failed("read"))? {
        return Ok(text);
    }
    let text = make()?;
    create(dir, &path, &text).map_err(failed("create"))?;
    // What counts is the file: another controller may have been first.
    let text = read(&path).map_err(failed("read"))?;
    text.ok_or_else(|| failed("read")(io::Error::from(io::ErrorKind::NotFound)).into())
}

/// The text of the store in `dir`, if there is one.
pub(crate) fn read_existing(dir: &Path) -> Result<Option<Zeroizing<String>>, StoreError> {
    let path = dir.join(FILE);
    read(&path).map_err(|source| StoreError { action: "read", path, source })
}

fn read(path: &Path) -> io::Result<Option<Zeroizing<String>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let metadata = file.metadata()?;
    if metadata.permissions().mode() & 0o077 != 0 {
        let why =
            "others than its owner may read it; run `chmod 600` on it, and replace the CA if anybody did";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    // Reserved in full: a growing string would leave copies of the key behind.
    let mut text = Zeroizing::new(String::with_capacity(MAX_PEM_BYTES + 1));
    file.take(MAX_PEM_BYTES as u64 + 1).read_to_string(&mut text)?;
    if text.len() > MAX_PEM_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is larger than 256 KiB"));
    }
    Ok(Some(text))
}

fn create(dir: &Path, path: &Path, text: &str) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // A name of its own for each writer: a left-over of a crash is never taken for a store, nor in the way.
    let temporary = dir.join(format!(".{FILE}.{}.{:016x}", std::process::id(), fastrand::u64(..)));
    let written = write(&temporary, text).and_then(|()| fs::hard_link(&temporary, path));
    let removed = fs::remove_file(&temporary);
    match written {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    removed?;
    File::open(dir)?.sync_all()
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}
