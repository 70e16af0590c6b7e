//! Identifiers. Each kind is its own type, so that two of them cannot be swapped.
//!
//! An id is 1 to 64 characters of `[a-z0-9]`, safe as a file name, a DNS label and a URL segment:
//! official clients build host names from it. Parsing is the only way in from outside.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a {kind} id: {reason}")]
pub struct ParseIdError {
    kind: &'static str,
    reason: &'static str,
}

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

fn random(length: usize) -> String {
    let mut bytes = [0_u8; 64];
    let bytes = &mut bytes[..length.min(64)];
    #[cfg(feature = "testing")]
    if testing::fill(bytes) {
        return bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte & 31)])).collect();
    }
    // The kernel's generator is up long before any of our code runs; a failure here means a broken host.
    getrandom::fill(bytes).expect("the kernel gives random bytes");
    bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte & 31)])).collect()
}

/// Ids that are the same each time, for tests that repeat exactly.
#[cfg(feature = "testing")]
pub mod testing {
    use std::cell::Cell;

    thread_local! {
        static NEXT: Cell<Option<u64>> = const { Cell::new(None) };
    }

    /// From now on the ids of this thread follow from `seed`; `None` makes them random again.
    pub fn seed(seed: Option<u64>) {
        NEXT.set(seed);
    }

    /// Fills `bytes`, when there is a seed. Source: Steele et al., "Fast Splittable Pseudorandom Number Generators".
    pub(super) fn fill(bytes: &mut [u8]) -> bool {
        let Some(mut state) = NEXT.get() else { return false };
        for byte in bytes {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            *byte = (mixed >> 56) as u8;
        }
        NEXT.set(Some(state));
        true
    }
}

/// An identifier that is a text: parsed on its way in, shown as it is.
macro_rules! text {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// It as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;

            fn try_from(text: String) -> Result<Self, ParseIdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        text!($(#[$doc])* $name);

        impl $name {
            /// A new id of 100 random bits from the kernel.
            pub fn random() -> Self {
                Self(random(20))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let reason = if text.is_empty() {
                    "it is empty"
                } else if text.len() > 64 {
                    "it is longer than 64 characters"
                } else if !text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()) {
                    "only a-z and 0-9 are allowed"
                } else {
                    return Ok(Self(text.to_owned()));
                };
                Err(ParseIdError { kind: $kind, reason })
            }
        }
    };
}

id!(
    /// A sandbox: what a user creates, lists and kills.
    SandboxId,
    "sandbox"
);
id!(
    /// One virtual machine on a node; a sandbox has one while it runs.
    VmId,
    "VM"
);
id!(
    /// A published snapshot: memory, device state and disk of one instant.
    SnapshotId,
    "snapshot"
);

/// The name of a template: 1 to 64 characters of `[a-z0-9._-]`, beginning with a letter or a digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(try_from = "String", into = "String")]
pub struct TemplateName(String);

impl TemplateName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TemplateName {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let fail = |reason| Err(ParseIdError { kind: "template", reason });
        match text.bytes().next() {
            None => fail("it is empty"),
            Some(first) if !(first.is_ascii_lowercase() || first.is_ascii_digit()) => {
                fail("it has to begin with a-z or 0-9")
            }
            Some(_) if text.len() > 64 => fail("it is longer than 64 characters"),
            Some(_)
                if !text.bytes().all(|byte| {
                    byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte)
                }) =>
            {
                fail("only a-z, 0-9, '.', '_' and '-' are allowed")
            }
            Some(_) => Ok(Self(text.to_owned())),
        }
    }
}

impl TryFrom<String> for TemplateName {
    type Error = ParseIdError;

    fn try_from(text: String) -> Result<Self, ParseIdError> {
        text.parse()
    }
}

impl From<TemplateName> for String {
    fn from(name: TemplateName) -> Self {
        name.0
    }
}

impl fmt::Display for TemplateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

text!(
    /// A build of a template: a UUID in lower case, as official clients parse it.
    BuildId
);

impl BuildId {
    /// Lengths of its groups of hexadecimal digits. Source: RFC 9562.
    const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];

    /// A new one, of version 4: random.
    pub fn random() -> Self {
        let digits: String = random(64)
            .bytes()
            .map(|letter| char::from(b"0123456789abcdef"[usize::from(letter & 15)]))
            .take(32)
            .collect();
        let (a, rest) = digits.split_at(8);
        let (b, c, d, e) = (&rest[..4], &rest[5..8], &rest[9..12], &rest[12..]);
        Self(format!("{a}-{b}-4{c}-a{d}-{e}"))
    }
}

/// Digits as they are written here: in lower case.
fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

impl FromStr for BuildId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let mut groups = text.split('-');
        let is_one = Self::GROUPS
            .iter()
            .all(|&length| groups.next().is_some_and(|group| group.len() == length && is_hex(group)));
        if !is_one || groups.next().is_some() {
            return Err(ParseIdError { kind: "build", reason: "it is no UUID in lower case" });
        }
        Ok(Self(text.to_owned()))
    }
}

