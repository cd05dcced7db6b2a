//! The examples of RFC 7541's appendix C, what must be refused, bombs, and properties: whatever one may write arrives.

use super::*;
use crate::h2::hpack::encode;
use proptest::prelude::*;

type Lines = Vec<(Vec<u8>, Vec<u8>)>;

fn lines_of(decoder: &mut Decoder, block: &[u8]) -> Result<Lines, HpackError> {
    let mut lines = Lines::new();
    let decoded = decoder.decode(block, usize::MAX / 2, &mut |name, value| {
        lines.push((name.to_vec(), value.to_vec()));
    })?;
    assert!(!decoded.truncated);
    assert_eq!(
        decoded.size,
        lines.iter().map(|(name, value)| name.len() + value.len() + OVERHEAD).sum::<usize>()
    );
    Ok(lines)
}

fn error(block: &[u8]) -> HpackError {
    lines_of(&mut Decoder::new(INITIAL), block).unwrap_err()
}

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        hex.chars().filter_map(|digit| digit.to_digit(16)).map(|digit| digit as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// Decodes a block of an example and compares lines and the size of the table.
fn example(decoder: &mut Decoder, hex: &str, expected: &str, size: usize) {
    let lines = lines_of(decoder, &bytes(hex)).unwrap();
    let text: Vec<String> = lines
        .iter()
        .map(|(name, value)| format!("{}: {}", String::from_utf8_lossy(name), String::from_utf8_lossy(value)))
        .collect();
    assert_eq!(text, expected.lines().map(str::trim).collect::<Vec<_>>());
    assert_eq!(decoder.table.size(), size);
}

#[test]
fn single_lines_of_the_specification_are_read() {
    let new = || Decoder::new(INITIAL);
    let hex = "400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572";
    example(&mut new(), hex, "custom-key: custom-header", 55);
    example(&mut new(), "040c 2f73 616d 706c 652f 7061 7468", ":path: /sample/path", 0);
    example(&mut new(), "1008 7061 7373 776f 7264 0673 6563 7265 74", "password: secret", 0);
    example(&mut new(), "82", ":method: GET", 0);
}

const REQUESTS: [&str; 3] = [
    ":method: GET
    :scheme: http
    :path: /
    :authority: www.example.com",
    ":method: GET
    :scheme: http
    :path: /
    :authority: www.example.com
    cache-control: no-cache",
    ":method: GET
    :scheme: https
    :path: /index.html
    :authority: www.example.com
    custom-key: custom-value",
];

#[test]
fn requests_of_the_specification_are_read() {
    let mut decoder = Decoder::new(INITIAL);
    example(&mut decoder, "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d", REQUESTS[0], 57);
    example(&mut decoder, "8286 84be 5808 6e6f 2d63 6163 6865", REQUESTS[1], 110);
    let hex = "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65";
    example(&mut decoder, hex, REQUESTS[2], 164);
}

#[test]
fn huffman_coded_requests_of_the_specification_are_read() {
    let mut decoder = Decoder::new(INITIAL);
    example(&mut decoder, "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff", REQUESTS[0], 57);
    example(&mut decoder, "8286 84be 5886 a8eb 1064 9cbf", REQUESTS[1], 110);
    example(&mut decoder, "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf", REQUESTS[2], 164);
}

const RESPONSES: [&str; 3] = [
    ":status: 302
    cache-control: private
    date: Mon, 21 Oct 2013 20:13:21 GMT
    location: https://www.example.com",
    ":status: 307
    cache-control: private
    date: Mon, 21 Oct 2013 20:13:21 GMT
    location: https://www.example.com",
    ":status: 200
    cache-control: private
    date: Mon, 21 Oct 2013 20:13:22 GMT
    location: https://www.example.com
    content-encoding: gzip
    set-cookie: foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
];

/// The examples of responses have a table of 256 bytes, so that entries are evicted.
fn small() -> Decoder {
    let mut decoder = Decoder::new(INITIAL);
    assert_eq!(lines_of(&mut decoder, &[0x3f, 0xe1, 0x01]), Ok(vec![]));
    decoder
}

#[test]
fn responses_of_the_specification_evict_entries() {
    let mut decoder = small();
    let hex = "4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133
        2032 303a 3133 3a32 3120 474d 546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d";
    example(&mut decoder, hex, RESPONSES[0], 222);
    example(&mut decoder, "4803 3330 37c1 c0bf", RESPONSES[1], 222);
    let hex = "88c1 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3220 474d
        54c0 5a04 677a 6970 7738 666f 6f3d 4153 444a 4b48 514b 425a 584f 5157 454f 5049 5541 5851
        5745 4f49 553b 206d 6178 2d61 6765 3d33 3630 303b 2076 6572 7369 6f6e 3d31";
    example(&mut decoder, hex, RESPONSES[2], 215);
}

#[test]
fn huffman_coded_responses_of_the_specification_evict_entries() {
    let mut decoder = small();
    let hex = "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6
        2d1b ff6e 919d 29ad 1718 63c7 8f0b 97c8 e9ae 82ae 43d3";
    example(&mut decoder, hex, RESPONSES[0], 222);
    example(&mut decoder, "4883 640e ffc1 c0bf", RESPONSES[1], 222);
    let hex = "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab
        77ad 94e7 821d d7f2 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160
        65c0 03ed 4ee5 b106 3d50 07";
    example(&mut decoder, hex, RESPONSES[2], 215);
}

#[test]
fn integers_of_the_specification_are_read() {
    assert_eq!(Input(&[0x0a]).integer(5), Ok(10));
    assert_eq!(Input(&[0x1f, 0x9a, 0x0a]).integer(5), Ok(1337));
    assert_eq!(Input(&[0x2a]).integer(8), Ok(42));
    // Prefix bits above are others'.
    assert_eq!(Input(&[0xea]).integer(5), Ok(10));
    // Zeros in front of the last byte are allowed, within bounds.
    assert_eq!(Input(&[0x1f, 0x80, 0x80, 0x80, 0x00]).integer(5), Ok(31));
    assert_eq!(Input(&[0x1f, 0xff, 0xff, 0xff, 0x7f]).integer(5), Ok((1 << 28) - 1 + 31));
}

#[test]
fn an_integer_that_overflows_is_refused() {
    assert_eq!(Input(&[0x1f, 0xff, 0xff, 0xff, 0xff, 0x01]).integer(5), Err(HpackError::Integer));
    assert_eq!(Input(&[0x1f, 0x80, 0x80, 0x80, 0x80, 0x00]).integer(5), Err(HpackError::Integer));
    assert_eq!(error(&[0xff; 40]), HpackError::Integer);
    assert_eq!(
        error(&[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]),
        HpackError::Integer
    );
}

#[test]
fn an_index_without_an_entry_is_refused() {
    assert_eq!(error(&[0x80]), HpackError::Index);
    // 62: the table is empty.
    assert_eq!(error(&[0xbe]), HpackError::Index);
    assert_eq!(error(&[0x7e, 0]), HpackError::Index);
    assert_eq!(error(&[0x0f, 62 - 15, 0]), HpackError::Index);
    assert_eq!(error(&[0xff, 0xff, 0xff, 0xff, 0x7f]), HpackError::Index);
    // One entry, and the one behind it.
    assert_eq!(lines_of(&mut Decoder::new(INITIAL), &[0x41, 0, 0xbe]).unwrap().len(), 2);
    assert_eq!(error(&[0x41, 0, 0xbf]), HpackError::Index);
}

#[test]
fn a_block_that_ends_within_a_line_is_refused() {
    let block = bytes("8287 85 400a 6375 7374 6f6d 2d6b 6579 8925 a849 e95b b8e8 b4bf 0f2e 0161 5f 0161");
    let whole = lines_of(&mut Decoder::new(INITIAL), &block).unwrap();
    for end in 0..block.len() {
        match lines_of(&mut Decoder::new(INITIAL), &block[..end]) {
            Ok(lines) => assert!(whole.starts_with(&lines) && lines.len() < whole.len()),
            Err(error) => assert_eq!(error, HpackError::Truncated, "{end}"),
        }
    }
}

#[test]
fn strings_that_are_no_huffman_code_are_refused() {
    assert_eq!(error(&[0x00, 0x81, 0xff, 0x00]), HpackError::Huffman);
    assert_eq!(error(&[0x01, 0x81, 0x00]), HpackError::Huffman);
    assert_eq!(error(&[0x01, 0x84, 0xff, 0xff, 0xff, 0xff]), HpackError::Huffman);
}

#[test]
fn a_table_size_update_stands_before_lines_only() {
    let mut decoder = Decoder::new(INITIAL);
    assert_eq!(lines_of(&mut decoder, &[0x20, 0x3f, 0xe1, 0x1f, 0x82]).unwrap().len(), 1);
    assert_eq!(lines_of(&mut decoder, &[0x82, 0x20]), Err(HpackError::LateUpdate));
    assert_eq!(error(&[0x41, 0, 0x20]), HpackError::LateUpdate);
}

#[test]
fn a_table_is_no_larger_than_we_said() {
    // 4,096 and one more.
    assert_eq!(lines_of(&mut Decoder::new(INITIAL), &[0x3f, 0xe1, 0x1f]), Ok(vec![]));
    assert_eq!(error(&[0x3f, 0xe2, 0x1f]), HpackError::LargeUpdate);
    assert_eq!(lines_of(&mut Decoder::new(INITIAL + 1), &[0x3f, 0xe2, 0x1f]), Ok(vec![]));
    // Before it has read our settings the peer may use what the protocol gives.
    assert_eq!(lines_of(&mut Decoder::new(0), &[0x3f, 0xe1, 0x1f]), Ok(vec![]));
}

#[test]
fn a_line_larger_than_the_table_empties_it() {
    let mut decoder = Decoder::new(INITIAL);
    let mut block = vec![0x41, 0];
    for length in [INITIAL - OVERHEAD - 1, INITIAL - OVERHEAD] {
        literal(&mut block, true, b"n", &vec![b'v'; length]);
    }
    // The first just fits, and only it.
    assert_eq!(lines_of(&mut decoder, &block).unwrap().len(), 3);
    assert_eq!(decoder.table.size(), 0);
    decoder.rest();
    assert_eq!(decoder.table.memory(), 0);
}

#[test]
fn an_entry_may_take_its_name_from_the_one_that_it_evicts() {
    let mut decoder = Decoder::new(INITIAL);
    let mut block = Vec::new();
    let name = vec![b'n'; 3000];
    literal(&mut block, true, &name, b"1");
    block.extend([0x7e, 1, b'2', 0xbe]);
    let lines = lines_of(&mut decoder, &block).unwrap();
    let expected = [(name.clone(), b"1".to_vec()), (name.clone(), b"2".to_vec()), (name, b"2".to_vec())];
    assert_eq!(lines, expected);
    assert_eq!(decoder.table.size(), 3000 + 1 + OVERHEAD);
}

#[test]
fn lines_beyond_the_budget_are_not_told_but_kept_in_the_table() {
    let mut decoder = Decoder::new(INITIAL);
    let mut block = vec![0x82];
    literal(&mut block, true, b"name", b"value");
    let mut told = 0;
    let decoded = decoder.decode(&block, 42 + 41, &mut |_, _| told += 1).unwrap();
    assert_eq!((told, decoded), (2, Decoded { size: 42 + 41, truncated: false }));
    let decoded = decoder.decode(&block, 42 + 41 - 1, &mut |_, _| told += 1).unwrap();
    assert_eq!((told, decoded), (3, Decoded { size: 42 + 41, truncated: true }));
    let line = (b"name".to_vec(), b"value".to_vec());
    assert_eq!(lines_of(&mut decoder, &[0xbe, 0xbf]), Ok(vec![line.clone(), line]));
}

#[test]
fn a_bomb_is_not_told_and_ends() {
    let mut decoder = Decoder::new(INITIAL);
    let mut block = Vec::new();
    literal(&mut block, true, b"n", &vec![b'v'; INITIAL - OVERHEAD - 1]);
    lines_of(&mut decoder, &block).unwrap();
    let mut told = 0;
    // 200 times a whole table fit into what is decoded beyond the budget, 100,000 do not.
    let decoded = decoder.decode(&[0xbe; 200], 8192, &mut |_, _| told += 1).unwrap();
    assert_eq!((told, decoded), (2, Decoded { size: 200 * INITIAL, truncated: true }));
    let bomb = decoder.decode(&vec![0xbe; 100_000], 8192, &mut |_, _| told += 1);
    assert_eq!((told, bomb), (4, Err(HpackError::Excess)));
    assert!(decoder.table.memory() <= 2 * INITIAL + 128 * 12);
}

#[test]
fn a_decoder_at_rest_owns_its_entries_only() {
    let mut decoder = Decoder::new(INITIAL);
    let mut block = vec![0x40];
    coded(&mut block, b"name");
    coded(&mut block, &[b'v'; 2000]);
    lines_of(&mut decoder, &block).unwrap();
    assert_eq!(decoder.scratch.capacity(), 0);
    lines_of(&mut decoder, &bytes("418c f1e3 c2e5 f23a 6ba0 ab90 f4ff")).unwrap();
    assert!(decoder.scratch.capacity() > 0);
    decoder.rest();
    assert_eq!(decoder.scratch.capacity(), 0);
    assert_eq!(lines_of(&mut decoder, &[0xbf]).unwrap()[0].1.len(), 2000);
    // Text, and less than the overhead that an entry counts.
    assert!(decoder.table.memory() <= decoder.table.size());
    lines_of(&mut decoder, &[0x20]).unwrap();
    decoder.rest();
    assert_eq!(decoder.table.memory(), 0);
}

/// Appends an integer (5.1) to what the prefix' first byte already says.
fn integer(block: &mut Vec<u8>, kind: u8, prefix: u32, value: usize) {
    let mask = (1 << prefix) - 1;
    if value < mask {
        return block.push(kind | value as u8);
    }
    block.push(kind | mask as u8);
    let mut rest = value - mask;
    while rest >= 128 {
        block.push(rest as u8 | 128);
        rest >>= 7;
    }
    block.push(rest as u8);
}

fn plain(block: &mut Vec<u8>, text: &[u8]) {
    integer(block, 0, 7, text.len());
    block.extend_from_slice(text);
}

fn coded(block: &mut Vec<u8>, text: &[u8]) {
    let mut code = Vec::new();
    huffman::encode(text, &mut code);
    integer(block, 0x80, 7, code.len());
    block.extend_from_slice(&code);
}

fn literal(block: &mut Vec<u8>, kept: bool, name: &[u8], value: &[u8]) {
    block.push(if kept { 0x40 } else { 0 });
    plain(block, name);
    plain(block, value);
}

/// The dynamic table as the RFC tells it, with no thought of speed.
#[derive(Default)]
struct Model {
    entries: Lines,
    max: usize,
}

impl Model {
    fn get(&self, index: usize) -> (Vec<u8>, Vec<u8>) {
        match STATIC.get(index - 1) {
            Some((name, value)) => (name.to_vec(), value.to_vec()),
            None => self.entries[index - 1 - STATIC.len()].clone(),
        }
    }

    fn size(&self) -> usize {
        self.entries.iter().map(|(name, value)| name.len() + value.len() + OVERHEAD).sum()
    }

    fn resize(&mut self, max: usize) {
        self.max = max;
        while self.size() > max {
            self.entries.pop();
        }
    }

    fn insert(&mut self, line: (Vec<u8>, Vec<u8>)) {
        self.entries.insert(0, line);
        self.resize(self.max);
    }
}

/// One thing that an encoder may write. Indices are taken modulo what there is.
#[derive(Debug, Clone)]
enum Step {
    Resize(usize),
    Indexed(usize),
    Named { kind: u8, index: usize, value: Vec<u8>, huffman: bool },
    Literal { kind: u8, name: Vec<u8>, value: Vec<u8>, huffman: bool },
    NewBlock,
}

fn text() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => "[a-z0-9 -]{0,20}".prop_map(String::into_bytes),
        2 => prop::collection::vec(any::<u8>(), 0..300),
        1 => (0..5000_usize, any::<u8>()).prop_map(|(length, byte)| vec![byte; length]),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    // 6.2: with indexing, without, never.
    let kind = || prop_oneof![4 => Just(0x40_u8), 1 => Just(0), 1 => Just(0x10)];
    prop_oneof![
        1 => (0..=INITIAL).prop_map(Step::Resize),
        6 => any::<usize>().prop_map(Step::Indexed),
        4 => (kind(), any::<usize>(), text(), any::<bool>())
            .prop_map(|(kind, index, value, huffman)| Step::Named { kind, index, value, huffman }),
        8 => (kind(), text(), text(), any::<bool>())
            .prop_map(|(kind, name, value, huffman)| Step::Literal { kind, name, value, huffman }),
        2 => Just(Step::NewBlock),
    ]
}

