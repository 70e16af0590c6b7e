//! Which shell is run when the image has not the one that is asked for.
//!
//! Clients ask for `/bin/bash -l -c …`, whatever the image is. Where there is no bash it is `/bin/sh`, and where there is no
//! shell at all the busybox that `init` has brought (`furnish.rs`). Asked only once the wanted one was not there: an image
//! with bash pays nothing for it. Nothing is written here.

use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;

/// Where init puts what it brings.
pub const DIRECTORY: &str = "/usr/local/lib/kelvin";
/// The shell that init brings: a link to busybox, which acts by the name that it is called by.
pub const BROUGHT: &str = "/usr/local/lib/kelvin/sh";
/// The same, for the child that becomes it.
pub const BROUGHT_C: &CStr = c"/usr/local/lib/kelvin/sh";

/// The variable that tells a login shell which `PATH` it was started with.
pub const PATH_VARIABLE: &str = "KELVIN_PATH";
/// What makes it keep that: the profile of most images begins with a `PATH` of its own, and clients start login shells. The
/// first of its directory: what the others add to the `PATH` stays.
pub const PROFILE: &str = "/etc/profile.d/00-kelvin-path.sh";
/// What is in there.
pub const PROFILE_TEXT: &str = "# Kelvin: a login shell keeps the PATH that its image or its caller says.\n\
    if [ -n \"${KELVIN_PATH-}\" ]; then\n  PATH=$KELVIN_PATH\n  export PATH\nfi\n";

/// Names that mean a shell of the image.
const SHELLS: [&str; 7] =
    ["bash", "/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "sh", "/bin/sh", "/usr/bin/sh"];

/// What is run instead of the program `name` that is not there, the best first; nothing for what is no shell.
pub fn instead_of(name: &OsStr) -> &'static [&'static str] {
    let is_shell = SHELLS.iter().any(|shell| shell.as_bytes() == name.as_bytes());
    if is_shell { &["/bin/sh", BROUGHT] } else { &[] }
}

/// `args` of a bash as every shell understands them: its long options that others lack, up to the first argument that is
/// no option.
pub fn understood(args: &[String]) -> Vec<String> {
    let mut understood = Vec::with_capacity(args.len());
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "--login" => understood.push("-l".to_owned()),
            // Of files that other shells do not read, and of editing.
            "--noprofile" | "--norc" | "--noediting" | "--posix" => {}
            "--rcfile" | "--init-file" => drop(rest.next()),
            // What follows the short options is the command's.
            short if short.starts_with('-') && !short.starts_with("--") && !short.contains('c') => {
                understood.push(arg.clone());
            }
            _ => {
                understood.push(arg.clone());
                understood.extend(rest.cloned());
                break;
            }
        }
    }
    understood
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_shell_has_something_in_its_place() {
        assert_eq!(instead_of(OsStr::new("/bin/bash")), ["/bin/sh", BROUGHT]);
        assert_eq!(instead_of(OsStr::new("sh")), ["/bin/sh", BROUGHT]);
        for name in ["python3", "/opt/bash", "./sh", "", "rbash"] {
            assert!(instead_of(OsStr::new(name)).is_empty(), "{name}");
        }
        assert_eq!(BROUGHT.as_bytes(), BROUGHT_C.to_bytes());
        assert!(BROUGHT.starts_with(DIRECTORY));
    }

    #[test]
    fn a_login_shell_keeps_its_path() {
        assert!(PROFILE_TEXT.contains(PATH_VARIABLE));
        let directory = std::env::temp_dir().join(format!("kelvin-profile-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let name = std::path::Path::new(PROFILE).file_name().unwrap();
        std::fs::write(directory.join(name), PROFILE_TEXT).unwrap();
        std::fs::write(directory.join("go.sh"), "PATH=$PATH:/go\n").unwrap();
        let shell = |path: Option<&str>| {
            let all = directory.display();
            let script =
                format!("set -eu; PATH=/profile; for i in {all}/*.sh; do . $i; done; echo \"$PATH\"");
            let mut command = std::process::Command::new("/bin/sh");
            command.env_clear().args(["-c", &script]);
            command.envs(path.map(|path| (PATH_VARIABLE, path)));
            String::from_utf8(command.output().unwrap().stdout).unwrap()
        };
        assert_eq!(
            (shell(Some("/go/bin:/bin")), shell(None)),
            ("/go/bin:/bin:/go\n".into(), "/profile:/go\n".into())
        );
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn options_of_bash_alone_are_left_out_and_a_command_is_untouched() {
        let of = |args: &[&str]| understood(&args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&["-l", "-c", "echo --norc"]), ["-l", "-c", "echo --norc"]);
        assert_eq!(of(&["--login", "--norc", "-c", "x", "--login"]), ["-l", "-c", "x", "--login"]);
        assert_eq!(of(&["-lc", "x", "--norc"]), ["-lc", "x", "--norc"]);
        assert_eq!(of(&["--rcfile", "/x", "-i", "-l"]), ["-i", "-l"]);
        assert_eq!(of(&["script", "--login"]), ["script", "--login"]);
        assert_eq!(of(&["--", "--login"]), ["--", "--login"]);
        assert!(of(&[]).is_empty());
    }
}
