//! How much callers may ask of the workload: rate limits and bounds on open connections, kept at its own sidecar.
//!
//! **Rates** are kept by GCRA (ITU-T I.371, the virtual scheduling form of a leaky bucket): a limit's whole state is
//! the moment at which it will be full again. That is one atomic word, so a limit of N is N however many threads ask,
//! no thread waits for another, and what is forgotten of a key whose moment is past is nothing.
//!
//! **Keys** (callers, header values) share a table of fixed size, one such word for each. A key looks for itself in a
//! few places that its hash names, else takes the first of these whose owner is idle. A table of words needs neither
//! a lock nor an allocation, and evicting an idle key changes no decision. Where all of its places are busy, a key
//! counts in one cell that all such keys share: hostile keys then take from each other, not from the workload, and
//! [`Limits::crowded`] counts it. Two threads that meet in a place that changes hands may miscount by one request
//! each.
//!
//! What is refused by one limit counts in no other.

use std::{
    fmt,
    hash::{BuildHasher, Hash, Hasher, RandomState},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use outrigger_api::v1;

use crate::{
    access::Caller,
    criteria::{Operation, Seen, Sense, Source, is_connection, is_from, is_request, ports},
    padded::Padded,
    path::EscapedSlashes,
    request::View,
};

/// Limits of one workload: each may be looked at for each request, and may have a table.
pub const MAX_LIMITS: usize = 32;

/// Keys of a table: 64 KiB. A key that was idle for long enough to be let through at once leaves when another comes.
const KEYS: usize = 4_096;

/// What a caller with too many connections is told to wait: when one of them closes is its own to say.
const CONNECTION_WAIT: Duration = Duration::from_secs(1);

/// Places in which a key looks for itself: 256 bytes of the table.
const PLACES: usize = 16;

const NANOS: u64 = 1_000_000_000;

/// One word: neighbours of a hot one would be as slow.
type Cell = Padded<AtomicU64>;

/// A rate with a burst. Times are nanoseconds since a moment before the first request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rate {
    /// Between two requests at the rate.
    interval: u64,
    /// Between empty and full.
    window: u64,
}

/// What a limit has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Left {
    requests: u64,
    /// Until all of it is back.
    reset: Duration,
}

impl Rate {
    fn new(millirequests: u64, burst: u32) -> Self {
        let interval = (NANOS * 1_000 + millirequests / 2).checked_div(millirequests).unwrap_or(u64::MAX / 4);
        // Below, times are added to it: a quarter of all that there is leaves room, and is 146 years.
        let interval = interval.clamp(1, u64::MAX / 4);
        Self { interval, window: interval.saturating_mul(burst.max(1).into()).min(u64::MAX / 4) }
    }

    /// Counts one request; `Err`: not before this time has passed.
    fn take(self, cell: &AtomicU64, now: u64) -> Result<(), Duration> {
        cell.fetch_update(Relaxed, Relaxed, |full_at| {
            let then = full_at.max(now).saturating_add(self.interval);
            (then - now <= self.window).then_some(then)
        })
        .map(drop)
        .map_err(|full_at| Duration::from_nanos(full_at.max(now) + self.interval - self.window - now))
    }

    /// Takes back what [`Rate::take`] has counted.
    fn give_back(self, cell: &AtomicU64) {
        cell.fetch_sub(self.interval, Relaxed);
    }

    fn left(self, cell: &AtomicU64, now: u64) -> Left {
        let used = cell.load(Relaxed).saturating_sub(now);
        Left { requests: self.window.saturating_sub(used) / self.interval, reset: Duration::from_nanos(used) }
    }
}

/// A word for each key.
#[derive(Debug)]
struct Table {
    hasher: RandomState,
    places: Box<[Place]>,
    /// For keys that have found no place.
    crowd: Cell,
}

#[derive(Debug, Default)]
struct Place {
    /// The hash of the key whose it is; 0: nobody's.
    key: AtomicU64,
    word: AtomicU64,
}

