//! Rows, and what is read from them: medians, and ratios between peers.
//!
//! A ratio is taken within a round, where both sides met the same machine, and the median over the rounds is reported with
//! the least and the greatest. Medians of different rounds are not divided by each other.

use serde::Serialize;

use crate::peers::Peer;

/// One measurement of one case through one peer.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) case: &'static str,
    #[serde(serialize_with = "name")]
    pub(crate) peer: Peer,
    pub(crate) round: usize,
    pub(crate) operations: f64,
    /// Operations per second.
    pub(crate) rate: f64,
    /// Microseconds of CPU time that both proxies used for an operation.
    pub(crate) cpu_us: f64,
    pub(crate) client_cpu_us: f64,
    pub(crate) server_cpu_us: f64,
    /// Microseconds; 0 where latency means nothing.
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// Share of both processors' time that the host took.
    pub(crate) stolen: f64,
    /// Share of both processors' time that anybody used.
    pub(crate) busy: f64,
    /// Milliseconds of a fixed piece of work just before.
    pub(crate) spin_ms: f64,
    /// Tries that were thrown away for what the host took.
    pub(crate) discarded: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn name<S: serde::Serializer>(peer: &Peer, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(peer.name())
}

/// A median between the least and the greatest.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) greatest: f64,
}

impl Spread {
    /// `None` of nothing.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(*values.get(middle.checked_sub(1)?)?, *values.get(middle)?)
        } else {
            *values.get(middle)?
        };
        Some(Self { median, least: *values.first()?, greatest: *values.last()? })
    }
}

/// What is read from a row.
pub(crate) type Field = fn(&Row) -> f64;

/// All rows of a run.
#[derive(Default)]
pub(crate) struct Samples {
    pub(crate) rows: Vec<Row>,
}

impl Samples {
    /// A field of one case and peer over the rounds.
    pub(crate) fn spread(&self, case: &str, peer: Peer, field: Field) -> Option<Spread> {
        Spread::of(self.of(case, peer).map(field).collect())
    }

    /// The ratio of `peer` to `to` within each round.
    pub(crate) fn ratio(&self, case: &str, field: Field, peer: Peer, to: Peer) -> Option<Spread> {
        self.pairs(case, peer, to, |mine, theirs| {
            let theirs = field(theirs);
            (theirs > 0.0).then(|| field(mine) / theirs)
        })
    }

    /// What `peer` adds to the field of a direct call, within each round.
    pub(crate) fn added(&self, case: &str, field: Field, peer: Peer) -> Option<Spread> {
        self.pairs(case, peer, Peer::Direct, |mine, direct| Some(field(mine) - field(direct)))
    }

    /// The ratio of what `peer` adds to what `to` adds.
    pub(crate) fn added_ratio(&self, case: &str, field: Field, peer: Peer, to: Peer) -> Option<Spread> {
        self.pairs(case, peer, to, |mine, theirs| {
            let direct = field(self.of(case, Peer::Direct).find(|row| row.round == mine.round)?);
            let theirs = field(theirs) - direct;
            (theirs > 0.0).then(|| (field(mine) - direct) / theirs)
        })
    }

    /// The foreign peer with the least median.
    pub(crate) fn best(&self, case: &str, value: impl Fn(Peer) -> Option<Spread>) -> Option<Peer> {
        let mut peers: Vec<Peer> = self
            .rows
            .iter()
            .filter(|row| row.case == case && row.peer.is_foreign())
            .map(|row| row.peer)
            .collect();
        peers.sort();
        peers.dedup();
        let least = |peer: &Peer| value(*peer).map_or(f64::INFINITY, |spread| spread.median);
        peers.into_iter().min_by(|a, b| least(a).total_cmp(&least(b)))
    }

    fn of<'a>(&'a self, case: &'a str, peer: Peer) -> impl Iterator<Item = &'a Row> {
        self.rows.iter().filter(move |row| row.case == case && row.peer == peer)
    }

    fn pairs(
        &self,
        case: &str,
        peer: Peer,
        to: Peer,
        value: impl Fn(&Row, &Row) -> Option<f64>,
    ) -> Option<Spread> {
        let pair = |mine: &Row| {
            let theirs = self.of(case, to).find(|row| row.round == mine.round)?;
            value(mine, theirs)
        };
        Spread::of(self.of(case, peer).filter_map(pair).collect())
    }
}

/// A quantile of nanoseconds, in microseconds; 0 of nothing.
pub(crate) fn quantile_us(sorted: &[u64], q: f64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index below 2^52, never negative"
    )]
    let at = (sorted.len().saturating_sub(1) as f64 * q) as usize;
    #[expect(clippy::cast_precision_loss, reason = "latencies of seconds, in nanoseconds")]
    let nanoseconds = sorted.get(at).copied().unwrap_or(0) as f64;
    nanoseconds / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(peer: Peer, round: usize, cpu_us: f64) -> Row {
        Row {
            case: "a",
            peer,
            round,
            operations: 1.0,
            rate: 1.0,
            cpu_us,
            client_cpu_us: 0.0,
            server_cpu_us: 0.0,
            p50_us: cpu_us,
            p99_us: 0.0,
            stolen: 0.0,
            busy: 0.0,
            spin_ms: 0.0,
            discarded: 0,
        }
    }

    #[test]
    fn a_ratio_is_taken_within_a_round() {
        let rows = vec![
            row(Peer::Ours, 0, 10.0),
            row(Peer::Haproxy, 0, 20.0),
            row(Peer::Ours, 1, 100.0),
            row(Peer::Haproxy, 1, 100.0),
            row(Peer::Ours, 2, 9.0),
            row(Peer::Haproxy, 2, 10.0),
            // Without its counterpart.
            row(Peer::Ours, 3, 1.0),
        ];
        let ratio = Samples { rows }.ratio("a", |row| row.cpu_us, Peer::Ours, Peer::Haproxy).unwrap();
        assert!((ratio.median - 0.9).abs() < 1e-9);
        assert!((ratio.least - 0.5).abs() < 1e-9 && (ratio.greatest - 1.0).abs() < 1e-9);
    }

    #[test]
    fn what_a_peer_adds_is_taken_within_a_round() {
        let rows = vec![row(Peer::Direct, 0, 10.0), row(Peer::Ours, 0, 30.0), row(Peer::Haproxy, 0, 50.0)];
        let samples = Samples { rows };
        let ratio = samples.added_ratio("a", |row| row.p50_us, Peer::Ours, Peer::Haproxy).unwrap();
        assert!((ratio.median - 0.5).abs() < 1e-9);
        let best = samples.best("a", |peer| samples.added("a", |row| row.p50_us, peer));
        assert_eq!(best, Some(Peer::Haproxy));
    }
}
