//! One table for each rule. The names in brackets are the lines of the attack list that the rule answers.

mod body;
mod properties;
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

/// The body and the trailers that `input` holds, and the bytes of it; an error if it is incomplete.
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

pub(crate) fn text(fields: &Fields) -> Vec<(String, String)> {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    fields.iter().map(|(name, value)| (text(name), text(value))).collect()
}
