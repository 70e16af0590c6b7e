//! What a sandbox may reach: E2B's `network` fields on the wire, and the policy that they mean.
//!
//! Order: what is never reachable (the host, other sandboxes, private, link-local and metadata addresses;
//! enforced by the node, no list opens it), then what is allowed, then what is denied, then open. Source:
//! E2B's `openapi.yml`, `SandboxNetworkConfig`; additions are marked.

use std::fmt;
use std::str::FromStr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::id::Token;

/// Entries of one list.
const MAX_ENTRIES: usize = 1000;

/// `network` of a create.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkConfig {
    /// Whether ports can be reached without a token; true unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_public_traffic: Option<bool>,
    /// CIDR blocks, addresses, domains (`example.com`, `*.example.com`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_out: Option<Vec<String>>,
    /// CIDR blocks and addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deny_out: Option<Vec<String>>,
    /// The `Host` that servers in the sandbox see; `${PORT}` stands for the port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_request_host: Option<String>,
    /// Refused: not supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_proxy: Option<serde_json::Value>,
    /// Refused: not supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<serde_json::Value>,
    /// Kelvin: megabits per second, each way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_mbit: Option<u32>,
    /// Kelvin: connections out of the sandbox at one time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
}

/// `network` of a create: E2B's object, or Kelvin's `"none"` for a sandbox without a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum NewNetwork {
    /// `"none"`.
    Word(Word),
    /// The rules of one.
    Config(Box<NetworkConfig>),
}

impl<'de> Deserialize<'de> for NewNetwork {
    /// By hand, so that an error names the field and not a variant.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let value = serde_json::Value::deserialize(deserializer)?;
        let at = |error: serde_json::Error| D::Error::custom(format!("network: {error}"));
        match value.is_string() {
            true => serde_json::from_value(value).map(Self::Word).map_err(at),
            false => serde_json::from_value(value).map(|config| Self::Config(Box::new(config))).map_err(at),
        }
    }
}

/// What can be said instead of rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// No network device that leads anywhere.
    None,
}

/// `PUT /sandboxes/{id}/network`: replaces the egress rules; what is left out is cleared.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkUpdate {
    /// Addresses, CIDR blocks and domains that it may reach, over `denyOut`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_out: Option<Vec<String>>,
    /// Addresses and CIDR blocks that it may not reach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deny_out: Option<Vec<String>>,
    /// Not supported: refused when it says something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_proxy: Option<serde_json::Value>,
    /// Not supported: refused when it says something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules: Option<serde_json::Value>,
    /// False denies everything that `allowOut` does not allow.
    #[serde(rename = "allow_internet_access", default, skip_serializing_if = "Option::is_none")]
    pub allow_internet_access: Option<bool>,
    /// Kelvin: the most that it may send and receive, in Mbit/s each way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_mbit: Option<u32>,
    /// Kelvin: the most connections that it may have at one time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,
}

/// Why a list cannot be a policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Neither an address, a block, nor a domain.
    #[error("{field} has {entry:?}, which is no IPv4 address, CIDR block or domain")]
    Entry {
        /// Which list.
        field: &'static str,
        /// What it has, shortened.
        entry: String,
    },
    /// A domain in a list of denials.
    #[error("denyOut has the domain {0:?}: only addresses can be denied")]
    DeniedDomain(String),
    /// An address that no list opens.
    #[error("allowOut has {0}, which no sandbox may reach")]
    Never(Ipv4Net),
    /// Domains without a denial of everything else.
    #[error("allowOut has domains, but denyOut does not deny everything else (0.0.0.0/0)")]
    DomainsWithoutDeny,
    /// Too many.
    #[error("{0} has more than {MAX_ENTRIES} entries")]
    TooMany(&'static str),
    /// A limit of nothing.
    #[error("{0} is 0: use denyOut to deny everything")]
    Zero(&'static str),
}

/// A domain, or everything below one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Domain {
    name: String,
    below: bool,
}

impl Domain {
    /// Whether `name` (with or without its last dot, in any case) is meant. `*.example.com` means every name
    /// below `example.com`, not itself.
    pub fn matches(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        if !self.below {
            return name == self.name;
        }
        name.strip_suffix(&self.name).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
    }
}

impl FromStr for Domain {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let lower = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let (name, below) = match lower.strip_prefix("*.") {
            Some(rest) => (rest, true),
            None => (lower.as_str(), false),
        };
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        };
        // A name of digits and dots would be an address that was mistyped.
        let top = name.rsplit('.').next().is_some_and(|top| !top.bytes().all(|byte| byte.is_ascii_digit()));
        if name.len() > 253 || !top || !name.split('.').all(label) {
            return Err(());
        }
        Ok(Self { name: name.to_owned(), below })
    }
}

