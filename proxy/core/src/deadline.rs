//! How long a caller is still willing to wait, as it says itself.
//!
//! gRPC has a header for it (grpc/doc/PROTOCOL-HTTP2.md), HTTP has none, so the mesh has one of its own. Both say a
//! duration, not a moment: no two clocks have to agree, and what the way here took is lost.
//!
//! A value that cannot be read is ignored. A deadline shortens what would be waited anyway, so nothing waits longer for
//! being without one; to refuse the request would make the mesh stricter than the servers behind it.

use std::{ops::Deref, time::Duration};

use crate::request::View;

/// Milliseconds that the caller waits for the whole response, for requests that are not gRPC. Not one of `outrigger-`: these end at
/// each application, and one that passes it on lets the whole chain stop in time.
pub const HEADER: &str = "request-timeout-ms";

/// [`HEADER`] in the case of a request's first name: what says of a whole head that its names begin with capitals is a letter, and of
/// one that mixes them a letter for each (see [`crate::case`]).
pub fn header_beside(name: Option<&[u8]>) -> &'static str {
    let has_capital = name.and_then(<[u8]>::first).is_some_and(u8::is_ascii_uppercase);
    if has_capital { "Request-Timeout-Ms" } else { HEADER }
}

/// The same of gRPC: at most eight digits and a unit.
pub const GRPC_HEADER: &str = "grpc-timeout";

/// What gRPC allows.
const MAX_GRPC_DIGITS: usize = 8;

/// Four months; no sum with a clock's time overflows.
const MAX_DIGITS: usize = 10;

/// gRPC's units, the finest first, in nanoseconds.
const UNITS: [(u8, u128); 6] = [
    (b'n', 1),
    (b'u', 1_000),
    (b'm', 1_000_000),
    (b'S', 1_000_000_000),
    (b'M', 60 * 1_000_000_000),
    (b'H', 3_600 * 1_000_000_000),
];

/// How long the caller waits; of several values the smallest. `None`: it does not say. Zero: no longer.
pub fn asked<V: View>(view: &V) -> Option<Duration> {
    let grpc = view.values(GRPC_HEADER).filter_map(read_grpc);
    let milliseconds =
        view.values(HEADER).filter_map(|value| Some(Duration::from_millis(digits(value, MAX_DIGITS)?)));
    grpc.chain(milliseconds).min()
}

fn read_grpc(value: &[u8]) -> Option<Duration> {
    let (unit, number) = value.split_last()?;
    let number = digits(number, MAX_GRPC_DIGITS)?;
    Some(match unit {
        b'n' => Duration::from_nanos(number),
        b'u' => Duration::from_micros(number),
        b'm' => Duration::from_millis(number),
        b'S' => Duration::from_secs(number),
        b'M' => Duration::from_secs(number * 60),
        b'H' => Duration::from_secs(number * 3_600),
        _ => return None,
    })
}

/// A number of 1 to `max` digits; `max` is at most 19, which a `u64` holds.
fn digits(text: &[u8], max: usize) -> Option<u64> {
    if text.is_empty() || text.len() > max || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(text.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}

/// A header's value, on the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Text {
    bytes: [u8; MAX_DIGITS],
    length: usize,
}

impl Text {
    /// `number` has at most [`MAX_DIGITS`] digits, one less if there is a unit.
    fn new(mut number: u64, unit: Option<u8>) -> Self {
        let mut bytes = [0; MAX_DIGITS];
        let mut length = 0;
        let mut push = |byte| {
            bytes[length] = byte;
            length += 1;
        };
        unit.into_iter().for_each(&mut push);
        loop {
            push(b"0123456789"[usize::try_from(number % 10).expect("a digit")]);
            number /= 10;
            if number == 0 {
                break;
            }
        }
        bytes[..length].reverse();
        Self { bytes, length }
    }
}

