//! How long an answer asks its reader to wait.
//!
//! A date is measured from the answer's own `Date`: whoever wrote one wrote the other, and no two clocks need to agree.

use std::time::Duration;

/// What is asked for where the answer says that it is not to be tried again, or not before a time that cannot be told.
pub(super) const NEVER: Duration = Duration::MAX;

/// What an answer asks for, by `grpc-retry-pushback-ms` (gRFC A6) where it is gRPC's, or by `Retry-After` (RFC 9110, 10.2.3).
/// A `Retry-After` that cannot be read asks for nothing.
pub(super) fn asked<'a>(is_grpc: bool, field: &impl Fn(&str) -> Option<&'a [u8]>) -> Option<Duration> {
    if is_grpc && let Some(value) = field("grpc-retry-pushback-ms") {
        // Negative or unreadable: not at all.
        return Some(number(value.trim_ascii()).map_or(NEVER, Duration::from_millis));
    }
    let value = field("retry-after")?.trim_ascii();
    if let Some(seconds) = number(value) {
        return Some(Duration::from_secs(seconds));
    }
    let until = imf_fixdate(value)?;
    let written = field("date").and_then(|date| imf_fixdate(date.trim_ascii()));
    Some(written.map_or(NEVER, |written| Duration::from_secs(until.saturating_sub(written))))
}

/// A number of decimal digits; one that is too large is the largest.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(
        text.iter()
            .fold(0, |value: u64, digit| value.saturating_mul(10).saturating_add(u64::from(digit - b'0'))),
    )
}

/// Seconds since 1970 of `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7). The two obsolete forms are not read: no
/// server that sends `Retry-After` is so old.
fn imf_fixdate(text: &[u8]) -> Option<u64> {
    const MONTHS: [&[u8]; 12] =
        [b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec"];
    let (_, rest) = text.split_at_checked(3)?;
    let separators =
        [(3, b','), (4, b' '), (7, b' '), (11, b' '), (16, b' '), (19, b':'), (22, b':'), (25, b' ')];
    let is_formed =
        text.len() == 29 && separators.iter().all(|(at, byte)| text[*at] == *byte) && rest.ends_with(b" GMT");
    if !is_formed {
        return None;
    }
    let field = |from: usize, to: usize| number(&text[from..to]);
    let month = MONTHS.iter().position(|name| *name == &text[8..11])? as u64 + 1;
    let (day, year) = (field(5, 7)?, field(12, 16)?);
    let (hour, minute, second) = (field(17, 19)?, field(20, 22)?, field(23, 25)?);
    if !(1..=31).contains(&day) || year < 1970 || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days since 1970, by years that begin in March, so that the leap day is the last.
    let (year, month) = if month < 3 { (year - 1, month + 9) } else { (year, month - 3) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1 - 719_468;
    Some(((days * 24 + hour) * 60 + minute) * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_read() {
        for (text, seconds) in [
            ("Thu, 01 Jan 1970 00:00:00 GMT", Some(0)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(784_111_777)),
            ("Tue, 29 Feb 2000 23:59:59 GMT", Some(951_868_799)),
            ("Wed, 25 Nov 2026 21:33:59 GMT", Some(1_795_642_439)),
            ("Sun, 06 Nov 1994 24:49:37 GMT", None),
            ("Sun, 06 Foo 1994 08:49:37 GMT", None),
            ("Sun, 00 Nov 1994 08:49:37 GMT", None),
            ("Sunday, 06-Nov-94 08:49:37 GMT", None),
            ("Sun, 06 Nov 1994 08:49:37 CET", None),
            ("Sun, 06 Nov 1969 08:49:37 GMT", None),
            ("", None),
        ] {
            assert_eq!(imf_fixdate(text.as_bytes()), seconds, "{text}");
        }
    }

    #[test]
    fn what_an_answer_asks_for() {
        const WRITTEN: &str = "Sun, 06 Nov 1994 08:49:37 GMT";
        const LATER: &str = "Sun, 06 Nov 1994 08:50:37 GMT";
        let of = |is_grpc, fields: &[(&str, &'static str)]| {
            asked(is_grpc, &|name: &str| {
                fields.iter().find(|field| field.0 == name).map(|field| field.1.as_bytes())
            })
        };
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        for (is_grpc, fields, expected) in [
            (false, &[][..], None),
            (false, &[("retry-after", "3")], seconds(3)),
            (false, &[("retry-after", "99999999999999999999999")], seconds(u64::MAX)),
            (false, &[("retry-after", "soon")], None),
            (false, &[("retry-after", "-3")], None),
            (false, &[("retry-after", LATER), ("date", WRITTEN)], seconds(60)),
            (false, &[("retry-after", WRITTEN), ("date", LATER)], seconds(0)),
            (false, &[("retry-after", LATER)], Some(NEVER)),
            (false, &[("grpc-retry-pushback-ms", "3")], None),
            (true, &[("grpc-retry-pushback-ms", "30")], Some(Duration::from_millis(30))),
            (true, &[("grpc-retry-pushback-ms", "-1")], Some(NEVER)),
            (true, &[("grpc-retry-pushback-ms", "x"), ("retry-after", "1")], Some(NEVER)),
            (true, &[("retry-after", "1")], seconds(1)),
        ] {
            assert_eq!(of(is_grpc, fields), expected, "{fields:?}");
        }
    }
}
