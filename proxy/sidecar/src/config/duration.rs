//! Durations as people write them: `250ms`, `10s`, `5m`, `24h`.

use std::{fmt, str::FromStr, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A duration of whole milliseconds, written as a number and a unit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String", extend("pattern" = "^[0-9]+(ms|s|m|h)$"))]
pub struct ConfigDuration(Duration);

impl ConfigDuration {
    /// A duration of `millis` milliseconds.
    pub const fn from_millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// The duration; zero where the setting is off.
    pub const fn get(self) -> Duration {
        self.0
    }

    /// `None` where zero switches the setting off.
    pub fn enabled(self) -> Option<Duration> {
        (!self.0.is_zero()).then_some(self.0)
    }
}

impl FromStr for ConfigDuration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault =
            || format!("{text:?} is no duration: write a number and a unit, as in 250ms, 10s, 5m or 24h");
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit: u64 = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(fault()),
        };
        let number: u64 = number.parse().map_err(|_| fault())?;
        Ok(Self(Duration::from_millis(number.checked_mul(unit).ok_or_else(fault)?)))
    }
}

impl fmt::Display for ConfigDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        match millis {
            0 => f.write_str("0s"),
            _ if millis.is_multiple_of(3_600_000) => write!(f, "{}h", millis / 3_600_000),
            _ if millis.is_multiple_of(60_000) => write!(f, "{}m", millis / 60_000),
            _ if millis.is_multiple_of(1_000) => write!(f, "{}s", millis / 1_000),
            _ => write!(f, "{millis}ms"),
        }
    }
}

impl fmt::Debug for ConfigDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for ConfigDuration {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ConfigDuration> for String {
    fn from(duration: ConfigDuration) -> Self {
        duration.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        for text in ["0s", "250ms", "1500ms", "10s", "5m", "24h"] {
            assert_eq!(text.parse::<ConfigDuration>().unwrap().to_string(), text);
        }
        assert_eq!("1000ms".parse::<ConfigDuration>().unwrap().to_string(), "1s");
    }

    #[test]
    fn other_spellings_are_refused() {
        for text in [
            "",
            "s",
            "10",
            "-1s",
            "1.5s",
            "1 s",
            "1d",
            "10sec",
            "99999999999999999999s",
            "18446744073709551615h",
        ] {
            assert!(text.parse::<ConfigDuration>().is_err(), "{text}");
        }
    }
}
