//! Secrets of API keys, and the server's own: made at the first start, kept in a file that only its owner reads.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;

use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::{Token, same_secret};

/// What stands before every key. Source: E2B's SDKs, which insist on it.
pub(crate) const PREFIX: &str = "e2b_";

/// The key of this server.
#[derive(Debug, Clone)]
pub struct ApiKey(Token);

impl ApiKey {
    /// Reads the key from `path`, or makes one there with mode 0600.
    ///
    /// # Errors
    /// When the file cannot be read or made, or others may read it.
    pub fn open(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
        match std::fs::metadata(path) {
            Ok(found) => {
                if found.permissions().mode() & 0o077 != 0 {
                    let text = format!(
                        "{} can be read by others: chmod 600 it, or remove it to get a new key",
                        path.display()
                    );
                    return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
                }
                let text = std::fs::read_to_string(path)?.trim().to_owned();
                if text.len() < 16 {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("{} holds no key", path.display()),
                    ));
                }
                Ok(Self(Token::from_secret(text)))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = random_key().map_err(io::Error::other)?;
                // Whole or not there: a half-written key would lock everybody out.
                let fresh = path.with_extension("new");
                let _ = std::fs::remove_file(&fresh);
                let mut file =
                    std::fs::File::options().write(true).create_new(true).mode(0o600).open(&fresh)?;
                writeln!(file, "{key}")?;
                file.sync_all()?;
                std::fs::rename(&fresh, path)?;
                if let Some(parent) = path.parent() {
                    std::fs::File::open(parent)?.sync_all()?;
                }
                Ok(Self(Token::from_secret(key)))
            }
            Err(error) => Err(error),
        }
    }

    /// A secret for `purpose` that follows from this key, and that does not tell it.
    pub(crate) fn secret_for(&self, purpose: &str) -> Token {
        let text = format!("{purpose}\n{}", self.0.expose());
        Token::from_secret(kelvin_api::digest::sha256(text.as_bytes()))
    }

    /// Whether `shown` is this key.
    pub fn matches(&self, shown: &str) -> bool {
        same_secret(shown.as_bytes(), self.0.expose().as_bytes())
    }
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut random = [0; N];
    getrandom::fill(&mut random).map_err(|error| {
        Failure::new(ErrorCode::NoEntropy, "the kernel gives no random bytes", "look at the host")
            .with_cause(&std::io::Error::other(error.to_string()))
    })?;
    Ok(random)
}

/// A new key.
///
/// # Errors
/// When the kernel gives no random bytes.
pub fn random_key() -> Result<String, Failure> {
    let mut key = PREFIX.to_owned();
    for byte in random::<20>()? {
        let _ = write!(key, "{byte:02x}");
    }
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api-key");
        let key = ApiKey::open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(key.matches(text.trim()));
        assert!(ApiKey::open(&path).unwrap().matches(text.trim()));
        assert!(!key.matches("e2b_0000000000000000000000000000000000000000"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(ApiKey::open(&path).is_err());
    }
}