impl TryFrom<String> for Domain {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map_err(|()| format!("{text:?} is no domain"))
    }
}

impl From<Domain> for String {
    fn from(domain: Domain) -> Self {
        domain.to_string()
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.name)
    }
}

/// Which names a sandbox may resolve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names<'a> {
    /// Every name.
    All,
    /// These.
    Listed(&'a [Domain]),
    /// None: a question could carry data out.
    None,
}

impl Names<'_> {
    /// Whether `name` may be resolved and, over HTTP or TLS, connected to.
    pub fn allow(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Listed(domains) => domains.iter().any(|domain| domain.matches(name)),
            Self::None => false,
        }
    }
}

/// What a sandbox may reach. The default is the internet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Allowed before anything is denied; blocks that do not overlap.
    pub allow: Vec<Ipv4Net>,
    /// Denied; blocks that do not overlap.
    pub deny: Vec<Ipv4Net>,
    /// Allowed by name, on ports 80 (HTTP) and 443 (TLS).
    pub domains: Vec<Domain>,
    /// Megabits per second, each way; `None` is the node's limit.
    pub bandwidth_mbit: Option<u32>,
    /// Connections at one time; `None` is the node's limit.
    pub max_connections: Option<u32>,
}

/// Everything that is never reachable, whatever a list says; the node adds its own addresses. Source: IANA's
/// registry of special-purpose addresses, without the blocks for documentation.
pub const NEVER: [&str; 12] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
];

/// Whether nothing may ever open `block`.
pub fn is_never(block: &Ipv4Net) -> bool {
    NEVER.iter().filter_map(|text| text.parse::<Ipv4Net>().ok()).any(|never| never.contains(block))
}

fn block(text: &str) -> Option<Ipv4Net> {
    text.parse::<Ipv4Net>()
        .ok()
        .or_else(|| text.parse::<std::net::Ipv4Addr>().ok().map(Ipv4Net::from))
        .map(|net| net.trunc())
}

fn is_v6(text: &str) -> bool {
    text.parse::<ipnet::Ipv6Net>().is_ok() || text.parse::<std::net::Ipv6Addr>().is_ok()
}

impl Policy {
    /// Makes a policy of E2B's lists. `internet` is `allow_internet_access`: `Some(false)` denies everything
    /// that is not allowed.
    ///
    /// # Errors
    /// The first entry that cannot be honoured.
    pub fn parse(
        allow_out: &[String],
        deny_out: &[String],
        internet: Option<bool>,
    ) -> Result<Self, PolicyError> {
        let shown = |text: &str| text.chars().take(80).collect::<String>();
        let mut policy = Self::default();
        if allow_out.len() > MAX_ENTRIES {
            return Err(PolicyError::TooMany("allowOut"));
        }
        if deny_out.len() > MAX_ENTRIES {
            return Err(PolicyError::TooMany("denyOut"));
        }
        for entry in deny_out {
            match block(entry) {
                Some(net) => policy.deny.push(net),
                // Nothing leaves over IPv6: it is denied already.
                None if is_v6(entry) => {}
                None if entry.parse::<Domain>().is_ok() => {
                    return Err(PolicyError::DeniedDomain(shown(entry)));
                }
                None => return Err(PolicyError::Entry { field: "denyOut", entry: shown(entry) }),
            }
        }
        if internet == Some(false) {
            policy.deny.push(Ipv4Net::default());
        }
        for entry in allow_out {
            match (block(entry), entry.parse::<Domain>()) {
                (Some(net), _) if is_never(&net) => return Err(PolicyError::Never(net)),
                (Some(net), _) => policy.allow.push(net),
                (None, Ok(domain)) => policy.domains.push(domain),
                (None, Err(())) => return Err(PolicyError::Entry { field: "allowOut", entry: shown(entry) }),
            }
        }
        // Two halves are the whole; and blocks that do not overlap are what rules are made of.
        policy.allow = Ipv4Net::aggregate(&policy.allow);
        policy.deny = Ipv4Net::aggregate(&policy.deny);
        if !policy.domains.is_empty() && !policy.denies_all() {
            return Err(PolicyError::DomainsWithoutDeny);
        }
        Ok(policy)
    }

    /// The same with limits; `None` leaves the node's.
    ///
    /// # Errors
    /// `Zero`.
    pub fn limited(
        mut self,
        bandwidth_mbit: Option<u32>,
        max_connections: Option<u32>,
    ) -> Result<Self, PolicyError> {
        if bandwidth_mbit == Some(0) {
            return Err(PolicyError::Zero("bandwidthMbit"));
        }
        if max_connections == Some(0) {
            return Err(PolicyError::Zero("maxConnections"));
        }
        (self.bandwidth_mbit, self.max_connections) = (bandwidth_mbit, max_connections);
        Ok(self)
    }

