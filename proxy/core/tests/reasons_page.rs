//! `docs/reasons.md` lists every reason; a code that nobody can look up explains nothing.
//! `OUTRIGGER_REGENERATE=1 cargo test -p outrigger-core --test reasons_page` writes the page anew.

use std::{fmt::Write, fs, path::Path};

use outrigger_core::reason::Reason;

const HEAD: &str = "\
# Reasons

When the mesh answers in the application's stead, it says who and why: in the response header
`outrigger-reason: <component>; <code>; <text>`, in the label `reason` of the metrics, and in the log. An HTTP caller gets the
HTTP status, a gRPC caller the gRPC status; a plain TCP connection is reset. A code keeps its meaning once it was released.

| code | HTTP | gRPC | meaning |
|---|---|---|---|
";

#[test]
fn the_page_is_current() {
    let mut page = HEAD.to_owned();
    for reason in Reason::ALL {
        writeln!(
            page,
            "| `{}` | {} | {} | {} |",
            reason.code(),
            reason.http_status(),
            reason.grpc_status(),
            reason.description()
        )
        .unwrap();
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reasons.md");
    if std::env::var_os("OUTRIGGER_REGENERATE").is_some() {
        fs::write(&path, &page).unwrap();
    }
    assert_eq!(
        fs::read_to_string(&path).unwrap_or_default(),
        page,
        "docs/reasons.md is stale, see this test's head"
    );
}
