//! The generated code is checked in, so that nobody needs a protobuf compiler to build. This test regenerates it and
//! compares; `OUTRIGGER_REGENERATE=1 cargo test -p outrigger-api` writes it anew.

use std::{fs, path::Path};

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fresh = tempfile::tempdir().unwrap();
    let protos = [
        "envoy/service/discovery/v3/discovery.proto",
        "outrigger/v1/resources.proto",
        "outrigger/v1/services.proto",
    ];
    let descriptors = protox::compile(protos, [root.join("proto")]).unwrap();
    tonic_prost_build::configure().out_dir(fresh.path()).compile_fds(descriptors).unwrap();

    let checked_in = root.join("src/generated");
    let regenerate = std::env::var_os("OUTRIGGER_REGENERATE").is_some();
    for file in ["envoy.service.discovery.v3.rs", "outrigger.v1.rs"] {
        let now = fs::read_to_string(fresh.path().join(file)).unwrap();
        let path = checked_in.join(file);
        if regenerate {
            fs::write(&path, &now).unwrap();
        }
        let then = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            now == then,
            "{} is stale: run OUTRIGGER_REGENERATE=1 cargo test -p outrigger-api",
            path.display()
        );
    }
}
