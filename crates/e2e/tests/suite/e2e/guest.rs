//! What people run in a sandbox, and what that must not break: memory, processes, identity, the agent itself.

use std::time::{Duration, Instant};

use http::{Method, StatusCode};
use kelvin_api::sandbox::{ForkSandbox, PauseSandbox, Sandbox, SandboxState};
use kelvin_client::agent::{Agent, Command, ErrorCode, Told};
use kelvin_client::{Client, Error};
use kelvin_e2e::{Ground, LIMIT, Server, agent_of, ask, new_sandbox, sh, shell, start_counter};

use super::containers::CONTAINERS;

fn root_of(client: &Client, sandbox: &Sandbox) -> Agent {
    client
        .agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), Some("root".to_owned()))
        .expect("a URL")
}

async fn made(client: &Client) -> (Sandbox, Agent, Agent) {
    let sandbox = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let (user, root) = (agent_of(client, &sandbox), root_of(client, &sandbox));
    (sandbox, user, root)
}

/// Runs a shell command; exit code, output and errors.
async fn tried(agent: &Agent, script: &str) -> (i32, String, String) {
    let (code, stdout, stderr) = agent.run(&shell(script), 1 << 20).await.expect("the command runs");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (code, text(stdout), text(stderr))
}

/// Waits until `script` succeeds in the guest, without output.
async fn until(agent: &Agent, what: &str, script: &str) {
    let loop_until = format!("for i in $(seq 600); do {script} && exit 0; sleep 0.1; done; exit 1");
    assert_eq!(tried(agent, &loop_until).await.0, 0, "{what}");
}

async fn within<T>(limit: Duration, what: &str, work: impl Future<Output = T>) -> T {
    let started = Instant::now();
    let done =
        tokio::time::timeout(limit, work).await.unwrap_or_else(|_| panic!("{what}: not within {limit:?}"));
    println!("{what}: {:.1} s", started.elapsed().as_secs_f64());
    done
}

async fn baked(ground: &Ground, name: &str, args: &[&str]) -> Server {
    ground.baked(name, args, 1).await
}

/// A command that takes all memory, a service that does, shared memory that is full, a fork bomb: what is guilty ends,
/// files stay, and the agent, `list`, `kill` and commands of root answer all the while.
#[tokio::test]
async fn memory_and_processes_that_run_out_end_no_sandbox() {
    let Some(ground) = Ground::find() else { return };
    let server = baked(&ground, "guest-out", &[]).await;
    let client = server.client();
    let (sandbox, user, root) = made(&client).await;
    sh(&user, "echo kept > file").await;

    // What everything here counts against, and what the agent keeps to itself.
    let groups = sh(&user, "cat /proc/self/cgroup; cat /proc/self/oom_score_adj; grep . /sys/fs/cgroup/sandbox/{,user/}{memory,pids}.max").await;
    println!("{groups}");
    assert!(groups.starts_with("0::/sandbox/user\n100\n"), "{groups}");
    assert_eq!(sh(&root, "cat /proc/self/cgroup").await, "0::/sandbox/root\n");
    let scores =
        sh(&root, "for p in $(pgrep -f 'agent$'); do cat /proc/$p/oom_score_adj; done; pgrep -fc 'agent$'")
            .await;
    assert!(scores.starts_with("-1000"), "the agent itself: {scores}");

    // A command, and one of root, each of which takes what there is.
    const EAT: &str = "b=[]\nwhile True: b.append(bytearray(16<<20))";
    for (agent, who) in [(&user, "a user"), (&root, "root")] {
        let command =
            Command { program: "python3".into(), args: vec!["-c".into(), EAT.into()], ..Command::default() };
        let ran =
            within(LIMIT, &format!("a command of {who} that takes all memory"), agent.run(&command, 4096))
                .await;
        let (code, _, stderr) = ran.expect("it ends and the agent says so");
        assert!(code != 0, "{who}: {code} {}", String::from_utf8_lossy(&stderr));
        assert_eq!(
            client.sandbox(sandbox.sandbox_id.as_str()).await.expect("it is there").state,
            SandboxState::Running
        );
        assert_eq!(sh(&user, "cat file").await, "kept\n");
    }
    // Memory that no process holds: nothing of a user's can run until root has made room, and root can.
    let _ = tried(&user, "head -c 1G /dev/zero > /dev/shm/full").await;
    within(LIMIT, "root makes room in full shared memory", sh(&root, "rm -f /dev/shm/full")).await;
    assert_eq!(sh(&user, "cat file").await, "kept\n");

    // A fork bomb, by a shell and by Python, in a group of its own.
    let bomb = shell("bomb() { bomb | bomb & }; bomb; while :; do sleep 1; done");
    let mut bombs = user.start(&bomb).await.expect("it starts");
    let Some(Told::Started { pid }) = bombs.next().await.expect("a stream") else {
        panic!("it did not start")
    };
    let full = "test $(cat /sys/fs/cgroup/sandbox/user/pids.current) -ge 300";
    until(&root, "hundreds of processes", full).await;
    within(Duration::from_secs(30), "list beside a fork bomb", user.processes()).await.expect("a list");
    let count = within(
        Duration::from_secs(30),
        "a command of root beside it",
        sh(&root, "cat /sys/fs/cgroup/sandbox/user/pids.current"),
    )
    .await;
    println!("processes: {count}");
    within(Duration::from_secs(30), "kill", user.signal(pid, true)).await.expect("a kill");
    // What has left the group is ended by root, as people do.
    within(LIMIT, "the rest is ended by root", async {
        sh(&root, "echo 1 > /sys/fs/cgroup/sandbox/user/cgroup.kill; for i in $(seq 300); do test $(cat /sys/fs/cgroup/sandbox/user/pids.current) = 0 && exit 0; sleep 0.1; done; exit 1").await
    })
    .await;
    assert_eq!(within(LIMIT, "a command of the user afterwards", sh(&user, "cat file")).await, "kept\n");
    client.kill(&sandbox.sandbox_id).await.expect("a kill");
    server.stop().await;
}

