//! How many warm machines there should be: pure arithmetic over arrivals, refill times and a memory budget.
//!
//! A pool's target covers the arrivals that are expected while one machine is refilled, with two standard deviations of
//! a Poisson process to spare. Two decayed rates are kept, one over seconds and one over a minute, and the larger
//! counts: a spike is believed at once and forgotten slowly. A budget of memory is spent where a MiB brings most hits.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// Over which arrivals are averaged: bursts, and the steady part.
const SHORT: Duration = Duration::from_secs(5);
const LONG: Duration = Duration::from_secs(60);
/// Below this many arrivals per second a template is idle: its pool goes to its minimum. One in ten minutes.
const IDLE: f64 = 1.0 / 600.0;
/// How much of a new refill time counts.
const GAIN: f64 = 0.3;

/// What an operator wants of the pools of one template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Machines that are always there.
    pub min: u32,
    /// The most; zero turns warm machines off, the same as `min` keeps their number fixed.
    pub max: u32,
    /// After how many seconds a machine that nobody claimed is replaced.
    pub max_age_s: u64,
}

/// A rate that forgets: each arrival adds `1/τ`, which fades with the time constant τ.
#[derive(Debug, Clone, Copy)]
struct Rate {
    per_second: f64,
    at: Instant,
    over: Duration,
}

impl Rate {
    fn new(over: Duration, now: Instant) -> Self {
        Self { per_second: 0.0, at: now, over }
    }

    fn now(&self, now: Instant) -> f64 {
        let past = now.saturating_duration_since(self.at).as_secs_f64();
        self.per_second * (-past / self.over.as_secs_f64()).exp()
    }

    fn arrive(&mut self, now: Instant) {
        self.per_second = self.now(now) + 1.0 / self.over.as_secs_f64();
        self.at = now;
    }
}

/// What is known of the demand for one pool.
#[derive(Debug, Clone, Copy)]
pub struct Demand {
    short: Rate,
    long: Rate,
    refill_s: f64,
}

impl Demand {
    /// Nothing has arrived; a refill is taken for a second until one was seen.
    pub fn new(now: Instant) -> Self {
        Self { short: Rate::new(SHORT, now), long: Rate::new(LONG, now), refill_s: 1.0 }
    }

    /// Somebody wanted a machine.
    pub fn arrive(&mut self, now: Instant) {
        self.short.arrive(now);
        self.long.arrive(now);
    }

    /// One was refilled in `took`.
    pub fn refilled(&mut self, took: Duration) {
        self.refill_s += GAIN * (took.as_secs_f64() - self.refill_s);
    }

    /// How long a refill takes, decayed, in seconds.
    pub fn refill_s(&self) -> f64 {
        self.refill_s
    }

    /// Arrivals per second that are to be expected.
    pub fn rate(&self, now: Instant) -> f64 {
        self.short.now(now).max(self.long.now(now))
    }

    /// How many machines should be ready under `rule`.
    pub fn target(&self, rule: Rule, now: Instant) -> u32 {
        let rate = self.rate(now);
        let expected = rate * self.refill_s;
        let wanted = if rate < IDLE { 0.0 } else { (expected + 2.0 * expected.sqrt()).ceil().max(1.0) };
        // A float that is too large saturates.
        (wanted as u32).max(rule.min).min(rule.max)
    }
}

/// One pool's claim on the budget.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Claim {
    /// Machines it should have.
    pub target: u32,
    /// Of them, those that are always there.
    pub min: u32,
    /// Memory of one, in MiB.
    pub memory_mib: u64,
    /// Arrivals per second.
    pub rate: f64,
    /// Machines that it has already.
    pub parked: u32,
}

/// How much more a machine that is there is worth than one that would have to be made: without it, pools that are
/// wanted about equally take each other's memory again and again.
const KEPT: f64 = 3.0;

