//! A client of registries, for pulling alone.
//!
//! ```text
//!   mirror, mirror, registry      each in its turn, for every document and blob
//!     try, wait, try ...          429, 5xx, a stall or a broken connection; a blob goes on where it stopped
//! ```
//!
//! After the first manifest everything is asked for by digest and checked against it: neither a tag that moves nor a mirror
//! that lies changes what is pulled.
//!
//! Source: OCI distribution specification 1.1, "Pull".

mod auth;
mod blob;
pub(crate) mod credentials;
mod http;
pub(crate) mod reach;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::http::header::{self, HeaderMap, HeaderValue};
use ::http::{Response, StatusCode, Uri};
use hyper::body::Incoming;

use self::auth::{Asker, Challenge};
use self::credentials::Credentials;
use self::http::{Ask, Http, Trouble, later, too_long};
use self::reach::Reach;
use crate::digest::Digest;
use crate::error::{Error, Refusal, shown};
use crate::limits::Limits;
use crate::manifest::{ACCEPT, Descriptor};
use crate::reference::{Reference, host_of, is_loopback};
use crate::told::Told;

/// The longest wait between two tries that nobody asked for.
const MAX_BACKOFF: Duration = Duration::from_secs(15);
/// Tries at a mirror: behind it is another source.
const MIRROR_TRIES: u32 = 2;

/// A registry's mirror, which is asked first: `docker.io=https://mirror.example`, with `http://` when it is insecure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Of which registry.
    pub registry: String,
    /// Where it answers, without `/v2/`.
    pub url: String,
}

impl FromStr for Mirror {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |reason| Error::Options { option: "mirror", value: text.to_owned(), reason };
        let (registry, url) = text.split_once('=').ok_or_else(|| wrong("it is not REGISTRY=URL"))?;
        let uri: Uri = url.parse().map_err(|_| wrong("the URL does not parse"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            return Err(wrong("the URL has to begin with http:// or https://"));
        }
        if uri.query().is_some() || uri.authority().is_some_and(|it| it.as_str().contains('@')) {
            return Err(wrong(
                "the URL has a host and a path alone; credentials go into Docker's configuration",
            ));
        }
        if Reference::parse(&format!("{registry}/a/b")).map_or(true, |it| it.registry != registry) {
            return Err(wrong("the registry is no host name with an optional port"));
        }
        Ok(Self { registry: registry.to_owned(), url: url.trim_end_matches('/').to_owned() })
    }
}

/// What all pulls share.
#[derive(Debug)]
pub(crate) struct Registries {
    http: Http,
    limits: Limits,
    mirrors: Vec<Mirror>,
    docker_config: Option<PathBuf>,
}

/// One place that is asked.
struct Endpoint {
    /// `https://host:port/path`.
    base: String,
    authority: String,
    is_insecure: bool,
    /// A mirror is the operator's, and may be anywhere.
    reach: Reach,
    tries: u32,
    credentials: Option<Credentials>,
    /// What was shown last and let in.
    authorization: Mutex<Option<HeaderValue>>,
}

/// Pulls from one repository, with the credentials of who asks.
pub(crate) struct Session {
    shared: Arc<Registries>,
    pub(crate) reference: Reference,
    /// Mirrors, then the registry.
    endpoints: Vec<Endpoint>,
}

/// Without credentials.
impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("reference", &self.reference).finish_non_exhaustive()
    }
}

/// A document as it came.
pub(crate) struct Fetched {
    pub(crate) bytes: Vec<u8>,
    pub(crate) content_type: Option<String>,
    pub(crate) digest: Digest,
}

/// Counts tries and waits between them.
struct Tries<'a> {
    limits: &'a Limits,
    endpoint: &'a Endpoint,
    done: u32,
}

