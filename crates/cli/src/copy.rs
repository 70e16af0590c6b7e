//! `kelvin sandbox cp`: files and directories, with their modes, into a sandbox and out of it.
//!
//! ```text
//! file       /files of the agent, then its mode         as large as it is, in bounded memory
//! directory  a tar stream, by the guest's own tar       names, modes, links; nothing of it is in a file on the way
//! -          standard input or output: a file's content, or with a directory (a name that ends with /) a tar stream
//! ```
//!
//! As cp(1): into a directory that is there goes the name of the source. What a guest sends is hostile: nothing is
//! written outside of the target, and of modes only the permissions are taken. A copy that is interrupted leaves a
//! `.part` beside a file, and what had arrived of a directory.

use std::io::{PipeReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use kelvin_api::id::SandboxId;
use kelvin_client::agent::{Agent, Command, ErrorCode, Told};
use kelvin_client::{Client, Error};
use tokio::io::AsyncReadExt;

use crate::output::{Failed, progress};
use crate::sandbox::agent;

/// What is told of what a program in the guest says of its failure, in bytes.
const WORDS: usize = 2000;
/// What a guest's tar is fed at once, in bytes.
const CHUNK: usize = 256 << 10;
/// Of a guest's modes: no set-user-id, no sticky bits.
const PERMISSIONS: u32 = 0o777;

/// `ID:PATH`, when it is one.
fn remote(text: &str) -> Option<(&str, &str)> {
    text.split_once(':').filter(|(id, path)| id.parse::<SandboxId>().is_ok() && !path.is_empty())
}

fn local(what: String) -> impl FnOnce(std::io::Error) -> Failed {
    move |source| Failed::from(Error::Local { what, source })
}

/// A path for programs of the guest, which start in the home directory: `~` is nothing to them.
fn plain(path: &str) -> &str {
    match path.strip_prefix("~/") {
        Some(rest) => rest,
        None if path == "~" => ".",
        None => path,
    }
}

/// A sandbox's side of a copy.
struct Remote {
    agent: Agent,
    path: String,
}

impl Remote {
    async fn of(client: &Client, id: &str, path: &str, user: Option<String>) -> Result<Self, Failed> {
        Ok(Self { agent: agent(client, id, user).await?, path: plain(path).to_owned() })
    }

    /// Runs a program of the guest; its exit code and output.
    async fn program(&self, program: &str, args: &[&str]) -> Result<(i32, String), Failed> {
        let args = args.iter().map(|text| (*text).to_owned()).collect();
        let command = Command { program: program.to_owned(), args, ..Command::default() };
        let (code, stdout, stderr) =
            self.agent.run(&command, WORDS).await.map_err(|error| without(program, error))?;
        let said = if code == 0 { stdout } else { stderr };
        Ok((code, String::from_utf8_lossy(&said).trim().to_owned()))
    }

    async fn is_dir(&self, path: &str) -> Result<bool, Failed> {
        Ok(self.program("test", &["-d", path]).await?.0 == 0)
    }

    /// Runs a program that has to succeed.
    async fn must(&self, what: &str, program: &str, args: &[&str]) -> Result<String, Failed> {
        match self.program(program, args).await? {
            (0, said) => Ok(said),
            (code, said) => Err(failed(what, code, &said)),
        }
    }
}

/// An image may be without the programs that everybody has.
fn without(program: &str, error: Error) -> Failed {
    match &error {
        Error::Agent(inner) if inner.code == ErrorCode::NotFound => Failed::new(
            format!("the sandbox has no program {program:?}"),
            "install it in the image; `cp - ID:PATH` and `cp ID:PATH -` copy a file without it",
        ),
        _ => Failed::from(error),
    }
}

fn failed(what: &str, code: i32, said: &str) -> Failed {
    Failed::new(
        format!("{what}: the guest's program ended with {code}: {said}"),
        "check the path and whose it is",
    )
}

/// Copies `source` to `target`, one of which is `ID:PATH`.
pub async fn run(client: &Client, source: &str, target: &str, user: Option<String>) -> Result<(), Failed> {
    match (remote(source), remote(target)) {
        (Some((id, path)), None) => download(&Remote::of(client, id, path, user).await?, target).await,
        (None, Some((id, path))) => upload(&Remote::of(client, id, path, user).await?, source).await,
        (Some(_), Some(_)) => Err(Failed::new(
            "both are in a sandbox".to_owned(),
            "cp ID:PATH - | cp - ID:PATH, or by way of a local file",
        )),
        (None, None) => Err(Failed::new(
            "one of the two has to be in a sandbox".to_owned(),
            "cp PATH ID:PATH, or cp ID:PATH PATH",
        )),
    }
}

fn name_of(path: &str) -> Result<&str, Failed> {
    let name = Path::new(path).file_name().and_then(|name| name.to_str());
    name.ok_or_else(|| {
        Failed::new(format!("{path:?} has no name to copy it by"), "name a file or a directory")
    })
}

async fn upload(remote: &Remote, source: &str) -> Result<(), Failed> {
    if source == "-" {
        if remote.path.ends_with('/') {
            return unpack_there(remote, &remote.path, tokio::io::stdin()).await;
        }
        return Ok(remote.agent.upload(&remote.path, tokio::io::stdin(), |_| {}).await?);
    }
    let found = tokio::fs::metadata(source).await.map_err(local(format!("reading {source}")))?;
    // `dir/.` and `dir` are the same directory; what is copied is called as it is.
    let inside = remote.is_dir(&remote.path).await?;
    let target = match inside {
        true => format!("{}/{}", remote.path.trim_end_matches('/'), name_of(source)?),
        false => remote.path.clone(),
    };
    if found.is_dir() {
        let reader = pack_here(PathBuf::from(source)).map_err(local(format!("packing {source}")))?;
        let content = tokio::net::unix::pipe::Receiver::from_owned_fd(OwnedFd::from(reader.0));
        unpack_there(remote, &target, content.map_err(local(format!("packing {source}")))?).await?;
        return reader
            .1
            .await
            .map_err(|error| Failed::other(&error))?
            .map_err(local(format!("packing {source}")));
    }
    let file = tokio::fs::File::open(source).await.map_err(local(format!("opening {source}")))?;
    let bar = progress(source, Some(found.len()));
    let told = bar.clone();
    remote.agent.upload(&target, file, move |done| told.set_position(done)).await?;
    bar.finish_and_clear();
    let mode = format!("{:o}", found.permissions().mode() & PERMISSIONS);
    remote.must("setting its mode", "chmod", &[&mode, "--", &target]).await.map(drop)
}

/// Packs the directory `source` into a pipe, on a thread of its own: names in it are relative to the directory.
type Packed = (PipeReader, tokio::task::JoinHandle<std::io::Result<()>>);
fn pack_here(source: PathBuf) -> std::io::Result<Packed> {
    let (reader, writer) = std::io::pipe()?;
    let packing = tokio::task::spawn_blocking(move || {
        let mut archive = tar::Builder::new(std::io::BufWriter::with_capacity(CHUNK, writer));
        archive.follow_symlinks(false);
        archive.append_dir_all(".", source)?;
        archive.into_inner()?.flush()
    });
    Ok((reader, packing))
}

/// Feeds the tar stream `content` to the guest's tar, which unpacks it in `directory`.
async fn unpack_there(
    remote: &Remote,
    directory: &str,
    mut content: impl tokio::io::AsyncRead + Unpin,
) -> Result<(), Failed> {
    const WHAT: &str = "unpacking in the sandbox";
    remote.must("making the directory", "mkdir", &["-p", "--", directory]).await?;
    let args = ["-x", "-p", "--no-same-owner", "-f", "-", "-C", directory].map(str::to_owned).to_vec();
    let command = Command { program: "tar".to_owned(), args, stdin: true, ..Command::default() };
    let mut process = remote.agent.start(&command).await.map_err(|error| without("tar", error))?;
    let Some(Told::Started { pid }) = process.next().await? else {
        return Err(failed(WHAT, -1, "it did not start"));
    };
    let feed = async {
        let mut buffer = vec![0; CHUNK];
        loop {
            match content.read(&mut buffer).await.map_err(local("reading what is copied".to_owned()))? {
                0 => break,
                count => remote.agent.feed(pid, buffer[..count].to_vec()).await?,
            }
        }
        Ok::<_, Failed>(remote.agent.end_input(pid).await?)
    };
    let mut said = Vec::new();
    let end = async {
        while let Some(told) = process.next().await? {
            match told {
                Told::Stderr(bytes) => said.extend(bytes.iter().take(WORDS.saturating_sub(said.len()))),
                Told::Ended { exit_code, .. } => return Ok::<_, Failed>(exit_code),
                Told::Started { .. } | Told::Stdout(_) => {}
            }
        }
        Ok(-1)
    };
    let (fed, ended) = tokio::join!(feed, end);
    match ended? {
        0 => fed,
        // Why it ended is worth more than that it took no more.
        code => Err(failed(WHAT, code, String::from_utf8_lossy(&said).trim())),
    }
}

async fn download(remote: &Remote, target: &str) -> Result<(), Failed> {
    if remote.is_dir(&remote.path).await? {
        return download_directory(remote, target).await;
    }
    if target == "-" {
        remote.agent.download(&remote.path, &mut tokio::io::stdout(), |_, _| {}).await?;
        return Ok(());
    }
    let target = match Path::new(target).is_dir() {
        true => Path::new(target).join(name_of(&remote.path)?),
        false => PathBuf::from(target),
    };
    let bar = progress(&remote.path, None);
    let told = bar.clone();
    let report = move |done, size: Option<u64>| {
        if let Some(size) = size {
            told.set_length(size);
        }
        told.set_position(done);
    };
    // Under another name first: an interrupted copy is not taken for the file.
    let mut part = target.clone().into_os_string();
    part.push(".part");
    let part = PathBuf::from(part);
    let making = || format!("making {}", part.display());
    let copied = async {
        let mut file = tokio::fs::File::create(&part).await.map_err(local(making()))?;
        remote.agent.download(&remote.path, &mut file, report).await?;
        let mode =
            remote.must("asking for its mode", "stat", &["-L", "-c", "%a", "--", &remote.path]).await?;
        // Of files of the kernel's own, and of those that are gone by now, it may not be a number.
        if let Ok(mode) = u32::from_str_radix(&mode, 8) {
            let mode = std::fs::Permissions::from_mode(mode & PERMISSIONS);
            file.set_permissions(mode).await.map_err(local(making()))?;
        }
        tokio::fs::rename(&part, &target).await.map_err(local(format!("naming {}", target.display())))
    };
    let copied: Result<(), Failed> = copied.await;
    bar.finish_and_clear();
    if copied.is_err() {
        let _ = tokio::fs::remove_file(&part).await;
    }
    copied
}

async fn download_directory(remote: &Remote, target: &str) -> Result<(), Failed> {
    const WHAT: &str = "packing in the sandbox";
    let args = ["-c", "-f", "-", "-C", &remote.path, "."].map(str::to_owned).to_vec();
    let command = Command { program: "tar".to_owned(), args, ..Command::default() };
    let mut process = remote.agent.start(&command).await.map_err(|error| without("tar", error))?;
    let (unpacking, mut sink) = match target {
        "-" => (None, Sink::Stdout(tokio::io::stdout())),
        target => {
            let here = match Path::new(target).is_dir() {
                true => Path::new(target).join(name_of(&remote.path)?),
                false => PathBuf::from(target),
            };
            let (reader, writer) = std::io::pipe().map_err(local("making a pipe".to_owned()))?;
            let writer = tokio::net::unix::pipe::Sender::from_owned_fd(OwnedFd::from(writer));
            let writer = writer.map_err(local("making a pipe".to_owned()))?;
            (Some(tokio::task::spawn_blocking(move || unpack_here(reader, &here))), Sink::Pipe(writer))
        }
    };
    let (mut said, mut code) = (Vec::new(), -1);
    let mut written = Ok(());
    while let Some(told) = process.next().await? {
        match told {
            Told::Stdout(bytes) if written.is_ok() => written = sink.write(&bytes).await,
            Told::Stderr(bytes) => said.extend(bytes.iter().take(WORDS.saturating_sub(said.len()))),
            Told::Ended { exit_code, .. } => {
                code = exit_code;
                break;
            }
            Told::Started { .. } | Told::Stdout(_) => {}
        }
    }
    drop(sink);
    if let Some(unpacking) = unpacking {
        unpacking
            .await
            .map_err(|error| Failed::other(&error))?
            .map_err(local(format!("unpacking to {target}")))?;
    }
    match code {
        0 => written.map_err(local("writing the directory".to_owned())),
        code => Err(failed(WHAT, code, String::from_utf8_lossy(&said).trim())),
    }
}

/// Where a tar stream goes.
enum Sink {
    Stdout(tokio::io::Stdout),
    Pipe(tokio::net::unix::pipe::Sender),
}

impl Sink {
    async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        use tokio::io::AsyncWriteExt;
        match self {
            Self::Stdout(stdout) => {
                stdout.write_all(bytes).await?;
                stdout.flush().await
            }
            Self::Pipe(pipe) => pipe.write_all(bytes).await,
        }
    }
}

