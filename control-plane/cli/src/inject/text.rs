//! Changes in a YAML text that leave everything else as it was written: comments, quotes, the order of fields.
//!
//! This is no YAML editor. It knows block style by its indentation, which is how manifests are written, and puts whole
//! lines in or takes them out. What it made is parsed again and compared with what was meant; where it is something
//! else (flow style, anchors, tabs), there is no edit. So it can fail, but not deceive.

use outrigger_inject::patch;
use serde_json::{Value, json};

/// The documents of a YAML text, without the lines between them.
pub(super) fn documents(text: &str) -> Vec<&str> {
    let mut documents = Vec::new();
    let (mut start, mut at) = (0, 0);
    for line in text.split_inclusive('\n') {
        if line.trim_end() == "---" {
            documents.push(&text[start..at]);
            start = at + line.len();
        }
        at += line.len();
    }
    documents.push(&text[start..]);
    documents.retain(|document| !document.trim().is_empty());
    documents
}

/// `text`, which says `from`, changed so that it says `to`. `None`: it cannot be done line by line.
pub(super) fn edit(text: &str, from: &Value, to: &Value) -> Option<String> {
    if text.trim_start().starts_with('{') {
        return Some(format!("{to:#}\n"));
    }
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    for operation in patch::between(from, to) {
        apply(&mut lines, &operation)?;
    }
    let edited = lines.join("\n") + "\n";
    let found: Value = serde_saphyr::from_str(&edited).ok()?;
    (found == *to).then_some(edited)
}

