//! Promises about speed, as ratios in one run.
//!
//! A round measures both sides of a ratio, some machines each, one side right after the other, and comes to one ratio:
//! within its limit or not. A promise is kept when the median ratio is within the limit, that is when a round is within
//! it at least as often as not. Rounds go on until that is decided:
//!
//! ```text
//! kept     "at most half of all rounds are within" is refuted with 95 % confidence: six rounds in a row
//! broken   "at least half of all rounds are within" is refuted with 99.9 %: twelve in a row
//! neither  after 30 rounds: kept, and with how little confidence is said, unless the evidence speaks for "broken" at all
//! ```
//!
//! The test looks after each round whether to stop, which a table for a fixed number of rounds does not allow. So the
//! evidence is a bet that is fair when the hypothesis holds: whoever bets on it multiplies a wealth of one to more than
//! 20 with a probability of at most 1/20, whenever they stop. Half of the wealth is bet boldly (0.9 of it each time, which
//! decides clear cases in six rounds), half carefully (0.5, which decides what is noisy). Only whether a round is within
//! its limit counts, not by how much: one round in which a neighbour took a processor is one round, however slow it was.
//! Source: Ville's inequality; Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2020.
//! Why this and not tries: `docs/decisions/0033-a-promise-is-decided-by-evidence.md`.

use serde_json::Value;

use crate::Server;

/// A wealth that refutes with 95 % confidence.
const KEPT_AT: f64 = 20.0;
/// One that refutes with 99.9 %: a false alarm costs somebody an hour.
const BROKEN_AT: f64 = 1000.0;
/// The most rounds.
const ROUNDS: usize = 30;
/// Which parts of the wealth of each half are bet.
const BETS: [f64; 2] = [0.9, 0.5];

/// What a ratio is promised to keep to.
#[derive(Debug, Clone, Copy)]
pub enum Limit {
    /// Not above it.
    AtMost(f64),
    /// Not below it.
    AtLeast(f64),
}

impl Limit {
    fn holds(self, ratio: f64) -> bool {
        match self {
            Self::AtMost(limit) => ratio <= limit,
            Self::AtLeast(limit) => ratio >= limit,
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "at most {limit}"),
            Self::AtLeast(limit) => write!(f, "at least {limit}"),
        }
    }
}

/// Wealth of somebody who bets against "at least half of all rounds are otherwise".
#[derive(Debug)]
struct Wealth([f64; 2]);

impl Wealth {
    fn new() -> Self {
        Self([0.5; 2])
    }

    fn bet(&mut self, won: bool) {
        for (part, bet) in self.0.iter_mut().zip(BETS) {
            *part *= if won { 1.0 + bet } else { 1.0 - bet };
        }
    }

    fn sum(&self) -> f64 {
        self.0.iter().sum()
    }

    /// In percent; none when the bets have lost.
    fn confidence(&self) -> f64 {
        100.0 * (1.0 - 1.0 / self.sum()).max(0.0)
    }
}

/// What the rounds of one promise have come to.
#[derive(Debug)]
struct Evidence {
    limit: Limit,
    ratios: Vec<f64>,
    kept: Wealth,
    broken: Wealth,
}

/// How a promise has ended, with the confidence in percent.
#[derive(Debug, PartialEq)]
enum Verdict {
    Kept(f64),
    Broken(f64),
}

impl Evidence {
    fn new(limit: Limit) -> Self {
        Self { limit, ratios: Vec::new(), kept: Wealth::new(), broken: Wealth::new() }
    }

    fn add(&mut self, ratio: f64) {
        let holds = self.limit.holds(ratio);
        self.ratios.push(ratio);
        self.kept.bet(holds);
        self.broken.bet(!holds);
    }

    /// The middle of all rounds; of two middles the worse.
    fn median(&self) -> f64 {
        let mut sorted = self.ratios.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = match self.limit {
            Limit::AtMost(_) => sorted.len() / 2,
            Limit::AtLeast(_) => sorted.len().saturating_sub(1) / 2,
        };
        sorted.get(middle).copied().unwrap_or(f64::NAN)
    }

    fn within(&self) -> usize {
        self.ratios.iter().filter(|ratio| self.limit.holds(**ratio)).count()
    }

    /// Whether it is decided.
    fn verdict(&self) -> Option<Verdict> {
        if self.kept.sum() >= KEPT_AT {
            Some(Verdict::Kept(self.kept.confidence()))
        } else if self.broken.sum() >= BROKEN_AT {
            Some(Verdict::Broken(self.broken.confidence()))
        } else if self.ratios.len() < ROUNDS {
            None
        } else if self.broken.sum() < 1.0 {
            // Nobody has gained by betting on "broken".
            Some(Verdict::Kept(self.kept.confidence()))
        } else {
            Some(Verdict::Broken(self.broken.confidence()))
        }
    }
}

