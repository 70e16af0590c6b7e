//! Bad input: a typed refusal with a remedy, and nothing is made.

use kelvin_api::id::Token;
use kelvin_api::sandbox::{NewSandbox, NodeInfo};
use kelvin_client::{Client, Error};
use kelvin_e2e::{Ground, Server, new_sandbox};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn refusal(client: &Client, body: &NewSandbox) -> (u16, String) {
    match client.create(body, None).await {
        Err(Error::Refused(refused)) => {
            assert!(refused.remediation.is_some(), "{refused:?}");
            (refused.code, refused.error_code.expect("a code"))
        }
        other => panic!("{body:?} gave {other:?}"),
    }
}

/// Sends raw bytes and returns the status line and the body.
async fn raw(server: &Server, request: &str, body: &[u8]) -> (u16, String) {
    let address = server.url().strip_prefix("http://").expect("http");
    let mut stream = tokio::net::TcpStream::connect(address).await.expect("a connection");
    let head = format!("{request}\r\nhost: x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await.expect("a write");
    let _ = stream.write_all(body).await;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.expect("a reply");
    let status = reply.split_whitespace().nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, reply.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

fn network(json: &str) -> Option<kelvin_api::network::NewNetwork> {
    Some(serde_json::from_str(json).expect("a network"))
}

fn resources(node: &NodeInfo) -> (u32, u64, u32, u32) {
    (node.sandboxes, node.memory_reserved_mb, node.vcpus_reserved, node.ledger_entries)
}

#[tokio::test]
#[allow(clippy::too_many_lines, reason = "one story: each step rests on what the one before it left")]
async fn bad_input_is_refused_by_name_and_makes_nothing() {
    let Some(ground) = Ground::find() else { return };
    let server =
        ground.server("input", &["--waiting-vmms", "0", "--no-auto-bake", "--memory-mib", "700"]).await;
    let client = server.client();
    let before = resources(&server.settle().await);
    let change = |edit: fn(&mut NewSandbox)| {
        let mut body = new_sandbox();
        edit(&mut body);
        body
    };
    let cases: Vec<(NewSandbox, u16, &str)> = vec![
        (change(|body| body.template_id = "nosuch".into()), 404, "template_not_found"),
        (change(|body| body.template_id = "../../etc/passwd".into()), 404, "template_not_found"),
        (change(|body| body.memory_mb = Some(0)), 400, "invalid_shape"),
        (change(|body| body.memory_mb = Some(64)), 400, "invalid_shape"),
        (change(|body| body.memory_mb = Some(1 << 20)), 400, "invalid_shape"),
        (change(|body| body.memory_mb = Some(u64::MAX)), 400, "invalid_shape"),
        (change(|body| body.cpu_count = Some(0)), 400, "invalid_shape"),
        (change(|body| body.cpu_count = Some(10_000)), 400, "invalid_shape"),
        (change(|body| body.timeout = Some(u64::MAX)), 400, "invalid_timeout"),
        (change(|body| body.metadata = Some([("a".into(), "x".repeat(1 << 20))].into())), 400, "too_large"),
        (change(|body| body.env_vars = Some([("A=B".into(), "x".into())].into())), 400, "invalid_env_var"),
        (change(|body| body.env_vars = Some([("A".into(), "x\0y".into())].into())), 400, "invalid_env_var"),
        (change(|body| body.env_vars = Some([("A".into(), "x".repeat(300_000))].into())), 400, "too_large"),
        (
            change(|body| {
                (body.auto_pause, body.auto_pause_memory) = (Some(true), Some(false));
                body.auto_resume = Some(kelvin_api::sandbox::AutoResume { enabled: true });
            }),
            400,
            "invalid_lifecycle",
        ),
        (change(|body| body.network = network(r#"{"rules": {"a.com": []}}"#)), 400, "unsupported_field"),
        (change(|body| body.network = network(r#"{"allowOut": ["10.0.0.0/8"]}"#)), 400, "invalid_network"),
        (change(|body| body.network = network(r#"{"allowOut": ["a.com"]}"#)), 400, "invalid_network"),
        (change(|body| body.network = network(r#"{"maskRequestHost": "a b"}"#)), 400, "invalid_network"),
    ];
    for (body, status, code) in &cases {
        assert_eq!(refusal(&client, body).await, (*status, (*code).to_owned()), "{:?}", body.template_id);
    }

    let key = format!("x-api-key: {}", server.key());
    let post = format!("POST /sandboxes HTTP/1.1\r\n{key}");
    let many: String = (0..65).map(|number| format!("k{number}%3Dv%26")).collect();
    for (request, body, status, code) in [
        (post.as_str(), "{", 400, "malformed_json"),
        (post.as_str(), "[]", 400, "invalid_request"),
        (post.as_str(), r#"{"templateID":"base","tiemout":3}"#, 400, "invalid_request"),
        (post.as_str(), r#"{"templateID":7}"#, 400, "invalid_request"),
        ("POST /sandboxes HTTP/1.1", "{}", 401, "no_api_key"),
        ("POST /sandboxes HTTP/1.1\r\nx-api-key: e2b_00", "{}", 401, "wrong_api_key"),
        ("GET /nowhere HTTP/1.1", "", 401, "no_api_key"),
        (&format!("GET /nowhere HTTP/1.1\r\n{key}"), "", 404, "no_route"),
        (&format!("PUT /sandboxes HTTP/1.1\r\n{key}"), "", 405, "method_not_allowed"),
        (&format!("GET /sandboxes/..%2F..%2Fetc HTTP/1.1\r\n{key}"), "", 404, "sandbox_not_found"),
        (&format!("DELETE /sandboxes/..%2Fx HTTP/1.1\r\n{key}"), "", 404, "sandbox_not_found"),
        (&format!("GET /v2/sandboxes?limit=0 HTTP/1.1\r\n{key}"), "", 400, "invalid_query"),
        (&format!("GET /v2/sandboxes?nextToken=%20 HTTP/1.1\r\n{key}"), "", 400, "invalid_token"),
        (&format!("GET /v2/sandboxes?state=odd HTTP/1.1\r\n{key}"), "", 400, "invalid_query"),
        (&format!("GET /v2/sandboxes?metadata={many} HTTP/1.1\r\n{key}"), "", 400, "invalid_query"),
        (&format!("GET /audit?limit=x HTTP/1.1\r\n{key}"), "", 400, "invalid_query"),
        (&format!("GET /templates/base/tags/exists HTTP/1.1\r\n{key}"), "", 400, "invalid_query"),
        (&format!("GET /sandboxes/%ff HTTP/1.1\r\n{key}"), "", 400, "invalid_path"),
        (&format!("{post}\r\nidempotency-key: {}", "k".repeat(300)), "{}", 400, "invalid_idempotency_key"),
        (&format!("POST /sandboxes/nosuch/pause HTTP/1.1\r\n{key}"), "", 404, "sandbox_not_found"),
        // Whose it is comes before what is asked.
        (&format!("POST /sandboxes/nosuch/pause HTTP/1.1\r\n{key}"), "{", 404, "sandbox_not_found"),
        (&format!("POST /sandboxes/nosuch/resume HTTP/1.1\r\n{key}"), "{}", 404, "sandbox_not_found"),
        (
            &format!("POST /sandboxes/nosuch/resume HTTP/1.1\r\n{key}"),
            r#"{"autoPause":true}"#,
            404,
            "sandbox_not_found",
        ),
        (
            &format!("POST /sandboxes/nosuch/fork HTTP/1.1\r\n{key}"),
            r#"{"count":-1}"#,
            404,
            "sandbox_not_found",
        ),
        (
            &format!("POST /sandboxes/x/fork HTTP/1.1\r\n{key}\r\nidempotency-key: k"),
            "",
            404,
            "sandbox_not_found",
        ),
        (&format!("POST /sandboxes/nosuch/snapshots HTTP/1.1\r\n{key}"), "{}", 404, "sandbox_not_found"),
        (&format!("POST /sandboxes/nosuch/promote HTTP/1.1\r\n{key}"), "", 404, "sandbox_not_found"),
        (&format!("GET /snapshots?limit=x HTTP/1.1\r\n{key}"), "", 400, "invalid_query"),
        (&format!("DELETE /snapshots/..%2Fx HTTP/1.1\r\n{key}"), "", 404, "snapshot_not_found"),
        (&format!("DELETE /templates/nosuch HTTP/1.1\r\n{key}"), "", 404, "snapshot_not_found"),
        (&format!("PUT /pools/..%2Fx HTTP/1.1\r\n{key}"), "{}", 404, "template_not_found"),
        (&format!("PUT /pools/base HTTP/1.1\r\n{key}"), r#"{"min":5,"max":2}"#, 400, "invalid_pool"),
        (&format!("PUT /pools/base HTTP/1.1\r\n{key}"), r#"{"max":100000}"#, 400, "invalid_pool"),
        ("GET /metrics HTTP/1.1", "", 401, "no_api_key"),
    ] {
        let (got, reply) = raw(&server, request, body.as_bytes()).await;
        let shown = request.replace(&server.key(), "KEY");
        let value: serde_json::Value =
            serde_json::from_str(&reply).unwrap_or_else(|_| panic!("{shown}: {reply}"));
        assert_eq!((got, value["error_code"].as_str()), (status, Some(code)), "{shown}: {reply}");
        assert_eq!(value["code"], status, "{shown}");
        assert!(value["remediation"].is_string(), "{shown}");
    }
    // A body over the limit is refused before it is read whole.
    let (status, reply) = raw(&server, &post, &vec![b' '; 5 << 20]).await;
    assert_eq!(status, 413, "{reply}");
    // The gateway: ids that are none, sandboxes that are none, paths of the platform.
    for (id, path, status) in [("../x", "/health", 502), ("nosuch", "/health", 502), ("nosuch", "/init", 403)]
    {
        let request = format!("GET {path} HTTP/1.1\r\ne2b-sandbox-id: {id}\r\ne2b-sandbox-port: 49983");
        assert_eq!(raw(&server, &request, b"").await.0, status, "{id} {path}");
    }
    let wrong = Client::new(server.url(), Token::from_secret("e2b_ff".into())).expect("a URL");
    assert!(matches!(wrong.node().await, Err(Error::Refused(refused)) if refused.code == 401));
    assert_eq!(resources(&server.settle().await), before, "something was made");

    // No room is no mistake: 503, and it works again when there is some.
    let first =
        client.create(&change(|body| body.memory_mb = Some(500)), None).await.expect("a boot").sandbox;
    assert_eq!(refusal(&client, &new_sandbox()).await, (503, "capacity_exhausted".to_owned()));
    client.kill(&first.sandbox_id).await.expect("a kill");
    assert_eq!(resources(&server.settle().await), before);
    server.stop().await;
}
