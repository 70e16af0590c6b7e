//! One request to a registry and the answer to it: redirects, idle limits, and what a status means.
//!
//! Credentials go to the host that they are for: a redirect to another one, or to another port, loses them. Plain HTTP is spoken
//! to this machine and to a mirror that is configured so. Every address, of a redirect too, is one that [`Reach`] allows.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::{ConfigBuilderExt as _, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::sync::OnceCell;

use super::reach::{NotPublic, Reach, Resolver};
use crate::error::{Error, Refusal, shown};
use crate::limits::Limits;
use crate::reference::is_loopback;

/// Redirects that are followed.
const MAX_REDIRECTS: usize = 5;
/// Bytes of an error's body that are read.
const MAX_ERROR: u64 = 16 << 10;
const CONNECT: Duration = Duration::from_secs(10);

/// Why a request has no result.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The same may go well later.
    Later { reason: String, after: Option<Duration> },
    /// It is not there.
    Missing(String),
    /// Nothing that another try would change.
    Failed(Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

pub(super) fn later(reason: impl Into<String>) -> Trouble {
    Trouble::Later { reason: reason.into(), after: None }
}

/// What is asked for.
#[derive(Clone)]
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) uri: Uri,
    pub(super) headers: HeaderMap,
    pub(super) authorization: Option<HeaderValue>,
    pub(super) body: Bytes,
    /// Whether plain HTTP to `uri`'s host, and to this machine, is allowed.
    pub(super) is_insecure: bool,
    /// Which addresses it, and what it is redirected to, may have.
    pub(super) reach: Reach,
}

impl Ask {
    pub(super) fn get(uri: Uri, is_insecure: bool, reach: Reach) -> Self {
        let (headers, body) = (HeaderMap::new(), Bytes::new());
        Self { method: Method::GET, uri, headers, authorization: None, body, is_insecure, reach }
    }
}

type HttpsClient = Client<HttpsConnector<HttpConnector<Resolver>>, Full<Bytes>>;

/// A client for each reach: a connection that is kept for one must not serve the other.
#[derive(Debug)]
struct Clients {
    public: HttpsClient,
    any: HttpsClient,
}

/// The client.
#[derive(Debug, Clone)]
pub(super) struct Http {
    /// Made for the first request: it reads every root certificate of the host, and most nodes that start pull nothing.
    clients: Arc<OnceCell<Clients>>,
    idle: Duration,
    document: Duration,
}

fn origin(uri: &Uri) -> (Option<&str>, Option<String>, Option<u16>) {
    let port = uri.port_u16().or(match uri.scheme_str() {
        Some("https") => Some(443),
        Some("http") => Some(80),
        _ => None,
    });
    (uri.scheme_str(), uri.host().map(str::to_ascii_lowercase), port)
}

/// The host that is shown for `uri`: its path and query may be secret.
pub(super) fn host(uri: &Uri) -> String {
    uri.authority().map_or_else(String::new, |it| {
        let text = it.as_str();
        shown(text.rsplit('@').next().unwrap_or(text).as_bytes())
    })
}

impl Http {
    pub(super) fn new(limits: &Limits) -> Self {
        Self { clients: Arc::default(), idle: limits.idle, document: limits.document }
    }

    async fn client(&self, reach: Reach) -> Result<&HttpsClient, Error> {
        let make =
            || async { tokio::task::spawn_blocking(clients).await.map_err(|error| Error::ended(&error)) };
        let clients = self.clients.get_or_try_init(make).await?;
        Ok(match reach {
            Reach::Public => &clients.public,
            Reach::Any => &clients.any,
        })
    }

    /// Sends `ask` and follows where it is sent. The answer has any status but a redirect. With it comes whether it is of the
    /// host that was asked: what another one says about credentials counts for nothing.
    pub(super) async fn send(&self, ask: &Ask) -> Result<(Response<Incoming>, bool), Trouble> {
        let first = origin(&ask.uri);
        let mut uri = ask.uri.clone();
        let mut authorization = ask.authorization.clone();
        for _ in 0..=MAX_REDIRECTS {
            allow(&uri, ask, &first)?;
            ask.reach.check(&uri).map_err(|why| failed(&uri, &why))?;
            let mut request = Request::builder().method(ask.method.clone()).uri(uri.clone());
            if let Some(headers) = request.headers_mut() {
                headers.extend(ask.headers.clone());
                headers.insert(header::USER_AGENT, HeaderValue::from_static("kelvin"));
                // What is digested is what is stored.
                headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
                if let Some(authorization) = &authorization {
                    headers.insert(header::AUTHORIZATION, authorization.clone());
                }
            }
            let request =
                request.body(Full::new(ask.body.clone())).map_err(|_| nonsense(&uri, "an odd address"))?;
            let client = self.client(ask.reach).await?;
            let response = tokio::time::timeout(self.idle, client.request(request))
                .await
                .map_err(|_| later(format!("{} does not answer", host(&uri))))?
                .map_err(|error| failed(&uri, &error))?;
            let is_redirect = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
            if !is_redirect || ask.method != Method::GET {
                let is_own = origin(&uri) == first;
                return Ok((response, is_own));
            }
            let to = response
                .headers()
                .get(header::LOCATION)
                .and_then(|to| to.to_str().ok())
                .and_then(|to| join(&uri, to))
                .ok_or_else(|| nonsense(&uri, "it redirects to nowhere"))?;
            if origin(&to) != first {
                authorization = None;
            }
            uri = to;
        }
        Err(nonsense(&uri, "it redirects again and again"))
    }

