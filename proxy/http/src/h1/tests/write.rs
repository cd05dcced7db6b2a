//! What goes out.

use super::*;

fn written(head: &RequestHead, framing: Framing) -> String {
    let mut out = Vec::new();
    write_request(head, framing, &mut out);
    String::from_utf8(out).unwrap()
}

#[test]
fn a_request_goes_out_as_it_came() {
    let input = "POST /a?b HTTP/1.1\r\nHoST: a\r\nContent-LENGTH: 5\r\nx: 1\r\n\r\n";
    let (head, decoder, _) = request(input.as_bytes()).unwrap();
    assert_eq!(written(&head, decoder.framing()), input);
}

#[test]
fn the_framing_that_is_named_is_the_only_one_on_the_wire() {
    let mut head = RequestHead::default();
    head.set_method(b"POST");
    head.set_path(Some(b"/"));
    head.fields.push(b"Transfer-Encoding", b"gzip");
    head.fields.push(b"content-length", b"5");
    head.fields.push(b"a", b"b");
    assert_eq!(
        written(&head, Framing::Chunked),
        "POST / HTTP/1.1\r\na: b\r\nTransfer-Encoding: chunked\r\n\r\n"
    );
    assert_eq!(written(&head, Framing::Length(5)), "POST / HTTP/1.1\r\ncontent-length: 5\r\na: b\r\n\r\n");
    head.fields.remove("content-length");
    assert_eq!(written(&head, Framing::Length(5)), "POST / HTTP/1.1\r\na: b\r\nContent-Length: 5\r\n\r\n");
}
