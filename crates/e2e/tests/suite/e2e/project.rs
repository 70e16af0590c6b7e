//! A project of people, `examples/project`, from its Dockerfile to a clone that answers: a web app in Node, one in Python.
//!
//! No network is needed: the image is the guest's base image, served by a registry on loopback; the packages are made here. What
//! installs them is real: apt with its index, dpkg, pip. npm is not in that image: its package is unpacked as npm would.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use http::{Method, StatusCode};
use kelvin_api::sandbox::{NewSandbox, StartPath};
use kelvin_bench::build::fixtures::{Content, Deb, Wheel, apt_repository, npm_package};
use kelvin_bench::build::{Image, Registry};
use kelvin_e2e::{Ground, agent_of, ask, new_sandbox, sh};
use serde_json::json;

/// Packs the file system `$1`, mounted on `$2` for as long as this runs, into `$3`. What no image of a registry has is left out.
const PACK: &str = "mount -o ro,loop,noload \"$1\" \"$2\" && exec tar --create --numeric-owner --file \"$3\" -C \"$2\" \
                    --exclude=./lost+found --exclude='./usr/lib/modules/*' .";

/// The base image of the guest as one of a registry.
fn image(rootfs: &Path, place: &Path) -> Image {
    let (mounted, archive) = (place.join("mounted"), place.join("base.tar"));
    fs::create_dir_all(&mounted).expect("a directory");
    let mut pack = Command::new("unshare");
    pack.args(["--mount", "--propagation", "private", "sh", "-c", PACK, "sh"]);
    let status = pack.arg(rootfs).arg(&mounted).arg(&archive).status().expect("it starts");
    assert!(status.success(), "packing the image: {status}");
    Image::of_archives(&[archive], &json!({})).expect("an image")
}

fn file(path: &str, text: &str, mode: u32) -> Content {
    (path.to_owned(), text.into(), mode)
}

/// The project, with the packages that it needs, in `to`.
fn project(to: &Path) {
    let from = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/project");
    let copied = Command::new("cp").arg("-r").arg(from).arg(to).status().expect("cp starts");
    assert!(copied.success(), "cp: {copied}");
    let packages = to.join("packages");
    for name in ["pip", "npm"] {
        fs::create_dir_all(packages.join(name)).expect("a directory");
    }
    let tool = [file("usr/bin/figures-tool", "#!/bin/sh\ncat /usr/share/figures/text /etc/figures\n", 0o755)];
    let data = [file("usr/share/figures/text", "counted\n", 0o644)];
    let debs = [
        Deb { name: "figures-tool", depends: &["figures-data"], files: &tool, postinst: None },
        Deb {
            name: "figures-data",
            depends: &[],
            files: &data,
            postinst: Some("#!/bin/sh\necho 'and set up' > /etc/figures\n"),
        },
    ];
    apt_repository(&packages.join("apt"), &debs).expect("a repository");
    let module = [file("figures/__init__.py", "def total(numbers):\n    return sum(numbers)\n", 0o644)];
    Wheel { name: "figures", requires: &[], files: &module }.make(&packages.join("pip")).expect("a wheel");
    let script = "exports.page = (known) => `<h1>${known.sum}</h1> ${known.tool}\\n`;\n";
    let script = [file("index.js", script, 0o644)];
    npm_package(&packages.join("npm"), "pages", &script).expect("a package");
}

#[tokio::test]
async fn a_project_of_node_and_python_answers_from_a_clone() {
    let Some(ground) = Ground::with_networks().await else { return };
    let server = ground.server("project", &["--waiting-vmms", "1"]).await;
    let place = server.data_dir().with_extension("image");
    fs::create_dir_all(&place).expect("a directory");
    let (registry, begun) = (Registry::start().expect("a port"), Instant::now());
    let base = registry.add("debian/base", image(&ground.guest("rootfs.ext4"), &place));
    let packed = begun.elapsed();
    project(&place.join("project"));

    let context = place.join("project");
    let context = context.to_str().expect("a path");
    let base = format!("BASE={base}");
    let words = ["template", "build", "project", context, "--build-arg", &base, "--memory-mib", "256"];
    let built = server.cli(&words).output().expect("it starts");
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{said}\n{}", server.log());
    assert_eq!(built.stdout, b"project\n", "{said}");
    println!(
        "packing the image {:.1} s, all until it is built {:.1} s",
        packed.as_secs_f64(),
        begun.elapsed().as_secs_f64()
    );

    // Both parts run in a clone, which was never told to start them.
    let client = server.client();
    let wanted =
        NewSandbox { template_id: "project".to_owned(), start_path: Some(StartPath::Clone), ..new_sandbox() };
    let sandbox = client.create(&wanted, None).await.expect("a clone").sandbox;
    let id = sandbox.sandbox_id.to_string();
    let get = async |port: &str| {
        ask(&server, &Method::GET, "/", &[("e2b-sandbox-id", id.as_str()), ("e2b-sandbox-port", port)], "")
            .await
    };
    let tool = "counted\nand set up";
    assert_eq!(get("8080").await, (StatusCode::OK, format!("<h1>45</h1> {tool}\n")));
    let (status, figures) = get("8000").await;
    assert_eq!(status, StatusCode::OK, "{figures}");
    let figures: serde_json::Value = serde_json::from_str(&figures).expect("JSON");
    assert_eq!(figures, json!({ "sum": 45, "tool": tool }));
    // Debian's own tools know what they have installed, and the services are the user's.
    let agent = agent_of(&client, &sandbox);
    assert_eq!(sh(&agent, "dpkg-query -W -f '${Package} ' 'figures-*'").await, "figures-data figures-tool ");
    assert_eq!(sh(&agent, "id -un; pwd; ls api/packages | grep figures").await.lines().count(), 4);
    assert_eq!(sh(&agent, "ps -o user= -C node").await.trim(), "user");
    server.stop().await;
    drop(registry);
    fs::remove_dir_all(place).expect("what was made for it");
}
