//! What is malformed on its way to an agent, and what a caller may ask too much of: a typed error, bounded memory, and
//! the agent stays up.

use std::time::{Duration, Instant};

use futures::StreamExt;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use kelvin_api::sandbox::Sandbox;
use kelvin_e2e::{Ground, LIMIT, Server, agent_of, ask, new_sandbox, sh};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long the agent lets the body of an upload stand still.
const IDLE: Duration = Duration::from_secs(30);

/// Descriptors of a server that has few: enough for two machines and the callers that it lets in, not for a third.
const FEW: u64 = 176;

struct Target<'a> {
    server: &'a Server,
    sandbox: &'a Sandbox,
}

impl Target<'_> {
    fn headers(&self) -> Vec<(&str, &str)> {
        vec![
            ("e2b-sandbox-id", self.sandbox.sandbox_id.as_str()),
            ("e2b-sandbox-port", "49983"),
            ("x-access-token", self.sandbox.envd_access_token.as_ref().expect("a token").expose()),
        ]
    }

    async fn call(&self, path: &str, kind: &str, body: &[u8]) -> (StatusCode, String) {
        let mut headers = self.headers();
        headers.extend([("content-type", kind), ("connect-protocol-version", "1")]);
        ask(self.server, &Method::POST, path, &headers, body.to_vec()).await
    }

    async fn rpc(&self, method: &str, body: &str) -> (StatusCode, String) {
        self.call(method, "application/json", body.as_bytes()).await
    }

    /// Begins a request by hand and leaves it as `head` and `body` are.
    async fn begin(&self, head: &str, body: &[u8]) -> TcpStream {
        let address = self.server.url().strip_prefix("http://").expect("http");
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        let mut text = format!("{head}\r\nhost: x\r\nconnection: close\r\n");
        for (name, value) in self.headers() {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str("\r\n");
        stream.write_all(text.as_bytes()).await.expect("a write");
        // The server may hang up before it has read all.
        let _ = stream.write_all(body).await;
        stream
    }
}

async fn reply_of(mut stream: TcpStream) -> (u16, String) {
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply).await;
    let reply = String::from_utf8_lossy(&reply).into_owned();
    let status = reply.split_whitespace().nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    (status, reply)
}

fn envelope(length: u32, body: &str) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend(length.to_be_bytes());
    bytes.extend(body.as_bytes());
    bytes
}

