//! What people type and rely on: exit codes, Ctrl-C, copies, filters, names, visitors of what is being paused.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use http::{Method, StatusCode};
use kelvin_api::sandbox::{AutoResume, ForkSandbox, NewSandbox, PauseSandbox, SandboxState};
use kelvin_client::Error;
use kelvin_e2e::{Ground, LIMIT, agent_of, ask, new_sandbox, sh, shell};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn run(command: &mut Command) -> Output {
    command.output().expect("it runs")
}

#[tokio::test]
#[allow(clippy::too_many_lines, reason = "one story: each step rests on what the one before it left")]
async fn exit_codes_copies_and_filters_are_what_people_expect() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.baked("people", &["--waiting-vmms", "1"], 1).await;
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let agent = agent_of(&client, &sandbox);
    let id = sandbox.sandbox_id.as_str();
    let exec = |words: &[&str]| run(server.cli(&["sandbox", "exec"]).args(words));

    // Who failed is told by the code: the command, or what was to run it.
    sh(&agent, "echo text > plain; printf '#!/bin/sh\\nexit 3\\n' > prog; chmod 755 prog").await;
    for (words, code) in [
        (vec![id, "--", "false"], 1),
        (vec![id, "--", "sh", "-c", "exit 125"], 125),
        (vec!["nosuchsandbox", "--", "true"], 125),
        (vec![id, "--", "no-such-command"], 127),
        (vec![id, "--", "/home/user/plain"], 126),
        (vec![id, "-w", "/none", "--", "true"], 125),
        (vec![id, "-u", "nobody-here", "--", "true"], 125),
        (vec![id, "--timeout", "1", "--", "sleep", "60"], 124),
        (vec![id, "--attach", "999999"], 125),
        (vec![id, "--", "sh", "-c", "kill -TERM $$"], 143),
        (vec![id, "--", "/home/user/prog"], 3),
    ] {
        let output = exec(&words);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {}", text(&output.stderr));
    }
    let nobody =
        run(&mut server.cli(&["--api-url", "http://127.0.0.1:9", "sandbox", "exec", id, "--", "true"]));
    assert_eq!(nobody.status.code(), Some(125), "{}", text(&nobody.stderr));
    let wrong = run(&mut server.cli(&["--api-key", "e2b_0000", "run", "--", "true"]));
    assert_eq!(wrong.status.code(), Some(125), "{}", text(&wrong.stderr));
    assert_eq!(run(&mut server.cli(&["run", "-t", "nosuchtemplate", "--", "true"])).status.code(), Some(125));

    // Ctrl-C, SIGTERM and a reader that goes away end what runs in the sandbox. A signal that is caught here is no longer
    // ignored there, as that of a shell's background job is.
    let _caught =
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt()).expect("a handler");
    let runs = async |what: &str| {
        let (code, ..) =
            agent.run(&shell(&format!("pgrep -f '{what}' >/dev/null")), 64).await.expect("it runs");
        code == 0
    };
    for (signal, code) in [(rustix::process::Signal::INT, 130), (rustix::process::Signal::TERM, 143)] {
        let mut child = server
            .cli(&["sandbox", "exec", id, "--", "sh", "-c", "echo up; exec sleep 86399"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut line = String::new();
        let mut out = std::io::BufReader::new(child.stdout.take().expect("a pipe"));
        std::io::BufRead::read_line(&mut out, &mut line).expect("a line");
        assert!(runs("[s]leep 86399").await);
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, signal).expect("a signal");
        assert_eq!(child.wait().expect("an end").code(), Some(code));
        assert!(!runs("[s]leep 86399").await, "{signal:?}");
    }
    for words in ["sh -c 'while :; do echo x; done'", "sh -c 'echo x; exec sleep 86398'"] {
        let script = format!("{} sandbox exec {id} -- {words} | head -n 1", env_of(&server));
        let started = Instant::now();
        let piped = run(Command::new("timeout").args(["60", "bash", "-c", &script]).envs(envs(&server)));
        assert_eq!((piped.status.code(), text(&piped.stdout).as_str()), (Some(0), "x\n"), "{words}");
        println!("a reader that goes away: {:.1} s", started.elapsed().as_secs_f64());
        assert!(!runs("[s]leep 86398").await && !runs("[w]hile :; do echo").await, "{words}");
    }
    // What was attached to was there before, and stays.
    let ticks = ["--detach", "--", "sh", "-c", "while :; do echo tick; sleep 0.2; done"];
    let pid = text(&exec(&[&[id], &ticks[..]].concat()).stdout).trim().to_owned();
    let mut child = server
        .cli(&["sandbox", "exec", id, "--attach", &pid])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut line = String::new();
    let mut out = std::io::BufReader::new(child.stdout.take().expect("a pipe"));
    std::io::BufRead::read_line(&mut out, &mut line).expect("a line");
    let attached = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(attached, rustix::process::Signal::INT).expect("a signal");
    assert_eq!(child.wait().expect("an end").code(), Some(130));
    assert!(runs("[d]o echo tick").await, "it was only attached to");

    // Copies: modes, directories with links, both ways, and streams.
    let local = ground.guest("people-copies");
    let _ = fs::remove_dir_all(&local);
    fs::create_dir_all(local.join("tree/sub/empty")).expect("a directory");
    fs::write(local.join("tree/sub/tool"), "#!/bin/sh\necho tool\n").expect("a file");
    fs::set_permissions(local.join("tree/sub/tool"), fs::Permissions::from_mode(0o750)).expect("a mode");
    fs::write(local.join("tree/big"), vec![b'k'; 3 << 20]).expect("a file");
    std::os::unix::fs::symlink("sub/tool", local.join("tree/link")).expect("a link");
    let here = |path: &str| local.join(path).display().to_string();
    let there = |path: &str| format!("{id}:{path}");
    let cp = |from: &str, to: &str| {
        let output = run(&mut server.cli(&["sandbox", "cp", from, to]));
        assert!(output.status.success(), "{from} {to}: {}", text(&output.stderr));
        output.stdout
    };
    cp(&here("tree/sub/tool"), &there("tool"));
    assert_eq!(sh(&agent, "stat -c '%a %U' tool; ./tool").await, "750 user\ntool\n");
    cp(&here("tree"), &there("copied"));
    let listed =
        "cd copied && find . | sort && stat -c %a sub/tool && readlink link && wc -c < big && stat -c %U sub";
    let shape = ".\n./big\n./link\n./sub\n./sub/empty\n./sub/tool\n750\nsub/tool\n3145728\nuser\n";
    assert_eq!(sh(&agent, listed).await, shape);
    sh(&agent, "mkdir into").await;
    cp(&here("tree"), &there("into"));
    cp(&here("tree/sub/tool"), &there("into/"));
    assert_eq!(sh(&agent, "test -d into/tree/sub/empty && stat -c %a into/tool").await, "750\n");
    cp(&there("copied"), &here("back"));
    let mode = |path: &str| fs::metadata(local.join(path)).expect("a file").permissions().mode() & 0o7777;
    assert_eq!(
        (mode("back/sub/tool"), fs::read_link(local.join("back/link")).expect("a link")),
        (0o750, "sub/tool".into())
    );
    assert_eq!(fs::read(local.join("back/big")).expect("a file").len(), 3 << 20);
    cp(&there("~/tool"), &here("tool"));
    assert_eq!(mode("tool"), 0o750);
    assert_eq!(text(&cp(&there("tool"), "-")), "#!/bin/sh\necho tool\n");
    let archive = cp(&there("copied"), "-");
    assert!(archive.len() > 3 << 20);
    let stream = |to: &str| {
        let mut child =
            server.cli(&["sandbox", "cp", "-", to]).stdin(Stdio::piped()).spawn().expect("it starts");
        let mut input = child.stdin.take().expect("a pipe");
        std::io::Write::write_all(&mut input, &archive).expect("a write");
        // What comes after an archive's end is not waited for by every tar, and is no failure of the copy.
        let _ = std::io::Write::write_all(&mut input, &[0; 1 << 20]);
        drop(input);
        assert!(child.wait().expect("an end").success());
    };
    stream(&there("unpacked/"));
    assert_eq!(sh(&agent, &listed.replace("copied", "unpacked")).await, shape);
    // One that takes the archive's end and is busy for a while after it, as with the modes of directories, is let finish.
    let busy = "printf '%s\\n' '#!/bin/sh' '/usr/bin/tar \"$@\"' 'exec <&-' 'sleep 1' 'touch /tmp/finished' | \
                sudo tee /usr/local/bin/tar > /dev/null && sudo chmod 755 /usr/local/bin/tar";
    sh(&agent, busy).await;
    stream(&there("unpacked-late/"));
    sh(&agent, "test -e /tmp/finished && sudo rm /usr/local/bin/tar").await;
    assert_eq!(sh(&agent, &listed.replace("copied", "unpacked-late")).await, shape);
    for (from, to) in
        [(here("none"), there("x")), (there("none"), here("x")), (here("tree"), there("/root/x"))]
    {
        let output = run(&mut server.cli(&["sandbox", "cp", &from, &to]));
        assert_eq!(output.status.code(), Some(1), "{from} {to}");
        assert!(text(&output.stderr).starts_with("error: "), "{}", text(&output.stderr));
        assert!(!local.join("x").exists() && !local.join("x.part").exists());
    }
    fs::remove_dir_all(&local).expect("a removal");

    // Filters with what needs encoding.
    for value in ["blue green", "a+b", "100%", "%20", "a=b&c=d", "\u{fc}/\u{1f600}?#", " "] {
        let mut body = new_sandbox();
        body.metadata = Some([("te am".to_owned(), value.to_owned())].into());
        let made = client.create(&body, None).await.expect("a create").sandbox;
        let found = client.list_all(&[("te am".to_owned(), value.to_owned())]).await.expect("a list");
        assert_eq!(
            found.iter().map(|row| row.sandbox_id.as_str()).collect::<Vec<_>>(),
            [made.sandbox_id.as_str()],
            "{value:?}"
        );
        assert_eq!(found[0].metadata["te am"], value);
        let listed =
            run(&mut server.cli(&["sandbox", "list", "-o", "json", "-m", &format!("te am={value}")]));
        assert!(text(&listed.stdout).contains(made.sandbox_id.as_str()), "{value:?}");
        client.kill(&made.sandbox_id).await.expect("a kill");
    }
    // The console can be read as often as one likes, each line with the time at which it was seen.
    let root = client
        .agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), Some("root".into()))
        .expect("a URL");
    sh(&root, "echo first > /dev/console").await;
    let seen = |logs: &kelvin_api::sandbox::SandboxLogs, what: &str| {
        logs.log_entries.iter().find(|entry| entry.message == what).map(|entry| entry.timestamp)
    };
    let first = seen(&client.logs(id).await.expect("logs"), "first").expect("a line");
    sh(&root, "echo second > /dev/console").await;
    let logs = client.logs(id).await.expect("logs");
    assert_eq!(seen(&logs, "first"), Some(first));
    assert!(seen(&logs, "second").expect("a line") > first);
    let line: serde_json::Value =
        serde_json::from_str(&logs.logs.last().expect("a line").line).expect("JSON");
    assert_eq!((line["level"].as_str(), line["message"].as_str()), (Some("info"), Some("second")));
    client.kill(&sandbox.sandbox_id).await.expect("a kill");
    server.stop().await;
}

