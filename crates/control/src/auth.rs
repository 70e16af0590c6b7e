//! The API key: made at the first start, kept in a file that only its owner reads.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;

use http::HeaderMap;
use kelvin_api::error::{Failure, Kind};
use kelvin_api::id::{Token, same_secret};

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
                let mut random = [0; 20];
                getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
                let mut key = "e2b_".to_owned();
                for byte in random {
                    let _ = write!(key, "{byte:02x}");
                }
                // Whole or not there: a half-written key would lock everybody out.
                let fresh = path.with_extension("new");
                let _ = std::fs::remove_file(&fresh);
                let mut file =
                    std::fs::File::options().write(true).create_new(true).mode(0o600).open(&fresh)?;
                writeln!(file, "{key}")?;
                file.sync_all()?;
                std::fs::rename(&fresh, path)?;
                Ok(Self(Token::from_secret(key)))
            }
            Err(error) => Err(error),
        }
    }

    /// Whether a request shows the key, by `X-API-KEY` or as a bearer token.
    ///
    /// # Errors
    /// `Unauthenticated`; it does not say whether a key was close.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), Failure> {
        let shown = headers.get("x-api-key").map(http::HeaderValue::as_bytes).or_else(|| {
            headers.get("authorization").and_then(|value| value.as_bytes().strip_prefix(b"Bearer "))
        });
        let remedy = "send the key in the header X-API-KEY; the server keeps it in <data-dir>/api-key";
        match shown {
            Some(key) if same_secret(key, self.0.expose().as_bytes()) => Ok(()),
            Some(_) => {
                Err(Failure::new(Kind::Unauthenticated, "wrong_api_key", "the API key is not known", remedy))
            }
            None => {
                Err(Failure::new(Kind::Unauthenticated, "no_api_key", "the request has no API key", remedy))
            }
        }
    }
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
        let mut headers = HeaderMap::new();
        assert_eq!(key.check(&headers).unwrap_err().error_code, "no_api_key");
        headers.insert("x-api-key", text.trim().parse().unwrap());
        ApiKey::open(&path).unwrap().check(&headers).unwrap();
        headers.insert("x-api-key", "e2b_0000000000000000000000000000000000000000".parse().unwrap());
        assert_eq!(key.check(&headers).unwrap_err().error_code, "wrong_api_key");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(ApiKey::open(&path).is_err());
    }
}
