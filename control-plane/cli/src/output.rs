//! How answers are printed: a table for people, JSON and YAML for programs, names for shell loops.

use anyhow::Result;
use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde::Serialize;

/// The value of `-o`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    #[default]
    Table,
    Json,
    Yaml,
    Name,
}

/// Something that can be listed.
pub(crate) trait Row: Serialize {
    /// The table's columns.
    const COLUMNS: &[&str];
    /// One cell for each column; the first is what `-o name` prints.
    fn cells(&self) -> Vec<String>;
}

/// Prints `rows` in `format` to standard output.
pub(crate) fn print<R: Row>(format: Format, rows: &[R]) -> Result<()> {
    print!("{}", render(format, rows)?);
    Ok(())
}

fn render<R: Row>(format: Format, rows: &[R]) -> Result<String> {
    Ok(match format {
        Format::Table if rows.is_empty() => "none\n".to_owned(),
        Format::Table => {
            let mut table = Table::new();
            table.load_style(presets::NOTHING).set_header(R::COLUMNS);
            for row in rows {
                table.add_row(row.cells());
            }
            table.trim_fmt() + "\n"
        }
        Format::Json => serde_json::to_string_pretty(rows)? + "\n",
        Format::Yaml => serde_saphyr::to_string(&rows)?,
        Format::Name => rows.iter().map(|row| row.cells().swap_remove(0) + "\n").collect(),
    })
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
        fn cells(&self) -> Vec<String> {
            vec![self.name.to_owned(), self.hulls.to_string()]
        }
    }

    #[test]
    fn every_format_shows_every_row() {
        let fleet = [Ship { name: "proa", hulls: 2 }, Ship { name: "sloop", hulls: 1 }];
        insta::assert_snapshot!(render(Format::Table, &fleet).unwrap(), @r"
         NAME   HULLS
         proa   2
         sloop  1
        ");
        insta::assert_snapshot!(render(Format::Name, &fleet).unwrap(), @r"
        proa
        sloop
        ");
        insta::assert_snapshot!(render(Format::Yaml, &fleet).unwrap(), @r"
        - name: proa
          hulls: 2
        - name: sloop
          hulls: 1
        ");
        assert!(render(Format::Json, &fleet).unwrap().contains("\"hulls\": 2"));
        assert_eq!(render::<Ship>(Format::Table, &[]).unwrap(), "none\n");
    }
}
