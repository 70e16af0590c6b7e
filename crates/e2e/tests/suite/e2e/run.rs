//! The command line as a newcomer uses it.

use std::io::Write;
use std::process::Stdio;

use kelvin_e2e::Ground;

#[tokio::test]
#[allow(clippy::too_many_lines, reason = "one story: each step rests on what the one before it left")]
async fn commands_run_and_tell_how_they_ended() {
    let Some(ground) = Ground::find() else { return };
    let server = ground.server("run", &[]).await;
    let run = |args: &[&str]| server.cli(args).output().expect("kelvin runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();

    // Cold once, while there is no snapshot; the bake follows by itself.
    let cold = run(&["run", "--timing", "--", "python3", "-c", "print(2 ** 10)"]);
    assert_eq!(text(&cold.stdout), "1024\n", "{}", text(&cold.stderr));
    assert!(text(&cold.stderr).contains("cold: no snapshot of template base"), "{}", text(&cold.stderr));
    for stage in ["kernel", "root disk", "init", "network", "agent"] {
        assert!(text(&cold.stderr).contains(&format!("boot: {stage}")), "{}", text(&cold.stderr));
    }
    server.node_when("baked", |node| node.settled && node.waiting_vmms > 0).await;
    let cloned = run(&["run", "--timing", "--", "python3", "-c", "print(2 ** 10)"]);
    assert_eq!(text(&cloned.stdout), "1024\n");
    assert!(text(&cloned.stderr).contains("clone: no warm slot"), "{}", text(&cloned.stderr));
    assert!(!text(&cloned.stderr).contains("boot: "), "{}", text(&cloned.stderr));

    // Exit codes, both streams, environment, directory, user.
    let output = run(&[
        "run",
        "-e",
        "A=b c",
        "-w",
        "/tmp",
        "-u",
        "root",
        "--",
        "bash",
        "-c",
        "echo $A $PWD $(id -un); echo oops >&2; exit 7",
    ]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(text(&output.stdout), "b c /tmp root\n");
    assert_eq!(text(&output.stderr), "oops\n");
    assert_eq!(run(&["run", "--", "bash", "-c", "kill -9 $$"]).status.code(), Some(137));
    assert_eq!(run(&["run", "--timeout", "1", "--", "sleep", "60"]).status.code(), Some(124));
    let missing = run(&["run", "--", "no-such-program"]);
    assert_eq!(missing.status.code(), Some(127));
    assert!(
        text(&missing.stderr).contains("command 'no-such-program' not found"),
        "{}",
        text(&missing.stderr)
    );

    // Standard input is passed on, to its end.
    let mut child = server
        .cli(&["run", "-i", "--", "sha256sum"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("kelvin runs");
    child.stdin.take().expect("a pipe").write_all(&vec![b'x'; 300_000]).expect("a write");
    let output = child.wait_with_output().expect("an end");
    assert_eq!(text(&output.stdout), format!("{}  -\n", sha256_of_x(300_000)));

    // For programs: nothing is an empty list, and there is no colour.
    let list = run(&["sandbox", "list", "--output", "json"]);
    assert_eq!(text(&list.stdout).trim(), "[]");
    let unknown = run(&["sandbox", "info", "nosuchsandbox"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(
        text(&unknown.stderr).starts_with("error: sandbox nosuchsandbox was not found"),
        "{}",
        text(&unknown.stderr)
    );
    let id = text(&run(&["sandbox", "create", "-m", "a=b"]).stdout).trim().to_owned();
    let listed: serde_json::Value =
        serde_json::from_slice(&run(&["sandbox", "list", "-m", "a=b", "-o", "json"]).stdout).expect("JSON");
    assert_eq!(listed[0]["sandboxID"], id.as_str());
    assert_eq!(text(&run(&["sandbox", "list", "-m", "a=c", "-o", "json"]).stdout).trim(), "[]");
    let templates: serde_json::Value =
        serde_json::from_slice(&run(&["template", "list", "-o", "json"]).stdout).expect("JSON");
    assert_eq!(templates[0]["templateID"], "base");
    let doctor: serde_json::Value =
        serde_json::from_slice(&run(&["doctor", "-o", "json"]).stdout).expect("JSON");
    let verdict = |name: &str| {
        doctor
            .as_array()
            .expect("a list")
            .iter()
            .find(|check| check["name"] == name)
            .map(|check| check["verdict"].clone())
    };
    assert_eq!(verdict("qemu-system-x86_64"), Some("ok".into()));
    assert_eq!(verdict("data directory"), Some("ok".into()));
    assert_eq!(verdict("server"), Some("ok".into()));
    assert!(text(&run(&["completion", "bash"]).stdout).contains("complete"));

    // Files in and out, and the console.
    let file = server.data_dir().join("up");
    std::fs::write(&file, vec![7; 3 << 20]).expect("a file");
    let up = run(&["sandbox", "cp", file.to_str().expect("text"), &format!("{id}:dir/up")]);
    assert!(up.status.success(), "{}", text(&up.stderr));
    let down = server.data_dir().join("down");
    let down_text = down.to_str().expect("text").to_owned();
    assert!(run(&["sandbox", "cp", &format!("{id}:/home/user/dir/up"), &down_text]).status.success());
    assert_eq!(std::fs::read(&down).expect("a file"), vec![7; 3 << 20]);
    let absent = run(&["sandbox", "cp", &format!("{id}:absent"), &down_text]);
    assert!(text(&absent.stderr).contains("does not exist"), "{}", text(&absent.stderr));
    assert_eq!(std::fs::read(&down).expect("a file").len(), 3 << 20, "a failed copy changes nothing");
    assert!(run(&["sandbox", "logs", &id]).status.success());
    assert!(run(&["sandbox", "kill", &id]).status.success());
    assert_eq!(run(&["sandbox", "kill", &id]).status.code(), Some(1));
    server.stop().await;
}

fn sha256_of_x(count: usize) -> String {
    let mut child = std::process::Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sha256sum");
    child.stdin.take().expect("a pipe").write_all(&vec![b'x'; count]).expect("a write");
    let output = child.wait_with_output().expect("an end");
    String::from_utf8_lossy(&output.stdout).split_whitespace().next().expect("a digest").to_owned()
}
