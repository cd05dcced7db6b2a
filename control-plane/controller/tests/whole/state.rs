//! The data directory: who may read it, and what happens when a part of it is lost.

use std::os::unix::fs::PermissionsExt;

use outrigger_controller::controller::Controller;

use crate::harness::{Bench, soon};

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_ca_is_not_silently_replaced() {
    let mut bench = Bench::start().await;
    let data = bench.config.data_dir.clone();
    let (ca, kept, root) =
        (data.join("ca"), data.join("kept"), std::fs::read(data.join("root.pem")).unwrap());
    bench.down().await;
    std::fs::rename(&ca, &kept).unwrap();
    refused(&bench, "is missing").await;
    assert!(!ca.exists(), "no other CA was made");

    let mut other = Bench::start().await;
    other.down().await;
    std::fs::create_dir(&ca).unwrap();
    std::fs::copy(other.config.data_dir.join("ca/ca.pem"), ca.join("ca.pem")).unwrap();
    refused(&bench, "has another root").await;
    assert_eq!(std::fs::read(data.join("root.pem")).unwrap(), root);

    std::fs::remove_dir_all(&ca).unwrap();
    std::fs::rename(&kept, &ca).unwrap();
    bench.up().await;
    bench.down().await;
    assert_eq!(std::fs::read(data.join("root.pem")).unwrap(), root);

    // The way to a new mesh is the one that the message names.
    std::fs::remove_dir_all(&ca).unwrap();
    std::fs::remove_file(data.join("controller.redb")).unwrap();
    bench.up().await;
    assert_ne!(std::fs::read(data.join("root.pem")).unwrap(), root);
}

async fn refused(bench: &Bench, why: &str) {
    let error = soon("refusing", Controller::start(&bench.config)).await.unwrap_err().to_string();
    assert!(error.contains(why) && error.contains("move controller.redb away"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_data_directory_is_its_owners() {
    let bench = Bench::start().await;
    let mode = |path: &str| {
        let metadata = std::fs::metadata(bench.config.data_dir.join(path)).unwrap();
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode(""), 0o700);
    for file in ["controller.redb", "admin-token", "ca/ca.pem"] {
        assert_eq!(mode(file), 0o600, "{file}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_of_the_store_shows() {
    let bench = Bench::start().await;
    let (_, sources) = bench.api("GET", "/api/v1/sources", None).await;
    assert_eq!(sources["store"]["writable"], true, "{sources}");
    let metrics = bench.monitoring("/metrics").await;
    assert!(metrics.contains("outrigger_store_writable 1"), "{metrics}");
}