/// Spends `budget_mib`: minimums first, then one machine at a time where the chance that it is claimed before the next
/// refill is largest for its memory. Returns how many each pool gets, never more than its target.
pub fn share(claims: &[Claim], budget_mib: u64) -> Vec<u32> {
    let mut granted = vec![0; claims.len()];
    let mut left = budget_mib;
    let mut grant = |index: usize, granted: &mut Vec<u32>| {
        let cost = claims[index].memory_mib;
        let fits = cost <= left && granted[index] < claims[index].target;
        if fits {
            left -= cost;
            granted[index] += 1;
        }
        fits
    };
    for (index, claim) in claims.iter().enumerate() {
        while granted[index] < claim.min && grant(index, &mut granted) {}
    }
    loop {
        let worth = |index: usize| {
            let claim = claims[index];
            let there = if granted[index] < claim.parked { KEPT } else { 1.0 };
            // The nth machine is needed when n come at once.
            there * claim.rate / f64::from(granted[index] + 1) / claim.memory_mib.max(1) as f64
        };
        let mut order: Vec<usize> =
            (0..claims.len()).filter(|index| granted[*index] < claims[*index].target).collect();
        order.sort_by(|a, b| worth(*b).total_cmp(&worth(*a)));
        if !order.into_iter().any(|index| grant(index, &mut granted)) {
            return granted;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULE: Rule = Rule { min: 0, max: 100, max_age_s: 60 };

    fn after(start: Instant, seconds: f64) -> Instant {
        start + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn a_steady_stream_is_covered_and_an_idle_template_costs_nothing() {
        let start = Instant::now();
        let mut demand = Demand::new(start);
        assert_eq!(demand.target(RULE, start), 0);
        for _ in 0..20 {
            demand.refilled(Duration::from_millis(500));
        }
        for arrival in 0..600 {
            demand.arrive(after(start, f64::from(arrival) * 0.25));
        }
        let now = after(start, 150.0);
        assert!((3.0..5.0).contains(&demand.rate(now)), "{}", demand.rate(now));
        assert!((4..=6).contains(&demand.target(RULE, now)), "4 a second, half a second each");
        assert_eq!(demand.target(Rule { max: 3, ..RULE }, now), 3);
        assert_eq!(demand.target(RULE, after(start, 900.0)), 0);
        assert_eq!(demand.target(Rule { min: 2, ..RULE }, after(start, 900.0)), 2);
    }

    #[test]
    fn a_spike_is_believed_at_once() {
        let start = Instant::now();
        let mut demand = Demand::new(start);
        for arrival in 0..10 {
            demand.arrive(after(start, f64::from(arrival) * 0.05));
        }
        assert!(demand.target(RULE, after(start, 0.5)) >= 4);
        let later = demand.target(RULE, after(start, 30.0));
        assert!((1..4).contains(&later), "and forgotten slowly: {later}");
    }

    #[test]
    fn memory_goes_where_it_is_used() {
        let claim = |target, rate, memory_mib| Claim { target, min: 0, memory_mib, rate, parked: 0 };
        assert_eq!(share(&[claim(4, 5.0, 100), claim(4, 0.1, 100)], 400), [4, 0]);
        assert_eq!(
            share(&[claim(1, 1.0, 1000), claim(4, 1.0, 100)], 1000),
            [0, 4],
            "the large one does not fit beside"
        );
        let kept = Claim { min: 1, ..claim(1, 0.0, 100) };
        assert_eq!(share(&[claim(9, 9.0, 100), kept], 200), [1, 1], "a minimum is kept");
        let there = Claim { parked: 1, ..claim(1, 1.0, 100) };
        assert_eq!(share(&[claim(1, 2.0, 100), there], 100), [0, 1], "not made anew for a little more");
        assert_eq!(share(&[claim(1, 5.0, 100), there], 100), [1, 0], "but for much more");
    }

    proptest! {
        #[test]
        fn the_budget_holds(
            pools in proptest::collection::vec((0_u32..20, 0_u32..5, 1_u64..2000, 0.0_f64..50.0), 0..12),
            budget in 0_u64..20_000,
        ) {
            let claims: Vec<Claim> = pools
                .iter()
                .map(|(target, min, memory_mib, rate)| Claim { target: *target, min: *min, memory_mib: *memory_mib, rate: *rate, parked: *min })
                .collect();
            let granted = share(&claims, budget);
            let spent: u64 = claims.iter().zip(&granted).map(|(claim, count)| claim.memory_mib * u64::from(*count)).sum();
            prop_assert!(spent <= budget);
            for (claim, count) in claims.iter().zip(&granted) {
                prop_assert!(*count <= claim.target);
                // What was refused would not have fitted.
                prop_assert!(*count == claim.target || claim.memory_mib > budget - spent);
            }
        }
    }
}