/// Unpacks what a guest sends to `target`: never outside of it, and with permissions alone.
fn unpack_here(reader: PipeReader, target: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(target)?;
    let mut archive = tar::Archive::new(reader);
    archive.set_preserve_permissions(true);
    archive.set_mask(!PERMISSIONS);
    let mut directories = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        match entry.header().entry_type() {
            kind if kind.is_dir() => {
                let inside = entry.path()?.into_owned();
                let plain = |part| matches!(part, Component::Normal(_) | Component::CurDir);
                if inside.components().all(plain) {
                    make_dir(target, &inside)?;
                    // What they let be done to them, last: one that may not be written could not be filled.
                    directories.push((inside, entry.header().mode()? & PERMISSIONS));
                }
            }
            kind if kind.is_file() || kind.is_symlink() || kind.is_hard_link() => {
                if !entry.unpack_in(target)? {
                    let text = format!("{} leads outside", entry.path()?.display());
                    return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, text));
                }
            }
            // Devices, FIFOs, sockets: nothing that belongs on this machine.
            _ => eprintln!("skipped: {} is no file", entry.path()?.display()),
        }
    }
    // What follows the end of the archive is padding.
    std::io::copy(&mut archive.into_inner(), &mut std::io::sink())?;
    for (path, mode) in directories.into_iter().rev() {
        let path = target.join(path);
        // Not through a link that came later.
        if std::fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir())
            && path.canonicalize()?.starts_with(target.canonicalize()?)
        {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        }
    }
    Ok(())
}

