//! `cargo xtask former-release [COMMIT...]`: sandboxes of former builds under this one.
//!
//! ```text
//! <shared>/former/COMMIT/{kelvin,guest/}   a build of that commit, made once
//! .cache/former                            mounted for as long as it runs; `data` is the data directory
//! ```
//!
//! The former server leaves sandboxes that run, were forked, were resumed and are paused, and a snapshot; it ends by SIGTERM, and
//! once more by SIGKILL. This build's takes all of them over: what ran runs, with its memory, disk and processes, and can be
//! paused, resumed, forked and killed. The former one then refuses what this one has left, and ends nothing. Who writes: one
//! run at a time; what one leaves that fails or is killed, its servers and machines too, the next removes.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::server::{self, Built, Server, client_of, start_at, stop};
use crate::{Result, cache, cargo, files as fs, output, root, run, say, shared};

/// Builds whose sandboxes this one has to take over: of before jails and descriptors changed, of before records had versions,
/// and of before rows knew their node.
const FORMER: [&str; 3] = ["46a6b66", "cd7e25a", "627838e"];

/// One build and what it serves.
struct Release {
    binary: PathBuf,
    guest: PathBuf,
}

impl Release {
    /// The build of `commit`; made when it is missing. `None`, and a line that says why, where the history lacks it.
    fn of(commit: &str) -> Result<Option<Self>> {
        let done = shared().join("former").join(commit);
        let found = Self { binary: done.join("kelvin"), guest: done.join("guest") };
        if found.binary.is_file() {
            return Ok(Some(found));
        }
        let is_known = |object: &str| {
            let mut ask = Command::new("git");
            ask.current_dir(root()).args(["cat-file", "-e", object]).stderr(Stdio::null());
            ask.status().is_ok_and(|status| status.success())
        };
        if !is_known(&format!("{commit}^{{tree}}")) {
            println!("skipped: the history of this checkout does not reach back to {commit}");
            return Ok(None);
        }
        say(&format!("building {commit} (once)"));
        let fresh = done.with_extension("new");
        let _ = fs::remove_dir_all(&fresh);
        let tree = fresh.join("tree");
        fs::create_dir_all(&tree)?;
        let archive = fresh.join("tree.tar");
        run(Command::new("git").current_dir(root()).args(["archive", "-o"]).arg(&archive).arg(commit))?;
        run(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&tree))?;
        run(cargo().current_dir(&tree).env_remove("CARGO_TARGET_DIR").args(["xtask", "build"]))?;
        fs::copy(tree.join("target/release/kelvin"), fresh.join("kelvin"))?;
        run(Command::new("cp").arg("-rL").arg(tree.join(".cache/guest")).arg(fresh.join("guest")))?;
        fs::remove_dir_all(&tree)?;
        fs::remove_file(&archive)?;
        fs::rename(&fresh, &done)?;
        Ok(Some(found))
    }
}

impl Release {
    /// Imports its guest as the template of a data directory.
    fn import(&self, data: &Path) -> Result<()> {
        let mut import = server::kelvin(&self.binary);
        import.args(["template", "import", "base", "--memory-mib", "256", "--data-dir"]).arg(data);
        import.arg("--rootfs").arg(self.guest.join("base.ext4"));
        import.arg("--kernel").arg(self.guest.join("kernel/vmlinuz"));
        import.arg("--initrd").arg(self.guest.join("initrd"));
        run(import.stdout(Stdio::null()))
    }
}

/// A server of one of the builds, on the data directory of this run.
struct Life<'a> {
    binary: &'a Path,
    data: &'a Path,
    server: Server,
}

impl<'a> Life<'a> {
    fn begin(binary: &'a Path, data: &'a Path) -> Result<Self> {
        let server = start_at(binary, data, "127.0.0.1:0", &cache().join("former.log"))?;
        Ok(Self { binary, data, server })
    }

    /// What a client of the same build prints.
    fn ask(&self, words: &[&str]) -> Result<String> {
        Ok(output(client_of(self.binary, &self.server, self.data)?.args(words))?.trim().to_owned())
    }

    /// Ids in what a client prints, of fields called `name`.
    fn ids(&self, name: &str, words: &[&str]) -> Result<Vec<String>> {
        let said = self.ask(&[&["--output", "json"], words].concat())?;
        let field = format!("\"{name}\": \"");
        let ids = said.split(&field).skip(1).filter_map(|rest| rest.split('"').next());
        Ok(ids.map(str::to_owned).collect())
    }

    fn id(&self, name: &str, words: &[&str]) -> Result<String> {
        let ids = self.ids(name, words)?;
        ids.into_iter().next().ok_or_else(|| format!("{} gave no {name}", words.join(" ")).into())
    }

    fn create(&self, template: &str) -> Result<String> {
        self.id("sandboxID", &["sandbox", "create", "--template", template, "--timeout", "3600"])
    }

    fn shell(&self, id: &str, script: &str) -> Result<String> {
        self.ask(&["sandbox", "exec", id, "--", "sh", "-c", script])
    }

