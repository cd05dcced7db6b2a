//! The files that Kubernetes mounts and replaces, and what is read of a file that somebody is just writing: the last good
//! one counts.

use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::time::Duration;

use crate::support::{Fake, TOKEN, eventually};
use outrigger_certs::CertificateAuthority;
use outrigger_proxy::{context::Context, run};
use tempfile::TempDir;

/// A volume as the kubelet writes it: the files are links through `..data`, which one rename swings to a new directory.
struct Volume {
    folder: TempDir,
    version: usize,
}

impl Volume {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), version: 0 }
    }

    fn publish(&mut self, token: &str, roots: &str) {
        let at = |name: &str| self.folder.path().join(name);
        self.version += 1;
        let directory = format!("..{}", self.version);
        std::fs::create_dir(at(&directory)).unwrap();
        std::fs::write(at(&directory).join("token"), token).unwrap();
        std::fs::write(at(&directory).join("roots.pem"), roots).unwrap();
        symlink(&directory, at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
        if self.version > 1 {
            std::fs::remove_dir_all(at(&format!("..{}", self.version - 1))).unwrap();
            return;
        }
        for name in ["token", "roots.pem"] {
            symlink(format!("..data/{name}"), at(name)).unwrap();
        }
    }

    fn sidecar(&self, fake: &Fake) -> Arc<Context> {
        let unused = tempfile::tempdir().unwrap();
        let mut config = fake.config(unused.path());
        config.token_file = self.folder.path().join("token");
        config.trust_bundle = self.folder.path().join("roots.pem");
        let (ctx, asks) = Context::from_config(config).unwrap();
        let ctx = Arc::new(ctx);
        run::start(&ctx, asks);
        ctx
    }
}

fn other_roots(fake: &Fake) -> String {
    CertificateAuthority::generate(fake.ca.bundle().trust_domain()).unwrap().roots
}

/// Attempts to get a certificate that failed.
fn failures(ctx: &Context) -> u64 {
    let text = ctx.metrics.encode();
    let line =
        text.lines().find(|line| line.starts_with("outrigger_certificate_signs_total{outcome=\"failed\"}"));
    line.map_or(0, |line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
}

async fn is_ready(ctx: &Context) {
    eventually("a certificate and the mesh", || ctx.ready.missing() == ["listeners"]).await;
}

#[tokio::test]
async fn token_and_roots_that_are_replaced_before_the_controller_comes_are_used() {
    let fake = Fake::new().await;
    fake.start().await;
    let mut volume = Volume::new();
    volume.publish("an old token", &other_roots(&fake));
    let ctx = volume.sidecar(&fake);
    // It has tried, and trusts the wrong root.
    eventually("an attempt", || failures(&ctx) > 1).await;
    assert!(ctx.credentials.leaf().is_none());
    volume.publish("an old token", &fake.ca.bundle().to_pem());
    let tried = failures(&ctx);
    eventually("an attempt with the right root", || failures(&ctx) > tried + 1).await;
    volume.publish(TOKEN, &fake.ca.bundle().to_pem());
    is_ready(&ctx).await;
}

#[tokio::test]
async fn a_file_that_is_half_written_or_gone_changes_nothing() {
    let fake = Fake::new().await;
    let roots = fake.ca.bundle().to_pem();
    let mut volume = Volume::new();
    volume.publish(TOKEN, &roots);
    let ctx = volume.sidecar(&fake);
    let good = ctx.credentials.bundle();
    for (token, bundle) in [
        ("", ""),
        (TOKEN, &roots[..roots.len() / 2]),
        ("\n", "\u{0}\u{0}"),
        (&*"x".repeat(1024 * 1024), "nonsense"),
    ] {
        volume.publish(token, bundle);
        let tried = failures(&ctx);
        eventually("attempts", || failures(&ctx) > tried + 1).await;
        assert!(ctx.credentials.bundle().same_roots(&good));
    }
    std::fs::remove_file(volume.folder.path().join("roots.pem")).unwrap();
    volume.publish(TOKEN, "");
    fake.state().leaf_life = Duration::from_secs(3);
    fake.start().await;
    is_ready(&ctx).await;

    // With a certificate the files may go for good: it renews by the one it has.
    std::fs::remove_dir_all(volume.folder.path()).unwrap();
    eventually("a renewal", || fake.state().signed_by_leaf > 1).await;
}
