//! One table for each rule. The names in brackets are the lines of the attack list that a test answers.

mod body;
mod cut;
mod framing;
mod request;
mod response;
mod write;

use super::*;

pub(crate) const LIMITS: Limits = Limits { head_bytes: 64 * 1024, fields: 100 };

/// Reads a request's head that is there at once.
pub(crate) fn request(text: &[u8]) -> Result<(RequestHead, Decoder, usize), Error> {
    let (mut decoder, mut head) = (Decoder::new(LIMITS), RequestHead::default());
    let consumed = decoder.request(text, &mut head)?.expect("the head is whole");
    Ok((head, decoder, consumed))
}

/// Reads a response's head that is there at once.
pub(crate) fn response(text: &[u8], asked: Asked) -> Result<(ResponseHead, Decoder, usize), Error> {
    let (mut decoder, mut head) = (Decoder::new(LIMITS), ResponseHead::default());
    let consumed = decoder.response(text, asked, &mut head)?.expect("the head is whole");
    Ok((head, decoder, consumed))
}

pub(crate) const HEAD: Asked = Asked { head: true, connect: false, upgrade: false };
pub(crate) const CONNECT: Asked = Asked { head: false, connect: true, upgrade: false };
pub(crate) const UPGRADE: Asked = Asked { head: false, connect: false, upgrade: true };

/// The body and the trailers in `input`, and the bytes of it; an error if the body is incomplete.
pub(crate) fn body(decoder: &mut Decoder, input: &[u8]) -> Result<(Vec<u8>, Fields, usize), Error> {
    let (mut data, mut trailers, mut at) = (Vec::new(), Fields::default(), 0);
    loop {
        let (consumed, piece) = decoder.body(&input[at..], &mut trailers)?;
        at += consumed;
        match piece {
            Piece::Data(piece) => data.extend_from_slice(piece),
            Piece::End => return Ok((data, trailers, at)),
            Piece::More => {
                decoder.end()?;
                return Ok((data, trailers, at));
            }
        }
    }
}

/// Refused, in whichever words.
#[track_caller]
pub(crate) fn assert_malformed<T>(result: Result<T, Error>, input: &[u8]) {
    let error = result.err();
    let input = input.escape_ascii();
    assert!(matches!(error, Some(Error::Malformed(_))), "{error:?} for {input}");
}

pub(crate) fn lines(fields: &Fields) -> Vec<(&str, &str)> {
    let text = |bytes| str::from_utf8(bytes).unwrap();
    fields.iter().map(|(name, value)| (text(name), text(value))).collect()
}
