//! A step of a build as it is asked for, and what an option of the command line comes to.

use std::path::Path;

use kelvin_api::build::TemplateStep;

use super::context::Context;
use super::files::Files;
use crate::args::StepKind;
use crate::output::Failed;

/// A step.
#[derive(Debug)]
pub struct Step {
    /// As the server is asked for it.
    pub step: TemplateStep,
    /// As people know it: `RUN pip install flask`.
    pub shown: String,
    /// Where it stands in a Dockerfile.
    pub line: Option<u32>,
    /// What is uploaded for it.
    pub files: Option<Files>,
}

/// `kind` with its arguments, for a server.
pub fn template_step(kind: &str, args: Vec<String>) -> TemplateStep {
    TemplateStep { kind: kind.to_owned(), args, ..TemplateStep::default() }
}

impl Step {
    /// What an option with the value `text` asks for.
    ///
    /// # Errors
    /// When it is not written as it should be, or names files that cannot be read.
    pub fn of_option(kind: StepKind, text: &str) -> Result<Self, Failed> {
        let of =
            |kind: &str, args: &[&str]| template_step(kind, args.iter().map(ToString::to_string).collect());
        let (step, files) = match kind {
            StepKind::Run => (of("RUN", &[text]), None),
            StepKind::Workdir => (of("WORKDIR", &[text]), None),
            StepKind::User => (of("USER", &[text]), None),
            StepKind::Env => {
                let (key, value) = text.split_once('=').ok_or_else(|| {
                    Failed::new(format!("--env {text:?} is no KEY=VALUE"), "for example --env PORT=80")
                })?;
                (of("ENV", &[key, value]), None)
            }
            StepKind::Copy => {
                // The last one: a file's name may have colons, a path in a guest rarely does.
                let parts = text.rsplit_once(':').filter(|(from, to)| !from.is_empty() && !to.is_empty());
                let (from, to) = parts.ok_or_else(|| {
                    Failed::new(
                        format!("--copy {text:?} is no SRC:DEST"),
                        "for example --copy ./app:/srv/app",
                    )
                })?;
                let context = Context::read(Path::new(from), to)?;
                let files_hash = Some(context.hash.clone());
                let step = TemplateStep { files_hash, ..of("COPY", &[&context.name, to]) };
                (step, Some(Files::Named(context)))
            }
        };
        let shown = format!("{} {}", step.kind, step.args.join(" "));
        Ok(Self { step, shown, line: None, files })
    }

    /// What a failure calls it.
    pub fn label(&self) -> String {
        match self.line {
            Some(line) => format!("line {line}: {}", self.shown),
            None => self.shown.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_the_steps_that_the_sdks_send() {
        let made = |kind, text: &str| Step::of_option(kind, text).unwrap().step;
        assert_eq!(
            (made(StepKind::Run, "a b").kind, made(StepKind::Run, "a b").args),
            ("RUN".into(), vec!["a b".to_owned()])
        );
        assert_eq!(made(StepKind::Env, "K=V=W").args, ["K", "V=W"]);
        let file = tempfile::tempdir().unwrap();
        std::fs::write(file.path().join("app.py"), "1").unwrap();
        let text = format!("{}/app.py:/srv/", file.path().display());
        let Step { step: copy, files, shown, .. } = Step::of_option(StepKind::Copy, &text).unwrap();
        assert_eq!(
            (copy.kind.as_str(), &copy.args[..]),
            ("COPY", &["app.py".to_owned(), "/srv/".to_owned()][..])
        );
        assert_eq!(copy.files_hash.as_deref(), files.as_ref().map(Files::hash));
        assert_eq!(shown, "COPY app.py /srv/");
        for (kind, text) in [
            (StepKind::Env, "K"),
            (StepKind::Copy, "a"),
            (StepKind::Copy, ":b"),
            (StepKind::Copy, "a:"),
            (StepKind::Copy, "/nothing/of/that/name:/a"),
        ] {
            assert!(Step::of_option(kind, text).is_err(), "{text}");
        }
    }
}
