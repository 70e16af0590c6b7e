//! COPY and ADD, as they are written.

use crate::error::Fault;
use crate::flags::Flags;
use crate::lines::{self, HereDoc};
use crate::words;

const NO_URL: &str = "Fetch it in a step, where its digest can be checked, too: RUN curl -fsSLo FILE URL.";
const NO_GIT: &str = "Clone it in a step: RUN git clone --depth 1 URL DIRECTORY.";

/// COPY, or ADD.
#[derive(Debug)]
pub(crate) struct Copy {
    /// `--from`, which Docker does not expand.
    pub from: Option<String>,
    pub sources: Vec<Source>,
    pub to: String,
    pub owner: Option<String>,
    pub mode: Option<String>,
    /// Whether an archive among the sources is unpacked: ADD does.
    pub unpack: bool,
}

/// One source of it.
#[derive(Debug)]
pub(crate) enum Source {
    Path(String),
    HereDoc(HereDoc),
}

/// Reads what comes after the keyword.
pub(crate) fn read(
    keyword: &str,
    rest: &str,
    heredocs: &[HereDoc],
    flags: &mut Flags,
    escape: char,
) -> Result<Copy, Fault> {
    let mut from = None;
    let mut unpack = false;
    if keyword == "COPY" {
        from = flags.take("from")?;
        if flags.switch("parents")? == Some(true) {
            let instead = "Leave --parents away, and copy each directory to its place.";
            return Err(Fault::unsupported("--parents", instead));
        }
    } else {
        if let Some(checksum) = flags.take("checksum")? {
            return Err(Fault::unsupported(format!("--checksum={checksum}"), NO_URL));
        }
        if flags.switch("keep-git-dir")? == Some(true) {
            return Err(Fault::unsupported("--keep-git-dir", NO_GIT));
        }
        unpack = flags.switch("unpack")?.unwrap_or(true);
    }
    if let Some(pattern) = flags.take("exclude")? {
        let instead = "Leave the files out by .dockerignore, or name those that are copied.";
        return Err(Fault::unsupported(format!("--exclude={pattern}"), instead));
    }
    let (owner, mode) = (flags.take("chown")?, flags.take("chmod")?);
    // It is about the layers of a registry's images; the disks of steps have no use for it.
    flags.switch("link")?;

    let exec = words::json(rest)?;
    let is_exec = exec.is_some();
    let mut found = exec.unwrap_or_else(|| words::plain(rest));
    let to = found.pop().filter(|to| !to.is_empty());
    let Some(to) = to.filter(|_| !found.is_empty() && !found.iter().any(String::is_empty)) else {
        return Err(Fault::syntax(format!("{keyword} has at least one source and a destination")));
    };
    if lines::heredoc(&to, escape).is_some() && !is_exec {
        return Err(Fault::syntax(format!("{keyword} has a destination after its here-document")));
    }
    let mut documents = heredocs.iter();
    let sources = found.into_iter().map(|word| match lines::heredoc(&word, escape).filter(|_| !is_exec) {
        // In the order in which they were announced.
        Some(_) => match documents.next() {
            Some(document) => Ok(Source::HereDoc(document.clone())),
            None => Err(Fault::syntax(format!("{word} has no here-document"))),
        },
        None => path(keyword, word),
    });
    Ok(Copy { from, sources: sources.collect::<Result<_, _>>()?, to, owner, mode, unpack })
}

/// A source that is no address.
fn path(keyword: &str, word: String) -> Result<Source, Fault> {
    let bare = word.split('#').next().unwrap_or_default();
    let is_url = ["http://", "https://"].iter().any(|scheme| word.starts_with(scheme));
    let is_git = ["git://", "ssh://", "git@"].iter().any(|scheme| word.starts_with(scheme))
        || word.starts_with("github.com/")
        || is_url && bare.ends_with(".git");
    match (is_git, is_url) {
        (true, _) => Err(Fault::unsupported(format!("{keyword} of the repository {word}"), NO_GIT)),
        (_, true) => Err(Fault::unsupported(format!("{keyword} of the URL {word}"), NO_URL)),
        _ => Ok(Source::Path(word)),
    }
}