impl Table {
    fn new() -> Self {
        let places = std::iter::repeat_with(Place::default).take(KEYS).collect();
        Self { hasher: RandomState::new(), places, crowd: Cell::default() }
    }

    fn hash(&self, key: Key<'_>) -> u64 {
        // Two keys of one hash share a word. The seed is ours alone, so nobody can look for such a pair.
        let mut hasher = self.hasher.build_hasher();
        match key {
            // By far the most, once for each request.
            Key::Identity(identity) => hasher.write(identity.as_bytes()),
            _ => key.hash(&mut hasher),
        }
        hasher.finish().max(1)
    }

    fn places_of(&self, hash: u64) -> impl Iterator<Item = (usize, &Place)> {
        let first = usize::try_from(hash >> 32).unwrap_or_default();
        (0..PLACES).map(move |at| (first + at) % KEYS).map(|at| (at, &self.places[at]))
    }

    /// The word of a key; `None`: it has to share one.
    fn word(&self, key: Key<'_>, now: u64) -> Option<&AtomicU64> {
        let hash = self.hash(key);
        loop {
            let own = self.places_of(hash).find(|(_, place)| place.key.load(Relaxed) == hash);
            if let Some((_, place)) = own {
                return Some(&place.word);
            }
            let (place, owner) = self.places_of(hash).find_map(|(_, place)| {
                let owner = place.key.load(Relaxed);
                (place.word.load(Relaxed) <= now).then_some((place, owner))
            })?;
            if place.key.compare_exchange(owner, hash, Relaxed, Relaxed).is_ok() {
                return Some(&place.word);
            }
        }
    }
}

/// Open connections by key.
#[derive(Debug)]
struct Connections {
    table: Table,
    most: u64,
}

/// The low bits of a word count connections, the others are of the key's hash: one word changes at once.
const COUNT_BITS: u32 = 20;
const COUNT: u64 = (1 << COUNT_BITS) - 1;

impl Connections {
    fn new(most: u32) -> Self {
        Self { table: Table::new(), most: u64::from(most).min(COUNT) }
    }

    /// The word that has counted one more; `None`: there are as many as there may be.
    fn enter(&self, key: Key<'_>) -> Option<Counted> {
        let hash = self.table.hash(key);
        let tag = hash & !COUNT;
        let add = |word: &AtomicU64, tag: u64| {
            word.fetch_update(Relaxed, Relaxed, |count| {
                (count & !COUNT == tag && count & COUNT < self.most).then_some(count + 1)
            })
        };
        let is_own = |count: u64| count != 0 && count & !COUNT == tag;
        loop {
            let find = |is_it: &dyn Fn(u64) -> bool| {
                self.table.places_of(hash).find(|(_, place)| is_it(place.word.load(Relaxed)))
            };
            if let Some((at, place)) = find(&is_own) {
                match add(&place.word, tag) {
                    Ok(_) => return Some(Counted::At(at)),
                    Err(count) if is_own(count) => return None,
                    // Its last connection has just closed.
                    Err(_) => continue,
                }
            }
            let Some((at, place)) = find(&|count| count == 0) else {
                return add(&self.table.crowd.0, 0).ok().map(|_| Counted::InCrowd);
            };
            if place.word.compare_exchange(0, tag | 1, Relaxed, Relaxed).is_ok() {
                return Some(Counted::At(at));
            }
        }
    }

    fn leave(&self, counted: Counted) {
        let word = match counted {
            Counted::At(at) => &self.table.places[at].word,
            Counted::InCrowd => &self.table.crowd.0,
        };
        word.fetch_update(Relaxed, Relaxed, |count| Some(if count & COUNT <= 1 { 0 } else { count - 1 }))
            .ok();
    }
}

#[derive(Debug, Clone, Copy)]
enum Counted {
    At(usize),
    InCrowd,
}