    /// The next bytes of a body; none at its end.
    pub(super) async fn frame(&self, body: &mut Incoming) -> Result<Option<Bytes>, Trouble> {
        loop {
            let frame =
                tokio::time::timeout(self.idle, body.frame()).await.map_err(|_| later("it stalls"))?;
            match frame {
                None => return Ok(None),
                Some(Err(error)) => {
                    let why = kelvin_api::error::chain(&error);
                    return Err(later(format!("the connection broke: {}", shown(why.as_bytes()))));
                }
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data()
                        && !bytes.is_empty()
                    {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }

    /// A whole body of at most `limit` bytes, within the time that a document may take: a byte now and then is no progress.
    ///
    /// # Errors
    /// `Ok(None)` when it is longer.
    pub(super) async fn whole(&self, body: &mut Incoming, limit: u64) -> Result<Option<Vec<u8>>, Trouble> {
        let read = async {
            let mut whole = Vec::new();
            while let Some(bytes) = self.frame(body).await? {
                whole.extend_from_slice(&bytes);
                if whole.len() as u64 > limit {
                    return Ok(None);
                }
            }
            Ok(Some(whole))
        };
        tokio::time::timeout(self.document, read).await.map_err(|_| later("it is too slow"))?
    }

    /// What an answer that is no success means.
    pub(super) async fn trouble(
        &self,
        registry: &str,
        response: Response<Incoming>,
        most: Duration,
    ) -> Trouble {
        let status = response.status();
        let after = retry_after(response.headers()).map(|after| after.min(most));
        let body = self.whole(&mut response.into_body(), MAX_ERROR).await.ok().flatten().unwrap_or_default();
        let reason = match said(&body) {
            Some(said) => format!("{}: {said}", status.as_u16()),
            None => format!("it answers {}", status.as_u16()),
        };
        let registry = registry.to_owned();
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Error::Denied { registry, reason }.into(),
            StatusCode::NOT_FOUND | StatusCode::GONE => Trouble::Missing(reason),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => Trouble::Later { reason, after },
            _ if status.is_server_error() => Trouble::Later { reason, after },
            _ => Error::Unavailable { registry, reason }.into(),
        }
    }
}

/// Both clients, with the host's certificates, which are read now. Blocks.
fn clients() -> Clients {
    let versions =
        rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions();
    let Ok(versions) = versions else { unreachable!("ring has the default versions of TLS") };
    let config = match versions.clone().with_native_roots() {
        Ok(config) => config,
        Err(error) => {
            tracing::warn!(%error, "no roots are trusted for TLS: registries over HTTPS cannot be used");
            versions.with_root_certificates(rustls::RootCertStore::empty())
        }
    };
    let config = config.with_no_client_auth();
    let client = |reach| {
        let mut connector = HttpConnector::new_with_resolver(Resolver(reach));
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT));
        connector.enforce_http(false);
        Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(20))
            .pool_max_idle_per_host(4)
            .build(
                HttpsConnectorBuilder::new()
                    .with_tls_config(config.clone())
                    .https_or_http()
                    .enable_http1()
                    .wrap_connector(connector),
            )
    };
    Clients { public: client(Reach::Public), any: client(Reach::Any) }
}

