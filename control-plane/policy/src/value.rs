//! Values with a spelling of their own: lengths of time, percentages, rates, gRPC codes.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::bounds::MAX_SPAN;
use crate::schema::rules::{SPAN, cel, span};

/// A length of time as the Gateway API writes it (GEP-2257): one to four numbers of up to five digits, each with `h`, `m`, `s` or `ms`,
/// as in `1m30s`. At most 1000 hours, which fits the wire's milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(u32);

impl Span {
    /// The longest: 1000 hours, in milliseconds.
    pub const MAX_MILLIS: u32 = 1000 * 3_600_000;

    /// Of so many milliseconds, at most [`Span::MAX_MILLIS`].
    pub const fn from_millis(millis: u32) -> Self {
        Self(if millis > Self::MAX_MILLIS { Self::MAX_MILLIS } else { millis })
    }

    /// In milliseconds.
    pub const fn millis(self) -> u32 {
        self.0
    }

    /// As the standard library's type.
    pub const fn duration(self) -> Duration {
        Duration::from_millis(self.0 as u64)
    }
}

const NO_SPAN: &str =
    "is no length of time: write numbers with h, m, s or ms, as in `1m30s`, `2s` or `250ms`";

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let shown: String = text.chars().take(32).collect();
        let fault = || format!("`{}` {NO_SPAN}", shown.escape_debug());
        let mut rest = text;
        let mut millis: u64 = 0;
        for part in 0.. {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let (number, tail) = rest.split_at(digits);
            // `ms` before `m` and `s`.
            let unit = [("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1000)]
                .into_iter()
                .find(|(unit, _)| tail.starts_with(unit));
            let (Some((unit, scale)), 1..=5, 0..4) = (unit, digits, part) else { return Err(fault()) };
            millis += number.parse::<u64>().map_err(|_| fault())? * scale;
            rest = &tail[unit.len()..];
            if rest.is_empty() {
                break;
            }
        }
        match u32::try_from(millis) {
            Ok(millis) if millis <= Self::MAX_MILLIS => Ok(Self(millis)),
            _ => Err(format!("`{shown}` is too long: at most 1000h")),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("0s");
        }
        let mut rest = self.0;
        for (unit, scale) in [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)] {
            if rest >= scale {
                write!(f, "{}{unit}", rest / scale)?;
                rest %= scale;
            }
        }
        Ok(())
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Spans;
        impl Visitor<'_> for Spans {
            type Value = Span;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a length of time with a unit, as in `2s`")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Span, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Spans)
    }
}

impl JsonSchema for Span {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "maxLength": MAX_SPAN, "pattern": SPAN, "x-kubernetes-validations": span()})
    }
}

/// A part of a hundred, with up to four decimals.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Percent(u32);

impl Percent {
    /// In units of a ten-thousandth of a percent.
    const SCALE: u32 = 10_000;

    /// Of so many in a million, at most a million.
    pub const fn from_per_million(per_million: u32) -> Self {
        Self(if per_million > 100 * Self::SCALE { 100 * Self::SCALE } else { per_million })
    }

    /// Of a million.
    pub const fn per_million(self) -> u32 {
        self.0
    }
}

impl Serialize for Percent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_decimal(u64::from(self.0), u64::from(Self::SCALE), serializer)
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let decimal = Decimal {
            scale: Self::SCALE,
            max: 100,
            what: "a percentage: 0 to 100, with up to four decimals",
        };
        // At most 100 times the scale.
        deserializer.deserialize_any(decimal).map(|parts| Self(u32::try_from(parts).unwrap_or(u32::MAX)))
    }
}

impl JsonSchema for Percent {
    fn schema_name() -> Cow<'static, str> {
        "Percent".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "number", "minimum": 0, "maximum": 100})
    }
}

/// So many a second, with up to three decimals: more than 0, at most 10,000,000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(u64);

impl Rate {
    const SCALE: u32 = 1000;
    /// More than one sidecar can take.
    const MAX: u32 = 10_000_000;

    /// Of so many thousandths.
    pub const fn from_thousandths(thousandths: u64) -> Self {
        Self(thousandths)
    }

