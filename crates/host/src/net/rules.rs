//! The rules of a slot and of the host, as nftables reads them. Pure text: who runs it is elsewhere.
//!
//! ```text
//! guest ── tap0 ─┬─ 169.254.0.22:53 ──> our resolver            (socket in the slot, served by `egress`)
//!                ├─ 80, 443 under domain rules ──> our proxy    (likewise)
//!                ├─ never reachable ──> reset or ICMP, counted by reason
//!                ├─ allowed ─ denied ─ open ──> up0 ──> host: forward, masquerade on the uplink
//! gateway ── up0 ┴─> guest, from the host's end of the slot alone
//! ```
//!
//! A slot's rules live and die with its namespace. The host's table holds for all slots and repeats what must
//! hold even if a slot's rules were wrong: no way to the host, to another slot, or past the uplink.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use kelvin_api::network::{NEVER, Names, Policy};

use super::addresses::{GUEST, GUEST_GATEWAY, PROXY_PORT, Range, TAP, UP};

/// Why something is refused: name of the counter after `denied_`, prefix in the log, key in the API.
pub const REASONS: [&str; 13] = [
    "spoofed",
    "host",
    "sandboxes",
    "metadata",
    "link_local",
    "private",
    "dns",
    "no_uplink",
    "policy",
    "connections",
    "bandwidth",
    "inbound",
    "invalid",
];

/// The group to which refusals are logged, inside a slot.
pub const LOG_GROUP: u16 = 7;

/// The generation of a new slot's rules.
const FIRST: u32 = 1;

/// What a slot's rules depend on beside the policy.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The slots' addresses.
    pub range: Range,
    /// Which slot.
    pub number: u16,
    /// Addresses of the host itself.
    pub host: Vec<Ipv4Addr>,
    /// Whether anything leads out.
    pub has_uplink: bool,
    /// The most of the node, each way; `None` is no limit.
    pub bandwidth_mbit: Option<u32>,
    /// The most of the node.
    pub max_connections: u32,
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

/// The whole table of a new slot, with the default policy.
#[allow(clippy::too_many_lines, reason = "one table of rules, top to bottom")]
pub fn slot(setting: &Setting) -> String {
    let (range, address, host_end) =
        (setting.range, setting.range.address(setting.number), setting.range.host_end(setting.number));
    let mut text = String::from("table inet kelvin {\n counter sent {}\n counter received {}\n");
    for reason in REASONS {
        let _ = writeln!(text, " counter denied_{reason} {{}}");
        // Limited, so that a guest cannot make the host log without end; the counter counts all.
        let _ = writeln!(
            text,
            " chain no_{reason} {{\n counter name denied_{reason} limit rate 10/second burst 20 packets log group \
             {LOG_GROUP} prefix \"{reason}\" snaplen 64\n goto refuse\n }}"
        );
    }
    let never = list(NEVER);
    let elements = match list(&setting.host).as_str() {
        "" => String::new(),
        own => format!(" elements = {{ {own} }};"),
    };
    let no_uplink = if setting.has_uplink { "" } else { "goto no_no_uplink" };
    let _ = write!(
        text,
        r#"
 set never {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {never} }}; }}
 set host {{ type ipv4_addr;{elements} }}
 chain refuse {{
  meta l4proto tcp reject with tcp reset
  reject with icmp type admin-prohibited
 }}
 chain listed {{ }}
 chain names {{ }}
 chain shape {{ }}
 chain limits {{ }}
 chain known {{ }}
 chain from_guest {{
  ct state invalid counter name denied_invalid drop
  ct state related accept
  ct state established ct direction reply accept
  jump known
  ip daddr @host goto no_host
  ip daddr {range} goto no_sandboxes
  ip daddr 169.254.169.254 goto no_metadata
  ip daddr 169.254.0.0/16 goto no_link_local
  ip daddr @never goto no_private
  meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} goto no_dns
  {no_uplink}
  jump listed
  goto limits
 }}
 chain in_raw {{
  type filter hook prerouting priority raw; policy accept;
  iifname "{TAP}" ip saddr != {GUEST} counter name denied_spoofed drop
  iifname "{TAP}" counter name sent
  iifname "{TAP}" jump shape
 }}
 chain out_raw {{
  type filter hook postrouting priority 300; policy accept;
  oifname "{TAP}" counter name received
  oifname "{TAP}" jump shape
 }}
 chain nat_in {{
  type nat hook prerouting priority dstnat; policy accept;
  iifname "{UP}" ip saddr {host_end} meta l4proto tcp dnat ip to {GUEST}
  iifname "{TAP}" ip daddr != @never ip daddr != @host jump names
 }}
 chain nat_out {{
  type nat hook postrouting priority srcnat; policy accept;
  oifname "{UP}" snat ip to {address}
  oifname "{TAP}" snat ip to {GUEST_GATEWAY}
 }}
 chain local_in {{
  type filter hook input priority filter; policy drop;
  ct state established,related accept
  iifname "{TAP}" ip daddr {GUEST_GATEWAY} meta l4proto {{ tcp, udp }} th dport 53 accept
  iifname "{TAP}" ct status dnat tcp dport {PROXY_PORT} goto limits
  iifname "{TAP}" goto no_host
  iifname "lo" accept
 }}
 chain through {{
  type filter hook forward priority filter; policy drop;
  tcp flags syn tcp option maxseg size set rt mtu
  iifname "{TAP}" oifname "{UP}" goto from_guest
  iifname "{TAP}" goto no_host
  iifname "{UP}" ct state established,related accept
  iifname "{UP}" ct status dnat accept
  iifname "{UP}" counter name denied_inbound
 }}
}}
table netdev kelvin {{
 counter denied_ipv6 {{}}
 chain ingress {{
  type filter hook ingress device "{TAP}" priority 0; policy accept;
  ether type ip6 counter name denied_ipv6 drop
 }}
}}
"#
    );
    text.push_str(&changes(setting, &Policy::default(), FIRST));
    text
}