/// The command line of a server, for a shell.
fn env_of(server: &kelvin_e2e::Server) -> String {
    server.cli(&[]).get_program().to_string_lossy().into_owned()
}

fn envs(server: &kelvin_e2e::Server) -> Vec<(std::ffi::OsString, std::ffi::OsString)> {
    let command = server.cli(&[]);
    command.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))).collect()
}

#[tokio::test]
async fn what_is_paused_can_be_copied_and_visitors_wait() {
    let Some(ground) = Ground::with_networks().await else { return };
    let server = ground.baked("people-paused", &["--waiting-vmms", "1", "--slots", "8"], 1).await;
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    let id = sandbox.sandbox_id.as_str();
    let agent = agent_of(&client, &sandbox);
    sh(&agent, "echo of-memory > /dev/shm/note; echo of-disk > note; sync").await;
    let read = "cat /dev/shm/note note 2>/dev/null; true";

    // Names: the newest has it, and once that is deleted nobody does.
    client.snapshot(id, Some("ready")).await.expect("a snapshot");
    let (older, _) = client.snapshot(id, Some("kept")).await.expect("a snapshot");
    client.snapshot(id, Some("ready")).await.expect("a snapshot");
    client.delete_snapshot("ready", false).await.expect("a deletion");
    let body = NewSandbox { template_id: "ready".into(), ..new_sandbox() };
    assert!(matches!(client.create(&body, None).await, Err(Error::Refused(refused)) if refused.code == 404));
    assert!(
        matches!(client.delete_snapshot("ready", false).await, Err(Error::Refused(refused)) if refused.code == 404)
    );
    let left = client.snapshots().await.expect("a list");
    assert_eq!(left.len(), 2, "the older one is there by its id");
    assert!(left.iter().all(|info| !info.names.contains(&"ready".to_owned())), "{left:?}");
    client.delete_snapshot(&older.snapshot_id, false).await.expect("a deletion");
    for info in client.snapshots().await.expect("a list") {
        client.delete_snapshot(&info.snapshot_id, true).await.expect("a deletion");
    }

    // Of what is paused: a snapshot and children, with memory; it stays paused.
    client.pause(id).await.expect("a pause");
    let (kept, _) = client.snapshot(id, Some("still")).await.expect("a snapshot of a paused sandbox");
    let fork = ForkSandbox { timeout: Some(300), count: Some(2), ..ForkSandbox::default() };
    let (children, _) = client.fork(id, &fork).await.expect("a fork of a paused sandbox");
    let from = NewSandbox { template_id: "still".into(), ..new_sandbox() };
    let copy = client.create(&from, None).await.expect("a create").sandbox;
    let made: Vec<_> =
        children.into_iter().map(|child| child.sandbox.expect("a child")).chain([copy]).collect();
    for sandbox in &made {
        assert_eq!(sh(&agent_of(&client, sandbox), read).await, "of-memory\nof-disk\n");
    }
    assert_eq!(client.sandbox(id).await.expect("a detail").state, SandboxState::Paused);
    client.resume(id, 300).await.expect("a resume");
    assert_eq!(sh(&agent, read).await, "of-memory\nof-disk\n");
    // Of the disk alone: children boot.
    client
        .pause_as(id, &PauseSandbox { memory: Some(false), ..PauseSandbox::default() })
        .await
        .expect("a pause");
    let fork = ForkSandbox { timeout: Some(300), count: Some(1), ..ForkSandbox::default() };
    let child = client.fork(id, &fork).await.expect("a fork").0.remove(0).sandbox.expect("a child");
    assert_eq!(sh(&agent_of(&client, &child), read).await, "of-disk\n");
    client.kill(&sandbox.sandbox_id).await.expect("a kill");
    for sandbox in made.iter().chain([&child]) {
        client.kill(&sandbox.sandbox_id).await.expect("a kill");
    }
    server.settle().await;
    client.delete_snapshot(&kept.snapshot_id, false).await.expect("nothing needs it");

    // A visitor whose answer is on its way while the sandbox pauses itself gets it after the wake.
    let mut body = new_sandbox();
    (body.auto_pause, body.auto_resume) = (Some(true), Some(AutoResume { enabled: true }));
    let sandbox = client.create(&body, None).await.expect("a create").sandbox;
    let id = sandbox.sandbox_id.as_str();
    let agent = agent_of(&client, &sandbox);
    let slow = "import http.server, time\nclass H(http.server.BaseHTTPRequestHandler):\n  def log_message(self,*a): pass\n  def do_GET(self):\n    open('/tmp/asked','a').write('x')\n    if self.path=='/slow' and len(open('/tmp/asked').read())==1: time.sleep(3600)\n    self.send_response(200); self.send_header('content-length','5'); self.end_headers(); self.wfile.write(b'done\\n')\n  do_POST=do_GET\nfor host,port in [('0.0.0.0',8000),('127.0.0.1',8001)]:\n  import threading; threading.Thread(target=http.server.ThreadingHTTPServer((host,port),H).serve_forever).start()\n";
    sh(
        &agent,
        &format!(
            "cat > /tmp/slow.py <<'EOF'\n{slow}EOF\nsetsid python3 /tmp/slow.py </dev/null >/dev/null 2>&1 &"
        ),
    )
    .await;
    for port in [8000, 8001] {
        let path = format!("/sandboxes/{id}/ports/{port}/");
        let started = Instant::now();
        while ask(&server, &Method::GET, &path, &[], "").await.0 != StatusCode::OK {
            assert!(started.elapsed() < LIMIT);
        }
        sh(&agent, "rm -f /tmp/asked").await;
        let slow_path = format!("{path}slow");
        let visit = ask(&server, &Method::GET, &slow_path, &[], "");
        let pause = async {
            until_asked(&agent).await;
            // It pauses itself now.
            client.set_timeout(&sandbox.sandbox_id, 1).await
        };
        let ((status, text), paused) = tokio::join!(visit, pause);
        paused.expect("a timeout");
        assert_eq!((status, text.as_str()), (StatusCode::OK, "done\n"), "{port}");
        assert!(server.log().contains("sandbox paused"));
        client.set_timeout(&sandbox.sandbox_id, 600).await.expect("a timeout");
    }
    client.kill(&sandbox.sandbox_id).await.expect("a kill");
    server.stop().await;
}

async fn until_asked(agent: &kelvin_client::agent::Agent) {
    sh(agent, "for i in $(seq 600); do test -s /tmp/asked && exit 0; sleep 0.1; done; exit 1").await;
}
