//! What others on the host can see of a server, and what a VMM that was taken over by its guest can do to it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use kelvin_api::sandbox::{ForkSandbox, NewSandbox, StartPath};
use kelvin_e2e::{Ground, Server, agent_of, new_sandbox, sh};

/// What `script` prints when `user`, who is in no group and may do nothing else, runs it in `directory`.
fn as_user(user: u32, directory: &Path, script: &str, args: &[&str]) -> String {
    let output = Command::new("setpriv")
        .args([&format!("--reuid={user}"), &format!("--regid={user}")])
        .args(["--clear-groups", "--inh-caps=-all", "--no-new-privs", "sh", "-c", script, "sh"])
        .args(args)
        .current_dir(directory)
        .output()
        .expect("setpriv is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn children(count: u32) -> ForkSandbox {
    ForkSandbox { count: Some(count), timeout: Some(600), ..ForkSandbox::default() }
}

/// Everything below `directory`, relative to `top`.
fn walk(top: &Path, directory: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(directory).expect("a directory").flatten() {
        let path = entry.path();
        found.push(path.strip_prefix(top).expect("below").to_string_lossy().into_owned());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(top, &path, found);
        }
    }
}

fn user_of(pid: i32) -> u32 {
    fs::metadata(format!("/proc/{pid}")).expect("it runs").uid()
}

/// Sandboxes that run, are paused, were forked and kept, and VMMs that wait.
async fn busy(server: &Server) -> Vec<String> {
    server.bake(2).await;
    let client = server.client();
    let source = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    sh(&agent_of(&client, &source), "echo written > /home/user/file").await;
    client.fork(source.sandbox_id.as_str(), &children(2)).await.expect("a fork");
    let running = client.list_all(&[]).await.expect("a list");
    let mut ids: Vec<String> = running.into_iter().map(|sandbox| sandbox.sandbox_id.to_string()).collect();
    assert_eq!(ids.len(), 3);
    client.pause(&ids[0]).await.expect("a pause");
    ids.push(source.sandbox_id.to_string());
    server.settle().await;
    ids
}