/// A version of a template: what one build has made, or, without a build, what was imported under the name or built by a release
/// that kept one version of it. As text `name@build`, or `name`; no tag is written so, and no name has an `@`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TemplateVersion {
    /// Of the template.
    pub name: TemplateName,
    /// The build that has made it.
    pub build: Option<BuildId>,
}

impl TemplateVersion {
    /// What `build` has made of `name`.
    pub fn of(name: TemplateName, build: BuildId) -> Self {
        Self { name, build: Some(build) }
    }
}

impl From<TemplateName> for TemplateVersion {
    fn from(name: TemplateName) -> Self {
        Self { name, build: None }
    }
}

impl FromStr for TemplateVersion {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        match text.split_once('@') {
            None => Ok(text.parse::<TemplateName>()?.into()),
            Some((name, build)) => Ok(Self::of(name.parse()?, build.parse()?)),
        }
    }
}

impl TryFrom<String> for TemplateVersion {
    type Error = ParseIdError;

    fn try_from(text: String) -> Result<Self, ParseIdError> {
        text.parse()
    }
}

impl From<TemplateVersion> for String {
    fn from(version: TemplateVersion) -> Self {
        version.to_string()
    }
}

impl fmt::Display for TemplateVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.build {
            None => write!(f, "{}", self.name),
            Some(build) => write!(f, "{}@{build}", self.name),
        }
    }
}

impl fmt::Debug for TemplateVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

text!(
    /// What uploaded files are called: 64 hexadecimal digits in lower case, which the client has made of them.
    FilesHash
);

impl FromStr for FilesHash {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        if text.len() != 64 || !is_hex(text) {
            let reason = "it is not 64 hexadecimal digits in lower case";
            return Err(ParseIdError { kind: "files", reason });
        }
        Ok(Self(text.to_owned()))
    }
}

/// A secret token, shown to its owner once; `Debug` never prints it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(transparent)]
pub struct Token(String);

impl Token {
    /// 160 random bits.
    pub fn random() -> Self {
        Self(random(32))
    }

    /// A token received from a peer or read from the node's own files.
    pub fn from_secret(secret: String) -> Self {
        Self(secret)
    }

    /// The secret itself, for a header or a comparison.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Compares without telling by its duration where the texts differ.
    pub fn matches(&self, other: &str) -> bool {
        same_secret(self.0.as_bytes(), other.as_bytes())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Compares two secrets in a time that depends on their lengths only.
pub fn same_secret(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |different, (x, y)| different | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_refuse_what_could_leave_a_directory() {
        for bad in ["", "../etc", "a/b", "A", "a-b", "a b", "ä", &"a".repeat(65)] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad:?}");
        }
        for bad in ["", ".hidden", "-rf", "../x", "a/b", "Base", &"a".repeat(65)] {
            assert!(bad.parse::<TemplateName>().is_err(), "{bad:?}");
        }
        assert_eq!("base".parse::<TemplateName>().unwrap().as_str(), "base");
    }

    #[test]
    fn random_ids_parse_and_differ() {
        let ids: std::collections::BTreeSet<_> = (0..1000).map(|_| SandboxId::random()).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| id.as_str().parse::<SandboxId>().is_ok()));
    }

    #[test]
    fn a_build_has_a_uuid_and_files_a_hash() {
        let ids: std::collections::BTreeSet<_> = (0..1000).map(|_| BuildId::random()).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| id.as_str().parse::<BuildId>().as_ref() == Ok(id)));
        let one = BuildId::random().to_string();
        for bad in ["", "x", &one[1..], &one.to_uppercase(), &format!("{one}-"), &one.replace('-', "")] {
            assert!(bad.parse::<BuildId>().is_err(), "{bad:?}");
        }
        assert!("a1".repeat(32).parse::<FilesHash>().is_ok());
        for bad in ["", "../x", &"A1".repeat(32), &"a1".repeat(33), &"g1".repeat(32)] {
            assert!(bad.parse::<FilesHash>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_version_is_read_as_it_is_written_and_no_tag_is_one() {
        let (name, build): (TemplateName, _) = ("web.v-1_0".parse().unwrap(), BuildId::random());
        let of = TemplateVersion::of(name.clone(), build.clone());
        assert_eq!(of.to_string(), format!("web.v-1_0@{build}"));
        for version in [of, name.into()] {
            assert_eq!(version.to_string().parse::<TemplateVersion>().as_ref(), Ok(&version));
        }
        for bad in [
            "",
            "@",
            "web@",
            "web@v1",
            "web:v1",
            &format!("@{build}"),
            &format!("../x@{build}"),
            &format!("web@{build}@"),
        ] {
            assert!(bad.parse::<TemplateVersion>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn tokens_do_not_print() {
        let token = Token::random();
        assert!(!format!("{token:?}").contains(token.expose()));
        assert!(token.matches(token.expose()) && !token.matches("x"));
    }
}