    fn end(self, with: &str) -> Result<()> {
        if with == "TERM" { stop(&self.server) } else { server::kill(&self.server) }
    }
}

/// What a former server has left.
struct Left {
    /// Each that runs, and whose memory and disk it has.
    running: Vec<(String, String)>,
    paused: String,
    snapshot: String,
}

fn leave(life: &Life<'_>) -> Result<Left> {
    life.ask(&["template", "bake", "base"])?;
    let ids = [life.create("base")?, life.create("base")?, life.create("base")?];
    for id in &ids {
        let begin = format!(
            "echo memory-{id} >/dev/shm/note; echo disk-{id} >note; sync; \
             sleep 100000 >/dev/null 2>&1 & echo $! >/dev/shm/pid"
        );
        life.shell(id, &begin)?;
    }
    let [runs, resumed, paused] = ids;
    life.ask(&["sandbox", "pause", &resumed])?;
    life.ask(&["sandbox", "resume", &resumed])?;
    life.ask(&["sandbox", "pause", &paused])?;
    let forks = life.ids("sandboxID", &["sandbox", "fork", &runs])?;
    let fork = forks.into_iter().find(|id| *id != runs).ok_or("a fork gave no child")?;
    let snapshot = life.id("snapshotID", &["sandbox", "snapshot", &runs])?;
    let running = vec![(runs.clone(), runs.clone()), (fork, runs), (resumed.clone(), resumed)];
    Ok(Left { running, paused, snapshot })
}

/// Sees that every one of `running` has its memory, its disk and its process.
fn look(life: &Life<'_>, running: &[(String, String)]) -> Result<()> {
    for (id, whose) in running {
        let found = life.shell(id, "cat /dev/shm/note note; kill -0 $(cat /dev/shm/pid) && echo alive")?;
        if found != format!("memory-{whose}\ndisk-{whose}\nalive") {
            return Err(format!("sandbox {id} has {found:?}").into());
        }
    }
    Ok(())
}

/// What this build does with what was `left`.
fn take_over(life: &Life<'_>, mut left: Left) -> Result<Vec<(String, String)>> {
    look(life, &left.running)?;
    life.ask(&["sandbox", "resume", &left.paused])?;
    left.running.push((left.paused.clone(), left.paused));
    look(life, &left.running)?;
    for (id, _) in &left.running {
        life.ask(&["sandbox", "pause", id])?;
        life.ask(&["sandbox", "resume", id])?;
    }
    look(life, &left.running)?;
    life.ask(&["sandbox", "fork", &left.running[0].0])?;
    let kept = life.create(&left.snapshot)?;
    if life.shell(&kept, "cat /dev/shm/note")? != format!("memory-{}", left.running[0].1) {
        return Err(format!("a sandbox from snapshot {} is another", left.snapshot).into());
    }
    let new = life.create("base")?;
    life.shell(&new, "true")?;
    Ok(left.running)
}

/// One former build whose server ends by the signal `with`.
fn one(former: &Release, ours: &Built, data: &Path, with: &str) -> Result<()> {
    let life = Life::begin(&former.binary, data)?;
    let left = leave(&life)?;
    life.end(with)?;
    let life = Life::begin(&ours.binary, data)?;
    let running = take_over(&life, left)?;
    life.end("TERM")?;
    // The other way round: it says no, and what runs runs on.
    match Life::begin(&former.binary, data) {
        Ok(life) => {
            life.end("TERM")?;
            return Err("the former build takes over what it cannot read".into());
        }
        Err(error) => say(&format!(
            "the former build refuses: {}",
            error.to_string().lines().last().unwrap_or_default()
        )),
    }
    let life = Life::begin(&ours.binary, data)?;
    look(&life, &running)?;
    life.ask(&["sandbox", "kill", "--all"])?;
    life.end("TERM")
}

/// `cargo xtask former-release [COMMIT...]`.
pub fn check(commits: &[String]) -> Result<()> {
    let ours = server::prepare()?;
    let ground = cache().join("former");
    let data = ground.join("data");
    let commits: Vec<&str> =
        if commits.is_empty() { FORMER.to_vec() } else { commits.iter().map(String::as_str).collect() };
    for commit in commits {
        let Some(former) = Release::of(commit)? else { continue };
        for with in ["TERM", "KILL"] {
            // Each begins anew: the former build cannot use what this one has touched, nor what an earlier run left.
            crate::ground::kill_leftovers(&ground)?;
            server::unmount(&ours.binary, &ground)?;
            run(crate::packages::as_root("rm").arg("-f").arg(ground.with_extension("xfs")))?;
            server::mount(&ours.binary, &ground)?;
            fs::create_dir_all(data.join("run"))?;
            former.import(&data)?;
            one(&former, &ours, &data, with)?;
            server::unmount(&ours.binary, &ground)?;
            say(&format!("{commit}, ended by SIG{with}: its sandboxes go on under this build"));
        }
    }
    Ok(())
}
