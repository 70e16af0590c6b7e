//! Which sandbox and port a request is for: by header, by host, by path.

use http::{HeaderMap, Request, header};
use kelvin_api::id::SandboxId;
use kelvin_api::{AGENT_PORT, PORT_HEADER, SANDBOX_HEADER};

/// How a request named its sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The headers that the SDKs send.
    Header,
    /// `<port>-<id>.<domain>`.
    Host,
    /// `/sandboxes/<id>/ports/<port>/`.
    Path,
}

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The sandbox as it was written, shortened; an id when it is one.
    pub shown: String,
    /// The port, when it is one.
    pub port: Option<u16>,
    /// How it was named.
    pub way: Way,
    /// Path and query without what only the gateway reads.
    pub path: String,
}

impl Target {
    /// The sandbox's id, when it is one.
    pub fn sandbox(&self) -> Option<SandboxId> {
        self.shown.parse().ok()
    }
}

fn port(text: &str) -> Option<u16> {
    text.parse().ok().filter(|port| *port > 0)
}

/// The host of a request: the authority of HTTP/2, the header of HTTP/1.
pub fn host<B>(request: &Request<B>) -> Option<&str> {
    let authority = request.uri().authority().map(http::uri::Authority::as_str);
    authority.or_else(|| request.headers().get(header::HOST).and_then(|host| host.to_str().ok()))
}

/// Where envd answers: no path of the control API begins like these.
const AGENTS: [&str; 6] =
    ["/files", "/health", "/metrics", "/envs", "/process.Process/", "/filesystem.Filesystem/"];

/// Whether `path` is one of envd's.
pub fn is_agents(path: &str) -> bool {
    let path = path.split('?').next().unwrap_or_default();
    AGENTS.iter().any(|agents| {
        path == *agents
            || path.strip_prefix(agents).is_some_and(|rest| agents.ends_with('/') || rest.starts_with('/'))
    })
}

/// What paths of the control API begin with, where clients send the headers of a sandbox too: envd has none of these.
/// Source: E2B's Python SDK 2.20, `Sandbox.connect`.
const CONTROLS: [&str; 8] =
    ["/sandboxes", "/v2", "/v3", "/templates", "/snapshots", "/teams", "/api-keys", "/events"];

fn is_controls(path: &str) -> bool {
    let path = path.split('?').next().unwrap_or_default();
    CONTROLS.iter().any(|controls| {
        path.strip_prefix(controls).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    })
}

fn by_header(headers: &HeaderMap, path: &str) -> Option<Target> {
    let shown = headers.get(SANDBOX_HEADER)?.to_str().unwrap_or_default().chars().take(80).collect();
    let port = match headers.get(PORT_HEADER) {
        None => Some(AGENT_PORT),
        Some(text) => text.to_str().ok().and_then(port),
    };
    if port == Some(AGENT_PORT) && is_controls(path) {
        return None;
    }
    Some(Target { shown, port, way: Way::Header, path: path.to_owned() })
}

fn by_host(host: &str, domain: &str, path: &str) -> Option<Target> {
    // A port of the listener may follow on either side.
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let domain = domain.rsplit_once(':').map_or(domain, |(domain, _)| domain);
    let (label, rest) = name.split_once('.')?;
    if !rest.eq_ignore_ascii_case(domain) {
        return None;
    }
    let (first, id) = label.split_once('-')?;
    if first.is_empty() || !first.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let shown = id.to_ascii_lowercase().chars().take(80).collect();
    Some(Target { shown, port: port(first), way: Way::Host, path: path.to_owned() })
}

fn by_path(path: &str) -> Option<Target> {
    let (id, rest) = path.strip_prefix("/sandboxes/")?.split_once("/ports/")?;
    if id.contains('/') {
        return None;
    }
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (number, rest) = rest.split_at(end);
    let path = if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") };
    Some(Target { shown: id.chars().take(80).collect(), port: port(number), way: Way::Path, path })
}

/// The target of a request, when it is for a sandbox and not for the control API.
pub fn target<B>(request: &Request<B>, domain: &str) -> Option<Target> {
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    by_header(request.headers(), path)
        .or_else(|| by_host(host(request)?, domain, path))
        .or_else(|| by_path(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(uri: &str, headers: &[(&str, &str)]) -> Option<(String, Option<u16>, Way, String)> {
        let mut request = Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        target(&request.body(()).unwrap(), "sandboxes.test:8443")
            .map(|target| (target.shown, target.port, target.way, target.path))
    }

    #[test]
    fn three_ways_lead_to_a_port() {
        let id = "i0123456789abcdef";
        let owned = |port, way, path: &str| Some((id.to_owned(), port, way, path.to_owned()));
        assert_eq!(find("/x?y", &[(SANDBOX_HEADER, id)]), owned(Some(49983), Way::Header, "/x?y"));
        assert_eq!(
            find("/", &[(SANDBOX_HEADER, id), (PORT_HEADER, "80000")]),
            owned(None, Way::Header, "/"),
            "a port that is none"
        );
        for host in ["8000-i0123456789abcdef.sandboxes.test", "8000-I0123456789abcdef.Sandboxes.test:99"] {
            assert_eq!(find("/x", &[("host", host)]), owned(Some(8000), Way::Host, "/x"), "{host}");
        }
        assert_eq!(find(&format!("/sandboxes/{id}/ports/80"), &[]), owned(Some(80), Way::Path, "/"));
        assert_eq!(find(&format!("/sandboxes/{id}/ports/80/a?b"), &[]), owned(Some(80), Way::Path, "/a?b"));
        assert_eq!(find(&format!("/sandboxes/{id}/ports/80?b"), &[]), owned(Some(80), Way::Path, "/?b"));
        // The control API's, whatever a client says beside it.
        let agent = [(SANDBOX_HEADER, id), (PORT_HEADER, "49983")];
        for path in ["/sandboxes/x/connect", "/v2/sandboxes?limit=1", "/templates"] {
            assert_eq!(find(path, &agent), None, "{path}");
        }
        assert_eq!(find("/sandboxesx", &agent), owned(Some(49983), Way::Header, "/sandboxesx"));
        let server = [(SANDBOX_HEADER, id), (PORT_HEADER, "8000")];
        assert_eq!(find("/sandboxes", &server), owned(Some(8000), Way::Header, "/sandboxes"));
        assert!(is_agents("/files?path=x") && is_agents("/process.Process/Start") && !is_agents("/filesx"));
        for (uri, host) in [
            ("/sandboxes/x", "127.0.0.1:7400"),
            ("/", "8000-x.other.test"),
            ("/", "x-8000.sandboxes.test"),
            ("/", "api.sandboxes.test"),
            ("/sandboxes/a/b/ports/80", "x"),
        ] {
            assert_eq!(find(uri, &[("host", host)]), None, "{uri} {host}");
        }
    }
}
