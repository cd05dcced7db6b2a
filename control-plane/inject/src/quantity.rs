//! Quantities of Kubernetes (`100m`, `64Mi`, `1.5`, `2e3`), as far as they must be judged: they are compared and never
//! rewritten.

/// A quantity in thousand-millionths of its unit. `None`: no quantity, negative, or larger than any machine.
pub(crate) fn nanos(text: &str) -> Option<u128> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || number.len() > 24 {
        return None;
    }
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    // Of the units a quantity may be written in; nano first, because everything is counted in it.
    let (factor, exponent): (u128, i32) = match suffix {
        "n" => (1, 0),
        "u" => (1, 3),
        "m" => (1, 6),
        "" => (1, 9),
        "k" => (1, 12),
        "M" => (1, 15),
        "G" => (1, 18),
        "T" => (1, 21),
        "P" => (1, 24),
        "Ki" => (1 << 10, 9),
        "Mi" => (1 << 20, 9),
        "Gi" => (1 << 30, 9),
        "Ti" => (1 << 40, 9),
        "Pi" => (1 << 50, 9),
        _ => (1, 9 + suffix.strip_prefix(['e', 'E'])?.parse::<i8>().map(i32::from).ok()?),
    };
    let exponent = exponent - i32::try_from(fraction.len()).ok()?;
    let scaled = digits.checked_mul(factor)?;
    let power = 10_u128.checked_pow(exponent.unsigned_abs())?;
    if exponent >= 0 { scaled.checked_mul(power) } else { Some(scaled.div_ceil(power)) }
}

#[cfg(test)]
mod tests {
    use super::nanos;

    #[test]
    fn the_same_amount_in_other_words() {
        for (one, other) in [
            ("1", "1000m"),
            ("0.5", "500m"),
            ("1Ki", "1024"),
            ("1.5Gi", "1536Mi"),
            ("2e3", "2k"),
            (".5", "500m"),
        ] {
            assert_eq!(nanos(one), nanos(other), "{one} {other}");
            assert!(nanos(one).is_some(), "{one}");
        }
        assert!(nanos("100m") < nanos("1"));
        assert!(nanos("64Mi") > nanos("64M"));
    }

    #[test]
    fn what_is_no_quantity() {
        for text in [
            "",
            ".",
            "-1",
            "1 Mi",
            "1mi",
            "1.2.3",
            "MiB",
            "1MiB",
            "e3",
            "1e",
            "99999999999999999999999999",
            "1e127",
            "٣",
        ] {
            assert_eq!(nanos(text), None, "{text}");
        }
    }
}
