//! Ways into a sandbox: by host, header and path, over HTTP/1.1, HTTP/2, WebSocket, TLS and raw TCP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream as StdTcpStream;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use kelvin_api::network::{NetworkConfig, NewNetwork};
use kelvin_api::sandbox::{NewSandbox, Sandbox};
use kelvin_client::Client;
use kelvin_client::agent::Agent;
use kelvin_e2e::world::certificate;
use kelvin_e2e::{Ground, LIMIT, Server, agent_of, new_sandbox, sh, shell};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

/// HTTP on 8000 and 8001 (the latter says which host and headers it saw); WebSocket echo on 8002; a server that
/// accepts and never answers on 8003.
const SERVERS: &str = r#"
cat > /tmp/servers.py <<'EOF'
import base64, hashlib, http.server, os, socket, socketserver, struct, threading
class Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
class Seen(Quiet):
    def do_GET(self):
        names = ['host', 'x-forwarded-host', 'x-forwarded-proto', 'x-forwarded-prefix', 'e2b-traffic-access-token', 'e2b-sandbox-id']
        body = (self.path + '\n' + '\n'.join(f'{n}={self.headers.get(n)}' for n in names) + '\n').encode()
        self.send_response(200); self.send_header('content-length', str(len(body))); self.end_headers(); self.wfile.write(body)
    def do_POST(self):
        digest, left = hashlib.sha256(), int(self.headers['content-length'])
        while left:
            part = self.rfile.read(min(left, 65536)); left -= len(part); digest.update(part)
        body = digest.hexdigest().encode()
        self.send_response(200); self.send_header('content-length', str(len(body))); self.end_headers(); self.wfile.write(body)
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        key = None
        while (line := self.rfile.readline().strip()):
            if line.lower().startswith(b'sec-websocket-key:'): key = line.split(b':', 1)[1].strip()
        accept = base64.b64encode(hashlib.sha1(key + b'258EAFA5-E914-47DA-95CA-C5AB0DC85B11').digest())
        self.wfile.write(b'HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ' + accept + b'\r\n\r\n')
        while True:
            head = self.rfile.read(2)
            if len(head) < 2: return
            length = head[1] & 127
            if length == 126: length = struct.unpack('>H', self.rfile.read(2))[0]
            mask = self.rfile.read(4)
            data = bytes(b ^ mask[i % 4] for i, b in enumerate(self.rfile.read(length)))
            size = bytes([length]) if length < 126 else b'\x7e' + struct.pack('>H', length)
            self.wfile.write(bytes([head[0]]) + size + data)
            if head[0] & 15 == 8: return
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True; daemon_threads = True; request_queue_size = 256
os.chdir('/home/user')
for port, handler in ((8000, Quiet), (8001, Seen), (8002, Echo)):
    threading.Thread(target=Server(('', port), handler).serve_forever).start()
mute = socket.create_server(('', 8003))
open('/tmp/ready', 'w').close()
held = []
while True: held.append(mute.accept())
EOF
cd /home/user; echo hello > hello.txt; truncate -s 1G large
(setsid python3 /tmp/servers.py >/tmp/servers.log 2>&1 &)
until test -e /tmp/ready; do sleep 0.05; done
"#;

async fn sandbox(server: &Server, config: NetworkConfig) -> (Client, Sandbox, Agent) {
    let client = server.client();
    let network = Some(NewNetwork::Config(Box::new(config)));
    let sandbox =
        client.create(&NewSandbox { network, ..new_sandbox() }, None).await.expect("a create").sandbox;
    let agent = agent_of(&client, &sandbox);
    sh(&agent, SERVERS).await;
    (client, sandbox, agent)
}

fn address(server: &Server) -> String {
    server.url().trim_start_matches("http://").to_owned()
}

async fn send(address: &str, request: Request<Empty<Bytes>>) -> http::Response<Incoming> {
    let stream = TcpStream::connect(address).await.expect("the gateway");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP/1.1");
    tokio::spawn(connection);
    sender.send_request(request).await.expect("a reply")
}

fn request(path: &str, headers: &[(&str, &str)]) -> Request<Empty<Bytes>> {
    let mut request = Request::builder().uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Empty::new()).expect("a request")
}

async fn get(address: &str, path: &str, headers: &[(&str, &str)]) -> (StatusCode, String) {
    let response = send(address, request(path, headers)).await;
    let status = response.status();
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    (status, String::from_utf8_lossy(&body).into_owned())
}