/// Measures rounds until it is decided whether their ratio keeps to `limit`; prints the rounds and the confidence.
///
/// # Panics
/// When it does not.
pub fn promise(name: &str, limit: Limit, mut round: impl FnMut() -> f64) {
    let mut evidence = Evidence::new(limit);
    let verdict = loop {
        evidence.add(round());
        if let Some(verdict) = evidence.verdict() {
            break verdict;
        }
    };
    let (median, within, all) = (evidence.median(), evidence.within(), evidence.ratios.len());
    let figures: Vec<_> = evidence.ratios.iter().map(|ratio| format!("{ratio:.3}")).collect();
    let told = |how: &str, confidence: f64| {
        format!(
            "{name}: {median:.3} (promised {limit}), {how} with {confidence:.0} % confidence, {within} of {all} rounds \
             within: {}",
            figures.join(" ")
        )
    };
    match verdict {
        Verdict::Kept(confidence) => println!("{}", told("kept", confidence)),
        Verdict::Broken(confidence) => panic!("{}", told("broken", confidence)),
    }
}

/// Runs `kelvin bench create` with these arguments.
pub fn bench(server: &Server, args: &[&str]) -> Value {
    bench_of(server, "create", args)
}

/// Runs `kelvin bench WHAT` with these arguments; its report.
///
/// # Panics
/// Beside other tests, which it would measure too: its test has to be among those that run alone.
pub fn bench_of(server: &Server, what: &str, args: &[&str]) -> Value {
    assert!(
        std::env::var_os("KELVIN_E2E_BESIDE").is_none(),
        "this test measures beside others: name it in ALONE, crates/xtask/src/suite.rs"
    );
    let mut all = vec!["--output", "json", "bench", what];
    all.extend(args);
    let output = server.cli(&all).output().expect("kelvin runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The middle of a figure.
pub fn p50(report: &Value, field: &str) -> f64 {
    report[field]["p50"].as_f64().expect("a figure")
}

/// What a bench with `--baseline` came to.
pub fn ratio(report: &Value) -> f64 {
    report["ratio_p50"].as_f64().expect("a ratio")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounds until it is decided, each the next of `ratios`, and the verdict.
    fn decided(limit: Limit, ratios: impl IntoIterator<Item = f64>) -> (usize, Verdict) {
        let mut evidence = Evidence::new(limit);
        for ratio in ratios {
            evidence.add(ratio);
            if let Some(verdict) = evidence.verdict() {
                return (evidence.ratios.len(), verdict);
            }
        }
        panic!("not decided: {evidence:?}");
    }

    fn is_kept(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Kept(_))
    }

    #[test]
    fn what_is_clear_is_decided_early() {
        let (rounds, verdict) = decided(Limit::AtMost(0.5), std::iter::repeat(0.4));
        assert_eq!(rounds, 6);
        assert!(matches!(verdict, Verdict::Kept(confidence) if confidence > 95.0), "{verdict:?}");
        let (rounds, verdict) = decided(Limit::AtLeast(60.0), std::iter::repeat(59.0));
        assert_eq!(rounds, 12);
        assert!(matches!(verdict, Verdict::Broken(confidence) if confidence > 99.9), "{verdict:?}");
    }

    #[test]
    fn one_bad_round_is_one_round_and_a_coin_decides_nothing() {
        let bad = [9.0].into_iter().chain(std::iter::repeat(0.4));
        let (rounds, verdict) = decided(Limit::AtMost(0.5), bad);
        assert!(rounds <= 12 && is_kept(&verdict), "{rounds} {verdict:?}");
        // As often within as not: neither is claimed.
        let coin = (0..ROUNDS).map(|round| if round % 2 == 0 { 0.4 } else { 0.6 });
        assert_eq!(decided(Limit::AtMost(0.5), coin), (ROUNDS, Verdict::Kept(0.0)));
        // Two of three outside speak for "broken".
        let mostly = (0..ROUNDS).map(|round| if round % 3 == 0 { 0.4 } else { 0.6 });
        let (rounds, verdict) = decided(Limit::AtMost(0.5), mostly);
        assert!(rounds == ROUNDS && !is_kept(&verdict), "{rounds} {verdict:?}");
    }

    /// Of rounds that are within their limit with probability `within`, how many promises of a thousand are kept. Source
    /// of the numbers: Steele et al., "Fast Splittable Pseudorandom Number Generators".
    fn kept_of_a_thousand(within: f64) -> usize {
        let mut state = 0_u64;
        let mut draw = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
        };
        let mut one =
            || decided(Limit::AtMost(1.0), std::iter::repeat_with(|| 2.0 * f64::from(draw() >= within)));
        (0..1000).filter(|_| is_kept(&one().1)).count()
    }

    #[test]
    fn a_noisy_machine_breaks_no_promise_and_luck_keeps_none() {
        // Four of ten rounds are spoiled.
        let kept = [0.6, 0.8].map(kept_of_a_thousand);
        assert!(kept[0] > 990 && kept[1] == 1000, "{kept:?}");
        // Of three tries one would be within for 488 and 657 of these: 1 - 0.8^3, 1 - 0.7^3.
        let kept = [0.2, 0.3].map(kept_of_a_thousand);
        assert!(kept[0] < 50 && kept[1] < 400, "{kept:?}");
    }
}