#[tokio::test]
async fn nobody_else_on_the_host_reads_anything() {
    let Some(ground) = Ground::find() else { return };
    if !rustix::process::geteuid().is_root() {
        println!("skipped: not root, there is nobody else");
        return;
    }
    let args = ["--waiting-vmms", "2"];
    let mut server = ground.server("closed", &args).await;
    // As on hosts where root's files are root's alone: VMMs still find what they need.
    server.terminate().await;
    server.umask = Some("077");
    server.start(&args).await;
    let ids = busy(&server).await;
    let data_dir = server.data_dir();
    let mut paths = Vec::new();
    walk(data_dir, data_dir, &mut paths);
    assert!(paths.iter().any(|path| path == "api-key"), "there is a key");
    assert!(paths.iter().any(|path| path.starts_with("snapshots/") && path.ends_with("/memory")));
    let list = paths.join("\n");
    let vmms: Vec<i32> = server.vmms().into_iter().collect();
    // Whoever it is, and the user of another's VMM.
    for user in [65_534, user_of(vmms[0])] {
        // Handed the names, from within the directory: closed parents would hide what is open in it.
        let tried = r#"printf '%s\n' "$1" | while read -r path; do [ -e "$path" ] && echo "$path"; done; :"#;
        assert_eq!(as_user(user, data_dir, tried, &[&list]), "", "user {user} reaches this");
        let listed = as_user(user, data_dir, "ls -a . 2>/dev/null; :", &[]);
        assert_eq!(listed, "", "user {user} lists the data directory");
    }
    // Ids and paths are in nobody's arguments.
    let lines =
        as_user(65_534, Path::new("/"), "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'; :", &[]);
    assert!(lines.contains("qemu-system-x86_64") || lines.contains("firecracker"), "VMMs are seen");
    let names = |directory: &str| {
        let entries = fs::read_dir(data_dir.join(directory)).expect("a directory").flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    for id in ids.into_iter().chain(names("snapshots")).chain(names("sandboxes")) {
        assert!(!lines.contains(&id), "{id} is in somebody's arguments");
    }
    for pid in &vmms {
        let line = fs::read(format!("/proc/{pid}/cmdline")).expect("it runs");
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        assert!(!line.contains(&*data_dir.to_string_lossy()), "{line}");
        let tried = r#"for name in environ maps mem; do cat /proc/$1/$name; done 2>/dev/null; ls /proc/$1/root/ /proc/$1/fd/ 2>/dev/null; :"#;
        assert_eq!(as_user(65_534, Path::new("/"), tried, &[&pid.to_string()]), "", "process {pid}");
    }
    server.stop().await;
}

/// What a VMM that was taken over tries: with all that its user can reach, in its own root and in its directory.
const BREAK_OUT: &str = r#"
pid=$1 secret=$2 directory=$3
[ "$(head -c1 /proc/$pid/root/guest/initrd | wc -c)" = 1 ] && echo "sees its guest"
for place in /proc/$pid/root "$directory"; do
    for name in disk memory state.new parent control.sock http.sock qmp.sock guest dev/null; do
        ln -sfn "$secret" "$place/$name" && echo "links $place/$name"
        mv "$place/$name" "$place/moved" && echo "moves $place/$name"
        [ -e "$place/$name" ] && rm -rf "$place/$name" && [ ! -e "$place/$name" ] && echo "removes $place/$name"
        mkdir "$place/$name" && echo "makes $place/$name"
    done
    true >> "$place/memory" && echo "writes $place/memory"
    echo > "$place/ro_ram.so" && echo "writes $place/ro_ram.so"
    cat "$place/../api-key" "$place/../../api-key" "$secret" && echo "reads the secret"
done 2>/dev/null
shift 3
for path; do
    [ "$(head -c1 "$path" | wc -c)" = 1 ] && echo "reads $path"
done 2>/dev/null
:
"#;

#[tokio::test]
async fn a_vmm_that_was_taken_over_replaces_nothing() {
    let Some(ground) = Ground::find() else { return };
    if !rustix::process::geteuid().is_root() {
        println!("skipped: not root, VMMs have the server's own rights");
        return;
    }
    let mut server = ground.baked("taken-over", &["--waiting-vmms", "1"], 1).await;
    let client = server.client();
    let sandbox = client.create(&new_sandbox(), None).await.expect("a create").sandbox;
    server.settle().await;
    let secret = server.data_dir().join("api-key");
    let before = fs::read(&secret).expect("a key");
    let attack = |server: &Server| {
        let (data_dir, mut names) = (server.data_dir(), Vec::new());
        walk(data_dir, data_dir, &mut names);
        names.retain(|name| {
            ["disk", "memory", "state"].iter().any(|kind| name.ends_with(&format!("/{kind}")))
        });
        assert!(names.len() > 3, "{names:?}");
        let everything: Vec<String> =
            names.iter().map(|name| data_dir.join(name).to_string_lossy().into_owned()).collect();
        for pid in server.vmms() {
            let directory: PathBuf = server.data_dir().join("sandboxes").join(server.machine_of(pid));
            let pid_text = pid.to_string();
            let mut args =
                vec![&*pid_text, secret.to_str().expect("UTF-8"), directory.to_str().expect("UTF-8")];
            // Disks and memory of everybody, by their names: what is another's, and its own by another way.
            args.extend(everything.iter().map(String::as_str));
            let done = as_user(user_of(pid), Path::new("/"), BREAK_OUT, &args);
            // The memory of a machine that was booted is its own file, and nobody else's.
            let memory = format!("/proc/{pid}/root/memory");
            let is_own = fs::metadata(&memory).is_ok_and(|found| found.uid() == user_of(pid));
            let own = if is_own { format!("writes {memory}\n") } else { String::new() };
            assert_eq!(done, format!("sees its guest\n{own}"), "process {pid}");
        }
    };
    attack(&server);
    let wanted = NewSandbox { start_path: Some(StartPath::Cold), ..new_sandbox() };
    let cold = client.create(&wanted, None).await.expect("a boot").sandbox;
    attack(&server);
    // Whatever it tried, its sandbox can be frozen, restored, forked and adopted.
    for id in [sandbox.sandbox_id.as_str(), cold.sandbox_id.as_str()] {
        client.pause(id).await.expect("a pause");
        client.resume(id, 600).await.expect("a resume");
    }
    client.fork(sandbox.sandbox_id.as_str(), &children(1)).await.expect("a fork");
    server.settle().await;
    attack(&server);
    server.kill_9();
    server.start(&["--waiting-vmms", "1"]).await;
    server.settle().await;
    attack(&server);
    server.client().pause(sandbox.sandbox_id.as_str()).await.expect("a pause of one that was adopted");
    assert_eq!(fs::read(&secret).expect("a key"), before);
    assert_eq!(fs::metadata(&secret).expect("a key").permissions().mode() & 0o777, 0o600);
    server.stop().await;
}