    /// In thousandths.
    pub const fn thousandths(self) -> u64 {
        self.0
    }
}

impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_decimal(self.0, u64::from(Self::SCALE), serializer)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let what = "a rate: more than 0, at most 10000000, with up to three decimals";
        match deserializer.deserialize_any(Decimal { scale: Self::SCALE, max: Self::MAX, what })? {
            0 => Err(de::Error::custom(format!("0 is not {what}; leave the field out for no bound"))),
            thousandths => Ok(Self(thousandths)),
        }
    }
}

impl JsonSchema for Rate {
    fn schema_name() -> Cow<'static, str> {
        "Rate".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // The API server compares whole numbers with the whole part of a minimum.
        json_schema!({
            "type": "number",
            "minimum": 0.001,
            "maximum": Self::MAX,
            "x-kubernetes-validations": cel(&[("self > 0.0", "is no rate: it is more than 0; leave the field out for no bound")]),
        })
    }
}

/// A number with a few decimals, kept as a whole number of its smallest parts.
struct Decimal {
    scale: u32,
    max: u32,
    what: &'static str,
}

impl Visitor<'_> for Decimal {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<u64, E> {
        if value > u64::from(self.max) {
            return Err(E::custom(format!("{value} is not {}", self.what)));
        }
        Ok(value * u64::from(self.scale))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<u64, E> {
        match u64::try_from(value) {
            Ok(value) => self.visit_u64(value),
            Err(_) => Err(E::custom(format!("{value} is not {}", self.what))),
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0 to max * scale, which an f64 holds"
    )]
    fn visit_f64<E: de::Error>(self, value: f64) -> Result<u64, E> {
        let parts = value * f64::from(self.scale);
        let whole = parts.round();
        // What is left of a decimal fraction in binary is far below this.
        if !(0.0..=f64::from(self.max)).contains(&value) || (parts - whole).abs() > 1e-4 {
            return Err(E::custom(format!("{value} is not {}", self.what)));
        }
        Ok(whole as u64)
    }
}

#[expect(clippy::cast_precision_loss, reason = "at most 10,000,000,000, which an f64 holds")]
fn serialize_decimal<S: Serializer>(parts: u64, scale: u64, serializer: S) -> Result<S::Ok, S::Error> {
    if parts.is_multiple_of(scale) {
        serializer.serialize_u64(parts / scale)
    } else {
        serializer.serialize_f64(parts as f64 / scale as f64)
    }
}

/// A status code of gRPC, 0 to 16. Written as its number or its name, as in `unavailable`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrpcCode(u8);

/// By number; the names are those of the gRPC specification ("Status codes and their use in gRPC").
const GRPC_NAMES: [&str; 17] = [
    "ok",
    "cancelled",
    "unknown",
    "invalid-argument",
    "deadline-exceeded",
    "not-found",
    "already-exists",
    "permission-denied",
    "resource-exhausted",
    "failed-precondition",
    "aborted",
    "out-of-range",
    "unimplemented",
    "internal",
    "unavailable",
    "data-loss",
    "unauthenticated",
];

impl GrpcCode {
    /// `unavailable`.
    pub const UNAVAILABLE: Self = Self(14);

    /// Of a number, 0 to 16.
    pub fn new(code: u32) -> Option<Self> {
        u8::try_from(code).ok().filter(|code| usize::from(*code) < GRPC_NAMES.len()).map(Self)
    }

    /// The number.
    pub const fn code(self) -> u32 {
        self.0 as u32
    }

    /// The name, as in `resource-exhausted`.
    pub fn name(self) -> &'static str {
        GRPC_NAMES[usize::from(self.0)]
    }

    fn named(name: &str) -> Option<Self> {
        GRPC_NAMES.iter().zip(0..).find(|(known, _)| **known == name).map(|(_, code)| Self(code))
    }
}

impl fmt::Display for GrpcCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for GrpcCode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for GrpcCode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Codes;
        impl Visitor<'_> for Codes {
            type Value = GrpcCode;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a gRPC status: 0 to 16, or its name, as in `unavailable`")
            }
            fn visit_u64<E: de::Error>(self, code: u64) -> Result<GrpcCode, E> {
                let known = u32::try_from(code).ok().and_then(GrpcCode::new);
                known.ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(code), &self))
            }
            fn visit_str<E: de::Error>(self, name: &str) -> Result<GrpcCode, E> {
                GrpcCode::named(name).ok_or_else(|| E::invalid_value(de::Unexpected::Str(name), &self))
            }
        }
        deserializer.deserialize_any(Codes)
    }
}

