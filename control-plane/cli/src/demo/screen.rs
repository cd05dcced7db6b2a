//! What the demo shows: on a terminal a table that lives and the last things said; elsewhere a plain log.

use std::io::{IsTerminal, Write};

/// Lines of narration that stay on a live screen.
const LINES: usize = 14;
/// Move to the top left corner, and erase to the end of the line or of the screen (ECMA-48 8.3.21, 8.3.41, 8.3.39).
const HOME: &str = "\x1b[H";
const ERASE_LINE: &str = "\x1b[K";
const ERASE_BELOW: &str = "\x1b[J";

/// Where the demo speaks.
pub(super) struct Screen {
    live: bool,
    said: Vec<String>,
    table: String,
}

impl Screen {
    /// A live screen, unless asked not to be or nobody could see it.
    pub(super) fn new(once: bool) -> Self {
        let live = !once && std::io::stdout().is_terminal();
        if live {
            print!("\x1b[2J");
        }
        Self { live, said: Vec::new(), table: String::new() }
    }

    /// Whether somebody is watching.
    pub(super) fn is_live(&self) -> bool {
        self.live
    }

    /// Says something.
    pub(super) fn say(&mut self, text: impl Into<String>) {
        let text = text.into();
        if !self.live {
            println!("{text}");
            return;
        }
        self.said.extend(text.lines().map(str::to_owned));
        let surplus = self.said.len().saturating_sub(LINES);
        self.said.drain(..surplus);
        self.draw();
    }

    /// Shows the table as it is now. A plain log shows it only when a step ends.
    pub(super) fn show(&mut self, table: String, step_ended: bool) {
        self.table = table;
        if self.live {
            self.draw();
        } else if step_ended {
            println!("\n{}\n", self.table);
        }
    }

    fn draw(&self) {
        let mut frame = String::from(HOME);
        let lines = ["Outrigger demo: every line is one edge of the mesh. Ctrl-C ends it.", ""]
            .into_iter()
            .chain(self.table.lines())
            .chain([""])
            .chain(self.said.iter().map(String::as_str));
        for line in lines {
            frame.push_str(line.trim_end());
            frame.push_str(ERASE_LINE);
            frame.push_str("\r\n");
        }
        frame.push_str(ERASE_BELOW);
        let mut out = std::io::stdout().lock();
        // A terminal that is gone ends the demo by its signal, not here.
        let _ = out.write_all(frame.as_bytes()).and_then(|()| out.flush());
    }
}
