//! Headers on their way through: what belongs to one connection stays there, and what a server in a sandbox sees. Nothing is
//! written.

use axum::body::Body;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Version, header};
use kelvin_api::id::Token;
use kelvin_node_api::Route;

use crate::target::{Target, Way};

/// Headers that belong to one connection. Source: RFC 9110, 7.6.1.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];

/// The `Host` that a server in the sandbox sees: as it is masked, else the public name, else its own.
pub fn host_for(target: &Target, route: &Route, port: u16, host: Option<&str>) -> HeaderValue {
    let own = format!("localhost:{port}");
    let text = match (&route.mask_request_host, target.way, host) {
        (Some(mask), ..) => mask.replace("${PORT}", &port.to_string()),
        (None, Way::Host, Some(host)) => host.to_owned(),
        _ => own.clone(),
    };
    HeaderValue::from_str(&text)
        .or_else(|_| HeaderValue::from_str(&own))
        .unwrap_or(HeaderValue::from_static("localhost"))
}

/// Whether a request shows `token`, when there is one to show.
pub fn shows(headers: &HeaderMap, name: &str, token: Option<&Token>) -> bool {
    let Some(token) = token else {
        return true;
    };
    headers.get(name).and_then(|value| value.to_str().ok()).is_some_and(|value| token.matches(value))
}

/// The protocol that an HTTP/1.1 request wants to be upgraded to.
pub fn upgrade_of(request: &Request<Body>) -> Option<HeaderValue> {
    let named = request
        .headers()
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|name| name.trim().eq_ignore_ascii_case("upgrade"));
    let usual = request.version() == Version::HTTP_11 && request.method() != Method::CONNECT;
    request.headers().get(header::UPGRADE).filter(|_| named && usual).cloned()
}

/// Whether the caller takes trailers.
pub fn takes_trailers(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::TE).iter().filter_map(|value| value.to_str().ok());
    values
        .flat_map(|value| value.split(','))
        .any(|coding| coding.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("trailers"))
}

/// Removes what belongs to one connection.
pub fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in HOP_BY_HOP.iter().chain(&named) {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_one_connection_stays_there() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, x-private"),
            ("x-private", "1"),
            ("transfer-encoding", "chunked"),
            ("x-access-token", "t"),
        ] {
            headers.insert(name, value.parse().unwrap());
        }
        strip(&mut headers);
        assert_eq!(headers.keys().collect::<Vec<_>>(), ["x-access-token"]);
    }

    #[test]
    fn trailers_are_asked_for_by_name() {
        let takes = |text: &str| takes_trailers(&[(header::TE, text.parse().unwrap())].into_iter().collect());
        assert!(takes("trailers") && takes("gzip;q=0.5, Trailers;q=1"));
        assert!(!takes("gzip") && !takes_trailers(&HeaderMap::new()));
    }

    #[test]
    fn a_server_sees_the_host_that_was_asked_for() {
        let target = |way| Target { shown: "x".into(), port: Some(80), way, path: "/".into() };
        let mut route = Route { access_token: None, traffic_token: None, mask_request_host: None };
        assert_eq!(host_for(&target(Way::Host), &route, 80, Some("80-x.test")), "80-x.test");
        assert_eq!(host_for(&target(Way::Path), &route, 80, Some("api.test")), "localhost:80");
        route.mask_request_host = Some("app.local:${PORT}".into());
        assert_eq!(host_for(&target(Way::Host), &route, 80, Some("80-x.test")), "app.local:80");
    }
}
