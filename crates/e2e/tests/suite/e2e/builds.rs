//! Templates that are built: an image that people bring becomes machines that start in milliseconds.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use http::{Method, StatusCode};
use kelvin_api::digest::sha256;
use kelvin_api::sandbox::{NewSandbox, StartPath};
use kelvin_e2e::{Ground, LIMIT, Server, agent_of, ask, new_sandbox, sh};
use serde_json::{Value, json};

/// A busybox of the host that needs nothing beside itself.
fn busybox() -> Option<PathBuf> {
    let found =
        ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from).into_iter().find(|path| path.exists());
    let is_static = |path: &PathBuf| {
        let bytes = fs::read(path).expect("it can be read");
        !bytes.windows(9).any(|part| part == b"/ld-linux" || part == b"/ld-musl-")
    };
    let found = found.filter(is_static);
    if found.is_none() {
        println!("skipped: no static busybox on this host (busybox-static)");
    }
    found
}

/// Packs what is in `from`, as root's.
fn tar(from: &Path, to: &Path, names: &[&str]) -> Vec<u8> {
    let mut command = Command::new("tar");
    command.args(["--owner=0", "--group=0", "--numeric-owner", "--sort=name", "--mtime=@0", "-cf"]);
    let status = command.arg(to).arg("-C").arg(from).args(names).status().expect("tar starts");
    assert!(status.success(), "tar: {status}");
    fs::read(to).expect("an archive")
}

