//! How answers are printed: a table for people, JSON and YAML for programs, names for shell loops.

use std::{
    fmt::Write as _,
    io::{IsTerminal, Write as _},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// The value of `-o`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns
    #[default]
    Table,
    /// More columns
    Wide,
    /// All that the controller said
    Json,
    /// All that the controller said
    Yaml,
    /// One name a line
    Name,
}

/// Something that can be listed.
pub(crate) trait Row: Serialize {
    /// The table's columns.
    const COLUMNS: &[&str];
    /// Those that `-o wide` adds.
    const WIDE: &[&str] = &[];
    /// What `-o name` prints.
    fn name(&self) -> String;
    /// One cell for each column.
    fn cells(&self) -> Vec<String>;
    /// One cell for each column that `-o wide` adds.
    fn wide(&self) -> Vec<String> {
        Vec::new()
    }
    /// Whether somebody should look at it: red on a terminal.
    fn is_alarming(&self) -> bool {
        false
    }
}

/// Prints `rows` in `format` to standard output.
pub(crate) fn print<R: Row>(format: Format, rows: &[R]) -> Result<()> {
    write(&render(format, rows, Paint::stdout())?)
}

/// Writes to standard output; a reader that has gone (`| head`) has had enough, which is no failure.
pub(crate) fn write(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("writing to standard output"),
    }
}

/// `value` as JSON or, for any other format, as YAML.
pub(crate) fn document(format: Format, value: &impl Serialize) -> Result<String> {
    Ok(match format {
        Format::Json => serde_json::to_string_pretty(value)? + "\n",
        _ => serde_saphyr::to_string(value)?,
    })
}

/// `rows` in `format`.
pub(crate) fn render<R: Row>(format: Format, rows: &[R], paint: Paint) -> Result<String> {
    Ok(match format {
        Format::Table | Format::Wide if rows.is_empty() => "none\n".to_owned(),
        Format::Table | Format::Wide => {
            let is_wide = format == Format::Wide;
            let mut table = Table::new();
            let wide = if is_wide { R::WIDE } else { &[] };
            table.load_style(presets::NOTHING).set_header(R::COLUMNS.iter().chain(wide));
            for row in rows {
                let mut cells = row.cells();
                if is_wide {
                    cells.extend(row.wide());
                }
                table.add_row(cells.iter().map(|cell| plain(cell)));
            }
            // A cell is one line, so that the lines after the header are the rows.
            let mut text = String::new();
            for (at, line) in table.trim_fmt().lines().enumerate() {
                let is_alarming = at.checked_sub(1).and_then(|at| rows.get(at)).is_some_and(Row::is_alarming);
                let line = line.strip_prefix(' ').unwrap_or(line);
                let _ = writeln!(text, "{}", paint.when(is_alarming, Colour::Red, line));
            }
            text
        }
        Format::Json | Format::Yaml => document(format, &rows)?,
        Format::Name => rows.iter().map(|row| plain(&row.name()) + "\n").collect(),
    })
}

/// `text` without what a terminal would obey: names, versions and reasons come from proxies and other people.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Whether output is coloured: only on a terminal that people look at (<https://no-color.org>).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Paint(bool);

/// A colour of the terminal's own palette.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Colour {
    Red,
    Green,
    Cyan,
}

impl Paint {
    /// No colour.
    #[cfg(test)]
    pub(crate) const NONE: Self = Self(false);

    /// What standard output takes.
    pub(crate) fn stdout() -> Self {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self(std::io::stdout().is_terminal() && !is_set("NO_COLOR") && !is_dumb)
    }

    /// `text` in `colour`.
    pub(crate) fn paint(self, colour: Colour, text: &str) -> String {
        let code = match colour {
            Colour::Red => 31,
            Colour::Green => 32,
            Colour::Cyan => 36,
        };
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn when(self, condition: bool, colour: Colour, text: &str) -> String {
        if condition { self.paint(colour, text) } else { text.to_owned() }
    }
}

/// How long ago `unix` (seconds) was, in the largest unit that says something.
pub(crate) fn age(unix: i64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    match now.saturating_sub(unix.try_into().unwrap_or(0)) {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7_200 => format!("{}m", seconds / 60),
        seconds @ 7_200..172_800 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// `unix` (seconds) as RFC 3339 has it, in UTC.
pub(crate) fn date(unix: i64) -> String {
    OffsetDateTime::from_unix_timestamp(unix)
        .ok()
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_else(|| "no date".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Ship {
        name: &'static str,
        hulls: u8,
    }

    impl Row for Ship {
        const COLUMNS: &[&str] = &["NAME", "HULLS"];
        const WIDE: &[&str] = &["KIND"];

        fn name(&self) -> String {
            self.name.to_owned()
        }

        fn cells(&self) -> Vec<String> {
            vec![self.name.to_owned(), self.hulls.to_string()]
        }

        fn wide(&self) -> Vec<String> {
            vec![if self.hulls > 1 { "multihull\x1b[2J" } else { "monohull" }.to_owned()]
        }

        fn is_alarming(&self) -> bool {
            self.hulls == 1
        }
    }

    #[test]
    fn every_format_shows_every_row() {
        let fleet = [Ship { name: "proa", hulls: 2 }, Ship { name: "sloop", hulls: 1 }];
        let render = |format| render(format, &fleet, Paint::NONE).unwrap();
        insta::assert_snapshot!(render(Format::Table), @r"
        NAME   HULLS
        proa   2
        sloop  1
        ");
        insta::assert_snapshot!(render(Format::Wide), @r"
        NAME   HULLS  KIND
        proa   2      multihull�[2J
        sloop  1      monohull
        ");
        insta::assert_snapshot!(render(Format::Name), @r"
        proa
        sloop
        ");
        insta::assert_snapshot!(render(Format::Yaml), @r"
        - name: proa
          hulls: 2
        - name: sloop
          hulls: 1
        ");
        assert!(render(Format::Json).contains("\"hulls\": 2"));
        assert_eq!(super::render::<Ship>(Format::Table, &[], Paint::NONE).unwrap(), "none\n");
    }

    #[test]
    fn colour_marks_the_row_that_alarms() {
        let fleet = [Ship { name: "proa", hulls: 2 }, Ship { name: "sloop", hulls: 1 }];
        let text = render(Format::Table, &fleet, Paint(true)).unwrap();
        assert_eq!(text, "NAME   HULLS\nproa   2\n\x1b[31msloop  1\x1b[0m\n");
    }
}