/// A request that has come to no answer.
fn failed(uri: &Uri, error: &(dyn std::error::Error + 'static)) -> Trouble {
    let mut causes = std::iter::successors(Some(error), |error| error.source());
    if causes.any(|cause| cause.is::<NotPublic>()) {
        return Error::NotPublic { registry: host(uri) }.into();
    }
    later(format!("{}: {}", host(uri), shown(kelvin_api::error::chain(error).as_bytes())))
}

/// Ends what comes more slowly than may be: an idle limit alone lets a byte now and then hold a pull for as long as its build
/// may take. Only the time that the other side is waited for counts, not that of our own disk.
pub(super) struct Pace {
    /// How much has to come in each `window` of waiting.
    least: u64,
    window: Duration,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// At least `rate` bytes a second, on the average of a `window`.
    pub(super) fn new(rate: u64, window: Duration) -> Self {
        let least = u64::try_from(window.as_millis()).unwrap_or(u64::MAX).saturating_mul(rate) / 1000;
        Self { least, window, waited: Duration::ZERO, bytes: 0 }
    }

    /// `bytes` have come after they were `waited` for.
    ///
    /// # Errors
    /// `Later` when a window has passed with less than there has to be.
    pub(super) fn came(&mut self, bytes: u64, waited: Duration) -> Result<(), Trouble> {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < self.window {
            return Ok(());
        }
        if self.bytes < self.least {
            return Err(later(format!("it sends {} bytes in {:.0?}", self.bytes, self.waited)));
        }
        (self.waited, self.bytes) = (Duration::ZERO, 0);
        Ok(())
    }
}

fn nonsense(uri: &Uri, reason: &str) -> Trouble {
    Error::Unavailable { registry: host(uri), reason: reason.to_owned() }.into()
}

/// Refuses plain HTTP where it is not allowed: from HTTPS never, otherwise to the same host and to this machine.
fn allow(uri: &Uri, ask: &Ask, first: &(Option<&str>, Option<String>, Option<u16>)) -> Result<(), Trouble> {
    match uri.scheme_str() {
        Some("https") => Ok(()),
        Some("http") if ask.is_insecure && first.0 == Some("http") => {
            let same = uri.host().is_some_and(|host| Some(host.to_ascii_lowercase()) == first.1);
            match same || uri.host().is_some_and(is_loopback) {
                true => Ok(()),
                false => Err(nonsense(uri, "plain HTTP is allowed to loopback and to mirrors alone")),
            }
        }
        _ => Err(nonsense(uri, "plain HTTP is allowed to loopback and to mirrors alone")),
    }
}

/// Where `to`, a URL or a path, leads from `from`.
fn join(from: &Uri, to: &str) -> Option<Uri> {
    let to = to.split('#').next().unwrap_or(to);
    if to.starts_with("//") {
        return format!("{}:{to}", from.scheme_str()?).parse().ok();
    }
    if to.starts_with('/') {
        return format!("{}://{}{to}", from.scheme_str()?, from.authority()?).parse().ok();
    }
    to.parse().ok().filter(|uri: &Uri| uri.scheme().is_some() && uri.authority().is_some())
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    // The other form, a date, is treated as if it were not there.
    headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// What a registry says about an error. Source: OCI distribution specification, "Error Codes".
fn said(body: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(serde::Deserialize)]
    struct One {
        code: String,
        #[serde(default)]
        message: String,
    }
    let Errors { errors } = serde_json::from_slice(body).ok()?;
    errors.first().map(|one| shown(format!("{} {}", one.code, one.message).trim().as_bytes()))
}

/// A body that is longer than it may be.
pub(super) fn too_long(part: &str, what: &'static str, limit: u64) -> Trouble {
    Error::refused(part, Refusal::Limit { what, limit }).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_goes_where_it_may() {
        let ask = |uri: &str, is_insecure| Ask::get(uri.parse().unwrap(), is_insecure, Reach::Any);
        let may = |from: &str, is_insecure, to: &str| {
            let ask = ask(from, is_insecure);
            allow(&to.parse().unwrap(), &ask, &origin(&ask.uri)).is_ok()
        };
        assert!(may("https://a.example/", false, "https://b.example/"));
        assert!(!may("https://a.example/", false, "http://a.example/"));
        assert!(!may("https://a.example/", true, "http://127.0.0.1/"));
        assert!(may("http://127.0.0.1:1/", true, "http://127.0.0.1:2/"));
        assert!(may("http://mirror.example/", true, "http://mirror.example/x"));
        assert!(!may("http://mirror.example/", true, "http://other.example/x"));
        assert!(!may("http://a.example/", false, "http://a.example/"));
        assert!(!may("https://a.example/", true, "ftp://a.example/"));
    }

    #[test]
    fn what_trickles_is_ended() {
        let (window, second) = (Duration::from_secs(30), Duration::from_secs(1));
        let mut pace = Pace::new(1024, window);
        for _ in 0..90 {
            assert!(pace.came(1024, second).is_ok());
        }
        // What comes at once is of no harm, and neither is the disk's time.
        assert!(pace.came(1 << 20, Duration::ZERO).is_ok());
        let mut pace = Pace::new(1024, window);
        let ended = (1..=60).find(|_| pace.came(1023, second).is_err());
        assert_eq!(ended, Some(30));
    }

    #[test]
    fn redirects_are_joined() {
        let from: Uri = "https://a.example:5000/v2/x".parse().unwrap();
        let to = |text: &str| join(&from, text).map(|uri| uri.to_string());
        assert_eq!(to("/y?z#f").as_deref(), Some("https://a.example:5000/y?z"));
        assert_eq!(to("//b.example/y").as_deref(), Some("https://b.example/y"));
        assert_eq!(to("http://c.example/").as_deref(), Some("http://c.example/"));
        assert_eq!(to("y"), None);
        let secret: Uri = "https://user:sesame@a.example/x?sig=sesame".parse().unwrap();
        assert_eq!(host(&secret), "a.example");
    }
}
