//! References as `docker pull` takes them.
//!
//! Source: <https://github.com/distribution/reference>, its grammar and its normalization of short names.

use std::fmt;
use std::net::IpAddr;

use crate::digest::Digest;
use crate::error::Error;

/// The registry of short names.
const DEFAULT: &str = "docker.io";
/// Where that registry answers.
const DEFAULT_HOST: &str = "registry-1.docker.io";

/// A reference: `[registry/]path[:tag][@digest]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reference {
    /// As people write it: `docker.io`, `host:5000`.
    pub(crate) registry: String,
    /// `library/python`.
    pub(crate) repository: String,
    /// Of no meaning when there is a digest.
    pub(crate) tag: Option<String>,
    pub(crate) digest: Option<Digest>,
}

/// Whether it is `[a-z0-9]+` with `.`, `_`, `__` or `-`s between.
fn is_path_part(part: &str) -> bool {
    let mut rest = part.as_bytes();
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    loop {
        let word = rest.iter().take_while(|byte| alphanumeric(byte)).count();
        if word == 0 {
            return false;
        }
        rest = &rest[word..];
        let Some(first) = rest.first() else { return true };
        let same = rest.iter().take_while(|byte| *byte == first).count();
        let is_separator = match first {
            b'.' => same == 1,
            b'_' => same <= 2,
            b'-' => true,
            _ => false,
        };
        if !is_separator {
            return false;
        }
        rest = &rest[same..];
    }
}

fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|byte| word(byte) || byte == b'.' || byte == b'-')
}

/// The host of `registry`, without its port.
pub(crate) fn host_of(registry: &str) -> &str {
    if registry.starts_with('[') {
        return registry.split_inclusive(']').next().unwrap_or(registry);
    }
    registry.split(':').next().unwrap_or(registry)
}

fn is_registry(registry: &str) -> bool {
    let host = host_of(registry);
    let port = &registry[host.len()..];
    let is_port = port.is_empty()
        || port.strip_prefix(':').is_some_and(|port| {
            port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
        });
    let is_v6 = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .is_some_and(|host| host.parse::<std::net::Ipv6Addr>().is_ok());
    let is_name = host.len() <= 253
        && host.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        });
    is_port && (is_v6 || is_name)
}

/// Whether `host`, without a port, is this machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl Reference {
    /// Reads a reference; without tag and digest it is `latest`.
    ///
    /// # Errors
    /// [`Error::Reference`], [`Error::Refused`] when the digest is of another algorithm.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let wrong = |reason| Error::Reference { reference: text.chars().take(300).collect(), reason };
        if text.len() > 600 {
            return Err(wrong("it is longer than 600 bytes"));
        }
        let (named, digest) = match text.split_once('@') {
            Some((named, digest)) => {
                let digest = Digest::parse(digest)
                    .map_err(|why| Error::refused(format!("the reference {text:?}"), why))?;
                (named, Some(digest))
            }
            None => (text, None),
        };
        let (registry, rest) = match named.split_once('/') {
            Some((first, rest))
                if first.contains(['.', ':'])
                    || first == "localhost"
                    || first.bytes().any(|byte| byte.is_ascii_uppercase()) =>
            {
                (first, rest)
            }
            _ => (DEFAULT, named),
        };
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (rest, None),
        };
        if !is_registry(registry) {
            return Err(wrong("the registry is no host name with an optional port"));
        }
        if path.is_empty() || path.len() > 255 {
            return Err(wrong("the name has to have 1 to 255 characters"));
        }
        if !path.split('/').all(is_path_part) {
            return Err(wrong("the name may have a-z, 0-9, and '.', '_' and '-' between them"));
        }
        if !tag.is_none_or(is_tag) {
            return Err(wrong("the tag may have 128 letters, digits, '_', '.' and '-'"));
        }
        let registry = match registry.to_ascii_lowercase() {
            hub if hub == "index.docker.io" => DEFAULT.to_owned(),
            other => other,
        };
        let repository = match registry == DEFAULT && !path.contains('/') {
            true => format!("library/{path}"),
            false => path.to_owned(),
        };
        let tag = match (&digest, tag) {
            (_, Some(tag)) => Some(tag.to_owned()),
            (None, None) => Some("latest".to_owned()),
            (Some(_), None) => None,
        };
        Ok(Self { registry, repository, tag, digest })
    }

    /// Where its registry answers: a host with an optional port.
    pub(crate) fn authority(&self) -> &str {
        if self.registry == DEFAULT { DEFAULT_HOST } else { &self.registry }
    }

    /// The repository with its registry: `docker.io/library/python`.
    pub(crate) fn full_repository(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// What a manifest is asked for by.
    pub(crate) fn wanted(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.clone().unwrap_or_else(|| "latest".to_owned()),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.full_repository())?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_as_in_docker() {
        let digest = Digest::of(b"x");
        for (text, full) in [
            ("python", "docker.io/library/python:latest"),
            ("python:3.12", "docker.io/library/python:3.12"),
            ("team/app", "docker.io/team/app:latest"),
            ("index.docker.io/app", "docker.io/library/app:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("host:5000/team/app:v1", "host:5000/team/app:v1"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("Ghcr.io/a/b-c__d.e", "ghcr.io/a/b-c__d.e:latest"),
            (&format!("a@{digest}"), &format!("docker.io/library/a@{digest}")),
            (&format!("a:t@{digest}"), &format!("docker.io/library/a:t@{digest}")),
        ] {
            assert_eq!(Reference::parse(text).unwrap().to_string(), full);
        }
        let both = Reference::parse(&format!("a:t@{digest}")).unwrap();
        assert_eq!(both.wanted(), digest.to_string());
        assert_eq!(both.authority(), DEFAULT_HOST);
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for bad in [
            "",
            "/",
            "a/",
            "UPPER",
            "a b",
            "../etc",
            "a/../b",
            "a:",
            "a:-x",
            "a___b",
            "a..b",
            "-a",
            "host:x/a",
            "host:0/a",
            "host:99999/a",
            "-h.x/a",
            "h..x/a",
            "[::g]/a",
            "a@",
            "a@sha256:x",
            "user:pw@host/a",
            "https://host/a",
            &"a/".repeat(200),
            &format!("a:{}", "t".repeat(129)),
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn loopback_is_an_address_not_a_prefix() {
        for (host, is) in [
            ("127.0.0.1", true),
            ("127.8.8.8", true),
            ("[::1]", true),
            ("localhost", true),
            ("127.0.0.1.evil.example", false),
            ("localhost.evil.example", false),
            ("10.0.0.1", false),
            ("0.0.0.0", false),
        ] {
            assert_eq!(is_loopback(host), is, "{host}");
        }
    }
}
