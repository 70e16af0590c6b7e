//! Commands: the exec form as a line for a shell, ENTRYPOINT and CMD together, HEALTHCHECK.

use crate::instruction::Form;

/// What runs the shell form where no SHELL was said.
pub(crate) const SHELL: [&str; 2] = ["/bin/sh", "-c"];
/// The largest single argument that Linux takes, in bytes, with room for its end (`MAX_ARG_STRLEN`).
pub(crate) const MOST_ARGUMENT: usize = (128 << 10) - 64;
/// Writes its first argument to a file of its own, runs that, and ends as it ended. `set -C` refuses a file that is there.
const SCRIPT: &str = "f=/tmp/.kelvin-run-$$; set -C; printf %s \"$1\" >\"$f\" && chmod 700 \"$f\" && \"$f\"; \
     c=$?; rm -f \"$f\"; exit $c";

/// One word for a POSIX shell.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "_-./:=,@%+".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// A line for a POSIX shell that becomes the command `argv`.
pub fn line(argv: &[String]) -> String {
    let words: Vec<String> = argv.iter().map(|word| quoted(word)).collect();
    format!("exec {}", words.join(" "))
}

/// The words of a command; `shell` runs the shell form.
pub(crate) fn argv(form: &Form, shell: &[String]) -> Vec<String> {
    match form {
        Form::Exec(words) => words.clone(),
        Form::Shell(text) => shell.iter().cloned().chain([text.clone()]).collect(),
    }
}

/// A command that runs `script`, whose first line names its interpreter.
pub(crate) fn script(script: String) -> Vec<String> {
    let head = SHELL.iter().copied().chain([SCRIPT, "sh"]).map(str::to_owned);
    head.chain([script]).collect()
}

/// What a container of the image starts with, as Docker puts it together, as a line for `/bin/sh -c`; none when both are empty.
///
/// An ENTRYPOINT of the shell form gets CMD, too: as arguments of its shell, which looks at none.
pub fn start(entrypoint: &[String], cmd: &[String]) -> Option<String> {
    let argv: Vec<String> = entrypoint.iter().chain(cmd).cloned().collect();
    (!argv.is_empty()).then(|| line(&argv))
}

/// A line for `/bin/sh -c` that checks what `argv` checks: its script as it is, where it has that shell.
pub(crate) fn check(argv: &[String]) -> String {
    match argv {
        [shell, flag, script] if [shell.as_str(), flag.as_str()] == SHELL => script.clone(),
        _ => line(argv),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn texts(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    /// What `/bin/sh` makes of the line.
    fn said(line: &str) -> String {
        let output = Command::new("/bin/sh").args(["-c", line]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn a_shell_reads_the_words_back() {
        let words = [
            "printf", "%s|", "a b", "", "it's", "$HOME", "`x`", "\"", "\\", "a\nb", "*", "x=y", "ü", "~", "!",
        ];
        assert_eq!(said(&line(&texts(&words))), words[2..].join("|") + "|");
        assert_eq!(line(&texts(&["python3", "-m", "http.server"])), "exec python3 -m http.server");
    }

    #[test]
    fn entrypoint_and_cmd_are_put_together_as_docker_does() {
        let (none, sh) = (texts(&[]), texts(&["/bin/sh", "-c", "serve"]));
        let (entry, cmd) = (texts(&["run"]), texts(&["-v"]));
        assert_eq!(start(&entry, &cmd).as_deref(), Some("exec run -v"));
        assert_eq!(start(&none, &sh).as_deref(), Some("exec /bin/sh -c serve"));
        assert_eq!(start(&entry, &sh).as_deref(), Some("exec run /bin/sh -c serve"));
        assert_eq!(start(&none, &none), None);
        // The shell has its script, and what comes after it is no part of that.
        assert_eq!(said(&start(&texts(&["/bin/sh", "-c", "echo it"]), &cmd).unwrap()), "it\n");
        assert_eq!(check(&sh), "serve");
        assert_eq!(check(&texts(&["curl", "-f", "a b"])), "exec curl -f 'a b'");
    }

    #[test]
    fn a_script_runs_by_its_own_interpreter() {
        let argv = script("#!/bin/sh -e\necho \"it's $0\" | sed 's/[0-9]*$//'\nexit 3\n".to_owned());
        let output = Command::new(&argv[0]).args(&argv[1..]).output().unwrap();
        assert_eq!(
            (output.status.code(), output.stdout.as_slice()),
            (Some(3), &b"it's /tmp/.kelvin-run-\n"[..])
        );
        let left = std::fs::read_dir("/tmp").unwrap().flatten();
        assert!(
            !left.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(".kelvin-run-"))
        );
    }
}