/// Root does to the files of the agent what it likes: forks, pauses and resumes work, and edits are kept.
#[tokio::test]
async fn files_that_root_has_changed_break_no_identity() {
    let Some(ground) = Ground::find() else { return };
    let server = baked(&ground, "guest-identity", &[]).await;
    let client = server.client();
    let (sandbox, user, root) = made(&client).await;
    let id = sandbox.sandbox_id.as_str();
    let source = sh(&user, "cat /etc/machine-id /etc/hostname; hostname").await;
    let own = format!("{id}\n{id}\n");
    assert!(source.ends_with(&own), "{source}");

    // Each is done to a fresh child, which is forked in its turn.
    for (what, script) in [
        ("an emptied machine-id", "truncate -s 0 /etc/machine-id"),
        (
            "a machine-id of its own",
            "rm /etc/machine-id; echo 0123456789abcdef0123456789abcdef > /etc/machine-id",
        ),
        ("a shorter machine-id", "echo uninitialized > /etc/machine-id"),
        ("no machine-id", "rm -f /etc/machine-id /run/kelvin/machine-id"),
        ("a FIFO", "rm -f /run/kelvin/machine-id; mkfifo /run/kelvin/machine-id"),
        (
            "directories",
            "rm -f /run/kelvin/*; mkdir /run/kelvin/hosts /run/kelvin/hostname /run/kelvin/machine-id",
        ),
        ("no directory", "umount /proc/sys/kernel/random/boot_id; rm -rf /run/kelvin"),
        (
            "files that are cut while nobody looks",
            "(while :; do truncate -s 0 /run/kelvin/*; done) </dev/null >/dev/null 2>&1 &",
        ),
        (
            "FIFOs where the agent reads",
            "cp -p /etc/group /tmp/group; rm /etc/group; mkfifo /etc/group; rm -f /dev/urandom",
        ),
    ] {
        let body = ForkSandbox { timeout: Some(300), count: Some(1), ..ForkSandbox::default() };
        let child = client.fork(id, &body).await.expect("a fork").0.remove(0).sandbox.expect("a child");
        sh(&root_of(&client, &child), script).await;
        let body = ForkSandbox { timeout: Some(300), count: Some(1), ..ForkSandbox::default() };
        let forked = within(LIMIT, what, client.fork(child.sandbox_id.as_str(), &body)).await;
        let grandchild = forked.expect(what).0.remove(0);
        let grandchild = grandchild.sandbox.unwrap_or_else(|| panic!("{what}: {:?}", grandchild.error));
        let seen = sh(
            &root_of(&client, &grandchild),
            "cat /etc/machine-id; hostname; cat /proc/sys/kernel/random/boot_id",
        )
        .await;
        let lines: Vec<&str> = seen.lines().collect();
        if !what.starts_with("files that are cut") {
            assert_eq!((lines.len(), lines[0].len()), (3, 32), "{what}: {seen}");
            assert!(
                !source.contains(lines[0]) && lines[0] != "0123456789abcdef0123456789abcdef",
                "{what}: {seen}"
            );
            assert_eq!(lines[1], grandchild.sandbox_id.as_str(), "{what}");
        }
        for gone in [&child, &grandchild] {
            client.kill(&gone.sandbox_id).await.expect("a kill");
        }
    }

    // Edits of people: kept by a fork with the copy's own name, and by a pause without memory.
    sh(&root, "echo '10.9.8.7 db' >> /etc/hosts; echo mine > /etc/hostname").await;
    let body = ForkSandbox { timeout: Some(300), count: Some(1), ..ForkSandbox::default() };
    let child = client.fork(id, &body).await.expect("a fork").0.remove(0).sandbox.expect("a child");
    let hosts =
        sh(&agent_of(&client, &child), "cat /etc/hosts; sudo -n true && getent hosts $(hostname)").await;
    assert!(hosts.contains("10.9.8.7 db") && !hosts.contains(id), "{hosts}");
    client.kill(&child.sandbox_id).await.expect("a kill");
    let before = sh(&user, "cat /etc/machine-id").await;
    client
        .pause_as(id, &PauseSandbox { memory: Some(false), ..PauseSandbox::default() })
        .await
        .expect("a pause");
    client.resume(id, 300).await.expect("a resume");
    let after = sh(&user, "cat /etc/machine-id; hostname; cat /etc/hosts").await;
    assert!(
        after.starts_with(&before) && after.contains("\nmine\n") && after.contains("10.9.8.7 db"),
        "{after}"
    );
    client.kill(&sandbox.sandbox_id).await.expect("a kill");
    server.stop().await;
}