/// What changes when the policy of a slot changes; one transaction.
///
/// Connections bear the generation of the rules that let them through. Those of a former one are looked at again
/// with the guest's next packet, its acknowledgement of what still arrives, say: what is no longer allowed gets a
/// reset there. To forget them instead would leave a guest that only listens waiting for ever.
pub fn changes(setting: &Setting, policy: &Policy, generation: u32) -> String {
    let mut text = String::new();
    for chain in ["known", "listed", "names", "shape", "limits"] {
        let _ = writeln!(text, "flush chain inet kelvin {chain}");
    }
    own(&mut text, setting, policy);
    let connections = policy.max_connections.unwrap_or(u32::MAX).min(setting.max_connections);
    let _ = writeln!(
        text,
        "add rule inet kelvin limits ct state new ct count over {connections} goto no_connections\n\
         add rule inet kelvin limits ct mark set {generation}\n\
         add rule inet kelvin known ct mark {generation} accept\n\
         add rule inet kelvin limits accept"
    );
    text
}

/// What the policy of a machine that has not run yet adds to a new slot's rules. Nothing is taken away, which would
/// cost several times as much, on the path of a create.
pub fn additions(setting: &Setting, policy: &Policy) -> String {
    let mut text = String::new();
    own(&mut text, setting, policy);
    if let Some(connections) = policy.max_connections.filter(|own| *own < setting.max_connections) {
        let _ = writeln!(
            text,
            "insert rule inet kelvin limits ct state new ct count over {connections} goto no_connections"
        );
    }
    text
}

fn own(text: &mut String, setting: &Setting, policy: &Policy) {
    // Sets without names, made with their rule: adding to a named one takes the kernel six times as long. In such a
    // set blocks must not overlap.
    let blocks = |nets: &[Ipv4Net]| list(nets.iter().filter(|net| net.prefix_len() != 0));
    let allows_all = policy.allow.iter().any(|net| net.prefix_len() == 0);
    let (allowed, denied) = (blocks(&policy.allow), blocks(&policy.deny));
    if !allowed.is_empty() {
        let _ = writeln!(text, "add rule inet kelvin listed ip daddr {{ {allowed} }} goto limits");
    }
    if !denied.is_empty() && !allows_all {
        let _ = writeln!(text, "add rule inet kelvin listed ip daddr {{ {denied} }} goto no_policy");
    }
    if policy.denies_all() {
        let _ = writeln!(text, "add rule inet kelvin listed goto no_policy");
    }
    if matches!(policy.names(), Names::Listed(_)) && setting.has_uplink {
        let others = match allowed.as_str() {
            "" => String::new(),
            allowed => format!("ip daddr != {{ {allowed} }} "),
        };
        let _ = writeln!(
            text,
            "add rule inet kelvin names {others}tcp dport {{ 80, 443 }} redirect to :{PROXY_PORT}"
        );
    }
    let smaller = |own: Option<u32>, most: Option<u32>| match (own, most) {
        (Some(own), Some(most)) => Some(own.min(most)),
        (own, most) => own.or(most),
    };
    if let Some(mbit) = smaller(policy.bandwidth_mbit, setting.bandwidth_mbit) {
        // The kernel's bucket holds a second's worth beside the burst: so much may come at once.
        let rate = u64::from(mbit) * 125_000;
        let _ = writeln!(
            text,
            "add rule inet kelvin shape iifname \"{TAP}\" limit rate over {rate} bytes/second burst 64 kbytes counter name denied_bandwidth drop\n\
             add rule inet kelvin shape oifname \"{TAP}\" limit rate over {rate} bytes/second burst 64 kbytes counter name denied_bandwidth drop"
        );
    }
}

/// The host's table for all slots of `range`; replaces one that is there.
pub fn host(range: Range, uplink: Option<&str>, user: u32) -> String {
    let (table, links) = (range.table(), range.links());
    let out = match uplink {
        Some(name) => format!(
            "iifname \"{links}*\" oifname != \"{name}\" goto refuse\n  iifname \"{links}*\" ip daddr {{ {} }} goto refuse\n  iifname \"{links}*\" accept",
            list(NEVER)
        ),
        None => format!("iifname \"{links}*\" goto refuse"),
    };
    let masquerade = uplink.map_or_else(String::new, |name| {
        format!(
            " chain nat {{\n  type nat hook postrouting priority srcnat; policy accept;\n  ip saddr {range} oifname \"{name}\" masquerade\n }}\n"
        )
    });
    format!(
        r#"
table inet {table}
delete table inet {table}
table inet {table} {{
 counter refused {{}}
 chain refuse {{
  counter name refused
  meta l4proto tcp reject with tcp reset
  reject with icmpx type admin-prohibited
 }}
 chain input {{
  type filter hook input priority -10; policy accept;
  iifname "{links}*" ct state established,related accept
  iifname "{links}*" goto refuse
 }}
 chain output {{
  type filter hook output priority -10; policy accept;
  oifname "{links}*" meta skuid != {user} goto refuse
 }}
 chain forward {{
  type filter hook forward priority -10; policy accept;
  {out}
  oifname "{links}*" ct state established,related accept
  oifname "{links}*" drop
 }}
{masquerade}}}
"#
    )
}

/// Removes the host's table. Fails when it is not there.
pub fn host_gone(range: Range) -> String {
    format!("delete table inet {}", range.table())
}