/// Makes a directory below `target`, through no link.
fn make_dir(target: &Path, inside: &Path) -> std::io::Result<()> {
    let mut path = target.to_owned();
    for part in inside.components() {
        path.push(part);
        match std::fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => {
                return Err(std::io::Error::new(
                    std::io::ErrorKind::InvalidData,
                    format!("{} is in the way", path.display()),
                ));
            }
            Err(_) => std::fs::create_dir(&path)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpack(archive: Vec<u8>, name: &str) -> (PathBuf, std::io::Result<()>) {
        let directory = std::env::temp_dir().join(format!("kelvin-copy-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        let (reader, mut writer) = std::io::pipe().unwrap();
        let writing = std::thread::spawn(move || writer.write_all(&archive));
        let result = unpack_here(reader, &directory.join("in"));
        let _ = writing.join();
        (directory, result)
    }

    fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header
    }

    #[test]
    fn a_directory_comes_with_its_modes_and_links() {
        let mut archive = tar::Builder::new(Vec::new());
        archive.append_data(&mut header(tar::EntryType::Directory, 0o555, 0), "./d", &[][..]).unwrap();
        archive.append_data(&mut header(tar::EntryType::Regular, 0o4755, 1), "./d/run", &b"x"[..]).unwrap();
        archive.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), "./link", "d/run").unwrap();
        let (directory, result) = unpack(archive.into_inner().unwrap(), "modes");
        result.unwrap();
        let mode = |path: &str| {
            std::fs::metadata(directory.join("in").join(path)).unwrap().permissions().mode() & 0o7777
        };
        assert_eq!((mode("d"), mode("d/run")), (0o555, 0o755), "no set-user-id");
        assert_eq!(std::fs::read_link(directory.join("in/link")).unwrap(), Path::new("d/run"));
        std::fs::set_permissions(directory.join("in/d"), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn nothing_is_written_outside_of_the_target() {
        // A link that leads outside, and a file through it.
        let mut archive = tar::Builder::new(Vec::new());
        archive.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), "out", "..").unwrap();
        archive.append_data(&mut header(tar::EntryType::Regular, 0o644, 1), "out/bad", &b"x"[..]).unwrap();
        archive.append_data(&mut header(tar::EntryType::Directory, 0o755, 0), "out/dir", &[][..]).unwrap();
        let (directory, result) = unpack(archive.into_inner().unwrap(), "link");
        assert!(result.is_err());
        assert!(!directory.join("bad").exists() && !directory.join("dir").exists());
        std::fs::remove_dir_all(directory).unwrap();
        // A name that climbs.
        let mut bytes = header(tar::EntryType::Regular, 0o644, 1);
        bytes.as_old_mut().name[..6].copy_from_slice(b"../bad");
        bytes.set_cksum();
        let mut archive = tar::Builder::new(Vec::new());
        archive.append(&bytes, &b"x"[..]).unwrap();
        let (directory, result) = unpack(archive.into_inner().unwrap(), "name");
        assert!(result.is_err());
        assert!(!directory.join("bad").exists());
        std::fs::remove_dir_all(directory).unwrap();
    }
}