impl Deref for Text {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The value of [`GRPC_HEADER`] that says what is left: in the finest unit that has the digits for it, never more than
/// it is. gRPC has no zero; what is over is one nanosecond.
pub fn grpc_timeout(left: Duration) -> Text {
    let nanoseconds = left.as_nanos().max(1);
    let most = 10_u128.pow(8) - 1;
    let fits = |(_, unit): &&(u8, u128)| nanoseconds / unit <= most;
    let (unit, length) = UNITS.iter().find(fits).unwrap_or(&UNITS[UNITS.len() - 1]);
    let number = u64::try_from((nanoseconds / length).min(most)).expect("eight digits");
    Text::new(number, Some(*unit))
}

/// The value of [`HEADER`] that says what is left, never more than it is.
pub fn milliseconds(left: Duration) -> Text {
    let most = 10_u64.pow(10) - 1;
    Text::new(u64::try_from(left.as_millis()).map_or(most, |left| left.min(most)), None)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::request::Request;

    fn of(headers: &[(&str, &str)]) -> Option<Duration> {
        let request = headers
            .iter()
            .fold(Request::new("POST", "/"), |request, (name, value)| request.with(name, *value));
        asked(&request)
    }

    #[test]
    fn the_smallest_of_what_is_asked_holds() {
        let (ms, s) = (Duration::from_millis, Duration::from_secs);
        for (headers, expected) in [
            (&[][..], None),
            (&[("grpc-timeout", "5S")], Some(s(5))),
            (&[("grpc-timeout", "100m")], Some(ms(100))),
            (&[("grpc-timeout", "2M")], Some(s(120))),
            (&[("grpc-timeout", "1H")], Some(s(3_600))),
            (&[("grpc-timeout", "7u")], Some(Duration::from_micros(7))),
            (&[("grpc-timeout", "99999999n")], Some(Duration::from_nanos(99_999_999))),
            (&[("grpc-timeout", "0n")], Some(Duration::ZERO)),
            (&[("request-timeout-ms", "250")], Some(ms(250))),
            (&[("request-timeout-ms", "250"), ("grpc-timeout", "1S")], Some(ms(250))),
            (&[("request-timeout-ms", "2500"), ("grpc-timeout", "1S")], Some(s(1))),
            (&[("grpc-timeout", "2S"), ("grpc-timeout", "1S")], Some(s(1))),
            (&[("request-timeout-ms", "x"), ("grpc-timeout", "1S")], Some(s(1))),
        ] {
            assert_eq!(of(headers), expected, "{headers:?}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_ignored() {
        for value in ["", "S", "5", "5s", "-5S", "+5S", " 5S", "5 S", "1.5S", "123456789n", "5SS", "0x5S"] {
            assert_eq!(of(&[("grpc-timeout", value)]), None, "{value:?}");
        }
        for value in ["", "-1", "+1", "1.5", "5S", "12345678901", " 1"] {
            assert_eq!(of(&[("request-timeout-ms", value)]), None, "{value:?}");
        }
    }

    #[test]
    fn what_is_left_is_written_in_the_finest_unit() {
        for (left, text) in [
            (Duration::ZERO, "1n"),
            (Duration::from_nanos(99_999_999), "99999999n"),
            (Duration::from_millis(100), "100000u"),
            (Duration::from_secs(5), "5000000u"),
            (Duration::from_hours(1), "3600000m"),
            (Duration::from_secs(100_000_000), "1666666M"),
            (Duration::MAX, "99999999H"),
        ] {
            assert_eq!(std::str::from_utf8(&grpc_timeout(left)), Ok(text));
        }
        for (left, text) in [
            (Duration::ZERO, "0"),
            (Duration::from_micros(1_999), "1"),
            (Duration::from_mins(1), "60000"),
            (Duration::MAX, "9999999999"),
        ] {
            assert_eq!(std::str::from_utf8(&milliseconds(left)), Ok(text));
        }
    }

    proptest! {
        #[test]
        fn nobody_is_promised_more_than_is_left(nanoseconds in 1_u64..) {
            let left = Duration::from_nanos(nanoseconds);
            let read = asked(&Request::new("POST", "/").with("grpc-timeout", &*grpc_timeout(left))).unwrap();
            // Five digits are left where a unit is just large enough.
            prop_assert!(read <= left && left.saturating_sub(read) <= left / 100_000, "{:?} {:?}", read, left);
            let read = asked(&Request::new("GET", "/").with(HEADER, &*milliseconds(left))).unwrap();
            prop_assert!(read <= left);
        }

        #[test]
        fn any_value_is_read_without_a_panic(value in prop::collection::vec(any::<u8>(), 0..14)) {
            asked(&Request::new("POST", "/").with(HEADER, &*value).with(GRPC_HEADER, &*value));
        }
    }
}