/// Whose word it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key<'a> {
    Identity(&'a str),
    Address(IpAddr),
    Value(&'a [u8]),
    NoValue,
    /// A header that comes twice: which one counts is the application's to say, so all such requests count as one
    /// caller's, and a second value is no way to a fresh limit.
    ManyValues,
}

impl<'a> Key<'a> {
    fn caller(caller: &Caller<'a>) -> Self {
        match caller.identity {
            Some(identity) => Self::Identity(identity),
            None => Self::Address(caller.source.to_canonical()),
        }
    }

    fn value<V: View>(view: &'a V, name: &'a str) -> Self {
        let mut values = view.values(name);
        match (values.next(), values.next()) {
            (None, _) => Self::NoValue,
            (Some(value), None) => Self::Value(value),
            (Some(_), Some(_)) => Self::ManyValues,
        }
    }
}

/// The limits of a workload.
#[derive(Debug)]
pub struct Limits {
    limits: Vec<Limit>,
    began: Instant,
}

#[derive(Debug)]
struct Limit {
    policy: Arc<str>,
    name: Arc<str>,
    audit: bool,
    ports: Vec<u16>,
    from: Vec<Source>,
    to: Vec<Operation>,
    per: Per,
    rate: Option<Rate>,
    /// Whether answers that pass say what is left.
    tells: bool,
    cells: Arc<Cells>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Per {
    Total,
    Caller,
    Header(Box<str>),
}

/// What is counted, for as long as the limit stays what it is.
#[derive(Debug)]
struct Cells {
    total: Cell,
    keyed: Option<Table>,
    connections: Option<Connections>,
    crowded: AtomicU64,
}

/// A limit that has refused something, or would have, were its policy not under audit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// `<namespace>/<name>` of the policy.
    pub policy: Arc<str>,
    /// The limit's name.
    pub limit: Arc<str>,
    /// When it is worth asking again.
    pub retry_after: Duration,
    /// `None`: it bounds connections.
    pub standing: Option<Standing>,
}

impl Refused {
    /// The value of `Retry-After` (RFC 9110, 10.2.3), in whole seconds, at least 1.
    pub fn retry_after_seconds(&self) -> u64 {
        seconds(self.retry_after).max(1)
    }
}

/// What lets a request pass has found.
#[derive(Debug, Default)]
pub struct Passed {
    /// Limits of policies under audit that would have refused it.
    pub audits: Vec<Refused>,
    /// Of the limits that tell callers what is left, the one with the least.
    pub standing: Option<Standing>,
}

/// Where a rate stands for one caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    limit: Arc<str>,
    rate: Rate,
    left: Left,
}

impl Standing {
    /// The value of `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10, 3): what passes within the time in
    /// which an empty limit is full again, of which the field knows whole seconds.
    pub fn rate_limit_policy(&self) -> String {
        let window = seconds(Duration::from_nanos(self.rate.window)).max(1);
        let quota = window.saturating_mul(NANOS) / self.rate.interval;
        format!("{};q={};w={window}", Quoted(&self.limit), quota.max(1))
    }

    /// The value of `RateLimit` (the same, 4).
    pub fn rate_limit(&self) -> String {
        format!("{};r={};t={}", Quoted(&self.limit), self.left.requests, seconds(self.left.reset).max(1))
    }
}

/// Rounded up: who comes back then is let in.
fn seconds(of: Duration) -> u64 {
    of.as_secs() + u64::from(of.subsec_nanos() > 0)
}

/// A string of a structured field (RFC 9651, 3.3.3).
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for c in self.0.chars() {
            match c {
                '"' | '\\' => write!(f, "\\{c}")?,
                ' '..='~' => write!(f, "{c}")?,
                _ => f.write_str("?")?,
            }
        }
        f.write_str("\"")
    }
}

/// An open connection: it counts until it is dropped.
#[derive(Debug)]
pub struct OpenConnection(Vec<(Arc<Cells>, Counted)>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        for (cells, counted) in &self.0 {
            if let Some(connections) = &cells.connections {
                connections.leave(*counted);
            }
        }
    }
}

impl Default for Limits {
    /// Nothing is bounded.
    fn default() -> Self {
        Self { limits: Vec::new(), began: Instant::now() }
    }
}

