//! Projects and API keys: who may do what, and how much of it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The project of everything that was made before there were others, and of the server's own key.
pub const DEFAULT_PROJECT: &str = "default";

/// A project: what owns sandboxes and snapshots. 1 to 40 characters of `[a-z0-9-]`, beginning with a letter or a
/// digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(try_from = "String", into = "String")]
pub struct Project(String);

impl Project {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Project {
    fn default() -> Self {
        Self(DEFAULT_PROJECT.to_owned())
    }
}

impl FromStr for Project {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if text.is_empty() || text.len() > 40 || text.starts_with('-') || !text.bytes().all(good) {
            return Err("a project is 1 to 40 of a-z, 0-9 and '-', beginning with a letter or a digit");
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Project {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Project> for String {
    fn from(project: Project) -> Self {
        project.0
    }
}

impl fmt::Display for Project {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How much an API key, or a project, may have at one time. What is left out has no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Limits {
    /// Sandboxes that run, are being made or resumed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sandboxes: Option<u32>,
    /// Sandboxes that are being made: creates and children of forks under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_creating: Option<u32>,
    /// Sandboxes that are paused. A sandbox that pauses at its deadline is paused in any case, and counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_paused: Option<u32>,
    /// Snapshots that are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_snapshots: Option<u32>,
    /// MiB of disk that all of it may come to: the disks of sandboxes, and memory and disk of what is paused or kept.
    #[serde(default, rename = "maxDiskMB", skip_serializing_if = "Option::is_none")]
    pub max_disk_mib: Option<u64>,
}

impl Limits {
    /// Whether one of them is 0, which allows nothing.
    pub fn has_zero(&self) -> bool {
        [self.max_sandboxes, self.max_creating, self.max_paused, self.max_snapshots].contains(&Some(0))
            || self.max_disk_mib == Some(0)
    }
}

/// A row of `GET /projects`, and the reply of `PUT /projects/{name}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ProjectInfo {
    /// Its name.
    pub name: Project,
    /// What all its keys may have together.
    pub limits: Limits,
    /// What they have now.
    pub used: Used,
}

/// How much of what is limited is in use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Used {
    /// Sandboxes that run, are being made or resumed.
    pub sandboxes: u32,
    /// Sandboxes that are being made.
    pub creating: u32,
    /// Sandboxes that are paused.
    pub paused: u32,
    /// Snapshots that are kept.
    pub snapshots: u32,
    /// MiB of disk.
    #[serde(rename = "diskMB")]
    pub disk_mib: u64,
}

/// `POST /api-keys`. Source: E2B's `NewTeamAPIKey`; the rest is Kelvin's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NewApiKey {
    /// What it is called, for people.
    pub name: String,
    /// Whose it is; a project that is not there yet is made.
    #[serde(default)]
    pub project: Project,
    /// Sandboxes of it that run at one time; none is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sandboxes: Option<u32>,
    /// Creates and children of forks of it that are under way at one time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_creating: Option<u32>,
    /// Sandboxes of it that are paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_paused: Option<u32>,
    /// Snapshots of it that are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_snapshots: Option<u32>,
    /// MiB of disk; see [`Limits::max_disk_mib`].
    #[serde(default, rename = "maxDiskMB", skip_serializing_if = "Option::is_none")]
    pub max_disk_mib: Option<u64>,
    /// Requests per second of it, and how many may come at once; none is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<u32>,
}

impl NewApiKey {
    /// What it may have.
    pub fn limits(&self) -> Limits {
        Limits {
            max_sandboxes: self.max_sandboxes,
            max_creating: self.max_creating,
            max_paused: self.max_paused,
            max_snapshots: self.max_snapshots,
            max_disk_mib: self.max_disk_mib,
        }
    }
}

impl ApiKeyInfo {
    /// What it may have.
    pub fn limits(&self) -> Limits {
        Limits {
            max_sandboxes: self.max_sandboxes,
            max_creating: self.max_creating,
            max_paused: self.max_paused,
            max_snapshots: self.max_snapshots,
            max_disk_mib: self.max_disk_mib,
        }
    }
}

/// What of a key may be shown. Source: E2B's `IdentifierMaskingDetails`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct Mask {
    /// What stands before every key.
    pub prefix: String,
    /// Characters of the key after the prefix.
    pub value_length: u32,
    /// Its first characters after the prefix.
    pub masked_value_prefix: String,
    /// Its last characters.
    pub masked_value_suffix: String,
}

/// A row of `GET /api-keys`. Source: E2B's `TeamAPIKey`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct ApiKeyInfo {
    /// Its id, a UUID.
    pub id: String,
    /// What it is called.
    pub name: String,
    /// What of it may be shown.
    pub mask: Mask,
    /// When it was made.
    pub created_at: jiff::Timestamp,
    /// When it was shown last, to a few seconds.
    pub last_used: Option<jiff::Timestamp>,
    /// Kelvin: whose it is.
    pub project: Project,
    /// Kelvin: sandboxes of it that run at one time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_sandboxes: Option<u32>,
    /// Kelvin: creates and children of forks of it that are under way at one time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_creating: Option<u32>,
    /// Kelvin: sandboxes of it that are paused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_paused: Option<u32>,
    /// Kelvin: snapshots of it that are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_snapshots: Option<u32>,
    /// Kelvin: MiB of disk; see [`Limits::max_disk_mib`].
    #[serde(default, rename = "maxDiskMB", skip_serializing_if = "Option::is_none")]
    pub max_disk_mib: Option<u64>,
    /// Kelvin: requests per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<u32>,
}

/// The reply of `POST /api-keys`: the one time that the key itself is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CreatedApiKey {
    /// The key.
    pub key: String,
    /// What it is.
    #[serde(flatten)]
    pub info: ApiKeyInfo,
}

/// A row of `GET /audit`: one request that could change something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct AuditEntry {
    /// Its number; grows.
    pub id: i64,
    /// When it came.
    pub at: jiff::Timestamp,
    /// Of which project.
    pub project: String,
    /// With which key.
    #[serde(rename = "keyID")]
    pub key_id: String,
    /// Method and route.
    pub action: String,
    /// What it was about: a sandbox, a template, a key.
    pub target: String,
    /// The status of the reply; 0 while the request is under way, and of one whose end the server did not live to see.
    pub status: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_is_a_short_plain_name() {
        for good in ["default", "a", "team-1", "0"] {
            assert_eq!(good.parse::<Project>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "A", "a_b", "a/b", &"a".repeat(41)] {
            assert!(bad.parse::<Project>().is_err(), "{bad:?}");
        }
    }
}