    /// Whether everything that is not allowed is denied.
    pub fn denies_all(&self) -> bool {
        self.deny.iter().any(|net| net.prefix_len() == 0)
            && !self.allow.iter().any(|net| net.prefix_len() == 0)
    }

    /// Which names it lets resolve.
    pub fn names(&self) -> Names<'_> {
        if !self.denies_all() {
            Names::All
        } else if self.domains.is_empty() {
            Names::None
        } else {
            Names::Listed(&self.domains)
        }
    }
}

/// A sandbox's network: what it may reach, and who may reach it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// Out.
    pub policy: Policy,
    /// What callers of its ports must show; `None` for public ports.
    pub traffic_token: Option<Token>,
    /// The `Host` that its servers see; `${PORT}` stands for the port.
    pub mask_request_host: Option<String>,
}

/// What a create wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// No network.
    None,
    /// One with these rules; a node that has none gives none, because nothing was said of one.
    Usual(Attachment),
    /// One with these rules or a refusal.
    Required(Attachment),
}

/// `GET /sandboxes/{id}/network`: Kelvin's own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct NetworkState {
    /// Whether there is a network at all.
    pub attached: bool,
    /// CIDR blocks and domains.
    pub allow_out: Vec<String>,
    /// CIDR blocks.
    pub deny_out: Vec<String>,
    /// Packets and bytes out of the sandbox.
    pub sent: Traffic,
    /// Packets and bytes into the sandbox.
    pub received: Traffic,
    /// What was refused, by reason: packets, and for `name` and `dns_name` connections and questions.
    pub denied: std::collections::BTreeMap<String, u64>,
    /// The last refusals, newest last.
    pub recent: Vec<Refusal>,
}

/// A counter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Traffic {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// One thing that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    /// When.
    pub at: jiff::Timestamp,
    /// Why.
    pub reason: String,
    /// What it was for: address and port, or a name.
    pub target: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(allow: &[&str], deny: &[&str]) -> Result<Policy, PolicyError> {
        let own = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        Policy::parse(&own(allow), &own(deny), None)
    }

    #[test]
    fn lists_become_policies_or_say_why_not() {
        let policy = parse(&["8.8.8.8", "*.Example.com", "example.org"], &["0.0.0.0/0"]).unwrap();
        assert!(policy.denies_all());
        for (name, allowed) in [
            ("example.org", true),
            ("Example.ORG.", true),
            ("a.example.org", false),
            ("example.com", false),
            ("a.b.example.com", true),
            ("notexample.com", false),
            (".example.com", false),
        ] {
            assert_eq!(policy.names().allow(name), allowed, "{name}");
        }
        assert_eq!(Policy::parse(&[], &[], Some(false)).unwrap().names(), Names::None);
        assert!(parse(&["a.com"], &["0.0.0.0/1", "128.0.0.0/1"]).unwrap().denies_all());
        assert_eq!(parse(&["0.0.0.0/0"], &["0.0.0.0/0"]).unwrap().names(), Names::All);
        assert_eq!(parse(&["10.1.2.3"], &[]), Err(PolicyError::Never("10.1.2.3/32".parse().unwrap())));
        assert_eq!(parse(&["a.com"], &["1.1.1.1"]), Err(PolicyError::DomainsWithoutDeny));
        assert_eq!(parse(&[], &["a.com"]), Err(PolicyError::DeniedDomain("a.com".into())));
        for bad in ["1.2.3", "300.1.1.1", "a..b", "http://x.com/", "", "*", "::1/200", "2001:db8::1"] {
            assert!(parse(&[bad], &["0.0.0.0/0"]).is_err(), "{bad}");
        }
        assert!(parse(&[], &["::/0"]).is_ok(), "nothing leaves over IPv6 anyway");
    }

    #[test]
    fn the_words_of_a_create() {
        let word: NewNetwork = serde_json::from_str("\"none\"").unwrap();
        assert_eq!(word, NewNetwork::Word(Word::None));
        let config: NewNetwork = serde_json::from_str(r#"{"allowOut":["1.1.1.1"]}"#).unwrap();
        assert!(matches!(config, NewNetwork::Config(config) if config.allow_out.is_some()));
        assert!(serde_json::from_str::<NewNetwork>("\"all\"").is_err());
        assert!(serde_json::from_str::<NewNetwork>(r#"{"alowOut":[]}"#).is_err());
    }
}
