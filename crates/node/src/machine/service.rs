//! What runs in a template's machine when its snapshot is taken: started, and waited for until it can be used.
//!
//! ```text
//! log made ─> start, as the template's user, detached ─> ready? ── no, again in 0.5 s ──┐
//!                     │                                   └── yes: frozen               │
//!                     └ ends with a code other than 0, or never ready: failed, with its last lines
//! ```
//!
//! Without a ready command it counts as ready when somebody listens on a TCP port who did not before, when it ends well, or after
//! a while. What it writes goes to [`LOG`] in the guest, which is the template's own then. A crash leaves nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use http::Request;
use http_body_util::{BodyExt, Limited};
use kelvin_api::sandbox::EnvVars;
use kelvin_store::image::{Service, Template};
use tokio::time::Instant;

use crate::error::Error;
use crate::machine::processes::{Command, Exit, Failed, Process, Processes, Told, USER, whole};
use crate::machine::text;

/// Where its output goes, in the guest.
const LOG: &str = "/var/log/kelvin-start.log";
/// What is read of that, from its end, in bytes.
const TAIL: usize = 64 << 10;
/// Lines of it that are told.
const TAIL_LINES: usize = 20;
/// How long all of it may take: whatever the guest is asked, what it runs is its image's.
const LIMIT: Duration = Duration::from_secs(300);
/// How long the guest may take to show what a service that failed has said.
const TOLD: Duration = Duration::from_secs(10);
/// How long after an answer it is asked again.
const AGAIN: Duration = Duration::from_millis(500);
/// How long one that says nothing of itself is waited for. Source: E2B's default, 20 s.
const SILENT: Duration = Duration::from_secs(20);
/// Prints who listens, by the shell alone: an image may have nothing else. Source: proc_pid_net(5), state 0A.
const LISTENING: &str = "for f in /proc/net/tcp /proc/net/tcp6; do [ -r $f ] && while read -r n a r s x; do \
                         [ \"$s\" = 0A ] && echo \"$a\"; done < $f; done; true";
/// Who is told to do this.
const ROOT: &str = "root";

/// Starts the service of `template` in a guest and waits until it can be used. Cancel-safe: what was started runs on.
///
/// # Errors
/// `Service` when it fails or is never ready, `Agent` when the agent does not answer.
pub async fn begin(processes: &Processes, template: &Template) -> Result<(), Error> {
    let Some(service) = &template.service else { return Ok(()) };
    let guest = Guest { processes, template };
    match tokio::time::timeout(LIMIT, guest.bring_up(service)).await {
        Ok(done) => done,
        Err(_) => {
            let what = format!("the template was not ready within {} s", LIMIT.as_secs());
            Err(guest.failed(what).await)
        }
    }
}

struct Guest<'a> {
    processes: &'a Processes,
    template: &'a Template,
}

