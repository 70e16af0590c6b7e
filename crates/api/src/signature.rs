//! Signed URLs of `/files`: whoever holds one may read or write one path as one user until it expires,
//! without the sandbox's access token. Source: E2B's SDKs, `get_signature`.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use http::{Method, Uri};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::id::same_secret;

/// What a signature allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// `GET /files`.
    Read,
    /// `POST /files`.
    Write,
}

/// What was signed, as the request shows it: nothing of it is resolved or cleaned.
#[derive(Debug, Clone, Copy)]
pub struct Signed<'a> {
    /// The parameter `path`; empty when there is none.
    pub path: &'a str,
    /// The parameter `username`; empty when there is none.
    pub user: &'a str,
    /// What the URL is for.
    pub operation: Operation,
    /// The parameter `signature`.
    pub signature: &'a str,
    /// The parameter `signature_expiration`, seconds since 1970.
    pub expiration: Option<&'a str>,
}

/// The signature of a request, taken from its URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    parameters: HashMap<String, String>,
    operation: Operation,
}

impl Signature {
    /// The signature of a request to `/files`, when it shows one.
    pub fn of(method: &Method, uri: &Uri) -> Option<Self> {
        let operation = match *method {
            Method::GET | Method::HEAD => Operation::Read,
            Method::POST => Operation::Write,
            _ => return None,
        };
        if uri.path() != "/files" {
            return None;
        }
        let parameters = query(uri).ok()?;
        parameters.contains_key("signature").then_some(Self { parameters, operation })
    }

    /// What was signed.
    pub fn signed(&self) -> Signed<'_> {
        let get = |name: &str| self.parameters.get(name).map(String::as_str);
        Signed {
            path: get("path").unwrap_or_default(),
            user: get("username").unwrap_or_default(),
            operation: self.operation,
            signature: get("signature").unwrap_or_default(),
            expiration: get("signature_expiration"),
        }
    }
}

/// The parameters of a query string, decoded; of a name that stands twice, the last.
///
/// # Errors
/// A text for the caller, when it is not UTF-8.
pub fn query(uri: &Uri) -> Result<HashMap<String, String>, &'static str> {
    let decode = |text: &str| {
        percent_encoding::percent_decode_str(&text.replace('+', " "))
            .decode_utf8()
            .map(std::borrow::Cow::into_owned)
            .map_err(|_| "the query string is not UTF-8")
    };
    uri.query()
        .unwrap_or_default()
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| Ok((decode(name)?, decode(value)?)))
        .collect()
}

/// Why a signature admits nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// It is not the signature of this token, or what it signs is something else.
    #[error("invalid signature")]
    Invalid,
    /// It was right once.
    #[error("signature is already expired")]
    Expired,
}

/// The signature of one path for one operation.
///
/// # Arguments
/// `token`: the sandbox's access token. `expiration`: seconds since 1970, as it stands in the URL.
pub fn sign(path: &str, operation: Operation, user: &str, token: &str, expiration: Option<&str>) -> String {
    let operation = match operation {
        Operation::Read => "read",
        Operation::Write => "write",
    };
    let mut text = format!("{path}:{operation}:{user}:{token}");
    if let Some(expiration) = expiration {
        text.push(':');
        text.push_str(expiration);
    }
    let digest = Sha256::digest(text.as_bytes());
    format!("v1_{}", base64::engine::general_purpose::STANDARD_NO_PAD.encode(digest))
}

impl Signed<'_> {
    /// Whether the holder of `token` signed this, expired or not.
    pub fn is_of(&self, token: &str) -> bool {
        let right = sign(self.path, self.operation, self.user, token, self.expiration);
        same_secret(self.signature.as_bytes(), right.as_bytes())
    }

    /// Admits the request or says why not.
    ///
    /// # Errors
    /// `Invalid` before `Expired`: whoever cannot sign learns nothing about times.
    pub fn check(&self, token: &str) -> Result<(), SignatureError> {
        if !self.is_of(token) {
            return Err(SignatureError::Invalid);
        }
        let Some(expiration) = self.expiration else {
            return Ok(());
        };
        let until: i64 = expiration.parse().map_err(|_| SignatureError::Invalid)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        if until < i64::try_from(now).unwrap_or(i64::MAX) { Err(SignatureError::Expired) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed<'a>(path: &'a str, signature: &'a str, expiration: Option<&'a str>) -> Signed<'a> {
        Signed { path, user: "user", operation: Operation::Read, signature, expiration }
    }

    #[test]
    fn a_signature_is_for_one_path_one_operation_one_user_and_one_token() {
        let right = sign("a b", Operation::Read, "user", "token", None);
        assert_eq!(signed("a b", &right, None).check("token"), Ok(()));
        assert_eq!(signed("a c", &right, None).check("token"), Err(SignatureError::Invalid));
        assert_eq!(signed("a b", &right, None).check("other"), Err(SignatureError::Invalid));
        let write = Signed { operation: Operation::Write, ..signed("a b", &right, None) };
        assert_eq!(write.check("token"), Err(SignatureError::Invalid));
        let other = Signed { user: "root", ..signed("a b", &right, None) };
        assert_eq!(other.check("token"), Err(SignatureError::Invalid));
        assert_eq!(
            signed("a b", &right, Some("99999999999")).check("token"),
            Err(SignatureError::Invalid),
            "an expiration that was not signed"
        );
    }

    proptest::proptest! {
        #[test]
        fn any_url_parses_or_fails_without_panic(query in ".{0,200}", method in "GET|POST|HEAD|PUT") {
            // What a caller sends as a query, escaped or not.
            if let Ok(uri) = format!("/files?{query}").parse::<Uri>()
                && let Some(signature) = Signature::of(&method.parse().unwrap(), &uri)
            {
                proptest::prop_assert!(signature.signed().check("token").is_err());
            }
        }
    }

    #[test]
    fn a_signature_ends() {
        for (expiration, outcome) in [
            ("1", Err(SignatureError::Expired)),
            ("99999999999", Ok(())),
            ("soon", Err(SignatureError::Invalid)),
        ] {
            let text = sign("x", Operation::Read, "user", "t", Some(expiration));
            assert_eq!(signed("x", &text, Some(expiration)).check("t"), outcome, "{expiration}");
        }
    }

    #[test]
    fn the_form_is_the_one_that_the_clients_make() {
        // Made with Python: hashlib.sha256(b"f.txt:read:user:tok").digest(), base64 without padding.
        assert_eq!(sign("f.txt", Operation::Read, "user", "tok", None), EXPECTED);
    }

    const EXPECTED: &str = "v1_iqDwmk/2vofIGBaFeTYxeQSKnnyi9gxYwXXTDtlGsQI";
}
