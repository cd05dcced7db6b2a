//! Reads the Prometheus text that a sidecar's `/metrics` answers with: enough of the format for counters, histograms
//! and information metrics (<https://prometheus.io/docs/instrumenting/exposition_formats>).

use std::collections::BTreeMap;

/// One line of the exposition.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) value: f64,
}

impl Sample {
    /// The label's value, empty where it is absent.
    pub(super) fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// Every sample in `text`; lines that are none are passed over.
pub(super) fn parse(text: &str) -> Vec<Sample> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Sample> {
    let Some((name, rest)) = line.split_once('{') else {
        let (name, value) = line.split_once(' ')?;
        return Some(Sample { name: name.to_owned(), labels: BTreeMap::new(), value: first_number(value)? });
    };
    let (labels, rest) = parse_labels(rest)?;
    Some(Sample { name: name.to_owned(), labels, value: first_number(rest)? })
}

fn first_number(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

/// Labels up to the closing brace, and what follows it.
fn parse_labels(mut rest: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches(',');
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (name, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = after.char_indices();
        let end = loop {
            match characters.next()? {
                (at, '"') => break at + 1,
                (_, '\\') => match characters.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        labels.insert(name.to_owned(), value);
        rest = &after[end..];
    }
}

/// The value below which the fraction `q` of a histogram's observations lie, by linear interpolation inside the
/// bucket. `buckets`: upper bound (seconds) -> cumulative count. `None` without observations.
pub(super) fn quantile(q: f64, buckets: &[(f64, f64)]) -> Option<f64> {
    let total = buckets.last()?.1;
    if total <= 0.0 {
        return None;
    }
    let rank = q * total;
    let (mut lower, mut below) = (0.0, 0.0);
    for &(upper, cumulative) in buckets {
        if cumulative >= rank {
            if upper.is_infinite() {
                return Some(lower);
            }
            let inside = cumulative - below;
            return Some(if inside > 0.0 {
                lower + (upper - lower) * (rank - below) / inside
            } else {
                upper
            });
        }
        (lower, below) = (upper, cumulative);
    }
    Some(lower)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_names_labels_and_values() {
        let text = "# TYPE a counter\na_total{x=\"1\",y=\"q\\\"\\\\,}\"} 3\nb 2.5 1700000000\n# EOF\n";
        let samples = parse(text);
        assert_eq!(samples.len(), 2);
        assert_eq!(samples[0].label("y"), "q\"\\,}");
        assert_eq!(samples[0].value.to_bits(), 3.0_f64.to_bits());
        assert_eq!((samples[1].name.as_str(), samples[1].value.to_bits()), ("b", 2.5_f64.to_bits()));
    }

    #[test]
    fn half_a_line_is_no_sample() {
        for text in ["a{", "a{x=", "a{x=\"", "a{x=\"1\"}", "a{x=\"1\"} z", "a"] {
            assert_eq!(parse(text), [], "{text}");
        }
    }

    #[test]
    fn quantiles_interpolate() {
        let buckets = [(0.001, 50.0), (0.01, 100.0), (f64::INFINITY, 100.0)];
        let close = |a: Option<f64>, b: f64| (a.unwrap() - b).abs() < 1e-9;
        assert!(close(quantile(0.5, &buckets), 0.001));
        assert!(close(quantile(0.99, &buckets), 0.00982));
        assert_eq!(quantile(0.5, &[]), None);
        assert_eq!(quantile(0.5, &[(1.0, 0.0)]), None);
    }
}
