//! HTTP/1.1 messages: heads, framing, bodies (RFC 9112).
//!
//! A proxy is attacked where it and its neighbour disagree about where a message ends. So this codec does not repair: what
//! two readers could read in two ways is refused, and the connection with it. What it lets through is forwarded as it
//! came, byte for byte, in case and order of the field lines. The README lists what is refused that the RFC would allow.
//!
//! The files are the steps of a message: `lines` finds the end of a head, `start` reads its first line, `framing`
//! decides how long the body is, `chunked` takes the chunks apart, and `write` puts a message together.
//! Field lines are lexed by `httparse`, whose leniencies (bare LF) `lines` has excluded before.

mod chunked;
mod framing;
mod lines;
mod start;
mod write;

use self::chunked::Chunks;
use self::lines::{Lines, Section};
pub use self::write::{reason_phrase, write_chunk, write_last_chunk, write_request, write_response};
use crate::fields::Fields;
use crate::head::{RequestHead, ResponseHead};

/// Bounds of one head, and of one trailer section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the start line and the field lines, line ends included. More than 1 GiB counts as 1 GiB.
    pub head_bytes: usize,
    /// Field lines.
    pub fields: usize,
}

/// Where the body of a message ends (RFC 9112, 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// There is no body. A Content-Length in the response to HEAD or in a 304 says what GET would have got.
    Empty,
    /// So many bytes; may be 0.
    Length(u64),
    /// Chunks.
    Chunked,
    /// A response whose body lasts until the connection ends.
    UntilClose,
    /// No message any more: raw bytes behind an accepted upgrade or CONNECT.
    Tunnel,
}

impl Framing {
    /// Whether no byte of a body can come: the message ends with its head.
    pub fn is_empty(self) -> bool {
        matches!(self, Self::Empty | Self::Length(0))
    }
}

/// Why a message is refused. The connection cannot be read any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// 414: the bound of a head was reached within the request line.
    #[error("the request line is too long")]
    TargetTooLong,
    /// 431: the bound of a head or of its field lines was reached. Trailers are bounded alike.
    #[error("the head is too large")]
    HeadTooLarge,
    /// 400: not HTTP, or open to two readings. The text is a clause for people.
    #[error("{0}")]
    Malformed(&'static str),
    /// The stream ended within a message.
    #[error("the message is truncated")]
    Truncated,
}

/// What a response answers, as far as it decides where the response ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Asked {
    /// The method was HEAD.
    pub head: bool,
    /// The method was CONNECT: a 2xx opens a tunnel.
    pub connect: bool,
    /// The request asked for an upgrade: a 101 opens a tunnel.
    pub upgrade: bool,
}

/// A piece of a body.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Nothing without more input.
    More,
    /// Bytes of the body, never none.
    Data(&'a [u8]),
    /// The message is complete.
    End,
}

/// Reads the messages of one direction of one connection, one after the other.
///
/// It holds no bytes. Input that it did not consume is handed in again, with more behind it.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    /// How far the section (a head or trailers) at the start of the input was looked at.
    lines: Lines,
    state: State,
    framing: Framing,
    keeps_alive: bool,
}

/// What is expected next.
#[derive(Debug)]
enum State {
    Head,
    /// So many bytes of the body, at least one.
    Length(u64),
    Chunked(Chunks),
    UntilClose,
    Tunnel,
}

impl Decoder {
    /// A decoder for a fresh connection.
    pub fn new(limits: Limits) -> Self {
        // Positions in a head are 32 bits wide, and far below the end of them a sum of two cannot overflow.
        let limits = Limits { head_bytes: limits.head_bytes.min(1 << 30), ..limits };
        Self {
            limits,
            lines: Lines::default(),
            state: State::Head,
            framing: Framing::Empty,
            keeps_alive: true,
        }
    }

    /// Reads a request's head once all of it is in `input`, into `head`; returns the bytes consumed.
    ///
    /// `None`: call again with the same bytes and more behind them. No byte is looked at twice until the head is whole.
    /// Empty lines before it are skipped (RFC 9112, 2.2), four at most.
    pub fn request(&mut self, input: &[u8], head: &mut RequestHead) -> Result<Option<usize>, Error> {
        self.expect_head()?;
        let Some(section) = self.lines.request(input, self.limits)? else { return Ok(None) };
        head.clear();
        start::read_request(&input[..section.end], section, head)?;
        let told = framing::of_request(head)?;
        Ok(Some(self.begin(section, told)))
    }