/// `kill -9 -1` by root: the agent comes back as who it was, streams end with an error, what died is not listed.
#[tokio::test]
async fn an_agent_that_is_killed_comes_back_as_who_it_was() {
    let Some(ground) = Ground::find() else { return };
    let server = baked(&ground, "guest-killed", &[]).await;
    let client = server.client();
    let mut body = new_sandbox();
    body.env_vars = Some([("FROM_CREATE".into(), "yes".into())].into());
    let sandbox = client.create(&body, None).await.expect("a create").sandbox;
    let (user, root) = (agent_of(&client, &sandbox), root_of(&client, &sandbox));
    let who =
        "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; echo $FROM_CREATE $E2B_SANDBOX_ID";
    let before = sh(&user, who).await;
    start_counter(&user).await;
    let mut stream = user.start(&shell("sleep 1000")).await.expect("it starts");
    assert!(matches!(stream.next().await, Ok(Some(Told::Started { .. }))));
    for round in 0..2 {
        // Everything but init: the agent with it, so nothing answers this.
        let _ = root.run(&shell("kill -9 -1"), 1024).await;
        if round == 0 {
            let end = within(LIMIT, "the stream of a process that died", async {
                loop {
                    match stream.next().await {
                        Ok(Some(Told::Ended { .. }) | None) | Err(_) => break,
                        Ok(Some(_)) => {}
                    }
                }
            });
            end.await;
        }
        // What is asked while there is no agent gets an error at once, and may be asked again.
        let back = async {
            loop {
                match user.run(&shell(who), 4096).await {
                    Ok((0, stdout, _)) => break String::from_utf8_lossy(&stdout).into_owned(),
                    Ok(other) => panic!("{other:?}"),
                    Err(Error::Agent(error)) if error.code == ErrorCode::Unavailable => {}
                    Err(error) => println!("while it comes back: {error}"),
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let after = within(LIMIT, "a command after kill -9 -1", back).await;
        assert_eq!(after, before, "the same identity, token and environment");
        assert_eq!(user.processes().await.expect("a list").len(), 0, "what died is not listed");
    }
    // A stranger is not let in by that.
    let other = client.agent(&sandbox.sandbox_id, None, None).expect("a URL");
    assert!(
        matches!(other.processes().await, Err(Error::Agent(error)) if error.code == ErrorCode::Unauthenticated)
    );
    // It is a machine like any other: paused, resumed, forked.
    client.pause(sandbox.sandbox_id.as_str()).await.expect("a pause");
    client.resume(sandbox.sandbox_id.as_str(), 300).await.expect("a resume");
    assert_eq!(sh(&user, who).await, before);
    client.kill(&sandbox.sandbox_id).await.expect("a kill");
    server.stop().await;
}

/// What a process is given, what it leaves running, what it can read and write, and how the guest is set up.
#[tokio::test]
#[allow(clippy::too_many_lines, reason = "one story: each step rests on what the one before it left")]
async fn processes_find_what_people_expect() {
    let Some(ground) = Ground::find() else { return };
    let server = baked(&ground, "guest-processes", &[]).await;
    let client = server.client();
    let (sandbox, user, root) = made(&client).await;

    // A job in the background that prints after its shell has ended, lives on; the caller is told of the end at once.
    for (what, job) in [
        ("prints", "sleep 2; echo x; echo y >&2; touch one"),
        ("prints much", "sleep 1; head -c 300000 /dev/zero; touch two"),
        ("a pipeline", "sleep 1; seq 100000 | tail -n 1; touch three"),
    ] {
        let started = Instant::now();
        sh(&user, &format!("({job}) &")).await;
        assert!(started.elapsed() < Duration::from_secs(30), "{what}");
    }
    until(&user, "jobs that print go on", "test -e one -a -e two -a -e three").await;
    // One that never stops printing does not keep the end back.
    within(LIMIT, "the end beside a job that never stops printing", sh(&user, "yes & echo begun")).await;
    sh(&user, "pkill yes").await;

    // Pipes and terminals are their user's.
    for agent in [&user, &root] {
        let (code, out, err) = tried(
            agent,
            "echo a > /dev/stdout; echo b | tee /dev/stderr; echo c > /dev/fd/2; echo d > /proc/self/fd/1",
        )
        .await;
        assert_eq!((code, out.as_str(), err.as_str()), (0, "a\nb\nd\n", "b\nc\n"));
    }
    let (_, out, err) = tried(&user, "script -qec 'stat -c \"%U %G %a\" $(tty); tty > $(tty)' /dev/null; stat -f -c %T /dev/pts; grep devpts /proc/mounts").await;
    assert!(out.starts_with("user tty 620\r\n") && out.contains("gid=5,mode=620"), "{out} {err}");
    assert_eq!(
        sh(&user, "cat /dev/stdin < /dev/null; : > /dev/null; stat -Lc '%U' /dev/stdout").await,
        "user\n"
    );

    // Defaults of the guest.
    let defaults = "cat /proc/sys/fs/inotify/max_user_watches; stat -c '%a %n' /run /run/lock /dev/shm /tmp; \
                    test -d /usr/share/man/man1 && echo man; cat /proc/sys/vm/max_map_count; ulimit -n";
    let defaults = sh(&user, defaults).await;
    assert_eq!(defaults, "524288\n755 /run\n1777 /run/lock\n1777 /dev/shm\n1777 /tmp\nman\n262144\n1024\n");
    for (what, script) in CONTAINERS {
        let (code, out, err) = tried(&root, &format!("set -e; cd $(mktemp -d); {script}")).await;
        assert_eq!(code, 0, "{what}: {out} {err}");
    }

    // Where a command cannot be started: typed, and why.
    let start = async |program: &str, cwd: Option<&str>, args: Vec<String>| {
        let command =
            Command { program: program.into(), args, cwd: cwd.map(Into::into), ..Command::default() };
        match user.run(&command, 1024).await {
            Err(Error::Agent(error)) => (error.code, error.message.clone().unwrap_or_default()),
            other => panic!("{program} {cwd:?}: {other:?}"),
        }
    };
    for (program, cwd, code, text) in [
        ("true", Some("/none"), ErrorCode::InvalidArgument, "cwd '/none' does not exist"),
        ("true", Some("/etc/passwd"), ErrorCode::InvalidArgument, "cwd '/etc/passwd' is not a directory"),
        ("true", Some("/root"), ErrorCode::PermissionDenied, "may not be entered"),
        ("nosuchcommand", None, ErrorCode::NotFound, "not found"),
        ("/etc/passwd", None, ErrorCode::PermissionDenied, "cannot be executed"),
        ("a\0b", None, ErrorCode::InvalidArgument, "NUL"),
    ] {
        let (is, said) = start(program, cwd, Vec::new()).await;
        assert!(is == code && said.contains(text), "{program} {cwd:?}: {is:?} {said}");
    }
    let (code, said) = start("true", None, vec!["x".repeat(200_000)]).await;
    assert!(code == ErrorCode::InvalidArgument && said.contains("longer"), "{code:?} {said}");

    // Files whose size is a lie, and special ones: their content, or a typed error; the agent lives.
    let files = [
        ("/sys/class/net/lo/mtu", 200, Some("65536\n")),
        ("/proc/sys/kernel/ostype", 200, Some("Linux\n")),
        ("/proc/version", 200, None),
        ("/sys/fs/cgroup/cgroup.controllers", 200, None),
        ("/proc/self/maps", 200, None),
        ("/proc/kmsg", 200, None),
        ("/dev/zero", 400, None),
        ("/dev/stdin", 0, None),
        ("/proc/1/mem", 0, None),
        ("/sys/kernel/debug", 0, None),
        ("/tmp", 400, None),
        ("/tmp/self-link", 400, None),
    ];
    sh(&root, "ln -s self-link /tmp/self-link; mkfifo -m 666 /tmp/fifo").await;
    let token = sandbox.envd_access_token.clone().map(|token| token.expose().to_owned()).unwrap_or_default();
    let headers = [
        ("e2b-sandbox-id", sandbox.sandbox_id.as_str()),
        ("e2b-sandbox-port", "49983"),
        ("x-access-token", token.as_str()),
    ];
    for (path, status, content) in files.iter().chain(&[("/tmp/fifo", 400, None)]) {
        let query = format!("/files?path={path}&username=root");
        let asked = ask(&server, &Method::GET, &query, &headers, "");
        let (is, text) = within(LIMIT, path, asked).await;
        assert!(*status == 0 || is.as_u16() == *status, "{path}: {is} {text}");
        assert!(content.is_none_or(|content| content == text), "{path}: {text:?}");
        assert!(*status != 0 || is != StatusCode::BAD_GATEWAY, "{path}: {is} {text}");
    }
    assert_eq!(sh(&user, "echo alive").await, "alive\n");
    client.kill(&sandbox.sandbox_id).await.expect("a kill");
    server.stop().await;
}

/// Servers on loopback, of either family, are reached like any other; trailers get through.
#[tokio::test]
async fn whatever_listens_in_a_guest_is_reached() {
    let Some(ground) = Ground::with_networks().await else { return };
    let server = baked(&ground, "guest-loopback", &[]).await;
    let client = server.client();
    let (sandbox, user, _) = made(&client).await;
    let listeners = [
        (8101, "127.0.0.1", "AF_INET"),
        (8102, "127.0.0.2", "AF_INET"),
        (8103, "::1", "AF_INET6"),
        (8104, "::", "AF_INET6"),
        (8105, "0.0.0.0", "AF_INET"),
    ];
    let script = format!(
        "import http.server, socket, threading\nclass H(http.server.BaseHTTPRequestHandler):\n  protocol_version='HTTP/1.1'\n  def log_message(self,*a): pass\n  def do_GET(self):\n    n=str(self.server.server_port).encode()\n    if self.path=='/trailers':\n      self.send_response(200); self.send_header('Trailer','x-sum'); self.send_header('x-te', self.headers.get('te','-')); self.send_header('Transfer-Encoding','chunked'); self.end_headers(); self.wfile.write(b'4\\r\\n'+n+b'\\r\\n0\\r\\nx-sum: done\\r\\n\\r\\n'); return\n    self.send_response(200); self.send_header('content-length',str(len(n))); self.end_headers(); self.wfile.write(n)\nfor port,host,family in {listeners:?}:\n  class S(http.server.ThreadingHTTPServer): address_family=getattr(socket,family)\n  class S6(S):\n    def server_bind(self):\n      self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1); super().server_bind()\n  threading.Thread(target=(S6 if host=='::' else S)((host,port),H).serve_forever).start()\nopen('/tmp/up','w')\n"
    );
    let write = format!(
        "cat > /tmp/s.py <<'EOF'\n{script}EOF\nsetsid python3 /tmp/s.py </dev/null >/tmp/s.log 2>&1 &"
    );
    sh(&user, &write).await;
    until(&user, "the servers", "test -e /tmp/up").await;
    let id = sandbox.sandbox_id.as_str();
    for (port, host, _) in listeners {
        let (status, text) =
            ask(&server, &Method::GET, &format!("/sandboxes/{id}/ports/{port}/"), &[], "").await;
        assert_eq!((status, text), (StatusCode::OK, port.to_string()), "{host}");
    }
    // The address of the sandbox itself is not what is loopback's, and what nobody listens on is closed.
    let (status, text) = ask(&server, &Method::GET, &format!("/sandboxes/{id}/ports/8199/"), &[], "").await;
    assert!(status == StatusCode::BAD_GATEWAY && text.contains("port is not open"), "{status} {text}");
    // Many at once, over loopback.
    let asked: Vec<_> = (0..50)
        .map(|_| {
            let path = format!("/sandboxes/{id}/ports/8101/");
            let server = &server;
            async move { ask(server, &Method::GET, &path, &[], "").await }
        })
        .collect();
    for (status, text) in futures::future::join_all(asked).await {
        assert_eq!((status, text.as_str()), (StatusCode::OK, "8101"));
    }
    // The node's way to loopback is nobody else's.
    let token = sandbox.envd_access_token.clone().map(|token| token.expose().to_owned()).unwrap_or_default();
    let headers = [("e2b-sandbox-id", id), ("x-access-token", token.as_str())];
    let (status, _) = ask(&server, &Method::CONNECT, "/", &headers, "").await;
    assert!(status.is_client_error(), "{status}");
    for port in [8105, 8101] {
        let response = kelvin_e2e::send(
            &server,
            &Method::GET,
            &format!("/sandboxes/{id}/ports/{port}/trailers"),
            &[("te", "trailers"), ("connection", "te")],
            "",
        )
        .await;
        assert_eq!(response.headers()["x-te"], "trailers");
        use http_body_util::BodyExt;
        let body = response.into_body().collect().await.expect("a body");
        assert_eq!(
            body.trailers().and_then(|trailers| trailers.get("x-sum")).map(|sum| sum.as_bytes()),
            Some(&b"done"[..]),
            "{port}"
        );
        assert_eq!(body.to_bytes(), port.to_string());
    }
    client.kill(&sandbox.sandbox_id).await.expect("a kill");
    server.stop().await;
}

/// Guests end in different ways, and owners are told which.
#[tokio::test]
async fn how_a_guest_has_ended_is_told() {
    let Some(ground) = Ground::with_networks().await else { return };
    let server = baked(&ground, "guest-ends", &["--slots", "8"]).await;
    let client = server.client();
    let reboot = |command: u32| {
        format!(
            "python3 -c 'import ctypes; ctypes.CDLL(None).syscall(169, 0xfee1dead, 672274793, {command:#x}, 0)'"
        )
    };
    let cases = [
        ("shut down", reboot(0x4321_fedc)),
        ("rebooted", reboot(0x0123_4567)),
        ("rebooted", "echo b > /proc/sysrq-trigger".to_owned()),
        ("shut down", "echo o > /proc/sysrq-trigger".to_owned()),
        ("panicked: sysrq triggered crash", "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger".to_owned()),
        ("ran out of memory", "echo 2 > /proc/sys/vm/panic_on_oom; python3 -c \"b=[]\nwhile True: b.append(bytearray(16<<20))\"".to_owned()),
        ("halted", reboot(0xcdef_0123)),
    ];
    for (told, script) in &cases {
        let (sandbox, _, root) = made(&client).await;
        let id = sandbox.sandbox_id.as_str();
        let started = Instant::now();
        let mut command = shell(&format!(
            "echo 1 > /proc/sys/kernel/sysrq; (sleep 0.2; {script}) </dev/null >/dev/null 2>&1 &"
        ));
        command.deadline = None;
        let _ = root.run(&command, 1024).await;
        // By host, as a browser: the page says why.
        let name = format!("8000-{id}.localhost");
        let reason = loop {
            let (_, text) =
                ask(&server, &Method::GET, "/", &[("host", &name), ("accept", "text/html")], "").await;
            if let Some((_, rest)) = text.split_once("It has ended: ") {
                break rest.split(". Create").next().unwrap_or_default().to_owned();
            }
            assert!(started.elapsed() < LIMIT, "{told}: {text}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        println!("{told}: {reason:?} after {:.1} s", started.elapsed().as_secs_f64());
        assert!(reason.contains(told), "{told}: {reason}");
        assert!(matches!(client.sandbox(id).await, Err(Error::Refused(refused)) if refused.code == 404));
    }
    // The VMM itself.
    let (sandbox, _, _) = made(&client).await;
    server.settle().await;
    for pid in server.vmms() {
        if server.machine_of(pid).contains("waiting") {
            continue;
        }
        let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("a signal");
    }
    let started = Instant::now();
    let name = format!("8000-{}.localhost", sandbox.sandbox_id);
    loop {
        let (_, text) =
            ask(&server, &Method::GET, "/", &[("host", &name), ("accept", "text/html")], "").await;
        if text.contains("its VMM ended") {
            assert!(!text.contains("vmdescription"), "{text}");
            break;
        }
        assert!(started.elapsed() < LIMIT, "{text}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    server.stop().await;
}