proptest! {
    #[test]
    fn whatever_an_encoder_may_write_is_read(steps in prop::collection::vec(step(), 0..120)) {
        let mut decoder = Decoder::new(INITIAL);
        let mut model = Model { max: INITIAL, ..Model::default() };
        let (mut block, mut lines) = (Vec::new(), Lines::new());
        for step in steps.into_iter().chain([Step::NewBlock]) {
            let count = STATIC.len() + model.entries.len();
            let string = |huffman| if huffman { coded } else { plain };
            match step {
                Step::Resize(max) if lines.is_empty() => {
                    integer(&mut block, 0x20, 5, max);
                    model.resize(max);
                }
                Step::Resize(_) => {}
                Step::Indexed(index) => {
                    integer(&mut block, 0x80, 7, index % count + 1);
                    lines.push(model.get(index % count + 1));
                }
                Step::Named { kind, index, value, huffman } => {
                    integer(&mut block, kind, if kind == 0x40 { 6 } else { 4 }, index % count + 1);
                    string(huffman)(&mut block, &value);
                    lines.push((model.get(index % count + 1).0, value));
                    if kind == 0x40 {
                        model.insert(lines.last().unwrap().clone());
                    }
                }
                Step::Literal { kind, name, value, huffman } => {
                    block.push(kind);
                    string(huffman)(&mut block, &name);
                    string(huffman)(&mut block, &value);
                    lines.push((name, value));
                    if kind == 0x40 {
                        model.insert(lines.last().unwrap().clone());
                    }
                }
                Step::NewBlock => {
                    prop_assert_eq!(lines_of(&mut decoder, &block), Ok(std::mem::take(&mut lines)));
                    prop_assert_eq!(decoder.table.size(), model.size());
                    prop_assert!(decoder.table.memory() <= 2 * INITIAL + 128 * 12);
                    decoder.rest();
                    block.clear();
                }
            }
        }
    }

    #[test]
    fn what_another_encoder_writes_is_read(
        blocks in prop::collection::vec(prop::collection::vec((text(), text(), 0..32_u8), 0..20), 1..10),
    ) {
        let mut decoder = Decoder::new(INITIAL);
        let mut encoder = httlib_hpack::Encoder::default();
        for lines in blocks {
            let mut block = Vec::new();
            for (name, value, flags) in &lines {
                encoder.encode((name.clone(), value.clone(), *flags), &mut block).unwrap();
            }
            let lines = lines.into_iter().map(|(name, value, _)| (name, value)).collect();
            prop_assert_eq!(lines_of(&mut decoder, &block), Ok(lines));
        }
    }

    #[test]
    fn arbitrary_bytes_are_lines_or_an_error(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 1..8)) {
        let mut decoder = Decoder::new(INITIAL);
        for block in blocks {
            if lines_of(&mut decoder, &block).is_err() {
                break;
            }
        }
    }

    #[test]
    fn what_we_write_is_read_by_us_and_by_another(
        lines in prop::collection::vec((name(), text()), 0..20), status in 100..1000_u16, method in name(), path in text(),
    ) {
        let mut block = Vec::new();
        let mut expected: Vec<(&[u8], Vec<u8>)> = Vec::new();
        encode::encode_status(status, &mut block);
        expected.push((b":status", status.to_string().into_bytes()));
        encode::encode_method(&method, &mut block);
        expected.push((b":method", method));
        encode::encode_path(&path, &mut block);
        expected.push((b":path", path.clone()));
        encode::encode_scheme(&path, &mut block);
        expected.push((b":scheme", path.clone()));
        encode::encode_authority(&path, &mut block);
        expected.push((b":authority", path.clone()));
        encode::encode_protocol(&path, &mut block);
        expected.push((b":protocol", path));
        let mut expected: Lines = expected.into_iter().map(|(name, value)| (name.to_vec(), value)).collect();
        for (name, value) in lines {
            encode::encode_line(&name, &value, &mut block);
            expected.push((name.to_ascii_lowercase(), value));
        }
        let mut decoder = Decoder::new(INITIAL);
        prop_assert_eq!(lines_of(&mut decoder, &block), Ok(expected.clone()));
        prop_assert_eq!(decoder.table.memory(), 0);
        let mut other = Vec::new();
        httlib_hpack::Decoder::default().decode(&mut block, &mut other).unwrap();
        prop_assert_eq!(other.into_iter().map(|(name, value, _)| (name, value)).collect::<Lines>(), expected);
    }
}

/// Names as they are, and those of the static table in any case.
fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        text(),
        (0..STATIC.len()).prop_map(|index| STATIC[index].0.to_vec()),
        (14..STATIC.len()).prop_map(|index| STATIC[index].0.to_ascii_uppercase()),
    ]
}