#[tokio::test]
async fn ports_are_reached_by_host_by_header_and_by_path() {
    let Some(ground) = Ground::with_networks().await else { return };
    let server = ground.baked("gateway", &["--waiting-vmms", "2"], 2).await;
    let (client, sandbox, agent) = sandbox(&server, NetworkConfig::default()).await;
    let (at, id) = (address(&server), sandbox.sandbox_id.as_str());
    let host = format!("8000-{id}.localhost");
    let seen = format!("8001-{id}.localhost:7400");
    let ok = (StatusCode::OK, "hello\n".to_owned());
    assert_eq!(get(&at, "/hello.txt", &[("host", &host)]).await, ok);
    let header = [("host", "x"), ("e2b-sandbox-id", id), ("e2b-sandbox-port", "8000")];
    assert_eq!(get(&at, "/hello.txt", &header).await, ok);
    assert_eq!(get(&at, &format!("/sandboxes/{id}/ports/8000/hello.txt"), &[("host", "x")]).await, ok);
    // What a server sees: the public host by host, its own otherwise, nothing of the gateway's.
    let (_, text) = get(&at, "/a?b=c", &[("host", &seen)]).await;
    assert_eq!(
        text,
        format!(
            "/a?b=c\nhost={seen}\nx-forwarded-host={seen}\nx-forwarded-proto=http\nx-forwarded-prefix=None\ne2b-traffic-access-token=None\ne2b-sandbox-id=None\n"
        )
    );
    let path = format!("/sandboxes/{id}/ports/8001");
    let (_, text) = get(&at, &format!("{path}/a"), &[("host", "x")]).await;
    assert!(text.starts_with("/a\nhost=localhost:8001\nx-forwarded-host=x\n"), "{text}");
    assert!(text.contains(&format!("x-forwarded-prefix={path}\n")), "{text}");
    // Problems say what to do: JSON with E2B's words for programs, a page for people.
    let html = ("accept", "text/html,*/*");
    let (status, text) = get(&at, "/", &[("host", &format!("8099-{id}.localhost"))]).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(text.contains("\"The sandbox is running but port is not open\""), "{text}");
    let (status, text) = get(&at, "/", &[("host", &format!("8099-{id}.localhost")), html]).await;
    assert!(status == StatusCode::BAD_GATEWAY && text.contains("listens on port 8099"), "{text}");
    let (status, text) = get(&at, "/", &[("host", "8000-nobody.localhost"), html]).await;
    assert!(status == StatusCode::NOT_FOUND && text.contains("was not found"), "{status} {text}");
    let (status, text) =
        get(&at, "/", &[("host", &host), ("e2b-sandbox-id", id), ("e2b-sandbox-port", "99999")]).await;
    assert!(status == StatusCode::BAD_REQUEST && text.contains("port"), "{status} {text}");

    // A hundred at once, and a body up.
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let (at, host) = (at.clone(), host.clone());
        tasks.spawn(async move { get(&at, "/hello.txt", &[("host", &host)]).await });
    }
    let started = Instant::now();
    for one in tasks.join_all().await {
        assert_eq!(one, ok);
    }
    println!("100 requests at once: {:?}", started.elapsed());
    echo(&at, id).await;
    large(&server, &at, &host).await;

    // The end of the sandbox is no clean end of a stream.
    let mut body = send(&at, request("/large", &[("host", &host)])).await.into_body();
    body.frame().await.expect("a frame").expect("bytes");
    client.kill(&sandbox.sandbox_id).await.expect("a kill");
    let cut = loop {
        match body.frame().await {
            Some(Ok(_)) => {}
            Some(Err(_)) => break true,
            None => break false,
        }
    };
    assert!(cut, "the stream ended as if it were whole");
    drop(agent);
    let (status, text) = get(&at, "/", &[("host", &host)]).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(text.contains("\"The sandbox was not found\"") && text.contains(id), "{text}");
    let (status, text) = get(&at, "/", &[("host", &host), html]).await;
    assert!(status == StatusCode::GONE && text.contains("It has ended: it was killed"), "{status} {text}");
    server.stop().await;
}

