//! What changed in a text, for people who review it.

use similar::TextDiff;

/// Unchanged lines around a change: what `diff -u` shows.
const CONTEXT: usize = 3;

/// The lines that differ, as `diff -u` writes them. Empty: there are none.
pub fn diff(old_name: &str, old: &str, new_name: &str, new: &str) -> String {
    TextDiff::from_lines(old, new)
        .unified_diff()
        .context_radius(CONTEXT)
        .header(old_name, new_name)
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_differ_are_shown_with_what_is_around_them() {
        let old = "a\nb\nc\nd\ne\n";
        assert_eq!(diff("x", old, "y", old), "");
        let new = "a\nb\nc\nd\nf\n";
        assert_eq!(diff("x", old, "y", new), "--- x\n+++ y\n@@ -2,4 +2,4 @@\n b\n c\n d\n-e\n+f\n");
        assert_eq!(diff("x", "", "y", "a\n"), "--- x\n+++ y\n@@ -0,0 +1 @@\n+a\n");
    }
}