impl JsonSchema for GrpcCode {
    fn schema_name() -> Cow<'static, str> {
        "GrpcCode".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let names = GRPC_NAMES.join("', '");
        let rule = format!("type(self) == int ? self >= 0 && self <= 16 : self in ['{names}']");
        // Kubernetes' way to say that it is one or the other (structural schemas know no list of types).
        json_schema!({
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": true,
            "x-kubernetes-validations": cel(&[(&rule, "is no gRPC status: 0 to 16, or its name, as in `unavailable`")]),
        })
    }
}

/// What is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RetryOn {
    /// `5xx`: any status from 500 to 599.
    ServerError,
    /// `gateway-error`: 502, 503 and 504.
    GatewayError,
    /// `reset`: a connection that ended, or a stream that was reset, before there was an answer.
    Reset,
    /// `connect-failure`: no connection came to be.
    ConnectFailure,
    /// `per-try-timeout`: a try that took longer than `timeouts.perTry`.
    PerTryTimeout,
    /// A status, 400 to 599.
    Status(u16),
    /// A gRPC status.
    Grpc(GrpcCode),
}

impl RetryOn {
    /// Where `on` is left out.
    pub const DEFAULT: [Self; 3] = [Self::GatewayError, Self::Reset, Self::ConnectFailure];

    fn word(self) -> Option<&'static str> {
        match self {
            Self::ServerError => Some("5xx"),
            Self::GatewayError => Some("gateway-error"),
            Self::Reset => Some("reset"),
            Self::ConnectFailure => Some("connect-failure"),
            Self::PerTryTimeout => Some("per-try-timeout"),
            Self::Grpc(code) => Some(code.name()),
            Self::Status(_) => None,
        }
    }
}

const RETRY_ON: &str = "something to retry on: 5xx, gateway-error, reset, connect-failure, per-try-timeout, \
    a status from 400 to 599, or the name of a gRPC status, as in `unavailable`";

impl FromStr for RetryOn {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words =
            [Self::ServerError, Self::GatewayError, Self::Reset, Self::ConnectFailure, Self::PerTryTimeout];
        let named = words.into_iter().find(|on| on.word() == Some(text));
        let grpc = || GrpcCode::named(text).filter(|code| code.code() != 0).map(Self::Grpc);
        let status = || text.parse().ok().filter(|status| (400..600).contains(status)).map(Self::Status);
        named.or_else(grpc).or_else(status).ok_or_else(|| {
            let shown: String = text.chars().take(32).collect();
            format!("`{}` is not {RETRY_ON}", shown.escape_debug())
        })
    }
}

impl fmt::Display for RetryOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, self.word()) {
            (Self::Status(status), _) => write!(f, "{status}"),
            (_, word) => f.write_str(word.unwrap_or_default()),
        }
    }
}

impl Serialize for RetryOn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Status(status) => serializer.serialize_u16(*status),
            _ => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for RetryOn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Conditions;
        impl Visitor<'_> for Conditions {
            type Value = RetryOn;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(RETRY_ON)
            }
            fn visit_u64<E: de::Error>(self, status: u64) -> Result<RetryOn, E> {
                status.to_string().parse().map_err(E::custom)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<RetryOn, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Conditions)
    }
}

impl JsonSchema for RetryOn {
    fn schema_name() -> Cow<'static, str> {
        "RetryOn".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // `ok` is nothing to try again.
        let names = GRPC_NAMES[1..].join("|");
        let words = "5xx|gateway-error|reset|connect-failure|per-try-timeout";
        // No rule in CEL: the API server takes a text of this type for one that is as long as a request can be.
        json_schema!({
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": true,
            "minimum": 400,
            "maximum": 599,
            "pattern": format!("^([45][0-9][0-9]|{words}|{names})$"),
        })
    }
}

#[cfg(test)]
mod tests;
