//! How a registry is shown who asks: Basic, or a token of the service that it names.
//!
//! Source: distribution `docs/spec/auth/token.md`, `docs/spec/auth/oauth.md`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Uri};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;

use super::credentials::{Credentials, IDENTITY};
use super::http::{Ask, Http, Trouble, host, later};
use super::reach::Reach;
use crate::error::{Error, shown};
use crate::limits::Limits;
use crate::reference::is_loopback;

/// Bytes of the answer with a token.
const MAX_TOKEN: u64 = 1 << 20;
const QUERY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// What a registry asks for with a 401.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

#[derive(Deserialize)]
struct Granted {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
}

/// The parameters of a challenge: `a="b\"c", d=e`.
fn parameters(mut text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    while let Some((name, rest)) = text.split_once('=') {
        let name = name.trim_matches([' ', ',', '\t']).to_ascii_lowercase();
        let value;
        if let Some(quoted) = rest.strip_prefix('"') {
            let (mut end, mut plain, mut is_escaped) = (quoted.len(), String::new(), false);
            for (at, letter) in quoted.char_indices() {
                if !is_escaped && letter == '"' {
                    end = at;
                    break;
                }
                is_escaped = !is_escaped && letter == '\\';
                if !is_escaped {
                    plain.push(letter);
                }
            }
            value = plain;
            text = quoted.get(end + 1..).unwrap_or_default();
        } else {
            let (plain, left) = rest.split_once(',').unwrap_or((rest, ""));
            value = plain.trim().to_owned();
            text = left;
        }
        found.push((name, value));
    }
    found
}

impl Challenge {
    /// The strongest that is understood.
    pub(super) fn read(headers: &HeaderMap) -> Option<Self> {
        let mut basic = None;
        for value in headers.get_all(header::WWW_AUTHENTICATE) {
            let text = value.to_str().ok().filter(|text| text.len() <= 8192)?;
            let (scheme, rest) = text.split_once(' ').unwrap_or((text, ""));
            if scheme.eq_ignore_ascii_case("bearer") {
                let mut all = parameters(rest);
                let mut take = |name: &str| {
                    let at = all.iter().position(|(known, _)| known == name)?;
                    Some(all.swap_remove(at).1)
                };
                if let Some(realm) = take("realm") {
                    return Some(Self::Bearer { realm, service: take("service"), scope: take("scope") });
                }
            } else if scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Self::Basic);
            }
        }
        basic
    }
}

/// A header that is not shown.
fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn basic(credentials: &Credentials) -> Option<HeaderValue> {
    let pair = format!("{}:{}", credentials.username, credentials.password.expose());
    secret(&format!("Basic {}", STANDARD.encode(pair)))
}

fn encoded(text: &str) -> impl std::fmt::Display {
    utf8_percent_encode(text, QUERY).to_string()
}

/// Who asks, and where.
pub(super) struct Asker<'a> {
    pub(super) http: &'a Http,
    pub(super) limits: &'a Limits,
    /// The registry's host, with its port.
    pub(super) registry: &'a str,
    pub(super) repository: &'a str,
    pub(super) is_insecure: bool,
    pub(super) reach: Reach,
    pub(super) credentials: Option<&'a Credentials>,
}

