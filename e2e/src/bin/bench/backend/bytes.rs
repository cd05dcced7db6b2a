//! Bytes: requests of 1 KiB. Most are answered by as many; one whose first byte is [`FLOOD`] by a stream without end.

use anyhow::Result;

use super::{SMALL, Serve};
use crate::poller::{Line, Poller};

/// First byte of a request that asks for a stream without end. No protocol that a proxy detects begins with it.
pub(crate) const FLOOD: u8 = 2;

static ANSWER: [u8; SMALL] = [b'x'; SMALL];
/// What one write of the stream offers.
static CHUNK: [u8; 256 * 1024] = [b'x'; 256 * 1024];

#[derive(Default)]
pub(super) struct Bytes {
    /// Bytes of the current request that came.
    partial: usize,
    flood: bool,
}

impl Serve for Bytes {
    fn serve(&mut self, line: &mut Line, poller: &Poller, bytes: &[u8]) -> Result<()> {
        self.flood |= self.partial == 0 && bytes.first() == Some(&FLOOD);
        self.partial += bytes.len();
        while self.partial >= SMALL {
            self.partial -= SMALL;
            if !self.flood {
                line.out.extend_from_slice(&ANSWER);
            }
        }
        if self.flood {
            line.watch(poller, true)?;
            // A few writes, then the others' turn.
            for _ in 0..4 {
                if line.offer(&CHUNK)? < CHUNK.len() {
                    break;
                }
            }
        }
        Ok(())
    }
}
