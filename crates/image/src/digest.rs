//! Digests: SHA-256 and nothing else.

use std::fmt;
use std::io::{self, Read};

use kelvin_api::digest::hex;
use sha2::{Digest as _, Sha256};

use crate::error::{Refusal, shown};

/// A SHA-256 digest: 64 hexadecimal digits in lower case, safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Digest(String);

impl Digest {
    /// Reads `sha256:…`.
    pub(crate) fn parse(text: &str) -> Result<Self, Refusal> {
        let wrong = || Refusal::Algorithm(shown(text.as_bytes()));
        let digits = text.strip_prefix("sha256:").ok_or_else(wrong)?;
        Self::from_hex(digits).ok_or_else(wrong)
    }

    pub(crate) fn from_hex(digits: &str) -> Option<Self> {
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (digits.len() == 64 && digits.bytes().all(is_hex)).then(|| Self(digits.to_owned()))
    }

    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(hex(&Sha256::digest(bytes)))
    }

    pub(crate) fn finish(hasher: Sha256) -> Self {
        Self(hex(&hasher.finalize()))
    }

    /// The digits.
    pub(crate) fn hex(&self) -> &str {
        &self.0
    }

    /// Fails unless `found` is this one.
    pub(crate) fn check(&self, found: &Self) -> Result<(), Refusal> {
        if self == found {
            return Ok(());
        }
        Err(Refusal::Digest { expected: self.to_string(), found: found.to_string() })
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

/// A reader that digests and counts what goes through it.
pub(crate) struct Hashing<R> {
    inner: R,
    hasher: Sha256,
    bytes: u64,
}

impl<R: Read> Hashing<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, hasher: Sha256::new(), bytes: 0 }
    }

    /// The digest of what has been read, and how much that was.
    pub(crate) fn finish(self) -> (Digest, u64) {
        (Digest::finish(self.hasher), self.bytes)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.bytes += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sha256_is_a_digest() {
        let one = Digest::of(b"x");
        assert_eq!(Digest::parse(&one.to_string()), Ok(one.clone()));
        for bad in ["", "sha256:", "sha256:../x", &one.to_string().to_uppercase(), one.hex()] {
            assert!(Digest::parse(bad).is_err(), "{bad:?}");
        }
        let long = format!("sha512:{}", "0".repeat(128));
        assert!(Digest::parse(&long).is_err_and(|why| why.to_string().contains("sha512")));
    }
}