    /// Reads a response's head as [`request`](Self::request) does; `asked` is about the request that it answers.
    ///
    /// After an interim response (1xx, but not the 101 that opens a tunnel) another head is expected.
    pub fn response(
        &mut self,
        input: &[u8],
        asked: Asked,
        head: &mut ResponseHead,
    ) -> Result<Option<usize>, Error> {
        self.expect_head()?;
        let Some(section) = self.lines.response(input, self.limits)? else { return Ok(None) };
        head.clear();
        start::read_response(&input[..section.end], section, head)?;
        let told = framing::of_response(head, asked)?;
        Ok(Some(self.begin(section, told)))
    }

    /// Whether a part of a head has been seen, but not all of it: what a head's time-out is for.
    pub fn has_begun(&self) -> bool {
        matches!(self.state, State::Head) && self.lines.has_begun()
    }

    /// Where the body ends of the message whose head was read last.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// Whether the connection may carry another message after this one, as far as this and those before it say
    /// (RFC 9112, 9.3).
    pub fn keeps_alive(&self) -> bool {
        self.keeps_alive
    }

    /// The next piece of the body, and the bytes consumed for it.
    ///
    /// Data is a slice of `input`. Trailers are appended to `trailers` before the end is told; field names that frame or
    /// route a message are left out of them (RFC 9110, 6.5.1). After the end a head is expected.
    pub fn body<'a>(&mut self, input: &'a [u8], trailers: &mut Fields) -> Result<(usize, Piece<'a>), Error> {
        match &mut self.state {
            State::Head => Ok((0, Piece::End)),
            _ if input.is_empty() => Ok((0, Piece::More)),
            State::UntilClose | State::Tunnel => Ok((input.len(), Piece::Data(input))),
            State::Length(left) => {
                let (data, rest) = take(input, *left);
                *left = rest;
                if rest == 0 {
                    self.state = State::Head;
                }
                Ok((data.len(), Piece::Data(data)))
            }
            State::Chunked(chunks) => {
                let (consumed, piece) = chunks.next(input, &mut self.lines, self.limits, trailers)?;
                if matches!(piece, Piece::End) {
                    self.state = State::Head;
                }
                Ok((consumed, piece))
            }
        }
    }

    /// The stream has ended here, all input consumed or handed in: whether that is an end of a message.
    pub fn end(&self) -> Result<(), Error> {
        match self.state {
            State::Head if self.lines.has_begun() => Err(Error::Truncated),
            State::Length(_) | State::Chunked(_) => Err(Error::Truncated),
            State::Head | State::UntilClose | State::Tunnel => Ok(()),
        }
    }

    /// From here on everything is raw bytes: for the side of the request, once the upgrade or the CONNECT was accepted.
    pub fn switch(&mut self) {
        (self.state, self.framing, self.keeps_alive) = (State::Tunnel, Framing::Tunnel, false);
        self.lines = Lines::default();
    }

    /// Reading a body as a head is how a request is smuggled, so it must not depend on the caller's care.
    fn expect_head(&self) -> Result<(), Error> {
        match self.state {
            State::Head => Ok(()),
            _ => Err(Error::Malformed("a head is not due before the end of the body")),
        }
    }

    /// A head was read: what is next is its body. Returns the bytes of the head.
    fn begin(&mut self, section: Section, (framing, keeps_alive): (Framing, bool)) -> usize {
        self.lines = Lines::default();
        self.framing = framing;
        // What one message ended, a later one cannot revive: an interim response may say it before the final one.
        self.keeps_alive &= keeps_alive;
        self.state = match framing {
            Framing::Empty | Framing::Length(0) => State::Head,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Chunked(Chunks::default()),
            Framing::UntilClose => State::UntilClose,
            Framing::Tunnel => State::Tunnel,
        };
        section.end
    }
}

/// As much of `input` as `left` allows, and what is left then.
fn take(input: &[u8], left: u64) -> (&[u8], u64) {
    let bytes = usize::try_from(left).map_or(input.len(), |left| left.min(input.len()));
    (&input[..bytes], left - bytes as u64)
}

#[cfg(test)]
mod tests;