async fn echo(at: &str, id: &str) {
    let stream = TcpStream::connect(at).await.expect("the gateway");
    let url = format!("ws://8002-{id}.localhost/chat");
    let (mut socket, response) = tokio_tungstenite::client_async(url, stream).await.expect("a WebSocket");
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    for round in 0..200 {
        let text = "x".repeat(round * 7);
        socket.send(Message::text(text.clone())).await.expect("sent");
        assert_eq!(socket.next().await.expect("an echo").expect("a message"), Message::text(text));
    }
    socket.close(None).await.expect("closed");
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the server runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// 1 GiB down, read with pauses, while the server's memory stays where it is.
async fn large(server: &Server, at: &str, host: &str) {
    let before = resident_kib(server.pid());
    let started = Instant::now();
    let mut body = send(at, request("/large", &[("host", host)])).await.into_body();
    let (mut bytes, mut most) = (0_u64, before);
    // A reader that stops: what comes must wait in the guest, not here.
    tokio::time::sleep(Duration::from_secs(1)).await;
    most = most.max(resident_kib(server.pid()));
    while let Some(frame) = body.frame().await {
        let frame = frame.expect("bytes").into_data().expect("data");
        if bytes >> 26 != (bytes + frame.len() as u64) >> 26 {
            most = most.max(resident_kib(server.pid()));
        }
        bytes += frame.len() as u64;
    }
    assert_eq!(bytes, 1 << 30);
    let grown = most.saturating_sub(before);
    println!("1 GiB in {:?}, the server grew by {grown} KiB at the most", started.elapsed());
    assert!(grown < 32 << 10, "the server grew by {grown} KiB");
}

#[tokio::test]
#[allow(clippy::too_many_lines, reason = "one story: each step rests on what the one before it left")]
async fn private_ports_tls_and_raw_streams() {
    let Some(ground) = Ground::with_networks().await else { return };
    let (chain, key) = certificate(&["*.sandboxes.test", "sandboxes.test", "localhost"]);
    let directory = ground.guest("certificate");
    let _ = std::fs::create_dir(&directory);
    let (chain_file, key_file) = (directory.join("chain.pem"), directory.join("key.pem"));
    std::fs::write(&chain_file, &chain).expect("written");
    std::fs::write(&key_file, &key).expect("written");
    let (chain_file, key_file) = (chain_file.display().to_string(), key_file.display().to_string());
    let tls = ["--tls-listen", "127.0.0.1:8443", "--tls-cert", &chain_file, "--tls-key", &key_file];
    let args: Vec<&str> =
        ["--waiting-vmms", "1", "--domain", "sandboxes.test:8443"].into_iter().chain(tls).collect();
    let server = ground.baked("tls", &args, 1).await;
    let config = NetworkConfig {
        allow_public_traffic: Some(false),
        mask_request_host: Some("app.internal:${PORT}".to_owned()),
        ..NetworkConfig::default()
    };
    let (client, sandbox, agent) = sandbox(&server, config).await;
    let (at, id) = (address(&server), sandbox.sandbox_id.as_str());
    assert_eq!(sandbox.domain.as_deref(), Some("sandboxes.test:8443"));
    let token = sandbox.traffic_access_token.clone().expect("a token");
    let host = format!("8001-{id}.sandboxes.test:8443");
    for headers in
        [vec![("host", host.as_str())], vec![("host", host.as_str()), ("e2b-traffic-access-token", "wrong")]]
    {
        let (status, text) = get(&at, "/", &headers).await;
        assert!(status == StatusCode::FORBIDDEN && text.contains("private"), "{status} {text}");
    }
    let (status, text) =
        get(&at, "/", &[("host", &host), ("e2b-traffic-access-token", token.expose())]).await;
    assert!(status == StatusCode::OK && text.contains("host=app.internal:8001\n"), "{status} {text}");
    assert!(
        text.contains("e2b-traffic-access-token=None"),
        "the server in the sandbox has no use for it: {text}"
    );
    assert_eq!(client.sandbox(id).await.expect("it runs").traffic_access_token, Some(token.clone()));
    assert!(client.list_all(&[]).await.expect("a list").iter().all(|row| row.traffic_access_token.is_none()));

    // TLS: h2 by ALPN and HTTP/1.1, the API and ports on one listener.
    for protocol in ["h2", "http/1.1"] {
        let (status, text) = over_tls(&chain, protocol, &host, token.expose()).await;
        assert_eq!(status, StatusCode::OK, "{protocol}: {text}");
        assert!(text.contains("x-forwarded-proto=https\n"), "{protocol}: {text}");
    }

    // The CLI speaks to either listener; over TLS it trusts the host's roots, or those it is told.
    let over = |trusted: bool| {
        let mut list = server.cli(&["--api-url", "https://localhost:8443", "sandbox", "list"]);
        if trusted {
            list.env("SSL_CERT_FILE", &chain_file);
        }
        list.output().expect("kelvin runs")
    };
    let listed = over(true);
    assert!(
        String::from_utf8_lossy(&listed.stdout).contains(id),
        "{}",
        String::from_utf8_lossy(&listed.stderr)
    );
    let refused = String::from_utf8_lossy(&over(false).stderr).into_owned();
    assert!(refused.contains("certificate") || refused.contains("roots"), "{refused}");

    // Raw streams: by the CLI, as a listener and as standard input and output; with half-closed ends.
    sh(
        &agent,
        "(setsid python3 -c '
import socket
l = socket.create_server((\"\", 9009))
open(\"/tmp/raw\", \"w\").close()
while True:
    c, _ = l.accept(); data = b\"\"
    while (part := c.recv(65536)): data += part
    c.sendall(data[::-1]); c.close()' >/dev/null 2>&1 &) ; until test -e /tmp/raw; do sleep 0.05; done",
    )
    .await;
    let mut forward = server
        .cli(&["sandbox", "forward", id, "0:9009"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("kelvin starts");
    let mut line = String::new();
    BufReader::new(forward.stdout.as_mut().expect("a pipe")).read_line(&mut line).expect("a line");
    let local = line.split(' ').next().expect("an address").to_owned();
    let mut handles = Vec::new();
    for index in 0..8_u8 {
        let local = local.clone();
        let namespace = kelvin_host::net::ns::current().expect("a namespace");
        handles.push(std::thread::spawn(move || {
            kelvin_host::net::ns::enter(std::os::fd::AsFd::as_fd(&namespace)).expect("it can be entered");
            let mut stream = StdTcpStream::connect(local).expect("the forwarder");
            let sent: Vec<u8> = (0..100_000_u32).map(|byte| (byte % 251) as u8 ^ index).collect();
            stream.write_all(&sent).expect("sent");
            stream.shutdown(std::net::Shutdown::Write).expect("half closed");
            let mut back = Vec::new();
            stream.read_to_end(&mut back).expect("received");
            back.reverse();
            assert!(back == sent, "{} bytes came back of {}", back.len(), sent.len());
        }));
    }
    for handle in handles {
        tokio::task::spawn_blocking(move || handle.join().expect("it came back")).await.expect("joined");
    }
    forward.kill().expect("it can be ended");
    forward.wait().expect("it ends");
    let mut proxy = server
        .cli(&["sandbox", "proxy", id, "9009"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("kelvin starts");
    proxy.stdin.take().expect("a pipe").write_all(b"drawer").expect("sent");
    let output = tokio::task::spawn_blocking(move || proxy.wait_with_output())
        .await
        .expect("joined")
        .expect("it ends");
    assert_eq!(output.stdout, b"reward");
    let closed = server.cli(&["sandbox", "proxy", id, "9010"]).output().expect("kelvin runs");
    let words = String::from_utf8_lossy(&closed.stderr).into_owned();
    assert!(
        !closed.status.success()
            && words.contains("port is not open")
            && words.contains("listens on port 9010"),
        "{words}"
    );
    // A guest that does not answer is given up in time, and said so.
    let root = client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), Some("root".into()));
    let root = root.expect("a URL");
    sh(&root, "ip link set eth0 down").await;
    let headers = [("host", host.as_str()), ("e2b-traffic-access-token", token.expose())];
    // Once over a connection that was kept from before, once over a new one.
    for words in ["fell silent", "did not accept within 10s"] {
        let started = Instant::now();
        let (status, text) = get(&at, "/", &headers).await;
        assert!(status == StatusCode::GATEWAY_TIMEOUT && text.contains(words), "{status} {text}");
        assert!(started.elapsed() < Duration::from_secs(25), "{:?}", started.elapsed());
    }
    sh(&root, "ip link set eth0 up; ip route add default via 169.254.0.22").await;
    assert_eq!(get(&at, "/", &headers).await.0, StatusCode::OK);
    // Without the tokens there is no raw stream.
    let mut stranger = client.sandbox(id).await.expect("it runs");
    stranger.envd_access_token = None;
    let refused = client.stream(&stranger, 9009).await.err().expect("refused").to_string();
    assert!(refused.contains("access token"), "{refused}");
    server.stop().await;
}

async fn over_tls(chain: &str, protocol: &str, host: &str, token: &str) -> (StatusCode, String) {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, ServerName};
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(chain.as_bytes()).expect("a certificate")).expect("a root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
    let stream = TcpStream::connect("127.0.0.1:8443").await.expect("the gateway");
    let name = host.split(':').next().expect("a name").to_owned();
    let name = ServerName::try_from(name).expect("a name");
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.expect("TLS");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocol.as_bytes()));
    let builder = Request::builder().header("e2b-traffic-access-token", token);
    let response = if protocol == "h2" {
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .expect("h2");
        tokio::spawn(connection);
        let request =
            builder.uri(format!("https://{host}/x")).body(Empty::<Bytes>::new()).expect("a request");
        sender.send_request(request).await.expect("a reply")
    } else {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP/1.1");
        tokio::spawn(connection);
        let request = builder.uri("/x").header("host", host).body(Empty::<Bytes>::new()).expect("a request");
        sender.send_request(request).await.expect("a reply")
    };
    let status = response.status();
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    (status, String::from_utf8_lossy(&body).into_owned())
}

/// Whoever opens connections without end gets a 429 for the next one, and the sandbox goes on.
#[tokio::test]
async fn connections_into_a_sandbox_are_limited() {
    let Some(ground) = Ground::with_networks().await else { return };
    kelvin_host::descriptors::raise().expect("the hard limit");
    let server = ground.baked("inbound", &["--waiting-vmms", "1"], 1).await;
    let (client, sandbox, agent) = sandbox(&server, NetworkConfig::default()).await;
    let detail = client.sandbox(sandbox.sandbox_id.as_str()).await.expect("it runs");
    let mut held = Vec::new();
    let refused = loop {
        match client.stream(&detail, 8003).await {
            Ok(stream) => held.push(stream),
            Err(kelvin_client::Error::Refused(refused)) => break refused,
            Err(error) => panic!("after {} connections: {error}", held.len()),
        }
        assert!(held.len() <= 1024, "there is no limit");
    };
    assert_eq!((refused.code, held.len()), (429, 1024), "{refused}");
    assert_eq!(sh(&agent, "echo ok").await, "ok\n");
    // Places are free again when the server in the sandbox has closed: then it is not there, which is another word.
    sh(&agent, "pkill -f servers.py").await;
    let started = Instant::now();
    loop {
        match client.stream(&detail, 8003).await {
            Err(kelvin_client::Error::Refused(refused)) if refused.code == 502 => break,
            other => assert!(started.elapsed() < LIMIT, "no place is free again: {}", other.is_ok()),
        }
    }
    drop(held);
    server.stop().await;
}

/// An agent that crashes has lost the sandbox's token: it lets nobody in, rather than everybody.
#[tokio::test]
async fn an_agent_that_crashed_lets_no_stranger_in() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("agent-crash", &["--waiting-vmms", "1"], 1).await;
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let token = sandbox.envd_access_token.clone();
    let root = client.agent(&sandbox.sandbox_id, token, Some("root".into())).expect("a URL");
    let identity = sh(&root, "cat /etc/machine-id /etc/hostname").await;
    assert!(identity.contains(sandbox.sandbox_id.as_str()), "{identity}");
    // The agent is the one child of PID 1 that has its name; its end is the end of this command's stream.
    let _ = root
        .run(
            &shell("kill -9 $(pgrep -f '^/proc/self/exe agent' || pgrep -P 1 -x exe || pgrep -P 1 -f agent)"),
            1 << 10,
        )
        .await;
    let started = Instant::now();
    loop {
        let stranger = client.agent(&sandbox.sandbox_id, None, None).expect("a URL");
        let command = shell("true");
        match tokio::time::timeout(LIMIT / 10, stranger.run(&command, 1 << 10)).await {
            Ok(Ok(_)) => panic!("a stranger was let in"),
            Ok(Err(error)) if error.to_string().contains("unauthenticated") => break,
            _ => assert!(started.elapsed() < LIMIT, "the agent is not back"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Its owner is, by the same token, and it is who it was.
    assert_eq!(sh(&root, "cat /etc/machine-id /etc/hostname").await, identity);
    server.stop().await;
}