fn apply(lines: &mut Vec<String>, operation: &Value) -> Option<()> {
    let path: Vec<String> = operation["path"].as_str()?.split('/').skip(1).map(unescaped).collect();
    let (last, parents) = path.split_last()?;
    let parent =
        parents.iter().try_fold(Block::of(lines, 0, lines.len())?, |block, step| block.child(lines, step))?;
    match operation["op"].as_str()? {
        "add" => {
            let (at, value) = match parent.kind {
                Kind::Map => (parent.end, json!({ last: operation["value"] })),
                Kind::List => {
                    let index: usize = last.parse().ok()?;
                    let at = parent
                        .starts(lines)
                        .nth(index)
                        .map_or(parent.end, |start| before_comments(lines, start));
                    (at, json!([operation["value"]]))
                }
            };
            let rendered = serde_saphyr::to_string(&value).ok()?;
            let indent = " ".repeat(parent.indent);
            lines.splice(at..at, rendered.lines().map(|line| format!("{indent}{line}")));
        }
        "remove" => {
            let (start, end) = parent.entry(lines, last)?;
            lines.drain(start..end);
        }
        _ => return None,
    }
    Some(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Map,
    List,
}

/// A mapping or a list in block style: its lines, without blank lines and comments around it.
struct Block {
    kind: Kind,
    start: usize,
    end: usize,
    /// Columns before its keys or dashes.
    indent: usize,
    /// The first key of a mapping in a list stands behind the dash of its line.
    behind_dash: bool,
}

impl Block {
    /// The block in these lines.
    fn of(lines: &[String], start: usize, end: usize) -> Option<Self> {
        let start = (start..end).find(|line| is_content(&lines[*line]))?;
        let end = (start..end).rev().find(|line| is_content(&lines[*line]))? + 1;
        let indent = indentation(&lines[start]);
        let kind = if is_dash(&lines[start][indent..]) { Kind::List } else { Kind::Map };
        Some(Self { kind, start, end, indent, behind_dash: false })
    }

    /// The lines on which its entries start.
    fn starts<'l>(&'l self, lines: &'l [String]) -> impl Iterator<Item = usize> + 'l {
        (self.start..self.end).filter(move |line| {
            let text = &lines[*line];
            if self.behind_dash && *line == self.start {
                return true;
            }
            // A list may stand in the column of the key that it belongs to.
            is_content(text)
                && indentation(text) == self.indent
                && is_dash(&text[self.indent..]) == (self.kind == Kind::List)
        })
    }

    /// The lines of an entry, without what comes after it.
    fn entry(&self, lines: &[String], step: &str) -> Option<(usize, usize)> {
        let starts: Vec<usize> = self.starts(lines).collect();
        let position = match self.kind {
            Kind::List => step.parse().ok()?,
            Kind::Map => starts
                .iter()
                .position(|line| key(&lines[*line][self.indent..]).is_some_and(|(key, _)| key == step))?,
        };
        let start = *starts.get(position)?;
        let end = starts.get(position + 1).copied().unwrap_or(self.end);
        let end = (start..end).rev().find(|line| is_content(&lines[*line]))? + 1;
        Some((start, end))
    }

    /// The block in an entry.
    fn child(&self, lines: &[String], step: &str) -> Option<Self> {
        let (start, end) = self.entry(lines, step)?;
        match self.kind {
            Kind::Map => {
                let (_, rest) = key(&lines[start][self.indent..])?;
                let rest = rest.trim();
                (rest.is_empty() || rest.starts_with('#')).then(|| Self::of(lines, start + 1, end))?
            }
            Kind::List => {
                let content = lines[start][self.indent + 1..].trim_start();
                key(content)?;
                let indent = lines[start].len() - content.len();
                Some(Self { kind: Kind::Map, start, end, indent, behind_dash: true })
            }
        }
    }
}

/// The comments right above an entry belong to it.
fn before_comments(lines: &[String], start: usize) -> usize {
    (0..start).rev().take_while(|line| lines[*line].trim_start().starts_with('#')).last().unwrap_or(start)
}

fn is_content(line: &str) -> bool {
    let text = line.trim();
    !text.is_empty() && !text.starts_with('#')
}

fn is_dash(text: &str) -> bool {
    text == "-" || text.starts_with("- ")
}

fn indentation(line: &str) -> usize {
    line.len() - line.trim_start_matches(' ').len()
}

/// The key that a line begins with, and what comes after its colon.
fn key(text: &str) -> Option<(&str, &str)> {
    let (key, rest) = match text.chars().next()? {
        quote @ ('"' | '\'') => text[1..].split_once(quote)?,
        _ => text
            .find(": ")
            .map(|at| text.split_at(at))
            .or_else(|| Some((text.trim_end().strip_suffix(':')?, ":")))?,
    };
    Some((key, rest.strip_prefix(':')?))
}

/// A step of a JSON pointer (RFC 6901).
fn unescaped(step: &str) -> String {
    step.replace("~1", "/").replace("~0", "~")
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "\
# A pod.
apiVersion: v1
kind: Pod
metadata:
  name: web # its name
  labels:
    \"app\": 'web'
spec:
  # Before all else.
  initContainers:
  # Migrates.
  - name: migrate
    image: web:1
  containers:
    - name: web
      args: [\"a\", 'b']
      command:
        - sh
        - |
          # no comment
          run: it

  # The end.
";

    #[test]
    fn a_change_leaves_everything_else_as_it_was() {
        let from: Value = serde_saphyr::from_str(POD).unwrap();
        let mut to = from.clone();
        to["metadata"]["labels"]["x/y"] = "true".into();
        to["metadata"]["annotations"] = json!({ "note": "1" });
        to["spec"]["initContainers"] = json!([{ "name": "first", "env": [{ "name": "A", "value": "x: y" }] }, from["spec"]["initContainers"][0]]);
        to["spec"]["volumes"] = json!([{ "name": "v" }]);
        let edited = edit(POD, &from, &to).expect("it can be edited");
        for line in POD.lines() {
            assert!(edited.lines().any(|other| other == line), "{line:?} is gone:\n{edited}");
        }
        assert!(edited.find("first") < edited.find("# Migrates."), "{edited}");
        let back = edit(&edited, &to, &from).expect("and back");
        assert_eq!(back, POD);
    }

    #[test]
    fn what_is_not_in_block_style_is_not_edited() {
        let text = "metadata: {name: web}\nspec: {containers: []}\n";
        let from: Value = serde_saphyr::from_str(text).unwrap();
        let mut to = from.clone();
        to["metadata"]["labels"] = json!({ "a": "b" });
        assert_eq!(edit(text, &from, &to), None);
    }

    #[test]
    fn documents_of_a_text() {
        assert_eq!(documents("---\na: 1\n---\n\n---\nb: |\n  ---\n"), ["a: 1\n", "b: |\n  ---\n"]);
        assert_eq!(documents("# head\n---\na: 1"), ["# head\n", "a: 1"]);
    }
}