#[tokio::test]
#[allow(clippy::too_many_lines, reason = "one story: each step rests on what the one before it left")]
async fn malformed_requests_get_typed_errors_and_the_agent_stays_up() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("hostile", &[], 1).await;
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a sandbox").sandbox;
    let agent = agent_of(&client, &sandbox);
    let to = Target { server: &server, sandbox: &sandbox };
    let agents = "pgrep -f -d, '^/proc/self/exe agent$|kelvin-agent agent'";
    let before = sh(&agent, agents).await;
    assert!(!before.trim().is_empty(), "the agent has a pid");

    // Bodies that stop: held open beside everything else, and answered when their time is over.
    let mut slow = Vec::new();
    for number in 0..8 {
        let head = format!(
            "POST /files?path=slow-{number} HTTP/1.1\r\ncontent-type: application/octet-stream\r\ncontent-length: 1000"
        );
        slow.push(to.begin(&head, b"a little").await);
    }
    let stopped = Instant::now();

    // Connect: envelopes and bodies that are none.
    let stream = "application/connect+json";
    let start = r#"{"process":{"cmd":"/bin/true"}}"#;
    for (case, body) in [
        ("cut before the end", envelope(1000, start)),
        ("no header", vec![0, 0]),
        ("larger than any limit", envelope(u32::MAX, start)),
        ("not JSON", envelope(3, "{{{")),
        ("a compressed one", [vec![1], envelope(4, "abcd")[1..].to_vec()].concat()),
        ("empty", Vec::new()),
    ] {
        let (status, reply) = to.call("/process.Process/Start", stream, &body).await;
        // A stream's error is in its last envelope.
        assert!(status == StatusCode::OK || status.is_client_error(), "{case}: {status} {reply}");
        assert!(reply.contains("\"code\""), "{case}: {status} {reply}");
    }
    for (kind, body) in [("text/plain", "{}"), ("application/xml", "<a/>"), ("", "{}")] {
        let (status, reply) = to.call("/process.Process/List", kind, body.as_bytes()).await;
        assert_eq!(status, StatusCode::UNSUPPORTED_MEDIA_TYPE, "{kind:?}: {reply}");
    }
    for (method, body, status, code) in [
        ("/process.Process/List", "{", 400, "invalid_argument"),
        ("/process.Process/Nothing", "{}", 404, "unimplemented"),
        ("/nothing.Nothing/List", "{}", 404, "unimplemented"),
        (
            "/process.Process/SendSignal",
            r#"{"process":{"pid":1},"signal":"SIGNAL_SIGKILL"}"#,
            404,
            "not_found",
        ),
        (
            "/process.Process/SendSignal",
            r#"{"process":{"pid":4294967295},"signal":"SIGNAL_SIGKILL"}"#,
            404,
            "not_found",
        ),
        ("/process.Process/SendSignal", r#"{"signal":"SIGNAL_SIGKILL"}"#, 400, "invalid_argument"),
        ("/process.Process/SendInput", r#"{"process":{"pid":1},"input":{"stdin":"YQ=="}}"#, 404, "not_found"),
        ("/filesystem.Filesystem/Stat", r#"{"path":"a\u0000b"}"#, 400, "invalid_argument"),
        ("/filesystem.Filesystem/ListDir", r#"{"path":"/etc/passwd"}"#, 400, "invalid_argument"),
        ("/filesystem.Filesystem/CreateWatcher", r#"{"path":"/nowhere"}"#, 404, "not_found"),
        ("/filesystem.Filesystem/CreateWatcher", r#"{"path":"/etc/passwd"}"#, 400, "invalid_argument"),
        ("/filesystem.Filesystem/GetWatcherEvents", r#"{"watcherId":"x"}"#, 404, "not_found"),
        ("/filesystem.Filesystem/RemoveWatcher", r#"{"watcherId":"x"}"#, 404, "not_found"),
    ] {
        let (got, reply) = to.rpc(method, body).await;
        let value: serde_json::Value =
            serde_json::from_str(&reply).unwrap_or_else(|_| panic!("{method}: {got} {reply}"));
        assert_eq!((got.as_u16(), value["code"].as_str()), (status, Some(code)), "{method} {body}: {reply}");
    }

    // Paths and ranges.
    sh(&agent, "echo content > f; ln -s /etc/passwd out; ln -s loop loop; mkfifo pipe; mkdir d").await;
    for (path, range, status) in [
        ("/files?path=%ff%fe", None, 400),
        ("/files?path=a%00b", None, 400),
        ("/files", None, 400),
        ("/files?path=nowhere", None, 404),
        ("/files?path=d", None, 400),
        ("/files?path=pipe", None, 400),
        ("/files?path=f/below", None, 400),
        ("/files?path=..%2f..%2f..%2fetc%2fhostname", None, 200),
        ("/files?path=out", None, 200),
        ("/files?path=f&username=nobody-here", None, 401),
        ("/files?path=f", Some("bytes=18446744073709551615-"), 416),
        ("/files?path=f", Some("bytes=9223372036854775807-9223372036854775808"), 416),
        ("/files?path=f", Some("bytes=-18446744073709551615"), 206),
        ("/files?path=f", Some("bytes=99999999999999999999999-"), 200),
        ("/files?path=f", Some("bytes=2-4"), 206),
    ] {
        let mut headers = to.headers();
        headers.extend(range.map(|range| ("range", range)));
        let (got, reply) = ask(&server, &Method::GET, path, &headers, "").await;
        assert_eq!(got.as_u16(), status, "{path} {range:?}: {reply}");
    }
    let (status, reply) = {
        let path = format!("/files?path={}", "x".repeat(300));
        ask(&server, &Method::GET, &path, &to.headers(), "").await
    };
    assert_eq!(status, StatusCode::BAD_REQUEST, "{reply}");
    for (kind, body, status) in [
        ("multipart/form-data", "x", 400),
        ("multipart/form-data; boundary=b", "--b\r\nnothing", 400),
        (
            "multipart/form-data; boundary=b",
            "--b\r\nContent-Disposition: form-data; name=\"other\"\r\n\r\nx\r\n--b--\r\n",
            400,
        ),
        (
            "multipart/form-data; boundary=b",
            "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\ncut",
            400,
        ),
        ("application/x-www-form-urlencoded", "a=b", 415),
    ] {
        let (got, reply) = to.call("/files?path=up", kind, body.as_bytes()).await;
        assert_eq!(got.as_u16(), status, "{kind} {body:?}: {reply}");
    }
    let mut headers = to.headers();
    headers.extend([("content-type", "application/octet-stream"), ("content-encoding", "gzip")]);
    let (status, reply) = ask(&server, &Method::POST, "/files?path=up", &headers, "not gzip").await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{reply}");

    // A packed form that is 256 MiB: it may fill the disk, as any other file, and not the agent.
    let form = r#"b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"zeroes\"\r\n\r\n""#;
    sh(
        &agent,
        &format!(
            "python3 -c 'import gzip\nwith gzip.open(\"bomb\", \"wb\") as f:\n f.write({form})\n for _ in range(256): f.write(bytes(1 << 20))\n f.write(b\"\\r\\n--b--\\r\\n\")'"
        ),
    )
    .await;
    let mut response = kelvin_e2e::send(&server, &Method::GET, "/files?path=bomb", &to.headers(), "").await;
    let packed = response.body_mut().collect().await.expect("a body").to_bytes();
    let mut headers = to.headers();
    headers.extend([("content-type", "multipart/form-data; boundary=b"), ("content-encoding", "gzip")]);
    let (status, reply) = ask(&server, &Method::POST, "/files", &headers, packed.to_vec()).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    assert_eq!(sh(&agent, "stat -c %s zeroes; rm zeroes").await, format!("{}\n", 256 << 20));
    let peak =
        sh(&agent, "awk '/VmHWM/ { print int($2 / 1024) }' /proc/$(pgrep -o -f 'agent$')/status").await;
    let peak: u64 = peak.trim().parse().expect("MiB");
    assert!(peak < 32, "the agent had {peak} MiB");

    // A header of a mebibyte.
    let head = format!("GET /files?path=f HTTP/1.1\r\nx-large: {}", "a".repeat(1 << 20));
    let (status, _) = reply_of(to.begin(&head, b"").await).await;
    assert!(status == 431 || status == 0, "the connection is refused: {status}");

    // Those that stopped: a typed error each, not before its time.
    let waited = tokio::time::timeout(IDLE * 2, futures::future::join_all(slow.into_iter().map(reply_of)));
    for (status, reply) in waited.await.expect("each is answered") {
        assert_eq!(status, 408, "{reply}");
    }
    assert!(stopped.elapsed() >= IDLE);

    assert_eq!(sh(&agent, agents).await, before, "the agent was never restarted");
    assert!(!server.log().contains("panicked"), "nothing panicked");
    server.stop().await;
}

#[tokio::test]
async fn ten_thousand_watchers_are_too_many() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("watchers", &[], 1).await;
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a sandbox").sandbox;
    let agent = agent_of(&client, &sandbox);
    let to = Target { server: &server, sandbox: &sandbox };
    sh(&agent, "mkdir d deleted").await;
    let rss = "awk '/VmRSS/ { print int($2 / 1024) }' /proc/$(pgrep -o -f 'agent$')/status";
    let before: u64 = sh(&agent, rss).await.trim().parse().expect("MiB");

    let asked = (0..10_000)
        .map(|_| to.rpc("/filesystem.Filesystem/CreateWatcher", r#"{"path":"d","recursive":true}"#));
    let replies: Vec<_> = futures::stream::iter(asked).buffer_unordered(32).collect().await;
    let made: Vec<&String> =
        replies.iter().filter(|(status, _)| *status == StatusCode::OK).map(|(_, reply)| reply).collect();
    let refused = replies.iter().filter(|(status, reply)| {
        *status == StatusCode::TOO_MANY_REQUESTS && reply.contains("resource_exhausted")
    });
    assert_eq!((made.len(), refused.count()), (1024, 10_000 - 1024));
    // Each of them sees everything; what nobody fetches is dropped, and that is said.
    sh(&agent, "for i in $(seq 2000); do echo x > d/$i; done").await;
    let after: u64 = sh(&agent, rss).await.trim().parse().expect("MiB");
    println!("1,024 watchers, 2,000 files: the agent has {after} MiB, {before} before");
    assert!(after < before + 64, "{after} MiB, {before} before");
    let watcher = |reply: &str| {
        let value: serde_json::Value = serde_json::from_str(reply).expect("JSON");
        value["watcherId"].as_str().expect("an id").to_owned()
    };
    let last = watcher(made[1023]);
    let (status, reply) =
        to.rpc("/filesystem.Filesystem/GetWatcherEvents", &format!(r#"{{"watcherId":"{last}"}}"#)).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{reply}");
    for reply in &made {
        let body = format!(r#"{{"watcherId":"{}"}}"#, watcher(reply));
        assert_eq!(to.rpc("/filesystem.Filesystem/RemoveWatcher", &body).await.0, StatusCode::OK);
    }

    // A folder that goes away under its watch.
    let (_, reply) = to.rpc("/filesystem.Filesystem/CreateWatcher", r#"{"path":"deleted"}"#).await;
    let body = format!(r#"{{"watcherId":"{}"}}"#, watcher(&reply));
    sh(&agent, "rmdir deleted").await;
    let (status, reply) = to.rpc("/filesystem.Filesystem/GetWatcherEvents", &body).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    assert!(reply.contains("EVENT_TYPE_REMOVE"), "{reply}");
    let (status, reply) = to.rpc("/filesystem.Filesystem/GetWatcherEvents", &body).await;
    assert_eq!(status, StatusCode::NOT_FOUND, "{reply}");
    assert!(reply.contains("was removed"), "{reply}");
    server.stop().await;
}

#[tokio::test]
async fn ten_gibibytes_go_through_in_flat_memory() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("large", &[], 1).await;
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a sandbox").sandbox;
    let agent = agent_of(&client, &sandbox);
    let to = Target { server: &server, sandbox: &sandbox };
    // A file of 10 GiB without content, of which the last mebibyte is asked for: offsets are 64 bits everywhere.
    sh(
        &agent,
        "truncate -s 10G large && printf end | dd of=large bs=1 seek=10737418237 conv=notrunc status=none",
    )
    .await;
    let mut headers = to.headers();
    headers.push(("range", "bytes=10737418230-"));
    let (status, reply) = ask(&server, &Method::GET, "/files?path=large", &headers, "").await;
    assert_eq!(
        (status, reply.len(), reply.trim_start_matches('\0')),
        (StatusCode::PARTIAL_CONTENT, 10, "end")
    );

    // A gibibyte each way through the whole path, as a stream.
    let rss = "awk '/VmRSS/ { print int($2 / 1024) }' /proc/$(pgrep -o -f 'agent$')/status";
    let before: u64 = sh(&agent, rss).await.trim().parse().expect("MiB");
    let server_before = kelvin_e2e::resident_mib(server.pid());
    let bytes = 1_u64 << 30;
    let started = Instant::now();
    let sent =
        kelvin_e2e::upload_zeroes(&server, &to.headers(), "/files?path=/dev/shm/../../home/user/up", bytes)
            .await;
    assert_eq!(sent, StatusCode::OK);
    println!("1 GiB up: {:.1} s", started.elapsed().as_secs_f64());
    let started = Instant::now();
    let mut response = kelvin_e2e::send(&server, &Method::GET, "/files?path=up", &to.headers(), "").await;
    let mut received = 0;
    while let Some(frame) = response.body_mut().frame().await {
        received += frame.expect("a frame").data_ref().map_or(0, |data| data.len() as u64);
    }
    assert_eq!(received, bytes);
    println!("1 GiB down: {:.1} s", started.elapsed().as_secs_f64());
    let after: u64 = sh(&agent, rss).await.trim().parse().expect("MiB");
    let server_after = kelvin_e2e::resident_mib(server.pid());
    println!("agent {before} -> {after} MiB, server {server_before} -> {server_after} MiB");
    assert!(after < before + 32 && server_after < server_before + 128);
    server.stop().await;
}

/// What a connection to the server gets that asks for its health.
async fn health(server: &Server) -> (TcpStream, String) {
    let address = server.url().strip_prefix("http://").expect("http");
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    let _ = stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let (mut reply, mut buffer) = (String::new(), [0; 4096]);
    while !reply.contains("\r\n\r\n") || reply.contains("503") && !reply.contains('}') {
        match tokio::time::timeout(LIMIT, stream.read(&mut buffer)).await.expect("an answer") {
            Ok(read @ 1..) => reply.push_str(&String::from_utf8_lossy(&buffer[..read])),
            _ => break,
        }
    }
    (stream, reply)
}

/// A server with few descriptors refuses by name the connections that it has none for, and goes on with what it has begun.
#[tokio::test]
async fn connections_that_run_out_are_refused_by_name() {
    let Some(ground) = Ground::find() else { return };
    let args = ["--no-network", "--warm-max", "0", "--waiting-vmms", "0"];
    let mut server = ground.baked("few", &args, 0).await;
    server.terminate().await;
    server.descriptors = Some(FEW);
    server.start(&args).await;
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a sandbox").sandbox;
    let agent = agent_of(&client, &sandbox);
    assert_eq!(sh(&agent, "echo before").await, "before\n");

    // Half of what it may open is for callers.
    let mut open = Vec::new();
    let refused = loop {
        let (stream, reply) = health(&server).await;
        if !reply.starts_with("HTTP/1.1 204") {
            break reply;
        }
        open.push(stream);
        assert!(u64::try_from(open.len()).unwrap_or(u64::MAX) < FEW, "nobody is refused");
    };
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("\"too_many_connections\""), "{refused}");
    // What it has begun goes on, and when callers have left there is room again.
    open.clear();
    let since = Instant::now();
    let another = loop {
        match client.create(&new_sandbox(), None).await {
            Ok(created) => break created.sandbox,
            Err(error) => assert!(since.elapsed() < LIMIT, "{error:?}"),
        }
    };
    assert_eq!(sh(&agent, "echo meanwhile").await, "meanwhile\n");
    for sandbox in [&sandbox, &another] {
        client.kill(&sandbox.sandbox_id).await.expect("it is killed");
    }
    server.stop().await;
}