impl Limits {
    /// Checks the limits among what was pushed. `slashes`: as in the same push. `now`: before any request is checked.
    pub fn from_wire(
        policies: &[v1::AccessPolicy],
        slashes: EscapedSlashes,
        now: Instant,
    ) -> Result<Self, String> {
        let mut limits = Vec::new();
        for policy in policies {
            for limit in &policy.limits {
                let limit = Limit::from_wire(policy, limit, slashes).map_err(|error| {
                    format!("AccessPolicy {}, limit {}: {error}", policy.name, limit.name)
                })?;
                limits.push(limit);
            }
        }
        if limits.len() > MAX_LIMITS {
            return Err(format!(
                "the access policies hold {} limits; a workload may have {MAX_LIMITS}",
                limits.len()
            ));
        }
        Ok(Self { limits, began: now })
    }

    /// Goes on with what `old` has counted, in each limit that has not changed.
    #[must_use]
    pub fn adopt(mut self, old: &Self) -> Self {
        self.began = old.began;
        let mut olds: Vec<&Limit> = old.limits.iter().collect();
        for limit in &mut self.limits {
            if let Some(at) = olds.iter().position(|old| old.counts_like(limit)) {
                limit.cells = olds.swap_remove(at).cells.clone();
            }
        }
        self
    }

    /// Whether limits in force of the port look at paths; see [`crate::access::Access::decides_on_paths`].
    pub fn decides_on_paths(&self, port: u16) -> bool {
        self.of_port(port).any(|limit| !limit.audit && limit.to.iter().any(Operation::looks_at_paths))
    }

    /// Counts a request. `Ok`: it may go on. `path`: see [`crate::access::Access::request`].
    pub fn check<V: View>(
        &self,
        caller: &Caller<'_>,
        port: u16,
        view: &V,
        path: &[u8],
        now: Instant,
    ) -> Result<Passed, Refused> {
        let mut passed = Passed::default();
        if self.limits.is_empty() {
            return Ok(passed);
        }
        let now = self.since_began(now);
        let seen = Seen::new(view, path);
        let mut taken = [None; MAX_LIMITS];
        for (limit, taken_here) in self.of_port(port).zip(0..) {
            let Some(rate) = limit.rate else { continue };
            if !is_from(&limit.from, caller) || !is_request(&limit.to, port, &seen, Sense::Shuts) {
                continue;
            }
            let word = limit.word(caller, view, now);
            match rate.take(word, now) {
                Ok(()) => {
                    taken[taken_here] = Some((rate, word));
                    if limit.tells {
                        let standing = limit.standing(rate, word, now);
                        let least = passed.standing.as_ref().map(|least| least.left.requests);
                        if least.is_none_or(|least| standing.left.requests < least) {
                            passed.standing = Some(standing);
                        }
                    }
                }
                Err(retry_after) => {
                    let refused = limit.refused(retry_after, Some(limit.standing(rate, word, now)));
                    if !limit.audit {
                        taken.iter().flatten().for_each(|(rate, word)| rate.give_back(word));
                        return Err(refused);
                    }
                    passed.audits.push(refused);
                }
            }
        }
        Ok(passed)
    }

    /// Counts a connection for as long as what is returned lives; `Err`: its caller has as many as it may have.
    pub fn connect(&self, caller: &Caller<'_>, port: u16) -> Result<(OpenConnection, Vec<Refused>), Refused> {
        let mut open = OpenConnection(Vec::new());
        let mut audits = Vec::new();
        let is_it =
            |limit: &&Limit| is_from(&limit.from, caller) && is_connection(&limit.to, port, Sense::Shuts);
        for limit in self.of_port(port).filter(is_it) {
            let Some(connections) = &limit.cells.connections else { continue };
            match connections.enter(Key::caller(caller)) {
                Some(counted) => {
                    if matches!(counted, Counted::InCrowd) {
                        limit.cells.crowded.fetch_add(1, Relaxed);
                    }
                    open.0.push((limit.cells.clone(), counted));
                }
                None if limit.audit => audits.push(limit.refused(CONNECTION_WAIT, None)),
                None => return Err(limit.refused(CONNECTION_WAIT, None)),
            }
        }
        Ok((open, audits))
    }