impl Tries<'_> {
    /// Waits for the next try, or fails when there is none.
    async fn again(&mut self, reason: String, after: Option<Duration>, told: &Told) -> Result<(), Error> {
        self.done += 1;
        let registry = self.endpoint.authority.clone();
        if self.done >= self.endpoint.tries {
            return Err(Error::Unavailable { registry, reason });
        }
        let wait = after.unwrap_or_else(|| {
            let wait = self.limits.backoff.saturating_mul(1 << (self.done - 1).min(10)).min(MAX_BACKOFF);
            // Not all at once, when many wait for one registry.
            let mut random = [0];
            let _ = getrandom::fill(&mut random);
            wait + wait / 4 * u32::from(random[0]) / 255
        });
        told(&format!("{registry}: {reason}; trying again in {:.1} s", wait.as_secs_f64()));
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

impl Registries {
    pub(crate) fn new(limits: Limits, mirrors: Vec<Mirror>, docker_config: Option<PathBuf>) -> Arc<Self> {
        Arc::new(Self { http: Http::new(&limits), limits, mirrors, docker_config })
    }

    async fn configured(&self, authority: &str) -> Result<Option<Credentials>, Error> {
        match &self.docker_config {
            Some(path) => credentials::look_up(path, authority).await,
            None => Ok(None),
        }
    }

    /// Pulls of `reference` from addresses within `reach`, and from mirrors; `given` are of this request and win.
    ///
    /// # Errors
    /// `Denied` when the configured credentials cannot be read.
    pub(crate) async fn session(
        self: &Arc<Self>,
        reference: Reference,
        given: Option<Credentials>,
        reach: Reach,
    ) -> Result<Session, Error> {
        let mut endpoints = Vec::new();
        for mirror in self.mirrors.iter().filter(|mirror| mirror.registry == reference.registry) {
            let uri: Uri = mirror.url.parse().map_err(|_| Error::Options {
                option: "mirror",
                value: mirror.url.clone(),
                reason: "the URL does not parse",
            })?;
            let authority = uri.authority().map(|it| it.to_string()).unwrap_or_default();
            let credentials = self.configured(&authority).await.unwrap_or_else(|error| {
                tracing::warn!(%error, "a mirror is asked without credentials");
                None
            });
            endpoints.push(Endpoint {
                base: mirror.url.trim_end_matches('/').to_owned(),
                is_insecure: uri.scheme_str() == Some("http"),
                reach: Reach::Any,
                authority,
                tries: self.limits.tries.min(MIRROR_TRIES),
                credentials,
                authorization: Mutex::default(),
            });
        }
        let authority = reference.authority().to_owned();
        let is_insecure = is_loopback(host_of(&authority));
        let credentials = match given {
            Some(given) => Some(given),
            None => self.configured(&authority).await?,
        };
        endpoints.push(Endpoint {
            base: format!("{}://{authority}", if is_insecure { "http" } else { "https" }),
            authority,
            is_insecure,
            reach,
            tries: self.limits.tries,
            credentials,
            authorization: Mutex::default(),
        });
        Ok(Session { shared: Arc::clone(self), reference, endpoints })
    }
}

impl Session {
    fn tries<'a>(&'a self, endpoint: &'a Endpoint) -> Tries<'a> {
        Tries { limits: &self.shared.limits, endpoint, done: 0 }
    }

    fn missing(&self, endpoint: &Endpoint, what: &str, reason: &str) -> Error {
        Error::NotFound {
            image: format!("{what} of {}", self.reference),
            reason: format!("{}: {reason}", endpoint.authority),
        }
    }

    /// Asks `endpoint` for `path` below the repository, and shows who asks when it wants to know.
    async fn get(
        &self,
        endpoint: &Endpoint,
        path: &str,
        headers: HeaderMap,
    ) -> Result<Response<Incoming>, Trouble> {
        let http = &self.shared.http;
        let address = format!("{}/v2/{}/{path}", endpoint.base, self.reference.repository);
        let address = address.parse().map_err(|_| Error::Unavailable {
            registry: endpoint.authority.clone(),
            reason: "its address cannot be used".to_owned(),
        })?;
        let mut ask = Ask::get(address, endpoint.is_insecure, endpoint.reach);
        ask.headers = headers;
        let known = endpoint.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
        ask.authorization = known;
        let (response, is_own) = http.send(&ask).await?;
        if response.status() != StatusCode::UNAUTHORIZED || !is_own {
            return Ok(response);
        }
        let Some(challenge) = Challenge::read(response.headers()) else { return Ok(response) };
        drop(response);
        let asker = Asker {
            http,
            limits: &self.shared.limits,
            registry: &endpoint.authority,
            repository: &self.reference.repository,
            is_insecure: endpoint.is_insecure,
            reach: endpoint.reach,
            credentials: endpoint.credentials.as_ref(),
        };
        let answer = asker.answer(challenge).await?;
        ask.authorization = Some(answer.clone());
        let (response, _) = http.send(&ask).await?;
        let lets_in = response.status() != StatusCode::UNAUTHORIZED;
        *endpoint.authorization.lock().unwrap_or_else(PoisonError::into_inner) = lets_in.then_some(answer);
        Ok(response)
    }

    /// The manifest or index that is called `wanted`, a tag or a digest.
    ///
    /// # Errors
    /// `NotFound`, `Denied`, `Unavailable`; `Refused` when it is too large, or not what `expected` says.
    pub(crate) async fn document(
        &self,
        wanted: &str,
        expected: Option<&Digest>,
        told: &Told,
    ) -> Result<Fetched, Error> {
        let mut failed = None;
        for endpoint in &self.endpoints {
            let mut tries = self.tries(endpoint);
            let error = loop {
                match self.document_once(endpoint, wanted, expected).await {
                    Ok(fetched) => return Ok(fetched),
                    Err(Trouble::Later { reason, after }) => {
                        if let Err(error) = tries.again(reason, after, told).await {
                            break error;
                        }
                    }
                    Err(Trouble::Missing(reason)) => break self.missing(endpoint, "manifest", &reason),
                    Err(Trouble::Failed(error)) => break error,
                }
            };
            self.next_endpoint(endpoint, &error, told);
            failed = Some(error);
        }
        Err(failed.unwrap_or(Error::Stopped))
    }

    fn next_endpoint(&self, endpoint: &Endpoint, error: &Error, told: &Told) {
        if self.endpoints.last().is_some_and(|last| !std::ptr::eq(last, endpoint)) {
            told(&format!("the mirror {} is passed over: {error}", endpoint.authority));
        }
    }

    async fn document_once(
        &self,
        endpoint: &Endpoint,
        wanted: &str,
        expected: Option<&Digest>,
    ) -> Result<Fetched, Trouble> {
        let limits = &self.shared.limits;
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static(ACCEPT));
        let response = self.get(endpoint, &format!("manifests/{wanted}"), headers).await?;
        if response.status() != StatusCode::OK {
            return Err(self.shared.http.trouble(&endpoint.authority, response, limits.retry_after).await);
        }
        let text =
            |name: &str| response.headers().get(name).and_then(|it| it.to_str().ok()).map(str::to_owned);
        let content_type =
            text("content-type").map(|it| it.split(';').next().unwrap_or(&it).trim().to_owned());
        let said = text("docker-content-digest");
        let length = text("content-length").and_then(|it| it.parse::<u64>().ok());
        let part = format!("the manifest of {}", self.reference);
        let limit = limits.manifest_bytes;
        if length.is_some_and(|length| length > limit) {
            return Err(too_long(&part, "bytes of a manifest", limit));
        }
        let bytes = self
            .shared
            .http
            .whole(&mut response.into_body(), limit)
            .await?
            .ok_or_else(|| too_long(&part, "bytes of a manifest", limit))?;
        if length.is_some_and(|length| length != bytes.len() as u64) {
            return Err(later("the manifest is cut short"));
        }
        let digest = Digest::of(&bytes);
        let said = match expected {
            Some(expected) => Some(expected.clone()),
            // A digest of another algorithm says nothing that could be checked.
            None => said.and_then(|said| Digest::parse(&said).ok()),
        };
        if let Some(said) = said {
            said.check(&digest).map_err(|why| Error::refused(part, why))?;
        }
        Ok(Fetched { bytes, content_type, digest })
    }

    /// How `descriptor` is called in messages.
    fn part(&self, what: &str, descriptor: &Descriptor) -> String {
        format!("{what} {} of {}", short(&descriptor.digest), self.reference)
    }
}

/// A digest that people can compare.
pub(crate) fn short(digest: &Digest) -> String {
    format!("sha256:{}", &digest.hex()[..12])
}

fn wrong_size(part: &str, expected: u64, found: u64) -> Trouble {
    Error::refused(shown(part.as_bytes()), Refusal::Size { expected, found }).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_are_registry_and_url() {
        let mirror: Mirror = "docker.io=http://127.0.0.1:5000/".parse().unwrap();
        assert_eq!((mirror.registry.as_str(), mirror.url.as_str()), ("docker.io", "http://127.0.0.1:5000"));
        for bad in [
            "docker.io",
            "docker.io=",
            "docker.io=mirror.example",
            "docker.io=ftp://mirror.example",
            "docker.io=https://user:sesame@mirror.example",
            "=https://mirror.example",
            "a b=https://mirror.example",
        ] {
            assert!(bad.parse::<Mirror>().is_err(), "{bad}");
        }
    }
}
