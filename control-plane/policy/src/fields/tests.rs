use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::*;

/// From the Go types of the Gateway API (`apis/v1`, commit 4564255ac2c3, the experimental channel included).
const PUBLISHED: [(Kind, &str); 2] =
    [(Kind::HttpRoute, include_str!("HTTPRoute.txt")), (Kind::GrpcRoute, include_str!("GRPCRoute.txt"))];

#[test]
fn every_published_field_is_known() {
    for (kind, published) in PUBLISHED {
        let known = fields();
        let known: Vec<&Field> = known.iter().filter(|field| field.kind == kind).collect();
        let published: BTreeSet<&str> = published.lines().collect();
        for field in &published {
            let covered = known.iter().any(|known| match known.support {
                Support::Refused { .. } => {
                    known.field == **field || field.starts_with(&format!("{}.", known.field))
                }
                _ => known.field == **field,
            });
            assert!(covered, "{kind}: {field} is not known");
        }
        for known in known {
            assert!(published.contains(&*known.field), "{kind}: {} is not published", known.field);
        }
    }
}

#[test]
fn each_reason_is_used() {
    let fields = fields();
    for (name, reason) in REFUSED {
        let used = |field: &Field| field.support == Support::Refused { reason };
        assert!(fields.iter().any(used), "{name}");
    }
    for (end, reason) in LIMITED {
        let used = |field: &Field| field.support == Support::Limited { reason };
        assert!(fields.iter().any(used), "{end}");
    }
    insta::assert_snapshot!(
        fields
            .iter()
            .filter(|field| field.support != Support::Supported)
            .map(|field| format!("{} {}: {:?}\n", field.kind, field.field, field.support))
            .collect::<Vec<_>>()
            .concat()
    );
}

const BEGIN: &str = "<!-- fields: made from `outrigger_policy::fields()` -->\n";
const END: &str = "<!-- fields: end -->\n";

/// `OUTRIGGER_REGENERATE=1` writes it.
#[test]
fn the_table_in_the_documentation_is_fresh() {
    let mut table = "| kind | field | |\n|---|---|---|\n".to_owned();
    for Field { kind, field, support } in fields() {
        let said = match support {
            Support::Supported => "yes".to_owned(),
            Support::Limited { reason } => format!("in part: {reason}"),
            Support::Refused { reason } => format!("refused: {reason}"),
        };
        writeln!(table, "| {kind} | `{field}` | {said} |").unwrap();
    }
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/policies.md");
    let text = std::fs::read_to_string(&file).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let fresh = format!("{before}{BEGIN}{table}{END}{after}");
    if std::env::var_os("OUTRIGGER_REGENERATE").is_some() {
        std::fs::write(&file, &fresh).unwrap();
    } else {
        assert!(text == fresh, "docs/policies.md is old: run with OUTRIGGER_REGENERATE=1");
    }
}