    /// Requests and connections so far that counted in a cell shared by keys for which there was no place: for each
    /// limit, with the name of its policy and its own.
    pub fn crowded(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<str>, u64)> {
        self.limits.iter().map(|limit| (&limit.policy, &limit.name, limit.cells.crowded.load(Relaxed)))
    }

    fn of_port(&self, port: u16) -> impl Iterator<Item = &Limit> {
        self.limits.iter().filter(move |limit| limit.ports.is_empty() || limit.ports.contains(&port))
    }

    fn since_began(&self, now: Instant) -> u64 {
        // That is 584 years.
        u64::try_from(now.saturating_duration_since(self.began).as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Limit {
    fn from_wire(
        policy: &v1::AccessPolicy,
        wire: &v1::RateLimit,
        slashes: EscapedSlashes,
    ) -> Result<Self, String> {
        let per = match wire.per() {
            v1::rate_limit::Per::Unspecified => return Err("it does not say what has a bound".to_owned()),
            v1::rate_limit::Per::Total => Per::Total,
            v1::rate_limit::Per::Caller => Per::Caller,
            v1::rate_limit::Per::Header if wire.header.is_empty() => {
                return Err("it names no header".to_owned());
            }
            v1::rate_limit::Per::Header => Per::Header(wire.header.to_ascii_lowercase().into()),
        };
        let rate = (wire.millirequests > 0).then(|| Rate::new(wire.millirequests, wire.burst));
        let cells = Cells {
            total: Cell::default(),
            keyed: (rate.is_some() && per != Per::Total).then(Table::new),
            connections: (wire.connections > 0).then(|| Connections::new(wire.connections)),
            crowded: AtomicU64::new(0),
        };
        Ok(Self {
            policy: policy.name.as_str().into(),
            name: wire.name.as_str().into(),
            audit: policy.audit,
            ports: ports(&policy.ports)?,
            from: wire.from.iter().map(Source::from_wire).collect::<Result<_, _>>()?,
            to: wire.to.iter().map(|to| Operation::from_wire(to, slashes)).collect::<Result<_, _>>()?,
            per,
            rate,
            // What a policy under audit counts is nobody's business but its author's.
            tells: wire.tell_remaining && !policy.audit,
            cells: Arc::new(cells),
        })
    }

    /// Whether both count the same things up to the same bound.
    fn counts_like(&self, other: &Self) -> bool {
        let most = |limit: &Self| limit.cells.connections.as_ref().map(|connections| connections.most);
        (&self.policy, &self.name, &self.ports, &self.from, &self.to, &self.per, self.rate, most(self))
            == (
                &other.policy,
                &other.name,
                &other.ports,
                &other.from,
                &other.to,
                &other.per,
                other.rate,
                most(other),
            )
    }

    fn word<V: View>(&self, caller: &Caller<'_>, view: &V, now: u64) -> &AtomicU64 {
        let key = match &self.per {
            Per::Total => return &self.cells.total.0,
            Per::Caller => Key::caller(caller),
            Per::Header(name) => Key::value(view, name),
        };
        let Some(table) = &self.cells.keyed else { return &self.cells.total.0 };
        table.word(key, now).unwrap_or_else(|| {
            self.cells.crowded.fetch_add(1, Relaxed);
            &table.crowd.0
        })
    }

    fn refused(&self, retry_after: Duration, standing: Option<Standing>) -> Refused {
        Refused { policy: self.policy.clone(), limit: self.name.clone(), retry_after, standing }
    }

    fn standing(&self, rate: Rate, word: &AtomicU64, now: u64) -> Standing {
        Standing { limit: self.name.clone(), rate, left: rate.left(word, now) }
    }
}

#[cfg(test)]
mod tests;
