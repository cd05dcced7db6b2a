//! HTTP/1.1: `GET /` answers 1 KiB, `GET /<bytes>` so many; a body is read to its end first.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use anyhow::{Context as _, Result};

use super::{SMALL, Serve};
use crate::{
    load::http1::{content_length, head_end},
    poller::{Line, Poller},
};

thread_local! {
    /// Whole answers by the length of their body.
    static ANSWERS: RefCell<BTreeMap<usize, Rc<[u8]>>> = const { RefCell::new(BTreeMap::new()) };
}

#[derive(Default)]
pub(super) struct Http1 {
    /// An incomplete head.
    head: Vec<u8>,
    /// What is missing of a request's body.
    body: usize,
    /// Length of the answer that follows it.
    answer: usize,
}

impl Serve for Http1 {
    fn serve(&mut self, line: &mut Line, _: &Poller, bytes: &[u8]) -> Result<()> {
        let joined;
        let mut bytes = bytes;
        if !self.head.is_empty() && !bytes.is_empty() {
            self.head.extend_from_slice(bytes);
            joined = std::mem::take(&mut self.head);
            bytes = &joined;
        }
        while !bytes.is_empty() {
            if self.body > 0 {
                let part = self.body.min(bytes.len());
                self.body -= part;
                bytes = &bytes[part..];
                if self.body == 0 {
                    line.out.extend_from_slice(&answer(self.answer));
                }
                continue;
            }
            let Some(end) = head_end(bytes) else {
                self.head = bytes.to_vec();
                break;
            };
            let head = &bytes[..end];
            bytes = &bytes[end..];
            self.answer = wanted(head)?;
            self.body = content_length(head).unwrap_or(0);
            if self.body == 0 {
                line.out.extend_from_slice(&answer(self.answer));
            }
        }
        Ok(())
    }
}

/// The length that the path asks for.
fn wanted(head: &[u8]) -> Result<usize> {
    let path = head.split(|byte| *byte == b' ').nth(1).context("a request line has a path")?;
    match path {
        b"/" => Ok(SMALL),
        path => std::str::from_utf8(&path[1..])?.parse().context("a path is a length"),
    }
}

fn answer(length: usize) -> Rc<[u8]> {
    ANSWERS.with_borrow_mut(|answers| {
        let make = || {
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\n\r\n");
            let mut whole = head.into_bytes();
            whole.resize(whole.len() + length, b'x');
            whole.into()
        };
        Rc::clone(answers.entry(length).or_insert_with(make))
    })
}