impl Guest<'_> {
    async fn bring_up(&self, service: &Service) -> Result<(), Error> {
        let Some(start) = &service.start else { return self.wait_ready(service, None).await };
        self.make_log().await?;
        let before = match service.ready {
            Some(_) => BTreeSet::new(),
            None => self.listening().await?,
        };
        let text = format!("exec >>{LOG} 2>&1 </dev/null; {start}");
        let process = self.processes.start(&self.command(&text)).await;
        let process = process.map_err(|failed| self.not_run("the start command", failed))?;
        self.wait_ready(service, Some((process, before))).await
    }

    fn command<'c>(&'c self, text: &'c str) -> Command<'c> {
        let template = self.template;
        let (user, cwd) = (template.user.as_deref(), template.workdir.as_deref());
        Command { text, argv: None, user, cwd, env: &template.env }
    }

    fn not_run(&self, what: &str, failed: Failed) -> Error {
        match failed {
            Failed::Broken(error) => error,
            Failed::Refused(why) => {
                Error::Service { what: format!("{what} cannot be run: {why}"), said: None }
            }
        }
    }

    /// Waits until it is ready. `started`: its process, and who listened before it.
    async fn wait_ready(
        &self,
        service: &Service,
        started: Option<(Process, BTreeSet<String>)>,
    ) -> Result<(), Error> {
        let (mut process, before) = started.map_or((None, BTreeSet::new()), |(one, set)| (Some(one), set));
        let ready = async {
            match &service.ready {
                Some(ready) => self.until_well(ready).await,
                None => self.until_listened_to(&before).await,
            }
        };
        tokio::pin!(ready);
        loop {
            tokio::select! {
                biased;
                ready = &mut ready => return ready,
                exit = end_of(&mut process) => match exit? {
                    exit if !exit.is_good() => {
                        let what = format!("the start command ended before it was ready, with {exit}");
                        return Err(self.failed(what).await);
                    }
                    // It has put itself into the background, or done what there was to do.
                    _ if service.ready.is_none() => return Ok(()),
                    _ => process = None,
                },
            }
        }
    }

    async fn until_well(&self, ready: &str) -> Result<(), Error> {
        loop {
            let ran = self.processes.run(&self.command(ready), 0).await;
            let (exit, _) = ran.map_err(|failed| self.not_run("the ready command", failed))?;
            if exit.is_good() {
                return Ok(());
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn until_listened_to(&self, before: &BTreeSet<String>) -> Result<(), Error> {
        let silent = Instant::now() + SILENT;
        while Instant::now() < silent {
            if !self.listening().await?.is_subset(before) {
                return Ok(());
            }
            tokio::time::sleep(AGAIN).await;
        }
        Ok(())
    }

    /// Local addresses on which somebody listens; none in a guest without a shell.
    async fn listening(&self) -> Result<BTreeSet<String>, Error> {
        let env = EnvVars::new();
        let command = Command { text: LISTENING, argv: None, user: Some(ROOT), cwd: Some("/"), env: &env };
        match self.processes.run(&command, TAIL).await {
            Ok((_, output)) => {
                Ok(String::from_utf8_lossy(&output).split_whitespace().map(str::to_owned).collect())
            }
            Err(Failed::Refused(_)) => Ok(BTreeSet::new()),
            Err(Failed::Broken(error)) => Err(error),
        }
    }

    fn log_path(&self, user: &str) -> String {
        let encode = |text| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC);
        format!("http://agent/files?path={}&username={}", encode(LOG), encode(user))
    }

    /// Makes the log, of whose the processes are: they may not make one there.
    async fn make_log(&self) -> Result<(), Error> {
        let user = self.template.user.as_deref().unwrap_or(USER);
        let user = user.split(':').next().unwrap_or(user);
        let request = Request::post(self.log_path(user))
            .header(http::header::CONTENT_TYPE, "application/octet-stream")
            .body(whole(""))
            .map_err(|error| Error::Io { what: "asking for a log", source: std::io::Error::other(error) })?;
        let reply = self.processes.send(request).await?;
        if reply.status().is_success() {
            return Ok(());
        }
        let what = format!("{LOG} cannot be made for the user {user}: the agent replied {}", reply.status());
        Err(Error::Service { what, said: None })
    }

    /// That it failed, with the last that it has said.
    async fn failed(&self, what: String) -> Error {
        let asked = Request::get(self.log_path(ROOT))
            .header(http::header::RANGE, format!("bytes=-{TAIL}"))
            .body(whole(""));
        let Ok(request) = asked else { return Error::Service { what, said: None } };
        let said = async {
            let reply = self.processes.send(request).await.ok()?;
            let reply = Some(reply).filter(|reply| reply.status().is_success())?;
            let bytes = Limited::new(reply.into_body(), TAIL).collect().await.ok()?.to_bytes();
            Some(text::last_lines(&bytes, TAIL_LINES)).filter(|said| !said.is_empty())
        };
        Error::Service { what, said: tokio::time::timeout(TOLD, said).await.ok().flatten() }
    }
}

/// Waits for the end of a process; for ever when there is none.
async fn end_of(process: &mut Option<Process>) -> Result<Exit, Error> {
    let Some(process) = process else { return std::future::pending().await };
    loop {
        match process.next().await {
            Ok(Told::Ended(exit)) => return Ok(exit),
            Ok(Told::Output(_) | Told::Errors(_)) => {}
            Err(Failed::Broken(error)) => return Err(error),
            Err(Failed::Refused(why)) => {
                return Err(Error::Service {
                    what: format!("the start command cannot be run: {why}"),
                    said: None,
                });
            }
        }
    }
}
