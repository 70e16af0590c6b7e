//! Imports of templates: files on the server's machine, for the server's own key.
//!
//! ```text
//! request ──> refused: its status
//!         └─> begun, on a task of its own ──> template | error
//!                └─ told line by line, while somebody listens: the reply has begun, its status is 200
//! ```
//!
//! Who listens may leave, before or after the reply has begun: the import goes on, and its audit entry says how it ended. With
//! an idempotency key the reply comes at the end, because it is kept.

use std::convert::Infallible;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use futures::stream;
use http::{HeaderMap, Method, StatusCode, header};
use kelvin_api::error::{ErrorCode, Failure};
use kelvin_api::id::TemplateName;
use kelvin_api::import::{IMPORT_EVENTS, ImportEvent, ImportProgress, ImportTemplate};
use kelvin_api::sandbox::Template;
use kelvin_api::units::MemoryMib;
use kelvin_node_api::Import;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::audit::Audit;
use crate::builds::Importing;
use crate::codes;
use crate::control::{Control, Inner};
use crate::create::memory_of;
use crate::once::Key;
use crate::openapi::{Api, Tag, op};
use crate::reply;
use crate::request::{Outcome, Path, json, parse_required, read};

/// Memory of machines of a template, when the request names none.
const DEFAULT_MEMORY: MemoryMib = MemoryMib(512);
/// How long nothing is told after something was.
const PAUSE: Duration = Duration::from_millis(100);

/// The route; its caller lets administrators alone come here.
pub(crate) fn routes() -> Api {
    Api::new().route(
        &Method::POST,
        "/templates/{name}/import",
        import,
        op("importTemplate", Tag::Templates, "Make a template of files on the server's machine. With `Accept: application/x-ndjson` the reply tells how far it \
            is, one ImportEvent a line, the last of which is the template or the error")
        .body::<ImportTemplate>()
        .reply::<Template>(200)
        .events::<ImportEvent>(IMPORT_EVENTS)
        .errors(&[
            codes::NODE,
            &[
                ErrorCode::InvalidName,
                ErrorCode::InvalidFile,
                ErrorCode::InvalidShape,
                ErrorCode::NameTaken,
                ErrorCode::TemplateImporting,
                ErrorCode::CapacityExhausted,
            ],
        ]),
    )
}

fn file(field: &str, text: String) -> Result<PathBuf, Failure> {
    let path = PathBuf::from(text);
    if path.is_absolute() && !path.as_os_str().as_encoded_bytes().contains(&0) {
        return Ok(path);
    }
    let shown: String = FilePath::new(&path).display().to_string().chars().take(80).collect();
    Err(Failure::new(
        ErrorCode::InvalidFile,
        format!("{field} {shown:?} is not an absolute path"),
        "name a file on the server's machine",
    ))
}

fn of(name: &str, body: ImportTemplate) -> Result<Import, Failure> {
    Ok(Import {
        template: name.parse().map_err(|error: kelvin_api::id::ParseIdError| {
            let remedy = "use 1 to 64 of a-z, 0-9, '.', '_' and '-'";
            Failure::new(ErrorCode::InvalidName, error.to_string(), remedy)
        })?,
        rootfs: file("rootfs", body.rootfs)?,
        kernel: file("kernel", body.kernel)?,
        initrd: file("initrd", body.initrd)?,
        vcpus: body.cpu_count.unwrap_or(1),
        memory_mib: memory_of(body.memory_mb)?.unwrap_or(DEFAULT_MEMORY),
    })
}

fn wants_events(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted
        .flat_map(|value| value.split(','))
        .filter_map(|range| range.split(';').next())
        .any(|kind| kind.trim().eq_ignore_ascii_case(IMPORT_EVENTS))
}

/// Reserves the name of an import: what a project has built is not replaced, and none builds it meanwhile.
async fn reserve(inner: &Inner, template: &TemplateName) -> Result<Importing, Failure> {
    let _changing = inner.builds.changing.lock().await;
    let Some(owner) = inner.owners.of(template.as_str()) else {
        return Ok(inner.builds.import(template.clone()));
    };
    let text = format!("the name {template} is that of a template of the project {}", owner.project);
    Err(Failure::new(ErrorCode::NameTaken, text, "choose another, or have the project delete its template"))
}

/// The end of an import, whatever became of its task.
async fn end_of(importing: &mut JoinHandle<Result<Template, Failure>>) -> Result<Template, Failure> {
    importing.await.unwrap_or_else(|error| {
        let text = "the import was aborted";
        Err(Failure::new(ErrorCode::Aborted, text, "look at the server's log").with_cause(&error))
    })
}

/// An import that somebody listens to.
struct Listening {
    progress: watch::Receiver<Option<ImportProgress>>,
    importing: JoinHandle<Result<Template, Failure>>,
    has_told: bool,
    is_over: bool,
}

