//! `kelvin sandbox cp`: files and directories, with their modes, into a sandbox and out of it.
//!
//! ```text
//! file       /files of the agent, then its mode         as large as it is, in bounded memory
//! directory  a tar stream, by the guest's own tar       names, modes, links; nothing of it is in a file on the way
//! -          standard input or output: a file's content, or with a directory (a name that ends with /) a tar stream
//! ```
//!
//! As cp(1): into a directory that is there goes the name of the source. What a guest sends is hostile: nothing is
//! written outside of the target, and of modes only the permissions are taken. A copy that is interrupted leaves what had
//! arrived of a directory; a program that is killed, a `.part` beside a file.

use std::io::{PipeReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use kelvin_api::id::SandboxId;
use kelvin_client::agent::{Agent, Command, ErrorCode, Told};
use kelvin_client::{Client, Error};
use tokio::io::AsyncReadExt;

use crate::exec::{agent, told_to_end};
use crate::output::{Failed, progress};

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
    // A guest's words on their way to a terminal.
    let said: String = said.chars().filter(|c| !c.is_control() || *c == '\n').collect();
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

/// Where the copy of `path` goes in a directory that is there, as cp(1): by its name; what has none (`.`, `..`, `/`) is
/// the directory itself.
fn name_of(path: &str) -> &str {
    Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// The same on this machine. What a guest has sent before may be a link that leads elsewhere.
fn place_in(target: &str, path: &str) -> Result<PathBuf, Failed> {
    if !Path::new(target).is_dir() {
        return Ok(PathBuf::from(target));
    }
    let place = Path::new(target).join(name_of(path));
    match std::fs::symlink_metadata(&place) {
        Ok(found) if found.is_symlink() => Err(Failed::new(
            format!("{} is a link: it may lead out of {target}", place.display()),
            "remove it, or name the file that it leads to",
        )),
        _ => Ok(place),
    }
}

async fn upload(remote: &Remote, source: &str) -> Result<(), Failed> {
    if source == "-" {
        if remote.path.ends_with('/') {
            return unpack_there(remote, &remote.path, tokio::io::stdin()).await;
        }
        return Ok(remote.agent.upload(&remote.path, tokio::io::stdin(), |_| {}).await?);
    }
    let found = tokio::fs::metadata(source).await.map_err(local(format!("reading {source}")))?;
    let inside = remote.is_dir(&remote.path).await?;
    let target = match inside {
        true => format!("{}/{}", remote.path.trim_end_matches('/'), name_of(source)),
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
        let mut left_out = 0;
        pack(&mut archive, &source, Path::new("."), &mut left_out)?;
        archive.into_inner()?.flush()?;
        match left_out {
            0 => Ok(()),
            count => Err(std::io::Error::other(format!("{count} files were left out"))),
        }
    });
    Ok((reader, packing))
}

/// Adds what is at `path` to `archive` as `name`, and what is below it. What cannot be read, and what is neither a file, a
/// directory nor a link, is said, counted when somebody would miss it, and left out.
fn pack(
    archive: &mut tar::Builder<impl Write>,
    path: &Path,
    name: &Path,
    left_out: &mut usize,
) -> std::io::Result<()> {
    use std::io::Read;
    let found = std::fs::symlink_metadata(path)?;
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&found);
    let mut leave_out = |error: &dyn std::fmt::Display| {
        *left_out += 1;
        eprintln!("left out: {}: {error}", path.display());
    };
    if found.is_symlink() {
        archive.append_link(&mut header, name, std::fs::read_link(path)?)
    } else if found.is_dir() {
        archive.append_data(&mut header, name, std::io::empty())?;
        let entries = match std::fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) => {
                leave_out(&error);
                return Ok(());
            }
        };
        for entry in entries {
            let entry = entry?;
            pack(archive, &entry.path(), &name.join(entry.file_name()), left_out)?;
        }
        Ok(())
    } else if found.is_file() {
        match std::fs::File::open(path) {
            // As long as it was: one that others write to would be taken for the next entry.
            Ok(file) => {
                let content = file.take(found.len()).chain(std::io::repeat(0)).take(found.len());
                archive.append_data(&mut header, name, content)
            }
            Err(error) => {
                leave_out(&error);
                Ok(())
            }
        }
    } else {
        eprintln!("skipped: {} is no file", path.display());
        Ok(())
    }
}

