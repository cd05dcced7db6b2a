//! Files that others replace while we run: the token, the roots.
//!
//! Kubernetes swings a symbolic link (`..data`) to a new directory, others write in place. So a file is opened once and read
//! from there to its end: what comes of it is one version, or of a file that is just being written a part of one. Whoever
//! reads judges that as it would any nonsense, keeps what it has, and reads again when it needs to.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The whole file, if it has at most `most` bytes.
pub(crate) fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("larger than {} KiB", most / 1024)));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_file_without_an_end_is_refused() {
        assert_eq!(read(Path::new("/dev/zero"), 1024).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(read(Path::new("/dev/null"), 0).unwrap().is_empty());
    }

    /// As the kubelet writes a volume: a new directory, and one rename of the link that leads to it.
    #[test]
    fn while_a_volume_is_replaced_one_whole_version_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let publish = |version: usize| {
            let directory = format!("..{version}");
            std::fs::create_dir(folder.path().join(&directory)).unwrap();
            let text = version.to_string().repeat(20_000);
            std::fs::write(folder.path().join(&directory).join("token"), text).unwrap();
            symlink(&directory, folder.path().join("..data_tmp")).unwrap();
            std::fs::rename(folder.path().join("..data_tmp"), folder.path().join("..data")).unwrap();
        };
        publish(0);
        symlink("..data/token", folder.path().join("token")).unwrap();
        let (path, done) = (folder.path().join("token"), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut seen = std::collections::BTreeSet::new();
                while !done.load(Ordering::Relaxed) {
                    let bytes = read(&path, 1024 * 1024).unwrap();
                    assert_eq!(bytes.len(), 20_000);
                    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "two versions in one");
                    seen.insert(bytes[0]);
                }
                seen.len()
            });
            // Old directories stay here: the kubelet removes them after the swing, and an open file outlives that.
            for version in 1..10 {
                publish(version);
                std::thread::yield_now();
            }
            done.store(true, Ordering::Relaxed);
            assert!(reader.join().unwrap() >= 1);
        });
    }
}