impl Listening {
    /// What is to be told next; none when the end was told.
    async fn next(&mut self) -> Option<ImportEvent> {
        if self.is_over {
            return None;
        }
        let (progress, pause) = (&mut self.progress, if self.has_told { PAUSE } else { Duration::ZERO });
        let told = async {
            tokio::time::sleep(pause).await;
            match progress.changed().await {
                Ok(()) => *progress.borrow_and_update(),
                // It is about to end.
                Err(_) => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            biased;
            ended = end_of(&mut self.importing) => ended,
            now = told => {
                self.has_told = true;
                return now.map(ImportEvent::Progress);
            }
        };
        self.is_over = true;
        Some(match ended {
            Ok(template) => ImportEvent::Template(Box::new(template)),
            Err(failure) => ImportEvent::Error(reply::body(&failure)),
        })
    }

    fn reply(self) -> Response {
        let lines = stream::unfold(self, |mut listening| async move {
            let mut line = serde_json::to_vec(&listening.next().await?).unwrap_or_default();
            line.push(b'\n');
            Some((Ok::<_, Infallible>(Bytes::from(line)), listening))
        });
        ([(header::CONTENT_TYPE, IMPORT_EVENTS)], Body::from_stream(lines)).into_response()
    }
}

async fn import(
    State(control): State<Control>,
    Path(name): Path<String>,
    key: Option<Extension<Key>>,
    Extension(audit): Extension<Arc<Audit>>,
    request: Request,
) -> Outcome {
    let is_told = key.is_none() && wants_events(request.headers());
    let request = of(&name, parse_required(&read(request).await?)?)?;
    let reserved = reserve(&control.inner, &request.template).await?;
    let (told, mut progress) = watch::channel(None);
    let (inner, late) = (Arc::clone(&control.inner), Arc::clone(&audit));
    let mut importing = control.inner.tasks.spawn(async move {
        let imported = inner.node.import(request, told).await;
        drop(reserved);
        let status = imported.as_ref().map_or_else(|failure| failure.kind.status(), |_| StatusCode::OK);
        late.end_late(&inner.database, status).await;
        imported
    });
    // What is refused before it begins is refused with its status.
    if is_told && progress.wait_for(Option::is_some).await.is_ok() {
        audit.ends_late();
        progress.mark_changed();
        let listening = Listening { progress, importing, has_told: false, is_over: false };
        return Ok(listening.reply());
    }
    Ok(json(StatusCode::OK, &end_of(&mut importing).await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(rootfs: &str) -> ImportTemplate {
        let name = |name: &str| format!("/files/{name}");
        ImportTemplate {
            rootfs: rootfs.to_owned(),
            kernel: name("kernel"),
            initrd: name("initrd"),
            cpu_count: None,
            memory_mb: None,
        }
    }

    #[test]
    fn a_request_is_checked_before_anything_is_opened() {
        let good = of("base", body("/files/rootfs")).unwrap();
        assert_eq!((good.vcpus, good.memory_mib), (1, DEFAULT_MEMORY));
        for path in ["", "rootfs", "./rootfs", "../rootfs", "/files/\0"] {
            assert_eq!(of("base", body(path)).unwrap_err().error_code, ErrorCode::InvalidFile, "{path:?}");
        }
        for name in ["", "UPPER", "a/b", "../base"] {
            let refused = of(name, body("/files/rootfs")).unwrap_err();
            assert_eq!(refused.error_code, ErrorCode::InvalidName, "{name:?}");
        }
    }

    #[test]
    fn events_come_to_who_asks_for_them() {
        let asked = |text: &'static str| {
            wants_events(&HeaderMap::from_iter([(header::ACCEPT, http::HeaderValue::from_static(text))]))
        };
        assert!(asked("application/x-ndjson"));
        assert!(asked("text/html, Application/X-NDJSON;q=0.5"));
        assert!(!asked("application/json") && !asked("*/*") && !wants_events(&HeaderMap::new()));
    }

    fn progress(done_bytes: u64) -> ImportProgress {
        ImportProgress { stage: kelvin_api::import::ImportStage::Hashing, done_bytes, total_bytes: 10 }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_overtaken_is_not_told_and_the_end_is_told_once() {
        let (told, progress_there) = watch::channel(None);
        let importing = tokio::spawn(async move {
            for done in 1..=10 {
                told.send_replace(Some(progress(done)));
                tokio::time::sleep(PAUSE / 4).await;
            }
            Err(Failure::new(ErrorCode::DiskFull, "full", "free some"))
        });
        let mut listening =
            Listening { progress: progress_there, importing, has_told: false, is_over: false };
        let (mut done, mut last) = (Vec::new(), None);
        while let Some(event) = listening.next().await {
            match event {
                ImportEvent::Progress(progress) => done.push(progress.done_bytes),
                end => assert!(last.replace(end).is_none()),
            }
        }
        assert!(done.is_sorted() && done[0] == 1 && (2..=5).contains(&done.len()), "{done:?}");
        let Some(ImportEvent::Error(error)) = last else { panic!("{last:?}") };
        assert_eq!((error.code, error.error_code.as_deref()), (503, Some("disk_full")));
    }
}
