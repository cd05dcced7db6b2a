use proptest::prelude::*;

use super::*;

#[test]
fn spans_are_written_as_the_gateway_api_writes_them() {
    for (text, millis) in [
        ("0s", 0),
        ("0h0m0s0ms", 0),
        ("1500ms", 1500),
        ("2s", 2000),
        ("1m30s", 90_000),
        ("30s1m", 90_000),
        ("1h1m1s1ms", 3_661_001),
        ("99999s", 99_999_000),
        ("1000h", Span::MAX_MILLIS),
    ] {
        assert_eq!(text.parse(), Ok(Span(millis)), "{text}");
    }
    for text in [
        "",
        "1",
        "s",
        "-1s",
        "1.5s",
        "1d",
        "100000s",
        "1s1s1s1s1s",
        "1 s",
        "1s ",
        "1S",
        "1001h",
        "1000h1ms",
        "99999h",
        "１s",
    ] {
        assert!(text.parse::<Span>().is_err(), "{text}");
    }
}

#[test]
fn decimals_are_exact() {
    for (json, per_million) in
        [("0", 0), ("100", 1_000_000), ("0.5", 5000), ("0.0001", 1), ("99.9999", 999_999), ("1.0", 10_000)]
    {
        assert_eq!(serde_json::from_str::<Percent>(json).unwrap(), Percent(per_million), "{json}");
    }
    for json in ["-1", "100.0001", "101", "0.00001", "1e300", "\"5\"", "null", "-0.5"] {
        assert!(serde_json::from_str::<Percent>(json).is_err(), "{json}");
    }
    for json in ["0", "0.0001", "10000001", "-1"] {
        assert!(serde_json::from_str::<Rate>(json).is_err(), "{json}");
    }
}

#[test]
fn what_is_retried_has_names_and_numbers() {
    for (json, on) in [
        ("\"5xx\"", RetryOn::ServerError),
        ("503", RetryOn::Status(503)),
        ("\"503\"", RetryOn::Status(503)),
        ("\"resource-exhausted\"", RetryOn::Grpc(GrpcCode(8))),
    ] {
        assert_eq!(serde_json::from_str::<RetryOn>(json).unwrap(), on, "{json}");
    }
    for json in ["200", "600", "\"ok\"", "\"4xx\"", "\"Reset\"", "-1", "503.5", "true"] {
        assert!(serde_json::from_str::<RetryOn>(json).is_err(), "{json}");
    }
    assert_eq!(serde_json::from_str::<GrpcCode>("14").unwrap(), GrpcCode::UNAVAILABLE);
    assert!(serde_json::from_str::<GrpcCode>("17").is_err());
}

proptest! {
    #[test]
    fn values_read_back(millis in 0..=Span::MAX_MILLIS, per_million in 0..=1_000_000_u32, thousandths in 1..=10_000_000_000_u64) {
        let span = Span(millis);
        prop_assert_eq!(span.to_string().parse(), Ok(span));
        let percent = Percent(per_million);
        let text = serde_json::to_string(&percent).unwrap();
        prop_assert_eq!(serde_json::from_str::<Percent>(&text).unwrap(), percent);
        let rate = Rate(thousandths);
        let text = serde_json::to_string(&rate).unwrap();
        prop_assert_eq!(serde_json::from_str::<Rate>(&text).unwrap(), rate);
    }

    #[test]
    fn no_text_makes_spans_panic(text in "[0-9hms]{0,30}", any in any::<String>()) {
        let _ = text.parse::<Span>();
        let _ = any.parse::<Span>();
        let _ = any.parse::<RetryOn>();
    }
}