/// A root file system of a few files: a shell, two users, a working directory.
fn root(place: &Path, busybox: &Path) {
    for name in ["bin", "etc", "srv", "tmp"] {
        fs::create_dir_all(place.join(name)).expect("a directory");
    }
    fs::copy(busybox, place.join("bin/busybox")).expect("a copy");
    for applet in ["sh", "cat", "chown", "echo", "id", "ls", "mkdir", "pwd", "stat", "wget"] {
        std::os::unix::fs::symlink("busybox", place.join("bin").join(applet)).expect("a link");
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:500:500::/srv:/bin/sh\n";
    fs::write(place.join("etc/passwd"), passwd).expect("a file");
    fs::write(place.join("etc/group"), "root:x:0:\napp:x:500:\n").expect("a file");
    fs::write(place.join("etc/from-the-image"), "it is\n").expect("a file");
}

/// An OCI image layout with that file system as its one layer. Source: OCI image specification, `image-layout.md`.
fn layout(ground: &Path, busybox: &Path) -> PathBuf {
    let (files, place) = (ground.join("root"), ground.join("layout"));
    fs::create_dir_all(place.join("blobs/sha256")).expect("a directory");
    root(&files, busybox);
    let layer = tar(&files, &ground.join("layer.tar"), &["."]);
    let blob = |media: &str, bytes: &[u8]| {
        let digest = sha256(bytes);
        fs::write(place.join("blobs/sha256").join(&digest), bytes).expect("a blob");
        json!({ "mediaType": media, "digest": format!("sha256:{digest}"), "size": bytes.len() })
    };
    let oci = |kind: &str| format!("application/vnd.oci.image.{kind}");
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Env": ["PATH=/bin", "GREETING=hello from the image"],
            "WorkingDir": "/srv",
            "User": "app",
            "Labels": { "of": "a test" },
        },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", sha256(&layer))] },
    });
    let layer = blob(&oci("layer.v1.tar"), &layer);
    let config = blob(&oci("config.v1+json"), config.to_string().as_bytes());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": oci("manifest.v1+json"), "config": config, "layers": [layer],
    });
    let mut manifest = blob(&oci("manifest.v1+json"), manifest.to_string().as_bytes());
    manifest["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    let index = json!({ "schemaVersion": 2, "mediaType": oci("index.v1+json"), "manifests": [manifest] });
    fs::write(place.join("index.json"), index.to_string()).expect("an index");
    fs::write(place.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("a layout");
    place
}

/// A request with the server's own key; what it answers.
async fn admin(server: &Server, method: &Method, path: &str, body: &Value) -> Value {
    let key = server.key();
    let headers = [("x-api-key", key.as_str()), ("content-type", "application/json")];
    let text = if body.is_null() { String::new() } else { body.to_string() };
    let (status, answer) = ask(server, method, path, &headers, text).await;
    assert!(status.is_success(), "{method} {path}: {status} {answer}\n{}", server.log());
    serde_json::from_str(&answer).unwrap_or_default()
}

/// The steps; the last one is `last`.
fn steps(hash: &str, last: &str) -> Value {
    json!([
        { "type": "RUN", "args": ["mkdir -p /srv/www && chown -R app /srv", "root"] },
        { "type": "ENV", "args": ["PAGE", "$GREETING, built"] },
        { "type": "COPY", "args": ["site", "/srv/www/", "app", "0640"], "filesHash": hash },
        { "type": "COPY", "args": ["/made/*.html", "/srv/www/", "app"], "fromStage": 0 },
        { "type": "WORKDIR", "args": ["/srv/www"] },
        { "type": "RUN", "args": [last] },
    ])
}

/// Builds `people` and waits for its end; what was logged.
async fn build(server: &Server, layout: &Path, hash: &str, last: &str) -> Vec<String> {
    build_as(server, "people", layout, hash, last).await
}

/// The same with a tag.
async fn build_as(server: &Server, name: &str, layout: &Path, hash: &str, last: &str) -> Vec<String> {
    let wanted = json!({ "name": name, "cpuCount": 1, "memoryMB": 256 });
    let asked = admin(server, &Method::POST, "/v3/templates", &wanted).await;
    let (template, build) = (asked["templateID"].as_str(), asked["buildID"].as_str());
    let path = format!("/templates/{}/builds/{}", template.expect("an id"), build.expect("an id"));
    let start = json!({
        // A stage whose files are copied, in exec form: its image's own program, and no shell.
        "stages": [{ "fromLayout": layout, "steps": [
            { "type": "RUN", "args": ["mkdir /made && busybox ln -s staged.html /made/link.html", "root"] },
            { "type": "RUN", "args": ["", "root"], "argv": ["busybox", "sh", "-c", "echo \"staged by $0\" > /made/staged.html", "a b"] },
        ] }],
        "fromLayout": layout,
        "steps": steps(hash, last),
        "startCmd": "busybox httpd -f -p 8080 -h /srv/www",
        "readyCmd": "wget -q -O /dev/null http://127.0.0.1:8080/page.html",
    });
    admin(server, &Method::POST, &format!("/v2{path}"), &start).await;
    let (started, mut lines) = (Instant::now(), Vec::new());
    loop {
        let at = format!("{path}/status?logsOffset={}", lines.len());
        let told = admin(server, &Method::GET, &at, &Value::Null).await;
        for entry in told["logEntries"].as_array().expect("a list") {
            lines.push(entry["message"].as_str().expect("a text").to_owned());
        }
        match told["status"].as_str() {
            Some("ready") => return lines,
            Some("error") => panic!("{}\n{lines:#?}\n{}", told["reason"], server.log()),
            _ => assert!(started.elapsed() < 3 * LIMIT, "{told}\n{lines:#?}"),
        }
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
}

/// Versions under tags, beside what `people` is by itself: its `built.html` says `changed`. Each is started, `default` moves to one
/// and back, one is deleted beside its sandbox.
async fn versions_are_started_by_their_tags(server: &Server, layout: &Path, hash: &str) {
    let client = server.client();
    for tag in ["one", "two"] {
        let last = format!("echo {tag} > built.html");
        build_as(server, &format!("people:{tag}"), layout, hash, &last).await;
    }
    let create = async |text: &str| {
        let wanted =
            NewSandbox { template_id: text.to_owned(), start_path: Some(StartPath::Clone), ..new_sandbox() };
        client.create(&wanted, None).await.map(|made| made.sandbox)
    };
    // What a sandbox of it says; it is ended.
    let says = async |text: &str| {
        let sandbox = create(text).await.unwrap_or_else(|error| panic!("{text}: {error}"));
        let said = sh(&agent_of(&client, &sandbox), "cat built.html").await;
        client.kill(&sandbox.sandbox_id).await.expect("its end");
        said
    };
    for (text, said) in [("people:one", "one\n"), ("people:two", "two\n"), ("people", "changed\n")] {
        assert_eq!(says(text).await, said, "{text}");
    }
    let found = client.template("people").await.expect("a template").template;
    assert!(found.versions.iter().all(|version| version.image_bytes > 0), "{found:?}");
    let named = |tag: &str| found.versions.iter().find(|one| one.tags.iter().any(|known| known == tag));
    let before = named("default").and_then(|version| version.build_id.clone()).expect("a build");
    assert!(named("two").expect("a version").memory_disk_bytes.is_some_and(|bytes| bytes > 0), "{found:?}");
    client.add_tags("people:one", &["default".to_owned()]).await.expect("a move");
    assert_eq!(says("people").await, "one\n");
    // Back to what no tag names any more.
    client.add_tags(&format!("people:{before}"), &["default".to_owned()]).await.expect("a move back");
    assert_eq!(says("people").await, "changed\n");
    let sandbox = create("people:two").await.expect("a clone");
    client.delete_template("people:two").await.expect("its end");
    assert!(create("people:two").await.is_err());
    admin(server, &Method::POST, "/gc", &Value::Null).await;
    assert_eq!(sh(&agent_of(&client, &sandbox), "cat built.html").await, "two\n");
    client.kill(&sandbox.sandbox_id).await.expect("its end");
    assert_eq!(says("people:one").await, "one\n");
    let left = client.template("people").await.expect("a template").template.versions;
    assert!(!left.iter().any(|version| version.tags.iter().any(|tag| tag == "two")), "{left:?}");
}

fn count(lines: &[String], beginning: &str) -> usize {
    lines.iter().filter(|line| line.starts_with(beginning)).count()
}

/// Every disk that a build has kept is a file system without a fault, once its journal is played.
fn layers_are_sound(server: &Server, scratch: &Path) {
    let (copy, mut checked) = (scratch.join("checked.ext4"), 0);
    for entry in fs::read_dir(server.data_dir().join("layers")).expect("a directory") {
        let disk = entry.expect("an entry").path().join("disk");
        let run = |program: &str, args: &[&str]| {
            let output = Command::new(program).args(args).output().expect("it starts");
            (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let (disk, to) = (disk.to_str().expect("a path"), copy.to_str().expect("a path"));
        let copied = run("cp", &["--reflink=auto", "--sparse=always", "--no-preserve=mode", disk, to]);
        assert_eq!(copied.0, Some(0), "{disk}: {copied:?}");
        // 1: the journal was played, or orphans were freed, as a mount would.
        let played = run("e2fsck", &["-p", to]);
        assert!(matches!(played.0, Some(0 | 1)), "{disk}: {played:?}");
        let sound = run("e2fsck", &["-fn", to]);
        assert_eq!(sound.0, Some(0), "{disk}: {sound:?}");
        fs::remove_file(&copy).expect("the copy");
        checked += 1;
    }
    assert!(checked >= 5, "{checked} layers");
}

#[tokio::test]
async fn an_image_of_people_becomes_a_template() {
    let Some(ground) = Ground::with_networks().await else { return };
    let Some(busybox) = busybox() else { return };
    let server = ground.server("builds", &["--waiting-vmms", "1"]).await;
    let place = server.data_dir().with_extension("image");
    fs::create_dir_all(place.join("context/site")).expect("a directory");
    let layout = layout(&place, &busybox);
    fs::write(place.join("context/site/page.html"), "a page\n").expect("a file");

    // What a step copies is uploaded before, by a URL that needs no key.
    let wanted = json!({ "name": "people", "cpuCount": 1, "memoryMB": 256 });
    let asked = admin(&server, &Method::POST, "/v3/templates", &wanted).await;
    let (template, hash) = (asked["templateID"].as_str().expect("an id"), "ab".repeat(32));
    let files = format!("/templates/{template}/files/{hash}");
    let given = admin(&server, &Method::GET, &files, &Value::Null).await;
    assert_eq!(given["present"], false);
    let archive = tar(&place.join("context"), &place.join("context.tar"), &["site"]);
    let url = given["url"].as_str().expect("a URL");
    let path = &url[url.find("/uploads").expect("its path")..];
    let (status, text) = ask(&server, &Method::PUT, path, &[], archive).await;
    assert!(status.is_success(), "{status} {text}");
    assert_eq!(admin(&server, &Method::GET, &files, &Value::Null).await["present"], true);

    let last = "echo \"$PAGE\" > built.html; id -un > who; pwd > where";
    let first = build(&server, &layout, &hash, last).await;
    assert_eq!(count(&first, "cached"), 0, "{first:#?}");

    // A clone has the image's files, variables, directory and user; its service runs.
    let client = server.client();
    let insisted =
        NewSandbox { template_id: "people".to_owned(), start_path: Some(StartPath::Clone), ..new_sandbox() };
    let sandbox = client.create(&insisted, None).await.expect("a clone").sandbox;
    let agent = agent_of(&client, &sandbox);
    assert_eq!(sh(&agent, "cat /etc/from-the-image").await, "it is\n");
    assert_eq!(sh(&agent, "echo $GREETING; id -un; pwd").await, "hello from the image\napp\n/srv/www\n");
    assert_eq!(sh(&agent, "cat built.html who where").await, "hello from the image, built\napp\n/srv/www\n");
    assert_eq!(sh(&agent, "stat -c '%U %a' page.html").await, "app 640\n");
    // What a stage has made is there, and nothing else of the stage.
    let staged = "cat link.html; stat -c '%U %F' staged.html link.html; ls / | cat";
    let staged = sh(&agent, staged).await;
    assert!(staged.starts_with("staged by a b\napp regular file\napp symbolic link\n"), "{staged}");
    assert!(!staged.contains("made"), "{staged}");
    let id = sandbox.sandbox_id.to_string();
    let headers = [("e2b-sandbox-id", id.as_str()), ("e2b-sandbox-port", "8080")];
    let page = ask(&server, &Method::GET, "/built.html", &headers, "").await;
    assert_eq!(page, (StatusCode::OK, "hello from the image, built\n".to_owned()));
    // A process that names another user is that one.
    let root = client.agent(&sandbox.sandbox_id, sandbox.envd_access_token.clone(), Some("root".to_owned()));
    assert_eq!(sh(&root.expect("a URL"), "id -u").await, "0\n");

    // Nothing changed: no machine runs. The last line changed: one step does.
    let started = Instant::now();
    let again = build(&server, &layout, &hash, last).await;
    println!("nothing changed: {:.1} s", started.elapsed().as_secs_f64());
    assert_eq!(count(&again, "8 steps are cached"), 1, "{again:#?}");
    assert_eq!(count(&again, "the machine is saved"), 0, "{again:#?}");
    let changed = build(&server, &layout, &hash, "echo changed > built.html").await;
    assert_eq!(count(&changed, "cached: "), 5, "{changed:#?}");
    // The sandbox of the former one goes on.
    assert_eq!(sh(&agent, "cat built.html").await, "hello from the image, built\n");
    let newer = client.create(&insisted, None).await.expect("a clone").sandbox;
    assert_eq!(sh(&agent_of(&client, &newer), "cat built.html").await, "changed\n");
    client.kill(&newer.sandbox_id).await.expect("its end");
    versions_are_started_by_their_tags(&server, &layout, &hash).await;
    assert_eq!(sh(&agent, "cat built.html").await, "hello from the image, built\n");
    server.settle().await;
    layers_are_sound(&server, &place);
    server.stop().await;
    fs::remove_dir_all(place).expect("what was made for it");
}