impl Asker<'_> {
    fn denied(&self, reason: impl Into<String>) -> Trouble {
        Error::Denied { registry: self.registry.to_owned(), reason: reason.into() }.into()
    }

    /// What to show for `challenge`.
    ///
    /// # Errors
    /// `Denied` when there is nothing to show, or the service refuses; `Later` when it cannot be used now.
    pub(super) async fn answer(&self, challenge: Challenge) -> Result<HeaderValue, Trouble> {
        let (realm, service, scope) = match (challenge, self.credentials) {
            (Challenge::Basic, Some(credentials)) => {
                return basic(credentials).ok_or_else(|| self.denied("the credentials cannot be sent"));
            }
            (Challenge::Basic, None) => return Err(self.denied("it wants credentials, and there are none")),
            (Challenge::Bearer { realm, service, scope }, _) => (realm, service, scope),
        };
        let odd = || self.denied("the service that gives tokens has an odd address");
        let address: Uri = realm.parse().map_err(|_| odd())?;
        let is_plain = address.scheme_str() == Some("http");
        let may_be_plain = self.is_insecure
            && address.host().is_some_and(|host| {
                is_loopback(host) || host.eq_ignore_ascii_case(crate::reference::host_of(self.registry))
            });
        if address.host().is_none() || !(address.scheme_str() == Some("https") || is_plain && may_be_plain) {
            return Err(self.denied(format!(
                "its tokens come from {} without HTTPS, where no credentials are sent",
                host(&address)
            )));
        }
        // What is asked for is ours to say: to pull this one repository.
        let _ = scope;
        let scope = format!("repository:{}:pull", self.repository);
        let service = service.as_deref().unwrap_or_default();
        let ask = self.ask(&realm, service, &scope).ok_or_else(odd)?;
        let (response, _) = self.http.send(&ask).await?;
        if !response.status().is_success() {
            return Err(self.http.trouble(self.registry, response, self.limits.retry_after).await);
        }
        let body = self.http.whole(&mut response.into_body(), MAX_TOKEN).await?;
        let granted: Granted = serde_json::from_slice(&body.unwrap_or_default())
            .map_err(|_| later(format!("{} gives no token", host(&address))))?;
        let token = granted.token.filter(|it| !it.is_empty()).or(granted.access_token).unwrap_or_default();
        if token.is_empty() {
            return Err(later(format!("{} gives an empty token", shown(host(&address).as_bytes()))));
        }
        secret(&format!("Bearer {token}")).ok_or_else(|| later("the token is none"))
    }

    fn ask(&self, realm: &str, service: &str, scope: &str) -> Option<Ask> {
        let fields = format!("service={}&scope={}", encoded(service), encoded(scope));
        if let Some(credentials) = self.credentials
            && credentials.username == IDENTITY
        {
            let mut ask = Ask::get(realm.parse().ok()?, self.is_insecure, self.reach);
            ask.method = Method::POST;
            let form = HeaderValue::from_static("application/x-www-form-urlencoded");
            ask.headers.insert(header::CONTENT_TYPE, form);
            let token = encoded(credentials.password.expose()).to_string();
            ask.body =
                format!("grant_type=refresh_token&client_id=kelvin&{fields}&refresh_token={token}").into();
            return Some(ask);
        }
        let separator = if realm.contains('?') { '&' } else { '?' };
        let mut ask =
            Ask::get(format!("{realm}{separator}{fields}").parse().ok()?, self.is_insecure, self.reach);
        ask.authorization = match self.credentials {
            Some(credentials) => Some(basic(credentials)?),
            None => None,
        };
        Some(ask)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let read = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::WWW_AUTHENTICATE, value.parse().unwrap());
            }
            Challenge::read(&headers)
        };
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| {
            let (service, scope) = (service.map(str::to_owned), scope.map(str::to_owned));
            Some(Challenge::Bearer { realm: realm.to_owned(), service, scope })
        };
        assert_eq!(
            read(&[r#"Bearer realm="https://a.example/token",service="s",scope="repository:a/b:pull,push""#]),
            bearer("https://a.example/token", Some("s"), Some("repository:a/b:pull,push"))
        );
        assert_eq!(
            read(&["Basic realm=\"x\"", r#"bearer realm=r, service="a\"b""#]),
            bearer("r", Some("a\"b"), None)
        );
        assert_eq!(read(&["Basic realm=\"x\""]), Some(Challenge::Basic));
        for none in [&[][..], &["Negotiate"], &["Bearer"], &["Bearer realm"], &["Bearer service=\"unclosed"]]
        {
            assert_eq!(read(none), None, "{none:?}");
        }
    }

    #[test]
    fn what_is_secret_is_not_shown() {
        let password = kelvin_api::id::Token::from_secret("sesame".to_owned());
        let credentials = Credentials { username: "me".to_owned(), password };
        let header = basic(&credentials).unwrap();
        assert_eq!(header.to_str().unwrap(), format!("Basic {}", STANDARD.encode("me:sesame")));
        assert!(!format!("{header:?} {credentials:?}").contains(&STANDARD.encode("me:sesame")));
        assert!(!format!("{credentials:?}").contains("sesame"));
    }
}