/// Whether input was refused because the process has closed it or has ended, and not because it was lost on the way.
fn reads_no_more(refused: &kelvin_client::Error) -> bool {
    let kelvin_client::Error::Agent(error) = refused else { return false };
    matches!(error.code, ErrorCode::FailedPrecondition | ErrorCode::NotFound)
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
    let started = process.next().await.map_err(|error| without("tar", error))?;
    let Some(Told::Started { pid }) = started else {
        return Err(failed(WHAT, -1, "it did not start"));
    };
    // What the guest's tar took no more of is no failure yet: it reads to the archive's own end, ends, and its exit
    // code says whether that was all.
    let feed = async {
        let mut buffer = vec![0; CHUNK];
        loop {
            let read = content.read(&mut buffer).await;
            let count = read.map_err(local("reading what is copied".to_owned()))?;
            let taken = match count {
                0 => remote.agent.end_input(pid).await,
                count => remote.agent.feed(pid, buffer[..count].to_vec()).await,
            };
            if taken.is_err() || count == 0 {
                return Ok::<_, Failed>(taken.err());
            }
        }
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
    let feed = async {
        let fed = tokio::select! {
            fed = feed => fed,
            signal = told_to_end() => Err(interrupted(signal)),
        };
        // One that reads no more ends by itself, and has directories to finish before: it is let.
        if !matches!(&fed, Ok(None)) && !matches!(&fed, Ok(Some(refused)) if reads_no_more(refused)) {
            // It would wait for the rest for ever. One that has ended does not notice.
            let _ = remote.agent.signal(pid, true).await;
        }
        fed
    };
    let (fed, ended) = tokio::join!(feed, end);
    match (fed?, ended?) {
        (_, 0) => Ok(()),
        // It was ended because it could not be fed.
        (Some(refused), ..0) => Err(refused.into()),
        (_, code) => Err(failed(WHAT, code, String::from_utf8_lossy(&said).trim())),
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
    let target = place_in(target, &remote.path)?;
    // A device, a FIFO: written into, not replaced.
    let special = std::fs::metadata(&target).is_ok_and(|found| !found.is_file());
    let bar = progress(&remote.path, None);
    let told = bar.clone();
    let report = move |done, size: Option<u64>| {
        if let Some(size) = size {
            told.set_length(size);
        }
        told.set_position(done);
    };
    let making = |path: &Path| format!("making {}", path.display());
    if special {
        let file = tokio::fs::File::options().write(true).open(&target).await;
        let mut file = file.map_err(local(making(&target)))?;
        let copied = remote.agent.download(&remote.path, &mut file, report).await;
        bar.finish_and_clear();
        return copied.map(drop).map_err(Failed::from);
    }
    // Under another name first: an interrupted copy is not taken for the file. A name that nobody can have put there.
    let mut part = target.clone().into_os_string();
    part.push(format!(".{}.part", kelvin_api::id::VmId::random()));
    let part = PathBuf::from(part);
    let copied = async {
        let file = tokio::fs::File::options().write(true).create_new(true).open(&part).await;
        let mut file = file.map_err(local(making(&part)))?;
        remote.agent.download(&remote.path, &mut file, report).await?;
        let mode =
            remote.must("asking for its mode", "stat", &["-L", "-c", "%a", "--", &remote.path]).await?;
        // Of files of the kernel's own, and of those that are gone by now, it may not be a number.
        if let Ok(mode) = u32::from_str_radix(&mode, 8) {
            let mode = std::fs::Permissions::from_mode(mode & PERMISSIONS);
            file.set_permissions(mode).await.map_err(local(making(&part)))?;
        }
        tokio::fs::rename(&part, &target).await.map_err(local(format!("naming {}", target.display())))
    };
    let copied: Result<(), Failed> = tokio::select! {
        copied = copied => copied,
        signal = told_to_end() => Err(interrupted(signal)),
    };
    bar.finish_and_clear();
    if copied.is_err() {
        let _ = tokio::fs::remove_file(&part).await;
    }
    copied
}

fn interrupted(signal: i32) -> Failed {
    let code = u8::try_from(128 + signal).unwrap_or(u8::MAX);
    Failed::new("the copy was interrupted".to_owned(), "copy again").with_code(code)
}

async fn download_directory(remote: &Remote, target: &str) -> Result<(), Failed> {
    const WHAT: &str = "packing in the sandbox";
    let args = ["-c", "-f", "-", "-C", &remote.path, "."].map(str::to_owned).to_vec();
    let command = Command { program: "tar".to_owned(), args, ..Command::default() };
    let mut process = remote.agent.start(&command).await.map_err(|error| without("tar", error))?;
    let (unpacking, mut sink) = match target {
        "-" => (None, Sink::Stdout(tokio::io::stdout())),
        target => {
            let here = place_in(target, &remote.path)?;
            let (reader, writer) = std::io::pipe().map_err(local("making a pipe".to_owned()))?;
            let writer = tokio::net::unix::pipe::Sender::from_owned_fd(OwnedFd::from(writer));
            let writer = writer.map_err(local("making a pipe".to_owned()))?;
            (Some(tokio::task::spawn_blocking(move || unpack_here(reader, &here))), Sink::Pipe(writer))
        }
    };
    let (mut said, mut code, mut pid) = (Vec::new(), -1, None);
    let mut written = Ok(());
    let reading = async {
        while let Some(told) = process.next().await.map_err(|error| without("tar", error))? {
            match told {
                Told::Started { pid: started } => pid = Some(started),
                Told::Stdout(bytes) => {
                    written = sink.write(&bytes).await;
                    if written.is_err() {
                        break;
                    }
                }
                Told::Stderr(bytes) => said.extend(bytes.iter().take(WORDS.saturating_sub(said.len()))),
                Told::Ended { exit_code, .. } => {
                    code = exit_code;
                    break;
                }
            }
        }
        Ok::<_, Failed>(())
    };
    let read = tokio::select! {
        read = reading => read,
        signal = told_to_end() => Err(interrupted(signal)),
    };
    drop(sink);
    if let (-1, Some(pid)) = (code, pid) {
        // Nobody takes the rest.
        let _ = remote.agent.signal(pid, true).await;
    }
    if let Some(unpacking) = unpacking {
        // Why it took no more is worth more than that it did not.
        unpacking
            .await
            .map_err(|error| Failed::other(&error))?
            .map_err(local(format!("unpacking to {target}")))?;
    }
    read?;
    written.map_err(local("writing the directory".to_owned()))?;
    match code {
        0 => Ok(()),
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
                if kind.is_hard_link() {
                    // One of an earlier copy.
                    let inside = entry.path()?.into_owned();
                    if inside
                        .components()
                        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
                    {
                        let old = target.join(&inside);
                        let parent = old.parent().and_then(|parent| parent.canonicalize().ok());
                        if parent.is_some_and(|parent| {
                            target.canonicalize().is_ok_and(|target| parent.starts_with(target))
                        }) {
                            let _ = std::fs::remove_file(old);
                        }
                    }
                }
                if !entry.unpack_in(target)? {
                    let text = format!("{} leads outside", entry.path()?.display());
                    return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, text));
                }
            }
            // Devices, FIFOs, sockets: nothing that belongs on this machine.
            _ => eprintln!("skipped: {:?} is no file", entry.path()?),
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
