//! Failures as programs and people read them: E2B's JSON, or a page for a browser.

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, StatusCode, header};

/// A failure on its way out.
#[derive(Debug)]
pub struct Problem {
    /// For programs. E2B's clients know a sandbox that is gone by 502.
    pub status: StatusCode,
    /// For a browser, where it says more.
    pub page_status: StatusCode,
    /// The sandbox as the request wrote it.
    pub sandbox: String,
    /// One sentence.
    pub message: String,
    /// What to do.
    pub advice: String,
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// What is in backticks, as code.
fn code(text: &str) -> String {
    let parts = text.split('`').enumerate();
    parts
        .map(|(index, part)| if index % 2 == 1 { format!("<code>{part}</code>") } else { part.to_owned() })
        .collect()
}

/// Whether the caller is a browser that navigates.
fn wants_page(headers: &HeaderMap) -> bool {
    headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("text/html"))
}

impl Problem {
    /// The reply for a request with `headers`.
    pub fn reply(&self, headers: &HeaderMap) -> Response {
        let (status, kind, body) = if wants_page(headers) {
            (self.page_status, "text/html; charset=utf-8", self.page())
        } else {
            (self.status, "application/json", self.json())
        };
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if status == StatusCode::TOO_MANY_REQUESTS {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }

    /// The body that E2B's clients recognise, with what to do. Source: E2B's SDKs, which tell by it.
    fn json(&self) -> String {
        serde_json::json!({
            "sandboxId": self.sandbox,
            "message": self.message,
            "code": self.status.as_u16(),
            "remediation": self.advice,
        })
        .to_string()
    }

    fn page(&self) -> String {
        let status = self.page_status;
        format!(
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
             <title>{code} {reason}</title><style>body{{font:16px/1.5 system-ui,sans-serif;max-width:38rem;margin:12vh auto;\
             padding:0 1rem;color:#1b1b1f;background:#fff}}h1{{font-size:1.4rem;margin:0 0 .5rem}}code{{background:#f1f1f4;\
             padding:.1em .3em;border-radius:3px;overflow-wrap:anywhere}}p{{margin:.5rem 0}}.c{{color:#6b6b76}}\
             @media(prefers-color-scheme:dark){{body{{color:#e6e6ea;background:#16161a}}code{{background:#26262c}}}}</style>\
             <p class=\"c\">{code} {reason}</p><h1>{message}</h1><p>{advice}</p><p class=\"c\">Sandbox <code>{sandbox}</code></p>",
            code = status.as_u16(),
            reason = status.canonical_reason().unwrap_or_default(),
            message = escape(&self.message),
            advice = code(&escape(&self.advice)),
            sandbox = escape(&self.sandbox),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_caller_wrote_is_text_on_a_page() {
        let problem = Problem {
            status: StatusCode::BAD_GATEWAY,
            page_status: StatusCode::NOT_FOUND,
            sandbox: "<script>".to_owned(),
            message: "no".to_owned(),
            advice: "do `this <b>` now".to_owned(),
        };
        assert!(problem.page().contains("do <code>this &lt;b&gt;</code> now"));
        assert!(!problem.page().contains("<script>"));
        let mut headers = HeaderMap::new();
        assert_eq!(problem.reply(&headers).status(), StatusCode::BAD_GATEWAY);
        headers.insert(header::ACCEPT, HeaderValue::from_static("text/html,*/*"));
        assert_eq!(problem.reply(&headers).status(), StatusCode::NOT_FOUND);
    }
}
